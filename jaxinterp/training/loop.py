"""A training loop for any loss: batches over all devices, exact resume, learning curves.

    OUT/parts/NAME.state.npz    parameters, optimizer and place in the run, written now and then
    OUT/parts/NAME-000012.npz   what was measured in an epoch
    OUT/NAME.csv, NAME.png      the learning curves

The order of the examples and the random key of each follow from one key, the epoch and the example's number, so neither
depends on the batch or the devices. A run that is killed goes on from the last stored state and ends with the same
bits. On another number of devices sums over a batch are rounded differently, and nothing else changes.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from jaxinterp import parallel, processes
from jaxinterp.canonical import jitted
from jaxinterp.data import Arrays, DamagedImage, Source
from jaxinterp.data.source import to_unit
from jaxinterp.dissect import shares
from jaxinterp.network import Params
from jaxinterp.processes import read_part
from jaxinterp.runs import Run
from jaxinterp.statistics import Estimate

_STORED = 30.0  # seconds after which the state is stored; the result does not depend on it
_STATISTICS = re.compile(r"(^|\.)running_(mean|var)$")


class Outcome(NamedTuple):
    """What a loss returns.

    Attributes:
        losses: [B] the loss of every example; their mean over the batch is minimised.
        metrics: name -> [B], what else the learning curves show.
        statistics: name -> new value of parameters that are not trained but measured, the running statistics of batch
            norm; the loop stores them after the step. Only where `params` is a flat dict.
    """

    losses: Float[Array, " b"]
    metrics: Mapping[str, Float[Array, " b"]] = {}
    statistics: Mapping[str, Array] = {}


@runtime_checkable
class Loss(Protocol):
    """`loss(params, images, labels, keys) -> Outcome`: images [B,H,W,C] in [0, 1], labels [B], random keys [B]."""

    def __call__(
        self, params: Params, images: Float[Array, "b h w c"], labels: Int[Array, " b"], keys: Any, /
    ) -> Outcome: ...


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A trained network.

    Attributes:
        params: the parameters, on the default device.
        history: what was measured in each epoch: means over the training examples as they were trained on, and what
            `evaluate` returned.
        damaged: (id, reason) of examples that could not be read, found since the processes began.
    """

    params: Params
    history: list[dict[str, float]]
    damaged: tuple[tuple[str, str], ...] = ()


def is_statistic(name: str) -> bool:
    """Whether a parameter is a running statistic of batch norm, by its name; those are not trained."""
    return _STATISTICS.search(name) is not None


