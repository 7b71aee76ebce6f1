"""The problems of GRPO: what is trained on, what is held out, and how it is scored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from helpers.config import RunConfig, complete
from helpers.data import preparation as data
from helpers.errors import ConfigError
from helpers.grpo.answers import parse_gold
from helpers.grpo.rewards import Reward, correctness
from helpers.masking.templates import render
from helpers.runs import Run, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from helpers.inference.generation import Answer, Answering

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def split_problems(run: Run) -> tuple[list[data.Row], list[data.Row]]:
    """Returns the problems to train on, and those that choose the best adapter.

    The latter are the first of the run's eval rows that end in a gold answer, which SFT
    did not train on either; where there are none, the last of the problems.
    """
    config = run.config
    problems = data.read_rows(run.require("data/problems.jsonl"))
    held_out = []
    if "eval" in data.parts_of(config.data):
        for row in data.read_rows(run.require("data/eval.jsonl")):
            question, answer = row["messages"][-2:]
            gold = parse_gold(answer["content"])
            if gold is not None:
                held_out.append({"question": question["content"], "gold": str(gold)})
    if not held_out:
        cut = max(1, len(problems) - config.grpo_held_out)
        problems, held_out = problems[:cut], problems[cut:]
    return problems, held_out[: config.grpo_held_out]


def to_prompts(run: Run, problems: list[data.Row]) -> list[data.Row]:
    """Returns `{"prompt", "gold"}` rows of problems, as `GRPOTrainer` takes them."""
    system = run.config.system_prompt
    return [
        {"prompt": data.ask(p["question"], system), "gold": p["gold"]} for p in problems
    ]


def training_prompts(run: Run, tokenizer: PreTrainedTokenizerBase) -> list[data.Row]:
    """Returns the prompts to train on, `{"prompt", "gold"}` each.

    Those of more than `max_prompt_length` tokens are left out, and counted in
    `grpo/prompts.json`.

    Raises:
        ConfigError: what is left does not fill one optimiser step.
    """
    problems, _ = split_problems(run)
    rows = to_prompts(run, problems)
    limit = run.config.max_prompt_length
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
    check_enough(run, len(rows))
    return rows


def require_prompts(run: Run) -> None:
    """Raises ConfigError when a run's data hold fewer problems than one step takes."""
    if (run.path / "data" / "problems.jsonl").exists():
        check_enough(run, len(split_problems(run)[0]))


def check_enough(run: Run, count: int) -> None:
    """Raises ConfigError when prompts do not fill one optimiser step of GRPO.

    TRL drops an incomplete batch, so that such a run would end without a step.
    """
    from trl import GRPOConfig

    values = complete(run.config, "grpo")
    names = ["per_device_train_batch_size", "gradient_accumulation_steps"]
    names += ["num_generations", "steps_per_generation", "generation_batch_size"]
    sizes = {name: values[name] for name in names}
    settings = GRPOConfig(use_cpu=True, bf16=False, report_to="none", **sizes)
    needed = settings.generation_batch_size // settings.num_generations
    if count < needed:
        total = len(data.read_rows(run.require("data/problems.jsonl")))
        raise ConfigError(
            f"GRPO would take no step: {count} of {total} problems are left to train "
            f"on, and a step takes {needed} ({settings.generation_batch_size} answers, "
            f"{settings.num_generations} to each); give more problems, or lower "
            "grpo_held_out, grpo.per_device_train_batch_size or "
            "grpo.gradient_accumulation_steps"
        )


def sampling_of(config: RunConfig) -> dict[str, Any]:
    """Returns how a run's GRPO draws its answers, for `generation.generate`."""
    values = complete(config, "grpo")
    drawn = {name: values[name] for name in SAMPLING}
    return drawn | {"max_new_tokens": values["max_completion_length"]}


def score(
    answers: list[Answer],
    held_out: list[data.Row],
    tokenizer: PreTrainedTokenizerBase,
    functions: list[Reward],
    weights: list[float],
) -> dict[str, float]:
    """Returns the mean reward of answers, whole (`eval_reward`) and by component.

    Args:
        answers: greedy, one to each held-out problem.
        held_out: `prompt` and `gold` each.
        tokenizer: of the model that answered.
        functions: the rewards, of `rewards.choose`.
        weights: of these.
    """
    columns = {
        "prompts": [row["prompt"] for row in held_out],
        "completions": [[{"role": "assistant", "content": a.text}] for a in answers],
        "completion_ids": [tokenizer(a.text)["input_ids"] for a in answers],
        "gold": [row["gold"] for row in held_out],
    }
    means, total = {}, 0.0
    for function, weight in zip(functions, weights, strict=True):
        scores = [s for s in function(**columns) if s is not None]
        mean = sum(scores) / len(scores) if scores else 0.0
        means[f"eval_rewards/{function.__name__}"] = round(mean, 4)
        total += weight * mean
    return {"eval_reward": round(total, 4), **means}


def pass_rates(
    run: Run, answer: Answering, problems: list[data.Row], samples: int
) -> list[float]:
    """Returns the share of sampled answers to each problem that are right, 0 to 1.

    Args:
        run: says how prompts are made and answers drawn.
        answer: `generate` of a model, or of a `Sampler`, with its tokenizer.
        problems: `question` and `gold` each.
        samples: answers drawn to each.
    """
    rows = [row for row in to_prompts(run, problems) for _ in range(samples)]
    prompts = [row["prompt"] for row in rows]
    answers = answer(prompts, sampling=sampling_of(run.config))
    scores = correctness(
        [each.text for each in answers],
        gold=[row["gold"] for row in rows],
        prompts=prompts,
    )
    starts = range(0, len(rows), samples)
    return [scores[i : i + samples].count(1.0) / samples for i in starts]
