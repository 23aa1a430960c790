"""Labels in writing: class indices and names, and files that list one label for each picture."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
"""Endings, in lower case, that mark a file as a picture."""


class Classes:
    """The classes of a network, found by index or by name."""

    def __init__(self, classes: int | Sequence[str]) -> None:
        """Takes the number of classes, or their names in the order of their indices."""
        names = () if isinstance(classes, int) else tuple(classes)
        self.count = classes if isinstance(classes, int) else len(names)
        if self.count < 1:
            raise ValueError(f"classes: expected a positive number or the names, got {classes!r}")
        self._exact = _positions(names)
        self._loose = _positions([_loose(name) for name in names])

    def index(self, text: str) -> int:
        """The class that `text` means: an index, a name, or a name in other case with '_' for spaces.

        Raises:
            ValueError: it means none, or more than one; the message gives the range.
        """
        text = text.strip()
        found = set(self._exact.get(text) or self._loose.get(_loose(text), ()))
        if re.fullmatch("[0-9]+", text) and int(text) < self.count:
            # Beside the names: where classes are called "1", "2", ... a number says too little.
            found.add(int(text))
        if len(found) == 1:
            return found.pop()
        if found:
            raise ValueError(f"the label {text!r} means any of the classes {sorted(found)}")
        expected = f"a class index in 0..{self.count - 1}" + (" or a class name" if self._exact else "")
        raise ValueError(f"the label {text!r} is not {expected}")


def _positions(names: Sequence[str]) -> dict[str, list[int]]:
    positions: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        positions.setdefault(name, []).append(index)
    return positions


def _loose(name: str) -> str:
    return name.replace("_", " ").strip().casefold()


class Entry(NamedTuple):
    """One line of a labels file, as written."""

    line: int
    file: str
    label: str


def read_labels(path: str, is_picture: Callable[[str], bool], classes: Classes) -> list[Entry]:
    """Reads a labels file: on each line a file name and a label, with or without a header.

    The columns are separated by commas (`.csv`, or commas on every line), tabs (`.tsv`, or tabs on every
    line) or spaces. In the first two, cells may be quoted. In the last, spaces may also be part of a file
    name or a label: the file is the longest beginning of the line that names a picture.

    Args:
        path: the labels file, UTF-8.
        is_picture: whether a text names a picture.
        classes: the classes that labels may mean; here they only tell a header from an entry.

    Returns:
        The entries, in the order of the file. Labels are not checked yet.

    Raises:
        ValueError: the file cannot be read, or a line does not have two columns.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            lines = stream.readlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"labels: cannot read {path}: {error}") from error

    separator = _separator(path, [line for line in lines if line.strip()])
    if separator:
        reader = csv.reader(lines, delimiter=separator, skipinitialspace=True)
        stripped = ((reader.line_num, [cell.strip() for cell in row]) for row in reader)
        try:
            rows = [(number, row) for number, row in stripped if any(row)]
        except csv.Error as error:  # a quote that is never closed makes one endless cell
            raise ValueError(f"labels: cannot read {path}, line {reader.line_num}: {error}") from error
    else:
        rows = [(i, _split(line.strip(), is_picture)) for i, line in enumerate(lines, 1) if line.strip()]

    entries = []
    for number, row in rows:
        if len(row) != 2:
            raise ValueError(f"{path}, line {number}: expected a file and a label, got {len(row)} columns")
        entries.append(Entry(number, *row))
    if entries and _is_header(entries[0], is_picture, classes):
        del entries[0]
    return entries


def _separator(path: str, lines: Sequence[str]) -> str | None:
    by_suffix = {".csv": ",", ".tsv": "\t"}.get(os.path.splitext(path)[1].lower())
    return by_suffix or next((mark for mark in "\t," if lines and all(mark in line for line in lines)), None)


def _split(line: str, is_picture: Callable[[str], bool]) -> list[str]:
    for gap in reversed(list(re.finditer(r"\s+", line))):
        if is_picture(line[: gap.start()]):
            return [line[: gap.start()], line[gap.end() :]]
    return line.rsplit(None, 1)


def _is_header(first: Entry, is_picture: Callable[[str], bool], classes: Classes) -> bool:
    if is_picture(first.file) or first.file.lower().endswith(SUFFIXES):
        return False
    try:
        classes.index(first.label)
    except ValueError:
        return True
    return False
