"""Puts conversations on sides by what they ask, and finds questions on two sides."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from itertools import accumulate

from helpers.errors import DataError


def normal(question: str) -> str:
    """Returns a question as it is compared: white space does not count."""
    return " ".join(question.split())


def place_of(question: str) -> float:
    """Returns a number from 0 to 1 that depends on nothing but what is asked.

    >>> place_of("What is  a prime?") == place_of(" What is a prime?")
    True
    """
    digest = hashlib.sha256(normal(question).encode()).hexdigest()
    return int(digest[:12], 16) / 16**12


def split(places: Iterable[float], shares: dict[str, float]) -> list[str]:
    """Returns the side of each conversation: a name of `shares`, or `train`.

    The place of the first question decides, so that a conversation stays on its side
    when data are added, and all that ask the same go to the same side. Of few
    conversations a side may get none that way: it takes those of the lowest place.

    >>> split([0.02, 0.5, 0.07, 0.9], {"eval": 0.05})
    ['eval', 'train', 'train', 'train']

    Args:
        places: of the first questions, from `place_of`.
        shares: the part of the whole that each side gets, 0 to 1.

    Raises:
        DataError: nothing is left to train on.
    """
    places = array("d", places)
    ends = list(zip(shares, accumulate(shares.values()), strict=True))
    sides = [
        next((name for name, end in ends if place < end), "train") for place in places
    ]
    for name in shares:
        if name not in sides:
            free = (p for p, side in zip(places, sides, strict=True) if side == "train")
            lowest = min(free, default=None)
            for at, place in enumerate(places):
                if place == lowest:
                    sides[at] = name
    if "train" not in sides:
        raise DataError(
            f"{len(set(places))} different questions, of which "
            f"{' and '.join(shares)} take {sum(shares.values()):.0%}: none is left to "
            "train on; give more rows"
        )
    return sides


def assert_disjoint(train: Iterable[str], held_out: dict[str, Iterable[str]]) -> None:
    """Raises DataError when a held-out question is among those trained on.

    Args:
        train: the questions of the training rows; only one is held at a time.
        held_out: the questions of each held-out set, by the set's name.
    """
    sets = {name: list(questions) for name, questions in held_out.items()}
    known = {normal(question) for questions in sets.values() for question in questions}
    trained = known.intersection(map(normal, train)) if known else known
    for name, questions in sets.items():
        leaked = [question for question in questions if normal(question) in trained]
        if leaked:
            raise DataError(
                f"{len(leaked)} questions of {name} are in the training rows too, "
                f"the first: {leaked[0][:80]!r}; remove them from one side"
            )
