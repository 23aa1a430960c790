"""Statistics of several devices: one share each, merged once."""

import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.dissect import quantiles, shares, topimages, wide


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 7, 8])
def test_any_number_of_shares_is_merged_once_each(number):
    counts = np.array([[2**31 - 65536 - i, 65535 << (i % 8), 3**i] for i in range(number)], np.int32)
    states = wide.Wide(jnp.asarray(counts & 65535), jnp.asarray(counts >> 16))
    whole = shares.merged(states, wide.merge, None)
    np.testing.assert_array_equal(wide.total(whole), counts.sum(axis=0, dtype=np.int64))


@pytest.mark.parametrize("number", [3, 5])
def test_merging_keeps_the_order_of_statistics_that_have_one(number):
    """Numbers of images are unique, so the merged list is that of all images."""
    features = np.random.default_rng(0).normal(size=(number * 2, 2, 2, 3)).astype(np.float32)
    numbers = np.arange(number * 2, dtype=np.int32)
    whole = topimages.update(topimages.init(3, 4), jnp.asarray(features), jnp.asarray(numbers))
    states = jax.vmap(lambda x, i: topimages.update(topimages.init(3, 4), x, i))(
        features.reshape(number, 2, 2, 2, 3), numbers.reshape(number, 2)
    )
    jax.tree.map(np.testing.assert_array_equal, shares.merged(states, topimages.merge, None), whole)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_every_device_counts_its_own_examples(meshes, devices):
    mesh = meshes[devices]
    assert shares.count(mesh) == devices
    features = np.random.default_rng(0).normal(size=(16, 2, 2, 3)).astype(np.float32)
    valid = np.arange(16) % 3 > 0
    states = shares.start(topimages.init, mesh, 3, 4)
    assert states.value.shape == (devices, 3, 4)
    step = shares.step(topimages.update, mesh, (True, True, True))
    for part in (slice(0, 8), slice(8, 16)):
        states = step(states, *shares.placed((features[part], np.arange(16, dtype=np.int32)[part], valid[part]), mesh))
    if mesh is not None:
        assert len(states.value.sharding.device_set) == devices
        share = np.asarray(states.image)[0]
        mine = set(range(8 // devices)) | set(range(8, 8 + 8 // devices))
        assert set(share.ravel().tolist()) <= mine | {topimages.NONE}
    whole = shares.merged(states, topimages.merge, mesh)
    expected = topimages.update(
        topimages.init(3, 4), jnp.asarray(features), jnp.arange(16, dtype=jnp.int32), jnp.asarray(valid)
    )
    jax.tree.map(np.testing.assert_array_equal, whole, expected)
    assert whole.value.is_fully_replicated


def test_a_mesh_is_one_process_or_all(meshes, monkeypatch):
    assert [shares.processes(mesh) for mesh in meshes.values()] == [1, 1, 1, 1]
    of = inspect.unwrap(shares.processes)
    two = SimpleNamespace(devices=np.array([[SimpleNamespace(process_index=i)] for i in (0, 0, 1, 1)]))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert of(two) == 2
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    assert of(None) == 1
    with pytest.raises(ValueError, match="mesh: expected devices of one process or of all 3, got 2"):
        of(two)


def test_replicated_arguments_reach_every_device(meshes):
    def update(state, values, factor):
        return state + values.sum() * factor

    for mesh in (meshes[1], meshes[4]):
        states = shares.start(jnp.zeros, mesh, (), jnp.int32)
        values = shares.placed(np.arange(8, dtype=np.int32), mesh)
        factor = shares.replicated(np.int32(3), mesh)
        step = shares.step(update, mesh, (True, False))
        states = step(states, values, factor)
        assert int(shares.merged(states, lambda a, b: a + b, mesh)) == 3 * 28


def test_a_step_is_compiled_once_for_its_options():
    traced = []

    def update(state, values, *, factor):
        traced.append(factor)
        return state + values.sum() * factor

    for factor in (2, 3, 2, 3):
        states = shares.start(jnp.zeros, None, (), jnp.float32)
        states = shares.step(update, None, (True,), factor=factor)(states, jnp.ones(4))
        assert states.tolist() == [4 * factor]
    assert traced == [2, 3]


def test_placed_is_spread_over_the_mesh_or_on_the_default_device(meshes):
    assert shares.placed(np.zeros((8, 2)), meshes[4]).sharding.spec == jax.P("data")
    assert shares.replicated(np.zeros((8, 2)), meshes[4]).is_fully_replicated
    x, y = shares.placed((np.arange(3), np.ones((3, 2), np.float32)), None)
    assert isinstance(x, jax.Array)
    np.testing.assert_array_equal(y, np.ones((3, 2)))


def test_histograms_of_shares(meshes):
    """The statistic behind thresholds of batches, spread over eight devices: the counts of one."""
    features = np.random.default_rng(0).normal(size=(8, 2, 2, 2)).astype(np.float32)
    step = shares.step(quantiles.update, meshes[8], (True, True))
    states = shares.start(quantiles.init, meshes[8], 2)
    states = step(states, *shares.placed((features, np.arange(8) != 3), meshes[8]))
    whole = shares.merged(states, quantiles.merge, meshes[8])
    expected = quantiles.update(quantiles.init(2), jnp.asarray(np.delete(features, 3, axis=0)))
    jax.tree.map(np.testing.assert_array_equal, whole, expected)
