"""*The* answer parser: rewards and accuracy go by it, and by nothing else."""

import re
from fractions import Fraction
from itertools import pairwise
from unicodedata import category, decimal, normalize

# Numbers. Unicode categories and signs, and what the patterns below read them as
KINDS = {"Sc": "$", "Pd": "-", "Pi": "'", "Pf": "'", "Zs": " ", "Zl": "\n", "Zp": "\n"}
KINDS |= {"So": "'"} | dict.fromkeys(["Cf", "Mn", "Me", "No"], "")
SIGNS = {"°": "°", "\u2212": "-", "\u066b": ".", "\u066c": ",", "\u2044": "/"}
# Latin, Greek and Cyrillic letters: scripts that part words, so that x2 is a name
LETTER = r"[A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u052f\u1e00-\u1fff]"
# √ makes a number unreadable
LATEX = {"times": "×", "cdot": "×", "circ": "°", "sqrt": "√", "pi": "√", "pm": "√"}
CLEANING = [
    ("<sup>", "^"),
    (r"<[/|]*[^\W\d][^<>\s]{0,40}>", " "),  # tags and end tokens
    (r"\\([$%&#_])", r"\1"),
    (r"\{,\}|,?\\[,!;: ](?=\d{3})", ","),
    (r"(?<=\d)\s*(?=\\[dt]?frac)", " "),
    (r"\\[dt]?frac *(?:\{(\d+)\}|(\d)) ?(?:\{(\d+)\}|(\d)(?!\d))", r"\1\2/\3\4"),
    *((rf"\^?\{{?\\{name}(?![a-z])", sign) for name, sign in LATEX.items()),
    (r"(?<=\d)(?:\^\{?|\*\*)([-+]?\d+)\}?", r"^\1"),
    (r"\\(?:text|math)[a-z]*|\\(?:left|right)\b|\\[()\[\],;:! ]|[{}]", " "),
    (r"(?<=[^\W\d_])\^ ?[-+]?\d+", ""),  # the power of a unit
    (r"(?<!\w)[*_`]+(?=\S)|(?<=\S)[*_`]+(?!\w)", ""),
    (r"(?<![\d)%] )\b(?:minus|negative|moins|menos|минус) (?=\$?\d)", "-"),
    (r"(?:[负負]|マイナス) ?(?=\$?\d)", "-"),
]
# A number and whatever is joined to it without a space, to be read as a whole or not at
# all. The powers of a unit (12m2) are no part of it.
NUMBER = (
    r"(?:\d+ (?:and )?\d\d?/\d+|\d{1,3}(?: \d{3}){1,6}(?! ?\d)|(?:(?<![\w.])\.)?\d+)"
    r"(?:[.,:/'_]\d+)*(?:\^[-+]?\d+)*(?:[eE][-+]?\d+| ?[x×*·] ?10\^[-+]?\d+)?"
    rf"(?:(?!(?:[cdkm]?m|ft|in)[23]\b){LETTER}+\d+)*"
)
SIGN = r"(?:[-+√±∓] {0,3}){0,3}"
TOKEN = rf"(?P<sign>{SIGN})(?P<money>\$ ?(?P<inner>[-+√±∓])?)?(?P<number>{NUMBER})"
# names and powers such as x2 and ^2 are passed over
TOKENS = re.compile(rf"(?:{LETTER}|[_^])\d(?:[.,:/'_]?\d)*|(?P<lead>)(?P<unit>){TOKEN}")
SUM = r"(?:(?: *[^\W\d_] *|(?:(?![=≈→])[\W\d_xX])*+)[=≈→])*+"  # `5 + 7 = `, `x = `
# US, Rs., kr, EUR, 元, but neither `about` nor `Step` nor 第
CURRENCY = (
    rf"(?:{LETTER}+(?=\$)|(?:(?![xyz]){LETTER}\.? |(?:{LETTER}{{2}}|[A-Z]{{3}})\.? ?"
    rf"|{LETTER}{{3,4}}\. ?|(?!{LETTER}|第)[^\W\d_] ?)(?!\$|[-+] ))?"
)
CODE = re.compile(r"[A-Z]{2,3}\b|(?:[Kk]r|Rs|Fr|z\u0142)\b")
OPENING = re.compile(
    rf"{SUM}[\s~>:|\"'(\[*_`$]*?(?P<lead>{SIGN})(?P<unit>{CURRENCY}){TOKEN}"
)
UNCLEAR = re.compile(r"[\w)%\]$°](?:-| *- +)\Z")  # a minus after an operand
# plain digits or groups of thousands, by what parts them and by the decimal sign
POINT = re.compile(
    r"(?:\d+|[1-9]\d{0,2}([ ,'_])\d{3}(?:\1\d{3})*|[1-9]\d?(?:,\d\d)+,\d{3})?(?:\.\d+)?"
)
COMMA = re.compile(r"0,\d+|[1-9]\d{0,2}(?:(?:[ .'_]\d{3})+,\d+|(?:\.\d{3}){2,})")
# a mixed number, a fraction, a power, and times a power of ten
SHAPE = re.compile(
    r"(?i)(?:(\d+) (?:and )?(?=\d\d?/))?([\d.,' _]*\d)(?:/([\d.,' _]*\d))?"
    r"(?:\^([-+]?\d\d?))?(?:e([-+]?\d\d?)| ?[x×*·] ?10\^([-+]?\d\d?))?"
)
LONGEST = 40  # characters of a number
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "bn": 9}
SCALES |= {"trillion": 12, "万": 4, "萬": 4, "亿": 8, "億": 8}
SCALE = re.compile(rf"(?: ?(?:k|(?i:{'|'.join(SCALES)})s?)|[KMB])(?!{LETTER})")
SCALES |= {"k": 3, "m": 6, "b": 9}
# what makes the number before it a part of another: 2√3, 2π, 3x, 2 and a half, 3 lakh
BROKEN = re.compile(
    rf" ?[√π∞^]| ?[+*×÷·] ?[^\W\d_(]|[xyz](?!{LETTER})| ?[百만억천兆]"
    r"| ?千(?![克米瓦卡])| and (?:[^\W\d_]+[ -])?(?:half|thirds?|quarters?)\b"
    r"| ?(?i:lakhs?|crores?|लाख|करोड|тыс[а-я]*|милли[оа]\w*|млн|млрд|tausend"
    rf"|milli?[aeoó]\w*|mil|mio|mln|mrd)(?!{LETTER})"
)
UNIT = re.compile(r" ?(?:[^\W\d_]|[%$°])")
OR = r"(?:\b(?:and|or|to|bis|und|oder|et|ou|y|o|e|и|или)\b|[和或と]|または)"
# what begins a remark after an answer
REMARK = re.compile(rf"(?:[,;.:(!?。]| -) *(?!(?i:{OR}))[^\W\d_]")
MARKER = "####"
REASONING = re.compile(r"\A.*</(?:think|reasoning)>|<(?:think|reasoning)>.*", re.DOTALL)
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
TAGGED = re.compile(r"(?is)<(?:answer|solution)>(.*?)(?=</?(?:answer|solution)>|\Z)")
# `#### 12`, but not the heading `#### 1. Find the price`
MARKED = re.compile(rf"{MARKER}\s*+(?!\d+[.:)][ \t]+[^\W\d])([^\n#]*)")
ANNOUNCED = re.compile(
    rf"(?i)(?:{MARKER}[^\n\d#]*?|answer|antwort|respuesta|réponse|resposta|ответ|答案|答え)"
    r"[*_ ]*(?:\b(?:is|ist|es|est|é)\b|[:=：是は])([^\n#]*)"
)
# what stands between two numbers that are both offered, or that are one quantity
JOINED = re.compile(
    rf"[^\S\n]*|\W*(?:[^\W\d_]+\W*?)?{OR}\W*|{LETTER}{{1,3}} "
    r"|[^-\w\s]*(?:~|\.\.+)[^\w\s]*|[^-\w=]*-[^-\w=]*"
)


