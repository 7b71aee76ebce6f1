"""Training: what goes in, what a kill costs, what is refused."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from helpers import runtime, stages
from helpers.config import changed
from helpers.data import preparation as data
from helpers.errors import ConfigError, TrainingError
from helpers.files import read_json, read_rows, write_json
from helpers.grpo import rewards
from helpers.grpo import trainer as grpo
from helpers.models import adapters, load
from helpers.runs import Run
from helpers.training import callbacks, inputs
from helpers.training import trainer as train

ROOT = Path(__file__).resolve().parent.parent
HEAD = """
import os, resource, signal
from helpers import runs, stages
from helpers.errors import TunebookError
from helpers.export import formats
from helpers.grpo import rewards
from helpers.training import callbacks
from tests.test_train import length

rewards.REWARDS["length"] = length
run = runs.open_run("test")

class Fault(callbacks.Watch):
    def on_step_end(self, args, state, control, **_):
        strike(state.global_step)

callbacks.Watch = Fault
"""
KILLED = """
def strike(step):
    if step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)

stages.train_stage(run, {stage!r})
"""
FULL = """
def strike(step=0):
    resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))

try:
    if {stage!r} == "export":
        strike()
        formats.export(run, "sft", ["adapter"])
    stages.train_stage(run, {stage!r})
except TunebookError as error:
    print(error)
"""


def run_script(text, **values):
    """Runs a program of those above in a process of its own."""
    command = [sys.executable, "-c", HEAD + text.format(**values)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def length(completions, **_):
    """A reward of one's own that random text spreads: its length, modulo seven."""
    return [float(len(rewards.plain(text)) % 7) for text in completions]


@pytest.fixture
def prepared(run_factory, monkeypatch):
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


def kill_at(step, stage):
    """Trains a stage in another process, which is killed after a step."""
    done = run_script(KILLED, step=step, stage=stage)
    assert done.returncode == -9, done.stderr[-2000:]


def losses(run, stage, name="loss"):
    entries = json.loads((run.path / stage / "log_history.json").read_text())
    return [(entry["step"], entry[name]) for entry in entries if name in entry]


def adapter(run, stage):
    return load_file(run.path / stage / "adapter" / "adapter_model.safetensors")


def test_a_killed_sft_goes_on_and_ends_where_it_would_have(prepared, caplog):
    part = stages.train_stage(prepared, "sft")
    assert part["steps"] == 6 and part["tokens_per_second"] > 0
    assert 0.1 < part["supervised_fraction"] < 0.9
    for name in ("log_history.json", "curves.png", "samples.jsonl", "best.json"):
        assert (prepared.path / "sft" / name).stat().st_size > 0
    assert prepared.report()["sft"] == part
    # the first logged step is shown at once
    assert re.search(r"step 1 of 6, \d\d:\d\d left: Loss \d", caplog.text)

    (prepared.path / "sft").rename(prepared.path / "whole")
    kill_at(5, "sft")
    part = stages.train_stage(prepared, "sft")
    assert re.search("going on from .*checkpoint-4", caplog.text)
    assert part["steps"] == 6
    for name in ("loss", "eval_loss", "num_tokens"):
        resumed, whole = losses(prepared, "sft", name), losses(prepared, "whole", name)
        assert [step for step, _ in resumed] == [step for step, _ in whole]
        assert [v for _, v in resumed] == pytest.approx([v for _, v in whole], rel=1e-5)
    seconds = [value for _, value in losses(prepared, "sft", "seconds")]
    assert seconds == sorted(seconds) and part["seconds"] == round(seconds[-1], 1)
    # transformers' sums are of the last session alone
    assert losses(prepared, "whole", "train_loss")
    assert not losses(prepared, "sft", "train_loss")
    samples = [read_rows(prepared.path / s / "samples.jsonl") for s in ("sft", "whole")]
    assert samples[0] == samples[1]


def cut(file):
    file.write_bytes(file.read_bytes()[:-40])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


def empty(file):
    file.write_bytes(b"")


def change_settings(file):
    file.write_text(file.read_text().replace('"made_from": "', '"made_from": "0'))


DAMAGE = [
    ("adapter_model.safetensors", cut),
    ("adapter_model.safetensors", empty),
    ("adapter_model.safetensors", Path.unlink),
    ("adapter_config.json", cut),
    ("optimizer.pt", Path.unlink),
    ("optimizer.pt", cut),
    ("optimizer.pt", flip),
    ("scheduler.pt", empty),
    ("rng_state.pth", Path.unlink),
    ("rng_state.pth", cut),
    ("trainer_state.json", Path.unlink),
    ("trainer_state.json", cut),
    ("trainer_state.json", change_settings),
]


