"""GSM8K's training problems with other numbers, from its notes for a calculator.

A note, <<48/2=24>>, tells how a number of a worked answer came about. Numbers of the
question get other values of about their size, and each note is reckoned anew. What the
notes do not explain is left out: about half of the problems can be changed.

    python benchmarks/gsm8k_variants.py TRAIN           # prints some, side by side
"""

from __future__ import annotations

import json
import random
import re
import sys
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers.grpo.answers import parse_gold  # noqa: E402

NOTE = re.compile(r"<<([-+*/() \d.]+)=([\d.]+)>>")
NUMBER = re.compile(r"(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)")
ALONE = re.compile(rf"(?<![\w./]){NUMBER.pattern}(?![\w%/]|[.,]\d)")
LEAST = 3  # 1 and 2 are too often a "twice" or a "both"
DRAWS = 40  # of numbers for a problem, until all that follows is whole where it was
Values = dict[Fraction, Fraction]


def value_of(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def reckon(expression: str, values: Values) -> Fraction:
    """Returns what a note's left side comes to, with other values for its numbers.

    Raises:
        ValueError: it is no sum of numbers.
    """

    def exact(number: re.Match[str]) -> str:
        value = value_of(number[0])
        return f"Fraction('{values.get(value, value)}')"

    if re.search(r"[^-+*/() \d.]|\*\*|//", expression):
        raise ValueError(f"{expression!r} is not +, -, *, / and numbers")
    try:
        return Fraction(eval(NUMBER.sub(exact, expression), {"Fraction": Fraction}))
    except (ArithmeticError, SyntaxError, TypeError) as error:
        raise ValueError(f"{expression!r} cannot be reckoned") from error


def changeable(question: str, answer: str) -> list[Fraction]:
    """Returns the question's numbers that can be changed; none where it is not sure."""
    asked = [value_of(text) for text in ALONE.findall(question)]
    steps = [(left, value_of(right)) for left, right in NOTE.findall(answer)]
    results = [right for _, right in steps]
    uses = [{value_of(n) for n in NUMBER.findall(left)} for left, _ in steps]
    used = set().union(*uses)
    early = any(numbers & {*results[n:]} for n, numbers in enumerate(uses))
    told = {value_of(n) for n in NUMBER.findall(NOTE.sub("", answer))}
    once = len({*asked, *results}) == len(asked) + len(results)  # else two meanings
    if not steps or parse_gold(answer) != results[-1] or not once or early:
        return []
    if answer.count("<<") != len(steps) or told - {*asked, *results, *used}:
        return []
    try:
        if any(reckon(left, {}) != right for left, right in steps):  # rounded, or wrong
            return []
    except ValueError:  # a note that is no sum
        return []
    return [n for n in asked if n in used and n >= LEAST and n.denominator == 1]


def draw(number: Fraction, rng: random.Random) -> Fraction:
    """Returns a number between half and twice as much, as round as it is."""
    unit = next(u for u in (1000, 500, 100, 50, 10, 5, 1) if number % u == 0)
    low, high = int(number / (2 * unit)), int(2 * number / unit)
    return Fraction(unit * rng.randint(max(low, 1 + (unit == 1)), high))


def follow(answer: str, values: Values) -> Values | None:
    """Returns the values with all results, or None if one is not of its kind."""
    values = dict(values)
    for left, right in NOTE.findall(answer):
        old, new = value_of(right), reckon(left, values)
        written_so = (100 * new).denominator == 1
        if new <= 0 or (old.denominator == 1 < new.denominator) or not written_so:
            return None
        values[old] = new
    return values


def rewrite(text: str, values: Values) -> str:
    def other(number: re.Match[str]) -> str:
        old = value_of(number[0])
        new = values.get(old, old)
        if new == old:
            return number[0]
        if new.denominator > 1:
            return f"{float(new):.2f}"
        return f"{int(new):,}" if "," in number[0] else str(int(new))

    return NUMBER.sub(other, text)


def vary(question: str, answer: str, rng: random.Random) -> tuple[str, str] | None:
    """Returns a question and its worked answer with other numbers.

    None where the notes do not explain every number of the answer, where a number
    stands for two things, and where no drawn numbers come out.
    """
    free = changeable(question, answer)
    for _ in range(DRAWS if free else 0):
        values = follow(answer, {number: draw(number, rng) for number in free})
        if values is None or all(old == new for old, new in values.items()):
            continue
        return rewrite(question, values), rewrite(answer, values)
    return None


def vary_lines(lines: list[str], count: int) -> list[str]:
    """Returns different variants of JSON lines, up to `count` of each."""
    rows, rng = [json.loads(line) for line in lines], random.Random(0)
    new: dict[str, None] = {}  # in order
    for row in rows * count:
        if pair := vary(row["question"], row["answer"], rng):
            question, answer = pair
            new[json.dumps({"question": question, "answer": answer}) + "\n"] = None
    return [*new]


def equations_alone(lines: list[str]) -> list[str]:
    """Returns JSON lines whose answers are their notes, a line each, and the result.

    Problems are left out whose last note does not give the result.
    """
    short = []
    for row in map(json.loads, lines):
        notes, gold = NOTE.findall(row["answer"]), parse_gold(row["answer"])
        if not notes or gold is None or value_of(notes[-1][1]) != gold:
            continue
        steps = [f"<<{left}={right}>>\n" for left, right in notes]
        final = row["answer"].rpartition("####")[2].strip()
        answer = "".join(steps) + f"#### {final}"
        short.append(json.dumps({"question": row["question"], "answer": answer}) + "\n")
    return short


def main() -> None:
    """Prints problems and their variants, and how many have one."""
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    rows, rng = [json.loads(line) for line in lines], random.Random(0)
    varied = [vary(row["question"], row["answer"], rng) for row in rows]
    pairs = [(row, new) for row, new in zip(rows, varied, strict=True) if new]
    for row, (question, answer) in rng.sample(pairs, min(3, len(pairs))):
        print(f"{row['question']}\n{row['answer']}\n->\n{question}\n{answer}\n")
    print(f"{len(pairs)} of {len(rows)} problems have variants")


if __name__ == "__main__":
    main()
