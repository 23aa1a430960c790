"""Do the kinds of cells depend on the strength of an attack, and on whether it has a target?

    python experiments/untargeted_and_strength.py --model efficientnet_lite0 --strengths 1 2 4 8 16

The paper's attacks are targeted and of one strength (arXiv 1904.02057). Here I-FGSM attacks the same pictures at
several eps, targeted and untargeted; the target of an untargeted attack is the class that it reached. A weak or
untargeted attack need only take something from the true class, so one expects more suppression there. Writes
untargeted_and_strength/answers.json and strength.png.
"""

from __future__ import annotations

import dataclasses
import sys

import jax
import numpy as np
import tyro

from jaxinterp import attacks, effect, models, plots
from jaxinterp.cli import guarded
from jaxinterp.explain.tables import KINDS
from jaxinterp.pictures import classify
from jaxinterp.statistics import bootstrap_mean, proportion
from jaxinterp.study import Answer, Setting, begin, verdict

MODES = ("targeted", "untargeted")


@dataclasses.dataclass(frozen=True)
class Strengths(Setting):
    """What `Setting` has, the strengths and the cells.

    Attributes:
        strengths: Values of eps, in units of 1/255.
        size: Side of the cells, in pixels.
    """

    strengths: tuple[float, ...] = (1, 2, 4, 8, 16)
    size: int = 28


def main(setting: Strengths) -> None:
    """Kinds of cells against eps, targeted and untargeted."""
    strengths = sorted(set(setting.strengths))
    if not strengths or not 0 < strengths[0] <= strengths[-1] <= 255:
        raise ValueError(f"--strengths must be above 0 and at most 255, got {strengths}")
    side = models.network(setting.model).image_size
    effect.grid(side, side, setting.size)
    config = {"strengths": strengths, "size": setting.size}
    study = begin("untargeted_and_strength", setting, config)
    model, key = study.found.network.bind(study.found.params), jax.random.key(setting.seed)

    def analyse(_, arrays):
        """Of every picture, mode and eps: success, and shares of the kinds."""
        made = []
        for targets in (arrays["targets"], None):
            for eps in strengths:
                attack = attacks.IFGSM(eps=eps / 255)
                result = attacks.run(attack, model, arrays["clean"], arrays["labels"], targets, key=key)
                success = np.asarray(result.success)
                # Where an untargeted attack failed nothing changed, and any other class will do.
                reached = np.asarray(classify(model, result.images)) if targets is None else targets
                reached = np.where(success, reached, arrays["targets"])
                e = effect.pse(model, arrays["clean"], result.images, arrays["labels"], reached, setting.size)
                made.append(np.column_stack([success, np.asarray(effect.shares(e.kind))]))
        return {"found": np.array(made).reshape(2, len(strengths), len(success), 4).transpose(2, 0, 1, 3)}

    first = list(study.found.attacks)[:1]  # whose chunks hold all pictures
    parts = [extra["found"] for _, _, extra in study.analysed(analyse, first)]
    found = np.concatenate(parts)  # [pictures, modes, strengths, (success, shares)]

    def mean(values):
        return bootstrap_mean(values, seed=setting.seed)

    def shares(m, i, j):
        return mean(found[:, m, i, 1 + j])

    answers = []
    for i, eps in enumerate(strengths):
        more = mean(found[:, 1, i, 1] - found[:, 0, i, 1])
        claim = f"eps {eps:g}/255: untargeted attacks have more suppression-dominated cells than targeted ones"
        answers.append(Answer(claim, f"by {more}, {more.count} pictures", verdict(more, 0.0)))
    for m, mode in enumerate(MODES):
        more = mean(found[:, m, 0, 1] - found[:, m, -1, 1])
        claim = f"{mode}: the weakest attack has more suppression-dominated cells than the strongest"
        answers.append(Answer(claim, f"by {more}, {more.count} pictures", verdict(more, 0.0)))
    panels = {
        "success": {
            mode: [proportion(int(found[:, m, i, 0].sum()), len(found)) for i in range(len(strengths))]
            for m, mode in enumerate(MODES)
        },
        **{
            f"share of {kind} cells": {
                mode: [shares(m, i, j) for i in range(len(strengths))] for m, mode in enumerate(MODES)
            }
            for j, kind in enumerate(KINDS)
        },
    }
    plots.save(plots.curves(panels, strengths, xlabel="eps, 1/255", log=True), study.run.directory / "strength.png")
    study.conclude(
        answers,
        {
            mode: {
                f"{eps:g}": {
                    "success": f"{int(found[:, m, i, 0].sum())} of {len(found)}",
                    **{kind: format(shares(m, i, j)) for j, kind in enumerate(KINDS)},
                }
                for i, eps in enumerate(strengths)
            }
            for m, mode in enumerate(MODES)
        },
    )


if __name__ == "__main__":
    sys.exit(guarded(lambda words: main(tyro.cli(Strengths, description=__doc__, args=words))))
