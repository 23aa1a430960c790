"""The pictures of a run: which the network sees rightly, and the target that each is attacked towards."""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp import parallel, processes
from jaxinterp.canonical import canonical
from jaxinterp.data import Batch, DamagedImage, Example, Source, batches
from jaxinterp.network import Model, Network, Params
from jaxinterp.processes import read_part
from jaxinterp.runs import Run, file_name, png_name

Progress = Callable[[str, float], None]
"""Called with what is being done, and how many attacked pictures were finished since the last call."""


_SURVEYED = 16  # batches that are looked at before it is stored what was seen


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
    """The clean pictures as the network sees them: one entry for every readable picture, in order.

    Where `unlabelled` is true, the label is the network's own prediction.
    """

    indices: np.ndarray
    ids: tuple[str, ...]
    labels: np.ndarray
    unlabelled: np.ndarray
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

    A picture without a label gets the network's own prediction for one. Several processes share the pictures.

    Raises:
        ValueError: a label is not one of the network's classes, the network cannot take the pictures, or what is drawn
            of two pictures would be one file.
    """
    group = processes.current()
    size = max(1, min(batch_size, len(source)))
    starts = range(0, len(source), _SURVEYED * size)
    if group.told("unlabelled" not in (run.read_part("pictures") or {})):  # which older versions did not store
        for start in group.share(_missing(run, starts)):
            block = range(start, min(start + _SURVEYED * size, len(source)))
            run.write_part(_survey_part(start), _look(network, params, source, block, size, progress))
        group.wait()
        if group.first:
            run.write_part("pictures", _merged(network, [read_part(run, _survey_part(start)) for start in starts]))
        group.wait()
    if group.first:
        for start in starts:
            run.remove_part(_survey_part(start))
    stored = read_part(run, "pictures")
    ids = tuple(str(name) for name in stored["ids"])
    _check_files(ids)
    return Pictures(
        indices=stored["indices"],
        ids=ids,
        labels=stored["labels"],
        unlabelled=stored["unlabelled"],
        predicted=stored["predicted"],
        targets=random_targets(ids, stored["labels"], network.num_classes, seed),
        damaged=tuple((str(name), str(reason)) for name, reason in stored["damaged"]),
    )


def _check_files(ids: Sequence[str]) -> None:
    """Raises ValueError where two pictures, such as x and x.png, have the same `png_name`."""
    taken: dict[str, str] = {}
    for name in ids:
        other = taken.setdefault(png_name(name), name)
        if other != name:
            raise ValueError(
                f"pictures: {other} and {name} would both be drawn as {png_name(name)}; rename one of them"
            )


def _missing(run: Run, starts: Sequence[int]) -> list[int]:
    group = processes.current()
    mine = [start for start in group.share(starts) if run.read_part(_survey_part(start)) is None]
    return group.settle(mine, lambda lists: sorted(itertools.chain(*lists)))


def _survey_part(start: int) -> str:
    return f"pictures-{start:08d}"


def _look(
    network: Network, params: Params, source: Source, block: Sequence[int], size: int, progress: Progress
) -> dict[str, np.ndarray]:
    """Positions, ids, labels and predicted classes of the pictures at the positions `block`, in order."""
    damaged: list[DamagedImage] = []
    model = network.bind(params)
    columns: dict[str, list[Any]] = {"ids": [], "labels": [], "predicted": []}
    selection = Numbered(Selection(source, tuple(block)))
    for batch in batches(selection, size, on_damaged=damaged.append):
        if not columns["ids"]:
            _check_fits(network, model, batch.images)
        kept = batch.mask
        progress("reading pictures", float(np.sum(kept)))
        columns["ids"] += [name for name, keep in zip(batch.ids, kept, strict=True) if keep]
        columns["labels"] += list(batch.labels[kept])
        columns["predicted"] += list(np.asarray(classify(model, batch.images))[kept])
    numbered = [name.partition(":") for name in columns["ids"]]
    return {
        "indices": np.array([block[int(index)] for index, _, _ in numbered], np.int64),
        "ids": np.array([name for _, _, name in numbered], dtype=np.str_),
        "labels": np.array(columns["labels"], np.int32),
        "predicted": np.array(columns["predicted"], np.int32),
        "damaged": np.array([(d.id, d.reason) for d in damaged], dtype=np.str_).reshape(-1, 2),
    }


def _merged(network: Network, blocks: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """All blocks as one; the network's own prediction where there is no label. Errors are those of `survey`."""
    whole = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    whole["unlabelled"] = whole["labels"] < 0
    whole["labels"] = np.where(whole["unlabelled"], whole["predicted"], whole["labels"])
    outside = np.flatnonzero(whole["labels"] >= network.num_classes)
    if outside.size:
        raise ValueError(
            f"labels must be from 0 to {network.num_classes - 1}, the classes of {network.name}, but "
            f"{whole['ids'][outside[0]]} has {whole['labels'][outside[0]]}"
        )
    return whole


def _check_fits(network: Network, model: Model, images: np.ndarray) -> None:
    try:
        jax.eval_shape(model, images)
    except (TypeError, ValueError) as error:
        height, width, channels = images.shape[1:]
        size = f"{height} x {width} pixels and {channels} channel{'s' * (channels != 1)}"
        raise ValueError(f"{network.name} cannot take images of {size}: {error}") from error


