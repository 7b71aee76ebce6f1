"""Intervals and tests, against published numbers and other ways to compute them."""

from __future__ import annotations

import math
import random

import pytest

from helpers.evaluation import metrics as stats

Z = 1.959963984540054  # the 97.5 % point of the normal distribution


@pytest.mark.parametrize(
    ("k", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (45, 100), (1, 7), (180, 400)]
)
def test_a_proportion_has_the_wilson_interval(k: int, n: int) -> None:
    p = k / n  # the closed formula, without scipy
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    ends = (max(0.0, centre - half), min(1.0, centre + half))
    interval = stats.proportion(k, n)
    assert (interval["k"], interval["n"]) == (k, n)
    assert (interval["low"], interval["high"]) == pytest.approx(ends, abs=6e-5)


def test_a_proportion_has_the_published_interval_of_81_of_263() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, score method
    interval = stats.proportion(81, 263)
    ends = (interval["low"], interval["high"])
    assert ends == pytest.approx((0.2553, 0.3662), abs=1e-4)


def verdicts(*counts: int) -> tuple[list[bool], list[bool]]:
    """Verdicts on two models: both right, only the first, only the second, none."""
    kinds = ((True, True), (True, False), (False, True), (False, False))
    pairs = [k for k, n in zip(kinds, counts, strict=True) for _ in range(n)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def test_mcnemar_is_the_binomial_test_of_the_items_that_differ() -> None:
    test = stats.paired_difference(*verdicts(40, 5, 15, 40))
    tail = sum(math.comb(20, k) for k in range(6)) / 2**20
    assert test["p"] == pytest.approx(2 * tail, rel=1e-2)
    assert (test["only_first"], test["only_second"], test["n"]) == (5, 15, 100)
    assert "p" not in stats.paired_difference([0.5, 0.25], [1.0, 0.5])


def test_the_difference_has_an_interval_near_that_of_the_normal_distribution() -> None:
    test = stats.paired_difference(*verdicts(100, 60, 100, 140))
    half = Z * math.sqrt((160 - 40**2 / 400) / 400**2)
    assert test["difference"] == 0.1
    ends = (test["low"], test["high"])
    assert ends == pytest.approx((0.1 - half, 0.1 + half), abs=6e-3)


def test_a_bootstrap_interval_is_the_same_each_time() -> None:
    draw = random.Random(1)
    values = [draw.random() for _ in range(50)]
    interval = stats.mean(values)
    assert interval == stats.mean(values)
    assert interval["low"] < interval["mean"] < interval["high"]
