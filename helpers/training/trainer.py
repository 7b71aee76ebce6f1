"""What both stages share: a model with LoRA, a safe `fit`, the report."""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import checks, runtime
from helpers.config import Stage, complete
from helpers.data import preparation as data
from helpers.errors import ConfigError
from helpers.files import read_json, stream_rows, write_json
from helpers.masking.dataset import mask_conversations
from helpers.masking.templates import render
from helpers.models import adapters
from helpers.models import load as models
from helpers.runs import Run
from helpers.training import callbacks, inputs

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

log = logging.getLogger(__name__)
# what a config leaves open is PEFT's own default: Unsloth has others
PEFT_OPEN = ("r", "lora_alpha", "lora_dropout", "bias")
# tokenised rows go when this process ends
SCRATCH = tempfile.TemporaryDirectory(prefix="tunebook-")
WITNESSES, WITNESS_TOKENS = 4, 64  # rows, and tokens of each


def lora_arguments(run: Run) -> dict[str, Any]:
    """Returns the arguments of `LoraConfig`: the run's, and PEFT's defaults."""
    from peft import LoraConfig

    plain = LoraConfig(task_type="CAUSAL_LM")
    names = ("task_type", *PEFT_OPEN, "target_modules")
    return {name: getattr(plain, name) for name in names} | run.config.lora


def attach_lora(
    run: Run, model: PreTrainedModel, lora: LoraConfig, stage: Stage = "sft"
) -> PreTrainedModel:
    """Returns the model with fresh LoRA matrices to train, the base frozen.

    Unsloth or PEFT attaches them here, so that the trainer needs no `peft_config`.

    Raises:
        ModelError: the model or a saved adapter cannot follow a setting.
    """
    plain = type(lora)(task_type=lora.task_type)
    values = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in vars(lora).items()
        if name in PEFT_OPEN or value != getattr(plain, name)
    }
    options = lora_options(run, stage)
    return adapters.add_lora(model, values, **options)


def lora_options(run: Run, stage: Stage) -> dict[str, Any]:
    """Returns what attaching and loading LoRA have in common."""
    checkpointing = complete(run.config, stage)["gradient_checkpointing"]
    names = run.config.model_dump(include={"engine", "seed"})
    return names | {"checkpointing": checkpointing}


def load_for_training(
    run: Run, stage: Stage = "sft", adapter: Path | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the run's model with LoRA to train, and its tokenizer.

    Args:
        run: its config names model, engine, weights and LoRA.
        stage: the stage that is to be trained.
        adapter: go on from this adapter instead of fresh matrices.

    Raises:
        ConfigError: the run has no such stage.
    """
    from peft import LoraConfig

    inputs.require_stage(run.config, stage)
    options = models.options(run.config)
    model, tokenizer = models.load_model(run.config.model, **options)
    if adapter is None:
        lora = LoraConfig(**lora_arguments(run))
        return attach_lora(run, model, lora, stage), tokenizer
    common = lora_options(run, stage)
    tuned = models.load_adapter(model, adapter, trainable=True, **common)
    return tuned, tokenizer


def keep_lora_fp32(model: PreTrainedModel) -> None:
    """Casts LoRA matrices to fp32: TRL makes them bf16, which a T4 and CPUs emulate."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def fit(trainer: Trainer, run: Run) -> dict[str, Any]:
    """Trains a stage, from its last checkpoint if it has one; returns its report.

    Saves a checkpoint each `save_minutes`; stops where fp16 skips every step. Writes
    `adapter/` (the best), `log_history.json` and `curves.png` to the stage's folder. A
    finished stage is not trained again: its report is returned.

    Args:
        trainer: with the run's arguments, `sft_arguments` say.
        run: the run that it is for.

    Raises:
        ConfigError: the trainer is of another run.
        ModelError: the saved adapter does not compute what was trained.
    """
    folder = Path(trainer.args.output_dir).parent
    stage: Stage = "grpo" if folder.name == "grpo" else "sft"
    if folder != run.path / stage:
        raise ConfigError(
            f"the trainer writes to {folder}, not into {run.path}: build it with the "
            f"arguments of run {run.config.name!r}"
        )
    if part := inputs.finished_part(run, stage):
        return part
    inputs.open_stage(run, stage)
    keep_lora_fp32(trainer.model)
    trainer.add_callback(callbacks.Stopwatch(run.config.save_minutes))
    trainer.add_callback(callbacks.SkippedSteps())
    witness = find_witness(trainer.processing_class)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, callbacks.BestAdapter):
            callback.witness = witness
    checkpoint = callbacks.last_checkpoint(folder / "checkpoints")
    if checkpoint is not None:
        log.info(f"{stage}: going on from {checkpoint.name}")
    if checkpoint is None or not restore_finished(trainer, checkpoint):
        try:
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        finally:
            end_wandb(trainer.args.run_name)
    if trainer.state.global_step == 0:
        raise ConfigError(
            f"{stage} took no optimiser step, so nothing is learnt and nothing saved: "
            f"{len(trainer.train_dataset)} rows; give more rows, or a smaller batch"
        )
    if not (folder / "adapter").exists():  # no evaluation has chosen one
        adapters.save_adapter(trainer.model, folder / "adapter", witness)
    write_json(folder / "log_history.json", trainer.state.log_history)
    inputs.draw_diagnostics(trainer.state.log_history, folder / "curves.png")
    part = stage_report(trainer, folder)
    part["reloaded"] = compare_reloaded(run, folder / "adapter")
    run.write_part(stage, part)
    engine = runtime.resolve_engine(run.config.engine)
    run.write_part("environment", runtime.environment(engine, run.config.dtype))
    inputs.write_note(run, stage, finished=True)
    return part