def fit(
    loss: Loss,
    params: Params,
    source: Source,
    *,
    optimizer: optax.GradientTransformation,
    epochs: int,
    batch_size: int,
    key: jax.Array,
    run: Run,
    name: str = "training",
    evaluate: Callable[[Params], Mapping[str, float]] | None = None,
    frozen: Callable[[str], bool] = is_statistic,
    mesh: Mesh | None = None,
    store_every: float | int = _STORED,
    quiet: bool = False,
) -> Fitted:
    """Minimises the mean of a loss over the examples of a source, from `params` or from the state stored in `run`.

    Every epoch goes once through the source in an order of its own. The last batch is filled up with examples of the
    same epoch that have no weight in the mean.

    Args:
        loss: see `Loss`; must be traceable.
        params: a pytree of float arrays, where training begins.
        source: labelled examples of one shape.
        optimizer: from optax.
        epochs: how often to go through the source.
        batch_size: examples in a batch, on all devices together; a multiple of the devices.
        key: of the order and of everything random.
        run: the results directory; its config must tell what is trained and how.
        name: of the training in it.
        evaluate: called with the parameters after every epoch; returns what the curves show beside the training's own.
        frozen: whether the parameter of this name (its path, joined by dots) stays as it is.
        mesh: the devices; None means all there are (`parallel.global_mesh`).
        store_every: seconds after which the state is stored.
        quiet: show no progress.

    Raises:
        ValueError: numbers out of range, no example, an example without a label, a stored state of another training, a
            loss that is not a number.
        TypeError: a loss that does not return an `Outcome` with a loss for each example.
        OSError: the state cannot be stored.
    """
    mesh = parallel.global_mesh() if mesh is None else mesh
    check(source, epochs, batch_size, mesh)
    group, count = processes.current(), len(source)
    per_epoch = math.ceil(count / batch_size)
    reader = _Reader(source, batch_size, mesh)
    params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)  # the loop gives its memory away
    names = metrics_of(loss, params, jax.eval_shape(lambda: reader.shapes), key, frozen)
    step = step_of(loss, optimizer, frozen)
    identity = np.array([count, batch_size, epochs, *np.asarray(jax.random.key_data(key)).ravel()], np.int64)
    first = {
        "identity": identity,
        "done": np.zeros((), np.int64),
        "state": shares.replicated(begin(params, optimizer, names, frozen), mesh),
    }
    stored = run.read_state(name, first)
    if stored is not None and not np.array_equal(stored["identity"], identity):
        raise ValueError(
            f"{run.directory}: the stored state of {name} belongs to {stored['identity'][:3].tolist()} examples, batch "
            f"size and epochs, expected {identity[:3].tolist()} and the same key; choose another directory"
        )
    done, state = (0, first["state"]) if stored is None else (int(stored["done"]), stored["state"])
    if len(seen := group.settle(done, lambda values: sorted(set(values)))) > 1:
        raise ValueError(
            f"{run.directory}: the processes see different states of {name}, after {seen} steps; try again"
        )
    total, written = epochs * per_epoch, time.monotonic()

    def store() -> None:
        if group.first:
            run.write_state(name, {"identity": identity, "done": np.asarray(done, np.int64), "state": state})

    with tqdm(total=total, initial=done, desc=name, unit="step", disable=quiet or not group.first) as bar:
        while done < total:
            epoch, place = divmod(done, per_epoch)
            state = step(state, reader.read(_order(key, epoch, count), place), jax.random.fold_in(key, epoch))
            done += 1
            bar.update()
            if done % per_epoch == 0:
                state, measured = _measured(state, name, epoch)
                measured |= dict(evaluate(_merged(*_local(state[:2])))) if evaluate is not None else {}
                bar.set_postfix({n: f"{v:.3g}" for n, v in measured.items()})
                if group.first:
                    run.write_part(_epoch(name, epoch), {n: np.asarray(v, np.float64) for n, v in measured.items()})
            if time.monotonic() - written >= store_every or done == total:
                store()
                written = time.monotonic()
    damaged = group.settle(
        reader.damaged, lambda found: sorted({tuple(entry) for entries in found for entry in entries})
    )
    history = [{n: float(v) for n, v in read_part(run, _epoch(name, e)).items()} for e in range(epochs)]
    if group.first:
        _curves(run, name, history)
    return Fitted(
        _merged(*jax.tree.map(jnp.asarray, _local(state[:2]))), history, tuple((id, reason) for id, reason in damaged)
    )


def check(source: Source, epochs: int, batch_size: int, mesh: Mesh | None) -> None:
    """Raises ValueError as `fit` for numbers out of range and examples without labels, before anything is written."""
    for what, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{what} must be at least 1, got {value}")
    if batch_size % parallel.multiple(mesh):
        raise ValueError(f"batch_size must be a multiple of the {parallel.multiple(mesh)} devices, got {batch_size}")
    if not len(source):
        raise ValueError("source has no examples, expected at least one")
    labels = getattr(source, "labels", None)
    if labels is not None and np.min(np.asarray(labels)) < 0:
        raise ValueError(f"source: every example needs a label, but {source[int(np.argmin(labels))].id} has none")


def _order(key: jax.Array, epoch: int, count: int) -> np.ndarray:
    """The order of the examples in an epoch."""
    seeds = np.asarray(jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, epoch), 0xFFFFFFFF))).ravel()
    return np.random.Generator(np.random.Philox([int(s) for s in seeds])).permutation(count)


