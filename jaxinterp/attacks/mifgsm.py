"""MI-FGSM, the momentum iterative fast gradient sign method (Dong et al. 2018, arXiv 1710.06081, section 3.1)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinterp.attacks import descent, objective
from jaxinterp.attacks import transforms as chains
from jaxinterp.attacks.attack import AttackResult, Examples, Real, along, per_example
from jaxinterp.attacks.constraint import Norm, normalised, steepest
from jaxinterp.attacks.transforms import Memory, Transform
from jaxinterp.canonical import canonical
from jaxinterp.pytree import pytree, static


@pytree
class Momentum:
    """What MI-FGSM remembers: the accumulated gradient, its decay, and the chain with its own memory."""

    gradient: Float[Array, "b h w c"]
    decay: Float[Array, " b"]
    transforms: tuple[Any, ...]
    chain: Memory


@pytree
class MIFGSM:
    """g <- mu g + grad / ||grad||_1, x <- clip(x - a sign g) into the Linf ball and the box, for grad CE(x, t).

    Untargeted, the gradient is that of -CE(x, y). With `transforms`, it is what their chain makes of it: NI-FGSM is
    `transforms=(Nesterov(),)`, and `mifgsm:transforms=ni+si+di` on the command line. The latest iterate that succeeded
    is returned.

    Attributes:
        eps: radius of the ball, in pixel units of [0, 1]; one number, or one for every example.
        step_size: a; None means eps / steps.
        kappa: confidence, the margin of logits that counts as success.
        decay: mu, the share of the accumulated gradient that is kept.
        transforms: gradient transformations, the first of which asks all others.
        steps: number of steps K.
        stop_on_success: stop an example at its first success.

    Raises:
        ValueError: a chain of transformations that makes no sense.
    """

    name: ClassVar[str] = "mifgsm"
    norm: ClassVar[Norm] = "linf"
    parts: ClassVar[dict[str, Any]] = {"transforms": chains.TRANSFORMS}

    eps: Real = 8 / 255
    step_size: Real | None = None
    kappa: Real = 0.0
    decay: Real = 1.0
    transforms: tuple[Any, ...] = ()
    steps: int = static(default=10)
    stop_on_success: bool = static(default=False)

    def __post_init__(self) -> None:
        chains.check(self.transforms)

    @property
    def iterations(self) -> int:
        """K steps, and one that judges the last iterate."""
        return self.steps + 1

    @canonical
    def init(self, model, images, labels, targets, keys, support=None) -> descent.DescentState:
        """Starts at the original image, without momentum."""
        chain: tuple[Transform, ...] = jax.tree.map(lambda leaf: per_example(leaf, images), self.transforms)
        return descent.start(
            Examples(images, labels, targets, support),
            images,
            eps=self.eps,
            step_size=self.eps / self.steps if self.step_size is None else self.step_size,
            kappa=self.kappa,
            keys=keys if chain else None,
            memory=Momentum(jnp.zeros_like(images), per_example(self.decay, images), chain, chains.init(chain, images)),
        )

    @canonical
    def warm(self, state: descent.DescentState, initial) -> descent.DescentState:
        """Starts at `initial`."""
        return descent.warm(state, initial, "linf")

    @canonical
    def step(self, model, state: descent.DescentState) -> descent.DescentState:
        """One signed step along the momentum."""
        chain = self.transforms
        gradients = chains.gradients(chain)
        return descent.step(
            model,
            state,
            _move,
            steps=self.steps,
            stop_on_success=self.stop_on_success,
            forward=gradients + chains.elsewhere(chain),
            backward=gradients,
        )

    @canonical
    def result(self, state: descent.DescentState) -> AttackResult:
        """The latest iterate that succeeded."""
        return descent.result(state)


def _move(model, state):
    """Logits at the iterate, the next images, and the momentum that led there."""
    momentum, x = state.memory, state.images
    if momentum.transforms:
        logits, gradient, chain = _through_chain(model, state)
    else:
        (logits, gradient), chain = descent.gradient(model, state), momentum.chain
    g = along(momentum.decay, x) * momentum.gradient + normalised(gradient, "l1")
    momentum = dataclasses.replace(momentum, gradient=g, chain=chain)
    return logits, descent.towards(state, steepest(g, "linf"), "linf"), momentum


def _through_chain(model, state):
    """Logits at the iterate, the chain's gradient, and its memory."""
    examples, momentum, x = state.examples, state.memory, state.images
    # Look ahead as the authors' program does, which divides by the mean of the absolute gradient instead of the sum.
    # It is the same direction, but by the sum as in the paper the step ahead would be nothing in a large image.
    ahead = -along(state.step_size * momentum.decay * x[0].size, x) * momentum.gradient
    query = chains.Query(x, lambda images: images, descent.keys_of(state), state.eps, ahead)

    def loss(logits):
        return objective.likelihood(logits, examples.labels, examples.targets)

    logits, gradient, chain = chains.update(momentum.transforms, model, loss, query, momentum.chain)
    if chains.elsewhere(momentum.transforms):
        logits = model(x)
    if examples.support is not None:
        gradient = jnp.where(examples.support, gradient, 0)
    return logits, gradient, chain
