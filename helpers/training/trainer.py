"""Builds the trainers from a config, runs them, resumes them.

The notebooks' cells call these functions, and so does the command line:

    python -m helpers train runs/demo/config.json
    python -m helpers train guanaco-llama2-7b --small
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import weakref
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import checks, fields, runtime
from helpers.config import RunConfig, Stage, changed, read_config
from helpers.data import preparation as data
from helpers.errors import ConfigError
from helpers.models import load as models
from helpers.runs import Run, save_run, write_json
from helpers.stages import (
    NOTEBOOKS,
    finish,
    is_finished,
    open_stage,
    require_stage,
    stage_report,
)
from helpers.training.trackers import choose_trackers, one_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

PROMPTS = Path(__file__).with_name("eval_prompts.jsonl")
WITNESSES, WITNESS_TOKENS = 4, 64  # rows, and tokens of each
DECISIVE = (  # for what is learnt
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "optim",
    "beta",
    "loss_type",
    "mask_truncated_completions",
)


def recomputes(config: RunConfig, stage: Stage) -> bool:
    """Returns whether a stage recomputes activations to save memory, never on a CPU.

    There it would cost a third more time, and memory is plenty.
    """
    asked = fields.complete(config, stage)["gradient_checkpointing"]
    return asked and runtime.find_machine().device == "cuda"


def machine_arguments(config: RunConfig) -> dict[str, Any]:
    """Returns the training arguments that the machine decides, not the recipe."""
    machine = runtime.find_machine()
    dtype = str(runtime.choose_dtype(machine, config.dtype)[0])
    return {
        "fp16": machine.device == "cuda" and dtype == "torch.float16",
        "bf16": machine.device == "cuda" and dtype == "torch.bfloat16",
        "use_cpu": machine.device == "cpu",
    }


def load_for_training(
    run: Run, stage: Stage = "sft", adapter: Path | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the run's base model with LoRA to train, and its tokenizer.

    Args:
        run: its config names model, engine, weights and LoRA.
        stage: the stage that is to be trained.
        adapter: go on from this adapter instead of fresh matrices.

    Prints what is questionable in the config, see `checks`.

    Raises:
        ConfigError: the run has no such stage, or its config cannot be trained.
    """
    from helpers.grpo import trainer as grpo

    config = run.config
    require_stage(config, stage)
    advice = checks.advise(config, rows=run.report().get("data", {}).get("train"))
    if advice:
        print(checks.report(advice))  # noqa: T201
    checks.require(advice)
    base, tokenizer = models.load_model(config.model, **models.options(config))
    runtime.seed_everything(config.seed)
    options: dict[str, Any] = {
        "engine": config.engine,
        "seed": config.seed,
        "checkpointing": recomputes(config, stage),
    }
    if "grpo" in config.stages:
        grpo.require_prompts(run)
    if adapter is not None:
        tuned = models.load_adapter(base, adapter, trainable=True, **options)
        return tuned, tokenizer
    options["max_length"] = config.max_length
    return models.add_lora(base, config.lora, **options), tokenizer


def training_arguments(run: Run, stage: Stage, folder: Path) -> dict[str, Any]:
    """Returns a stage's training arguments: the config's, and what they leave open."""
    config = run.config
    values = {**defaults(stage), **getattr(config, stage)}
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


def defaults(stage: Stage) -> dict[str, Any]:
    """Returns TRL's defaults of what decides how a stage learns.

    Unsloth's trainers have others: another optimiser, two micro-batches a step.
    """
    found = fields.defaults(stage)
    return {n: found[n] for n in DECISIVE if found.get(n) is not None}


def keep_lora_fp32(model: PreTrainedModel) -> None:
    """Casts LoRA matrices to fp32: TRL makes them bf16, which a T4 and CPUs emulate."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


class AboutPacking(logging.Filter):
    """Leaves out TRL's warning that packed rows may attend to each other.

    It looks for FlashAttention. Since 5.x transformers keeps packed documents apart
    with SDPA too, by the position ids; `tests/test_train.py` holds it to that.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return "supported Flash Attention variant" not in record.getMessage()


