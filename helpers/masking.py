"""Token ids + labels with loss on assistant tokens only; shows the mask to a human.

Labels are computed when tokenising and stored with the tokens, so packing and any
collator keep them. No hand-written markers: `turns` finds where the assistant speaks.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from helpers.blocks import Block, check_block, check_pad
from helpers.formats import DataError, Messages
from helpers.frames import Example, Frames, Rows
from helpers.turns import NO_LOSS, LossOn, find_spans, label_tokens
from helpers.words import find_cuts

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

BLOCK = 1024  # conversations in memory at a time
NAMED = 20  # rows in a message


class Masked(NamedTuple):
    """Tokenised rows and what happened on the way."""

    rows: Dataset
    """`input_ids` and `labels` each, both (seq,); -100 = no loss."""
    dropped: list[int]
    """Positions of conversations with no supervised token left after truncation."""
    truncated: int
    """How many of the kept rows were cut at `max_length`."""
    supervised_fraction: float
    """Share of the kept tokens that carry loss, 0 to 1."""
    ends: list[int]
    """Tokens of each conversation up to its last supervised one, uncut."""

    def describe_dropped(self) -> str:
        """Returns how many conversations were dropped, and which, counted from 1."""
        named = ", ".join(str(n + 1) for n in self.dropped[:NAMED])
        more = ", ..." if len(self.dropped) > NAMED else ""
        return (
            f"{len(self.dropped)} of {len(self.ends)} conversations are left out, none "
            f"of their answers begins within max_length (rows {named}{more})"
        )

    def counts(self) -> dict[str, Any]:
        """Returns what `labels.json` holds."""
        return {
            "rows": len(self.rows),
            "dropped": len(self.dropped),
            "dropped_rows": [n + 1 for n in self.dropped[:NAMED]],
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
        messages: the turns.
        loss_on: `assistant` supervises every answer and its end-of-turn token, `last`
            only the last answer, `all` every token.
        max_length: tokens past it are cut off.

    Raises:
        TemplateError: the template refuses the conversation or leaves out text of an
            answer.
    """
    text, spans = find_spans(tokenizer, messages, loss_on)
    found = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    ids = found["input_ids"]
    labels = label_tokens(ids, found["offset_mapping"], text, spans)
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def mask_rows(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Iterable[Messages],
    loss_on: LossOn = "assistant",
) -> Iterator[Rows]:
    """Yields the rows of `mask_conversation`, many at a time and many times faster.

    Raises:
        TemplateError: see `mask_conversation`.
    """
    whole = partial(mask_conversation, tokenizer, loss_on=loss_on)
    cuts = find_cuts(tokenizer)
    frames = Frames(tokenizer, loss_on, cuts, whole) if cuts else None
    remaining = iter(conversations)
    while block := list(islice(remaining, BLOCK)):
        yield (
            frames.rows(frames.lay(block))
            if frames
            else Rows.of(list(map(whole, block)))
        )


def mask_conversations(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Iterable[Messages],
    loss_on: LossOn = "assistant",
    max_length: int | None = None,
    file: Path | None = None,
) -> Masked:
    """Returns the tokenised rows, with what was dropped and cut.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        conversations: read one after the other, so they need not fit in memory.
        loss_on: see `mask_conversation`.
        max_length: tokens past it are cut off.
        file: a new Arrow file for the rows; without it they are kept in memory.

    Raises:
        DataError: no row has a supervised token, or the labels break a guard; the
            message shows one row.
        TemplateError: see `mask_conversation`.
    """
    import pyarrow as pa
    from datasets import Dataset

    check_pad(tokenizer)
    kind = pa.list_(pa.int32())
    schema = pa.schema({"input_ids": kind, "labels": kind})
    sink = pa.OSFile(str(file), "wb") if file else pa.BufferOutputStream()
    dropped: list[int] = []
    ends: list[int] = []
    truncated = tokens = learnt = 0
    shown = ""
    with sink, pa.ipc.new_stream(sink, schema) as writer:
        for rows in mask_rows(tokenizer, conversations, loss_on):
            block = Block(rows, max_length)
            check_block(tokenizer, block, loss_on, before=len(ends))
            dropped += [len(ends) + int(n) for n in np.flatnonzero(~block.kept)]
            ends += block.ends.tolist()
            truncated += int(block.cut.sum())
            tokens += len(block.left[0])
            learnt += int((block.left[1] != NO_LOSS).sum())
            shown = shown or tokenizer.decode(block.ids[:60].tolist())
            writer.write_batch(block.batch(schema))
    if not ends:
        raise DataError("no conversations to tokenise; the data is empty")
    if len(dropped) == len(ends):
        cause = "The prompts alone fill max_length: raise it."
        if not any(ends):
            cause = "They have no answer: check the roles of the turns."
        raise DataError(
            f"none of {len(ends)} conversations has a token to learn from within "
            f"max_length={max_length}; the first one starts {shown!r}. {cause}"
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
