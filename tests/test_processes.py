"""The same training in two processes: losses, gradients, resumption; launch files."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed import run as torchrun

from helpers import recipes, runtime, stages
from helpers.__main__ import COMMANDS
from helpers.errors import ConfigError, ModelError
from helpers.models import load
from helpers.runs import Run
from helpers.training import inputs, layout

ROOT = Path(__file__).parent.parent
SFT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
SFT |= {"per_device_eval_batch_size": 4, "packing": False, "learning_rate": 1e-3}
SFT |= {"max_steps": 8, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2}
SFT |= {"eval_strategy": "steps", "eval_steps": 4, "optim": "adamw_torch"}
TWO = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}

# answers that are decided by the prompt, so that only the arithmetic is compared
GRADIENTS = """
import sys
from collections import Counter
import torch
from transformers import TrainerCallback
from helpers import runs, runtime, stages
from helpers.grpo import build_grpo, split_problems
from helpers.inference.generation import encode
from helpers.training import load_for_training
run = runs.open_run("test")
with runtime.first_process():
    stages.ensure_ready(run, "grpo")
model, tokenizer = load_for_training(run, "grpo")
gold = {str(p["prompt"]): float(p["gold"]) for p in split_problems(run)[0]}
def answer(prompts, trainer):
    seen, ids = Counter(), []
    for prompt in prompts:
        number = gold[str(prompt)] + seen[str(prompt)] // 2
        text = "so " * seen[str(prompt)] + f"#### {number:g}"
        ids.append(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id])
        seen[str(prompt)] += 1
    rows = [encode(tokenizer, prompt) for prompt in prompts]
    return {"prompt_ids": rows, "completion_ids": ids, "logprobs": None}
