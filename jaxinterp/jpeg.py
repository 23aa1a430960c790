"""What a JPEG file makes of a picture: the standard's lossy steps, as integers on the device.

    8 bits -> Y, Cb, Cr -> chroma at half resolution (4:2:0) -> DCT of 8 x 8 blocks -> division by the table, rounding
           -> the same backwards

The entropy coding of a file loses nothing and is left out. Every step is the integer arithmetic of libjpeg's slow DCT
(Loeffler, Ligtenberg and Moschytz 1989) with its bilinear chroma interpolation, so the result is that of writing
and reading a file with Pillow, bit for bit, and the same on every backend and in every batch. Tables and quality are
those of the standard (ITU-T T.81, annex K) as libjpeg scales them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

# Quantisation tables of brightness and of colour at quality 50 (T.81, tables K.1 and K.2).
_LUMA = (
    *(16, 11, 10, 16, 24, 40, 51, 61),
    *(12, 12, 14, 19, 26, 58, 60, 55),
    *(14, 13, 16, 24, 40, 57, 69, 56),
    *(14, 17, 22, 29, 51, 87, 80, 62),
    *(18, 22, 37, 56, 68, 109, 103, 77),
    *(24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101),
    *(72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = (
    *(17, 18, 24, 47, 99, 99, 99, 99),
    *(18, 21, 26, 66, 99, 99, 99, 99),
    *(24, 26, 56, 99, 99, 99, 99, 99),
    *(47, 66, 99, 99, 99, 99, 99, 99),
    *(99,) * 32,
)
_BLOCK = 8
_SAMPLE = 13  # bits behind the point of the constants of the DCT,
_BETWEEN = 2  # and of values between its two passes
_COLOUR = 16  # bits behind the point of the constants of the colour conversion
_NARROW = 4  # up to this width, in pixels, libjpeg repeats chroma instead of interpolating it


def recompress(
    images: Float[Array, "b h w c"], quality: float | int | Float[Array, ""] | Float[Array, " b"] = 75.0
) -> Float[Array, "b h w c"]:
    """The images as a JPEG file of this quality gives them back.

    Values are rounded to 8 bits (halves upwards) and clipped to the box before. The gradient is zero; for one that
    passes through, take `images + stop_gradient(recompress(images) - images)`.

    Args:
        images: RGB in [0, 1], of any size.
        quality: from 1 to 100, as Pillow and libjpeg count it; fractions are dropped. One number, or one an image.

    Raises:
        ValueError: images that do not have three channels.
    """
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be RGB [B,H,W,3], got shape {images.shape}")
    height, width = images.shape[1:3]
    half = (-(-height // 2), -(-width // 2))
    luma, *chroma = _to_ycc(to_levels(images))
    # As libjpeg: columns are repeated before chroma is halved, rows only to an even number, and after it.
    chroma = [_halved(_repeat_last(_repeat_last(plane, 2, 1), 2 * _BLOCK, 2)) for plane in chroma]
    tables = [_table(base, jnp.asarray(quality)) for base in (_LUMA, _CHROMA, _CHROMA)]
    planes = _coded([_repeat_last(_repeat_last(plane, _BLOCK, 1), _BLOCK, 2) for plane in (luma, *chroma)], tables)
    luma, *chroma = planes[0][:, :height, :width], *(plane[:, : half[0], : half[1]] for plane in planes[1:])
    planes = [_doubled(plane, smooth=width > _NARROW)[:, :height, :width] for plane in chroma]
    return to_unit(_to_rgb(luma, *planes))


def to_levels(images: Float[Array, "..."]) -> Int[Array, "..."]:
    """Values of [0, 1] as levels 0..255, halves upwards, others clipped."""
    return jnp.floor(jnp.clip(images * 255, 0, 255) + 0.5).astype(jnp.int32)


def to_unit(levels: Int[Array, "..."]) -> Float[Array, "..."]:
    """Levels 0..255 as float32 in [0, 1], as NumPy divides: compilers multiply by 1 / 255, which is rounded."""
    return jnp.asarray(np.arange(256, dtype=np.float32) / np.float32(255))[levels]


def _table(base: Sequence[int], quality: Array) -> Array:
    """The table at a quality, [1,1,8,8] or [b,1,8,8]."""
    quality = jnp.clip(quality.astype(jnp.int32), 1, 100)
    scale = jnp.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    entries = (np.reshape(base, (_BLOCK, _BLOCK)).astype(np.int32) * scale.reshape(-1, 1, 1, 1) + 50) // 100
    return jnp.clip(entries, 1, 255)


# Colours. Every constant is one of ITU-R BT.601 in fixed point; what is added is a half, for rounding.


def _to_ycc(rgb: Array) -> tuple[Array, Array, Array]:
    """Levels [b,h,w,3] as Y, Cb and Cr [b,h,w]."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    half = 1 << (_COLOUR - 1)
    middle = (128 << _COLOUR) + half - 1
    luma = 19595 * red + 38470 * green + 7471 * blue + half
    to_blue = -11059 * red - 21709 * green + 32768 * blue + middle
    to_red = 32768 * red - 27439 * green - 5329 * blue + middle
    return luma >> _COLOUR, to_blue >> _COLOUR, to_red >> _COLOUR


