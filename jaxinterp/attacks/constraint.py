"""Where a perturbed image may lie: in the box [0, 1], in a ball around the original, on the support.

Functions take images [B,H,W,C] and radii [B]. The box comes after the ball: clipping to a box that contains the
original never moves a point away from it, so the result satisfies both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxinterp.attacks.attack import along, norm
from jaxinterp.draws import shaped

Norm = Literal["linf", "l2", "l1", "l0"]
NORMS: tuple[Norm, ...] = ("linf", "l2", "l1", "l0")
# <g, d> <= ||g||_dual ||d||: the dual norm of a slope is the change along the steepest direction of unit length.
DUAL: dict[Norm, Norm] = {"linf": "l1", "l2": "l2", "l1": "linf"}
_TINY = 1e-30
_HUGE = 1e15  # far beyond the box, and squares of it can be added


def distance(delta: Float[Array, "b h w c"], which: Norm) -> Float[Array, " b"]:
    """The size of every perturbation in the given norm, in pixel units (l0: the number of components changed)."""
    axes = tuple(range(1, delta.ndim))
    if which == "l0":
        return jnp.sum(delta != 0, axis=axes).astype(delta.dtype)
    if which == "l1":
        return jnp.sum(jnp.abs(delta), axis=axes)
    return norm(delta) if which == "l2" else jnp.max(jnp.abs(delta), axis=axes)


def project(
    images: Float[Array, "b h w c"],
    original: Float[Array, "b h w c"],
    eps: Float[Array, " b"],
    which: Norm,
    support: Bool[Array, "b h w c"] | None = None,
) -> Float[Array, "b h w c"]:
    """The nearest image in the ball of radius `eps` around `original`, then in the box, changed on `support` only.

    In L1 the nearest point of ball and box together is found (Croce and Hein 2021, arXiv 2103.01208, section 2.2), as
    one projection after the other would lose most of the ball. In L0 the components are kept that the box lets move
    the farthest.
    """
    delta = images - original
    if support is not None:
        delta = jnp.where(support, delta, 0)
    radius = along(eps, images)
    if which == "l1":
        delta = _soften(delta, original, eps)
    elif which == "l0":
        delta = _keep_largest(delta, original, eps)
    elif which == "linf":
        delta = jnp.clip(delta, -radius, radius)
    else:
        delta = jnp.clip(delta, -_HUGE, _HUGE)
        delta = delta * jnp.minimum(1.0, radius / jnp.maximum(along(norm(delta), images), _TINY))
    return jnp.where(delta == 0, original, jnp.clip(original + delta, 0.0, 1.0))


def farthest(
    original: Float[Array, "b h w c"], support: Bool[Array, "b h w c"] | None, which: Norm
) -> Float[Array, " b"]:
    """The distance of the farthest image of the box that differs from the original on the support only."""
    reach = jnp.maximum(original, 1 - original)
    return distance(reach if support is None else jnp.where(support, reach, 0), which)


def to_hyperplane(
    images: Float[Array, "b h w c"],
    normal: Float[Array, "b h w c"],
    gap: Float[Array, " b"],
    which: Norm,
    support: Bool[Array, "b h w c"] | None = None,
) -> Float[Array, "b h w c"]:
    """The smallest d with <normal, d> = gap and images + d in the box, changed on the support only (l2, linf, l1).

    The solution of Croce and Hein (2020, arXiv 1907.02044, section 3.1 and appendix A): with the room that the box
    leaves in the direction s = sign(gap normal), it is s min(t |normal|, room) in L2 and s min(t, room) in Linf for
    the smallest t that bridges the gap; in L1 the components with the largest |normal| use up their room one after
    the other. They sort the components; here t is bisected, as a sum is cheaper than a sort. Where the hyperplane
    misses the box, the result is the corner of the box that comes nearest to it.

    Args:
        images: points of the box.
        normal: normals of the hyperplanes, at most 1 in every component.
        gap: what <normal, .> has to change by, of either sign.
        which: the norm of d, not "l0".
        support: where d may differ from zero.
    """
    slope, need = jnp.abs(normal), jnp.abs(gap)
    direction = jnp.sign(normal) * along(jnp.sign(gap), normal)
    room = jnp.where(direction > 0, 1 - images, images) * jnp.abs(direction)
    if support is not None:
        room = jnp.where(support, room, 0)
    axes = tuple(range(1, images.ndim))
    if which == "l1":
        gain = slope * room

        def above(t):
            return jnp.sum(jnp.where(slope > along(t, slope), gain, 0), axis=axes)

        t = _smallest(lambda t: above(t) <= need, need.shape)
        last = slope == along(t, slope)
        left = need - above(t)
        part = jnp.clip(left / jnp.maximum(jnp.sum(jnp.where(last, gain, 0), axis=axes), _TINY), 0, 1)
        return direction * jnp.where(slope > along(t, slope), room, jnp.where(last, along(part, room) * room, 0))

    def size(t):
        return jnp.minimum(along(t, slope) * slope if which == "l2" else along(t, slope), room)

    t = _smallest(lambda t: jnp.sum(slope * size(t), axis=axes) >= need, need.shape)
    return direction * size(t)


def _room(delta, original):
    """How far every component may move in its direction before it meets the box."""
    return jnp.minimum(jnp.abs(delta), jnp.where(delta > 0, 1 - original, original))


def _soften(delta, original, eps):
    """sign(d) clip(|d| - t, 0, room) with the smallest t >= 0 for which the L1 norm is at most eps."""
    magnitude, room = jnp.abs(delta), _room(delta, original)

    def shrunk(t):
        return jnp.clip(magnitude - along(t, delta), 0, room)

    t = _smallest(lambda t: jnp.sum(shrunk(t), axis=tuple(range(1, delta.ndim))) <= eps, eps.shape)
    return jnp.sign(delta) * shrunk(t)


def _keep_largest(delta, original, eps):
    """The components whose move inside the box is the largest, at most eps of them; of a tie, the first ones."""
    return jnp.where(largest(_room(delta, original), jnp.floor(eps)), delta, 0)


def largest(magnitude: Float[Array, "b ..."], count: Float[Array, " b"]) -> Bool[Array, "b ..."]:
    """Which components are among the `count` largest of their example; of a tie, the first ones; never zeros."""
    flat = magnitude.reshape(magnitude.shape[0], -1)
    t = _smallest(lambda t: jnp.sum(flat > t[:, None], axis=1, dtype=jnp.int32) <= count, count.shape)[:, None]
    above, ties = flat > t, (flat == t) & (flat > 0)
    left = count[:, None] - jnp.sum(above, axis=1, keepdims=True, dtype=jnp.int32)
    kept = above | (ties & (jnp.cumsum(ties, axis=1, dtype=jnp.int32) <= left))
    return kept.reshape(magnitude.shape)


def _smallest(holds: Callable[[Array], Array], shape: tuple[int, ...]) -> Float[Array, " b"]:
    """The smallest float t >= 0, of the given shape, for which the monotone `holds(t)` is true; it must be in the end.

    Floats from 0 on are ordered as their bits are, so that 32 bisections of the bits find the very float.
    """

    def halve(_, bracket):
        low, high = bracket  # true at high, and low - 1 is false or beyond the end
        middle = low + (high - low) // 2
        good = holds(lax.bitcast_convert_type(middle, jnp.float32))
        return jnp.where(good, low, middle + 1), jnp.where(good, middle, high)

    end = lax.bitcast_convert_type(jnp.full(shape, jnp.finfo(jnp.float32).max), jnp.int32)
    _, smallest = lax.fori_loop(0, 32, halve, (jnp.zeros_like(end), end))
    return lax.bitcast_convert_type(smallest, jnp.float32)


def normalised(gradient: Float[Array, "b h w c"], which: Norm) -> Float[Array, "b h w c"]:
    """The gradient divided by its norm; zero where it is zero."""
    # Scaled first, so that squares of very small or large gradients neither vanish nor overflow.
    gradient = gradient / along(jnp.maximum(distance(gradient, "linf"), _TINY), gradient)
    return gradient / jnp.maximum(along(distance(gradient, which), gradient), _TINY)


def steepest(gradient: Float[Array, "b h w c"], which: Literal["linf", "l2"]) -> Float[Array, "b h w c"]:
    """The direction of steepest ascent of unit length in the given norm; zero where the gradient is zero."""
    return jnp.sign(gradient) if which == "linf" else normalised(gradient, "l2")


def sparse_step(
    ascent: Float[Array, "b h w c"],
    images: Float[Array, "b h w c"],
    length: Float[Array, " b"],
    count: Float[Array, " b"],
) -> Float[Array, "b h w c"]:
    """What is taken from the images in a step of the given length in L1: from the components with the largest gradient.

    One after the other moves by the `count`-th part of the length, or by what the box leaves of it, until the length is
    used up; of equal components each moves by the same share of that. The steepest step has a single part, but gets too
    slowly to the optimum, where the box limits how far each component may go (Tramer and Boneh 2019, arXiv 1904.13000,
    section 4). They give a part to components without room, too, which a projection onto the ball has moved away from
    the border by a little: their steps are used up by giving it back, and stop far from the optimum.
    """
    slope, axes = jnp.abs(ascent), tuple(range(1, ascent.ndim))
    room = jnp.where(slope > 0, jnp.where(ascent > 0, images, 1 - images), 0)
    able = jnp.sum(room > 0, axis=axes, dtype=jnp.int32)  # fewer than `count` get larger parts
    size = jnp.minimum(along(length / jnp.maximum(jnp.minimum(count, able), 1), ascent), room)

    def above(t):
        return jnp.sum(jnp.where(slope > along(t, slope), size, 0), axis=axes)

    t = _smallest(lambda t: above(t) <= length, length.shape)
    last = slope == along(t, slope)
    share = jnp.clip((length - above(t)) / jnp.maximum(jnp.sum(jnp.where(last, size, 0), axis=axes), _TINY), 0, 1)
    return jnp.sign(ascent) * jnp.where(slope > along(t, slope), size, jnp.where(last, along(share, size) * size, 0))


def movable(ascent: Float[Array, "b h w c"], images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """`ascent` without the components in which the box keeps the images from a step down."""
    return jnp.where((images <= 0) & (ascent > 0) | (images >= 1) & (ascent < 0), 0, ascent)


def random_in_ball(
    keys: Array, images: Float[Array, "b h w c"], eps: Float[Array, " b"], which: Norm
) -> Float[Array, "b h w c"]:
    """A point uniform in the ball of radius `eps` around every image, from one key for each (box not applied).

    The radius of a uniform point in n dimensions is eps U^(1/n); its direction is that of normal components in L2 and
    of Laplace-distributed ones in L1.
    """
    shape = images.shape[1:]
    if which == "linf":
        drawn = jax.vmap(lambda key: shaped(jax.random.uniform, key, shape, jnp.float32, -1.0))(keys)
        return images + along(eps, images) * drawn
    if which == "l0":
        raise ValueError("no uniform point of an L0 ball is defined")
    draw = jax.random.laplace if which == "l1" else jax.random.normal

    def direction_and_radius(key):
        first, second = jax.random.split(key)
        radius = jax.random.uniform(second, (), jnp.float32) ** (1.0 / images[0].size)
        return shaped(draw, first, shape, jnp.float32), radius

    direction, radius = jax.vmap(direction_and_radius)(keys)
    return images + normalised(direction, which) * along(eps * radius, images)
