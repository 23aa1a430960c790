"""Attacks that descend inside a ball, against closed forms, steps by hand and slow programs in NumPy.

For two classes and logits Z = x W + b, everything is decided by d = w_y - w_j and the margin m = Z_y - Z_j: the nearest
adversarial point is at m / ||d||_1 in Linf and m / ||d||_2 in L2, as long as the box is not in the way. In L1 the
components with the largest |d_i| go to the end of the box, one after the other, until the margin is used up.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from jax.tree_util import Partial

from jaxinterp.attacks import (
    APGD,
    APGDT,
    DDN,
    FGSM,
    MIFGSM,
    PGD,
    SPSA,
    DiverseInputs,
    Nesterov,
    ScaleInvariant,
    TranslationInvariant,
    VarianceTuning,
    advance,
    boundary,
    finish,
    objective,
    run,
    start,
    transforms,
)
from jaxinterp.attacks.apgd import checkpoints
from jaxinterp.attacks.constraint import largest, movable, random_in_ball, sparse_step
from jaxinterp.attacks.transforms import Query

SHAPE = (6, 5, 3)
KEY = jax.random.key(0)


def affine(p, x):
    return x.reshape(x.shape[0], -1) @ p[0] + p[1]


def linear(classes: int = 2, seed: int = 0):
    """A linear model, images inside the box, and their labels."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(np.prod(SHAPE), classes)).astype(np.float32)
    images = rng.uniform(0.35, 0.65, size=(6, *SHAPE)).astype(np.float32)
    bias = (-images.reshape(6, -1).mean(0) @ weights).astype(np.float32)
    model = Partial(affine, (jnp.asarray(weights), jnp.asarray(bias)))
    labels = np.asarray(model(jnp.asarray(images))).argmax(1)
    return model, images, labels, weights


def optimum(model, images, labels, weights, norm):
    """The smallest distance [B] of success, between two classes."""
    logits = np.asarray(model(jnp.asarray(images)), np.float64)
    found = []
    for x, z, y in zip(images.astype(np.float64), logits, labels, strict=True):
        d, margin = (weights[:, y] - weights[:, 1 - y]).astype(np.float64), z[y] - z[1 - y]
        if norm == "l1":
            order = np.argsort(-np.abs(d))
            room = np.where(d > 0, x.ravel(), 1 - x.ravel())[order]
            gained = np.cumsum(room * np.abs(d[order]))
            i = np.searchsorted(gained, margin)
            before = gained[i - 1] if i else 0.0
            found.append(room[:i].sum() + (margin - before) / np.abs(d[order[i]]))
        else:
            found.append(margin / np.linalg.norm(d, ord=1 if norm == "linf" else 2))
    return np.array(found)


def quadratic(seed: int = 0):
    """Two classes whose difference Z_1 - Z_0 = -|A (x - c)|^2 / 2 + 9 curves, so that long steps overshoot."""
    rng = np.random.default_rng(seed)
    n = int(np.prod(SHAPE))
    a = rng.normal(size=(n, n)) * rng.uniform(0.1, 1, size=n) / np.sqrt(n)
    c = rng.uniform(0.2, 0.8, size=n)
    a, c = a.astype(np.float32), c.astype(np.float32)

    def model(p, x):
        r = (x.reshape(x.shape[0], -1) - p[1]) @ p[0].T
        second = 9 - jnp.sum(r * r, axis=1) / 2
        return jnp.stack([jnp.zeros_like(second), second], axis=1)

    images = rng.uniform(size=(3, *SHAPE)).astype(np.float32)
    return Partial(model, (jnp.asarray(a), jnp.asarray(c))), images, a.astype(np.float64), c.astype(np.float64)


# Minimal distances

ATTACKS = {
    "fgsm": (lambda eps: FGSM(eps=eps), "linf"),
    "pgd-l1": (lambda eps: PGD(eps=eps, norm="l1", steps=40, sparsity=0.05), "l1"),
    "apgd-linf": (lambda eps: APGD(eps=eps, steps=30), "linf"),
    "apgd-l2": (lambda eps: APGD(eps=eps, norm="l2", steps=30), "l2"),
    "apgd-l1": (lambda eps: APGD(eps=eps, norm="l1", steps=50), "l1"),
    "apgdt-l2": (lambda eps: APGDT(eps=eps, norm="l2", steps=20), "l2"),
    "mifgsm": (lambda eps: MIFGSM(eps=eps), "linf"),
    "spsa": (lambda eps: SPSA(eps=eps, lr=0.02, samples=64, steps=40), "linf"),
}


