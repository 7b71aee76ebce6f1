"""The callbacks that watch a GRPO training, on states as the trainer has them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from helpers.grpo import budget, diagnostics
from helpers.grpo import monitor as guards
from helpers.grpo.record import ALL_RIGHT, ALL_WRONG, Record

ROOT = Path(__file__).resolve().parent.parent
ARGUMENTS = SimpleNamespace(
    eval_strategy="steps",
    num_generations=2,
    max_completion_length=64,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def train(
    guard: guards.TimeBudget,
    clock: Clock,
    *,
    step_s: float,
    evaluation_s: float = 0.0,
    start: int = 0,
    kill_at: int | None = None,
) -> int:
    """Steps a budget as the trainer does; returns the step at which it ended."""
    state, control = TrainerState(global_step=start, max_steps=999), TrainerControl()
    guard.on_train_begin(ARGUMENTS, state, control)
    while state.global_step < state.max_steps and not control.should_training_stop:
        guard.on_step_begin(ARGUMENTS, state, control)
        clock.now += step_s
        state.global_step += 1
        control.should_evaluate = state.global_step % 10 == 0  # as the trainer does
        guard.on_step_end(ARGUMENTS, state, control)
        if state.global_step == kill_at:
            return state.global_step
        if control.should_evaluate:
            clock.now += evaluation_s
            guard.on_evaluate(ARGUMENTS, state, control)
    assert control.should_save and control.should_evaluate
    guard.on_train_end(ARGUMENTS, state, control)
    return state.global_step


@pytest.mark.parametrize("actual_s", [2.0, 5.0, 8.0])
@pytest.mark.parametrize("evaluation_s", [0.0, 12.0])
def test_a_training_takes_its_minutes_even_if_the_probe_was_wrong(
    tmp_path: Path, actual_s: float, evaluation_s: float
) -> None:
    made = budget.plan(10, budget.Timing(5.0, evaluation_s, 20.0))
    budget.write_plan(tmp_path, made)
    clock = Clock()
    guard = guards.TimeBudget(tmp_path, 10, made.steps, clock=clock)
    train(guard, clock, step_s=actual_s, evaluation_s=evaluation_s)
    assert guard.used_s == pytest.approx(600, abs=max(actual_s, evaluation_s) / 2)
    assert budget.read_used(tmp_path) == guard.used_s
    assert "10 minutes of grpo_minutes are used" in guard.reason


def test_the_time_before_a_kill_counts(tmp_path: Path) -> None:
    clock = Clock()
    first = guards.TimeBudget(tmp_path, 2, 24, clock=clock)
    assert train(first, clock, step_s=5, kill_at=14) == 14
    clock.now += 3600  # nothing runs meanwhile
    again = guards.TimeBudget(tmp_path, 2, 24, clock=clock)
    assert train(again, clock, step_s=5, start=10) == 20  # of 24, four were lost
    assert again.used_s == pytest.approx(120, abs=2.5)


def test_a_budget_that_ended_leaves_a_state_with_no_step_to_go(tmp_path: Path) -> None:
    clock = Clock()
    guard = guards.TimeBudget(tmp_path, 1, 100, clock=clock)
    state = TrainerState(global_step=0, max_steps=999)
    guard.on_train_begin(ARGUMENTS, state, TrainerControl())
    assert state.max_steps == 100
    clock.now, state.global_step = clock.now + 60, 7
    guard.on_step_end(ARGUMENTS, state, TrainerControl())
    assert state.max_steps == 7


@pytest.mark.parametrize(("first_s", "steps"), [(3, 3), (9, 2), (30, 1)])
def test_a_probe_takes_a_second_step_and_ends_without_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], first_s: float, steps: int
) -> None:
    clock = Clock()
    guard = guards.TimeBudget(tmp_path, 0.1, probe=True, clock=clock)
    state, control = TrainerState(max_steps=4), TrainerControl()
    guard.on_train_begin(ARGUMENTS, state, control)
    while not control.should_training_stop:
        guard.on_step_begin(ARGUMENTS, state, control)
        clock.now += 1.5 if state.global_step else first_s
        state.global_step += 1
        guard.on_step_end(ARGUMENTS, state, control)
    assert state.global_step == steps
    assert not control.should_save and not control.should_evaluate
    assert capsys.readouterr().out == ""


def test_without_minutes_the_time_is_only_measured(tmp_path: Path) -> None:
    clock = Clock()
    guard = guards.TimeBudget(tmp_path, None, clock=clock)
    state, control = TrainerState(global_step=1, max_steps=4), TrainerControl()
    guard.on_train_begin(ARGUMENTS, state, control)
    clock.now += 1e6
    guard.on_step_end(ARGUMENTS, state, control)
    assert not control.should_training_stop and state.max_steps == 4
    assert budget.read_used(tmp_path) == 1e6


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_learning_rate_has_fallen_to_nothing_when_the_time_is_used(
    tmp_path: Path, kind: str
) -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    clock = Clock()
    guard = guards.TimeBudget(tmp_path, 10, 100, clock=clock)
    scheduler = get_scheduler(kind, optimizer, 10, 100)
    guard.follow(scheduler)
    rates = []
    optimizer.step()
    for _ in range(5):  # many fewer steps than were planned
        scheduler.step()
        rates.append(round(scheduler.get_last_lr()[0], 3))
        clock.now += 150
    assert rates[0] == 0 and rates[1] > rates[2] > rates[3] > rates[4] == 0


# the panel


@pytest.fixture
def record() -> Record:
    made = Record({"correctness": 1.0})

    def correctness(completions: list[Any], **_: Any) -> list[float | None]:
        return [1.0, 0.0, 0.0, 0.0]

    prompts = [[{"role": "user", "content": "2 + 2?"}]] * 4
    made.watch(correctness)(completions=["4", "5", "6", "7"], prompts=prompts)
    return made


def test_the_panel_adds_wrong_groups_and_skipped_steps_to_what_is_logged(
    tmp_path: Path, record: Record
) -> None:
    panel = guards.LivePanel(tmp_path, record)
    state = TrainerState(global_step=1)
    panel.on_train_begin(ARGUMENTS, state, None)
    skipped = SimpleNamespace(step_was_skipped=True)
    panel.on_step_end(ARGUMENTS, state, None, optimizer=skipped)
    logs = {"reward": 0.25}
    panel.on_log(ARGUMENTS, state, None, logs=logs)
    assert logs == {
        "reward": 0.25,
        ALL_WRONG: 0.5,
        ALL_RIGHT: 0.0,
        diagnostics.SKIPPED: 1,
    }
    kept = [
        json.loads(x) for x in (tmp_path / "answers.jsonl").read_text().split("\n")[:2]
    ]
    assert [(k["step"], k["answer"], k["reward"]) for k in kept] == [
        (1, "4", 1.0),
        (1, "5", 0.0),
    ]


def test_outside_a_notebook_the_panel_prints_what_is_new_and_all_at_the_end(
    tmp_path: Path, record: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    panel = guards.LivePanel(tmp_path, record, clock=clock)
    panel.on_train_begin(ARGUMENTS, TrainerState(global_step=0), None)
    for step in (1, 2):
        logs = {"reward": 0.25, "completions/clipped_ratio": 0.5}
        panel.on_log(ARGUMENTS, TrainerState(global_step=step), None, logs=logs)
        clock.now += guards.SHOW_S
    said = capsys.readouterr().out
    assert said.count("50% of the answers are cut at 64 tokens") == 1
    panel.on_train_end(ARGUMENTS, TrainerState(global_step=2), None)
    said = capsys.readouterr().out
    assert "50% of the answers" in said and "near zero by construction" in said
    assert "answer  correctness  reward  advantage" in said
    assert (tmp_path / "diagnostics.png").stat().st_size > 5_000


CELL = """
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, {root!r})
from transformers import TrainerState

