"""Conversations tokenised quickly: the template's text once, the contents by words.

What a template writes around the contents depends on the roles alone for nearly all
conversations. A frame is that text with its labels, for one sequence of roles. It is
used where it gives, filled with the contents, the very text that the template renders;
the other conversations are tokenised whole. The rows are the same either way.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from helpers.formats import Messages
from helpers.templates import TemplateError, answer_marks, render
from helpers.turns import FIRST, LAST, NO_LOSS, LossOn, find_spans
from helpers.words import BETWEEN, FIXED, WORD, Cuts, Words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_KEPT = 10_000  # frames
CONTENT = re.compile(f"([{chr(FIRST)}-{chr(LAST)}])")
Example = dict[str, list[int]]


class Rows(NamedTuple):
    """Tokenised conversations, one after the other."""

    ids: np.ndarray
    """Token ids of all, int32 of (tokens,)."""
    labels: np.ndarray
    """The same, -100 = no loss, int32 of (tokens,)."""
    lengths: np.ndarray
    """Tokens of each, (rows,)."""

    @classmethod
    def of(cls, examples: list[Example]) -> Rows:
        """Returns rows that are given as `input_ids` and `labels` each."""
        ids, labels = (
            np.array([x for row in examples for x in row[name]], np.int32)
            for name in ("input_ids", "labels")
        )
        return cls(ids, labels, np.array([len(row["input_ids"]) for row in examples]))

    @classmethod
    def join(cls, rows: list[Rows]) -> Rows:
        """Returns rows one after the other."""
        return cls(*map(np.concatenate, zip(*rows, strict=True)))

    def split(self) -> list[Rows]:
        """Returns each row by itself."""
        ends = np.cumsum(self.lengths)[:-1]
        parts = np.split(self.ids, ends), np.split(self.labels, ends)
        return list(map(Rows, *parts, self.lengths[:, None]))

    def examples(self) -> list[Example]:
        """Returns the rows as `input_ids` and `labels` each."""
        return [
            {"input_ids": row.ids.tolist(), "labels": row.labels.tolist()}
            for row in self.split()
        ]


class Place(NamedTuple):
    """Where a content stands in a frame."""

    piece: int
    """Which piece it is."""
    before: str
    """What stands before it, as part of its first word."""
    after: str
    """What stands behind it, as part of its last word."""


class Frame(NamedTuple):
    """What a template writes around the contents of one sequence of roles."""

    around: list[str]
    """The text before, between and after the contents."""
    pieces: list[str]
    """The same in pieces of which all is learnt or nothing; contents are left out."""
    learnt: list[bool]
    """Which pieces are."""
    places: list[Place]
    """Of the contents, in order."""


class Laid(NamedTuple):
    """Conversations in their frames."""

    block: list[Messages]
    pieces: list[str]
    """Of all conversations, with `BETWEEN` between words."""
    learnt: list[bool]
    """Which pieces are."""
    counts: list[int]
    """Pieces of each conversation, 0 where no frame fits."""


class Frames:
    """The rows of conversations, from the frames and words seen so far.

    Args:
        tokenizer: with a chat template.
        loss_on: see `masking.mask_conversation`.
        cuts: of the tokenizer.
        whole: makes the row of a conversation that no frame fits.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        loss_on: LossOn,
        cuts: Cuts,
        whole: Callable[[Messages], Example],
    ) -> None:
        self.tokenizer, self.loss_on = tokenizer, loss_on
        self.cuts, self.whole = cuts, whole
        self.special = re.compile("|".join(map(re.escape, cuts.special)))
        self.frames: dict[tuple[str, ...], Frame | None] = {}
        self.words = Words(tokenizer, cuts.special[0])

    def lay(self, block: list[Messages]) -> Laid:
        """Returns conversations in their frames."""
        laid = Laid(block, [], [], [])
        for messages in block:
            contents = [message["content"] for message in messages]
            frame = self.fit(messages, contents)
            if frame is None:
                laid.counts.append(0)
                continue
            pieces = frame.pieces.copy()
            for (piece, before, after), text in zip(
                frame.places, contents, strict=True
            ):
                pieces[piece] = before + self.cuts.apart(text) + after
            laid.pieces.extend(pieces)
            laid.learnt.extend(frame.learnt)
            laid.counts.append(len(pieces))
        return laid

    def fit(self, messages: Messages, contents: list[str]) -> Frame | None:
        """Returns the frame that a conversation fits, None if there is none."""
        roles = tuple([message["role"] for message in messages])
        if roles not in self.frames:
            if len(self.frames) >= MAX_KEPT:
                self.frames.clear()
            self.frames[roles] = self.build(roles)
        frame = self.frames[roles]
        if frame is None or any(not x or x.strip() != x for x in contents):
            return None
        filled = zip_longest(frame.around, contents, fillvalue="")
        text = "".join(chain.from_iterable(filled))
        odd = BETWEEN in text or FIXED in text
        return None if odd or render(self.tokenizer, messages) != text else frame

    def rows(self, laid: Laid) -> Rows:
        """Returns the rows of conversations, from `lay`."""
        import pyarrow as pa
        from pyarrow import compute

        words = compute.split_pattern(pa.array(laid.pieces, pa.large_string()), BETWEEN)
        coded = words.flatten().dictionary_encode()
        known = self.words.find(
            coded.dictionary.to_numpy(zero_copy_only=False).tolist()
        )
        numbers = known[coded.indices.to_numpy()]
        ids, ends = self.words.join(numbers)
        bounds = np.append(0, ends)[words.offsets.to_numpy()]  # of the pieces
        learnt = np.repeat(np.array(laid.learnt, bool), np.diff(bounds))
        labels = np.where(learnt, ids, np.int32(NO_LOSS))
        firsts = np.cumsum([0, *laid.counts])  # pieces of the conversations
        rows = Rows(ids, labels, np.diff(bounds[firsts]))
        odd = np.append(0, np.cumsum(numbers == 0))[words.offsets.to_numpy()[firsts]]
        unfit = np.flatnonzero((np.diff(odd) > 0) | (np.array(laid.counts) == 0))
        if not len(unfit):
            return rows
        each = rows.split()
        for number in unfit:
            each[number] = Rows.of([self.whole(laid.block[number])])
        return Rows.join(each)

    def build(self, roles: tuple[str, ...]) -> Frame | None:
        """Returns the frame of a sequence of roles, None where the contents decide.

        The template is rendered with one character in place of each content.
        """
        drawn = [{"role": r, "content": chr(FIRST + n)} for n, r in enumerate(roles)]
        try:
            text, spans = find_spans(self.tokenizer, drawn, self.loss_on)
            opening, _ = answer_marks(self.tokenizer)
        except TemplateError:
            return None
        around = CONTENT.split(text)
        if around[1::2] != [message["content"] for message in drawn]:
            return None
        opened = all(text.endswith(opening, 0, start) for start, _ in spans)
        if self.loss_on != "all" and opening.strip() and not opened:
            return None
        edges = self.edges(text)
        if not edges.issuperset(chain.from_iterable(spans)):
            return None
        frame = Frame(around[::2], [], [], [])
        ordered = sorted(edges)
        for start, end in zip(ordered, ordered[1:], strict=False):
            learnt = any(a <= start < b for a, b in spans)
            before, *content = CONTENT.split(text[start:end])
            if content:
                if len(content) > 2 or not WORD.fullmatch(f"{before}x{content[1]}"):
                    return None
                frame.places.append(Place(len(frame.pieces), before, content[1]))
            elif frame.pieces and frame.pieces[-1] and frame.learnt[-1] == learnt:
                frame.pieces[-1] += before
                continue
            frame.pieces.append("" if content else FIXED + before)
            frame.learnt.append(learnt)
        return frame

    def edges(self, text: str) -> set[int]:
        """Returns where the text of a frame may be cut."""
        ends = [match.span() for match in self.special.finditer(text)]
        edges = {0, len(text), *chain.from_iterable(ends)}
        last = 0
        for start, end in [*ends, (len(text), len(text))]:
            found = self.cuts.pattern.finditer(text[last:start])
            edges.update(last + match.start() for match in found)
            last = end
        return edges
