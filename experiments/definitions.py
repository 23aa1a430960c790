"""Do the definitions of a cell's effect agree?

    python experiments/definitions.py --model efficientnet_lite0 --size 28

The paper leaves one cell out and looks at logits (arXiv 1904.02057, section 4). Here the same perturbations are looked
at with a cell alone added to the original (add one in), on log-softmax and softmax in place of logits, and by an
estimate of first order from one gradient. Each is compared with the paper's definition: how many of the cells keep
their kind (beside what chance alone would give with these shares), and how the overall effects s + p rank (Spearman
within a picture). The rank correlation of the estimate says how good it is for screening. Writes
definitions/answers.json and agreement.png.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from typing import Any

import numpy as np
import tyro

from jaxinterp import effect, models, plots
from jaxinterp.cli import guarded
from jaxinterp.statistics import bootstrap_mean, spearman
from jaxinterp.study import Answer, Setting, begin, problem, verdict

DEFINITIONS: dict[str, dict[str, Any]] = {
    "add one in": {"method": "add_one_in"},
    "log-softmax": {"scale": "log_softmax"},
    "softmax": {"scale": "softmax"},
    "first order (estimate)": {"method": "first_order"},
}
AGREEMENT, RHO = 0.5, 0.5


@dataclasses.dataclass(frozen=True)
class Definitions(Setting):
    """What `Setting` has, and the cells.

    Attributes:
        size: Side of the cells that definitions are compared at, in pixels.
    """

    size: int = 28


def compare(first: effect.Effect, other: effect.Effect) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every picture the share of cells of the same kind, what chance would give, Spearman's rho of s + p."""
    rows = []
    for i in range(len(first.kind)):
        a, b = np.asarray(first.kind[i]).ravel(), np.asarray(other.kind[i]).ravel()
        acting = (a != effect.Kind.NONE) & (b != effect.Kind.NONE)
        if acting.sum() < 3:
            rows.append((np.nan,) * 3)
            continue
        a, b = a[acting], b[acting]
        chance = sum(np.mean(a == k) * np.mean(b == k) for k in effect.Kind)
        overall = [np.asarray(e.suppression[i] + e.promotion[i]).ravel()[acting] for e in (first, other)]
        rows.append((np.mean(a == b), chance, spearman(*overall)))
    agreement, chance, rho = np.array(rows, np.float64).reshape(-1, 3).T
    return agreement, chance, rho


def main(setting: Definitions) -> None:
    """Agreement of definitions."""
    side = models.network(setting.model).image_size
    effect.grid(side, side, setting.size)
    study = begin("definitions", setting, {"size": setting.size})
    model = study.found.network.bind(study.found.params)

    def analyse(attack, arrays):
        first = effect.pse(model, *problem(arrays), setting.size)
        made = [
            compare(first, effect.pse(model, *problem(arrays), setting.size, **how)) for how in DEFINITIONS.values()
        ]
        return {"compared": np.array(made).transpose(2, 0, 1)}  # [pictures, definitions, (agreement, chance, rho)]

    parts = defaultdict(list)
    for attack, arrays, extra in study.analysed(analyse):
        parts[attack].append(extra["compared"][arrays["success"]])
    found = {attack: np.concatenate(each) for attack, each in parts.items()}

    def mean(values):
        return bootstrap_mean(values, seed=setting.seed)

    answers = []
    for attack, values in found.items():
        for d, name in enumerate(DEFINITIONS):
            agreement, chance, rho = (mean(values[:, d, i]) for i in range(3))
            kinds = f"{attack}: with {name} more than half of the cells keep their kind"
            answers.append(Answer(kinds, f"{agreement}, by chance {chance}", verdict(agreement, AGREEMENT)))
            ranks = f"{attack}: with {name} s + p rank alike, Spearman > {RHO}"
            answers.append(Answer(ranks, f"rho {rho}", verdict(rho, RHO)))
    panels = {
        title: {
            attack: {name: mean(values[:, d, i]) for d, name in enumerate(DEFINITIONS)}
            for attack, values in found.items()
        }
        for title, i in (("share of cells that keep their kind", 0), ("Spearman's rho of s + p", 2))
    }
    plots.save(plots.bars(panels, ylabel="against the paper's definition"), study.run.directory / "agreement.png")
    study.conclude(
        answers,
        {
            attack: {
                name: dict(zip(("agreement", "chance", "rho"), (format(mean(v)) for v in values[:, d].T), strict=True))
                for d, name in enumerate(DEFINITIONS)
            }
            for attack, values in found.items()
        },
    )


if __name__ == "__main__":
    sys.exit(guarded(lambda words: main(tyro.cli(Definitions, description=__doc__, args=words))))
