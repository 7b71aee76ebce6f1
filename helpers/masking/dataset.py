"""Token ids and labels of conversations, guarded row by row, and shown to a human.

Labels are computed when tokenising and stored with the tokens, so packing and any
collator keep them.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers.data.formats import Messages
from helpers.data.preparation import store
from helpers.errors import DataError, TemplateError
from helpers.masking.spans import (
    NO_LOSS,
    LossOn,
    Span,
    find_spans,
    label_tokens,
    learnt_spans,
)
from helpers.masking.templates import answer_marks, stop_token_ids

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

BATCH = 512  # conversations in memory at a time
NAMED = 20  # rows in a message
TOO_LONG = "no answer begins within max_length"
NOTHING = "there is no answer to learn"
Example = dict[str, list[int]]


@dataclass
class Masked:
    """Tokenised rows, what was left out, and what was cut."""

    rows: Dataset = None  # type: ignore[assignment]
    """`input_ids` and `labels` each, both (seq,); -100 = no loss."""
    dropped: dict[int, str] = field(default_factory=dict)  # position and reason
    truncated: int = 0  # rows that were cut at `max_length`
    supervised_fraction: float = 0.0  # share of the tokens that carry loss, 0 to 1
    ends: list[int] = field(default_factory=list)
    """Tokens of each conversation up to its last supervised one, uncut."""

    def describe_dropped(self) -> str:
        """Returns how many conversations were dropped, why, and which, from 1."""
        rows: dict[str, list[str]] = {}
        for position, reason in self.dropped.items():
            rows.setdefault(reason, []).append(str(position + 1))
        reasons = [
            f"{reason} (rows {', '.join(n[:NAMED] + ['...'] * (len(n) > NAMED))})"
            for reason, n in rows.items()
        ]
        count = f"{len(self.dropped)} of {len(self.ends)} conversations"
        return f"{count} are left out: {'; '.join(reasons)}"

    def counts(self) -> dict[str, Any]:
        """Returns the figures of `labels.json`."""
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
        TemplateError: see `spans.find_spans`.
    """
    (row,) = tokenise(tokenizer, [find_spans(tokenizer, messages, loss_on)])
    return {name: values[:max_length] for name, values in row.items()}


def tokenise(
    tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, list[Span]]]
) -> list[Example]:
    """Returns the rows of rendered texts, each with the spans to learn."""
    encoder = tokenizer.backend_tokenizer
    encoder.no_truncation()  # an earlier call may have left them on
    encoder.no_padding()
    batch = encoder.encode_batch([text for text, _ in texts], add_special_tokens=False)
    return [
        {"input_ids": row.ids, "labels": label_tokens(row.ids, row.offsets, *text)}
        for row, text in zip(batch, texts, strict=True)
    ]


