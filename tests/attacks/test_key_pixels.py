"""Key pixels on linear models, where every stage of the search has a closed form."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxinterp.attacks import KeyPixels, run

SIDE, PIXELS = 10, 100
KEY = jax.random.key(0)
BASE = KeyPixels(eps=1.0, rho=0.05, growth=2.0, most=0.2, steps=8, rounds=3, prunes=6, lengths=6)
RNG = np.random.default_rng(0)
W = (RNG.normal(size=(SIDE, SIDE, 3)) * np.exp(0.5 * RNG.normal(size=(SIDE, SIDE, 1)))).astype(np.float32)
GRAY = jnp.full((3, SIDE, SIDE, 3), 0.5, jnp.float32)
LABELS = jnp.zeros(3, jnp.int32)
ORDER = np.argsort(-(W**2).sum(-1).ravel())  # pixels by what they gain
# Changes of the first five pixels of these lengths are enough; none of them comes near the box.
GAPS = np.array([0.2, 0.5, 0.85], np.float32) * np.linalg.norm(W.reshape(PIXELS, 3)[ORDER[:5]])


def _logits(w, gaps, x):
    """Logits whose margin is a gap at grey images, and falls along w."""
    margin = gaps - jnp.sum(w * (x - 0.5), axis=(1, 2, 3))
    return jnp.stack([margin, jnp.zeros_like(margin)], axis=1)


def attack_on(attack=BASE, gaps: Any = GAPS, w=W):
    """The attack on grey images with these margins."""
    return run(attack, Partial(_logits, jnp.asarray(w), jnp.asarray(gaps)), GRAY, LABELS, key=KEY, compact=False)


def changed(result):
    return np.any(np.asarray(result.images) != np.asarray(GRAY), axis=-1).reshape(3, -1)


def length(w, pixels, gap):
    """The shortest change of some pixels that takes a gap away."""
    return gap / np.linalg.norm(w.reshape(PIXELS, 3)[pixels])


def test_the_pixels_of_the_largest_gradient_are_changed_no_more_than_needed_and_no_further():
    result = attack_on()
    assert np.asarray(result.success).all()
    for row, gap in enumerate(GAPS):
        pixels = np.flatnonzero(changed(result)[row])
        count = len(pixels)
        assert set(pixels) == set(ORDER[:count])
        assert count <= 5  # the first share was enough
        # Steps have one length and one direction, so one pixel less at the length of the first success fails.
        needed = length(W, pixels, gap)
        assert needed <= result.l2[row] * (1 + 1e-4)
        assert result.l2[row] <= needed + 1 / 2**6 + 1e-4  # halved six times, from a base no longer than the ball
        assert result.backward[row] == result.iterations[row] + 1
        assert result.forward[row] <= result.backward[row] + 6 + 6
    assert np.all(np.diff(np.asarray(result.iterations)) > 0)


def test_pruning_keeps_the_fewest_of_the_first_pixels_that_succeed():
    attack = dataclasses.replace(BASE, step_size=0.9)  # one step, far beyond what is needed
    result = attack_on(attack)
    pixels = ORDER[:5]
    along = np.zeros(W.size, np.float32).reshape(PIXELS, 3)
    along[pixels] = W.reshape(PIXELS, 3)[pixels]
    step = 0.9 * along / np.linalg.norm(along)
    gains = (step * W.reshape(PIXELS, 3)).sum(-1)
    for row, gap in enumerate(GAPS):
        enough = int(np.argmax(np.cumsum(gains[pixels]) > gap * (1 + 1e-4))) + 1
        assert changed(result)[row].sum() == enough
    assert changed(result).sum(1).tolist() != [5, 5, 5]


def test_more_pixels_where_the_first_ones_do_not_suffice():
    gap = 0.95 * np.linalg.norm(W.reshape(PIXELS, 3)[ORDER[:20]])  # for all twenty nearly the whole ball
    short = length(W, ORDER[:5], gap)
    assert short > 1.0  # five pixels cannot
    gaps = np.array([gap, gap, 100 * gap], np.float32)
    result = attack_on(gaps=gaps)
    assert np.asarray(result.success).tolist() == [True, True, False]
    assert 5 < changed(result)[0].sum() <= 20
    assert set(np.flatnonzero(changed(result)[0])) <= set(ORDER[:20])
    np.testing.assert_array_equal(result.forward[2], BASE.steps * BASE.rounds + 1)
    assert not np.asarray(attack_on(dataclasses.replace(BASE, most=0.05), gaps=gaps).success).any()


def test_weights_and_the_support_say_where_key_pixels_may_lie():
    weights = np.zeros((3, SIDE, SIDE, 1), np.float32)
    weights[:, :3] = 1
    result = attack_on(dataclasses.replace(BASE, weights=jnp.asarray(weights)), gaps=GAPS / 4)
    assert np.asarray(result.success).all()
    assert not changed(result)[:, 30:].any()
    by_weight = [p for p in ORDER if p < 30]
    for row in range(3):
        pixels = set(np.flatnonzero(changed(result)[row]))
        assert pixels == set(by_weight[: len(pixels)])


def test_bad_weights_are_named():
    for shape in ((3, SIDE, SIDE, 3), (3, SIDE, SIDE - 1, 1)):
        with pytest.raises(ValueError, match=r"KeyPixels.weights must have shape \(3, 10, 10, 1\)"):
            attack_on(dataclasses.replace(BASE, weights=jnp.ones(shape)))
    with pytest.raises(ValueError, match=r"KeyPixels.weights must be finite and not negative"):
        attack_on(dataclasses.replace(BASE, weights=-jnp.ones((3, SIDE, SIDE, 1))))
