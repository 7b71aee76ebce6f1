"""Intervals of counts, means and differences, and a paired test."""

from __future__ import annotations

from collections.abc import Sequence

DRAWS = 9999  # bootstrap resamples


def proportion(k: int, n: int) -> dict[str, float]:
    """Returns `{"k", "n", "low", "high"}`: a count and its 95 % Wilson interval.

    >>> {name: round(value, 3) for name, value in proportion(45, 100).items()}
    {'k': 45, 'n': 100, 'low': 0.356, 'high': 0.548}
    """
    from scipy.stats import binomtest

    interval = binomtest(k, n).proportion_ci(confidence_level=0.95, method="wilson")
    low, high = round(float(interval.low), 4), round(float(interval.high), 4)
    return {"k": k, "n": n, "low": low, "high": high}


def mean(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Returns `{"mean", "n", "low", "high"}` with a 95 % bootstrap interval.

    The percentile interval (Efron and Tibshirani, An Introduction to the Bootstrap,
    1993, section 13.3), by resampling the values.

    >>> mean([1.0, 1.0, 1.0])
    {'mean': 1.0, 'n': 3, 'low': 1.0, 'high': 1.0}
    """
    import numpy as np
    from scipy.stats import bootstrap

    centre, low, high = float(np.mean(values)), min(values), max(values)
    if low != high:
        options = {"n_resamples": DRAWS, "batch": 500, "method": "percentile"}
        generator = np.random.default_rng(seed)
        draws = bootstrap((np.asarray(values),), np.mean, rng=generator, **options)
        low, high = draws.confidence_interval
    numbers = {"mean": centre, "n": len(values), "low": float(low), "high": float(high)}
    return {name: round(number, 4) for name, number in numbers.items()}


def compare_verdicts(first: Sequence[bool], second: Sequence[bool]) -> dict[str, float]:
    """Returns how the verdicts on two models' answers to the same items differ.

    `only_first` and `only_second` count the items that one model alone got right. `p`
    is McNemar's exact two-sided test, the binomial test of these two counts (Fagerland,
    Lydersen and Laake, BMC Medical Research Methodology 13:91, 2013). `difference` is
    second minus first, as a share of the items, with its 95 % bootstrap interval.

    >>> test = compare_verdicts([True, False, False, False], [True, True, True, False])
    >>> test["only_first"], test["only_second"], test["difference"], test["p"]
    (0, 2, 0.5, 0.5)

    Raises:
        ValueError: the numbers of items differ.
    """
    from scipy.stats import binomtest

    gains = [int(b) - int(a) for a, b in zip(first, second, strict=True)]
    lost, won = gains.count(-1), gains.count(1)
    difference = mean(gains)
    p = binomtest(won, won + lost).pvalue if won + lost else 1.0
    return {
        "n": len(gains),
        "only_first": lost,
        "only_second": won,
        "difference": difference["mean"],
        "low": difference["low"],
        "high": difference["high"],
        "p": float(f"{p:.3g}"),
    }
