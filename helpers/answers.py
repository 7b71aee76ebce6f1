r"""*The* answer parser: what a completion's answer is, and whether it is right.

Rewards and accuracy go by it, and by nothing else.

What counts as the answer of a completion:

1. Reasoning does not: nothing up to the last `</think>` or `</reasoning>`, and nothing
   at all after a `<think>` or `<reasoning>` that is never closed.
2. What follows `####` in its line or stands in `\boxed{...}`, if it begins with a
   number. It must be one number, perhaps with a unit or after a sum (`5 + 7 = 12`), and
   where several are marked they must be equal: who offers two values gives no answer.
3. Without a mark the last number of the last line, but of no list (`1, 2, 3`) and no
   choice (`12 or 13`). Numbers in the lines before are reasoning.
4. A line of six words or more that stands in the prompt is not the model's own.

What counts as equal: exact values. 1080 = 1,080 = 1080.00 = $1,080 = 1080% = 2160/2 =
1080 apples; 0.333 is not 1/3, 50% is 50, and numbers in words are none. A gold answer
between dollars, `$2\sqrt{3}$`, is an expression; math-verify compares what is marked.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

MARKER = "####"
COPIED_WORDS = 6
# A minus is a sign only where nothing stands before it: 10-5 ends in 5, not in -5.
MINUS = r"(?<![\w)%])[-\u2212]"
CURRENCY = r"[$\u20ac\u00a3\u00a5]"
# Digits with thousands commas, or plain ones; a decimal part; a fraction or a mixed
# number. Digits after a letter or a power sign are no number of their own: x2, m^2.
NUMBER = (
    rf"(?:{MINUS})?(?:{CURRENCY}-?)?"
    r"(?:(?<![A-Za-z\d^])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?: \d+(?=/))?(?:/\d+)?"
    r"|(?<![\w.])\.\d+)"
)
UNIT = r"(?:%|[(a-zA-Z\u00b0][a-zA-Z\u00b0/\u00b2\u00b3() -]*+(?:\^[23])?)"
WRITTEN = re.compile(rf"\s*+({NUMBER})\s*+{UNIT}?+\s*+\.?\s*+")
STRICT = re.compile(rf"\w\W*\n{MARKER} ?{NUMBER} ?%?\.?\s*\Z")
SOFT = re.compile(rf"{MARKER}[ \t]*+{NUMBER}[ \t]*+{UNIT}?+\.?[ \t]*+$", re.MULTILINE)
# `#### 12`, but not the heading `#### 1. Find the price`
STARTS = re.compile(rf"(?!\d+[.:)]\s+[^\W\d]){NUMBER}")
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
MARKED = re.compile(rf"{MARKER}\s*([^\n#]*)")
REASONING = re.compile(r"\A.*</(?:think|reasoning)>|<(?:think|reasoning)>.*", re.DOTALL)
# what makes a last number one of a choice or of a list
LISTED = re.compile(
    rf"{NUMBER}%? or \Z|(?:{NUMBER}%?(?:[\s,;|]|\bor\b|\band\b)+){{2}}\Z"
)
# LaTeX that a plain number may be written with
LATEX = [
    (re.compile(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}"), r" \1"),
    (re.compile(r"(?<=\d)\s*\\[dt]?frac\{(\d+)\}\{(\d+)\}"), r" \1/\2"),
    (re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}"), r"\1/\2"),
    (re.compile(r"\{,\}|,?\\[,!;: ](?=\d{3})"), ","),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\A(?:\s*+[a-zA-Z]\s*+|[^a-wyzA-Z=]*+)=\s*"), ""),
]
EXPRESSION = re.compile(r"\$([^$]{1,200})\$")
SECONDS = 2  # for each step of math-verify, which an evil expression can keep busy


def parse_number(text: str) -> Fraction | None:
    """Returns the exact value of a written number, None when it is none.

    Thousands commas, currency signs, `%`, a final dot and a unit do not count.

    >>> parse_number("1,080.00") == parse_number("$1080") == parse_number("1080%")
    True
    >>> parse_number("3/4"), parse_number("2 1/2 km"), parse_number("about 12")
    (Fraction(3, 4), Fraction(5, 2), None)
    """
    matched = WRITTEN.fullmatch(text.replace(r"\$", "$").replace(r"\%", "%"))
    if matched is None:
        return None
    number = matched.group(1).replace("\u2212", "-")
    digits = re.sub(rf"[,-]|{CURRENCY}", "", number)
    whole, _, fraction = digits.rpartition(" ")
    over, _, under = fraction.partition("/")
    try:
        value = Fraction(over) / Fraction(under or 1) + Fraction(whole or 0)
    except (ValueError, ZeroDivisionError):  # too long to be meant, or a zero below
        return None
    return -value if "-" in number else value


def parse_gold(answer: str) -> Fraction | None:
    """Returns the gold number of a GSM8K answer: what stands after the last `####`.

    >>> parse_gold("2 + 3 = 5 nuts.\\n#### 5")
    Fraction(5, 1)
    """
    _, marker, final = answer.rpartition(MARKER)
    return parse_number(final) if marker else None


def plain(written: str) -> str:
    """Returns a marked answer without the LaTeX and the emphasis around a number.

    >>> plain(r" **\\frac{3}{4}** "), plain(r"x = 1{,}080 \\text{ km}")
    ('3/4', '1,080   km')
    """
    for pattern, instead in LATEX:
        written = pattern.sub(instead, written)
    return written.strip(" \t*_`").removesuffix("$")


def marked(text: str) -> list[str]:
    """Returns what a text marks as its answers, in plain writing.

    >>> marked("First 2, then\\n#### 3 nuts."), marked("It is 3.")
    (['3 nuts.'], [])
    """
    found = [*MARKED.findall(text), *BOXED.findall(text)]
    return [written for written in map(plain, found) if written]


def extract_answer(text: str) -> Fraction | None:
    """Returns the number a completion gives as its answer, None when it gives none.

    The rules are those of the module, but for the prompt's.

    >>> extract_answer("5 - 2 = 3 left.\\n#### 3")
    Fraction(3, 1)
    >>> extract_answer("5 - 2 = 3.\\nSo she has 3 apples."), extract_answer("3 or 4")
    (Fraction(3, 1), None)
    """
    text = REASONING.sub("", text).rstrip()
    values = {parse_number(found) for found in marked(text) if STARTS.match(found)}
    if values:
        return values.pop() if len(values) == 1 else None
    last = [*re.finditer(NUMBER, text)][-1:]
    if not last or "\n" in text[last[0].start() :]:
        return None
    listed = LISTED.search(text[: last[0].start()])
    return None if listed else parse_number(last[0].group())


def own_words(text: str, prompt: str) -> str:
    """Returns a completion without the lines that were copied from its prompt.

    >>> own_words("Ann has 5 nuts and eats 2.\\n#### 3", "Ann has 5 nuts and eats 2.")
    '#### 3'
    """
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

    Args:
        text: the completion.
        gold: a number, or an expression between dollars.
        prompt: what the model was asked; what is copied from there does not count.

    >>> is_correct("It costs $1,080.00.", "1080"), is_correct("12 or 13", "13")
    (True, False)
    >>> is_correct(r"So it is \\boxed{\\sqrt{12}}.", r"$2\\sqrt{3}$")
    True
    """
    text, value = own_words(text, prompt), parse_number(gold)
    if value is not None:
        return extract_answer(text) == value
    expected = parse_expression(gold)
    if expected is None:
        return False
    from math_verify import verify

    found = set(marked(REASONING.sub("", text)))
    if len(found) != 1:
        return False
    answer = parse_expression(f"${found.pop().strip('$. ')}$")
    return answer is not None and verify(expected, answer, timeout_seconds=SECONDS)


