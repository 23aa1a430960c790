"""Folders in Broden's format as a source of segmented images.

Read as published: broden1_224, broden1_227, broden1_384, and whatever else has their tables, see `broden_tables`. All
label maps of an image are stacked, whatever their category: what category a label counts for follows from its number.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from jaxinterp.network import suggest

from .broden_tables import Coded, Label, Row, read_categories, read_codes, read_index, read_labels, refuse
from .decode import decode_pixels, decode_stored, resize_pixels
from .segmentation import Concepts, Segmented
from .source import DamagedImage, to_unit


class Broden:
    """The images of a folder in Broden's format, in the order of index.csv.

    An image's id is its path below images/. Its label maps come in the order of the categories and, within a cell, of
    the list; what an image has fewer of than another is filled up with 0, maps and whole-image labels alike.

    Attributes:
        directory: the folder.
        concepts: the labels by the numbers of label.csv. A label belongs to the chosen category in which its coverage
            is largest, the last one of equals; one that occurs in none of them has no category.
        ids: N ids.
        rows: N lines of index.csv, with the cells of the chosen categories.
        left_out: how many lines have no label in the chosen categories.
        image_size: (height, width) of the images.
        label_size: (height, width) of the label maps.
        channels: label maps of an image, the most that any has.
        scalars: whole-image labels of an image, the most that any has.
        strict: as given.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        categories: Sequence[str] | None = None,
        split: str | None = None,
        limit: int | None = None,
        image_size: int | None = None,
        strict: bool = False,
    ) -> None:
        """Reads the tables; no picture is opened yet.

        Args:
            directory: the folder.
            categories: which categories to use; None means all. Their order is that of category.csv.
            split: use only the lines of index.csv of this split, such as "val".
            limit: use only the first so many lines that are left.
            image_size: images are resized to a square of this side, where a network has another input size; label
                maps stay as they are, as they are compared with positions relative to the image.
            strict: an item that cannot be read raises ValueError, which ends a walk, not DamagedImage.

        Raises:
            TypeError: categories that are one text; a limit or a size that is no whole number.
            ValueError: a table is missing or malformed, images or label maps are of several sizes (file and line are
                named); an unknown category, or one without labels; an unknown split; no image is left.
        """
        self.directory, self.strict = os.fspath(directory), strict
        if not os.path.isdir(self.directory):
            raise ValueError(f"no such folder: {self.directory}")
        if isinstance(categories, str):
            raise TypeError(f"categories: expected several names, such as [{categories!r}], got one text")
        for name, value in (("limit", limit), ("image_size", image_size)):
            if value is not None and not isinstance(value, int | np.integer):
                raise TypeError(f"{name}: expected a whole number, got {value!r}")
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.labels = read_labels(self.directory, self._refuse)
        chosen = self._choose(list(read_categories(self.directory, self._refuse)), categories)
        codes = {category: read_codes(self.directory, category, self._refuse) for category in chosen}
        self.concepts = self._concepts(self.labels, codes)
        rows = read_index(self.directory, chosen, self.labels, self._refuse)
        labelled = [row for row in rows if any(row.files.values()) or any(row.numbers.values())]
        self.left_out = len(rows) - len(labelled)
        if split is not None:
            known = dict.fromkeys(row.split for row in rows)
            if split not in known:
                raise ValueError(f"split: index.csv has no {split!r}{suggest(split, known)}")
            labelled = [row for row in labelled if row.split == split]
        self.rows = tuple(labelled[:limit])
        if not self.rows:
            self._refuse(f"index.csv has no image with a label in {', '.join(chosen)}")
        self.ids = tuple(row.image for row in self.rows)
        self.label_size = self._size("label_size", "label maps")
        self.image_size = self._size("image_size", "images") if image_size is None else (image_size, image_size)
        self.channels = max(sum(map(len, row.files.values())) for row in self.rows)
        self.scalars = max(sum(map(len, row.numbers.values())) for row in self.rows)
        self._known = np.zeros(1 << 16, np.bool_)
        self._known[[0, *self.labels]] = True

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Segmented:
        """The item at `index`.

        Raises:
            DamagedImage: the image or a label map is missing or damaged, of another size than index.csv says, or has a
                label number that label.csv does not have. With `strict` a ValueError.
        """
        pixels, planes = self.read(index)
        return self.item(index, pixels, planes)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Decodes an item: pixels, uint8 [H,W,3], and its label maps, int16 [its own number,sh,sw]. Raises likewise."""
        row = self.rows[index]
        path = row.image
        try:
            pixels = decode_pixels(self._path(path))
            self._check_size(pixels, row.image_size)
            pixels = resize_pixels(pixels, self.image_size)
            planes = np.zeros((sum(map(len, row.files.values())), *self.label_size), np.int16)
            for i, path in enumerate(path for files in row.files.values() for path in files):
                planes[i] = self._plane(path)
        except DamagedImage as error:
            reason = f"index.csv line {row.line}, images/{path}: {error.reason}"
            if self.strict:
                raise ValueError(f"{self.directory}: {reason}") from error
            raise DamagedImage(row.image, reason) from error
        return pixels, planes

    def item(self, index: int, pixels: np.ndarray, planes: np.ndarray) -> Segmented:
        """The item of what `read` has decoded: images in [0, 1], label maps and whole-image labels filled up."""
        stacked = np.zeros((self.channels, *self.label_size), np.int16)
        stacked[: len(planes)] = planes
        numbers = [number for part in self.rows[index].numbers.values() for number in part]
        scalars = np.zeros(self.scalars, np.int16)
        scalars[: len(numbers)] = numbers
        return Segmented(to_unit(pixels), stacked, scalars, self.ids[index])

    def _plane(self, path: str) -> np.ndarray:
        numbers, _ = label_map(self._path(path))
        self._check_size(numbers, self.label_size)
        known = self._known[numbers]
        if not known.all():
            number = numbers[~known][0]
            raise DamagedImage(path, f"label number {number} has no row in label.csv")
        return numbers.astype(np.int16)

    @staticmethod
    def _check_size(pixels: np.ndarray, size: tuple[int, int]) -> None:
        if pixels.shape[:2] != size:
            found = f"{pixels.shape[0]} x {pixels.shape[1]}"
            raise DamagedImage("", f"expected {size[0]} x {size[1]} pixels, as in index.csv, got {found}")

    def _path(self, path: str) -> str:
        return os.path.join(self.directory, "images", path)

    def _refuse(self, problem: str) -> None:
        refuse(f"{self.directory}: {problem}")

    def _choose(self, known: list[str], wanted: Sequence[str] | None) -> list[str]:
        if not known:
            self._refuse("category.csv has no categories")
        for name in wanted or ():
            if name not in known:
                raise ValueError(f"categories: {self.directory} has no {name!r}{suggest(name, known)}")
        if wanted is not None and (not wanted or len(set(wanted)) < len(wanted)):
            raise ValueError(f"categories: expected different names, got {list(wanted)}")
        return known if wanted is None else [name for name in known if name in wanted]

    def _concepts(self, labels: dict[int, Label], codes: dict[str, dict[int, Coded]]) -> Concepts:
        for category, coded in codes.items():
            if not coded:
                self._refuse(f"c_{category}.csv: the category {category!r} has no labels")
            for number, found in coded.items():
                if number not in labels:
                    self._refuse(f"c_{category}.csv line {found.line}: label number {number} has no row in label.csv")
        names = [""] * (max(labels) + 1)
        for number, label in labels.items():
            names[number] = label.name
        return Concepts(tuple(names), tuple(codes), primary_categories(len(names), list(codes.values())))

    def _size(self, name: str, what: str) -> tuple[int, int]:
        first: Row = self.rows[0]
        size = getattr(first, name)
        for row in self.rows:
            if getattr(row, name) != size:
                found = "{} x {}".format(*getattr(row, name))
                self._refuse(
                    f"index.csv line {row.line}: expected {what} of {size[0]} x {size[1]} as on line"
                    f" {first.line}, got {found}"
                )
        return size


def primary_categories(count: int, codes: Sequence[dict[int, Coded]]) -> np.ndarray:
    """The category that each label counts for: that of its largest coverage, the last of equals; -1 = none.

    Args:
        count: labels, with label 0.
        codes: for each category its labels by number.

    Returns:
        int32 [count].
    """
    result = np.full(count, -1, np.int32)
    largest = np.zeros(count)
    for index, coded in enumerate(codes):
        for number, label in coded.items():
            if label.coverage >= largest[number]:
                result[number], largest[number] = index, label.coverage
    return result


_DEPTH = 24
"""Where a PNG states its bits: behind 8 bytes of signature, length and name of its first part, width and height."""


def label_map(path: str) -> tuple[np.ndarray, bool]:
    """Reads a PNG of label numbers.

    Returns:
        int32 [H,W], R + 256 G; and whether there is any blue, which stands for nothing.

    Raises:
        DamagedImage: it cannot be read, or is no PNG of 8-bit RGB.
    """
    stored, kind = decode_stored(path)
    channels = stored.shape[2] if stored.ndim == 3 else 1
    if kind != "PNG" or channels < 3 or stored.dtype != np.uint8:
        raise DamagedImage(path, f"expected a PNG of 8-bit RGB, got {kind} of {stored.dtype} x {channels}")
    with open(path, "rb") as file:
        depth = file.read(_DEPTH + 1)[_DEPTH]
    if depth != 8:  # of 16 bits, the upper 8 would arrive here
        raise DamagedImage(path, f"expected a PNG of 8-bit RGB, got PNG of {depth}-bit x {channels}")
    return stored[..., 0].astype(np.int32) + 256 * stored[..., 1].astype(np.int32), bool(stored[..., 2].any())
