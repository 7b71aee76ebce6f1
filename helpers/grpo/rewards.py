"""Rewards, by the answer parser: text -> float functions with TRL's contract.

None says that the gold answer cannot be graded, which is not the 0.0 of a wrong one.
What a completion copies from its prompt earns nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from helpers.errors import ConfigError
from helpers.grpo import answers
from helpers.grpo.answers import extract_answer, parse_number

Texts = list[str] | list[list[dict[str, str]]]  # plain, or conversational
Prompts = Texts | None
Scores = list[float | None]
Reward = Callable[..., Scores]
ALL_WRONG, ALL_RIGHT = "groups/all_wrong", "groups/all_right"  # logged shares


def own_texts(completions: Texts, prompts: Prompts) -> list[str]:
    """Returns the text of each completion, without what it copies from its prompt."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    if prompts is None:
        return texts
    questions = [
        p if isinstance(p, str) else "\n".join(m["content"] for m in p) for p in prompts
    ]
    pairs = zip(texts, questions, strict=True)
    return [answers.own_words(text, question) for text, question in pairs]


def correctness(
    completions: Texts,
    gold: list[str],
    prompts: Prompts = None,
    log_metric: Callable[[str, float], None] | None = None,
    **_: Any,
) -> Scores:
    """Returns 1.0 for a right answer, 0.0 for a wrong one, None without a gold."""
    scores: Scores = []
    for text, g in zip(own_texts(completions, prompts), gold, strict=True):
        readable = parse_number(g) is not None or answers.parse_expression(g)
        scores.append(float(answers.is_correct(text, g)) if readable else None)
    if log_metric is not None and prompts:
        pairs = itertools.groupby(zip(prompts, scores, strict=True), lambda p: p[0])
        groups = [[score or 0.0 for _, score in group] for _, group in pairs]
        log_metric(ALL_WRONG, sum(max(group) == 0 for group in groups) / len(groups))
        log_metric(ALL_RIGHT, sum(min(group) == 1 for group in groups) / len(groups))
    return scores


def closeness(
    completions: Texts, gold: list[str], prompts: Prompts = None, **_: Any
) -> Scores:
    """Returns 1.0 for a right number, 0.5 within 10 %, 0.25 within 20 %, else 0.0."""
    texts, scores = own_texts(completions, prompts), []
    for text, value in zip(texts, map(parse_number, gold), strict=True):
        answer = extract_answer(text)
        if value is None or answer is None:
            scores.append(None if value is None else 0.0)
            continue
        off, size = abs(answer - value), abs(value)
        near = 0.5 if 10 * off <= size else 0.25 if 5 * off <= size else 0.0
        scores.append(1.0 if off == 0 else near)
    return scores


def strict_format(completions: Texts, prompts: Prompts = None, **_: Any) -> Scores:
    """Returns 1.0 where the text is working and one final `#### <number>` line."""
    texts = own_texts(completions, prompts)
    return [float(answers.has_strict_format(text)) for text in texts]


def soft_format(completions: Texts, prompts: Prompts = None, **_: Any) -> Scores:
    """Returns 1.0 where `####` and a number stand once, wherever that is."""
    texts = own_texts(completions, prompts)
    return [float(answers.has_soft_format(text)) for text in texts]


def number_present(completions: Texts, prompts: Prompts = None, **_: Any) -> Scores:
    """Returns 1.0 where the text gives one answer that is a number, marked or not."""
    return [
        float(extract_answer(text) is not None and text.count(answers.MARKER) <= 1)
        for text in own_texts(completions, prompts)
    ]


def punish_overlong(max_completion_length: int) -> Reward:
    """Returns DAPO's overlong punishment, arXiv 2503.14476: from 0.0 to -1.0."""

    def overlong(completion_ids: list[list[int]], **_: Any) -> Scores:
        from trl.rewards import get_soft_overlong_punishment

        # it begins at 80 % of the longest, as in the paper
        cache = max(1, max_completion_length // 5)
        return get_soft_overlong_punishment(max_completion_length, cache)(
            completion_ids
        )

    return overlong


PURE = (correctness, closeness, strict_format, soft_format, number_present)
REWARDS: dict[str, Reward] = {function.__name__: function for function in PURE}
# the least that a right answer earns, and the most that a wrong one does
BOUNDS = dict.fromkeys(REWARDS, (0.0, 1.0)) | {"overlong": (-1.0, 0.0)}
BOUNDS |= {"correctness": (1.0, 0.0), "closeness": (1.0, 0.5)}


def margin(weights: dict[str, float]) -> float:
    """Returns by how much the worst right answer outscores the best wrong one."""
    pairs = [(w, *BOUNDS[name]) for name, w in weights.items() if name in BOUNDS]
    return round(sum(w * (right - wrong) for w, right, wrong in pairs), 6)


def choose(
    weights: dict[str, float], max_completion_length: int
) -> tuple[list[Reward], list[float]]:
    """Returns reward functions and their weights, as `GRPOTrainer` takes them."""
    known = REWARDS | {"overlong": punish_overlong(max_completion_length)}
    for name in weights:
        if name not in known:
            raise ConfigError(f"no reward {name!r}; known: {', '.join(known)}")
    return [known[name] for name in weights], list(weights.values())
