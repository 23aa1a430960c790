"""DDN, FMN, DeepFool and FAB against what is known by hand or from slow programs in float64.

For logits Z = x W + b, the nearest point at which Z_j reaches Z_y has distance (Z_y - Z_j) / ||w_j - w_y||_q in the
norm with the dual q, as long as the box is not in the way. The nearest rival is also the nearest target.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy.optimize import bisect, linprog

from jaxinterp import attacks
from jaxinterp.attacks import DDN, FAB, FMN, DeepFool, boundary, finish, objective, start
from jaxinterp.attacks.attack import Examples
from jaxinterp.attacks.constraint import Norm, farthest, to_hyperplane
from jaxinterp.attacks.schedule import cosine

SHAPE = (6, 5, 3)
KEY = jax.random.key(0)
# In one program: what is unfinished in smaller batches is up to test_compaction.py.
run = functools.partial(attacks.run, compact=False)
advance = functools.partial(attacks.advance, compact=False)
ORDER: dict[str, Any] = {"l1": 1, "l2": 2, "linf": np.inf}
EXHAUSTIVE = pytest.mark.exhaustive
DUAL: dict[str, Any] = {"l1": np.inf, "l2": 2, "linf": 1}

CASES: dict[str, Any] = {
    "ddn": DDN(initial_radius=0.1),
    "fmn-l0": FMN(norm="l0", steps=60),
    "fmn-l1": FMN(norm="l1", steps=60),
    "fmn-l2": FMN(norm="l2", steps=60),
    "fmn-linf": FMN(norm="linf", steps=60),
    "deepfool-l2": DeepFool(norm="l2"),
    "deepfool-linf": DeepFool(norm="linf"),
    "fab-l1": FAB(norm="l1", steps=20),
    "fab-l2": FAB(norm="l2", steps=20),
    "fab-linf": FAB(norm="linf", steps=20),
}


def affine(p, x):
    return x.reshape(x.shape[0], -1) @ p[0] + p[1]


def linear(classes: int, seed: int = 0, low: float = 0.35, high: float = 0.65):
    """A linear model, images, and their labels; with the defaults the solutions lie inside the box, except in L0."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(np.prod(SHAPE), classes)).astype(np.float32)
    images = rng.uniform(low, high, size=(6, *SHAPE)).clip(0, 1).astype(np.float32)
    bias = (-images.reshape(6, -1).mean(0) @ weights).astype(np.float32)
    model = Partial(affine, (jnp.asarray(weights), jnp.asarray(bias)))
    labels = np.asarray(model(jnp.asarray(images))).argmax(1)
    return model, images, labels, weights.astype(np.float64), bias.astype(np.float64)


def shortest(x, normal, gap, norm):
    """Length of the shortest d with <normal, d> >= gap and x + d in the box, as a linear program or in closed form."""
    n, x = x.size, x.ravel().astype(np.float64)
    room = np.where(normal > 0, 1 - x, x)
    if norm == "l0":
        return 1 + np.searchsorted(np.cumsum(np.sort(np.abs(normal) * room)[::-1]), gap)
    if norm == "l2":  # d = sign(normal) min(t |normal|, room), as the conditions of Kuhn and Tucker say
        t = bisect(lambda t: np.abs(normal) @ np.minimum(t * np.abs(normal), room) - gap, 0, 1e6)
        return np.linalg.norm(np.minimum(t * np.abs(normal), room))
    if norm == "l1":  # d = u - v
        bounds = [(0, 1 - v) for v in x] + [(0, v) for v in x]
        return linprog(np.ones(2 * n), A_ub=[np.r_[-normal, normal]], b_ub=[-gap], bounds=bounds).fun
    bounds = [(-v, 1 - v) for v in x] + [(0, None)]
    smaller = np.block([[np.eye(n), -np.ones((n, 1))], [-np.eye(n), -np.ones((n, 1))], [-normal, np.zeros(1)]])
    return linprog(np.r_[np.zeros(n), 1], A_ub=smaller, b_ub=np.r_[np.zeros(2 * n), -gap], bounds=bounds).fun