# Those of which no slow program below says what they do.
QUICK = ("fgsm", "pgd-l1", "apgd-linf", "mifgsm", "spsa")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.exhaustive) for name in ATTACKS]
)
def test_success_just_outside_the_optimum_and_not_inside(name):
    model, images, labels, weights = linear()
    make, norm = ATTACKS[name]
    best = optimum(model, images, labels, weights, norm)
    for factor in (0.8, 1.25):
        eps = (factor * best).astype(np.float32)
        result = run(make(jnp.asarray(eps)), model, images, labels, key=KEY)
        np.testing.assert_array_equal(result.success, factor > 1)
        size = np.asarray(getattr(result, norm))
        assert (size <= 1.0001 * eps).all()
        assert (size >= 0.999 * best).all() or factor < 1


@pytest.mark.parametrize("loss", ["dlr", pytest.param("ce", marks=pytest.mark.exhaustive)])
def test_apgd_reaches_a_target_among_several_classes(loss):
    model, images, labels, weights = linear(5)
    targets = (labels + 1) % 5
    logits = np.asarray(model(jnp.asarray(images)))
    rows = np.arange(6)
    # The target has to pass the label, and whichever class is on the way: more than the distance to the label alone.
    slope = np.linalg.norm(weights[:, labels] - weights[:, targets], axis=0)
    eps = 2 * (logits[rows, labels] - logits[rows, targets]) / slope
    result = run(APGD(eps=jnp.asarray(eps), norm="l2", loss=loss, steps=20), model, images, labels, targets, key=KEY)
    assert np.asarray(result.success).all()
    np.testing.assert_array_equal(np.asarray(model(result.images)).argmax(1), targets)


# Restarts


def test_runs_go_on_until_a_success_and_their_passes_are_counted():
    model, images, labels, weights = linear()
    eps = optimum(model, images, labels, weights, "l2") * np.where(np.arange(6) % 2, 1.25, 0.8)
    attack = PGD(eps=jnp.asarray(eps, jnp.float32), norm="l2", steps=5, restarts=3)
    state = start(attack, model, images, labels, key=KEY)
    starts = [np.asarray(state.images)]
    while not np.asarray(state.done).all():
        state = advance(attack, model, state, 1)
        if int(state.count[0]) % 6 == 0:
            starts.append(np.asarray(state.images))
    result = finish(attack, state)
    found = np.arange(6) % 2 == 1
    np.testing.assert_array_equal(result.success, found)
    np.testing.assert_array_equal(result.forward, np.where(found, 6, 18))
    np.testing.assert_array_equal(result.backward, np.where(found, 5, 15))
    assert (np.asarray(result.iterations)[found] < 6).all()
    for before, after in itertools.pairwise(starts[:3]):
        moved = np.abs(after - before).reshape(6, -1).max(1)
        assert (moved[~found] > 1e-3).all()
    # The runs of one that succeeds at once are those of an attack without restarts.
    once = run(PGD(eps=attack.eps, norm="l2", steps=5), model, images, labels, key=KEY)
    np.testing.assert_array_equal(np.asarray(once.images)[found], np.asarray(result.images)[found])


def test_apgd_t_tries_the_strongest_rivals_one_after_the_other():
    model, images, labels, _ = linear(5)
    attack = APGDT(eps=1e-4, classes=3, steps=2, restarts=2)
    state = advance(attack, model, start(attack, model, images, labels, key=KEY), 1)
    np.testing.assert_array_equal(state.record.forward, 1)  # at the original
    np.testing.assert_array_equal(state.record.backward, 0)
    logits = np.array(model(jnp.asarray(images)))
    logits[np.arange(6), labels] = -np.inf
    rivals = np.argsort(-logits, axis=1)[:, :3]
    np.testing.assert_array_equal(state.memory.rivals, rivals)
    # Which holds to the end, whatever other points say.
    far = APGDT(eps=0.05, kappa=100.0, classes=3, steps=3)
    end = advance(far, model, start(far, model, images, labels, key=KEY))
    assert (np.asarray(boundary.ranked(model(end.images), end.examples, 3)) != rivals).any()
    np.testing.assert_array_equal(end.memory.rivals, rivals)
    result = finish(attack, advance(attack, model, state))
    assert not np.asarray(result.success).any()
    np.testing.assert_array_equal(result.forward, 1 + 3 * 2 * 3)  # the ranking, rivals, restarts, passes of a run
    np.testing.assert_array_equal(result.backward, 3 * 2 * 2)
    # All of the rivals that there are, and only the target where one is given.
    few = run(APGDT(eps=1e-4, classes=9, steps=2), model, images, labels, key=KEY)
    np.testing.assert_array_equal(few.backward, 4 * 2)
    given = run(APGDT(eps=1e-4, classes=9, steps=2), model, images, labels, (labels + 1) % 5, key=KEY)
    np.testing.assert_array_equal(given.forward, 3)


