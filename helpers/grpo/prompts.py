"""The prompts of GRPO: few-shot turns, a length limit, and a filter by pass rate.

What a prompt is made of is `data.ask`, here as in evaluation.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from helpers.config import RunConfig
from helpers.data import preparation as data
from helpers.errors import ConfigError
from helpers.grpo import rewards
from helpers.runs import Run, fingerprint, write_json
from helpers.training.inputs import made_from, read_note

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from helpers.inference.generation import Answering

PASS_RATES = "pass_rates.json"  # in the run folder
CHUNK = 64  # problems between two writes of the pass rates
# GSM8K's answers hold notes for a calculator, <<48/2=24>>, which nobody should imitate
CALCULATOR = re.compile(r"<<[^<>]*>>")


def shown_problems(run: Run) -> list[data.Row]:
    """Returns the problems shown as solved examples: the first `few_shot` of training.

    Raises:
        ConfigError: there are not as many, and one to train on.
    """
    count = run.config.few_shot
    if count == 0:
        return []
    problems = data.read_rows(run.require("data/problems.jsonl"))
    if count >= len(problems):
        raise ConfigError(
            f"few_shot={count} takes all {len(problems)} problems of "
            f"{run.config.data.problems}; lower it or give more problems"
        )
    return problems[:count]


def shots(run: Run) -> data.Messages:
    """Returns the turns of the solved examples, empty without `few_shot`."""
    turns = []
    for problem in shown_problems(run):
        answer = CALCULATOR.sub("", problem["answer"])
        turns.append({"role": "user", "content": problem["question"]})
        turns.append({"role": "assistant", "content": answer})
    return turns


def to_prompts(run: Run, problems: list[data.Row]) -> list[data.Row]:
    """Returns `{"prompt", "gold"}` rows of problems, as `GRPOTrainer` takes them."""
    system, turns = run.config.system_prompt, shots(run)
    return [
        {"prompt": data.ask(p["question"], system, turns), "gold": p["gold"]}
        for p in problems
    ]


def select(
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    answer: Answering,
    problems: list[data.Row] | None = None,
) -> list[data.Row]:
    """Returns the prompts to train on, `{"prompt", "gold"}` each.

    Left out are the problems that every prompt shows solved, those longer than
    `max_prompt_length`, and with `probe_samples` those that the model always or never
    solves: a group of equal rewards has no gradient. Counts go to `grpo/prompts.json`.

    Args:
        run: with `data/` prepared.
        tokenizer: of the model.
        answer: draws answers of the model as GRPO starts with it.
        problems: to choose from; all of the run's by default.

    Raises:
        ConfigError: none is left.
    """
    config = run.config
    if problems is None:
        problems = data.read_rows(run.require("data/problems.jsonl"))
    shown = {problem["id"] for problem in shown_problems(run)}
    left = [problem for problem in problems if problem["id"] not in shown]
    report: dict[str, Any] = {"shown": len(problems) - len(left)}
    if config.max_prompt_length:
        short = keep_short(run, tokenizer, left)
        report["too_long"] = len(left) - len(short)
        left = short
    if config.probe_samples:
        left, report["probe"] = keep_useful(run, answer, left)
    counts = {"prompts": len(left), "left_out": len(problems) - len(left)}
    write_json(run.path / "grpo" / "prompts.json", counts | report)
    return to_prompts(run, left)


def keep_short(
    run: Run, tokenizer: PreTrainedTokenizerBase, problems: list[data.Row]
) -> list[data.Row]:
    """Returns the problems whose prompt has at most `max_prompt_length` tokens.

    Raises:
        ConfigError: there is none.
    """
    from helpers.masking.templates import render

    limit = run.config.max_prompt_length or 0
    rows = to_prompts(run, problems)
    texts = [render(tokenizer, row["prompt"], for_generation=True) for row in rows]
    lengths = [len(i) for i in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    short = [p for p, n in zip(problems, lengths, strict=True) if n <= limit]
    if not short:
        raise ConfigError(
            f"max_prompt_length={limit} leaves none of {len(problems)} problems: the "
            f"shortest prompt has {min(lengths, default=0)} tokens; raise it"
            + (" or lower few_shot" if run.config.few_shot else "")
        )
    return short


def keep_useful(
    run: Run, answer: Answering, problems: list[data.Row]
) -> tuple[list[data.Row], dict[str, Any]]:
    """Returns the probed problems that are solved sometimes, and what was found.

    Raises:
        ConfigError: there is none.
    """
    import random

    samples, cap = run.config.probe_samples, run.config.probe_problems
    if cap is not None and cap < len(problems):
        problems = random.Random(run.config.seed).sample(problems, cap)
    solved = probe(run, answer, problems)
    counts = Counter(solved[problem["id"]] for problem in problems)
    histogram = [counts[n] for n in range(samples + 1)]
    useful = [p for p in problems if 0 < solved[p["id"]] < samples]
    found = {"samples": samples, "problems": len(problems), "histogram": histogram}
    print(describe(histogram))  # noqa: T201
    if not useful:
        raise ConfigError(
            f"no problem is left to learn from: {describe(histogram)}; train SFT "
            "first or give easier problems if none is solved, harder ones if all are"
        )
    return useful, found


def describe(histogram: list[int]) -> str:
    """Returns a sentence on a histogram of pass rates.

    >>> describe([5, 2, 1, 2])
    '10 problems, 3 answers each: 5 never solved, 2 always, 3 kept (1/3: 2, 2/3: 1)'
    """
    samples = len(histogram) - 1
    never, *between, always = histogram
    parts = [f"{n}/{samples}: {count}" for n, count in enumerate(between, start=1)]
    return (
        f"{sum(histogram)} problems, {samples} answers each: {never} never solved, "
        f"{always} always, {sum(between)} kept ({', '.join(parts)})"
    )


def probe(run: Run, answer: Answering, problems: list[data.Row]) -> dict[str, int]:
    """Returns how many of `probe_samples` answers to each problem are right, by its id.

    Answers are drawn as GRPO draws them. What is found is kept in `pass_rates.json`
    of the run folder, for a stopped run to go on from.
    """
    import torch

    config, path = run.config, run.path / PASS_RATES
    made, kept = made_of(run), read_note(path)
    solved: dict[str, int] = kept["solved"] if kept.get("made_from") == made else {}
    left = [problem for problem in problems if problem["id"] not in solved]
    for start in range(0, len(left), CHUNK):
        chunk = left[start : start + CHUNK]
        rows = [r for r in to_prompts(run, chunk) for _ in range(config.probe_samples)]
        # the training that follows draws the same numbers whether or not this ran
        with torch.random.fork_rng():
            torch.manual_seed(config.seed + start)
            asked = [row["prompt"] for row in rows]
            answers = answer(asked, sampling=sampling(config))
        right = rewards.correctness(
            [each.text for each in answers],
            gold=[row["gold"] for row in rows],
            prompts=[row["prompt"] for row in rows],
        )
        for number, problem in enumerate(chunk):
            first = number * config.probe_samples
            solved[problem["id"]] = right[first : first + config.probe_samples].count(1)
        write_json(path, {"made_from": made, "solved": solved})
    return solved


def made_of(run: Run) -> str:
    """Returns the fingerprint of all that decides a pass rate."""
    drawn = (run.config.probe_samples, sampling(run.config))
    return fingerprint(*drawn, shots(run), made_from(run, "sft"))


def sampling(config: RunConfig) -> dict[str, Any]:
    """Returns how a run's GRPO draws its answers, for `generation.generate`."""
    from trl import GRPOConfig

    drawn = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    names = {name: name for name in drawn} | {"max_new_tokens": "max_completion_length"}
    return {
        ours: config.grpo.get(theirs, getattr(GRPOConfig, theirs))
        for ours, theirs in names.items()
    }