class _Reader:
    """Reads batches, of which a process reads the rows of its own devices."""

    def __init__(self, source: Source, batch_size: int, mesh: Mesh | None):
        self.source, self.batch_size, self.mesh = source, batch_size, mesh
        self.damaged: list[tuple[str, str]] = []
        self.example = self._first()
        self.threads = None if isinstance(source, Arrays) else ThreadPoolExecutor(32)
        count = shares.processes(mesh)
        self.rows = batch_size // count
        self.start = self.rows * jax.process_index() if count > 1 else 0

    @property
    def shapes(self) -> tuple[Any, ...]:
        """A batch of zeros."""
        size = self.batch_size
        return (
            jnp.zeros((size, *self.example.shape), jnp.float32),
            jnp.zeros(size, jnp.int32),
            jnp.zeros(size, jnp.uint32),
            jnp.zeros(size, jnp.float32),
        )

    def read(self, order: np.ndarray, place: int) -> tuple[Array, Array, Array, Array]:
        """Images, labels, numbers and weights of the batch at a place of an epoch."""
        positions = place * self.batch_size + self.start + np.arange(self.rows)
        numbers = order[positions % len(order)]
        weights = (positions < len(order)).astype(np.float32)
        if isinstance(self.source, Arrays):
            images = to_unit(self.source.images[numbers])
            labels = self.source.labels[numbers]
        else:
            assert self.threads is not None
            images = np.zeros((self.rows, *self.example.shape), np.float32)
            labels = np.zeros(self.rows, np.int32)
            for row, found in enumerate(self.threads.map(self._one, numbers.tolist())):
                if found is None:
                    images[row], weights[row] = self.example, 0
                    continue
                if found.image.shape != self.example.shape:
                    shape = list(self.example.shape)
                    raise ValueError(f"source: {found.id} has the shape {list(found.image.shape)}, expected {shape}")
                if found.label < 0:
                    raise ValueError(f"source: every example needs a label, but {found.id} has none")
                images[row], labels[row] = found.image, found.label
        return shares.placed((images, labels.astype(np.int32), numbers.astype(np.uint32), weights), self.mesh)

    def _one(self, number: int) -> Any:
        try:
            return self.source[number]
        except DamagedImage as error:
            if (error.id, error.reason) not in self.damaged:
                self.damaged.append((error.id, error.reason))
            return None

    def _first(self) -> np.ndarray:
        for number in range(len(self.source)):
            found = self._one(number)
            if found is not None:
                return np.asarray(found.image, np.float32)
        raise ValueError("source has no example that can be read")


def begin(
    params: Params,
    optimizer: optax.GradientTransformation,
    metrics: Sequence[str],
    frozen: Callable[[str], bool] = is_statistic,
) -> Any:
    """The state before the first step: trained parameters, others, the optimizer's memory, sums of what is measured."""
    trained, fixed = _divided(params, frozen)
    return trained, fixed, optimizer.init(trained), {name: jnp.zeros(()) for name in (*metrics, "examples")}


def step_of(
    loss: Loss, optimizer: optax.GradientTransformation, frozen: Callable[[str], bool] = is_statistic
) -> Callable[[Any, tuple[Array, Array, Array, Array], jax.Array], Any]:
    """The jitted `step(state, (images, labels, numbers, weights), key) -> state`; it takes the state's memory.

    The arguments are those of `fit`; numbers [B] are those of the examples, weights [B] theirs in the mean.
    """

    def mean(trained, fixed, batch, key):
        found, weights = _outcome(loss, _merged(trained, fixed), batch, key, frozen), batch[3]
        return jnp.sum(weights * found.losses) / jnp.maximum(jnp.sum(weights), 1), found

    def step(state, batch, key):
        trained, fixed, memory, sums = state
        (_, found), gradient = jax.value_and_grad(mean, has_aux=True)(trained, fixed, batch, key)
        updates, memory = optimizer.update(gradient, memory, trained)
        trained = optax.apply_updates(trained, updates)
        if found.statistics:
            fixed = {**fixed, **found.statistics}
        added = {"loss": found.losses, **found.metrics, "examples": jnp.ones_like(batch[3])}
        sums = {name: sums[name] + jnp.sum(batch[3] * value) for name, value in added.items()}
        return trained, fixed, memory, sums

    return jitted(step, donate_argnums=0)


