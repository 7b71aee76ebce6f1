"""Evaluation: what is counted, and what a run with these sets reports."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from helpers import data, evaluation, results
from helpers.runs import Run

Z = 1.959963984540054  # the 97.5 % point of the normal distribution


def wilson(k: int, n: int) -> tuple[float, float]:
    """The interval by its closed formula, without scipy."""
    p = k / n
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


@pytest.mark.parametrize(
    ("k", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (45, 100), (1, 7), (180, 400)]
)
def test_a_proportion_has_the_wilson_interval(k, n):
    low, high = wilson(k, n)
    found = evaluation.proportion(k, n)
    assert (found["k"], found["n"]) == (k, n)
    assert found["low"] == pytest.approx(low, abs=6e-5)
    assert found["high"] == pytest.approx(high, abs=6e-5)


def test_a_proportion_has_the_published_interval_of_81_of_263():
    # Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, score method
    found = evaluation.proportion(81, 263)
    assert (found["low"], found["high"]) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_four_times_the_problems_halve_the_interval():
    few, many = evaluation.proportion(45, 100), evaluation.proportion(180, 400)
    ratio = (few["high"] - few["low"]) / (many["high"] - many["low"])
    assert ratio == pytest.approx(2, rel=0.05)


def test_a_summary_counts_answers_formats_stops_and_tokens():
    verdicts = [(True, True, True, 10), (True, False, True, 20), (False, True, True, 5)]
    verdicts.append((False, False, False, 64))
    keys = ("correct", "strict_format", "stopped", "tokens")
    items = [dict(zip(keys, verdict, strict=True)) for verdict in verdicts]
    assert evaluation.summarise(items) == {
        "accuracy": evaluation.proportion(2, 4),
        "strict_format": evaluation.proportion(2, 4),
        "stop_rate": 0.75,
        "tokens": 99,
    }


CHATS = {
    "stages": ["sft"],
    "data__train": ["data_samples/dolly.jsonl"],
    "data__eval": None,
    "data__eval_share": 0.2,
    "data__test_share": 0.2,
    "data__problems": None,
    "data__test": None,
    "data__test_new": None,
    "evaluation__max_new_tokens": 4,
}


def test_a_run_with_held_out_conversations_reports_their_losses(
    run_factory: Callable[..., Run],
) -> None:
    run = run_factory(**CHATS)
    data.prepare(run)
    part = evaluation.evaluate(run, "base")
    assert part["perplexity"] == pytest.approx(math.exp(part["eval_loss"]), rel=1e-3)
    test = part["test_chat"]
    assert test["perplexity"] == pytest.approx(math.exp(test["loss"]), rel=1e-3)
    assert "accuracy" not in part


def test_held_out_conversations_are_answered_for_reading(
    run_factory: Callable[..., Run],
) -> None:
    run = run_factory(**CHATS)
    data.prepare(run)
    evaluation.evaluate(run, "base")
    held_out = data.read_rows(run.path / "data" / "test_chat.jsonl")
    table = results.examples(run, count=1)
    assert table.header == ["question", "base"]
    question = data.questions_of(held_out[0]["messages"])[0]
    assert table.rows[0][0].startswith(question)


def test_a_run_that_holds_nothing_out_says_which_fields_to_set(
    run_factory: Callable[..., Run],
) -> None:
    nothing = {**CHATS, "data__eval_share": None, "data__test_share": None}
    run = run_factory(**nothing, best_by="loss", sft__eval_strategy="no")
    data.prepare(run)
    with pytest.raises(
        data.DataError, match="set data.eval_share or .*, data.eval, or"
    ):
        evaluation.evaluate(run, "base")


@pytest.mark.parametrize(
    ("changes", "sets"),
    [
        ({}, ["eval", "test", "test_new"]),
        ({"data__test_new": None}, ["eval", "test"]),
        (CHATS, ["eval", "test_chat"]),
    ],
)
def test_what_is_held_out_is_what_the_config_says(
    run_factory: Callable[..., Run], changes: dict[str, Any], sets: list[str]
) -> None:
    assert evaluation.held_out(run_factory(**changes).config) == sets
