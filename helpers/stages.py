"""A stage of a run: what it was made from, whether it is finished, what it reports."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import runtime
from helpers.config import RunConfig, Stage
from helpers.data.formats import Row
from helpers.errors import ConfigError
from helpers.grpo import diagnostics
from helpers.masking.templates import template_text
from helpers.runs import Run, content_hash, fingerprint, write_json

if TYPE_CHECKING:
    from transformers import Trainer

NOTE = "made_from.json"
REPORTING = ["report_to", "run_name", "project", "trackio_space_id", "logging_dir"]
# how progress is shown and kept, and how rows reach the trainer
REPORTING += ["disable_tqdm", "save_steps", "save_strategy", "save_total_limit"]
REPORTING += ["dataloader_num_workers", "dataloader_pin_memory"]
LOGGING = ["logging_steps", "logging_strategy", "logging_first_step"]
NOTEBOOKS: dict[Stage, str] = {"sft": "02_sft_qlora", "grpo": "03_grpo_gsm8k"}


def require_stage(config: RunConfig, stage: Stage) -> None:
    """Raises ConfigError when a run has no such stage."""
    if stage not in config.stages:
        raise ConfigError(
            f"run {config.name!r} (recipe {config.recipe!r}) has no {stage} stage, "
            f"only {' and '.join(config.stages)}: open notebook "
            f"{NOTEBOOKS[config.stages[0]]}, or choose another recipe in 00_setup"
        )


def inputs_of(run: Run, stage: Stage) -> dict[str, Any]:
    """Returns all that decides a stage's result, by name: settings and contents.

    An allow-list: what is not named here leaves a finished stage alone. Data count by
    the content of the prepared rows, adapters by their weights.
    """
    config = run.config
    rows = run.report().get("data", {}).get("fingerprints", {})
    names = ["engine", "weights", "double_quant", "dtype", "pad_token", "seed"]
    if stage == "sft":
        names += ["max_length", "loss_on", "best_by"]
        parts = ["train", "eval"]
    else:
        names += ["grpo_minutes", "grpo_held_out", "sampler", "rewards"]
        names += ["max_prompt_length", "system_prompt"]
        parts = ["problems", "eval"]
    inputs = {name: getattr(config, name) for name in names}
    template = fingerprint(template_text(config.template))
    inputs |= {"model": content_hash(config.model), "template": template}
    inputs |= {f"data.{name}": rows[name] for name in parts if name in rows}
    # what is logged decides which adapter is best, and when GRPO is stopped
    by_log = stage == "grpo" or config.best_by == "loss"
    without = REPORTING if by_log else REPORTING + LOGGING
    inputs |= flat(stage, getattr(config, stage), without)
    if stage == "sft" or "sft" not in config.stages and not config.sft_adapter:
        return inputs | flat("lora", config.lora)
    if config.sft_adapter:
        return inputs | {"sft_adapter": content_hash(config.sft_adapter)}
    return inputs | {"sft": made_from(run, "sft")}


def flat(group: str, values: dict[str, Any], without: Sequence[str] = ()) -> Row:
    """Returns a group's values under dotted names.

    >>> flat("lora", {"r": 16})
    {'lora.r': 16}
    """
    return {f"{group}.{k}": v for k, v in values.items() if k not in without}


def made_from(run: Run, stage: Stage) -> str:
    """Returns the fingerprint of all that decides a stage's result."""
    return fingerprint(inputs_of(run, stage))


def open_stage(run: Run, stage: Stage) -> Path:
    """Returns a stage's folder, with checkpoints of another config set aside.

    A folder that was made from other settings or data is renamed, never mixed in and
    never deleted.
    """
    folder = run.path / stage
    note = read_note(folder / NOTE)
    if note and note["fingerprint"] != made_from(run, stage):
        number = 1 + len(list(run.path.glob(f"{stage}.before-*")))
        aside = run.path / f"{stage}.before-{number}"
        print(  # noqa: T201
            f"{stage}: {name_changes(note, run, stage)} changed since it was trained; "
            f"the former result is in {aside}, and it is trained anew"
        )
        folder.rename(aside)
    if not (folder / NOTE).exists():
        write_note(run, stage, finished=False)
    return folder


