"""The consistency of neurons: levels by hand, merging, ties, what chance gives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp import Network
from jaxinterp.dissect import consistency, topimages

AFFINITY = consistency.affinity([[0, 2, 4], [2, 0, 4], [4, 4, 0]], sigma=2.0)


def statistic(maxima, share, order=None, size=7):
    """The statistic of units' maxima [N,U], batch by batch."""
    count, units = maxima.shape
    order = np.arange(count) if order is None else order
    top = consistency.init(units, count, share)
    for start in range(0, count, size):
        chosen = order[start : start + size]
        top = consistency.update(top, jnp.asarray(maxima[chosen])[:, None, None, :], jnp.asarray(chosen))
    return top


def test_levels_by_hand():
    labels = np.array([0, 0, 1, 2, 2, 2, 2, 2])
    maxima = np.zeros((8, 3), np.float32)
    maxima[[0, 1], 0] = [2, 3]  # one class
    maxima[[0, 2], 1] = [2, 3]  # siblings
    maxima[[1, 3], 2] = [2, 3]  # further apart
    found = consistency.result(statistic(maxima, 0.25), labels, AFFINITY)
    far = np.exp(-16 / 8)
    np.testing.assert_allclose(found.level, [1, (1 + np.exp(-0.5)) / 2, (1 + far) / 2], rtol=1e-6)
    np.testing.assert_allclose(found.fractions, [[1, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5]])
    assert not found.tied.any()


def test_any_order_batches_and_shares_give_the_same(rng):
    labels = rng.integers(0, 3, 60)
    maxima = rng.integers(0, 12, (60, 5)).astype(np.float32)  # many ties
    first = statistic(maxima, 0.1)
    for size in (1, 60):
        other = statistic(maxima, 0.1, rng.permutation(60), size)
        np.testing.assert_array_equal(first.image, other.image)
    halves = []
    for half in (np.arange(0, 60, 2), np.arange(1, 60, 2)):
        empty = consistency.init(5, 60, 0.1)
        halves.append(consistency.update(empty, jnp.asarray(maxima[half])[:, None, None, :], jnp.asarray(half)))
    merged = consistency.merge(*halves)
    np.testing.assert_array_equal(first.image, merged.image)
    found = consistency.result(first, labels, AFFINITY)
    order = np.lexsort((np.arange(60)[:, None].repeat(5, 1).T, -maxima.T))[:, :6]
    expected = [np.bincount(labels[row], minlength=3) / 6 for row in order]
    np.testing.assert_allclose(found.fractions, expected, rtol=1e-6)


def test_many_top_images_are_sorted_as_few_are_compared(rng, monkeypatch):
    values = rng.integers(0, 30, (200, 2)).astype(np.float32)
    few = topimages.update(topimages.init(2, 64), jnp.asarray(values)[:, None, None], jnp.arange(200))
    monkeypatch.setattr(topimages, "_FEW", 8)
    many = topimages.update(topimages.init(2, 64), jnp.asarray(values)[:, None, None], jnp.arange(200))
    np.testing.assert_array_equal(few.image, many.image)
    np.testing.assert_array_equal(few.value, many.value)
    padded = topimages.update(topimages.init(2, 64), jnp.asarray(values[:3])[:, None, None], jnp.arange(3))
    assert (padded.image[:, 3:] == topimages.NONE).all()


def test_ties_and_units_that_prefer_nothing():
    maxima = np.array([[6, 0, 1], [6, 0, 2], [6, 0, 2], [1, 0, 2]], np.float32)
    found = consistency.result(statistic(maxima, 0.5), np.array([0, 0, 1, 2]), AFFINITY)
    np.testing.assert_array_equal(found.constant, [True, True, True])
    np.testing.assert_array_equal(found.tied, [True, True, True])
    assert np.isnan(found.level).all()
    maxima = np.array([[3], [2], [2], [1]], np.float32)
    found = consistency.result(statistic(maxima, 0.5), np.array([0, 0, 1, 2]), AFFINITY)
    assert (bool(found.tied[0]), bool(found.constant[0]), float(found.level[0])) == (True, False, 1.0)


def test_chance_is_the_mean_over_all_draws():
    labels = np.array([0, 0, 1, 1, 2, 2, 2])
    draws = []
    for chosen in itertools.combinations(labels, 3):
        p = np.bincount(chosen, minlength=3) / 3
        draws.append(p @ np.asarray(AFFINITY) @ p)
    assert consistency.chance(labels, AFFINITY, 3) == pytest.approx(np.mean(draws), rel=1e-6)


def test_of_a_layer_equals_its_activations(rng):
    def apply(params, images, tap):
        maps = tap("maps", jnp.einsum("bhwc,cu->bhwu", images, params))
        return maps.mean((1, 2))

    network = Network("n", apply, ("maps",), 4, 5)
    params = jax.random.normal(jax.random.key(0), (3, 5))
    images, labels = rng.random((23, 4, 4, 3), np.float32), rng.integers(0, 3, 23)
    maps = np.einsum("bhwc,cu->bhwu", images, np.asarray(params))
    for pool, values in (("max", maps.max((1, 2))), ("mean", maps.mean((1, 2)))):
        found = consistency.of(network, params, "maps", images, labels, AFFINITY, share=0.2, pool=pool, batch_size=6)
        expected = [np.bincount(labels[np.argsort(-v, kind="stable")[:5]], minlength=3) / 5 for v in values.T]
        np.testing.assert_allclose(found.fractions, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="has no node 'map'; did you mean 'maps'"):
        consistency.of(network, params, "map", images, labels, AFFINITY)
    with pytest.raises(ValueError, match="labels must be one for each of 23 images, got 22"):
        consistency.of(network, params, "maps", images, labels[1:], AFFINITY)


def test_bad_input():
    for share, message in ((0.0, "share must be above 0"), (1.0, "below 1"), (0.99, "leaves no other images")):
        with pytest.raises(ValueError, match=message):
            consistency.count(20, share)
    assert [consistency.count(n) for n in (100, 101, 1000)] == [1, 2, 10]
    with pytest.raises(ValueError, match="sigma must be positive"):
        consistency.affinity([[0.0]], sigma=0)
    with pytest.raises(ValueError, match=r"distances must be \[K,K\]"):
        consistency.affinity([[0.0, 1.0]])
    top = consistency.init(2, 10, 0.2)
    with pytest.raises(ValueError, match="pool must be one of max, mean, got 'min'"):
        consistency.update(top, jnp.zeros((1, 1, 1, 2)), jnp.arange(1), pool="min")
    with pytest.raises(ValueError, match="top has seen 0 images, expected more than 2"):
        consistency.result(top, np.zeros(10, int), AFFINITY)
    with pytest.raises(ValueError, match="labels must be from 0 to 2"):
        consistency.result(top, np.full(10, 3), AFFINITY)