def optimum(problem, norm, kappa=0.0):
    """Distance [B] to the nearest rival at a margin of kappa, and that rival [B]."""
    model, images, labels, weights, _ = problem
    logits = np.asarray(model(jnp.asarray(images)), np.float64)
    distances = np.full(logits.shape, np.inf)
    for i, (image, z, y) in enumerate(zip(images, logits, labels, strict=True)):
        for j in set(range(len(z))) - {y}:
            distances[i, j] = shortest(image, weights[:, j] - weights[:, y], z[y] - z[j] + kappa, norm)
    return distances.min(1), distances.argmin(1)


# Minimal distances


# Every attack in one of the two: with targets among several classes, or between two classes, in a wider box too.
TARGETED = ("fmn-l0", "fmn-l1", "fmn-l2", "deepfool-linf", "fab-linf")


@pytest.mark.parametrize(
    ("case", "classes", "targeted"),
    [
        pytest.param(case, *more, marks=() if more == ((5, True) if case in TARGETED else (2, False)) else EXHAUSTIVE)
        for case in CASES
        for more in ((2, False), (5, True), (2, True), (5, False))
    ],
)
def test_the_result_is_near_the_nearest_point(case, classes, targeted):
    problem = linear(classes)
    model, images, labels, *_ = problem
    norm = case.partition("-")[2] or "l2"
    best, rival = optimum(problem, norm)
    result = run(CASES[case], model, images, labels, rival if targeted else None, key=KEY)
    assert np.asarray(result.success).all()
    ratio = np.asarray(getattr(result, norm)) / best
    assert ratio.min() > 0.999
    assert ratio.max() < (1.05 if norm == "l2" else 1.25)
    logits = np.asarray(result.images, np.float64).reshape(6, -1) @ problem[3] + problem[4]
    rows = np.arange(6)
    others = np.where(np.arange(classes) == labels[:, None], -np.inf, logits).max(1)
    assert ((logits[rows, rival] if targeted else others) > logits[rows, labels] - 1e-5).all()


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=EXHAUSTIVE if case in TARGETED else ()) for case in CASES if case != "fmn-l0"],
)
def test_the_box_and_confidence_move_the_nearest_point(case):
    """Two classes, most pixels at 0 or 1, and a margin that many of them have to move for."""
    problem = linear(2, seed=3, low=-0.5, high=1.5)
    model, images, labels, *_ = problem
    norm = case.partition("-")[2] or "l2"
    best, _ = optimum(problem, norm, kappa=6.0)
    free, _ = optimum((model, np.full_like(images, 0.5), labels, *problem[3:]), norm, kappa=6.0)
    assert not np.allclose(best, free, rtol=0.1)
    result = run(dataclasses.replace(CASES[case], kappa=6.0), model, images, labels, key=KEY)
    assert np.asarray(result.success).all()
    ratio = np.asarray(getattr(result, norm)) / best
    assert ratio.min() > 0.999
    assert ratio.max() < (1.05 if norm == "l2" else 1.25)


@pytest.mark.parametrize("classes", [5, 10])
def test_ddn_at_its_defaults_ends_at_the_nearest_of_several_rivals(classes):
    problem = linear(classes)
    model, images, labels, *_ = problem
    best, _ = optimum(problem, "l2")
    within = best > 0.95**100 / 0.9  # what its radius can reach
    assert within.sum() >= 4
    result = run(DDN(), model, images, labels, key=KEY)
    assert np.asarray(result.success).all()
    ratio = np.asarray(result.l2) / best
    assert ratio.min() > 0.999
    assert ratio[within].max() < 1.05


def test_ddn_with_cross_entropy_comes_as_near_where_the_network_is_confident():
    """Then it does not blend the directions to several rivals."""
    problem = linear(5)
    model, images, labels, *_ = problem
    best, _ = optimum(problem, "l2")
    confident = Partial(lambda m, x: 1e4 * m(x), model)
    result = run(DDN(initial_radius=0.1, loss="cross_entropy"), confident, images, labels, key=KEY)
    ratio = np.asarray(result.l2) / best
    assert ratio.min() > 0.999
    assert ratio.max() < 1.05


# Slow programs and single steps


