"""Finished examples cost nothing: the driver goes on with the unfinished ones alone, and nothing else changes."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from jaxinterp.attacks import CW, IFGSM, Square, advance, driver, finish, finished, run, start
from jaxinterp.bench.timing import watching_compiler

BATCH, KEY = 9, jax.random.key(0)
ATTACK = CW(lr=0.05, initial_const=0.3, search_steps=5, steps=40)


def problem():
    """A linear model, and images every other one of which is adversarial already: those are done at once."""
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(6 * 5 * 3, 4)) * 0.3, jnp.float32)
    model = Partial(lambda w, x: (x.reshape(x.shape[0], -1) - 0.5) @ w, weights)
    images = jnp.asarray(rng.uniform(0.1, 0.9, size=(BATCH, 6, 5, 3)), jnp.float32)
    labels = jnp.argmax(model(images), axis=1)
    return model, images, jnp.where(jnp.arange(BATCH) % 2 == 0, labels, (labels + 1) % 4)


def same(a, b):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


@pytest.fixture
def programs(monkeypatch):
    """(size of the batch, steps that ran) of every loop."""
    ran, original = [], driver._advance

    def recorded(mesh, donated=False, stage=None):
        def loop(attack, model, state, limit, enough):
            taken, state = original(mesh, donated, stage)(attack, model, state, limit, enough)
            ran.append((state.done.shape[0], int(np.max(taken))))
            return taken, state

        return loop

    monkeypatch.setattr(driver, "_advance", recorded)
    return ran


def test_results_are_those_of_the_whole_batch_at_fewer_passes(programs):
    model, images, labels = problem()
    whole = run(ATTACK, model, images, labels, key=KEY, compact=False)
    [(size, steps)] = programs
    assert size == BATCH
    programs.clear()
    result = run(ATTACK, model, images, labels, key=KEY)
    same(result, whole)
    # All examples are in the batch at first, few at the end; the number of steps is the same.
    sizes = [size for size, _ in programs]
    assert sizes[0] == BATCH
    assert sizes == sorted(sizes, reverse=True)
    assert sum(steps for _, steps in programs) == steps
    paid = int(np.sum(np.asarray(result.forward)))
    spent = sum(size * steps for size, steps in programs)
    assert paid <= spent < 1.15 * paid
    assert spent < 0.6 * BATCH * steps


def test_pieces_of_any_length_give_the_same(programs):
    model, images, labels = problem()
    whole = run(ATTACK, model, images, labels, key=KEY, compact=False)
    state = start(ATTACK, model, images, labels, key=KEY)
    for piece in (1, 70, 33, 500):
        state = advance(ATTACK, model, state, piece)
    assert finished(state)
    same(finish(ATTACK, state), whole)
    assert min(size for size, _ in programs) < BATCH


def test_a_limit_counts_steps_of_every_example():
    model, images, labels = problem()
    first = start(ATTACK, model, images, labels, key=KEY)
    for steps in (0, 1, 60, 110):
        same(advance(ATTACK, model, first, steps), advance(ATTACK, model, first, steps, compact=False))


def test_steps_are_a_whole_number():
    model, images, labels = problem()
    state = start(ATTACK, model, images, labels, key=KEY)
    unchecked = inspect.unwrap(advance)  # the type checker would refuse some of them
    for steps, error in ((2.5, TypeError), (True, TypeError), (-1, ValueError)):
        with pytest.raises(error, match="steps must be"):
            unchecked(ATTACK, model, state, steps)


def test_a_state_that_is_known_advances_under_a_trace_of_the_model():
    model, images, labels = problem()
    state = start(ATTACK, model, images, labels, key=KEY)
    same(jax.jit(lambda model: advance(ATTACK, model, state, 9))(model), advance(ATTACK, model, state, 9))


def test_the_devices_of_a_mesh_share_the_unfinished_examples(programs):
    model, images, labels = problem()
    images, labels = images[:8], labels[:8]
    whole = run(ATTACK, model, images, labels, key=KEY, compact=False)
    programs.clear()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    spread = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    result = run(ATTACK, model, spread, labels, key=KEY)
    same(result, whole)
    assert len(result.images.sharding.device_set) == 2
    assert programs[0][0] == 8
    assert programs[-1][0] < 8
    assert all(size % 2 == 0 for size, _ in programs)


def test_a_hyper_parameter_of_each_example_follows_it():
    model, images, labels = problem()
    kappa = jnp.linspace(0, 0.5, BATCH)
    attack = dataclasses.replace(ATTACK, kappa=kappa)
    both = [run(attack, model, images, labels, key=KEY, compact=compact) for compact in (True, False)]
    same(*both)


def test_what_an_example_draws_follows_it(programs):
    model, images, labels = problem()
    attack = Square(eps=0.02, steps=80)
    same(*(run(attack, model, images, labels, key=KEY, compact=compact) for compact in (False, True)))
    assert programs[-1][0] < BATCH


def test_short_attacks_are_left_in_one_program(programs):
    model, images, labels = problem()
    run(CW(lr=0.05, initial_const=3.0, search_steps=2, steps=20), model, images, labels, key=KEY)
    assert len(programs) == 1


def test_smaller_batches_are_halves_and_multiples_of_the_devices():
    halving = functools.partial(driver._smaller_batch, devices=1)
    assert [halving(n) for n in (9, 5, 3, 2, 1)] == [5, 3, 2, 1, 0]
    assert [driver._smaller_batch(n, 4) for n in (32, 16, 12, 8, 4)] == [16, 8, 8, 4, 0]


def test_gathered_states_give_their_memory_up_and_nobody_else_s_does(monkeypatch):
    """The state that the caller holds, and the images in it, can be used again; copies of a part of it are not kept."""
    model, images, labels = problem()
    first, held, original = start(ATTACK, model, images, labels, key=KEY), [], driver._advance

    def watched(mesh, donated=False, stage=None):
        def loop(attack, model, state, limit, enough):
            held.append((donated, state))
            return original(mesh, donated, stage)(attack, model, state, limit, enough)

        return loop

    monkeypatch.setattr(driver, "_advance", watched)
    once, again = (finish(ATTACK, advance(ATTACK, model, first)) for _ in range(2))
    same(once, again)
    whole = [state for donated, state in held if not donated]
    parts = [state for donated, state in held if donated]
    assert len(whole) == 2
    assert len(parts) >= 2
    assert all(state.done.shape[0] == BATCH for state in whole)
    assert all(leaf.is_deleted() for state in parts for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in (*jax.tree.leaves((first, model)), images, labels))


def test_weights_on_a_device_of_their_own_cost_no_second_program():
    """Those of a loaded checkpoint are committed to a device; what a step returns is, too, and the start must be."""
    model, images, labels = problem()
    model = jax.device_put(model, jax.devices()[0])
    attack = IFGSM(steps=3)
    state = advance(attack, model, start(attack, model, images, labels, key=KEY), 1)
    with watching_compiler() as seen:
        state = jax.block_until_ready(advance(attack, model, state, 1))
    assert seen.programs == 0
