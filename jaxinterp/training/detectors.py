"""Training of the detectors of `jaxinterp.models.detectors`, and their checkpoints.

A detector is trained on the squares of `jaxinterp.training.generated`, turned and mirrored at random, by Adam on
cross-entropy, and saved by the package's own writer, so that `jaxinterp.load` verifies it like any other network.
"""

from __future__ import annotations

import dataclasses
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
from jaxinterp.network import Params
from jaxinterp.pictures import classify
from jaxinterp.statistics import Estimate, proportion
from jaxinterp.training.generated import Generated, Squares, make
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


def loss(
    name: str, params: Params, images: Float[Array, "b h w 3"], labels: Int[Array, " b"], keys: Array
) -> Float[Array, " b"]:
    """Cross-entropy of every image, turned by a multiple of 90 degrees and mirrored as its key says."""
    logits = models.network(name).bind(params)(jax.vmap(turned)(images, keys))
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]


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
    epochs: int = 20,
    batch_size: int = 64,
    rate: float = 2e-3,
    seed: int = 0,
    progress: Callable[[int, float], object] | None = None,
) -> Params:
    """The parameters of a detector, trained by Adam, whose step falls to zero by a cosine.

    Args:
        name: the network, one of `NAMES`.
        squares: to train on.
        epochs: how often to go through them.
        batch_size: squares in a step; what is left of an epoch is skipped.
        rate: the first step size.
        seed: of the initial parameters, the order, turns and mirrors.
        progress: is told every epoch and the mean loss in it.

    Raises:
        ValueError: an unknown name, numbers below 1, fewer squares than a batch, a loss that is not a number.
    """
    import optax

    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    per_epoch = len(squares.labels) // max(1, batch_size)
    if min(epochs, batch_size, per_epoch) < 1:
        raise ValueError(
            f"epochs and batch_size must be at least 1, and there must be a batch of squares, got {epochs},"
            f" {batch_size} and {len(squares.labels)} squares"
        )
    key = jax.random.key(seed)
    params = models.init(name, key)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, epochs * per_epoch))

    @jax.jit
    def step(params, memory, levels, labels, keys):
        images = levels.astype(jnp.float32) / 255
        value, gradient = jax.value_and_grad(lambda params: jnp.mean(loss(name, params, images, labels, keys)))(params)
        updates, memory = optimizer.update(gradient, memory)
        return optax.apply_updates(params, updates), memory, value

    memory = optimizer.init(params)
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(squares.labels))
        losses = []
        for i in range(per_epoch):
            rows = order[i * batch_size : (i + 1) * batch_size]
            keys = jax.random.split(jax.random.fold_in(key, epoch * per_epoch + i), batch_size)
            params, memory, value = step(params, memory, squares.images[rows], squares.labels[rows], keys)
            losses.append(value)
        mean = float(np.mean(losses))
        if not np.isfinite(mean):
            raise ValueError(f"the loss of epoch {epoch} is {mean}; a smaller rate may help")
        if progress is not None:
            progress(epoch, mean)
    return params


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
            "data": hashlib.sha256(data.train.images.tobytes() + data.train.labels.tobytes()).hexdigest(),
            "license": "Apache-2.0",
            "accuracy": {group: [e.mean, e.low, e.high, e.count] for group, e in trained.accuracy.items()},
            "optax": importlib.metadata.version("optax"),
            **(settings or {}),
        },
    )
    return folder


def ensure(
    data: Generated,
    *,
    root: str | os.PathLike[str] | None = None,
    epochs: int = 20,
    seed: int = 0,
    say: Callable[[str], object] = print,
) -> dict[str, dict[str, Estimate]]:
    """Trains the detectors that have no checkpoint yet, and returns every detector's held-out accuracy.

    Args:
        data: real and generated squares, see `generated.make`.
        root: folder of checkpoints; None means `checkpoint.default_root()`.
        epochs: see `train`.
        seed: see `train`.
        say: is told what is done, line by line.

    Raises:
        ValueError: a checkpoint that is damaged, or trained on other squares.
        OSError: a checkpoint cannot be written.
    """
    place = checkpoint.default_root() if root is None else Path(root)
    digest = hashlib.sha256(data.train.images.tobytes() + data.train.labels.tobytes()).hexdigest()
    found = {}
    for name in NAMES:
        if not (place / name).is_dir():
            say(f"{name} has no checkpoint in {place} and is trained")
            params = train(
                name,
                data.train,
                epochs=epochs,
                seed=seed,
                progress=lambda epoch, mean: say(f"  epoch {epoch + 1} of {epochs}: loss {mean:.3f}")
                if (epoch + 1) % 5 == 0
                else None,
            )
            made = Trained(name, params, accuracy(name, params, data.test))
            save(made, data, root=place, settings={"epochs": epochs, "seed": seed})
        source = checkpoint.read_manifest(place / name, name=name)["source"]
        if source.get("data") != digest:
            raise ValueError(f"{place / name} was trained on other squares; remove it to train it anew")
        found[name] = {group: Estimate(*values) for group, values in source["accuracy"].items()}
    return found


__all__ = ["NAMES", "Generated", "Trained", "accuracy", "ensure", "loss", "make", "save", "train"]
