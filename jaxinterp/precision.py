"""The one switch for the precision of products and convolutions in float32: JAX's `jax_default_matmul_precision`.

    default   the fastest: bfloat16 on TPUs, TF32 on NVIDIA GPUs that have it, float32 on CPUs
    high      three passes in bfloat16 on TPUs, TF32 on NVIDIA GPUs, float32 on CPUs
    highest   float32 everywhere

`jaxinterp --precision highest COMMAND` sets it, as does JAX's own environment variable JAX_DEFAULT_MATMUL_PRECISION.
Results state it; `jaxinterp validate` always compares at the highest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from jaxinterp.network import suggest

_NAME = "jax_default_matmul_precision"
CHOICES = ("default", "high", "highest")
# JAX's own words for the same three.
_SAME = {None: "default", "bfloat16": "default", "tensorfloat32": "high", "bfloat16_3x": "high", "float32": "highest"}


def current() -> str:
    """The precision in force: one of `CHOICES`, or JAX's name of another algorithm."""
    found = getattr(jax.config, _NAME)  # not `values`: that of an enclosing block counts
    return _SAME.get(found, str(found))


@contextmanager
def using(name: str | None) -> Iterator[None]:
    """Computes the block at another precision; None leaves it as it is.

    Raises:
        ValueError: not one of `CHOICES`.
    """
    if name is not None and name not in CHOICES:
        raise ValueError(f"--precision must be one of {', '.join(CHOICES)}, got {name!r}{suggest(name, CHOICES)}")
    before = jax.config.values[_NAME]
    if name is not None:
        jax.config.update(_NAME, None if name == "default" else name)
    try:
        yield
    finally:
        jax.config.update(_NAME, before)
