"""How two masks of a conversation differ, in words.

A difference is told by where it lies. A cause is given only where the text, the tokens
or the other side's markers bear it out; an unexplained difference is an error.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.chats import SPECIAL, THOUGHT, Messages  # noqa: E402
from benchmarks.oracle import NO_LOSS, Answer, Span  # noqa: E402

# The parts of an answer's turn, by what they end before.
PLACES = {
    "begin": "header",
    "first": "opening",
    "last": "answer",
    "end": "end",
    "following": "after",
}


class Row(NamedTuple):
    """One conversation under one template."""

    messages: Messages
    text: str
    ids: list[int]
    spans: list[Span]
    answers: list[Answer]
    ours: dict[str, list[int]]
    """What `masking` makes of it."""


class Theirs(NamedTuple):
    """Whose labels are compared with ours, and what they go by."""

    question: str = ""
    """The marker that opens a question; empty where there are none."""
    answer: str = ""
    eos: str = ""


def describe(row: Row, ours: list[int], theirs: list[int], whose: Theirs) -> set[str]:
    """Returns the ways in which labels differ, in words that were borne out.

    Raises:
        ValueError: there is a difference that nothing here explains.
    """
    groups: dict[tuple[int, str, bool], list[Span]] = {}
    for mine, other, (start, end) in zip(ours, theirs, row.spans, strict=True):
        if mine != other:
            number, place = find_place(row, start)
            groups.setdefault((number, place, mine == NO_LOSS), []).append((start, end))
    ways = set()
    for (number, place, more), spans in groups.items():
        answer = row.answers[number]
        if more:
            way = explain_more(row, answer, place, spans, whose)
        else:
            learnt = [x != NO_LOSS for x in theirs]
            inside = [answer.begin <= a and b <= answer.end for a, b in row.spans]
            silent = not any(x and y for x, y in zip(learnt, inside, strict=True))
            way = explain_less(row, answer, place, spans, whose, silent)
        ways.add(way)
    return ways


def find_place(row: Row, position: int) -> tuple[int, str]:
    """Returns the number of an answer and the part of its turn that a character is in.

    Text of a question belongs to the answer before it; see PLACES for the parts.
    """
    for number, answer in enumerate(row.answers):
        if position < answer.previous:
            return max(0, number - 1), "question"
        for part, name in PLACES.items():
            if position < getattr(answer, part):
                return number, name
    return len(row.answers) - 1, "question"


def explain_more(
    row: Row, answer: Answer, place: str, spans: list[Span], whose: Theirs
) -> str:
    """Returns what else is learnt, and why, in words."""
    start, stop = spans[0][0], spans[-1][1]
    text = row.text[start:stop]
    asked = [m["content"] for m in row.messages if m["role"] == "user"]
    runs_on = place in ("question", "after") or start == answer.previous
    if whose.answer and runs_on:
        if any(whose.answer.strip() in content for content in asked):
            return "learns on from a marker in a question"
        passed = whose.question.strip() in row.text[row.answers[0].end : stop]
        if passed and any(content[0].isspace() for content in asked):
            return "learns on over a question that begins with white space"
    if place == "header" and spans[0][1] > answer.begin:
        return "learns a token that header and answer share"
    if place == "header":
        before = row.text[answer.previous : start].rstrip()
        why = ""
        if whose.answer.endswith(text):
            why = ", which is other tokens than in its marker"
        elif whose.answer and before.endswith(whose.answer.strip()):
            why = ", before which its marker ends"
        if why or not whose.answer:
            return f"learns {text!r} of the header{why}"
    if place == "after" and whose.eos in row.text[answer.last : answer.end]:
        return f"learns {text!r} after the end of the turn"
    if place == "after" and not text.strip():
        return f"learns {text!r} after the end of the turn, which is not EOS"
    raise ValueError(f"learns {text!r} in {place}, unexplained, in {row.text!r}")


def explain_less(
    row: Row, answer: Answer, place: str, spans: list[Span], whose: Theirs, silent: bool
) -> str:
    """Returns what is not learnt, and why, in words; `silent`: nothing of an answer."""
    start, stop = spans[0][0], spans[-1][1]
    text = row.text[start:stop]
    if silent and row.text[answer.begin].isspace():
        return "learns no answer that begins with white space"
    within = SPECIAL.findall(row.text, answer.first, min(stop, answer.last))
    if place in ("answer", "end") and set(within).difference(THOUGHT):
        return "stops at a marker in an answer"
    if whose.question in row.text[answer.begin - 1 : start + len(whose.question)]:
        if whose.question:
            return f"stops where its marker {whose.question!r} begins"
    if place == "opening" and text.strip() in whose.answer:
        return f"does not learn {text!r} before the answer, which its marker holds"
    if (
        place == "answer"
        and start == answer.last - 1
        and len(row.text[start].encode()) > 1
    ):
        return "does not learn every byte of an answer's last character"
    raise ValueError(
        f"does not learn {text!r} in {place}, unexplained, in {row.text!r}"
    )
