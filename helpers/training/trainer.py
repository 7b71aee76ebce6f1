"""What both stages share: a model with LoRA, a safe `fit`, the report."""

import copy
import logging
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate.utils import set_seed
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import PrinterCallback, Trainer, TrainerState

from helpers import checks, runtime
from helpers.config import Stage, complete
from helpers.data import preparation as data
from helpers.data.formats import ask
from helpers.errors import ConfigError, TrainingError
from helpers.files import disk_space, read_json, stream_rows, write_json
from helpers.inference.decoder import set_attention
from helpers.inference.generation import encode
from helpers.masking import dataset
from helpers.masking.templates import Tokenizer
from helpers.models import adapters, load
from helpers.models.load import Model
from helpers.runs import Run, writes
from helpers.training import callbacks, inputs, layout

log = logging.getLogger(__name__)
THOUGHTLESS = "thinking: no answer has a <think>...</think>, so the model learns "
THOUGHTLESS += "not to think: write thoughts into the rows, set it to false, "
THOUGHTLESS += "or use GRPO alone"
# transformers keeps packed rows apart by position ids, whatever TRL warns of
logging.getLogger("trl.trainer.sft_trainer").addFilter(
    lambda record: "supported Flash Attention variant" not in record.getMessage()
)
# what a config leaves open is PEFT's own default: Unsloth has others
PEFT_OPEN = ("r", "lora_alpha", "lora_dropout", "bias")
SCRATCH = tempfile.TemporaryDirectory(prefix="tunebook-")  # of tokenised rows
# what TRL's trainers count beside the state that a checkpoint holds
COUNTS = ("_step", "_buffered_inputs", "_metrics", "_logs", "_total_train_tokens")


def lora_arguments(run: Run) -> dict[str, Any]:
    """Returns the arguments of `LoraConfig`: the run's, and PEFT's defaults."""
    plain = LoraConfig(task_type="CAUSAL_LM")
    names = ("task_type", *PEFT_OPEN, "target_modules")
    return {name: getattr(plain, name) for name in names} | run.config.lora


def attach_lora(run: Run, model: Any, lora: LoraConfig, stage: Stage = "sft") -> Model:
    """Returns the model with fresh LoRA matrices to train, the base frozen.

    Raises:
        ModelError: the model or a saved adapter cannot follow a setting.
    """
    plain = vars(type(lora)(task_type=lora.task_type))
    values = {n: v for n, v in vars(lora).items() if n in PEFT_OPEN or v != plain[n]}
    values |= {n: sorted(v) for n, v in values.items() if isinstance(v, set)}
    options = run.config.model_dump(include={"engine", "seed"})
    recompute = complete(run.config, stage)["gradient_checkpointing"]
    set_attention(model)
    return adapters.add_lora(model, values, checkpointing=recompute, **options)


def load_for_training(
    run: Run, stage: Stage = "sft", adapter: Path | str | None = None
) -> tuple[Model, Tokenizer]:
    """Returns the run's model with LoRA, fresh or an `adapter`'s, and its tokenizer."""
    model, tokenizer = load.load_model(run.config.model, **load.options(run.config))
    if adapter is None:
        lora = LoraConfig(**lora_arguments(run))
        return attach_lora(run, model, lora, stage), tokenizer
    options: Any = run.config.model_dump(include={"engine", "seed"})
    options["checkpointing"] = complete(run.config, stage)["gradient_checkpointing"]
    return load.load_adapter(model, adapter, trainable=True, **options), tokenizer


