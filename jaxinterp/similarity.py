"""How alike two images are to the eye: SSIM and PSNR of every pair, by dm-pix."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

_WINDOW = 11


def ssim(images: Float[Array, "b h w c"], others: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    """Structural similarity, the mean over positions and channels: 1 for equal images.

    Windows of 11 x 11 pixels with Gaussian weights of sigma 1.5, those that lie inside the image, K1 = 0.01, K2 = 0.03
    (Wang, Bovik, Sheikh and Simoncelli 2004, "Image quality assessment: from error visibility to structural
    similarity", IEEE Transactions on Image Processing 13(4)).

    Args:
        images: in [0, 1].
        others: of the same shape.

    Raises:
        ValueError: shapes that differ, or images smaller than the window.
    """
    import dm_pix

    _check(images, others)
    if min(images.shape[1:3]) < _WINDOW:
        raise ValueError(f"images must have at least {_WINDOW} x {_WINDOW} pixels for SSIM, got {images.shape[1:3]}")
    return jnp.asarray(dm_pix.ssim(images, others, filter_size=_WINDOW))


def psnr(images: Float[Array, "b h w c"], others: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    """Peak signal-to-noise ratio -10 log10(mean squared difference), in decibels: infinite for equal images.

    Args:
        images: in [0, 1].
        others: of the same shape.

    Raises:
        ValueError: shapes that differ.
    """
    import dm_pix

    _check(images, others)
    return jnp.asarray(dm_pix.psnr(images, others))


def _check(images: Array, others: Array) -> None:
    if images.ndim != 4 or images.shape != others.shape:
        raise ValueError(f"others must have the images' shape [B,H,W,C], got {others.shape} and {images.shape}")