def build_sft(
    run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Trainer:
    """Returns the SFT trainer of a run: response-only labels, packed as configured.

    Args:
        run: with `data/` prepared.
        model: with LoRA attached, from `load_for_training`.
        tokenizer: of the model.

    Raises:
        MissingInput: notebook 01 has not prepared the data.
        ConfigError: the run has no sft stage.
        DataError: the labels would be wrong (see `masking`).
    """
    from trl import SFTConfig, SFTTrainer

    from helpers.masking import dataset as masking
    from helpers.training import callbacks

    config = run.config
    require_stage(config, "sft")
    folder = open_stage(run, "sft")
    scratch = tempfile.TemporaryDirectory(prefix="tunebook-")
    rows = {}
    for part in ("train", "eval"):
        if part not in data.parts_of(config.data):
            continue
        conversations = data.stream_rows(run.require(f"data/{part}.jsonl"))
        rows[part] = masking.mask_conversations(
            tokenizer,
            (row["messages"] for row in conversations),
            config.loss_on,
            config.max_length,
            Path(scratch.name) / f"{part}.arrow",
            drop=config.data.drop_unusable,
        )
        if rows[part].dropped:
            print(f"{part}: {rows[part].describe_dropped()}")  # noqa: T201
    cut = checks.check_lengths(rows["train"].ends, config.max_length)
    if cut:
        print(checks.report([cut]))  # noqa: T201
    arguments = training_arguments(run, "sft", folder)
    arguments["include_num_input_tokens_seen"] = "all"  # Unsloth logs no num_tokens
    logging.getLogger("trl.trainer.sft_trainer").addFilter(AboutPacking())
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(max_length=config.max_length, **arguments),
        train_dataset=rows["train"].rows,
        eval_dataset=rows["eval"].rows if "eval" in rows else None,
        processing_class=tokenizer,
        callbacks=[
            callbacks.History(folder),
            callbacks.BestAdapter(
                folder / "adapter", config.best_by, find_witness(run, tokenizer)
            ),
            callbacks.TimedSaves(config.save_minutes),
            callbacks.SkippedSteps(),
            callbacks.LiveSamples(
                tokenizer,
                [row["prompt"] for row in data.read_rows(PROMPTS)],
                folder / "samples.jsonl",
                system_prompt=config.system_prompt,
            ),
        ],
    )
    keep_lora_fp32(trainer.model)
    # the rows stay on disk as long as the trainer reads them
    weakref.finalize(trainer, scratch.cleanup)
    write_json(folder / "labels.json", rows["train"].counts())
    return trainer


def fit(run: Run, stage: Stage, trainer: Trainer) -> dict[str, Any]:
    """Trains a stage, from its last checkpoint if it has one; returns its report part.

    A stage that is finished is not trained again: its report is returned.

    Args:
        run: the run the trainer was built for.
        stage: `sft` or `grpo`.
        trainer: from `build_sft` or `build_grpo`.
    """
    from helpers.training import callbacks

    folder = run.path / stage
    if is_finished(run, stage):
        print(f"{stage} is finished; to train again, move {folder} away")  # noqa: T201
        return run.report()[stage]
    callbacks.MachineUse.lead(trainer)
    checkpoint = callbacks.last_checkpoint(folder / "checkpoints")
    if checkpoint is not None:
        print(f"{stage}: going on from {checkpoint.name}")  # noqa: T201
    if checkpoint is None or not restore_finished(trainer, checkpoint):
        with one_run():
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if trainer.state.global_step == 0:
        raise ConfigError(
            f"{stage} took no optimiser step, so nothing is learnt and nothing saved: "
            f"{len(trainer.train_dataset)} rows, max_steps={trainer.args.max_steps}, "
            f"{trainer.args.num_train_epochs:g} epochs; give more rows, or a smaller "
            "batch"
        )
    if not (folder / "adapter").exists():  # no evaluation has chosen one
        witness = find_witness(run, trainer.processing_class)
        models.save_adapter(trainer.model, folder / "adapter", witness)
    part = stage_report(run, stage, trainer)
    part["reloaded"] = compare_reloaded(run, folder / "adapter")
    run.write_part(stage, part)
    engine = models.resolve_engine(run.config.engine)
    run.write_part("environment", runtime.environment(engine, run.config.dtype))
    finish(run, stage)
    return part


def find_witness(run: Run, tokenizer: PreTrainedTokenizerBase) -> models.Witness:
    """Returns the starts of the first few training rows, cut to the same length."""
    import torch

    from helpers.masking.templates import render

    names = [n for n in ("train", "problems") if n in data.parts_of(run.config.data)]
    rows = islice(data.stream_rows(run.require(f"data/{names[0]}.jsonl")), WITNESSES)
    system = run.config.system_prompt
    texts = [
        render(tokenizer, r.get("messages") or data.ask(r["question"], system))
        for r in rows
    ]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    length = min(WITNESS_TOKENS, *map(len, ids))
    return models.Witness(
        torch.tensor([i[:length] for i in ids]), models.half_of(run.config)
    )


def compare_reloaded(run: Run, adapter: Path) -> dict[str, float] | None:
    """Returns how a saved adapter, loaded again, differs from the trained model.

    None where the machine does not hold a second model, or no logits were kept.

    Raises:
        ModelError: see `models.compare_saved`.
    """
    import torch

    config = run.config
    try:
        model, _ = models.load_model(
            config.model, adapter=adapter, **models.options(config)
        )
        bits = models.resolve_weights(config.weights)
        return models.compare_saved(model, adapter, models.half_of(config), bits)
    except (MemoryError, torch.OutOfMemoryError):
        return None
    finally:
        model = None
        runtime.free_memory()