def mask_batches(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Iterable[Messages],
    loss_on: LossOn = "assistant",
    drop: bool = False,
) -> Iterator[list[Example | str]]:
    """Yields the rows of `mask_conversation`, many at a time.

    With `drop` a reason stands in for each conversation that a template refuses.
    """
    closing = answer_marks(tokenizer)[1] if loss_on != "all" else ""
    numbered = enumerate(conversations, 1)
    # a batch is tokenised while the next one is rendered
    with ThreadPoolExecutor(1) as pool:
        pending: tuple[list[str | None], Future[list[Example]]] | None = None
        while True:
            texts: list[tuple[str, list[Span]]] = []
            reasons: list[str | None] = []
            for number, messages in islice(numbered, BATCH):
                try:
                    texts.append(find_spans(tokenizer, messages, loss_on, closing))
                    reasons.append(None)
                except TemplateError as error:
                    if not drop:
                        raise TemplateError(f"row {number}: {error}") from error
                    reasons.append(str(error))
            following = reasons, pool.submit(tokenise, tokenizer, texts)
            if pending:
                rows = iter(pending[1].result())
                yield [reason or next(rows) for reason in pending[0]]
            pending = following
            if not reasons:
                return


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
        drop: leave out conversations that `spans.find_spans` refuses.

    Raises:
        DataError: no row has a supervised token, or the labels break a guard; the
            message shows one row.
        TemplateError: see `mask_batches`.
    """
    import pyarrow as pa

    eos = tokenizer.eos_token_id
    if eos is not None and tokenizer.pad_token_id == eos:
        raise DataError(
            f"pad and EOS are the same token ({tokenizer.eos_token}): stopping would "
            "not be learnt; templates.prepare_tokenizer chooses another pad token"
        )
    masked = Masked()
    dropped, ends = masked.dropped, masked.ends
    first: list[int] = []
    tokens = learnt = 0

    def cut() -> Iterator[list[Example]]:
        nonlocal first, tokens, learnt
        for batch in mask_batches(tokenizer, conversations, loss_on, drop):
            before = len(ends)
            ends.extend(check_rows(tokenizer, batch, loss_on, before))
            rows = []
            for number, row in enumerate(batch, before):
                if isinstance(row, str):
                    dropped[number] = row
                    continue
                first = first or row["input_ids"][:60]
                labels = row["labels"][:max_length]
                count = len(labels) - labels.count(NO_LOSS)
                if not count:
                    dropped[number] = TOO_LONG if ends[number] else NOTHING
                    continue
                ids = row["input_ids"][:max_length]
                rows.append({"input_ids": ids, "labels": labels})
                masked.truncated += len(labels) < len(row["labels"])
                tokens, learnt = tokens + len(labels), learnt + count
            yield rows

    kind = pa.list_(pa.int32())
    schema = pa.schema({"input_ids": kind, "labels": kind})
    masked.rows = store(cut(), schema, file)
    if not ends:
        raise DataError("no conversations to tokenise; the data is empty")
    if len(dropped) == len(ends):
        cause = f"{dropped[0]}."
        if TOO_LONG in dropped.values():
            cause = "The prompts alone fill max_length: raise it."
        elif NOTHING in dropped.values():
            cause = "They have no answer to learn: check the roles of the turns."
        raise DataError(
            f"none of {len(ends)} conversations has a token to learn from within "
            f"{max_length=}; the first one starts {tokenizer.decode(first)!r}. {cause}"
        )
    masked.supervised_fraction = learnt / tokens
    if loss_on != "all" and not 0.01 <= masked.supervised_fraction <= 0.99:
        text = supervised_text(tokenizer, masked.rows[0])[:200]
        raise DataError(
            f"{masked.supervised_fraction:.1%} of the tokens carry loss; 1 % to 99 % "
            f"is plausible. Row 1 learns {text!r}"
        )
    return masked


def check_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example | str],
    loss_on: LossOn,
    before: int = 0,
) -> list[int]:
    """Returns the number of tokens up to the last learnt one of each row.

    Refuses a doubled BOS, and (but with `all`) learnt turns that do not end in a stop
    token. `before` is the number of rows in earlier batches.
    """
    stops = stop_token_ids(tokenizer)
    # where a question comes last, the answer before it may end in another token
    closing = {*stops, *tokenizer.added_tokens_decoder}
    spans = [[] if isinstance(x, str) else learnt_spans(x["labels"]) for x in rows]
    doubled, unclosed = list[int](), list[tuple[int, list[int]]]()
    for number, row in enumerate(rows):
        ids = [] if isinstance(row, str) else row["input_ids"]
        if ids[:2] == [tokenizer.bos_token_id] * 2:
            doubled.append(before + number + 1)
        for _, end in spans[number] if loss_on != "all" else ():
            if ids[end - 1] not in closing:
                unclosed.append((before + number + 1, ids[max(0, end - 21) : end]))
    if doubled:
        raise DataError(
            f"{len(doubled)} rows start with {tokenizer.bos_token} twice, the first is "
            f"row {doubled[0]}; the template writes it, so it must not be added again"
        )
    if unclosed:
        number, ids = unclosed[0]
        names = ", ".join(tokenizer.convert_ids_to_tokens(stops))
        raise DataError(
            f"{len(unclosed)} of {sum(map(len, spans))} answers do not end in a stop "
            f"token ({names}), so the model would not learn to stop; the first, in row "
            f"{number}, ends in {tokenizer.decode(ids)!r}; use a template that ends "
            "turns with EOS"
        )
    return [row[-1][1] if row else 0 for row in spans]


def supervised_text(tokenizer: PreTrainedTokenizerBase, row: Example) -> str:
    """Returns the text that a row's loss is taken on, special tokens shown."""
    return tokenizer.decode([label for label in row["labels"] if label != NO_LOSS])


class Shown(NamedTuple):
    """A row with its mask, coloured in a notebook, bracketed in a terminal."""

    pieces: list[tuple[str, bool]]
    """Text, and whether it is learnt."""
    fraction: float

    def __repr__(self) -> str:
        marked = "".join(f"[[{t}]]" if learnt else t for t, learnt in self.pieces)
        return f"{marked}\n[[...]] = learnt, {self.fraction:.0%} of the tokens"

    def _repr_html_(self) -> str:
        style = "background:#2e7d3255;border-bottom:2px solid #2e7d32"
        tags = {True: (f'<span style="{style}">', "</span>"), False: ("", "")}
        body = "".join(html.escape(t).join(tags[learnt]) for t, learnt in self.pieces)
        legend = f"underlined = learnt, {self.fraction:.0%} of the tokens"
        return f'<pre style="white-space:pre-wrap">{body}</pre><small>{legend}</small>'


def show(tokenizer: PreTrainedTokenizerBase, row: Example) -> Shown:
    """Returns a view of a row in which the learnt tokens stand out."""
    pairs = list(zip(row["input_ids"], row["labels"], strict=True))
    pieces = [
        (tokenizer.decode([token for token, _ in run]), learnt)
        for learnt, run in groupby(pairs, lambda pair: pair[1] != NO_LOSS)
    ]
    fraction = sum(label != NO_LOSS for _, label in pairs) / max(1, len(pairs))
    return Shown(pieces, fraction)
