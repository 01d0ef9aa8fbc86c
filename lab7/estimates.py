"""Numbers with their 95 % intervals: over conditions for a share, over seeds for a mean."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
import torch

_RESAMPLES = 2000
_Z = 1.959964  # 97.5 % quantile of the normal distribution


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


def share(
    above: np.ndarray | torch.Tensor,
    below: np.ndarray | torch.Tensor,
    groups: torch.Tensor | None = None,
) -> Estimate:
    """Estimate a ratio of two sums over pictures.

    The interval is the percentile bootstrap over groups (Efron and Tibshirani, “An Introduction to
    the Bootstrap”, 1993): 2,000 resamples, always the same. Where the ratio is 0 or 1 the bootstrap
    would give no width, and it is Wilson's interval for that many pictures (Wilson, 1927).

    Args:
        above: (B,), what each picture adds to the sum above the line.
        below: (B,), and to that below; 0 / 0 counts as 0.
        groups: (B,) integers; pictures with the same number are resampled together. None: every
            picture by itself.

    Raises:
        ValueError: `groups` of another shape.
    """
    count = len(above)
    columns = np.stack([np.asarray(above), np.asarray(below)], axis=1).astype(float)
    groups = np.arange(count) if groups is None else torch.as_tensor(groups).cpu().numpy()
    if groups.shape != (count,):
        raise ValueError(f"groups must be ({count},), not {groups.shape}")
    names, rows = np.unique(groups, return_inverse=True)
    totals = np.zeros((len(names), 2))
    np.add.at(totals, rows, columns)
    rng = np.random.default_rng(0)
    draws = (rng.integers(len(names), size=len(names)) for _ in range(_RESAMPLES))
    sums = np.array([np.bincount(draw, minlength=len(names)) @ totals for draw in draws])
    low, high = np.percentile(sums[:, 0] / np.maximum(sums[:, 1], 1), (2.5, 97.5))
    hits, total = columns.sum(0)
    value, margin = hits / max(total, 1), _Z**2 / (count + _Z**2)
    if value == 1:
        low, high = 1 - margin, 1.0
    elif value == 0:
        low, high = 0.0, margin
    return Estimate(float(value), float(low), float(high), round(hits), round(total))


def aggregate(values: Sequence[float]) -> Estimate:
    """Return the mean over repetitions (seeds) and its 95 % interval.

    The interval is Student's: mean ± t(0.975, n - 1)·s/√n. A single value has none.

    Raises:
        ValueError: No values.
    """
    if len(values) == 0:
        raise ValueError("there is nothing to aggregate: no values")
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return Estimate(mean, None, None)
    error = float(np.std(values, ddof=1)) / count**0.5
    margin = float(scipy.stats.t.ppf(0.975, count - 1)) * error
    return Estimate(mean, mean - margin, mean + margin)
