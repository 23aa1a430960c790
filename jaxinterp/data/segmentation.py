"""What a labelled segmentation source is, and the simplest one: arrays in memory.

Network dissection compares units with concepts. A concept is a number: label maps ("planes") hold it pixel by pixel,
whole-image labels ("scalars") hold it for the picture as a whole. 0 stands for no label. Every concept belongs to one
category (colour, object, part, material, scene, texture).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from .source import Arrays

MOST_LABELS = 32_767
"""Label numbers are stored in 16 bits."""


@dataclass(frozen=True, eq=False)
class Concepts:
    """The names behind label numbers.

    Attributes:
        names: L names, by label number; "" where a number stands for nothing, as 0 does.
        categories: names of the C categories.
        category: int32 [L], the index of the category of every label; -1 where it has none.
    """

    names: tuple[str, ...]
    categories: tuple[str, ...]
    category: np.ndarray

    def __post_init__(self) -> None:
        """Checks the three against each other.

        Raises:
            ValueError: more than 32,767 labels, a category index out of range, different lengths, no category, one
                that is named twice, or a category given to label 0.
        """
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "categories", tuple(self.categories))
        category = np.asarray(self.category)
        if not 2 <= len(self.names) <= MOST_LABELS + 1:
            raise ValueError(f"names: expected 1 to {MOST_LABELS} labels after label 0, got {len(self.names) - 1}")
        if category.shape != (len(self.names),) or not np.issubdtype(category.dtype, np.integer):
            raise ValueError(
                f"category: expected {len(self.names)} integers, one for each label,"
                f" got {category.dtype} {list(category.shape)}"
            )
        if not self.categories or len(set(self.categories)) != len(self.categories):
            raise ValueError(f"categories: expected different names, got {list(self.categories)}")
        if category.min() < -1 or category.max() >= len(self.categories):
            raise ValueError(
                f"category: expected indices below {len(self.categories)}, or -1 = none,"
                f" got {category.min()} to {category.max()}"
            )
        if category[0] != -1:
            raise ValueError("category: label 0 stands for no label and has no category (-1)")
        object.__setattr__(self, "category", category.astype(np.int32))


@dataclass(frozen=True, eq=False)
class Segmented:
    """One image with its concepts.

    Attributes:
        image: float32 [H,W,3] in [0, 1].
        planes: int16 [channels,sh,sw] label numbers, 0 = none; a pixel may carry several labels, one in each channel.
        scalars: int16 [n] whole-image labels, 0 = none.
        id: unique within its source.
    """

    image: np.ndarray
    planes: np.ndarray
    scalars: np.ndarray
    id: str


@runtime_checkable
class SegmentedSource(Protocol):
    """A finite, indexable collection of segmented images of one shape. Threads may read several items at once.

    Attributes:
        concepts: what the label numbers mean.
    """

    @property
    def concepts(self) -> Concepts: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Segmented:
        """The item at `index`. Raises DamagedImage where it cannot be read."""
        ...


class SegmentedArrays:
    """A source over arrays in memory.

    Attributes:
        concepts: what the label numbers mean.
    """

    def __init__(
        self,
        images: np.ndarray,
        planes: np.ndarray,
        concepts: Concepts,
        *,
        scalars: np.ndarray | None = None,
        ids: Sequence[str] | None = None,
    ) -> None:
        """Checks and keeps the arrays.

        Args:
            images: [N,H,W,C], uint8 in 0..255 or floating point in [0, 1].
            planes: integers [N,channels,sh,sw], or [N,sh,sw] for one channel; 0 = no label.
            concepts: what the label numbers mean.
            scalars: integers [N,n], whole-image labels, 0 = none.
            ids: N different strings; by default the positions.

        Raises:
            TypeError: planes or scalars are not integers.
            ValueError: a wrong rank or length, or a label number without a concept.
        """
        self._images = Arrays(images, ids=ids)
        count = len(self._images)
        planes = np.asarray(planes)
        if planes.ndim == 3:
            planes = planes[:, None]
        self._planes = _labels("planes", planes, 4, count, len(concepts.names))
        given = np.zeros((count, 0), np.int16) if scalars is None else np.asarray(scalars)
        self._scalars = _labels("scalars", given, 2, count, len(concepts.names))
        self.concepts = concepts

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Segmented:
        example = self._images[index]
        return Segmented(example.image, self._planes[index], self._scalars[index], example.id)


def _labels(name: str, labels: np.ndarray, rank: int, count: int, known: int) -> np.ndarray:
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"{name}: expected integers, got {labels.dtype}")
    if labels.ndim != rank or len(labels) != count:
        raise ValueError(f"{name}: expected {rank} dimensions, the first of length {count}, got {list(labels.shape)}")
    if labels.size and not 0 <= labels.min() <= labels.max() < known:
        raise ValueError(f"{name}: expected label numbers from 0 to {known - 1}, got {labels.min()} to {labels.max()}")
    return labels.astype(np.int16)
