"""Rewards with TRL's contract; None: the gold answer is no number to grade by."""

import itertools
from collections.abc import Callable
from typing import Any

from helpers.errors import ConfigError
from helpers.grpo import answers
from helpers.grpo.answers import extract_answer, parse_number

Texts = list[str] | list[list[dict[str, str]]]  # plain, or conversational
Scores = list[float | None]
Reward = Callable[..., Scores]
ALL_WRONG, ALL_RIGHT = "groups/all_wrong", "groups/all_right"  # logged shares


def plain(text: Any) -> str:
    return text if isinstance(text, str) else "\n".join(m["content"] for m in text)


def own_texts(completions: Texts, prompts: Texts | None = None, **_: Any) -> list[str]:
    """Returns the text of each completion, without what it copies from its prompt."""
    pairs = zip(completions, prompts or [""] * len(completions), strict=True)
    return [answers.own_words(plain(text), plain(prompt)) for text, prompt in pairs]


def correctness(
    completions: Texts,
    gold: list[str],
    prompts: Texts | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **_: Any,
) -> Scores:
    """Returns 1.0 for a right answer, 0.0 for a wrong one, None without a gold."""
    scores: Scores = []
    for text, g in zip(own_texts(completions, prompts), gold, strict=True):
        is_gold = parse_number(g) is not None
        scores.append(float(answers.is_correct(text, g)) if is_gold else None)
    if log_metric is not None and prompts:
        pairs = itertools.groupby(zip(prompts, scores, strict=True), lambda p: p[0])
        groups = [[score or 0.0 for _, score in group] for _, group in pairs]
        log_metric(ALL_WRONG, sum(max(group) == 0 for group in groups) / len(groups))
        log_metric(ALL_RIGHT, sum(min(group) == 1 for group in groups) / len(groups))
    return scores


def closeness(completions: Texts, gold: list[str], **more: Any) -> Scores:
    """Returns 1.0 for a right number, 0.5 within 10 %, 0.25 within 20 %, else 0.0."""
    scores: Scores = []
    for text, g in zip(own_texts(completions, **more), gold, strict=True):
        value, answer = parse_number(g), extract_answer(text)
        if value is None or answer is None:
            scores.append(None if value is None else 0.0)
            continue
        off, size = abs(answer - value), abs(value)
        near = 0.5 if 10 * off <= size else 0.25 if 5 * off <= size else 0.0
        scores.append(1.0 if off == 0 else near)
    return scores


def strict_format(completions: Texts, **more: Any) -> Scores:
    """Returns 1.0 where the text is working and one final `#### <number>` line."""
    return [float(answers.has_strict_format(t)) for t in own_texts(completions, **more)]


def soft_format(completions: Texts, **more: Any) -> Scores:
    """Returns 1.0 where `####` and a number stand once, wherever that is."""
    return [float(answers.has_soft_format(t)) for t in own_texts(completions, **more)]


def number_present(completions: Texts, **more: Any) -> Scores:
    """Returns 1.0 where the text gives one answer that is a number, marked or not."""
    texts = own_texts(completions, **more)
    return [float(extract_answer(t) is not None and t.count("####") < 2) for t in texts]


def punish_overlong(max_completion_length: int) -> Reward:
    """Returns DAPO's overlong punishment, arXiv 2503.14476: from 0.0 to -1.0."""
    from trl.rewards import get_soft_overlong_punishment

    # it begins at 80 % of the longest, as in the paper
    cache = max(1, max_completion_length // 5)
    overlong = get_soft_overlong_punishment(max_completion_length, cache)
    overlong.__name__ = "overlong"
    return overlong


PURE = (correctness, closeness, strict_format, soft_format, number_present)
REWARDS: dict[str, Reward] = {function.__name__: function for function in PURE}
LEADS = {"correctness": 1.0, "closeness": 0.5}  # of a right answer, over any wrong one


def margin(weights: dict[str, float]) -> float:
    """Returns by how much the worst right answer outscores the best wrong one."""
    # a wrong answer may get all that another reward pays, and a right one nothing
    known = weights.keys() & {*REWARDS, "overlong"}
    leads = [weights[n] * LEADS[n] if n in LEADS else -abs(weights[n]) for n in known]
    return round(sum(leads), 6)


def choose(
    weights: dict[str, float], max_completion_length: int
) -> tuple[list[Reward], list[float]]:
    """Returns reward functions and their weights, as `GRPOTrainer` takes them."""
    known = REWARDS | {"overlong": punish_overlong(max_completion_length)}
    if unknown := [name for name in weights if name not in known]:
        raise ConfigError(f"no reward {unknown[0]!r}; known: {', '.join(known)}")
    return [known[name] for name in weights], list(weights.values())
