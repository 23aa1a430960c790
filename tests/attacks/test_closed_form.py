"""Attacks against what is known by hand: nearest adversarial points of linear models, and single steps.

For logits Z = x W + b, the nearest point where Z_j reaches Z_y lies at distance (Z_y - Z_j) / ||w_y - w_j||_2 in L2
and, with the dual norm, (Z_y - Z_j) / ||w_y - w_j||_1 in Linf, as long as the box is not in the way.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import Partial
from scipy.optimize import bisect

from jaxinterp import attacks
from jaxinterp.attacks import APGD, APGDT, CW, DDN, FAB, IFGSM, PGD, DeepFool, finish, objective, start
from jaxinterp.attacks.constraint import NORMS, distance, project, random_in_ball, steepest

SHAPE = (6, 5, 3)
KEY = jax.random.key(0)
# In one program: what is unfinished in smaller batches is up to test_compaction.py.
run = functools.partial(attacks.run, compact=False)
advance = functools.partial(attacks.advance, compact=False)


def affine(p, x):
    return x.reshape(x.shape[0], -1) @ p[0] + p[1]


def linear(classes: int, seed: int = 0):
    """A linear model, images inside the box, and their labels."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(np.prod(SHAPE), classes)).astype(np.float32)
    images = rng.uniform(0.35, 0.65, size=(6, *SHAPE)).astype(np.float32)
    # Margins around 4 of slopes around 13 (L2) and 100 (L1): solutions stay inside the box.
    bias = (-images.reshape(6, -1).mean(0) @ weights).astype(np.float32)
    model = Partial(affine, (jnp.asarray(weights), jnp.asarray(bias)))
    labels = np.asarray(model(jnp.asarray(images))).argmax(1)
    return model, images, labels, weights


def optimum(model, images, labels, weights, targets=None):
    """Closed-form minimal distances (L2, Linf) [B] to success."""
    logits = np.asarray(model(jnp.asarray(images)), np.float64)
    result = []
    for z, y, t in zip(logits, labels, labels if targets is None else targets, strict=True):
        others = [j for j in range(len(z)) if j != y] if targets is None else [t]
        gaps = [(z[y] - z[j], weights[:, y].astype(np.float64) - weights[:, j]) for j in others]
        result.append((min(g / np.linalg.norm(d) for g, d in gaps), min(g / np.abs(d).sum() for g, d in gaps)))
    return np.array(result).T


def numpy_gradient(weights, logits, chosen):
    """Gradient [B,n] of cross-entropy of the class `chosen`."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return (p - np.eye(p.shape[1])[chosen]) @ weights.T


def in_the_box(x, w, need, norm):
    """The least distance [float64] at which <w, d> reaches `need` with x + d in the box, or infinity."""
    slope, room = np.abs(w), np.where(w > 0, 1 - x, x)
    if (slope * room).sum() < need:
        return np.inf
    if norm == "l1":
        order = np.argsort(-slope)
        gained = np.cumsum((slope * room)[order])
        i = np.searchsorted(gained, need)
        before = gained[i - 1] if i else 0.0
        return room[order][:i].sum() + (need - before) / slope[order[i]]
    low, high = 0.0, 1e6
    for _ in range(200):
        t = (low + high) / 2
        step = np.minimum(t * slope if norm == "l2" else t, room)
        low, high = (low, t) if (slope * step).sum() >= need else (t, high)
    step = np.minimum(high * slope if norm == "l2" else high, room)
    return np.linalg.norm(step) if norm == "l2" else step.max()


def saturated(classes, shape, *, seed, border, reach, count):
    """A linear model and images with pixels at 0 and 1, where success takes the part `reach` of what the box allows."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(int(np.prod(shape)), classes)).astype(np.float32)
    images = rng.uniform(size=(count, *shape)).astype(np.float32)
    images = np.where(rng.uniform(size=images.shape) < border, np.round(images), images).astype(np.float32)
    flat = images.reshape(count, -1).astype(np.float64)
    slopes = weights[:, 1:] - weights[:, :1]
    logits = flat @ weights
    able = np.array([[(np.abs(w) * np.where(w > 0, 1 - x, x)).sum() for w in slopes.T] for x in flat])
    bias = np.zeros(classes, np.float32)
    bias[0] = np.median((reach * able - (logits[:, :1] - logits[:, 1:])).max(1))
    model = Partial(affine, (jnp.asarray(weights), jnp.asarray(bias)))
    labels = np.asarray(model(jnp.asarray(images))).argmax(1)

    def least(norm):
        found = []
        for x, z, y in zip(flat, logits + bias, labels, strict=True):
            rivals = [j for j in range(classes) if j != y]
            found.append(min(in_the_box(x, weights[:, j] - weights[:, y], z[y] - z[j], norm) for j in rivals))
        return np.array(found)

    return model, images, labels, least


