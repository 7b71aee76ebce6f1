"""Generate the word problems in data_samples/word_problems.

Run ``python data_samples/generate.py``. The same seed always gives the same
bytes. Only the standard library is used.

The problems come from two text files next to this one: ``templates.txt`` (for
train, eval and test) and ``templates_new.txt`` (for test_new only). A template
is a block of lines; blocks are separated by empty lines, ``#`` starts a comment:

    groups-extra
    draw k=3..9 q=4..15 e=3..30
    word pack box/boxes|bag|basket
    ask  {name} has {k} {pack.s} of {q} {item.s} and {e} more. How many in all?
    step The {pack.s} hold [x = k * q] {item.s}.
    step In all there are [y = x + e] {item.s}.

* first line: the name of the template.
* ``draw``: numbers, drawn from left to right. ``a=3..9`` draws from 3 to 9,
  ``a=10..50/10`` draws one of 10, 20, 30, 40, 50, and ``t=k*q`` computes. Bounds
  may use the numbers before them (``b=3..a-2``).
* ``word``: the words that one slot may take in this template, instead of POOLS.
  ``box/boxes`` gives a singular and a plural; a plain ``bag`` gets an "s".
* ``ask``: one wording of the question. One of the wordings is drawn for a row.
* ``step``: one line of the worked answer, with exactly one ``[x = a + b]``. It
  renders as ``12 + 7 = 19`` and binds x for the later steps. The result of the
  last step is the gold answer.
* ``{a}`` is a number, ``{item}`` a word, ``{item.s}`` its plural, ``{item2}``
  another word of the same pool, ``{Item}`` the word with a capital letter.

A draw is thrown away when a number above 60 is drawn or a step does not give an
integer from 2 to 100, so a template needs no further conditions: divisions are
always exact.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 20240
SMALLEST, LARGEST_GIVEN, LARGEST = 2, 60, 100
# Rows per split, in the order in which they are drawn.
SHARED_SPLITS = {"test": 400, "eval": 200, "train": 2400}
NEW_SPLITS = {"test_new": 200}

POOLS = {
    "name": "Maya|Omar|Lucia|Kenji|Amara|Felix|Priya|Tomas|Leila|Andrei|Zuri|Hugo"
    "|Mei|Ravi|Ingrid|Kofi|Sofia|Dmitri|Aisha|Liam|Yuki|Carlos|Nadia|Sven|Thandi"
    "|Mateo|Hana|Idris|Clara|Bao|Fatima|Oscar|Anika|Joao|Elif|Pavel|Rosa|Tariq"
    "|Greta|Emeka|Lin|Noah|Simone|Arjun|Wanjiru|Pedro|Salma|Erik|Olivia|Tane",
    "item": "shell|marble|sticker|stamp|bead|button|postcard|coin|badge|crayon"
    "|toy car|trading card|puzzle piece|key ring|pencil|rubber band"
    "|feather|magnet|glass ball",
    "food": "muffin|cookie|pancake|samosa|dumpling|tart|sandwich/sandwiches|bun"
    "|pretzel|waffle|spring roll|scone|empanada|cupcake",
    "fruit": "apple|pear|plum|orange|mango/mangoes|peach/peaches|lemon|fig|apricot"
    "|lime|quince|guava",
    "flower": "tulip|rose|daisy/daisies|sunflower|lily/lilies|poppy/poppies|carnation",
    "veg": "tomato plant|cabbage|bean plant|pepper plant|lettuce|pumpkin|leek|onion",
    "pack": "box/boxes|bag|jar|tin|basket|bowl|drawer",
    "good": "mug|poster|notebook|candle|scarf/scarves|puzzle|lamp|kite|plate"
    "|brush/brushes|cap|calendar|teapot|cushion",
    "bigbuy": "guitar|skateboard|camera|telescope|tent|drum|bicycle|watch/watches",
    "money": "dollar|euro|pound|peso|rupee",
    "toy": "wooden train|doll|toy boat|kite|toy robot|chess piece|mask|lantern",
    "vehicle": "bus/buses|tram|train|coach/coaches",
    "beast": "horse|cow|goat|donkey|pig|sheep/sheep",
    "bird": "hen|duck|goose/geese|turkey|rooster",
    "sport": "football|tennis|chess|hockey|volleyball|badminton|cricket|basketball",
    "instrument": "violin|piano|flute|guitar|trumpet|cello|drums|clarinet",
    "yard": "garden|field|playground|meadow|vegetable patch|courtyard",
    "cake": "cake|pie|pudding|quiche",
    "seafish": "catfish|clownfish|goldfish|angelfish|pufferfish",
}

SLOT = re.compile(r"\{([A-Za-z]+)(\d?)(\.s)?\}")
STEP = re.compile(r"\[(\w+) = ([^\]]+)\]")
EQUATION = re.compile(r"(\d+(?: [-+*/] \d+)+) = (\d+)")
OPERATORS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}
Row = dict[str, str]


@dataclass
class Template:
    name: str
    draws: list[tuple[str, str]] = field(default_factory=list)
    words: dict[str, str] = field(default_factory=dict)
    asks: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)


def read_templates(path: Path) -> list[Template]:
    """Read the blocks of a template file."""
    templates: list[Template] = []
    text = re.sub(r"^#.*\n", "", path.read_text(encoding="utf-8"), flags=re.M)
    for block in re.split(r"\n\s*\n", text.strip()):
        name, *lines = block.strip().splitlines()
        template = Template(name.strip())
        for line in lines:
            keyword, rest = line.split(maxsplit=1)
            if keyword == "draw":
                for part in rest.split():
                    variable, rule = part.split("=")
                    template.draws.append((variable, rule))
            elif keyword == "word":
                slot, options = rest.split(maxsplit=1)
                template.words[slot] = options
            elif keyword == "ask":
                template.asks.append(rest)
            elif keyword == "step":
                template.steps.append(rest)
            else:
                raise ValueError(f"{path.name}, {name}: unknown line {line!r}")
        templates.append(template)
    return templates


def value_of(expression: str, numbers: dict[str, int]) -> Fraction:
    """Evaluate an expression of numbers, names and + - * /, without brackets."""
    tokens = re.findall(r"\w+|[-+*/]", expression)
    values = [Fraction(int(t) if t.isdigit() else numbers[t]) for t in tokens[::2]]
    terms = [values[0]]
    for operator, value in zip(tokens[1::2], values[1:], strict=True):
        if operator in "*/":
            terms[-1] = OPERATORS[operator](terms[-1], value)
        else:
            terms.append(value if operator == "+" else -value)
    return sum(terms, Fraction(0))


def draw_numbers(template: Template, rng: random.Random) -> dict[str, int] | None:
    """Draw the numbers of a template; None if a range is empty."""
    numbers: dict[str, int] = {}
    for variable, rule in template.draws:
        if ".." in rule:
            bounds, _, stride = rule.partition("/")
            low, high = (int(value_of(b, numbers)) for b in bounds.split(".."))
            options = range(low, high + 1, int(stride or 1))
            if not options:
                return None
            numbers[variable] = rng.choice(options)
        else:
            numbers[variable] = int(value_of(rule, numbers))
    return numbers


def draw_words(template: Template, rng: random.Random) -> dict[str, tuple[str, str]]:
    """Draw a singular and a plural for every slot, without repeats in a pool."""
    words: dict[str, tuple[str, str]] = {}
    pools: dict[str, list[str]] = {}
    text = " ".join(template.asks + template.steps)
    numbers = {variable for variable, _ in template.draws}
    for kind, index, _ in SLOT.findall(text):
        slot = kind.lower()
        if slot + index in words or slot in numbers:
            continue
        if slot not in pools:
            pools[slot] = (template.words.get(slot) or POOLS[slot]).split("|")
            rng.shuffle(pools[slot])
        singular, _, plural = pools[slot].pop().partition("/")
        words[slot + index] = (singular, plural or singular + "s")
    return words


def fill(text: str, numbers: dict[str, int], words: dict[str, tuple[str, str]]) -> str:
    """Put numbers and words into the slots of a text."""

    def slot(match: re.Match[str]) -> str:
        kind, index, plural = match.groups()
        if kind in numbers:
            return str(numbers[kind])
        word = words[kind.lower() + index][1 if plural else 0]
        return word if kind[0].islower() else word[0].upper() + word[1:]

    return SLOT.sub(slot, text)


def render(template: Template, rng: random.Random) -> Row | None:
    """Draw one problem; None if its numbers do not work out."""
    numbers = draw_numbers(template, rng)
    if numbers is None or max(numbers.values()) > LARGEST_GIVEN:
        return None
    words = draw_words(template, rng)
    question = fill(rng.choice(template.asks), numbers, words)
    lines: list[str] = []
    result = 0
    for step in template.steps:
        match = STEP.search(step)
        if match is None:
            raise ValueError(f"{template.name}: no equation in {step!r}")
        variable, expression = match.groups()
        value = value_of(expression, numbers)
        if value.denominator != 1 or not SMALLEST <= value <= LARGEST:
            return None
        result = int(value)
        shown = " ".join(str(numbers.get(t, t)) for t in expression.split(" "))
        numbers[variable] = result
        lines.append(
            fill(step[: match.start()], numbers, words)
            + f"{shown} = {result}"
            + fill(step[match.end() :], numbers, words)
        )
    lines.append(f"#### {result}")
    return {
        "id": "",
        "question": question,
        "answer": "\n".join(lines),
        "template": template.name,
    }


def check(row: Row) -> None:
    """Re-read the equations from the answer text; raise ValueError if one is wrong."""
    *steps, last = row["answer"].split("\n")
    result = ""
    for line in steps:
        found = EQUATION.findall(line)
        if len(found) != 1 or line.count("=") != 1:
            raise ValueError(f"not exactly one equation in {line!r}: {row}")
        left, result = found[0]
        first, *rest = left.split(" ")
        value = Fraction(first)
        if len(rest) != 2:
            raise ValueError(f"not one operation in {line!r}: {row}")
        value = OPERATORS[rest[0]](value, Fraction(rest[1]))
        if value != int(result):
            raise ValueError(f"wrong arithmetic in {line!r}: {row}")
    if not steps or last != f"#### {result}":
        raise ValueError(f"the last line is not the last result: {row}")
    if re.search(r"[{}\[\]]|  ", row["question"] + row["answer"]):
        raise ValueError(f"unfilled slot or double space: {row}")


def rows_of(template: Template, seed: int) -> Iterator[Row]:
    """Yield problems of one template; no two have the same numbers."""
    rng = random.Random(f"{seed}/{template.name}")
    seen: set[tuple[str, ...]] = set()
    misses = 0
    while misses < 20_000:
        row = render(template, rng)
        # Sorted, so that wordings which swap two numbers count as the same.
        key = tuple(sorted(re.findall(r"\d+", row["question"]))) if row else ()
        if row is None or key in seen:
            misses += 1
            continue
        misses = 0
        seen.add(key)
        check(row)
        yield row


def make_splits(
    templates: list[Template], sizes: dict[str, int], seed: int
) -> dict[str, list[Row]]:
    """Deal the problems of the templates to the splits, in turns."""
    streams = {template.name: rows_of(template, seed) for template in templates}
    names = list(streams)
    order = random.Random(f"{seed}/order")
    questions: set[str] = set()
    splits: dict[str, list[Row]] = {}
    for split, size in sizes.items():
        order.shuffle(names)
        rows: list[Row] = []
        while len(rows) < size:
            name = names[len(rows) % len(names)]
            row = next(streams[name], None)
            if row is None:
                raise ValueError(f"template {name} has too few different problems")
            if row["question"] not in questions:
                questions.add(row["question"])
                rows.append(row)
        order.shuffle(rows)
        for index, row in enumerate(rows):
            row["id"] = f"{split}-{index:05d}"
        splits[split] = rows
    return splits


def generate(folder: Path, seed: int = SEED) -> dict[str, list[Row]]:
    """Write train, eval, test and test_new as JSON lines into a folder."""
    shared = read_templates(HERE / "templates.txt")
    new = read_templates(HERE / "templates_new.txt")
    splits = make_splits(shared, SHARED_SPLITS, seed)
    splits |= make_splits(new, NEW_SPLITS, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path = folder / f"{split}.jsonl"
        path.write_text("".join(lines), encoding="utf-8", newline="\n")
    return splits


def main() -> None:
    for split, rows in generate(HERE / "word_problems").items():
        templates = len({row["template"] for row in rows})
        print(f"{split}.jsonl: {len(rows)} rows, {templates} templates")


if __name__ == "__main__":
    main()
