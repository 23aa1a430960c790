"""What a dissection will take, before it begins: memory, disk, operations, and the time, measured on one batch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxinterp import dissect, parallel, processes
from jaxinterp.concepts import reading
from jaxinterp.concepts.job import Job, gib, storage
from jaxinterp.data import Broden, DamagedImage
from jaxinterp.data.packed import size as packed_size
from jaxinterp.dissect.dissection import extractor


def estimate(job: Job, out: Path, spill: bool = True) -> Iterator[str]:
    """What the job will take, line by line; nothing is written.

    One batch is read, computed and counted, twice where the first time includes compiling.

    Args:
        job: the job.
        out: the results directory, for the room on its disk.
        spill: whether feature maps may be stored, see `jaxinterp.concepts.dissect`.

    Raises:
        ValueError: no image can be read.
    """
    source, concepts = job.source, job.source.concepts
    yield from job.notes
    labels = ", ".join(f"{name} {int((concepts.category == i).sum())}" for i, name in enumerate(concepts.categories))
    yield f"{job.network.name}: {len(source)} images; {int((concepts.category >= 0).sum())} labels ({labels})"
    if isinstance(source, Broden):
        (ih, iw), (sh, sw) = source.image_size, source.label_size
        maps = f"up to {source.channels} label maps and {source.scalars} whole-image labels"
        yield f"images of {ih} x {iw}, label maps of {sh} x {sw}; {maps} an image"
    yield from job.plan.lines()
    if job.plan.flops is not None:
        yield f"a forward pass to the last of the layers takes {job.plan.flops / 1e9:.2f} GFLOP an image"
    stores, words = storage(job, out, spill)
    if isinstance(source, Broden):
        yield f"decoded images and labels take {gib(packed_size(source))} on the disk"
    yield words
    read, forward, tally = measure(job)
    walks = 1 if stores else job.plan.walks
    count = processes.current().count
    each = (read + forward * walks + tally) / count
    devices = parallel.multiple(parallel.data_mesh()) * count
    yield (
        f"measured on one batch, ms an image: reading {1e3 * read:.1f}, forward {1e3 * forward:.1f}, tally"
        f" {1e3 * tally:.1f}; on {devices} {jax.devices()[0].device_kind} device{'' if devices == 1 else 's'}"
    )
    yield f"expected time: {_duration(each * len(source))}, and some seconds for compiling and figures"


def measure(job: Job) -> tuple[float, float, float]:
    """Seconds an image takes to be read (decoded), to go through the network, and to be counted."""
    start = time.perf_counter()
    batch, skipped = None, []

    def skip(error: DamagedImage) -> None:
        if job.strict:
            raise ValueError(f"{error}") from error
        skipped.append(error)

    walk = reading.walk(job.source, job.batch_size, skip)
    with contextlib.closing(walk):
        batch = next((batch for _, batch in walk if batch.mask.any()), None)
    if batch is None:
        raise ValueError(f"data: none of the {len(skipped)} images can be read: {skipped[0]}")
    images = int(batch.mask.sum())
    read = (time.perf_counter() - start) / images
    mesh = parallel.data_mesh()
    pixels, params = parallel.shard(batch.images, mesh), parallel.replicate(job.params, mesh)
    run = extractor(job.network, job.nodes, mesh)

    def forward() -> Any:
        return jax.block_until_ready(run(params, pixels))

    maps = forward()
    limits = [dissect.thresholds(each, job.config["quantile"]) for each in maps]

    def tally() -> None:
        for each, limit in zip(maps, limits, strict=True):
            categories = job.source.concepts.category
            dissect.tally(
                each, limit, batch.planes, batch.scalars, categories, batch_size=len(batch.images), form=job.form
            )

    tally()
    size = len(batch.images)  # with the places that only fill up, which cost as much
    return read, _seconds(forward) / size, _seconds(tally) / size


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
