"""The L2 attack of Carlini and Wagner (2017, arXiv 1608.04644, section VI.A), every example on its own.

    min ||x' - x0||^2 + c max(max_{j != t} Z(x')_j - Z(x')_t + kappa, 0),   x' = (tanh w + 1) / 2

by Adam on w, inside a search for the smallest constant c that succeeds.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.attacks import objective
from jaxinterp.attacks.attack import (
    AttackResult,
    Examples,
    Real,
    Record,
    along,
    norm,
    per_example,
    select,
)
from jaxinterp.canonical import canonical
from jaxinterp.pytree import pytree, static

_SHRINK = 0.999999  # keeps atanh finite at pixels that are exactly 0 or 1
_TOLERANCE = 1e-4  # relative decrease of the loss that counts as progress
_CHECKS = 10  # times that progress is checked in one search step,
_WINDOW = 10  # but not more often than every so many iterations: Adam starts with a rising loss


@pytree
class CWState:
    """Every example's variable, optimiser, bracket of the constant, and place in the search."""

    examples: Examples
    record: Record
    best_l2: Float[Array, " b"]
    w: Float[Array, "b h w c"]
    adam: Any
    const: Float[Array, " b"]
    lower: Float[Array, " b"]
    upper: Float[Array, " b"]
    kappa: Float[Array, " b"]
    lr: Float[Array, " b"]
    found: Bool[Array, " b"]  # in this search step
    checked_loss: Float[Array, " b"]
    iteration: Int[Array, " b"]  # in this search step
    search: Int[Array, " b"]
    count: Int[Array, " b"]
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
        already = objective.succeeded(model(images), labels, targets, kappa)
        every = jnp.ones_like(already)
        zeros = jnp.zeros(images.shape[0], jnp.int32)
        w = _to_w(images)
        record = Record.start(images).update(
            images=images, found=already, better=already, iteration=zeros, forward=every, backward=~every
        )
        return CWState(
            examples=examples,
            record=record,
            best_l2=jnp.where(already, 0.0, jnp.inf),
            w=w,
            adam=jax.vmap(optax.scale_by_adam().init)(w),
            const=per_example(self.initial_const, images),
            lower=per_example(0.0, images),
            upper=per_example(jnp.inf, images),
            kappa=kappa,
            lr=per_example(self.lr, images),
            found=~every,
            checked_loss=per_example(jnp.inf, images),
            iteration=zeros,
            search=zeros,
            count=zeros,
            done=already,
        )

    @canonical
    def step(self, model, state: CWState) -> CWState:
        """One iteration of Adam for every example, at its own place in its own search."""
        examples, active = state.examples, ~state.done
        tanh = jnp.tanh(state.w)
        x = (tanh + 1) / 2
        if examples.support is not None:
            x = jnp.where(examples.support, x, examples.images)
        delta = x - examples.images
        l2 = norm(delta)

        def hinge(logits):
            f = objective.margin(logits, examples.labels, examples.targets)
            return state.const * jnp.maximum(f + state.kappa, 0)

        logits, penalty, gradient = objective.value_and_gradient(model, x, hinge)
        loss = jnp.square(l2) + penalty
        gradient = (gradient + 2 * delta) * (1 - jnp.square(tanh)) / 2
        if examples.support is not None:
            gradient = jnp.where(examples.support, gradient, 0)

        success = active & objective.succeeded(logits, examples.labels, examples.targets, state.kappa)
        better = success & (l2 < state.best_l2)
        record = state.record.update(
            images=x, found=success, better=better, iteration=state.count, forward=active, backward=active
        )
        direction, adam = jax.vmap(optax.scale_by_adam().update)(gradient, state.adam)
        moved = dataclasses.replace(
            state,
            record=record,
            best_l2=jnp.where(better, l2, state.best_l2),
            w=state.w - along(state.lr, x) * jnp.asarray(direction),
            adam=adam,
            found=state.found | success,
            iteration=state.iteration + 1,
            count=state.count + 1,
        )
        moved = self._check_progress(moved, loss)
        return select(active, moved, state)

    def _check_progress(self, state: CWState, loss: Float[Array, " b"]) -> CWState:
        """Ends the search steps that have used up their iterations or make no progress."""
        ended = state.iteration >= self.steps
        if self.abort_early:
            due = state.iteration % max(self.steps // _CHECKS, _WINDOW) == 0
            ended = ended | (due & (loss > (1 - _TOLERANCE) * state.checked_loss))
            state = dataclasses.replace(state, checked_loss=jnp.where(due, loss, state.checked_loss))
        return select(ended, self._next_search_step(state), state)

    def _next_search_step(self, state: CWState) -> CWState:
        """Narrows the bracket, chooses the next constant, and starts again from the original."""
        # The original program tries the upper bound once more in the last of ten or more search steps; with early
        # successes kept, that only repeats what is known.
        upper = jnp.where(state.found, jnp.minimum(state.upper, state.const), state.upper)
        lower = jnp.where(state.found, state.lower, jnp.maximum(state.lower, state.const))
        w = _to_w(state.examples.images)
        return dataclasses.replace(
            state,
            w=w,
            adam=jax.vmap(optax.scale_by_adam().init)(w),
            const=jnp.where(jnp.isfinite(upper), (lower + upper) / 2, state.const * 10),
            lower=lower,
            upper=upper,
            found=jnp.zeros_like(state.found),
            checked_loss=jnp.full_like(state.checked_loss, jnp.inf),
            iteration=jnp.zeros_like(state.iteration),
            search=state.search + 1,
            done=state.done | (state.search + 1 >= self.search_steps),
        )

    @canonical
    def result(self, state: CWState) -> AttackResult:
        """The nearest success. The distance is from the original itself, not from its image under tanh."""
        return state.record.result(state.examples.images)


def _to_w(images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    return jnp.arctanh((2 * images - 1) * _SHRINK)
