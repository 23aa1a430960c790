"""The formats in which a network can be computed, and what a format does to results.

float32   float32 in every product (`jax_default_matmul_precision` highest)
tf32      products of float32 numbers that are rounded to TF32 where the device has it (precision high); a CPU
          computes them in float32
bf16      parameters, images and feature maps in bfloat16; logits, attacks and their gradients' sums in float32
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp.bench.device import FORMATS
from jaxinterp.network import Network, Params, suggest


@dataclasses.dataclass(frozen=True)
class InBfloat16:
    """A network's `apply` on images in bfloat16, with logits in float32; comparable, as `apply` is."""

    apply: Callable[..., Any]

    def __call__(self, params: Params, images: Any, tap: Any) -> Any:
        return self.apply(params, images.astype(jnp.bfloat16), tap).astype(jnp.float32)


def check(forms: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the formats. Raises ValueError for an unknown one, for one given twice, or for none."""
    for form in forms:
        if form not in FORMATS:
            raise ValueError(f"--formats: unknown format {form!r}{suggest(form, FORMATS)}")
    if not forms or len(set(forms)) < len(forms):
        raise ValueError(
            f"--formats: expected some of {', '.join(FORMATS)}, each once, got {' '.join(forms) or 'none'}"
        )
    return forms


def network_in(form: str, network: Network, params: Params) -> tuple[Network, Params]:
    """The network and its parameters in a format; what they compute must run under `computing_in` the same one."""
    if form != "bf16":
        return network, params
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    return dataclasses.replace(network, apply=InBfloat16(network.apply)), half


PRECISIONS = {"float32": "highest", "tf32": "high", "bf16": "default"}
"""The precision of matrix products that belongs to a format."""


def computing_in(form: str) -> contextlib.AbstractContextManager[Any]:
    """The precision of a format, for programs that are traced inside the block."""
    return jax.default_matmul_precision(PRECISIONS[form])


# ---- What it does to results -------------------------------------------------------------------------------


def sign_agreement(found: Any, reference: Any) -> float:
    """The share of components of a gradient whose sign is that of the reference, among those not zero there."""
    a, b = (np.asarray(x, np.float32) for x in (found, reference))
    there = b != 0
    return float(np.mean(np.sign(a[there]) == np.sign(b[there]))) if np.any(there) else 1.0


def difference(found: Any, reference: Any) -> float:
    """The largest difference, relative to the largest value of the reference."""
    a, b = (np.asarray(x, np.float32) for x in (found, reference))
    return float(np.max(np.abs(a - b)) / (np.max(np.abs(b)) or 1.0))


def agreement(found: Any, reference: Any) -> float:
    """The share of equal entries, such as success flags, classes or kinds of cells."""
    return float(np.mean(np.asarray(found) == np.asarray(reference)))
