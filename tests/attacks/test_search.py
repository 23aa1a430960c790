"""The search over the constant: brackets, progress and restarts by hand."""

import jax.numpy as jnp
import numpy as np

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
