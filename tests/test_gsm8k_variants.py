"""Tests of benchmarks/gsm8k_variants.py: other numbers, the same reckoning."""

import json
import random
import re
from fractions import Fraction
from pathlib import Path

import pytest

from benchmarks import gsm8k_variants
from helpers.grpo import answers

GSM8K = Path(__file__).parent.parent.parent / "shared/data/gsm8k/train.jsonl"


def problem(number=7):
    question = (
        f"Ann has {number} pens and buys 1,200 more for 2 friends. And 50% of it?"
    )
    total = number + 1200
    answer = f"She has {number} + 1200 = <<{number}+1200={total}>>{total} pens.\n"
    answer += f"Each friend gets {total * 2} / 2 ... <<{total}*2={total * 2}>>"
    return question, answer + f"{total * 2}.\n#### {total * 2}"


def test_all_numbers_follow_from_the_changed_ones():
    seen = set()
    for seed in range(20):
        question, answer = gsm8k_variants.vary(*problem(), random.Random(seed))
        pens, more = re.match(
            r"Ann has (\d+) pens and buys ([\d,]+)", question
        ).groups()
        assert "for 2 friends. And 50% of it?" in question  # left as they are
        pens, more = int(pens), int(more.replace(",", ""))
        assert 3 <= pens <= 14 and 600 <= more <= 2400 and more % 100 == 0
        total = pens + more
        assert answer.startswith(f"She has {pens} + {more} = <<{pens}+{more}={total}>>")
        assert answer.endswith(
            f"<<{total}*2={2 * total}>>{2 * total}.\n#### {2 * total}"
        )
        seen.add((pens, more))
    assert len(seen) > 10


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("5 pens, 5 boys", "<<5+5=10>>10\n#### 10"),  # which of both?
        ("5 pens, 10 boys", "<<5+5=10>>10\n#### 10"),  # asked, and a result
        ("5 pens", "5 x 4 = 20, <<5+1=6>>6\n#### 6"),  # 20 is not explained
        ("9 pens", "<<9*2=18>>18 <<18-16=2>>2\n#### 2"),  # 2 before it is a result
        ("9 pens", "<<9+1=10>>10, 7 left\n#### 7"),  # not by a note
        ("9 pens", "<<9/7=1.29>>1.29\n#### 1.29"),  # rounded
        ("9 pens", "<<9+1=11>>11\n#### 11"),  # wrong
        ("9 pens", "<<9**9=387420489>>\n#### 387420489"),
        ("9 pens", "<<x+9=10>>10\n#### 10"),
        ("9 pens", "<<9(2)=18>>18\n#### 18"),
        ("twice 2", "<<2*2=4>>4\n#### 4"),
        ("no number", "#### 4"),
    ],
)
def test_what_the_notes_do_not_explain_is_left_out(question, answer):
    assert gsm8k_variants.vary(question, answer, random.Random(0)) is None


def test_lines_are_varied_once_each_and_others_left_out():
    rows = [problem(), ("no number", "#### 4")]
    lines = [json.dumps({"question": q, "answer": a}) for q, a in rows]
    new = gsm8k_variants.vary_lines(lines, 3)
    assert len(set(new)) == len(new) == 3 and not set(new) & set(lines)
    assert new == gsm8k_variants.vary_lines(lines, 3)  # the same every time
    assert gsm8k_variants.vary_lines(lines, 0) == []


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not here")
def test_every_variant_of_gsm8k_reckons_right():
    lines = GSM8K.read_text("utf-8").splitlines()[:2000]
    new = [json.loads(line) for line in gsm8k_variants.vary_lines(lines, 1)]
    assert len(new) > 900
    for row in new:
        notes = gsm8k_variants.NOTE.findall(row["answer"])
        reckoned = [gsm8k_variants.reckon(left, {}) for left, _ in notes]
        assert [float(right) for _, right in notes] == pytest.approx(
            [float(value) for value in reckoned], abs=0.0051
        )
        assert Fraction(answers.parse_gold(row["answer"])) == reckoned[-1]
