"""Builds the trainers from a config, runs them, resumes them.

The notebooks' cells call these functions, and so does the command line:

    python -m helpers.train runs/demo/config.json
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from helpers import data, models, runtime
from helpers.config import ConfigError, nearest
from helpers.runs import Run, fingerprint, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

Stage = Literal["sft", "grpo"]
PROMPTS = "data_samples/eval_prompts.jsonl"
NOTE = "made_from.json"


def machine_arguments() -> dict[str, Any]:
    """Returns the training arguments that the machine decides, not the recipe."""
    machine = runtime.find_machine()
    dtype = str(runtime.choose_dtype(machine)[0])
    arguments: dict[str, Any] = {
        "fp16": machine.device == "cuda" and dtype == "torch.float16",
        "bf16": machine.device == "cuda" and dtype == "torch.bfloat16",
        "report_to": "none",
    }
    if machine.device == "cpu":
        # recomputing activations would cost a third more time and memory is plenty
        arguments |= {"use_cpu": True, "gradient_checkpointing": False}
    return arguments


def check_fields(kind: type, values: dict[str, Any], where: str) -> None:
    """Raises ConfigError when a dictionary has keys that a TRL config lacks."""
    known = {field.name for field in dataclasses.fields(kind)}
    for key in values:
        if key not in known:
            hint = nearest(key, known)
            raise ConfigError(f"{where}.{key} is no field of {kind.__name__}{hint}")


def load_for_training(
    run: Run, adapter: Path | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the run's base model with LoRA to train, and its tokenizer.

    Args:
        run: its config names model, engine, weights and LoRA.
        adapter: go on from this adapter instead of fresh matrices.
    """
    config = run.config
    options: dict[str, Any] = {"engine": config.engine, "max_length": config.max_length}
    base, tokenizer = models.load_model(config.model, weights=config.weights, **options)
    runtime.seed_everything(config.seed)
    if adapter is not None:
        return models.load_adapter(
            base, adapter, seed=config.seed, **options
        ), tokenizer
    return models.add_lora(base, config.lora, seed=config.seed, **options), tokenizer


def made_from(run: Run, stage: Stage) -> str:
    """Returns the fingerprint of all that decides a stage's result."""
    config = run.config.model_dump(exclude={"evaluation", "save_minutes"})
    config["data"] = run.report().get("data", {}).get("fingerprints")
    if stage == "sft":
        config = {k: v for k, v in config.items() if k not in ("grpo", "rewards")}
    return fingerprint(config)


def open_stage(run: Run, stage: Stage) -> Path:
    """Returns a stage's folder, with checkpoints of another config set aside.

    A folder that was made from other settings or data is renamed, never mixed in and
    never deleted.
    """
    folder = run.path / stage
    now = made_from(run, stage)
    old = read_note(folder / NOTE).get("fingerprint", now)
    if old != now:
        number = 1 + len(list(run.path.glob(f"{stage}.before-*")))
        aside = run.path / f"{stage}.before-{number}"
        print(f"{stage}: settings or data changed, former result kept in {aside}")  # noqa: T201
        folder.rename(aside)
    if not (folder / NOTE).exists():
        write_json(folder / NOTE, {"fingerprint": now, "finished": False})
    return folder


def is_finished(run: Run, stage: Stage) -> bool:
    """Returns whether a stage was trained to its end with the settings as they are."""
    note = read_note(run.path / stage / NOTE)
    return note.get("finished", False) and note["fingerprint"] == made_from(run, stage)


