"""Callbacks on states as the trainer has them, and the curves of its log."""

import json
import math
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from helpers.models import adapters
from helpers.models import load as models
from helpers.training import callbacks
from helpers.training.inputs import draw_diagnostics


@pytest.fixture
def lora_model(tiny_model_folder):
    model, _ = models.load_model(str(tiny_model_folder))
    return adapters.add_lora(model, {"r": 4, "target_modules": ["q_proj"]})


@pytest.mark.parametrize(
    ("by", "values", "kept"),
    [
        ("eval_loss", [math.nan, 1.0, 1.5], {"value": 1.0, "step": 2}),
        ("eval_reward", [math.nan, 0.4, 0.4, 0.3], {"value": 0.4, "step": 3}),
    ],
)
def test_the_adapter_of_the_best_value_is_kept_and_remembered(
    lora_model, tmp_path, by, values, kept
):
    best = callbacks.BestAdapter(tmp_path / "adapter", by=by)
    for step, value in enumerate(values, start=1):
        logs, state = {by: value, "other": -step}, TrainerState(global_step=step)
        best.on_log(None, state, None, logs=logs, model=lora_model)
    assert json.loads((tmp_path / "best.json").read_text()) == {"by": by, **kept}
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "best.json"]
    for at, step in ((len(values), kept["step"]), (1, kept["step"])):  # resumed there
        again = callbacks.BestAdapter(tmp_path / "adapter", by=by)
        again.on_train_begin(None, TrainerState(global_step=at), None)
        assert again.step == step


def test_a_sample_is_logged_and_kept_at_each_epochs_end(
    lora_model, tokenizer, tmp_path, caplog
):
    path = tmp_path / "samples.jsonl"
    live = callbacks.LiveSamples(tokenizer, path)
    lora_model.train()
    for step in (5, 10):
        state = TrainerState(global_step=step, epoch=step / 5)
        live.on_epoch_end(None, state, None, model=lora_model)
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [5, 10]
    prompts = [row["prompt"] for row in callbacks.PROMPTS]
    assert [sample["prompt"] for sample in samples] == prompts[1:3]
    live.prompts = ["Why?"]
    live.on_epoch_end(None, state, None, model=lora_model)  # the same step: replaced
    assert json.loads(path.read_text().splitlines()[-1])["prompt"] == "Why?"
    assert len(path.read_text().splitlines()) == 2
    assert "step 10 | " in caplog.text and lora_model.training


def test_a_save_is_due_once_the_minutes_have_passed_since_the_last(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now)
    watch, state = callbacks.Watch(save_minutes=10), TrainerState()
    watch.on_train_begin(None, state, None)
    due = []
    for seconds in (599, 1, 599, 1):
        now += seconds
        control = TrainerControl()
        watch.on_step_end(None, state, control)
        due.append(control.should_save)
    assert due == [False, True] * 2


def test_training_stops_with_a_reason_when_fp16_skips_every_step():
    watch, control = callbacks.Watch(save_minutes=10), TrainerControl()
    former = {"step": 2, "skipped_steps": 3, "seconds": 70.0}
    state = TrainerState(log_history=[former])
    watch.on_train_begin(None, state, control)
    for step, skipped in enumerate([True, False, *[True] * 10], start=3):
        optimizer, state.global_step = SimpleNamespace(step_was_skipped=skipped), step
        watch.on_step_end(None, state, control, optimizer=optimizer)
        assert control.should_training_stop == (step == 14)
    assert "stopped at step 14: fp16 gradients overflow" in watch.reason
    logs = {"loss": 1.0}
    state.log_history.append({**logs, "step": 14})
    watch.on_log(None, state, control, logs=logs)
    last = state.log_history[-1]  # a resumed run goes on counting
    assert logs["skipped_steps"] == last["skipped_steps"] == 14
    assert 70 <= last["seconds"] < 80 and "seconds" not in logs


def test_losses_are_drawn_though_steps_log_them_in_entries_of_their_own(tmp_path):
    steps = [{"step": n, "loss": 2.0 / n} for n in (1, 2)]
    history = [*steps, {"step": 2, "eval_loss": 1.5}]
    (axes,) = draw_diagnostics(history, tmp_path / "curves.png").axes
    assert (tmp_path / "curves.png").stat().st_size > 0
    assert [line.get_label() for line in axes.lines] == ["loss", "eval_loss"]
    assert axes.lines[0].get_xydata().tolist() == [[1, 2], [2, 1]]


def test_of_grpo_each_reward_is_drawn_and_no_loss():
    names = ["rewards/correctness/mean", "rewards/style/mean"]
    logged = dict.fromkeys([*names, "rewards/style/std", "reward", "loss", "kl"], 0.1)
    first, nats = draw_diagnostics([{"step": n, **logged} for n in (1, 2)]).axes
    assert [line.get_label() for line in first.lines] == names
    assert nats.get_title() == "nats a token"
