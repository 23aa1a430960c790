"""Text over images: rendered to a mask of coverage on the host, placed and blended by pure functions.

    x' = x + a m (colour - x)

with m in [0, 1] the coverage of every pixel by the letters and a the opacity. Text is rendered by Pillow in DejaVu
Sans, the font that matplotlib ships. What is rendered depends on the arguments alone, so a search can try masks inside
a compiled program: a `Bank` holds every text in every size and at every angle, and `place` moves one of them or repeats
it on a grid, in integers.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
import os

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

_LARGEST = 1000  # font sizes that are tried, in pixels


@dataclasses.dataclass(frozen=True)
class Bank:
    """Texts in every size and at every angle, for images of one size.

    Attributes:
        tiles: [N,H,W] coverage, 0 to 255, of each text in the upper left corner of an image.
        ink: [N,2] rows and columns that it takes there.
        period: [N,2] rows and columns after which it is repeated on a grid: its own and a gap of the font's size, at
            most the image's.
        phrases: [N] what it says.
        sizes: [N] its font size, in pixels.
        angles: [N] degrees by which it is turned, counterclockwise.
    """

    tiles: UInt8[np.ndarray, "n h w"]
    ink: Int[np.ndarray, "n 2"]
    period: Int[np.ndarray, "n 2"]
    phrases: tuple[str, ...]
    sizes: tuple[int, ...]
    angles: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.tiles)


def render(phrase: str, size: int, angle: float = 0.0) -> UInt8[np.ndarray, "h w"]:
    """A line of text as coverage from 0 to 255, in the smallest rectangle that holds it.

    Args:
        phrase: one line.
        size: of the font, in pixels.
        angle: degrees by which the line is turned, counterclockwise.

    Raises:
        ValueError: nothing to draw, a line break or another control character, a character that the font lacks, or a
            size below 1.
    """
    from PIL import Image, ImageDraw

    _check(phrase)
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    font = _font(size)
    left, top, right, bottom = font.getbbox(phrase)
    canvas = Image.new("L", (math.ceil(right - left) + 4, math.ceil(bottom - top) + 4))
    ImageDraw.Draw(canvas).text((2 - left, 2 - top), phrase, fill=255, font=font)
    if angle % 360:
        canvas = canvas.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"text {phrase!r} at size {size} leaves no pixel; a larger size would show it")
    return np.asarray(canvas.crop(box))


@functools.lru_cache(maxsize=8)
def bank(phrases: tuple[str, ...], sizes: tuple[int, ...], angles: tuple[float, ...], height: int, width: int) -> Bank:
    """Every phrase in every size and at every angle, for images of height x width.

    Raises:
        ValueError: as `render`; one of them does not fit, with the largest size that would.
    """
    entries = list(itertools.product(phrases, sizes, angles))
    tiles = np.zeros((len(entries), height, width), np.uint8)
    ink = np.zeros((len(entries), 2), np.int32)
    period = np.zeros_like(ink)
    for i, (phrase, size, angle) in enumerate(entries):
        mask = render(phrase, size, angle)
        if mask.shape[0] > height or mask.shape[1] > width:
            raise ValueError(
                f"text {phrase!r} of size {size} at {angle:g} degrees takes {mask.shape[0]} x {mask.shape[1]} pixels "
                f"and does not fit in {height} x {width}; {what_fits(phrase, angles, height, width)}"
            )
        ink[i] = mask.shape
        tiles[i, : mask.shape[0], : mask.shape[1]] = mask
        period[i] = np.minimum(ink[i] + size, (height, width))
    tiles.flags.writeable = ink.flags.writeable = period.flags.writeable = False
    return Bank(tiles, ink, period, *(tuple(column) for column in zip(*entries, strict=True)))


@functools.lru_cache(maxsize=256)
def largest_size(phrase: str, angles: tuple[float, ...], height: int, width: int) -> int:
    """The largest font size at which the phrase fits at all angles, in pixels; 0 where none does.

    Raises:
        ValueError: as `render`.
    """
    _check(phrase)
    fits = functools.partial(_fits, phrase, angles, height, width)
    low, high = 0, min(_LARGEST, 2 * max(height, width) + 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def what_fits(phrase: str, angles: tuple[float, ...], height: int, width: int) -> str:
    """What to ask for instead of a text that does not fit, as the end of a message."""
    size = largest_size(phrase, angles, height, width)
    if size:
        return f"size {size} fits" + ("" if len(angles) == 1 else " at every angle")
    kept = bisect.bisect_right(range(1, len(phrase)), 0, key=lambda n: not _fits(phrase[:n], angles, height, width, 1))
    return f"no size does, but {phrase[:kept]!r} would" if kept else "no text does"


def place(tile: UInt8[Array, "h w"], period: Int[Array, " 2"], offset: Int[Array, " 2"]) -> Float[Array, "h w"]:
    """The coverage, in [0, 1], of an image by a text that begins at `offset` and comes again after every `period`.

    Args:
        tile: of a bank.
        period: rows and columns; those of the image for a single text.
        offset: row and column of its upper left corner.
    """
    height, width = tile.shape
    rows = (jnp.arange(height) - offset[0]) % period[0]
    columns = (jnp.arange(width) - offset[1]) % period[1]
    return tile[rows[:, None], columns[None, :]].astype(jnp.float32) / 255


def blend(
    images: Float[Array, "*b h w c"],
    mask: Float[Array, "*b h w"],
    opacity: Float[Array, "*#b"] | float,
    colour: Float[Array, "*#b c"],
) -> Float[Array, "*b h w c"]:
    """The images under a colour, where and as far as the mask covers them.

    Args:
        images: in [0, 1].
        mask: coverage in [0, 1].
        opacity: of the colour at full coverage; more than 1 is 1.
        colour: in [0, 1].
    """
    alpha = jnp.minimum(jnp.asarray(opacity), 1.0)[..., None, None] * mask
    return jnp.clip(images + alpha[..., None] * (colour[..., None, None, :] - images), 0.0, 1.0)


def _fits(phrase: str, angles: tuple[float, ...], height: int, width: int, size: int) -> bool:
    try:
        masks = [render(phrase, size, angle) for angle in angles]
    except ValueError:  # too small to leave a pixel
        return True
    return all(mask.shape[0] <= height and mask.shape[1] <= width for mask in masks)


def _check(phrase: str) -> None:
    """Raises ValueError where the text cannot be drawn."""
    if not phrase.strip():
        raise ValueError(f"text must have a character to draw, got {phrase!r}")
    if not phrase.isprintable():
        raise ValueError(f"text must be one line without control characters, got {phrase!r}")
    lacking = _lacking(phrase)
    if lacking:
        raise ValueError(f"text {phrase!r}: the font, DejaVu Sans, has no {lacking!r}")


@functools.lru_cache(maxsize=64)
def _lacking(phrase: str) -> str:
    from matplotlib.ft2font import FT2Font

    font = FT2Font(_font_file())
    return "".join(dict.fromkeys(c for c in phrase if not font.get_char_index(ord(c))))


@functools.lru_cache(maxsize=64)
def _font(size: int):
    from PIL import ImageFont

    # The same places on every machine: the other layout engine depends on a library that may be missing.
    return ImageFont.truetype(_font_file(), size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _font_file() -> str:
    import matplotlib

    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