def test_apgd_t_descends_towards_its_rival():
    """The first step of a run follows the gradient of the ratio, by the quotient rule, for the two rivals in turn."""
    model, images, labels, weights = linear(5)
    attack = APGDT(eps=1e-4, classes=2, steps=1, random_start=False)
    state = advance(attack, model, start(attack, model, images, labels, key=KEY), 1)  # ranks the rivals
    rivals = np.asarray(state.memory.rivals)
    for turn in range(2):
        before = state.images
        after = np.asarray(advance(attack, model, state, 1).images)
        for i, z in enumerate(np.asarray(model(before), np.float64)):
            top, _, third, fourth = np.argsort(-z)[:4]
            y, r, w = labels[i], rivals[i, turn], weights.astype(np.float64)
            above, below = z[y] - z[r], z[top] - (z[third] + z[fourth]) / 2
            d = (w[:, y] - w[:, r]) / below - above / below**2 * (w[:, top] - (w[:, third] + w[:, fourth]) / 2)
            step = (after[i] - np.asarray(before)[i]).ravel()
            clear = (np.abs(step) > 1e-6) & (np.abs(d) > 1e-3)  # not at the end of the ball, not near a change of sign
            assert clear.sum() > 20
            np.testing.assert_array_equal(np.sign(step[clear]), -np.sign(d[clear]))
        state = advance(attack, model, state, 2)


@pytest.mark.parametrize("random_start", [False, True])
def test_apgd_t_draws_its_first_start_where_that_is_asked_for_and_all_others_always(random_start):
    model, images, labels, _ = linear(5)
    attack = APGDT(eps=1e-2, classes=2, steps=1, restarts=2, random_start=random_start)
    state = advance(attack, model, start(attack, model, images, labels, key=KEY), 1)
    begun = [np.asarray(state.images)]
    for _ in range(2):
        state = advance(attack, model, state, 2)
        begun.append(np.asarray(state.images))
    moved = [(np.abs(images - b) > 1e-6).any(axis=(1, 2, 3)) for b in begun]
    np.testing.assert_array_equal(moved, [[random_start] * 6, [True] * 6, [True] * 6])
    assert np.abs(begun[1] - begun[2]).max() > 1e-3


# The pieces


def test_sparse_steps_by_hand():
    ascent = jnp.array([[3.0, -5.0, 0.0, 1.0, -3.0], [0.0, 0.0, 2.0, 0.0, 0.0]]).reshape(2, 1, 5, 1)
    middle, length = jnp.full(ascent.shape, 0.5), jnp.array([0.3, 0.2])
    for count, expected in ((1, [0, -0.3, 0, 0, 0]), (2, [0.075, -0.15, 0, 0, -0.075]), (3, [0.1, -0.1, 0, 0, -0.1])):
        found = sparse_step(ascent, middle, length, jnp.full(2, float(count)))
        np.testing.assert_allclose(found[0].ravel(), expected, rtol=1e-6)
        np.testing.assert_allclose(found[1].ravel(), [0, 0, 0.2, 0, 0], rtol=1e-6)  # zeros never take part
    # What the box leaves no room for goes to the next; -5 moves up, 3 and 1 down.
    images = jnp.array([[0.04, 0.98, 0.5, 0.5, 1.0], [0.5, 0.5, 0.0, 0.5, 0.5]]).reshape(ascent.shape)
    found = sparse_step(ascent, images, length, jnp.full(2, 2.0))
    np.testing.assert_allclose(found[0].ravel(), [0.04, -0.02, 0, 0.15, 0], atol=1e-6)
    assert not found[1].any()
    # Where fewer components have room than there are parts, the parts are larger.
    images = jnp.array([[0.0, 1.0, 0.5, 0.5, 1.0], [0.5, 0.5, 0.5, 0.5, 0.5]]).reshape(ascent.shape)
    found = sparse_step(ascent, images, length, jnp.full(2, 4.0))
    np.testing.assert_allclose(found.reshape(2, 5), [[0, 0, 0, 0.3, 0], [0, 0, 0.2, 0, 0]], atol=1e-6)
    assert not sparse_step(jnp.zeros((1, 1, 2, 1)), jnp.full((1, 1, 2, 1), 0.5), jnp.ones(1), jnp.ones(1)).any()
    np.testing.assert_array_equal(largest(jnp.array([[2.0, 7.0, 2.0, 2.0]]), jnp.array([3.0])), [[1, 1, 1, 0]])


