"""Counters beyond 32 bits, in arrays of 32-bit integers.

JAX counts in 32 bits unless a whole program is switched to 64. Pixels of a data set exceed that: 63,305 label maps of
112 x 112 pixels hold 794 million, and a thousand times as many are nothing unusual on a pod.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxinterp.pytree import pytree

_BITS = 16
_LOW = (1 << _BITS) - 1


@pytree
class Wide:
    """Non-negative integers below 2^47, `high * 65536 + low` with `low` below 65536.

    The two halves may be summed over up to 32,768 devices (`jax.lax.psum`) and then `normalised`.
    """

    low: Int[Array, "*shape"]
    high: Int[Array, "*shape"]


def zeros(*shape: int) -> Wide:
    """Counters that have counted nothing."""
    return Wide(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32))


def add(counter: Wide, counts: Int[Array, "..."]) -> Wide:
    """`counter + counts`, for counts from 0 to 2^31 - 65536 of the same shape."""
    return normalised(Wide(counter.low + counts, counter.high))


def merge(a: Wide, b: Wide) -> Wide:
    """The sum of two counters."""
    return normalised(Wide(a.low + b.low, a.high + b.high))


def normalised(counter: Wide) -> Wide:
    """The same number, with the carry moved to the high half."""
    return Wide(counter.low & _LOW, counter.high + (counter.low >> _BITS))


def total(counter: Wide) -> np.ndarray:
    """The counters as int64, on the host."""
    low, high = (np.asarray(jax.device_get(half), np.int64) for half in (counter.low, counter.high))
    return np.asarray((high << _BITS) + low)
