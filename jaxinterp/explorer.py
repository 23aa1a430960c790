"""What the explorer of a page embeds: the layers of a picture as PNG, its cells and maps as numbers.

The script in the page draws from these. Every number is rounded as far as it is shown, so that a page stays small.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from numpy.typing import ArrayLike
from PIL import Image

from jaxinterp import plots
from jaxinterp.effect import Cell, sides

LAYERS = ("original", "adversarial", "perturbation")
"""The layers that are pictures; the others are drawn from numbers."""

KEYS = (
    *("id", "attack", "true", "target", "predicted", "success", "size", "cell", *LAYERS, "magnification"),
    *("grid", "suppression", "promotion", "ratio", "kind", "norm", "full", "maps", "scale", "limit"),
)
"""What an item holds, see `item`."""

_DIGITS = 4  # of the numbers of a cell
_MAP_DIGITS = 6  # differences of maps are taken from these, and lose digits
_STOPS = 33  # of a colour map; linear between them it differs by less than 4 of 255 levels from the whole


def item(
    *,
    id: str,
    attack: str,
    true: str,
    target: str,
    predicted: str,
    success: bool,
    clean: ArrayLike,
    adversarial: ArrayLike,
    suppression: ArrayLike,
    promotion: ArrayLike,
    ratio: ArrayLike,
    kind: ArrayLike,
    norm: ArrayLike,
    maps: ArrayLike,
    cell: Cell,
) -> dict[str, Any]:
    """What the explorer needs of one picture under one attack, ready for JSON.

    Args:
        id: name of the picture.
        attack: name of the attack.
        true: name of the true class t₀.
        target: name of the target t.
        predicted: name of the class that the network gives the adversarial picture.
        success: whether the target was reached.
        clean: x₀, [H,W,3] or [H,W,1], in [0, 1].
        adversarial: x′, as `clean`.
        suppression: s, [gh,gw], as many as cells tile the picture.
        promotion: p, [gh,gw].
        ratio: log2(p / s), [gh,gw]; infinite where s or p is 0, NaN where both are.
        kind: [gh,gw] codes, the positions in `plots.KINDS`.
        norm: the norm of the perturbation in the cell, [gh,gw].
        maps: F(x₀, t₀), F(x′, t₀), F(x₀, t), F(x′, t), [4,h,w].
        cell: side of a cell in pixels, or its height and width.

    Returns:
        `KEYS`: names as given; `size` [H, W] and `cell`, height and width; `original`, `adversarial` and
        `perturbation` as data URLs, the last multiplied by `magnification` around mid grey; `grid` [gh, gw] and the
        numbers of the cells row by row to four digits, infinities as "inf" and "-inf", NaN as None; `full`, the
        strength s + p from which a cell is drawn with full opacity; `maps` four lists of rows to six digits, `scale`
        the ends of their one colour scale; `limit` the end of that of the two differences, which is symmetric around 0.

    Raises:
        ValueError: a shape or a code does not fit, or a picture or a map is not finite.
    """
    before, after = _picture(clean, "clean"), _picture(adversarial, "adversarial")
    if before.shape != after.shape:
        raise ValueError(f"clean has shape {before.shape}, adversarial {after.shape}; expected the same")
    height, width = before.shape[:2]
    tall, wide = sides(cell)
    if min(tall, wide) < 1:
        raise ValueError(f"cell is {cell}, expected at least 1 pixel")
    grid = (math.ceil(height / tall), math.ceil(width / wide))
    cells = {"suppression": suppression, "promotion": promotion, "ratio": ratio, "norm": norm}
    cells = {name: np.asarray(values, np.float64) for name, values in cells.items()}
    codes = np.asarray(kind)
    for name, values in {**cells, "kind": codes}.items():
        if values.shape != grid:
            raise ValueError(
                f"{name} has shape {values.shape}, expected {grid} for cells of {cell} px in a picture of "
                f"{height} x {width}"
            )
    if not np.isin(codes, range(len(plots.KINDS))).all():
        raise ValueError(f"kind holds the codes {np.unique(codes).tolist()}, expected 0 to {len(plots.KINDS) - 1}")
    four = np.asarray(maps, np.float64)
    if four.ndim != 3 or four.shape[0] != 4 or 0 in four.shape or not np.isfinite(four).all():
        raise ValueError(f"maps has shape {four.shape}, expected [4,h,w] of finite numbers")

    delta = after - before
    factor = plots.magnification(delta)
    low, high = float(four.min()), float(four.max())
    if low == high:  # constant maps: any range does, as long as it is one
        low, high = low - 0.5, high + 0.5
    limit = max(float(np.abs(four[0] - four[1]).max()), float(np.abs(four[3] - four[2]).max())) or 1.0
    return {
        "id": str(id),
        "attack": str(attack),
        "true": str(true),
        "target": str(target),
        "predicted": str(predicted),
        "success": bool(success),
        "size": [height, width],
        "cell": [tall, wide],
        "original": png_url(before),
        "adversarial": png_url(after),
        "perturbation": png_url(0.5 + factor * delta),
        "magnification": factor,
        "grid": list(grid),
        **{name: _numbers(values, _DIGITS) for name, values in cells.items()},
        "kind": codes.astype(int).ravel().tolist(),
        "full": plots.full_strength(codes, cells["suppression"] + cells["promotion"]),
        "maps": [[_numbers(row, _MAP_DIGITS) for row in values] for values in four],
        "scale": [low, high],
        "limit": limit,
    }


def png_url(picture: ArrayLike) -> str:
    """A picture [H,W,3] or [H,W,1] as a data URL: clipped to [0, 1] and rounded to 256 levels."""
    levels = np.rint(np.clip(np.asarray(picture, np.float64), 0.0, 1.0) * 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels).save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def pieces(items: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """What the page embeds for items, one after the other; nothing of an item is kept but digests of its pictures.

    Args:
        items: as `item` gives them.

    Returns:
        Of every item the pictures that have not come before, {"json": text}, then the item itself, {"json": text,
        "id": ..., "attack": ...}. The item names its pictures by their position among all that came. An original that
        several attacks share is therefore embedded once, and so is what a failed attack left unchanged.

    Raises:
        ValueError: an item lacks a key.
    """
    places: dict[bytes, int] = {}
    for index, each in enumerate(items):
        missing = [key for key in KEYS if key not in each]
        if missing:
            raise ValueError(f"explorer[{index}] lacks {', '.join(missing)}; expected {', '.join(KEYS)}")
        embedded = {key: each[key] for key in KEYS}
        for layer in LAYERS:
            digest = hashlib.sha256(each[layer].encode()).digest()
            if digest not in places:
                places[digest] = len(places)
                yield {"json": as_json(each[layer])}
            embedded[layer] = places[digest]
        yield {"json": as_json(embedded), "id": each["id"], "attack": each["attack"]}


def as_json(value: Any) -> str:
    """JSON that may stand inside a script element: no text in it can end the element or begin a comment."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def colours() -> dict[str, Sequence[str]]:
    """Stops of the colour maps that the figures have too: "maps" from low to high, "differences" around zero."""
    names = {"maps": plots.MAP_COLOURS, "differences": plots.DIFFERENCE_COLOURS}
    stops = np.linspace(0.0, 1.0, _STOPS)
    return {key: [to_hex(matplotlib.colormaps[name](x)) for x in stops] for key, name in names.items()}


def _picture(values: ArrayLike, name: str) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 3 or array.shape[-1] not in (1, 3) or 0 in array.shape or not np.isfinite(array).all():
        raise ValueError(f"{name} has shape {array.shape}, expected [H,W,3] or [H,W,1] of finite numbers")
    return array


def _numbers(values: np.ndarray, digits: int) -> list[float | str | None]:
    """Rounded to significant digits; JSON has neither infinities nor NaN."""
    rounded = (float(f"{value:.{digits}g}") for value in values.ravel().tolist())
    return [None if math.isnan(x) else x if math.isfinite(x) else str(x) for x in rounded]