def test_components_at_the_end_of_the_box_do_not_take_part_in_steps_out_of_it():
    images = jnp.array([0.0, 0.0, 1.0, 1.0, 0.5, 0.5]).reshape(1, 1, 6, 1)
    ascent = jnp.array([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]).reshape(1, 1, 6, 1)  # the image moves against it
    np.testing.assert_array_equal(movable(ascent, images).ravel(), [0, -1, 1, 0, 1, -1])


def test_random_points_are_uniform_in_an_l1_ball():
    keys = jax.random.split(jax.random.key(1), 4000)
    offsets = np.asarray(random_in_ball(keys, jnp.full((4000, 1, 3, 1), 0.5), jnp.full(4000, 0.2), "l1") - 0.5)
    offsets = offsets.reshape(4000, 3) / 0.2
    radius = np.abs(offsets).sum(1)
    assert radius.max() <= 1.0001
    # In three dimensions P(radius < r) = r^3 and P(|x_1| > t) = (1 - t)^3; four standard deviations.
    np.testing.assert_allclose([(radius < r).mean() for r in (0.3, 0.6, 0.9)], [0.027, 0.216, 0.729], atol=0.03)
    tail = [(np.abs(offsets[:, 0]) > t).mean() for t in (0.1, 0.25, 0.5)]
    np.testing.assert_allclose(tail, [0.729, 0.4219, 0.125], atol=0.032)
    np.testing.assert_allclose(offsets.mean(0), 0, atol=0.02)


LOGITS = np.array([[1.0, 4.0, -2.0, 3.0, 0.0], [7.0, 4.0, 1.0, 5.0, 6.0]], np.float32)


def test_the_difference_of_logits_ratio_by_hand():
    labels, targets = jnp.array([1, 2]), jnp.array([4, 3])
    logits = jnp.asarray(LOGITS)
    np.testing.assert_allclose(objective.dlr(logits, labels, None), [(4 - 3) / (4 - 1), (1 - 7) / (7 - 5)])
    np.testing.assert_allclose(objective.dlr(logits, labels, targets), [(4 - 0) / (4 - 0.5), (7 - 5) / (7 - 4.5)])
    np.testing.assert_allclose(objective.dlr_of_rival(logits, labels, targets), [4 / 3.5, (1 - 5) / 2.5])
    # Neither a factor nor a constant changes it.
    np.testing.assert_allclose(
        objective.dlr(8 * logits - 64, labels, None), objective.dlr(logits, labels, None), rtol=1e-6
    )
    # Nothing with fewer classes than the divisor names.
    np.testing.assert_allclose(objective.dlr_of_rival(logits[:, :3], labels, jnp.array([0, 0])), [3, -6])
    np.testing.assert_allclose(objective.dlr(logits[:, :3], labels, jnp.array([2, 0])), [4 + 2, 4 - 7])
    np.testing.assert_allclose(objective.dlr(logits[:, :2], jnp.array([1, 1]), None), [3.0, -3.0])
    assert np.isfinite(jax.grad(lambda z: jnp.sum(objective.dlr(z, labels, None)))(jnp.zeros((2, 5)))).all()


