"""The pictures of a run: which the network sees rightly, and the target that each is attacked towards."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp.data import DamagedImage, Example, Source, batches
from jaxinterp.network import Model, Network, Params
from jaxinterp.runs import Run

Progress = Callable[[str, float], None]
"""Called with what is being done, and how many attacked pictures were finished since the last call."""


def silent(what: str, done: float) -> None:
    """The progress that is not shown."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """Some items of a source, in the given order."""

    source: Source
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[self.indices[index]]


@dataclasses.dataclass(frozen=True)
class Numbered:
    """A source whose ids begin with the position in it: what a batch leaves out is then known."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        return dataclasses.replace(example, id=f"{index}:{example.id}")


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The clean pictures as the network sees them: one entry for every readable picture, in order."""

    indices: np.ndarray
    ids: tuple[str, ...]
    labels: np.ndarray
    predicted: np.ndarray
    targets: np.ndarray
    damaged: tuple[tuple[str, str], ...]

    @property
    def correct(self) -> np.ndarray:
        """Positions of the correctly classified pictures: the ones that are attacked."""
        return np.flatnonzero(self.labels == self.predicted)


def survey(
    run: Run, network: Network, params: Params, source: Source, *, seed: int, batch_size: int, progress: Progress
) -> Pictures:
    """What the network makes of the clean pictures, and the random but seeded target of each.

    A picture without a label gets the network's own prediction for one.

    Raises:
        ValueError: a label is not one of the network's classes, or the network cannot take the pictures.
    """
    stored = run.read_part("pictures")
    if stored is None:
        damaged: list[DamagedImage] = []
        model = network.bind(params)
        columns: dict[str, list[Any]] = {"ids": [], "labels": [], "predicted": []}
        size = max(1, min(batch_size, len(source)))
        for batch in batches(Numbered(source), size, on_damaged=damaged.append):
            if not columns["ids"]:
                _check_fits(network, model, batch.images)
            kept = batch.mask
            progress("reading pictures", float(np.sum(kept)))
            columns["ids"] += [name for name, keep in zip(batch.ids, kept, strict=True) if keep]
            columns["labels"] += list(batch.labels[kept])
            columns["predicted"] += list(np.asarray(classify(model, batch.images))[kept])
        labels, predicted = (np.array(columns[k], np.int32) for k in ("labels", "predicted"))
        labels = np.where(labels < 0, predicted, labels)
        outside = np.flatnonzero(labels >= network.num_classes)
        if outside.size:
            raise ValueError(
                f"labels must be from 0 to {network.num_classes - 1}, the classes of {network.name}, but "
                f"{columns['ids'][outside[0]].partition(':')[2]} has {labels[outside[0]]}"
            )
        numbered = [name.partition(":") for name in columns["ids"]]
        stored = {
            "indices": np.array([int(index) for index, _, _ in numbered], np.int64),
            "ids": np.array([name for _, _, name in numbered], dtype=np.str_),
            "labels": labels,
            "predicted": predicted,
            "damaged": np.array([(d.id, d.reason) for d in damaged], dtype=np.str_).reshape(-1, 2),
        }
        run.write_part("pictures", stored)
    ids = tuple(str(name) for name in stored["ids"])
    return Pictures(
        indices=stored["indices"],
        ids=ids,
        labels=stored["labels"],
        predicted=stored["predicted"],
        targets=random_targets(ids, stored["labels"], network.num_classes, seed),
        damaged=tuple((str(name), str(reason)) for name, reason in stored["damaged"]),
    )


def _check_fits(network: Network, model: Model, images: np.ndarray) -> None:
    try:
        jax.eval_shape(model, images)
    except (TypeError, ValueError) as error:
        height, width, channels = images.shape[1:]
        size = f"{height} x {width} pixels and {channels} channel{'s' * (channels != 1)}"
        raise ValueError(f"{network.name} cannot take images of {size}: {error}") from error


def random_targets(ids: Sequence[str], labels: np.ndarray, classes: int, seed: int) -> np.ndarray:
    """A class other than the label for every picture, from the seed and the picture's id alone."""
    digests = np.array([zlib.crc32(name.encode()) for name in ids], np.uint32)
    key = jax.random.key(seed)
    draw = jax.vmap(lambda i: jax.random.randint(jax.random.fold_in(key, i), (), 0, classes - 1))
    other = np.asarray(draw(digests)) if len(ids) else np.zeros(0, np.int32)
    return (other + (other >= labels)).astype(np.int32)


@jax.jit
def classify(model, images):
    return jnp.argmax(model(images), axis=-1)
