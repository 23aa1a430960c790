"""Images, labels and ids in one .npz file."""

from __future__ import annotations

import os

import numpy as np

from jaxinterp.npzfile import NpzFile

from .decode import Crop, crop_pixels
from .source import UNKNOWN, DamagedImage, Example, to_unit

_EXPAND = 64  # times the file's size: pictures compress well, bombs a thousandfold
_IMAGES, _LABELS, _IDS = ("images", "x", "x_test"), ("labels", "y", "y_test"), ("ids",)


class Npz:
    """The images of a .npz file, as `numpy.savez(path, images=..., labels=..., ids=...)` writes it.

    Images stay on disk where the file is not compressed, and are read as they are asked for; a compressed file is
    read at once. Nothing is unpickled.

    Attributes:
        images: [N,H,W,C], as in the file.
        labels: int32 [N], -1 = unknown.
        ids: N strings; the positions "0", "1", ... where the file has no ids.
        label_origin: where the labels came from, in plain words.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        crop: Crop | None = None,
        classes: int | None = None,
        labels: str = "auto",
    ) -> None:
        """Opens the file and checks everything but the values of floating-point images.

        Args:
            path: the file. Its arrays: images [N,H,W,C] (or [N,H,W]: grey), uint8 in 0..255 or floating point in
                [0, 1]; labels [N], integers, optional; ids [N], integers or text, optional. x and y, or x_test and
                y_test, may stand for images and labels.
            crop: how uint8 images are resized and cropped that do not have its size; None keeps their own.
            classes: the number of classes, where labels are to be checked against it.
            labels: "auto" takes those of the file, "predicted" none (all are -1).

        Raises:
            ValueError: a file that is damaged or no .npz archive; arrays that are missing, of a wrong shape or type;
                a label out of range; an id that occurs twice.
            OSError: the file cannot be opened.
        """
        self.path = os.fspath(path)
        if labels not in ("auto", "predicted"):
            raise ValueError(f"labels: expected 'auto' or 'predicted' for a .npz file, got {labels!r}")
        with NpzFile(self.path, expand=_EXPAND) as file:
            name = self._pick(file, _IMAGES)
            if name is None:
                raise self._error(f"expected an array 'images', found {', '.join(map(repr, file.names)) or 'none'}")
            images = file.map(name)
            given = self._pick(file, _LABELS)
            found = None if given is None or labels == "predicted" else file.read(given)
            ids = None if self._pick(file, _IDS) is None else file.read("ids")
        if images.ndim == 3:
            images = images[..., None]
        if images.ndim != 4:
            raise self._error(f"{name}: expected the shape [N,H,W,C], got {list(images.shape)}")
        if images.dtype != np.uint8 and images.dtype.kind != "f":
            raise self._error(f"{name}: expected uint8 or floating point, got {images.dtype}")
        side = None if crop is None else (crop.size, crop.size)
        self.crop = crop if side not in (None, images.shape[1:3]) else None  # what has the size is left alone
        if self.crop is not None and (images.dtype != np.uint8 or images.shape[3] not in (1, 3) or 0 in images.shape):
            raise self._error(
                f"{name}: cannot resize {images.dtype} of shape {list(images.shape)} to {self.crop.size} x"
                f" {self.crop.size}; expected that size, or uint8 with 1 or 3 channels"
            )
        self.images = images
        self.labels = np.full(len(images), UNKNOWN, np.int32)
        self.label_origin = "predicted by the model" + (", since the file has no labels" if given is None else "")
        if found is not None:
            if found.shape == (len(images), 1):
                found = found[:, 0]
            self.labels = self._integers(str(given), found)
            wrong = np.flatnonzero((self.labels < UNKNOWN) | (self.labels >= (classes or np.inf)))
            if len(wrong):
                last = "" if classes is None else str(classes - 1)
                shown = f"{self.labels[wrong[0]]} at {wrong[0]}"
                raise self._error(f"{given}: expected classes in 0..{last}, or -1 = unknown, got {shown}")
            array = f"the array {given!r} of the file"
            none = len(images) > 0 and np.all(self.labels == UNKNOWN)
            self.label_origin = f"predicted by the model, since {array} has none" if none else array
        if ids is None:
            ids = np.arange(len(images))
        elif ids.shape != (len(images),) or ids.dtype.kind not in "iuU":
            shown = f"{ids.dtype} of shape {list(ids.shape)}"
            raise self._error(f"ids: expected {len(images)} integers or texts, one for each image, got {shown}")
        self.ids = tuple(map(str, ids.tolist()))
        if len(set(self.ids)) != len(self.ids):
            values, counts = np.unique(ids, return_counts=True)
            raise self._error(f"ids: expected different ones, got {values[counts.argmax()]!s} {counts.max()} times")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        pixels = np.array(self.images[index])
        try:
            image = to_unit(pixels) if self.crop is None else crop_pixels(pixels, self.crop)
        except ValueError as error:  # a picture a few pixels wide becomes enormous
            raise DamagedImage(self.ids[index], str(error)) from error
        if self.images.dtype != np.uint8 and not (image.size == 0 or (image.min() >= 0 and image.max() <= 1)):
            # Not damage to be skipped: every image of the file will be like this one.
            raise self._error(f"images: expected values in [0, 1], got [{image.min()}, {image.max()}] at {index}")
        return Example(image, int(self.labels[index]), self.ids[index])

    def _integers(self, name: str, array: np.ndarray) -> np.ndarray:
        if array.shape != (len(self.images),):
            raise self._error(f"{name}: expected {len(self.images)}, one for each image, got {list(array.shape)}")
        if array.dtype.kind not in "iu":
            raise self._error(f"{name}: expected integers, got {array.dtype}")
        if array.size and (array.max() > np.iinfo(np.int32).max or array.min() < np.iinfo(np.int32).min):
            raise self._error(f"{name}: expected class indices, got values from {array.min()} to {array.max()}")
        return array.astype(np.int32)

    @staticmethod
    def _pick(file: NpzFile, names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in file.names), None)

    def _error(self, reason: str) -> ValueError:
        return ValueError(f"{self.path}: {reason}")
