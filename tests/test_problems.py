"""The problems of GRPO: what is trained on, what is held out, how it is scored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.config import SYSTEM_PROMPT, changed
from helpers.data import preparation as data
from helpers.data.sources import load_rows
from helpers.errors import ConfigError
from helpers.grpo import answers, problems, rewards
from helpers.inference.generation import Answer
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
    run = problem_run(max_prompt_length=500)
    rows = problems.training_prompts(run, tokenizer)
    assert len(rows) == len(ROWS) - 2
    system = {"role": "system", "content": SYSTEM_PROMPT}
    question = {"role": "user", "content": ROWS[-3]["question"]}
    assert rows[-1] == {"prompt": [system, question], "gold": "1622"}


def test_the_format_rewards_pay_for_what_the_system_prompt_asks_for() -> None:
    line = SYSTEM_PROMPT.partition(": ")[2]
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


def test_fewer_prompts_than_a_step_takes_are_refused(
    problem_run: Callable[..., Run], tokenizer: Any
) -> None:
    run = problem_run(grpo={"per_device_train_batch_size": 22, "num_generations": 2})
    text = "no step: 10 of 12 problems are left .* takes 11 .22 answers, 2 to each"
    with pytest.raises(ConfigError, match=text):
        problems.require_prompts(run)
    with pytest.raises(ConfigError, match=text):
        problems.training_prompts(run, tokenizer)
    problems.require_prompts(problem_run())


def test_held_out_problems_are_eval_rows_and_all_problems_are_trained_on(
    run_factory: Callable[..., Run],
) -> None:
    run = run_factory(stages=["grpo"], grpo_held_out=4)
    data.prepare(run)
    left, held_out = problems.split_problems(run)
    assert (len(left), len(held_out)) == (2400, 4)
    rows = load_rows(run.config.data.eval or "")
    assert [p["question"] for p in held_out] == [r["question"] for r in rows[:4]]
    assert held_out[0]["gold"] == rows[0]["answer"].split("#### ")[1]


@pytest.mark.parametrize("rows", [None, "data_samples/alpaca.jsonl"])
def test_without_eval_rows_with_gold_answers_the_last_problems_are_held_out(
    problem_run: Callable[..., Run], rows: str | None
) -> None:
    run = problem_run(data__eval=rows)
    every = data.read_rows(run.path / "data" / "problems.jsonl")
    assert problems.split_problems(run) == (every[:-2], every[-2:])


def test_the_held_out_reward_is_the_weighted_mean_over_answers(tokenizer: Any) -> None:
    def length(completions: list[Any], **_: Any) -> list[float | None]:
        return [float(len(rewards.text_of(c)) % 7) for c in completions]

    rows = [{"prompt": data.ask(q, ""), "gold": "5"} for q in ("1 + 4?", "2 + 2?")]
    texts = [Answer("five: 5", 7, True), Answer("no", 2, True)]
    functions: Any = [length, rewards.correctness]
    assert problems.score(texts, rows, tokenizer, functions, [0.5, 1.0]) == {
        "eval_rewards/length": 1.0,  # of 0 and 2
        "eval_rewards/correctness": 0.5,
        "eval_reward": 1.0,
    }


def test_pass_rates_are_of_answers_drawn_as_grpo_does(run: Run) -> None:
    from trl import GRPOConfig

    config = changed(run.config, grpo={"temperature": 0.7, "max_completion_length": 9})
    drawn: dict[str, Any] = {}

    def answer(prompts: list[Any], sampling: dict[str, Any]) -> list[Answer]:
        drawn.update(sampling)
        return [Answer(text, 1, True) for text in ("5", "6", "#### 5", "7", "8", "9")]

    rows = [{"question": "2 + 3?", "gold": "5"}, {"question": "1?", "gold": "1"}]
    rates = problems.pass_rates(Run(run.path, config), answer, rows, samples=3)
    assert rates == [pytest.approx(2 / 3), 0]
    assert drawn == {
        "temperature": 0.7,
        "top_p": GRPOConfig.top_p,
        "top_k": GRPOConfig.top_k,
        "min_p": GRPOConfig.min_p,
        "repetition_penalty": GRPOConfig.repetition_penalty,
        "max_new_tokens": 9,
    }
