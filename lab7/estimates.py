"""Estimates with their 95 % intervals over conditions, from what each picture contributes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest
from torch import Tensor

from lab7.errors import UserError

_RESAMPLES = 2000
Values = Sequence[float] | np.ndarray | Tensor


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; a single value has no interval.

    A share also says what it is made of: `hits` of `total`.
    """

    value: float
    low: float | None
    high: float | None
    hits: int | None = None
    total: int | None = None


def share(numerators: Values, denominators: Values, groups: Values | None = None) -> Estimate:
    """Estimate a share: the sum of numerators over the sum of denominators, for instance hits.

    The interval is the percentile bootstrap over groups, a cluster bootstrap (Efron and
    Tibshirani, “An Introduction to the Bootstrap”, 1993): 2,000 resamples, always the same. Where
    the share is 0 or 1 the bootstrap would give no width, and the interval is Wilson's for as many
    trials as there are groups.

    Args:
        numerators: (B,), one for each picture.
        denominators: (B,), likewise; 0 / 0 counts as 0.
        groups: (B,) integers; pictures with the same number share a condition and are resampled
            together. None: every picture by itself.

    Raises:
        UserError: `groups` of another shape.
    """
    value, low, high, count = _bootstrap(_ratio, [numerators, denominators], groups)
    if value in (0, 1):
        alike = wilson(round(value) * count, count)
        low, high = alike.low, alike.high
    hits, total = (round(float(np.sum(np.asarray(x)))) for x in (numerators, denominators))
    return Estimate(value, low, high, hits, total)


def mean(values: Values, groups: Values | None = None) -> Estimate:
    """Estimate the mean of values (B,), with the bootstrap over groups of `share`."""
    value, low, high, _ = _bootstrap(_ratio, [values, np.ones(len(values))], groups)
    return Estimate(value, low, high)


def difference(
    first: tuple[Values, Values], second: tuple[Values, Values], groups: Values | None = None
) -> Estimate:
    """Estimate the difference of two shares, first minus second, over the same groups.

    The bootstrap is paired: a resample takes the same groups for both.

    Args:
        first: Numerators and denominators, see `share`; (B,) each.
        second: The same of the other share; (B,) each.
        groups: (B,), see `share`.
    """
    value, low, high, _ = _bootstrap(
        lambda sums: _ratio(sums[:2]) - _ratio(sums[2:]), [*first, *second], groups
    )
    return Estimate(value, low, high)


def wilson(hits: int, total: int) -> Estimate:
    """Estimate a share from independent trials, for instance the objects of one published draw.

    Wilson's interval: “Probable Inference, the Law of Succession, and Statistical Inference”, 1927.
    """
    if not total:
        return Estimate(0.0, 0.0, 1.0, 0, 0)
    found = binomtest(hits, total).proportion_ci(0.95, method="wilson")
    return Estimate(hits / total, float(found.low), float(found.high), hits, total)


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[0] / np.maximum(sums[1], 1)


def _bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], columns: Sequence[Values], groups: Values | None
) -> tuple[float, float, float, int]:
    """Return a statistic of the columns' sums, its interval, and the number of groups."""
    table = np.stack([np.asarray(column, dtype=float) for column in columns], axis=1)
    groups = np.arange(len(table)) if groups is None else np.asarray(groups)
    if groups.shape != table.shape[:1]:
        raise UserError(f"groups must be ({len(table)},), not {groups.shape}")
    names, rows = np.unique(groups, return_inverse=True)
    totals, count = np.zeros((len(names), len(columns))), len(names)
    np.add.at(totals, rows, table)
    rng = np.random.default_rng(0)
    draws = (rng.integers(count, size=count) for _ in range(_RESAMPLES))
    sums = np.array([np.bincount(draw, minlength=count) @ totals for draw in draws])
    low, high = np.percentile(statistic(sums.T), (2.5, 97.5))
    return float(statistic(totals.sum(0))), float(low), float(high), count
