"""Does silencing the units that an attack moves defend against it?

    python experiments/neuron_masking.py --model efficientnet_lite0 --attack ifgsm --numbers 0 10 30 100 300

The N most sensitive units of a layer are set to zero (sensitivity: relative change under the attack), and accuracy is
measured on the natural images, on the adversarial images that were made against the whole network (fixed), and on
images that are attacked again through the masked network (adaptive). Controls: N random units (mean and spread over
draws; fewer draws where attacks are run again), the N least sensitive, the N best concept detectors, the N worst units.
Only pictures that the network classifies correctly take part, so accuracy begins at 1 on natural images. A defence that
works on fixed images only is none: the adaptive curve is the one that counts. Claim (arXiv 1904.02057): masking
sensitive units raises accuracy on fixed adversarial images more than masking random ones.

Writes neuron_masking/answers.json, and masking-ATTACK.png for every attack.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from jaxinterp import attacks, plots
from jaxinterp.cli import guarded
from jaxinterp.dissect.dissection import extractor
from jaxinterp.dissect.masking import correct, groups, keep, masked
from jaxinterp.dissect.sensitivity import change, mean_over_pairs
from jaxinterp.processes import current, read_part
from jaxinterp.runs import file_name
from jaxinterp.statistics import Estimate, bootstrap_mean, proportion
from jaxinterp.study import UNDECIDED, Answer, Units, begin, dissected, verdict

KINDS = ("natural", "fixed", "adaptive")


@dataclasses.dataclass(frozen=True)
class Masking(Units):
    """What `Units` has, and which units are silenced.

    Attributes:
        numbers: Numbers of silenced units.
        draws: Random draws of units.
        adaptive: Attack the masked networks again.
    adaptive_draws: Random draws for which that is done, too.
    """

    numbers: tuple[int, ...] = (0, 10, 30, 100, 300)
    draws: int = 10
    adaptive: bool = True
    adaptive_draws: int = 2


def main(setting: Masking) -> None:
    """Accuracy without units."""
    dissection = dissected(setting)
    layers = dissection.layers
    if len(layers) != 1:
        raise ValueError(f"--node: expected one layer, got {len(layers)}")
    [(node, layer)] = layers.items()
    numbers = sorted(set(setting.numbers))
    if not numbers:
        raise ValueError("--numbers: expected at least one number of units")
    if numbers[0] < 0 or numbers[-1] > layer.units:
        raise ValueError(
            f"--numbers: expected 0 to {layer.units}, the units of {node}, got {numbers[0]}, {numbers[-1]}"
        )
    if setting.draws < 1:
        raise ValueError(f"--draws must be at least 1, got {setting.draws}")
    config = {
        **{"dissection": dissection.run.config, "numbers": numbers},
        **{"draws": setting.draws, "adaptive": setting.adaptive, "adaptive_draws": setting.adaptive_draws},
    }
    study = begin("neuron_masking", setting, config, ("ifgsm",))
    network, params = study.found.network, study.found.params
    run, limit = extractor(network, (node,)), jnp.asarray(layer.dissection.thresholds)
    without = masked(network, node)
    key = jax.random.key(setting.seed)
    again = {"sensitive", "insensitive", "detectors", "others", *(f"random-{i}" for i in range(setting.adaptive_draws))}
    again = again if setting.adaptive else set()

    chunks: dict[str, list[dict[str, np.ndarray]]] = {}
    for _, attack, arrays in study.found.parts():
        chunks.setdefault(attack, []).append(arrays)
    detects = np.asarray(layer.best.detects().any(axis=1))
    attacked, orders = {}, {}
    for attack, parts in chunks.items():
        stacked = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        success = stacked["success"].astype(bool)
        if not success.any():
            continue
        moved = [
            np.asarray(change(run(params, part["clean"])[0], run(params, part["adversarial"])[0], limit).relative)
            for part in parts
        ]
        sensitivity = mean_over_pairs(np.concatenate(moved)[success].astype(np.float64))
        attacked[attack] = stacked
        orders[attack] = groups(sensitivity, layer.best.score, detects, key=key, draws=setting.draws)

    def curve(attack: str, group: str) -> dict[str, np.ndarray]:
        """[numbers, pictures]: which are classified correctly, natural, fixed, and attacked anew."""
        stacked, order = attacked[attack], orders[attack][group]
        masks = np.array([keep(order, n, layer.units) for n in numbers if n <= len(order)]).reshape(-1, layer.units)
        found = {
            name: correct(network, params, node, masks, stacked[images], stacked["labels"])
            for name, images in (("natural", "clean"), ("fixed", "adversarial"))
        }
        if group in again:
            spec = study.found.attacks[attack]
            rows = [_attacked(spec, without, params, m, stacked, key, setting.batch_size) for m in masks]
            found["adaptive"] = np.array(rows, bool).reshape(len(masks), -1)
        return found

    processes = current()
    every = [(attack, group) for attack, by_group in orders.items() for group in by_group]
    missing = processes.told([e for e in every if study.run.read_part(part_of(*e)) is None])
    for attack, group in tqdm(processes.share(missing), desc=study.name, unit="curve"):
        study.run.write_part(part_of(attack, group), curve(attack, group))
    processes.wait()

    answers, results = [], {}
    for attack in chunks:
        if attack not in attacked:
            claim = f"{attack}: silencing the most sensitive units saves more fixed images than silencing random ones"
            answers.append(Answer(claim, "no picture was attacked with success", UNDECIDED))
    for attack, stacked in attacked.items():
        success = stacked["success"].astype(bool)
        accuracy = {group: read_part(study.run, part_of(attack, group)) for group in orders[attack]}
        panels: dict[str, dict[str, list[Estimate]]] = {}
        for kind in KINDS:
            series = {}
            for group in ("sensitive", "insensitive", "detectors", "others"):
                if kind in accuracy[group]:
                    rows = list(accuracy[group][kind])
                    shown = [proportion(int(row.sum()), row.size) for row in rows]
                    series[group] = shown + [Estimate(np.nan, np.nan, np.nan, 0)] * (len(numbers) - len(shown))
            random = [
                accuracy[g][kind].mean(axis=1) for g in accuracy if g.startswith("random") and kind in accuracy[g]
            ]
            if random:
                means = np.array(random)
                ends = np.quantile(means, [0.025, 0.975], axis=0)
                series["random"] = [
                    Estimate(float(m), float(a), float(b), len(random))
                    for m, a, b in zip(means.mean(axis=0), *ends, strict=True)
                ]
            if series:
                panels[f"{kind} images"] = series
        figure = plots.curves(panels, numbers, xlabel=f"silenced units of {node}, of {layer.units}")
        plots.save(figure, study.run.directory / f"masking-{file_name(attack)}.png")
        random_fixed = np.array([accuracy[g]["fixed"] for g in accuracy if g.startswith("random")])
        for i, number in enumerate(numbers):
            if number == 0:
                continue
            gain = accuracy["sensitive"]["fixed"][i].astype(float) - random_fixed[:, i].mean(axis=0)
            found = bootstrap_mean(gain[success], seed=setting.seed, bounds=(-1, 1))
            better = int((random_fixed[:, i].mean(axis=1) >= accuracy["sensitive"]["fixed"][i].mean()).sum())
            claim = (
                f"{attack}: silencing the {number} most sensitive units saves more fixed images than {number} random"
            )
            lost = 1 - accuracy["sensitive"]["natural"][i].mean()
            measured = (
                f"by {found}; {better} of {setting.draws} random draws do as well;"
                f" {lost:.0%} of natural images lost; {int(success.sum())} pictures"
            )
            answers.append(Answer(claim, measured, verdict(found, 0.0)))
        results[attack] = {
            kind: {name: [format(e) for e in series] for name, series in groups_.items()}
            for kind, groups_ in panels.items()
        }
    study.conclude(answers, {"numbers": numbers, "accuracy": results})


def part_of(attack: str, group: str) -> str:
    """The name of the part that holds a curve."""
    return f"{file_name(attack)}-{group}"


def _attacked(attack: Any, network: Any, params: Any, kept: Any, arrays: Any, key: Any, batch: int) -> np.ndarray:
    """Which images withstand the attack on the masked network: they are classified correctly before and after it."""
    model = network.bind({"params": params, "keep": jnp.asarray(kept)})
    total, found = len(arrays["labels"]), []
    for start in range(0, total, batch):
        rows = np.minimum(np.arange(start, start + batch), total - 1)
        images, labels = jnp.asarray(arrays["clean"][rows]), arrays["labels"][rows]
        before = np.asarray(model(images)).argmax(axis=1) == labels
        result = attacks.run(attack, model, images, labels, arrays["targets"][rows], key=key)
        after = np.asarray(model(result.images)).argmax(axis=1) == labels
        found.append((before & after)[: total - start])
    return np.concatenate(found)


if __name__ == "__main__":
    sys.exit(guarded(lambda words: main(tyro.cli(Masking, description=__doc__, args=words))))
