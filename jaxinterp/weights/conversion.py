"""From a file of weights to the parameters of a network: recipe, reader, number of classes, strict map."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxinterp import models
from jaxinterp.weights import checkpoint, files, names, recipes


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A file that was read, and how it maps to a network.

    Attributes:
        network: the network's name.
        classes: number of classes, read from the file (the network's own where the file lacks its last layer).
        file: the file.
        sha256: of the file.
        origin: package and licence, where the file came from a recipe's package; else empty.
        tensors: what the file holds, under its own names.
        rows: the mapping table (see `names.Row`).
    """

    network: str
    classes: int
    file: Path
    sha256: str
    origin: dict[str, Any]
    tensors: dict[str, np.ndarray]
    rows: list[names.Row]

    def params(self) -> dict[str, np.ndarray]:
        """The parameters, float32, in JAX's layouts.

        Raises:
            ValueError: tensors are missing, unexpected, misshapen or not finite; the message lists them.
        """
        layout, rename = _dialect(self.network)
        expected = models.shapes(self.network, self.classes)
        return names.map_tensors(
            self.tensors, expected, source=self.file.name, network=self.network, layout=layout, rename=rename
        )

    def notes(self) -> list[str]:
        """What was done to tensors beyond a change of layout, each kind once, with how many it concerns."""
        kinds: dict[str, int] = {}
        for row in self.rows:
            for note in filter(None, row.note.split("; ")):
                kinds[note] = kinds.get(note, 0) + 1
        return [f"{note} ({count} tensors)" for note, count in kinds.items()]


def prepare(name: str, file: str | os.PathLike[str] | None = None) -> Conversion:
    """Reads the weights of a network and lays out the map; nothing is converted or written yet.

    Args:
        name: the network, such as "resnet18".
        file: any file that `files.read` reads; None takes the one in the installed weight package.

    Raises:
        ValueError: unknown network; no package installed; a damaged file. What does not fit the network is in `rows`,
            and `Conversion.params` refuses it.
        OSError: the file cannot be read.
    """
    head, axis = head_of(name)
    origin: dict[str, Any] = {}
    if file is None:
        recipe = recipes.recipe(name)
        file = recipe.find()
        origin = {"package": recipe.install, "license": recipe.license}
    file = Path(file)
    if not file.exists():
        raise ValueError(f"no such file: {file}")
    tensors = files.read(file)
    layout, rename = _dialect(name)
    try:
        classes = names.classes_of(tensors, head, axis, source=file.name, layout=layout, rename=rename)
    except ValueError:  # another network's file: the rows say everything that is wrong with it
        classes = models.network(name).num_classes
    expected = models.shapes(name, classes)
    rows = names.plan(tensors, expected, network=name, layout=layout, rename=rename)
    return Conversion(name, classes, file, checkpoint.file_digest(file), origin, tensors, rows)


def head_of(name: str) -> tuple[str, int]:
    """The parameter of a network, and its axis, whose length is the number of classes.

    It is found by building the network's shapes for two numbers of classes, so it holds for every architecture.

    Raises:
        ValueError: unknown network.
    """
    own = models.network(name).num_classes
    return names.class_axis(models.shapes(name, own), models.shapes(name, own + 1))


def table(conversion: Conversion) -> Iterator[str]:
    """The mapping table as lines of text: tensor in the file, parameter, what is done or what is wrong."""
    body = [("tensor", "shape", "type", "parameter", "shape", "note")]
    for row in conversion.rows:
        body.append(
            (
                row.source or "-",
                _shape(row.source_shape),
                row.source_dtype or "-",
                row.name or "-",
                _shape(row.shape),
                row.problem.upper() or row.note,
            )
        )
    widths = [max(len(line[column]) for line in body) for column in range(6)]
    for line in body:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def _shape(shape: tuple[int, ...] | None) -> str:
    return "-" if shape is None else "x".join(map(str, shape)) or "scalar"


def _dialect(name: str) -> tuple[names.Layout, Any]:
    """Layout and names of the files that hold this network's weights: PyTorch's unless a recipe says otherwise."""
    recipe = recipes.RECIPES.get(name)
    return ("torch", None) if recipe is None else (recipe.layout, recipe.rename)
