"""Builds the GRPO trainer of a run, from the pieces that notebook 03 shows."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from helpers.config import complete, defaults
from helpers.data import preparation as data
from helpers.data.formats import ask
from helpers.errors import ConfigError
from helpers.files import read_rows, write_json
from helpers.grpo import monitor, rewards
from helpers.grpo.answers import parse_gold
from helpers.inference.generation import generate, inference
from helpers.masking.templates import render
from helpers.rollout.sampler import Sampler, choose_sampler
from helpers.runs import Run
from helpers.training import callbacks
from helpers.training.inputs import open_stage, training_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
    from trl import GRPOTrainer as Base
else:
    Base = object  # TRL's class is put after this one once Unsloth has replaced it

OPEN = ("num_generations", "max_completion_length", "temperature")  # TRL's default
DEFAULT_EVALUATIONS = 4  # where neither eval_steps nor grpo_minutes is given


def split_problems(run: Run) -> tuple[list[data.Row], list[data.Row]]:
    """Returns the problems to train on and those held out, `{"prompt", "gold"}` each.

    Held out are the first of the run's eval rows that end in a gold answer, which SFT
    did not train on either; where there are none, the last of the problems.

    Args:
        run: with `data/` prepared.

    Raises:
        MissingInput: notebook 01 has not prepared the data.
    """
    config, held_out = run.config, []
    rows = read_rows(run.require("data/problems.jsonl"))
    questions = [(row["question"], row["gold"]) for row in rows]
    if "eval" in data.parts_of(config.data):
        for row in read_rows(run.require("data/eval.jsonl")):
            question, answer = row["messages"][-2:]
            gold = parse_gold(answer["content"])
            if gold is not None:
                held_out.append((question["content"], str(gold)))
    if not held_out:
        cut = max(1, len(questions) - config.grpo_held_out)
        questions, held_out = questions[:cut], questions[cut:]
    problems = [
        {"prompt": ask(question, config.system_prompt), "gold": gold}
        for question, gold in questions + held_out[: config.grpo_held_out]
    ]
    return problems[: len(questions)], problems[len(questions) :]


def training_prompts(run: Run, tokenizer: PreTrainedTokenizerBase) -> list[data.Row]:
    """Returns the problems to train on, those with overlong prompts left out.

    These are counted in `grpo/prompts.json`.

    Args:
        run: with `data/` prepared, and a `max_prompt_length` in tokens.
        tokenizer: of the model.

    Raises:
        ConfigError: every prompt is longer.
    """
    problems, _ = split_problems(run)
    rows, limit = problems, run.config.max_prompt_length
    if limit:
        texts = [render(tokenizer, row["prompt"], for_generation=True) for row in rows]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = [row for row, i in zip(rows, ids, strict=True) if len(i) <= limit]
        if not rows:
            raise ConfigError(
                f"max_prompt_length={limit} leaves none of {len(problems)} problems: "
                f"the shortest prompt has {min(map(len, ids))} tokens; raise it"
            )
    counts = {"prompts": len(rows), "left_out": len(problems) - len(rows)}
    write_json(run.path / "grpo" / "prompts.json", counts)
    return rows


def require_prompts(run: Run) -> None:
    """Raises ConfigError when problems do not fill one optimiser step of GRPO.

    TRL drops an incomplete batch, so that such a run would end without a step.
    """
    import torch
    from trl import GRPOConfig

    if not (run.path / "data" / "problems.jsonl").exists():
        return
    values, count = complete(run.config, "grpo"), len(split_problems(run)[0])
    names = ["per_device_train_batch_size", "gradient_accumulation_steps"]
    names += ["num_generations", "steps_per_generation", "generation_batch_size"]
    sizes = {name: values[name] for name in names}
    # on this machine's device: accelerate keeps the last one for the whole process
    cpu = not torch.cuda.is_available()
    settings = GRPOConfig(use_cpu=cpu, bf16=False, report_to="none", **sizes)
    needed = settings.generation_batch_size // settings.num_generations
    if count < needed:
        raise ConfigError(
            f"GRPO would take no step: {count} problems are left to train on, and a "
            f"step takes {needed} ({settings.generation_batch_size} answers, "
            f"{settings.num_generations} to each); give more problems, or lower "
            "grpo_held_out, grpo.per_device_train_batch_size or "
            "grpo.gradient_accumulation_steps"
        )


class GreedyEvaluation(Base):
    """Goes before TRL's class, `class Trainer(GreedyEvaluation, GRPOTrainer)`.

    `evaluate` pays greedy answers to the held-out problems: TRL's own samples, which
    adds noise, and computes a loss, which is zero in GRPO. The table of these losses
    is hidden, as the panel shows more.
    """

    control: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        from transformers import PrinterCallback, ProgressCallback
        from transformers.utils.notebook import NotebookProgressCallback

        super().__init__(*args, **options)
        for kind in (NotebookProgressCallback, ProgressCallback, PrinterCallback):
            self.remove_callback(kind)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Returns the held-out reward, logged as `eval_reward` and by component."""
        args, tokenizer = self.args, self.processing_class
        columns = self.eval_dataset.to_dict()
        options: dict[str, Any] = {"max_new_tokens": args.max_completion_length}
        if self.model.device.type != "cpu" or self.rollout_func:  # as many as in a step
            size = args.per_device_train_batch_size * args.steps_per_generation
            options["batch_size"] = size
        answer: Any = partial(generate, self.model)
        if isinstance(self.rollout_func, Sampler):
            answer = self.rollout_func.generate
        texts = [a.text for a in answer(tokenizer, columns["prompt"], **options)]
        values = {
            "prompts": columns["prompt"],
            "completions": [[{"role": "assistant", "content": t}] for t in texts],
            "completion_ids": tokenizer(texts)["input_ids"],
            "gold": columns["gold"],
        }
        metrics = {"eval_reward": 0.0}
        for function, weight in zip(
            self.reward_funcs, args.reward_weights, strict=True
        ):
            scores = [s for s in function(**values) if s is not None]
            mean = sum(scores) / max(1, len(scores))
            metrics[f"eval_rewards/{function.__name__}"] = round(mean, 4)
            metrics["eval_reward"] += weight * mean
        metrics["eval_reward"] = round(metrics["eval_reward"], 4)
        with inference(self.model):  # keeps TRL's training metrics out of this entry
            self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            args, self.state, self.control, metrics
        )
        return metrics


