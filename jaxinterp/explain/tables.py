"""Tables made from the chunks of a run: a row for every picture and attack, one for every cell, the summary."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinterp import cam, effect
from jaxinterp.network import Network
from jaxinterp.statistics import Estimate, bootstrap_mean, spearman

IMAGE_COLUMNS = (
    *("id", "attack", "label", "label_name", "target", "target_name", "success", "adversarial_class"),
    *("l0", "l1", "l2", "linf", "first_success", "forward", "backward", "pse_forward"),
    *("cells", "cells_none", "share_suppression", "share_balanced", "share_promotion", "rho_effect_norm"),
    *("is_label", "is_target", "is_null", "is_shuffled", "is_shuffled_sd", "is_asm", "is_asm_null"),
    *("label_map_suppression", "label_map_balanced", "label_map_promotion"),
    *("target_map_suppression", "target_map_balanced", "target_map_promotion"),
)
FAITHFULNESS_COLUMNS = tuple(
    f"{measure}_{which}{null}"
    for which in ("label", "target")
    for measure in ("deletion", "insertion", "drop")
    for null in ("", "_null")
)
"""Further columns of images.csv, where faithfulness is measured."""
GRADIENT_COLUMNS = ("pse_backward",)
"""Further columns of images.csv, where effects are estimated from gradients."""
NOT_IN_ROWS = ("clean", "adversarial", "maps")
"""The large arrays of a chunk, which `image_rows` does not need."""
CELL_COLUMNS = (
    *("id", "attack", "row", "column", "suppression", "promotion", "ratio", "kind", "norm"),
    *("map_label_clean", "map_target_adversarial"),
)
KINDS = ("suppression", "balanced", "promotion")  # of cells that act, in the order of `effect.Kind`
SHARE_COLUMNS = tuple(f"share_{kind}" for kind in KINDS)
KIND_LABELS = tuple(kind.label for kind in list(effect.Kind)[1:])
SUMMARY_COLUMNS = (
    ("attack", "attack", ""),
    ("pictures", "pictures", "d"),
    ("success", "success", ".0%"),
    ("l2", "median L2", ".3f"),
    ("linf", "median Linf", ".4f"),
    ("l1", "median L1", ".1f"),
    ("l0", "median L0", ".0f"),
    ("forward", "median passes", ".0f"),
    ("effect", "effect", ""),
    ("share_suppression", "suppression", ".3f"),
    ("share_balanced", "balanced", ".3f"),
    ("share_promotion", "promotion", ".3f"),
    ("rho_effect_norm", "rho(s+p, norm)", ".3f"),
    ("is_label", "IS, true class", ".3f"),
    ("is_target", "IS, target", ".3f"),
    ("is_null", "IS, null", ".3f"),
    ("is_shuffled", "IS, shuffled", ".3f"),
    *(
        (f"{measure}_{which}{null}", f"{name}, {whose}{', null' if null else ''}", ".3f")
        for which, whose in (("label", "true class"), ("target", "target"))
        for measure, name in (("deletion", "deletion"), ("insertion", "insertion"), ("drop", "average drop"))
        for null in ("", "_null")
    ),
)
"""Key, heading and format; of faithfulness and `effect` where the rows have them, see `summary_columns`."""


def image_rows(
    network: Network, attack: str, arrays: Mapping[str, np.ndarray], definition: effect.Definition = effect.PAPER
) -> Iterator[dict[str, Any]]:
    """One row for every picture of a chunk, with the columns `IMAGE_COLUMNS`, and those that were asked for."""
    shares = np.asarray(effect.shares(jnp.asarray(arrays["kind"])))
    for i, name in enumerate(arrays["ids"]):
        label, target = int(arrays["labels"][i]), int(arrays["targets"][i])
        kind = arrays["kind"][i]
        yield {
            "id": str(name),
            "attack": attack,
            "label": label,
            "label_name": network.class_name(label),
            "target": target,
            "target_name": network.class_name(target),
            "success": bool(arrays["success"][i]),
            "adversarial_class": int(arrays["adversarial_class"][i]),
            **{key: arrays[key][i] for key in ("l0", "l1", "l2", "linf", "forward", "backward", "pse_forward")},
            "first_success": arrays["iterations"][i],
            "cells": kind.size,
            "cells_none": int(np.sum(kind == effect.Kind.NONE)),
            "share_suppression": shares[i, 0],
            "share_balanced": shares[i, 1],
            "share_promotion": shares[i, 2],
            "rho_effect_norm": _rho(arrays, i),
            **{key: arrays[key][i] for key in ("is_label", "is_target", "is_null", "is_asm", "is_asm_null")},
            **{
                f"{which}_map_{share.removeprefix('share_')}": arrays[f"{which}_map_by_kind"][i, j]
                for which in ("label", "target")
                for j, share in enumerate(SHARE_COLUMNS)
            },
            "is_shuffled": np.mean(arrays["is_shuffled"][i]),
            "is_shuffled_sd": np.std(arrays["is_shuffled"][i]),
            **{key: arrays[key][i] for key in GRADIENT_COLUMNS + FAITHFULNESS_COLUMNS if key in arrays},
            **named(definition),
        }


def named(definition: effect.Definition) -> dict[str, str]:
    """A further column of every table, where effects are not the paper's."""
    return {} if definition == effect.PAPER else {"effect": str(definition)}