def parse_expression(text: str) -> list[Any] | None:
    """Returns math-verify's reading of `$...$`, None where there is nothing to read.

    Raises:
        RuntimeError: outside the main thread, where no time limit can be set.
    """
    import threading

    matched = EXPRESSION.fullmatch(text.strip())
    if matched is None:
        return None
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            f"{text} can be graded in the main thread only: math-verify limits its "
            "time by a signal; call the reward there, or give numbers as gold answers"
        )
    from math_verify import LatexExtractionConfig, parse

    found = parse(matched.group(), [LatexExtractionConfig()], parsing_timeout=SECONDS)
    return found if any(not isinstance(part, str) for part in found) else None


def has_strict_format(text: str) -> bool:
    """Returns whether the text is some working, then one final line `#### <number>`.

    >>> has_strict_format("2 + 3 = 5\\n#### 5"), has_strict_format("#### 5 #### 6")
    (True, False)
    """
    return has_soft_format(text) and STRICT.search(text) is not None


def has_soft_format(text: str) -> bool:
    """Returns whether `####` stands once, a number ends its line, and is the answer.

    >>> has_soft_format("It is #### 5 nuts.\\nDone."), has_soft_format("#### five")
    (True, False)
    """
    return (
        text.count(MARKER) == 1
        and SOFT.search(text) is not None
        and extract_answer(text) is not None
    )
