"""Every inconsistency of a folder in Broden's format: between its tables, and between them and the pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable

import numpy as np
from PIL import Image, UnidentifiedImageError

from jaxinterp.data import DamagedImage
from jaxinterp.data.batches import read_ahead
from jaxinterp.data.broden import label_map
from jaxinterp.data.broden_tables import (
    META,
    Category,
    Coded,
    Label,
    Row,
    columns,
    read_categories,
    read_codes,
    read_index,
    read_labels,
)
from jaxinterp.data.decode import decode_pixels

from .tables import Counts

_SPLITS = ("train", "val", "test")
_ROUNDED = 1e-6  # coverage in label.csv has six digits after the point


@dataclasses.dataclass(frozen=True)
class Checked:
    """What was found.

    Attributes:
        errors: what is wrong, in the order of the files.
        notes: what is odd, but harmless.
        summary: what the folder has, in a line.
    """

    errors: list[str]
    notes: list[str]
    summary: str


@dataclasses.dataclass
class _Found:
    """What the files of one line of index.csv, or of all, have in them."""

    errors: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    counts: Counts = dataclasses.field(default_factory=Counts)
    unread: set[str] = dataclasses.field(default_factory=set)  # categories with a label map that cannot be read
    misnamed: list[str] = dataclasses.field(default_factory=list)  # files whose suffix is not their format


def check(
    directory: str | os.PathLike[str],
    *,
    tolerance: float = 0.0,
    progress: Callable[[int, int], object] | None = None,
) -> Checked:
    """Reads everything in the folder.

    Args:
        directory: the folder.
        tolerance: by how much, relative to it, a frequency or coverage in the tables may differ from what is counted
            in the files. The published sets need some: theirs were counted before label maps were scaled down. A
            frequency may differ by 1, and a coverage by the area of one image, beyond that where this is not 0.
        progress: is told how many lines of index.csv are checked and how many there are.

    Raises:
        ValueError: no such folder, or a negative tolerance.
    """
    folder = os.fspath(directory)
    if not os.path.isdir(folder):
        raise ValueError(f"no such folder: {folder}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance: expected a number in [0, 1), got {tolerance}")
    found = _Found()
    labels = read_labels(folder, found.errors.append)
    categories = read_categories(folder, found.errors.append)
    codes = {category: read_codes(folder, category, found.errors.append) for category in categories}
    header = columns(folder)
    present = [category for category in categories if category in header]
    rows = read_index(folder, present, labels, found.errors.append, found.notes.append)
    _check_columns(header, list(categories), found)
    _check_tables(labels, categories, codes, found)
    _check_sizes(rows, found)
    _check_splits(rows, found)
    _check_strays(folder, categories, found)

    def files(i: int) -> _Found:
        return _check_files(folder, rows[i], labels, codes)

    with contextlib.closing(read_ahead(files, range(len(rows)))) as reading:
        for done, future in enumerate(reading, 1):
            own = future.result()
            found.errors += own.errors
            found.notes += own.notes
            found.counts.merge(own.counts)
            found.unread |= own.unread
            found.misnamed += own.misnamed
            if progress is not None:
                progress(done, len(rows))
    area = rows[0].label_size[0] * rows[0].label_size[1] if rows else 1
    _check_counts(labels, codes, found, area, tolerance)
    if found.misnamed:
        many = f"{len(found.misnamed)} files have a format that their names do not say"
        found.notes.append(f"{many}, such as images/{found.misnamed[0]}")
    _note_unlisted(folder, rows, found)
    summary = f"{len(rows)} images, {len(labels)} labels in {len(categories)} categories: " + ", ".join(
        f"{category} {len(coded)}" for category, coded in codes.items()
    )
    return Checked(found.errors, found.notes, summary)


def _check_columns(header: tuple[str, ...], categories: list[str], found: _Found) -> None:
    own = [column for column in header if column not in META]
    if header and sorted(own) != sorted(categories):
        for column in own:
            if column not in categories:
                found.errors.append(f"index.csv line 1: the column {column!r} is no category of category.csv")
        for category in categories:
            if category not in own:
                found.errors.append(f"index.csv line 1: the category {category!r} has no column")
    elif own != categories:
        found.notes.append(f"index.csv has the columns {','.join(own)}, not in the order of category.csv")


def _check_tables(
    labels: dict[int, Label], categories: dict[str, Category], codes: dict[str, dict[int, Coded]], found: _Found
) -> None:
    """What category.csv, label.csv and every c_CAT.csv say about each other."""
    for category, coded in codes.items():
        file = f"c_{category}.csv"
        for number, entry in coded.items():
            where = f"{file} line {entry.line}: label number {number}"
            label = labels.get(number)
            if label is None:
                found.errors.append(f"{where} has no row in label.csv")
            elif label.name != entry.name:
                found.errors.append(f"{where} is called {entry.name!r}, and {label.name!r} in label.csv")
            elif label.categories.get(category) != entry.frequency:
                stated = f"{category}({entry.frequency})"
                found.errors.append(f"label.csv line {label.line}: category: expected {stated}, as in {file}")
        own = sorted(entry.code for entry in coded.values())
        if own != list(range(1, len(own) + 1)):
            found.errors.append(f"{file}: codes: expected 1 to {len(own)}, got {own[:1]} to {own[-1:]}")
        line = categories[category]
        if not coded:
            found.errors.append(f"{file}: the category {category!r} has no labels")
            continue
        frequency = sum(entry.frequency for entry in coded.values())
        expected = Category(line.line, category, min(coded), max(coded), len(coded), frequency)
        for column in ("first", "last", "count", "frequency"):
            stated, right = getattr(line, column), getattr(expected, column)
            if stated != right:
                found.errors.append(
                    f"category.csv line {line.line}: {category}: {column}: expected {right}, as in {file}, got {stated}"
                )
    names: dict[str, int] = {}
    for number, label in labels.items():
        where = f"label.csv line {label.line}: label number {number}"
        for category in label.categories:
            if category not in categories:
                found.errors.append(f"{where}: category.csv has no category {category!r}")
            elif number not in codes[category]:
                found.errors.append(f"{where}: c_{category}.csv has no such label")
        if label.frequency != sum(label.categories.values()):
            total = sum(label.categories.values())
            found.errors.append(
                f"{where}: frequency: expected {total}, the sum over its categories, got {label.frequency}"
            )
        if label.name and names.setdefault(label.name, number) != number:
            found.notes.append(f"{where} has the name of label number {names[label.name]}: {label.name!r}")


def _check_sizes(rows: list[Row], found: _Found) -> None:
    for name, what in (("image_size", "ih, iw"), ("label_size", "sh, sw")):
        for row in rows:
            if getattr(row, name) != getattr(rows[0], name):
                expected, given = ("{} x {}".format(*getattr(one, name)) for one in (rows[0], row))
                found.errors.append(
                    f"index.csv line {row.line}: {what}: expected {expected} as on line {rows[0].line}, got {given}"
                )


def _check_splits(rows: list[Row], found: _Found) -> None:
    """Every image is in a split; names that are not the usual ones may be misspelt."""
    known: set[str] = set(_SPLITS)
    for row in rows:
        if not row.split:
            found.errors.append(f"index.csv line {row.line}: split: expected a name such as {_SPLITS[0]}, got none")
        elif row.split not in known:
            known.add(row.split)
            of = sum(other.split == row.split for other in rows)
            found.notes.append(
                f"index.csv line {row.line}: the split {row.split!r} ({of} images) is none of {', '.join(_SPLITS)}"
            )


def _check_strays(folder: str, categories: dict[str, Category], found: _Found) -> None:
    """Tables of labels whose category is not known, so that nothing reads them."""
    for name in sorted(os.listdir(folder)):
        if name.startswith("c_") and name.endswith(".csv") and name[2:-4] not in categories:
            found.errors.append(f"{name}: category.csv has no category {name[2:-4]!r}")


def _misnamed(folder: str, path: str) -> bool:
    """Whether a picture that can be read is of another format than its suffix says."""
    stated = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
    try:
        with Image.open(os.path.join(folder, "images", path), formats=[stated] if stated else []):
            return False
    except UnidentifiedImageError:
        return True


def _check_files(folder: str, row: Row, labels: dict[int, Label], codes: dict[str, dict[int, Coded]]) -> _Found:
    """The files of one line, and the labels in them."""
    found = _Found()
    where = f"index.csv line {row.line}"
    try:
        size = decode_pixels(os.path.join(folder, "images", row.image)).shape[:2]
        if _misnamed(folder, row.image):
            found.misnamed.append(row.image)
        if size != row.image_size:
            found.errors.append(f"{where}: images/{row.image}: {_wrong_size(row.image_size, size)}")
    except DamagedImage as error:
        found.errors.append(f"{where}: images/{row.image}: {error.reason}")
    if not any(row.files.values()) and not any(row.numbers.values()):
        found.notes.append(f"{where}: {row.image} has no label")
    for category in row.files:
        numbers = row.numbers[category]
        maps = []
        for path in row.files[category]:
            try:
                maps.append(_labels(folder, path, row, where, found))
            except DamagedImage as error:
                found.errors.append(f"{where}: images/{path}: {error.reason}")
                found.unread.add(category)
        if len(set(numbers)) < len(numbers) or len(set(row.files[category])) < len(row.files[category]):
            found.errors.append(f"{where}: {category}: the same label or file is there twice")
        own = Counts()
        own.add(category, maps, numbers, row.label_size[0] * row.label_size[1])
        for number in sorted(number for _, number in own.images):
            if number not in labels:
                found.errors.append(f"{where}: {category}: label number {number} has no row in label.csv")
            elif number not in codes[category]:
                name = labels[number].name
                found.errors.append(f"{where}: {category}: c_{category}.csv has no label number {number} ({name})")
        found.counts.merge(own)
    return found


def _labels(folder: str, path: str, row: Row, where: str, found: _Found) -> np.ndarray:
    numbers, blue = label_map(os.path.join(folder, "images", path))
    if numbers.shape != row.label_size:
        raise DamagedImage(path, _wrong_size(row.label_size, numbers.shape))
    if _misnamed(folder, path):
        found.misnamed.append(path)
    if blue:
        found.notes.append(f"{where}: images/{path} has blue in it, which stands for nothing")
    return numbers


def _wrong_size(expected: tuple[int, ...], got: tuple[int, ...]) -> str:
    return f"expected {expected[0]} x {expected[1]} pixels, as in index.csv, got {got[0]} x {got[1]}"


def _check_counts(
    labels: dict[int, Label], codes: dict[str, dict[int, Coded]], found: _Found, area: int, tolerance: float
) -> None:
    """Frequencies and coverages against what is in the files."""
    for category in sorted(found.unread):
        found.notes.append(f"{category}: label maps that cannot be read are missing in what is counted")
    beyond = 1 if tolerance else 0

    def compare(
        where: str, column: str, stated: int | float, counted: int | float, complete: bool, slack: int | float
    ) -> None:
        allowed = slack + tolerance * stated + beyond
        if counted - stated > allowed or (complete and stated - counted > allowed):
            found.errors.append(f"{where}: {column}: {stated:g} in the table, {counted:g} in the files")

    for category, coded in codes.items():
        complete = category not in found.unread
        for number, entry in coded.items():
            where = f"c_{category}.csv line {entry.line}: label number {number} ({entry.name})"
            images = found.counts.images[category, number]
            compare(where, "frequency", entry.frequency, images, complete, 0)
            covered = found.counts.pixels[category, number] / area
            compare(where, "coverage", entry.coverage, covered, complete, _ROUNDED)
            if not images and complete:
                found.notes.append(f"{where} is in no image")
    for number, label in labels.items():
        complete = found.unread.isdisjoint(label.categories)
        covered = sum(found.counts.pixels[category, number] for category in label.categories) / area
        where = f"label.csv line {label.line}: label number {number} ({label.name})"
        compare(where, "coverage", label.coverage, covered, complete, _ROUNDED)
        if not label.categories:
            found.notes.append(f"{where} is in no category")


def _note_unlisted(folder: str, rows: list[Row], found: _Found) -> None:
    used = {
        os.path.normpath(path)
        for row in rows
        for path in (row.image, *(p for part in row.files.values() for p in part))
    }
    root = os.path.join(folder, "images")
    there = {os.path.relpath(os.path.join(place, name), root) for place, _, names in os.walk(root) for name in names}
    unlisted = sorted(there - used)
    if unlisted:
        found.notes.append(f"{len(unlisted)} files in images are not in index.csv, such as {unlisted[0]}")
