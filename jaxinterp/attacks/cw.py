"""The L2 attack of Carlini and Wagner (2017, arXiv 1608.04644, section VI.A), every example on its own.

    min ||x' - x0||^2 + c max(max_{j != t} Z(x')_j - Z(x')_t + kappa, 0),   x' = (tanh w + 1) / 2

by Adam on w, inside a search for the smallest constant c that succeeds. With cross-entropy in place of the margin, and
1 / c for lambda, it is the ensemble attack of Dong et al. (2017, arXiv 1708.05493), min lambda d(x', x) + CE(Z(x'), t),
with d the squared distance; they let Adam move the pixels themselves.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from jaxinterp.attacks.attack import AttackResult, Examples, Real, select
from jaxinterp.attacks.boxed import Boxed
from jaxinterp.attacks.search import TOLERANCE, Nearest, beginning, evaluate, next_problem
from jaxinterp.canonical import canonical
from jaxinterp.pytree import pytree, static

_POLISHES = 2  # search steps
_FINE = 0.1  # of the learning rate, in the last of them


@pytree
class CWState(Nearest):
    """Every example's variable with its optimiser, bracket of the constant, and place in the search."""

    variable: Boxed


@pytree
class CW:
    """The smallest L2 perturbation that succeeds at confidence kappa.

    On linear models the result is within 1.05 of the nearest point, if that is farther than about one step of Adam,
    lr sqrt(n) / 2 with n components. The first step is lr times the sign of the gradient whatever c is: where it jumps
    over the boundary, every c succeeds, and the search only lowers c. So it is in the original. A smaller `lr` finds
    nearer points, with more `steps`.

    Attributes:
        lr: learning rate of Adam.
        initial_const: c of the first search step; times 10 until a success, then bisected.
        kappa: confidence, the margin of logits that counts as success.
        search_steps: number of constants that are tried.
        steps: iterations of Adam for every constant, at most.
        abort_early: end a search step of an example whose loss has not fallen by `tolerance` (relative) in
            `window` iterations.
        window: None means a tenth of `steps`, at least 10. Fewer end sooner what has converged; the lowest loss of the
            search step must stand still then, too, since at the boundary the loss goes up and down.
        tolerance: see `abort_early`.
        polish: begin the last two search steps at the nearest success so far, with the smallest constant that has
            succeeded, and give them twice the window and a tenth of the tolerance, the last one a tenth of the learning
            rate, too. Search steps that end early then cost little distance: they only have to find the constant.
        loss: "margin", or "ce" for cross-entropy: of the target, or untargeted of any other class than the label.
    """

    name: ClassVar[str] = "cw"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"loss": ("margin", "ce")}

    lr: Real = 0.01
    initial_const: Real = 1e-3
    kappa: Real = 0.0
    search_steps: int = static(default=9)
    steps: int = static(default=1000)
    abort_early: bool = static(default=True)
    window: int | None = static(default=None)
    tolerance: Real = TOLERANCE
    polish: bool = static(default=False)
    loss: Literal["margin", "ce"] = static(default="margin")

    @property
    def iterations(self) -> int:
        """At most this many; examples may be done before."""
        return self.search_steps * self.steps

    @canonical
    def init(self, model, images, labels, targets, keys, support=None) -> CWState:
        """Starts at the original; an image that is adversarial already is done after the first step."""
        examples = Examples(images, labels, targets, support)
        return CWState(
            **beginning(
                examples,
                variable=Boxed.start(images),
                initial_const=self.initial_const,
                kappa=self.kappa,
                lr=self.lr,
                tolerance=self.tolerance,
            )
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
        polishing = state.polishing(self.search_steps, _POLISHES) if self.polish else None
        judged, gradient, ended = evaluate(
            model,
            state,
            x,
            steps=self.steps,
            abort_early=self.abort_early,
            window=self.window,
            loss=self.loss,
            polishing=polishing,
        )
        lr = state.lr
        if self.polish:  # Adam goes to and fro about the nearest point, as far off as its steps are long
            lr = jnp.where(state.polishing(self.search_steps, 1), _FINE * lr, lr)
        variable = state.variable.descend(gradient + 2 * delta, lr, examples.support)
        moved = select(active, dataclasses.replace(judged, variable=variable), state)

        def fresh(images):
            return {"variable": Boxed.start(images)}

        return next_problem(moved, ended, fresh, search_steps=self.search_steps, polishes=_POLISHES * self.polish)

    @canonical
    def result(self, state: CWState) -> AttackResult:
        """The nearest success. The distance is from the original itself, not from its image under tanh."""
        return state.record.result(state.examples.images)
