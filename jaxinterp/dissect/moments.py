"""Mean and variance of each unit's activations over all positions of all images, exactly: rounded once, at the end.

A float32 is split into two halves of 12 bits, whose products are float32 again: x = a + b and x^2 = a^2 + 2ab + b^2.
The sums of x and of the three products are those of `exactsum`, so the bits are the same for any batches and devices,
and a variance that is small beside the square of the mean is not lost.

    m = moments.init(units)
    m = moments.update(m, features)      # a batch; merge combines two
    found = moments.result(m)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from jaxinterp.dissect import exactsum
from jaxinterp.dissect.exactsum import ExactSum
from jaxinterp.pytree import pytree

_BLOCK = 64  # values that an exact sum takes at once
_UPPER = 0xFFFFF000  # sign, exponent and the upper half of the mantissa


@pytree
class Moments:
    """Sums [4,U] of x, a^2, 2ab and b^2 over all positions."""

    sums: ExactSum


@dataclasses.dataclass(frozen=True, eq=False)
class Described:
    """Moments on the host.

    Attributes:
        count: positions that were counted.
        mean: float64 [U]; NaN where nothing was counted, or a value was not finite.
        variance: float64 [U], the mean squared distance from the mean (divided by `count`); NaN likewise.
    """

    count: int
    mean: np.ndarray
    variance: np.ndarray


def init(units: int) -> Moments:
    """Nothing counted."""
    return Moments(exactsum.init(4, units))


def update(moments: Moments, features: Float[Any, "batch h w units"], valid: Any = None) -> Moments:
    """Adds a batch.

    Args:
        moments: what was counted so far.
        features: feature maps. Squares beyond the range of float32 make a variance NaN; of squares below 1e-31 some
            bits are lost.
        valid: bool [B], which images count; None means all.
    """
    batch, h, w, units = features.shape
    x = features.astype(jnp.float32).reshape(batch * h * w, units)
    there = jnp.repeat(jnp.ones(batch, bool) if valid is None else jnp.asarray(valid), h * w)
    missing = -len(x) % _BLOCK
    x = jnp.pad(x, ((0, missing), (0, 0)))
    there = jnp.pad(there, (0, missing)).reshape(len(x) // _BLOCK, _BLOCK)
    upper = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(_UPPER), jnp.float32)
    lower = x - upper
    parts = jnp.stack([x, upper * upper, 2 * upper * lower, lower * lower], axis=1)
    parts = parts.reshape(len(there), _BLOCK, 4, units)

    def add(i, sums):
        return exactsum.update(sums, parts[i], there[i])

    return Moments(lax.fori_loop(0, len(there), add, moments.sums))


def merge(a: Moments, b: Moments) -> Moments:
    """The positions of both."""
    return Moments(exactsum.merge(a.sums, b.sums))


def result(moments: Moments) -> Described:
    """Mean and variance of every unit; each is the exact number, rounded once."""
    count, whole = exactsum.count(moments.sums), exactsum.integers(moments.sums)
    first, second = whole[0], whole[1:].sum(axis=0)
    bad = np.isnan(exactsum.result(moments.sums)) | (count == 0)
    n, one = max(count, 1), exactsum.ONE
    mean = [int(s) / (n * one) for s in first]
    variance = [(n * int(q) * one - int(s) ** 2) / (n * one) ** 2 for s, q in zip(first, second, strict=True)]
    return Described(count, np.where(bad[0], np.nan, mean), np.where(bad.any(axis=0), np.nan, variance))
