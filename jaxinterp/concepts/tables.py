"""Tables of a dissection: the published tally, all IoUs, and what is reported under either convention."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxinterp.data import Concepts
from jaxinterp.dissect import CONVENTIONS, Best, Dissection, best, counts, iou
from jaxinterp.runs import replacing

CONVENTION_NAMES = {
    "best": "a unit counts once, for its best concept",
    "category": "a unit counts in every category in which it detects a concept",
}
UNION_NAMES = {"image": "anywhere in an image", "lite": "under the unit's mask"}
"""When a category occurs, so that an image counts for its IoU."""


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """A dissected layer and what follows from its counts.

    Attributes:
        dissection: counts, thresholds, top images.
        concepts: what the labels mean.
        iou: float64 [U,L].
        best: the best concept of every unit in every category.
    """

    dissection: Dissection
    concepts: Concepts
    iou: np.ndarray
    best: Best

    @property
    def units(self) -> int:
        """Number of units U."""
        return len(self.iou)

    @property
    def order(self) -> np.ndarray:
        """The units by falling score; of equal ones the first comes first."""
        return np.argsort(-self.best.score, kind="stable")

    @property
    def silent(self) -> np.ndarray:
        """The units that exceed their threshold nowhere: dead ones, and those whose largest value is too frequent."""
        return np.flatnonzero(self.dissection.tally.activation == 0)

    def name(self, label: int) -> str:
        """Of a concept; "" for label 0."""
        return self.concepts.names[label] if label else ""

    def category(self, unit: int) -> str:
        """The category of a unit's best concept; "" where it overlaps with none."""
        return self.concepts.categories[self.best.category[unit]] if self.best.concept[unit] else ""


def layer(dissection: Dissection, concepts: Concepts) -> Layer:
    """What follows from the counts of a layer."""
    scores = iou(dissection.tally, concepts.category)
    return Layer(dissection, concepts, scores, best(scores, concepts.category, len(concepts.categories)))


def tally_columns(categories: Iterable[str]) -> tuple[str, ...]:
    """The columns of the published tally.csv, and behind them the rule of the union."""
    parts = ("label", "truth", "activation", "intersect", "iou")
    return (
        *("unit", "category", "label", "score"),
        *(f"{category}-{part}" for category in categories for part in parts),
        "union",
    )


def tally_rows(found: Layer) -> Iterator[dict[str, Any]]:
    """One row for every unit, by falling score, with `tally_columns`; units count from 1.

    Under CAT-: the label of the category with the highest IoU, its pixels, the pixels under the mask in images where
    the category occurs, those with the label, and the IoU. All are 0 where no label of the category overlaps.
    """
    tally = found.dissection.tally
    for unit in map(int, found.order):
        row: dict[str, Any] = {
            "unit": unit + 1,
            "category": found.category(unit),
            "label": found.name(int(found.best.concept[unit])),
            "score": found.best.score[unit],
            "union": tally.union,
        }
        for index, category in enumerate(found.concepts.categories):
            label = int(found.best.label[unit, index])
            row |= {
                f"{category}-label": found.name(label),
                f"{category}-truth": tally.label_area[label] if label else 0,
                f"{category}-activation": tally.activation_by_category[unit, index] if label else 0,
                f"{category}-intersect": tally.intersection[unit, label] if label else 0,
                f"{category}-iou": found.best.iou[unit, index],
            }
        yield row