def restore_finished(trainer: Trainer, checkpoint: Path) -> bool:
    """Returns whether a checkpoint is of the last step; restores it if it is.

    A run killed between its last step and its report has nothing left to train, but
    the trainer would take one step more on resuming.
    """
    from transformers import TrainerState

    from helpers.grpo import monitor as guards
    from helpers.training import callbacks

    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step < state.max_steps:
        return False
    models.set_adapter_weights(trainer.model, checkpoint)
    trainer.state = state
    kinds = callbacks.History | callbacks.BestAdapter | guards.LivePanel
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, kinds):
            callback.on_train_begin(trainer.args, state, trainer.control)
            callback.on_train_end(trainer.args, state, trainer.control)
    return True


def ensure_adapter(run: Run, stage: Stage) -> Path | str | None:
    """Returns a stage's adapter, training it first, with a word, if it is missing.

    Notebooks call this for what the notebook before them made, so that each can be
    opened alone. `sft_adapter` in the config is taken instead of training SFT. None
    for `sft` in a run without that stage: GRPO then starts with fresh matrices.

    Raises:
        ConfigError: the run has no grpo stage.
    """
    if stage == "sft" and run.config.sft_adapter:
        return run.config.sft_adapter
    if stage == "sft" and "sft" not in run.config.stages:
        return None
    require_stage(run.config, stage)
    path = run.path / stage / "adapter"
    if not is_finished(run, stage):
        maker = NOTEBOOKS[stage]
        print(f"no finished {path} (notebook {maker} makes it): training it now")  # noqa: T201
        train_stage(run, stage)
    return path


def adapters(run: Run) -> dict[str, Path | str | None]:
    """Returns the adapter of each model of a run: none for `base`, then its stages'."""
    return {"base": None, **{s: ensure_adapter(run, s) for s in run.config.stages}}


def train_stage(run: Run, stage: Stage) -> dict[str, Any]:
    """Trains one stage of a run, and what it needs before, and returns its report."""
    from helpers.grpo import trainer as grpo

    require_stage(run.config, stage)
    checks.require(checks.advise(run.config))
    data.ensure_data(run)
    start = ensure_adapter(run, "sft") if stage == "grpo" else None
    model, tokenizer = load_for_training(run, stage, start)
    if stage == "grpo":
        print(grpo.show_plan(run, model, tokenizer))  # noqa: T201
    build = build_sft if stage == "sft" else grpo.build_grpo
    part = fit(run, stage, build(run, model, tokenizer))
    del model
    runtime.free_memory()
    return part


def read_arguments(arguments: list[str]) -> RunConfig:
    """Returns the config that a command line asks for.

    Raises:
        ConfigError: there is no such recipe or file, or it is not valid.
    """
    from helpers import recipes
    from helpers.models import hub

    parser = argparse.ArgumentParser(
        prog="python -m helpers train",
        description="Trains the stages of a run, evaluates it and prints its table.",
    )
    parser.add_argument("config", help="a recipe's name, or a config.json")
    parser.add_argument(
        "--small",
        action="store_true",
        help="offline model, our sample rows, 10 steps: no GPU, no network",
    )
    given = parser.parse_args(arguments)
    file = given.config.endswith(".json")
    config = read_config(Path(given.config)) if file else recipes.load(given.config)
    if given.small:
        config = recipes.scaled(
            config, model=hub.OFFLINE, steps=10, rows=8, samples=True
        )
        # 4 bit weights save memory, which is not short here, and cost time on a CPU
        config = changed(
            config,
            name=f"{config.name}-small",
            weights="auto",
            evaluation__max_new_tokens=64,
        )
        if "sft" in config.stages:  # a micro-batch a step
            config = changed(config, sft__gradient_accumulation_steps=1)
        if "grpo" in config.stages:  # a group of short answers a step
            config = changed(
                config,
                grpo__max_completion_length=64,
                grpo__per_device_train_batch_size=config.grpo["num_generations"],
                grpo__gradient_accumulation_steps=1,
            )
    return config


def main(arguments: list[str]) -> None:
    """Trains the stages of a run, evaluates it and prints its table.

    Raises:
        SystemExit: something that the user can mend is wrong; the message says what.
    """
    from helpers.errors import TemplateError
    from helpers.evaluation import evaluator as evaluation

    ours = (ConfigError, data.DataError, models.ModelError, TemplateError)
    with runtime.exit_on(*ours, OSError):
        run = save_run(read_arguments(arguments))
        for stage in run.config.stages:
            print(stage, train_stage(run, stage))  # noqa: T201
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return  # under `accelerate launch` each process would evaluate all of it
        if not evaluation.held_out(run.config):
            print("nothing is held out by this config, so nothing is measured")  # noqa: T201
            return
        print(evaluation.evaluate_run(run).to_string())  # noqa: T201
