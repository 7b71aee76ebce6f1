"""What goes into a stage: its training arguments, and all that decides its result.

The note `made_from.json` in a stage's folder holds its inputs, and whether the stage
was trained to its end with them.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from helpers import runtime
from helpers.config import RunConfig, Stage, complete, defaults
from helpers.errors import ConfigError
from helpers.masking.templates import template_text
from helpers.runs import Run, content_hash, fingerprint, write_json

log = logging.getLogger(__name__)
NOTE = "made_from.json"
NOTEBOOKS: dict[Stage, str] = {"sft": "02_sft_qlora", "grpo": "03_grpo_gsm8k"}
# how progress is shown and kept, and how rows reach the trainer, decide no result
REPORTING = ["report_to", "run_name", "project", "trackio_space_id", "logging_dir"]
REPORTING += ["disable_tqdm", "save_steps", "save_strategy", "save_total_limit"]
REPORTING += ["dataloader_num_workers", "dataloader_pin_memory"]
LOGGING = ["logging_steps", "logging_strategy", "logging_first_step"]

# what a config leaves open is TRL's own default: Unsloth has others
TRL_OPEN = ["per_device_train_batch_size", "gradient_accumulation_steps", "packing"]
TRL_OPEN += ["learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay"]
TRL_OPEN += ["max_steps", "num_train_epochs", "optim"]
TRL_OPEN += ["beta", "loss_type", "mask_truncated_completions"]


def require_stage(config: RunConfig, stage: Stage) -> None:
    """Raises ConfigError when a run has no such stage."""
    if stage not in config.stages:
        raise ConfigError(
            f"run {config.name!r} (recipe {config.recipe!r}) has no {stage} stage, "
            f"only {' and '.join(config.stages)}: open notebook "
            f"{NOTEBOOKS[config.stages[0]]}, or choose another recipe in 00_setup"
        )


def inputs_of(run: Run, stage: Stage) -> dict[str, Any]:
    """Returns the inputs that decide a stage's result: settings and contents.

    An allow-list: what is not named here leaves a finished stage alone. Data count by
    the content of the prepared rows, adapters by their weights.
    """
    config = run.config
    names = ["engine", "weights", "double_quant", "dtype", "pad_token", "seed"]
    if stage == "sft":
        names += ["max_length", "loss_on", "best_by"]
        parts = ["train", "eval"]
    else:
        names += ["grpo_minutes", "grpo_held_out", "sampler", "rewards"]
        names += ["max_prompt_length", "system_prompt"]
        parts = ["problems", "eval"]
    inputs = {name: getattr(config, name) for name in names}
    inputs["model"] = content_hash(config.model)
    inputs["template"] = fingerprint(template_text(config.template))
    rows = run.report().get("data", {}).get("fingerprints", {})
    inputs |= {f"data.{name}": rows[name] for name in parts if name in rows}
    # what is logged decides which adapter is best, and when GRPO is stopped
    by_log = stage == "grpo" or config.best_by == "loss"
    ignored = REPORTING if by_log else REPORTING + LOGGING
    values = getattr(config, stage)
    inputs |= {f"{stage}.{k}": v for k, v in values.items() if k not in ignored}
    if stage == "grpo" and config.sft_adapter:
        return inputs | {"sft_adapter": content_hash(config.sft_adapter)}
    if stage == "grpo" and "sft" in config.stages:
        return inputs | {"sft": made_from(run, "sft")}
    return inputs | {f"lora.{name}": value for name, value in config.lora.items()}


def made_from(run: Run, stage: Stage) -> str:
    """Returns the fingerprint of a stage's inputs."""
    return fingerprint(inputs_of(run, stage))


