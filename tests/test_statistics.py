"""Bootstrap intervals: known coverage, degenerate samples, reproducibility."""

import math

import numpy as np
import pytest

from jaxinterp.statistics import bootstrap_mean, difference, proportion, student_mean


def test_the_interval_has_the_width_that_theory_gives(rng):
    values = rng.standard_normal(400)
    estimate = bootstrap_mean(values, seed=0)
    half = float(1.96 * np.std(values, ddof=1) / 20)
    assert estimate.mean == pytest.approx(np.mean(values))
    assert estimate.low == pytest.approx(estimate.mean - half, abs=0.15 * half)
    assert estimate.high == pytest.approx(estimate.mean + half, abs=0.15 * half)


def test_about_one_interval_in_twenty_misses(rng):
    hits = 0
    for seed in range(120):
        estimate = bootstrap_mean(rng.normal(3.0, 2.0, 30), seed=seed)
        hits += estimate.low <= 3.0 <= estimate.high
    assert 0.87 * 120 <= hits <= 120


def test_values_that_are_not_finite_are_left_out_and_counted():
    estimate = bootstrap_mean([1.0, math.nan, 3.0, math.inf], seed=0)
    assert (estimate.mean, estimate.count) == (2.0, 2)
    assert bootstrap_mean([math.nan], seed=0).count == 0
    assert format(bootstrap_mean([], seed=0)) == "-"


def test_degenerate_samples():
    one = bootstrap_mean([0.25], seed=0)
    assert (one.mean, one.count) == (0.25, 1)
    assert math.isnan(one.low)
    assert one.interval == (0.25, 0.25, 0.25)
    assert format(one, ".2f") == "0.25 (one picture)"
    same = bootstrap_mean([0.5, 0.5, 0.5], seed=0)
    assert (same.low, same.high) == (0.5, 0.5)


def test_values_that_are_all_alike_have_the_interval_of_a_share():
    found, exact = bootstrap_mean([1.0] * 20, seed=0, bounds=(0, 1)), proportion(20, 20)
    np.testing.assert_allclose(found.interval, exact.interval, rtol=1e-12)
    difference = bootstrap_mean([0.0] * 20, seed=0, bounds=(-1, 1))
    np.testing.assert_allclose([difference.low, difference.high], [exact.low - 1, 1 - exact.low], rtol=1e-12)
    assert bootstrap_mean([0, 1] * 9, seed=0, bounds=(0, 1)) == bootstrap_mean([0, 1] * 9, seed=0)


def test_students_interval():
    """The published quantile of Student's distribution with two degrees of freedom, 4.302653; runs that are alike."""
    found = student_mean([1.0, 2.0, 3.0, math.nan])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.high - 2.0 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert student_mean([1.0, 2.0, 3.0], bounds=(-9, 9)) == student_mean([1.0, 2.0, 3.0])
    bound = student_mean([0.1, 0.2, 0.9], bounds=(0, 1))
    assert (bound.low, bound.high) == (0.0, 1.0)


def test_an_interval_within_the_range_of_its_values():
    found = student_mean([0.1, 0.2, 0.9]).within(0, 1)
    assert (found.low, found.high, found.count) == (0.0, 1.0, 3)
    assert found.mean == pytest.approx(0.4)
    assert math.isnan(bootstrap_mean([0.25], seed=0).within(0, 1).low)


def test_of_a_few_values_the_interval_is_students():
    """Resampling two values never leaves their range, and would settle by two of one sign what chance gives in half."""
    few = [0.2, 0.5, 0.3, 0.4, 0.1]
    assert bootstrap_mean(few, seed=0) == student_mean(few)
    two = bootstrap_mean([0.9, 1.1], seed=0)
    assert two.low < 0 < two.high
    six = [*few, 0.6]
    assert min(six) < bootstrap_mean(six, seed=0).low
    assert bootstrap_mean(six, seed=0) != student_mean(six)
    same = student_mean([64.0] * 3)
    assert (same.low, same.high) == (64.0, 64.0)
    share = proportion(0, 3).high
    same = student_mean([64.0] * 3, bounds=(-64, 64))
    np.testing.assert_allclose([same.low, same.high], [64 - 128 * share, 64])


def test_the_same_seed_gives_the_same_interval(rng):
    values = rng.random(20)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_the_interval_of_a_share_is_the_exact_one():
    none, most = proportion(0, 10), proportion(9, 10)
    np.testing.assert_allclose([none.mean, none.low, none.high], [0, 0, 1 - 0.025**0.1], rtol=1e-9)
    # Clopper and Pearson: P(X >= 9 | low) = P(X <= 9 | high) = 0.025.
    low, high = most.low, most.high
    np.testing.assert_allclose([10 * low**9 * (1 - low) + low**10, 1 - high**10], 0.025, rtol=1e-6)
    assert proportion(0, 0).count == 0


@pytest.mark.parametrize(
    ("a", "b", "low", "high"),
    [  # Newcombe 1998, table II, method 10
        ((48, 80), (56, 70), 0.0524, 0.3339),
        ((3, 10), (9, 10), 0.1705, 0.8090),
        ((2, 7), (6, 7), 0.0582, 0.8062),
        ((0, 29), (5, 56), -0.0381, 0.1926),
        ((0, 20), (0, 10), -0.1611, 0.2775),
        ((0, 10), (10, 10), 0.6075, 1.0),
    ],
)
def test_the_difference_of_two_shares_has_newcombes_interval(a, b, low, high):
    found = difference(a, b)
    assert (found.mean, found.count) == (pytest.approx(b[0] / b[1] - a[0] / a[1]), min(a[1], b[1]))
    assert (found.low, found.high) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


def test_a_difference_from_nothing_is_no_number():
    found = difference((0, 0), (3, 4))
    assert np.isnan(found.mean)
    assert found.count == 0