def fold(char: str) -> str:
    """Returns a character as the patterns know it: `٣` as 3, `€` as $, `–` as -."""
    kind, plain = category(char), normalize("NFKC", char)
    if kind == "Nd":
        return str(decimal(char))
    if kind == "No" and "\u2044" in plain:  # ½
        return " " + plain.replace("\u2044", "/")
    return SIGNS.get(char, KINDS.get(kind, plain))


def clean(text: str) -> str:
    """Returns a text in plain signs: no LaTeX, emphasis or tags around its numbers."""
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻]+", lambda run: "^" + normalize("NFKC", run[0]), text)
    text = text.translate({ord(c): fold(c) for c in set(text) if not c.isascii()})
    for pattern, instead in CLEANING:
        text = re.sub(pattern, instead, text)
    return text


def tokens(text: str, start: int = 0) -> list[re.Match[str]]:
    return [token for token in TOKENS.finditer(text, start) if token["number"]]


def amount(digits: str, short_comma: bool) -> Fraction:
    """Returns the value of digits with their separators, ValueError without a rule."""
    if POINT.fullmatch(digits):
        return Fraction(re.sub("[ ,'_]", "", digits))
    if COMMA.fullmatch(digits) or (short_comma and re.fullmatch(r"\d+,\d\d?", digits)):
        return Fraction(re.sub("[ .'_]", "", digits).replace(",", "."))
    raise ValueError(f"{digits!r} is no number")