def open_stage(run: Run, stage: Stage) -> Path:
    """Returns a stage's folder, after renaming one that was made from other inputs.

    Raises:
        ConfigError: the run has no such stage.
    """
    require_stage(run.config, stage)
    folder = run.path / stage
    note = read_note(folder / NOTE)
    if note and note["fingerprint"] != made_from(run, stage):
        old = note.get("inputs", {})
        new = json.loads(json.dumps(inputs_of(run, stage)))  # as the note was written
        names = sorted(k for k in old | new if old.get(k) != new.get(k))
        number = 1 + len(list(run.path.glob(f"{stage}.before-*")))
        aside = folder.rename(run.path / f"{stage}.before-{number}")
        log.info(
            f"{stage}: {', '.join(names) or 'settings or data'} changed since it was "
            f"trained; the former result is in {aside}, and it is trained anew"
        )
    if not (folder / NOTE).exists():
        write_note(run, stage, finished=False)
    return folder


def write_note(run: Run, stage: Stage, *, finished: bool) -> None:
    """Writes a stage's inputs, and whether it was trained to its end with them."""
    note = {"fingerprint": made_from(run, stage), "finished": finished}
    write_json(run.path / stage / NOTE, note | {"inputs": inputs_of(run, stage)})


def is_finished(run: Run, stage: Stage) -> bool:
    """Returns whether a stage was trained to its end from its present inputs."""
    note = read_note(run.path / stage / NOTE)
    return note.get("finished", False) and note["fingerprint"] == made_from(run, stage)


def read_note(path: Path) -> dict[str, Any]:
    """Returns the content of a stage's JSON file, empty when there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def machine_arguments(config: RunConfig, stage: Stage) -> dict[str, Any]:
    """Returns the training arguments that the machine decides, not the recipe.

    Recomputing activations saves memory for a third more time: never on a CPU.
    """
    machine = runtime.find_machine()
    gpu = machine.device == "cuda"
    dtype = str(runtime.choose_dtype(machine, config.dtype)[0])
    return {
        "fp16": gpu and dtype == "torch.float16",
        "bf16": gpu and dtype == "torch.bfloat16",
        "use_cpu": not gpu,
        "gradient_checkpointing": gpu
        and complete(config, stage)["gradient_checkpointing"],
    }


def training_arguments(run: Run, stage: Stage, folder: Path) -> dict[str, Any]:
    """Returns a stage's training arguments: the config's, and what they leave open."""
    config, default = run.config, defaults(stage)
    machine = machine_arguments(config, stage)
    values = {n: default[n] for n in TRL_OPEN if default.get(n) is not None}
    values |= getattr(config, stage)
    # what fits while training fits while evaluating
    values.setdefault(
        "per_device_eval_batch_size", values["per_device_train_batch_size"]
    )
    return {
        "output_dir": str(folder / "checkpoints"),
        "run_name": f"{config.name}-{stage}",
        "project": "tunebook",
        "seed": config.seed,
        "save_total_limit": 2,
        "logging_first_step": True,
        **machine,
        **values,
        "gradient_checkpointing": machine["gradient_checkpointing"],
        "report_to": choose_trackers(values.get("report_to") or "none") or "none",
    }


def choose_trackers(report_to: str | list[str]) -> list[str]:
    """Returns the trackers of `report_to` that are installed; the others are logged.

    W&B keeps its run on this machine where nobody is logged in, and asks nothing.
    """
    from transformers.integrations import get_available_reporting_integrations

    installed = get_available_reporting_integrations()
    names = [report_to] if isinstance(report_to, str) else report_to
    names = installed if names == ["all"] else [n for n in names if n != "none"]
    for name in set(names) - set(installed):
        log.info(f"report_to: {name} is left out; run `pip install {name}`")
    names = [name for name in names if name in installed]
    if "wandb" in names and "WANDB_MODE" not in os.environ:
        import wandb

        try:
            has_key = wandb.login(prompt=False, verify=False)
        except TypeError:  # Colab's 0.28 has no `prompt`
            has_key = wandb.api.api_key is not None
        if not has_key:
            os.environ["WANDB_MODE"] = "offline"
            wandb.setup(settings=wandb.Settings(mode="offline"))  # it has read that
            log.info("wandb: nobody is logged in; `wandb sync` uploads the run later")
    return names
