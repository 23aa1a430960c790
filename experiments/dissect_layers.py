"""What do units detect, layer by layer?

    python experiments/dissect_layers.py --model efficientnet_lite0 --node _blocks.2 --node _blocks.10 --node _conv_head

Dissects several layers in one walk and counts concept detectors by category and depth, in both conventions. Claim (Bau
et al. 2017, section 3.2): colour detectors belong to the first layers, and what needs larger structure (textures, then
objects) to later ones. With a set that has colours and textures only, objects cannot be found: the answer is about
what is there. Intervals are over the units of a layer.

Writes dissect_layers/answers.json and detectors.png.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import tyro

from jaxinterp import models, plots
from jaxinterp.cli import guarded
from jaxinterp.dissect import CONVENTIONS, counts
from jaxinterp.processes import current, open_run
from jaxinterp.runs import versions
from jaxinterp.statistics import Estimate, difference, proportion
from jaxinterp.study import UNDECIDED, Answer, Units, dissected, verdict

DEPTHS = 5


def spread(nodes: tuple[str, ...]) -> tuple[str, ...]:
    """A few nodes from the first to the last."""
    chosen = np.unique(np.linspace(0, len(nodes) - 1, DEPTHS).round().astype(int))
    return tuple(nodes[i] for i in chosen)


def main(setting: Units) -> None:
    """Detectors by category and depth."""
    network = models.network(setting.model)
    nodes = setting.node or spread(network.nodes[: _last(network) + 1])
    if len(nodes) < 2:
        raise ValueError(f"--node: expected at least two layers, got {len(nodes)}")
    setting = dataclasses.replace(setting, node=nodes)
    out = setting.out or Path("results/study") / setting.model
    dissection = dissected(setting)
    layers = dissection.layers
    run = open_run(out / "dissect_layers", {"dissection": dissection.run.config})
    categories = next(iter(layers.values())).concepts.categories

    panels: dict[str, dict[str, list[Estimate]]] = {}
    results = {}
    for node, layer in layers.items():
        results[node] = {}
        for convention in CONVENTIONS:
            detectors, concepts = counts(layer.best, convention)
            results[node][convention] = {
                category: {"detectors": int(d), "concepts": int(c)}
                for category, d, c in zip(categories, detectors, concepts, strict=True)
            }
            for category, d in zip(categories, detectors, strict=True):
                series = panels.setdefault(f"units that detect, {convention}", {}).setdefault(category, [])
                series.append(proportion(int(d), layer.units))
    figure = plots.curves(panels, range(len(nodes)), xlabel="layer", names=nodes)
    plots.save(figure, run.directory / "detectors.png")

    first, last = layers[nodes[0]], layers[nodes[-1]]
    answers = []
    for index, category in enumerate(categories):
        shares = [layer.best.detects("category")[:, index].astype(float) for layer in (first, last)]
        (few, of_first), (many, of_last) = ends = [(int(share.sum()), len(share)) for share in shares]
        more = difference(*ends)
        # Colours are expected to become fewer, all others more.
        sign = -1 if category == "color" else 1
        bounds = sorted((sign * more.low, sign * more.high))
        signed = Estimate(sign * more.mean, bounds[0], bounds[1], more.count)
        word = "fewer" if sign < 0 else "more"
        claim = f"{word} units detect a {category} in {nodes[-1]} than in {nodes[0]}"
        settled = verdict(signed, 0.0) if any(share.any() for share in shares) else UNDECIDED
        answers.append(Answer(claim, f"{few / of_first:.1%} to {many / of_last:.1%}, difference {more:.3f}", settled))
    if current().first:
        run.write_json(
            "answers.json",
            {
                "study": "dissect_layers",
                "config": run.config,
                "versions": versions(),
                "images": first.dissection.images,
                "answers": [dataclasses.asdict(answer) for answer in answers],
                "results": results,
            },
        )
    for node, found in results.items():
        print(f"{node}, {layers[node].units} units")
        for convention, table in found.items():
            row = ", ".join(f"{name} {n['detectors']} ({n['concepts']} concepts)" for name, n in table.items())
            print(f"  {convention:9} {row}")
    print()
    for answer in answers:
        print(f"{answer.verdict:<30} {answer.claim}: {answer.measured}")
    print(f"\n{first.dissection.images} images; {run.directory}/answers.json")


def _last(network) -> int:
    return network.nodes.index(network.cam_node) if network.cam_node else len(network.nodes) - 1


if __name__ == "__main__":
    sys.exit(guarded(lambda words: main(tyro.cli(Units, description=__doc__, args=words))))