def keep_lora_fp32(model: Model) -> None:
    """Casts LoRA matrices to fp32: TRL makes them bf16, which a T4 and CPUs emulate."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@writes
def fit(trainer: Trainer, run: Run) -> dict[str, Any]:
    """Trains a stage, from its last checkpoint if it has one; returns its report.

    Writes `adapter/` (the best), `log_history.json` and `curves.png` to the stage's
    folder. A finished stage is not trained again.

    Raises:
        ConfigError: the trainer has not the run's arguments, or took no optimiser step.
        ModelError: the saved adapter does not compute what was trained.
        TrainingError: a gradient or logit is not finite; the step is not taken.
    """
    folder, config = Path(trainer.args.output_dir).parent, run.config
    stage: Stage = "grpo" if folder.name == "grpo" else "sft"
    if folder != run.path / stage:
        raise ConfigError(f"the trainer writes to {folder}, not to run {config.name!r}")
    if part := inputs.finished_part(run, stage):
        return part
    model, tokenizer = trainer.model, trainer.processing_class
    keep_lora_fp32(model)
    if trainer.args.world_size > 1:
        set_seed(trainer.args.seed, device_specific=True)  # of dropout
        if trainer.args.use_cpu:  # torch loads no checkpoint to accelerate's "cpu:0"
            vars(trainer.args)["_setup_devices"] = torch.device("cpu")
        own = trainer.get_train_dataloader
        trainer.get_train_dataloader = partial(layout.filled_loader, trainer, own)
    if runtime.is_sharded():
        trainer.remove_callback(callbacks.LiveSamples)  # each token gathers all weights
        layout.share_weights(trainer)
    begin(trainer)
    prompt = ask(callbacks.PROMPTS[0]["prompt"], "")
    model.witness = torch.tensor([encode(tokenizer, prompt)])
    watch = callbacks.Watch(config.save_minutes, folder)
    trainer.remove_callback(callbacks.Watch)  # of a call that was interrupted
    trainer.callback_handler.callbacks.insert(0, watch)  # the others see its count
    if stage == "sft":
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(inputs.Panel)
        trainer.add_callback(inputs.Panel(folder))
    trainer.remove_callback(callbacks.SecondPlace)
    if place := os.environ.get("TUNEBOOK_KEEP"):
        name = inputs.copies_name(run, stage)
        trainer.add_callback(callbacks.SecondPlace(place, name, folder))
    checkpoint = callbacks.last_checkpoint(folder / "checkpoints")
    size = model.num_parameters(only_trainable=True)
    try:
        if not (checkpoint and resume(trainer, checkpoint)):
            with disk_space(folder, size * 12e-9):  # weights, AdamW's moments
                layout.train_within_memory(trainer, run, checkpoint)
    except RuntimeError as error:  # of sampling
        if "probability tensor" not in str(error):
            raise
        text = f"step {trainer.state.global_step + 1}: the logits are not finite; "
        raise TrainingError(text + "lower the learning rate") from error
    finally:  # else W&B's run would take in the next stage's curves
        tracked = getattr(sys.modules.get("wandb"), "run", None)
        if tracked is not None and tracked.name == trainer.args.run_name:
            tracked.finish()
    if trainer.state.global_step == 0:
        raise ConfigError(f"{stage} took no optimiser step: give more rows")
    adapter, history = folder / "adapter", trainer.state.log_history
    if not adapter.exists():  # no evaluation has chosen one
        adapters.save_adapter(model, adapter, model.witness)
    if not trainer.is_world_process_zero():
        trainer.accelerator.wait_for_everyone()
        return run.report()[stage]
    write_json(folder / "log_history.json", history)
    part = stage_report(trainer, folder)
    try:
        copy, _ = load.load_model(config.model, adapter=adapter, **load.options(config))
        copy.set_attn_implementation(model.config._attn_implementation)  # else 3 % off
        part["reloaded"] = adapters.compare_saved(copy, adapter)
    except (MemoryError, torch.OutOfMemoryError):
        part["reloaded"] = None
    run.write_part(stage, part)
    run.write_part("environment", runtime.environment(config.engine, config.dtype))
    note = read_json(folder / inputs.NOTE)
    write_json(folder / inputs.NOTE, note | {"finished": True})
    trainer.accelerator.wait_for_everyone()
    return part


def begin(trainer: Trainer) -> None:
    """Keeps a trainer's start, or takes it back there after an interrupted `fit`."""
    if not hasattr(trainer, "start"):
        counts = {name: getattr(trainer, name, None) for name in COUNTS}
        trainer.start = copy.deepcopy(counts), tempfile.mkdtemp(dir=SCRATCH.name)
        trainer.model.save_pretrained(trainer.start[1])
        trainer._save_rng_state(trainer.start[1])
        return
    log.info("interrupted before: from its last checkpoint, or from the start")
    counts, folder = trainer.start
    load.set_adapter_weights(trainer.model, folder)
    trainer.model.zero_grad()
    vars(trainer).update(copy.deepcopy(counts), optimizer=None, lr_scheduler=None)
    trainer._load_rng_state(folder)


