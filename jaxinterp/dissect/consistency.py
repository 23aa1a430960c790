"""How alike the classes are of the images on which a unit is most active: the consistency of a neuron.

Dong et al. 2017 (arXiv 1708.05493, section 3): p_i are the fractions of the classes among the 1 % of all images that
activate a unit most, C_ij = exp(-d(w_i, w_j)^2 / (2 sigma^2)) with d the distance of two classes in a tree of
labels, and

    level = p^T C p

which is in (0, 1], and 1 where all those images are of one class. A statistic over data like the others here:

    top = consistency.init(units, images)
    top = consistency.update(top, features, numbers)      # a batch; merge combines two
    found = consistency.result(top, labels, consistency.affinity(distances))
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.canonical import canonical
from jaxinterp.dissect import topimages
from jaxinterp.dissect.topimages import TopImages
from jaxinterp.network import Network, Params, features
from jaxinterp.pytree import pytree

SHARE = 0.01
"""The share of the images that counts as a unit's top images."""
SIGMA = 2.0
"""The distance in the tree at which classes are 0.61 alike; siblings are two steps apart. The paper's is not known."""

POOLS = ("max", "mean")
"""A unit's activation on an image: the highest of its feature map, or the mean."""


@pytree
class Consistency:
    """How consistent each unit is.

    Attributes:
        level: [U] p^T C p; NaN where `constant`.
        fractions: [U,K] p, the classes' shares of the unit's top images.
        tied: [U] whether the last of the top images is as active as the next one, so that numbers decide between them.
        constant: [U] whether the first of the top images is no more active than the next one after the last: what the
            unit prefers cannot be said, as of one that is silent or saturated on all of them.
    """

    level: Float[Array, " units"]
    fractions: Float[Array, "units classes"]
    tied: Bool[Array, " units"]
    constant: Bool[Array, " units"]


