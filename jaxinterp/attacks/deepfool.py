"""DeepFool (Moosavi-Dezfooli et al. 2016, arXiv 1511.04599, algorithm 2 and section 2.3).

    r = |f_l| / ||w_l||_2^2 w_l          (L2)
    r = |f_l| / ||w_l||_1 sign(w_l)      (Linf)
    l = argmin |f_l| / ||w_l||_q,  x <- x + (1 + overshoot) r

with f_l = Z_l - Z_y and w_l its gradient, both at x: a step to the nearest of the linearised boundaries. The paper
knows no box. Here r is the shortest step that stays in it: the same one where the box is not in the way, while clipping
the paper's step at pixels of 0 and 1 would take many more.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.attacks import boundary, objective
from jaxinterp.attacks.attack import AttackResult, Examples, Real, Record, along, per_example, select
from jaxinterp.attacks.constraint import Norm
from jaxinterp.canonical import canonical
from jaxinterp.pytree import pytree, static


@pytree
class DeepFoolState:
    """Every example's iterate; `count` is the number of evaluations so far."""

    examples: Examples
    record: Record
    images: Float[Array, "b h w c"]
    overshoot: Float[Array, " b"]
    kappa: Float[Array, " b"]
    count: Int[Array, " b"]
    done: Bool[Array, " b"]


@pytree
class DeepFool:
    """A small perturbation in L2 or Linf, by steps to the nearest linearised boundary until the first success.

        x <- x + (1 + overshoot) |f| / ||w||_2^2 w      (Moosavi-Dezfooli et al. 2016, arXiv 1511.04599)

    A step costs one forward pass and a backward pass for every candidate, or one with a target. An example without a
    slope in any direction stops.

    Attributes:
        overshoot: relative length that is added to every step, so that it crosses the boundary.
        kappa: confidence, the margin of logits that counts as success; the boundaries are moved by it.
        norm: "l2" or "linf".
        candidates: how many rivals of the label are considered without a target: those with the largest logits at the
            current iterate, as the logits are there and a rival may come up on the way. (The authors' program chooses
            them at the original.)
        steps: number of steps at most.
    """

    name: ClassVar[str] = "deepfool"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"norm": ("l2", "linf")}

    overshoot: Real = 0.02
    kappa: Real = 0.0
    norm: Norm = static(default="l2")
    candidates: int = static(default=10)
    steps: int = static(default=50)

    @property
    def iterations(self) -> int:
        """The steps, and one that judges the last iterate."""
        return self.steps + 1

    @canonical
    def init(self, model, images, labels, targets, keys, support=None) -> DeepFoolState:
        """Starts at the original."""
        zeros = jnp.zeros(images.shape[0], jnp.int32)
        return DeepFoolState(
            examples=Examples(images, labels, targets, support),
            record=Record.start(images),
            images=images,
            overshoot=per_example(self.overshoot, images),
            kappa=per_example(self.kappa, images),
            count=zeros,
            done=zeros.astype(bool),
        )

    @canonical
    def step(self, model, state: DeepFoolState) -> DeepFoolState:
        """Judges the iterate, and steps to the nearest boundary where it is no success; the last call only judges."""
        examples, active, x = state.examples, ~state.done, state.images
        logits, pull_back = objective.linearised(model, x, examples.support)
        found = active & objective.succeeded(logits, examples.labels, examples.targets, state.kappa)
        moves = active & ~found & (state.count < self.steps)

        def to_the_boundary():
            near = boundary.nearest(pull_back, x, logits, examples, state.kappa, self.candidates, self.norm)
            return jnp.clip(x + along(1 + state.overshoot, x) * near.step, 0, 1), jnp.isfinite(near.distance)

        moved, slopes = lax.cond(jnp.any(moves), to_the_boundary, lambda: (x, jnp.zeros_like(moves)))
        backward = moves * boundary.passes(logits, examples, self.candidates)
        return dataclasses.replace(
            state,
            record=state.record.update(
                images=x, found=found, better=found, iteration=state.count, forward=active, backward=backward
            ),
            images=select(moves, moved, x),
            count=state.count + active.astype(jnp.int32),
            done=~(moves & slopes),
        )

    @canonical
    def result(self, state: DeepFoolState) -> AttackResult:
        """The first success."""
        return state.record.result(state.examples.images)
