"""FMN, the fast minimum-norm attack (Pintor et al. 2021, arXiv 2102.12827, algorithm 1).

Steps along the normalised gradient of the margin are projected onto a ball whose radius looks for the boundary:

    e_k = ||d_k||_p + L / ||grad L||_q       as long as the boundary has not been crossed,
          (1 + gamma_k) e_{k-1}              if x_k is not adversarial,
          min((1 - gamma_k) e_{k-1}, ||d*||_p)  if it is; d* is the nearest success
    x_{k+1} = P_{e_k}(x_k - a_k grad L / ||grad L||_2)

with q the dual of p; a_k and gamma_k fall along half a cosine.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.attacks import objective
from jaxinterp.attacks.attack import AttackResult, Examples, Real, Record, along, per_example, select
from jaxinterp.attacks.constraint import DUAL, Norm, distance, farthest, project, steepest
from jaxinterp.attacks.schedule import cosine
from jaxinterp.canonical import canonical
from jaxinterp.pytree import pytree, static

_TINY = 1e-30


@pytree
class FMNState:
    """Every example's iterate and the radius of its ball; `count` is the number of evaluations so far."""

    examples: Examples
    record: Record
    best: Float[Array, " b"]  # norm of the nearest success
    images: Float[Array, "b h w c"]
    radius: Float[Array, " b"]
    gamma: Float[Array, " b"]
    final_gamma: Float[Array, " b"]
    step_size: Float[Array, " b"]
    final_step_size: Float[Array, " b"]
    kappa: Float[Array, " b"]
    count: Int[Array, " b"]
    done: Bool[Array, " b"]


@pytree
class FMN:
    """The smallest perturbation in L0, L1, L2 or Linf, by steps of the gradient in a ball that looks for the boundary.

        x <- P_e(x - a grad L / ||grad L||_2),  e <- (1 -+ gamma) e      (Pintor et al. 2021, arXiv 2102.12827)

    with L the margin of logits. An input that is adversarial already is done at distance zero. Otherwise K steps cost
    K backward passes and K + 1 forward passes.

    Attributes:
        step_size: L2 length of the first step; the following ones fall along half a cosine. In Linf it should grow
            with the root of the number of components: 10 for ImageNet.
        final_step_size: to this length; None means step_size / 100.
        gamma: relative change of the radius in the first step, below 1; it falls likewise,
        final_gamma: to this one, below 1.
        kappa: confidence, the margin of logits that counts as success.
        norm: "l0", "l1", "l2" or "linf".
        steps: number of steps K.
    """

    name: ClassVar[str] = "fmn"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"norm": ("l0", "l1", "l2", "linf")}
    ranges: ClassVar[dict[str, str]] = {"gamma": "below 1", "final_gamma": "below 1"}

    step_size: Real = 1.0
    final_step_size: Real | None = None
    gamma: Real = 0.05
    final_gamma: Real = 1e-3
    kappa: Real = 0.0
    norm: Norm = static(default="l2")
    steps: int = static(default=100)

    @property
    def iterations(self) -> int:
        """K steps, and one that judges the last iterate."""
        return self.steps + 1

    @canonical
    def init(self, model, images, labels, targets, keys, support=None) -> FMNState:
        """Starts at the original."""
        zeros = jnp.zeros(images.shape[0], jnp.int32)
        final = self.step_size / 100 if self.final_step_size is None else self.final_step_size
        return FMNState(
            examples=Examples(images, labels, targets, support),
            record=Record.start(images),
            best=per_example(jnp.inf, images),
            images=images,
            radius=per_example(1.0 if self.norm == "l0" else 0.0, images),
            gamma=per_example(self.gamma, images),
            final_gamma=per_example(self.final_gamma, images),
            step_size=per_example(self.step_size, images),
            final_step_size=per_example(final, images),
            kappa=per_example(self.kappa, images),
            count=zeros,
            done=zeros.astype(bool),
        )

    @canonical
    def step(self, model, state: FMNState) -> FMNState:
        """Judges the iterate, changes the radius, steps along the gradient into the ball; the last call only judges."""
        examples, active, x = state.examples, ~state.done, state.images
        logits, pull_back = objective.linearised(model, x, examples.support)
        size = distance(x - examples.images, self.norm)
        found = active & objective.succeeded(logits, examples.labels, examples.targets, state.kappa)
        better = found & (size < state.best)
        best = jnp.where(better, size, state.best)
        moves = active & (state.count < self.steps) & ~(found & (state.count == 0))

        def loss(logits):
            return jnp.sum(objective.margin(logits, examples.labels, examples.targets))

        gradient = lax.cond(jnp.any(moves), lambda: pull_back(jax.grad(loss)(logits)), lambda: jnp.zeros_like(x))
        gamma = cosine(state.gamma, state.final_gamma, state.count, self.steps)
        if self.norm == "l0":
            radius = _count(state.radius, found, gamma, best)
        else:
            lacking = objective.shortfall(logits, examples.labels, examples.targets, state.kappa)
            ahead = lacking / jnp.maximum(distance(gradient, DUAL[self.norm]), _TINY)
            # The linear estimate alone may creep up to the boundary and never cross it, as it is reached up to
            # rounding on a linear model; so the ball grows at least as it does later.
            estimate = size + jnp.where(jnp.isfinite(ahead), jnp.maximum(ahead, gamma * size), 0)
            radius = jnp.where(state.record.success, (1 + gamma) * state.radius, estimate)
            radius = jnp.where(found, jnp.minimum((1 - gamma) * state.radius, best), radius)
        # As the authors' program does: no ball needs to reach beyond the box.
        radius = jnp.minimum(radius, farthest(examples.images, examples.support, self.norm))
        length = cosine(state.step_size, state.final_step_size, state.count, self.steps)
        # The original projects onto the ball and clips afterwards, which loses a part of the ball where the gradient
        # points out of the box. In L1 and L0 `project` finds the nearest point of both; in L2 clipping comes first,
        # as the ball then only scales towards the original; in Linf the order does not matter.
        moved = x - along(length, x) * steepest(gradient, "l2")
        if self.norm == "l2":
            moved = jnp.clip(moved, 0, 1)
        moved = project(moved, examples.images, radius, self.norm, examples.support)
        return dataclasses.replace(
            state,
            record=state.record.update(
                images=x, found=found, better=better, iteration=state.count, forward=active, backward=moves
            ),
            best=best,
            images=select(moves, moved, x),
            radius=jnp.where(moves, radius, state.radius),
            count=state.count + active.astype(jnp.int32),
            done=~moves,
        )

    @canonical
    def result(self, state: FMNState) -> AttackResult:
        """The nearest success."""
        return state.record.result(state.examples.images)


def _count(radius, found, gamma, best):
    """The radius in L0: at least one component more or less in every step, as there is no gradient of a count."""
    fewer = jnp.minimum(jnp.minimum(radius - 1, jnp.floor((1 - gamma) * radius)), best)
    more = jnp.maximum(radius + 1, jnp.floor((1 + gamma) * radius))
    return jnp.maximum(jnp.where(found, fewer, more), 0)
