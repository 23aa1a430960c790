"""The Linf attack of Carlini and Wagner (2017, arXiv 1608.04644, section VI.C), every example on its own.

    min c max(max_{j != t} Z(x')_j - Z(x')_t + kappa, 0) + sum_i max(|x'_i - x0_i| - tau, 0),   x' = (tanh w + 1) / 2

by Adam on w. When no change exceeds tau and x' succeeds, tau shrinks and the search goes on from there; when that is
not achieved, c doubles.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxinterp.attacks import objective
from jaxinterp.attacks.attack import AttackResult, Examples, Real, Record, along, per_example, select
from jaxinterp.attacks.boxed import Boxed
from jaxinterp.attacks.constraint import distance
from jaxinterp.attacks.search import TOLERANCE, Progress, judge_original, nearest_so_far, restart
from jaxinterp.canonical import canonical
from jaxinterp.pytree import pytree, static

_GROWTH = 2.0  # of the constant
_SOLVED = 1e-4  # loss that counts as zero, relative to the constant
_SMALLEST = 1 / 256  # bound on the changes at which the search ends, as 8 bits could not hold smaller ones


@pytree
class CWLinfState:
    """Every example's variable with its optimiser, constant, bound on the changes, and place in the search."""

    examples: Examples
    record: Record
    best_linf: Float[Array, " b"]
    variable: Boxed
    const: Float[Array, " b"]
    tau: Float[Array, " b"]
    progress: Progress
    largest_const: Float[Array, " b"]
    decrease: Float[Array, " b"]
    kappa: Float[Array, " b"]
    lr: Float[Array, " b"]
    done: Bool[Array, " b"]


@pytree
class CWLinf:
    """A small Linf perturbation that succeeds at confidence kappa; the nearest success in Linf is returned.

    An example is done when tau falls below 1/256, when c exceeds `largest_const`, or after `search_steps`. The largest
    change is then within about 1 / `decrease` of the last tau for which there was a solution. The search goes no
    further than 1 / (256 `decrease`) on purpose, and Adam takes steps of about lr / 2 on every pixel: on linear models
    whose nearest point is at 0.006 to 0.008 it ends up to 1.3 times as far by the defaults, 1.1 with lr=0.001.

    Attributes:
        lr: learning rate of Adam.
        initial_const: the first c.
        largest_const: the last c.
        decrease: factor, below 1, by which tau shrinks, from 1 or from the largest change where that is smaller.
        kappa: confidence, the margin of logits that counts as success.
        search_steps: number of problems, each with its c and tau, at most. The other defaults allow 53 values of tau
            and 21 of c.
        steps: iterations of Adam for every problem, at most.
        abort_early: end a problem of an example whose loss has not fallen by `tolerance` (relative) in
            `window` iterations.
        window: None means a tenth of `steps`, at least 10. Fewer end sooner what has converged; the lowest loss of the
            problem must stand still then, too, since at the boundary the loss goes up and down.
        tolerance: see `abort_early`.
            The original program always makes `steps` iterations before it doubles c.
    """

    name: ClassVar[str] = "cw-linf"
    ranges: ClassVar[dict[str, str]] = {"decrease": "below 1"}

    lr: Real = 5e-3
    initial_const: Real = 1e-5
    largest_const: Real = 20.0
    decrease: Real = 0.9
    kappa: Real = 0.0
    search_steps: int = static(default=75)
    steps: int = static(default=1000)
    abort_early: bool = static(default=True)
    window: int | None = static(default=None)
    tolerance: Real = TOLERANCE

    @property
    def iterations(self) -> int:
        """At most this many; examples may be done before."""
        return self.search_steps * self.steps

    @canonical
    def init(self, model, images, labels, targets, keys, support=None) -> CWLinfState:
        """Starts at the original; an image that is adversarial already is done, at distance zero."""
        examples = Examples(images, labels, targets, support)
        kappa = per_example(self.kappa, images)
        record = judge_original(model, examples, kappa)
        return CWLinfState(
            examples=examples,
            record=record,
            best_linf=nearest_so_far(record),
            variable=Boxed.start(images),
            const=per_example(self.initial_const, images),
            tau=per_example(1.0, images),
            progress=Progress.start(images, self.tolerance),
            largest_const=per_example(self.largest_const, images),
            decrease=per_example(self.decrease, images),
            kappa=kappa,
            lr=per_example(self.lr, images),
            done=record.success,
        )

    @canonical
    def step(self, model, state: CWLinfState) -> CWLinfState:
        """One iteration of Adam for every example, at its own place in its own search."""
        examples, active = state.examples, ~state.done
        x = state.variable.images()
        if examples.support is not None:
            x = jnp.where(examples.support, x, examples.images)
        delta = x - examples.images
        excess = jnp.maximum(jnp.abs(delta) - along(state.tau, x), 0)

        def margin(logits):
            return objective.margin(logits, examples.labels, examples.targets)

        logits, f, gradient = objective.value_and_gradient(model, x, margin)
        loss = state.const * jnp.maximum(f + state.kappa, 0) + distance(excess, "l1")
        linf = distance(delta, "linf")
        succeeded = objective.succeeded(logits, examples.labels, examples.targets, state.kappa)
        # The hinge ends where the attack succeeds: a little, by what rounding may change, beyond its zero.
        gradient = along(jnp.where(succeeded, 0, state.const), x) * gradient + jnp.sign(delta) * (excess > 0)
        success = active & succeeded
        solved = success & (loss < _SOLVED * state.const)
        # Every success is a candidate, also one that exceeds tau somewhere.
        better = success & (linf < state.best_linf)
        record = state.record.update(
            images=x, found=success, better=better, iteration=state.progress.count, forward=active, backward=active
        )
        progress, ended = state.progress.advance(
            success, loss, steps=self.steps, abort_early=self.abort_early, window=self.window
        )
        moved = dataclasses.replace(
            state,
            record=record,
            best_linf=jnp.where(better, linf, state.best_linf),
            variable=select(solved, state.variable, state.variable.descend(gradient, state.lr, examples.support)),
            const=jnp.where(ended & ~solved, _GROWTH * state.const, state.const),
            tau=jnp.where(solved, state.decrease * jnp.minimum(state.tau, linf), state.tau),
            progress=progress,
        )
        return self._next_problem(select(active, moved, state), solved, active & (ended | solved))

    def _next_problem(self, state: CWLinfState, solved: Bool[Array, " b"], ended: Bool[Array, " b"]) -> CWLinfState:
        """Where a problem has ended: on from the same point, after a solution with a new Adam."""
        last = (
            (state.tau <= _SMALLEST)
            | (state.const >= state.largest_const)
            | (state.progress.problem + 1 >= self.search_steps)
        )
        return dataclasses.replace(
            state,
            variable=restart(solved, lambda: Boxed.at(state.variable.w), state.variable),
            progress=select(ended, state.progress.next_problem(), state.progress),
            done=state.done | (ended & last),
        )

    @canonical
    def result(self, state: CWLinfState) -> AttackResult:
        """The nearest success."""
        return state.record.result(state.examples.images)
