"""Adam on a variable that cannot leave the box (Carlini and Wagner 2017, arXiv 1608.04644, section V.B).

    x = (tanh w + 1) / 2

w is free, x is between 0 and 1.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxinterp.attacks.attack import along
from jaxinterp.pytree import pytree

_SHRINK = 0.999999  # keeps atanh finite at pixels that are exactly 0 or 1


@pytree
class Boxed:
    """The variable w of every example and its own Adam."""

    w: Float[Array, "b h w c"]
    adam: Any

    @classmethod
    def start(cls, images: Float[Array, "b h w c"]) -> Boxed:
        """At the given images, with a new Adam."""
        return cls.at(jnp.arctanh((2 * images - 1) * _SHRINK))

    @classmethod
    def at(cls, w: Float[Array, "b h w c"]) -> Boxed:
        """At the given w, with a new Adam."""
        return cls(w, jax.vmap(optax.scale_by_adam().init)(w))

    def images(self) -> Float[Array, "b h w c"]:
        """The images x."""
        return (jnp.tanh(self.w) + 1) / 2

    def descend(
        self,
        gradient: Float[Array, "b h w c"],
        lr: Float[Array, " b"],
        support: Bool[Array, "b h w c"] | None,
    ) -> Boxed:
        """One step of Adam, from the gradient with respect to x, on the support."""
        gradient = gradient * (1 - jnp.square(jnp.tanh(self.w))) / 2
        if support is not None:
            gradient = jnp.where(support, gradient, 0)
        direction, adam = jax.vmap(optax.scale_by_adam().update)(gradient, self.adam)
        return Boxed(self.w - along(lr, gradient) * jnp.asarray(direction), adam)
