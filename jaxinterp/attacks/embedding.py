"""Watermarks in the coefficients of a transform (Xiang et al. 2020, arXiv 2009.05107).

Each channel has a strength Q of its own. In the one-level Haar transform, Q times the watermark's band LL is added to
all four bands of the host, with signs (LL, LH, HL, HH) of R (+,-,-,-), G (-,+,+,+), B (+,-,-,-); in the
cosine transform of the whole image, Q times the watermark's coefficients are added to the host's. Both transforms are
linear, so what an embedding adds does not depend on the host; `change` gives it without a transform of the host.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax.scipy import fft
from jaxtyping import Array, Float

Transform = Literal["haar", "dct"]

STRENGTHS: dict[Transform, tuple[float, float, float]] = {"haar": (0.02, 0.04, 0.01), "dct": (0.010, 0.020, 0.005)}
"""The paper's Q of R, G and B."""
SIGNS = np.array([[1, -1, -1, -1], [-1, 1, 1, 1], [1, -1, -1, -1]], np.float32)
"""Of the bands (LL, LH, HL, HH), for R, G and B."""

_SIDES = (-3, -2)
# What these signs are in a block of 2 x 2 pixels, [2,2,3]: of R, minus in the upper left one and plus in the others.
_PATTERN = np.array([[[-1, 1, -1], [1, -1, 1]], [[1, -1, 1], [1, -1, 1]]], np.float32)


def haar(images: Float[Array, "*b h w c"]) -> Float[Array, "*b h//2 w//2 c 4"]:
    """The orthonormal one-level Haar transform: bands LL, LH, HL, HH of every channel.

    LH is the difference of rows, HL that of columns (MATLAB's horizontal and vertical details).

    Raises:
        ValueError: a side that two does not divide.
    """
    check_even(images.shape)
    a, b = images[..., ::2, ::2, :], images[..., ::2, 1::2, :]
    c, d = images[..., 1::2, ::2, :], images[..., 1::2, 1::2, :]
    return _butterfly(a, b, c, d)


def inverse_haar(bands: Float[Array, "*b h w c 4"]) -> Float[Array, "*b 2*h 2*w c"]:
    """The images that have these bands, see `haar`."""
    *batch, height, width, channels, _ = bands.shape
    pixels = _butterfly(*(bands[..., i] for i in range(4)))
    pixels = pixels.reshape(*batch, height, width, channels, 2, 2)
    start = len(batch)
    order = (*range(start), start, start + 3, start + 1, start + 4, start + 2)
    return jnp.transpose(pixels, order).reshape(*batch, 2 * height, 2 * width, channels)


def embed(
    images: Float[Array, "*#b h w c"],
    watermarks: Float[Array, "*#b _ _ _"],
    strengths: Float[Array, "3"] | tuple[float, float, float] | None = None,
    transform: Transform = "haar",
) -> Float[Array, "*b h w c"]:
    """The hosts with a watermark in each, before anything is rounded or clipped; differentiable in all arguments.

    Args:
        images: the hosts, RGB.
        watermarks: of the same size.
        strengths: Q of R, G and B; None means the paper's for the transform.
        transform: "haar" or "dct".

    Raises:
        ValueError: an unknown transform; sizes that differ; a side that two does not divide (Haar).
    """
    q = _strengths(strengths, transform)
    _check_fit(images.shape, watermarks.shape)
    if transform == "haar":
        low = haar(watermarks)[..., 0]
        return inverse_haar(haar(images) + SIGNS * (q * low)[..., None])
    coefficients = fft.dctn(images, axes=_SIDES, norm="ortho") + q * fft.dctn(watermarks, axes=_SIDES, norm="ortho")
    return fft.idctn(coefficients, axes=_SIDES, norm="ortho")


def change(
    watermarks: Float[Array, "*b h w 3"],
    strengths: Float[Array, "3"] | tuple[float, float, float] | None = None,
    transform: Transform = "haar",
) -> Float[Array, "*b h w 3"]:
    """What `embed` adds to any host: Q w for the cosine transform, Q LL(w) times +-1 in every 2 x 2 pixels for Haar.

    Arguments and errors are those of `embed`.
    """
    q = _strengths(strengths, transform)
    _check_fit(watermarks.shape, watermarks.shape)
    if transform == "dct":
        return q * watermarks
    check_even(watermarks.shape)
    size = jnp.repeat(jnp.repeat(q * haar(watermarks)[..., 0], 2, axis=-3), 2, axis=-2)
    return jnp.tile(_PATTERN, (size.shape[-3] // 2, size.shape[-2] // 2, 1)) * size


def _butterfly(a: Array, b: Array, c: Array, d: Array) -> Array:
    """Sum and differences, its own inverse."""
    return jnp.stack([a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d], axis=-1) / 2


def _strengths(strengths: Array | tuple[float, float, float] | None, transform: str) -> Array:
    if transform not in STRENGTHS:
        raise ValueError(f"transform must be one of {', '.join(STRENGTHS)}, got {transform!r}")
    return jnp.asarray(STRENGTHS[transform] if strengths is None else strengths, jnp.float32)


def check_even(shape: tuple[int, ...]) -> None:
    height, width = shape[-3:-1]
    if height % 2 or width % 2:
        raise ValueError(f"the Haar transform needs sides that two divides, got {height} x {width} pixels")


def _check_fit(host: tuple[int, ...], watermark: tuple[int, ...]) -> None:
    if host[-1] != 3:
        raise ValueError(f"watermarks are embedded in RGB images [...,H,W,3], got shape {host}")
    if host[-3:] != watermark[-3:]:
        raise ValueError(f"watermarks must have the images' size {host[-3:]}, got {watermark[-3:]}; resize them first")
