"""The problems of GRPO: what is trained on, and what is held out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.config import SYSTEM_PROMPT
from helpers.data import load_rows
from helpers.data import preparation as data
from helpers.errors import ConfigError
from helpers.grpo import answers
from helpers.grpo import trainer as problems
from helpers.runs import Run

# in the format of GSM8K's files
ROWS = [
    {"question": f"Ann has {n} nuts and gets {n} more. How many has she?"}
    | {"answer": f"Ann has {n}+{n}=<<{n}+{n}={2 * n}>>{2 * n} nuts.\n#### {2 * n:,}"}
    for n in range(1, 1000, 90)
]


@pytest.fixture
def problem_run(run_factory: Callable[..., Run], tmp_path: Path) -> Callable[..., Run]:
    """Makes a prepared GRPO run over the problems above, from a local file."""
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")

    def make(**changes: Any) -> Run:
        local = {"stages": ["grpo"], "data__train": [], "data__eval": None}
        local |= {"data__problems": str(path), "grpo_held_out": 2}
        run = run_factory(**{**local, **changes})
        data.prepare(run)
        return run

    return make


def test_a_prompt_is_the_question_under_the_system_prompt_with_a_plain_gold(
    problem_run: Callable[..., Run], tokenizer: Any
) -> None:
    rows = problems.training_prompts(problem_run(max_prompt_length=500), tokenizer)
    assert len(rows) == len(ROWS) - 2
    system = {"role": "system", "content": SYSTEM_PROMPT}
    question = {"role": "user", "content": ROWS[-3]["question"]}
    assert rows[-1] == {"prompt": [system, question], "gold": "1622"}
    line = SYSTEM_PROMPT.partition(": ")[2]  # the format that is paid for
    assert answers.has_strict_format(f"6 * 7 = 42\n{line}")


def test_prompts_over_the_limit_are_left_out_and_counted(
    problem_run: Callable[..., Run], tokenizer: Any
) -> None:
    rows = problems.training_prompts(problem_run(), tokenizer)
    prompts = [row["prompt"] for row in rows]
    ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True)
    shortest, *_, longest = sorted(map(len, ids["input_ids"]))
    run = problem_run(max_prompt_length=longest - 1)
    left = problems.training_prompts(run, tokenizer)
    counts = {"prompts": len(left), "left_out": len(rows) - len(left)}
    assert 0 < len(left) < len(rows)
    assert json.loads((run.path / "grpo/prompts.json").read_text()) == counts
    with pytest.raises(ConfigError, match=f"shortest prompt has {shortest} tokens"):
        problems.training_prompts(problem_run(max_prompt_length=5), tokenizer)


def test_fewer_problems_than_a_step_takes_are_refused(
    problem_run: Callable[..., Run],
) -> None:
    run = problem_run(grpo={"per_device_train_batch_size": 22, "num_generations": 2})
    text = "no step: 10 problems are left .* takes 11 .22 answers, 2 to each"
    with pytest.raises(ConfigError, match=text):
        problems.require_prompts(run)
    problems.require_prompts(problem_run())


def test_held_out_problems_are_eval_rows_and_all_problems_are_trained_on(
    run_factory: Callable[..., Run],
) -> None:
    run = run_factory(stages=["grpo"], grpo_held_out=4)
    data.prepare(run)
    left, held_out = problems.split_problems(run)
    assert (len(left), len(held_out)) == (2400, 4)
    rows = load_rows(run.config.data.eval or "")
    asked = [problem["prompt"][-1]["content"] for problem in held_out]
    assert asked == [row["question"] for row in rows[:4]]
    assert held_out[0]["gold"] == rows[0]["answer"].split("#### ")[1]


@pytest.mark.parametrize("rows", [None, "data_samples/alpaca.jsonl"])
def test_without_eval_rows_with_gold_answers_the_last_problems_are_held_out(
    problem_run: Callable[..., Run], rows: str | None
) -> None:
    parts = problems.split_problems(problem_run(data__eval=rows))
    asked = [[row["prompt"][-1]["content"] for row in part] for part in parts]
    questions = [row["question"] for row in ROWS]
    assert asked == [questions[:-2], questions[-2:]]
