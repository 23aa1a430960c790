"""The images of the highest maxima, against sorted lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.dissect import topimages
from jaxinterp.dissect.topimages import NONE

update, merge = jax.jit(topimages.update), jax.jit(topimages.merge)
update_maps = jax.jit(topimages.update_maps)


def listed(features, k, numbers=None):
    """For every unit the k pairs (value, number) with the highest maxima; of equal ones the lower number first."""
    numbers = range(len(features)) if numbers is None else numbers
    maxima = features.max(axis=(1, 2))
    found = [sorted(zip(-column, numbers, strict=True))[:k] for column in maxima.T]
    return np.array([[-v for v, _ in one] for one in found]), np.array([[i for _, i in one] for one in found])


@pytest.fixture(scope="module")
def features():
    """Twelve images of many ties, negative values among them."""
    return np.random.default_rng(0).integers(-3, 4, (12, 2, 2, 6)).astype(np.float32) - 2


def of(features, k, batches=(), numbers=None):
    numbers = np.arange(len(features)) if numbers is None else numbers
    top = topimages.init(features.shape[-1], k)
    for maps, of_batch in zip(np.split(features, batches), np.split(numbers, batches), strict=True):
        top = update(top, jnp.asarray(maps), jnp.asarray(of_batch, jnp.int32))
    return top


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("k", [1, 3, 12])
def test_the_highest_maxima_in_falling_order(features, k):
    value, image = listed(features, k)
    top = of(features, k)
    np.testing.assert_array_equal(top.value, value)
    np.testing.assert_array_equal(top.image, image)
    found = topimages.result(top)
    assert type(found.value) is type(found.image) is np.ndarray
    np.testing.assert_array_equal(found.value, value)
    np.testing.assert_array_equal(found.image, image)


def test_neither_batches_nor_order_matter(features):
    whole = of(features, 5)
    for cuts in ([4, 8], [5, 10], [1, 2, 3]):
        assert_same(of(features, 5, cuts), whole)
    order = np.random.default_rng(1).permutation(12)
    assert_same(of(features[order], 5, [4, 8], order), whole)


def test_merging_is_associative_and_commutative(features):
    a, b, c = (
        update(topimages.init(6, 5), jnp.asarray(features[i : i + 4]), jnp.arange(i, i + 4, dtype=jnp.int32))
        for i in (0, 4, 8)
    )
    whole = of(features, 5)
    for merged in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(merge(c, a), b)):
        assert_same(merged, whole)


def test_fewer_images_than_places(features):
    top = of(features[:2], 4)
    value, image = listed(features[:2], 2)
    np.testing.assert_array_equal(top.value[:, :2], value)
    np.testing.assert_array_equal(top.image[:, :2], image)
    assert (np.asarray(top.value[:, 2:]) == -np.inf).all()
    assert (np.asarray(top.image[:, 2:]) == NONE).all()
    assert_same(merge(top, topimages.init(6, 4)), top)


def test_images_that_do_not_count(features):
    valid = np.array([True, False, True, True, False, True] * 2)
    high = np.where(valid[:, None, None, None], features, 100)
    top = update(topimages.init(6, 9), jnp.asarray(high), jnp.arange(12, dtype=jnp.int32), jnp.asarray(valid))
    value, image = listed(features[valid], 8, np.flatnonzero(valid))
    np.testing.assert_array_equal(top.value[:, :8], value)
    np.testing.assert_array_equal(top.image[:, :8], image)
    assert (np.asarray(top.image[:, 8]) == NONE).all()


def test_zeros_of_both_signs_are_equal():
    features = np.array([0.0, -0.0, 0.0], np.float32).reshape(3, 1, 1, 1)
    assert of(features, 3).image.tolist() == [[0, 1, 2]]
    assert of(features[::-1], 3, numbers=np.array([2, 1, 0])).image.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("size", [2, 5, 11])
def test_feature_maps_on_top_images(size, rng):
    """In any batches, and in two halves that are merged, the maps are those that indexing by the numbers gives."""
    images, units, k = 11, 4, 3
    features = rng.normal(size=(images, 2, 5, units)).astype(np.float32)
    numbers = rng.permutation(100)[:images].astype(np.int32)
    top = update(topimages.init(units, k), features, numbers)
    halves = [topimages.no_maps(units, k, (2, 5)) for _ in range(2)]
    for start in range(0, images, size):
        rows = np.arange(start, start + size)
        valid, rows = rows < images, np.minimum(rows, images - 1)
        which = start // size % 2
        halves[which] = update_maps(halves[which], features[rows], numbers[rows], valid, top.image)
    found = topimages.merge_maps(*halves)
    place = {int(number): row for row, number in enumerate(numbers)}
    for unit in range(units):
        for i in range(k):
            expected = features[place[int(top.image[unit, i])], ..., unit]
            np.testing.assert_array_equal(found[unit, i], expected)
            assert float(expected.max()) == float(top.value[unit, i])


def test_there_is_no_feature_map_without_an_image(rng):
    features = rng.normal(size=(2, 1, 1, 3)).astype(np.float32)
    top = update(topimages.init(3, 4), features, np.array([0, 1], np.int32), np.array([True, False]))
    maps = topimages.no_maps(3, 4, (1, 1))
    maps = update_maps(maps, features, np.array([0, 0], np.int32), np.array([True, False]), top.image)
    np.testing.assert_array_equal(maps[:, 0, 0, 0], features[0, 0, 0])
    assert np.isneginf(maps[:, 1:]).all()
