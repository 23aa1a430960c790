"""The search over the constant: brackets, progress and restarts by hand; the polish on linear models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxinterp.attacks import CW, EAD, advance, run, start
from jaxinterp.attacks.search import Bracket, Progress, restart

IMAGES = jnp.zeros((3, 2, 2, 1))


def test_constants_grow_until_a_success_and_are_bisected_then():
    bracket = Bracket.start(jnp.array([1.0, 1.0, 4.0]), IMAGES)
    outcomes = [(0, 0, 1), (0, 1, 1), (1, 0, 0), (1, 1, 0)]
    consts = []
    for found in outcomes:
        bracket = bracket.narrow(jnp.array(found, bool), growth=10.0)
        consts.append(np.asarray(bracket.const).tolist())
    assert consts == [[10, 10, 2], [100, 5.5, 1], [55, 7.75, 1.5], [32.5, 6.625, 1.75]]
    np.testing.assert_array_equal(bracket.lower, [10, 5.5, 1.5])
    np.testing.assert_array_equal(bracket.upper, [55, 7.75, 2])


def test_a_problem_ends_at_its_last_step_or_when_the_loss_stands_still():
    no = jnp.zeros(3, bool)
    progress, ends = Progress.start(IMAGES), []
    for i in range(30):
        # One falls all the time, one stands still after iteration 12, one falls by less than 1e-4 of itself.
        loss = jnp.array([100.0 - i, 100.0 - min(i, 12), 100.0 - 1e-4 * i])
        progress, ended = progress.advance(no, loss, steps=30, abort_early=True)
        ends.append(np.asarray(ended))
    first = np.argmax(ends, axis=0)
    np.testing.assert_array_equal(first, [29, 29, 19])  # checks after 10, 20 and 30 iterations
    np.testing.assert_array_equal(progress.count, 30)
    progress = progress.next_problem()
    np.testing.assert_array_equal(progress.problem, 1)
    np.testing.assert_array_equal(progress.iteration, 0)
    np.testing.assert_array_equal(progress.count, 30)
    assert np.isinf(progress.checked_loss).all()


def test_window_and_tolerance_of_progress():
    """A loss that falls by a hundredth of itself in four iterations, with tolerances on both sides of that."""
    progress, ends = Progress.start(IMAGES, jnp.array([0.02, 0.005, 0.02])), []
    for i in range(8):
        loss = jnp.array([0.9975**i, 0.9975**i, 0.9**i])
        progress, ended = progress.advance(jnp.zeros(3, bool), loss, steps=1000, abort_early=True, window=4)
        ends.append(np.asarray(ended))
    np.testing.assert_array_equal(np.asarray(ends).any(axis=0), [True, False, False])
    assert ends[7][0]
    assert not np.asarray(ends[:7]).any()


def test_with_a_window_the_lowest_loss_must_stand_still_too():
    """Losses that are higher at a check than at the last one: with a low between them, after one, without one."""
    losses = np.ones((12, 3))
    losses[7] = 1.1
    losses[5, 0] = 0.5
    losses[2, 1] = 0.5
    losses[11] = 1.2
    progress, ends = Progress.start(IMAGES, 0.01), []
    for loss in losses:
        progress, ended = progress.advance(
            jnp.zeros(3, bool), jnp.asarray(loss, jnp.float32), steps=100, abort_early=True, window=4
        )
        ends.append(np.asarray(ended))
    np.testing.assert_array_equal(np.argmax(ends, axis=0), [11, 7, 7])
    progress = progress.next_problem()
    assert np.isinf(progress.lowest).all()
    assert np.isinf(progress.checked_lowest).all()


def test_who_polishes_has_twice_the_window_and_a_tenth_of_the_tolerance():
    """A loss that falls by two per mille in three iterations; another that falls by two hundredths of that."""
    rates = jnp.array([0.002, 0.002, 0.00004]) / 3
    for window, ends_at in ((3, [6, 30, 12]), (None, [20, 30, 30])):
        progress, ends = Progress.start(IMAGES, 0.01), []
        for i in range(30):
            progress, ended = progress.advance(
                jnp.zeros(3, bool),
                (1 - rates) ** i,
                steps=30,
                abort_early=True,
                window=window,
                polishing=jnp.array([False, True, True]),
            )
            ends.append(np.asarray(ended))
        np.testing.assert_array_equal(np.argmax(ends, axis=0) + 1, ends_at)


def affine(p, x):
    return x.reshape(x.shape[0], -1) @ p[0] + p[1]


def linear_problem():
    """Images of a linear model of two classes, their labels, and how far away the other class is."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(6 * 5 * 3, 2)).astype(np.float32)
    images = rng.uniform(0.35, 0.65, size=(6, 6, 5, 3)).astype(np.float32)
    bias = (-images.reshape(6, -1).mean(0) @ w).astype(np.float32) + np.array([8, 0], np.float32)
    logits = images.reshape(6, -1) @ w + bias
    distances = np.abs(logits[:, 0] - logits[:, 1]) / np.linalg.norm(w[:, 0] - w[:, 1])
    return Partial(affine, (jnp.asarray(w), jnp.asarray(bias))), jnp.asarray(images), logits.argmax(1), distances


