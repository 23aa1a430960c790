"""PGD, projected gradient descent from a random start (Madry et al. 2018, arXiv 1706.06083)."""

from __future__ import annotations

from typing import ClassVar

from jaxinterp.attacks import descent
from jaxinterp.attacks.attack import AttackResult, Examples, Real, per_example
from jaxinterp.attacks.constraint import Norm, project, random_in_ball
from jaxinterp.canonical import canonical
from jaxinterp.pytree import pytree, static


@pytree
class PGD:
    """Steepest descent of cross-entropy in an Linf or L2 ball, from a point uniform in the ball.

    The latest iterate that succeeded is returned.

    Attributes:
        eps: radius of the ball, in pixel units of [0, 1]; one number, or one for every example.
        step_size: length of a step in the ball's norm; None means 2.5 eps / steps.
        kappa: confidence, the margin of logits that counts as success.
        norm: "linf" or "l2".
        steps: number of steps K.
        random_start: start at a random point instead of the original image.
        stop_on_success: stop an example at its first success.
    """

    name: ClassVar[str] = "pgd"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"norm": ("linf", "l2")}

    eps: Real = 8 / 255
    step_size: Real | None = None
    kappa: Real = 0.0
    norm: Norm = static(default="linf")
    steps: int = static(default=20)
    random_start: bool = static(default=True)
    stop_on_success: bool = static(default=False)

    @property
    def iterations(self) -> int:
        """K steps, and one that judges the last iterate."""
        return self.steps + 1

    @canonical
    def init(self, model, images, labels, targets, keys, support=None) -> descent.DescentState:
        """Starts at a random point of the ball, on the support and in the box."""
        start = images
        if self.random_start:
            eps = per_example(self.eps, images)
            start = project(random_in_ball(keys, images, eps, self.norm), images, eps, self.norm, support)
        return descent.start(
            Examples(images, labels, targets, support),
            start,
            eps=self.eps,
            step_size=self.step_size,
            kappa=self.kappa,
            steps=self.steps,
        )

    @canonical
    def step(self, model, state: descent.DescentState) -> descent.DescentState:
        """One step of steepest descent."""
        return descent.step(model, state, which=self.norm, steps=self.steps, stop_on_success=self.stop_on_success)

    @canonical
    def result(self, state: descent.DescentState) -> AttackResult:
        """The latest iterate that succeeded."""
        return descent.result(state)
