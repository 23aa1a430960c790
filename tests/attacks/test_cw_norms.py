"""The Linf and L0 attacks of Carlini and Wagner: nearest points of linear models, and steps of their searches."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxinterp import attacks
from jaxinterp.attacks import CWL0, CWLinf, start

SHAPE = (6, 5, 3)
KEY = jax.random.key(0)
# In one program: what is unfinished in smaller batches is up to test_compaction.py.
run = functools.partial(attacks.run, compact=False)
advance = functools.partial(attacks.advance, compact=False)


def affine(p, x):
    return x.reshape(x.shape[0], -1) @ p[0] + p[1]


def linear(classes: int, seed: int = 0, gap: float = 0.0):
    """A linear model, images inside the box, and their labels; `gap` is added to the logit of class 0."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(np.prod(SHAPE), classes)).astype(np.float32)
    images = rng.uniform(0.35, 0.65, size=(6, *SHAPE)).astype(np.float32)
    bias = (-images.reshape(6, -1).mean(0) @ weights).astype(np.float32)
    bias[0] += gap
    model = Partial(affine, (jnp.asarray(weights), jnp.asarray(bias)))
    labels = np.asarray(model(jnp.asarray(images))).argmax(1)
    return model, images, labels, weights


# Linf


@pytest.mark.parametrize("kappa", [0.0, 1.0])
def test_cw_linf_comes_near_the_nearest_point(kappa):
    model, images, labels, weights = linear(2)
    attack = CWLinf(lr=0.002, initial_const=0.1, kappa=kappa, search_steps=70, steps=200)
    result = run(attack, model, images, labels, key=KEY)
    logits = np.asarray(model(jnp.asarray(images)), np.float64)
    best = (np.abs(logits[:, 0] - logits[:, 1]) + kappa) / np.abs(weights[:, 0] - weights[:, 1]).sum()
    assert np.asarray(result.success).all()
    assert (np.asarray(result.linf) > 0.999 * best).all()
    # The search ends at the first success for which 0.9 of the largest change are below 1/256.
    assert (np.asarray(result.linf) < np.maximum(1.25 * best, 1.001 / (0.9 * 256))).all()
    assert (best > 1 / 256).sum() >= 3


def test_tau_shrinks_after_a_solution_and_the_constant_doubles_after_none():
    model, images, labels, _ = linear(3)
    attack = CWLinf(lr=0.02, initial_const=0.01, decrease=0.8, search_steps=100, steps=40)
    state = start(attack, model, images, labels, key=KEY)
    kinds = set()
    for _ in range(400):
        before, state = state, advance(attack, model, state, 1)
        x = (np.tanh(np.asarray(before.variable.w, np.float64)) + 1) / 2
        size = np.abs(x - images).max(axis=(1, 2, 3))
        for i in np.flatnonzero(np.asarray(state.progress.problem) > np.asarray(before.progress.problem)):
            tau, const = float(before.tau[i]), float(before.const[i])
            if float(state.tau[i]) != tau:
                kinds.add("solved")
                np.testing.assert_allclose(state.tau[i], 0.8 * min(tau, size[i]), rtol=1e-4)
                assert float(state.const[i]) == const
                # A solution does not exceed tau, but for what the loss leaves; the search goes on from it.
                assert size[i] <= tau + 1e-4 * const + 1e-6
                np.testing.assert_array_equal(state.variable.w[i], before.variable.w[i])
                assert int(state.variable.adam.count[i]) == 0
                assert float(state.record.best[i].max()) > 0
            else:
                kinds.add("not solved")
                assert float(state.const[i]) == 2 * const
                assert int(state.variable.adam.count[i]) > 0
    assert kinds == {"solved", "not solved"}


def test_cw_linf_gives_up_at_the_largest_constant():
    model, images, labels, _ = linear(2)
    attack = CWLinf(initial_const=1.0, largest_const=10.0, kappa=1e6, steps=10)
    result = run(attack, model, images, labels, key=KEY)
    np.testing.assert_array_equal(result.success, False)
    np.testing.assert_array_equal(result.backward, 4 * 10)  # at 1, 2, 4 and 8


# L0


