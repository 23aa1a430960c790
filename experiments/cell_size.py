"""How do the shares of the kinds change with the size of a cell?

    python experiments/cell_size.py --model efficientnet_lite0 --sizes 112 56 28 14

The paper looks at pixels and at grids of one size (arXiv 1904.02057, section 4) and reads its three kinds as
properties of the perturbation. If they are, the shares should not depend on the size of the cells that they are taken
at. Effects of all sizes are taken of the same perturbations; the coarsest is compared with the finest. Writes
cell_size/answers.json and shares.png.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict

import numpy as np
import tyro

from jaxinterp import effect, models, plots
from jaxinterp.cli import guarded
from jaxinterp.explain.tables import KINDS
from jaxinterp.statistics import bootstrap_mean
from jaxinterp.study import CONFIRMED, NOT_CONFIRMED, UNDECIDED, Answer, Setting, begin, problem

CLOSE = 0.05  # a difference of shares that would not change what one says


@dataclasses.dataclass(frozen=True)
class Sizes(Setting):
    """What `Setting` has, and the sizes.

    Attributes:
        sizes: Sides of cells, in pixels.
    """

    sizes: tuple[int, ...] = (112, 56, 28, 14)


def main(setting: Sizes) -> None:
    """Shares of kinds by size of the cells."""
    sizes = sorted(set(setting.sizes), reverse=True)
    if len(sizes) < 2:
        raise ValueError(f"--sizes: expected at least two sizes to compare, got {sizes}")
    side = models.network(setting.model).image_size
    for size in sizes:
        effect.grid(side, side, size)
    study = begin("cell_size", setting, {"sizes": sizes})
    model = study.found.network.bind(study.found.params)

    def analyse(attack, arrays):
        shares, none = [], []
        for size in sizes:
            e = effect.pse(model, *problem(arrays), size)
            shares.append(effect.shares(e.kind))
            none.append(np.mean(np.asarray(e.kind) == effect.Kind.NONE, axis=(1, 2)))
        return {"shares": np.stack(shares, axis=1), "none": np.stack(none, axis=1)}

    found = defaultdict(list)
    for attack, arrays, extra in study.analysed(analyse):
        found[attack].append(extra["shares"][arrays["success"]])
    shares = {attack: np.concatenate(parts) for attack, parts in found.items()}  # [pictures, sizes, kinds]

    def mean(values):
        return bootstrap_mean(values, seed=setting.seed)

    answers = []
    for attack, values in shares.items():
        for j, kind in enumerate(KINDS):
            change = mean(values[:, 0, j] - values[:, -1, j])
            claim = f"{attack}: the share of {kind} cells is the same (within {CLOSE}) at {sizes[0]} and {sizes[-1]} px"
            if change.count < 2:
                settled = UNDECIDED
            elif change.low > -CLOSE and change.high < CLOSE:
                settled = CONFIRMED
            else:
                settled = NOT_CONFIRMED if change.low > CLOSE or change.high < -CLOSE else UNDECIDED
            answers.append(Answer(claim, f"it changes by {change}", settled))
    lines = {
        f"share of {kind} cells": {
            attack: [mean(values[:, i, j]) for i in range(len(sizes))] for attack, values in shares.items()
        }
        for j, kind in enumerate(KINDS)
    }
    plots.save(
        plots.curves(lines, sizes, xlabel="side of a cell, pixels", log=True), study.run.directory / "shares.png"
    )
    study.conclude(
        answers,
        {
            attack: {
                str(size): {kind: format(mean(values[:, i, j])) for j, kind in enumerate(KINDS)}
                for i, size in enumerate(sizes)
            }
            for attack, values in shares.items()
        },
    )


if __name__ == "__main__":
    sys.exit(guarded(lambda words: main(tyro.cli(Sizes, description=__doc__, args=words))))
