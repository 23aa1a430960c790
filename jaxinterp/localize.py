"""What links perturbations to class activation maps: scores, the kinds of cells on maps, attacks refined by maps.

Four maps belong to a perturbation, F(x0,t0), F(x',t0), F(x0,t) and F(x',t) (arXiv 1904.02057, section 5). Their
differences show where it suppresses the true class and promotes the target, and sum to the changes of the logits:

    suppression = F(x0,t0) - F(x',t0),   sum_i suppression_i = Z(x0)_t0 - Z(x')_t0
    promotion   = F(x',t) - F(x0,t),     sum_i promotion_i   = Z(x')_t - Z(x0)_t

IS(d) = ||B o d||_2 / ||d||_2, with B_i = 1 where the map, at the resolution of the image, reaches its 70th percentile
(the same; 1808.01664, section 4). A perturbation that ignores the map scores sqrt(0.3) = 0.548.

A refined attack is the same attack confined to the part of the image that matters, begun at the perturbation found
before. The paper shows that it exists; which part and how is our choice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Real

from jaxinterp import cam
from jaxinterp.attacks import driver
from jaxinterp.attacks.attack import Attack, AttackResult
from jaxinterp.cam import resize
from jaxinterp.canonical import canonical
from jaxinterp.draws import reproducible
from jaxinterp.effect import Kind, partition
from jaxinterp.network import Model, Network, Params, as_model
from jaxinterp.pytree import pytree
from jaxinterp.sharding import with_automatic_axes


@pytree
class FourMaps:
    """Class activation maps [B,h,w] of the true class and the target, on the clean and the adversarial image."""

    label_clean: Float[Array, "b h w"]
    label_adversarial: Float[Array, "b h w"]
    target_clean: Float[Array, "b h w"]
    target_adversarial: Float[Array, "b h w"]

    @property
    def suppression(self) -> Float[Array, "b h w"]:
        """What the perturbation takes from the true class."""
        return self.label_clean - self.label_adversarial

    @property
    def promotion(self) -> Float[Array, "b h w"]:
        """What the perturbation adds to the target."""
        return self.target_adversarial - self.target_clean

    def stacked(self) -> Float[Array, "b 4 h w"]:
        """The maps in the order of the attributes."""
        return jnp.stack([self.label_clean, self.label_adversarial, self.target_clean, self.target_adversarial], axis=1)

    def one_scale(self) -> Float[Array, "b 4 h w"]:
        """The maps of each image shifted and scaled together, so that the four span [0, 1]."""
        return cam.normalised(self.stacked().reshape(self.label_clean.shape[0], 1, -1)).reshape(self.stacked().shape)


@with_automatic_axes
def four_maps(
    network: Network,
    params: Params,
    clean: Any,
    adversarial: Any,
    labels: Any,
    targets: Any,
    method: str = "cam",
    node: str | None = None,
) -> FourMaps:
    """The four maps of a perturbation, raw.

    Arguments are those of `cam.maps`, for two images and two classes of each.

    Raises:
        ValueError, TypeError: as `cam.maps`; images of different shapes, a target equal to its label.
    """
    _same_shape(clean, adversarial)
    clean, labels, targets, _ = driver.check(network.bind(params), clean, labels, targets, names=("clean", "labels"))
    both = jnp.stack([jnp.asarray(labels), jnp.asarray(targets)], axis=1)
    before = cam.maps(network, params, clean, both, method, node)
    after = cam.maps(network, params, adversarial, both, method, node)
    return FourMaps(before[:, 0], after[:, 0], before[:, 1], after[:, 1])


def _same_shape(clean: Any, adversarial: Any) -> None:
    if np.shape(clean) != np.shape(adversarial):
        raise ValueError(
            f"adversarial images {np.shape(adversarial)} and clean images {np.shape(clean)} must have the same shape"
        )


def salient(
    maps: Float[Array, "b h w"], size: tuple[int, int], percentile: float | Real[Array, ""] = 70.0
) -> Bool[Array, "b H W"]:
    """Where each map, resized to `size`, reaches its own percentile (0 to 100)."""
    large = resize(maps, size)
    return large >= jnp.percentile(large, percentile, axis=(1, 2), keepdims=True)


@with_automatic_axes
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
        [B] in [0, 1]; NaN where the perturbation is zero or the map is not finite.

    Raises:
        ValueError: not one map for each perturbation, a percentile outside [0, 100].
    """
    _check_score(delta, maps, percentile)
    return _interpretability_score(delta, maps, percentile)


@jax.jit
@canonical
def _interpretability_score(delta, maps, percentile):
    return _score(delta, maps, salient(maps, _size(delta), percentile))


