"""Verdicts: lm-evaluation-harness's by its own code, and what is counted from ours."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.data.reading import to_problems
from helpers.data.sources import load_rows
from helpers.evaluation import metrics as gsm8k
from helpers.models import load as models

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))


def test_our_verdicts_are_those_of_lm_eval_on_changed_and_random_outputs() -> None:
    pytest.importorskip("lm_eval")
    import gsm8k_agreement

    draw = random.Random(7)  # other strings than the benchmark's
    problems = [{"answer": f"2 * {n} = {2 * n}\n#### {2 * n}"} for n in (7, 600, -3)]
    outputs = [
        *gsm8k_agreement.change_answers(problems, draw),
        *gsm8k_agreement.random_strings(600, draw),
    ]
    counts = gsm8k_agreement.agreement(outputs)
    assert counts["n"] > 800
    assert counts["strict_agree"] == counts["flexible_agree"] == counts["n"]
    for right in counts["judged_right"].values():  # or it would say little
        assert all(10 < count < counts["n"] - 10 for count in right.values())


@pytest.mark.parametrize("task", ["gsm8k", "gsm8k_cot_llama"])
def test_lm_eval_itself_has_the_same_prompts_outputs_and_accuracy(
    task: str, tiny_model_folder: Path
) -> None:
    pytest.importorskip("lm_eval")
    import gsm8k_agreement

    model, tokenizer = models.load_model(str(tiny_model_folder))
    problems = to_problems(load_rows("data_samples/word_problems/test.jsonl", 3))
    shots = "data_samples/word_problems/train.jsonl"
    counts = gsm8k_agreement.end_to_end(task, model, tokenizer, problems, shots, 8)
    assert counts["same_prompts"] == counts["same_outputs"] == counts["n"] == 3


QUESTION = "How many hens are there in all, if Ann counts 1080?"


@pytest.mark.parametrize(
    ("text", "verdicts"),
    [
        ("So 1,080.\n#### 1080", (True, True, True, True)),
        ("It is $1,080.", (True, False, True, False)),
        # ours compares numbers, lm-eval strings
        ("So 1080.\n#### 1080.00", (True, False, False, True)),
        ("no idea", (False, False, False, False)),
        # the number of the problem itself, copied
        (QUESTION, (False, False, True, False)),
    ],
)
def test_the_four_verdicts_on_an_answer(text: str, verdicts: tuple[bool, ...]) -> None:
    prompt = [{"role": "user", "content": QUESTION}]
    problem = {"gold": "1080", "answer": "2 * 540 = 1080\n#### 1080", "prompt": prompt}
    item = gsm8k.check_answer(text, problem)
    assert tuple(item[name] for name in gsm8k.VERDICTS) == verdicts


def items(*rows: tuple[bool, bool]) -> list[dict[str, Any]]:
    """Items: whether the number is right, and whether the strict match is."""
    return [{"correct": correct, "strict_match": strict} for correct, strict in rows]


def test_a_strict_gain_is_split_into_format_and_reasoning() -> None:
    right, loose, wrong = (True, True), (True, False), (False, False)
    first = items(loose, loose, wrong, right, right, wrong, right)
    second = items(right, right, right, wrong, loose, loose, right)
    assert gsm8k.split_gain(first, second) == {
        "by format": {"only_first": 1, "only_second": 2},
        "by reasoning": {"only_first": 1, "only_second": 1},
    }
