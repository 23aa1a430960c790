"""Where a perturbed image may lie: in the box [0, 1], in a ball around the original, on the support.

Functions take images [B,H,W,C] and radii [B]. The box comes after the ball: clipping to a box that contains the
original never moves a point away from it, so the result satisfies both.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxinterp.attacks.attack import along, norm

Norm = Literal["linf", "l2"]
NORMS: tuple[Norm, ...] = ("linf", "l2")
_TINY = 1e-30


def project(
    images: Float[Array, "b h w c"],
    original: Float[Array, "b h w c"],
    eps: Float[Array, " b"],
    which: Norm,
    support: Bool[Array, "b h w c"] | None = None,
) -> Float[Array, "b h w c"]:
    """The nearest image in the ball of radius `eps` around `original`, then in the box, changed on `support` only."""
    delta = images - original
    if support is not None:
        delta = jnp.where(support, delta, 0)
    radius = along(eps, images)
    if which == "linf":
        delta = jnp.clip(delta, -radius, radius)
    else:
        delta = delta * jnp.minimum(1.0, radius / jnp.maximum(along(norm(delta), images), _TINY))
    return jnp.where(delta == 0, original, jnp.clip(original + delta, 0.0, 1.0))


def steepest(gradient: Float[Array, "b h w c"], which: Norm) -> Float[Array, "b h w c"]:
    """The direction of steepest ascent of unit length in the given norm; zero where the gradient is zero."""
    if which == "linf":
        return jnp.sign(gradient)
    # Scaled first, so that squares of very small or large gradients neither vanish nor overflow.
    largest = jnp.max(jnp.abs(gradient), axis=tuple(range(1, gradient.ndim)))
    gradient = gradient / along(jnp.maximum(largest, _TINY), gradient)
    return gradient / jnp.maximum(along(norm(gradient), gradient), _TINY)


def random_in_ball(
    keys: Array, images: Float[Array, "b h w c"], eps: Float[Array, " b"], which: Norm
) -> Float[Array, "b h w c"]:
    """A point uniform in the ball of radius `eps` around every image, from one key for each (box not applied)."""
    shape = images.shape[1:]
    if which == "linf":
        return images + along(eps, images) * jax.vmap(lambda k: jax.random.uniform(k, shape, minval=-1.0))(keys)

    def direction_and_radius(key):
        first, second = jax.random.split(key)
        radius = jax.random.uniform(second) ** (1.0 / images[0].size)
        return jax.random.normal(first, shape), radius

    direction, radius = jax.vmap(direction_and_radius)(keys)
    return images + steepest(direction, "l2") * along(eps * radius, images)
