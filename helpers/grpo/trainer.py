"""Builds the GRPO trainer of a run, from the pieces that notebook 03 shows."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from helpers.config import defaults
from helpers.grpo import monitor, problems, rewards
from helpers.inference.generation import Answering, generate, inference
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
        answer: Answering = partial(generate, self.model)
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
        train_dataset=Dataset.from_list(problems.training_prompts(run, tokenizer)),
        eval_dataset=Dataset.from_list(problems.split_problems(run)[1]),
        processing_class=tokenizer,
        rollout_func=choose_sampler(run, model),
        callbacks=[
            monitor.LivePanel(run),
            callbacks.BestAdapter(folder / "adapter", "eval_reward"),
            monitor.Clock(folder, config.grpo_minutes),
        ],
    )