def read_note(path: Path) -> dict[str, Any]:
    """Returns what a small JSON file of a stage holds, empty when it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def common_arguments(run: Run, folder: Path) -> dict[str, Any]:
    """Returns the training arguments that both stages share."""
    return {
        "output_dir": str(folder / "checkpoints"),
        "seed": run.config.seed,
        "save_total_limit": 2,
        "logging_first_step": True,
        **machine_arguments(),
    }


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
        ConfigError: `sft` has a field that `SFTConfig` lacks.
        DataError: the labels would be wrong (see `masking`).
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from helpers import callbacks, masking

    config = run.config
    check_fields(SFTConfig, config.sft, "sft")
    folder = open_stage(run, "sft")
    rows = {}
    for part in ("train", "eval"):
        conversations = [
            row["messages"] for row in data.read_rows(run.require(f"data/{part}.jsonl"))
        ]
        rows[part] = masking.mask_conversations(
            tokenizer, conversations, config.loss_on, config.max_length
        )
    arguments = {**common_arguments(run, folder), **config.sft}
    arguments["include_num_input_tokens_seen"] = "all"  # Unsloth logs no num_tokens
    logging.getLogger("trl.trainer.sft_trainer").addFilter(AboutPacking())
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(max_length=config.max_length, **arguments),
        train_dataset=Dataset.from_list(rows["train"].rows),
        eval_dataset=Dataset.from_list(rows["eval"].rows),
        processing_class=tokenizer,
        callbacks=[
            callbacks.History(folder),
            callbacks.BestAdapter(folder / "adapter", config.best_by),
            callbacks.TimedSaves(config.save_minutes),
            callbacks.SkippedSteps(),
            callbacks.LiveSamples(
                tokenizer,
                [row["prompt"] for row in data.load_rows(PROMPTS)],
                folder / "samples.jsonl",
                system_prompt=config.system_prompt,
            ),
        ],
    )
    keep_lora_fp32(trainer.model)
    labels = rows["train"]._asdict()
    labels |= {"rows": len(labels["rows"]), "dropped": len(labels["dropped"])}
    write_json(folder / "labels.json", labels)
    return trainer


def build_grpo(
    run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Trainer:
    """Returns the GRPO trainer of a run, over the problems in its `data/`.

    Args:
        run: with `data/` prepared.
        model: carrying the SFT adapter, from `load_for_training(run, adapter)`.
        tokenizer: of the model.

    Raises:
        MissingInput: notebook 01 has not prepared the data.
        ConfigError: `grpo` has a field that `GRPOConfig` lacks.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from helpers import callbacks, rewards

    config = run.config
    check_fields(GRPOConfig, config.grpo, "grpo")
    functions, weights = rewards.choose(config.rewards)
    problems = data.read_rows(run.require("data/problems.jsonl"))
    folder = open_stage(run, "grpo")
    prompts = [
        {"prompt": data.ask(p["question"], config.system_prompt), "gold": p["gold"]}
        for p in problems
    ]
    arguments = {**common_arguments(run, folder), **config.grpo}
    trainer = GRPOTrainer(
        model=model,
        args=GRPOConfig(reward_weights=weights, **arguments),
        reward_funcs=functions,
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        callbacks=[
            callbacks.History(folder),
            callbacks.TimedSaves(config.save_minutes),
            callbacks.SkippedSteps(),
        ],
    )
    keep_lora_fp32(trainer.model)
    return trainer


def fit(run: Run, stage: Stage, trainer: Trainer) -> dict[str, Any]:
    """Trains a stage, from its last checkpoint if it has one; returns its report part.

    A stage that is finished is not trained again: its report is returned.

    Args:
        run: the run the trainer was built for.
        stage: `sft` or `grpo`.
        trainer: from `build_sft` or `build_grpo`.
    """
    from helpers import callbacks

    folder = run.path / stage
    if is_finished(run, stage):
        print(f"{stage} is finished; to train again, move {folder} away")  # noqa: T201
        return run.report()[stage]
    checkpoint = callbacks.last_checkpoint(folder / "checkpoints")
    if checkpoint is not None:
        print(f"{stage}: going on from {checkpoint.name}")  # noqa: T201
    if checkpoint is None or not restore_finished(trainer, checkpoint):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not (folder / "adapter").exists() or stage == "grpo":
        callbacks.save_adapter(trainer.model, folder / "adapter")
    part = stage_report(run, stage, trainer)
    run.write_part(stage, part)
    engine = models.resolve_engine(run.config.engine)
    run.write_part("environment", runtime.environment(engine))
    note = {"fingerprint": made_from(run, stage), "finished": True}
    write_json(folder / NOTE, note)
    return part