def test_a_damaged_or_foreign_checkpoint_is_passed_over_with_a_word(prepared, caplog):
    stages.train_stage(prepared, "sft")
    folder = prepared.path / "sft" / "checkpoints"
    files = {file: file.read_bytes() for file in (folder / "checkpoint-6").iterdir()}
    assert callbacks.last_checkpoint(folder) == str(folder / "checkpoint-6")
    for name, damage in DAMAGE:
        caplog.clear()
        damage(folder / "checkpoint-6" / name)
        assert callbacks.last_checkpoint(folder) == str(folder / "checkpoint-4"), name
        fault = f"checkpoint-6 is passed over: no whole .*{Path(name).suffix}"
        if name == "trainer_state.json":
            fault = "passed over: it was not finished, or is of other settings"
        assert re.search(fault, caplog.text)
        for file, content in files.items():
            file.write_bytes(content)
    # a run that lost its report goes on from there, to the same end
    before, whole = adapter(prepared, "sft"), losses(prepared, "sft")
    (prepared.path / "report.json").unlink()
    cut(folder / "checkpoint-6" / "optimizer.pt")
    shutil.rmtree(prepared.path / "sft" / "adapter")
    (prepared.path / "sft" / "best.json").unlink()
    stages.train_stage(prepared, "sft")
    assert re.search("going on from .*checkpoint-4", caplog.text)
    assert dict(losses(prepared, "sft")) == pytest.approx(dict(whole), rel=1e-5)
    assert not (prepared.path / "sft.before-1").exists()
    after = adapter(prepared, "sft")
    assert all(after[name] == pytest.approx(before[name], abs=1e-6) for name in after)


