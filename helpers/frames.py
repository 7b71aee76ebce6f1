"""Conversations tokenised quickly: the template's text once, the contents by words.

What a template writes around the contents depends on the roles alone for nearly all
conversations. A frame is that text with its labels, for one sequence of roles. It is
used where it gives, filled with the contents, the very text that the template renders;
`masking` tokenises the other conversations whole. The rows are the same either way.
"""

from __future__ import annotations

import re
import warnings
from array import array
from collections.abc import Iterator
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, NamedTuple

from helpers.formats import Messages
from helpers.templates import TemplateError, answer_marks, render
from helpers.turns import FIRST, LAST, NO_LOSS, LossOn, Span, find_spans, label_tokens
from helpers.words import CUT, WORD, Run, Words, cut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_KEPT = 10_000  # frames, and beginnings of words that are learnt in part
CONTENT = re.compile(f"([{chr(FIRST)}-{chr(LAST)}])")
NOT_LEARNT = array("i", [NO_LOSS]).tobytes()

Row = tuple[bytes, bytes]
"""Token ids and labels, int32 each."""


class Gap(NamedTuple):
    """What lies between two special tokens: texts, and turns whose content it holds."""

    unlearnt: list[str | int]
    learnt: list[str | int]
    """What follows, as far as the next special token."""


class Frame(NamedTuple):
    """What a template writes around the contents of one sequence of roles."""

    around: list[str]
    """The text before, between and after the contents."""
    parts: list[Row | Gap]
    """The same with the contents, in order."""


class Stretch(NamedTuple):
    """The text of a gap, as words."""

    unlearnt: Run
    joint: tuple[str, int] | None
    """The word that both parts share, if they do, and how much of it is not learnt."""
    learnt: Run
    words: Words
    """Where the words are kept."""


