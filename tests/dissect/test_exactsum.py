"""Sums that depend on nothing but the values, against math.fsum."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxinterp.dissect import exactsum

init, update, merge = exactsum.init, jax.jit(exactsum.update), jax.jit(exactsum.merge)
SMALLEST = np.finfo(np.float32).smallest_subnormal
LARGEST = np.finfo(np.float32).max

normal = st.floats(width=32, allow_nan=False, allow_infinity=False)
extreme = st.sampled_from([0.0, -0.0, SMALLEST, -SMALLEST, 1e-38, LARGEST, -LARGEST, 1.0, -1.0])
columns = arrays(np.float32, (8, 2), elements=normal | extreme.map(float))
quick = settings(max_examples=60, deadline=None, derandomize=True)


def fsum(values):
    """[N,*shape] summed over N, exactly, rounded once to 64 bits."""
    flat = values.reshape(len(values), -1).astype(np.float64)
    return np.reshape([math.fsum(column) for column in flat.T], values.shape[1:])


def of(values, batches=None):
    """The statistic of values [N,...]."""
    sums = init(*values.shape[1:])
    for batch in np.split(values, batches or []):
        sums = update(sums, jnp.asarray(batch))
    return sums


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@quick
@given(columns, st.permutations(range(8)))
def test_sums_are_those_of_fsum_in_any_order_and_batches(values, order):
    sums = of(values)
    np.testing.assert_array_equal(exactsum.result(sums), fsum(values))
    np.testing.assert_array_equal(exactsum.mean(sums), fsum(values) / 8)
    assert exactsum.count(sums) == 8
    assert_same(of(values[list(order)], [4]), sums)


@quick
@given(columns, columns, columns)
def test_merging_is_associative_and_commutative_in_every_bit(a, b, c):
    x, y, z = of(a), of(b), of(c)
    whole = merge(merge(x, y), z)
    assert_same(merge(x, merge(y, z)), whole)
    assert_same(merge(z, merge(y, x)), whole)
    np.testing.assert_array_equal(exactsum.result(whole), fsum(np.concatenate([a, b, c])))
    assert exactsum.count(whole) == 24


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1e30, 1.0, -1e30], 1.0),
        ([1.0, SMALLEST, -1.0], SMALLEST),
        ([LARGEST, LARGEST, LARGEST], 3 * float(LARGEST)),
        ([-1.5, -2.25], -3.75),
        ([1e-38, -SMALLEST, -1e-38], -SMALLEST),
        ([0.1] * 10, 10 * float(np.float32(0.1))),
        ([2.0**24, 1.0, 1.0, 1.0], 2**24 + 3),
        ([0.0, -0.0], 0.0),
    ],
)
def test_by_hand(values, expected):
    assert float(exactsum.result(of(np.array(values, np.float32)))) == float(expected)


def test_many_values_of_the_largest_mantissa(rng):
    """64 batches of 64: far beyond what one 32-bit counter holds."""
    values = np.full((4096, 1), np.nextafter(np.float32(2), np.float32(0)), np.float32)
    values[::3] *= -1
    sums = of(values, list(range(64, 4096, 64)))
    np.testing.assert_array_equal(exactsum.result(sums), fsum(values))
    spread = (rng.normal(size=(640, 3)) * 10.0 ** rng.uniform(-30, 30, (640, 3))).astype(np.float32)
    np.testing.assert_array_equal(exactsum.result(of(spread, list(range(64, 640, 64)))), fsum(spread))


def test_the_result_is_rounded_once():
    """2^53 + 1 + 2^-30 lies above the middle of two doubles, 2^53 + 1 exactly in it."""
    for little, expected in ((2.0**-30, 2.0**53 + 2), (0.0, 2.0**53), (-(2.0**-30), 2.0**53)):
        assert float(exactsum.result(of(np.array([2.0**53, 1.0, little], np.float32)))) == expected


def test_values_that_do_not_count(rng):
    values = rng.normal(size=(8, 2)).astype(np.float32)
    valid = np.array([True, False, True, True, False, False, True, True])
    values[1] = np.nan
    sums = update(init(2), jnp.asarray(values), jnp.asarray(valid))
    np.testing.assert_array_equal(exactsum.result(sums), fsum(values[valid]))
    assert exactsum.count(sums) == 5
    np.testing.assert_array_equal(exactsum.mean(sums), fsum(values[valid]) / 5)


def test_what_is_not_finite_is_marked(rng):
    values = rng.normal(size=(4, 5)).astype(np.float32)
    values[1, 0], values[2, 2], values[3, 3] = np.nan, np.inf, -np.inf
    sums = of(values, [2])
    total = exactsum.result(sums)
    np.testing.assert_array_equal(np.isnan(total), [True, False, True, True, False])
    np.testing.assert_array_equal(total[[1, 4]], fsum(values[:, [1, 4]]))
    assert np.isnan(exactsum.result(merge(of(np.abs(values)), of(0 * values[:1] + 1)))[2])
    np.testing.assert_array_equal(np.asarray(sums.bad.low), [1, 0, 1, 1, 0])


def test_nothing_has_the_sum_0_and_no_mean():
    sums = init(2)
    assert exactsum.result(sums).tolist() == [0, 0]
    assert np.isnan(exactsum.mean(sums)).all()
    assert float(exactsum.mean(of(np.array([1.0, 2.0], np.float32)))) == 1.5


def test_every_shape_and_half_precision(rng):
    values = rng.normal(size=(5, 2, 3)).astype(np.float32)
    np.testing.assert_array_equal(exactsum.result(of(values)), fsum(values))
    half = jnp.asarray(values, jnp.bfloat16)
    np.testing.assert_array_equal(exactsum.result(update(init(2, 3), half)), fsum(np.asarray(half, np.float32)))


def test_too_many_values_at_once_are_refused():
    with pytest.raises(ValueError, match="values: expected at most 64 at once, got 65"):
        exactsum.update(init(1), jnp.zeros((65, 1)))


@pytest.mark.parametrize("positions", [1, 2, 3, 7, 12])
def test_fold_is_a_sum_with_the_same_bits_in_every_batch(rng, positions):
    x = rng.normal(size=(positions, 6, 5)).astype(np.float32)
    whole = np.asarray(jax.jit(exactsum.fold)(x))
    np.testing.assert_allclose(whole, x.astype(np.float64).sum(axis=0), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(jax.jit(exactsum.fold)(x[:, 2:3])), whole[2:3])
    integers = np.arange(positions * 2, dtype=np.float32).reshape(positions, 2)
    np.testing.assert_array_equal(exactsum.fold(jnp.asarray(integers)), integers.sum(axis=0))
