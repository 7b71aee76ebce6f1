"""Text -> float reward functions and *the* answer parser, shared with evaluation.

The functions follow TRL's contract: lists in, one float a completion out; None where
the gold answer cannot be graded, which is not the same as 0.0 for a wrong one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

MARKER = "####"
# A minus is a sign only where nothing stands before it: 10-5 ends in 5, not in -5.
MINUS = r"(?<![\w)%])[-\u2212]"
# digits with thousands commas, or plain ones; a decimal part; a fraction
NUMBER = (
    rf"(?:{MINUS})?(?:\\?\$-?)?"
    r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|(?<![\w.])\.\d+)"
)
STRICT = re.compile(rf"\S\s*\n{MARKER} ?({NUMBER}) ?%?\.?\s*\Z")
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")


def parse_number(text: str) -> Fraction | None:
    """Returns the exact value of a written number, None when it is none.

    Thousands commas, `$`, `%`, a final dot and a unit after a space do not count.

    >>> parse_number("1,080.00") == parse_number("$1080") == parse_number("1080%")
    True
    >>> parse_number("3/4"), parse_number("about 12")
    (Fraction(3, 4), None)
    """
    matched = re.fullmatch(
        rf"\s*({NUMBER})\s*(?:%|\\%|[a-zA-Z][a-zA-Z ]*)?\.?\s*", text
    )
    if matched is None:
        return None
    digits = re.sub(r"[,$\\]", "", matched.group(1)).replace("\u2212", "-")
    over, _, under = digits.partition("/")
    try:
        return Fraction(over) / Fraction(under or 1)
    except (ValueError, ZeroDivisionError):  # too long to be meant, or a zero below
        return None


def parse_gold(answer: str) -> Fraction | None:
    """Returns the gold number of a GSM8K answer: what stands after the last `####`.

    >>> parse_gold("2 + 3 = 5 nuts.\\n#### 5")
    Fraction(5, 1)
    """
    _, marker, final = answer.rpartition(MARKER)
    return parse_number(final) if marker else None


def extract_answer(text: str) -> Fraction | None:
    """Returns the number a completion gives as its answer, None when it gives none.

    What follows the last `####` counts if it starts with a number; else the last
    `\\boxed{...}`; else the last number in the text (the flexible rule, under which a
    model is not scored on format).

    >>> extract_answer("5 - 2 = 3 left.\\n#### 3")
    Fraction(3, 1)
    >>> extract_answer("So she has 1,080 apples, not 90."), extract_answer("none")
    (Fraction(90, 1), None)
    """
    _, marker, final = text.rpartition(MARKER)
    if marker and (matched := re.match(rf"\s*({NUMBER})", final)):
        return parse_number(matched.group(1))
    boxed = BOXED.findall(text)
    if boxed and (matched := re.match(rf"[\s$]*({NUMBER})", boxed[-1])):
        return parse_number(matched.group(1))
    numbers = re.findall(NUMBER, text)
    return parse_number(numbers[-1]) if numbers else None


def is_correct(text: str, gold: str) -> bool:
    """Returns whether the extracted answer equals the gold number exactly.

    >>> is_correct("It costs $1,080.00.", "1080"), is_correct("12 or 13", "12")
    (True, False)
    """
    return extract_answer(text) == parse_number(gold) is not None


def has_strict_format(text: str) -> bool:
    """Returns whether the text is some working, then one final line `#### <number>`.

    >>> has_strict_format("2 + 3 = 5\\n#### 5"), has_strict_format("#### 5 #### 6")
    (True, False)
    """
    final = STRICT.search(text)
    return (
        text.count(MARKER) == 1
        and final is not None
        and parse_number(final.group(1)) is not None
    )


Completion = str | list[dict[str, str]]
Reward = Callable[..., list[float | None]]


def text_of(completion: Completion) -> str:
    """Returns the text of a completion, conversational or plain."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def correctness(
    completions: list[Completion], gold: list[str], **_: Any
) -> list[float | None]:
    """Returns 1.0 for a right answer, 0.0 for a wrong one, None without a gold number.

    >>> correctness(["1 + 1 = 2\\n#### 2", "#### 3", "2"], gold=["2", "2", "?"])
    [1.0, 0.0, None]
    """
    return [
        None if parse_number(g) is None else float(is_correct(text_of(c), g))
        for c, g in zip(completions, gold, strict=True)
    ]


def strict_format(completions: list[Completion], **_: Any) -> list[float | None]:
    """Returns 1.0 where the text is working and one final `#### <number>` line.

    >>> strict_format(["2 + 3 = 5\\n#### 5", "The answer is 5"])
    [1.0, 0.0]
    """
    return [float(has_strict_format(text_of(c))) for c in completions]


def number_present(completions: list[Completion], **_: Any) -> list[float | None]:
    """Returns 1.0 where the text ends in exactly one marked answer or a number.

    >>> number_present(["#### 5", "no idea"])
    [1.0, 0.0]
    """
    return [
        float(extract_answer(text_of(c)) is not None and text_of(c).count(MARKER) <= 1)
        for c in completions
    ]


REWARDS: dict[str, Reward] = {
    "correctness": correctness,
    "strict_format": strict_format,
    "number_present": number_present,
}


def choose(weights: dict[str, float]) -> tuple[list[Reward], list[float]]:
    """Returns reward functions and their weights, as `GRPOTrainer` takes them.

    >>> functions, weights = choose({"correctness": 1.0, "strict_format": 0.2})
    >>> [f.__name__ for f in functions], weights
    (['correctness', 'strict_format'], [1.0, 0.2])

    Raises:
        ValueError: a reward is not known.
    """
    for name in weights:
        if name not in REWARDS:
            raise ValueError(f"no reward {name!r}; known: {', '.join(REWARDS)}")
    return [REWARDS[name] for name in weights], list(weights.values())
