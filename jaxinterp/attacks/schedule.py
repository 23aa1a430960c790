"""Numbers that change with an example's own count of steps."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def cosine(
    first: Float[Array, " b"], last: Float[Array, " b"], count: Int[Array, " b"], steps: int
) -> Float[Array, " b"]:
    """From `first` at count 0 to `last` at count `steps` along half a cosine.

    The weights come from a table, as a compiler may evaluate a cosine in another way for another batch size.
    """
    weights = (1 + np.cos(np.pi * np.arange(steps + 1) / steps)) / 2
    return last + (first - last) * jnp.asarray(weights, jnp.float32)[jnp.minimum(count, steps)]
