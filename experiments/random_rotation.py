"""Are concepts a property of single units, or of the space they span?

    python experiments/random_rotation.py --model efficientnet_lite0 --rotations 3 --amounts 0 0.25 0.5 0.75 1

Turns the units of a layer into random orthogonal mixtures of themselves, and back right behind it: the network computes
the same function (accuracy is unchanged up to rounding), but what is dissected are the mixtures. Rotations by less than
the whole are powers of it. Claim (Bau et al. 2017, section 3.1): a rotated basis loses its concept detectors.

Writes random_rotation/answers.json and rotation.png.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxinterp import load, plots
from jaxinterp.cli import guarded
from jaxinterp.dissect import counts
from jaxinterp.network import Network, identity
from jaxinterp.processes import current, open_run
from jaxinterp.runs import versions
from jaxinterp.statistics import Estimate
from jaxinterp.study import CONFIRMED, NOT_CONFIRMED, UNDECIDED, Answer, Units, dissected


@dataclasses.dataclass(frozen=True)
class Rotations(Units):
    """What `Units` has, and the rotations.

    Attributes:
        rotations: Number of random rotations.
        amounts: How far the units are rotated, from 0 to 1.
    """

    rotations: int = 3
    amounts: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)


def rotation(units: int, seed: int, amount: float) -> np.ndarray:
    """A power of a random rotation of `units` dimensions (uniformly drawn, determinant 1), float32 [U,U]."""
    from scipy.linalg import expm, logm
    from scipy.stats import special_ortho_group

    if amount == 0:
        return np.eye(units, dtype=np.float32)
    whole = special_ortho_group.rvs(units, random_state=np.random.default_rng(seed))
    if amount == 1:
        return whole.astype(np.float32)
    generator = np.real(logm(whole))
    return expm(amount * (generator - generator.T) / 2).astype(np.float32)


def rotated(network: Network, node: str) -> Network:
    """The network whose parameters are a dict: the original `params`, and `turn` [U,U]; the node shows the mixtures."""
    return dataclasses.replace(network, name=f"{network.name}, rotated", apply=functools.partial(_apply, network, node))


def _apply(network: Network, node: str, params: Any, images: Any, tap: Any = identity) -> Any:
    def turned(name, x):
        if name != node:
            return tap(name, x)
        exact = jax.lax.Precision.HIGHEST
        mixed = tap(name, jnp.matmul(x, params["turn"], precision=exact))
        return jnp.matmul(mixed, params["turn"].T, precision=exact)

    return network.apply(params["params"], images, turned)


def main(setting: Rotations) -> None:
    """Detectors of a rotated basis."""
    if setting.rotations < 1:
        raise ValueError(f"--rotations must be at least 1, got {setting.rotations}")
    amounts = sorted(set(setting.amounts) | {0.0, 1.0})
    if not 0 <= amounts[0] <= amounts[-1] <= 1:
        raise ValueError(f"--amounts: expected numbers from 0 to 1, got {setting.amounts}")
    network, params = load(setting.model)
    out = setting.out or Path("results/study") / setting.model
    dissection = dissected(setting)
    layers = dissection.layers
    config = {"rotations": setting.rotations, "amounts": amounts, "seed": setting.seed}
    run = open_run(out / "random_rotation", {"dissection": dissection.run.config, **config})
    if len(layers) != 1:
        raise ValueError(f"--node: expected one layer, got {len(layers)}")
    [(node, layer)] = layers.items()
    setting = dataclasses.replace(setting, node=(node,))
    images = jax.random.uniform(jax.random.key(setting.seed), (4, network.image_size, network.image_size, 3))
    expected = np.asarray(jax.jit(network.bind(params))(images))

    units, concepts = (np.zeros((setting.rotations, len(amounts)), int) for _ in range(2))
    moved = 0.0
    turned = rotated(network, node)
    forward = jax.jit(lambda p, x: turned.apply(p, x, identity))
    for i in range(setting.rotations):
        for j, amount in enumerate(amounts):
            if amount == 0:
                found = layer
            else:
                turn = rotation(layer.units, setting.seed + i, amount)
                given = {"params": params, "turn": jnp.asarray(turn)}
                logits = np.asarray(forward(given, images))
                moved = max(moved, float(np.abs(logits - expected).max() / np.abs(expected).max()))
                folder = run.directory / f"rotation-{i}-{amount:g}"
                found = dissected(setting, folder, (turned, given)).layers[node]
            detectors, different = counts(found.best, "best")
            units[i, j], concepts[i, j] = detectors.sum(), different.sum()

    def spread(values: np.ndarray) -> list[Estimate]:
        return [Estimate(float(v.mean()), float(v.min()), float(v.max()), len(v)) for v in values.T]

    panels = {"units that detect": {"rotated": spread(units)}, "concepts detected": {"rotated": spread(concepts)}}
    plots.save(plots.curves(panels, amounts, xlabel="rotation"), run.directory / "rotation.png")
    answers = []
    for what, values in (("units that detect a concept", units), ("different concepts detected", concepts)):
        whole, before = values[:, -1], int(values[0, 0])
        settled = UNDECIDED if before == 0 else CONFIRMED if whole.max() < before else NOT_CONFIRMED
        if settled == NOT_CONFIRMED and whole.min() < before:
            settled = UNDECIDED
        measured = f"{before} before, {whole.min()} to {whole.max()} in {len(whole)} rotations"
        answers.append(Answer(f"{node}: a rotated basis has fewer {what}", measured, settled))
    answers.append(
        Answer(
            f"{node}: the rotated network computes the same function",
            f"logits differ by at most {moved:.2g} of the largest",
            CONFIRMED if moved < 1e-4 else NOT_CONFIRMED,
        )
    )
    if current().first:
        run.write_json(
            "answers.json",
            {
                "study": "random_rotation",
                "config": run.config,
                "versions": versions(),
                "images": layer.dissection.images,
                "answers": [dataclasses.asdict(answer) for answer in answers],
                "results": {
                    "amounts": amounts,
                    "units that detect": units.tolist(),
                    "concepts detected": concepts.tolist(),
                },
            },
        )
    for answer in answers:
        print(f"{answer.verdict:<30} {answer.claim}: {answer.measured}")
    print(f"\n{layer.dissection.images} images; {run.directory}/answers.json")


if __name__ == "__main__":
    sys.exit(guarded(lambda words: main(tyro.cli(Rotations, description=__doc__, args=words))))