def cell_rows(
    attack: str, arrays: Mapping[str, np.ndarray], cell: effect.Cell, definition: effect.Definition = effect.PAPER
) -> Iterator[dict[str, Any]]:
    """One row for every cell of every picture of a chunk, with the columns `CELL_COLUMNS` and `named`."""
    size, (tall, wide) = arrays["clean"].shape[1:3], effect.sides(cell)
    maps = np.asarray(cam.resize(jnp.asarray(arrays["maps"]), size))
    for i, name in enumerate(arrays["ids"]):
        kind = arrays["kind"][i]
        for row, column in np.ndindex(kind.shape):
            window = (slice(row * tall, (row + 1) * tall), slice(column * wide, (column + 1) * wide))
            yield {
                "id": str(name),
                "attack": attack,
                "row": row,
                "column": column,
                **{k: arrays[k][i, row, column] for k in ("suppression", "promotion", "ratio", "norm")},
                "kind": effect.Kind(kind[row, column]).label,
                "map_label_clean": np.mean(maps[i, 0][window]),
                "map_target_adversarial": np.mean(maps[i, 3][window]),
                **named(definition),
            }


def summarise(rows: Sequence[Mapping[str, Any]], names: Sequence[str], *, seed: int) -> list[dict[str, Any]]:
    """One row for every attack: success, median norms, and means over pictures with 95 % bootstrap intervals."""
    summary = []
    for name in names:
        mine = [row for row in rows if row["attack"] == name]
        good = [row for row in mine if row["success"]]

        def median(key, good=good):
            return float(np.median([row[key] for row in good])) if good else float("nan")

        def mean(key, low: float, high: float, good=good) -> Estimate:
            return bootstrap_mean([row[key] for row in good], seed=seed).within(low, high)

        summary.append(
            {
                "attack": name,
                "pictures": len(mine),
                "success": len(good) / len(mine) if mine else float("nan"),
                **{key: median(key) for key in ("l0", "l1", "l2", "linf", "forward", "backward")},
                **{key: mean(key, 0, 1) for key in ("share_suppression", "share_balanced", "share_promotion")},
                **{key: mean(key, 0, 1) for key in ("is_label", "is_target", "is_null", "is_shuffled")},
                "rho_effect_norm": mean("rho_effect_norm", -1, 1),
                **{key: mean(key, -np.inf, np.inf) for row in mine[:1] for key in FAITHFULNESS_COLUMNS if key in row},
                **({"effect": mine[0]["effect"]} if mine and "effect" in mine[0] else {}),
            }
        )
    return summary


def summary_columns(summary: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Those of `SUMMARY_COLUMNS` that the rows have."""
    return [column for column in SUMMARY_COLUMNS if all(column[0] in row for row in summary)]


def as_json(summary: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The summary with estimates as dicts, and None for what is not a number."""

    def plain(value):
        if isinstance(value, Estimate):
            return {key: plain(v) for key, v in dataclasses.asdict(value).items()}
        return None if isinstance(value, float) and not np.isfinite(value) else value

    return [{key: plain(value) for key, value in row.items()} for row in summary]


@dataclasses.dataclass(frozen=True)
class CellColumns:
    """Norms, overall effects and ratios of all perturbed cells, by attack."""

    norms: dict[str, np.ndarray]
    effects: dict[str, np.ndarray]
    ratios: dict[str, np.ndarray]


def overview_columns(chunks: Iterable[tuple[str, Mapping[str, np.ndarray]]]) -> CellColumns:
    """The columns of all cells with a perturbation, for the overview figures."""
    gathered: dict[str, list[np.ndarray]] = {}
    for name, arrays in chunks:
        touched = arrays["norm"] > 0
        overall = arrays["suppression"] + arrays["promotion"]
        stacked = np.stack([arrays["norm"][touched], overall[touched], arrays["ratio"][touched]])
        gathered.setdefault(name, []).append(stacked)
    whole = {name: np.concatenate(columns, axis=1) for name, columns in gathered.items()}
    return CellColumns(*({name: columns[i] for name, columns in whole.items()} for i in range(3)))


def _rho(arrays: Mapping[str, np.ndarray], i: int) -> float:
    """Spearman's rho between the overall effect s + p of the cells and the norm of the perturbation in them."""
    norms = arrays["norm"][i].ravel()
    touched = norms > 0
    return spearman((arrays["suppression"][i] + arrays["promotion"][i]).ravel()[touched], norms[touched])


def summary_lines(summary: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The summary as lines of text, one attack after the other."""

    def shown(value: Any, spec: str) -> str:
        return "-" if isinstance(value, float) and np.isnan(value) else format(value, spec)

    columns = summary_columns(summary)[1:]
    width = max(16, *(len(heading) for _, heading, _ in columns))
    for row in summary:
        yield f"\n{row['attack']}"
        for key, heading, spec in columns:
            yield f"  {heading:<{width}} {shown(row[key], spec)}"
