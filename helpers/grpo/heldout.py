"""The held-out problems of GRPO, and the reward that answers to them get."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.config import RunConfig, complete
from helpers.data import preparation as data
from helpers.grpo.answers import parse_gold
from helpers.runs import Run

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

    from helpers.inference.generation import Answer


def split_problems(run: Run) -> tuple[list[data.Row], list[data.Row]]:
    """Returns the problems to train on, and those that choose the best adapter.

    The latter are the first of the run's eval rows that end in a gold answer, which SFT
    did not train on either; where there are none, the last of the problems.
    """
    config = run.config
    problems = data.read_rows(run.require("data/problems.jsonl"))
    found = []
    if "eval" in data.parts_of(config.data):
        for row in data.read_rows(run.require("data/eval.jsonl")):
            question, answer = row["messages"][-2:]
            gold = parse_gold(answer["content"])
            if gold is not None:
                found.append({"question": question["content"], "gold": str(gold)})
    if not found:
        cut = max(1, len(problems) - config.grpo_held_out)
        problems, found = problems[:cut], problems[cut:]
    return problems, found[: config.grpo_held_out]


def answer_tokens(config: RunConfig) -> int:
    """Returns where completions are cut: the config's value, or TRL's default."""
    return complete(config, "grpo")["max_completion_length"]


def score(
    answers: list[Answer],
    held: list[data.Row],
    tokenizer: PreTrainedTokenizerBase,
    functions: list[Callable[..., list[float | None]]],
    weights: list[float],
) -> dict[str, float]:
    """Returns the mean reward of answers, whole and by component.

    Args:
        answers: greedy, one to each held-out problem.
        held: `prompt` and `gold` each.
        tokenizer: of the model that answered.
        functions: the rewards, of `rewards.choose`, with their weights.
    """
    given = {
        "prompts": [row["prompt"] for row in held],
        "completions": [[{"role": "assistant", "content": a.text}] for a in answers],
        "completion_ids": [tokenizer(a.text)["input_ids"] for a in answers],
        "gold": [row["gold"] for row in held],
    }
    found = {"eval_reward": 0.0}
    for function, weight in zip(functions, weights, strict=True):
        paid = [p for p in function(**given) if p is not None]
        mean = sum(paid) / len(paid) if paid else 0.0
        found[f"eval_rewards/{function.__name__}"] = round(mean, 4)
        found["eval_reward"] += weight * mean
    found["eval_reward"] = round(found["eval_reward"], 4)
    return found
