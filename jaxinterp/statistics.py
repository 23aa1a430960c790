"""Estimates with their spread: means over pictures with bootstrap intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

_FEW = 6  # values, below which a bootstrap interval is too short


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval, over `count` finite values; all NaN where there are none."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def interval(self) -> tuple[float, float, float]:
        """(mean, low, high) for drawing; an interval that a single value cannot give has no width."""
        return (self.mean, self.mean, self.mean) if self.count == 1 else (self.mean, self.low, self.high)

    def within(self, low: float | int, high: float | int) -> Estimate:
        """The interval without what lies outside the range that values have."""
        return dataclasses.replace(
            self, low=float(np.clip(self.low, low, high)), high=float(np.clip(self.high, low, high))
        )

    def __format__(self, spec: str) -> str:
        if self.count == 0:
            return "-"
        spec = spec or ".3f"
        if self.count == 1:
            return f"{self.mean:{spec}} (one picture)"
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def bootstrap_mean(
    values: Sequence[Any] | np.ndarray,
    *,
    seed: int,
    level: float = 0.95,
    bounds: tuple[float | int, float | int] | None = None,
) -> Estimate:
    """The mean of the finite values with a bias-corrected and accelerated bootstrap interval.

    Resampling values that are all alike shows no spread: the interval has no width then, unless `bounds` are given. Of
    fewer than six values the interval is Student's: resampling never leaves their range, which five values of one sign
    share by chance once in sixteen times.

    Args:
        values: one for each picture; those that are not finite are left out.
        seed: of the resampling.
        level: of the interval.
        bounds: between which values can lie, such as 0 and 1 of successes. Where all are alike, the interval allows
            for as many at a bound as may exist without one of them being seen: 20 of 20 are no proof of all.
    """
    from scipy.stats import bootstrap

    finite = np.asarray(values, np.float64)
    finite = finite[np.isfinite(finite)]
    if finite.size == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    mean = float(np.mean(finite))
    if finite.size == 1:
        return Estimate(mean, float("nan"), float("nan"), 1)
    if finite.size < _FEW:
        return student_mean(finite, level=level, bounds=bounds)
    if np.ptp(finite) == 0:
        return _alike(mean, finite.size, level, bounds)
    interval = bootstrap(
        (finite,), np.mean, confidence_level=level, rng=np.random.default_rng(seed)
    ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high), int(finite.size))


def _alike(mean: float, count: int, level: float, bounds: tuple[float | int, float | int] | None) -> Estimate:
    """Of values that show no spread."""
    unseen = proportion(0, count, level=level).high
    low, high = (mean, mean) if bounds is None else (mean + unseen * (bound - mean) for bound in bounds)
    return Estimate(mean, low, high, count)


def student_mean(
    values: Sequence[Any] | np.ndarray,
    *,
    level: float = 0.95,
    bounds: tuple[float | int, float | int] | None = None,
) -> Estimate:
    """The mean of the finite values with Student's interval, for a few independent runs, which a bootstrap underrates.

    Args:
        values: one for each run; those that are not finite are left out.
        level: of the interval.
        bounds: between which values can lie; see `bootstrap_mean`.
    """
    from scipy.stats import t

    finite = np.asarray(values, np.float64)
    finite = finite[np.isfinite(finite)]
    if finite.size < 2:
        mean = float(finite[0]) if finite.size else float("nan")
        return Estimate(mean, float("nan"), float("nan"), int(finite.size))
    mean, error = float(np.mean(finite)), float(np.std(finite, ddof=1) / np.sqrt(finite.size))
    if np.ptp(finite) == 0:
        return _alike(mean, finite.size, level, bounds)
    reach = float(t.ppf((1 + level) / 2, finite.size - 1)) * error
    low, high = (-np.inf, np.inf) if bounds is None else map(float, bounds)
    return Estimate(mean, max(mean - reach, low), min(mean + reach, high), int(finite.size))


def spearman(a: Sequence[Any] | np.ndarray, b: Sequence[Any] | np.ndarray) -> float:
    """Spearman's rank correlation; NaN of fewer than three pairs, or where one side is constant."""
    from scipy.stats import spearmanr

    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(spearmanr(np.asarray(a), np.asarray(b)).statistic)  # type: ignore[attr-defined]  # not in its stubs


def proportion(count: int, total: int, *, level: float = 0.95) -> Estimate:
    """A share with its exact interval (Clopper and Pearson 1934); NaN where there are none."""
    from scipy.stats import binomtest

    if total == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    interval = binomtest(count, total).proportion_ci(level, method="exact")
    return Estimate(count / total, float(interval.low), float(interval.high), total)


def difference(a: tuple[int, int], b: tuple[int, int], *, level: float = 0.95) -> Estimate:
    """How much larger the share of `b` is than that of `a`, of independent counts.

    The interval is Newcombe's, of Wilson's two (1998, Statistics in Medicine 17:873, method 10). It has a width where
    both shares are 0 or 1, too.

    Args:
        a: a count, and of how many.
        b: likewise.
        level: of the interval.
    """
    from scipy.stats import binomtest

    if not a[1] or not b[1]:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    (p, low_p, high_p), (q, low_q, high_q) = (
        (count / total, *binomtest(count, total).proportion_ci(level, method="wilson")) for count, total in (a, b)
    )
    low, high = q - p - np.hypot(q - low_q, high_p - p), q - p + np.hypot(high_q - q, p - low_p)
    return Estimate(q - p, float(low), float(high), min(a[1], b[1]))