def test_training_stops_at_once_when_its_folder_is_removed(prepared):
    class Remove(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 1:
                shutil.rmtree(prepared.path)

    trainer = train.build_sft(prepared, *train.load_for_training(prepared))
    trainer.add_callback(Remove())
    with pytest.raises(TrainingError, match="sft is gone: put it back, or start again"):
        train.fit(trainer, prepared)
    assert trainer.state.global_step == 2 and not prepared.path.exists()


def test_a_full_disk_is_a_sentence_and_leaves_nothing_half_written(prepared):
    def report(stage):
        return run_script(FULL, size=300_000, stage=stage).stdout

    free = r"[\d.e+]+ GB free"
    fault = f"no space left for .*test/sft: {free}, [\\d.e-]+ GB needed; make room"
    assert re.search(fault, report("sft"))
    assert [*(prepared.path / "sft" / "checkpoints").glob("checkpoint-*")] == []
    assert stages.train_stage(prepared, "sft")["steps"] == 6
    assert re.search(f"no space left for .*test: {free}; make room", report("export"))
    assert [*(prepared.path / "export").iterdir()] == []


def test_a_finished_stage_is_reported_and_a_trainer_of_another_run_refused(
    prepared, run_factory, monkeypatch
):
    part, before = stages.train_stage(prepared, "sft"), adapter(prepared, "sft")
    trainer = train.build_sft(prepared, *train.load_for_training(prepared))
    assert train.fit(trainer, prepared) == part
    with monkeypatch.context() as patch:
        patch.setattr(train, "load_for_training", None)  # nothing is loaded
        assert stages.train_stage(prepared, "sft") == part
    with pytest.raises(ConfigError, match="writes to .*, not to run 'other'"):
        train.fit(trainer, run_factory(name="other"))
    # killed after the last step, it takes none more
    note = prepared.path / "sft" / inputs.NOTE
    write_json(note, read_json(note) | {"finished": False})
    again, after = train.fit(trainer, prepared), adapter(prepared, "sft")
    for name in ("steps", "loss_last", "eval_loss_best", "best_step"):
        assert again[name] == pytest.approx(part[name], rel=1e-5)
    for name in before:
        assert after[name] == pytest.approx(before[name], abs=1e-6)


def test_a_killed_grpo_goes_on_with_the_rewards_and_weights_it_would_have_had(
    prepared, caplog
):
    part = stages.train_stage(prepared, "grpo")
    assert part["steps"] == 3 and 0 <= part["reward_last"] <= 6.5
    start, whole = adapter(prepared, "sft"), adapter(prepared, "grpo")
    moved = max(float((start[n] - whole[n]).abs().max()) for n in start)
    assert 0 < moved < 0.1  # it started from SFT's matrices, and they were trained
    (prepared.path / "grpo").rename(prepared.path / "whole")
    kill_at(1, "grpo")  # before its first checkpoint
    kill_at(2, "grpo")
    stages.train_stage(prepared, "grpo")
    assert re.search("going on from .*checkpoint-1", caplog.text)
    for name in ("reward", "eval_reward", "groups/all_wrong"):
        assert losses(prepared, "grpo", name) == losses(prepared, "whole", name)
    assert [step for step, _ in losses(prepared, "grpo", "reward")] == [1, 2, 3]
    resumed = adapter(prepared, "grpo")
    for name in whole:
        assert resumed[name] == pytest.approx(whole[name], abs=1e-6)


class Stop(TrainerCallback):
    """The stop button of a notebook, pressed once after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.step = 0
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("stage", "step"), [("sft", 1), ("sft", 5), ("grpo", 1), ("grpo", 2)]
)
def test_a_cell_that_is_stopped_and_run_again_ends_as_if_it_was_not(
    prepared, stage, step
):
    stages.train_stage(prepared, stage)
    (prepared.path / stage).rename(prepared.path / "whole")
    start = prepared.path / "sft" / "adapter" if stage == "grpo" else None
    build = train.build_sft if stage == "sft" else grpo.build_grpo
    trainer = build(prepared, *train.load_for_training(prepared, stage, start))
    trainer.add_callback(Stop(step))
    with pytest.raises(KeyboardInterrupt):
        train.fit(trainer, prepared)
    train.fit(trainer, prepared)
    for name in ["loss", "eval_loss"] if stage == "sft" else ["reward", "eval_reward"]:
        assert losses(prepared, stage, name) == losses(prepared, "whole", name)
    again, whole = adapter(prepared, stage), adapter(prepared, "whole")
    assert all(bool((again[name] == whole[name]).all()) for name in whole)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_loss_that_is_not_finite_stops_and_is_never_a_result(prepared, stage):
    config = changed(prepared.config, **{f"{stage}__learning_rate": 1e30})
    run = Run(prepared.path, config)
    with pytest.raises(TrainingError, match="step 2: .* not finite"):
        stages.train_stage(run, stage)
    assert not read_json(run.path / stage / inputs.NOTE)["finished"]
    assert stage not in run.report()
    for file in (run.path / stage).rglob("adapter_model.safetensors"):
        assert all(bool(m.isfinite().all()) for m in load_file(file).values())


@pytest.mark.parametrize("by", ["loss", "eval_loss"])
def test_a_run_without_evaluations_reports_the_loss_it_went_by_if_any(run_factory, by):
    sft = {"max_steps": 1, "eval_strategy": "no"}
    run = run_factory(stages=["sft"], best_by=by, sft=sft)
    part = stages.train_stage(run, "sft")
    best = {key: value for key, value in part.items() if key.endswith("_best")}
    assert best == ({"loss_best": part["loss_last"]} if by == "loss" else {})
    assert (run.path / "sft" / "adapter").is_dir()


@pytest.mark.parametrize(("stage", "name"), [("sft", "SFT"), ("grpo", "GRPO")])
def test_what_a_config_leaves_open_is_trls_default_whoever_patched_trl(
    run_factory, monkeypatch, stage, name
):
    import trl

    plain = getattr(trl, f"{name}Config")

    @dataclasses.dataclass
    class Patched(plain):  # as Unsloth's, with its values
        gradient_accumulation_steps: int = 2
        learning_rate: float = 5e-5
        weight_decay: float = 0.001
        warmup_steps: float = 0.1
        optim: str = "adamw_8bit"

    monkeypatch.setattr(trl, f"{name}Config", Patched)
    run = run_factory(**{stage: {"learning_rate": 1e-4}})
    values = inputs.training_arguments(run, stage, run.path)
    assert values["learning_rate"] == 1e-4
    for open_ in ("gradient_accumulation_steps", "weight_decay", "warmup_steps"):
        assert values[open_] == plain.__dataclass_fields__[open_].default
    assert values["optim"] == "adamw_torch"  # TRL's, but not the fused one
    assert values["per_device_eval_batch_size"] == values["per_device_train_batch_size"]


def test_lora_that_a_config_leaves_open_is_pefts_default_in_either_engine(
    run_factory, monkeypatch
):
    from peft import LoraConfig

    passed = {}
    monkeypatch.setattr(adapters, "add_lora", lambda _, lora, **__: passed.update(lora))
    run = run_factory(lora={"target_modules": ["v_proj", "q_proj"]})
    model, _ = load.load_model(run.config.model, **load.options(run.config))
    train.attach_lora(run, model, LoraConfig(**train.lora_arguments(run)))
    assert passed.pop("target_modules") == ["q_proj", "v_proj"]
    assert passed == {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none"}


@pytest.mark.parametrize(
    ("dtype", "capability", "expected"),
    [
        ("bfloat16", (7, 5), ["fp16", "gradient_checkpointing"]),
        ("auto", (8, 0), ["bf16", "gradient_checkpointing"]),
        ("float16", (8, 0), ["fp16", "gradient_checkpointing"]),
        ("auto", None, ["use_cpu"]),
    ],
)
def test_the_trainer_computes_as_model_and_machine_do(
    run, monkeypatch, dtype, capability, expected
):
    device = "cuda" if capability else "cpu"
    machine = runtime.Machine(device, "a machine", 14.7, capability)
    monkeypatch.setattr(runtime, "find_machine", lambda: machine)
    names = ("fp16", "bf16", "use_cpu", "gradient_checkpointing")
    for recompute in (True, False):
        changes = {"dtype": dtype, "sft__gradient_checkpointing": recompute}
        other = Run(run.path, changed(run.config, **changes))
        values = inputs.training_arguments(other, "sft", run.path)
        flags = [name for name in names if values[name]]
        assert flags == expected[: None if recompute or not capability else -1]


def test_a_run_without_an_optimiser_step_is_an_error(run_factory):
    batch = {"per_device_train_batch_size": 64, "dataloader_drop_last": True}
    sft = {"packing": False, "max_steps": 2, **batch}
    run = run_factory(stages=["sft"], data__train_rows=4, sft=sft)
    with pytest.raises(ConfigError, match="sft took no optimiser step"):
        stages.train_stage(run, "sft")
    assert not (run.path / "sft" / "adapter").exists()
