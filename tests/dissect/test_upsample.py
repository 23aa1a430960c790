"""Interpolation to the resolution of label maps against PIL, JAX and exact identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinterp.dissect.upsample import taps, upsample, weights

# from -> to: even factors, odd ones, none, halves, thirds, smaller, and one axis up with the other one down
SIZES = [
    ((4, 6), (8, 24)),
    ((3, 3), (9, 15)),
    ((7, 5), (7, 5)),
    ((14, 13), (56, 56)),
    ((5, 4), (8, 7)),
    ((9, 12), (3, 4)),
    ((10, 7), (4, 6)),
    ((3, 16), (12, 5)),
    ((1, 1), (6, 5)),
    ((6, 5), (1, 1)),
]


run = jax.jit(upsample, static_argnums=1)


def maps_of(size, units=3):
    return jnp.asarray(np.random.default_rng(0).normal(size=(*size, units)), jnp.float32)


@pytest.mark.parametrize(("size", "target"), SIZES)
def test_values_are_those_of_pil_and_of_jax(slow, size, target):
    maps = maps_of(size)
    large = np.asarray(run(maps, target))
    assert large.shape == (*target, 3)
    scale = 4 * np.spacing(np.float32(np.abs(maps).max()))
    pil = np.stack([slow.resize(np.asarray(maps[..., k]), target) for k in range(3)], axis=-1)
    np.testing.assert_allclose(large, pil, rtol=0, atol=scale)
    # JAX computes its weights in 32 bits.
    expected = jax.image.resize(maps, (*target, 3), "bilinear")
    np.testing.assert_allclose(large, expected, rtol=0, atol=1e-5)


def test_by_hand():
    row = jnp.array([[[0.0], [4.0]]])
    np.testing.assert_array_equal(run(row, (1, 4)).ravel(), [0, 1, 3, 4])
    np.testing.assert_allclose(run(row, (1, 3)).ravel(), [0, 2, 4], atol=1e-6)
    # Twice as coarse: a triangle over four positions, 1/8, 3/8, 3/8, 1/8; at an edge without the first one.
    coarse = jnp.array([[[7.0], [0.0], [8.0], [0.0], [0.0], [14.0]]])
    np.testing.assert_allclose(run(coarse, (1, 3)).ravel(), [29 / 7, 3, 6], rtol=1e-6)
    # The first axis is that of rows.
    corner = jnp.array([[[0.0]], [[4.0]]])
    np.testing.assert_array_equal(run(corner, (4, 2))[..., 0], [[0, 0], [1, 1], [3, 3], [4, 4]])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 40))
def test_weights(size, target):
    matrix = weights(size, target)
    assert matrix.shape == (target, size)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-15)
    assert matrix.min() >= 0
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-12)
    if target == size:
        np.testing.assert_array_equal(matrix, np.eye(size))
    # A ramp stays a ramp between the edges: position i of the target lies at (i + 1/2) size / target - 1/2.
    if target >= size:
        at = np.clip((np.arange(target) + 0.5) * size / target - 0.5, 0, size - 1)
        np.testing.assert_allclose(matrix @ np.arange(size), at, atol=1e-12 * size)


def test_weights_of_nothing_are_refused():
    for size, target in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match=f"size, target: expected at least 1, got {size} and {target}"):
            weights(size, target)


@pytest.mark.parametrize(("size", "target"), SIZES)
def test_plateaus_and_extremes_are_exact(size, target):
    """A constant map stays as it is; of any other, no value lies beyond its ends."""
    value = np.float32(0.1)
    np.testing.assert_array_equal(run(jnp.full((*size, 3), value), target), value)
    maps = maps_of(size)
    if target == size:
        np.testing.assert_array_equal(run(maps, target), maps)
    maps = jnp.maximum(maps, 0)
    large = np.asarray(run(maps, target))
    assert large.min() >= 0
    if size[0] <= target[0] and size[1] <= target[1]:
        assert (large.max(axis=(0, 1)) <= maps.max(axis=(0, 1))).all()


@pytest.mark.parametrize(("size", "target"), [SIZES[3], SIZES[4], SIZES[6]])
def test_the_same_bits_for_any_number_of_units_in_any_program(size, target):
    maps = maps_of(size, units=37)
    whole = np.asarray(run(maps, target))
    for units in (1, 16):
        few = np.asarray(run(maps[..., :units], target))
        np.testing.assert_array_equal(few.view(np.uint32), whole[..., :units].view(np.uint32))
    several = jax.jit(jax.vmap(lambda one: upsample(one, target)))(jnp.stack([maps, -maps, maps]))
    for one, expected in zip(np.asarray(several), (whole, -whole, whole), strict=True):
        np.testing.assert_array_equal(one, expected)
    # In a program that goes on with the values.
    mask = jax.jit(lambda maps: upsample(maps, target) > whole)(maps)
    assert not np.asarray(mask).any()


def test_an_infinite_value_reaches_its_neighbours_only():
    """9 positions to 5: the first of them bears on two, the last on none but the last two."""
    maps = jnp.ones((9, 1, 1)).at[0].set(jnp.inf)
    found = np.asarray(run(maps, (5, 1))).ravel()
    np.testing.assert_array_equal(found[2:], 1)
    assert not np.isfinite(found[0])


def rounded_steps(maps, target):
    """The interpolation in NumPy's 32-bit floats: every difference, product and sum rounded by itself."""
    for axis, size in ((1, target[1]), (0, target[0])):
        if maps.shape[axis] == size:
            continue
        base, others, factors = taps(maps.shape[axis], size)
        shape = [-1 if i == axis else 1 for i in range(3)]
        start = np.take(maps, base, axis=axis)
        out = start
        for index, factor in zip(others, factors, strict=True):
            out = out + (np.take(maps, index, axis=axis) - start) * factor.reshape(shape)
        maps = out
    return maps


@pytest.mark.parametrize(("size", "target"), SIZES)
def test_every_step_is_rounded_by_itself(size, target):
    """So no bit depends on what a compiler joins into one instruction, nor on the form for even factors."""
    maps = maps_of(size)
    expected = rounded_steps(np.asarray(maps), target)
    assert expected.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(run(maps, target)).view(np.uint32), expected.view(np.uint32))
