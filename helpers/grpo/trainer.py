"""Builds the GRPO trainer of a run, from the pieces that notebook 03 shows."""

from functools import partial
from typing import Any

from accelerate.utils import gather_object
from transformers import PrinterCallback

from helpers.config import complete, defaults
from helpers.data import preparation as data
from helpers.data.formats import ask
from helpers.errors import ConfigError
from helpers.files import read_rows, write_json
from helpers.grpo import answers, monitor, rewards
from helpers.inference.generation import encode, generate, inference
from helpers.inference.sampler import Sampler, choose_sampler
from helpers.masking.templates import neutralise
from helpers.runs import Run
from helpers.training import callbacks, inputs

Base: Any = object  # TRL's class is put after this one once Unsloth has replaced it


def split_problems(run: Run) -> tuple[list[data.Row], list[data.Row]]:
    """Returns the problems to train on and those held out, `{"prompt", "gold"}` each.

    Held out are the first of the run's eval rows that end in a gold answer, which SFT
    did not train on either; else the last of the problems, at most about half of them.

    Args:
        run: with `data/` prepared by notebook 01.
    """
    config, held_out = run.config, []
    rows, system = read_rows(run.require("data/problems.jsonl")), config.system_prompt
    problems = [{"prompt": ask(r["question"], system), "gold": r["gold"]} for r in rows]
    if "eval" in data.parts_of(config.data):
        for row in read_rows(run.require("data/eval.jsonl")):
            question, answer = (turn["content"] for turn in row["messages"][-2:])
            if (gold := answers.parse_gold(answer)) is not None:
                held_out.append({"prompt": ask(question, system), "gold": str(gold)})
    if not held_out:
        cut = max(len(problems) - config.grpo_held_out, len(problems) // 2)
        problems, held_out = problems[:cut], problems[cut:]
    return problems, held_out[: config.grpo_held_out]


def training_prompts(run: Run, tokenizer: Any) -> list[data.Row]:
    """Returns the problems to train on, without overlong prompts, which are counted.

    Args:
        run, tokenizer: with `data/` prepared; counts go to its `grpo/prompts.json`.

    Raises:
        ConfigError: every prompt is longer than `max_prompt_length`, in tokens.
    """
    problems, limit = split_problems(run)[0], run.config.max_prompt_length
    rows = problems
    if limit:
        lengths = [len(encode(tokenizer, row["prompt"])) for row in problems]
        rows = [row for row, n in zip(problems, lengths, strict=True) if n <= limit]
    if not rows:
        text = f"no prompt fits into max_prompt_length={limit}"
        raise ConfigError(f"{text}: the shortest has {min(lengths)} tokens")
    counts = {"prompts": len(rows), "left_out": len(problems) - len(rows)}
    write_json(run.path / "grpo" / "prompts.json", counts)
    return [row | {"prompt": neutralise(tokenizer, row["prompt"])} for row in rows]


def require_prompts(run: Run) -> None:
    """Raises ConfigError when problems do not fill a step: TRL drops a part of one."""
    values, count = complete(run.config, "grpo"), len(split_problems(run)[0])
    # GRPOConfig would tell, but accelerate keeps its device (use_cpu) for the process
    batches = values["steps_per_generation"] or values["gradient_accumulation_steps"]
    rows = batches * values["per_device_train_batch_size"]
    rows, group = values["generation_batch_size"] or rows, values["num_generations"]
    if count < rows // group:
        text = f"GRPO would take no step: {count} problems are left to train on, and a "
        text += f"step takes {rows // group} ({rows} answers, {group} to each); give "
        raise ConfigError(text + "more, or lower grpo_held_out or the batch")


class GreedyEvaluation(Base):
    """Goes before TRL's class, `class Trainer(GreedyEvaluation, GRPOTrainer)`.

    `evaluate` pays greedy answers to the held-out problems: TRL's own samples, which
    adds noise, and computes a loss, which is zero in GRPO. The loss is not shown.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.remove_callback(PrinterCallback)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        args, tokenizer = self.args, self.processing_class
        answer: Any = partial(generate, self.model)
        if isinstance(self.rollout_func, Sampler):
            answer = self.rollout_func.generate
        limits = {"max_new_tokens": args.max_completion_length}
        limits["batch_size"] = args.generation_batch_size
        columns = self.eval_dataset.rename_column("prompt", "prompts").to_dict()
        with self.accelerator.split_between_processes(columns["prompts"]) as prompts:
            texts = [a.text for a in answer(tokenizer, prompts, **limits)]
        texts = gather_object(texts)
        columns["completions"] = [[{"role": "assistant", "content": t}] for t in texts]
        columns["completion_ids"] = tokenizer(texts)["input_ids"]
        metrics = {"eval_reward": 0.0}
        weights = self.reward_weights.tolist()  # ones, where `args` has none
        for reward, weight in zip(self.reward_funcs, weights, strict=True):
            scores = [score for score in reward(**columns) if score is not None]
            mean = sum(scores) / max(1, len(scores))
            metrics[f"eval_rewards/{reward.__name__}"] = round(mean, 4)
            metrics["eval_reward"] += weight * mean
        metrics["eval_reward"] = round(metrics["eval_reward"], 4)
        with inference(self.model):  # keeps TRL's training metrics out of this entry
            self.log(metrics)
        self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics


def grpo_arguments(run: Run) -> dict[str, Any]:
    """Returns the arguments of `GRPOConfig`: the config's, and what they leave open.

    Opens the stage's folder; what other settings or data left there is set aside.

    Args:
        run: with `data/` prepared.

    Raises:
        ConfigError: the run has no grpo stage.
    """
    folder, default = inputs.open_stage(run, "grpo"), defaults("grpo")
    values: dict[str, Any] = {
        "reward_weights": list(run.config.rewards.values()),
        "num_generations_eval": 1,  # TRL would sample more to each; `evaluate` is ours
        "eval_strategy": "steps",
        "eval_steps": 0.25,  # of all steps
        # an adapter worse than the start must never take its place
        "eval_on_start": run.config.grpo.get("eval_strategy") != "no",
        "log_completions": True,  # to parquet files
        "num_completions_to_print": -1,  # 0 would print an empty table
    }
    for name in ("num_generations", "max_completion_length", "temperature"):
        values[name] = default[name]  # TRL's: Unsloth has others
    values |= inputs.training_arguments(run, "grpo", folder)
    if values["loss_type"] == "dapo":  # for which Unsloth has another than TRL
        values.setdefault("epsilon_high", values.get("epsilon", default["epsilon"]))
    if run.config.grpo_minutes:  # the clock evaluates, and ends the run
        values |= dict.fromkeys(["max_steps", "eval_steps"], monitor.ENDLESS)
    return values


def build_grpo(run: Run, model: Any, tokenizer: Any) -> Any:
    """Returns the GRPO trainer of a run, over the problems in its `data/`.

    Args:
        run: with `data/` prepared.
        model, tokenizer: from `load_for_training(run, "grpo", adapter)`.

    Raises:
        ConfigError: the run has no grpo stage, or every prompt is too long.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config, folder = run.config, run.path / "grpo"
    trainer: Any = type("Trainer", (GreedyEvaluation, GRPOTrainer), {})
    args = GRPOConfig(**grpo_arguments(run))
    functions, _ = rewards.choose(config.rewards, args.max_completion_length)
    return trainer(
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