def end_wandb(name: str) -> None:
    """Ends the W&B run of a stage, which would take in the next stage's curves."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None and wandb.run.name == name:
        wandb.run.finish()


def restore_finished(trainer: Trainer, checkpoint: Path) -> bool:
    """Returns whether a checkpoint is of the last step; restores it if it is.

    The trainer would take one step more on resuming.
    """
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step < state.max_steps:
        return False
    models.set_adapter_weights(trainer.model, checkpoint)
    trainer.state = state
    for callback in trainer.callback_handler.callbacks:
        if hasattr(callback, "report"):
            callback.on_train_begin(trainer.args, state, trainer.control)
            callback.on_train_end(trainer.args, state, trainer.control)
    return True


def stage_report(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Returns a stage's part of `report.json` from what the trainer logged."""
    state, history = trainer.state, trainer.state.log_history
    seconds = max((entry.get("seconds", 0.0) for entry in history), default=0.0)
    part: dict[str, Any] = {
        "steps": state.global_step,
        "seconds": round(seconds, 1),
        "peak_memory_gb": round(runtime.peak_memory_gb(), 3),
    }
    if folder.name == "sft":
        losses = [entry["loss"] for entry in history if "loss" in entry]
        part |= {"loss_first": round(losses[0], 4), "loss_last": round(losses[-1], 4)}
        tokens = state.num_input_tokens_seen
        part["tokens_per_second"] = round(tokens / max(seconds, 0.01), 1)
    if labels := read_json(folder / "labels.json"):
        part["supervised_fraction"] = round(labels["supervised_fraction"], 4)
        part |= {f"rows_{name}": labels[name] for name in ("dropped", "truncated")}
    for callback in trainer.callback_handler.callbacks:
        if hasattr(callback, "report"):
            part |= callback.report(history)
        if reason := getattr(callback, "reason", ""):
            part["stopped"] = reason
    return part


def find_witness(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Returns the ends of a few prompts, cut to the same length."""
    import torch

    asked = [[{"role": "user", "content": p}] for p in callbacks.PROMPTS[:WITNESSES]]
    texts = [render(tokenizer, turns, for_generation=True) for turns in asked]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    length = min(WITNESS_TOKENS, *map(len, ids))
    return torch.tensor([row[-length:] for row in ids])


def compare_reloaded(run: Run, adapter: Path) -> dict[str, float] | None:
    """Returns how a saved adapter differs when loaded, None without memory for it."""
    import torch

    config, options = run.config, models.options(run.config)
    try:
        model, _ = models.load_model(config.model, adapter=adapter, **options)
        return adapters.compare_saved(model, adapter)
    except (MemoryError, torch.OutOfMemoryError):
        return None
    finally:
        model = None
        runtime.free_memory()


def sft_arguments(run: Run) -> dict[str, Any]:
    """Returns the arguments of `SFTConfig` for a run."""
    logging.getLogger("trl.trainer.sft_trainer").addFilter(is_not_about_packing)
    return {
        **inputs.training_arguments(run, "sft", run.path / "sft"),
        "max_length": run.config.max_length,
        "include_num_input_tokens_seen": "all",  # Unsloth logs no num_tokens
    }


def is_not_about_packing(record: logging.LogRecord) -> bool:
    """Returns False for TRL's warning that packed rows may attend to each other."""
    # transformers keeps them apart by position ids, see `tests/test_train.py`
    return "supported Flash Attention variant" not in record.getMessage()


def label_rows(run: Run, tokenizer: PreTrainedTokenizerBase) -> dict[str, Dataset]:
    """Returns `input_ids` and `labels` of the run's `train` and `eval` rows.

    Opens the stage's folder, and writes what was dropped and cut to `labels.json`.

    Args:
        run: with `data/` prepared.
        tokenizer: of the model.

    Raises:
        MissingInput: notebook 01 has not prepared the data.
        ConfigError: the run has no sft stage.
        DataError: the labels would be wrong (see `masking`).
    """
    config, folder = run.config, inputs.open_stage(run, "sft")
    rows: dict[str, Dataset] = {}
    parts = data.parts_of(config.data)
    for part in [name for name in ("train", "eval") if name in parts]:
        file = Path(SCRATCH.name) / f"{config.name}-{part}.arrow"
        file.unlink(missing_ok=True)  # an earlier trainer may still read it
        conversations = stream_rows(run.require(f"data/{part}.jsonl"))
        masked = mask_conversations(
            tokenizer,
            (row["messages"] for row in conversations),
            config.loss_on,
            config.max_length,
            file,
            drop=config.data.drop_unusable,
        )
        rows[part] = masked.rows
        if masked.dropped:
            log.info(f"{part}: {masked.dropped}")
        if part == "train":
            write_json(folder / "labels.json", masked.counts)
            if cut := checks.check_lengths(masked.ends, config.max_length):
                log.info(checks.report([cut]))
    return rows


def build_sft(
    run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Trainer:
    """Returns the SFT trainer of a run, for a model from `load_for_training`."""
    from trl import SFTConfig, SFTTrainer

    config, folder = run.config, run.path / "sft"
    rows = label_rows(run, tokenizer)
    samples = folder / "samples.jsonl"
    return SFTTrainer(
        model=model,
        args=SFTConfig(**sft_arguments(run)),
        train_dataset=rows["train"],
        eval_dataset=rows.get("eval"),
        processing_class=tokenizer,
        callbacks=[
            callbacks.BestAdapter(folder / "adapter", config.best_by),
            callbacks.LiveSamples(tokenizer, samples, config.system_prompt),
        ],
    )
