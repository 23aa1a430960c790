"""Labelled pictures that a package registry delivers: the samples inside foolbox's wheel, twenty a data set.

They are read where they are installed, without importing foolbox.
"""

from __future__ import annotations

import importlib.util
import os

from .decode import Crop
from .folder import Folder

CLASSES = {"imagenet": 1000, "cifar10": 10, "cifar100": 100, "mnist": 10, "fashionMNIST": 10}
"""The data sets, and how many classes each has."""


def samples(dataset: str = "imagenet", *, crop: Crop | None) -> Folder:
    """The twenty sample pictures of a data set, with their true labels.

    Args:
        dataset: imagenet (RGB, of several sizes), cifar10, cifar100 (32 x 32), mnist or fashionMNIST (28 x
            28, grey, returned as three equal channels).
        crop: how every picture is resized and cropped; None keeps its own size.

    Returns:
        The pictures in the order of their numbers; an id is the file name.

    Raises:
        ValueError: an unknown data set, or foolbox is not installed.
    """
    if dataset not in CLASSES:
        raise ValueError(f"dataset: expected one of {', '.join(CLASSES)}, got {dataset!r}")
    # find_spec only locates a top-level package. Importing it would load whole frameworks.
    spec = importlib.util.find_spec("foolbox")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    files = [
        os.path.join(place, "data", name)
        for place in places
        if os.path.isdir(os.path.join(place, "data"))
        for name in sorted(os.listdir(os.path.join(place, "data")))
        if name.startswith(f"{dataset}_") and name.endswith((".jpg", ".png"))
    ]
    if not files:
        raise ValueError('the sample pictures come with foolbox: pip install "jaxinterp[samples]"')
    folder = Folder(files, crop=crop, labels="names", classes=CLASSES[dataset])
    folder.label_origin = "foolbox's samples, the last number in each file name"
    return folder
