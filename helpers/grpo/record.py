"""What each reward paid for the completions that were last sampled."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

from helpers.evaluation.results import Table
from helpers.grpo.rewards import text_of

Row = dict[str, Any]
ALL_WRONG, ALL_RIGHT = "groups/all_wrong", "groups/all_right"


class Record:
    """The last completions that were sampled, and what each reward paid for them.

    Args:
        weights: of the rewards, by name.
    """

    def __init__(self, weights: dict[str, float]) -> None:
        self.weights = weights
        self.questions: list[str] = []
        self.answers: list[str] = []
        self.paid: dict[str, list[float | None]] = {}

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a reward function that also notes here what it pays."""
        name = function.__name__

        @functools.wraps(function)
        def watched(completions: list[Any], **given: Any) -> list[float | None]:
            paid = function(completions=completions, **given)
            if name in self.paid:  # a new batch has begun
                self.paid = {}
            self.questions = [text_of(p) for p in given.get("prompts", [])]
            self.answers = [text_of(c) for c in completions]
            self.paid[name] = list(paid)
            return paid

        return watched

    @property
    def totals(self) -> list[float]:
        """The weighted sum of the rewards of each answer; None pays nothing."""
        return [
            sum(self.weights[n] * (p[i] or 0.0) for n, p in self.paid.items())
            for i in range(len(self.answers))
        ]

    def groups(self, size: int) -> dict[str, float]:
        """Returns the shares of groups that are all wrong, and all right.

        By `correctness` where that is among the rewards, else by their sum: nothing
        for any, or the same for all.

        Args:
            size: answers to the same problem, which follow each other.
        """
        values = [p or 0.0 for p in self.paid.get("correctness", self.totals)]
        found = [values[i : i + size] for i in range(0, len(values), size)]
        count = max(1, len(found))
        same = [group for group in found if min(group) == max(group)]
        wrong = sum(max(group) <= 0 for group in same)
        return {ALL_WRONG: wrong / count, ALL_RIGHT: (len(same) - wrong) / count}

    def group(self, size: int) -> list[Row]:
        """Returns the answers of one group, best first: one with spread, if any has.

        Each holds `question`, `answer`, `rewards` by name, `reward` and `advantage`.
        """
        totals = self.totals
        starts = range(0, len(totals) - size + 1, size)
        spreads = {
            i: max(totals[i : i + size]) - min(totals[i : i + size]) for i in starts
        }
        if not spreads:
            return []
        first = max(spreads, key=lambda i: (spreads[i], -i))
        chosen = totals[first : first + size]
        mean = sum(chosen) / size
        spread = statistics.stdev(chosen) if size > 1 else 0.0
        rows = [
            {
                "question": self.questions[i] if self.questions else "",
                "answer": self.answers[i],
                "rewards": {name: paid[i] for name, paid in self.paid.items()},
                "reward": round(totals[i], 4),
                # as TRL scales it
                "advantage": round((totals[i] - mean) / (spread + 1e-4), 3),
            }
            for i in range(first, first + size)
        ]
        return sorted(rows, key=lambda row: -row["reward"])


def answers_table(rows: list[Row], count: int = 4) -> Table:
    """Returns the best and the worst answers of a group, with what each reward paid."""
    if len(rows) > count:
        rows = [*rows[: count - count // 2], *rows[-(count // 2) :]]
    names = list(rows[0]["rewards"]) if rows else []
    body = [
        [
            row["answer"][:300],
            *("-" if (p := row["rewards"][n]) is None else f"{p:g}" for n in names),
            f"{row['reward']:g}",
            f"{row['advantage']:+.2f}",
        ]
        for row in rows
    ]
    return Table(["answer", *names, "reward", "advantage"], body)