def restore_finished(trainer: Trainer, checkpoint: Path) -> bool:
    """Returns whether a checkpoint is of the last step; restores it if it is.

    A run killed between its last step and its report has nothing left to train, but
    the trainer would take one step more on resuming.
    """
    from transformers import TrainerState

    from helpers import callbacks

    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step < state.max_steps:
        return False
    models.set_adapter_weights(trainer.model, checkpoint)
    trainer.state = state
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, callbacks.History | callbacks.BestAdapter):
            callback.on_train_begin(trainer.args, state, trainer.control)
    return True


def callback_of(trainer: Trainer, kind: type) -> Any:
    """Returns the trainer's callback of a class."""
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, kind))


def stage_report(run: Run, stage: Stage, trainer: Trainer) -> dict[str, Any]:
    """Returns a stage's part of `report.json` from what the trainer logged."""
    from helpers import callbacks

    history = callback_of(trainer, callbacks.History)
    skipped = callback_of(trainer, callbacks.SkippedSteps)
    part: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "seconds": round(history.training_seconds, 1),
        "peak_memory_gb": round(runtime.peak_memory_gb(), 3),
        "skipped_steps": skipped.count,
    }
    if skipped.reason:
        part["stopped"] = skipped.reason
    if stage == "grpo":
        rewards_seen = history.values("reward")
        ends = max(1, len(rewards_seen) // 4)
        part |= {
            "reward_first": round(sum(rewards_seen[:ends]) / ends, 4),
            "reward_last": round(sum(rewards_seen[-ends:]) / ends, 4),
            "reward_averaged_over_steps": ends,
        }
        return part
    losses, tokens = history.values("loss"), trainer.state.num_input_tokens_seen
    best = callback_of(trainer, callbacks.BestAdapter)
    labels = read_note(run.path / stage / "labels.json")
    return part | {
        "loss_first": round(losses[0], 4),
        "loss_last": round(losses[-1], 4),
        "eval_loss_best": round(best.best, 4),
        "best_step": best.step,
        "tokens_per_second": round(tokens / history.training_seconds, 1),
        "supervised_fraction": round(labels["supervised_fraction"], 4),
        "rows_dropped": labels["dropped"],
        "rows_truncated": labels["truncated"],
    }


def ensure_adapter(run: Run, stage: Stage) -> Path | str:
    """Returns a stage's adapter, training it first, with a word, if it is missing.

    Notebooks call this for what the notebook before them made, so that each can be
    opened alone. `sft_adapter` in the config is taken instead of training SFT.
    """
    if stage == "sft" and run.config.sft_adapter:
        return run.config.sft_adapter
    path = run.path / stage / "adapter"
    if is_finished(run, stage):
        return path
    maker = {"sft": "02_sft_qlora", "grpo": "03_grpo_gsm8k"}[stage]
    print(f"no finished {path} (notebook {maker} makes it): training it now")  # noqa: T201
    train_stage(run, stage)
    return path


def train_stage(run: Run, stage: Stage) -> dict[str, Any]:
    """Trains one stage of a run, and what it needs before, and returns its report."""
    data.ensure_data(run)
    start = ensure_adapter(run, "sft") if stage == "grpo" else None
    model, tokenizer = load_for_training(run, start)
    build = build_sft if stage == "sft" else build_grpo
    part = fit(run, stage, build(run, model, tokenizer))
    del model
    runtime.free_memory()
    return part


def main(path: str) -> None:
    """Trains both stages of the run whose `config.json` is given.

    Raises:
        SystemExit: something that the user can mend is wrong; the message says what.
    """
    from helpers.config import read_config
    from helpers.runs import save_run

    try:
        run = save_run(read_config(Path(path)))
        for stage in ("sft", "grpo"):
            print(stage, train_stage(run, stage))  # type: ignore[arg-type]  # noqa: T201
    except (ConfigError, data.DataError, models.ModelError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(sys.argv[1])
