"""What links perturbations to class activation maps: the interpretability score and its controls.

IS(d) = ||B o d||_2 / ||d||_2, with B_i = 1 where the map, at the resolution of the image, reaches its 70th percentile
(arXiv 1904.02057, section 5; 1808.01664, section 4). A perturbation that ignores the map scores sqrt(0.3) = 0.548.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Real

from jaxinterp.cam import resize
from jaxinterp.canonical import canonical


def salient(
    maps: Float[Array, "b h w"], size: tuple[int, int], percentile: float | Real[Array, ""] = 70.0
) -> Bool[Array, "b H W"]:
    """Where each map, resized to `size`, reaches its own percentile (0 to 100)."""
    large = resize(maps, size)
    return large >= jnp.percentile(large, percentile, axis=(1, 2), keepdims=True)


@functools.partial(jax.jit)
@canonical
def interpretability_score(
    delta: Float[Array, "b H W c"],
    maps: Float[Array, "b h w"],
    percentile: float | Real[Array, ""] = 70.0,
) -> Float[Array, " b"]:
    """The share of a perturbation's norm that lies on the salient part of a map.

    Args:
        delta: perturbations, in pixel units.
        maps: class activation maps at any resolution, raw or scaled.
        percentile: of the map's values, from which on a pixel is salient.

    Returns:
        [B] in [0, 1]; NaN where the perturbation is zero.
    """
    return _score(delta, salient(maps, _size(delta), percentile))


@functools.partial(jax.jit)
@canonical
def null_score(
    delta: Float[Array, "b H W c"],
    maps: Float[Array, "b h w"],
    percentile: float | Real[Array, ""] = 70.0,
) -> Float[Array, " b"]:
    """The score of a perturbation spread evenly: the root of the salient share of the image, nominally sqrt(0.3)."""
    mask = salient(maps, _size(delta), percentile)
    return jnp.sqrt(jnp.mean(mask.astype(jnp.float32), axis=(1, 2)))


@functools.partial(jax.jit, static_argnames=("repeats",))
def shuffled_score(
    delta: Float[Array, "b H W c"],
    maps: Float[Array, "b h w"],
    keys: Array,
    percentile: float | Real[Array, ""] = 70.0,
    *,
    repeats: int = 8,
) -> Float[Array, "b repeats"]:
    """Scores of the perturbation with its pixels (all channels together) shuffled, once for each repeat.

    Args:
        delta: perturbations, in pixel units.
        maps: class activation maps at any resolution.
        keys: [B] random keys, one for each example.
        percentile: as in `interpretability_score`.
        repeats: number of shuffles.
    """

    @canonical
    def scores(delta, maps, keys, percentile):
        mask = salient(maps, _size(delta), percentile)
        pixels = delta.reshape(delta.shape[0], -1, delta.shape[3])

        def shuffled(key, pixels):
            return jax.random.permutation(key, pixels)

        def once(i):
            moved = jax.vmap(shuffled)(jax.vmap(lambda k: jax.random.fold_in(k, i))(keys), pixels)
            return _score(moved.reshape(delta.shape), mask)

        return jax.lax.map(once, jnp.arange(repeats)).T

    return scores(delta, maps, keys, percentile)


def _score(delta, mask):
    energy = jnp.sum(jnp.square(delta), axis=-1)
    inside = jnp.sum(jnp.where(mask, energy, 0), axis=(1, 2))
    return jnp.sqrt(inside / jnp.sum(energy, axis=(1, 2)))


def _size(delta):
    return delta.shape[1], delta.shape[2]
