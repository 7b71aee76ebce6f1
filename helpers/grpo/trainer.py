"""Builds the GRPO trainer of a run: prompts, rewards, budget, held-out evaluation."""

from __future__ import annotations

import functools
import shutil
import statistics
import time
from typing import TYPE_CHECKING, Any

from helpers import runtime
from helpers.data import preparation as data
from helpers.errors import ConfigError
from helpers.estimate import sampled_rows
from helpers.grpo import budget, heldout, prompts, rewards
from helpers.grpo.record import Record
from helpers.rollout import sampler as sampling
from helpers.runs import Run, write_json
from helpers.training import callbacks
from helpers.training import trainer as train
from helpers.training.inputs import open_stage, read_note, require_stage

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from helpers.config import RunConfig
    from helpers.evaluation.results import Table
    from helpers.inference.generation import Answering

PROBE_STEPS = 4  # timed for the plan, at most; the first, which compiles, not
PROBE_SHARE = 0.1  # of the time, after which no further step is timed
EVALUATIONS = 4  # of a run whose config names no eval_steps


def build_grpo(
    run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Trainer:
    """Returns the GRPO trainer of a run, over the problems in its `data/`.

    With `grpo_minutes` in the config, its steps are those of `make_plan`.

    Args:
        run: with `data/` prepared.
        model: carrying the SFT adapter, from `load_for_training(run, adapter)`.
        tokenizer: of the model.

    Raises:
        MissingInput: notebook 01 has not prepared the data.
        ConfigError: the run has no grpo stage, or every prompt is longer than
            `max_prompt_length`.
    """
    from helpers.grpo import monitor as guards

    config = run.config
    folder = open_grpo(run)
    made = make_plan(run, model, tokenizer) if config.grpo_minutes else None
    resumed = callbacks.last_checkpoint(folder / "checkpoints") is not None
    arguments = grpo_arguments(run, folder, made)
    if resumed:  # what is measured before the first step is in the history
        arguments["eval_on_start"] = False
    record = Record(config.rewards)
    steps = made.steps if made else None
    clock = guards.TimeBudget(folder, config.grpo_minutes, steps)
    trainer = make_trainer(
        run,
        model,
        tokenizer,
        arguments,
        record,
        [
            guards.LivePanel(folder, record),
            callbacks.BestAdapter(
                folder / "adapter", "eval_reward", train.find_witness(run, tokenizer)
            ),
            callbacks.TimedSaves(config.save_minutes),
            callbacks.SkippedSteps(),
            guards.CollapseGuard(folder),
            clock,
        ],
    )
    guards.silence_progress(trainer)
    if steps is not None:
        create = trainer.create_scheduler

        def create_scheduler(num_training_steps: int, optimizer: Any = None) -> Any:
            clock.follow(create(steps, optimizer))
            return trainer.lr_scheduler

        trainer.create_scheduler = create_scheduler
    return trainer


def require_prompts(run: Run) -> None:
    """Raises ConfigError when a run's data hold fewer problems than one step takes."""
    if (run.path / "data" / "problems.jsonl").exists():
        check_enough(run, len(heldout.split_problems(run)[0]))


def check_enough(run: Run, count: int) -> None:
    """Raises ConfigError when prompts do not fill one optimiser step of GRPO.

    TRL drops an incomplete batch, so that such a run would end without a step.

    Args:
        run: with `data/` prepared.
        count: the prompts that are left to train on.
    """
    from trl import GRPOConfig

    arguments = grpo_arguments(run, run.path / "grpo")
    settings = GRPOConfig(**arguments)
    needed = settings.generation_batch_size // settings.num_generations
    if count < needed:
        total = sum(1 for _ in data.stream_rows(run.require("data/problems.jsonl")))
        raise ConfigError(
            f"GRPO would take no step: {count} of {total} problems are left to train "
            f"on, and a step takes {needed} ({settings.generation_batch_size} answers, "
            f"{settings.num_generations} to each); give more problems, or lower "
            "grpo_held_out, grpo.per_device_train_batch_size or "
            "grpo.gradient_accumulation_steps"
        )


def open_grpo(run: Run) -> Path:
    """Returns the stage's folder, made or set aside as `stages.open_stage` does."""
    require_stage(run.config, "grpo")
    run.require("data/problems.jsonl")
    return open_stage(run, "grpo")


def grpo_arguments(
    run: Run, folder: Path, made: budget.Plan | None = None
) -> dict[str, Any]:
    """Returns the arguments of `GRPOConfig`: the config's, a plan's, and ours.

    The held-out reward is measured before the first step, so that an adapter worse than
    the start never takes its place.
    """
    from trl import GRPOConfig

    values = train.training_arguments(run, "grpo", folder)
    # TRL samples so many answers where it evaluates, which is not asked of it here
    given = {"num_generations_eval": 1, "eval_strategy": "steps", **values}
    given.setdefault("eval_on_start", given["eval_strategy"] != "no")
    if given["loss_type"] == "dapo":  # for which Unsloth has another than TRL
        given.setdefault("epsilon_high", given.get("epsilon", GRPOConfig.epsilon))
    if made is not None:
        # the time ends it, after more steps where the machine is faster than the probe
        given |= {"max_steps": 3 * made.steps, "eval_steps": made.eval_steps}
    elif "eval_steps" not in given:
        steps = given.get("max_steps") or -1
        # a share of the run, where its steps are counted in epochs
        given["eval_steps"] = -(-steps // EVALUATIONS) if steps > 0 else 1 / EVALUATIONS
    return given


def make_trainer(
    run: Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: dict[str, Any],
    record: Record,
    callbacks: list[Any],
) -> Trainer:
    """Returns TRL's trainer, which evaluates by the rewards of greedy held-out answers.

    TRL's own evaluation samples, which adds noise, and computes a loss of no use here.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from helpers.inference.generation import inference

    config = run.config
    functions, weights = rewards.choose(config.rewards, heldout.answer_tokens(config))
    choice = sampling.choose(config, model)
    problems, held_out = heldout.split_problems(run)
    answer = answering(model, tokenizer, config, choice.rollout)
    rows = prompts.select(run, tokenizer, answer, problems)
    check_enough(run, len(rows))
    held = prompts.to_prompts(run, held_out)

    class Trainer(GRPOTrainer):
        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            asked = [row["prompt"] for row in held]
            answers = answer(asked, max_new_tokens=heldout.answer_tokens(config))
            found = heldout.score(answers, held, tokenizer, functions, weights)
            # in this mode what the steps since the last log measured stays theirs
            with inference(self.model):
                self.log(found)
            self.control: Any = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, found
            )
            return found

    trainer = Trainer(
        model=model,
        args=GRPOConfig(reward_weights=weights, **choice.arguments, **arguments),
        reward_funcs=[record.watch(function) for function in functions],
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(held),
        processing_class=tokenizer,
        callbacks=callbacks,
        rollout_func=choice.rollout,
    )
    train.keep_lora_fp32(trainer.model)
    said = {"name": choice.name, "reason": choice.reason}
    write_json(run.path / "grpo" / "sampler.json", said)
    return trainer


def answering(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    sampler: sampling.Sampler | None,
) -> Answering:
    """Returns what answers prompts during GRPO: the copy where one samples."""
    from helpers.inference.generation import generate

    # the memory of these is counted
    rows = sampled_rows(config)
    if sampler is not None:
        return functools.partial(sampler.generate, tokenizer, batch_size=rows)
    # on a CPU as many as are fastest
    size = None if model.device.type == "cpu" else rows
    return functools.partial(generate, model, tokenizer, batch_size=size)


def show_plan(
    run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Table:
    """Returns the plan in words, made first where `grpo_minutes` asks for one."""
    made = make_plan(run, model, tokenizer) if run.config.grpo_minutes else None
    problems, _ = heldout.split_problems(run)
    chosen = read_note(run.path / "grpo" / "prompts.json")
    return budget.table(made, run.config, chosen.get("prompts", len(problems)))


def make_plan(
    run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> budget.Plan:
    """Returns how many steps fit into `grpo_minutes`, by timing a few on this machine.

    The probe trains with a rate of zero, so that nothing is learnt from it. What it
    takes, choosing the prompts included, is part of the minutes. A plan that the
    stage's folder holds already, of a killed session, stays.

    Raises:
        ConfigError: the config names no `grpo_minutes`.
    """
    from transformers import PrinterCallback

    from helpers.grpo import monitor as guards

    config = run.config
    if config.grpo_minutes is None:
        raise ConfigError("grpo_minutes is empty: there is no time to plan for")
    folder = open_grpo(run)
    kept = budget.read_plan(folder)
    if kept is not None:
        return kept
    share = PROBE_SHARE * config.grpo_minutes
    clock = guards.TimeBudget(folder / "probe", share, probe=True)
    silent = {
        "max_steps": PROBE_STEPS,
        "learning_rate": 0.0,
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "logging_first_step": False,
        "output_dir": str(folder / "probe"),
    }
    record = Record(config.rewards)
    arguments = grpo_arguments(run, folder) | silent
    began = time.monotonic()
    probe = make_trainer(run, model, tokenizer, arguments, record, [clock])
    selected_s = time.monotonic() - began  # with probe_samples the longest part
    probe.remove_callback(PrinterCallback)
    forward = vars(model).get("forward")
    probe.train()
    before = clock.used_s
    probe.evaluate()
    used_s = clock.used_s
    # mixed precision wraps the model's forward pass: the next trainer does it again
    vars(model).pop("_original_forward", None)
    vars(model).pop("forward", None)
    if forward is not None:
        model.forward = forward
    timing = budget.agreed(
        budget.Timing(
            step_s=statistics.fmean(clock.step_s[1:] or clock.step_s),
            evaluation_s=used_s - before,
            spent_s=selected_s + used_s,
            longest=max(len(tokenizer(text)["input_ids"]) for text in record.answers),
        )
    )
    made = budget.plan(config.grpo_minutes, timing)
    budget.write_plan(folder, made)
    shutil.rmtree(folder / "probe", ignore_errors=True)
    del probe
    runtime.free_memory()
    return made
