"""GRPO: what is held out, the probe and its plan, the adapter that is kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from helpers import stages
from helpers.config import changed
from helpers.data import preparation as data
from helpers.errors import ConfigError
from helpers.grpo import budget, heldout, rewards
from helpers.grpo import monitor as guards
from helpers.grpo import trainer as grpo
from helpers.inference.generation import Answer
from helpers.runs import Run
from helpers.training import trainer as train


def length(completions: list[Any], **_: Any) -> list[float | None]:
    """A reward of one's own that random text spreads: its length, modulo seven."""
    return [float(len(rewards.text_of(c)) % 7) for c in completions]


@pytest.fixture
def make(
    run_factory: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Run]:
    """Makes a prepared run of GRPO alone, with a reward that a random model gets."""
    monkeypatch.setitem(rewards.REWARDS, "length", length)

    def prepared(**changes: Any) -> Run:
        small = {
            "stages": ["grpo"],
            "rewards": {"length": 1.0, "strict_format": 0.5},
            "grpo__max_steps": 3,
            "grpo__max_completion_length": 6,
            "grpo_held_out": 4,
        }
        run = run_factory(**{**small, **changes})
        data.prepare(run)
        return run

    return prepared


def history(run: Run) -> list[dict[str, Any]]:
    return json.loads((run.path / "grpo" / "log_history.json").read_text())


# what is held out


def test_held_out_problems_are_eval_rows_and_all_problems_are_trained_on(
    make: Callable[..., Run],
) -> None:
    run = make()
    problems, held = heldout.split_problems(run)
    assert (len(problems), len(held)) == (2400, 4)
    rows = data.load_rows(run.config.data.eval or "")
    assert [p["question"] for p in held] == [r["question"] for r in rows[:4]]
    assert held[0]["gold"] == rows[0]["answer"].split("#### ")[1]


def test_without_eval_rows_the_last_problems_are_held_out(
    make: Callable[..., Run],
) -> None:
    run = make(data__train=[], data__eval=None)
    rows = data.read_rows(run.path / "data" / "problems.jsonl")
    problems, held = heldout.split_problems(run)
    assert problems == rows[:-4] and held == rows[-4:]


def test_eval_conversations_without_a_gold_answer_are_not_held_out(
    make: Callable[..., Run],
) -> None:
    run = make(data__eval="data_samples/alpaca.jsonl")
    assert heldout.split_problems(run)[1][0]["id"] == "train-02396"


