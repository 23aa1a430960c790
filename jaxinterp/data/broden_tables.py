"""The tables of a folder in Broden's format, with everything checked that does not take a picture.

    index.csv      image,split,ih,iw,sh,sw, then a column for every category
    category.csv   name,first,last,count,frequency
    label.csv      number,name,category,frequency,coverage,syns
    c_CAT.csv      code,number,name,frequency,coverage, of the labels that occur in the category CAT
    images/        what index.csv names

A cell of index.csv is empty or a list separated by ";". Digits are the number of a label that holds for the whole
image; anything else is a PNG of label numbers, R + 256 G, 0 = none. Frequencies are numbers of images, coverages are
sums of areas in units of a whole image. Those of a label in label.csv are the sums of those in all its categories, and
the frequency of a category in category.csv is the sum of those of its labels.

The format is that of Bau, Zhou, Khosla, Oliva, Torralba, "Network Dissection", CVPR 2017.

Every function here takes a `report` that is told of what is wrong, in words that name file and line. `refuse` ends the
reading at the first; a function that only collects lets it go on, without the line in question.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, NoReturn

from .segmentation import MOST_LABELS

META = ("image", "split", "ih", "iw", "sh", "sw")
"""The columns of index.csv that are no categories."""

Report = Callable[[str], object]


def refuse(problem: str) -> NoReturn:
    """The report that raises ValueError."""
    raise ValueError(problem)


class Category(NamedTuple):
    """A line of category.csv."""

    line: int
    name: str
    first: int
    last: int
    count: int
    frequency: int


class Label(NamedTuple):
    """A line of label.csv; `categories` gives the frequency in each category."""

    line: int
    number: int
    name: str
    categories: dict[str, int]
    frequency: int
    coverage: float


class Coded(NamedTuple):
    """A line of c_CAT.csv."""

    line: int
    code: int
    number: int
    name: str
    frequency: int
    coverage: float


class Row(NamedTuple):
    """A line of index.csv: for every category the files of label maps and the whole-image labels."""

    line: int
    image: str
    split: str
    image_size: tuple[int, int]
    label_size: tuple[int, int]
    files: dict[str, tuple[str, ...]]
    numbers: dict[str, tuple[int, ...]]


def read_categories(folder: str, report: Report) -> dict[str, Category]:
    """category.csv by name, in the order of the file."""
    found: dict[str, Category] = {}
    for line, cells in _table(os.path.join(folder, "category.csv"), Category._fields[1:], report):
        where, name = f"category.csv line {line}", cells["name"]
        numbers = [_integer(cells[column], f"{where}: {column}", report) for column in Category._fields[2:]]
        if not name or name in META or re.search(r'[/\\;"\0]', name) or name.startswith("."):
            report(f"{where}: {name!r} cannot be the name of a category")
        elif name in found:
            report(f"{where}: the category {name!r} is on line {found[name].line} already")
        elif None not in numbers:
            found[name] = Category(line, name, *numbers)  # type: ignore[arg-type]  # none is None
    return found


def read_labels(folder: str, report: Report) -> dict[int, Label]:
    """label.csv by number."""
    found: dict[int, Label] = {}
    for line, cells in _table(os.path.join(folder, "label.csv"), _LABEL, report):
        where = f"label.csv line {line}"
        number = _label_number(cells["number"], where, report)
        frequency = _integer(cells["frequency"], f"{where}: frequency", report)
        coverage = _real(cells["coverage"], f"{where}: coverage", report)
        categories: dict[str, int] = {}
        for part in filter(None, cells["category"].split(";")):
            match = re.fullmatch(r"([^()]+)\(([0-9]{1,15})\)", part)
            if match is None:
                report(f"{where}: category: expected a list such as material(36);object(3), got {cells['category']!r}")
            elif match[1] in categories:
                report(f"{where}: category: {match[1]} is there twice")
            else:
                categories[match[1]] = int(match[2])
        if number is None or frequency is None or coverage is None:
            continue
        if number in found:
            report(f"{where}: label number {number} is on line {found[number].line} already")
            continue
        if not cells["name"]:
            report(f"{where}: label {number} has no name")
        found[number] = Label(line, number, cells["name"], categories, frequency, coverage)
    return found


def read_codes(folder: str, category: str, report: Report) -> dict[int, Coded]:
    """c_CAT.csv by label number."""
    found: dict[int, Coded] = {}
    codes: dict[int, int] = {}
    file = f"c_{category}.csv"
    for line, cells in _table(os.path.join(folder, file), Coded._fields[1:], report):
        where = f"{file} line {line}"
        code = _integer(cells["code"], f"{where}: code", report)
        number = _label_number(cells["number"], where, report)
        frequency = _integer(cells["frequency"], f"{where}: frequency", report)
        coverage = _real(cells["coverage"], f"{where}: coverage", report)
        if code is None or number is None or frequency is None or coverage is None:
            continue
        if number in found:
            report(f"{where}: label number {number} is on line {found[number].line} already")
        elif codes.setdefault(code, line) != line:
            report(f"{where}: code {code} is on line {codes[code]} already")
        else:
            found[number] = Coded(line, code, number, cells["name"], frequency, coverage)
    return found


def read_index(
    folder: str, categories: Sequence[str], known: dict[int, Label], report: Report, note: Report = lambda oddity: None
) -> list[Row]:
    """index.csv, with the cells of `categories` only; whole-image labels have to be among the `known`.

    `note` is told of whole-image labels that are 0, which stand for nothing.
    """
    found: list[Row] = []
    lines: dict[str, int] = {}
    for line, cells in _table(os.path.join(folder, "index.csv"), (*META, *categories), report):
        where = f"index.csv line {line}"
        sizes = [_integer(cells[column], f"{where}: {column}", report, least=1) for column in META[2:]]
        image = cells["image"]
        files, numbers = {}, {}
        for category in categories:
            items = [item for item in cells[category].split(";") if item]
            files[category] = tuple(item for item in items if not item.isdecimal() or not item.isascii())
            if any(item.isdecimal() and item.isascii() and int(item) == 0 for item in items):
                note(f"{where}: {category}: the whole-image label 0 stands for nothing")
            numbers[category] = tuple(
                number
                for item in items
                if item.isdecimal() and item.isascii()
                if (number := _whole_image(item, f"{where}: {category}", known, report))
            )
        outside = [path for path in (image, *(path for part in files.values() for path in part)) if _leaves(path)]
        for path in outside:
            report(f"{where}: expected a path inside the folder images, got {path!r}")
        if outside or None in sizes:
            continue
        if lines.setdefault(image, line) != line:
            report(f"{where}: the image {image} is on line {lines[image]} already")
            continue
        ih, iw, sh, sw = (size or 0 for size in sizes)
        found.append(Row(line, image, cells["split"], (ih, iw), (sh, sw), files, numbers))
    return found


def columns(folder: str) -> tuple[str, ...]:
    """The names of the columns of index.csv; none where it cannot be read."""
    try:
        with open(os.path.join(folder, "index.csv"), encoding="utf-8-sig", newline="") as stream:
            return tuple(next(csv.reader(stream), ()))
    except (OSError, UnicodeDecodeError, csv.Error):
        return ()


_LABEL = ("number", "name", "category", "frequency", "coverage")


def _table(path: str, needed: Sequence[str], report: Report) -> Iterator[tuple[int, dict[str, str]]]:
    """The lines of a table that have the right number of cells, and the line of the file each begins at."""
    file = os.path.basename(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            text = stream.read()
    except FileNotFoundError:
        report(f"{file} is missing in {os.path.dirname(path)}")
        return
    except (OSError, UnicodeDecodeError) as error:
        report(f"{file} cannot be read ({error})")
        return
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        header = next(reader, [])
        missing = [column for column in needed if column not in header]
        if missing or len(set(header)) < len(header):
            what = f"the columns {', '.join(missing)} are missing" if missing else "a column is there twice"
            report(f"{file} line 1: {what}; expected {','.join(needed)}, got {','.join(header)}")
            return
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                report(f"{file} line {line}: expected {len(header)} cells, got {len(cells)}")
            elif cells:
                yield line, dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        report(f"{file} line {line}: {error}")


def _integer(text: str, what: str, report: Report, least: int = 0) -> int | None:
    if re.fullmatch("[0-9]{1,15}", text) and int(text) >= least:
        return int(text)
    report(f"{what}: expected a whole number{f' from {least}' if least else ''}, got {text!r}")
    return None


def _real(text: str, what: str, report: Report) -> float | None:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if 0 <= value < math.inf:
        return value
    report(f"{what}: expected a number, got {text!r}")
    return None


def _label_number(text: str, where: str, report: Report) -> int | None:
    number = _integer(text, f"{where}: number", report, least=1)
    if number is not None and number > MOST_LABELS:
        report(f"{where}: expected label numbers up to {MOST_LABELS}, which fit in 16 bits, got {number}")
        return None
    return number


def _whole_image(text: str, what: str, known: dict[int, Label], report: Report) -> int:
    number = _integer(text, what, report)
    if number and number not in known:
        report(f"{what}: label number {number} has no row in label.csv")
        return 0
    return number or 0


def _leaves(path: str) -> bool:
    """Whether a path is no path below a folder."""
    return not path or "\0" in path or "\\" in path or os.path.isabs(path) or ".." in path.split("/")