def _check_score(delta: Array, maps: Array, percentile: Any) -> None:
    if delta.ndim != 4 or maps.ndim != 3 or delta.shape[0] != maps.shape[0]:
        raise ValueError(f"expected perturbations [B,H,W,C] and a map [B,h,w] of each, got {delta.shape}, {maps.shape}")
    if not isinstance(percentile, Tracer) and not 0 <= np.min(percentile) <= np.max(percentile) <= 100:
        raise ValueError(f"percentile must be from 0 to 100, got {percentile}")


@with_automatic_axes
def null_score(
    delta: Float[Array, "b H W c"],
    maps: Float[Array, "b h w"],
    percentile: float | Real[Array, ""] = 70.0,
) -> Float[Array, " b"]:
    """The score of a perturbation spread evenly: the root of the salient share of the image, nominally sqrt(0.3).

    Arguments and errors are those of `interpretability_score`.
    """
    _check_score(delta, maps, percentile)
    return _null_score(delta, maps, percentile)


@jax.jit
@canonical
def _null_score(delta, maps, percentile):
    mask = salient(maps, _size(delta), percentile)
    return _finite(maps, jnp.sqrt(jnp.mean(mask.astype(jnp.float32), axis=(1, 2))))


@with_automatic_axes
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
        keys: [B] random keys, one for each example, of any implementation.
        percentile: as in `interpretability_score`.
        repeats: number of shuffles.

    Raises:
        ValueError: as `interpretability_score`.
    """
    _check_score(delta, maps, percentile)
    return _shuffled_score(delta, maps, jax.vmap(reproducible)(keys), percentile, repeats)


@functools.partial(jax.jit, static_argnames=("repeats",))
def _shuffled_score(delta, maps, keys, percentile, repeats):
    @canonical
    def scores(delta, maps, keys, percentile):
        mask = salient(maps, _size(delta), percentile)
        pixels = delta.reshape(delta.shape[0], -1, delta.shape[3])

        def shuffled(key, pixels):
            return jax.random.permutation(key, pixels)

        def once(i):
            moved = jax.vmap(shuffled)(jax.vmap(lambda k: jax.random.fold_in(k, i))(keys), pixels)
            return _score(moved.reshape(delta.shape), maps, mask)

        return jax.lax.map(once, jnp.arange(repeats)).T

    return scores(delta, maps, keys, percentile)


@with_automatic_axes
def score_curve(
    delta: Float[Array, "b H W c"], maps: Float[Array, "b h w"], percentiles: Sequence[float | int] = range(30, 91, 10)
) -> tuple[Float[Array, "b p"], Float[Array, "b p"]]:
    """Interpretability scores over percentiles, and their null (arXiv 1808.01664, section 4, has one percentile).

    Args:
        delta: perturbations, in pixel units.
        maps: class activation maps at any resolution, raw or scaled.
        percentiles: from 0 to 100, of the map's values.

    Returns:
        Scores and nulls, [B,p] each, as `interpretability_score` and `null_score` give them.

    Raises:
        ValueError: as `interpretability_score`.
    """
    levels = jnp.asarray(percentiles, jnp.float32)
    _check_score(delta, maps, levels)
    scores = jax.vmap(lambda p: _interpretability_score(delta, maps, p), out_axes=1)
    nulls = jax.vmap(lambda p: _null_score(delta, maps, p), out_axes=1)
    return scores(levels), nulls(levels)


@with_automatic_axes
def adversarial_saliency(model: Model, images: Any, labels: Any, targets: Any) -> Float[Array, "b H W"]:
    """The adversarial saliency map (ASM), for scores in place of a class activation map (1808.01664, section 4).

    Of a component i of the image it is 0 if dZ_t/dx_i < 0 or dZ_t0/dx_i > 0, else dZ_t/dx_i |dZ_t0/dx_i|: where more
    promotes the target and suppresses the true class at once. Channels are summed.

    Args:
        model: images -> logits.
        images: [B,H,W,C] float in [0, 1].
        labels: t0 [B].
        targets: t [B].

    Raises:
        ValueError, TypeError: as `jaxinterp.attacks.run`.
    """
    model = as_model(model)
    images, labels, targets, _ = driver.check(model, images, labels, targets)
    return _saliency(model, images, labels, targets)


@jax.jit
@canonical
def _saliency(model, images, labels, targets):
    logits, pull_back = jax.vjp(model, images)
    by_label, by_target = (
        pull_back(jax.nn.one_hot(c, logits.shape[-1], dtype=logits.dtype))[0] for c in (labels, targets)
    )
    return jnp.sum(jnp.maximum(by_target, 0) * jnp.maximum(-by_label, 0), axis=-1)


# Kinds of cells on maps


@with_automatic_axes
def mean_by_kind(
    maps: Float[Array, "b h w"], kind: Int[Array, " b *cells"], cells: Any, size: tuple[int, int]
) -> Float[Array, "b 3"]:
    """Mean of each map over the suppression-dominated, the balanced and the promotion-dominated cells.

    Args:
        maps: at any resolution, raw or scaled.
        kind: from `jaxinterp.effect.pse`.
        cells: as they were given there.
        size: height and width of the images.

    Returns:
        [B,3], means over pixels, in the order of `Kind`; NaN where an image has no cell of that kind.

    Raises:
        ValueError, TypeError: as `jaxinterp.effect.partition`; kinds that are not those of these cells.
    """
    where = _partition_of(kind, "kind", cells, maps.shape[0], size)
    return _means(maps, _of_cells(kind, where), (int(size[0]), int(size[1])))


def _partition_of(values: Array, name: str, cells: Any, batch: int, size: tuple[int, int]) -> Int[np.ndarray, "n h w"]:
    where, shape = partition(cells, batch, *size)
    if values.shape != (batch, *shape):
        raise ValueError(f"{name} must have the shape {(batch, *shape)} with these cells, got {values.shape}")
    return where


@functools.partial(jax.jit, static_argnames=("size",))
def _means(maps, by_pixel, size: tuple[int, int]):
    """Means over the pixels of each kind, in an order that neither batch nor devices change."""

    @canonical
    def means(maps, by_pixel):
        large = resize(maps, size)
        inside = [by_pixel == k for k in list(Kind)[1:]]
        sums = [jnp.sum(jnp.where(where, large, 0), axis=(1, 2)) / jnp.sum(where, axis=(1, 2)) for where in inside]
        return jnp.stack(sums, axis=1)

    return means(maps, by_pixel)


def _of_cells(values: Array, where: Int[np.ndarray, "n h w"]) -> Array:
    """The value of every pixel's cell, [B,H,W]."""
    flat = values.reshape(values.shape[0], -1)
    return jax.vmap(lambda v, w: v[w])(flat, jnp.broadcast_to(where, (flat.shape[0], *where.shape[1:])))


