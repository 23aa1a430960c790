"""One page of HTML that shows what was found, picture by picture.

The page is a single file: figures are inside it as base64 PNG, the styles too, and it fetches nothing. Only
where there are more figures than a browser opens at ease does it link to their files instead. It reads well
without JavaScript; with it, tables sort, pictures can be filtered by attack and outcome, and an explorer shows
the layers of a picture one over the other and the numbers of every cell. Figures and what the explorer shows are
read while the page is written, one at a time, so memory does not grow with their number.
"""

from __future__ import annotations

import base64
import itertools
import math
import numbers
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup
from PIL import Image

from jaxinterp import explorer as explore
from jaxinterp.effect import PAPER, Definition
from jaxinterp.runs import replacing

EMBEDDED = 24
"""Up to so many figures of pictures are inside the page; of more, none is."""

_KEYS = ("id", "attack", "true", "target", "success", "facts", "figure")


def write(
    path: str | os.PathLike,
    *,
    title: str,
    facts: Mapping[str, str],
    summary: Sequence[Mapping[str, Any]],
    summary_columns: Sequence[tuple[str, str, str]],
    pictures: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
    overview: Sequence[tuple[str, str | os.PathLike]] = (),
    skipped: Sequence[tuple[str, str]] = (),
    explorer: Iterable[Mapping[str, Any]] = (),
    definition: Definition = PAPER,
) -> Path:
    """Writes the page, whole or not at all.

    Everything is escaped: names of classes, files and attacks are text, whatever they contain.

    Args:
        path: where to write; missing folders are made, an existing file is replaced.
        title: heading of the page.
        facts: what was run (network, weights, attacks, cell, seed, versions), name -> text.
        summary: one row per attack (or whatever is compared), column key -> value.
        summary_columns: (key, heading, format) of the columns to show, in order. The format is a Python
            format specification such as ".3f" or ".0%", or "" for plain text. A value that is missing, None
            or NaN is shown as a dash; text is shown as it is.
        pictures: one mapping per picture and attack, in the order of the page: `id` the picture's name,
            `attack`, `true` and `target` the names of the classes, `success` whether the target was reached,
            `facts` name -> text or number, `figure` the path of a PNG. Up to `EMBEDDED` figures are inside the
            page; where there are more, it links to them by paths relative to its own.
        notes: paragraphs on how the numbers came about.
        overview: (caption, path of a PNG) of figures over all pictures, shown below the summary.
        skipped: (picture, reason) of pictures that were left out.
        explorer: what `jaxinterp.explorer.item` gives for pictures and attacks, in the order of the menus. They are
            asked for one at a time. Without any, the page has no explorer.
        definition: of the effects of cells, which the page explains.

    Returns:
        The path.

    Raises:
        ValueError: a picture or an item lacks a key, a figure is no PNG, or a format does not fit its value. Nothing is
            written.
        FileNotFoundError: a figure does not exist. Nothing is written.
    """
    seen: dict[str, int] = {}
    sections = []
    for index, picture in enumerate(pictures):
        missing = [key for key in _KEYS if key not in picture]
        if missing:
            raise ValueError(f"pictures[{index}] lacks {', '.join(missing)}; expected {', '.join(_KEYS)}")
        anchor = re.sub(r"[^a-z0-9]+", "-", f"{picture['attack']} {picture['id']}".lower()).strip("-")
        seen[anchor] = seen.get(anchor, 0) + 1
        sections.append(
            {
                **{key: picture[key] for key in _KEYS},
                "success": bool(picture["success"]),
                "facts": {key: _text(value) for key, value in picture["facts"].items()},
                "anchor": f"picture-{anchor}-{seen[anchor]}",
                "size": png_size(picture["figure"]),
            }
        )
    rows = [[_cell(row.get(key), spec, key) for key, _, spec in summary_columns] for row in summary]
    templates = environment()
    templates.filters["embed"] = _embed
    templates.filters["relative"] = lambda figure: _relative(figure, Path(path).parent)
    embedded = explore.pieces(explorer)
    first = next(embedded, None)
    page = templates.get_template("report.html").generate(
        title=title,
        facts={key: _text(value) for key, value in facts.items()},
        headings=[
            {"text": heading, "number": any(row[column]["sort"] is not None for row in rows)}
            for column, (_, heading, _) in enumerate(summary_columns)
        ],
        rows=rows,
        pictures=sections,
        attacks=list(dict.fromkeys(str(section["attack"]) for section in sections)),
        notes=list(notes),
        overview=[{"caption": caption, "figure": figure, "size": png_size(figure)} for caption, figure in overview],
        skipped=list(skipped),
        inside=len(sections) <= EMBEDDED,
        embedded=EMBEDDED,
        explored=itertools.chain((first,), embedded) if first else None,
        colours=explore.as_json(explore.colours()) if first else None,
        null=math.sqrt(0.3),
        definition=definition,
    )
    with replacing(path) as stream:
        for piece in page:
            stream.write(piece.encode())
    return Path(path)


def environment() -> jinja2.Environment:
    """The templates of this package. What they are given is escaped, unless it is marked as HTML."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("jaxinterp", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def png_size(path: str | os.PathLike) -> tuple[int, int]:
    """Width and height; the page reserves the room before a figure is decoded."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return picture.size
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a PNG") from error


def _embed(path: str | os.PathLike) -> Markup:
    return Markup("data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode("ascii"))


def _relative(path: str | os.PathLike, folder: Path) -> str:
    """A URL for a file, relative to the folder of the page."""
    return quote(Path(os.path.relpath(path, folder)).as_posix())


def _plain(value: Any) -> Any:
    """A Python value for a scalar of numpy or JAX."""
    return value.item() if hasattr(value, "item") else value


def _text(value: Any) -> str:
    value = _plain(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(value: Any, spec: str, key: str) -> dict[str, Any]:
    """Text of a cell, and the number to sort by where it has one."""
    value = _plain(value)
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not spec or math.isnan(value):
        text = _text(value)
    else:
        try:
            text = format(value, spec)
        except ValueError as error:
            raise ValueError(f"summary column {key!r}: {value!r} does not fit the format {spec!r}") from error
    return {
        "text": text,
        "sort": float(value) if number and not math.isnan(value) else None,
    }
