"""A stage's folder: its training arguments, what it was made from, its curves."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import runtime
from helpers.config import RunConfig, Stage, complete, defaults
from helpers.errors import ConfigError
from helpers.files import content_hash, fingerprint, read_json, write_json
from helpers.masking.templates import template_text
from helpers.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)
NOTE = "made_from.json"  # the inputs, and whether the stage was trained to its end
NOTEBOOKS: dict[Stage, str] = {"sft": "02_sft_qlora", "grpo": "03_grpo_gsm8k"}
# these decide no result; what is logged may decide which adapter is the best
REPORTING = """report_to run_name project trackio_space_id logging_dir disable_tqdm
    save_steps save_strategy save_total_limit dataloader_num_workers
    dataloader_pin_memory""".split()
# what a config leaves open is TRL's own default: Unsloth has others
TRL_OPEN = """per_device_train_batch_size gradient_accumulation_steps packing
    learning_rate lr_scheduler_type warmup_steps weight_decay max_steps
    num_train_epochs optim beta loss_type mask_truncated_completions""".split()
REWARDS = "reward by component (band: spread)"
PANELS = {
    "loss": ["loss", "eval_loss"],
    REWARDS: ["eval_reward"],
    "share of groups": ["frac_reward_zero_std", "groups/all_wrong", "groups/all_right"],
    "completion length, tokens": ["completions/mean_length", "completions/max_length"],
    "share of answers cut off": ["completions/clipped_ratio"],
    "nats a token": ["entropy", "kl"],
    "learning rate": ["learning_rate"],
    "optimiser": ["grad_norm", "skipped_steps"],
}


def require_stage(config: RunConfig, stage: Stage) -> None:
    """Raises ConfigError when a run has no such stage."""
    if stage not in config.stages:
        raise ConfigError(
            f"run {config.name!r} (recipe {config.recipe!r}) has no {stage} stage, "
            f"only {' and '.join(config.stages)}: open notebook "
            f"{NOTEBOOKS[config.stages[0]]}, or choose another recipe in 00_setup"
        )


def inputs_of(run: Run, stage: Stage) -> dict[str, Any]:
    """Returns all that decides a stage's result, data and adapters by their content."""
    config = run.config
    names = {"engine", "weights", "double_quant", "dtype", "pad_token", "seed"}
    if stage == "sft":
        names |= {"max_length", "loss_on", "best_by"}
        parts = ["train", "eval"]
    else:
        names |= {"grpo_minutes", "grpo_held_out", "sampler", "rewards"}
        names |= {"max_prompt_length", "system_prompt"}
        parts = ["problems", "eval"]
    inputs = config.model_dump(include=names)
    inputs["model"] = content_hash(config.model)
    inputs["template"] = fingerprint(template_text(config.template))
    rows = run.report().get("data", {}).get("fingerprints", {})
    inputs |= {f"data.{name}": rows[name] for name in parts if name in rows}
    values = {k: v for k, v in getattr(config, stage).items() if k not in REPORTING}
    inputs |= {f"{stage}.{name}": value for name, value in values.items()}
    if stage == "grpo" and config.sft_adapter:
        return inputs | {"sft_adapter": content_hash(config.sft_adapter)}
    if stage == "grpo" and "sft" in config.stages:
        return inputs | {"sft": made_from(run, "sft")}
    return inputs | {f"lora.{name}": value for name, value in config.lora.items()}


def made_from(run: Run, stage: Stage) -> str:
    """Returns the fingerprint of a stage's inputs."""
    return fingerprint(inputs_of(run, stage))


def open_stage(run: Run, stage: Stage) -> Path:
    """Returns a stage's folder, after renaming one that was made from other inputs."""
    require_stage(run.config, stage)
    folder = run.path / stage
    note = read_json(folder / NOTE)
    inputs = inputs_of(run, stage)
    if note and note["fingerprint"] != fingerprint(inputs):
        old, new = note["inputs"], json.loads(json.dumps(inputs))  # as it was written
        names = sorted(k for k in old | new if old.get(k) != new.get(k))
        number = 1 + len(list(run.path.glob(f"{stage}.before-*")))
        aside = folder.rename(run.path / f"{stage}.before-{number}")
        log.info(
            f"{stage}: {', '.join(names)} changed since it was trained; the former "
            f"result is in {aside}, and it is trained anew"
        )
    if not (folder / NOTE).exists():
        write_note(run, stage, finished=False)
    return folder