def name_changes(note: dict[str, Any], run: Run, stage: Stage) -> str:
    """Returns which inputs of a stage are others than its note says, in words."""
    before, now = note.get("inputs", {}), inputs_of(run, stage)
    now = json.loads(json.dumps(now))  # as the note was written
    names = sorted(k for k in before | now if before.get(k) != now.get(k))
    return ", ".join(names) or "settings or data"


def write_note(run: Run, stage: Stage, finished: bool) -> None:
    """Writes what a stage is made from, and whether it was trained to its end."""
    note = {"fingerprint": made_from(run, stage), "finished": finished}
    note["inputs"] = inputs_of(run, stage)
    write_json(run.path / stage / NOTE, note)


def is_finished(run: Run, stage: Stage) -> bool:
    """Returns whether a stage was trained to its end with the settings as they are."""
    note = read_note(run.path / stage / NOTE)
    return note.get("finished", False) and note["fingerprint"] == made_from(run, stage)


def read_note(path: Path) -> dict[str, Any]:
    """Returns what a small JSON file of a stage holds, empty when it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def finish(run: Run, stage: Stage) -> None:
    """Notes that a stage was trained to its end with the settings as they are."""
    write_note(run, stage, finished=True)


def callback_of(trainer: Trainer, kind: type) -> Any:
    """Returns the trainer's callback of a class."""
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, kind))


def stage_report(run: Run, stage: Stage, trainer: Trainer) -> dict[str, Any]:
    """Returns a stage's part of `report.json` from what the trainer logged."""
    from helpers.training import callbacks

    history = callback_of(trainer, callbacks.History)
    skipped = callback_of(trainer, callbacks.SkippedSteps)
    part: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "seconds": round(history.training_seconds, 1),
        "peak_memory_gb": round(runtime.peak_memory_gb(), 3),
        "skipped_steps": skipped.count,
    }
    best = callback_of(trainer, callbacks.BestAdapter)
    reasons = [getattr(c, "reason", "") for c in trainer.callback_handler.callbacks]
    if any(reasons):
        part["stopped"] = "; ".join(filter(None, reasons))
    if stage == "grpo":
        rewards_seen = history.values("reward")
        ends = diagnostics.width_of_ends(len(rewards_seen))
        prompts = read_note(run.path / stage / "prompts.json")
        part |= {
            "reward_first": round(sum(rewards_seen[:ends]) / ends, 4),
            "reward_last": round(sum(rewards_seen[-ends:]) / ends, 4),
            "reward_averaged_over_steps": ends,
            "prompts_left_out": prompts["left_out"],
        }
        part["sampler"] = "copy" if trainer.rollout_func else "model"
        if run.config.grpo_minutes:
            clock = read_note(run.path / stage / "clock.json")
            part["planned_steps"] = clock["planned_steps"]
        held_out = history.values(best.by)
        if held_out:
            part |= {"held_out_first": held_out[0], "held_out_best": best.best}
            part["best_step"] = best.step
        return part
    losses, tokens = history.values("loss"), trainer.state.num_input_tokens_seen
    labels = read_note(run.path / stage / "labels.json")
    part |= {"loss_first": round(losses[0], 4), "loss_last": round(losses[-1], 4)}
    if math.isfinite(best.best):  # the loss it goes by was never logged otherwise
        part |= {f"{best.by}_best": round(best.best, 4), "best_step": best.step}
    return part | {
        "tokens_per_second": round(tokens / history.training_seconds, 1),
        "supervised_fraction": round(labels["supervised_fraction"], 4),
        "rows_dropped": labels["dropped"],
        "rows_truncated": labels["truncated"],
    }