@pytest.mark.parametrize(("factor", "made"), [(1.0, 1), (0.0, 1), (np.nan, 0)])
def test_a_backward_pass_is_a_branch_that_is_taken_whatever_it_is_asked(factor, made):
    """So that a count of passes does not depend on the logits. Without any number there is none, and no gradient."""
    passes = []

    @jax.custom_vjp
    def probe(x):
        return x

    def backward(_, g):
        jax.debug.callback(lambda: passes.append(1))
        return (g,)

    probe.defvjp(lambda x: (x, None), backward)
    model, images, _, _ = linear(3)

    @jax.jit
    def gradient(x):
        return objective.value_and_gradient(lambda x: model(probe(x)), x, lambda z: factor * jnp.sum(z, axis=1))

    _, _, found = gradient(images)
    jax.effects_barrier()
    assert len(passes) == made
    assert np.any(found) == (factor == 1)
    assert not np.signbit(np.asarray(found)[np.asarray(found) == 0]).any()
    if jax.default_backend() == "cpu":
        assert "stablehlo.case" in gradient.lower(images).as_text()


@pytest.mark.parametrize("attack", [APGD(norm="l2", loss="dlr", steps=20), APGDT(norm="l2", steps=20)])
def test_the_ratio_has_a_slope_towards_the_lowest_of_three_classes(attack):
    model, images, _, _ = linear(3)
    logits = np.asarray(model(jnp.asarray(images)))
    labels, targets = logits.argmax(1), logits.argmin(1)
    nearest = run(DDN(steps=100), model, images, labels, targets, key=KEY)
    assert np.asarray(nearest.success).all()
    given = dataclasses.replace(attack, eps=1.25 * nearest.l2)
    assert np.asarray(run(given, model, images, labels, targets, key=KEY).success).all()


# APGD


def test_checkpoints_of_the_paper():
    assert checkpoints(100) == (22, 41, 57, 70, 80, 87, 93, 99)
    assert checkpoints(10) == (3, 5, 6, 7, 8, 9, 10)


def project_l2(x, x0, eps):
    d = x - x0
    return np.clip(x0 + d * min(1, eps / max(np.linalg.norm(d), 1e-30)), 0, 1)


def project_l1(x, x0, eps):
    """The nearest point of ball and box, by bisection."""
    d = np.abs(x - x0)
    room = np.where(x > x0, 1 - x0, x0)
    low, high = 0.0, d.max()
    if np.minimum(d, room).sum() <= eps:
        high = 0.0
    for _ in range(100):
        t = (low + high) / 2
        low, high = (t, high) if np.clip(d - t, 0, room).sum() > eps else (low, t)
    return x0 + np.sign(x - x0) * np.clip(d - high, 0, room)


def slow_apgd(x0, f, gradient, eps, steps, norm):
    """Algorithm 1 of either paper for one image in float64, as it is printed: all iterates, and halvings or returns."""
    d = x0.size
    eta = (1 if norm == "l1" else 2) * eps
    project = project_l1 if norm == "l1" else project_l2
    x, before, iterates, returns = x0, x0, [], 0
    best, losses, kept, changed = x0, [f(x0)], d // 5, d
    marks = checkpoints(steps)
    at, best_at, halved = 0, -np.inf, False
    for k in range(steps):
        g = gradient(x)
        if norm == "l1":
            u, left = np.zeros(d), eta
            for i in np.argsort(-np.abs(g), kind="stable"):  # in print the first `kept`, whether or not there is room
                u[i] = min(eta / kept, x[i] if g[i] > 0 else 1 - x[i], left)
                left -= u[i]
            new = project(x - np.sign(g) * u, x0, eps)
        else:
            z = project(x - eta * g / np.linalg.norm(g), x0, eps)
            a = 0.75 if k else 1.0
            new = project(x + a * (z - x) + (1 - a) * (x - before), x0, eps)
        before, x = x, new
        iterates.append(x)
        losses.append(f(x))
        if losses[-1] < f(best):
            best = x
        if norm == "l1":
            if (k + 1) % max(int(0.04 * steps), 1) == 0:
                now = (best != x0).sum()
                sparser, kept, changed = now / changed < 0.95, max(int(now / 1.5), 1), now
                if sparser:
                    eta, x, returns = eps, best, returns + 1
                else:
                    eta = max(eta / 1.5, eps / 10)
        elif k + 1 in marks:
            lowered = sum(losses[i + 1] < losses[i] for i in range(at, k + 1))
            again = lowered < 0.75 * (k + 1 - at) or (not halved and best_at == f(best))
            if again:
                eta, x, returns = eta / 2, best, returns + 1
            at, best_at, halved = k + 1, f(best), again
    return np.array(iterates), returns


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_apgd_searches_as_a_slow_program_does(norm):
    model, images, a, c = quadratic()
    eps, steps = {"l2": 1.5, "l1": 6.0}[norm], 25
    labels = np.zeros(3, int)  # away from class 0: up the hill to c

    def f(x):
        return np.sum((a @ (x - c)) ** 2) / 2

    def gradient(x):
        return a.T @ (a @ (x - c))

    attack = APGD(eps=eps, norm=norm, steps=steps, random_start=False)
    state = start(attack, model, images, labels, key=KEY)
    found = []
    for _ in range(steps):
        state = advance(attack, model, state, 1)
        found.append(np.asarray(state.images).reshape(3, -1))
    returned = 0
    for i, image in enumerate(images):
        expected, returns = slow_apgd(image.astype(np.float64).ravel(), f, gradient, eps, steps, norm)
        np.testing.assert_allclose([x[i] for x in found], expected, atol=3e-4)
        returned += returns
    assert returned > 0  # otherwise half of the rule was not used


