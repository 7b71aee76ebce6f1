"""Token ids + labels with loss on assistant tokens only; shows the mask to a human.

Labels are computed when tokenising and stored with the tokens, so packing and any
collator keep them. `turns` finds where the assistant speaks. The guards look at every
row before training, not at a sample.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers.formats import DataError, Messages
from helpers.templates import TemplateError, stop_token_ids
from helpers.turns import NO_LOSS, LossOn, Span, find_spans, label_tokens, learnt_spans

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

BATCH = 512  # conversations in memory at a time
NAMED = 20  # rows in a message
Example = dict[str, list[int]]


class Masked(NamedTuple):
    """Tokenised rows and what happened on the way."""

    rows: Dataset
    """`input_ids` and `labels` each, both (seq,); -100 = no loss."""
    dropped: dict[int, str]
    """Conversations that are left out: position and reason."""
    truncated: int
    """How many of the kept rows were cut at `max_length`."""
    supervised_fraction: float
    """Share of the kept tokens that carry loss, 0 to 1."""
    ends: list[int]
    """Tokens of each conversation up to its last supervised one, uncut."""

    def describe_dropped(self) -> str:
        """Returns how many conversations were dropped, why, and which, from 1."""
        rows: dict[str, list[str]] = {}
        for position, reason in self.dropped.items():
            rows.setdefault(reason, []).append(str(position + 1))
        reasons = [
            f"{reason} (rows {', '.join(numbers[:NAMED])}"
            f"{', ...' if len(numbers) > NAMED else ''})"
            for reason, numbers in rows.items()
        ]
        return (
            f"{len(self.dropped)} of {len(self.ends)} conversations are left out: "
            + "; ".join(reasons)
        )

    def counts(self) -> dict[str, Any]:
        """Returns what `labels.json` holds."""
        return {
            "rows": len(self.rows),
            "dropped": len(self.dropped),
            "dropped_rows": [n + 1 for n in [*self.dropped][:NAMED]],
            "truncated": self.truncated,
            "supervised_fraction": self.supervised_fraction,
        }


def mask_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    loss_on: LossOn = "assistant",
    max_length: int | None = None,
) -> Example:
    """Returns `input_ids` and `labels`, both (seq,); -100 = no loss.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        messages: the turns; those of `"weight": 0` are not learnt.
        loss_on: `assistant` supervises every answer and its end-of-turn token, `last`
            only the last answer, `all` every token.
        max_length: tokens past it are cut off.

    Raises:
        TemplateError: see `turns.find_spans`.
    """
    (row,) = tokenise(tokenizer, [find_spans(tokenizer, messages, loss_on)])
    return {name: values[:max_length] for name, values in row.items()}


def tokenise(
    tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, list[Span]]]
) -> list[Example]:
    """Returns the rows of rendered texts, which are given with the spans to learn."""
    encoder = tokenizer.backend_tokenizer
    # an earlier call may have left them on
    encoder.no_truncation()
    encoder.no_padding()
    batch = encoder.encode_batch([text for text, _ in texts], add_special_tokens=False)
    return [
        {"input_ids": e.ids, "labels": label_tokens(e.ids, e.offsets, text, spans)}
        for e, (text, spans) in zip(batch, texts, strict=True)
    ]


def mask_batches(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Iterable[Messages],
    loss_on: LossOn = "assistant",
    drop: bool = False,
) -> Iterator[list[Example | str]]:
    """Yields the rows of `mask_conversation`, many at a time.

    Args:
        tokenizer: see `mask_conversation`.
        conversations: read one after the other.
        loss_on: see `mask_conversation`.
        drop: yield the reason for a conversation that cannot be used.

    Raises:
        TemplateError: a conversation cannot be used; the message names its row.
    """
    remaining, before = iter(conversations), 0
    while batch := list(islice(remaining, BATCH)):
        rows: list[Any] = []
        for number, messages in enumerate(batch, before + 1):
            try:
                rows.append(find_spans(tokenizer, messages, loss_on))
            except TemplateError as error:
                if not drop:
                    raise TemplateError(f"row {number}: {error}") from error
                rows.append(str(error))
        texts = [row for row in rows if not isinstance(row, str)]
        examples = iter(tokenise(tokenizer, texts))
        yield [row if isinstance(row, str) else next(examples) for row in rows]
        before += len(batch)


def mask_conversations(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Iterable[Messages],
    loss_on: LossOn = "assistant",
    max_length: int | None = None,
    file: Path | None = None,
    drop: bool = False,
) -> Masked:
    """Returns the tokenised rows, with what was dropped and cut.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        conversations: read one after the other, so they need not fit in memory.
        loss_on: see `mask_conversation`.
        max_length: tokens past it are cut off.
        file: a new Arrow file for the rows; without it they are kept in memory.
        drop: leave out rows that the template cannot render or ask for; else they are
            an error.

    Raises:
        DataError: no row has a supervised token, or the labels break a guard; the
            message shows one row.
        TemplateError: see `mask_batches`.
    """
    import pyarrow as pa
    from datasets import Dataset

    check_pad(tokenizer)
    kind = pa.list_(pa.int32())
    schema = pa.schema({"input_ids": kind, "labels": kind})
    sink = pa.OSFile(str(file), "wb") if file else pa.BufferOutputStream()
    dropped: dict[int, str] = {}
    ends: list[int] = []
    truncated = tokens = learnt = 0
    first: list[int] = []
    with sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in mask_batches(tokenizer, conversations, loss_on, drop):
            check_rows(tokenizer, batch, loss_on, before=len(ends))
            kept = []
            for row in batch:
                labels = [] if isinstance(row, str) else row["labels"]
                end = max((end for _, end in learnt_spans(labels)), default=0)
                ends.append(end)
                if isinstance(row, str):
                    dropped[len(ends) - 1] = row
                    continue
                first = first or row["input_ids"]
                cut = {name: values[:max_length] for name, values in row.items()}
                count = len(labels[:max_length]) - cut["labels"].count(NO_LOSS)
                if not count:
                    dropped[len(ends) - 1] = (
                        "no answer begins within max_length"
                        if end
                        else "there is no answer to learn"
                    )
                    continue
                kept.append(cut)
                truncated += len(cut["labels"]) < len(labels)
                tokens += len(cut["labels"])
                learnt += count
            columns = [pa.array([row[n] for row in kept], kind) for n in schema.names]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    if not ends:
        raise DataError("no conversations to tokenise; the data is empty")
    if len(dropped) == len(ends):
        cause = "The prompts alone fill max_length: raise it."
        if not any(ends):
            cause = "They have no answer to learn: check the roles of the turns."
        if not first:
            cause = dropped[0]
        raise DataError(
            f"none of {len(ends)} conversations has a token to learn from within "
            f"max_length={max_length}; the first one starts "
            f"{tokenizer.decode(first[:60])!r}. {cause}"
        )
    made = (
        Dataset.from_file(str(file)) if file else Dataset.from_buffer(sink.getvalue())
    )
    fraction = learnt / tokens
    if loss_on != "all" and not 0.01 <= fraction <= 0.99:
        raise DataError(
            f"{fraction:.1%} of the tokens carry loss; 1 % to 99 % is plausible. "
            f"Row 1 learns {supervised_text(tokenizer, made[0])[:200]!r}"
        )
    return Masked(made, dropped, truncated, fraction, ends)


def check_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example | str],
    loss_on: LossOn,
    before: int = 0,
) -> None:
    """Raises DataError when training on these labels would go silently wrong.

    Guards against a doubled BOS, and supervised turns that do not end in a stop token,
    in every row.

    Args:
        tokenizer: what made the tokens.
        rows: some of them may be reasons why there is none.
        loss_on: with `all` turns need no stop token.
        before: number of rows in earlier batches, for the message.

    Raises:
        DataError: a guard is broken; the message names the first row, from 1.
    """
    examples = {n: x for n, x in enumerate(rows, before + 1) if not isinstance(x, str)}
    twice = [tokenizer.bos_token_id] * 2
    doubled = [n for n, row in examples.items() if row["input_ids"][:2] == twice]
    if doubled:
        raise DataError(
            f"{len(doubled)} rows start with {tokenizer.bos_token} twice, the first is "
            f"row {doubled[0]}; the template writes it, so it must not be added again"
        )
    if loss_on == "all":
        return
    stops = stop_token_ids(tokenizer)
    # where a question comes last, the answer before it may end in another token
    closing = {*stops, *tokenizer.added_tokens_decoder}
    ends = [
        (number, row["input_ids"][:end])
        for number, row in examples.items()
        for _, end in learnt_spans(row["labels"])
    ]
    unclosed = [(number, ids) for number, ids in ends if ids[-1] not in closing]
    if unclosed:
        number, ids = unclosed[0]
        raise DataError(
            f"{len(unclosed)} of {len(ends)} answers do not end in a stop token "
            f"({', '.join(tokenizer.convert_ids_to_tokens(stops))}), so the model would "
            f"not learn to stop; the first, in row {number}, ends in "
            f"{tokenizer.decode(ids[-21:])!r}; use a template that ends turns with EOS"
        )


def check_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises DataError when a tokenizer pads with the token that ends answers."""
    eos = tokenizer.eos_token_id
    if eos is not None and tokenizer.pad_token_id == eos:
        raise DataError(
            f"pad and EOS are the same token ({tokenizer.eos_token}): no loss is taken "
            "on padding, so the model would not learn to stop; let "
            "templates.prepare_tokenizer choose another pad token"
        )