def test_ddn_walks_as_a_slow_program_does():
    model, images, labels, weights, bias = linear(3, seed=1)
    steps, attack = 30, DDN(initial_radius=0.3, gamma=0.1, kappa=0.1, loss="cross_entropy", steps=30)
    result = run(attack, model, images, labels, key=KEY)
    for i, image in enumerate(images):
        x0 = image.astype(np.float64).ravel()
        delta, radius, best = np.zeros_like(x0), 0.3, np.inf
        for k in range(steps + 1):
            z = (x0 + delta) @ weights + bias
            rivals = np.delete(np.arange(3), labels[i])
            found = z[rivals].max() - z[labels[i]] > 0.1 + 1e-5 * np.ptp(z)
            if found:
                best = min(best, np.linalg.norm(delta))
            p = np.exp(z - z.max())
            gradient = weights @ (p / p.sum() - np.eye(3)[labels[i]])
            length = 0.01 + 0.99 * (1 + np.cos(np.pi * k / steps)) / 2
            delta = delta + length * gradient / np.linalg.norm(gradient)
            radius *= 0.9 if found else 1.1
            delta = np.clip(x0 + radius * delta / np.linalg.norm(delta), 0, 1) - x0
        assert np.isfinite(best)
        np.testing.assert_allclose(result.l2[i], best, rtol=1e-3)
    np.testing.assert_array_equal(result.forward, steps + 1)
    np.testing.assert_array_equal(result.backward, steps)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_fmn_walks_as_a_slow_program_does(norm):
    """Of a curved network, as on a linear one the first estimate is exact, and its success a matter of rounding."""
    model, images, labels, weights, bias = linear(3, seed=1)
    model = Partial(lambda m, x: m(x) + 0.1 * m(x) ** 3, model)
    steps = 20
    attack = FMN(norm=norm, step_size=0.5, gamma=0.2, final_gamma=0.01, kappa=0.1, steps=steps)
    state = start(attack, model, images, labels, key=KEY)
    radii = []
    for _ in range(steps):
        state = advance(attack, model, state, 1)
        radii.append(np.asarray(state.radius))
    result = finish(attack, advance(attack, model, state))
    for i, image in enumerate(images):
        x0 = image.astype(np.float64).ravel()
        delta, radius, best = np.zeros_like(x0), 0.0, np.inf
        for k in range(steps):
            z = (x0 + delta) @ weights + bias
            slopes, z = weights * (1 + 0.3 * z**2), z + 0.1 * z**3
            rivals = np.delete(np.arange(3), labels[i])
            rival = rivals[z[rivals].argmax()]
            gradient = slopes[:, labels[i]] - slopes[:, rival]
            margin, size = z[labels[i]] - z[rival], np.linalg.norm(delta, ORDER[norm])
            cos = (1 + np.cos(np.pi * k / steps)) / 2
            gamma, length = 0.01 + 0.19 * cos, 0.005 + 0.495 * cos
            lacking = margin + 0.1 + 1e-5 * np.ptp(z)
            if lacking < 0:
                best = min(best, size)
                radius = min((1 - gamma) * radius, best)
            elif np.isfinite(best):
                radius *= 1 + gamma
            else:
                radius = size + max(lacking / np.linalg.norm(gradient, DUAL[norm]), gamma * size)
            np.testing.assert_allclose(radii[k][i], radius, rtol=1e-3)
            delta = delta - length * gradient / np.linalg.norm(gradient)
            shrunk = delta * min(1, radius / np.linalg.norm(delta))
            delta = shrunk if norm == "l2" else np.clip(delta, -radius, radius)
        assert np.isfinite(best)
        assert result.success[i]
        last = np.linalg.norm(delta, ORDER[norm])  # judged by one more call
        assert min(abs(float(getattr(result, norm)[i]) - d) for d in (best, last)) < 1e-3 * best


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_first_step_of_deepfool_by_hand(norm, targeted):
    problem = linear(5)
    model, images, labels, weights, _ = problem
    targets = (labels + 1) % 5 if targeted else None
    attack = DeepFool(norm=norm, overshoot=0.1, kappa=0.3)
    state = advance(attack, model, start(attack, model, images, labels, targets, key=KEY), 1)
    logits = np.asarray(model(jnp.asarray(images)), np.float64)
    for i, (z, y) in enumerate(zip(logits, labels, strict=True)):
        pairs = [(y, j) for j in range(5) if j != y]
        if targets is not None:  # the label is the largest other class
            pairs = [(y, targets[i])]
        normals = [weights[:, b] - weights[:, a] for a, b in pairs]
        gaps = [z[a] - z[b] + 0.3 for a, b in pairs]
        nearest = np.argmin([g / np.linalg.norm(w, DUAL[norm]) for g, w in zip(gaps, normals, strict=True)])
        w, gap = normals[nearest], gaps[nearest]
        step = gap / (w @ w) * w if norm == "l2" else gap / np.abs(w).sum() * np.sign(w)
        np.testing.assert_allclose(state.images[i].ravel() - images[i].ravel(), 1.1 * step, atol=2e-5 * abs(gap))
    assert (np.asarray(state.record.backward) == (1 if targeted else 4)).all()