# MI-FGSM


def test_momentum_accumulates_normalised_gradients_by_hand():
    model, images, a, c = quadratic(1)
    attack = MIFGSM(eps=0.3, step_size=0.07, decay=0.6, steps=4)
    state = start(attack, model, images, np.zeros(3, int), key=KEY)
    x, g = images.reshape(3, -1).astype(np.float64), 0.0
    for _ in range(3):
        gradient = (x - c) @ a.T @ a
        g = 0.6 * g + gradient / np.abs(gradient).sum(1, keepdims=True)
        x = np.clip(np.clip(x - 0.07 * np.sign(g), images.reshape(3, -1) - 0.3, images.reshape(3, -1) + 0.3), 0, 1)
        state = advance(attack, model, state, 1)
        np.testing.assert_allclose(state.memory.gradient.reshape(3, -1), g, atol=1e-6)
        np.testing.assert_allclose(state.images.reshape(3, -1), x, atol=1e-6)


# Gradient transformations, of L = |x - c|^2 / 2 + sum(w x): its gradient is x - c + w


CENTRE = np.random.default_rng(3).uniform(size=SHAPE).astype(np.float32)


def bowl(x):
    """Two classes with Z_0 - Z_1 = |x - c|^2 / 2."""
    height = jnp.sum(jnp.square(x - CENTRE), axis=(1, 2, 3)) / 2
    return jnp.stack([height, jnp.zeros_like(height)], axis=1)


