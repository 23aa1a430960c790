"""How often labels occur in a Broden folder, and the tables that say so; see `jaxinterp.data.broden_tables`."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jaxinterp.data.broden_tables import META, Row


class Counts:
    """In how many images the labels of a category occur, and on how many pixels of the label maps.

    Attributes:
        images: by category and label number, the number of images.
        pixels: likewise the number of pixels; a whole-image label counts for all of an image, and a pixel that has a
            label in two maps counts twice.
    """

    def __init__(self) -> None:
        self.images: Counter[tuple[str, int]] = Counter()
        self.pixels: Counter[tuple[str, int]] = Counter()

    def add(self, category: str, maps: Iterable[np.ndarray], numbers: Iterable[int], area: int) -> None:
        """Counts the label maps and the whole-image labels of one category of one image.

        Args:
            category: the category.
            maps: its label maps, integers [sh,sw].
            numbers: its whole-image labels.
            area: sh x sw.
        """
        here: Counter[int] = Counter()
        for labels in maps:
            found, pixels = np.unique(labels, return_counts=True)
            here.update(dict(zip(found.tolist(), pixels.tolist(), strict=True)))
        here.update(dict.fromkeys(set(numbers), area))
        del here[0]
        self.images.update((category, number) for number in here)
        self.pixels.update({(category, number): pixels for number, pixels in here.items()})

    def merge(self, other: Counts) -> None:
        """Adds another's counts to these."""
        self.images.update(other.images)
        self.pixels.update(other.pixels)

    def categories(self) -> list[str]:
        """The categories that have a label, in the order of their lowest numbers."""
        first: dict[str, int] = {}
        for category, number in self.images:
            first[category] = min(number, first.get(category, number))
        return sorted(first, key=lambda category: (first[category], category))

    def labels(self, category: str) -> list[int]:
        """The labels of a category, most frequent first; those on more pixels come first among equals."""
        found = [number for other, number in self.images if other == category]
        return sorted(found, key=lambda n: (-self.images[category, n], -self.pixels[category, n], n))


def write_tables(folder: str, rows: Sequence[Row], names: Mapping[int, str], counts: Counts) -> None:
    """Writes index.csv, category.csv, label.csv and every c_CAT.csv.

    Args:
        folder: where to.
        rows: the lines of index.csv in order, all with label maps of one size.
        names: the names of all labels that occur.
        counts: of these rows.
    """
    area = rows[0].label_size[0] * rows[0].label_size[1]
    categories = counts.categories()
    _write(
        os.path.join(folder, "index.csv"),
        [*META, *categories],
        (
            [
                *(row.image, row.split, *row.image_size, *row.label_size),
                *(";".join([*row.files.get(c, ()), *map(str, row.numbers.get(c, ()))]) for c in categories),
            ]
            for row in rows
        ),
    )
    summary = []
    for category in categories:
        labels = counts.labels(category)
        frequency = sum(counts.images[category, number] for number in labels)
        summary.append([category, min(labels), max(labels), len(labels), frequency])
        _write(
            os.path.join(folder, f"c_{category}.csv"),
            ["code", "number", "name", "frequency", "coverage"],
            (
                [code, n, names[n], counts.images[category, n], repr(counts.pixels[category, n] / area)]
                for code, n in enumerate(labels, 1)
            ),
        )
    _write(os.path.join(folder, "category.csv"), ["name", "first", "last", "count", "frequency"], summary)
    lines = []
    for number in sorted({number for _, number in counts.images}):
        own = [category for category in categories if counts.images[category, number]]
        own.sort(key=lambda category: -counts.images[category, number])
        listed = ";".join(f"{category}({counts.images[category, number]})" for category in own)
        frequency = sum(counts.images[category, number] for category in own)
        pixels = sum(counts.pixels[category, number] for category in own)
        lines.append([number, names[number], listed, frequency, f"{pixels / area:f}", ""])
    _write(os.path.join(folder, "label.csv"), ["number", "name", "category", "frequency", "coverage", "syns"], lines)


def _write(path: str, header: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(lines)
