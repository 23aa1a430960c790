"""I-FGSM, the iterative fast gradient sign method (Kurakin, Goodfellow and Bengio 2017, arXiv 1607.02533)."""

from __future__ import annotations

from typing import ClassVar

from jaxinterp.attacks import descent
from jaxinterp.attacks.attack import AttackResult, Examples, Real
from jaxinterp.attacks.constraint import Norm
from jaxinterp.canonical import canonical
from jaxinterp.pytree import pytree, static


@pytree
class IFGSM:
    """x <- clip(x - a sign grad CE(x, t)) into the Linf ball and the box; untargeted: + sign grad CE(x, y).

    The latest iterate that succeeded is returned.

    Attributes:
        eps: radius of the ball, in pixel units of [0, 1]; one number, or one for every example.
        step_size: a; None means 2.5 eps / steps.
        kappa: confidence, the margin of logits that counts as success.
        steps: number of steps K.
        stop_on_success: stop an example at its first success.
    """

    name: ClassVar[str] = "ifgsm"
    norm: ClassVar[Norm] = "linf"

    eps: Real = 8 / 255
    step_size: Real | None = None
    kappa: Real = 0.0
    steps: int = static(default=20)
    stop_on_success: bool = static(default=False)

    @property
    def iterations(self) -> int:
        """K steps, and one that judges the last iterate."""
        return self.steps + 1

    @canonical
    def init(self, model, images, labels, targets, keys, support=None) -> descent.DescentState:
        """Starts at the original image."""
        return descent.start(
            Examples(images, labels, targets, support),
            images,
            eps=self.eps,
            step_size=descent.default_step_size(self.eps, self.steps) if self.step_size is None else self.step_size,
            kappa=self.kappa,
        )

    @canonical
    def warm(self, state: descent.DescentState, initial) -> descent.DescentState:
        """Starts at `initial`."""
        return descent.warm(state, initial, "linf")

    @canonical
    def step(self, model, state: descent.DescentState) -> descent.DescentState:
        """One signed step."""
        return descent.descend(
            model, state, descent.steepest("linf"), steps=self.steps, stop_on_success=self.stop_on_success
        )

    @canonical
    def result(self, state: descent.DescentState) -> AttackResult:
        """The latest iterate that succeeded."""
        return descent.result(state)
