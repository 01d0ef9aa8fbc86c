"""Intervals: of shares, means and paired differences, over conditions."""

import numpy as np
import pytest
import torch

from lab7.estimates import Estimate, difference, mean, share, wilson

GROUPS = torch.arange(32).repeat(8)


def test_all_and_none_right_count_conditions():
    ones = torch.ones(256)
    found = share(ones, ones, GROUPS)
    assert (found.value, found.high, found.hits, found.total) == (1, 1, 256, 256)
    assert found.low == pytest.approx(32 / (32 + 1.959964**2))
    none = share(0 * ones, ones, GROUPS)
    assert (none.value, none.low) == (0, 0) and none.high == pytest.approx(1 - found.low)


@pytest.mark.parametrize("wrong", [1, 2, 128, 254, 255])
def test_shares_stay_within_their_range(wrong):
    right = torch.ones(256)
    right[:wrong] = 0
    found = share(right, torch.ones(256), GROUPS)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_means_have_the_bootstraps_interval_and_no_shares():
    assert mean([0.0] * 64, GROUPS[:64]) == Estimate(0, 0, 0), "copies, all at distance 0"
    values = np.random.default_rng(1).normal(3, 0.5, 256)
    found = mean(values)
    assert found.value == pytest.approx(values.mean()) and found.hits is None
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 16, rel=0.1)
    alike = mean(values[:32].repeat(8), np.arange(32).repeat(8))
    assert alike.high - alike.low > 2 * (found.high - found.low)


def test_differences_are_paired():
    hard = np.random.default_rng(0).random(32).repeat(8)
    first, ones = (np.random.default_rng(1).random(256) > hard) * 1.0, np.ones(256)
    second, groups = first * (np.arange(256) % 8 > 0), np.arange(32).repeat(8)
    found = difference((first, ones), (second, ones), groups)
    assert found.value == pytest.approx(first.mean() - second.mean())
    alone = share(first, ones, groups)
    assert 0 < found.low and found.high - found.low < 0.5 * (alone.high - alone.low)
    assert difference((first, ones), (first, ones), groups) == Estimate(0, 0, 0)


def test_wilson_is_the_formula():
    z, hits, total = 1.959964, 67, 72
    middle, margin = hits + z**2 / 2, z * np.sqrt(hits * (total - hits) / total + z**2 / 4)
    found = wilson(hits, total)
    assert (found.value, found.hits, found.total) == (hits / total, hits, total)
    for bound, sign in ((found.low, -1), (found.high, 1)):
        assert bound == pytest.approx((middle + sign * margin) / (total + z**2))


def test_groups_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"groups must be \(4,\), not \(3,\)"):
        mean([1, 2, 3, 4], [0, 1, 1])
