"""Intervals and tests, against published numbers and other ways to compute them."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from helpers.evaluation import stats as intervals

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
    found = intervals.proportion(k, n)
    assert (found["k"], found["n"]) == (k, n)
    assert found["low"] == pytest.approx(low, abs=6e-5)
    assert found["high"] == pytest.approx(high, abs=6e-5)


def test_a_proportion_has_the_published_interval_of_81_of_263():
    # Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, score method
    found = intervals.proportion(81, 263)
    assert (found["low"], found["high"]) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_four_times_the_problems_halve_the_interval():
    few, many = intervals.proportion(45, 100), intervals.proportion(180, 400)
    ratio = (few["high"] - few["low"]) / (many["high"] - many["low"])
    assert ratio == pytest.approx(2, rel=0.05)


def verdicts(
    both: int, first: int, second: int, neither: int
) -> list[tuple[bool, bool]]:
    """Pairs of verdicts with these counts."""
    counts = ((True, True), both), ((True, False), first)
    counts += ((False, True), second), ((False, False), neither)
    return [pair for pair, count in counts for _ in range(count)]


def test_mcnemar_is_the_binomial_test_of_the_items_that_differ():
    pairs = verdicts(both=40, first=5, second=15, neither=40)
    found = intervals.compare(*zip(*pairs, strict=True))
    tail = sum(math.comb(20, k) for k in range(6)) / 2**20
    assert found["p"] == pytest.approx(2 * tail, rel=1e-2)
    assert (found["only_first"], found["only_second"], found["n"]) == (5, 15, 100)


def test_the_difference_has_an_interval_near_that_of_the_normal_distribution():
    pairs = verdicts(both=100, first=60, second=100, neither=140)
    found = intervals.compare(*zip(*pairs, strict=True))
    half = Z * math.sqrt((160 - 40**2 / 400) / 400**2)
    assert found["difference"] == 0.1
    assert (found["low"], found["high"]) == pytest.approx(
        (0.1 - half, 0.1 + half), abs=6e-3
    )


def test_models_with_the_same_verdicts_do_not_differ():
    found = intervals.compare([True, False, True], [True, False, True])
    assert (found["p"], found["low"], found["difference"], found["high"]) == (
        1,
        0,
        0,
        0,
    )


def test_models_that_answered_other_numbers_of_items_are_refused():
    with pytest.raises(ValueError, match="shorter|longer"):
        intervals.compare([True], [True, False])


def test_a_bootstrap_interval_is_the_same_each_time():
    draw = random.Random(1)
    values = [draw.random() for _ in range(50)]
    assert intervals.mean(values) == intervals.mean(values)
    assert intervals.mean(values)["low"] < intervals.mean(values)["mean"]


@pytest.mark.parametrize(
    ("n", "right", "k"), [(5, 2, 1), (5, 2, 3), (6, 1, 4), (4, 0, 2)]
)
def test_pass_at_k_is_the_share_of_choices_of_k_with_a_right_one(n, right, k):
    answers = [True] * right + [False] * (n - right)
    choices = list(itertools.combinations(answers, k))
    share = sum(map(any, choices)) / len(choices)
    assert intervals.pass_at_k(n, right, k) == pytest.approx(share)


def test_pass_at_more_than_all_answers_is_refused():
    with pytest.raises(ValueError, match="pass@5 of 4 answers: k from 1 to 4"):
        intervals.pass_at_k(4, 1, 5)