def test_fab_t_goes_to_one_rival_after_the_other():
    """Alone, the rival with the largest logit; with all rivals, the one with the nearest boundary."""
    problem = linear(5, seed=7)
    model, images, labels, weights, _ = problem
    best, nearest = optimum(problem, "l2")
    rows, logits = np.arange(6), np.asarray(model(jnp.asarray(images)), np.float64)
    others = logits.copy()
    others[rows, labels] = -np.inf
    first = others.argmax(1)
    away = (logits[rows, labels] - logits[rows, first]) / np.linalg.norm(weights[:, labels] - weights[:, first], axis=0)
    farther = first != nearest
    assert farther.any()
    assert (away[farther] > 1.02 * best[farther]).all()
    alone = run(FAB(classes=1, steps=10), model, images, labels, key=KEY)
    np.testing.assert_allclose(alone.l2, away, rtol=0.01)
    whole = run(FAB(classes=9, steps=10), model, images, labels, key=KEY)
    np.testing.assert_allclose(whole.l2, best, rtol=0.01)
    np.testing.assert_array_equal(alone.backward, 10)
    np.testing.assert_array_equal(whole.backward, 4 * 10)  # there are four rivals


def test_the_rivals_of_fab_t_are_those_of_the_original():
    model, images, labels, _, _ = linear(5, seed=7)
    attack, examples = FAB(classes=9, steps=3, eta=20.0), Examples(jnp.asarray(images), jnp.asarray(labels), None, None)
    first = np.asarray(boundary.ranked(model(examples.images), examples, 4))
    state = start(attack, model, images, labels, key=KEY)
    orders = []
    for _ in range(4):
        state = advance(attack, model, state, 1)
        np.testing.assert_array_equal(state.rivals, first)
        orders.append(np.asarray(boundary.ranked(model(state.images), examples, 4)))
    assert (orders[0] != first).any(), "at the successor of the original it is another one"


@pytest.mark.parametrize("norm", ["l2", *(pytest.param(more, marks=pytest.mark.exhaustive) for more in ("l1", "linf"))])
def test_two_iterations_and_the_search_of_fab_by_hand(norm):
    """Two classes: one hyperplane. The first iterate lies 1.05 away; the search ends on the boundary."""
    problem = linear(2)
    model, images, labels, weights, _ = problem
    best, _ = optimum(problem, norm)
    attack = FAB(norm=norm, steps=2, alpha_max=0.2, beta=0.7)
    state = advance(attack, model, start(attack, model, images, labels, key=KEY), 2)  # there, and a look at it
    if norm == "l1":  # on the component with the largest slope
        d_0 = np.zeros((6, np.prod(SHAPE)))
        normal = weights[:, 1] - weights[:, 0]
        d_0[:, np.abs(normal).argmax()] = best * np.sign(normal[np.abs(normal).argmax()]) * (1 - 2 * labels)
    else:
        normal = (weights[:, 1] - weights[:, 0]) * (1 - 2 * labels[:, None])
        d_0 = normal if norm == "l2" else np.sign(normal)
        d_0 = best[:, None] * d_0 / np.linalg.norm(d_0, ORDER[norm], axis=1, keepdims=True)
    x0 = images.reshape(6, -1)
    # At x_0, d = d_0 and a = 0.2: x_1 = x_0 + 1.05 d_0, a success, and back to 0.7 of it.
    np.testing.assert_allclose(getattr(finish(attack, state), norm), 1.05 * best, rtol=3e-3)
    x1 = 0.7 * 1.05 * d_0
    np.testing.assert_allclose(state.images.reshape(6, -1) - x0, x1, atol=2e-5)
    # From there d = (1 - 0.735) d_0, so that a = min(0.265 / 1.265, 0.2) = 0.2.
    d = (1 - 0.735) * d_0
    x2 = 0.8 * (x1 + 1.05 * d) + 0.2 * 1.05 * d_0
    state = advance(attack, model, state, 2)
    np.testing.assert_allclose(getattr(finish(attack, state), norm), np.linalg.norm(x2, ORDER[norm], axis=1), rtol=3e-3)
    assert not np.asarray(state.done).any()
    # The search looks first where the difference of logits would be zero, and a hundredth of the rest beyond.
    after = finish(attack, advance(attack, model, state, 1))
    np.testing.assert_allclose(getattr(after, norm), best, rtol=3e-3)
    result = finish(attack, advance(attack, model, state))
    np.testing.assert_allclose(getattr(result, norm), best, rtol=3e-3)
    np.testing.assert_array_equal(result.forward, 2 * 2 + 3)
    np.testing.assert_array_equal(result.backward, 2)