# Minimal distances


@pytest.mark.parametrize(
    ("attack", "norm"),
    [
        (DeepFool(), "l2"),
        (DeepFool(norm="linf"), "linf"),
        (FAB(), "l2"),
        (FAB(norm="linf"), "linf"),
        (FAB(norm="l1"), "l1"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_the_nearest_class_is_the_one_that_is_nearest_in_the_box(attack, norm):
    """Of binary images half the components cannot move: the class with the steepest slope need not be the nearest."""
    model, images, labels, least = saturated(3, (4, 4, 3), seed=14, border=1.0, reach=0.5, count=20)
    result = run(attack, model, images, labels, key=KEY)
    ratio = np.asarray(getattr(result, norm)) / least(norm)
    assert np.asarray(result.success).all()
    assert ratio.min() > 0.999
    assert ratio.max() < 1.05


@pytest.mark.parametrize("attack", [PGD, APGD])
@pytest.mark.parametrize(("shape", "border", "reach"), [((16, 16, 3), 0.0, 0.1), ((6, 5, 3), 0.5, 0.4)])
def test_descent_in_l1_loses_no_steps_at_the_border(attack, shape, border, reach):
    """Every projection takes a little from components that have arrived there, and the noise of a start is to go."""
    model, images, labels, least = saturated(2, shape, seed=15, border=border, reach=reach, count=10)
    eps = (1.25 * least("l1")).astype(np.float32)
    result = run(attack(norm="l1", eps=eps), model, images, labels, key=KEY)
    assert np.asarray(result.success).all()
    assert (np.asarray(result.l1) <= 1.0001 * eps).all()


@pytest.mark.parametrize("classes", [5, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_cw_comes_near_the_nearest_point(classes):
    model, images, labels, weights = linear(classes)
    best, _ = optimum(model, images, labels, weights)
    result = run(CW(lr=0.01, initial_const=0.01, search_steps=9, steps=300), model, images, labels, key=KEY)
    assert np.asarray(result.success).all()
    ratio = np.asarray(result.l2) / best
    assert ratio.min() > 0.999
    assert ratio.max() < 1.05


def test_cw_comes_near_the_nearest_point_of_a_target_with_confidence():
    """Of two classes, so that no third one becomes the largest on the way; kappa moves the boundary by kappa."""
    model, images, labels, weights = linear(2, seed=1)
    best, _ = optimum(model, images, labels, weights, 1 - labels)
    kappa = 2.0
    slope = np.linalg.norm(weights[:, 0] - weights[:, 1])
    result = run(
        CW(lr=0.01, initial_const=0.01, kappa=kappa, search_steps=9, steps=300),
        model,
        images,
        labels,
        1 - labels,
        key=KEY,
    )
    ratio = np.asarray(result.l2) / (best + kappa / slope)
    assert np.asarray(result.success).all()
    assert ratio.min() > 0.999
    assert ratio.max() < 1.05


@pytest.mark.parametrize(
    ("method", "classes"),
    [
        *(("ifgsm", 2), ("linf", 5), ("l2", 2)),
        *(pytest.param(*more, marks=pytest.mark.exhaustive) for more in (("ifgsm", 5), ("linf", 2), ("l2", 5))),
    ],
)
def test_descent_succeeds_just_outside_the_optimum_and_not_inside(method, classes):
    model, images, labels, weights = linear(classes)
    l2, linf = optimum(model, images, labels, weights)
    best = l2 if method == "l2" else linf
    distances = {}
    # Among several rivals the loss has several maxima on the sphere, and the one found need not be the nearest.
    enough = 1.25 if classes == 2 else 1.5
    for factor in (0.8, enough):
        eps = (factor * best).astype(np.float32)
        radius = jnp.asarray(eps)
        attack = IFGSM(eps=radius, steps=40) if method == "ifgsm" else PGD(eps=radius, norm=method, steps=40)
        result = run(attack, model, images, labels, key=KEY)
        assert (np.asarray(result.success) == (factor > 1)).all()
        distances[factor] = np.asarray(result.l2 if method == "l2" else result.linf)
        assert (distances[factor] <= 1.0001 * eps).all()
    assert (distances[enough] >= 0.999 * best).all()


def inside_of_a_ball(p, x):
    centre, radius = p
    return jnp.stack([jnp.zeros(len(x)), radius**2 - jnp.sum(jnp.square(x - centre), (1, 2, 3))], 1)


def around_a_ball():
    """A quadratic model, whose second class is a ball off the images, and their distances from it in three norms."""
    rng = np.random.default_rng(3)
    centre = rng.uniform(0.4, 0.6, SHAPE).astype(np.float32)
    images = rng.uniform(0.25, 0.75, (6, *SHAPE)).astype(np.float32)
    apart, radius = np.abs(images - centre).reshape(6, -1).astype(np.float64), 0.75

    def level(squares, v) -> Any:
        return bisect(lambda t: squares(v, t) - radius**2, 0, 1)

    # In L1 the largest differences are cut at one level, in Linf all become smaller by as much.
    cut = [level(lambda v, t: (np.minimum(v, t) ** 2).sum(), v) for v in apart]
    less = [level(lambda v, t: (np.maximum(v - t, 0) ** 2).sum(), v) for v in apart]
    smallest = {
        "l1": np.array([np.maximum(v - t, 0).sum() for v, t in zip(apart, cut, strict=True)]),
        "l2": np.linalg.norm(apart, axis=1) - radius,
        "linf": np.array(less),
    }
    return Partial(inside_of_a_ball, (jnp.asarray(centre), jnp.float32(radius))), jnp.asarray(images), smallest


@pytest.mark.parametrize(
    ("attack", "norm", "factor"),
    [
        (CW(), "l2", 1.05),
        (DDN(), "l2", 1.05),
        (attacks.FMN(norm="l2"), "l2", 1.05),
        (FAB(norm="l2"), "l2", 1.05),
        (DeepFool(norm="l2"), "l2", 1.05),
        (attacks.FMN(norm="l1"), "l1", 1.25),
        (attacks.EAD(beta=0.01, rule="l1"), "l1", 1.25),
        (attacks.FMN(norm="linf"), "linf", 1.25),
        (FAB(norm="linf"), "linf", 1.25),
        (attacks.CWLinf(), "linf", 1.25),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_a_quadratic_model_is_left_near_the_nearest_point(attack, norm, factor):
    model, images, smallest = around_a_ball()
    result = attacks.run(attack, model, images, np.zeros(6, int), key=jax.random.key(0))
    assert result.success.all()
    ratio = np.asarray(getattr(result, norm)) / smallest[norm]
    assert (ratio > 0.999).all()
    assert (ratio < factor).all(), ratio


@pytest.mark.parametrize(
    "attack",
    [IFGSM(), PGD(), PGD(norm="l2"), PGD(norm="l1", sparsity=0.05), APGD(), APGD(norm="l2"), APGD(norm="l1"), APGDT()],
    ids=lambda attack: f"{attack.name}-{getattr(attack, 'norm', 'linf')}",
)
def test_a_quadratic_model_is_broken_just_outside_the_optimum_and_not_inside(attack):
    model, images, smallest = around_a_ball()
    norm = getattr(attack, "norm", "linf")
    for factor in (0.95, 1.25):
        eps = (factor * smallest[norm]).astype(np.float32)
        attacked = dataclasses.replace(attack, eps=eps)
        result = attacks.run(attacked, model, images, np.zeros(6, int), key=jax.random.key(0))
        assert (np.asarray(result.success) == (factor > 1)).all()
        assert (np.asarray(getattr(result, norm)) <= 1.0001 * eps).all()


@pytest.mark.parametrize("targeted", [False, True])
def test_penalised_cross_entropy_reaches_the_optimum_and_minimises_what_it_says(targeted):
    """The loss is ||d||^2 + c CE: at the end of one problem its gradient, written by hand, vanishes."""
    model, images, labels, weights = linear(2)
    targets = 1 - labels if targeted else None
    attack = CW(lr=0.001, initial_const=0.1, search_steps=9, steps=400, loss="ce")
    result = run(attack, model, images, labels, targets, key=KEY)
    assert np.asarray(result.success).all()
    best, _ = optimum(model, images, labels, weights)
    assert (np.asarray(result.l2) <= 1.05 * best).all()

    const = 3.0
    one = CW(lr=0.003, initial_const=const, search_steps=2, steps=1500, abort_early=False, loss="ce")
    state = advance(one, model, start(one, model, images, labels, targets, key=KEY), 1499)
    x = np.asarray(state.variable.images(), np.float64)
    logits = x.reshape(6, -1) @ weights + np.asarray(model.args[0][1], np.float64)
    slope = const * numpy_gradient(weights, logits, 1 - labels).reshape(x.shape)
    np.testing.assert_allclose(2 * (x - images), -slope, atol=0.02 * np.abs(slope).max())


# Single steps


@pytest.mark.parametrize("targeted", [False, True])
def test_first_step_of_ifgsm_by_hand(targeted):
    model, images, labels, weights = linear(5)
    targets = (labels + 1) % 5 if targeted else None
    attack = IFGSM(eps=0.1, step_size=0.03, steps=4)
    state = advance(attack, model, start(attack, model, images, labels, targets, key=KEY), 1)
    logits = np.asarray(model(jnp.asarray(images)))
    sign = np.sign(numpy_gradient(weights, logits, labels if targets is None else targets)).reshape(images.shape)
    expected = images - 0.03 * sign if targeted else images + 0.03 * sign
    np.testing.assert_allclose(state.images, expected, atol=1e-7)
    # The fourth step would lie 0.12 away on every pixel: the ball of 0.1 clips it, then the box.
    last = finish(attack, advance(attack, model, state))
    assert np.asarray(last.linf)[np.asarray(last.success)].max() <= 0.1 * 1.0001


@pytest.mark.parametrize("targeted", [False, True])
def test_two_steps_of_pgd_in_l2_by_hand(targeted):
    model, images, labels, weights = linear(5)
    targets = (labels + 2) % 5 if targeted else None
    attack = PGD(eps=0.5, step_size=0.4, norm="l2", steps=4, random_start=False)
    state = start(attack, model, images, labels, targets, key=KEY)
    x = images.astype(np.float64)
    for _ in range(2):  # the second step leaves the ball and is scaled back
        state = advance(attack, model, state, 1)
        logits = x.reshape(6, -1) @ weights + np.asarray(model.args[0][1])
        g = numpy_gradient(weights.astype(np.float64), logits, labels if targets is None else targets)
        g = (g / np.linalg.norm(g, axis=1, keepdims=True)).reshape(x.shape) * (-1 if targeted else 1)
        delta = x + 0.4 * g - images
        size = np.linalg.norm(delta.reshape(6, -1), axis=1).reshape(-1, 1, 1, 1)
        x = np.clip(images + delta * np.minimum(1, 0.5 / size), 0, 1)
        np.testing.assert_allclose(state.images, x, atol=2e-6)


@pytest.mark.parametrize(
    "attack",
    [
        *(kind(norm=norm, steps=20) for kind in (PGD, APGD) for norm in ("linf", "l2", "l1")),
        *(attacks.Square(norm=norm, steps=60) for norm in ("linf", "l2", "l1")),
    ],
    ids=lambda attack: f"{attack.name}-{attack.norm}",
)
def test_the_ball_may_be_larger_than_the_box_by_any_factor(attack):
    """Neither its radius nor the steps that follow from it become infinite when they are squared or added."""
    model, images, labels, _ = linear(3)
    for eps in (1e6, 1e22, 3e38):
        found = attacks.run(dataclasses.replace(attack, eps=eps), model, images, labels, key=jax.random.key(0))
        assert found.success.all(), eps
        assert np.isfinite(found.images).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_square_in_a_ball_larger_than_the_box_is_square_in_the_box(norm):
    model, images, labels, _ = linear(8)
    targets = np.asarray(model(images)).argmin(1)

    def found(eps):
        attack = attacks.Square(norm=norm, eps=eps, kappa=2.0, steps=100)
        return attacks.run(attack, model, images, labels, key=jax.random.key(0), targets=targets)

    box, larger = found(1e6), found(3e38)
    assert (box.success & (box.iterations > 2)).any(), "not by the start alone"
    for one, other in zip(jax.tree.leaves(box), jax.tree.leaves(larger), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_default_step_crosses_the_ball_in_time():
    attack = IFGSM(eps=0.1, steps=10)
    model, images, labels, _ = linear(2)
    assert np.allclose(start(attack, model, images, labels, key=KEY).step_size, 0.025)


# The geometry of balls


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(["linf", "l2"]),
    st.floats(0, 3, width=32),
    st.floats(0, 2, width=32),
)
def test_projection_stays_in_ball_and_box_and_keeps_what_is_inside(seed, which, eps, reach):
    rng = np.random.default_rng(seed)
    original = np.round(rng.uniform(-0.5, 1.5, (2, 4, 3, 2)).clip(0, 1), 2).astype(np.float32)
    images = (original + reach * rng.normal(size=original.shape)).astype(np.float32)
    support = rng.uniform(size=original.shape) < 0.5
    radius = jnp.full(2, eps, jnp.float32)
    for mask in (None, jnp.asarray(support)):
        once = np.asarray(project(jnp.asarray(images), jnp.asarray(original), radius, which, mask))
        delta = (once - original).astype(np.float64).reshape(2, -1)
        size = np.abs(delta).max(1) if which == "linf" else np.linalg.norm(delta, axis=1)
        assert (size <= 1.0001 * eps + 1e-7).all()
        assert once.min() >= 0
        assert once.max() <= 1
        if mask is not None:
            np.testing.assert_array_equal(once[~support], original[~support])
        twice = project(jnp.asarray(once), jnp.asarray(original), radius, which, mask)
        np.testing.assert_allclose(twice, once, atol=1e-6)


def test_projection_onto_a_ball_is_the_nearest_point():
    original, images = jnp.full((1, 1, 2, 1), 0.5), jnp.array([0.8, 0.1]).reshape(1, 1, 2, 1)  # delta (.3, -.4)
    radius = jnp.array([0.25])
    np.testing.assert_allclose(project(images, original, radius, "l2").ravel(), [0.65, 0.3], atol=1e-6)
    np.testing.assert_allclose(project(images, original, radius, "linf").ravel(), [0.75, 0.25], atol=1e-6)


def nearest_in_l1(delta, room, eps):
    """sign(d) clip(|d| - t, 0, room) at the t where the norm is eps, by a search over reals in float64."""
    low, high = 0.0, np.abs(delta).max()
    if np.minimum(np.abs(delta), room).sum() <= eps:
        return np.sign(delta) * np.minimum(np.abs(delta), room)
    for _ in range(200):
        t = (low + high) / 2
        low, high = (t, high) if np.clip(np.abs(delta) - t, 0, room).sum() > eps else (low, t)
    return np.sign(delta) * np.clip(np.abs(delta) - high, 0, room)


@pytest.mark.parametrize("eps", [0.0, 0.3, 2.0, 50.0])
def test_projection_onto_l1_ball_and_box_is_the_nearest_point_of_both(eps):
    rng = np.random.default_rng(0)
    original = np.round(rng.uniform(-0.3, 1.3, (3, 4, 5, 2)).clip(0, 1), 2).astype(np.float32)
    images = (original + rng.normal(size=original.shape)).astype(np.float32)
    found = np.asarray(project(jnp.asarray(images), jnp.asarray(original), jnp.full(3, eps), "l1"))
    for x, x0, z in zip(images.astype(np.float64), original.astype(np.float64), found, strict=True):
        expected = nearest_in_l1(x - x0, np.where(x > x0, 1 - x0, x0), eps)
        np.testing.assert_allclose(z - x0, expected, atol=1e-5)


def test_projection_onto_an_l0_ball_keeps_the_largest_moves_that_the_box_allows():
    original = jnp.array([0.5, 0.9, 0.5, 0.0, 0.5, 0.5]).reshape(1, 1, 6, 1)
    images = jnp.array([0.9, 5.0, 0.2, -3.0, 0.6, 0.8]).reshape(1, 1, 6, 1)  # moves .4 .1 .3 0 .1 .3 in the box
    for eps, kept in ((0, []), (1, [0]), (2.9, [0, 2]), (3, [0, 2, 5]), (4, [0, 1, 2, 5]), (6, [0, 1, 2, 4, 5])):
        expected = np.array(original)
        expected[0, 0, kept] = np.clip(images, 0, 1)[0, 0, kept]
        np.testing.assert_allclose(project(images, original, jnp.array([float(eps)]), "l0"), expected, atol=1e-7)


def test_distances_by_hand():
    delta = jnp.array([[0.3, 0.0, -0.4, 0.0], [0.0, 0.0, 0.0, 0.0]]).reshape(2, 2, 2, 1)
    for which, expected in zip(NORMS, (0.4, 0.5, 0.7, 2), strict=True):
        np.testing.assert_allclose(distance(delta, which), [expected, 0], rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1.0, 1e25])
def test_steepest_directions_have_unit_length_at_any_scale(scale):
    gradient = np.random.default_rng(0).normal(size=(3, 4, 4, 2))
    gradient[1] = 0
    unit = np.asarray(steepest(jnp.asarray(gradient * scale, jnp.float32), "l2"))
    expected = gradient / np.maximum(np.linalg.norm(gradient.reshape(3, -1), axis=1), 1e-9).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(unit, expected, atol=1e-6)
    np.testing.assert_array_equal(
        steepest(jnp.asarray(gradient * scale, jnp.float32), "linf"), np.sign(gradient).astype(np.float32)
    )


def test_random_points_are_uniform_in_the_ball():
    keys = jax.random.split(jax.random.key(1), 4000)
    centre = jnp.full((4000, 1, 3, 1), 0.5)
    eps = jnp.full(4000, 0.2)
    offsets = np.asarray(random_in_ball(keys, centre, eps, "l2") - 0.5).reshape(4000, 3)
    radius = np.linalg.norm(offsets, axis=1) / 0.2
    assert radius.max() <= 1.0001
    # P(radius < r) = r^3 in three dimensions; four standard deviations of the mean.
    np.testing.assert_allclose([(radius < r).mean() for r in (0.3, 0.6, 0.9)], [0.027, 0.216, 0.729], atol=0.03)
    np.testing.assert_allclose(offsets.mean(0), 0, atol=4 * 0.2 / np.sqrt(5 * 4000))
    offsets = np.asarray(random_in_ball(keys, centre, eps, "linf") - 0.5).reshape(4000, 3) / 0.2
    assert np.abs(offsets).max() <= 1.0001
    np.testing.assert_allclose([(offsets[:, 0] < r).mean() for r in (-0.5, 0.0, 0.5)], [0.25, 0.5, 0.75], atol=0.03)


# Objectives


LOGITS = np.array([[1.0, 2.0, -0.5], [0.3, 0.1, 0.2], [-3.0, -4.0, -3.5]], np.float32)
CHOSEN = np.array([1, 0, 2])


def cross_entropy(logits, classes):
    return -jax.nn.log_softmax(logits)[jnp.arange(logits.shape[0]), classes]


def test_log_odds_is_the_log_of_the_odds_and_cross_entropy_its_softplus():
    odds = objective.log_odds(jnp.asarray(LOGITS), jnp.asarray(CHOSEN))
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    own = p[np.arange(3), CHOSEN]
    np.testing.assert_allclose(odds, np.log((1 - own) / own), rtol=1e-5)
    np.testing.assert_allclose(jax.nn.softplus(odds), cross_entropy(LOGITS, CHOSEN), rtol=1e-5)


def test_log_odds_descends_as_cross_entropy_does():
    by_odds = jax.grad(lambda z: jnp.sum(objective.log_odds(z, jnp.asarray(CHOSEN))))(jnp.asarray(LOGITS))
    by_entropy = jax.grad(lambda z: jnp.sum(cross_entropy(z, CHOSEN)))(jnp.asarray(LOGITS))

    def unit(g):
        return np.asarray(g) / np.linalg.norm(g, axis=1, keepdims=True)

    np.testing.assert_allclose(unit(by_odds), unit(by_entropy), atol=1e-6)
    # Where cross-entropy underflows, the direction is still there.
    confident = 1e4 * jnp.asarray(LOGITS)[:1]
    assert not np.asarray(jax.grad(lambda z: cross_entropy(z, CHOSEN[:1])[0])(confident)).any()
    gradient = jax.grad(lambda z: objective.log_odds(z, jnp.asarray(CHOSEN[:1]))[0])(confident)
    np.testing.assert_allclose(gradient, [[1.0, -1.0, 0.0]], atol=1e-6)


def test_a_confident_linear_model_is_attacked_in_its_own_direction():
    """Logits times 1e4: the first step is the same."""
    model, images, labels, _ = linear(5)
    confident = Partial(lambda m, x: 1e4 * m(x), model)
    two = linear(2)
    for attack in (IFGSM(eps=0.1, steps=2), PGD(eps=0.3, norm="l2", steps=2, random_start=False)):
        state = start(attack, confident, images, labels, key=KEY)
        moved = np.asarray(advance(attack, confident, state, 1).images - state.images)
        assert np.abs(moved).reshape(6, -1).max(1).min() > 1e-3
        # With two classes softmax weights do not matter at all.
        states = [
            advance(attack, m, start(attack, m, two[1], two[2], key=KEY), 1)
            for m in (two[0], Partial(lambda m, x: 1e4 * m(x), two[0]))
        ]
        np.testing.assert_allclose(states[0].images, states[1].images, atol=1e-6)


def test_margin_and_success_by_hand():
    logits, labels, targets = jnp.asarray(LOGITS), jnp.asarray(CHOSEN), jnp.asarray([0, 2, 0])
    np.testing.assert_allclose(objective.margin(logits, labels, None), [1.0, 0.1, -0.5], atol=1e-6)
    np.testing.assert_allclose(objective.margin(logits, labels, targets), [1.0, 0.1, -0.5], atol=1e-6)
    for kappa, expected in ((0.0, [0, 0, 1]), (0.49, [0, 0, 1]), (0.51, [0, 0, 0])):
        np.testing.assert_array_equal(objective.succeeded(logits, labels, None, kappa), expected)
        np.testing.assert_array_equal(objective.succeeded(logits, labels, targets, kappa), expected)
    tie = jnp.zeros((1, 3))
    assert not objective.succeeded(tie, labels[:1], None, 0.0)[0]
    assert not objective.succeeded(tie.at[0, 2].set(jnp.nan), labels[:1], None, 0.0)[0]


@pytest.mark.parametrize("ruled_out", [[], [1], [0, 1, 3]])
def test_logits_are_picked_and_their_rounding_measured(rng, ruled_out):
    logits, classes = rng.normal(size=(5, 5)).astype(np.float32) * 30, np.asarray([2, 4, 4, 2, 2])
    logits[:, ruled_out] = -np.inf
    logits[4, 2] = 1e6  # a float32 has 7 digits: the difference of such numbers fewer than four behind the point
    expected, kept = logits[np.arange(5), classes], np.delete(logits, ruled_out, axis=1)
    logits, classes = jnp.asarray(logits), jnp.asarray(classes)
    np.testing.assert_array_equal(objective.pick(logits, classes), expected)
    weights = rng.normal(size=5).astype(np.float32)
    gradient = jax.grad(lambda x: jnp.sum(weights * objective.pick(x, classes)))
    np.testing.assert_array_equal(gradient(logits), weights[:, None] * np.eye(5, dtype=np.float32)[classes])
    assert "scatter" not in str(jax.make_jaxpr(gradient)(logits)), "a loop on CPUs"
    difference, largest = np.ptp(kept, axis=1), np.abs(kept).max(axis=1)
    if kept.shape[1] == 2:
        difference = np.maximum(difference, 1)
    least = np.maximum(objective.ROUNDING * difference, 4 * np.finfo(np.float32).eps * largest)
    np.testing.assert_allclose(objective.rounding(logits), least, rtol=1e-6)


def test_a_list_is_one_value_for_every_example():
    model, images, labels, _ = linear(3)
    values = [0.1, 0.2, 0.3, 0.05, 0.0, 0.15]
    listed, plain = IFGSM(steps=2), IFGSM(eps=jnp.array(values), steps=2)
    object.__setattr__(listed, "eps", values)  # past the types that the tests check in constructors
    first, second = (run(attack, model, images, labels, key=KEY) for attack in (listed, plain))
    np.testing.assert_array_equal(first.images, second.images)


def test_a_class_that_the_model_rules_out_does_not_shield_the_others():
    model, images, labels, _ = linear(3)
    masked = Partial(lambda m, x: jnp.concatenate([m(x), jnp.full((x.shape[0], 1), -jnp.inf)], axis=1), model)
    for attack in (IFGSM(eps=0.2, steps=5), CW(search_steps=3, steps=40, lr=0.1, initial_const=1.0)):
        plain, result = (run(attack, m, images, labels, key=KEY) for m in (model, masked))
        assert np.asarray(plain.success).any()
        np.testing.assert_array_equal(result.success, plain.success)
        np.testing.assert_allclose(result.l2, plain.l2, rtol=1e-4)


@pytest.mark.parametrize("attack", [APGD(eps=0.3, loss="dlr", steps=10), APGDT(eps=0.3, classes=3, steps=10)])
@pytest.mark.parametrize("live", [2, 3])
def test_ratios_of_logits_are_those_of_the_classes_that_are_left(attack, live):
    """Of six classes the model rules out all but two or three; a divisor that is infinite would hide every slope."""
    model, images, _, _ = linear(6)
    mask = jnp.where(jnp.arange(6) < live, 0, -jnp.inf)
    masked = Partial(lambda m, x: m(x) + mask, model)
    labels = jnp.argmax(masked(images), axis=1)
    result = run(attack, masked, images, labels, key=KEY)
    expected = run(APGD(eps=0.3, steps=10), masked, images, labels, key=KEY)
    assert np.asarray(expected.success).any()
    np.testing.assert_array_equal(result.success, expected.success)


def test_of_two_classes_a_success_exceeds_rounding_too():
    """At the boundary their difference is the margin itself, and no measure of what it was computed from."""
    model, _, _, _ = linear(2)
    images = jnp.asarray(np.random.default_rng(3).uniform(size=(64, *SHAPE)), jnp.float32)
    labels = jnp.argmax(model(images), axis=1)
    for attack in (FAB(steps=10), FAB(norm="linf", steps=10), DeepFool(), DDN(steps=30)):
        result = run(attack, model, images, labels, key=KEY)
        exact = np.asarray(result.images, np.float64).reshape(64, -1) @ np.asarray(model.args[0][0], np.float64)
        exact = exact + np.asarray(model.args[0][1], np.float64)
        assert np.asarray(result.success).sum() > 32
        assert (exact.argmax(1) != labels)[np.asarray(result.success)].all()


# The search of Carlini and Wagner


def slow_cw(x0, y, weights, bias, *, lr, const, kappa, search_steps, steps):
    """The attack for one image and a linear model, in float64 and plain NumPy: constants tried, iterations, best L2."""
    x0, w, b = x0.astype(np.float64).ravel(), weights.astype(np.float64), np.asarray(bias, np.float64)
    lower, upper, best, tried, spent = 0.0, np.inf, np.inf, [], []
    for _ in range(search_steps):
        tried.append(const)
        v = np.arctanh((2 * x0 - 1) * 0.999999)
        m = s = np.zeros_like(v)
        found, checked = False, np.inf
        for k in range(1, steps + 1):
            x = (np.tanh(v) + 1) / 2
            z = x @ w + b
            others = [j for j in range(len(z)) if j != y]
            rival = max(others, key=lambda j: z[j])
            f = z[y] - z[rival] + kappa
            l2 = np.linalg.norm(x - x0)
            if z[rival] - z[y] > kappa + 1e-5 * np.ptp(z):
                found, best = True, min(best, l2)
            loss = l2**2 + const * max(f, 0)
            g = 2 * (x - x0) + (const * (w[:, y] - w[:, rival]) if f > 0 else 0)
            g = g * (1 - np.tanh(v) ** 2) / 2
            m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g**2
            v = v - lr * (m / (1 - 0.9**k)) / (np.sqrt(s / (1 - 0.999**k)) + 1e-8)
            if k % max(steps // 10, 10) == 0:
                if loss > 0.9999 * checked:
                    break
                checked = loss
        spent.append(k)
        if found:
            upper = min(upper, const)
        else:
            lower = max(lower, const)
        const = (lower + upper) / 2 if np.isfinite(upper) else const * 10
    return tried, spent, best


def test_cw_searches_as_a_slow_program_does():
    model, images, labels, weights = linear(3, seed=2)
    chosen: dict[str, Any] = {"lr": 0.02, "kappa": 0.5, "search_steps": 7, "steps": 60}
    attack = CW(initial_const=1e-3, **chosen)
    state = start(attack, model, images, labels, key=KEY)
    consts = [[] for _ in images]
    previous = np.full(len(images), -1)
    while not np.asarray(state.done).all():
        search = np.asarray(state.progress.problem)
        for i in np.flatnonzero((search != previous) & ~np.asarray(state.done)):
            consts[i].append(float(state.bracket.const[i]))
        previous = search
        state = advance(attack, model, state, 1)
    result = finish(attack, state)
    lengths = set()
    for i, image in enumerate(images):
        tried, spent, best = slow_cw(image, labels[i], weights, model.args[0][1], const=1e-3, **chosen)
        np.testing.assert_allclose(consts[i], tried, rtol=1e-5)
        np.testing.assert_allclose(result.l2[i], best, rtol=1e-3)
        assert int(result.backward[i]) == sum(spent)
        assert int(result.forward[i]) == sum(spent)
        lengths.add(sum(spent))
    assert len(lengths) > 1  # each example aborted at its own time
    assert min(lengths) < 7 * 60


def test_without_early_abort_every_iteration_is_made():
    model, images, labels, _ = linear(3, seed=2)
    result = run(CW(search_steps=2, steps=40, abort_early=False), model, images, labels, key=KEY)
    np.testing.assert_array_equal(result.backward, 80)
