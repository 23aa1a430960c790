"""The interpretability score in closed form, its null level and its shuffled control."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinterp import localize

SIDE = 10
PERCENTILES = (30.0, 50.0, 70.0, 90.0)


def ramp(batch=1):
    """Maps at the size of the image whose values are 0 ... 99 in another order for each example."""
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(SIDE * SIDE).reshape(SIDE, SIDE) for _ in range(batch)]).astype(np.float32)


def noise(batch=4, seed=1):
    return np.random.default_rng(seed).normal(size=(batch, SIDE, SIDE, 3)).astype(np.float32) * 0.01


def score(delta, maps, percentile=70.0):
    return np.asarray(localize.interpretability_score(jnp.asarray(delta), jnp.asarray(maps), percentile))


# Closed forms


def test_salient_pixels_are_those_from_the_percentile_on():
    """The 70th percentile of 0 ... 99 is 69.3: thirty pixels, 70 ... 99."""
    maps = ramp(3)
    np.testing.assert_array_equal(localize.salient(jnp.asarray(maps), (SIDE, SIDE)), maps >= 70)
    np.testing.assert_array_equal(localize.salient(jnp.asarray(maps), (SIDE, SIDE), 95.0), maps >= 95)
    # Reaching the percentile is enough: of a map without values everything is salient.
    assert np.asarray(localize.salient(jnp.zeros((1, 3, 3)), (SIDE, SIDE))).all()
    # Resized first: a map of two columns has its upper 30 % in the last three columns of ten.
    mask = np.asarray(localize.salient(jnp.array([[[0.0, 1.0]]]), (4, 10), 70.0))[0]
    np.testing.assert_array_equal(mask, np.tile(np.arange(10) >= 7, (4, 1)))


def test_scores_in_closed_form():
    maps = np.repeat(ramp(), 5, axis=0)
    mask = maps[0] >= 70
    delta = np.zeros((5, SIDE, SIDE, 3), np.float32)
    delta[0, mask] = [0.1, -0.2, 0.3]  # all on the salient part
    delta[1, ~mask] = [0.1, -0.2, 0.3]  # none on it
    delta[2] = 0.01  # uniform: the root of the salient share
    r, c = np.argwhere(mask)[0], np.argwhere(~mask)[0]
    delta[3, r[0], r[1]] = [0.0, 0.3, 0.0]
    delta[3, c[0], c[1]] = [0.0, 0.0, 0.4]  # 3-4-5
    np.testing.assert_allclose(score(delta, maps)[:4], [1, 0, np.sqrt(0.3), 0.6], rtol=1e-6)
    assert np.isnan(score(delta, maps)[4])  # no perturbation, no score


def test_score_is_the_ratio_of_norms():
    delta, maps = noise(), ramp(4)
    for percentile in PERCENTILES:
        mask = maps >= np.percentile(maps, percentile)
        inside = np.sqrt((delta.astype(np.float64) ** 2 * mask[..., None]).sum(axis=(1, 2, 3)))
        expected = inside / np.sqrt((delta.astype(np.float64) ** 2).sum(axis=(1, 2, 3)))
        np.testing.assert_allclose(score(delta, maps, percentile), expected, rtol=1e-5)


def test_null_is_the_root_of_the_salient_share():
    maps, delta = ramp(4), noise()
    for percentile, share in ((30.0, 0.7), (70.0, 0.3), (90.0, 0.1)):
        null = localize.null_score(jnp.asarray(delta), jnp.asarray(maps), percentile)
        np.testing.assert_allclose(null, np.sqrt(share), rtol=1e-6)
        uniform = score(np.full_like(delta, 0.02), maps, percentile)
        np.testing.assert_allclose(uniform, null, rtol=1e-6)
    # With ties at the percentile the share is larger than nominal, and the null says so.
    ties = np.zeros((1, SIDE, SIDE), np.float32)
    ties[0, :5] = 1
    np.testing.assert_allclose(
        localize.null_score(jnp.asarray(delta[:1]), jnp.asarray(ties), 70.0), np.sqrt(0.5), rtol=1e-6
    )


# The shuffled control


def keys(n=4, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def shuffled(delta, maps, keys, **kwargs):
    return np.asarray(localize.shuffled_score(jnp.asarray(delta), jnp.asarray(maps), keys, **kwargs))


def test_shuffled_scores_lie_around_the_null():
    """The mean of squared scores is the salient share exactly; its spread follows from sampling without replacement."""
    delta, maps = noise(), ramp(4)
    delta[0] *= 1 + 5 * (maps[0] >= 70)[..., None]  # strongly localised before shuffling
    assert score(delta, maps)[0] > 0.9
    repeats = 200
    control = shuffled(delta, maps, keys(), repeats=repeats)
    assert control.shape == (4, repeats)
    energy = (delta.astype(np.float64) ** 2).sum(axis=-1).reshape(4, -1)
    n, k = SIDE * SIDE, 30
    variance = k * (n - k) / (n * (n - 1)) * (energy**2).sum(1) - k * (n - k) / (n**2 * (n - 1)) * energy.sum(1) ** 2
    spread = np.sqrt(variance) / energy.sum(1)
    squares = np.square(control)
    assert (np.abs(squares.mean(1) - 0.3) < 5 * spread / np.sqrt(repeats)).all()
    np.testing.assert_allclose(squares.std(1), spread, rtol=0.25)


def test_shuffling_a_uniform_perturbation_changes_nothing():
    control = shuffled(np.full((4, SIDE, SIDE, 3), 0.02, np.float32), ramp(4), keys(), repeats=4)
    np.testing.assert_allclose(control, np.sqrt(0.3), rtol=1e-6)
    assert (control == control[:, :1]).all()


def test_shuffling_keeps_the_channels_of_a_pixel_together():
    """One perturbed pixel is either on the salient part or not; its channels never part."""
    delta = np.zeros((1, SIDE, SIDE, 3), np.float32)
    delta[0, 3, 3] = [0.1, 0.2, 0.2]
    control = shuffled(delta, ramp(), keys(1), repeats=300)
    assert set(np.round(control.ravel(), 6)) == {0.0, 1.0}
    assert abs(control.mean() - 0.3) < 4 * np.sqrt(0.21 / 300)


def test_shuffles_are_decided_by_each_examples_key():
    delta, maps = noise(), ramp(4)
    control = shuffled(delta, maps, keys(), repeats=3)
    np.testing.assert_array_equal(shuffled(delta, maps, keys(), repeats=3), control)
    assert (shuffled(delta, maps, keys(seed=1), repeats=3) != control).all()
    for i in range(4):
        alone = shuffled(delta[i : i + 1], maps[i : i + 1], keys()[i : i + 1], repeats=3)
        np.testing.assert_array_equal(alone[0], control[i])
    # More repeats go on where fewer stopped.
    np.testing.assert_array_equal(shuffled(delta, maps, keys(), repeats=5)[:, :3], control)


# Invariances


@settings(max_examples=15, deadline=None)
@given(st.integers(-12, 12), st.integers(-6, 6), st.sampled_from([-64.0, -1.0, 0.0, 1.0, 64.0]))
def test_scale_of_perturbation_and_of_map_do_not_matter(power, map_power, offset):
    """Powers of two and whole numbers, so that the arithmetic is exact."""
    delta, maps = noise(), ramp(4)
    np.testing.assert_array_equal(score(delta * np.float32(2.0**power), maps), score(delta, maps))
    moved = (maps * np.float32(2.0**map_power) + np.float32(offset)).astype(np.float32)
    np.testing.assert_array_equal(score(delta, moved), score(delta, maps))


def test_the_sign_of_the_map_matters():
    delta, maps = noise(), ramp(4)
    delta *= 1 + 5 * (maps >= 70)[..., None]
    assert (score(delta, maps) > score(delta, -maps) + 0.3).all()


def test_a_higher_percentile_scores_lower():
    delta = noise()
    maps = np.random.default_rng(3).normal(size=(4, 4, 3)).astype(np.float32)  # resized to the image
    curve = np.stack([score(delta, maps, p) for p in np.linspace(0, 100, 11)])
    assert (np.diff(curve, axis=0) <= 0).all()
    np.testing.assert_allclose(curve[0], 1, rtol=1e-6)
    assert (curve[5] > curve[9]).all()


def test_percentiles_share_one_program():
    delta, maps = jnp.asarray(noise()), jnp.asarray(ramp(4))
    sweep = jax.jit(jax.vmap(lambda p: localize.interpretability_score(delta, maps, p)))
    together = sweep(jnp.asarray(PERCENTILES))
    for percentile, scores in zip(PERCENTILES, together, strict=True):
        np.testing.assert_allclose(scores, score(delta, maps, percentile), rtol=1e-6)


@pytest.mark.parametrize("size", [(SIDE, SIDE), (4, 3)], ids=str)
def test_a_batch_is_scores_of_one(size):
    delta = noise(5)
    maps = np.random.default_rng(2).normal(size=(5, *size)).astype(np.float32)
    whole = score(delta, maps)
    order = np.array([4, 2, 0, 1, 3])
    np.testing.assert_array_equal(score(delta[order], maps[order]), whole[order])
    null = np.asarray(localize.null_score(jnp.asarray(delta), jnp.asarray(maps)))
    for i in range(5):
        np.testing.assert_array_equal(score(delta[i : i + 1], maps[i : i + 1])[0], whole[i])
        alone = localize.null_score(jnp.asarray(delta[i : i + 1]), jnp.asarray(maps[i : i + 1]))
        np.testing.assert_array_equal(alone[0], null[i])