def resume(trainer: Trainer, checkpoint: str) -> bool:
    """Takes up a checkpoint's counts; returns whether it is of the last step."""
    log.info(f"going on from {checkpoint}")
    trainer.args.eval_on_start = False
    state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
    tokens = (entry.get("num_tokens", 0) for entry in state.log_history)
    trainer._total_train_tokens = max(tokens, default=0)  # TRL's is a session's
    # after the last step TRL would take one more
    if state.global_step < state.max_steps:
        return False
    load.set_adapter_weights(trainer.model, checkpoint)
    trainer.state = state
    for callback in trainer.callback_handler.callbacks:
        if hasattr(callback, "report"):
            callback.on_train_begin(trainer.args, state, trainer.control)
            callback.on_train_end(trainer.args, state, trainer.control)
    return True


def stage_report(trainer: Trainer, folder: Path) -> dict[str, Any]:
    state, logged = trainer.state, pd.DataFrame(trainer.state.log_history)
    seconds = float(logged["seconds"].max())
    part: dict[str, Any] = {
        "steps": state.global_step,
        "seconds": round(seconds, 1),
        "peak_memory_gb": round(runtime.peak_memory_gb(), 3),
        "processes": trainer.args.world_size,
        "skipped_steps": int(logged["skipped_steps"].max()),
    }
    if folder.name == "sft":
        losses = logged["loss"].dropna().round(4).tolist()
        part |= {"loss_first": losses[0], "loss_last": losses[-1]}
        rate = state.num_input_tokens_seen / max(seconds, 0.01)
        part["tokens_per_second"] = round(rate, 1)
    if labels := read_json(folder / "labels.json"):
        part["supervised_fraction"] = round(labels["supervised_fraction"], 4)
        part |= {f"rows_{name}": labels[name] for name in ("dropped", "truncated")}
    part["layout"] = read_json(folder / layout.NOTE)
    for callback in trainer.callback_handler.callbacks:
        if hasattr(callback, "report"):
            part |= callback.report(state.log_history)
        if reason := getattr(callback, "reason", ""):
            part["stopped"] = reason
    return part


def sft_arguments(run: Run) -> dict[str, Any]:
    """Returns the arguments of `SFTConfig` for a run."""
    options: dict[str, Any] = {"max_length": run.config.max_length}
    options["include_num_input_tokens_seen"] = "non_padding"  # Unsloth logs none
    return inputs.training_arguments(run, "sft", run.path / "sft") | options


def label_rows(run: Run, tokenizer: Tokenizer) -> dict[str, Dataset]:
    """Returns `input_ids` and `labels` of the run's `train` and `eval` rows.

    Opens the stage's folder, and writes what was dropped and cut to `labels.json`.

    Raises:
        ConfigError, MissingInput: the run has no sft stage, or no prepared data.
        DataError: the labels would be wrong (see `masking`).
    """
    disable_progress_bars()  # of packing, a bar for each of its steps
    config, folder = run.config, inputs.open_stage(run, "sft")
    limits, drop = (config.loss_on, config.max_length), config.data.drop_unusable
    rows, template = dict[str, Dataset](), str(tokenizer.chat_template)
    parts = data.parts_of(config.data)
    for part in [name for name in ("train", "eval") if name in parts]:
        file = Path(SCRATCH.name) / f"{config.name}-{part}.arrow"
        file.unlink(missing_ok=True)  # an earlier trainer may still read it
        stored = stream_rows(run.require(f"data/{part}.jsonl"))
        chats = (row["messages"] for row in stored)
        masked = dataset.mask_conversations(tokenizer, chats, *limits, file, drop=drop)
        rows[part] = masked.rows
        if masked.dropped:
            log.info(f"{part}: {masked.dropped}")
        if part == "train":
            write_json(folder / "labels.json", masked.counts)
            if cut := checks.check_lengths(masked.ends, config.max_length):
                log.info(checks.report([cut]))
            thinks = config.thinking is not False and "enable_thinking" in template
            if thinks and not masked.counts["thoughts"]:
                log.info(THOUGHTLESS)
    return rows


def build_sft(run: Run, model: Model, tokenizer: Tokenizer) -> Trainer:
    from trl import SFTConfig, SFTTrainer  # Unsloth's, where it has replaced them

    folder, rows = run.path / "sft", label_rows(run, tokenizer)
    best = callbacks.BestAdapter(folder / "adapter", run.config.best_by)
    samples, system = folder / "samples.jsonl", run.config.system_prompt
    asked = data.held_out_questions(run)
    return SFTTrainer(
        model=model,
        args=SFTConfig(**sft_arguments(run)),
        train_dataset=rows["train"],
        eval_dataset=rows.get("eval"),
        processing_class=tokenizer,
        callbacks=[best, callbacks.LiveSamples(tokenizer, samples, system, asked)],
    )
