"""PGD, projected gradient descent from random starts (Madry et al. 2018, arXiv 1706.06083)."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax.numpy as jnp

from jaxinterp.attacks import descent
from jaxinterp.attacks.attack import AttackResult, Examples, Real, per_example
from jaxinterp.attacks.constraint import project, random_in_ball, sparse_step
from jaxinterp.canonical import canonical
from jaxinterp.pytree import pytree, static


@pytree
class PGD:
    """Steepest descent of cross-entropy in an Linf, L2 or L1 ball, from points uniform in the ball.

    In L1 a step moves a small part of the components by equal amounts (SLIDE, Tramer and Boneh 2019, arXiv
    1904.13000, section 4), and more of them where the box leaves less room. Steps that move few components find sparse
    successes best. Where only a change of many components succeeds, `sparsity` times `steps` must reach them: on logits
    that fall with the squared distance from a point the defaults fail in balls of any size, 0.05 does not. (`APGD`
    adapts the number.) Where several rivals are about equally near, cross-entropy is drawn to all of them, and may need
    1.5 times the smallest radius. The latest iterate that succeeded is returned.

    Attributes:
        eps: radius of the ball, in pixel units of [0, 1]; one number, or one for every example.
        step_size: length of a step in the ball's norm; None means 2.5 eps / steps.
        kappa: confidence, the margin of logits that counts as success.
        sparsity: the part of all components that a step in L1 moves, from 0 to 1.
        norm: "linf", "l2" or "l1".
        steps: number of steps K of a run.
        restarts: number of runs. An example that has succeeded starts no further one.
        random_start: start the first run, too, at a random point instead of the original image.
        stop_on_success: stop an example at its first success.
    """

    name: ClassVar[str] = "pgd"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"norm": ("linf", "l2", "l1")}
    ranges: ClassVar[dict[str, str]] = {"sparsity": "from 0 to 1"}

    eps: Real = 8 / 255
    step_size: Real | None = None
    kappa: Real = 0.0
    sparsity: Real = 0.01
    norm: Literal["linf", "l2", "l1"] = static(default="linf")
    steps: int = static(default=20)
    restarts: int = static(default=1)
    random_start: bool = static(default=True)
    stop_on_success: bool = static(default=False)

    @property
    def iterations(self) -> int:
        """In every run K steps, and one that judges the last iterate."""
        return self.restarts * (self.steps + 1)

    @canonical
    def init(self, model, images, labels, targets, keys, support=None) -> descent.DescentState:
        """Starts at a random point of the ball, on the support and in the box."""
        state = descent.start(
            Examples(images, labels, targets, support),
            images,
            eps=self.eps,
            step_size=descent.default_step_size(self.eps, self.steps) if self.step_size is None else self.step_size,
            kappa=self.kappa,
            keys=keys,
            # How many components a step in L1 moves.
            memory=jnp.maximum(jnp.ceil(per_example(self.sparsity, images) * images[0].size), 1),
        )
        return self._begin(state) if self.random_start else state

    @canonical
    def warm(self, state: descent.DescentState, initial) -> descent.DescentState:
        """Starts the first run at `initial`."""
        return descent.warm(state, initial, self.norm)

    @canonical
    def step(self, model, state: descent.DescentState) -> descent.DescentState:
        """One step of steepest descent."""
        state = descent.descend(
            model,
            state,
            _sparse if self.norm == "l1" else descent.steepest(self.norm),
            steps=self.steps,
            runs=self.restarts,
            stop_on_success=self.stop_on_success,
        )
        return self._begin(state) if self.restarts > 1 else state

    @canonical
    def result(self, state: descent.DescentState) -> AttackResult:
        """The latest iterate that succeeded."""
        return descent.result(state)

    def _begin(self, state: descent.DescentState) -> descent.DescentState:
        """Random starts for the examples that begin a run."""
        images, support = state.examples.images, state.examples.support

        def begin(keys):
            start = random_in_ball(keys, images, state.eps, self.norm)
            return project(start, images, state.eps, self.norm, support), state.memory

        return descent.restart(state, begin, steps=self.steps)


def _sparse(state, ascent):
    """A step by equal parts of as many components as `state.memory` says, or more where the box leaves less room."""
    moved = state.images - sparse_step(ascent, state.images, state.step_size, state.memory)
    return project(moved, state.examples.images, state.eps, "l1", state.examples.support)
