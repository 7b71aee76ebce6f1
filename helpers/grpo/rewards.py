"""Text -> float reward functions; the answer parser behind them is in `answers`.

The functions follow TRL's contract: lists in, one float a completion out; None where
the gold answer cannot be graded, which is not the same as 0.0 for a wrong one. What a
completion copies from its prompt earns nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

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
Reward = Callable[..., list[float | None]]


def text_of(completion: Completion) -> str:
    """Returns the text of a completion, conversational or plain."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def own_texts(
    completions: list[Completion], prompts: list[Completion] | None
) -> list[str]:
    """Returns the text of each completion, without what it copies from its prompt."""
    texts = [text_of(completion) for completion in completions]
    if prompts is None:
        return texts
    asked = [
        p if isinstance(p, str) else "\n".join(m["content"] for m in p) for p in prompts
    ]
    return [own_words(text, prompt) for text, prompt in zip(texts, asked, strict=True)]


def correctness(
    completions: list[Completion],
    gold: list[str],
    prompts: list[Completion] | None = None,
    **_: Any,
) -> list[float | None]:
    """Returns 1.0 for a right answer, 0.0 for a wrong one, None without a gold answer.

    >>> correctness(["1 + 1 = 2\\n#### 2", "#### 3", "2"], gold=["2", "2", "?"])
    [1.0, 0.0, None]
    """
    return [
        None
        if parse_number(g) is None and parse_expression(g) is None
        else float(is_correct(text, g))
        for text, g in zip(own_texts(completions, prompts), gold, strict=True)
    ]


def closeness(
    completions: list[Completion],
    gold: list[str],
    prompts: list[Completion] | None = None,
    **_: Any,
) -> list[float | None]:
    """Returns 1.0 for a right number, 0.5 within 10 %, 0.25 within 20 %.

    0.0 else, and None without a gold number. A guess of the right size is paid, too:
    keep its weight well below that of `correctness`.

    >>> closeness(["#### 100", "#### 92", "#### 8", "2"], gold=["100"] * 3 + ["?"])
    [1.0, 0.5, 0.0, None]
    """
    scores: list[float | None] = []
    for text, written in zip(own_texts(completions, prompts), gold, strict=True):
        value, answer = parse_number(written), extract_answer(text)
        if value is None:
            scores.append(None)
            continue
        off = None if answer is None else abs(answer - value)
        steps = [(1.0, Fraction(0)), (0.5, abs(value) / 10), (0.25, abs(value) / 5)]
        paid = [pay for pay, most in steps if off is not None and off <= most]
        scores.append(max(paid, default=0.0))
    return scores


def strict_format(
    completions: list[Completion], prompts: list[Completion] | None = None, **_: Any
) -> list[float | None]:
    """Returns 1.0 where the text is working and one final `#### <number>` line.

    >>> strict_format(["2 + 3 = 5\\n#### 5", "The answer is 5"])
    [1.0, 0.0]
    """
    return [float(has_strict_format(text)) for text in own_texts(completions, prompts)]


def soft_format(
    completions: list[Completion], prompts: list[Completion] | None = None, **_: Any
) -> list[float | None]:
    """Returns 1.0 where `####` and a number stand once, wherever that is.

    >>> soft_format(["It is #### 5 nuts.", "The answer is 5"])
    [1.0, 0.0]
    """
    return [float(has_soft_format(text)) for text in own_texts(completions, prompts)]


def number_present(
    completions: list[Completion], prompts: list[Completion] | None = None, **_: Any
) -> list[float | None]:
    """Returns 1.0 where the text gives one answer that is a number, marked or not.

    >>> number_present(["#### 5", "no idea", "1 2 3 4 5"])
    [1.0, 0.0, 0.0]
    """
    return [
        float(extract_answer(text) is not None and text.count(MARKER) <= 1)
        for text in own_texts(completions, prompts)
    ]


def punish_overlong(max_completion_length: int) -> Reward:
    """Returns DAPO's soft overlong punishment, a reward from 0.0 down to -1.0.

    Equation 13 of DAPO (arXiv 2503.14476), as TRL has it: nothing up to 80 % of the
    longest completion in tokens, then a straight line to -1.0 where it is cut. The 20 %
    are the paper's, 4,096 of 20,480 tokens.

    >>> overlong = punish_overlong(100)
    >>> overlong(completion_ids=[[1] * 80, [1] * 90, [1] * 100])
    [0.0, -0.5, -1.0]
    """
    from trl.rewards import get_soft_overlong_punishment

    cache = max(1, max_completion_length // 5)
    punish = get_soft_overlong_punishment(max_completion_length, cache)

    def overlong(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return punish(completion_ids)

    return overlong


REWARDS: dict[str, Reward] = {
    "correctness": correctness,
    "closeness": closeness,
    "strict_format": strict_format,
    "soft_format": soft_format,
    "number_present": number_present,
}
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
    """Returns reward functions and their weights, as `GRPOTrainer` takes them.

    >>> functions, weights = choose({"correctness": 1.0, "overlong": 0.2}, 64)
    >>> [f.__name__ for f in functions], weights
    (['correctness', 'overlong'], [1.0, 0.2])

    Args:
        weights: by the reward's name.
        max_completion_length: in tokens, where completions are cut.

    Raises:
        ValueError: a reward is not known.
    """
    functions = []
    for name in weights:
        if name not in REWARDS and name != "overlong":
            known = ", ".join([*REWARDS, "overlong"])
            raise ValueError(f"no reward {name!r}; known: {known}")
        functions.append(REWARDS.get(name) or punish_overlong(max_completion_length))
    return functions, list(weights.values())
