"""Training of the detectors of `jaxinterp.models.detectors`, and their checkpoints.

A detector is trained on the squares of `jaxinterp.training.generated`, turned and mirrored at random, by Adam on
cross-entropy, and saved by the package's own writer, so that `jaxinterp.load` verifies it like any other network.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinterp import models
from jaxinterp.data import Arrays
from jaxinterp.network import Params
from jaxinterp.pictures import classify
from jaxinterp.processes import open_run
from jaxinterp.runs import Run, differences
from jaxinterp.statistics import Estimate, proportion
from jaxinterp.training.generated import Generated, Squares
from jaxinterp.training.loop import Outcome, fit
from jaxinterp.weights import checkpoint

NAMES = ("detector_meso", "detector_residual", "detector_separable")


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained detector.

    Attributes:
        name: the network.
        params: its parameters.
        accuracy: on the held-out pictures, by recipe, "real" and "all"; shares of squares with exact intervals.
    """

    name: str
    params: Params
    accuracy: dict[str, Estimate]


def loss(name: str, params: Params, images: Float[Array, "b h w 3"], labels: Int[Array, " b"], keys: Array) -> Outcome:
    """Cross-entropy and accuracy of every image, turned by a multiple of 90 degrees and mirrored as its key says."""
    logits = models.network(name).bind(params)(jax.vmap(turned)(images, keys))
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
    return Outcome(losses, {"accuracy": (jnp.argmax(logits, axis=1) == labels).astype(jnp.float32)})


def turned(image: Float[Array, "s s 3"], key: Array) -> Float[Array, "s s 3"]:
    """One of the eight images that a square gives when it is turned and mirrored."""
    which = jax.random.bits(key, (3,)) % 2 == 1
    image = jnp.where(which[0], image[::-1], image)
    image = jnp.where(which[1], image[:, ::-1], image)
    return jnp.where(which[2], image.transpose(1, 0, 2), image)


def train(
    name: str,
    squares: Squares,
    *,
    run: Run,
    epochs: int = 20,
    batch_size: int = 64,
    rate: float = 2e-3,
    seed: int = 0,
    quiet: bool = False,
) -> Params:
    """The parameters of a detector, trained by Adam, whose step falls to zero by a cosine.

    Args:
        name: the network, one of `NAMES`.
        squares: to train on.
        run: where the training is stored, see `jaxinterp.training.loop`.
        epochs: how often to go through them.
        batch_size: squares in a step.
        rate: the first step size.
        seed: of the initial parameters, the order, turns and mirrors.
        quiet: show no progress.

    Raises:
        ValueError: an unknown name, or as `jaxinterp.training.loop.fit`.
    """
    import optax

    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    steps = max(1, epochs * -(-len(squares.labels) // max(1, batch_size)))
    key = jax.random.key(seed)
    return fit(
        functools.partial(loss, name),
        models.init(name, key),
        Arrays(squares.images, squares.labels, squares.ids),
        optimizer=optax.adam(optax.cosine_decay_schedule(rate, steps)),
        epochs=epochs,
        batch_size=batch_size,
        key=key,
        run=run,
        name=name,
        quiet=quiet,
    ).params


def accuracy(name: str, params: Params, squares: Squares) -> dict[str, Estimate]:
    """Shares of squares that a detector sees rightly: of "all", of "real" ones, of those of every recipe."""
    model = models.network(name).bind(params)
    size = 128
    right = []
    for start in range(0, len(squares.labels), size):
        images = squares.images[start : start + size].astype(np.float32) / 255
        predicted = np.asarray(classify(model, np.resize(images, (size, *images.shape[1:]))))[: len(images)]
        right.append(predicted == squares.labels[start : start + size])
    whole, recipes = np.concatenate(right), np.array(squares.recipes)
    groups = {"all": np.ones(len(whole), bool)} | {name: recipes == name for name in dict.fromkeys(recipes)}
    return {group: proportion(int(whole[rows].sum()), int(rows.sum())) for group, rows in groups.items()}


def save(
    trained: Trained, data: Generated, *, root: str | os.PathLike[str] | None = None, settings: Mapping | None = None
) -> Path:
    """Writes the checkpoint of a detector, as `jaxinterp.load` reads it.

    Args:
        trained: the detector.
        data: what it was trained on; its digest goes into the manifest.
        root: folder of checkpoints; None means `checkpoint.default_root()`.
        settings: of the training, for the manifest.

    Raises:
        OSError: it cannot be written.
    """
    params = {name: np.asarray(value, np.float32) for name, value in trained.params.items()}
    whole = hashlib.sha256()
    for name in sorted(params):
        whole.update(name.encode() + np.ascontiguousarray(params[name]).tobytes())
    folder = (checkpoint.default_root() if root is None else Path(root)) / trained.name
    checkpoint.save(
        params,
        folder,
        name=trained.name,
        classes=models.network(trained.name).num_classes,
        source={
            "file": "trained by jaxinterp.training.detectors",
            "sha256": whole.hexdigest(),
            "data": data.digest,
            "license": "Apache-2.0",
            "accuracy": {group: [e.mean, e.low, e.high, e.count] for group, e in trained.accuracy.items()},
            "optax": importlib.metadata.version("optax"),
            **(settings or {}),
        },
    )
    return folder


def ensure(
    data: Generated,
    out: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    epochs: int = 20,
    seed: int = 0,
    say: Callable[[str], object] = print,
) -> dict[str, dict[str, Estimate]]:
    """Trains the detectors that have no checkpoint yet, and returns every detector's held-out accuracy.

    Args:
        data: real and generated squares, see `generated.make`.
        out: results directory of the trainings, which continue there.
        root: folder of checkpoints; None means `checkpoint.default_root()`.
        epochs: see `train`.
        seed: see `train`.
        say: is told what is done, line by line.

    Raises:
        ValueError: a checkpoint that is damaged, of other squares or of another training; a directory of another
            config.
        OSError: a checkpoint cannot be written.
    """
    place = checkpoint.default_root() if root is None else Path(root)
    settings = {"epochs": epochs, "seed": seed}
    wanted = {"data": data.digest, **settings}

    def stored(name: str) -> dict[str, Estimate]:
        source = checkpoint.read_manifest(place / name, name=name)["source"]
        differing = differences({key: source.get(key) for key in wanted}, wanted)
        if differing:
            raise ValueError(
                f"{place / name} comes from another training; remove it to train it anew. It differs in "
                + "; ".join(differing)
            )
        return {group: Estimate(*values) for group, values in source["accuracy"].items()}

    missing = [name for name in NAMES if not (place / name).is_dir()]
    found = {name: stored(name) for name in NAMES if name not in missing}  # before anything is trained
    for name in missing:
        say(f"{name} has no checkpoint in {place} and is trained")
        run = open_run(out, {"detectors": list(NAMES), **wanted})
        params = train(name, data.train, run=run, epochs=epochs, seed=seed)
        save(Trained(name, params, accuracy(name, params, data.test)), data, root=place, settings=settings)
        found[name] = stored(name)
    return {name: found[name] for name in NAMES}
