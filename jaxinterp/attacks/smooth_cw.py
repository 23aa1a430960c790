"""sC&W, the attack of Carlini and Wagner along smooth perturbations (Zhang et al. 2019, arXiv 1903.11862).

    min_z ||r|| + c max(max_{j != t} Z(x')_j - Z(x')_t + kappa, 0),   r = s(z),   x' = clip(x_0 + r)

by Adam on z, with s the operator of `jaxinterp.attacks.smoothing`, inside the search for the constant c of Carlini and
Wagner. The norm is not squared. z is free, so that the whole of r follows the image; the box is met by clipping.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxinterp.attacks import smoothing
from jaxinterp.attacks.attack import AttackResult, Examples, Real, along, norm, select
from jaxinterp.attacks.search import TOLERANCE, Nearest, beginning, evaluate, next_problem
from jaxinterp.attacks.smoothing import Smoother
from jaxinterp.canonical import canonical
from jaxinterp.pytree import pytree, static

_TINY = 1e-30


@pytree
class Free:
    """The variable z of every example and its own Adam."""

    z: Float[Array, "b h w c"]
    adam: Any

    @classmethod
    def at(cls, z: Float[Array, "b h w c"]) -> Free:
        """At the given z, with a new Adam."""
        return cls(z, jax.vmap(optax.scale_by_adam().init)(z))

    def descend(self, gradient: Float[Array, "b h w c"], lr: Float[Array, " b"]) -> Free:
        """One step of Adam."""
        direction, adam = jax.vmap(optax.scale_by_adam().update)(gradient, self.adam)
        return Free(self.z - along(lr, gradient) * jnp.asarray(direction), adam)


@pytree
class SmoothCWState(Nearest):
    """Every example's variable, operator, bracket of the constant, and place in the search."""

    variable: Free
    smoother: Smoother


@pytree
class SmoothCW:
    """sC&W: a small L2 perturbation, smooth where the image is flat, that succeeds at confidence kappa.

    Of the successes, the one with the smallest L2 norm is returned.

    Attributes:
        lr: learning rate of Adam.
        initial_const: c of the first search step; times 10 until a success, then bisected.
        kappa: confidence, the margin of logits that counts as success.
        alpha: how far to smooth, in [0, 1); None means 0.95 for images of at most 64 pixels a side, else 0.997.
        lam: lambda, how much an edge of the image separates; None means 10 and 300, likewise.
        search_steps: number of constants that are tried.
        steps: iterations of Adam for every constant, at most.
        abort_early: end a search step of an example whose loss has not fallen by `tolerance` (relative) in
            `window` iterations.
        window: None means a tenth of `steps`, at least 10. Fewer end sooner what has converged.
        tolerance: see `abort_early`.
        normalised: whether smoothing leaves constants as they are.
        cg_steps: iterations of conjugate gradients in a smoothing.

    Raises:
        ValueError: alpha or lam out of range.
    """

    name: ClassVar[str] = "scw"

    lr: Real = 0.01
    initial_const: Real = 10.0
    kappa: Real = 0.0
    alpha: Real | None = None
    lam: Real | None = None
    search_steps: int = static(default=9)
    steps: int = static(default=100)
    abort_early: bool = static(default=True)
    window: int | None = static(default=None)
    tolerance: Real = TOLERANCE
    normalised: bool = static(default=True)
    cg_steps: int = static(default=50)

    def __post_init__(self) -> None:
        smoothing.check(self.alpha, self.lam, "SmoothCW.")

    @property
    def iterations(self) -> int:
        """At most this many; examples may be done before."""
        return self.search_steps * self.steps

    @canonical
    def init(self, model, images, labels, targets, keys, support=None) -> SmoothCWState:
        """Starts at the original; an image that is adversarial already is done after the first step."""
        examples = Examples(images, labels, targets, support)
        begun = beginning(
            examples,
            variable=Free.at(jnp.zeros_like(images)),
            initial_const=self.initial_const,
            kappa=self.kappa,
            lr=self.lr,
            tolerance=self.tolerance,
        )
        smoother = Smoother.of(images, self.alpha, self.lam, normalised=self.normalised, iterations=self.cg_steps)
        return SmoothCWState(**begun, smoother=smoother)

    @canonical
    def warm(self, state: SmoothCWState, initial) -> SmoothCWState:
        """Begins every problem at the z that becomes `initial` - x_0, which as a rule is far rougher."""
        state = dataclasses.replace(state, examples=dataclasses.replace(state.examples, initial=initial))
        return dataclasses.replace(state, variable=self._beginning(state))

    @canonical
    def step(self, model, state: SmoothCWState) -> SmoothCWState:
        """One iteration of Adam for every example, at its own place in its own search."""
        examples, active = state.examples, ~state.done
        r = state.smoother(state.variable.z)
        if examples.support is not None:
            r = jnp.where(examples.support, r, 0)
        moved = examples.images + r
        x = jnp.where(r == 0, examples.images, jnp.clip(moved, 0, 1))
        length = norm(r)
        judged, gradient, ended = evaluate(
            model, state, x, length, steps=self.steps, abort_early=self.abort_early, window=self.window
        )
        # The derivative of clip is one up to the bounds themselves, so that pixels at 0 and 1 can leave them.
        gradient = jnp.where((moved >= 0) & (moved <= 1), gradient, 0) + r / along(jnp.maximum(length, _TINY), r)
        if examples.support is not None:
            gradient = jnp.where(examples.support, gradient, 0)
        variable = state.variable.descend(state.smoother.transposed(gradient), state.lr)
        moved_on = select(active, dataclasses.replace(judged, variable=variable), state)

        def fresh(_):
            return {"variable": self._beginning(state)}

        return next_problem(moved_on, ended, fresh, search_steps=self.search_steps)

    def _beginning(self, state: SmoothCWState) -> Free:
        """The z of the image at which every problem begins."""
        if state.examples.initial is None:
            return Free.at(jnp.zeros_like(state.examples.images))
        return Free.at(state.smoother.inverse(state.examples.initial - state.examples.images))

    @canonical
    def result(self, state: SmoothCWState) -> AttackResult:
        """The nearest success."""
        return state.record.result(state.examples.images)