def test_the_held_out_reward_is_the_weighted_mean_over_answers(
    tiny_model_folder: Any,
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    held = [{"prompt": data.ask(q, ""), "gold": "5"} for q in ("1 + 4?", "2 + 2?")]
    answers = [Answer("five: 5", 7, True), Answer("no", 2, True)]
    functions: Any = [length, rewards.correctness]
    assert heldout.score(answers, held, tokenizer, functions, [0.5, 1.0]) == {
        "eval_rewards/length": 1.0,  # of 0 and 2
        "eval_rewards/correctness": 0.5,
        "eval_reward": 1.0,
    }


@pytest.mark.parametrize("sampler", ["model", "copy"])
def test_held_out_answers_are_greedy_whoever_samples(
    make: Callable[..., Run], sampler: str
) -> None:
    from helpers.inference.generation import generate

    run = make(sampler=sampler, grpo__eval_steps=1, grpo__learning_rate=1e-2)
    model, tokenizer = train.load_for_training(run, "grpo")
    trainer = grpo.build_grpo(run, model, tokenizer)
    trainer.train()
    measured = [e["eval_reward"] for e in history(run) if "eval_reward" in e]
    held = trainer.eval_dataset.to_list()
    prompts = [row["prompt"] for row in held]
    answers = generate(model, tokenizer, prompts, max_new_tokens=6)
    functions: Any = [length, rewards.strict_format]
    found = heldout.score(answers, held, tokenizer, functions, [1.0, 0.5])
    assert found["eval_reward"] == measured[-1]


# the training


def test_the_best_adapter_by_held_out_reward_is_kept_and_reported(
    make: Callable[..., Run],
) -> None:
    run = make(grpo__eval_steps=1, grpo__learning_rate=1e-3)
    part = stages.train_stage(run, "grpo")
    measured = [
        (e["eval_reward"], e["step"]) for e in history(run) if "eval_reward" in e
    ]
    assert [step for _, step in measured] == [0, 1, 2, 3]
    best, step = max(measured)
    assert (part["held_out_best"], part["best_step"]) == (round(best, 4), step)
    assert part["held_out_first"] == round(measured[0][0], 4)
    for name in ("diagnostics.png", "answers.jsonl", "curves.png"):
        assert (run.path / "grpo" / name).stat().st_size > 0


def test_without_evaluation_the_last_adapter_is_kept(make: Callable[..., Run]) -> None:
    run = make(grpo__eval_strategy="no", grpo__max_steps=1)
    part = stages.train_stage(run, "grpo")
    assert "held_out_best" not in part
    assert not any("eval_reward" in entry for entry in history(run))
    assert (run.path / "grpo" / "adapter" / "adapter_config.json").exists()


def test_clipping_is_as_far_to_both_sides_unless_told_otherwise(
    make: Callable[..., Run],
) -> None:
    run = make(grpo__epsilon=0.1)
    given = grpo.grpo_arguments(run, run.path / "grpo")
    assert (given["epsilon"], given["epsilon_high"]) == (0.1, 0.1)
    other = Run(run.path, changed(run.config, grpo__epsilon_high=0.3))
    assert grpo.grpo_arguments(other, run.path / "grpo")["epsilon_high"] == 0.3


# the budget


def test_the_plan_is_timed_on_real_steps_that_change_no_weight(
    make: Callable[..., Run],
) -> None:
    run = make(grpo_minutes=0.5)
    model, tokenizer = train.load_for_training(run, "grpo")
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    made = grpo.make_plan(run, model, tokenizer)
    after = dict(model.named_parameters())
    assert all(bool((after[name] == value).all()) for name, value in before.items())
    assert made.timing.step_s > 0 and made.timing.evaluation_s > 0
    assert 1 <= made.timing.longest <= 12  # six tokens, read as text again
    assert budget.read_used(run.path / "grpo") == made.timing.spent_s
    assert grpo.make_plan(run, model, tokenizer) == made  # kept, not timed again
    assert not (run.path / "grpo" / "probe").exists()


def test_choosing_the_prompts_is_part_of_the_minutes(
    make: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, choose, later = time.monotonic, grpo.prompts.select, [0.0]

    def slow(*given: Any) -> Any:
        later[0] += 20
        return choose(*given)

    monkeypatch.setattr(grpo.prompts, "select", slow)
    monkeypatch.setattr(time, "monotonic", lambda: clock() + later[0])
    run = make(grpo_minutes=0.5)
    made = grpo.make_plan(run, *train.load_for_training(run, "grpo"))
    assert made.timing.spent_s > 20
    assert made.steps < (30 - 20) / made.timing.step_s


def test_the_plan_counts_the_prompts_that_were_chosen(make: Callable[..., Run]) -> None:
    run = make(grpo_minutes=0.2, few_shot=2)
    problems, _ = heldout.split_problems(run)
    said = repr(grpo.show_plan(run, *train.load_for_training(run, "grpo")))
    assert f"drawn from {len(problems) - 2}" in said


def test_a_plan_without_minutes_is_refused(make: Callable[..., Run]) -> None:
    with pytest.raises(ConfigError, match="grpo_minutes is empty"):
        grpo.make_plan(make(), None, None)  # type: ignore[arg-type]


def test_a_training_with_minutes_ends_by_the_clock_with_its_adapter_saved(
    make: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)

    def slow(completions: list[Any], **_: Any) -> list[float | None]:
        clock.now += 5  # of sampling: each step and each evaluation calls it once
        return length(completions)

    monkeypatch.setitem(rewards.REWARDS, "slow", slow)
    monkeypatch.setattr(guards, "time", SimpleNamespace(monotonic=lambda: clock.now))
    run = make(
        rewards={"slow": 1.0}, grpo_minutes=0.75, grpo__lr_scheduler_type="linear"
    )
    part = stages.train_stage(run, "grpo")
    made = budget.read_plan(run.path / "grpo")
    assert made is not None
    # besides: the probe's two steps and evaluation, the first and the last evaluation
    assert part["planned_steps"] == made.steps == 3
    assert budget.read_used(run.path / "grpo") == pytest.approx(45, abs=5)
    assert "0.75 minutes of grpo_minutes are used" in part["stopped"]
    rates = [e["learning_rate"] for e in history(run) if "learning_rate" in e]
    assert rates[0] > 2 * rates[-1] >= 0
    assert (run.path / "grpo" / "adapter" / "adapter_config.json").exists()


def test_the_small_version_of_a_recipe_counts_steps_not_minutes() -> None:
    from helpers import recipes

    config = changed(recipes.load("demo"), grpo_minutes=60)
    assert recipes.scaled(config, steps=4).grpo_minutes is None
