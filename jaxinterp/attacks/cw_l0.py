"""The L0 attack of Carlini and Wagner (2017, arXiv 1608.04644, section VI.B), every example on its own.

The L2 attack changes the image on a set of pixels; once it succeeds, the pixels i for which g_i d_i is the smallest,
with g the gradient of the logits' margin and d the change, leave the set, and the attack goes on from there. When it
does not succeed, c doubles.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.attacks import objective
from jaxinterp.attacks.attack import AttackResult, Examples, Real, Record, along, norm, per_example, select
from jaxinterp.attacks.boxed import Boxed
from jaxinterp.attacks.search import TOLERANCE, Progress, judge_original, restart
from jaxinterp.canonical import canonical
from jaxinterp.pytree import pytree, static

_GROWTH = 2.0  # of the constant
_UNCHANGED = 1e-4  # smaller changes are none
_FIXED = 0.3  # times the square root of the number of changed pixels: how many are fixed at once


@pytree
class CWL0State:
    """Every example's variable with its optimiser, constant, set of pixels, and place in the search."""

    examples: Examples
    record: Record
    best_l0: Int[Array, " b"]
    variable: Boxed
    free: Bool[Array, "b h w c"]  # the components that may change
    const: Float[Array, " b"]
    progress: Progress
    largest_const: Float[Array, " b"]
    kappa: Float[Array, " b"]
    lr: Float[Array, " b"]
    done: Bool[Array, " b"]


