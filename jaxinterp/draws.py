"""Random arrays in the shape of an image, from programs that compile fast.

JAX numbers the components of what it draws by their place in memory, which for a shape of several axes it works out
from their indices. On CPUs compiling that for [64,64,3] under vmap takes about five times as long as for [12288], for
the same numbers (jaxlib 0.10.2: more than a second, half of what the gradient of a ResNet-18 takes).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jaxtyping import Array


def shaped(draw: Callable[..., Array], key: Array, shape: tuple[int, ...], *args: Any) -> Array:
    """`draw(key, shape, *args)`, bit for bit, drawn without its axes.

    Args:
        draw: of `jax.random`, such as `jax.random.uniform`: components that do not depend on each other.
        key: of one draw.
        shape: of the result.
        args: what `draw` takes behind the shape, such as the type and the limits.

    Returns:
        Of `shape`, in the type that `draw` returns. Errors are those of `draw`.
    """
    return draw(key, (math.prod(shape),), *args).reshape(shape)
