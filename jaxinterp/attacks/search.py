"""The search over the constant of attacks that minimise D(x' - x0) + c f(x'): what C&W, EAD and StrAttack share.

A search is a sequence of problems, one for every constant c that is tried. `Bracket` chooses the constants,
`Progress` says when a problem has ended, `restart` begins the next one. Every example is at its own place: all values
are [B].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.attacks import objective
from jaxinterp.attacks.attack import Examples, Real, Record, per_example, select
from jaxinterp.network import Model
from jaxinterp.pytree import pytree

T = TypeVar("T")

_TOLERANCE = 1e-4  # relative decrease of the loss that counts as progress
_CHECKS = 10  # times that progress is checked in one problem,
_WINDOW = 10  # but not more often than every so many iterations: Adam starts with a rising loss


@pytree
class Bracket:
    """The constant of the present problem, the largest that failed, the smallest that succeeded."""

    const: Float[Array, " b"]
    lower: Float[Array, " b"]
    upper: Float[Array, " b"]

    @classmethod
    def start(cls, const: Real, images: Float[Array, "b h w c"]) -> Bracket:
        """Nothing has failed or succeeded yet."""
        return cls(per_example(const, images), per_example(0.0, images), per_example(jnp.inf, images))

    def narrow(self, found: Bool[Array, " b"], growth: float) -> Bracket:
        """After a problem with or without success: the mean of the bounds, or `growth` times c before any success."""
        # The original program tries the upper bound once more in the last of ten or more search steps; with early
        # successes kept, that only repeats what is known.
        upper = jnp.where(found, jnp.minimum(self.upper, self.const), self.upper)
        lower = jnp.where(found, self.lower, jnp.maximum(self.lower, self.const))
        return Bracket(jnp.where(jnp.isfinite(upper), (lower + upper) / 2, self.const * growth), lower, upper)


@pytree
class Progress:
    """Where every example stands.

    Attributes:
        problem: number of the present problem.
        iteration: iterations made in it.
        count: iterations made in all problems.
        found: whether it has brought a success.
        checked_loss: the loss when progress was last checked.
    """

    problem: Int[Array, " b"]
    iteration: Int[Array, " b"]
    count: Int[Array, " b"]
    found: Bool[Array, " b"]
    checked_loss: Float[Array, " b"]

    @classmethod
    def start(cls, images: Float[Array, "b h w c"]) -> Progress:
        """Before the first iteration of the first problem."""
        zeros = jnp.zeros(images.shape[0], jnp.int32)
        return cls(zeros, zeros, zeros, zeros.astype(bool), per_example(jnp.inf, images))

    def advance(
        self,
        success: Bool[Array, " b"],
        loss: Float[Array, " b"],
        *,
        steps: int | Int[Array, " b"],
        abort_early: bool,
    ) -> tuple[Progress, Bool[Array, " b"]]:
        """After one more iteration, and which problems have ended.

        They end after `steps` iterations, and with `abort_early` where the loss has not fallen by 1e-4 (relative) in a
        tenth of `steps`.
        """
        iteration, checked_loss = self.iteration + 1, self.checked_loss
        ended = iteration >= steps
        if abort_early:
            due = iteration % jnp.maximum(steps // _CHECKS, _WINDOW) == 0
            ended = ended | (due & (loss > (1 - _TOLERANCE) * checked_loss))
            checked_loss = jnp.where(due, loss, checked_loss)
        progress = dataclasses.replace(
            self,
            iteration=iteration,
            count=self.count + 1,
            found=self.found | success,
            checked_loss=checked_loss,
        )
        return progress, ended

    def next_problem(self) -> Progress:
        """Before the first iteration of the next problem."""
        return dataclasses.replace(
            self,
            problem=self.problem + 1,
            iteration=jnp.zeros_like(self.iteration),
            found=jnp.zeros_like(self.found),
            checked_loss=jnp.full_like(self.checked_loss, jnp.inf),
        )


def judge_original(model: Model, examples: Examples, kappa: Float[Array, " b"]) -> Record:
    """The record after one forward pass: images that are adversarial already are successes at distance zero."""
    already = objective.succeeded(model(examples.images), examples.labels, examples.targets, kappa)
    every = jnp.ones_like(already)
    return Record.start(examples.images).update(
        images=examples.images,
        found=already,
        better=already,
        iteration=jnp.zeros_like(examples.labels),
        forward=every,
        backward=~every,
    )


def restart(ended: Bool[Array, " b"], fresh: Callable[[], T], current: T) -> T:
    """The pytree `fresh()` for the examples whose problem has ended; it is computed only where one has."""
    return lax.cond(jnp.any(ended), lambda: select(ended, fresh(), current), lambda: current)
