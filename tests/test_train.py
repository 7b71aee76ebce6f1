"""Training: what goes in, what a kill costs, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import recipes, runtime, stages
from helpers.config import changed
from helpers.data import preparation as data
from helpers.errors import ConfigError, MissingInput
from helpers.grpo import rewards
from helpers.grpo.budget import read_used
from helpers.runs import Run
from helpers.training import trainer as train

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
    note = prepared.path / "sft" / stages.NOTE
    note.write_text(note.read_text().replace("true", "false"))
    before = adapter(prepared, "sft")
    again = train.train_stage(prepared, "sft")
    assert again["steps"] == part["steps"] == 6
    assert losses(prepared, "sft")[-1][0] == 6
    after = adapter(prepared, "sft")
    assert all(bool((before[name] == after[name]).all()) for name in before)


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path: Path) -> None:
    from helpers.training.callbacks import last_checkpoint

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


def test_grpo_goes_on_from_the_sft_adapter(prepared: Run) -> None:
    train.train_stage(prepared, "sft")
    part = train.train_stage(prepared, "grpo")
    assert part["steps"] == 3 and 0 <= part["reward_last"] <= 6.5
    sft, grpo = adapter(prepared, "sft"), adapter(prepared, "grpo")
    moved = max(float((sft[n] - grpo[n]).abs().max()) for n in sft)
    assert 0 < moved < 0.1  # it started from SFT's matrices, and they were trained


def test_a_killed_grpo_goes_on_with_the_rewards_and_weights_it_would_have_had(
    prepared: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    train.train_stage(prepared, "grpo")
    (prepared.path / "grpo").rename(prepared.path / "whole")
    kill_at(2, "grpo")
    used_s = read_used(prepared.path / "grpo")
    train.train_stage(prepared, "grpo")
    assert "going on from checkpoint-1" in capsys.readouterr().out
    for name in ("reward", "eval_reward", "groups/all_wrong"):
        assert losses(prepared, "grpo", name) == losses(prepared, "whole", name)
    assert [step for step, _ in losses(prepared, "grpo", "reward")] == [1, 2, 3]
    resumed, whole = adapter(prepared, "grpo"), adapter(prepared, "whole")
    for name in whole:
        assert resumed[name] == pytest.approx(whole[name], abs=1e-6)
    assert read_used(prepared.path / "grpo") > used_s > 0


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
    with pytest.raises(ConfigError, match="did you mean 'learning_rate'"):
        train.load_for_training(run)


def test_what_is_questionable_is_said_before_anything_is_loaded(
    run_factory: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_factory(sft__warmup_steps=9, sft__max_steps=4)
    train.load_for_training(run)
    said = capsys.readouterr().out
    assert "warning: sft.warmup_steps: 9 in a run of 4 steps" in said


def test_a_length_that_cuts_answers_is_said_with_one_that_does_not(
    run_factory: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_factory(max_length=96)
    data.prepare(run)
    train.build_sft(run, *train.load_for_training(run))
    said = capsys.readouterr().out
    assert "warning: max_length: 96 tokens cut" in said
    assert "which cuts at most 1 %" in said


def test_a_packed_batch_has_the_loss_of_its_documents_apart(
    prepared: Run, tiny_model_folder: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from trl import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from helpers.evaluation.evaluator import response_loss
    from helpers.masking.dataset import mask_conversations
    from helpers.models.load import load_tokenizer

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
    assert together == pytest.approx(response_loss(model, masked), abs=1e-5)


def test_the_command_line_trains_both_stages_and_prints_the_table(
    prepared: Run, run_python: Any
) -> None:
    path = prepared.path / "config.json"
    path.write_text(path.read_text().replace('"length"', '"number_present"'))
    done = run_python("-m", "helpers", "train", str(path))
    assert prepared.report()["grpo"]["steps"] == 3
    labels = [line.split("  ")[0] for line in done.stdout.splitlines()[-3:]]
    assert labels == ["base", "after SFT", "after GRPO"]


def test_the_command_line_takes_a_recipe_or_a_file(run: Run) -> None:
    assert train.read_arguments(["guanaco-llama2-7b"]) == (
        recipes.load("guanaco-llama2-7b")
    )
    assert train.read_arguments([str(run.path / "config.json")]) == run.config


@pytest.mark.parametrize("name", [name for name in recipes.NAMES if name != "smoke"])
def test_the_small_version_of_a_recipe_needs_neither_gpu_nor_network(name: str) -> None:
    config = train.read_arguments([name, "--small"])
    assert (config.name, config.model) == (f"{name}-small", "smollm2-135m-offline")
    sources = [*config.data.train, config.data.problems, config.data.test]
    assert all((ROOT / source).is_file() for source in sources if source)
    stage = getattr(config, config.stages[0])
    assert stage["max_steps"] in (10, 5)


def test_an_unknown_recipe_on_the_command_line_is_one_sentence(
    runs_home: Path,
) -> None:
    with pytest.raises(
        SystemExit, match="^ConfigError: no recipe 'dolly-llama'; did y"
    ):
        train.main(["dolly-llama"])


# runs without all stages


@pytest.fixture
def sft_only(run_factory: Callable[..., Run]) -> Run:
    return run_factory(
        stages=["sft"],
        best_by="loss",
        data__train=["data_samples/sharegpt.jsonl"],
        data__eval=None,
        data__problems=None,
        data__test=None,
        data__test_new=None,
        sft={"max_steps": 2},
    )


@pytest.fixture
def grpo_only(run_factory: Callable[..., Run]) -> Run:
    return run_factory(
        stages=["grpo"],
        data__train=[],
        data__eval=None,
        grpo__max_steps=1,
        grpo__max_completion_length=4,
    )


def test_a_stage_that_the_run_lacks_names_recipe_stages_and_notebook(
    sft_only: Run,
) -> None:
    with pytest.raises(
        ConfigError,
        match="run 'test' .recipe 'smoke'. has no grpo stage, only sft: open notebook "
        "02_sft_qlora, or choose another recipe in 00_setup",
    ):
        train.train_stage(sft_only, "grpo")


@pytest.mark.parametrize("call", [train.load_for_training, train.ensure_adapter])
def test_nothing_is_loaded_for_a_stage_that_the_run_lacks(
    sft_only: Run, call: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match="has no grpo stage"):
        call(sft_only, "grpo")


def test_a_run_without_eval_rows_trains_and_reports_the_loss_it_went_by(
    sft_only: Run,
) -> None:
    part = train.train_stage(sft_only, "sft")
    lowest = min(value for _, value in losses(sft_only, "sft"))
    assert part["loss_best"] == round(lowest, 4)
    assert "eval_loss_best" not in part


def test_a_loss_that_was_never_logged_is_not_reported_as_the_best(
    run_factory: Callable[..., Run],
) -> None:
    run = run_factory(sft__max_steps=1, sft__eval_strategy="no", sft__warmup_steps=0)
    part = train.train_stage(run, "sft")
    assert "eval_loss_best" not in part and "best_step" not in part
    assert (run.path / "sft" / "adapter").is_dir()


def test_grpo_without_sft_starts_from_fresh_lora(grpo_only: Run) -> None:
    assert train.ensure_adapter(grpo_only, "sft") is None
    part = train.train_stage(grpo_only, "grpo")
    assert (part["steps"], part["prompts_left_out"]) == (1, 0)
    assert not (grpo_only.path / "sft").exists()


def test_the_adapters_of_a_run_are_none_and_one_a_stage(
    grpo_only: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    found = train.adapters(grpo_only)
    assert found == {"base": None, "grpo": grpo_only.path / "grpo" / "adapter"}
    assert "03_grpo_gsm8k makes it): training it now" in capsys.readouterr().out


# what the machine and the config decide together


@pytest.mark.parametrize("asked", [True, False])
def test_activations_are_recomputed_on_a_gpu_if_the_config_says_so(
    run: Run, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    config = changed(run.config, sft__gradient_checkpointing=asked)
    t4 = runtime.Machine("local", "cuda", "Tesla T4", 14.7, (7, 5))
    cpu = runtime.Machine("local", "cpu", "two cores", 8.0, None)
    for machine, expected in ((t4, asked), (cpu, False)):
        monkeypatch.setattr(runtime, "find_machine", lambda machine=machine: machine)
        assert train.recomputes(config, "sft") == expected
        given = train.training_arguments(Run(run.path, config), "sft", run.path)
        assert given["gradient_checkpointing"] == expected


@pytest.mark.parametrize(("stage", "name"), [("sft", "SFT"), ("grpo", "GRPO")])
def test_what_a_config_leaves_open_is_trls_default_whoever_patched_trl(
    run_factory: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    stage: Any,
    name: str,
) -> None:
    import dataclasses

    import trl

    plain: Any = getattr(trl, f"{name}Config")

    @dataclasses.dataclass
    class Patched(plain):  # as Unsloth's, with its values
        gradient_accumulation_steps: int = 2
        learning_rate: float = 5e-5
        weight_decay: float = 0.001
        warmup_steps: float = 0.1
        optim: str = "adamw_8bit"

    monkeypatch.setattr(trl, f"{name}Config", Patched)
    run = run_factory(**{stage: {"learning_rate": 1e-4}})
    values = train.training_arguments(run, stage, run.path)
    assert values["learning_rate"] == 1e-4
    for open_ in ("gradient_accumulation_steps", "weight_decay", "warmup_steps"):
        assert values[open_] == plain.__dataclass_fields__[open_].default
    assert values["optim"] == "adamw_torch"  # TRL's, but not the fused one


def test_an_evaluation_takes_the_batches_that_training_takes(
    run_factory: Callable[..., Run],
) -> None:
    run = run_factory(sft={"per_device_train_batch_size": 2})
    values = train.training_arguments(run, "sft", run.path)
    assert values["per_device_eval_batch_size"] == 2
    run = run_factory(sft={"per_device_eval_batch_size": 4})
    values = train.training_arguments(run, "sft", run.path)
    assert values["per_device_eval_batch_size"] == 4


@pytest.mark.parametrize(
    ("dtype", "capability", "flags"),
    [
        ("auto", (7, 5), (True, False)),
        ("bfloat16", (7, 5), (True, False)),
        ("auto", (8, 0), (False, True)),
        ("float16", (8, 0), (True, False)),
    ],
)
def test_the_trainer_computes_in_the_dtype_that_the_model_has(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    capability: tuple[int, int],
    flags: tuple[bool, bool],
) -> None:
    gpu = runtime.Machine("local", "cuda", "a GPU", 14.7, capability)
    monkeypatch.setattr(runtime, "find_machine", lambda: gpu)
    given = train.machine_arguments(changed(run.config, dtype=dtype))
    assert (given["fp16"], given["bf16"]) == flags


def test_a_tracker_that_cannot_work_here_does_not_stop_the_training(
    sft_only: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(sft_only.path / "no-such-file"))
    config = changed(sft_only.config, sft__report_to=["wandb"])
    part = train.train_stage(Run(sft_only.path, config), "sft")
    assert part["steps"] == 2
    assert "wandb is left out, nobody is logged in" in capsys.readouterr().out
