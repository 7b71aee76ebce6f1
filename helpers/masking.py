"""Token ids + labels with loss on assistant tokens only; shows the mask to a human.

Labels are computed when tokenising and stored with the tokens, so packing and any
collator keep them. No hand-written markers: `turns` finds where the assistant speaks.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Literal, NamedTuple

from helpers.formats import DataError, Messages
from helpers.templates import render, stop_token_ids
from helpers.turns import find_answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LOSS = -100
LossOn = Literal["all", "assistant", "last"]
Example = dict[str, list[int]]


class Masked(NamedTuple):
    """Tokenised rows and what happened on the way."""

    rows: list[Example]
    """`input_ids` and `labels` each, both (seq,); -100 = no loss."""
    dropped: list[int]
    """Positions of conversations with no supervised token left after truncation."""
    truncated: int
    """How many of the kept rows were cut at `max_length`."""
    supervised_fraction: float
    """Share of the kept tokens that carry loss, 0 to 1."""
    ends: list[int]
    """Tokens of each conversation up to its last supervised one, uncut."""


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
    if loss_on == "all":
        text = render(tokenizer, messages)
        spans = [(0, len(text))]
    else:
        text, spans = find_answers(tokenizer, messages, last_only=loss_on == "last")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    labels = [NO_LOSS] * len(ids)
    span = iter(spans)
    start, end = next(span, (len(text), len(text)))
    before = 0
    for position, (left, right) in enumerate(encoded["offset_mapping"]):
        left, before = min(left, before), right  # some tokenizers leave out spaces
        while left >= end and end < len(text):
            start, end = next(span, (len(text), len(text)))
        # an end-of-turn token may take the white space after it with it
        if start <= left < end and not text[end:right].strip():
            labels[position] = ids[position]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def mask_conversations(
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[Messages],
    loss_on: LossOn = "assistant",
    max_length: int | None = None,
) -> Masked:
    """Returns the tokenised rows, with what was dropped and cut.

    Raises:
        DataError: no row has a supervised token, or the labels break a guard of
            `check_rows`; the message shows one row.
        TemplateError: see `mask_conversation`.
    """
    if not conversations:
        raise DataError("no conversations to tokenise; the data is empty")
    rows, ends, dropped, truncated = [], [], [], 0
    for number, messages in enumerate(conversations):
        row = mask_conversation(tokenizer, messages, loss_on)
        cut = {name: ids[:max_length] for name, ids in row.items()}
        learnt = (i for i, label in enumerate(row["labels"], 1) if label != NO_LOSS)
        ends.append(max(learnt, default=0))
        if all(label == NO_LOSS for label in cut["labels"]):
            dropped.append(number)
            continue
        truncated += len(cut["labels"]) < len(row["labels"])
        rows.append(cut)
    if not rows:
        shown = tokenizer.decode(row["input_ids"][:60])
        raise DataError(
            f"none of {len(conversations)} conversations has a token to learn from "
            f"within max_length={max_length}; the first tokens of the last one are "
            f"{shown!r}. The prompts alone fill max_length: raise it."
        )
    tokens = sum(len(row["labels"]) for row in rows)
    supervised = sum(sum(x != NO_LOSS for x in row["labels"]) for row in rows)
    fraction = supervised / tokens
    check_rows(tokenizer, rows, loss_on, fraction, truncated)
    return Masked(rows, dropped, truncated, fraction, ends)


def check_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Example],
    loss_on: LossOn,
    fraction: float,
    truncated: int,
) -> None:
    """Raises DataError when training on these labels would go silently wrong.

    Guards against a doubled BOS, answers that do not end in a stop token, and a
    supervised share outside 1 % to 99 %.
    """
    bos = tokenizer.bos_token_id
    first = rows[0]["input_ids"]
    if bos is not None and first[:2] == [bos, bos]:
        raise DataError(f"the rows start with {tokenizer.bos_token} twice")
    if loss_on == "all":
        return
    if not 0.01 <= fraction <= 0.99:
        raise DataError(
            f"{fraction:.1%} of the tokens carry loss; 1 % to 99 % is plausible. "
            f"Row 1 learns {supervised_text(tokenizer, rows[0])[:200]!r}"
        )
    stops = set(stop_token_ids(tokenizer))
    # where a question comes last, the answer before it may end in another token
    ends = stops | set(tokenizer.added_tokens_decoder)
    learnt = [[x for x in row["labels"] if x != NO_LOSS][-1] for row in rows]
    open_ended = sum(last not in ends for last in learnt)
    if open_ended > truncated:
        raise DataError(
            f"{open_ended} of {len(rows)} rows do not end in a stop token "
            f"({', '.join(tokenizer.convert_ids_to_tokens(sorted(stops)))}), so the "
            "model would not learn to stop; use a template that ends turns with EOS"
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
