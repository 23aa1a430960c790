"""The job from segmented images to a page of units, in a results directory that resumes.

DIR/config.json           what determines the numbers; another config is refused
DIR/cache/                the images and label maps, decoded (or wherever --cache says)
DIR/parts/features-*.npz  feature maps of a batch, until all is counted
DIR/parts/layer-*.npz     thresholds, counts and top images of a layer; tables and pages are made from them
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxinterp import parallel, processes
from jaxinterp.concepts import page, reading, tables
from jaxinterp.concepts.tables import Layer
from jaxinterp.data import Broden, DamagedImage, Packed, SegmentedSource, packed
from jaxinterp.dissect import FORMS, MINIMUM, QUANTILE, UNIONS, Dissection, Plan, Tally, feature_shapes, plan
from jaxinterp.dissect import dissect as dissect_layers
from jaxinterp.dissect.counting import Form
from jaxinterp.dissect.dissection import item_shapes
from jaxinterp.dissect.quantiles import check as check_quantile
from jaxinterp.dissect.topimages import TopImages
from jaxinterp.network import Network, Params
from jaxinterp.processes import open_run
from jaxinterp.runs import Run, file_name
from jaxinterp.weights import checkpoint, digest, load

Say = Callable[[str], None]
"""Is told what a person should know, line by line."""

FORMAT = 1  # of the stored parts; directories of another one are refused
_COUNTS = ("intersection", "activation", "activation_by_category", "label_area")
_RESERVE = 1 << 28  # bytes of the disk that stored feature maps leave free


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A dissection that is ready to begin; nothing has been written.

    Attributes:
        network: the network that is dissected.
        params: its parameters.
        nodes: its layers.
        source: the images and labels.
        config: what determines the numbers.
        batch_size: images that each process computes at once.
        mesh: the devices of all processes; None for one.
        plan: what will be held in memory.
        form: of the tally.
        strict: whether an image that cannot be read ends the job.
        notes: what a person should know.
    """

    network: Network
    params: Params
    nodes: tuple[str, ...]
    source: SegmentedSource
    config: dict[str, Any]
    batch_size: int
    mesh: Mesh | None
    plan: Plan
    form: Form
    strict: bool
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Dissected:
    """What a finished job found.

    Attributes:
        run: the results directory.
        layers: by node.
        summary: the record in summary.json.
        page: index.html.
    """

    run: Run
    layers: dict[str, Layer]
    summary: dict[str, Any]
    page: Path