from helpers import guards
from helpers.record import Record

args = SimpleNamespace(
    num_generations=2,
    max_completion_length=64,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
)
panel = guards.LivePanel(Path({folder!r}), Record({{"correctness": 1.0}}))
panel.on_train_begin(args, TrainerState(global_step=0), None)
for step in (1, 2, 3):
    panel.shown = float("-inf")  # as if time had passed
    state = TrainerState(global_step=step, max_steps=3)
    panel.on_log(args, state, None, logs={{"reward": 0.1 * step}})
panel.on_train_end(args, state, None)
"""


def test_in_a_notebook_the_panel_is_one_output_that_is_updated(tmp_path: Path) -> None:
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook

    cell = new_code_cell(CELL.format(root=str(ROOT), folder=str(tmp_path)))
    NotebookClient(new_notebook(cells=[cell]), kernel_name="python3").execute()
    shown = [o["data"]["text/html"] for o in cell["outputs"] if "data" in o]
    assert len(shown) == 1
    assert "step 3 of 3" in shown[0] and "<img src=" in shown[0]
    assert "look at the reward" in shown[0]


def test_a_resumed_panel_goes_on_from_the_history(
    tmp_path: Path, record: Record
) -> None:
    old = [{"step": s, "reward": 0.1, diagnostics.SKIPPED: s} for s in (1, 2, 3)]
    (tmp_path / "history.json").write_text(json.dumps(old))
    answers = tmp_path / guards.ANSWERS
    answers.write_text('{"step": 2}\n{"step": 3}\n')
    panel = guards.LivePanel(tmp_path, record)
    panel.on_train_begin(ARGUMENTS, TrainerState(global_step=2), None)
    assert [e["step"] for e in panel.entries] == [1, 2]
    assert panel.skipped == 2
    assert answers.read_text() == '{"step": 2}\n'


def test_a_training_whose_reward_collapses_is_stopped_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = [{"step": s, "reward": 0.5} for s in range(1, 21)]
    (tmp_path / "history.json").write_text(json.dumps(old))
    guard, control = guards.CollapseGuard(tmp_path), TrainerControl()
    guard.on_train_begin(ARGUMENTS, TrainerState(global_step=20), control)
    step = 20
    while not control.should_training_stop:
        step += 1
        state = TrainerState(global_step=step)
        guard.on_log(ARGUMENTS, state, control, logs={"reward": 0.0})
    assert step == 28
    assert "stopped at step 28: the reward collapsed from 0.50 to 0.10" in guard.reason
    assert capsys.readouterr().out.strip() == guard.reason