@pytree
class CWL0:
    """A perturbation of few pixels that succeeds at confidence kappa.

    An example is done when no pixel is left, when c exceeds `largest_const`, or after `search_steps`.

    Attributes:
        lr: learning rate of Adam.
        initial_const: the first c.
        largest_const: the last c.
        kappa: confidence, the margin of logits that counts as success.
        independent_channels: count and fix components by themselves, not pixels with all their channels.
        search_steps: number of problems, each with its c and set of pixels, at most. From n pixels down to none there
            are about 7 sqrt(n) sets.
        steps: iterations of Adam for every problem, at most; it ends at its first success.
        abort_early: end a problem of an example whose loss has not fallen by `tolerance` (relative) in
            `window` iterations.
        window: None means a tenth of `steps`, at least 10. Fewer end sooner what has converged; the lowest loss of the
            problem must stand still then, too, since at the boundary the loss goes up and down.
        tolerance: see `abort_early`.
            The original program always makes `steps` iterations before it doubles c.
    """

    name: ClassVar[str] = "cw-l0"

    lr: Real = 0.01
    initial_const: Real = 1e-3
    largest_const: Real = 2e6
    kappa: Real = 0.0
    independent_channels: bool = static(default=False)
    search_steps: int = static(default=2000)
    steps: int = static(default=1000)
    abort_early: bool = static(default=True)
    window: int | None = static(default=None)
    tolerance: Real = TOLERANCE

    @property
    def iterations(self) -> int:
        """At most this many; examples are done long before."""
        return self.search_steps * self.steps

    @canonical
    def init(self, model, images, labels, targets, keys, support=None) -> CWL0State:
        """Starts at the original; an image that is adversarial already is done, at distance zero."""
        examples = Examples(images, labels, targets, support)
        kappa = per_example(self.kappa, images)
        record = judge_original(model, examples, kappa)
        return CWL0State(
            examples=examples,
            record=record,
            best_l0=jnp.where(record.success, 0, images[0].size + 1).astype(jnp.int32),
            variable=Boxed.start(images),
            free=jnp.ones_like(images, bool) if support is None else support,
            const=per_example(self.initial_const, images),
            progress=Progress.start(images, self.tolerance),
            largest_const=per_example(self.largest_const, images),
            kappa=kappa,
            lr=per_example(self.lr, images),
            done=record.success,
        )

    @canonical
    def step(self, model, state: CWL0State) -> CWL0State:
        """One iteration of Adam for every example, at its own place in its own search."""
        examples, active = state.examples, ~state.done
        x = jnp.where(state.free, state.variable.images(), examples.images)
        x = jnp.where(jnp.abs(x - examples.images) < _UNCHANGED, examples.images, x)
        delta = x - examples.images

        def margin(logits):
            return objective.margin(logits, examples.labels, examples.targets)

        logits, f, g = objective.value_and_gradient(model, x, margin)
        # No hinge: the problem ends at the first success.
        gradient = along(state.const, g) * g + 2 * delta
        success = active & objective.succeeded(logits, examples.labels, examples.targets, state.kappa)
        l0 = jnp.sum(self._by_pixel(delta != 0), axis=1, dtype=jnp.int32)
        better = success & (l0 < state.best_l0)
        record = state.record.update(
            images=x, found=success, better=better, iteration=state.progress.count, forward=active, backward=active
        )
        loss = jnp.square(norm(delta)) + state.const * (f + state.kappa)
        progress, ended = state.progress.advance(
            success, loss, steps=self.steps, abort_early=self.abort_early, window=self.window
        )
        moved = dataclasses.replace(
            state,
            record=record,
            best_l0=jnp.where(better, l0, state.best_l0),
            variable=select(success, state.variable, state.variable.descend(gradient, state.lr, state.free)),
            const=jnp.where(ended & ~success, _GROWTH * state.const, state.const),
            progress=progress,
        )
        return self._next_problem(select(active, moved, state), delta, g, success, active & (ended | success))

    def _next_problem(
        self,
        state: CWL0State,
        delta: Float[Array, "b h w c"],
        g: Float[Array, "b h w c"],
        success: Bool[Array, " b"],
        ended: Bool[Array, " b"],
    ) -> CWL0State:
        """Where a problem has ended: on from the same point, after a success with fewer pixels and a new Adam."""

        def fewer():
            return Boxed.at(state.variable.w), state.free & self._fewer(delta, g)

        variable, free = restart(success, fewer, (state.variable, state.free))
        last = (
            ~jnp.any(free, axis=(1, 2, 3))
            | (state.const >= state.largest_const)
            | (state.progress.problem + 1 >= self.search_steps)
        )
        return dataclasses.replace(
            state,
            variable=variable,
            free=free,
            progress=select(ended, state.progress.next_problem(), state.progress),
            done=state.done | (ended & last),
        )

    def _fewer(self, delta: Float[Array, "b h w c"], g: Float[Array, "b h w c"]) -> Bool[Array, "b h w c"]:
        """The changed pixels without those that matter the least for the margin.

        The original program takes for g the gradient of the whole loss, and also stops fixing pixels at the first one
        whose product exceeds 0.01, a number that means something only for its scale of the loss.
        """
        changed = self._by_pixel(delta != 0)
        effect = jnp.abs(g * delta)
        if not self.independent_channels:
            effect = jnp.sum(effect, axis=3)
        effect = jnp.where(changed, effect.reshape(changed.shape), jnp.inf)
        rank = jnp.argsort(jnp.argsort(effect, axis=1), axis=1)
        number = jnp.ceil(_FIXED * jnp.sqrt(jnp.sum(changed, axis=1, dtype=jnp.float32)))
        kept = changed & (rank >= number[:, None])
        shape = delta.shape if self.independent_channels else (*delta.shape[:3], 1)
        return jnp.broadcast_to(kept.reshape(shape), delta.shape)

    def _by_pixel(self, components: Bool[Array, "b h w c"]) -> Bool[Array, "b n"]:
        """Whether any channel of each pixel is marked, or every component by itself."""
        pixels = components if self.independent_channels else jnp.any(components, axis=3)
        return pixels.reshape(components.shape[0], -1)

    @canonical
    def result(self, state: CWL0State) -> AttackResult:
        """The success that changes the fewest pixels."""
        return state.record.result(state.examples.images)
