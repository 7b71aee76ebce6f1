r"""*The* answer parser: what a completion's answer is, and whether it is right.

Rewards and accuracy go by it, and by nothing else.

What counts as the answer of a completion:

1. Reasoning does not: nothing up to the last `</think>` or `</reasoning>`, and nothing
   at all after a `<think>` or `<reasoning>` that is never closed.
2. What stands in `\boxed{...}` or in `<answer>` (`<SOLUTION>`) tags, or follows `####`
   in its line and begins with a number. It must hold one number, with any unit, after a
   sum (`5 + 7 = 12`) or before a remark (`12, for 3 days`). Where several are marked
   they must be equal: a completion that offers two values gives no answer.
3. Without such a mark, what follows `answer is`, `Answer:` or `#### Total:`.
4. Without either, the last number of the last line, but of no list (`1, 2, 3`), choice
   (`12 or 13`) or range (`12-15`). Numbers in the lines before are reasoning.
5. A line of six words or more that stands in the prompt is not the model's own.

What a number is, `numerals` says. What counts as equal: exact values. 1080 = 1,080 =
1080.00 = $1,080 = 1080% = 2160/2 = 1080 apples; 0.333 is not 1/3, 50% is 50, and
numbers in words are none. A gold answer between dollars, `$2\sqrt{3}$`, is an
expression; math-verify compares what is marked.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from helpers.grpo.numerals import (
    LETTER,
    OPENING,
    OR,
    TOKEN,
    clean,
    fold,
    parse_number,
    tokens,
    value_of,
)

MARKER = "####"
COPIED_WORDS = 6
REASONING = re.compile(r"\A.*</(?:think|reasoning)>|<(?:think|reasoning)>.*", re.DOTALL)
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
TAGS = re.compile(r"<(?:answer|solution)>", re.IGNORECASE)
TAG_ENDS = re.compile(r"</(?:answer|solution)>", re.IGNORECASE)
# `#### 12`, but not the heading `#### 1. Find the price`
MARKED = re.compile(rf"{MARKER}\s*+(?!\d+[.:)][ \t]+[^\W\d])([^\n#]*)")
ANNOUNCED = re.compile(
    rf"(?:{MARKER}[^\n\d#]*?|answer|antwort|respuesta|réponse|resposta|ответ|答案|答え)"
    r"[*_ ]*(?:\b(?:is|ist|es|est|é)\b|[:=：是は])([^\n#]*)",
    re.IGNORECASE,
)
FINAL = re.compile(rf"{MARKER} ?{TOKEN} ?[%$]?\.?")
# what stands between two numbers that are both offered, or that are one quantity
JOINED = re.compile(
    rf"[^\S\n]*|\W*(?:[^\W\d_]+\W*?)?{OR}\W*|{LETTER}{{1,3}} "
    r"|[^-\w\s]*(?:~|\.\.+)[^\w\s]*"
)
RANGE = re.compile(r"[^-\w]*-[^-\w]*")
LISTED = re.compile(r"%?[\s,;|、]+")
EXPRESSION = re.compile(r"\$([^$]{1,200})\$")
SECONDS = 2  # for each step of math-verify, which an adversarial expression can stall


def parse_gold(answer: str) -> Fraction | None:
    """Returns the gold number of a GSM8K answer: what stands after the last `####`."""
    _, marker, final = answer.rpartition(MARKER)
    return parse_number(final) if marker else None


def enclosed(text: str) -> list[str]:
    """Returns what a text encloses as its answers, in a box or in tags."""
    contents = [TAG_ENDS.split(piece, 1)[0] for piece in TAGS.split(text)[1:]]
    return BOXED.findall(text) + [c.replace("\n", ", ").strip(", ") for c in contents]


def last_number(text: str) -> Fraction | None:
    """Returns the last number of the last line that has words, if it stands alone."""
    lines = [line for line in clean(text).splitlines() if re.search(r"\w", line)]
    text = "\n".join(lines[-3:])
    numbers = tokens(text)[-3:]
    if not numbers or "\n" in text[numbers[-1].end() :]:
        return None
    value = value_of(numbers[-1])
    gaps = [
        text[left.end() : right.start("number")].replace("$", "")
        for left, right in zip(numbers, numbers[1:], strict=False)
    ]
    if len(gaps) == 2 and all(map(LISTED.fullmatch, gaps)):
        return None
    if gaps and value is not None:
        first = value_of(numbers[-2])
        rising = first is None or first < value
        if JOINED.fullmatch(gaps[-1]) or (rising and RANGE.fullmatch(gaps[-1])):
            return None
    return value


def extract_answer(text: str) -> Fraction | None:
    """Returns the number a completion gives as its answer, None when it gives none.

    >>> extract_answer("5 - 2 = 3 left.\\n#### 3"), extract_answer("#### 3 or 4")
    (Fraction(3, 1), None)
    """
    text = REASONING.sub("", text)
    boxes = [clean(box).strip() for box in enclosed(text)]
    lines = [clean(line).strip() for line in MARKED.findall(text)]
    values = {parse_number(line) for line in lines if OPENING.match(line)}
    values |= {
        parse_number(box) if OPENING.match(box) else last_number(box)
        for box in boxes
        if tokens(box)
    }
    if not values:
        values = set(map(parse_number, ANNOUNCED.findall(text))) - {None}
        if not values or (len(values) > 1 and MARKER in text):  # headings
            values = {last_number(text)}
    return values.pop() if len(values) == 1 else None


def own_words(text: str, prompt: str) -> str:
    """Returns a completion without the lines that were copied from its prompt."""
    if not prompt:
        return text
    known = " ".join(prompt.split())
    lines = [(line, line.split()) for line in text.splitlines()]
    return "\n".join(
        line
        for line, words in lines
        if len(words) < COPIED_WORDS or " ".join(words) not in known
    )


def is_correct(text: str, gold: str, prompt: str = "") -> bool:
    """Returns whether a completion's answer equals the gold answer.

    >>> is_correct("It costs $1,080.00.", "1080"), is_correct("12 or 13", "13")
    (True, False)

    Args:
        text: the completion.
        gold: a number, or an expression between dollars.
        prompt: what the model was asked; lines copied from it do not count.
    """
    text, value = own_words(text, prompt), parse_number(gold)
    if value is not None:
        return extract_answer(text) == value
    expected = parse_expression(gold)
    if expected is None:
        return False
    from math_verify import verify

    text = REASONING.sub("", text)
    marks = {mark.strip("$. \t*_`") for mark in enclosed(text) + MARKED.findall(text)}
    if len(marks - {""}) != 1:
        return False
    answer = parse_expression(f"${max(marks)}$")
    return answer is not None and verify(expected, answer, timeout_seconds=SECONDS)


def parse_expression(text: str) -> list[Any] | None:
    """Returns math-verify's reading of `$...$`, None where there is nothing to read.

    Raises:
        RuntimeError: outside the main thread, where no time limit can be set.
    """
    import threading

    expression = EXPRESSION.fullmatch(text.strip())
    if expression is None:
        return None
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            f"{text} can be graded in the main thread only: math-verify limits its "
            "time by a signal; call the reward there, or give numbers as gold answers"
        )
    from math_verify import LatexExtractionConfig, parse

    parts = parse(expression[0], [LatexExtractionConfig()], parsing_timeout=SECONDS)
    return parts if any(not isinstance(part, str) for part in parts) else None


def has_strict_format(text: str) -> bool:
    """Returns whether the text is some working, then one final line `#### <number>`."""
    working, _, line = text.rstrip().rpartition("\n")
    line = "".join(map(fold, line))
    working_there = re.search(r"\w", working) is not None
    return working_there and FINAL.fullmatch(line) is not None and has_soft_format(text)


def has_soft_format(text: str) -> bool:
    """Returns whether `####` stands once, followed by one number in its line."""
    line = text.partition(MARKER)[2].partition("\n")[0]
    return (
        text.count(MARKER) == 1
        and parse_number(line) is not None
        and extract_answer(text) is not None
    )