def metrics_of(
    loss: Loss, params: Params, batch: Any, key: jax.Array, frozen: Callable[[str], bool] = is_statistic
) -> list[str]:
    """The names of what a loss measures, "loss" first; nothing is computed, and `batch` may be shapes.

    Raises:
        TypeError: the loss does not return what `Outcome` describes.
    """
    return ["loss", *jax.eval_shape(lambda p, b, k: _outcome(loss, p, b, k, frozen), params, batch, key).metrics]


def _outcome(loss, params, batch, key, frozen):
    images, labels, numbers, _ = batch
    keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
    found = loss(params, images, labels, keys)
    if not isinstance(found, Outcome):
        raise TypeError(f"loss must return an Outcome, got {type(found).__name__}")
    for name, value in {"losses": found.losses, **found.metrics}.items():
        if jnp.shape(value) != labels.shape:
            raise TypeError(f"loss: {name} must have the shape {labels.shape}, got {jnp.shape(value)}")
    for name in found.statistics:
        if not isinstance(params, Mapping) or name not in params or not frozen(name):
            raise TypeError(f"loss: statistics must be parameters that are not trained, got {name!r}")
    return found


def _measured(state: Any, name: str, epoch: int) -> tuple[Any, dict[str, float]]:
    """The state with its sums at zero again, and the means."""
    *others, sums = state
    values = {n: float(v) for n, v in sums.items()}
    examples = values.pop("examples")
    means = {n: v / max(examples, 1) for n, v in values.items()}
    if not math.isfinite(means["loss"]):
        raise ValueError(f"{name}: the loss of epoch {epoch} is {means['loss']}; a smaller step may help")
    return (*others, jax.tree.map(jnp.zeros_like, sums)), means


def _divided(params: Params, frozen: Callable[[str], bool]) -> tuple[Params, Params]:
    """Parameters that are trained, and those that are not; None in the other's place."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    still = [frozen(jax.tree_util.keystr(path, simple=True, separator=".")) for path, _ in leaves]
    trained = [None if fixed else leaf for (_, leaf), fixed in zip(leaves, still, strict=True)]
    others = [leaf if fixed else None for (_, leaf), fixed in zip(leaves, still, strict=True)]
    return treedef.unflatten(trained), treedef.unflatten(others)


def _merged(trained: Params, fixed: Params) -> Params:
    """What `_divided` divided."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, fixed, is_leaf=lambda leaf: leaf is None)


def _local(tree: Any) -> Any:
    """Replicated arrays as arrays of numpy."""
    return jax.tree.map(np.asarray, tree)


def _epoch(name: str, epoch: int) -> str:
    return f"{name}-{epoch:06d}"


def _curves(run: Run, name: str, history: Sequence[Mapping[str, float]]) -> None:
    """The table of the history, and the figure: a panel for each last word of a name, such as accuracy."""
    from jaxinterp import plots

    epochs = range(1, len(history) + 1)
    run.write_table(
        f"{name}.csv",
        ["epoch", *history[0]],
        [{"epoch": e, **{n: np.float64(v) for n, v in row.items()}} for e, row in zip(epochs, history, strict=True)],
    )
    panels: dict[str, dict[str, list[Estimate]]] = {}
    for what in history[0]:
        line, _, panel = what.rpartition(" ")
        values = [row[what] for row in history]
        panels.setdefault(panel, {})[line or "training"] = [Estimate(v, v, v, 1) for v in values]
    plots.save(plots.curves(panels, list(epochs), xlabel="epoch"), run.directory / f"{name}.png")
