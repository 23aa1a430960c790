"""Mean and variance over positions against exact fractions, in any batches and on any devices."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.dissect import moments, shares

UNITS = 5
update = jax.jit(moments.update)


@pytest.fixture(scope="module")
def features():
    """Units of several scales; one is a large mean with a small spread, one is constant, one has both signs."""
    x = np.random.default_rng(0).normal(size=(16, 3, 5, UNITS)).astype(np.float32)
    x[..., 0] = 1000 + x[..., 0] / 100
    x[..., 1] = 0.1
    x[..., 2] *= np.float32(10.0) ** np.random.default_rng(1).integers(-8, 8, x.shape[:3])
    return x


def exact(features):
    """Mean and variance as fractions, rounded once to float64."""
    rows = []
    for column in features.reshape(-1, features.shape[-1]).T:
        values = [Fraction(float(v)) for v in column]
        mean = sum(values) / len(values)
        rows.append((float(mean), float(sum(v * v for v in values) / len(values) - mean * mean)))
    return np.array(rows).T


def test_mean_and_variance_are_those_of_fractions(features):
    found = moments.result(update(moments.init(UNITS), features))
    assert found.count == 16 * 15
    mean, variance = exact(features)
    np.testing.assert_array_equal(found.mean, mean)
    np.testing.assert_array_equal(found.variance, variance)
    assert found.variance[1] == 0
    wide = features.reshape(-1, UNITS).astype(np.float64)
    np.testing.assert_allclose(found.mean, wide.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.variance, wide.var(axis=0), rtol=1e-9)


@pytest.mark.parametrize(("devices", "batch"), [(1, 1), (1, 5), (1, 16), (2, 2), (2, 8), (4, 4), (8, 8), (8, 16)])
def test_batches_and_devices_change_no_bit(features, meshes, devices, batch):
    mesh = meshes[devices]
    states = shares.start(moments.init, mesh, UNITS)
    step = shares.step(moments.update, mesh, (True, True))
    for start in range(0, 16, batch):
        rows = np.arange(start, start + batch)
        maps, valid = features[np.minimum(rows, 15)], rows < 16
        states = step(states, *shares.placed((maps, valid), mesh))
    merged = shares.merged(states, moments.merge, mesh)
    jax.tree.map(np.testing.assert_array_equal, merged, update(moments.init(UNITS), features))
    mean, variance = exact(features)
    found = moments.result(merged)
    np.testing.assert_array_equal(found.mean, mean)
    np.testing.assert_array_equal(found.variance, variance)


def test_what_does_not_count_and_what_is_not_finite(features):
    x = features.copy()
    x[1], x[2, 0, 0, 3], x[3, 0, 0, 4] = np.nan, np.inf, 1e30
    valid = np.arange(16) != 1
    found = moments.result(update(moments.init(UNITS), x, jnp.asarray(valid)))
    assert found.count == 15 * 15
    mean, variance = exact(features[valid])
    np.testing.assert_array_equal(found.mean[:3], mean[:3])
    np.testing.assert_array_equal(found.variance[:3], variance[:3])
    assert np.isnan(found.mean).tolist() == [False, False, False, True, False]
    assert np.isnan(found.variance[3:]).all()  # 1e60 is no float32
    nothing = moments.result(moments.init(2))
    assert nothing.count == 0
    assert np.isnan(nothing.mean).all()
    assert np.isnan(nothing.variance).all()