# Refinement


def top_cells(
    overall: Float[Array, " b *cells"], cells: Any, size: tuple[int, int], fraction: float | int = 0.35
) -> Bool[Array, "b H W"]:
    """The pixels of the cells with the largest overall effect.

    Args:
        overall: s + p of every cell.
        cells: as they were given to `jaxinterp.effect.pse`.
        size: height and width of the images.
        fraction: the part of an image's cells that is kept, rounded up; of equal cells the first ones. Numbers of a
            partition that no pixel of the image has do not count.

    Raises:
        ValueError: a fraction outside (0, 1]; effects that are not those of these cells; cells as in
            `jaxinterp.effect.partition`.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")
    where = _partition_of(overall, "overall", cells, overall.shape[0], size)
    flat = overall.reshape(overall.shape[0], -1)
    there = np.zeros((len(where), flat.shape[1]), bool)
    np.put_along_axis(there, where.reshape(len(where), -1), True, axis=1)
    kept = np.array([[math.ceil(round(float(n) * fraction, 6))] for n in there.sum(axis=1)])
    rank = jnp.argsort(jnp.argsort(jnp.where(there, -flat, jnp.inf), axis=1, stable=True), axis=1)
    return _of_cells(rank < kept, where)


@with_automatic_axes
def refine(
    attack: Attack,
    model: Model,
    clean: Any,
    adversarial: Any,
    labels: Any,
    targets: Any,
    support: Bool[Array, "b H W"],
    *,
    key: jax.Array,
    ids: Any = None,
) -> AttackResult:
    """The attack once more, with no perturbation outside the support, begun at the perturbation found before.

    Supports are made by `salient` from the map of the true class, of the target, or the union of both, and by
    `top_cells`. An attack without a warm start begins at the original.

    Args:
        attack: the attack that found `adversarial`, or another.
        model: images -> logits.
        clean: x0 [B,H,W,C] float in [0, 1].
        adversarial: x' [B,H,W,C] float in [0, 1].
        labels: t0 [B].
        targets: t [B], or None.
        support: [B,H,W], the pixels that may change.
        key: as in `jaxinterp.attacks.run`.
        ids: likewise.

    Raises:
        ValueError, TypeError: as `jaxinterp.attacks.run`; images of different shapes.
    """
    _same_shape(clean, adversarial)
    return driver.run(
        attack,
        model,
        clean,
        labels,
        targets,
        key=key,
        ids=ids,
        support=support[..., None],
        initial=adversarial if hasattr(attack, "warm") else None,
    )


def _score(delta, maps, mask):
    energy = jnp.sum(jnp.square(delta), axis=-1)
    inside = jnp.sum(jnp.where(mask, energy, 0), axis=(1, 2))
    return _finite(maps, jnp.sqrt(inside / jnp.sum(energy, axis=(1, 2))))


def _finite(maps, scores):
    """NaN where a map says nothing."""
    return jnp.where(jnp.all(jnp.isfinite(maps), axis=(1, 2)), scores, jnp.nan)


def _size(delta):
    return delta.shape[1], delta.shape[2]
