"""What each reward paid, by answer and by group."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.grpo.record import ALL_RIGHT, ALL_WRONG, Record, answers_table


@pytest.fixture
def record() -> Record:
    """Three groups of two: all right, mixed, all wrong."""
    made = Record({"correctness": 1.0, "style": 0.5})

    def correctness(completions: list[Any], **_: Any) -> list[float | None]:
        return [1.0, 1.0, 0.0, 1.0, 0.0, None]

    def style(completions: list[Any], **_: Any) -> list[float | None]:
        return [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]

    prompts = [[{"role": "user", "content": q}] for q in "aabbcc"]
    for function in (correctness, style):
        watched = made.watch(function)
        assert watched.__name__ == function.__name__  # TRL logs under it
        watched(prompts=prompts, completions=list("123456"), gold=list("112233"))
    return made


def test_groups_without_gradient_are_counted_as_all_wrong_or_all_right(
    record: Record,
) -> None:
    found = record.groups(2)
    assert found == {
        ALL_WRONG: pytest.approx(1 / 3),
        ALL_RIGHT: pytest.approx(1 / 3),
    }


def test_the_group_that_is_shown_is_the_one_with_the_largest_spread(
    record: Record,
) -> None:
    rows = record.group(2)
    assert [(r["question"], r["answer"]) for r in rows] == [("b", "4"), ("b", "3")]
    assert [r["reward"] for r in rows] == [1.0, 0.5]
    assert (
        rows[0]["advantage"] == -rows[1]["advantage"] == pytest.approx(0.707, abs=1e-3)
    )
    assert rows[1]["rewards"] == {"correctness": 0.0, "style": 1.0}


def test_a_new_batch_replaces_the_last(record: Record) -> None:
    def correctness(completions: list[Any], **_: Any) -> list[float | None]:
        return [0.0, 0.0]

    record.watch(correctness)(completions=["7", "8"])
    assert record.answers == ["7", "8"] and record.totals == [0.0, 0.0]


def test_of_a_large_group_the_best_and_the_worst_answers_are_shown() -> None:
    rows = [
        {"answer": str(n), "rewards": {"r": None}, "reward": n, "advantage": 0.5}
        for n in range(8, 0, -1)
    ]
    shown = answers_table(rows).rows
    assert [row[0] for row in shown] == ["8", "7", "2", "1"]
    assert shown[0][1:] == ["-", "8", "+0.50"]
