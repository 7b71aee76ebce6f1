"""Training: what goes in, what a kill costs, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import data, rewards, train
from helpers.config import ConfigError
from helpers.runs import MissingInput, Run

ROOT = Path(__file__).resolve().parent.parent
KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from helpers import callbacks, data, rewards, runs, train
from tests.test_train import length

rewards.REWARDS["length"] = length

class Kill(callbacks.TimedSaves):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == {step}:
            os.kill(os.getpid(), signal.SIGKILL)

callbacks.TimedSaves = Kill
run = runs.open_run("test")
data.ensure_data(run)
train.train_stage(run, {stage!r})
"""


def length(completions: list[Any], **_: Any) -> list[float | None]:
    """A reward of one's own that random text spreads: its length, modulo seven."""
    return [float(len(rewards.text_of(c)) % 7) for c in completions]


@pytest.fixture
def prepared(run_factory: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setitem(rewards.REWARDS, "length", length)
    run = run_factory(
        sft__max_steps=6,
        sft__save_steps=2,
        sft__eval_steps=3,
        sft__warmup_steps=0,
        grpo__max_steps=3,
        grpo__save_steps=1,
        grpo__max_completion_length=8,
        grpo__learning_rate=1e-3,
        rewards={"length": 1.0, "strict_format": 0.5},
        evaluation__max_new_tokens=8,
    )
    data.prepare(run)
    return run


def kill_at(step: int, stage: str) -> None:
    """Trains a stage in another process, which is killed after a step."""
    script = KILLED.format(root=str(ROOT), step=step, stage=stage)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert done.returncode == -9, done.stderr[-2000:]


def losses(run: Run, stage: str, name: str = "loss") -> list[tuple[int, float]]:
    entries = json.loads((run.path / stage / "history.json").read_text())
    return [(entry["step"], entry[name]) for entry in entries if name in entry]


def adapter(run: Run, stage: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(run.path / stage / "adapter" / "adapter_model.safetensors")


def test_sft_writes_adapter_history_curves_samples_and_report(prepared: Run) -> None:
    part = train.train_stage(prepared, "sft")
    assert part["steps"] == 6 and part["tokens_per_second"] > 0
    assert 0.1 < part["supervised_fraction"] < 0.9
    folder = prepared.path / "sft"
    for name in ("history.json", "curves.png", "samples.jsonl", "best.json"):
        assert (folder / name).stat().st_size > 0
    assert any(bool((t != 0).any()) for n, t in adapter(prepared, "sft").items())
    assert prepared.report()["sft"] == part


def test_a_killed_training_goes_on_and_ends_where_it_would_have(
    prepared: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    train.train_stage(prepared, "sft")
    (prepared.path / "sft").rename(prepared.path / "whole")
    kill_at(5, "sft")
    part = train.train_stage(prepared, "sft")
    assert "going on from checkpoint-4" in capsys.readouterr().out
    assert part["steps"] == 6
    for name in ("loss", "eval_loss"):
        resumed, whole = losses(prepared, "sft", name), losses(prepared, "whole", name)
        assert [step for step, _ in resumed] == [step for step, _ in whole]
        assert [v for _, v in resumed] == pytest.approx([v for _, v in whole], rel=1e-5)


def test_a_run_killed_after_its_last_step_is_only_reported(prepared: Run) -> None:
    kill_at(6, "sft")  # the last step's checkpoint is written after its end
    part = train.train_stage(prepared, "sft")
    note = prepared.path / "sft" / train.NOTE
    note.write_text(note.read_text().replace("true", "false"))
    before = adapter(prepared, "sft")
    again = train.train_stage(prepared, "sft")
    assert again["steps"] == part["steps"] == 6
    assert losses(prepared, "sft")[-1][0] == 6
    after = adapter(prepared, "sft")
    assert all(bool((before[name] == after[name]).all()) for name in before)


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path: Path) -> None:
    from helpers.callbacks import last_checkpoint

    for step, state in ((2, '{"global_step": 2}'), (4, '{"global_st'), (6, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_a_finished_stage_is_not_trained_again(
    prepared: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    part = train.train_stage(prepared, "sft")
    assert train.train_stage(prepared, "sft") == part
    assert "is finished" in capsys.readouterr().out


def test_results_of_other_settings_are_set_aside_not_deleted(
    prepared: Run, run_factory: Callable[..., Run]
) -> None:
    train.train_stage(prepared, "sft")
    edited = run_factory(sft__max_steps=2, sft__eval_steps=1, lora__r=4)
    assert train.train_stage(edited, "sft")["steps"] == 2
    assert (prepared.path / "sft.before-1" / "adapter").is_dir()


def test_grpo_goes_on_from_the_sft_adapter_and_resumes_after_a_kill(
    prepared: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    train.train_stage(prepared, "sft")
    kill_at(2, "grpo")
    part = train.train_stage(prepared, "grpo")
    assert "going on from checkpoint-1" in capsys.readouterr().out
    assert part["steps"] == 3 and 0 <= part["reward_last"] <= 6.5
    assert [step for step, _ in losses(prepared, "grpo", "reward")] == [1, 2, 3]
    sft, grpo = adapter(prepared, "sft"), adapter(prepared, "grpo")
    moved = max(float((sft[n] - grpo[n]).abs().max()) for n in sft)
    assert 0 < moved < 0.1  # it started from SFT's matrices, and they were trained


def test_a_missing_adapter_is_made_with_a_word(
    prepared: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    path = train.ensure_adapter(prepared, "sft")
    assert (Path(path) / "adapter_model.safetensors").exists()
    assert "notebook 02_sft_qlora makes it" in capsys.readouterr().out


def test_training_without_data_names_the_notebook_to_run(run: Run) -> None:
    model, tokenizer = train.load_for_training(run)
    with pytest.raises(MissingInput, match="run notebook 01_data_prep"):
        train.build_sft(run, model, tokenizer)


def test_an_unknown_training_argument_gets_the_nearest_name(
    run_factory: Callable[..., Run],
) -> None:
    run = run_factory(sft={"learning_rat": 1e-4})
    data.prepare(run)
    model, tokenizer = train.load_for_training(run)
    with pytest.raises(ConfigError, match="did you mean 'learning_rate'"):
        train.build_sft(run, model, tokenizer)


def test_a_packed_batch_has_the_loss_of_its_documents_apart(
    prepared: Run, tiny_model_folder: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from trl import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from helpers.evaluation import response_loss
    from helpers.masking import mask_conversations
    from helpers.models import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_model_folder))
    rows = data.read_rows(prepared.path / "data" / "train.jsonl")[:12]
    masked = mask_conversations(tokenizer, [row["messages"] for row in rows]).rows
    from datasets import Dataset

    packed = pack_dataset(Dataset.from_list(masked), 256, "bfd")
    assert len(packed) < len(masked)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    collate = DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=True)
    batch = collate(list(packed))
    assert (batch["position_ids"] == 0).sum() == len(masked)
    # as TRL calls it: with a cache, documents would not be told apart
    together = model(**batch, use_cache=False).loss.item()
    assert together == pytest.approx(response_loss(model, tokenizer, masked), abs=1e-5)


def test_the_command_line_trains_both_stages(prepared: Run) -> None:
    path = prepared.path / "config.json"
    path.write_text(path.read_text().replace('"length"', '"number_present"'))
    command = [sys.executable, "-m", "helpers.train", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert prepared.report()["grpo"]["steps"] == 3
