"""Runs of steps that lower a loss inside a ball: what FGSM, PGD, APGD and their relatives share.

    x_{k+1} = P(x_k - a D_k)

with D_k a direction of unit length, for instance that of steepest descent in the ball's norm, and P the projection
onto ball, box and support. A run of K steps costs K forward and backward passes and one more forward pass that judges
the last iterate, unless a step asks for more gradients. It can be followed by other runs from new starts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxinterp.attacks import constraint, objective
from jaxinterp.attacks.attack import AttackResult, Examples, Record, along, per_example, select
from jaxinterp.attacks.constraint import Norm, project
from jaxinterp.draws import wrapped
from jaxinterp.network import Model
from jaxinterp.pytree import pytree


@pytree
class DescentState:
    """Iterate and settings of every example.

    Attributes:
        count: number of iterates judged so far, K + 1 in every run; -1 where the original is judged before.
        keys: data of random keys, where anything is drawn after the start.
        memory: whatever else a move depends on, with the example as first axis.
    """

    examples: Examples
    record: Record
    images: Float[Array, "b h w c"]
    eps: Float[Array, " b"]
    step_size: Float[Array, " b"]
    kappa: Float[Array, " b"]
    count: Int[Array, " b"]
    done: Bool[Array, " b"]
    keys: UInt32[Array, "b n"] | None = None
    memory: Any = ()


# The logits at `state.images`, the next images, and what to remember.
Move = Callable[[Model, DescentState], tuple[Float[Array, "b k"], Float[Array, "b h w c"], Any]]


def default_step_size(eps: float | Array, steps: int) -> float | Array:
    """2.5 eps / steps: the iterates can cross the ball and come back (Madry et al. 2018, arXiv 1706.06083)."""
    return 2.5 * eps / steps


def start(
    examples: Examples,
    images: Float[Array, "b h w c"],
    *,
    eps: float | Array,
    step_size: float | Array,
    kappa: float | Array,
    keys: Array | None = None,
    memory: Any = (),
) -> DescentState:
    """The state at the starting point `images`."""
    return DescentState(
        examples=examples,
        record=Record.start(examples.images),
        images=images,
        eps=per_example(eps, images),
        step_size=per_example(step_size, images),
        kappa=per_example(kappa, images),
        count=jnp.zeros(images.shape[0], jnp.int32),
        done=jnp.zeros(images.shape[0], bool),
        keys=None if keys is None else jax.random.key_data(keys),
        memory=memory,
    )


def warm(state: DescentState, initial: Float[Array, "b h w c"], which: Norm) -> DescentState:
    """The state at `initial`, or the nearest point inside the ball, in place of the starting point."""
    examples = state.examples
    return dataclasses.replace(state, images=project(initial, examples.images, state.eps, which, examples.support))


def gradient(model: Model, state: DescentState) -> tuple[Float[Array, "b k"], Float[Array, "b h w c"]]:
    """Logits and the gradient of `objective.likelihood` at the iterate."""
    examples = state.examples
    logits, _, gradient = objective.value_and_gradient(
        model, state.images, lambda logits: objective.likelihood(logits, examples.labels, examples.targets)
    )
    return logits, gradient if examples.support is None else jnp.where(examples.support, gradient, 0)


def towards(state: DescentState, direction: Float[Array, "b h w c"], which: Norm) -> Float[Array, "b h w c"]:
    """P(x - a D), a step against the ascending `direction` and back into ball, box and support."""
    moved = state.images - along(state.step_size, direction) * direction
    return project(moved, state.examples.images, state.eps, which, state.examples.support)


def steepest(which: Literal["linf", "l2"]) -> Callable[[DescentState, Array], Float[Array, "b h w c"]]:
    """The step of steepest descent, from the state and the gradient."""
    return lambda state, gradient: towards(state, constraint.steepest(gradient, which), which)


def descend(
    model: Model,
    state: DescentState,
    move: Callable[[DescentState, Array], Float[Array, "b h w c"]],
    *,
    steps: int,
    runs: int = 1,
    stop_on_success: bool = False,
) -> DescentState:
    """`step` where one gradient of `objective.likelihood` is all that a move asks for.

    The forward pass then stands in the program once.
    """
    examples = state.examples
    logits, pull_back = objective.linearised(model, state.images, examples.support)
    _, covectors = objective.values_and_covectors(
        logits, lambda z: objective.likelihood(z, examples.labels, examples.targets)
    )
    gradient = objective.pulled_back(pull_back, covectors, state.images, jnp.any(moving(state, steps)))
    images = move(state, gradient)
    return settle(state, logits, images, state.memory, steps=steps, runs=runs, stop_on_success=stop_on_success)


def step(
    model: Model,
    state: DescentState,
    move: Move,
    *,
    steps: int,
    runs: int = 1,
    stop_on_success: bool = False,
    forward: int = 1,
    backward: int = 1,
) -> DescentState:
    """Judges the iterate and moves on; the last call of a run only judges.

    Args:
        model: images -> logits.
        state: the state before the step.
        move: where to go, unless the iterate is the last of its run.
        steps: as for `settle`, with the arguments that follow.
        runs: number of runs.
        stop_on_success: an example is done at its first success.
        forward: forward passes of a move, among them the one that judges.
        backward: backward passes of a move.
    """

    def judge(model, state):
        return model(state.images), state.images, state.memory

    moved = lax.cond(jnp.any(moving(state, steps)), move, judge, model, state)
    passes = {"forward": forward, "backward": backward}
    return settle(state, *moved, steps=steps, runs=runs, stop_on_success=stop_on_success, **passes)


def moving(state: DescentState, steps: int) -> Bool[Array, " b"]:
    """Which examples move on from their iterate: the last one of a run of K `steps` is only judged."""
    return ~state.done & (state.count % (steps + 1) < steps)


def settle(
    state: DescentState,
    logits: Float[Array, "b k"],
    images: Float[Array, "b h w c"],
    memory: Any,
    *,
    steps: int,
    runs: int = 1,
    stop_on_success: bool = False,
    forward: int = 1,
    backward: int = 1,
) -> DescentState:
    """The state after a step to `images`, with the iterate judged by its logits.

    An example is done after the first run in which it succeeded, or the last one. Starting the next run is the
    caller's part: see `restart`.

    Args:
        state: the state before the step.
        logits: at the iterate.
        images: the next iterates, taken by examples that move and are not done.
        memory: what these remember.
        steps: number of steps K in a run.
        runs: number of runs.
        stop_on_success: an example is done at its first success.
        forward: forward passes of a move, among them the one that judges.
        backward: backward passes of a move.
    """
    examples, active, moves = state.examples, ~state.done, moving(state, steps)
    found = active & objective.succeeded(logits, examples.labels, examples.targets, state.kappa)
    record = state.record.update(
        images=state.images,
        found=found,
        better=found,  # the latest success: it has had the most steps
        iteration=jnp.maximum(state.count, 0),
        forward=jnp.where(moves, forward, active),
        backward=jnp.where(moves, backward, 0),
    )
    count = state.count + active
    done = ~active | ((count % (steps + 1) == 0) & (record.success | (count >= runs * (steps + 1))))
    if stop_on_success:
        done = done | found
    images, memory = select(moves & ~done, (images, memory), (state.images, state.memory))
    return dataclasses.replace(state, record=record, images=images, memory=memory, count=count, done=done)


def restart(
    state: DescentState,
    begin: Callable[[Array], tuple[Float[Array, "b h w c"], Any]],
    *,
    steps: int,
    first: bool = True,
) -> DescentState:
    """Puts the examples at the beginning of a run where `begin(keys)` says: images and memory, from fresh keys.

    Unless it is the `first` run, where that is not asked for.
    """
    begins = ~state.done & (state.count % (steps + 1) == 0) & (first | (state.count > 0))
    now = state.images, state.memory
    images, memory = lax.cond(jnp.any(begins), lambda: select(begins, begin(keys_of(state)), now), lambda: now)
    return dataclasses.replace(state, images=images, memory=memory)


def keys_of(state: DescentState) -> Array:
    """One key for every example, folded from its own and the number of iterates it has judged."""
    assert state.keys is not None
    return jax.vmap(jax.random.fold_in)(wrapped(state.keys), state.count)


def result(state: DescentState) -> AttackResult:
    """The latest iterate that succeeded."""
    return state.record.result(state.examples.images)
