"""*The* answer parser: rewards and accuracy go by it, and by nothing else."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Any

# Numbers. Unicode categories and signs, and what the patterns below read them as
KINDS = {"Sc": "$", "Pd": "-", "Pi": "'", "Pf": "'", "Zs": " ", "Zl": "\n", "Zp": "\n"}
KINDS |= {"So": "'"} | dict.fromkeys(["Cf", "Mn", "Me", "No"], "")
SIGNS = {"°": "°", "\u2212": "-", "\u066b": ".", "\u066c": ","}
SIGNS |= dict.fromkeys("\u2044\u2215", "/")
# Latin, Greek and Cyrillic letters: scripts that part words, so that x2 is a name
LETTER = r"[A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u052f\u1e00-\u1fff]"
LATEX = {"times": "×", "cdot": "×", "sqrt": "√", "pi": "π", "pm": "±", "approx": "≈"}
CLEANING = [
    (re.compile(r"<sup>"), "^"),
    (re.compile(r"<[/|]*[^\W\d][^<>\s]{0,40}>"), " "),  # tags and end tokens
    (re.compile(r"\\([$%&#_])"), r"\1"),
    (re.compile(r"\{,\}|,?\\[,!;: ](?=\d{3})"), ","),
    (re.compile(r"(\\[dt]?frac) ?(\d) ?(\d)(?!\d)"), r"\1{\2}{\3}"),
    (re.compile(r"(?<=\d)\s*\\[dt]?frac\{(\d+)\}\{(\d+)\}"), r" \1/\2"),
    (re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}"), r"\1/\2"),
    (re.compile(r"\^?\{?\\(?:circ|degree)\b\}?"), "°"),
    *((re.compile(rf"\\{name}(?![a-z])"), sign) for name, sign in LATEX.items()),
    (re.compile(r"(?<=\d)(?:\^\{?|\*\*)([-+]?\d+)\}?"), r"^\1"),
    (re.compile(r"\\(?:text|math)[a-z]*|\\(?:left|right)\b|\\[()\[\],;:! ]|[{}]"), " "),
    (re.compile(r"(?<=[^\W\d_])\^ ?[-+]?\d+"), ""),  # the power of a unit
    (re.compile(r"(?<!\w)[*_`]+(?=\S)|(?<=\S)[*_`]+(?!\w)"), ""),
    (re.compile(r"(?<![\d)%] )\b(?:minus|negative|moins|menos|минус) (?=\$?\d)"), "-"),
    (re.compile(r"[负負] ?(?=\$?\d)|マイナス ?(?=\d)"), "-"),
]
# A number and whatever is joined to it without a space, to be read as a whole or not at
# all. The powers of a unit (12m2) are no part of it.
NUMBER = (
    r"(?:\d+ (?:and )?\d\d?/\d+|\d{1,3}(?: \d{3}){1,6}(?! ?\d)|(?:(?<![\w.])\.)?\d+)"
    r"(?:[.,:/'_]\d+)*(?:\^[-+]?\d+)*(?:[eE][-+]?\d+| ?[x×*·] ?10\^[-+]?\d+)?"
    rf"(?:(?!(?:[cdkm]?m|ft|in)[23]\b){LETTER}+\d+)*"
)
TOKEN = rf"(?P<sign>[-+] ?)?(?P<money>\$ ?(?P<inner>[-+])?)?(?P<number>{NUMBER})"
# names and powers such as x2 and ^2 are passed over
TOKENS = re.compile(rf"(?:{LETTER}|[_^])\d(?:[.,:/'_]?\d)*|{TOKEN}")
# `5 + 7 = ` and `x = `
SUM = r"(?:(?: *[^\W\d_] *|(?:(?![=≈→])[\W\d_xX])*+)[=≈→])*+"
# US, Rs., kr, EUR, 元, but neither `about` nor `Step` nor 第
CURRENCY = (
    rf"(?:{LETTER}+(?=\$)|(?:(?![xyz]){LETTER}\.? |(?:{LETTER}{{2}}|[A-Z]{{3}})\.? ?"
    rf"|{LETTER}{{3,4}}\. ?|(?!{LETTER}|第)[^\W\d_] ?)(?!\$|[-+] ))?"
)
CODE = re.compile(r"[A-Z]{2,3}\b|(?:[Kk]r|Rs|Fr|z\u0142)\b")
OPENING = re.compile(
    rf"{SUM}[\s~>:|\"'(\[*_`$√±∓]*?(?P<outer>[-+] ?)?(?P<unit>{CURRENCY}){TOKEN}"
)
# plain digits or groups of thousands, by what parts them and by the decimal sign
POINT = re.compile(
    r"(?:\d+|[1-9]\d{0,2}([ ,'_])\d{3}(?:\1\d{3})*|[1-9]\d?(?:,\d\d)+,\d{3})?(?:\.\d+)?"
)
COMMA = re.compile(r"0,\d+|[1-9]\d{0,2}(?:[ .'_]\d{3})+,\d+")
POINTS = re.compile(r"[1-9]\d{0,2}(?:\.\d{3}){2,}")
# a mixed number, a fraction, a power, and times a power of ten
SHAPE = re.compile(
    r"(?:(\d+) (?:and )?(?=\d\d?/))?([\d.,' _]*\d)(?:/([\d.,' _]*\d))?"
    r"(?:\^([-+]?\d\d?))?(?:e([-+]?\d\d?)| ?[x×*·] ?10\^([-+]?\d\d?))?",
    re.IGNORECASE,
)
LONGEST = 40  # characters of a number
SHORT_COMMA = re.compile(r"\d+,\d\d?")
MILLION = re.compile(rf" ?m(?!{LETTER})")  # $5m
SCALES = {
    2: "hundred|百",
    3: r"(?-i:k)|thousand|tausend|mille?|mil|тыс[а-я]*\.?|千(?![克米瓦卡])|천",
    4: "[万萬만]",
    5: "lakhs?|लाख",
    6: r"millions?|million(?:en|i)|mill[oó]n(?:es)?|mio\.?|mln|миллион\w*|млн",
    7: "crores?|करोड\u093c?",
    8: "[亿億억]",
    9: r"billions?|bn|milliard\w*|mrd\.?|миллиард\w*|млрд",
    12: "trillions?|兆",
}
SCALE = re.compile(
    r"(?: ?(?i:"
    + "|".join(f"(?P<e{n}>{words})" for n, words in SCALES.items())
    + rf")|(?P<k3>K)|(?P<m6>M)|(?P<b9>B))(?!{LETTER})"
)
# what makes the number before it a part of something else: 2√3, 2π, 3x, 2 and a half
BROKEN = re.compile(
    rf" ?[√π∞^]| ?[+*×÷·] ?[^\W\d_(]|[xyz](?!{LETTER})"
    r"| and (?:[^\W\d_]+[ -])?(?:half|thirds?|quarters?)\b"
)
UNIT = re.compile(r" ?(?:[^\W\d_]|[%$°])")
OR = r"(?:\b(?:and|or|to|bis|und|oder|et|ou|y|o|e|и|или)\b|[和或と]|または)"
# what begins a remark after an answer
REMARK = re.compile(rf"(?:[,;.:(!?。]| -) *(?!(?i:{OR}))[^\W\d_]")

# Answers
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


def fold(char: str) -> str:
    """Returns a character as the patterns know it: `٣` as 3, `€` as $, `–` as -."""
    kind = unicodedata.category(char)
    if kind == "Nd":
        return str(unicodedata.decimal(char))
    plain = unicodedata.normalize("NFKC", char)
    if kind == "So" and plain != char:  # ℃, ㎡
        return plain
    if unicodedata.decomposition(char).startswith("<fraction>"):
        return " " + plain.replace("\u2044", "/")
    return SIGNS.get(char, KINDS.get(kind, plain))


def clean(text: str) -> str:
    """Returns a text in plain signs: no LaTeX, emphasis or tags around its numbers."""
    text = re.sub(
        "[⁰¹²³⁴-⁹⁺⁻]+", lambda run: "^" + unicodedata.normalize("NFKC", run[0]), text
    )
    text = text.translate({ord(c): fold(c) for c in set(text) if not c.isascii()})
    for pattern, instead in CLEANING:
        text = pattern.sub(instead, text)
    return text


def tokens(text: str, start: int = 0) -> list[re.Match[str]]:
    """Returns the numbers of a cleaned text, readable or not."""
    return [token for token in TOKENS.finditer(text, start) if token["number"]]


def amount(written: str, short_comma: bool = False) -> Fraction:
    """Returns the value of digits with their separators, ValueError without a rule."""
    if POINT.fullmatch(written):
        return Fraction(re.sub("[ ,'_]", "", written))
    if COMMA.fullmatch(written) or short_comma and SHORT_COMMA.fullmatch(written):
        return Fraction(re.sub("[ .'_]", "", written).replace(",", "."))
    if POINTS.fullmatch(written):
        return Fraction(written.replace(".", ""))
    raise ValueError(f"{written!r} is no number")


def is_negative(token: re.Match[str], before: str) -> bool:
    """Returns whether a number has a minus, no operator; ValueError if unclear."""
    signs = token.groupdict()
    sign = "".join(signs.get(name) or "" for name in ("outer", "sign", "inner"))
    if len(sign.strip()) > 1:
        raise ValueError(f"{sign!r} are two signs")
    if not signs["sign"]:
        return "-" in sign
    left = before.rstrip(" ") if sign == "- " else before
    if sign == "- " and left[-1:].isalpha():
        raise ValueError("a minus or a dash")
    return "-" in sign and not re.search(r"[\w)%\]$°]\Z", left)


def value_of(token: re.Match[str]) -> Fraction | None:
    """Returns the exact value of a number in its text, None when it has none."""
    text, end = token.string, token.end()
    start = token.start("number")
    shape = SHAPE.fullmatch(token["number"][: LONGEST + 1])
    if shape is None or len(shape[0]) > LONGEST:
        return None
    if re.search(r"[√±∓][ $+-]*\Z", text[max(0, start - 9) : start]):
        return None
    whole, over, under, power, *tens = shape.groups()
    code = CODE.match(token.groupdict().get("unit", ""))
    comma = bool(token["money"] or code or UNIT.match(text, end))
    exponent = int(tens[0] or tens[1] or 0)
    while scale := SCALE.match(text, end):
        exponent, end = exponent + int(str(scale.lastgroup)[1:]), scale.end()
    broken = BROKEN.match(text, end) or (token["money"] and MILLION.match(text, end))
    if broken or exponent > LONGEST:
        return None
    try:
        value = (amount(over, comma) / amount(under or "1", comma)) ** int(power or 1)
        value = (value + int(whole or 0)) * Fraction(10) ** exponent
        before = text[max(0, token.start() - 9) : token.start()]
        return -value if is_negative(token, before) else value
    except (ValueError, ZeroDivisionError):
        return None


def parse_number(text: str) -> Fraction | None:
    """Returns the exact value of a written number, None when it is not one number.

    It may have a sign, a currency sign before, and any unit or a word such as `million`
    after; a part of one (`8:30`, `1/2/2024`, `2√3`) is none. A point is decimal unless
    there are two (`1.000.000`). A comma before three digits parts thousands, as do a
    space, an apostrophe and `_`. It is decimal after a 0 (`0,5`), after other groups
    (`1.000,50`), and before one or two digits next to a unit (`12,50 €`).
    """
    first = OPENING.match(clean(text).strip())
    if first is None:
        return None
    value, others = value_of(first), tokens(first.string, first.end())
    if others and not REMARK.search(first.string, first.end(), others[0].start()):
        return value if all(value_of(other) == value for other in others) else None
    return value


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
    r"""Returns the number a completion gives as its answer, None when it gives none.

    1. Reasoning does not count: what stands up to the last `</think>` or
       `</reasoning>`, or after a `<think>` or `<reasoning>` that is never closed.
    2. What is marked is the answer: in `\boxed{...}`, in `<answer>` (`<SOLUTION>`)
       tags, or after `####` in its line. It must hold one number, with any unit, after
       a sum (`5 + 7 = 12`) or before a remark. Two marked values are no answer.
    3. Without a mark it is what follows `answer is`, `Answer:` or `#### Total:`.
    4. Else it is the last number of the last line, but of no list (`1, 2, 3`), choice
       (`12 or 13`) or range (`12-15`).

    Values are exact: 1080 = 1,080.00 = $1,080 = 1080% = 2160/2; 0.333 is not 1/3.
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
    known, own = " ".join(prompt.split()), []
    for line in text.splitlines():
        words = line.split()
        if len(words) < COPIED_WORDS or " ".join(words) not in known:
            own.append(line)
    return "\n".join(own)


def is_correct(text: str, gold: str, prompt: str = "") -> bool:
    """Returns whether an answer equals `gold`, a number or a `$...$` expression."""
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
    """Returns math-verify's reading of `$...$`, None where there is nothing to read."""
    expression = EXPRESSION.fullmatch(text.strip())
    if expression is None:
        return None
    from math_verify import LatexExtractionConfig, parse

    parts = parse(expression[0], [LatexExtractionConfig()], parsing_timeout=SECONDS)
    return parts if any(not isinstance(part, str) for part in parts) else None


def has_strict_format(text: str) -> bool:
    """Returns whether the text is some working, then one final line `#### <number>`."""
    working, _, line = text.rstrip().rpartition("\n")
    is_final = FINAL.fullmatch("".join(map(fold, line)))
    return bool(re.search(r"\w", working) and is_final) and has_soft_format(text)


def has_soft_format(text: str) -> bool:
    """Returns whether `####` stands once, followed by one number in its line."""
    line = text.partition(MARKER)[2].partition("\n")[0]
    is_number = parse_number(line) is not None and extract_answer(text) is not None
    return is_number and text.count(MARKER) == 1
