"""Notebook 03 constructs what the command line builds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from helpers import grpo, inference, training
from helpers.data import preparation as data
from helpers.grpo import rewards
from helpers.runs import Run
from tests.test_construction import execute, watchers

CELLS = ["03-problems-look", "03-config", "03-build-class", "03-build"]


@pytest.mark.parametrize(
    "changes",
    [
        {"grpo_minutes": 2, "sampler": "copy", "grpo__temperature": 0.7},
        {"rewards": {"strict_format": 0.5, "overlong": 0.2}, "grpo__beta": 0.01},
    ],
)
def test_notebook_03_constructs_the_grpo_trainer_of_the_command_line(
    run_factory: Callable[..., Run], changes: dict[str, Any]
) -> None:
    run = run_factory(stages=["grpo"], max_prompt_length=200, **changes)
    data.prepare(run)
    model, tokenizer = training.load_for_training(run, "grpo")
    built = grpo.build_grpo(run, model, tokenizer)
    names = {"grpo": grpo, "inference": inference, "training": training}
    names |= {"rewards": rewards, "run": run, "config": run.config}
    names["model"], names["tokenizer"] = training.load_for_training(run, "grpo")
    shown = execute("03_grpo_gsm8k", CELLS, **names)["trainer"]
    assert shown.args.to_dict() == built.args.to_dict()
    assert shown.evaluate.__func__ is built.evaluate.__func__
    assert [f.__name__ for f in shown.reward_funcs] == list(run.config.rewards)
    assert [f.__name__ for f in built.reward_funcs] == list(run.config.rewards)
    assert type(shown.rollout_func) is type(built.rollout_func)
    assert list(shown.train_dataset) == list(built.train_dataset)
    assert list(shown.eval_dataset) == list(built.eval_dataset)
    kinds = [[name for name, _ in watchers(each)] for each in (shown, built)]
    assert kinds[0] == kinds[1] and "LivePanel" in kinds[0]
