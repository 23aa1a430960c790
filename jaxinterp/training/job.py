"""`jaxinterp train`: from labelled pictures to a checkpoint that every other command takes, and learning curves."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinterp import models, parallel, processes
from jaxinterp.canonical import jitted
from jaxinterp.data import Crop, Tfds, batches, open_source
from jaxinterp.data.folder import some
from jaxinterp.data.spec import AnySource
from jaxinterp.job import Say, identity
from jaxinterp.network import Network, Params
from jaxinterp.processes import open_run
from jaxinterp.runs import Run
from jaxinterp.training import consistent
from jaxinterp.training.loop import Fitted, Loss, check, fit
from jaxinterp.weights import checkpoint, load

METHODS = ("standard", "adversarial", "consistent")
"""CE(f(x), y); with CE(f(x*), y); with beta ||phi(x) - phi(x*)||^2, too."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        method: one of `METHODS`.
        epochs: how often to go through the examples.
        batch_size: examples in a batch.
        lr: the highest step of Adam; it rises over the first tenth of the steps and falls to zero along a cosine.
        weight_decay: of AdamW.
        eps: the largest distance of x* from x, in pixel units of [0, 1]; it is uniform from 0.
        beta: weight of the consistent loss.
        node: the feature map phi; None means the network's last.
        batch_norm: "batch" or "frozen".
        seed: of the parameters, the order and every eps.
    """

    method: str = "consistent"
    epochs: int = 20
    batch_size: int = 128
    lr: float = 3e-3
    weight_decay: float = 0.0
    eps: float = 0.2
    beta: float = 0.003
    node: str | None = None
    batch_norm: str = "batch"
    seed: int = 0

    def loss(self, network: Network) -> Loss:
        """The loss of the method. Errors are those of `training.consistent`, and a ValueError for an unknown method."""
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.method == "standard":
            return consistent.standard(network, batch_norm=self.batch_norm)
        beta = self.beta if self.method == "consistent" else 0.0
        return consistent.consistent(
            network, beta=beta, eps=(0.0, self.eps), node=self.node, batch_norm=self.batch_norm
        )

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """AdamW along the schedule."""
        warm = max(1, steps // 10)
        schedule = optax.warmup_cosine_decay_schedule(self.lr / 10, self.lr, warm, max(steps, warm + 1))
        return optax.adamw(schedule, weight_decay=self.weight_decay)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network.

    Attributes:
        run: the results directory.
        network: the network.
        fitted: its parameters and history.
        folder: the checkpoint; `jaxinterp.load(name, root=folder.parent)` loads it.
    """

    run: Run
    network: Network
    fitted: Fitted
    folder: Path


