"""Verdicts: lm-evaluation-harness's by its own code, and what is counted from ours."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.evaluation import gsm8k as verdicts
from helpers.evaluation.stats import proportion

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

KEYS = ("correct", "strict_match", "flexible_extract", "strict_format", "stopped")


def items(*rows: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Items with these verdicts, `tokens` last."""
    return [dict(zip((*KEYS, "tokens"), row, strict=True)) for row in rows]


def test_our_verdicts_are_those_of_lm_eval_on_changed_and_random_outputs():
    pytest.importorskip("lm_eval")
    import random

    import gsm8k_agreement

    draw = random.Random(7)  # other strings than the benchmark's
    problems = [{"answer": f"2 * {n} = {2 * n}\n#### {2 * n}"} for n in (7, 600, -3)]
    outputs = [
        *gsm8k_agreement.change_answers(problems, draw),
        *gsm8k_agreement.random_strings(600, draw),
    ]
    found = gsm8k_agreement.agreement(outputs)
    assert found["n"] > 800
    assert found["strict_agree"] == found["flexible_agree"] == found["n"]
    for counts in found["judged_right"].values():  # or it would say little
        assert all(10 < count < found["n"] - 10 for count in counts.values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So 1,080.\n#### 1080", (True, True, True, True)),
        ("It is $1,080.", (True, False, True, False)),
        # ours compares numbers, lm-eval strings
        ("So 1080.\n#### 1080.00", (True, False, False, True)),
        ("no idea", (False, False, False, False)),
    ],
)
def test_the_four_verdicts_on_an_answer(text, expected):
    problem = {"gold": "1080", "answer": "2 * 540 = 1080\n#### 1080", "prompt": "?"}
    found = verdicts.judge(text, problem)
    assert tuple(found[name] for name in verdicts.VERDICTS) == expected


def test_the_chat_protocol_wants_its_own_sentence():
    problem = {"gold": "5", "answer": "#### 5"}
    said = "2 + 3 = 5. The final answer is 5"
    assert verdicts.judge(said, problem, "gsm8k_cot_llama")["strict_match"]
    assert not verdicts.judge(said, problem)["strict_match"]


def test_a_summary_counts_verdicts_stops_and_tokens():
    found = verdicts.summarise(
        items(
            (True, True, True, True, True, 10),
            (True, False, True, False, True, 20),
            (False, False, False, True, True, 5),
            (False, False, False, False, False, 64),
        )
    )
    assert found == {
        "accuracy": proportion(2, 4),
        "strict_match": proportion(1, 4),
        "flexible_extract": proportion(2, 4),
        "strict_format": proportion(2, 4),
        "stop_rate": 0.75,
        "truncated": 1,
        "tokens": 99,
    }


def test_a_strict_gain_is_split_into_format_and_reasoning():
    right, loose = (
        (True, True, True, True, True, 1),
        (True, False, True, False, True, 1),
    )
    wrong = (False, False, False, False, True, 1)
    first = items(loose, loose, wrong, right, right, wrong, right)
    second = items(right, right, right, wrong, loose, loose, right)
    assert verdicts.gain(first, second) == {
        "strict_match": 1,
        "format": 1,
        "reasoning": 0,
        "format_gained": 2,
        "format_lost": 1,
        "reasoning_gained": 1,
        "reasoning_lost": 1,
    }


def drawn(*said: tuple[str | None, bool]) -> list[dict[str, Any]]:
    """The answers drawn to one problem."""
    return [{"extracted": number, "correct": right} for number, right in said]


def test_the_majority_is_asked_over_the_first_k_answers():
    right, wrong = ("3", True), ("4", False)
    groups = [
        drawn(wrong, right, right, right),
        drawn(right, wrong, wrong, wrong),
        drawn((None, False), (None, False), right, (None, False)),
    ]
    found = verdicts.summarise_samples(groups)
    assert found["maj@4"] == proportion(2, 3)
    assert found["pass@1"]["mean"] == pytest.approx((3 + 1 + 1) / 12, abs=1e-4)
    assert found["pass@2"]["mean"] == pytest.approx((1 + 0.5 + 0.5) / 3, abs=1e-4)
    assert found["pass@4"]["mean"] == 1.0


def test_without_any_number_no_majority_is_right():
    assert not verdicts.majority_is_right(drawn((None, False), (None, False)))
