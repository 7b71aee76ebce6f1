"""What both stages share: model with LoRA, arguments, a safe `fit`, the report."""

from __future__ import annotations

import logging
import os
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import runtime
from helpers.config import RunConfig, Stage, complete, defaults
from helpers.data import preparation as data
from helpers.errors import ConfigError
from helpers.masking.templates import render
from helpers.models import adapters
from helpers.models import load as models
from helpers.runs import Run, write_json
from helpers.training import callbacks, inputs
from helpers.training.plots import draw_losses

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

log = logging.getLogger(__name__)
# what a config leaves open is PEFT's and TRL's own default: Unsloth has others
PEFT_OPEN = ("r", "lora_alpha", "lora_dropout", "bias")
TRL_OPEN = ("per_device_train_batch_size", "gradient_accumulation_steps", "packing")
TRL_OPEN += ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay")
TRL_OPEN += ("max_steps", "num_train_epochs", "optim")
TRL_OPEN += ("beta", "loss_type", "mask_truncated_completions")
WITNESSES, WITNESS_TOKENS = 4, 64  # rows, and tokens of each


def recomputes(config: RunConfig, stage: Stage) -> bool:
    """Returns whether a stage recomputes activations to save memory, never on a CPU.

    There it would cost a third more time, and memory is plenty.
    """
    wanted = complete(config, stage)["gradient_checkpointing"]
    return wanted and runtime.find_machine().device == "cuda"


def machine_arguments(config: RunConfig) -> dict[str, Any]:
    """Returns the training arguments that the machine decides, not the recipe."""
    machine = runtime.find_machine()
    gpu = machine.device == "cuda"
    dtype = str(runtime.choose_dtype(machine, config.dtype)[0])
    flags = {"fp16": gpu and dtype == "torch.float16", "use_cpu": not gpu}
    return flags | {"bf16": gpu and dtype == "torch.bfloat16"}


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
    """
    plain = type(lora)(task_type=lora.task_type)
    values = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in vars(lora).items()
        if name in PEFT_OPEN or value != getattr(plain, name)
    }
    config = run.config
    options = {"engine": config.engine, "seed": config.seed}
    options |= {"checkpointing": recomputes(config, stage)}
    return adapters.add_lora(model, values, max_length=config.max_length, **options)


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

    config = run.config
    inputs.require_stage(config, stage)
    model, tokenizer = models.load_model(config.model, **models.options(config))
    if adapter is None:
        lora = LoraConfig(**lora_arguments(run))
        return attach_lora(run, model, lora, stage), tokenizer
    options: dict[str, Any] = {"engine": config.engine, "seed": config.seed}
    options |= {"checkpointing": recomputes(config, stage)}
    tuned = models.load_adapter(model, adapter, trainable=True, **options)
    return tuned, tokenizer


def training_arguments(run: Run, stage: Stage, folder: Path) -> dict[str, Any]:
    """Returns a stage's training arguments: the config's, and what they leave open."""
    config, default = run.config, defaults(stage)
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
        **machine_arguments(config),
        **values,
        "gradient_checkpointing": recomputes(config, stage),
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
    for name in names:
        if name not in installed:
            log.info(f"report_to: {name} is left out; run `pip install {name}`")
    if "wandb" in names and "WANDB_MODE" not in os.environ:
        import wandb

        try:
            has_key = wandb.login(prompt=False, verify=False)
        except TypeError:  # Colab's 0.28 has no `prompt`
            has_key = wandb.api.api_key is not None
        if not has_key:
            os.environ["WANDB_MODE"] = "offline"
            log.info("wandb: nobody is logged in; `wandb sync` uploads the run later")
    return [name for name in names if name in installed]


def open_wandb() -> Any:
    """Returns the W&B run of this process, None without one."""
    return getattr(sys.modules.get("wandb"), "run", None)


def keep_lora_fp32(model: PreTrainedModel) -> None:
    """Casts LoRA matrices to fp32: TRL makes them bf16, which a T4 and CPUs emulate."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def fit(trainer: Trainer, run: Run) -> dict[str, Any]:
    """Trains a stage, from its last checkpoint if it has one; returns its report.

    Writes `adapter/` (the best one), `log_history.json` and `curves.png` to the stage's
    folder. A finished stage is not trained again: its report is returned.

    Args:
        trainer: with arguments from `training_arguments`.
        run: the run that it is for.

    Raises:
        ConfigError: the trainer is of another run, or took no optimiser step.
        ModelError: the saved adapter does not compute what was trained.
    """
    folder = Path(trainer.args.output_dir).parent
    stage: Stage = "grpo" if folder.name == "grpo" else "sft"
    if folder != run.path / stage:
        raise ConfigError(
            f"the trainer writes to {folder}, not into {run.path}: build it with the "
            f"arguments of run {run.config.name!r}"
        )
    if inputs.is_finished(run, stage):
        log.info(f"{stage} is finished; to train again, move {folder} away")
        return run.report()[stage]
    inputs.open_stage(run, stage)
    keep_lora_fp32(trainer.model)
    trainer.add_callback(callbacks.Stopwatch())
    witness = find_witness(run, trainer.processing_class)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, callbacks.BestAdapter):
            callback.witness = witness
    checkpoint = callbacks.last_checkpoint(folder / "checkpoints")
    if checkpoint is not None:
        log.info(f"{stage}: going on from {checkpoint.name}")
    if checkpoint is None or not restore_finished(trainer, checkpoint):
        users_wandb = open_wandb()
        try:
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        finally:  # else it would take in the next stage's curves
            if users_wandb is None and open_wandb() is not None:
                open_wandb().finish()
    if trainer.state.global_step == 0:
        raise ConfigError(
            f"{stage} took no optimiser step, so nothing is learnt and nothing saved: "
            f"{len(trainer.train_dataset)} rows, max_steps={trainer.args.max_steps}, "
            f"{trainer.args.num_train_epochs:g} epochs; give more rows, or a smaller "
            "batch"
        )
    if not (folder / "adapter").exists():  # no evaluation has chosen one
        adapters.save_adapter(trainer.model, folder / "adapter", witness)
    write_json(folder / "log_history.json", trainer.state.log_history)
    draw_losses(trainer.state.log_history, folder / "curves.png")
    part = stage_report(trainer, folder)
    part["reloaded"] = compare_reloaded(run, folder / "adapter")
    run.write_part(stage, part)
    engine = runtime.resolve_engine(run.config.engine)
    run.write_part("environment", runtime.environment(engine, run.config.dtype))
    inputs.write_note(run, stage, finished=True)
    return part


