"""Intervals and tests: what a count or a difference says, and what chance could do."""

from __future__ import annotations

import math
from collections.abc import Sequence

DRAWS = 9999  # of a bootstrap


def proportion(k: int, n: int) -> dict[str, float]:
    """Returns `{"k", "n", "low", "high"}`: a count and its 95 % Wilson interval.

    >>> {name: round(value, 3) for name, value in proportion(45, 100).items()}
    {'k': 45, 'n': 100, 'low': 0.356, 'high': 0.548}
    """
    from scipy.stats import binomtest

    interval = binomtest(k, n).proportion_ci(confidence_level=0.95, method="wilson")
    low, high = float(interval.low), float(interval.high)
    return {"k": k, "n": n, "low": round(low, 4), "high": round(high, 4)}


def mean(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Returns `{"mean", "n", "low", "high"}` with a 95 % bootstrap interval.

    The percentile interval of means over items drawn with replacement (Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3).

    >>> mean([1.0, 1.0, 1.0])
    {'mean': 1.0, 'n': 3, 'low': 1.0, 'high': 1.0}
    """
    import numpy as np
    from scipy.stats import bootstrap

    centre, low = float(np.mean(values)), float(min(values))
    high = low
    if low != max(values):
        draw = np.random.default_rng(seed)
        options = {"n_resamples": DRAWS, "batch": 500, "method": "percentile"}
        found = bootstrap((np.asarray(values),), np.mean, rng=draw, **options)
        low, high = map(float, found.confidence_interval)
    numbers = {"mean": centre, "n": len(values), "low": low, "high": high}
    return {name: round(number, 4) for name, number in numbers.items()}


def compare(first: Sequence[bool], second: Sequence[bool]) -> dict[str, float]:
    """Returns how two models differ on the same items.

    `only_first` and `only_second` count the items that one of them got right; `p` is
    McNemar's exact test, two-sided: the binomial one of these two counts (Fagerland,
    Lydersen and Laake, BMC Medical Research Methodology 13:91, 2013). `difference`
    is second minus first, as a share of the items, with its 95 % bootstrap interval
    over items.

    >>> found = compare([True, False, False, False], [True, True, True, False])
    >>> found["only_first"], found["only_second"], found["difference"], found["p"]
    (0, 2, 0.5, 0.5)

    Raises:
        ValueError: the models did not answer the same number of items.
    """
    from scipy.stats import binomtest

    pairs = list(zip(first, second, strict=True))
    lost = sum(a and not b for a, b in pairs)
    won = sum(b and not a for a, b in pairs)
    found = mean([float(b) - float(a) for a, b in pairs])
    p = binomtest(won, won + lost).pvalue if won + lost else 1.0
    return {
        "n": len(pairs),
        "only_first": lost,
        "only_second": won,
        "difference": found["mean"],
        "low": found["low"],
        "high": found["high"],
        "p": float(f"{p:.3g}"),
    }


def pass_at_k(n: int, right: int, k: int) -> float:
    """Returns the chance that one of k answers is right, unbiased, from n of them.

    Chen et al., arXiv:2107.03374, equation 1: 1 - C(n - right, k) / C(n, k).

    >>> pass_at_k(4, 1, 1), round(pass_at_k(10, 3, 5), 4), pass_at_k(10, 6, 5)
    (0.25, 0.9167, 1.0)

    Raises:
        ValueError: there are fewer than k answers.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} answers: k from 1 to {n} expected")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