# Restarts, slopes, candidates


def valley(model_radius, x):
    """Of two classes, the second wins beyond a radius from the centre; within another one there is no slope."""
    inner, outer, centre = model_radius
    square = jnp.sum(jnp.square(x - centre), axis=(1, 2, 3))
    return jnp.stack([jnp.full_like(square, outer - inner), jnp.maximum(square - inner, 0)], axis=1)


def test_restarts_of_fab_find_what_a_point_without_slope_hides():
    centre = jnp.asarray(linear(2)[1])
    model = Partial(valley, (jnp.float32(0.2), jnp.float32(0.3), centre))
    labels = np.zeros(6, int)
    once = run(FAB(steps=10), model, centre, labels, key=KEY)
    assert not np.asarray(once.success).any()
    np.testing.assert_array_equal(once.forward, 2)  # the other iterations would be the same
    np.testing.assert_array_equal(once.backward, 1)
    again = run(FAB(steps=10, restarts=2), model, centre, labels, key=KEY)
    assert np.asarray(again.success).all()
    np.testing.assert_allclose(again.l2, np.sqrt(0.3), rtol=0.02)
    other = run(FAB(steps=10, restarts=2), model, centre, labels, key=jax.random.key(1))
    assert (np.asarray(other.images) != np.asarray(again.images)).mean() > 0.9


@pytest.mark.parametrize("norm", ["l2", *(pytest.param(more, marks=pytest.mark.exhaustive) for more in ("l1", "linf"))])
def test_a_restart_of_fab_lies_at_half_the_reach_on_the_support(norm):
    centre = jnp.full((6, *SHAPE), 0.5)
    model = Partial(valley, (jnp.float32(2000.0), jnp.float32(3000.0), centre))
    support = np.zeros((6, *SHAPE), bool)
    support[:, 2:] = True
    attack = FAB(norm=norm, steps=3, restarts=3, reach=0.6)
    state = start(attack, model, centre, np.zeros(6, int), key=KEY, support=support, ids=np.arange(6))
    offsets = []
    for _ in range(2):
        state = advance(attack, model, state, 2)
        offset = np.asarray(state.images - centre, np.float64)
        np.testing.assert_allclose(np.linalg.norm(offset.reshape(6, -1), ORDER[norm], axis=1), 0.3, rtol=1e-5)
        assert not offset[~support].any()
        assert np.abs(offset[0] - offset[1]).max() > 1e-3  # examples draw their own
        offsets.append(offset)
    assert np.abs(offsets[0] - offsets[1]).max() > 1e-3  # and every restart draws anew


def test_deepfool_stops_where_there_is_no_slope():
    centre = jnp.asarray(linear(2)[1])
    model = Partial(valley, (jnp.float32(0.2), jnp.float32(0.3), centre))
    result = run(DeepFool(), model, centre, np.zeros(6, int), key=KEY)
    assert not np.asarray(result.success).any()
    np.testing.assert_array_equal(result.forward, 1)
    np.testing.assert_array_equal(result.backward, 1)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_the_nearest_boundary_by_hand(norm):
    problem = linear(5, seed=4)
    model, images, labels, weights, _ = problem
    logits, pull_back = objective.linearised(model, jnp.asarray(images))
    z, kappa = np.asarray(logits, np.float64), np.linspace(0, 0.5, 6)
    examples = Examples(jnp.asarray(images), jnp.asarray(labels), None, None)
    for candidates in (1, 2, 10):
        given = examples, jnp.asarray(kappa, jnp.float32), candidates, norm
        found = boundary.nearest(pull_back, examples.images, logits, *given)
        assert boundary.passes(logits, examples, candidates) == min(candidates, 4)
        for i, y in enumerate(labels):
            rivals = [j for j in np.argsort(-z[i]) if j != y][:candidates]
            gaps = [(weights[:, j] - weights[:, y], z[i, y] - z[i, j] + kappa[i]) for j in rivals]
            # In L2 and Linf the box is not in the way; in L1 the steepest components go to its end one after the other.
            if norm == "l1":
                away = [in_l1(images[i].ravel(), slope, gap) for slope, gap in gaps]
            else:
                away = [gap / np.linalg.norm(slope, DUAL[norm]) for slope, gap in gaps]
            j = rivals[int(np.argmin(away))]
            normal = weights[:, j] - weights[:, y]
            largest = np.abs(normal).max()
            np.testing.assert_allclose(found.distance[i], min(away), atol=1e-4)
            np.testing.assert_allclose(found.normal[i].ravel(), normal / largest, atol=1e-5)
            np.testing.assert_allclose(found.gap[i], (z[i, y] - z[i, j] + kappa[i]) / largest, atol=1e-3)
            assert np.vdot(found.step[i], normal) == pytest.approx(z[i, y] - z[i, j] + kappa[i], abs=1e-3)