def query(eps=0.1, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    images = jnp.asarray(rng.uniform(size=(batch, *SHAPE)), jnp.float32)
    ahead = jnp.asarray(rng.normal(size=images.shape), jnp.float32)
    return Query(images, lambda x: x, jax.random.split(KEY, batch), jnp.full(batch, eps), ahead)


def answer(chain, asked, memory=None):
    memory = transforms.init(chain, asked.images) if memory is None else memory
    arrays = {name: getattr(asked, name) for name in ("images", "keys", "eps", "ahead")}

    @jax.jit
    def compiled(arrays, memory):
        return transforms.update(chain, bowl, lambda z: z[:, 0] - z[:, 1], dataclasses.replace(asked, **arrays), memory)

    logits, gradient, memory = compiled(arrays, memory)
    return np.asarray(logits), np.asarray(gradient), memory


def test_no_transformation_is_the_gradient():
    asked = query()
    logits, gradient, memory = answer((), asked)
    np.testing.assert_allclose(gradient, asked.images - CENTRE, atol=1e-6)
    np.testing.assert_allclose(logits, bowl(asked.images), rtol=1e-6)
    assert memory == {}


def test_nesterov_looks_ahead():
    asked = query()
    np.testing.assert_allclose(answer((Nesterov(),), asked)[1], asked.images + asked.ahead - CENTRE, atol=1e-6)


def test_scales_are_halved_and_their_gradients_averaged():
    asked = query()
    logits, gradient, _ = answer((ScaleInvariant(copies=3),), asked)
    x = np.asarray(asked.images)
    expected = ((x - CENTRE) + (x / 2 - CENTRE) / 2 + (x / 4 - CENTRE) / 4) / 3
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    np.testing.assert_allclose(logits, bowl(asked.images), rtol=1e-6)  # of the image itself


def test_translations_are_a_gaussian_over_the_gradient():
    asked = query()
    _, gradient, _ = answer((TranslationInvariant(sigma=1.3, reach=2),), asked)
    raw = np.asarray(asked.images) - CENTRE
    kernel = np.exp(-np.square(np.arange(-2, 3)) / (2 * 1.3**2))
    kernel /= kernel.sum()
    expected = raw
    for axis in (1, 2):
        expected = scipy.ndimage.convolve1d(expected, kernel, axis=axis, mode="constant")
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_diverse_inputs_are_shrunk_by_nearest_neighbours_and_moved():
    asked = query(batch=200)
    seen = []

    def watching(query, memory):
        seen.append(np.asarray(query.through(query.images)))
        return jnp.zeros(0), query.images, memory

    DiverseInputs(probability=0.5, smallest=0.6).update(watching, asked, {})
    height, width, _ = SHAPE
    images, sizes, places = np.asarray(asked.images), set(), set()
    for x, z in zip(images, seen[0], strict=True):
        rows, columns = np.flatnonzero(z.any((1, 2))), np.flatnonzero(z.any((0, 2)))
        h, w = len(rows), len(columns)
        assert (np.diff(rows) == 1).all()
        assert (np.diff(columns) == 1).all()
        i = ((np.arange(h) + 0.5) * height / h).astype(int)
        j = ((np.arange(w) + 0.5) * width / w).astype(int)
        np.testing.assert_array_equal(z[rows][:, columns], x[i][:, j])
        sizes.add((h, w))
        places.add((h, rows[0]))
    # ceil(0.6 * 6) = 4, ceil(0.6 * 5) = 3; every size and place occurs.
    assert {h for h, _ in sizes} == {4, 5, 6}
    assert {w for _, w in sizes} == {3, 4, 5}
    assert places == {(4, 0), (4, 1), (4, 2), (5, 0), (5, 1), (6, 0)}
    unchanged = np.mean([(x == z).all() for x, z in zip(images, seen[0], strict=True)])
    assert 0.5 < unchanged < 0.8  # one half, and those that drew the full size (1/3 or less of the rest)


def test_the_gradient_of_diverse_inputs_is_with_respect_to_the_image():
    """By a finite difference of the loss behind the same draw."""
    asked = query()
    chain = (DiverseInputs(probability=1.0, smallest=0.5),)
    _, gradient, _ = answer(chain, asked)
    direction = np.random.default_rng(5).normal(size=asked.images.shape).astype(np.float32)

    def loss(step):
        moved = dataclasses.replace(asked, images=asked.images + step * direction)
        logits, _, _ = answer(chain, moved)
        return logits[:, 0] - logits[:, 1]

    expected = (loss(0.5) - loss(-0.5)).astype(np.float64)  # exact for a quadratic
    np.testing.assert_allclose((gradient * direction).sum((1, 2, 3)), expected, rtol=1e-3)
    assert not np.allclose(gradient, np.asarray(asked.images) - CENTRE, atol=1e-2)


def test_variance_is_that_of_neighbours_and_comes_one_step_later():
    asked = query(eps=0.1)
    chain = (VarianceTuning(beta=2.0, samples=200),)
    raw = np.asarray(asked.images) - CENTRE
    logits, gradient, memory = answer(chain, asked)
    np.testing.assert_allclose(gradient, raw, atol=1e-6)
    np.testing.assert_allclose(logits, bowl(asked.images), rtol=1e-6)
    variance = np.asarray(memory["vmi"])  # of this loss, the mean of r_i: uniform within 0.2 of zero
    np.testing.assert_allclose(variance.std(), 0.2 / np.sqrt(3 * 200), rtol=0.2)
    np.testing.assert_allclose(answer(chain, asked, memory)[1], raw + variance, atol=1e-6)
    (only,) = (np.asarray(answer((VarianceTuning(beta=2.0, samples=1),), asked)[2]["vmi"]),)
    assert 0.19 < np.abs(only).max() <= 0.2001
    np.testing.assert_allclose(only.std(), 0.2 / np.sqrt(3), rtol=0.15)


def test_order_does_not_matter_to_what_is_not_drawn():
    asked = query()
    smooth, ahead = TranslationInvariant(sigma=0.7, reach=1), Nesterov()
    wide = DiverseInputs(probability=1.0, smallest=0.5)
    results = [answer(chain, asked)[1] for chain in ((ahead, wide, smooth), (smooth, ahead, wide))]
    np.testing.assert_allclose(results[0], results[1], atol=1e-6)


def test_chains_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"transforms must differ, got ni\+ni"):
        MIFGSM(transforms=(Nesterov(), Nesterov()))
    with pytest.raises(ValueError, match=r"vmi must come before .* got si\+vmi"):
        MIFGSM(transforms=(ScaleInvariant(), VarianceTuning()))
    MIFGSM(transforms=(ScaleInvariant(copies=1), VarianceTuning()))


