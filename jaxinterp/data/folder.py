"""Folders and files as a source of labelled pictures.

Labels come from one of four places; `Folder.label_origin` says from which:

* a labels file, one "file label" for each picture (see `labels.read_labels`);
* the names of the class folders, as in `val/tench/x.jpg` or `val/0/x.jpg`;
* the file names, whose last number follows an underscore, as in `imagenet_07_609.jpg`;
* nowhere: then the label is -1, and the model's own prediction takes its place later.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from .decode import Crop, decode
from .labels import SUFFIXES, Classes, read_labels
from .source import UNKNOWN, DamagedImage, Example

_LABEL_FILES = ("labels.csv", "labels.txt")
_LAST_NUMBER = re.compile("_([0-9]+)$")
# A camera's IMG_0231 is no label, hence no leading zeros where nobody has said that names are labels.
_LAST_NUMBER_STRICT = re.compile("_(0|[1-9][0-9]*)$")


class Folder:
    """The pictures in some folders and files, with their labels.

    Sub-folders are searched too. Within a folder, pictures are those with a known suffix (.jpg .jpeg .png
    .bmp .gif .webp .tif .tiff, in any case); other files and those whose name begins with a dot are ignored.
    A file that is named itself may have any suffix. The order is that of the paths and, within a folder, the
    alphabetical one of relative paths. A picture that is reached twice counts once.

    Attributes:
        paths: absolute path of every picture.
        ids: path relative to the given folder, with "/", or the file name of a file given itself; preceded by
            as many parent folders as it takes to make it unique. Bytes that are not UTF-8 are
            written in hexadecimal.
        labels: int32 [N], -1 = unknown.
        label_origin: where the labels came from, in plain words.
        crop: as given.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        crop: Crop | None,
        labels: str | os.PathLike[str] = "auto",
        classes: int | Sequence[str],
    ) -> None:
        """Lists the pictures and their labels; no picture is opened yet.

        Args:
            paths: files and folders, or a single one.
            crop: how every picture is resized and cropped; None keeps its own size.
            labels: where labels come from.

                * "auto": for each given folder, and for the files given themselves, the first that applies: a
                  file `labels.csv` or `labels.txt` in the folder; class folders, where all pictures lie in
                  sub-folders and all of these are named after classes; file names, where all end in an
                  underscore and a class index without leading zeros; otherwise -1.
                * "names": the file names.
                * "predicted": none, all -1.
                * a path: that labels file. Its file names are relative to it or to a given folder.
            classes: the number of classes, or their names; both give the range of the labels, and names can
                also be used in their place.

        Raises:
            ValueError: a path that does not exist, a folder without pictures, a label that is no class, a
                picture that the labels file leaves out, or one that only the labels file knows.
        """
        given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        self.paths, roots = _find([os.fspath(path) for path in given])
        self.ids = _ids(self.paths, roots)
        self.crop = crop
        self.labels, self.label_origin = self._label(os.fspath(labels), roots, Classes(classes))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        name = self.ids[index]
        try:
            image = decode(self.paths[index], self.crop)
        except DamagedImage as error:
            raise DamagedImage(name, error.reason) from error
        return Example(image, int(self.labels[index]), name)

    def _label(self, labels: str, roots: Sequence[str], classes: Classes) -> tuple[np.ndarray, str]:
        if labels == "predicted":
            return np.full(len(self), UNKNOWN, np.int32), "predicted by the model"
        if labels == "names":
            return np.array(_from_names(self.paths, classes), np.int32), "the last number in each file name"
        if labels != "auto":
            if not os.path.isfile(labels):
                known = "'auto', 'names', 'predicted' or a labels file"
                raise ValueError(f"labels: no such file: {labels!r}; expected {known}")
            found = _from_file(labels, self.paths, [root for root in dict.fromkeys(roots) if root], classes)
            return np.array(found, np.int32), f"the labels file {as_text(labels)}"

        result = np.full(len(self), UNKNOWN, np.int32)
        origins = []
        for root in dict.fromkeys(roots):
            members = [i for i, other in enumerate(roots) if other == root]
            result[members], origin = _auto(root, [self.paths[i] for i in members], classes)
            origins.append(origin)
        return result, "; ".join(dict.fromkeys(origins))


# Finding pictures


