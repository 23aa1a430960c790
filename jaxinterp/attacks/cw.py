"""The L2 attack of Carlini and Wagner (2017, arXiv 1608.04644, section VI.A), every example on its own.

    min ||x' - x0||^2 + c max(max_{j != t} Z(x')_j - Z(x')_t + kappa, 0),   x' = (tanh w + 1) / 2

by Adam on w, inside a search for the smallest constant c that succeeds.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxinterp.attacks import objective
from jaxinterp.attacks.attack import AttackResult, Examples, Real, Record, norm, per_example, select
from jaxinterp.attacks.boxed import Boxed
from jaxinterp.attacks.search import Bracket, Progress, judge_original, restart
from jaxinterp.canonical import canonical
from jaxinterp.pytree import pytree, static


@pytree
class CWState:
    """Every example's variable with its optimiser, bracket of the constant, and place in the search."""

    examples: Examples
    record: Record
    best_l2: Float[Array, " b"]
    variable: Boxed
    bracket: Bracket
    progress: Progress
    kappa: Float[Array, " b"]
    lr: Float[Array, " b"]
    done: Bool[Array, " b"]


@pytree
class CW:
    """The smallest L2 perturbation that succeeds at confidence kappa.

    Attributes:
        lr: learning rate of Adam.
        initial_const: c of the first search step; times 10 until a success, then bisected.
        kappa: confidence, the margin of logits that counts as success.
        search_steps: number of constants that are tried.
        steps: iterations of Adam for every constant, at most.
        abort_early: end a search step of an example whose loss has not fallen by 1e-4 (relative) in a tenth of
            `steps`.
    """

    name: ClassVar[str] = "cw"

    lr: Real = 0.01
    initial_const: Real = 1e-3
    kappa: Real = 0.0
    search_steps: int = static(default=9)
    steps: int = static(default=1000)
    abort_early: bool = static(default=True)

    @property
    def iterations(self) -> int:
        """At most this many; examples may be done before."""
        return self.search_steps * self.steps

    @canonical
    def init(self, model, images, labels, targets, keys, support=None) -> CWState:
        """Starts at the original; an image that is adversarial already is done, at distance zero."""
        examples = Examples(images, labels, targets, support)
        kappa = per_example(self.kappa, images)
        record = judge_original(model, examples, kappa)
        return CWState(
            examples=examples,
            record=record,
            best_l2=jnp.where(record.success, 0.0, jnp.inf),
            variable=Boxed.start(images),
            bracket=Bracket.start(self.initial_const, images),
            progress=Progress.start(images),
            kappa=kappa,
            lr=per_example(self.lr, images),
            done=record.success,
        )

    @canonical
    def warm(self, state: CWState, initial) -> CWState:
        """Begins every problem at `initial`."""
        examples = dataclasses.replace(state.examples, initial=initial)
        return dataclasses.replace(state, examples=examples, variable=Boxed.start(initial))

    @canonical
    def step(self, model, state: CWState) -> CWState:
        """One iteration of Adam for every example, at its own place in its own search."""
        examples, active = state.examples, ~state.done
        x = state.variable.images()
        if examples.support is not None:
            x = jnp.where(examples.support, x, examples.images)
        delta = x - examples.images
        l2 = norm(delta)

        def hinge(logits):
            f = objective.margin(logits, examples.labels, examples.targets)
            return state.bracket.const * jnp.maximum(f + state.kappa, 0)

        logits, penalty, gradient = objective.value_and_gradient(model, x, hinge)
        success = active & objective.succeeded(logits, examples.labels, examples.targets, state.kappa)
        better = success & (l2 < state.best_l2)
        record = state.record.update(
            images=x, found=success, better=better, iteration=state.progress.count, forward=active, backward=active
        )
        progress, ended = state.progress.advance(
            success, jnp.square(l2) + penalty, steps=self.steps, abort_early=self.abort_early
        )
        moved = dataclasses.replace(
            state,
            record=record,
            best_l2=jnp.where(better, l2, state.best_l2),
            variable=state.variable.descend(gradient + 2 * delta, state.lr, examples.support),
            progress=progress,
        )
        return self._next_problem(select(active, moved, state), active & ended)

    def _next_problem(self, state: CWState, ended: Bool[Array, " b"]) -> CWState:
        """Where a problem has ended: the next constant, from the start."""
        return dataclasses.replace(
            state,
            variable=restart(ended, lambda: Boxed.start(state.examples.start), state.variable),
            bracket=select(ended, state.bracket.narrow(state.progress.found, growth=10.0), state.bracket),
            progress=select(ended, state.progress.next_problem(), state.progress),
            done=state.done | (ended & (state.progress.problem + 1 >= self.search_steps)),
        )

    @canonical
    def result(self, state: CWState) -> AttackResult:
        """The nearest success. The distance is from the original itself, not from its image under tanh."""
        return state.record.result(state.examples.images)
