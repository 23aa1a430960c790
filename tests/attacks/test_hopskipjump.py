"""HopSkipJump against nearest points of linear models, what its queries must cost, and what it does without a start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxinterp import attacks
from jaxinterp.attacks import HopSkipJump, start

SHAPE = (6, 5, 3)
KEY = jax.random.key(0)
# In one program: what is unfinished in smaller batches is up to test_compaction.py.
run = functools.partial(attacks.run, compact=False)
advance = functools.partial(attacks.advance, compact=False)


def affine(p, x):
    return x.reshape(x.shape[0], -1) @ p[0] + p[1]


def linear(classes: int, seed: int = 0):
    """A linear model, six images inside the box, their labels, and the weights."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(np.prod(SHAPE), classes)).astype(np.float32)
    images = rng.uniform(0.35, 0.65, size=(6, *SHAPE)).astype(np.float32)
    bias = (-images.reshape(6, -1).mean(0) @ weights).astype(np.float32)
    model = Partial(affine, (jnp.asarray(weights), jnp.asarray(bias)))
    labels = np.asarray(model(jnp.asarray(images))).argmax(1)
    return model, images, labels, weights


def nearest(model, images, labels, weights, norm):
    """Distance of the nearest point where another class overtakes the label."""
    logits = np.asarray(model(jnp.asarray(images)), np.float64)
    order = 2 if norm == "l2" else 1
    return np.array(
        [
            min((z[y] - z[j]) / np.linalg.norm(weights[:, y] - weights[:, j], order) for j in range(len(z)) if j != y)
            for z, y in zip(logits, labels, strict=True)
        ]
    )


@pytest.mark.parametrize(("norm", "targeted"), [("l2", False), ("linf", True)])
def test_comes_near_the_nearest_point_of_a_linear_model(norm, targeted):
    model, images, labels, weights = linear(2)
    targets = 1 - labels if targeted else None
    attack = HopSkipJump(norm=norm, steps=15)
    result = run(attack, model, images, labels, targets, key=KEY)
    assert np.all(result.success)
    ratio = np.asarray(result.l2 if norm == "l2" else result.linf) / nearest(model, images, labels, weights, norm)
    assert ratio.min() > 0.999
    assert ratio.max() < (1.05 if norm == "l2" else 1.25)
    np.testing.assert_array_equal(result.backward, 0)


def test_every_query_is_counted_and_there_are_as_many_as_the_algorithm_asks_for():
    """T iterations of B_0 sqrt(t) samples, a jump or more, and a bisection of known length."""
    model, images, labels, _ = linear(3)
    attack = HopSkipJump(steps=4, evaluations=30, max_evaluations=50)
    assert attack.samples == (30, 42, 50, 50)
    asked = np.zeros(len(images), int)
    done = np.zeros((5, len(images)), int)
    state = start(attack, model, images, labels, key=KEY)
    while not np.all(state.done):
        doing = np.asarray(state.doing)
        active = ~np.asarray(state.done)
        asked += active
        for i in range(5):
            done[i] += active & (doing == i)
        state = advance(attack, model, state, 1)
    np.testing.assert_array_equal(state.record.forward, asked)
    judging, starting, bisecting, sampling, jumping = done
    np.testing.assert_array_equal(judging, 1)
    np.testing.assert_array_equal(sampling, 30 + 42 + 50 + 50)
    assert (starting >= 1).all()
    assert (jumping >= 4).all()
    # theta = 90^(-3/2) needs ten bisections, once after the start and once in every iteration.
    np.testing.assert_array_equal(bisecting, 5 * 10)
    assert (asked <= attack.iterations).all()


def test_the_direction_of_a_jump_points_along_the_gradient():
    model, images, labels, weights = linear(2)
    attack = HopSkipJump(steps=1, evaluations=400)
    state = start(attack, model, images, labels, key=KEY)
    direction = np.zeros(images.shape)
    while not np.all(state.done):
        state = advance(attack, model, state, 1)
        jumping = np.asarray(state.doing) == 4
        direction[jumping] = np.asarray(state.signed)[jumping]
    slope = (weights[:, 1] - weights[:, 0]) * np.where(labels == 0, 1, -1)[:, None]
    direction = direction.reshape(6, -1)
    cosine = (direction * slope).sum(1) / np.linalg.norm(slope, axis=1) / np.linalg.norm(direction, axis=1)
    # The estimate of 400 signs in 90 dimensions has a cosine of about 0.85.
    assert (cosine > 0.7).all()


def test_starts_are_used_and_noise_where_they_do_not_serve():
    model, images, labels, _ = linear(3)
    targets = (labels + 1) % 3
    pool = np.random.default_rng(5).uniform(0, 1, (200, *SHAPE)).astype(np.float32)
    classes = np.asarray(model(jnp.asarray(pool))).argmax(1)
    starts = np.stack([pool[np.flatnonzero(classes == t)[0]] for t in targets])
    attack = HopSkipJump(starts=jnp.asarray(starts), steps=3, evaluations=20, tries=1)
    state = advance(attack, model, start(attack, model, images, labels, targets, key=KEY), 2)
    np.testing.assert_array_equal(state.far, starts)
    np.testing.assert_array_equal(state.record.best, starts)
    assert np.all(run(attack, model, images, labels, targets, key=KEY).success)
    # The images themselves are no starts: the one try of noise decides.
    useless = HopSkipJump(starts=jnp.asarray(images), steps=3, evaluations=20, tries=1)
    result = run(useless, model, images, labels, targets, key=KEY)
    failed = ~np.asarray(result.success)
    assert failed.any()
    np.testing.assert_array_equal(np.asarray(result.forward)[failed], 3)
    np.testing.assert_array_equal(np.asarray(result.images)[failed], images[failed])


def test_without_a_start_it_fails_after_the_given_tries():
    """A class that noise never gets."""
    model, images, labels, _ = linear(2)
    never = Partial(lambda m, x: jnp.pad(m(x), ((0, 0), (0, 1)), constant_values=-1e4), model)
    result = run(HopSkipJump(tries=7), never, images, labels, np.full(6, 2), key=KEY)
    assert not np.any(result.success)
    np.testing.assert_array_equal(result.images, images)
    np.testing.assert_array_equal(result.forward, 8)


def test_starts_of_another_shape_are_refused():
    model, images, labels, _ = linear(2)
    with pytest.raises(ValueError, match=r"starts must have the images' shape \(6, 6, 5, 3\), got \(6, 5, 5, 3\)"):
        run(HopSkipJump(starts=jnp.asarray(images[:, :5])), model, images, labels, key=KEY)
    with pytest.raises(ValueError, match="starts must be one number, or one for each of 6"):
        run(HopSkipJump(starts=jnp.asarray(images[:5])), model, images, labels, key=KEY)
