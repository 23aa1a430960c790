"""Sizes of cells on the command line, of commands and experiments alike."""

from __future__ import annotations

import re
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec


def parse(text: str) -> int | tuple[int, int]:
    """A cell's side or its height and width, in pixels, as `jaxinterp.effect` takes them.

    Raises:
        ValueError: neither of these.
    """
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text, re.ASCII)
    if match is None:
        raise ValueError(f"expected pixels, as 14, or HEIGHTxWIDTH, as 14x28, got {text!r}")
    height, width = int(match[1]), int(match[2] or match[1])
    return height if height == width else (height, width)


def write(cell: Any) -> str:
    """The text that `parse` takes for it."""
    return "x".join(map(str, cell)) if isinstance(cell, tuple) else str(cell)


def _option(default: tuple[type, ...], shown: str) -> PrimitiveConstructorSpec:
    """How the command line reads and shows a size, or a default of another type, which has no text of its own."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT|INTxINT",
        instance_from_str=lambda texts: parse(texts[0]),
        is_instance=lambda value: isinstance(value, (int, tuple, *default)),
        str_from_instance=lambda value: [shown if isinstance(value, default) else write(value)],
    )


CellSize = Annotated[int | tuple[int, int], _option((), "")]
"""Type of an option: a side in pixels, as 14, or HEIGHTxWIDTH, as 14x28."""

CellSizeOrPart = Annotated[int | tuple[int, int] | None, _option((type(None),), "SIZE/14")]
"""The same of one that is a fourteenth of the image, None, where it is not given."""