def fewest(gap, gains):
    """How many of the gains, the largest first, close the gap."""
    return int(np.searchsorted(np.cumsum(np.sort(gains)[::-1]), gap) + 1)


@pytest.mark.parametrize("independent", [False, True])
def test_cw_l0_comes_near_the_fewest_pixels(independent):
    model, images, labels, weights = linear(2, seed=1, gap=10.0)
    attack = CWL0(lr=0.05, initial_const=0.1, independent_channels=independent, search_steps=60, steps=100)
    result = run(attack, model, images, labels, key=KEY)
    assert np.asarray(result.success).all()
    logits = np.asarray(model(jnp.asarray(images)), np.float64)
    changed = np.asarray(result.images) != images
    counts = changed.sum((1, 2, 3)) if independent else changed.any(3).sum((1, 2))
    optima = []
    for i, image in enumerate(images):
        slope = (weights[:, 1 - labels[i]] - weights[:, labels[i]]).astype(np.float64)
        gains = np.abs(slope) * np.where(slope > 0, 1 - image.ravel(), image.ravel())
        gains = gains if independent else gains.reshape(-1, 3).sum(1)
        optima.append(fewest(logits[i, labels[i]] - logits[i, 1 - labels[i]], gains))
        assert optima[-1] <= counts[i] <= math.ceil(1.25 * optima[-1]), i
    assert max(optima) >= 4


def test_pixels_that_matter_the_least_are_fixed_first():
    attack = CWL0()
    delta = np.zeros((2, 4, 4, 2), np.float32)
    delta[0] = np.random.default_rng(0).normal(size=(4, 4, 2))
    delta[0, 1, 1] = 0
    delta[1, 0, 0] = 0.5
    delta[1, 2, 3, 1] = 0.1  # one channel
    g = np.random.default_rng(1).normal(size=delta.shape).astype(np.float32)
    free = np.asarray(attack._fewer(jnp.asarray(delta), jnp.asarray(g)))
    np.testing.assert_array_equal(free[..., 0], free[..., 1])
    effect = np.abs(g * delta).sum(3)
    for i, fixed in ((0, 2), (1, 1)):  # ceil(0.3 sqrt(15)) and ceil(0.3 sqrt(2))
        changed = (delta[i] != 0).any(2)
        order = sorted(effect[i][changed])
        np.testing.assert_array_equal(free[i, ..., 0], changed & (effect[i] > order[fixed - 1]))


def test_fixed_pixels_are_those_of_the_original_and_the_last_solution_is_kept():
    model, images, labels, _ = linear(3, seed=2)
    attack = CWL0(lr=0.05, initial_const=0.5, search_steps=8, steps=60)
    state = start(attack, model, images, labels, key=KEY)
    previous = np.asarray(state.free)
    while not np.asarray(state.done).all():
        best = np.asarray(state.best_l0)
        state = advance(attack, model, state, 5)
        free = np.asarray(state.free)
        assert not (free & ~previous).any()  # no pixel comes back
        assert (np.asarray(state.best_l0) <= best).all()
        previous = free
    changed = (np.asarray(state.record.best) != images).any(3).sum((1, 2))
    success = np.asarray(state.record.success)
    assert success.any()
    np.testing.assert_array_equal(changed[success], np.asarray(state.best_l0)[success])


def test_cw_l0_gives_up_at_the_largest_constant():
    model, images, labels, _ = linear(2)
    attack = CWL0(initial_const=1.0, largest_const=4.0, kappa=1e6, steps=10)
    result = run(attack, model, images, labels, key=KEY)
    np.testing.assert_array_equal(result.success, False)
    np.testing.assert_array_equal(result.backward, 2 * 10)  # at 1 and 2


@pytest.mark.parametrize("independent", [False, True])
def test_cw_l0_keeps_to_the_channels_of_its_support(independent):
    """A pixel that is kept after a success does not free the channels of it that may not change."""
    model, images, labels, _ = linear(4)
    support = np.zeros((1, *SHAPE), bool)
    support[..., 0] = True
    attack = CWL0(steps=100, search_steps=20, initial_const=0.1, lr=0.05, independent_channels=independent)
    result = run(attack, model, images, labels, key=KEY, support=support)
    assert np.asarray(result.success).all()
    assert not (np.asarray(result.images) != images)[..., 1:].any()
