"""EAD, the elastic-net attack (Chen et al. 2018, arXiv 1709.04114, algorithm 1), every example on its own.

    min c max(max_{j != t} Z(x')_j - Z(x')_t + kappa, 0) + beta ||x' - x0||_1 + ||x' - x0||_2^2

by FISTA, inside a search for the smallest constant c that succeeds. With k the iteration of K and g the first and last
term of the sum,

    x_{k+1} = S_beta(y_k - a_k grad g(y_k)),   y_{k+1} = x_{k+1} + k / (k + 3) (x_{k+1} - x_k)
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinterp.attacks import objective
from jaxinterp.attacks.attack import AttackResult, Examples, Real, Record, along, per_example, select
from jaxinterp.attacks.constraint import distance
from jaxinterp.attacks.search import TOLERANCE, Bracket, Progress, Searching, judge_if_warm, next_problem
from jaxinterp.canonical import canonical
from jaxinterp.pytree import pytree, static


@pytree
class EADState(Searching):
    """Every example's iterates x_k and y_k, and place in the search."""

    best: Float[Array, " b"]  # distance of the best success by the rule
    x: Float[Array, "b h w c"]
    y: Float[Array, "b h w c"]
    beta: Float[Array, " b"]


@pytree
class EAD:
    """The smallest elastic-net or L1 perturbation that succeeds at confidence kappa.

    A step shrinks by beta and not by a_k beta, so the iteration solves for (beta / a_k) ||d||_1 + ||d||_2^2, while rule
    "en" ranks the iterates by beta ||d||_1 + ||d||_2^2: its result is the best of those that were met, not the smallest
    there is. Rule "l1" comes within 1.25 of the smallest L1 norm on linear models as long as its largest change stays
    below about beta / (2 lr), by the defaults 0.05. Beyond that the L2 term rules and spreads the change over more
    components: a larger `beta` helps, 0.01 up to changes of 0.5.

    Attributes:
        beta: weight of the L1 norm; every step sets changes below it to zero.
        lr: a_k = lr sqrt(1 - k / steps).
        initial_const: c of the first search step; times 10 until a success, then bisected.
        kappa: confidence, the margin of logits that counts as success.
        rule: of the successes, the one with the smallest beta ||d||_1 + ||d||_2^2 is returned ("en"), or the one with
            the smallest ||d||_1 ("l1").
        search_steps: number of constants that are tried.
        steps: iterations K of FISTA for every constant, at most.
        abort_early: end a search step of an example whose loss has not fallen by `tolerance` (relative) in
            `window` iterations.
        window: None means a tenth of `steps`, at least 10. Fewer end sooner what has converged; the lowest loss of the
            search step must stand still then, too, since at the boundary the loss goes up and down.
        tolerance: see `abort_early`.
        polish: begin the last search step at the best success so far, with the smallest constant that has succeeded,
            and give it twice the window and a tenth of the tolerance. Search steps that end early then cost little
            distance: they only have to find the constant.
    """

    name: ClassVar[str] = "ead"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"rule": ("en", "l1")}

    beta: Real = 1e-3
    lr: Real = 0.01
    initial_const: Real = 1e-3
    kappa: Real = 0.0
    rule: Literal["en", "l1"] = static(default="en")
    search_steps: int = static(default=9)
    steps: int = static(default=1000)
    abort_early: bool = static(default=True)
    window: int | None = static(default=None)
    tolerance: Real = TOLERANCE
    polish: bool = static(default=False)

    @property
    def iterations(self) -> int:
        """At most this many; examples may be done before."""
        return self.search_steps * self.steps

    @canonical
    def init(self, model, images, labels, targets, keys, support=None) -> EADState:
        """Starts at the original; an image that is adversarial already is done after the first step."""
        return EADState(
            examples=Examples(images, labels, targets, support),
            record=Record.start(images),
            best=per_example(jnp.inf, images),
            x=images,
            y=images,
            bracket=Bracket.start(self.initial_const, images),
            progress=Progress.start(images, self.tolerance),
            beta=per_example(self.beta, images),
            lr=per_example(self.lr, images),
            kappa=per_example(self.kappa, images),
            done=jnp.zeros(images.shape[0], bool),
        )

    @canonical
    def warm(self, state: EADState, initial) -> EADState:
        """Begins every problem at `initial`."""
        examples = dataclasses.replace(state.examples, initial=initial)
        return dataclasses.replace(state, examples=examples, x=initial, y=initial)

    @canonical
    def step(self, model, state: EADState) -> EADState:
        """One iteration of FISTA for every example: a gradient at y_k, and a forward pass that judges x_{k+1}."""
        state = judge_if_warm(model, state, state.kappa, best="best")
        examples, active, original = state.examples, ~state.done, state.examples.images

        def hinge(logits):
            f = objective.margin(logits, examples.labels, examples.targets)
            return state.bracket.const * jnp.maximum(f + state.kappa, 0)

        k = state.progress.iteration.astype(jnp.float32)
        a = along(state.lr * jnp.sqrt(1 - k / self.steps), original)
        _, _, gradient = objective.value_and_gradient(model, state.y, hinge)
        x = shrink(state.y - a * (gradient + 2 * (state.y - original)), original, state.beta)
        if examples.support is not None:
            x = jnp.where(examples.support, x, original)
        y = x + along(k / (k + 3), x) * (x - state.x)

        logits, delta = model(x), x - original
        success = active & objective.succeeded(logits, examples.labels, examples.targets, state.kappa)
        l1 = distance(delta, "l1")
        elastic = state.beta * l1 + jnp.square(distance(delta, "l2"))
        size = l1 if self.rule == "l1" else elastic
        better = success & (size < state.best)
        record = state.record.update(
            images=x,
            found=success,
            better=better,
            iteration=state.progress.count,
            forward=2 * active.astype(jnp.int32),
            backward=active,
        )
        progress, ended = state.progress.advance(
            success,
            hinge(logits) + elastic,
            steps=self.steps,
            abort_early=self.abort_early,
            window=self.window,
            polishing=state.polishing(self.search_steps, 1) if self.polish else None,
        )
        moved = dataclasses.replace(
            state,
            record=record,
            best=jnp.where(better, size, state.best),
            x=x,
            y=y,
            progress=progress,
            done=state.done | (success & (size == 0)),  # nothing is better; an adversarial original has no slope
        )

        def fresh(images):
            return {"x": images, "y": images}

        moved = select(active, moved, state)
        return next_problem(moved, active & ended, fresh, search_steps=self.search_steps, polishes=int(self.polish))

    @canonical
    def result(self, state: EADState) -> AttackResult:
        """The best success by the rule."""
        return state.record.result(state.examples.images)


def shrink(
    z: Float[Array, "b h w c"], original: Float[Array, "b h w c"], beta: Float[Array, " b"]
) -> Float[Array, "b h w c"]:
    """S_beta: changes of at most beta become zero, others shrink by beta and are clipped to the box.

    By beta itself, as in the paper and in the authors' program. The proximal step of beta ||.||_1 would
    shrink by a_k beta: the L1 norm weighs beta / a_k here.
    """
    threshold = along(beta, z)
    change = z - original
    shrunk = jnp.clip(z - jnp.sign(change) * threshold, 0.0, 1.0)
    return jnp.where(jnp.abs(change) <= threshold, original, shrunk)