def in_l1(x, slope, gap):
    """The L1 distance to <slope, d> = gap in the box."""
    left, length = gap, 0.0
    for k in np.argsort(-np.abs(slope)):
        moved = min(1 - x[k] if slope[k] > 0 else x[k], left / abs(slope[k]))
        left, length = left - moved * abs(slope[k]), length + moved
    return length


def test_a_boundary_that_the_box_keeps_out_of_reach_is_the_last():
    """To the first rival it is near, but all pixels that lead there are at their end already."""
    images = jnp.array([1.0, 0.5]).reshape(1, 1, 2, 1)
    slopes = jnp.array([[10.0, 0.0], [0.0, 0.1], [0.0, 10.0]])  # of the rivals; the last one is far

    def model(x):
        rivals = (x - images).reshape(len(x), -1) @ slopes.T + jnp.array([-0.1, -1.0, -2.0])
        return jnp.concatenate([jnp.zeros((len(x), 1)), rivals], axis=1)

    logits, pull_back = objective.linearised(model, images)
    examples = Examples(images, jnp.zeros(1, jnp.int32), None, None)
    found = boundary.nearest(pull_back, images, logits, examples, jnp.zeros(1), 10, "l2")
    np.testing.assert_allclose(found.step.ravel(), [0, 0.2], atol=1e-3)
    np.testing.assert_allclose(found.distance, 0.2, atol=1e-3)
    # Where no boundary can be reached, the step goes towards the one that would be nearest.
    examples = Examples(images, jnp.zeros(1, jnp.int32), None, jnp.array([True, False]).reshape(images.shape))
    logits, pull_back = objective.linearised(model, images - 0.005, examples.support)
    found = boundary.nearest(pull_back, images - 0.005, logits, examples, jnp.zeros(1), 10, "l2")
    np.testing.assert_allclose(found.step.ravel(), [0.005, 0], atol=1e-4)
    assert 1e6 < float(found.distance[0]) < np.inf


def test_no_boundary_where_logits_are_not_numbers_or_do_not_change():
    images = jnp.full((2, *SHAPE), 0.5)
    examples = Examples(images, jnp.zeros(2, jnp.int32), None, None)
    for model in (lambda x: jnp.nan * x[:, 0, 0], lambda x: 0 * x[:, 0, 0]):
        logits, pull_back = objective.linearised(model, images)
        found = boundary.nearest(pull_back, images, logits, examples, jnp.zeros(2), 10, "l2")
        assert np.isinf(np.asarray(found.distance)).all()
        assert not np.asarray(found.normal).any()
        assert not np.asarray(found.gap).any()


