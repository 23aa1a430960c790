"""FGSM, the fast gradient sign method (Goodfellow, Shlens and Szegedy 2015, arXiv 1412.6572, section 4)."""

from __future__ import annotations

from typing import ClassVar

from jaxinterp.attacks import descent
from jaxinterp.attacks.attack import AttackResult, Examples, Real
from jaxinterp.attacks.constraint import Norm
from jaxinterp.canonical import canonical
from jaxinterp.pytree import pytree


@pytree
class FGSM:
    """x' = clip(x - eps sign grad CE(x, t)) into the box; untargeted: + eps sign grad CE(x, y).

    The image at distance eps is returned where it is adversarial, else the original.

    Attributes:
        eps: length of the step in Linf, in pixel units of [0, 1]; one number, or one for every example.
        kappa: confidence, the margin of logits that counts as success.
    """

    name: ClassVar[str] = "fgsm"
    norm: ClassVar[Norm] = "linf"

    eps: Real = 8 / 255
    kappa: Real = 0.0

    @property
    def iterations(self) -> int:
        """One step, and one that judges where it led."""
        return 2

    @canonical
    def init(self, model, images, labels, targets, keys, support=None) -> descent.DescentState:
        """Starts at the original image."""
        return descent.start(
            Examples(images, labels, targets, support), images, eps=self.eps, step_size=self.eps, kappa=self.kappa
        )

    @canonical
    def step(self, model, state: descent.DescentState) -> descent.DescentState:
        """The signed step, or the judgement."""
        return descent.descend(model, state, descent.steepest("linf"), steps=1)

    @canonical
    def result(self, state: descent.DescentState) -> AttackResult:
        """The image after the step, where it succeeded."""
        return descent.result(state)