def write_ious(path: Path, layers: Mapping[str, Layer]) -> Path:
    """Writes every IoU of every unit and concept as Parquet, a group of rows for each layer, whole or not at all.

    Columns: node, unit (from 1), label (its number), name, category, intersection, activation (of images where the
    category occurs), label_area, iou, union. Labels without a category are left out.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def repeated(texts: Sequence[str], indices: np.ndarray) -> Any:
        return pa.DictionaryArray.from_arrays(pa.array(indices.astype(np.int32)), pa.array(list(texts), pa.string()))

    text = pa.dictionary(pa.int32(), pa.string())
    schema = pa.schema(
        {
            **{"node": text, "unit": pa.int32(), "label": pa.int32(), "name": text, "category": text},
            **{"intersection": pa.int64(), "activation": pa.int64(), "label_area": pa.int64()},
            **{"iou": pa.float64(), "union": text},
        }
    )
    # Plain values, whose bytes are always the same: the padding that the writer leaves in packed indices is not.
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": False}
    with replacing(path) as file, pq.ParquetWriter(file, schema, **options) as writer:
        for node, found in layers.items():
            tally, category = found.dissection.tally, found.concepts.category
            labels = np.flatnonzero(category >= 0)
            of_unit, of_label = np.repeat(np.arange(found.units), len(labels)), np.tile(labels, found.units)
            nothing = np.zeros(len(of_unit))
            columns = {
                "node": repeated([node], nothing),
                "unit": pa.array((of_unit + 1).astype(np.int32)),
                "label": pa.array(of_label.astype(np.int32)),
                "name": repeated(found.concepts.names, of_label),
                "category": repeated(found.concepts.categories, category[of_label]),
                "intersection": pa.array(tally.intersection[of_unit, of_label]),
                "activation": pa.array(tally.activation_by_category[of_unit, category[of_label]]),
                "label_area": pa.array(tally.label_area[of_label]),
                "iou": pa.array(found.iou[of_unit, of_label]),
                "union": repeated([tally.union], nothing),
            }
            writer.write_table(pa.table(columns, schema=schema))
    return path


def reported(found: Best, categories: Sequence[str], minimum: float) -> dict[str, Any]:
    """Detectors and concepts under both conventions, each for itself: convention -> totals and categories.

    `units` is the number of units that detect anything, `detectors` the sum over the categories.
    """
    record = {}
    for convention in CONVENTIONS:
        detectors, concepts = counts(found, convention, minimum)
        record[convention] = {
            "meaning": CONVENTION_NAMES[convention],
            "units": int(found.detects(convention, minimum).any(axis=1).sum()),
            "detectors": int(detectors.sum()),
            "concepts": int(concepts.sum()),
            "categories": {
                name: {"detectors": int(d), "concepts": int(c)}
                for name, d, c in zip(categories, detectors, concepts, strict=True)
            },
        }
    return record


def unique_detectors(found: Layer, convention: str, minimum: float) -> dict[str, dict[str, int]]:
    """How many units detect each concept: category -> concept -> units. Concepts without a detector are left out.

    Where several labels of a category have a name, their numbers are behind it: "pole #7".
    """
    detects = found.best.detects(convention, minimum)  # type: ignore[arg-type]  # one of CONVENTIONS
    groups = {}
    for index, category in enumerate(found.concepts.categories):
        labels, units = np.unique(found.best.label[detects[:, index], index], return_counts=True)
        times = Counter(found.name(int(n)) for n in np.flatnonzero(found.concepts.category == index))
        groups[category] = {
            found.name(n) if times[found.name(n)] == 1 else f"{found.name(n)} #{n}": int(count)
            for n, count in zip(labels.tolist(), units, strict=True)
        }
    return groups


def summarise(layers: Mapping[str, Layer], damaged: Sequence[tuple[str, str]], minimum: float) -> dict[str, Any]:
    """The record of a dissection, as JSON."""
    first = next(iter(layers.values()))
    labels = first.concepts.category
    return {
        "images": first.dissection.images,
        "quantile": first.dissection.quantile,
        "union": first.dissection.tally.union,
        "minimum": minimum,
        "labels": {name: int((labels == i).sum()) for i, name in enumerate(first.concepts.categories)},
        "labels_present": int((first.dissection.tally.label_area[labels >= 0] > 0).sum()),
        "damaged": [{"id": name, "reason": reason} for name, reason in damaged],
        "layers": {
            node: {
                "units": found.units,
                "positions": list(found.dissection.positions),
                "silent": [int(unit) + 1 for unit in found.silent],
                "conventions": reported(found.best, found.concepts.categories, minimum),
            }
            for node, found in layers.items()
        },
    }


def summary_lines(record: Mapping[str, Any]) -> Iterator[str]:
    """The record as text: each layer under both conventions, one after the other."""
    yield f"{record['images']} images, {record['labels_present']} of {sum(record['labels'].values())} labels present"
    for node, found in record["layers"].items():
        yield f"\n{node}: {found['units']} units" + _silent(len(found["silent"]))
        yield from report_lines(
            found["conventions"], f"IoU > {record['minimum']:g}, union={record['union']}", found["units"]
        )


def _silent(count: int) -> str:
    return f", {count} of which exceed their threshold nowhere" if count else ""


def report_lines(record: Mapping[str, Any], how: str, units: int) -> Iterator[str]:
    """What `reported` gives, as text, the two conventions apart.

    Args:
        record: the record.
        how: what counts as a detector, in words.
        units: how many units there are.
    """
    width = max(map(len, (*next(iter(record.values()))["categories"], "together")))
    for convention, found in record.items():
        yield f"  convention {convention!r}: {found['meaning']} ({how})"
        yield f"    {found['units']} of {units} units detect a concept"
        yield f"    {'':{width}}  detectors  concepts"
        rows = {**found["categories"], "together": found}
        for name, row in rows.items():
            yield f"    {name:{width}}  {row['detectors']:9d}  {row['concepts']:8d}"