@pytest.mark.parametrize(
    ("attack", "first"),
    [
        (CW(lr=0.02, initial_const=0.1, search_steps=4, steps=40, window=5, tolerance=0.1, polish=True), 2),
        (EAD(beta=0.001, initial_const=0.1, search_steps=4, steps=40, window=5, tolerance=0.1, polish=True), 3),
    ],
)
def test_the_last_search_steps_begin_at_the_best_success_with_the_smallest_constant_that_succeeded(attack, first):
    model, images, labels, _ = linear_problem()
    kappa = jnp.array([0, 0, 0, 1e3, 1e3, 0.5], jnp.float32)  # two that nothing reaches
    attack, seen = dataclasses.replace(attack, kappa=kappa), np.zeros((6, 4), bool)
    begun_at, ended_at = np.zeros((6, 4), int), np.zeros((6, 4), int)
    state = start(attack, model, images, labels, key=jax.random.key(0))
    while not np.asarray(state.done).all():
        before, state = state, advance(attack, model, state, 1, compact=False)
        problem = np.asarray(state.progress.problem)
        begins = np.asarray((state.progress.iteration == 0) & ~state.done)
        begun = state.variable.images() if isinstance(attack, CW) else state.x
        for i in np.flatnonzero(begins & (problem < first)):
            np.testing.assert_allclose(begun[i], images[i], atol=1e-6)
        for i in np.flatnonzero(begins & (problem >= first)):
            hopeless = not np.isfinite(state.bracket.upper[i])
            assert hopeless == (kappa[i] > 1)
            assert state.bracket.const[i] == (10 * before.bracket.const[i] if hopeless else state.bracket.upper[i])
            where = images if hopeless else state.record.best
            np.testing.assert_allclose(begun[i], where[i], atol=1e-6)
            assert hopeless or np.abs(begun[i] - images[i]).max() > 1e-3
            seen[i, problem[i]], begun_at[i, problem[i]] = True, state.progress.count[i]
        ended_at[np.arange(6), np.minimum(before.progress.problem, 3)] = state.progress.count
    assert (seen == (np.arange(4) >= first)).all()
    iterations = (ended_at - begun_at)[np.asarray(kappa) < 1, first:]
    assert (iterations % 10 == 0).all(), "checked after twice the window"
    assert (iterations >= 20).all()


def test_the_last_steps_of_cw_are_a_tenth_as_long():
    model, images, labels, _ = linear_problem()
    attack = CW(lr=0.02, initial_const=0.1, search_steps=4, steps=20, abort_early=False, polish=True)
    state = start(attack, model, images, labels, key=jax.random.key(0))

    def moved(state):
        return np.asarray(attack.step(model, state).variable.w - state.variable.w)

    for count in (0, 18, 22, 38, 41, 50, 58, 60, 61, 65, 78):
        state = advance(attack, model, state, count - int(state.progress.count[0]), compact=False)
        problem = count // 20
        assert state.bracket.closed.all() or problem < 2
        endless = dataclasses.replace(state, bracket=dataclasses.replace(state.bracket, upper=jnp.full(6, jnp.inf)))
        assert np.abs(moved(state)).max() > 1e-5
        np.testing.assert_allclose(moved(state), (0.1 if problem == 3 else 1) * moved(endless), rtol=1e-3, atol=1e-6)


def test_a_polish_makes_good_what_ended_too_early():
    model, images, labels, distances = linear_problem()
    early = CW(lr=0.005, search_steps=9, steps=400, window=13, tolerance=0.03)
    found = {
        name: run(attack, model, images, labels, key=jax.random.key(0))
        for name, attack in {
            "early": early,
            "polished": dataclasses.replace(early, polish=True),
            "patient": CW(lr=0.005, search_steps=9, steps=400),
        }.items()
    }
    ratios = {name: np.asarray(result.l2) / distances for name, result in found.items()}
    cost = {name: np.asarray(result.backward) for name, result in found.items()}
    assert all(result.success.all() for result in found.values())
    assert (ratios["early"] > 1.006).all()
    assert (ratios["polished"] < 1.005).all()
    assert (ratios["polished"] - 1 < (ratios["early"] - 1) / 2).all()
    assert (ratios["patient"] < 1.001).all()
    assert (cost["polished"] < cost["patient"] / 2.5).all()


def test_successes_last_for_the_problem():
    progress = Progress.start(IMAGES)
    for success in ([1, 0, 0], [0, 0, 1]):
        progress, _ = progress.advance(jnp.array(success, bool), jnp.ones(3), steps=9, abort_early=False)
    np.testing.assert_array_equal(progress.found, [True, False, True])
    assert not np.asarray(progress.next_problem().found).any()


def test_steps_may_differ_by_example():
    progress = Progress.start(IMAGES)
    steps = jnp.array([1, 2, 3], jnp.int32)
    for expected in ([1, 0, 0], [1, 1, 0], [1, 1, 1]):
        progress, ended = progress.advance(jnp.zeros(3, bool), jnp.ones(3), steps=steps, abort_early=False)
        np.testing.assert_array_equal(ended, np.array(expected, bool))


def test_only_examples_that_ended_start_again():
    current = {"x": jnp.arange(3.0)}
    again = restart(jnp.array([False, True, False]), lambda: {"x": jnp.full(3, 9.0)}, current)
    np.testing.assert_array_equal(again["x"], [0, 9, 2])
    np.testing.assert_array_equal(restart(jnp.zeros(3, bool), lambda: {"x": jnp.full(3, 9.0)}, current)["x"], [0, 1, 2])
