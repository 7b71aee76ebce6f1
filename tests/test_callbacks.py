"""The callbacks, on trainer states as the trainer hands them over."""

from __future__ import annotations

import json
import logging
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


NAN = float("nan")


@pytest.mark.parametrize(
    ("by", "values", "kept"),
    [
        ("eval_loss", [2.0, 1.0, 1.5, NAN], {"value": 1.0, "step": 2}),
        ("eval_reward", [0.2, 0.4, 0.4, 0.3, NAN], {"value": 0.4, "step": 3}),
    ],
)
def test_the_adapter_of_the_best_value_is_kept_and_remembered(
    lora_model: Any, tmp_path: Path, by: str, values: list[float], kept: dict[str, Any]
) -> None:
    best = callbacks.BestAdapter(tmp_path / "adapter", by=by)
    for step, value in enumerate(values, start=1):
        logs = {by: value, "other": -step}
        best.on_log(
            None, TrainerState(global_step=step), None, logs=logs, model=lora_model
        )
    assert json.loads((tmp_path / "best.json").read_text()) == {"by": by, **kept}
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "best.json"]
    for at, step in ((len(values), kept["step"]), (1, 0)):  # resumed there
        again = callbacks.BestAdapter(tmp_path / "adapter", by=by)
        again.on_train_begin(None, TrainerState(global_step=at), None)
        assert again.step == step


def test_nan_is_never_the_best(lora_model: Any, tmp_path: Path) -> None:
    best = callbacks.BestAdapter(tmp_path / "adapter", by="loss")
    state = TrainerState(global_step=1)
    best.on_log(None, state, None, logs={"loss": NAN}, model=lora_model)
    assert not (tmp_path / "adapter").exists() and best.report([]) == {}


def test_a_sample_is_logged_and_kept_at_each_epochs_end(
    lora_model: Any,
    tokenizer: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "helpers")
    path = tmp_path / "samples.jsonl"
    live = callbacks.LiveSamples(tokenizer, ["Why?"], path, max_new_tokens=4)
    lora_model.train()
    for step in (5, 10):
        state = TrainerState(global_step=step)
        live.on_epoch_end(SimpleNamespace(seed=0), state, None, model=lora_model)
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(s["step"], s["prompt"]) for s in samples] == [(5, "Why?"), (10, "Why?")]
    assert "step 10 | Why?" in caplog.text
    assert lora_model.training


def test_a_save_is_due_once_the_minutes_have_passed(
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
    assert watcher.report([]) == {"skipped_steps": 5}
    assert "overflow in fp16" in watcher.reason


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path: Path) -> None:
    for step, state in ((2, '{"global_step": 2}'), (4, '{"global_st'), (6, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert callbacks.last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
