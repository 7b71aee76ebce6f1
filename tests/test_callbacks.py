"""The callbacks, on trainer states as the trainer hands them over."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from helpers.models import adapters
from helpers.models import load as models
from helpers.training import callbacks


@pytest.fixture
def lora_model(tiny_model_folder: Path) -> Any:
    model, _ = models.load_model(str(tiny_model_folder))
    return adapters.add_lora(model, {"r": 4, "target_modules": ["q_proj"]})


def test_the_adapter_of_the_lowest_value_is_kept(
    lora_model: Any, tmp_path: Path
) -> None:
    best = callbacks.BestAdapter(tmp_path / "adapter", by="eval_loss")
    for step, value in ((1, 2.0), (2, 1.0), (3, 1.5)):
        state = TrainerState(global_step=step)
        logs = {"eval_loss": value, "loss": -step}
        best.on_log(None, state, None, logs=logs, model=lora_model)  # type: ignore[arg-type]
    note = json.loads((tmp_path / "best.json").read_text())
    assert note == {"by": "eval_loss", "value": 1.0, "step": 2}
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "best.json"]


def test_a_resumed_run_remembers_its_best_value(
    lora_model: Any, tmp_path: Path
) -> None:
    best = callbacks.BestAdapter(tmp_path / "adapter")
    state = TrainerState(global_step=2)
    best.on_log(None, state, None, logs={"eval_loss": 1.0}, model=lora_model)  # type: ignore[arg-type]
    again = callbacks.BestAdapter(tmp_path / "adapter")
    again.on_train_begin(None, state, None)  # type: ignore[arg-type]
    assert (again.best, again.step) == (1.0, 2)
    earlier = callbacks.BestAdapter(tmp_path / "adapter")
    earlier.on_train_begin(None, TrainerState(global_step=1), None)  # type: ignore[arg-type]
    assert earlier.best == float("inf")


def test_the_adapter_of_the_highest_reward_is_kept_of_equals_the_later(
    lora_model: Any, tmp_path: Path
) -> None:
    best = callbacks.BestAdapter(tmp_path / "adapter", by="eval_reward")
    for step, value in enumerate((0.2, 0.4, 0.4, 0.3, float("nan")), start=1):
        state = TrainerState(global_step=step)
        best.on_log(None, state, None, logs={"eval_reward": value}, model=lora_model)  # type: ignore[arg-type]
    note = json.loads((tmp_path / "best.json").read_text())
    assert note == {"by": "eval_reward", "value": 0.4, "step": 3}


def test_nan_is_never_the_best_loss(lora_model: Any, tmp_path: Path) -> None:
    best = callbacks.BestAdapter(tmp_path / "adapter", by="loss")
    state = TrainerState(global_step=1)
    best.on_log(None, state, None, logs={"loss": float("nan")}, model=lora_model)  # type: ignore[arg-type]
    assert not (tmp_path / "adapter").exists()


def test_a_sample_is_printed_and_kept_at_each_epochs_end(
    lora_model: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "samples.jsonl"
    live = callbacks.LiveSamples(tokenizer, ["Why?"], path, max_new_tokens=4)
    lora_model.train()
    for step in (5, 10):
        state = TrainerState(global_step=step)
        live.on_epoch_end(SimpleNamespace(seed=0), state, None, model=lora_model)  # type: ignore[arg-type]
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(s["step"], s["prompt"]) for s in samples] == [(5, "Why?"), (10, "Why?")]
    assert "step 10 | Why?" in capsys.readouterr().out
    assert lora_model.training


def test_a_save_is_asked_for_once_the_minutes_have_passed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now)
    timed = callbacks.TimedSaves(minutes=10)
    timed.on_train_begin()
    now += 599
    assert not timed.on_step_end(None, None, TrainerControl()).should_save
    now += 1
    assert timed.on_step_end(None, None, TrainerControl()).should_save
    timed.on_save()
    assert not timed.on_step_end(None, None, TrainerControl()).should_save


def test_training_stops_with_a_reason_when_fp16_skips_every_step() -> None:
    watcher = callbacks.SkippedSteps(patience=3)
    control = TrainerControl()
    for step, skipped in enumerate([True, True, False, True, True, True], start=1):
        optimizer = SimpleNamespace(step_was_skipped=skipped)
        state = TrainerState(global_step=step)
        watcher.on_step_end(None, state, control, optimizer=optimizer)
        assert control.should_training_stop == (step == 6)
    assert watcher.count == 5 and "overflow in fp16" in watcher.reason


def test_history_goes_on_from_the_checkpoint_that_training_resumes(
    tmp_path: Path,
) -> None:
    old = [
        {"step": s, "epoch": 0.1 * s, "seconds": 2.0 * s, "loss": 1.0}
        for s in (1, 2, 3)
    ]
    (tmp_path / "history.json").write_text(json.dumps(old))
    history = callbacks.History(tmp_path)
    history.on_train_begin(None, TrainerState(global_step=2), None)  # type: ignore[arg-type]
    history.on_log(None, TrainerState(global_step=3), None, logs={"loss": 0.5})  # type: ignore[arg-type]
    assert history.values("loss") == [1.0, 1.0, 0.5]
    assert history.entries[-1]["seconds"] >= 4.0