class Frames:
    """The rows of conversations, from the frames and words seen so far."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn, cuts: list[str]
    ) -> None:
        self.tokenizer, self.loss_on = tokenizer, loss_on
        self.special = re.compile("|".join(map(re.escape, cuts)))
        self.frames: dict[tuple[str, ...], Frame | None] = {}
        self.words, self.spaced = Words(tokenizer, cuts[0]), Words(tokenizer, cuts[0])
        self.heads: dict[str, bytes] = {}

    def rows(self, block: list[Messages]) -> list[Row | None]:
        """Returns the row of each conversation, None where no frame fits."""
        laid = [self.lay(messages) for messages in block]
        parts = chain.from_iterable(filter(None, laid))
        self.learn([part for part in parts if isinstance(part, Stretch)])
        return [self.put_together(parts) if parts else None for parts in laid]

    def lay(self, messages: Messages) -> list[Row | Stretch] | None:
        """Returns a conversation in its frame, None if it does not fit."""
        roles = tuple(message["role"] for message in messages)
        if roles not in self.frames:
            if len(self.frames) >= MAX_KEPT:
                self.frames.clear()
            self.frames[roles] = self.build(roles)
        frame = self.frames[roles]
        contents = [message["content"] for message in messages]
        if frame is None or any(not x or x.strip() != x for x in contents):
            return None
        filled = zip_longest(frame.around, contents, fillvalue="")
        if render(self.tokenizer, messages) != "".join(chain.from_iterable(filled)):
            return None

        def fill(atoms: list[str | int]) -> str:
            return "".join(contents[x] if isinstance(x, int) else x for x in atoms)

        return [
            self.stretch(fill(p.unlearnt), fill(p.learnt)) if isinstance(p, Gap) else p
            for p in frame.parts
        ]

    def stretch(self, unlearnt: str, learnt: str) -> Stretch:
        """Returns the words of a text of two parts, either of which may be empty."""
        for words, cutter in ((self.words, cut), (self.spaced, CUT.split)):
            before = cutter(unlearnt) if unlearnt else []
            after = cutter(learnt) if learnt else []
            joint = None
            if before and after:
                start = before.pop()
                joint = start + after.pop(0), len(start)
            found = words.run(before), words.run(after)
            new = [word for run in found for _, word in run.unknown]
            if joint:
                new.append(joint[0])
            if words is self.spaced or all(map(WORD.fullmatch, new)):
                break
        return Stretch(found[0], joint, found[1], words)

    def build(self, roles: tuple[str, ...]) -> Frame | None:
        """Returns the frame of a sequence of roles, None where the contents decide.

        The template is rendered with one character in place of each content.
        """
        drawn = [{"role": r, "content": chr(FIRST + n)} for n, r in enumerate(roles)]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # `opened` finds what is warned of
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
        parts: list[Row | Gap] = []
        for start, end in self.stretches(text):
            inside = [(max(a, start) - start, min(b, end) - start) for a, b in spans]
            inside = [(a, b) for a, b in inside if a < b]
            if not CONTENT.search(text, start, end):
                parts += self.label([text[start:end]], [inside])
                continue
            if len(inside) > 1 or any(b < end - start for _, b in inside):
                return None
            learnt = start + inside[0][0] if inside else end
            parts.append(Gap(atoms(text[start:learnt]), atoms(text[learnt:end])))
        return Frame(around[::2], parts)

    def stretches(self, text: str) -> Iterator[Span]:
        """Yields what lies between special tokens and holds contents, and the rest."""
        fixed, last = 0, 0
        ends = [match.span() for match in self.special.finditer(text)]
        for start, end in [*ends, (len(text), len(text))]:
            if CONTENT.search(text, last, start):
                if fixed < last:
                    yield fixed, last
                yield last, start
                fixed = start
            last = end
        if fixed < last:
            yield fixed, last

    def label(self, texts: list[str], spans: list[list[Span]]) -> list[Row]:
        """Returns the rows of texts that are learnt within spans."""
        found = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        every = zip(found.input_ids, found.offset_mapping, texts, spans, strict=True)
        return [as_row(ids, label_tokens(ids, *rest)) for ids, *rest in every]

    def learn(self, stretches: list[Stretch]) -> None:
        """Has the words tokenised that are not yet known."""
        for words in (self.words, self.spaced):
            mine = [s for s in stretches if s.words is words]
            runs = chain.from_iterable((s.unlearnt, s.learnt) for s in mine)
            new = {word for run in runs for _, word in run.unknown}
            words.learn(new.union(s.joint[0] for s in mine if s.joint))

    def label_joint(self, word: str, edge: int, ids: bytes) -> bytes:
        """Returns the labels of a word that is learnt from a place in it on."""
        if len(self.heads) >= MAX_KEPT:
            self.heads.clear()
        start = word[:edge]
        if start not in self.heads:
            self.heads[start] = self.label([start], [[]])[0][0]
        head = self.heads[start]
        if ids.startswith(head):  # then the rest are the tokens of the rest
            return NOT_LEARNT * (len(head) // 4) + ids[len(head) :]
        return self.label([word], [[(edge, len(word))]])[0][1]

    def put_together(self, parts: list[Row | Stretch]) -> Row:
        """Returns the row of a conversation whose words are known."""
        ids, labels = [], []
        for part in parts:
            if not isinstance(part, Stretch):
                ids.append(part[0])
                labels.append(part[1])
                continue
            unlearnt = part.unlearnt.joined(part.words)
            learnt = part.learnt.joined(part.words)
            ids.append(unlearnt)
            labels.append(NOT_LEARNT * (len(unlearnt) // 4))
            if part.joint:
                word, edge = part.joint
                ids.append(part.words.ids[word])
                labels.append(self.label_joint(word, edge, ids[-1]))
            ids.append(learnt)
            labels.append(learnt)
        return b"".join(ids), b"".join(labels)


def atoms(text: str) -> list[str | int]:
    """Returns a text with contents as its texts and the contents' numbers.

    >>> atoms("user\\n\\U000f0001 ")
    ['user\\n', 1, ' ']
    """
    pieces = filter(None, CONTENT.split(text))
    return [ord(x) - FIRST if CONTENT.match(x) else x for x in pieces]


def as_row(input_ids: list[int], labels: list[int]) -> Row:
    """Returns token ids and labels as bytes of int32."""
    return array("i", input_ids).tobytes(), array("i", labels).tobytes()
