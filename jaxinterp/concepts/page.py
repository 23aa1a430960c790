"""The page of a dissection: what is reported under either convention, unique detectors, and every unit."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from jaxinterp import plots, report
from jaxinterp.concepts import unit_pictures
from jaxinterp.concepts.tables import CONVENTION_NAMES, UNION_NAMES, Layer, unique_detectors
from jaxinterp.data import Packed, SegmentedSource
from jaxinterp.dissect import CONVENTIONS
from jaxinterp.network import Network
from jaxinterp.runs import Run, file_name, machine, replacing

EMBEDDED = 400
"""Of the units that detect most, so many have their images inside a page; the others' files are linked."""

TOGETHER = 1500
"""Up to so many units are on the page itself; of more, every layer has its own page."""


def write(
    run: Run,
    network: Network,
    source: SegmentedSource,
    layers: Mapping[str, Layer],
    summary: Mapping[str, Any],
    minimum: float,
    step: Callable[[], object],
) -> Path:
    """Writes figures, the units' pictures that are missing, and the pages; returns index.html.

    Args:
        run: the results directory.
        network: the network.
        source: where images are read again.
        layers: by node.
        summary: the record of the job.
        minimum: IoU that a detector exceeds.
        step: called after every unit's picture.
    """
    first = source.source if isinstance(source, Packed) else None
    size = first.label_size if first is not None else _label_size(source, layers)
    tile = unit_pictures.tiles(source)
    for node, found in layers.items():
        for unit in range(found.units):
            path = picture_path(run, node, unit)
            if not path.exists():
                unit_pictures.write(path, unit_pictures.draw(found, unit, size, tile))
            step()
    together = sum(found.units for found in layers.values()) <= TOGETHER
    sections = [
        _section(run, node, found, summary["layers"][node], minimum, together) for node, found in layers.items()
    ]
    shared = {
        "minimum": f"{minimum:g}",
        "union": summary["union"],
        "union_meaning": UNION_NAMES[summary["union"]],
        "conventions": CONVENTION_NAMES,
        "embedded": EMBEDDED,
    }
    if not together:
        for section in sections:
            section["units"] = _units(run, section["node"], layers[section["node"]], minimum)
            title = f"Units of {section['node']} in {network.name}"
            _render(run.directory / section["page"], title=title, back=True, sections=[section], **shared)
            section["units"] = None
    config = run.config
    return _render(
        run.directory / "index.html",
        title=f"Concepts in {network.name}",
        back=False,
        sections=sections,
        facts={
            "network": network.name,
            "images": f"{summary['images']:,}",
            "labels": f"{summary['labels_present']:,} present of {sum(summary['labels'].values()):,}",
            "quantile": f"{summary['quantile']:g}",
            "a detector's IoU": f"above {minimum:g}",
            "union": f"{summary['union']}: images in which the category occurs {UNION_NAMES[summary['union']]}",
            "data": config["data"],
            "weights (sha256)": config["weights"],
            **{k: v for k, v in machine().items() if k in ("jaxinterp", "jax", "device")},
        },
        damaged=summary["damaged"],
        **shared,
    )


def picture_path(run: Run, node: str, unit: int) -> Path:
    """Where the picture of a unit (from 0) is stored."""
    return run.directory / "units" / file_name(node) / f"{unit + 1:04d}.jpg"


def _label_size(source: SegmentedSource, layers: Mapping[str, Layer]) -> tuple[int, int]:
    """Height and width of the label maps, from an image that could be read."""
    top = next(iter(layers.values())).dissection.top
    return source[int(top.image[0, 0])].planes.shape[1:]  # type: ignore[return-value]  # two of them


def _section(
    run: Run, node: str, found: Layer, record: Mapping[str, Any], minimum: float, together: bool
) -> dict[str, Any]:
    """A layer on the page: its figures, and its units where they are on the same page."""
    figures, rule = [], found.dissection.tally.union
    for convention in CONVENTIONS:
        groups = unique_detectors(found, convention, minimum)
        if any(groups.values()):
            path = run.directory / "figures" / f"{file_name(node)}-{convention}.png"
            figure = plots.concept_bars(
                groups,
                title=f"{node}: how many units detect each concept",
                subtitle=f"convention '{convention}': {CONVENTION_NAMES[convention]}; IoU > {minimum:g}, union={rule}",
            )
            plots.save(figure, path)
            figures.append((convention, _png(path), report.png_size(path)))
    return {
        "node": node,
        "anchor": file_name(node),
        "page": f"units-{file_name(node)}.html",
        "record": record,
        "figures": figures,
        "units": _units(run, node, found, minimum) if together else None,
    }


def _units(run: Run, node: str, found: Layer, minimum: float) -> Iterator[dict[str, Any]]:
    """The units of a layer by falling score, read one at a time."""
    for place, unit in enumerate(map(int, found.order)):
        path = picture_path(run, node, unit)
        label = int(found.best.concept[unit])
        inside = place < EMBEDDED
        data, size = unit_pictures.thumbnail(path) if inside else (b"", (0, 0))
        yield {
            "unit": unit + 1,
            "label": found.name(label),
            "category": found.category(unit),
            "score": f"{found.best.score[unit]:.4f}",
            "threshold": f"{found.dissection.thresholds[unit]:.4g}",
            "detects": bool(found.best.score[unit] > minimum),
            "others": [
                f"{found.name(int(found.best.label[unit, i]))} ({name}) {found.best.iou[unit, i]:.3f}"
                for i, name in enumerate(found.concepts.categories)
                if found.best.iou[unit, i] > minimum and found.best.label[unit, i] != label
            ],
            "picture": quote(path.relative_to(run.directory).as_posix()),
            "size": size,
            "thumbnail": Markup("data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")) if inside else None,
        }


def _png(path: Path) -> Markup:
    return Markup("data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii"))


def _render(path: Path, **values: Any) -> Path:
    template = report.environment().get_template("concepts.html")
    with replacing(path) as file:
        for piece in template.generate(**{"facts": {}, "damaged": []} | values):
            file.write(piece.encode())
    return path
