"""Feature maps at the resolution of the labels, the same bits whatever computes them.

Half-pixel bilinear interpolation, antialiased where the labels are coarser than the feature map: the weights of PIL and
of `jax.image.resize`. A mask is a comparison with a threshold that is itself an activation, so the last bit counts:
each value is written as one activation plus weighted differences to its neighbours (exact where they are equal), and
every product is rounded before it is added.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxinterp.canonical import rounded


def weights(size: int, target: int) -> np.ndarray:
    """The interpolation from `size` positions to `target`, as a matrix [target,size] of float64; rows sum to 1."""
    if size < 1 or target < 1:
        raise ValueError(f"size, target: expected at least 1, got {size} and {target}")
    scale = size / target
    support = max(scale, 1.0)
    centre = (np.arange(target) + 0.5) * scale
    distance = np.abs(np.arange(size) + 0.5 - centre[:, None]) / support
    triangle = np.maximum(1.0 - distance, 0.0)
    return triangle / triangle.sum(axis=1, keepdims=True)


def upsample(maps: Float[Array, "h w units"], size: tuple[int, int]) -> Float[Array, "sh sw units"]:
    """Feature maps of one image, interpolated to `size` = (sh, sw), first along rows and then along columns."""
    across = _along(maps, size[1], axis=1)
    return _along(across, size[0], axis=0)


def _along(x, target: int, axis: int):
    size = x.shape[axis]
    if size == target:
        return x
    if target % size == 0 and target // size % 2 == 0:
        return _widened(x, target // size, axis)
    base, others, factors = taps(size, target)
    start = _picked(x, base, axis)
    shape = [1] * x.ndim
    shape[axis] = target
    out = start
    for index, factor in zip(others, factors, strict=True):
        out = out + rounded((_picked(x, index, axis) - start) * factor.reshape(shape))
    return out


def _widened(x, factor: int, axis: int):
    """Each position as `factor` ones, an even number: half of them lean on the position before, half on the one after.

    The same values as by `taps`, without a list of positions.
    """
    half = factor // 2
    away = ((np.arange(half) + 0.5) / factor).astype(np.float32)  # distance from the middle, and so the weight
    shape = [1] * (x.ndim + 1)
    shape[axis + 1] = half
    first, last = (lax.slice_in_dim(x, *ends, axis=axis) for ends in ((0, 1), (x.shape[axis] - 1, None)))
    before = jnp.concatenate([first, lax.slice_in_dim(x, 0, -1, axis=axis)], axis=axis)
    after = jnp.concatenate([lax.slice_in_dim(x, 1, None, axis=axis), last], axis=axis)
    middle = jnp.expand_dims(x, axis + 1)
    halves = [
        middle + rounded(jnp.expand_dims(neighbour - x, axis + 1) * weight.reshape(shape))
        for neighbour, weight in ((before, away[::-1]), (after, away))
    ]
    wide = jnp.concatenate(halves, axis=axis + 1)
    return wide.reshape(*x.shape[:axis], x.shape[axis] * factor, *x.shape[axis + 1 :])


def _picked(x, index: np.ndarray, axis: int):
    """`x[index]` along an axis by slices, which are copied whole; a gather goes element by element."""
    return jnp.concatenate([lax.slice_in_dim(x, i, i + 1, axis=axis) for i in map(int, index)], axis=axis)


def taps(size: int, target: int) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """The position with the largest weight in every row, and the other positions with their weights.

    Shorter rows are filled with the largest position and the weight 0.
    """
    matrix = weights(size, target)
    base = matrix.argmax(axis=1)
    rest = matrix.copy()
    rest[np.arange(target), base] = 0
    count = int((rest > 0).sum(axis=1).max())
    order = np.argsort(-rest, axis=1, kind="stable")[:, :count]
    factor = np.take_along_axis(rest, order, axis=1)
    index = np.where(factor > 0, order, base[:, None])
    return base, list(index.T), list(factor.astype(np.float32).T)
