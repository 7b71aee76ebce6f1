"""The plan of a time budget: what it is made of, what it says, what it keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import recipes
from helpers.config import changed
from helpers.grpo import budget


def timing(**changes: float) -> budget.Timing:
    known = {"step_s": 5.0, "evaluation_s": 2.0, "spent_s": 30.0, "longest": 61}
    return budget.Timing(**{**known, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("minutes", [2, 10, 60, 300])
@pytest.mark.parametrize("step_s", [0.5, 5.0, 11.0])
@pytest.mark.parametrize("evaluation_s", [0.0, 1.0, 20.0])
def test_a_plan_is_within_a_tenth_of_its_minutes(
    minutes: float, step_s: float, evaluation_s: float
) -> None:
    made = budget.plan(minutes, timing(step_s=step_s, evaluation_s=evaluation_s))
    assert 0.85 * minutes * 60 - step_s <= made.seconds <= minutes * 60


def test_evaluations_take_at_most_a_fifth_of_the_time() -> None:
    made = budget.plan(10, timing(evaluation_s=60))
    assert made.steps // made.eval_steps * 60 <= 0.2 * 600


def test_there_is_one_step_and_one_evaluation_where_nothing_fits() -> None:
    assert budget.plan(0.1, timing())[1:3] == (1, 1)


def test_a_plan_and_its_used_time_are_kept_in_the_folder(tmp_path: Path) -> None:
    assert budget.read_plan(tmp_path) is None and budget.read_used(tmp_path) == 0
    made = budget.plan(10, timing())
    budget.write_plan(tmp_path, made)
    assert budget.read_plan(tmp_path) == made
    assert budget.read_used(tmp_path) == 30


def test_the_table_says_what_a_step_holds_and_how_often_prompts_are_seen() -> None:
    config = changed(
        recipes.load("demo"),
        grpo__per_device_train_batch_size=32,
        grpo__gradient_accumulation_steps=2,
        grpo__num_generations=8,
        grpo__max_completion_length=96,
        grpo_held_out=32,
    )
    said = repr(budget.table(budget.plan(10, timing()), config, prompts=424))
    assert "9.6 of 10 minutes, of which the probe took 30 s" in said
    assert "8 prompts, 8 answers each, 5.0 s" in said
    assert "106, with 848 prompts drawn from 424" in said
    assert "at most 96 tokens; the longest sampled has 61" in said
    assert "32 problems every 14 steps, 2.0 s" in said
    assert "too few?" not in said


def test_a_plan_of_few_steps_says_so() -> None:
    made = budget.plan(1, timing())
    said = repr(budget.table(made, recipes.load("demo"), prompts=2400))
    assert f"{made.steps} show that it works; a gain takes more" in said


def test_without_minutes_the_table_has_the_steps_of_the_config() -> None:
    config = changed(recipes.load("demo"), grpo_minutes=None, grpo__max_steps=30)
    said = repr(budget.table(None, config, prompts=2400))
    assert (
        "30, with 60 prompts drawn from 2400" in said
        and "set grpo_minutes to plan for a time" in said
    )
