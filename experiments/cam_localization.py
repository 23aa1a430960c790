"""Do perturbations lie where class activation maps are high, and which kinds of cells lie there?

    python experiments/cam_localization.py --model efficientnet_lite0

Answers two findings of the paper (arXiv 1904.02057, section 5) for the attacked pictures:

(b) the interpretability score is above its null, and lowest for I-FGSM;
(c) the map of the true class on the original picture is higher on suppression-dominated cells than on
    promotion-dominated ones, and that of the target on the adversarial picture the other way round.

Scores are given at the 30th to 90th percentile, with their null, with the pixels of the perturbation shuffled, and with
the adversarial saliency map (ASM) in place of the class activation map. Maps are compared between cells in units of a
map's range, since networks differ in the scale of logits. Writes cam_localization/answers.json, curves.png, kinds.png.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import tyro

from jaxinterp import plots
from jaxinterp.cli import guarded
from jaxinterp.explain.compute import PERCENTILES
from jaxinterp.statistics import Estimate, bootstrap_mean
from jaxinterp.study import Answer, Setting, Study, begin, verdict

MAPS = {"label": "F(x0,t0)", "target": "F(x',t)"}
KINDS = ("suppression", "balanced", "promotion")


def of_pictures(study: Study) -> dict[str, list[dict[str, Any]]]:
    """By attack, what is needed of every picture that was attacked with success."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _, attack, arrays in study.found.parts():
        for i in np.flatnonzero(arrays["success"]):
            four = arrays["maps"][i]
            scale = {"label": np.ptp(four[0]) or np.nan, "target": np.ptp(four[3]) or np.nan}
            found[attack].append(
                {
                    "id": str(arrays["ids"][i]),
                    **{key: arrays[key][i] for key in ("is_curve", "is_null_curve", "is_asm", "is_asm_null")},
                    **{key: arrays[key][i] for key in ("is_label", "is_null")},
                    "is_shuffled": np.mean(arrays["is_shuffled"][i]),
                    **{which: arrays[f"{which}_map_by_kind"][i] / scale[which] for which in MAPS},
                }
            )
    return found


def answers(found: Mapping[str, list[dict[str, Any]]], seed: int) -> list[Answer]:
    """Directions (b) and (c)."""

    def mean(values) -> Estimate:
        return bootstrap_mean(list(values), seed=seed)

    settled = []
    for attack, rows in found.items():
        gain = mean(row["is_label"] - row["is_null"] for row in rows)
        shuffled = mean(row["is_shuffled"] - row["is_null"] for row in rows)
        claim = f"(b) {attack}: interpretability score above its null"
        settled.append(Answer(claim, f"by {gain}; shuffled by {shuffled}", verdict(gain, 0.0)))
        asm = mean(row["is_asm"] - row["is_asm_null"] for row in rows)
        settled.append(Answer(f"(b) {attack}: the score on the ASM above its null", f"by {asm}", verdict(asm, 0.0)))
    lowest = {row["id"]: row["is_label"] for row in found.get("ifgsm", [])}
    for attack, rows in found.items():
        if attack != "ifgsm" and lowest:
            more = mean(row["is_label"] - lowest[row["id"]] for row in rows if row["id"] in lowest)
            claim = f"(b) I-FGSM scores lower than {attack}"
            settled.append(Answer(claim, f"by {more} over {more.count} pictures", verdict(more, 0.0)))
    for attack, rows in found.items():
        for which, (high, low) in {"label": (0, 2), "target": (2, 0)}.items():
            more = mean(row[which][high] - row[which][low] for row in rows)
            claim = f"(c) {attack}: {MAPS[which]} higher on {KINDS[high]} cells than on {KINDS[low]} cells"
            settled.append(Answer(claim, f"by {more} of its range, {more.count} pictures", verdict(more, 0.0)))
    return settled


def main(setting: Setting) -> None:
    """Interpretability scores and kinds of cells on maps, with the paper's directions answered."""
    study = begin("cam_localization", setting, {"percentiles": list(PERCENTILES)})
    found = of_pictures(study)

    def means(columns) -> list[Estimate]:
        return [bootstrap_mean(column, seed=setting.seed) for column in np.transpose(columns)]

    curves = {attack: means([row["is_curve"] for row in rows]) for attack, rows in found.items()}
    nulls = [row["is_null_curve"] for rows in found.values() for row in rows]
    if nulls:
        plots.save(
            plots.curves(
                {"interpretability score": curves},
                PERCENTILES,
                xlabel="percentile of the map",
                reference=("null", np.mean(nulls, axis=0)),
            ),
            study.run.directory / "curves.png",
        )
        by_kind = {
            MAPS[which]: {
                attack: {
                    kind: bootstrap_mean([row[which][j] for row in rows], seed=setting.seed)
                    for j, kind in enumerate(KINDS)
                }
                for attack, rows in found.items()
            }
            for which in MAPS
        }
        plots.save(
            plots.bars(by_kind, ylabel="mean of the map, in units of its range"), study.run.directory / "kinds.png"
        )
    study.conclude(
        answers(found, setting.seed),
        {
            attack: {
                "percentiles": list(PERCENTILES),
                "score": [format(estimate) for estimate in curves[attack]],
                "null": [float(x) for x in np.mean([row["is_null_curve"] for row in rows], axis=0)],
            }
            for attack, rows in found.items()
        },
    )


if __name__ == "__main__":
    sys.exit(guarded(lambda words: main(tyro.cli(Setting, description=__doc__, args=words))))