@pytest.mark.parametrize(
    ("chain", "forward", "backward"),
    [
        ((), 1, 1),
        pytest.param((TranslationInvariant(),), 1, 1, marks=pytest.mark.exhaustive),
        ((Nesterov(),), 2, 1),
        ((ScaleInvariant(copies=3),), 3, 3),
        ((VarianceTuning(samples=2), ScaleInvariant(copies=3)), 9, 9),
        pytest.param((VarianceTuning(samples=2), DiverseInputs()), 4, 3, marks=pytest.mark.exhaustive),
    ],
)
def test_what_a_chain_costs(chain, forward, backward):
    model, images, labels, _ = linear()
    result = run(MIFGSM(eps=1e-4, transforms=chain, steps=2), model, images, labels, key=KEY)
    np.testing.assert_array_equal(result.forward, 2 * forward + 1)
    np.testing.assert_array_equal(result.backward, 2 * backward)


def test_a_chain_of_nothing_changes_nothing():
    model, images, labels, _ = linear(5)
    plain = run(MIFGSM(eps=0.03), model, images, labels, key=KEY)
    chain = (ScaleInvariant(copies=1), DiverseInputs(probability=0.0), TranslationInvariant(sigma=0.0, reach=3))
    same = run(MIFGSM(eps=0.03, transforms=chain), model, images, labels, key=KEY)
    np.testing.assert_array_equal(plain.images, same.images)


# SPSA


def spsa_step(samples, chunk, model, images, labels, lr=1e-3):
    attack = SPSA(eps=0.1, lr=lr, samples=samples, chunk=chunk, steps=3, stop_on_success=False)
    return advance(attack, model, start(attack, model, images, labels, key=KEY), 1)


def first_moment(state):
    """Adam's first moment after one step is a tenth of the gradient."""
    return 10 * np.asarray(state.memory.adam.mu).reshape(len(state.done), -1)


def test_one_direction_of_spsa_by_hand():
    """In a linear model the estimate is (d . v) v, whatever delta: of equal size everywhere."""
    model, images, labels, weights = linear()
    estimate = first_moment(spsa_step(1, 8, model, images, labels))
    size = np.abs(estimate)
    np.testing.assert_allclose(size, np.broadcast_to(size[:, :1], size.shape), rtol=1e-4)
    v = np.sign(estimate)
    d = (weights[:, labels] - weights[:, 1 - labels]).T
    np.testing.assert_allclose((d * v).sum(1), size[:, 0], rtol=1e-2)  # the sign of v itself cancels
    assert len({tuple(row) for row in v}) == 6  # examples draw their own


def test_the_estimate_of_spsa_nears_the_gradient():
    model, images, labels, weights = linear()
    estimate = first_moment(spsa_step(2048, 64, model, images, labels))
    d = (weights[:, labels] - weights[:, 1 - labels]).T
    error = np.linalg.norm(estimate - d, axis=1) / np.linalg.norm(d, axis=1)
    np.testing.assert_allclose(error, np.sqrt(90 / 2048), rtol=0.3)  # relative error sqrt(dimensions / directions)


def test_the_chunk_of_spsa_decides_nothing_but_memory():
    model, images, labels, _ = linear()
    states = [spsa_step(12, chunk, model, images, labels) for chunk in (1, 5, 100)]
    for state in states[1:]:
        np.testing.assert_allclose(first_moment(state), first_moment(states[0]), rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(state.keys, states[0].keys)
