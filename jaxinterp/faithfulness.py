"""Do maps show what a network looks at? Pixels are taken away or put back in the order of a map.

    deletion       P(c) while the most salient pixels are taken away: should fall fast     arXiv 1806.07421
    insertion      P(c) while they are put into the baseline: should rise fast             the same
    average drop   max(P(c | x) - P(c | x * map), 0) / P(c | x)                            arXiv 1710.11063
    pointing       whether the largest value lies on the object                            arXiv 1608.00507

P is the softmax. Curves are judged by the area under them (trapezoids; the share of pixels runs from 0 to 1). An area
has no meaning alone: compare it with that of maps without meaning, such as `jax.random.uniform` of the same shape.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from jaxinterp.attacks.driver import check, whole
from jaxinterp.attribution import over
from jaxinterp.cam import normalised, resize
from jaxinterp.canonical import canonical
from jaxinterp.network import Model, as_model
from jaxinterp.pytree import pytree


@pytree
class Curve:
    """P(c) against the share of pixels taken away or put back.

    Attributes:
        share: [n+1], from 0 to 1.
        probability: [B,n+1].
        area: [B] under the curve, in [0, 1].
    """

    share: Float[Array, " n"]
    probability: Float[Array, "b n"]
    area: Float[Array, " b"]


def deletion(
    model: Model, images: Any, classes: Any, maps: Float[Array, "b h w"], *, baseline: Any = 0.0, steps: int = 20
) -> Curve:
    """P(c) while the most salient pixels of the images are replaced by the baseline.

    Args:
        model: images -> logits.
        images: [B,H,W,C] float in [0, 1].
        classes: [B].
        maps: at any resolution; they are resized. Ties are broken by the order of pixels.
        baseline: a number, or an array that broadcasts to the images, in [0, 1]: gray, or a blurred copy.
        steps: n; every step takes the same number of pixels, but for rounding.

    Raises:
        ValueError, TypeError: as `jaxinterp.attacks.run`; maps that are not [B,h,w] or not finite; a baseline that
            does not broadcast or is not in [0, 1]; steps below 1 or not whole.
    """
    return _curve(model, images, classes, maps, baseline, steps, "deletion")


def insertion(
    model: Model, images: Any, classes: Any, maps: Float[Array, "b h w"], *, baseline: Any = 0.0, steps: int = 20
) -> Curve:
    """P(c) while the most salient pixels of the images are put into the baseline. As `deletion`."""
    return _curve(model, images, classes, maps, baseline, steps, "insertion")


def average_drop(model: Model, images: Any, classes: Any, maps: Float[Array, "b h w"]) -> Float[Array, " b"]:
    """The relative loss of P(c), in [0, 1], where the image is multiplied by the map scaled to [0, 1].

    Args:
        model: images -> logits.
        images: [B,H,W,C] float in [0, 1].
        classes: [B].
        maps: at any resolution; what is negative counts as zero.

    Returns:
        [B]; 0 where P(c) is 0.

    Raises:
        ValueError, TypeError: as `deletion`.
    """
    model, images, classes, maps = _problem(model, images, classes, maps)
    return _average_drop(model, images, classes, maps)


def pointing(maps: Float[Array, "b h w"], objects: Bool[Array, "b H W"]) -> Bool[Array, " b"]:
    """Whether the largest value of each map, resized to the masks of objects, lies on the object.

    The null is the share of the image that the object covers, `objects.mean((1, 2))`.

    Raises:
        ValueError: not one mask for each map, maps that are not finite.
        TypeError: masks that are not boolean.
    """
    maps, objects = _maps(maps, objects.shape[0]), jnp.asarray(objects)
    if objects.ndim != 3:
        raise ValueError(f"objects must be [B,H,W], a mask for every map, got {objects.shape}")
    if objects.dtype != bool:
        raise TypeError(f"objects must be boolean, got {objects.dtype}")
    large = resize(maps, (objects.shape[1], objects.shape[2])).reshape(maps.shape[0], -1)
    return jnp.take_along_axis(objects.reshape(maps.shape[0], -1), jnp.argmax(large, axis=1)[:, None], axis=1)[:, 0]


def _problem(model: Model, images: Any, classes: Any, maps: Array):
    model = as_model(model)
    images, classes, _, _ = check(model, images, classes, names=("images", "classes"))
    return model, images, classes, _maps(maps, images.shape[0])


def _maps(maps: Any, batch: int) -> Array:
    maps = jnp.asarray(maps)
    if maps.ndim != 3 or maps.shape[0] != batch:
        raise ValueError(f"maps must be [{batch},h,w], one for every image, got {maps.shape}")
    if not isinstance(maps, Tracer) and not bool(jnp.all(jnp.isfinite(maps))):
        raise ValueError("maps must be finite")
    return maps


def _curve(model, images, classes, maps, baseline, steps, kind: Literal["deletion", "insertion"]) -> Curve:
    steps = whole(steps, "steps")
    model, images, classes, maps = _problem(model, images, classes, maps)
    return _run(model, images, classes, maps, over(images, baseline), steps, kind)


def _probability(model, images, classes):
    return jnp.take_along_axis(jax.nn.softmax(model(images), axis=-1), classes[:, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnames=("steps", "kind"))
def _run(model, images, classes, maps, baseline, steps, kind):
    @canonical
    def curve(model, images, classes, maps, baseline):
        size = images.shape[1] * images.shape[2]
        flat = resize(maps, (images.shape[1], images.shape[2])).reshape(images.shape[0], size)
        rank = jnp.argsort(jnp.argsort(-flat, axis=1, stable=True), axis=1).reshape(*images.shape[:3], 1)
        first, second = (baseline, images) if kind == "deletion" else (images, baseline)

        def at(step):
            taken = jnp.round(step * (size / steps)).astype(jnp.int32)
            return _probability(model, jnp.where(rank < taken, first, second), classes)

        probability = lax.map(at, jnp.arange(steps + 1)).T
        share = jnp.arange(steps + 1) / steps
        return probability, jnp.trapezoid(probability, share, axis=1), share

    probability, area, share = curve(model, images, classes, maps, baseline)
    return Curve(share=share, probability=probability, area=area)


@jax.jit
@canonical
def _average_drop(model, images, classes, maps):
    shown = normalised(resize(jnp.maximum(maps, 0), (images.shape[1], images.shape[2])))
    whole = _probability(model, images, classes)
    part = _probability(model, images * shown[..., None], classes)
    return jnp.where(whole > 0, jnp.maximum(whole - part, 0) / whole, 0)
