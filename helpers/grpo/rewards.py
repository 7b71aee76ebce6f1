"""Rewards, by the answer parser: text -> float functions.

They keep TRL's contract: lists in, one float a completion out; None where the gold
answer cannot be graded, which is not the 0.0 of a wrong one. What a completion copies
from its prompt earns nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from helpers.errors import ConfigError
from helpers.grpo.answers import (
    MARKER,
    extract_answer,
    has_soft_format,
    has_strict_format,
    is_correct,
    own_words,
    parse_expression,
    parse_number,
)

Completion = str | list[dict[str, str]]
Prompts = list[Completion] | None
Reward = Callable[..., list[float | None]]
ALL_WRONG, ALL_RIGHT = "groups/all_wrong", "groups/all_right"  # logged shares


def text_of(completion: Completion) -> str:
    """Returns the text of a completion, conversational or plain."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def own_texts(completions: list[Completion], prompts: Prompts) -> list[str]:
    """Returns the text of each completion, without what it copies from its prompt."""
    texts = [text_of(completion) for completion in completions]
    if prompts is None:
        return texts
    questions = [
        p if isinstance(p, str) else "\n".join(m["content"] for m in p) for p in prompts
    ]
    return [own_words(text, q) for text, q in zip(texts, questions, strict=True)]


def correctness(
    completions: list[Completion],
    gold: list[str],
    prompts: Prompts = None,
    log_metric: Callable[[str, float], None] | None = None,
    **_: Any,
) -> list[float | None]:
    """Returns 1.0 for a right answer, 0.0 for a wrong one, None without a gold answer.

    Through TRL's `log_metric` it logs the shares of groups that teach nothing, as all
    of their answers are wrong, or all right.

    >>> correctness(["1 + 1 = 2\\n#### 2", "#### 3", "2"], gold=["2", "2", "?"])
    [1.0, 0.0, None]
    """
    scores = [
        None
        if parse_number(g) is None and parse_expression(g) is None
        else float(is_correct(text, g))
        for text, g in zip(own_texts(completions, prompts), gold, strict=True)
    ]
    if log_metric is not None and prompts:
        pairs = itertools.groupby(zip(prompts, scores, strict=True), lambda p: p[0])
        groups = [[score or 0.0 for _, score in group] for _, group in pairs]
        log_metric(ALL_WRONG, sum(max(group) == 0 for group in groups) / len(groups))
        log_metric(ALL_RIGHT, sum(min(group) == 1 for group in groups) / len(groups))
    return scores


def closeness(
    completions: list[Completion], gold: list[str], prompts: Prompts = None, **_: Any
) -> list[float | None]:
    """Returns 1.0 for a right number, 0.5 within 10 %, 0.25 within 20 %, else 0.0.

    None without a gold number. A guess of the right size is paid, too: keep its weight
    well below that of `correctness`.

    >>> closeness(["#### 100", "#### 92", "#### 8", "2"], gold=["100"] * 3 + ["?"])
    [1.0, 0.5, 0.0, None]
    """
    texts = own_texts(completions, prompts)
    scores: list[float | None] = []
    for text, value in zip(texts, map(parse_number, gold), strict=True):
        answer = extract_answer(text)
        if value is None or answer is None:
            scores.append(None if value is None else 0.0)
            continue
        off, size = abs(answer - value), abs(value)
        near = 0.5 if 10 * off <= size else 0.25 if 5 * off <= size else 0.0
        scores.append(1.0 if off == 0 else near)
    return scores


def strict_format(
    completions: list[Completion], prompts: Prompts = None, **_: Any
) -> list[float | None]:
    """Returns 1.0 where the text is working and one final `#### <number>` line.

    >>> strict_format(["2 + 3 = 5\\n#### 5", "The answer is 5"])
    [1.0, 0.0]
    """
    return [float(has_strict_format(text)) for text in own_texts(completions, prompts)]


def soft_format(
    completions: list[Completion], prompts: Prompts = None, **_: Any
) -> list[float | None]:
    """Returns 1.0 where `####` and a number stand once, wherever that is."""
    return [float(has_soft_format(text)) for text in own_texts(completions, prompts)]


def number_present(
    completions: list[Completion], prompts: Prompts = None, **_: Any
) -> list[float | None]:
    """Returns 1.0 where the text gives one answer that is a number, marked or not."""
    return [
        float(extract_answer(text) is not None and text.count(MARKER) <= 1)
        for text in own_texts(completions, prompts)
    ]


def punish_overlong(max_completion_length: int) -> Reward:
    """Returns DAPO's soft overlong punishment, a reward from 0.0 down to -1.0.

    Equation 13 of DAPO (arXiv 2503.14476), as TRL has it: nothing up to 80 % of the
    longest completion in tokens, then a straight line to -1.0 where it is cut. The 20 %
    are the paper's, 4,096 of 20,480 tokens.
    """

    def overlong(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        from trl.rewards import get_soft_overlong_punishment

        cache = max(1, max_completion_length // 5)
        punish = get_soft_overlong_punishment(max_completion_length, cache)
        return punish(completion_ids)

    return overlong


PURE = (correctness, closeness, strict_format, soft_format, number_present)
REWARDS: dict[str, Reward] = {function.__name__: function for function in PURE}
# of each reward, the least that a right answer earns and the most that a wrong one does
BOUNDS = {
    "correctness": (1.0, 0.0),
    "closeness": (1.0, 0.5),
    "strict_format": (0.0, 1.0),
    "soft_format": (0.0, 1.0),
    "number_present": (0.0, 1.0),
    "overlong": (-1.0, 0.0),
}


def margin(weights: dict[str, float]) -> float:
    """Returns by how much the worst right answer outscores the best wrong one.

    Not above zero, training may prefer a wrong answer. Rewards not of this module are
    left out, and weights are taken as positive.

    >>> margin({"correctness": 1.0, "strict_format": 0.2, "overlong": 0.25})
    0.55
    """
    pairs = [(w, *BOUNDS[name]) for name, w in weights.items() if name in BOUNDS]
    return round(sum(w * (right - wrong) for w, right, wrong in pairs), 6)


def choose(
    weights: dict[str, float], max_completion_length: int
) -> tuple[list[Reward], list[float]]:
    """Returns the reward functions and their weights, as `GRPOTrainer` takes them.

    Args:
        weights: by the reward's name; ConfigError where it is not known.
        max_completion_length: in tokens, where completions are cut.
    """
    known = REWARDS | {"overlong": punish_overlong(max_completion_length)}
    for name in weights:
        if name not in known:
            raise ConfigError(f"no reward {name!r}; known: {', '.join(known)}")
    return [known[name] for name in weights], list(weights.values())
