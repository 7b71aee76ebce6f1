"""The stages of a run in order: the only place that trains what is missing."""

import logging
import math
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import PartialState

from helpers import checks, estimate, runtime
from helpers.config import RunConfig, Stage, complete
from helpers.data import preparation as data
from helpers.errors import ConfigError, UnknownArchitecture
from helpers.evaluation import evaluator
from helpers.export.formats import export, require_formats
from helpers.grpo import trainer as grpo
from helpers.models import load
from helpers.runs import Run, save_run
from helpers.training import inputs, trainer

log = logging.getLogger(__name__)


def ensure_ready(run: Run, stage: Stage) -> None:
    """Prepares missing data; ConfigError or DataError for what cannot be trained."""
    inputs.require_stage(run.config, stage)
    data.ensure_data(run)
    if advice := checks.advise(run.config, rows=run.report()["data"].get("train")):
        checks.require(advice)
        log.info(checks.report(advice))
    if run.config.evaluation.labels:
        evaluator.read_sets(run)  # refuses wrong ones
    if "grpo" in run.config.stages:
        grpo.require_prompts(run)


def ensure_adapter(run: Run, stage: Stage) -> Path | str | None:
    """Returns a stage's adapter, trained first where it is missing.

    For SFT it is `sft_adapter` where the config names one, and None without that stage.
    """
    config, path = run.config, run.path / stage / "adapter"
    if stage == "sft" and (config.sft_adapter or "sft" not in config.stages):
        return config.sft_adapter
    if inputs.finished_part(run, stage) is None:
        log.info(f"makes {path} first: {say_minutes(run, stage)}")
        train_stage(run, stage)
    return path


def say_minutes(run: Run, stage: Stage) -> str:
    """Returns how long training takes up to a stage, of those that are missing."""
    config, place = run.config, estimate.this_gpu() or estimate.CPU
    minutes = {"sft": None, "grpo": config.grpo_minutes}
    with suppress(UnknownArchitecture):
        rows = run.report().get("data", {}).get("train")
        minutes["sft"] = estimate.sft_minutes(config, place, rows)
    stages = config.stages[: config.stages.index(stage) + 1]
    missing = [each for each in stages if inputs.finished_part(run, each) is None]
    total = sum(minutes[each] or math.nan for each in missing)
    known = f"roughly {math.ceil(total)} min" if total > 0 else "time unknown"
    return f"{known}, on {place.name}"


def train_stage(run: Run, stage: Stage) -> dict[str, Any]:
    """Trains a stage, and what it needs before; returns its report."""
    with runtime.first_process():  # which writes; the others find all there
        ensure_ready(run, stage)
        load.find_model(run.config.model)
        part = inputs.finished_part(run, stage)
    if part:
        return part
    start = ensure_adapter(run, "sft") if stage == "grpo" else None
    build = trainer.build_sft if stage == "sft" else grpo.build_grpo
    # nothing here keeps the model, so that its memory can be freed
    part = trainer.fit(build(run, *trainer.load_for_training(run, stage, start)), run)
    runtime.free_memory()
    return part


def require_shareable(config: RunConfig, stages: list[Stage]) -> None:
    """Raises ConfigError for what cannot be trained on weights that GPUs share."""
    needs = {
        "two GPUs or more": runtime.count_processes() == 1,
        "--stage sft: GRPO samples from whole weights": "grpo" in stages,
        "engine='transformers' or 'auto'": config.engine == "unsloth",
        "weights='4bit' or '16bit'": config.weights == "8bit",
        "an AdamW as sft.optim": "adamw" not in complete(config, "sft")["optim"],
    }
    if lacks := [need for need, is_missing in needs.items() if is_missing]:
        raise ConfigError(f"--shard needs {', and '.join(lacks)}")


def train(config: RunConfig, stage: Stage | None = None) -> Run:
    """Saves a run, trains its stages, evaluates and exports; or trains one stage."""
    wanted = [stage] if stage else config.stages
    if runtime.is_sharded():
        require_shareable(config, wanted)
    with runtime.first_process():
        run = save_run(config)
    require_formats(config)  # before hours of training
    for name in wanted:
        part = pd.json_normalize(train_stage(run, name)).T
        log.info(f"{name}\n{part.to_string(header=False, max_colwidth=40)}")
    if (count := runtime.count_processes()) > 1:
        PartialState().destroy_process_group()
    alone = count == 1 and not stage  # a launcher's processes would all do the rest
    if alone and evaluator.held_out(config):
        evaluator.evaluate_run(run)
        for pair in pairwise(["base", *config.stages]):
            evaluator.compare(run, *pair)
    if alone and config.export:
        export(run)
    return run
