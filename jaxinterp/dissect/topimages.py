"""The images on which each unit is most active, and its feature maps there, as exact statistics."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinterp.pytree import pytree

NONE = 2**31 - 1
"""The number of an image that is not there."""
_BLOCK = 16
_FEW = 64  # images of a unit, up to which all pairs are compared


@pytree
class TopImages:
    """For every unit the images with its highest maxima, in falling order; of equal ones the lower number comes first.

    Attributes:
        value: [U,k] the maximum over positions; -inf where there are fewer images.
        image: [U,k] numbers of the images; NONE where there are fewer.
    """

    value: Float[Array, "units k"]
    image: Int[Array, "units k"]


def init(units: int, k: int) -> TopImages:
    """No image seen."""
    return TopImages(jnp.full((units, k), -jnp.inf), jnp.full((units, k), NONE, jnp.int32))


def update(
    top: TopImages, features: Float[Array, "batch h w units"], images: Int[Array, " batch"], valid: Any = None
) -> TopImages:
    """Adds a batch.

    Args:
        top: what was found so far.
        features: feature maps.
        images: numbers of the images, each once over all batches.
        valid: bool [B], which images count; None means all.
    """
    maxima = features.max(axis=(1, 2))
    if valid is not None:
        maxima = jnp.where(valid[:, None], maxima, -jnp.inf)
        images = jnp.where(valid, images, NONE)
    numbers = jnp.broadcast_to(images.astype(jnp.int32)[:, None], maxima.shape)
    # A merge compares all pairs, so few images at a time.
    block = _BLOCK if top.value.shape[1] <= _FEW else len(images)
    missing = -len(images) % block
    maxima = jnp.pad(maxima, ((0, missing), (0, 0)), constant_values=-jnp.inf).reshape(-1, block, maxima.shape[1])
    numbers = jnp.pad(numbers, ((0, missing), (0, 0)), constant_values=NONE).reshape(maxima.shape)
    return lax.fori_loop(0, len(maxima), lambda i, found: merge(found, TopImages(maxima[i].T, numbers[i].T)), top)


def merge(a: TopImages, b: TopImages) -> TopImages:
    """The highest of both, as many as `a` holds.

    Every entry is compared with every other one where there are few, since a CPU sorts short rows slowly.
    """
    value = jnp.concatenate([a.value, b.value], axis=1)
    image = jnp.concatenate([a.image, b.image], axis=1)
    if a.value.shape[1] > _FEW:
        value, image = lax.sort((-value, image), num_keys=2)
        return TopImages(-value[:, : a.value.shape[1]], image[:, : a.value.shape[1]])
    place = jnp.arange(value.shape[1])  # decides between places without an image

    def of(x: Any) -> tuple[Any, Any]:
        return x[..., :, None], x[..., None, :]

    (value_i, value_j), (image_i, image_j), (i, j) = of(value), of(image), of(place)
    same = value_i == value_j
    before = (value_i > value_j) | (same & (image_i < image_j)) | (same & (image_i == image_j) & (i < j))
    rank = before.sum(axis=1, dtype=jnp.int32)
    chosen = rank[:, None, :] == jnp.arange(a.value.shape[1])[:, None]
    return TopImages(
        jnp.where(chosen, value[:, None, :], -jnp.inf).max(axis=-1),
        jnp.where(chosen, image[:, None, :], NONE).min(axis=-1),
    )


def result(top: TopImages) -> TopImages:
    """The same on the host, as NumPy arrays."""
    return jax.tree.map(np.asarray, jax.device_get(top))


def no_maps(units: int, k: int, positions: tuple[int, int]) -> Float[Array, "units k h w"]:
    """The statistic of each unit's feature maps on its top images: -inf where there is none (yet)."""
    return jnp.full((units, k, *positions), -jnp.inf, jnp.float32)


def update_maps(
    maps: Float[Array, "units k h w"],
    features: Float[Array, "batch h w units"],
    images: Int[Array, " batch"],
    valid: Any,
    top: Int[Array, "units k"],
) -> Float[Array, "units k h w"]:
    """Adds a batch: the feature maps of those images that are among a unit's top images.

    Args:
        maps: what was found so far.
        features: feature maps.
        images: numbers of the images.
        valid: bool [B], which images count.
        top: the numbers of the top images, `TopImages.image`.
    """
    same = (top[:, :, None] == images[None, None, :]) & valid
    rows = same.argmax(axis=-1)
    chosen = jax.vmap(lambda unit, row: unit[row], in_axes=(3, 0))(features, rows)
    return jnp.where(same.any(axis=-1)[:, :, None, None], chosen, maps)


def merge_maps(a: Float[Array, "units k h w"], b: Float[Array, "units k h w"]) -> Float[Array, "units k h w"]:
    """The feature maps of both; no image is in two shares."""
    return jnp.maximum(a, b)
