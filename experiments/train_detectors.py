"""Trains three detectors of generated pictures.

    python experiments/train_detectors.py

Makes the set of real and generated squares (`jaxinterp.training.generated`) in results/generated, trains the detectors
that have no checkpoint in ckpts/, and prints their accuracy on held-out pictures, by recipe. Writes squares.png.

Expected time on one core: three minutes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import tyro

from jaxinterp import plots
from jaxinterp.cli import guarded
from jaxinterp.job import check_seed
from jaxinterp.training import detectors, generated

SHOWN = 4  # pictures in the figure


def main(
    data: Path = Path("results/generated"), out: Path = Path("results/detectors"), epochs: int = 20, seed: int = 0
) -> None:
    """Trains the detectors.

    Args:
        data: Results directory of the set.
        out: Results directory of the trainings.
        epochs: How often a detector goes through it.
        seed: Of the set and of the training.
    """
    if epochs < 1:
        raise ValueError(f"--epochs must be at least 1, got {epochs}")
    check_seed(seed)
    made = generated.make(data, seed=seed)
    count = len(set(made.train.pictures)), len(set(made.test.pictures))
    print(f"{len(made.train.labels)} squares of {count[0]} pictures, {len(made.test.labels)} of {count[1]} held out")
    print(f"autoencoder: {made.psnr:.1f} dB on held-out pictures")
    plots.save(plots.gallery(examples(made.test)), data / "squares.png")
    for name, found in detectors.ensure(made, out, epochs=epochs, seed=seed).items():
        print(f"{name:20}" + "  ".join(f"{group} {estimate:.2f}" for group, estimate in found.items()))


def examples(squares: generated.Squares) -> list[list[tuple[str, np.ndarray]]]:
    """Of some pictures a row: a real square and what a recipe made of it, for every recipe."""
    rows = []
    for line, picture in enumerate(list(dict.fromkeys(squares.pictures))[:SHOWN]):
        row = []
        for turn, recipe in enumerate(generated.RECIPES):
            k = squares.ids.index(f"{picture}_{len(generated.RECIPES) * line + turn:02d}_{recipe}")
            row += [(f"{picture}, real", squares.images[k - 1] / 255), (recipe, squares.images[k] / 255)]
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(guarded(lambda words: tyro.cli(main, description=__doc__, args=words)))
