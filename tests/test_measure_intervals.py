"""Intervals against scipy, and how often they hold the truth."""

import math

import numpy as np
import pytest
from scipy import stats

from mlx_mtp.measure.intervals import paired_ratio, percentile, spread, t_quantile, unpaired_ratio


@pytest.mark.parametrize("freedom", [*range(1, 31), 60])
def test_quantiles_are_students(freedom):
    assert t_quantile(freedom) == pytest.approx(
        stats.t.ppf(0.975, freedom), abs=0.021 if freedom > 30 else 6e-4
    )


def test_a_spread_is_the_t_interval_of_the_mean():
    values = [10.0, 10.4, 9.9, 10.1, 10.3, 9.8]
    low, high = stats.t.interval(0.95, 5, np.mean(values), stats.sem(values))
    found = spread(values)
    assert found.median == 10.05
    assert (found.least, found.most, found.count) == (9.8, 10.4, 6)
    assert found.half_width == pytest.approx((high - low) / 2 / 10.05, rel=1e-3)


def test_noise_is_what_is_wider_than_two_percent():
    assert not spread([100, 101, 100, 101, 100]).is_noisy
    assert spread([100, 110, 100, 110, 100]).is_noisy
    assert spread([100.0]).is_noisy


def test_intervals_hold_the_truth_as_often_as_they_say():
    random = np.random.default_rng(1)
    inside = paired = unpaired = 0
    for _ in range(400):
        a = 10 * np.exp(random.normal(0, 0.02, 6))
        drift = np.exp(random.normal(0, 0.3, 6))
        b = 5 * np.exp(random.normal(0, 0.02, 6))
        one = paired_ratio(list(a * drift), list(b * drift))
        paired += one.low <= 2.0 <= one.high
        assert one.high / one.low < 1.2, "what both arms meet drops out of their ratio"
        two = unpaired_ratio(list(a), list(b))
        unpaired += two.low <= 2.0 <= two.high
        found = spread(list(a))
        inside += abs(np.mean(a) - 10) <= found.half_width * found.median
    assert 365 <= inside <= 395
    assert 365 <= paired <= 395
    assert 365 <= unpaired <= 400


def test_welch_agrees_with_scipy():
    a, b = [1.0, 1.1, 0.9, 1.05], [2.0, 2.3, 2.1, 1.9, 2.2]
    found = unpaired_ratio(a, b)
    theirs = stats.ttest_ind(np.log(a), np.log(b), equal_var=False).confidence_interval()
    # Ours takes whole degrees of freedom, rounded down: a little wider.
    assert math.exp(theirs.low) * 0.97 < found.low <= math.exp(theirs.low)
    assert math.exp(theirs.high) <= found.high < math.exp(theirs.high) * 1.03


def test_one_value_has_no_interval_and_equal_ones_a_point():
    assert paired_ratio([2.0], [1.0]).high > 1e6
    assert unpaired_ratio([2.0], [1.0, 1.0]).high > 1e6
    same = paired_ratio([2.0, 2.0], [1.0, 1.0])
    assert same.low == same.value == same.high == pytest.approx(2.0)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95, 1.0])
def test_percentiles_are_numpys(share):
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    assert percentile(values, share) == pytest.approx(np.percentile(values, 100 * share))