def train(
    data: str | Sequence[str],
    *,
    held_out: str | Sequence[str] | None = None,
    model: str,
    recipe: Recipe,
    out: Path,
    begin: str = "random",
    labels: str = "auto",
    data_dir: Path | None = None,
    limit: int | None = None,
    say: Say = print,
) -> Trained:
    """Trains a network, or goes on where it was stopped.

    Args:
        data: training pictures, as `jaxinterp.data.open_source` takes them.
        held_out: pictures on which accuracy is measured after every epoch, clean and after FGSM at the recipe's eps;
            those without a label do not count.
        model: name of the network.
        recipe: how it is trained.
        out: results directory: training.csv, training.png, summary.json and ckpts/MODEL.
        begin: with random parameters, or those that `jaxinterp convert` has made.
        labels: where labels come from.
        data_dir: where TensorFlow data sets were prepared.
        limit: use only the first so many training pictures.
        say: is told what a person should know.

    Raises:
        ValueError: bad arguments, pictures without labels, an output directory of another config.
        TypeError: as `training.consistent`.
        OSError: the results cannot be written.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1, got {limit}")
    if begin not in ("random", "converted"):
        raise ValueError(f"begin must be random or converted, got {begin!r}")
    network = models.network(model)
    params = None
    if begin == "converted":
        network, params = load(model)
    loss = recipe.loss(network)
    source, count = _open(data, network, labels, data_dir, limit)
    tested = None if held_out is None else _open(held_out, network, labels, data_dir, None)
    chosen = source if count == len(source) else _First(source, count)
    unlabelled = [] if tested is None else _unlabelled(tested[0])
    if tested is not None and len(unlabelled) == tested[1]:
        raise ValueError(f"held_out: none of {tested[1]} pictures has a label, expected at least one")
    check(chosen, recipe.epochs, recipe.batch_size, parallel.global_mesh())
    run = open_run(
        out,
        {
            "command": "train",
            "model": model,
            "begin": begin,
            "recipe": dataclasses.asdict(recipe),
            "pictures": count,
            "source": identity(source, _listed(data), count),
            "held_out": None if tested is None else identity(tested[0], _listed(held_out), tested[1]),
        },
    )
    say(f"{count} pictures; labels: {source.label_origin}")
    if unlabelled:
        say(f"  {len(unlabelled)} held-out pictures have no label and do not count: {some(unlabelled)}")
    if params is None:
        params = models.init(model, jax.random.key(recipe.seed), network.num_classes)
    steps = recipe.epochs * -(-count // recipe.batch_size)
    fitted = fit(
        loss,
        params,
        chosen,
        optimizer=recipe.optimizer(steps),
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        key=jax.random.key(recipe.seed),
        run=run,
        evaluate=None if tested is None else accuracies(network, tested[0], recipe.eps, recipe.batch_size),
    )
    for name, reason in fitted.damaged:
        say(f"  {name}: could not be read: {reason}")
    folder = out / "ckpts" / model
    save(fitted.params, folder, network, model, {"trained": run.config["source"]})
    if processes.current().first:
        run.write_json("summary.json", fitted.history[-1])
    processes.current().wait()
    return Trained(run, network, fitted, folder)


def save(params: Params, folder: Path, network: Network, model: str, origin: dict[str, Any]) -> None:
    """Writes a checkpoint of trained parameters, as `jaxinterp convert` writes converted ones."""
    whole = {name: np.asarray(value) for name, value in params.items()}
    digest = checkpoint.tensor_digest(np.concatenate([value.ravel() for value in whole.values()]))
    source = {"file": "trained by jaxinterp", "sha256": digest, "known": False, **origin}
    folder.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(whole, folder, name=model, classes=network.num_classes, source=source)


def accuracies(network: Network, source: Any, eps: float, batch_size: int) -> Callable[[Params], dict[str, float]]:
    """A function from parameters to "held-out accuracy" and "held-out adversarial accuracy" (FGSM at `eps`).

    They are not numbers where no picture can be read and has a label.
    """
    program, group = _correct(network), processes.current()

    def measure(params: Params) -> dict[str, float]:
        mesh = parallel.data_mesh()
        unit = parallel.multiple(mesh)
        size = -(-min(batch_size, len(source)) // unit) * unit
        placed, counts = parallel.replicate(params, mesh), np.zeros(3, int)
        for batch in batches(source, size, shard=(group.index, group.count)):
            images, labels = parallel.shard((batch.images, batch.labels), mesh)
            clean, attacked = program(placed, images, labels, jnp.float32(eps))
            kept = batch.mask & (batch.labels >= 0)
            counts += [np.sum(kept), np.sum(np.asarray(clean)[kept]), np.sum(np.asarray(attacked)[kept])]
        seen, *right = group.settle(counts.tolist(), lambda found: np.sum(found, axis=0).tolist())
        clean, attacked = (count / seen if seen else float("nan") for count in right)
        return {"held-out accuracy": clean, "held-out adversarial accuracy": attacked}

    return measure


@functools.cache
def _correct(network: Network) -> Any:
    def program(params, images, labels, eps):
        attacked = consistent.fast_gradient(network, params, images, labels, eps)
        model = network.bind(params)
        return tuple(jnp.argmax(model(x), axis=-1) == labels for x in (images, attacked))

    return jitted(program)


class _First:
    """The first `count` examples of a source."""

    def __init__(self, source: AnySource, count: int):
        labels = getattr(source, "labels", None)  # data sets that are read from the disk do not tell
        self.source, self.count, self.labels = source, count, None if labels is None else labels[:count]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.source[index]


def _unlabelled(source: AnySource) -> list[str]:
    """Ids of the pictures that are known to have no label."""
    if isinstance(source, Tfds):  # does not tell before it is read
        return []
    return [source.ids[i] for i in np.flatnonzero(source.labels < 0)]


def _listed(data: Any) -> Sequence[str]:
    return [data] if isinstance(data, str) else list(data)


def _open(
    data: str | Sequence[str], network: Network, labels: str, data_dir: Path | None, limit: int | None
) -> tuple[AnySource, int]:
    crop = Crop(network.image_size, network.crop_pct, network.interpolation)
    given = _listed(data)
    source = open_source(
        given if len(given) > 1 else given[0], crop=crop, classes=network.classes, labels=labels, data_dir=data_dir
    )
    return source, len(source) if limit is None else min(limit, len(source))
