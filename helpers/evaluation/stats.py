"""Intervals of counts, means and differences, and a paired test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def proportion(k: int, n: int) -> dict[str, float]:
    """Returns `{"k", "n", "low", "high"}`: a count and its 95 % Wilson interval."""
    from scipy.stats import binomtest

    interval = binomtest(k, n).proportion_ci(confidence_level=0.95, method="wilson")
    low, high = round(float(interval.low), 4), round(float(interval.high), 4)
    return {"k": k, "n": n, "low": low, "high": high}


def mean(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Returns `{"mean", "n", "low", "high"}` with a 95 % bootstrap interval.

    The percentile interval (Efron and Tibshirani, An Introduction to the Bootstrap,
    1993, section 13.3), by resampling the values.
    """
    import numpy as np
    from scipy.stats import bootstrap

    low, high = min(values), max(values)
    if low != high:
        options = {"method": "percentile", "rng": np.random.default_rng(seed)}
        draws = bootstrap((np.asarray(values),), np.mean, batch=500, **options)
        low, high = draws.confidence_interval
    ends = {"low": round(float(low), 4), "high": round(float(high), 4)}
    return {"mean": round(float(np.mean(values)), 4), "n": len(values), **ends}


def paired_difference(first: Sequence[Any], second: Sequence[Any]) -> dict[str, float]:
    """Returns how two models' verdicts or metrics on the same items differ.

    `difference` is the mean of second minus first, with a 95 % bootstrap interval. For
    verdicts, `p` is McNemar's exact two-sided test, the binomial test of the items that
    one model alone got right (Fagerland et al., BMC Med. Res. Methodology 13:91, 2013).
    """
    from scipy.stats import binomtest

    gains = [b - a for a, b in zip(first, second, strict=True)]
    values = mean(gains)
    values = {"difference": values.pop("mean"), **values}
    if isinstance(first[0], bool):
        lost, won = gains.count(-1), gains.count(1)
        p = binomtest(won, won + lost).pvalue if won + lost else 1.0
        values |= {"only_first": lost, "only_second": won, "p": float(f"{p:.3g}")}
    return values
