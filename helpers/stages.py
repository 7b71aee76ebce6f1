"""The stages of a run in order: the only place that trains what is missing."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from helpers import checks, runtime
from helpers.config import RunConfig, Stage
from helpers.data import preparation as data
from helpers.evaluation import evaluator
from helpers.grpo import trainer as grpo
from helpers.grpo.trainer import require_prompts
from helpers.runs import Run, save_run
from helpers.training import inputs
from helpers.training.trainer import build_sft, fit, load_for_training

log = logging.getLogger(__name__)


def ensure_ready(run: Run, stage: Stage) -> None:
    """Prepares a run's data where they are missing, and refuses what cannot train.

    Raises:
        ConfigError: the run has no such stage, or cannot take a step of it.
        DataError: see `data.prepare`.
    """
    inputs.require_stage(run.config, stage)
    checks.require(checks.advise(run.config))
    data.ensure_data(run)
    rows = run.report()["data"].get("train")
    if advice := checks.advise(run.config, rows=rows):
        log.info(checks.report(advice))
    if "grpo" in run.config.stages:
        require_prompts(run)


def ensure_adapter(run: Run, stage: Stage) -> Path | str | None:
    """Returns a stage's adapter, trained first where it is missing.

    For SFT it is the config's `sft_adapter` where one is named, and None in a run
    without that stage: GRPO then starts with fresh LoRA.
    """
    if stage == "sft" and run.config.sft_adapter:
        return run.config.sft_adapter
    if stage == "sft" and "sft" not in run.config.stages:
        return None
    inputs.require_stage(run.config, stage)
    path = run.path / stage / "adapter"
    if not inputs.is_finished(run, stage):
        notebook = inputs.NOTEBOOKS[stage]
        log.info(f"no finished {path} ({notebook} makes it): training it now")
        train_stage(run, stage)
    return path


def train_stage(run: Run, stage: Stage) -> dict[str, Any]:
    """Trains a stage, and what it needs before; returns its report."""
    ensure_ready(run, stage)
    if part := inputs.finished_part(run, stage):
        return part
    start = ensure_adapter(run, "sft") if stage == "grpo" else None
    model, tokenizer = load_for_training(run, stage, start)
    build = build_sft if stage == "sft" else grpo.build_grpo
    part = fit(build(run, model, tokenizer), run)
    del model
    runtime.free_memory()
    return part


def train(config: RunConfig) -> Run:
    """Saves a run, trains its stages, evaluates what is held out; returns the run.

    Under `accelerate launch` nothing is evaluated: each process would do all of it.
    """
    run = save_run(config)
    for stage in config.stages:
        log.info(f"{stage}: {train_stage(run, stage)}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return run
    if evaluator.held_out(config):
        evaluator.evaluate_run(run)
    else:
        log.info("nothing is held out by this config, so nothing is measured")
    return run