def _to_rgb(luma: Array, to_blue: Array, to_red: Array) -> Array:
    """The levels [b,h,w,3], in 0..255."""
    to_blue, to_red, half = to_blue - 128, to_red - 128, 1 << (_COLOUR - 1)
    red = luma + ((91881 * to_red + half) >> _COLOUR)
    green = luma + ((-22554 * to_blue - 46802 * to_red + half) >> _COLOUR)
    blue = luma + ((116130 * to_blue + half) >> _COLOUR)
    return jnp.clip(jnp.stack([red, green, blue], axis=-1), 0, 255)


# Sizes


def _repeat_last(plane: Array, unit: int, axis: int) -> Array:
    """The last row or column repeated until there is a multiple of `unit` of them."""
    missing = -plane.shape[axis] % unit
    return jnp.pad(plane, [(0, missing * (i == axis)) for i in range(plane.ndim)], mode="edge") if missing else plane


def _halved(plane: Array) -> Array:
    """The mean of every 2 x 2 pixels; halves are rounded up in every other column, and down in those between."""
    sums = plane[:, ::2, ::2] + plane[:, ::2, 1::2] + plane[:, 1::2, ::2] + plane[:, 1::2, 1::2]
    return (sums + np.where(np.arange(sums.shape[2]) % 2, 2, 1)) >> 2


