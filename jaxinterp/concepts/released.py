"""A tally.csv, ours or a published one, and the numbers of detectors that follow from it."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from jaxinterp.concepts.tables import report_lines, reported
from jaxinterp.dissect import MINIMUM, Best

_UNION = "union"


@dataclasses.dataclass(frozen=True, eq=False)
class Released:
    """The best concept of every unit in every category, as a tally.csv lists them.

    Attributes:
        path: the file.
        categories: names, in the order of the columns.
        units: int [U], numbers of the units, as in the file.
        best: labels are numbered within their category, in the order in which they occur.
        union: the rule of the union, where the file says so; published ones do not.
    """

    path: str
    categories: tuple[str, ...]
    units: np.ndarray
    best: Best
    union: str | None

    def lines(self, minimum: float = MINIMUM) -> Iterator[str]:
        """Detectors and concepts under both conventions, as text."""
        if not 0 <= minimum < 1:
            raise ValueError(f"--minimum: expected an IoU from 0 to below 1, got {minimum}")
        how = f"IoU > {minimum:g}, union={self.union or 'not stated in the file'}"
        yield f"{self.path}: {len(self.units)} units, categories {', '.join(self.categories)}"
        yield from report_lines(reported(self.best, self.categories, minimum), how, len(self.units))


def read_released(path: str | os.PathLike[str]) -> Released:
    """Reads a tally.csv: the columns unit, and CAT-label and CAT-iou for every category CAT. Others are not needed.

    Raises:
        ValueError: the file lacks columns or rows, names a unit twice, or has an IoU that is no number from 0 to 1;
            the message names the line.
        OSError: the file cannot be opened.
    """
    path = os.fspath(path)
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; expected a tally.csv")
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            table = csv.DictReader(file)
            columns = [name.strip() for name in table.fieldnames or ()]
            table.fieldnames = columns
            rows = list(table)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no table of text ({error}); expected a tally.csv") from error
    categories = tuple(name.removesuffix("-iou") for name in columns if name.endswith("-iou"))
    missing = [name for name in ("unit", *(f"{category}-label" for category in categories)) if name not in columns]
    if missing or not categories:
        lacking = ", ".join(missing) or "CAT-iou for any category CAT"
        raise ValueError(f"{path} is no tally.csv: it lacks the columns {lacking}")
    if not rows:
        raise ValueError(f"{path} has no row")
    units = np.zeros(len(rows), np.int64)
    label, value = np.zeros((2, len(rows), len(categories)))
    numbers: list[dict[str, int]] = [{} for _ in categories]
    seen: dict[int, int] = {}
    for i, row in enumerate(rows):
        where = f"{path} line {i + 2}"
        units[i] = _unit(row["unit"], where)
        if units[i] in seen:
            raise ValueError(f"{where}: unit {units[i]} is also on line {seen[units[i]]}")
        seen[units[i]] = i + 2
        for c, category in enumerate(categories):
            value[i, c] = _share(row, f"{category}-iou", where)
            if value[i, c] > 0:
                label[i, c] = numbers[c].setdefault(row[f"{category}-label"], len(numbers[c]) + 1)
    unions = {row[_UNION] for row in rows} if _UNION in columns else set()
    return Released(
        path, categories, units, Best(label.astype(np.int64), value), unions.pop() if len(unions) == 1 else None
    )


def _unit(text: str | None, where: str) -> int:
    try:
        return int(text or "")
    except ValueError:
        raise ValueError(f"{where}: unit: expected a number, got {text!r}") from None


def _share(row: Mapping[str, str | None], column: str, where: str) -> float:
    """A number from 0 to 1; an empty cell is 0."""
    text = row[column]
    try:
        value = float(text) if text else 0.0 if text == "" else math.nan
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise ValueError(f"{where}: {column}: expected a number from 0 to 1, got {text!r}")
    return value
