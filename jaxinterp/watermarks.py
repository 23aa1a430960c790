"""Pictures to embed as watermarks: class folders, or crops of installed pictures.

Every picture becomes a square of the hosts' side: its short side is resized, enlarged where it is smaller, and the
middle is taken.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import zlib
from pathlib import Path

import numpy as np

from jaxinterp.broden.make import SKIMAGE_PICTURES, SKIMAGE_TEXTURES, squares
from jaxinterp.broden.make import installed as installed_pictures
from jaxinterp.data import Crop, DamagedImage, decode
from jaxinterp.data.decode import decode_pixels, resize_pixels
from jaxinterp.data.folder import Folder, some
from jaxinterp.data.labels import SUFFIXES
from jaxinterp.data.source import to_unit


@dataclasses.dataclass(frozen=True)
class Watermarks:
    """Pictures of one size, folder by folder.

    Attributes:
        images: float32 [N,S,S,3] in [0, 1].
        folders: how many pictures each folder has.
        names: of the folders.
        ids: of the pictures.
        damaged: name and reason of every picture that was left out.
    """

    images: np.ndarray
    folders: tuple[int, ...]
    names: tuple[str, ...]
    ids: tuple[str, ...]
    damaged: tuple[tuple[str, str], ...] = ()

    @property
    def digest(self) -> str:
        """sha256 of the pixels and of the folders' sizes."""
        return hashlib.sha256(repr(self.folders).encode() + np.ascontiguousarray(self.images).tobytes()).hexdigest()


def read(path: str | os.PathLike[str], size: int) -> Watermarks:
    """The pictures in the sub-folders of a folder, in alphabetical order.

    Args:
        path: a folder with one sub-folder for each class of watermarks.
        size: side of the hosts, in pixels.

    Raises:
        ValueError: there is no such folder, it has no sub-folders, or one of them has no picture that can be read.
    """
    place = Path(path)
    if not place.is_dir():
        raise ValueError(f"watermarks: no such folder: {path}")
    classes = sorted(each for each in place.iterdir() if each.is_dir() and not each.name.startswith("."))
    if not classes:
        outside = sum(each.suffix.lower() in SUFFIXES for each in place.iterdir())
        found = f"found {outside} pictures that are in none" if outside else "found none"
        raise ValueError(f"watermarks: expected class folders in {path} (CLASS/picture.jpg), {found}")
    crop = Crop(size, crop_pct=1.0)
    images, ids, sizes, damaged = [], [], [], []
    for folder in classes:
        try:
            found = Folder(folder, crop=crop, labels="predicted", classes=1)
        except ValueError as error:
            raise ValueError(f"watermarks: the class folder {folder} is empty ({error})") from error
        before = len(images)
        for file, name in zip(found.paths, found.ids, strict=True):
            try:
                images.append(decode(file, crop))
                ids.append(f"{folder.name}/{name}")
            except DamagedImage as error:
                damaged.append((f"{folder.name}/{name}", error.reason))
        if len(images) == before:
            unread = some(f"{name} ({reason})" for name, reason in damaged[-len(found) :])
            raise ValueError(f"watermarks: no picture of the class folder {folder} can be read: {unread}")
        sizes.append(len(images) - before)
    names = tuple(folder.name for folder in classes)
    return Watermarks(np.stack(images), tuple(sizes), names, tuple(ids), tuple(damaged))


def installed(size: int, *, crops: int = 10, seed: int = 0) -> Watermarks:
    """Square crops of the pictures and textures of scikit-image, each picture being a class folder.

    Args:
        size: side of the hosts, in pixels.
        crops: of every picture; the first is the largest in its middle, the others lie anywhere, see
            `jaxinterp.broden.make.make`.
        seed: of the crops.

    Raises:
        ValueError: scikit-image is not installed.
    """
    wanted = {*SKIMAGE_PICTURES, *SKIMAGE_TEXTURES}
    paths = [path for group in installed_pictures() for path in group if os.path.basename(path) in wanted]
    if not paths:
        raise ValueError('give --watermarks, or install the pictures of scikit-image: pip install "jaxinterp[samples]"')
    images, ids = [], []
    for path in paths:
        name, pixels = os.path.basename(path), decode_pixels(path)
        places = squares(pixels.shape[:2], crops, [seed, zlib.crc32(name.encode())])
        for k, (top, left, side) in enumerate(places):
            square = pixels[top : top + side, left : left + side]
            images.append(to_unit(resize_pixels(square, (size, size))))
            ids.append(f"{name}_{k:02d}")
    return Watermarks(np.stack(images), (crops,) * len(paths), tuple(map(os.path.basename, paths)), tuple(ids))