class Look(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        named = model.named_parameters()
        grads = {n: p.grad.clone() for n, p in named if p.grad is not None}
        if state.is_world_process_zero:
            torch.save(grads, sys.argv[1])
trainer = build_grpo(run, model, tokenizer)
trainer.rollout_func = answer
trainer.add_callback(Look())
trainer.train()
"""

# with activations computed again, which a CPU does not do by itself
SHARES = r"""
from helpers import runs, runtime, stages
from helpers.training.trainer import build_sft, fit, load_for_training
run = runs.open_run()
with runtime.first_process():
    stages.ensure_ready(run, "sft")
model, tokenizer = load_for_training(run)
layers = model.get_base_model().model.layers
total = sum(p.nbytes for p in layers.parameters())
trainer = build_sft(run, model, tokenizer)
trainer.args.gradient_checkpointing = True
fit(trainer, run)
assert model.is_gradient_checkpointing
share = sum(p.to_local().nbytes for p in layers.parameters()) / total
print(f"share {share}\n", end="")  # at once: the other process prints, too
"""


def curve(run: Run, name: str = "loss") -> list[float]:
    history = json.loads((run.path / "sft" / "log_history.json").read_text())
    return [entry[name] for entry in history if name in entry]


def two_processes(run: Run, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "helpers", "train", str(run.path / "config.json")]
    options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command += ["--stage", "sft", "--gpus", "2", *more]
    options |= {"text": True, "cwd": ROOT, "env": os.environ | TWO}
    return subprocess.Popen(command, **options)


def kill_one(caller: subprocess.Popen[str], run: Run) -> None:
    """Kills one of two processes after their first checkpoint, which ends both."""
    state = run.path / "sft" / "checkpoints" / "checkpoint-2" / "trainer_state.json"
    late = time.monotonic() + 100
    while not state.exists():
        assert caller.poll() is None and time.monotonic() < late
        time.sleep(0.05)
    children = psutil.Process(caller.pid).children(recursive=True)
    ranks = {p.environ().get("LOCAL_RANK"): p for p in children}
    ranks["1"].send_signal(signal.SIGKILL)
    text, _ = caller.communicate(timeout=60)
    assert caller.returncode == 1 and not any(p.is_running() for p in children)
    assert "TrainingError: process 1 of 2 ended with exit code -9" in text


@pytest.fixture
def alone(run_factory: Callable[..., Run]) -> Run:
    """The run of one process; 27 rows leave a step of an epoch with three."""
    run = run_factory(name="alone", sft=SFT, data__train_rows=27, stages=["sft"])
    stages.train(run.config, "sft")
    return run


def test_two_processes_learn_what_one_does_and_a_killed_one_ends_both_and_goes_on(
    alone: Run, run_factory: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    both = run_factory(name="both", sft=SFT, data__train_rows=27, stages=["sft"])
    text, _ = two_processes(both).communicate(timeout=170)
    assert curve(both) == pytest.approx(curve(alone), abs=1e-5), text[-2000:]
    assert curve(both, "eval_loss") == pytest.approx(curve(alone, "eval_loss"), 1e-6)
    assert both.report()["sft"]["processes"] == 2
    assert text.count("runs are kept in") == 2  # of the first, then of the caller
    assert (
        not list(both.path.glob("*.before-*"))
        and not (both.path / "lock.json").exists()
    )

    run = run_factory(name="killed", sft=SFT, data__train_rows=27, stages=["sft"])
    kill_one(two_processes(run), run)
    caplog.set_level(logging.INFO, "helpers")
    stages.train(run.config, "sft")
    assert "going on from" in caplog.text
    assert curve(run) == pytest.approx(curve(alone), abs=1e-5)


def test_shared_weights_learn_what_whole_ones_do_and_any_number_goes_on(
    alone: Run, run_factory: Callable[..., Run]
) -> None:
    run = run_factory(name="shared", sft=SFT, data__train_rows=27, stages=["sft"])
    kill_one(two_processes(run, "--shard"), run)
    for options in (["--shard"], []):
        copy = Run(run.path.with_name(f"copy{len(options)}"), run.config)
        shutil.copytree(run.path, copy.path)
        config = run.config.model_copy(update={"name": copy.path.name})
        (copy.path / "config.json").write_text(config.model_dump_json())
        text, _ = two_processes(copy, *options).communicate(timeout=170)
        assert "going on from" in text
        assert curve(copy) == pytest.approx(curve(alone), abs=1e-5), text[-2000:]
        losses = curve(alone, "eval_loss")
        assert curve(copy, "eval_loss") == pytest.approx(losses, 1e-6)
        files = {p.name for p in (copy.path / "sft" / "adapter").iterdir()}
        assert files == {p.name for p in (alone.path / "sft" / "adapter").iterdir()}
    stages.train(run.config, "sft")
    assert curve(run) == pytest.approx(curve(alone), abs=1e-5)


def test_shared_4bit_weights_lie_in_halves_and_learn_with_recomputation(
    run_factory: Callable[..., Run], run_python: Callable[..., Any], tmp_path: Path
) -> None:
    same = {"sft": SFT | {"max_steps": 2, "eval_steps": 2}, "data__train_rows": 27}
    same |= {"stages": ["sft"], "weights": "4bit"}
    whole = run_factory(name="whole", **same)
    stages.train(whole.config, "sft")
    run = run_factory(name="shared", **same)
    program = tmp_path / "shares.py"
    program.write_text(SHARES)
    variables = TWO | runtime.SHARD | {"PYTHONPATH": str(ROOT)}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    text = run_python(*launcher, str(program), **variables).stdout
    shares = [float(x) for x in re.findall("share (.*)", text)]
    assert len(shares) == 2 and max(shares) < 0.51
    assert curve(run) == pytest.approx(curve(whole), abs=1e-5)


def test_grpo_has_the_gradients_of_one_process_at_the_same_groups(
    run_factory: Callable[..., Run], run_python: Callable[..., Any], tmp_path: Path
) -> None:
    import torch

    grpo = {"per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 1}
    grpo |= {"max_completion_length": 24, "eval_strategy": "no", "save_strategy": "no"}
    run_factory(grpo=grpo, stages=["grpo"])
    program = tmp_path / "gradients.py"
    program.write_text(GRADIENTS)
    files = [tmp_path / "one.pt", tmp_path / "two.pt"]
    path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run_python(str(program), str(files[0]), **path)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run_python(*launcher, str(program), str(files[1]), **path, ACCELERATE_USE_CPU="1")
    one, two = (torch.load(file) for file in files)
    assert max(grad.abs().max() for grad in one.values()) > 1e-4
    for name, grad in one.items():
        torch.testing.assert_close(two[name], grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("micro", "passes", "count", "share"),
    [(2, 4, 2, (2, 2)), (8, 1, 4, (2, 1)), (2, 4, 8, (1, 1)), (6, 2, 4, (3, 1))],
)
def test_processes_share_a_steps_rows(
    micro: int, passes: int, count: int, share: tuple[int, int]
) -> None:
    values = dict(zip(inputs.SIZES, (micro, 8, passes), strict=True))
    sizes = inputs.share_rows(values | {"steps_per_generation": 2}, count)
    assert (sizes[inputs.SIZES[0]], sizes[inputs.SIZES[2]]) == share
    assert sizes[inputs.SIZES[1]] == 8 // count
    assert sizes["generation_batch_size"] == 2 * micro


def test_processes_draw_a_steps_rows_in_shares_of_equal_tokens() -> None:
    tokens = [90, 10, 20, 80, 70, 30, 40, 60, 50, 50, 5, 95, 7, 7, 7, 7]
    rows = layout.SharedRows(range(14), [14, 14], tokens, size=2, processes=2, step=8)
    drawn = [*rows]
    assert len(drawn) == len(rows) == 16
    assert sorted(drawn[:8]) == [*range(8)]
    assert sorted(drawn[8:]) == [8, 9, 10, 11, 12, 13, 14, 14]
    for step in (drawn[:8], drawn[8:]):
        passes = [step[n : n + 2] for n in range(0, 8, 2)]
        shares = [rows.count_tokens(sum(passes[n::2], [])) for n in range(2)]
        assert max(shares) - min(shares) <= 12


def test_rows_that_do_not_divide_are_refused() -> None:
    values = dict(zip(inputs.SIZES, (3, 3, 1), strict=True))
    with pytest.raises(ConfigError, match="3 x 1 rows a step .* by 2 GPUs"):
        inputs.share_rows(values, 2)


@pytest.mark.parametrize("gpus", ["99", "0", "two"])
def test_more_gpus_than_there_are_is_refused(
    gpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("ACCELERATE_USE_CPU", "1")  # whose cores stand for them
        with pytest.raises(ConfigError, match=f"--gpus {gpus}: expected all, or a num"):
            runtime.launch(["train", "demo"], gpus)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="--gpus: there is no GPU"):
        runtime.launch(["train", "demo"], gpus)


def test_one_gpu_has_nobody_to_share_weights_with_and_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    with pytest.raises(ConfigError, match="--shard needs two GPUs or more"):
        runtime.launch(["train", "demo"], "1", shard=True)


def read_yaml(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "configs" / name).read_text())


def test_launch_files_call_commands_that_exist(tmp_path: Path) -> None:
    job = ROOT / "configs" / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(job)], check=True)
    text = job.read_text()
    assert re.search(r"^#SBATCH --nodes=\d+$", text, re.M)
    [options] = re.findall(r"torchrun (.*?)'", text, re.S)
    words = shlex.split(options.replace("\\\n", " "))
    words = [word.replace("$SLURM_NNODES", "2") for word in words]
    node = torchrun.parse_args(words)
    assert (node.nnodes, node.nproc_per_node) == ("2", "gpu")
    sky = read_yaml("skypilot.yaml")
    assert sky["setup"] == "make setup" and "accelerators" in sky["resources"]
    command = shlex.split(sky["run"].replace("$RUN", sky["envs"]["RUN"]))
    assert command[1:4] == ["-m", "helpers", "train"]
    for line in ([*node.training_script_args], command[3:]):
        assert set(line[2:]) - {"all"} <= set(COMMANDS["train"].split())


def test_accelerates_launcher_shares_weights_as_shard_does() -> None:
    words = ["--config_file", str(ROOT / "configs" / "fsdp2.yaml")]
    words += ["--module", "helpers", "train", "demo", "--stage", "sft"]
    options, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert runtime.SHARD.items() <= prepare_multi_gpu_env(options).items()


@pytest.mark.parametrize(
    ("changes", "needs"),
    [
        ({"stages": ["sft", "grpo"]}, "--stage sft: GRPO samples from whole weights"),
        ({"engine": "unsloth"}, "engine='transformers' or 'auto'"),
        ({"weights": "8bit"}, "weights='4bit' or '16bit'"),
        ({"sft": {"optim": "lion_8bit"}}, "an AdamW as sft.optim"),
        ({}, "two GPUs or more"),
    ],
)
def test_what_cannot_be_trained_on_shared_weights_is_refused(
    changes: dict[str, Any],
    needs: str,
    run_factory: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = run_factory(**{"stages": ["sft"]} | changes)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=f"--shard needs .*{re.escape(needs)}"):
        stages.train(run.config)


def test_weights_to_share_stay_in_ram_as_floats_and_stored_integers_are_refused(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load.load_model(str(tiny_model_folder), weights="4bit")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    load.load_model(str(tmp_path), weights="4bit")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("TUNEBOOK_DTYPE", "float16")  # whose NaNs CUDA's copies alter
    model, _ = load.load_model(str(tiny_model_folder), weights="4bit")
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert not hasattr(model, "hf_device_map")  # by which PEFT would send it to GPUs
    with pytest.raises(ModelError, match="--shard needs a model that was not quanti"):
        load.load_model(str(tmp_path), weights="4bit")


def test_axolotls_config_has_the_numbers_of_the_recipe() -> None:
    theirs, ours = read_yaml("axolotl.yaml"), recipes.load("finetome-llama32-1b")
    names = {"micro_batch_size": "per_device_train_batch_size", "optimizer": "optim"}
    names |= {"lr_scheduler": "lr_scheduler_type"}
    for name in "max_steps learning_rate warmup_steps weight_decay".split():
        names[name] = name
    assert {n: theirs[n] for n in names} == {n: ours.sft[m] for n, m in names.items()}
    passes = "gradient_accumulation_steps"
    assert theirs[passes] == ours.sft[passes]
    assert theirs["sequence_len"] == ours.max_length and theirs["seed"] == ours.seed
    assert theirs["lora_target_modules"] == ours.lora["target_modules"]
    assert theirs["base_model"] == ours.model
