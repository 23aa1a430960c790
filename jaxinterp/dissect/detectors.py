"""From counts to concept detectors: IoU of every unit and concept, and the two ways of reporting them.

Bau et al. 2017, section 2.3: IoU(k, c) = sum |M_k and L_c| / sum |M_k or L_c|, over the images in which the category of
c occurs. A unit detects its best concept where the IoU exceeds 0.04. Two conventions of counting are in use and give
very different numbers:

* "best": a unit counts once, for the concept with its highest IoU over all categories;
* "category": a unit counts in every category in which its best concept exceeds the minimum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from jaxinterp.dissect.counting import Tally

MINIMUM = 0.04
"""IoU that a detector exceeds."""

Convention = Literal["best", "category"]
CONVENTIONS: tuple[Convention, ...] = ("best", "category")


@dataclasses.dataclass(frozen=True, eq=False)
class Best:
    """The best concept of every unit in every category.

    Attributes:
        label: int [U,C], label numbers; 0 where no label of the category overlaps with the unit.
        iou: float64 [U,C].
    """

    label: np.ndarray
    iou: np.ndarray

    @property
    def category(self) -> np.ndarray:
        """[U] the category with the highest IoU, the first of several."""
        return self.iou.argmax(axis=1)

    @property
    def score(self) -> np.ndarray:
        """[U] the highest IoU."""
        return self.iou.max(axis=1)

    @property
    def concept(self) -> np.ndarray:
        """[U] the label with the highest IoU."""
        return np.take_along_axis(self.label, self.category[:, None], axis=1)[:, 0]

    def detects(self, convention: Convention = "best", minimum: float = MINIMUM) -> np.ndarray:
        """Whether a unit counts as a detector in a category, bool [U,C].

        Raises:
            ValueError: an unknown convention.
        """
        if convention not in CONVENTIONS:
            raise ValueError(f"convention: expected one of {', '.join(CONVENTIONS)}, got {convention!r}")
        above = self.iou > minimum
        if convention == "category":
            return above
        return above & (np.arange(above.shape[1]) == self.category[:, None])


def iou(tally: Tally, categories: Sequence[int] | np.ndarray) -> np.ndarray:
    """float64 [U,L]: intersection over union of every unit and label; 0 for labels without a category.

    Args:
        tally: counts.
        categories: [L] the category index of every label, -1 = none.
    """
    category = np.asarray(categories)
    shape = tally.intersection.shape
    if category.shape != (shape[1],):
        raise ValueError(f"categories: expected {shape[1]}, one for each label, got shape {list(category.shape)}")
    active = tally.activation_by_category[:, np.maximum(category, 0)]
    union = active + tally.label_area - tally.intersection
    return np.where(category >= 0, tally.intersection / (union + 1e-10), 0.0)


def best(scores: np.ndarray, categories: Sequence[int] | np.ndarray, number: int) -> Best:
    """The best label of every unit in each of `number` categories; of several, the one with the lowest number.

    Args:
        scores: [U,L], see `iou`.
        categories: [L] the category index of every label, -1 = none.
        number: C.
    """
    units = len(scores)
    label, value = np.zeros((units, number), np.int64), np.zeros((units, number))
    for index in range(number):
        members = np.flatnonzero(np.asarray(categories) == index)
        members = members[members > 0]
        if members.size:
            chosen = scores[:, members].argmax(axis=1)
            value[:, index] = scores[np.arange(units), members[chosen]]
            label[:, index] = np.where(value[:, index] > 0, members[chosen], 0)
    return Best(label, value)


def counts(found: Best, convention: Convention = "best", minimum: float = MINIMUM) -> tuple[np.ndarray, np.ndarray]:
    """Detectors and different concepts detected, in each category: two integer arrays [C]."""
    detects = found.detects(convention, minimum)
    concepts = [len(np.unique(labels[on])) for labels, on in zip(found.label.T, detects.T, strict=True)]
    return detects.sum(axis=0), np.array(concepts, int)
