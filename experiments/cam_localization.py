"""Do perturbations lie where class activation maps are high, and which kinds of cells lie there?

    python experiments/cam_localization.py --model efficientnet_lite0

Answers two findings of the paper (arXiv 1904.02057, section 5) for the attacked pictures:

(b) the interpretability score is above its null, and lowest for I-FGSM;
(c) the map of the true class on the original picture is higher on suppression-dominated cells than on
    promotion-dominated ones, and that of the target on the adversarial picture the other way round.

Scores are given at the 30th to 90th percentile with their null: on the map of the true class on the original picture,
on that of the target on the adversarial one, on the adversarial saliency map (ASM), and with the pixels of the
perturbation shuffled. Maps are compared between cells in units of a map's range, since networks differ in the scale of
logits. Writes cam_localization/answers.json, curves.png, kinds.png.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxinterp import localize, plots
from jaxinterp.attacks.attack import Attack
from jaxinterp.attacks.driver import example_keys
from jaxinterp.cli import guarded
from jaxinterp.statistics import Estimate, bootstrap_mean
from jaxinterp.study import Answer, Setting, Study, begin, problem, verdict

MAPS = {"label": "F(x0,t0)", "target": "F(x',t)"}
KINDS = ("suppression", "balanced", "promotion")
WHAT = ("score", "null")


PERCENTILES = (30, 40, 50, 60, 70, 80, 90)
CURVES = ("map of t0", "map of t", "ASM", "shuffled")


def curves_of(study: Study) -> Callable[[Attack, Mapping[str, np.ndarray]], dict[str, Any]]:
    """The analysis of a chunk: [pictures, percentiles] of every curve and its null."""
    model, key = study.found.network.bind(study.found.params), jax.random.key(study.seed)

    def analyse(_: Attack, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        clean, adversarial, labels, targets = problem(arrays)
        delta, of_label = jnp.asarray(adversarial - clean), jnp.asarray(arrays["maps"][:, 0])
        saliency = localize.adversarial_saliency(model, clean, labels, targets)
        keys = example_keys(key, jnp.asarray(clean))
        made = {
            name: localize.score_curve(delta, jnp.asarray(which), PERCENTILES)
            for name, which in zip(CURVES, (of_label, arrays["maps"][:, 3], saliency), strict=False)
        }
        shuffled = [jnp.mean(localize.shuffled_score(delta, of_label, keys, float(p)), axis=1) for p in PERCENTILES]
        made["shuffled"] = jnp.stack(shuffled, axis=1), made["map of t0"][1]
        return {f"{name}, {what}": v for name, both in made.items() for what, v in zip(WHAT, both, strict=True)}

    return analyse


def of_pictures(study: Study) -> dict[str, list[dict[str, Any]]]:
    """By attack, what is needed of every picture that was attacked with success."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in study.found.attacks}
    for attack, arrays, extra in study.analysed(curves_of(study)):
        for i in np.flatnonzero(arrays["success"]):
            four = arrays["maps"][i]
            scale = {"label": np.ptp(four[0]) or np.nan, "target": np.ptp(four[3]) or np.nan}
            found[attack].append(
                {
                    "id": str(arrays["ids"][i]),
                    **{key: arrays[key][i] for key in ("is_label", "is_null", "is_asm", "is_asm_null")},
                    "is_shuffled": np.mean(arrays["is_shuffled"][i]),
                    "curves": {name: tuple(extra[f"{name}, {what}"][i] for what in WHAT) for name in CURVES},
                    **{which: arrays[f"{which}_map_by_kind"][i] / scale[which] for which in MAPS},
                }
            )
    return found


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """The mean over attacks, each with its own successes."""
    value = float(np.nanmean([e.mean for e in estimates]))
    return Estimate(value, value, value, sum(e.count for e in estimates))


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
    sign = [attack for attack in found if attack.partition(":")[0] == "ifgsm"]
    lowest = {row["id"]: row["is_label"] for attack in sign[:1] for row in found[attack]}
    for attack, rows in found.items():
        if sign and attack not in sign:
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
    config = {"percentiles": list(PERCENTILES), "curves": list(CURVES)}
    study = begin("cam_localization", setting, config)
    found = of_pictures(study)

    def means(rows, name, place) -> list[Estimate]:
        columns = [[row["curves"][name][place][p] for row in rows] for p in range(len(PERCENTILES))]
        return [bootstrap_mean(column, seed=setting.seed) for column in columns]

    curves = {
        name: {attack: [means(rows, name, place) for place in range(2)] for attack, rows in found.items()}
        for name in CURVES
    }
    if any(found.values()):
        plots.save(
            plots.curves(
                {
                    f"score on the {name}" if name != "shuffled" else "pixels shuffled, map of t0": {
                        **{attack: score for attack, (score, _) in each.items()},
                        "null": [mean_of([null[p] for _, null in each.values()]) for p in range(len(PERCENTILES))],
                    }
                    for name, each in curves.items()
                },
                PERCENTILES,
                xlabel="percentile of the map",
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
                **{
                    name: dict(zip(WHAT, ([format(e) for e in part] for part in each[attack]), strict=True))
                    for name, each in curves.items()
                },
            }
            for attack in found
        },
    )


if __name__ == "__main__":
    sys.exit(guarded(lambda words: main(tyro.cli(Setting, description=__doc__, args=words))))