def labelled(source: Source, say: Callable[[str], object] = print) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images [N,H,W,C], labels [N] and ids of the pictures that can be read and have a label.

    Args:
        source: the pictures.
        say: is told how many are left out, and which.

    Raises:
        ValueError: there is none, or they have different shapes.
    """
    damaged: list[DamagedImage] = []
    found = next(batches(source, max(1, len(source)), on_damaged=damaged.append), None)
    kept = np.zeros(0, bool) if found is None else found.mask & (found.labels >= 0)
    if found is None or not kept.any():
        raise ValueError(f"pictures: none of {len(source)} can be read and has a label, expected at least one")
    if not kept.all():
        say(f"{len(source) - kept.sum()} of {len(source)} pictures are left out")
    for error in damaged:
        say(f"  {error.id}: could not be read: {error.reason}")
    for place in np.flatnonzero(found.mask & (found.labels < 0)):
        say(f"  {found.ids[place]}: has no label")
    ids = tuple(name for name, keep in zip(found.ids, kept, strict=True) if keep)
    return found.images[kept], found.labels[kept], ids


def random_targets(ids: Sequence[str], labels: np.ndarray, classes: int, seed: int) -> np.ndarray:
    """A class other than the label for every picture, from the seed and the picture's id alone."""
    digests = np.array([zlib.crc32(name.encode()) for name in ids], np.uint32)
    key = jax.random.key(seed)
    draw = jax.vmap(lambda i: jax.random.randint(jax.random.fold_in(key, i), (), 0, classes - 1))
    other = np.asarray(draw(digests)) if len(ids) else np.zeros(0, np.int32)
    return (other + (other >= labels)).astype(np.int32)


def left_out(network: Network, pictures: Pictures) -> list[tuple[str, str]]:
    """(picture, reason) of every picture that was not attacked."""
    damaged = [(name, f"could not be read: {reason}") for name, reason in pictures.damaged]
    wrong = np.flatnonzero(pictures.labels != pictures.predicted)
    return damaged + [
        (
            pictures.ids[i],
            f"not attacked: seen as {network.class_name(int(pictures.predicted[i]))}, "
            f"labelled {network.class_name(int(pictures.labels[i]))}",
        )
        for i in wrong
    ]


def chunk_size(pictures: Pictures, batch_size: int) -> int:
    """How many pictures are attacked at once and stored together: `batch_size` or all there are, on any devices."""
    return min(batch_size, max(1, len(pictures.correct)))


def chunks(pictures: Pictures, batch_size: int) -> dict[int, np.ndarray]:
    """For every chunk, by its number, the positions of its pictures."""
    size, positions = chunk_size(pictures, batch_size), pictures.correct
    return {start: positions[start : start + size] for start in range(0, len(positions), size)}


def part_name(attack: str, start: int) -> str:
    """The part of a chunk, by its number, under an attack."""
    return f"{file_name(attack)}-{start:06d}"


def stored_parts(
    run: Run, names: Iterable[str], pictures: Pictures, batch_size: int, *, without: Collection[str] = ()
) -> Iterator[tuple[str, str, dict[str, np.ndarray]]]:
    """Every chunk of a finished run, read back in order: its name, the attack's, its arrays.

    Args:
        run: the results directory.
        names: of the attacks.
        pictures: the pictures.
        batch_size: as in `chunk_size`.
        without: arrays that are not wanted.

    Raises:
        OSError: a part is missing or damaged.
    """
    for start in chunks(pictures, batch_size):
        for name in names:
            part = part_name(name, start)
            yield part, name, read_part(run, part, without=without)


def shared_chunks(run: Run, names: Collection[str], pictures: Pictures, batch_size: int) -> tuple[list[int], int]:
    """The unfinished chunks that this process computes, and how many pictures are in those that all have finished.

    What is left is shared anew at every start, so any number of processes goes on with what others have left.
    """
    group, every = processes.current(), chunks(pictures, batch_size)
    mine = [s for s in group.share(list(every)) if any(run.read_part(part_name(n, s)) is None for n in names)]
    missing = group.settle(mine, lambda lists: sorted(itertools.chain(*lists)))
    return group.share(missing), sum(len(every[start]) for start in every.keys() - set(missing))


def load_chunk(source: Source, pictures: Pictures, chunk: np.ndarray, size: int) -> tuple[Batch, np.ndarray]:
    """The pictures at the positions `chunk` as one batch, with their labels, and their targets [B].

    The batch has `size` places, or as many more as make it a multiple of the devices.

    Raises:
        ValueError: a picture can no longer be read.
    """
    unit = parallel.multiple(parallel.data_mesh())
    size = -(-size // unit) * unit
    selection = Selection(source, tuple(int(i) for i in pictures.indices[chunk]))
    batch = next(iter(batches(selection, size, on_damaged=_gone)))
    batch = dataclasses.replace(batch, labels=_padded(pictures.labels[chunk], size))
    return batch, _padded(pictures.targets[chunk], size)


def _gone(error: DamagedImage) -> None:
    raise ValueError(f"{error}; it could be read when the run began")


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    """Values for a batch of `size`, the last one repeated."""
    return np.concatenate([values, np.repeat(values[-1:], size - len(values))]).astype(np.int32)


@jax.jit
@canonical
def classify(model, images):
    return jnp.argmax(model(images), axis=-1)


def classify_resized(network: Network, params: Params, images: np.ndarray) -> np.ndarray:
    """The classes [B] of images [B,H,W,C] that were made for another network: they are resized to this one's side."""
    side = network.image_size
    resized = jax.image.resize(jnp.asarray(images), (len(images), side, side, images.shape[-1]), "cubic")
    return np.asarray(classify(network.bind(params), jnp.clip(resized, 0, 1)))