def value_of(token: re.Match[str]) -> Fraction | None:
    text, start, end, number = token.string, token.start(), token.end(), token["number"]
    shape = SHAPE.fullmatch(number) if len(number) <= LONGEST else None
    sign = (token["lead"] + token["sign"] + (token["inner"] or "")).replace(" ", "")
    before = text[max(0, start - 9) : start] + token["sign"]
    if shape is None or sign not in ("", "-", "+") or UNCLEAR.search(before):
        return None
    whole, over, under, power, *tens = shape.groups()
    comma = bool(token["money"] or CODE.match(token["unit"]) or UNIT.match(text, end))
    exponent = int(tens[0] or tens[1] or 0)
    while scale := SCALE.match(text, end):
        exponent += SCALES[scale[0].strip().lower().rstrip("s")]
        end = scale.end()
    is_short = token["money"] and re.match(r" ?[mb]\b", text[end : end + 3])  # $5m
    if is_short or BROKEN.match(text, end) or exponent > LONGEST:
        return None
    try:
        value = (amount(over, comma) / amount(under or "1", comma)) ** int(power or 1)
    except (ValueError, ZeroDivisionError):
        return None
    value = (value + int(whole or 0)) * Fraction(10) ** exponent
    return -value if sign == "-" else value


def parse_number(text: str) -> Fraction | None:
    """Returns the exact value of a text that is one number, with any unit after it.

    A comma before three digits parts thousands. It is decimal after a 0 (`0,5`), after
    other groups (`1.000,50`), and before one or two digits next to a unit (`12,50 €`).
    """
    first = OPENING.match(clean(text).strip())
    if first is None:
        return None
    value, others = value_of(first), tokens(first.string, first.end())
    if not others or REMARK.search(first.string, first.end(), others[0].start()):
        return value
    return value if all(value_of(other) == value for other in others) else None


def parse_gold(answer: str) -> Fraction | None:
    """Returns the gold number of a GSM8K answer: what stands after the last `####`."""
    _, marker, final = answer.rpartition(MARKER)
    return parse_number(final) if marker else None


def last_number(text: str) -> Fraction | None:
    """Returns the last number of the last line that has words, if it stands alone."""
    lines = [line for line in clean(text).splitlines() if re.search(r"\w", line)]
    text = "\n".join(lines[-3:])
    numbers = tokens(text)[-3:]
    if not numbers or "\n" in text[numbers[-1].end() :]:
        return None
    pairs = pairwise(numbers)
    gaps = [text[a.end() : b.start("number")].replace("$", "") for a, b in pairs]
    is_list = len(gaps) == 2 and all(re.fullmatch(r"%?[\s,;|、]+", g) for g in gaps)
    if is_list or (gaps and JOINED.fullmatch(gaps[-1])):
        return None
    return value_of(numbers[-1])


def extract_answer(text: str) -> Fraction | None:
    r"""Returns the number a completion gives as its answer, None when it gives none.

    1. What stands up to the last `</think>`, or after an open `<think>`, is reasoning.
    2. What is marked is the answer: in `\boxed{...}`, in `<answer>` (`<SOLUTION>`)
       tags, or after `####` in its line. It must hold one number, with any unit, after
       a sum (`5 + 7 = 12`) or before a remark. Two marked values are no answer.
    3. Without a mark it is what follows `answer is`, `Answer:` or `#### Total:`.
    4. Else it is the last number of the last line, but of no list (`1, 2, 3`), choice
       (`12 or 13`) or range (`12-15`).

    Values are exact: 1080 = 1,080.00 = $1,080 = 1080% = 2160/2; 0.333 is not 1/3.
    """
    text = REASONING.sub("", text)
    boxes = [clean(box).strip() for box in BOXED.findall(text) + TAGGED.findall(text)]
    lines = [clean(line).strip() for line in MARKED.findall(text)]
    values = {parse_number(line) for line in lines if OPENING.match(line)}
    for box in filter(tokens, boxes):
        values.add(parse_number(box) if OPENING.match(box) else last_number(box))
    if not values:
        values = set(map(parse_number, ANNOUNCED.findall(text))) - {None}
        if not values or (len(values) > 1 and MARKER in text):  # headings
            values = {last_number(text)}
    return values.pop() if len(values) == 1 else None


def own_words(text: str, prompt: str) -> str:
    """Returns a completion without the lines that were copied from its prompt."""
    known, lines = " ".join(prompt.split()), text.splitlines()
    pairs = [(line, line.split()) for line in lines]
    own = [line for line, w in pairs if len(w) < 6 or " ".join(w) not in known]
    return "\n".join(own)


def is_correct(text: str, gold: str, prompt: str = "") -> bool:
    """Returns whether a completion's answer, not copied from its prompt, is `gold`."""
    value = parse_number(gold)
    return value is not None and extract_answer(own_words(text, prompt)) == value


def has_strict_format(text: str) -> bool:
    """Returns whether the text is some working, then one final line `#### <number>`."""
    working, _, line = text.rstrip().rpartition("\n")
    is_final = re.fullmatch(rf"{MARKER} ?{TOKEN} ?[%$]?\.?", "".join(map(fold, line)))
    return bool(re.search(r"\w", working) and is_final) and has_soft_format(text)


def has_soft_format(text: str) -> bool:
    """Returns whether `####` stands once, followed by one number in its line."""
    line = text.partition(MARKER)[2].partition("\n")[0]
    is_number = parse_number(line) is not None and extract_answer(text) is not None
    return is_number and text.count(MARKER) == 1
