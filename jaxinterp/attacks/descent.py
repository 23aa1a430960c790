"""Steps of fixed size along the gradient inside a ball: what I-FGSM, PGD and their relatives share.

    x_{k+1} = P(x_k - a D(grad L(x_k)))

with D the direction of steepest descent in the ball's norm and P the projection onto ball, box and support. K steps
cost K forward and backward passes and one more forward pass that judges the last iterate.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.attacks import objective
from jaxinterp.attacks.attack import AttackResult, Examples, Record, along, per_example, select
from jaxinterp.attacks.constraint import Norm, project, steepest
from jaxinterp.network import Model
from jaxinterp.pytree import pytree


@pytree
class DescentState:
    """Iterate and settings of every example; `count` is the number of evaluations so far."""

    examples: Examples
    record: Record
    images: Float[Array, "b h w c"]
    eps: Float[Array, " b"]
    step_size: Float[Array, " b"]
    kappa: Float[Array, " b"]
    count: Int[Array, " b"]
    done: Bool[Array, " b"]


def default_step_size(eps: float | Array, steps: int) -> float | Array:
    """2.5 eps / steps: the iterates can cross the ball and come back (Madry et al. 2018, arXiv 1706.06083)."""
    return 2.5 * eps / steps


def start(
    examples: Examples,
    images: Float[Array, "b h w c"],
    *,
    eps: float | Array,
    step_size: float | Array | None,
    kappa: float | Array,
    steps: int,
) -> DescentState:
    """The state at the starting point `images`; `step_size=None` means the default for `eps` and `steps`."""
    return DescentState(
        examples=examples,
        record=Record.start(examples.images),
        images=images,
        eps=per_example(eps, images),
        step_size=per_example(default_step_size(eps, steps) if step_size is None else step_size, images),
        kappa=per_example(kappa, images),
        count=jnp.zeros(images.shape[0], jnp.int32),
        done=jnp.zeros(images.shape[0], bool),
    )


def step(model: Model, state: DescentState, *, which: Norm, steps: int, stop_on_success: bool = False) -> DescentState:
    """Judges the iterate and moves on; the call number `steps` (from 0) only judges."""
    examples, active = state.examples, ~state.done

    def judge_and_move(x):
        logits, _, gradient = objective.value_and_gradient(
            model, x, lambda logits: objective.likelihood(logits, examples.labels, examples.targets)
        )
        if examples.support is not None:
            gradient = jnp.where(examples.support, gradient, 0)
        moved = x - along(state.step_size, x) * steepest(gradient, which)
        return logits, project(moved, examples.images, state.eps, which, examples.support)

    def judge(x):
        return model(x), x

    moves = active & (state.count < steps)
    logits, moved = lax.cond(jnp.any(moves), judge_and_move, judge, state.images)
    found = active & objective.succeeded(logits, examples.labels, examples.targets, state.kappa)
    record = state.record.update(
        images=state.images,
        found=found,
        better=found,  # the latest success: it has had the most steps
        iteration=state.count,
        forward=active,
        backward=moves,
    )
    done = ~moves
    if stop_on_success:
        done = done | found
    return dataclasses.replace(
        state,
        record=record,
        images=select(active & ~done, moved, state.images),
        count=state.count + active.astype(jnp.int32),
        done=done,
    )


def result(state: DescentState) -> AttackResult:
    """The latest iterate that succeeded."""
    return state.record.result(state.examples.images)