def _doubled(plane: Array, *, smooth: bool) -> Array:
    """Twice as many rows and columns; `smooth` takes 3/4 of the nearest pixel and 1/4 of the next, in both axes."""
    if not smooth:
        return jnp.repeat(jnp.repeat(plane, 2, axis=1), 2, axis=2)
    around = jnp.pad(plane, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = jnp.stack([3 * around[:, 1:-1] + around[:, :-2], 3 * around[:, 1:-1] + around[:, 2:]], axis=2)
    rows = rows.reshape(len(plane), 2 * plane.shape[1], -1)
    near = 3 * rows[..., 1:-1]
    both = jnp.stack([(near + rows[..., :-2] + 8) >> 4, (near + rows[..., 2:] + 7) >> 4], axis=-1)
    return both.reshape(*rows.shape[:2], -1)


# Blocks. Between the roundings, each pass of libjpeg's transforms is linear with whole coefficients: a matrix. Sums of
# whole numbers are exact in any order.


def _coded(planes: Sequence[Array], tables: Sequence[Array]) -> list[Array]:
    """What quantisation leaves of planes [b,h,w] of whole blocks, all blocks of all planes at once."""
    blocks = [_to_blocks(plane) for plane in planes]
    x = jnp.concatenate(blocks, axis=1) - 128
    table = jnp.concatenate([jnp.repeat(t, b.shape[1], axis=1) for t, b in zip(tables, blocks, strict=True)], axis=1)
    divisor = 8 * table  # the coefficients are eight times those of an orthonormal DCT
    coefficients = _pass(_pass(x, _FORWARD, 3, _SAMPLE - _BETWEEN), _FORWARD, 2, _SAMPLE + _BETWEEN)
    size = lax.div(jnp.abs(coefficients) + (divisor >> 1), jnp.broadcast_to(divisor, x.shape))
    x = jnp.sign(coefficients) * size * table
    x = _pass(_pass(x, _BACKWARD, 2, _SAMPLE - _BETWEEN), _BACKWARD, 3, _SAMPLE + _BETWEEN + 3)
    x = jnp.clip(x + 128, 0, 255)
    ends = np.cumsum([b.shape[1] for b in blocks])[:-1]
    return [_from_blocks(part, plane.shape) for part, plane in zip(jnp.split(x, ends, axis=1), planes, strict=True)]


def _to_blocks(plane: Array) -> Array:
    """[b,h,w] as [b,blocks,8,8]."""
    batch, height, width = plane.shape
    rows = plane.reshape(batch, height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK)
    return jnp.swapaxes(rows, 2, 3).reshape(batch, -1, _BLOCK, _BLOCK)


def _from_blocks(blocks: Array, shape: tuple[int, ...]) -> Array:
    batch, height, width = shape
    rows = blocks.reshape(batch, height // _BLOCK, width // _BLOCK, _BLOCK, _BLOCK)
    return jnp.swapaxes(rows, 2, 3).reshape(shape)


def _pass(blocks: Array, matrix: np.ndarray, axis: int, bits: int) -> Array:
    """The matrix [8,8] (outputs, inputs) along one axis, over 2^bits, rounded."""
    along = [1] * (blocks.ndim + 1)
    along[axis] = along[axis + 1] = _BLOCK
    products = jnp.expand_dims(blocks, axis) * matrix.reshape(along)
    return (jnp.sum(products, axis=axis + 1, dtype=jnp.int32) + (1 << (bits - 1))) >> bits


def _fixed(value: float) -> int:
    return round(value * (1 << _SAMPLE))


def _odd(a: Any, b: Any, c: Any, d: Any) -> tuple[Any, Any, Any, Any]:
    """The odd part of both transforms: four inputs, four outputs."""
    z1, z2, z3, z4 = a + d, b + c, a + c, b + d
    z5 = (z3 + z4) * _fixed(1.175875602)
    z1, z2 = z1 * -_fixed(0.899976223), z2 * -_fixed(2.562915447)
    z3, z4 = z3 * -_fixed(1.961570560) + z5, z4 * -_fixed(0.390180644) + z5
    return (
        a * _fixed(0.298631336) + z1 + z3,
        b * _fixed(2.053119869) + z2 + z4,
        c * _fixed(3.072711026) + z2 + z3,
        d * _fixed(1.501321110) + z1 + z4,
    )


def _forward_matrix() -> np.ndarray:
    """The DCT of length 8, with the constants' rounding."""
    x = np.eye(_BLOCK, dtype=np.int32)
    sums, differences = x[:4] + x[:3:-1], x[:4] - x[:3:-1]
    outer, inner, wide, narrow = sums[0] + sums[3], sums[1] + sums[2], sums[0] - sums[3], sums[1] - sums[2]
    turned = (narrow + wide) * _fixed(0.541196100)
    seventh, fifth, third, first = _odd(*differences[::-1])
    zeroth, fourth = (outer + inner) << _SAMPLE, (outer - inner) << _SAMPLE
    second, sixth = turned + wide * _fixed(0.765366865), turned - narrow * _fixed(1.847759065)
    return np.stack([zeroth, first, second, third, fourth, fifth, sixth, seventh])


def _backward_matrix() -> np.ndarray:
    """The inverse, eight times as large in two passes."""
    x = np.eye(_BLOCK, dtype=np.int32)
    turned = (x[2] + x[6]) * _fixed(0.541196100)
    low, high = turned - x[6] * _fixed(1.847759065), turned + x[2] * _fixed(0.765366865)
    total, difference = (x[0] + x[4]) << _SAMPLE, (x[0] - x[4]) << _SAMPLE
    even = np.stack([total + high, difference + low, difference - low, total - high])
    odd = np.stack(_odd(x[7], x[5], x[3], x[1])[::-1])
    return np.concatenate([even + odd, (even - odd)[::-1]])


_FORWARD, _BACKWARD = _forward_matrix(), _backward_matrix()
