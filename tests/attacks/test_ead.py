"""EAD against a slow program, closed-form optima of linear models, and projected gradient descent at beta = 0."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxinterp import attacks
from jaxinterp.attacks import CW, EAD, finish, start
from jaxinterp.attacks.ead import shrink

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
    bias = (-images.reshape(6, -1).mean(0) @ weights).astype(np.float32)
    model = Partial(affine, (jnp.asarray(weights), jnp.asarray(bias)))
    labels = np.asarray(model(jnp.asarray(images))).argmax(1)
    return model, images, labels, weights


def test_shrinking_by_hand():
    z = jnp.array([0.5, 0.504, 0.496, 0.52, 0.45, 1.3, -0.2]).reshape(1, 7, 1, 1)
    shrunk = shrink(z, jnp.full_like(z, 0.5), jnp.array([0.005]))
    np.testing.assert_allclose(shrunk.ravel(), [0.5, 0.5, 0.5, 0.515, 0.455, 1.0, 0.0], atol=1e-6)
    assert (np.asarray(shrunk).ravel()[:3] == 0.5).all()


def slow_ead(x0, y, weights, bias, *, lr, beta, rule, const, kappa, search_steps, steps):
    """The attack for one image and a linear model, in float64 and plain NumPy: constants, iterations, best distance."""
    x0, w, b = x0.astype(np.float64).ravel(), weights.astype(np.float64), np.asarray(bias, np.float64)
    lower, upper, best, tried, spent = 0.0, np.inf, np.inf, [], 0

    def f(x):
        z = x @ w + b
        rival = max((j for j in range(len(z)) if j != y), key=lambda j: z[j])
        return z[y] - z[rival], w[:, y] - w[:, rival], 1e-5 * np.ptp(z)

    for _ in range(search_steps):
        tried.append(const)
        x, slack, found, checked = x0, x0, False, np.inf
        for k in range(steps):
            margin, slope, _ = f(slack)
            g = 2 * (slack - x0) + (const * slope if margin + kappa > 0 else 0)
            z = slack - lr * np.sqrt(1 - k / steps) * g
            new = np.where(
                z - x0 > beta, np.minimum(z - beta, 1), np.where(z - x0 < -beta, np.maximum(z + beta, 0), x0)
            )
            slack, x = new + k / (k + 3) * (new - x), new
            margin, _, rounding = f(x)
            l1, l2 = np.abs(x - x0).sum(), np.linalg.norm(x - x0)
            if -margin > kappa + rounding:
                found, best = True, min(best, l1 if rule == "l1" else beta * l1 + l2**2)
            spent += 1
            if (k + 1) % max(steps // 10, 10) == 0:
                loss = const * max(margin + kappa, 0) + beta * l1 + l2**2
                if loss > 0.9999 * checked:
                    break
                checked = loss
        if found:
            upper = min(upper, const)
        else:
            lower = max(lower, const)
        const = (lower + upper) / 2 if np.isfinite(upper) else const * 10
    return tried, spent, best


@pytest.mark.parametrize("rule", ["en", "l1"])
def test_ead_searches_as_a_slow_program_does(rule):
    model, images, labels, weights = linear(3, seed=2)
    chosen: dict[str, Any] = {"lr": 0.02, "beta": 2e-3, "rule": rule, "kappa": 0.5, "search_steps": 6, "steps": 60}
    attack = EAD(initial_const=1e-3, **chosen)
    state = start(attack, model, images, labels, key=KEY)
    consts = [[] for _ in images]
    while not np.asarray(state.done).all():
        for i in np.flatnonzero((np.asarray(state.progress.iteration) == 0) & ~np.asarray(state.done)):
            consts[i].append(float(state.bracket.const[i]))
        state = advance(attack, model, state, 1)
    result = finish(attack, state)
    lengths = set()
    for i, image in enumerate(images):
        tried, spent, best = slow_ead(image, labels[i], weights, model.args[0][1], const=1e-3, **chosen)
        np.testing.assert_allclose(consts[i], tried, rtol=1e-5)
        size = result.l1[i] if rule == "l1" else 2e-3 * result.l1[i] + result.l2[i] ** 2
        np.testing.assert_allclose(size, best, rtol=1e-3)
        assert int(result.backward[i]) == spent
        assert int(result.forward[i]) == 2 * spent
        lengths.add(spent)
    assert len(lengths) > 1  # each example ended its problems at its own time
    assert min(lengths) < 6 * 60


def test_without_the_l1_term_it_is_projected_gradient_descent_on_the_objective_of_cw():
    """With the momentum of FISTA; the gradient is that of an objective written out here."""
    model, images, labels, _ = linear(3, seed=1)
    const, steps, original = 5.0, 40, jnp.asarray(images)

    def objective_of_cw(x):
        z = model(x)
        own = z[jnp.arange(6), labels]
        others = jnp.max(z.at[jnp.arange(6), labels].set(-jnp.inf), axis=1)
        return jnp.sum(const * jnp.maximum(own - others, 0)) + jnp.sum((x - original) ** 2)

    attack = EAD(beta=0.0, lr=0.05, initial_const=const, search_steps=1, steps=steps, abort_early=False)
    state = start(attack, model, images, labels, key=KEY)
    x = y = original
    clipped = False
    for k in range(12):
        state = advance(attack, model, state, 1)
        free = y - 0.05 * np.sqrt(1 - k / steps) * jax.grad(objective_of_cw)(y)
        new = jnp.clip(free, 0, 1)
        clipped = clipped or bool((free != new).any())
        x, y = new, new + k / (k + 3) * (new - x)
        np.testing.assert_allclose(state.x, x, atol=2e-5)
    assert clipped


def nearest_in_l1(gap, slope, x0):
    """The smallest L1 norm in the box that closes the gap: the steepest components first, each to its bound."""
    room = np.where(slope > 0, 1 - x0, x0)
    total = 0.0
    for i in np.argsort(-np.abs(slope)):
        step = min(room[i], gap / abs(slope[i]))
        total, gap = total + step, gap - step * abs(slope[i])
        if gap <= 0:
            return total
    return np.inf


def test_the_l1_rule_comes_near_the_nearest_point_in_l1_and_the_box():
    model, images, labels, weights = linear(2)
    attack = EAD(beta=0.05, lr=0.02, initial_const=0.1, rule="l1", search_steps=7, steps=200)
    result = run(attack, model, images, labels, key=KEY)
    assert np.asarray(result.success).all()
    logits = np.asarray(model(jnp.asarray(images)), np.float64)
    for i, image in enumerate(images):
        y = labels[i]
        slope = (weights[:, 1 - y] - weights[:, y]).astype(np.float64)
        best = nearest_in_l1(logits[i, y] - logits[i, 1 - y], slope, image.ravel().astype(np.float64))
        assert 0.999 * best <= float(result.l1[i]) <= 1.25 * best


def test_without_the_l1_term_it_comes_near_the_nearest_point_in_l2():
    model, images, labels, weights = linear(2)
    result = run(EAD(beta=0.0, initial_const=0.01, search_steps=9, steps=300), model, images, labels, key=KEY)
    logits = np.asarray(model(jnp.asarray(images)), np.float64)
    gap = np.abs(logits[:, 0] - logits[:, 1])
    ratio = np.asarray(result.l2) / (gap / np.linalg.norm(weights[:, 0] - weights[:, 1]))
    assert np.asarray(result.success).all()
    assert ratio.min() > 0.999
    assert ratio.max() < 1.05


def test_its_perturbations_are_shorter_in_l1_and_sparser_than_those_of_cw_and_longer_in_l2():
    model, images, labels, _ = linear(5, seed=3)
    common: dict[str, Any] = {"initial_const": 0.1, "search_steps": 5, "steps": 100}
    cw = run(CW(**common), model, images, labels, key=KEY)
    ead = run(EAD(beta=0.02, **common), model, images, labels, key=KEY)
    assert np.asarray(cw.success).all()
    assert np.asarray(ead.success).all()
    assert np.mean(ead.l1) < 0.7 * np.mean(cw.l1)
    assert np.mean(ead.l0) < 0.5 * np.mean(cw.l0)
    assert np.mean(ead.l2) > np.mean(cw.l2)
