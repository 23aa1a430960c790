"""Figures and the page of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxinterp import explorer, plots, report
from jaxinterp.attacks.attack import Attack
from jaxinterp.attacks.spec import describe
from jaxinterp.effect import Cell, Definition, sides
from jaxinterp.explain.compute import map_method
from jaxinterp.explain.tables import (
    FAITHFULNESS_COLUMNS,
    KIND_LABELS,
    SHARE_COLUMNS,
    named,
    overview_columns,
    summary_columns,
)
from jaxinterp.network import Network
from jaxinterp.pictures import Pictures, left_out
from jaxinterp.runs import Run, file_name, machine, png_name
from jaxinterp.statistics import Estimate

EXPLORED = 96
"""The explorer holds at most about so many pictures times attacks, a third of a megabyte each: a browser opens that."""
EXPLORED_CELLS = 1 << 18
"""And so many cells, of which a megabyte holds some thirty thousand."""

NOTES = (
    "Norms and passes are medians over the pictures for which the attack succeeded. Shares of kinds, rho and IS are "
    "means over them with 95 % bootstrap intervals over pictures. Shares leave out cells that have no effect.",
    "rho(s+p, norm): Spearman's correlation, within a picture, of the overall effect of a cell with the norm of its "
    "perturbation. IS: interpretability score at the 70th percentile, on the map of the true class on the original "
    "picture and on the map of the target on the adversarial one; its null is the score of an even perturbation, and "
    "the shuffled control that of the same perturbation with its pixels in random order.",
)
FAITHFULNESS_NOTE = (
    "Deletion and insertion: the area under the class's probability while pixels are blacked out (small is good) or "
    "put into a black picture (large is good), 5 % at a time, in the order of the map. Average drop: the part of the "
    "probability that is lost where the picture is multiplied by the map. Of the true class on the original picture, "
    "and of the target on the adversarial one; the null is what a map of noise gets."
)

_EXPLORED_ARRAYS = ("clean", "adversarial", "suppression", "promotion", "ratio", "kind", "norm", "maps")


def figure_path(run: Run, attack: str, picture: str) -> Path:
    """Where the figure of a picture and attack is stored."""
    return run.directory / "figures" / file_name(attack) / png_name(picture)


def draw(
    network: Network,
    attack: str,
    arrays: Mapping[str, np.ndarray],
    i: int,
    row: Mapping[str, Any],
    cell: Cell,
    definition: Definition,
    method: str,
) -> Any:
    """The figure of picture `i` of a chunk."""
    return plots.explanation(
        original=arrays["clean"][i],
        adversarial=arrays["adversarial"][i],
        kind=arrays["kind"][i],
        suppression=arrays["suppression"][i],
        promotion=arrays["promotion"][i],
        maps=arrays["maps"][i],
        true_name=row["label_name"],
        target_name=row["target_name"],
        predicted_name=network.class_name(row["adversarial_class"]),
        attack=attack,
        cell=cell,
        subtitle=_subtitle(row),
        definition=definition,
        method=method,
    )


def _subtitle(row: Mapping[str, Any]) -> str:
    if not row["success"]:
        return f"{row['id']}: the attack failed; the picture is unchanged"
    return (
        f"{row['id']}   L2 {row['l2']:.2f}   Linf {row['linf'] * 255:.1f}/255   "
        f"interpretability score {row['is_label']:.3f} (null {row['is_null']:.3f})"
    )


def picture_facts(row: Mapping[str, Any], definition: Definition) -> dict[str, Any]:
    """What the page says beside a picture."""
    if not row["success"]:
        return {"result": "the attack failed"}
    return {
        "L2": f"{row['l2']:.3f}",
        "Linf": f"{row['linf']:.4f}",
        "L0": f"{row['l0']:.0f}",
        "passes": f"{row['forward']} forward, {row['backward']} backward",
        f"kinds{definition.note}": ", ".join(
            f"{label} {row[key]:.0%}" for label, key in zip(KIND_LABELS, SHARE_COLUMNS, strict=True)
        ),
        "interpretability score": f"{row['is_label']:.3f} on the true class's map, {row['is_target']:.3f} on the "
        f"target's (null {row['is_null']:.3f}, shuffled {row['is_shuffled']:.3f} ± {row['is_shuffled_sd']:.3f})",
    }


def draw_missing(
    run: Run,
    network: Network,
    attack: str,
    arrays: Mapping[str, np.ndarray],
    rows: Sequence[Mapping[str, Any]],
    cell: Cell,
    definition: Definition,
) -> None:
    """Draws the figures of a chunk that are not there yet."""
    method = map_method(network, run.config["maps"])
    for i, row in enumerate(rows):
        path = figure_path(run, attack, row["id"])
        if not path.exists():
            plots.save(draw(network, attack, arrays, i, row, cell, definition, method), path)


def write_page(
    run: Run,
    network: Network,
    pictures: Pictures,
    label_origin: str,
    chosen: Mapping[str, Attack],
    cell: Cell,
    definition: Definition,
    rows: Sequence[Mapping[str, Any]],
    summary: Sequence[Mapping[str, Any]],
    chunks: Callable[[], Iterable[tuple[str, Mapping[str, np.ndarray]]]],
) -> Path:
    """Writes index.html, with the figures over all pictures, and returns its path.

    Args:
        run: the results directory.
        network: the network that was attacked.
        pictures: all pictures, attacked or not.
        label_origin: where the labels come from, as text.
        chosen: the attacks by name.
        cell: side of a cell in pixels, or its height and width.
        definition: of the effects of cells.
        rows: one for every picture and attack, in the order of the page.
        summary: one row for every attack.
        chunks: reads the finished chunks, (name of the attack, arrays), from the first one on at every call.
    """
    config = run.config
    return report.write(
        run.directory / "index.html",
        title=f"What perturbations do to {network.name}",
        facts={
            "network": network.name,
            "pictures": f"{config['pictures']}, of which {len(pictures.correct)} attacked",
            "labels": label_origin,
            **{f"attack {name}": describe(attack) for name, attack in chosen.items()},
            "cell": "{} x {} pixels".format(*sides(cell)),
            **named(definition),
            "maps": map_method(network, config["maps"]),
            "seed": str(config["seed"]),
            "weights (sha256)": config["weights"],
            **{k: v for k, v in machine().items() if k in ("jaxinterp", "jax", "device")},
        },
        summary=[{k: format(v) if isinstance(v, Estimate) else v for k, v in row.items()} for row in summary],
        summary_columns=summary_columns(summary),
        pictures=[
            {
                "id": row["id"],
                "attack": row["attack"],
                "true": row["label_name"],
                "target": row["target_name"],
                "success": row["success"],
                "facts": picture_facts(row, definition),
                "figure": figure_path(run, row["attack"], row["id"]),
            }
            for row in rows
        ],
        notes=(*NOTES, FAITHFULNESS_NOTE) if FAITHFULNESS_COLUMNS[0] in summary[0] else NOTES,
        overview=_overview(run, summary, chunks(), definition),
        skipped=left_out(network, pictures),
        explorer=explored(network.class_name, rows, chunks(), cell),
        definition=definition,
    )


def explored(
    class_name: Callable[[int], str],
    rows: Sequence[Mapping[str, Any]],
    chunks: Iterable[tuple[str, Mapping[str, np.ndarray]]],
    cell: Cell,
) -> Iterator[dict[str, Any]]:
    """What the explorer shows: the first pictures of the run, as many as `EXPLORED` and `EXPLORED_CELLS` allow (one at
    least), under every attack.

    Args:
        class_name: names the classes.
        rows: one for every picture and attack, in the order of the page.
        chunks: the finished chunks, the attacks of the same pictures one after the other.
        cell: side of a cell in pixels, or its height and width.
    """
    ids = list(dict.fromkeys(row["id"] for row in rows))
    attacks = len({row["attack"] for row in rows})
    found: dict[tuple[Any, Any], Any] | None = None
    for attack, arrays in chunks:
        if found is None:
            most = min(EXPLORED, EXPLORED_CELLS // arrays["kind"][0].size) // attacks
            shown = set(ids[: max(most, 1)])
            found = {(row["id"], row["attack"]): row for row in rows if row["id"] in shown}
        if not found:
            return
        for i, name in enumerate(map(str, arrays["ids"])):
            row = found.pop((name, attack), None)
            if row is not None:
                yield explorer.item(
                    id=name,
                    attack=attack,
                    true=row["label_name"],
                    target=row["target_name"],
                    predicted=class_name(int(arrays["adversarial_class"][i])),
                    success=bool(row["success"]),
                    **{key: arrays[key][i] for key in _EXPLORED_ARRAYS},
                    cell=cell,
                )


def _overview(
    run: Run,
    summary: Sequence[Mapping[str, Any]],
    chunks: Iterable[tuple[str, Mapping[str, np.ndarray]]],
    definition: Definition,
) -> list[tuple[str, Path]]:
    """The figures over all pictures, (caption, path); none where every attack failed."""
    bars = {
        row["attack"]: {key.removeprefix("share_"): row[key].interval for key in SHARE_COLUMNS}
        for row in summary
        if row["share_balanced"].count
    }
    if not bars:
        return []
    columns, folder = overview_columns(chunks), run.directory / "figures"
    drawn = (
        (
            "kinds.png",
            "Shares of the kinds of cells: mean over pictures, 95 % interval",
            plots.kinds_bar(bars, definition=definition),
        ),
        (
            "effect_norm.png",
            "Overall effect of a cell against the norm of its perturbation",
            plots.scatter_effect(columns.norms, columns.effects, definition=definition),
        ),
        (
            "ratio_effect.png",
            "Ratio of promotion to suppression against the overall effect",
            plots.scatter_ratio(columns.effects, columns.ratios, definition=definition),
        ),
    )
    for name, _, figure in drawn:
        plots.save(figure, folder / name)
    return [(caption + definition.note, folder / name) for name, caption, _ in drawn]
