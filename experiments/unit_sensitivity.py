"""Are the units that attacks move the ones that mean something?

    python experiments/unit_sensitivity.py --model efficientnet_lite0 --node _conv_head --top 100

For every attack and layer: how much each unit changes between a natural image and its adversarial one, in magnitude
(absolute, relative to the natural activation, mean squared) and in position (shift of the maximum, change of the mask).
The most sensitive units are compared with units drawn at random (the hypergeometric null is exact), and sensitivity
with the best IoU (Spearman, with a bootstrap interval over pairs). A unit with large activations changes much in
absolute terms whatever the attack does; how far the absolute measure follows the units' scale is shown beside it.
Claim (arXiv 1904.02057): in deep layers, sensitive units hold more concept detectors than random ones.

Writes unit_sensitivity/answers.json, units.csv (a row for every unit, layer and attack), enrichment.png and
correlation.png.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro

from jaxinterp import plots
from jaxinterp.cli import guarded
from jaxinterp.concepts.tables import Layer
from jaxinterp.dissect import MINIMUM
from jaxinterp.dissect.detectors import Convention
from jaxinterp.dissect.dissection import extractor
from jaxinterp.dissect.sensitivity import MEASURES, Enrichment, change, correlation, enrichment, mean_over_pairs
from jaxinterp.processes import current
from jaxinterp.statistics import Estimate, spearman
from jaxinterp.study import CONFIRMED, NOT_CONFIRMED, UNDECIDED, Answer, Units, begin, dissected

NAMES = {
    "plain": "absolute change",
    "relative": "relative change",
    "squared": "mean squared change",
    "shift": "shift of the maximum",
    "mask": "change of the mask",
}


@dataclasses.dataclass(frozen=True)
class Sensitive(Units):
    """What `Units` has, and how many units are looked at.

    Attributes:
        top: Number of most sensitive units.
        convention: How detectors are counted: best (a unit counts once) or category.
    """

    top: int = 100
    convention: Convention = "best"


def settled(found: Enrichment) -> str:
    """Whether there are more detectors than 97.5 % of random draws have, or fewer."""
    if found.detectors in (0, found.units):
        return UNDECIDED
    return CONFIRMED if found.more < 0.025 else NOT_CONFIRMED if found.fewer < 0.025 else UNDECIDED


def by_category(layer: Layer, values: np.ndarray, top: int) -> dict[str, dict[str, Any]]:
    """Detectors of every category among the most sensitive units."""
    table = {}
    for index, category in enumerate(layer.concepts.categories):
        found = enrichment(values, layer.best.detects("category")[:, index], top)
        table[category] = dataclasses.asdict(found)
    return table


def main(setting: Sensitive) -> None:
    """Sensitivity of units against what they detect."""
    dissection = dissected(setting)
    layers = dissection.layers
    nodes = tuple(layers)
    smallest = min(layer.units for layer in layers.values())
    if not 1 <= setting.top < smallest:
        raise ValueError(f"--top: expected 1 to {smallest - 1}, below the number of units, got {setting.top}")
    study = begin("unit_sensitivity", setting, {"dissection": dissection.run.config})
    run, params = extractor(study.found.network, nodes), study.found.params
    limits = [jnp.asarray(layers[node].dissection.thresholds) for node in nodes]

    def analyse(_, arrays):
        """Every measure of every pair, unit and layer."""
        pairs = zip(nodes, run(params, arrays["clean"]), run(params, arrays["adversarial"]), limits, strict=True)
        made = {}
        for node, natural, adversarial, limit in pairs:
            changes = change(natural, adversarial, limit)
            made |= {f"{node}/{name}": getattr(changes, name) for name in (*MEASURES, "norm")}
        return made

    values: dict[tuple[str, str, str], list[np.ndarray]] = {}
    for attack, arrays, extra in study.analysed(analyse):
        success = arrays["success"].astype(bool)
        for key, array in extra.items():
            node, _, name = key.rpartition("/")
            values.setdefault((attack, node, name), []).append(array[success])

    answers, results, rows = [], {}, []
    counted: dict[str, dict[str, dict[str, Estimate]]] = {}
    related: dict[str, dict[str, dict[str, Estimate]]] = {}
    for node, layer in layers.items():
        detects = np.asarray(layer.best.detects(setting.convention).any(axis=1))
        for attack in study.found.attacks:
            pairs = {name: np.concatenate(values[attack, node, name]) for name in (*MEASURES, "norm")}
            means = {name: mean_over_pairs(each.astype(np.float64)) for name, each in pairs.items()}
            number = len(pairs["norm"])
            record: dict[str, Any] = {"pairs": number, "detectors": int(detects.sum()), "units": layer.units}
            for name in MEASURES:
                claim = f"{attack}, {node}: the {setting.top} most sensitive units ({NAMES[name]}) hold more detectors"
                if number == 0:
                    answers.append(Answer(claim, "no picture was attacked with success", UNDECIDED))
                    continue
                found = enrichment(means[name], detects, setting.top)
                rho = Estimate(
                    *correlation(pairs[name].astype(np.float64), layer.best.score, seed=setting.seed), number
                )
                there = ~np.isnan(means[name])
                scale = spearman(means[name][there], means["norm"][there])
                record[name] = {
                    "enrichment": dataclasses.asdict(found),
                    "rho with best IoU": dataclasses.asdict(rho),
                    "rho with the units' scale": scale,
                    "by category": by_category(layer, means[name], setting.top),
                }
                low, high, count = *map(float, found.interval), float(found.found)
                counted.setdefault(f"{attack}, {node}", {}).setdefault("most sensitive", {})[NAMES[name]] = Estimate(
                    count, count, count, number
                )
                counted[f"{attack}, {node}"].setdefault("at random", {})[NAMES[name]] = Estimate(
                    found.expected, low, high, number
                )
                related.setdefault(node, {}).setdefault(attack, {})[NAMES[name]] = rho
                measured = (
                    f"{found.found}, at random {found.expected:.1f} ({low:.0f} to {high:.0f}; p {found.more:.3g});"
                    f" rho with IoU {rho:.2f}, with scale {scale:.2f}; {number} pairs"
                )
                answers.append(Answer(claim, measured, settled(found)))
            results[f"{attack}, {node}"] = record
            rows += [
                {
                    "attack": attack,
                    "node": node,
                    "unit": unit + 1,
                    "label": layer.name(int(layer.best.concept[unit])),
                    "category": layer.category(unit),
                    "iou": layer.best.score[unit],
                    "detector": bool(detects[unit]),
                    **{name: means[name][unit] for name in (*MEASURES, "norm")},
                }
                for unit in range(layer.units)
            ]
    columns = ("attack", "node", "unit", "label", "category", "iou", "detector", *MEASURES, "norm")
    if current().first:
        study.run.write_table("units.csv", columns, rows)
    if counted:
        figure = plots.bars(counted, ylabel=f"detectors (IoU > {MINIMUM}) among {setting.top} units")
        plots.save(figure, study.run.directory / "enrichment.png")
        plots.save(plots.bars(related, ylabel="Spearman's rho with best IoU"), study.run.directory / "correlation.png")
    study.conclude(answers, results)


if __name__ == "__main__":
    sys.exit(guarded(lambda words: main(tyro.cli(Sensitive, description=__doc__, args=words))))