def write_note(run: Run, stage: Stage, *, finished: bool) -> None:
    """Writes a stage's inputs, and whether it was trained to its end with them."""
    inputs = inputs_of(run, stage)
    note = {"fingerprint": fingerprint(inputs), "finished": finished}
    write_json(run.path / stage / NOTE, note | {"inputs": inputs})


def is_finished(run: Run, stage: Stage) -> bool:
    """Returns whether a stage was trained to its end from its present inputs."""
    note = read_json(run.path / stage / NOTE)
    return note.get("finished", False) and note["fingerprint"] == made_from(run, stage)


def finished_part(run: Run, stage: Stage) -> dict[str, Any] | None:
    """Returns the report of a finished stage, with a note; None while there is none."""
    if not is_finished(run, stage):
        return None
    folder = run.path / stage
    log.info(f"{stage} is finished; to train again, move {folder} away")
    return run.report()[stage]


def training_arguments(run: Run, stage: Stage, folder: Path) -> dict[str, Any]:
    """Returns a stage's training arguments: the config's, and what they leave open."""
    config, default, machine = run.config, defaults(stage), runtime.find_machine()
    gpu = machine.device == "cuda"
    dtype = str(runtime.choose_dtype(machine, config.dtype)[0])
    values = {n: default[n] for n in TRL_OPEN if default.get(n) is not None}
    values = {"report_to": "none", **values, **getattr(config, stage)}
    if "wandb" in values["report_to"] or "all" in values["report_to"]:
        keep_wandb_offline()
    recompute = complete(config, stage)["gradient_checkpointing"]
    return {
        "output_dir": str(folder / "checkpoints"),
        "run_name": f"{config.name}-{stage}",
        "project": "tunebook",
        "seed": config.seed,
        "save_total_limit": 2,
        "logging_first_step": True,
        "fp16": gpu and dtype == "torch.float16",
        "bf16": gpu and dtype == "torch.bfloat16",
        "use_cpu": not gpu,
        # what fits while training fits while evaluating
        "per_device_eval_batch_size": values["per_device_train_batch_size"],
        **values,
        "gradient_checkpointing": gpu and recompute,  # it saves memory, costs time
    }


def keep_wandb_offline() -> None:
    """Has W&B keep its run on this machine where nobody is logged in; it would ask."""
    import wandb

    if "WANDB_MODE" not in os.environ and wandb.api.api_key is None:
        os.environ["WANDB_MODE"] = "offline"
        wandb.setup(settings=wandb.Settings(mode="offline"))  # it has read that
        log.info("wandb: nobody is logged in; `wandb sync` uploads the run later")


def draw_diagnostics(history: list[dict[str, Any]], path: Path | None = None) -> Figure:
    """Returns the curves of what a trainer logged, and saves them where told."""
    import pandas as pd
    from matplotlib.figure import Figure

    logged = pd.DataFrame(history).groupby("step").first().select_dtypes("number")
    # steps and evaluations are logged in entries of their own
    logged = logged.dropna(axis=1, how="all").interpolate(limit_area="inside")
    means = [n for n in logged if n.startswith("rewards/") and n.endswith("/mean")]
    panels = PANELS | {REWARDS: means + PANELS[REWARDS]}
    if means:
        del panels["loss"]  # GRPO's is zero by construction
    names = {title: [n for n in ns if n in logged] for title, ns in panels.items()}
    shown = {title: ns for title, ns in names.items() if ns}
    columns = -(-len(shown) // 2)
    figure = Figure(figsize=(3.8 * columns, 5.6), layout="constrained")
    for number, (title, curves) in enumerate(shown.items(), start=1):
        axes = figure.add_subplot(2, columns, number, xlabel="optimiser step")
        logged[curves].plot(ax=axes, title=title, grid=True, marker=".")
        for name in means if title == REWARDS else ():
            mean, spread = logged[name], logged[name.replace("/mean", "/std")]
            axes.fill_between(logged.index, mean - spread, mean + spread, alpha=0.12)
    if path is not None:
        figure.savefig(path, dpi=80)
    return figure