def supervised_text(tokenizer: PreTrainedTokenizerBase, row: Example) -> str:
    """Returns the text that a row's loss is taken on, special tokens shown."""
    return tokenizer.decode([label for label in row["labels"] if label != NO_LOSS])


class Shown:
    """A row with its mask, coloured in a notebook, bracketed in a terminal."""

    def __init__(self, pieces: list[tuple[str, bool]], fraction: float) -> None:
        self.pieces, self.fraction = pieces, fraction

    def __repr__(self) -> str:
        marked = "".join(f"[[{t}]]" if learnt else t for t, learnt in self.pieces)
        return f"{marked}\n[[...]] = learnt, {self.fraction:.0%} of the tokens"

    def _repr_html_(self) -> str:
        style = "background:#2e7d3255;border-bottom:2px solid #2e7d32"
        body = "".join(
            f'<span style="{style}">{html.escape(t)}</span>'
            if learnt
            else html.escape(t)
            for t, learnt in self.pieces
        )
        legend = f"underlined = learnt, {self.fraction:.0%} of the tokens"
        return f'<pre style="white-space:pre-wrap">{body}</pre><small>{legend}</small>'


def show(tokenizer: PreTrainedTokenizerBase, row: Example) -> Shown:
    """Returns a view of a row in which the learnt tokens stand out."""
    pieces: list[tuple[list[int], bool]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        learnt = label != NO_LOSS
        if not pieces or pieces[-1][1] != learnt:
            pieces.append(([], learnt))
        pieces[-1][0].append(token)
    fraction = sum(x != NO_LOSS for x in row["labels"]) / max(1, len(row["labels"]))
    return Shown([(tokenizer.decode(ids), learnt) for ids, learnt in pieces], fraction)