def prepare(
    data: str | SegmentedSource,
    *,
    model: str | tuple[Network, Params] = "efficientnet_lite0",
    nodes: Sequence[str] = (),
    quantile: float = QUANTILE,
    union: str = "image",
    categories: Sequence[str] = (),
    split: str | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    top: int = 9,
    memory: int | None = None,
    form: str = "auto",
    strict: bool = False,
) -> Job:
    """Loads the network, opens the data and checks everything that was asked for; writes nothing.

    Args:
        data: "broden:DIR", a folder in Broden's format, or a segmented source whose images have the network's input
            size. The five arguments that choose among the data are only for the former.
        model: name of a network whose weights have been converted, or a network and its parameters.
        nodes: layers; none means the one before global average pooling, or where there is none the last with more
            than one position.
        quantile: share of positions that exceed a unit's threshold.
        union: when a category occurs, see `jaxinterp.dissect.tally`.
        categories: which to use; none means all.
        split: use only this split.
        limit: use only the first so many images.
        batch_size: images that are computed at once in every process, rounded up to a multiple of its devices.
        top: images that are shown for each unit.
        memory: bytes that feature maps may take on all devices together; by default half of what is free.
        form: of the tally, see `jaxinterp.dissect.tally`.
        strict: an image that cannot be read is an error; otherwise it is skipped, counted and listed.

    Raises:
        ValueError: an argument out of range, an unknown model, node or category (with the closest ones), no weights,
            no folder, malformed tables, no image, or images that the network does not take.
    """
    for name, value in (("--batch-size", batch_size), ("--top", top), ("--limit", 1 if limit is None else limit)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_quantile(quantile)
    for name, value, known in (("--union", union, UNIONS), ("--form", form, FORMS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    if memory is not None and memory < 0:
        raise ValueError(f"--memory must not be negative, got {memory}")
    network, params = load(model) if isinstance(model, str) else model
    for node in nodes:
        network.check_node(node)
    if isinstance(data, str):
        source: SegmentedSource = reading.open_segmented(
            data,
            categories=categories or None,
            split=split,
            limit=limit,
            image_size=network.image_size,
            strict=strict,
        )
    elif categories or split is not None or limit is not None:
        raise ValueError("categories, split, limit: only for broden:DIR; give a source of the images that are wanted")
    else:
        source = data
    if not len(source):
        raise ValueError("data: expected at least one image")
    image, planes = item_shapes(network, source)
    chosen = tuple(nodes) or (default_node(network, params, image[2]),)
    mesh, unit = parallel.global_mesh(), parallel.multiple(parallel.data_mesh())
    size = -(-batch_size // unit) * unit
    notes = [f"batches of {size} images, a multiple of the {unit} devices"] if size > batch_size else []
    if isinstance(source, Broden) and source.left_out:
        notes.append(f"{source.left_out} images have no label in the chosen categories and are left out")
    concepts = source.concepts
    return Job(
        network,
        params,
        chosen,
        source,
        {
            "command": "dissect",
            "format": FORMAT,
            "model": network.name,
            "weights": _weights(model),
            "nodes": list(chosen),
            "data": reading.fingerprint(source),
            "images": len(source),
            "split": split,
            "categories": list(concepts.categories),
            "image_size": network.image_size,
            "quantile": quantile,
            "union": union,
            "top": top,
            "batch_size": batch_size,
        },
        size,
        mesh,
        plan(
            network,
            params,
            chosen,
            len(source),
            labels=len(concepts.names),
            categories=len(concepts.categories),
            batch_size=size * processes.current().count,
            channels=image[2],
            planes=planes,
            form=form,  # type: ignore[arg-type]  # one of FORMS
            mesh=mesh,
            memory=memory,
        ),
        form,  # type: ignore[arg-type]  # one of FORMS
        strict,
        tuple(notes),
    )


def default_node(network: Network, params: Params, channels: int = 3) -> str:
    """The layer before global average pooling, or where there is none the last one with more than one position.

    Args:
        network: the network.
        params: its parameters.
        channels: of the images.

    Raises:
        ValueError: the network has no feature map.
    """
    if network.cam_node is not None:
        return network.cam_node
    for node in reversed(network.nodes):
        with contextlib.suppress(ValueError):
            height, width, _ = feature_shapes(network, params, [node], channels)[node]
            if height * width > 1:
                return node
    raise ValueError(f"--node: {network.name} has no feature map with more than one position")


def _weights(model: str | tuple[Network, Params]) -> str:
    """The digest of the file that the weights come from, or of the parameters themselves."""
    if isinstance(model, str):
        return digest(model)
    leaves = jax.tree_util.tree_leaves_with_path(model[1])
    whole = hashlib.sha256()
    for path, leaf in leaves:
        whole.update(f"{jax.tree_util.keystr(path)} {checkpoint.tensor_digest(np.asarray(leaf))}\n".encode())
    return whole.hexdigest()


def storage(job: Job, out: Path, spill: bool = True) -> tuple[bool, str]:
    """Whether feature maps are stored on the disk of `out` until the job is finished, and that in words.

    Args:
        job: the job.
        out: the results directory, which need not exist.
        spill: whether they may be.
    """
    folder = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    there = sum(path.stat().st_size for path in _stored_features(out))
    needed = max(0, job.plan.features - there)
    room = f"{gib(job.plan.features)} on the disk, {gib(free)} are free"
    if not spill:
        return False, f"feature maps are not stored ({room}): a run that is stopped begins with them again"
    if needed + _RESERVE <= free:
        return True, f"feature maps are stored until the end, so that a run that is stopped goes on: {room}"
    return False, f"feature maps are not stored, as they take {room}: a run that is stopped begins with them again"


def gib(count: int | float) -> str:
    """Bytes as GiB."""
    return f"{count / 2**30:.3g} GiB"


def dissect(
    job: Job,
    out: str | os.PathLike[str],
    *,
    cache: str | os.PathLike[str] | None = None,
    spill: bool = True,
    minimum: float = MINIMUM,
    say: Say = print,
) -> Dissected:
    """Runs the job, or what is left of it, and writes tables, figures and pages.

    Args:
        job: what `prepare` returns.
        out: results directory: tally.csv, iou.parquet, summary.json, units/, figures/, index.html. Where everything has
            been counted already, only these are made again, under another `minimum` too.
        cache: folder of the decoded images; None means `out`/cache. A source that is no Broden folder has none.
        spill: store feature maps until the job is finished, where the disk has room.
        minimum: IoU that a detector exceeds.
        say: see `Say`.

    Raises:
        ValueError: `minimum` is out of range, `out` belongs to another config, no image can be read, NaN among the
            activations; an image that cannot be read where the job is strict.
        OSError: the results cannot be written.
    """
    if not 0 <= minimum < 1:
        raise ValueError(f"--minimum: expected an IoU from 0 to below 1, got {minimum}")
    out = Path(out)
    run, group = open_run(out, job.config), processes.current()
    for line in job.notes:
        say(line)
    source = job.source
    if isinstance(source, Broden):
        if not group.first:
            group.wait()  # the cache is made by process 0, and by others only where it is on a disk of their own
        with tqdm(total=len(source), unit="image", desc="packing", leave=False) as bar:
            source = packed(source, out / "cache" if cache is None else cache, progress=bar.update)
        if group.first:
            group.wait()
    found, damaged = _stored(run, job), _stored_damaged(run)
    readable = _readable(source, damaged or [])
    if group.told(bool(readable)):
        say(f"images that could not be read before and can be now: {len(readable)}; all are counted again")
        if group.first:
            _forget_counts(run, job)
        found = damaged = None
    if job.strict and damaged:
        name, reason = damaged[0]
        raise ValueError(f"{name}: {reason} ({len(damaged)} images were left out when {run.directory} was counted)")
    if group.told(found is None or damaged is None):
        found, damaged = _compute(run, job, source, spill, say)
    elif found is None or damaged is None:
        raise OSError(f"the counts that process 0 finds in {run.directory} cannot be read by {group.name}")
    else:
        say("everything has been counted; tables and pages are made again")
    for name, reason in damaged:
        say(f"  skipped {name}: {reason}")
    group.wait()
    removed = _forget_features(run) if group.first else 0
    if removed:
        say(f"the stored feature maps are not needed any more and were removed ({gib(removed)})")
    layers = {node: tables.layer(each, source.concepts) for node, each in found.items()}
    summary = {
        "model": job.network.name,
        "weights": job.config["weights"],
        **tables.summarise(layers, damaged, minimum),
    }
    if group.first:
        for node, layer in layers.items():
            columns = tables.tally_columns(source.concepts.categories)
            run.write_table(tally_name(node, job.nodes), columns, tables.tally_rows(layer))
        tables.write_ious(run.directory / "iou.parquet", layers)
        run.write_json("summary.json", summary)
        units = sum(layer.units for layer in layers.values())
        with tqdm(total=units, unit="unit", desc="figures", leave=False) as bar:
            page.write(run, job.network, source, layers, summary, minimum, lambda: bar.update(1))
    group.wait()
    return Dissected(run, layers, summary, run.directory / "index.html")


def tally_name(node: str, nodes: Sequence[str]) -> str:
    """The table of a layer: tally.csv, or where there are several layers tally-NODE.csv."""
    return "tally.csv" if len(nodes) == 1 else f"tally-{file_name(node)}.csv"


def _compute(
    run: Run, job: Job, source: SegmentedSource, spill: bool, say: Say
) -> tuple[dict[str, Dissection], list[tuple[str, str]]]:
    """Counts all layers, stores and returns what was found, and which images could not be read."""
    for line in job.plan.lines():
        say(line)
    group = processes.current()
    stores, words = group.told(storage(job, run.directory, spill))
    say(words)
    damaged: dict[str, str] = {}
    current: list[np.ndarray] = []

    def skip(error: DamagedImage) -> None:
        if job.strict:
            raise ValueError(f"{error}") from error
        damaged[error.id] = error.reason

    def walk() -> Iterator[tuple[np.ndarray, Any]]:
        for numbers, batch in reading.walk(source, job.batch_size, skip, (group.index, group.count)):
            current[:] = [np.where(batch.mask, numbers, -1)]
            yield numbers, batch

    def memo(name: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        numbers = current[0]
        stored = run.read_part(name)
        same = stored is not None and np.array_equal(stored.pop("__images", np.zeros(0)), numbers)
        if stored is None or not same or stored.keys() != {*job.nodes}:
            stored = compute()
            run.write_part(name, {**stored, "__images": numbers})
        return stored

    with _bars(len(source), group.count) as told:
        found = dissect_layers(
            job.network,
            job.params,
            job.nodes,
            source,
            quantile=job.config["quantile"],
            union=job.config["union"],
            top=job.config["top"],
            maps=True,
            batch_size=job.batch_size * group.count,
            mesh=job.mesh,
            memory=job.plan.budget,
            form=job.form,
            walk=walk,
            memo=memo if stores else None,
            progress=told,
        )
    every = group.settle(list(damaged.items()), lambda lists: sorted(set(map(tuple, itertools.chain(*lists)))))
    listed = [(name, reason) for name, reason in every]
    if group.first:
        run.write_part("damaged", {"listed": np.array(listed, str).reshape(-1, 2)})
        for node, each in found.items():
            run.write_part(_part(node), _arrays(each))
    return found, listed


@contextlib.contextmanager
def _bars(total: int, count: int) -> Iterator[Callable[[str, int], None]]:
    """A progress bar for each walk through the data; the processes, which walk in step, do as much as this one."""
    with contextlib.ExitStack() as stack:
        shown: dict[str, Any] = {}

        def told(what: str, images: int) -> None:
            if what not in shown:
                stack.close()
                shown[what] = stack.enter_context(tqdm(total=total, unit="image", desc=what, leave=False))
            shown[what].update(min(images * count, total - shown[what].n))

        yield told


def _part(node: str) -> str:
    return f"layer-{file_name(node)}"


def _arrays(found: Dissection) -> dict[str, np.ndarray]:
    assert found.maps is not None
    return {
        "thresholds": found.thresholds,
        **{name: getattr(found.tally, name) for name in _COUNTS},
        "top_value": np.asarray(found.top.value),
        "top_image": np.asarray(found.top.image),
        "maps": found.maps,
        "images": np.array(found.images),
    }


def _stored(run: Run, job: Job) -> dict[str, Dissection] | None:
    """The layers as they were stored; None where one has not been counted."""
    found = {}
    for node in job.nodes:
        arrays = run.read_part(_part(node))
        if arrays is None:
            return None
        found[node] = Dissection(
            node,
            job.config["quantile"],
            arrays["thresholds"],
            Tally(**{name: arrays[name] for name in _COUNTS}, union=job.config["union"]),
            TopImages(jnp.asarray(arrays["top_value"]), jnp.asarray(arrays["top_image"])),
            int(arrays["images"]),
            job.plan.shapes[node][:2],
            arrays["maps"],
        )
    return found


def _stored_damaged(run: Run) -> list[tuple[str, str]] | None:
    arrays = run.read_part("damaged")
    return None if arrays is None else [(str(name), str(reason)) for name, reason in arrays["listed"]]


def _readable(source: SegmentedSource, damaged: Sequence[tuple[str, str]]) -> list[str]:
    """Which of the images that were left out can be read by now.

    Only those of a cache are asked for: another source whose images have changed is another config.
    """
    if not isinstance(source, Packed):
        return []
    still = {source.ids[index] for index in source.damaged}
    return [name for name, _ in damaged if name not in still]


def _forget_counts(run: Run, job: Job) -> None:
    """Removes what was counted, layers first (without them the run is not finished), and the units' pictures."""
    for node in job.nodes:
        run.remove_part(_part(node))
    run.remove_part("damaged")
    shutil.rmtree(run.directory / "units", ignore_errors=True)


def _stored_features(directory: Path) -> list[Path]:
    return list((directory / "parts").glob("features-*.npz"))


def _forget_features(run: Run) -> int:
    """Removes the stored feature maps; returns how many bytes they took."""
    size = 0
    for path in _stored_features(run.directory):
        size += path.stat().st_size
        path.unlink()
    return size