def count(images: int, share: float = SHARE) -> int:
    """How many top images a unit has: `share` of all, rounded up.

    Raises:
        ValueError: a share outside (0, 1), or so few images that all of them would be top images.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be above 0 and below 1, got {share}")
    top = math.ceil(round(share * images, 9))
    if not 0 < top < images:
        raise ValueError(f"images: a share of {share} of {images} leaves no other images, expected more")
    return top


def affinity(distances: Any, sigma: float | int = SIGMA) -> Float[Array, "classes classes"]:
    """C_ij = exp(-d_ij^2 / (2 sigma^2)).

    Args:
        distances: [K,K] d, in steps of the tree, see `jaxinterp.labeltrees`.
        sigma: in steps.

    Raises:
        ValueError: distances that are not a square, or negative; a sigma that is not positive.
    """
    d = np.asarray(distances, np.float64)
    if d.ndim != 2 or d.shape[0] != d.shape[1] or not np.all(d >= 0):
        raise ValueError(f"distances must be [K,K] and not negative, got shape {list(d.shape)}")
    if not (sigma > 0 and math.isfinite(sigma)):
        raise ValueError(f"sigma must be positive, got {sigma}")
    return jnp.asarray(np.exp(-(d**2) / (2 * sigma**2)), jnp.float32)


def init(units: int, images: int, share: float = SHARE) -> TopImages:
    """No image of `images` seen. It keeps one more than the top images, to see ties. Errors are those of `count`."""
    return topimages.init(units, count(images, share) + 1)


def update(
    top: TopImages,
    features: Float[Array, "batch h w units"],
    images: Int[Array, " batch"],
    valid: Any = None,
    *,
    pool: str = "max",
) -> TopImages:
    """Adds a batch: feature maps, the images' numbers (each once over all batches), which of them count.

    Raises:
        ValueError: an unknown `pool`.
    """
    if pool not in POOLS:
        raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
    if pool == "mean":
        features = jnp.mean(features, axis=(1, 2), keepdims=True)
    return topimages.update(top, features, images, valid)


merge = topimages.merge


def result(top: TopImages, labels: Any, affinity: Float[Array, "classes classes"]) -> Consistency:
    """The level of every unit.

    Args:
        top: from `update`.
        labels: [N] the class of every image, by its number.
        affinity: [K,K] C.

    Raises:
        ValueError: labels out of range, or fewer images were seen than are top images.
    """
    known = np.asarray(labels)
    if known.ndim != 1 or not np.issubdtype(known.dtype, np.integer) or not len(known):
        raise ValueError(f"labels must be integers [N], got {known.dtype} of shape {list(known.shape)}")
    if known.min() < 0 or known.max() >= len(affinity):
        raise ValueError(
            f"labels must be from 0 to {len(affinity) - 1}, the classes of affinity, got {known.min()} to {known.max()}"
        )
    k = top.image.shape[1] - 1
    if int(jnp.max(top.image)) >= len(known):
        seen = int(jnp.sum(top.image[0] < topimages.NONE))
        raise ValueError(f"top has seen {seen} images, expected more than {k}, with numbers below {len(known)}")
    return _result(top, jnp.asarray(known, jnp.int32), affinity)


@jax.jit
def _result(top, labels, affinity):
    k = top.image.shape[1] - 1
    of_top = labels[top.image[:, :k]]
    counts = jnp.sum(of_top[..., None] == jnp.arange(len(affinity)), axis=1, dtype=jnp.int32)
    p = counts / k
    constant = top.value[:, 0] == top.value[:, k]
    level = jnp.einsum("ua,ab,ub->u", p, affinity, p, precision="highest")
    return Consistency(jnp.where(constant, jnp.nan, level), p, top.value[:, k - 1] == top.value[:, k], constant)


def chance(labels: Any, affinity: Float[Array, "classes classes"], top: int) -> float:
    """The mean level of a unit whose `top` images are drawn at random from all, without replacement: exact.

    An image is like itself, and like another one as C has it on average:
    1/k + (1 - 1/k) mean_{m != n} C(label_m, label_n).
    """
    known = np.asarray(labels)
    counts = np.bincount(known, minlength=len(affinity)).astype(np.float64)
    c, n = np.asarray(affinity, np.float64), len(known)
    others = (counts @ c @ counts - counts @ np.diag(c)) / (n * (n - 1))
    return float(1 / top + (1 - 1 / top) * others)


def of(
    network: Network,
    params: Params,
    node: str,
    images: Any,
    labels: Any,
    affinity: Float[Array, "classes classes"],
    *,
    share: float = SHARE,
    pool: str = "max",
    batch_size: int = 64,
) -> Consistency:
    """The consistency of the units of a layer on images in memory.

    Args:
        network: the network.
        params: its parameters.
        node: the layer.
        images: [N,H,W,C] float in [0, 1], or uint8.
        labels: [N] their classes. Of adversarial images the classes of the originals, which a person still sees.
        affinity: [K,K] C, see `affinity`.
        share: of the images that are a unit's top images.
        pool: one of `POOLS`.
        batch_size: images that are computed at once.

    Raises:
        ValueError: an unknown node, labels out of range or not one for each image, too few images.
    """
    network.check_node(node)
    total = len(images)
    if len(labels) != total:
        raise ValueError(f"labels must be one for each of {total} images, got {len(labels)}")
    size = min(batch_size, total)
    top = None
    for start in range(0, total, size):
        numbers = np.arange(start, start + size)
        chosen = np.minimum(numbers, total - 1)
        batch = np.asarray(images[chosen])
        batch = batch.astype(np.float32) / np.float32(255) if batch.dtype == np.uint8 else batch
        maps = _maps(network, node)(params, jnp.asarray(batch))
        if maps.ndim != 4:
            raise ValueError(f"node: {node!r} of {network.name} is no feature map [B,h,w,units], got {maps.shape}")
        top = init(maps.shape[-1], total, share) if top is None else top
        top = _updated(pool)(top, maps, jnp.asarray(chosen, jnp.int32), jnp.asarray(numbers < total))
    assert top is not None
    return result(top, labels, affinity)


@functools.cache
def _maps(network: Network, node: str) -> Any:
    return jax.jit(canonical(lambda params, images: features(network, params, images, node)))


@functools.cache
def _updated(pool: str) -> Any:
    return jax.jit(functools.partial(update, pool=pool))