def restore_finished(trainer: Trainer, checkpoint: Path) -> bool:
    """Returns whether a checkpoint is of the last step; restores it if it is.

    A run killed between its last step and its report has nothing left to train, but
    the trainer would take one step more on resuming.
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
    if labels := inputs.read_note(folder / "labels.json"):
        part["supervised_fraction"] = round(labels["supervised_fraction"], 4)
        part |= {f"rows_{name}": labels[name] for name in ("dropped", "truncated")}
    reasons = []
    for callback in trainer.callback_handler.callbacks:
        part |= callback.report(history) if hasattr(callback, "report") else {}
        reasons += [callback.reason] if getattr(callback, "reason", "") else []
    return part | ({"stopped": "; ".join(reasons)} if reasons else {})


def find_witness(run: Run, tokenizer: PreTrainedTokenizerBase) -> adapters.Witness:
    """Returns the starts of the first few training rows, cut to the same length."""
    import torch

    names = [n for n in ("train", "problems") if n in data.parts_of(run.config.data)]
    rows = islice(data.stream_rows(run.require(f"data/{names[0]}.jsonl")), WITNESSES)
    system = run.config.system_prompt
    turns = [r.get("messages") or data.ask(r["question"], system) for r in rows]
    texts = [render(tokenizer, messages) for messages in turns]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    length = min(WITNESS_TOKENS, *map(len, ids))
    starts = torch.tensor([row[:length] for row in ids])
    return adapters.Witness(starts, models.half_of(run.config))


def compare_reloaded(run: Run, adapter: Path) -> dict[str, float] | None:
    """Returns how a saved adapter, loaded again, differs from the trained model.

    None where the machine does not hold a second model, or no logits were kept.
    """
    import torch

    config, options = run.config, models.options(run.config)
    try:
        model, _ = models.load_model(config.model, adapter=adapter, **options)
        bits = models.resolve_weights(config.weights)
        return adapters.compare_saved(model, adapter, models.half_of(config), bits)
    except (MemoryError, torch.OutOfMemoryError):
        return None
    finally:
        model = None
        runtime.free_memory()