# The geometry of hyperplanes and boxes


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_the_shortest_way_to_a_hyperplane_inside_the_box(norm):
    rng = np.random.default_rng(5)
    for low, high in ((0.4, 0.6), (-0.5, 1.5)):  # the second with most pixels at 0 or 1
        images = rng.uniform(low, high, (4, *SHAPE)).clip(0, 1).astype(np.float32)
        normal = rng.normal(size=images.shape)
        normal /= np.abs(normal).reshape(4, -1).max(1).reshape(4, 1, 1, 1)
        room = np.where(normal > 0, 1 - images, images)
        reach = (np.abs(normal) * room).reshape(4, -1).sum(1)
        room_back = np.where(normal > 0, images, 1 - images)
        reach_back = (np.abs(normal) * room_back).reshape(4, -1).sum(1)
        gap = np.array([0.1, 0.6, 0.95, -0.5]) * np.where([1, 1, 1, 0], reach, reach_back)
        d = np.asarray(
            to_hyperplane(jnp.asarray(images), jnp.asarray(normal, jnp.float32), jnp.asarray(gap, jnp.float32), norm)
        )
        assert (images + d).min() >= -1e-6
        assert (images + d).max() <= 1 + 1e-6
        np.testing.assert_allclose((normal * d).reshape(4, -1).sum(1), gap, rtol=1e-4)
        for i in range(4):
            w = normal[i].ravel() * np.sign(gap[i])
            expected = shortest(images[i], w, abs(gap[i]), norm)
            np.testing.assert_allclose(np.linalg.norm(d[i].ravel(), ORDER[norm]), expected, rtol=1e-4)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_ways_to_hyperplanes_by_hand(norm):
    images = jnp.array([0.5, 0.9, 0.2, 0.0]).reshape(1, 1, 4, 1)
    normal = jnp.array([0.5, 1.0, -0.25, 0.0]).reshape(1, 1, 4, 1)

    def way(gap, support=None):
        return np.asarray(to_hyperplane(images, normal, jnp.array([gap]), norm, support)).ravel()

    assert not way(0.0).any()
    # No more than 0.25 + 0.1 + 0.05 is possible: beyond it, the corner nearest to the hyperplane.
    np.testing.assert_allclose(way(0.4), [0.5, 0.1, -0.2, 0], atol=1e-5)
    np.testing.assert_allclose(way(9.0), [0.5, 0.1, -0.2, 0], atol=1e-6)
    middle = {"l1": [0.2, 0.1, 0, 0], "l2": [0.16, 0.1, -0.08, 0], "linf": [0.4 / 3, 0.1, -0.4 / 3, 0]}[norm]
    np.testing.assert_allclose(way(0.2), middle, atol=1e-6)
    support = jnp.array([True, False, True, True]).reshape(1, 1, 4, 1)
    np.testing.assert_allclose(way(9.0, support), [0.5, 0, -0.2, 0], atol=1e-6)
    np.testing.assert_allclose(way(-9.0), [-0.5, -0.9, 0.8, 0], atol=1e-6)


def test_equal_slopes_share_what_is_left_in_l1():
    images, normal = jnp.full((1, 1, 4, 1), 0.5), jnp.array([1.0, 0.5, 0.5, 0.25]).reshape(1, 1, 4, 1)
    d = np.asarray(to_hyperplane(images, normal, jnp.array([0.75]), "l1")).ravel()
    np.testing.assert_allclose(d, [0.5, 0.25, 0.25, 0], atol=1e-6)


def test_the_farthest_image_of_the_box():
    original = jnp.array([0.3, 0.9, 0.5, 0.0]).reshape(1, 1, 4, 1)  # reach 0.7, 0.9, 0.5, 1
    support = jnp.array([True, True, True, False]).reshape(1, 1, 4, 1)
    sizes: dict[Norm, tuple[float, float]] = {
        "l0": (4, 3),
        "l1": (3.1, 2.1),
        "l2": (2.55**0.5, 1.55**0.5),
        "linf": (1.0, 0.9),
    }
    for norm, (everywhere, there) in sizes.items():
        np.testing.assert_allclose(farthest(original, None, norm), [everywhere], rtol=1e-6)
        np.testing.assert_allclose(farthest(original, support, norm), [there], rtol=1e-6)


def test_half_a_cosine():
    first, last = jnp.array([1.0, 2.0, 2.0, 2.0]), jnp.array([0.0, 1.0, 1.0, 1.0])
    values = cosine(first, last, jnp.array([0, 5, 10, 11]), 10)
    np.testing.assert_allclose(values, [1.0, 1.5, 1.0, 1.0], atol=1e-6)


def test_the_shortfall_is_negative_exactly_on_success():
    logits = jax.random.normal(jax.random.key(0), (500, 3))
    labels = jnp.zeros(500, jnp.int32)
    for targets in (None, labels + 1):
        success = np.asarray(objective.succeeded(logits, labels, targets, 0.2))
        assert 0 < success.sum() < 500
        np.testing.assert_array_equal(objective.shortfall(logits, labels, targets, 0.2) < 0, success)
