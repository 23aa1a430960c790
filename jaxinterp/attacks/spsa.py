"""The SPSA attack, descent by forward passes alone (Uesato et al. 2018, arXiv 1802.05666, algorithm 1)."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from jaxinterp.attacks import descent, objective
from jaxinterp.attacks.attack import AttackResult, Examples, Real, along, per_example
from jaxinterp.attacks.constraint import Norm
from jaxinterp.canonical import canonical
from jaxinterp.draws import shaped
from jaxinterp.pytree import pytree, static


@pytree
class Estimate:
    """What SPSA remembers: the length of its probes, and Adam's moments."""

    delta: Float[Array, " b"]
    adam: Any


@pytree
class SPSA:
    """Adam on gradients estimated by differences in random directions, in the Linf ball and the box.

        grad L(x) ~ 1/n sum_i (L(x + delta v_i) - L(x - delta v_i)) / (2 delta) v_i,   v_i in {-1, 1}^d

    The loss is the margin of logits. The latest iterate that succeeded is returned.

    Attributes:
        eps: radius of the ball, in pixel units of [0, 1]; one number, or one for every example.
        lr: learning rate of Adam.
        delta: positive, the distance of the probes from the iterate, on every pixel. The network sees them unclipped.
        kappa: confidence, the margin of logits that counts as success.
        samples: number n of directions in a step; each costs two forward passes.
        chunk: number of directions that are evaluated at once, at most. It decides the memory, not the result.
        steps: number of steps K.
        stop_on_success: stop an example at its first success.
    """

    name: ClassVar[str] = "spsa"
    norm: ClassVar[Norm] = "linf"
    ranges: ClassVar[dict[str, str]] = {"delta": "positive"}

    eps: Real = 8 / 255
    lr: Real = 0.01
    delta: Real = 0.01
    kappa: Real = 0.0
    samples: int = static(default=128)
    chunk: int = static(default=8)
    steps: int = static(default=100)
    stop_on_success: bool = static(default=True)

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
            step_size=self.lr,
            kappa=self.kappa,
            keys=keys,
            memory=Estimate(per_example(self.delta, images), jax.vmap(optax.scale_by_adam().init)(images)),
        )

    @canonical
    def step(self, model, state: descent.DescentState) -> descent.DescentState:
        """One step of Adam."""
        chunk = max(size for size in range(1, min(self.chunk, self.samples) + 1) if self.samples % size == 0)
        return descent.step(
            model,
            state,
            functools.partial(_move, samples=self.samples, chunk=chunk),
            steps=self.steps,
            stop_on_success=self.stop_on_success,
            forward=1 + 2 * self.samples,
            backward=0,
        )

    @canonical
    def result(self, state: descent.DescentState) -> AttackResult:
        """The latest iterate that succeeded."""
        return descent.result(state)


def _move(model, state, *, samples, chunk):
    """Logits at the iterate, the next images, and the moments that led there."""
    estimate = state.memory
    logits = model(state.images)
    gradient = _estimated(model, state, samples, chunk)
    direction, adam = jax.vmap(optax.scale_by_adam().update)(gradient, estimate.adam)
    moved = descent.towards(state, jnp.asarray(direction), "linf")
    return logits, moved, Estimate(estimate.delta, adam)


def _estimated(model, state, samples, chunk):
    """The mean over `samples` directions, `chunk` at a time; zero off the support and where it is not finite."""
    examples, x = state.examples, state.images
    keys = descent.keys_of(state)
    delta = along(state.memory.delta, x)[:, None]

    def draw(key, number):
        return shaped(jax.random.rademacher, jax.random.fold_in(key, number), x.shape[1:], jnp.float32)

    def loss(points):  # [B,chunk,H,W,C] -> [B,chunk]
        logits = model(points.reshape(-1, *x.shape[1:])).reshape(x.shape[0], chunk, -1)
        return jax.vmap(objective.margin, (1, None, None), 1)(logits, examples.labels, examples.targets)

    def add(i, total):
        numbers = i * chunk + jnp.arange(chunk)
        v = jax.vmap(lambda key: jax.vmap(lambda number: draw(key, number))(numbers))(keys)
        if examples.support is not None:
            v = jnp.where(examples.support[:, None], v, 0)
        slope = (loss(x[:, None] + delta * v) - loss(x[:, None] - delta * v)) / (2 * state.memory.delta[:, None])
        # One direction after the other, so that the order of additions does not depend on `chunk`.
        return lax.fori_loop(0, chunk, lambda j, total: total + along(slope[:, j], x) * v[:, j], total)

    total = lax.fori_loop(0, samples // chunk, add, jnp.zeros_like(x))
    return jnp.where(jnp.isfinite(total), total / samples, 0)