def _find(given: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Absolute paths of all pictures, and for each the folder it was found in ("" = the file was named)."""
    if not given:
        raise ValueError("paths: expected at least one file or folder")
    missing = [path for path in given if not os.path.exists(path)]
    if missing:
        raise ValueError(f"paths: no such file or folder: {some(missing)}")
    found: dict[str, str] = {}
    for path in given:
        top = os.path.abspath(path)
        if not os.path.isdir(top):
            found.setdefault(top, "")
            continue
        pictures = sorted(_walk(top, frozenset()), key=lambda picture: _relative(picture, top))
        if not pictures:
            raise ValueError(f"paths: no pictures ({' '.join(SUFFIXES)}) in the folder {path}")
        for picture in pictures:
            found.setdefault(picture, top)
    return tuple(found), list(found.values())


def _walk(folder: str, above: frozenset[str]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:  # a link back to a folder that we are in
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, above | {real})
            # A dangling link is a picture that cannot be read, not one that does not exist.
            elif entry.name.lower().endswith(SUFFIXES) and (entry.is_file() or entry.is_symlink()):
                yield entry.path


def _relative(path: str, root: str) -> str:
    """`path` below `root` in posix form, or its file name where there is no root."""
    return os.path.relpath(path, root).replace(os.sep, "/") if root else os.path.basename(path)


def _ids(paths: Sequence[str], roots: Sequence[str]) -> tuple[str, ...]:
    parts = [path.replace(os.sep, "/").split("/") for path in paths]
    depths = [_relative(path, root).count("/") + 1 for path, root in zip(paths, roots, strict=True)]
    while True:
        owners: dict[str, list[int]] = {}
        for i, (names, depth) in enumerate(zip(parts, depths, strict=True)):
            owners.setdefault(as_text("/".join(names[-depth:])), []).append(i)
        shared = [i for group in owners.values() if len(group) > 1 for i in group]
        if not shared:
            return tuple(owners)
        if all(depths[i] > len(parts[i]) for i in shared):  # only where one name spells out the bytes of another
            raise ValueError(f"paths: these cannot be told apart: {some(as_text(paths[i]) for i in shared)}")
        for i in shared:
            depths[i] += 1


def as_text(path: str) -> str:
    """A path that can be written and printed: file systems allow names that are not UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first few names, and how many there are beyond."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


# Finding labels


def _auto(root: str, paths: Sequence[str], classes: Classes) -> tuple[list[int], str]:
    """The labels of one folder's pictures, or of the files named themselves, and where they came from."""
    files = [path for name in _LABEL_FILES if root and os.path.isfile(path := os.path.join(root, name))]
    if len(files) > 1:
        raise ValueError(f"labels: found both {' and '.join(files)}; say which one to use")
    if files:
        return _from_file(files[0], paths, [root], classes), f"the labels file {as_text(files[0])}"
    labels = _from_class_folders(root, paths, classes) if root else [UNKNOWN] * len(paths)
    if UNKNOWN not in labels:
        return labels, "the names of the class folders"
    if all(_LAST_NUMBER_STRICT.search(_stem(path)) for path in paths):
        try:
            return _from_names(paths, classes), "the last number in each file name"
        except ValueError:
            pass  # a number out of range: these are no labels
    outside = [path for path, label in zip(paths, labels, strict=True) if label == UNKNOWN]
    why = ", since no labels were found"
    if len(outside) < len(paths):
        names = some((as_text(_relative(path, root)) for path in outside), 1)
        why = f": the names of the class folders are not used, since pictures lie outside of them: {names}"
    return [UNKNOWN] * len(paths), f"predicted by the model{why}"


def _from_class_folders(root: str, paths: Sequence[str], classes: Classes) -> list[int]:
    """The label of every picture; -1 where it lies in no class folder."""
    folders = [_relative(path, root).rpartition("/")[0].partition("/")[0] for path in paths]
    labels: dict[str, int] = {}
    for name in set(folders):
        try:
            labels[name] = classes.index(name) if name else UNKNOWN
        except ValueError:
            labels[name] = UNKNOWN
    return [labels[name] for name in folders]


def _from_names(paths: Sequence[str], classes: Classes) -> list[int]:
    labels = []
    for path in paths:
        match = _LAST_NUMBER.search(_stem(path))
        if match is None or int(match[1]) >= classes.count:
            given = "no number after an underscore at its end" if match is None else f"the label {match[1]}"
            expected = f"a class index in 0..{classes.count - 1}"
            raise ValueError(f"labels: {os.path.basename(path)} has {given}; expected {expected}")
        labels.append(int(match[1]))
    return labels


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _from_file(file: str, paths: Sequence[str], roots: Sequence[str], classes: Classes) -> list[int]:
    position = {path: i for i, path in enumerate(paths)}
    same_name: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        same_name.setdefault(os.path.basename(path), []).append(i)
    home = os.path.dirname(os.path.abspath(file))

    def candidates(name: str) -> list[str]:
        return [os.path.abspath(os.path.join(base, name)) for base in (home, *roots)]

    def find(name: str) -> list[int]:
        """What `name` may mean: relative to the labels file, else to a root, else by file name."""
        beside, *below = candidates(name)
        if beside in position:
            return [position[beside]]
        return [position[path] for path in below if path in position] or same_name.get(name, [])

    entries = read_labels(file, lambda name: bool(find(name)), classes)
    labels: dict[int, int] = {}
    unknown = []
    for line, name, text in entries:
        found = find(name)
        if not found:
            # A list may cover more pictures than were asked for, but not pictures that do not exist.
            if not any(map(os.path.isfile, candidates(name))):
                unknown.append(name)
            continue
        where = f"{file}, line {line}: {name}"
        if len(found) > 1:
            raise ValueError(f"{where} is the name of several pictures: {some(paths[i] for i in found)}")
        try:
            label = classes.index(text)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if labels.setdefault(found[0], label) != label:
            raise ValueError(f"{where} has the label {label}, and {labels[found[0]]} on a line before")
    if unknown:
        raise ValueError(f"{file} names pictures that do not exist: {some(unknown)}")
    left_out = [path for i, path in enumerate(paths) if i not in labels]
    if left_out:
        raise ValueError(f"{file} has no label for {some(left_out)}")
    return [labels[i] for i in range(len(paths))]
