"""What a source of images is, and the simplest one: arrays in memory.

A source is anything with a length whose items are `Example`s. Images are float32 in [0, 1], [H,W,C]; the
label is the index of the true class, or -1 where it is unknown; the id follows an example into every table,
so that each row of a result can be traced back to its picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

UNKNOWN = -1
"""The label of an example whose class nobody has named."""


@dataclass(frozen=True, eq=False)
class Example:
    """One labelled image.

    Attributes:
        image: float32 [H,W,C] in [0, 1]; C is 3 wherever the image came from a file.
        label: index of the true class, -1 = unknown.
        id: unique within its source.
    """

    image: np.ndarray
    label: int
    id: str


class DamagedImage(ValueError):
    """An image that cannot be read. Whoever walks through a source skips it, counts it and goes on.

    Attributes:
        id: id of the example.
        reason: what is wrong, in plain words.
    """

    def __init__(self, id: str, reason: str) -> None:
        super().__init__(id, reason)  # both, so that the exception survives pickling between processes
        self.id = id
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


@runtime_checkable
class Source(Protocol):
    """A finite, indexable collection of examples. Threads may read several items at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example:
        """The example at `index`. Raises DamagedImage where it cannot be read."""
        ...


class Arrays:
    """A source over arrays in memory.

    Attributes:
        images: the array as given.
        labels: int32 [N].
        ids: N strings.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: Sequence[int] | np.ndarray | None = None,
        ids: Sequence[str] | None = None,
    ) -> None:
        """Checks and keeps the arrays.

        Args:
            images: [N,H,W,C], uint8 in 0..255 or floating point in [0, 1].
            labels: N class indices, -1 = unknown; all unknown by default.
            ids: N different strings; by default the positions "0", "1", ...

        Raises:
            TypeError: images are neither uint8 nor floating point, or labels are not integers.
            ValueError: a wrong rank or length, a value out of range, or an id that occurs twice.
        """
        images = np.asarray(images)
        if images.ndim != 4:
            raise ValueError(f"images: expected the shape [N,H,W,C], got {list(images.shape)}")
        if images.dtype != np.uint8:
            if not np.issubdtype(images.dtype, np.floating):
                raise TypeError(f"images: expected uint8 or floating point, got {images.dtype}")
            if images.size and not (images.min() >= 0 and images.max() <= 1):  # also catches NaN
                raise ValueError(f"images: expected values in [0, 1], got [{images.min()}, {images.max()}]")
        count = len(images)

        given = np.full(count, UNKNOWN) if labels is None else np.asarray(labels)
        if given.shape != (count,):
            raise ValueError(f"labels: expected {count}, one for each image, got shape {list(given.shape)}")
        if count and not np.issubdtype(given.dtype, np.integer):
            raise TypeError(f"labels: expected integers, got {given.dtype}")
        if count and given.min() < UNKNOWN:
            raise ValueError(f"labels: expected class indices, or -1 = unknown, got {given.min()}")

        names = tuple(map(str, range(count) if ids is None else ids))
        if len(names) != count:
            raise ValueError(f"ids: expected {count}, one for each image, got {len(names)}")
        if len(set(names)) != count:
            [(twice, _)] = Counter(names).most_common(1)
            raise ValueError(f"ids: expected different ones, got {twice!r} twice")

        self.images = images
        self.labels = given.astype(np.int32)
        self.ids = names

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return Example(to_unit(self.images[index]), int(self.labels[index]), self.ids[index])


def to_unit(image: np.ndarray) -> np.ndarray:
    """Pixels as float32 in [0, 1]: uint8 is divided by 255, floating point is kept."""
    if image.dtype == np.uint8:
        return np.divide(image, np.float32(255), dtype=np.float32)
    return image.astype(np.float32, copy=False)
