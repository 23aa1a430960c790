"""DDN, the decoupling of direction and norm (Rony et al. 2019, arXiv 1811.09600, algorithm 1).

d_k = d_{k-1} - a_k g / ||g||_2                      g the gradient of the loss (here of the margin, see `DDN.loss`)
e_k = (1 - gamma) e_{k-1} if x_{k-1} is adversarial, else (1 + gamma) e_{k-1}
x_k = clip(x_0 + e_k d_k / ||d_k||_2),  d_k = x_k - x_0
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.attacks import objective
from jaxinterp.attacks.attack import AttackResult, Examples, Real, Record, along, norm, per_example, select
from jaxinterp.attacks.constraint import farthest, steepest
from jaxinterp.attacks.schedule import cosine
from jaxinterp.canonical import canonical
from jaxinterp.pytree import pytree, static


@pytree
class DDNState:
    """Every example's iterate and the radius of its sphere; `count` is the number of evaluations so far."""

    examples: Examples
    record: Record
    best_l2: Float[Array, " b"]
    images: Float[Array, "b h w c"]
    radius: Float[Array, " b"]
    gamma: Float[Array, " b"]
    step_size: Float[Array, " b"]
    final_step_size: Float[Array, " b"]
    kappa: Float[Array, " b"]
    count: Int[Array, " b"]
    done: Bool[Array, " b"]


@pytree
class DDN:
    """The smallest L2 perturbation, by steps of the gradient on a sphere that shrinks on success and grows on failure.

        x <- clip(x_0 + e d / ||d||_2),  e <- (1 -+ gamma) e      (Rony et al. 2019, arXiv 1811.09600)

    An input that is adversarial already is done at distance zero. Otherwise K steps cost K backward passes and K + 1
    forward passes.

    Attributes:
        initial_radius: e_0, the radius of the first sphere, in pixel units. The radius cannot fall below
            e_0 (1 - gamma)^K, by the defaults 0.006: where the nearest point may be nearer, begin smaller.
        gamma: relative change of the radius in every step, below 1.
        step_size: length of the first step; the following ones fall along half a cosine
        final_step_size: to this length.
        kappa: confidence, the margin of logits that counts as success.
        loss: "margin", or "cross_entropy" as in the paper. Cross-entropy blends the directions to several rivals of
            similar logits, and then ends beyond the nearest point, on linear models with more than two classes by a
            tenth to a half.
        steps: number of steps K.
    """

    name: ClassVar[str] = "ddn"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"loss": ("margin", "cross_entropy")}
    ranges: ClassVar[dict[str, str]] = {"gamma": "below 1"}

    initial_radius: Real = 1.0
    gamma: Real = 0.05
    step_size: Real = 1.0
    final_step_size: Real = 0.01
    kappa: Real = 0.0
    # The paper and its programs have cross-entropy, which misses the nearest point where there are several rivals.
    loss: str = static(default="margin")
    steps: int = static(default=100)

    @property
    def iterations(self) -> int:
        """K steps, and one that judges the last iterate."""
        return self.steps + 1

    @canonical
    def init(self, model, images, labels, targets, keys, support=None) -> DDNState:
        """Starts at the original."""
        zeros = jnp.zeros(images.shape[0], jnp.int32)
        return DDNState(
            examples=Examples(images, labels, targets, support),
            record=Record.start(images),
            best_l2=per_example(jnp.inf, images),
            images=images,
            radius=per_example(self.initial_radius, images),
            gamma=per_example(self.gamma, images),
            step_size=per_example(self.step_size, images),
            final_step_size=per_example(self.final_step_size, images),
            kappa=per_example(self.kappa, images),
            count=zeros,
            done=zeros.astype(bool),
        )

    @canonical
    def step(self, model, state: DDNState) -> DDNState:
        """Judges the iterate, changes the radius, and steps along the gradient; the last call only judges."""
        examples, active, x = state.examples, ~state.done, state.images
        logits, pull_back = objective.linearised(model, x, examples.support)
        delta = x - examples.images
        l2 = norm(delta)
        found = active & objective.succeeded(logits, examples.labels, examples.targets, state.kappa)
        better = found & (l2 < state.best_l2)
        moves = active & (state.count < self.steps) & ~(found & (state.count == 0))

        def loss(logits):
            function = objective.margin if self.loss == "margin" else objective.likelihood
            return jnp.sum(function(logits, examples.labels, examples.targets))

        gradient = lax.cond(jnp.any(moves), lambda: pull_back(jax.grad(loss)(logits)), lambda: jnp.zeros_like(x))
        # Where the gradient is zero the original program steps in a random direction, which the underflow of
        # cross-entropy makes necessary; the log of the odds does not underflow.
        length = cosine(state.step_size, state.final_step_size, state.count, self.steps)
        delta = delta - along(length, x) * steepest(gradient, "l2")
        radius = state.radius * jnp.where(found, 1 - state.gamma, 1 + state.gamma)
        radius = jnp.minimum(radius, farthest(examples.images, examples.support, "l2"))  # as the authors' program does
        moved = jnp.clip(examples.images + along(radius, x) * steepest(delta, "l2"), 0, 1)
        return dataclasses.replace(
            state,
            record=state.record.update(
                images=x, found=found, better=better, iteration=state.count, forward=active, backward=moves
            ),
            best_l2=jnp.where(better, l2, state.best_l2),
            images=select(moves, moved, x),
            radius=jnp.where(moves, radius, state.radius),
            count=state.count + active.astype(jnp.int32),
            done=~moves,
        )

    @canonical
    def result(self, state: DDNState) -> AttackResult:
        """The nearest success."""
        return state.record.result(state.examples.images)