def grpo_arguments(run: Run) -> dict[str, Any]:
    """Returns the arguments of `GRPOConfig`: the config's, and what they leave open.

    Opens the stage's folder; what other settings or data left there is set aside.

    Args:
        run: with `data/` prepared.

    Raises:
        ConfigError: the run has no grpo stage.
        MissingInput: notebook 01 has not prepared the data.
    """
    from trl import GRPOConfig

    folder = open_stage(run, "grpo")
    run.require("data/problems.jsonl")
    ours: dict[str, Any] = {
        "reward_weights": list(run.config.rewards.values()),
        "num_generations_eval": 1,  # TRL would sample more to each; `evaluate` is ours
        "eval_strategy": "steps",
        "log_completions": True,  # to parquet files
        "num_completions_to_print": -1,  # 0 would print an empty table
    }
    ours |= {name: defaults("grpo")[name] for name in OPEN}
    values = ours | training_arguments(run, "grpo", folder)
    # an adapter worse than the start must never take its place
    values.setdefault("eval_on_start", values["eval_strategy"] != "no")
    if callbacks.last_checkpoint(folder / "checkpoints") is not None:
        values["eval_on_start"] = False  # it is in the history
    if values["loss_type"] == "dapo":  # for which Unsloth has another than TRL
        values.setdefault("epsilon_high", values.get("epsilon", GRPOConfig.epsilon))
    if run.config.grpo_minutes:  # the clock evaluates, and ends the run
        return values | dict.fromkeys(["max_steps", "eval_steps"], monitor.ENDLESS)
    steps = values.get("max_steps") or -1
    share = -(-steps // DEFAULT_EVALUATIONS) if steps > 0 else 1 / DEFAULT_EVALUATIONS
    return {"eval_steps": share} | values


def build_grpo(
    run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Trainer:
    """Returns the GRPO trainer of a run, over the problems in its `data/`.

    Args:
        run: with `data/` prepared.
        model: with LoRA to train, from `load_for_training(run, "grpo", adapter)`.
        tokenizer: of the model.

    Raises:
        ConfigError: the run has no grpo stage, or every prompt is too long.
        MissingInput: notebook 01 has not prepared the data.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    class Trainer(GreedyEvaluation, GRPOTrainer):
        """TRL's trainer with a greedy evaluation."""

    config, folder = run.config, run.path / "grpo"
    args = GRPOConfig(**grpo_arguments(run))
    functions, _ = rewards.choose(config.rewards, args.max_completion_length)
    return Trainer(
        model=model,
        args=args,
        reward_funcs=functions,
        train_dataset=Dataset.from_list(training_prompts(run, tokenizer)),
        eval_dataset=Dataset.from_list(split_problems(run)[1]),
        processing_class=tokenizer,
        rollout_func=choose_sampler(run, model),
        callbacks=[
            monitor.LivePanel(run),
            callbacks.BestAdapter(folder / "adapter", "eval_reward"),
            monitor.Clock(folder, config.grpo_minutes),
        ],
    )
