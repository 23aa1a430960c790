"""Sums of float32 that do not depend on the order, on batches or on devices.

A float32 is an integer times a power of two. The integers are counted by exponent, exactly; only the result is rounded,
once. That makes sums of a thousand images on one device and on a thousand devices equal to the last bit.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxinterp.dissect import wide
from jaxinterp.dissect.wide import Wide
from jaxinterp.pytree import pytree

_EXPONENTS = 255  # of finite numbers


@pytree
class ExactSum:
    """Sums of the positive and of the negative values by exponent, and the number of values.

    Attributes:
        positive: mantissas [255,*shape].
        negative: mantissas [255,*shape].
        count: [].
        bad: [*shape] values that were NaN or infinite, and are not in the sums.
    """

    positive: Wide
    negative: Wide
    count: Wide
    bad: Wide


def init(*shape: int) -> ExactSum:
    """Sums of nothing."""
    sides = [wide.zeros(_EXPONENTS, *shape) for _ in range(2)]
    return ExactSum(sides[0], sides[1], wide.zeros(), wide.zeros(*shape))


def update(sums: ExactSum, values: Float[Array, "batch ..."], valid: Array | None = None) -> ExactSum:
    """Adds a batch of at most 64 values for each sum.

    Args:
        sums: sums so far.
        values: float32 [B,*shape].
        valid: bool [B], which of them count; None means all.
    """
    batch = values.shape[0]
    if batch > 64:
        raise ValueError(f"values: expected at most 64 at once, got {batch}")
    bits = lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    exponent = ((bits >> 23) & 0xFF).astype(jnp.int32)
    fraction = (bits & ((1 << 23) - 1)).astype(jnp.int32)
    mantissa = jnp.where(exponent > 0, fraction | (1 << 23), fraction)
    keep = jnp.ones(batch, bool) if valid is None else valid
    kept = keep.reshape(batch, *[1] * (values.ndim - 1)) & jnp.ones(values.shape, bool)
    finite = exponent < _EXPONENTS
    place = jnp.maximum(jnp.minimum(exponent, _EXPONENTS - 1), 1)  # subnormal numbers have the exponent of the next
    negative = bits >> 31 == 1

    def side(counter: Wide, chosen):
        amount = jnp.where(chosen & kept & finite, mantissa, 0)
        where = (place.reshape(batch, -1), jnp.arange(amount[0].size))
        counts = jnp.zeros((_EXPONENTS, amount[0].size), jnp.int32).at[where].add(amount.reshape(batch, -1))
        return wide.add(counter, counts.reshape(counter.low.shape))

    return ExactSum(
        side(sums.positive, ~negative),
        side(sums.negative, negative),
        wide.add(sums.count, keep.sum(dtype=jnp.int32)),
        wide.add(sums.bad, (kept & ~finite).sum(axis=0, dtype=jnp.int32)),
    )


def merge(a: ExactSum, b: ExactSum) -> ExactSum:
    """The sums of both."""
    return jax.tree.map(wide.merge, a, b, is_leaf=lambda node: isinstance(node, Wide))


def result(sums: ExactSum) -> np.ndarray:
    """The sums as float64, NaN where a value was not finite. Each is the exact sum, rounded once."""
    scale = np.ldexp(1.0, np.arange(_EXPONENTS) - 150)  # exact: a mantissa has 23 bits behind the point, bias 127
    signed = _signed(sums)
    scale = scale.reshape(-1, *[1] * (signed.ndim - 1))
    terms = signed * scale  # exact below 2^53
    exact = [math.fsum(column[column != 0]) for column in terms.reshape(_EXPONENTS, -1).T]
    return np.where(wide.total(sums.bad) > 0, np.nan, np.reshape(exact, signed.shape[1:]))


def integers(sums: ExactSum) -> np.ndarray:
    """The exact sums of the finite values as Python's integers, in units of 1 / ONE."""
    signed = _signed(sums).astype(object)
    return sum(row << exponent for exponent, row in enumerate(signed))  # type: ignore[return-value]  # an array


ONE = 1 << 150
"""1 in the units of `integers`."""


def _signed(sums: ExactSum) -> np.ndarray:
    """int64 [255,*shape]: the mantissas of every exponent."""
    return wide.total(sums.positive) - wide.total(sums.negative)


def count(sums: ExactSum) -> int:
    """How many values were added to each sum."""
    return int(wide.total(sums.count))


def mean(sums: ExactSum) -> np.ndarray:
    """The means as float64; NaN where nothing was added."""
    number = count(sums)
    return np.asarray(result(sums) / number) if number else np.full(sums.bad.low.shape, np.nan)


def fold(x: Float[Array, "positions ..."]) -> Float[Array, "..."]:
    """The sum over the first axis as a tree of elementwise sums: the same bits in every program and batch."""
    while x.shape[0] > 1:
        half = x.shape[0] // 2
        rest = x[2 * half :]
        x = jnp.concatenate([x[:half] + x[half : 2 * half], rest]) if rest.shape[0] else x[:half] + x[half : 2 * half]
    return x[0]
