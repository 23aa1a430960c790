"""The picture of a unit: the images on which it is most active, dimmed where they are outside its mask.

The mask is that of the tally: where the unit's feature map, interpolated to the label maps, exceeds its threshold.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxinterp.concepts.tables import Layer
from jaxinterp.data import DamagedImage, SegmentedSource
from jaxinterp.dissect.topimages import NONE
from jaxinterp.dissect.upsample import upsample
from jaxinterp.runs import replacing

TILE, GAP, HEAD = 112, 4, 22
"""Side of an image, space between two, and height of the line above them, in pixels."""

THUMBNAILS, THUMBNAIL = 4, 64
"""How many images a thumbnail shows, and their side."""

_DIM = 0.4  # what is left of the brightness outside the mask
_EDGE = (255, 214, 0)
_INK, _PAPER = (27, 31, 36), (255, 255, 255)

Tiles = Callable[[int], np.ndarray]
"""The image of a number, uint8 [TILE,TILE,3]."""


def tiles(source: SegmentedSource) -> Tiles:
    """Images of a source at the size of a tile; some thousand of them are held. One that is unreadable is grey."""

    @functools.lru_cache(maxsize=4096)
    def tile(number: int) -> np.ndarray:
        try:
            pixels = source[number].image
        except DamagedImage:
            return np.full((TILE, TILE, 3), 128, np.uint8)
        levels = np.rint(pixels * 255).astype(np.uint8)
        whole = Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels).convert("RGB")
        return np.asarray(whole.resize((TILE, TILE), Image.Resampling.LANCZOS))

    return tile


def masks(found: Layer, unit: int, size: tuple[int, int]) -> np.ndarray:
    """Where a unit's top images are under its mask, at the size of the label maps: bool [top,sh,sw]."""
    maps = found.dissection.maps
    assert maps is not None
    return np.asarray(_masks(maps[unit], found.dissection.thresholds[unit], size))


@functools.partial(jax.jit, static_argnums=2)
def _masks(maps, threshold, size):
    raised = upsample(maps.transpose(1, 2, 0), size) > threshold
    return (raised & (maps.max(axis=(1, 2)) > threshold)).transpose(2, 0, 1)


def shown(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """An image, uint8 [TILE,TILE,3], dimmed outside a mask [sh,sw], with a line along its edge."""
    inside = np.asarray(Image.fromarray(mask).resize((TILE, TILE), Image.Resampling.NEAREST))
    padded = np.pad(inside, 1, mode="edge")
    neighbours = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    picture = np.where(inside[..., None], pixels, pixels * _DIM).astype(np.uint8)
    picture[inside & ~neighbours] = _EDGE
    return picture


def draw(found: Layer, unit: int, size: tuple[int, int], tile: Tiles) -> Image.Image:
    """The picture of a unit: a line that says what it detects, and its top images from left to right.

    Args:
        found: its layer.
        unit: from 0.
        size: height and width of the label maps.
        tile: the images.
    """
    numbers = [int(n) for n in np.asarray(found.dissection.top.image)[unit] if n != NONE]
    sheet = Image.new("RGB", (len(numbers) * (TILE + GAP) - GAP, HEAD + TILE), _PAPER)
    for i, (number, mask) in enumerate(zip(numbers, masks(found, unit, size), strict=False)):
        sheet.paste(Image.fromarray(shown(tile(number), mask)), (i * (TILE + GAP), HEAD))
    ImageDraw.Draw(sheet).text((1, 2), caption(found, unit), fill=_INK, font=_font())
    return sheet


def caption(found: Layer, unit: int) -> str:
    """A unit, its best concept and how well it detects that, as text."""
    name = found.name(int(found.best.concept[unit]))
    what = f"{name} ({found.category(unit)})  IoU {found.best.score[unit]:.3f}" if name else "no concept"
    return f"unit {unit + 1}  {what}"


def write(path: Path, picture: Image.Image) -> None:
    """Writes a picture as JPEG, whole or not at all."""
    with replacing(path) as file:
        picture.save(file, format="JPEG", quality=85)


def thumbnail(path: Path) -> tuple[bytes, tuple[int, int]]:
    """The first images of a unit's picture, small, as JPEG; and its width and height."""
    with Image.open(path, formats=("JPEG",)) as opened:
        count = min(THUMBNAILS, (opened.width + GAP) // (TILE + GAP))
        part = opened.crop((0, HEAD, count * (TILE + GAP) - GAP, HEAD + TILE))
    small = part.resize((part.width * THUMBNAIL // TILE, THUMBNAIL), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, format="JPEG", quality=78)
    return stream.getvalue(), small.size


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    from matplotlib.font_manager import FontProperties, findfont

    return ImageFont.truetype(findfont(FontProperties(family="DejaVu Sans")), 13)
