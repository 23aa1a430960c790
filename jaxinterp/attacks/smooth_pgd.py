"""Projected gradient descent along smooth perturbations: sPGD_2 and sBIM (Zhang et al. 2019, arXiv 1903.11862).

    y_{k+1} = P(y_k - a D_k),   z = y_{k+1} - x_0
    x_{k+1} = P(x_0 + r),       r = ||z|| s(z) / ||s(z)||

D is the direction of steepest ascent of the loss at x_k, P the projection onto ball, box and support, s the operator
of `jaxinterp.attacks.smoothing`. Steps add up in y, which the network never sees; it sees their smoothed sum, which is
as long as the sum itself. With alpha = 0 nothing is smoothed, x is y, and the two are PGD from the original image and
I-FGSM.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from jaxtyping import Array, Float

from jaxinterp.attacks import descent, smoothing
from jaxinterp.attacks.attack import AttackResult, Examples, Real
from jaxinterp.attacks.constraint import project, steepest
from jaxinterp.attacks.smoothing import Smoother
from jaxinterp.canonical import canonical
from jaxinterp.pytree import pytree, static


@pytree
class Accumulated:
    """What the attacks remember: the image without smoothing, y, and the operator."""

    unsmoothed: Float[Array, "b h w c"]
    smoother: Smoother


class _Smooth:
    """What the two have in common; they differ in the norm."""

    norm: ClassVar[Literal["linf", "l2"]]
    eps: Real
    step_size: Real | None
    kappa: Real
    alpha: Real | None
    lam: Real | None
    steps: int
    stop_on_success: bool
    normalised: bool
    cg_steps: int

    def __post_init__(self) -> None:
        smoothing.check(self.alpha, self.lam, f"{type(self).__name__}.")

    @property
    def iterations(self) -> int:
        """K steps, and one that judges the last iterate."""
        return self.steps + 1

    @canonical
    def init(self, model, images, labels, targets, keys, support=None) -> descent.DescentState:
        """Starts at the original image."""
        smoother = Smoother.of(images, self.alpha, self.lam, normalised=self.normalised, iterations=self.cg_steps)
        return descent.start(
            Examples(images, labels, targets, support),
            images,
            eps=self.eps,
            step_size=descent.default_step_size(self.eps, self.steps) if self.step_size is None else self.step_size,
            kappa=self.kappa,
            memory=Accumulated(images, smoother),
        )

    @canonical
    def warm(self, state: descent.DescentState, initial) -> descent.DescentState:
        """Takes `initial`, or the nearest point inside the ball, for y."""
        unsmoothed = descent.warm(state, initial, self.norm).images
        memory = dataclasses.replace(state.memory, unsmoothed=unsmoothed)
        return dataclasses.replace(state, images=self._smoothed(state, unsmoothed), memory=memory)

    @canonical
    def step(self, model, state: descent.DescentState) -> descent.DescentState:
        """One step of y, and the smoothed sum of all."""

        def move(model, state):
            logits, ascent = descent.gradient(model, state)
            summed = dataclasses.replace(state, images=state.memory.unsmoothed)
            unsmoothed = descent.towards(summed, steepest(ascent, self.norm), self.norm)
            memory = dataclasses.replace(state.memory, unsmoothed=unsmoothed)
            return logits, self._smoothed(state, unsmoothed), memory

        return descent.step(model, state, move, steps=self.steps, stop_on_success=self.stop_on_success)

    @canonical
    def result(self, state: descent.DescentState) -> AttackResult:
        """The latest iterate that succeeded."""
        return descent.result(state)

    def _smoothed(self, state, unsmoothed):
        """P(x_0 + r)."""
        original, support = state.examples.images, state.examples.support
        r = state.memory.smoother.turned(unsmoothed - original, support)
        return project(original + r, original, state.eps, self.norm, support)


@pytree
class SmoothPGD(_Smooth):
    """sPGD_2: steepest descent in an L2 ball, along perturbations that are smooth where the image is flat.

    The steps are those of PGD in L2 from the original image; the network sees their smoothed sum, at its full length.
    The latest iterate that succeeded is returned.

    Attributes:
        eps: radius of the ball, in pixel units of [0, 1]; one number, or one for every example.
        step_size: length of a step; None means 2.5 eps / steps.
        kappa: confidence, the margin of logits that counts as success.
        alpha: how far to smooth, in [0, 1); None means 0.95 for images of at most 64 pixels a side, else 0.997.
        lam: lambda, how much an edge of the image separates; None means 10 and 300, likewise.
        steps: number of steps K.
        stop_on_success: stop an example at its first success.
        normalised: whether smoothing leaves constants as they are.
        cg_steps: iterations of conjugate gradients in a smoothing.

    Raises:
        ValueError: alpha or lam out of range.
    """

    name: ClassVar[str] = "spgd"
    norm: ClassVar[Literal["linf", "l2"]] = "l2"

    eps: Real = 1.0
    step_size: Real | None = None
    kappa: Real = 0.0
    alpha: Real | None = None
    lam: Real | None = None
    steps: int = static(default=20)
    stop_on_success: bool = static(default=False)
    normalised: bool = static(default=True)
    cg_steps: int = static(default=50)


@pytree
class SmoothBIM(_Smooth):
    """sBIM: signed steps in an Linf ball (I-FGSM), along perturbations that are smooth where the image is flat.

    The network sees the smoothed sum of the steps, at its full Euclidean length and cut off at the ball. The latest
    iterate that succeeded is returned.

    Attributes:
        eps: radius of the ball, in pixel units of [0, 1]; one number, or one for every example.
        step_size: length of a step; None means 2.5 eps / steps.
        kappa: confidence, the margin of logits that counts as success.
        alpha: how far to smooth, in [0, 1); None means 0.95 for images of at most 64 pixels a side, else 0.997.
        lam: lambda, how much an edge of the image separates; None means 10 and 300, likewise.
        steps: number of steps K.
        stop_on_success: stop an example at its first success.
        normalised: whether smoothing leaves constants as they are.
        cg_steps: iterations of conjugate gradients in a smoothing.

    Raises:
        ValueError: alpha or lam out of range.
    """

    name: ClassVar[str] = "sbim"
    norm: ClassVar[Literal["linf", "l2"]] = "linf"

    eps: Real = 8 / 255
    step_size: Real | None = None
    kappa: Real = 0.0
    alpha: Real | None = None
    lam: Real | None = None
    steps: int = static(default=20)
    stop_on_success: bool = static(default=False)
    normalised: bool = static(default=True)
    cg_steps: int = static(default=50)
