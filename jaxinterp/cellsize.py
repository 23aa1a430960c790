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


CellSize = Annotated[
    int | tuple[int, int],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT|INTxINT",
        instance_from_str=lambda texts: parse(texts[0]),
        is_instance=lambda value: isinstance(value, int | tuple),
        str_from_instance=lambda value: [write(value)],
    ),
]
"""Type of an option: a side in pixels, as 14, or HEIGHTxWIDTH, as 14x28."""
