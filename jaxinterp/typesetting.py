"""Text rendered by Pillow in DejaVu Sans, the font that matplotlib ships: what `attacks.TransparentText` places.

What is rendered depends on the arguments alone, on every machine.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
import os

import jax.numpy as jnp
import matplotlib
import numpy as np
from jaxtyping import UInt8
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from jaxinterp.attacks.lettering import Bank
from jaxinterp.attacks.transparent_text import TransparentText

_LARGEST = 1000  # font sizes that are tried, in pixels
_LEGIBLE = 5  # pixels, the smallest font size that is chosen where none is asked for
_STEEPEST = 45.0  # degrees
_SEPARATOR = "|"


def written(attack: TransparentText, height: int, width: int) -> TransparentText:
    """The attack with every text that it may place on images of height x width.

    Raises:
        ValueError: a text that cannot be drawn or does not fit (with what would), or sizes in the wrong order.
    """
    phrases = tuple(phrase.strip() for phrase in attack.text.split(_SEPARATOR))
    steep = np.linspace(-_STEEPEST, _STEEPEST, attack.angles) if attack.angles > 1 else (0.0,)
    angles = tuple(float(angle) for angle in steep)
    largest = attack.largest
    if largest is None:
        room = {phrase: largest_size(phrase, angles, height, width) for phrase in phrases}
        longest = min(room, key=room.__getitem__)
        largest = min(max(height // 4, _LEGIBLE), room[longest])
        if largest < _LEGIBLE and (attack.smallest is None or largest < attack.smallest):
            raise ValueError(
                f"TransparentText.text: {_quoted(longest)} does not fit in {height} x {width} pixels at a size that "
                f"can be read ({_LEGIBLE} or more); {what_fits(longest, angles, height, width, _LEGIBLE)}"
            )
    smallest = max(1, largest // 3, min(_LEGIBLE, largest)) if attack.smallest is None else attack.smallest
    if smallest > largest:
        raise ValueError(f"TransparentText.smallest must be at most the largest size {largest}, got {smallest}")
    steps = np.geomspace(smallest, largest, attack.sizes) if attack.sizes > 1 else [largest]
    sizes = tuple(sorted({round(float(size)) for size in steps}))
    return dataclasses.replace(attack, bank=bank(phrases, sizes, angles, height, width))


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
        if _longer_than_any(phrase, size, height, width):
            raise ValueError(
                f"text {_quoted(phrase)} of size {size} takes {_length(phrase, size):.0f} pixels and does not fit in "
                f"{height} x {width}; {what_fits(phrase, angles, height, width)}"
            )
        mask = render(phrase, size, angle)
        if mask.shape[0] > height or mask.shape[1] > width:
            raise ValueError(
                f"text {_quoted(phrase)} of size {size} at {angle:g} degrees takes {mask.shape[0]} x {mask.shape[1]} "
                f"pixels and does not fit in {height} x {width}; {what_fits(phrase, angles, height, width)}"
            )
        ink[i] = mask.shape
        tiles[i, : mask.shape[0], : mask.shape[1]] = mask
        period[i] = np.minimum(ink[i] + size, (height, width))
    return Bank(jnp.asarray(tiles), jnp.asarray(ink), jnp.asarray(period))


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


def what_fits(phrase: str, angles: tuple[float, ...], height: int, width: int, least: int = 1) -> str:
    """What to ask for instead of a text that does not fit at a size of at least `least`, as the end of a message."""
    size = largest_size(phrase, angles, height, width)
    if size >= least:
        return f"size {size} fits" + ("" if len(angles) == 1 else " at every angle")
    lengths = range(1, len(phrase))
    kept = bisect.bisect_right(lengths, 0, key=lambda n: not _fits(phrase[:n], angles, height, width, least))
    return f"no size does, but {phrase[:kept].strip()!r} would" if kept else "no text does"


def _fits(phrase: str, angles: tuple[float, ...], height: int, width: int, size: int) -> bool:
    if _longer_than_any(phrase, size, height, width):
        return False
    try:
        masks = [render(phrase, size, angle) for angle in angles]
    except ValueError:  # too small to leave a pixel
        return True
    return all(mask.shape[0] <= height and mask.shape[1] <= width for mask in masks)


def _longer_than_any(phrase: str, size: int, height: int, width: int) -> bool:
    """Whether the line is longer than the diagonal, by far; then it need not be drawn to see that it does not fit."""
    return _length(phrase, size) > 1.25 * math.hypot(height, width) + 8


def _length(phrase: str, size: int) -> float:
    left, _, right, _ = _font(size).getbbox(phrase.strip())
    return float(right - left)


def _quoted(phrase: str) -> str:
    """The phrase, or how it begins, for a message."""
    return repr(phrase if len(phrase) <= 80 else phrase[:60] + "…")


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
    font = FT2Font(_font_file())
    return "".join(dict.fromkeys(c for c in phrase if not font.get_char_index(ord(c))))


@functools.lru_cache(maxsize=64)
def _font(size: int):
    # The same places on every machine: the other layout engine depends on a library that may be missing.
    return ImageFont.truetype(_font_file(), size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _font_file() -> str:
    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
