"""A source as batches of one fixed shape, so that a compiled program sees only one.

Pictures are read by threads (decoding and resizing release the interpreter's lock), a bounded number ahead of
the consumer. Order and content do not depend on the number of threads.
"""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from .source import DamagedImage, Example, Source


@dataclass(frozen=True, eq=False)
class Batch:
    """Some examples of a source, side by side.

    Where `mask` is False there is no example. Such a place holds a copy of a real image and its label, so
    that whatever runs on it behaves as on real data; its results mean nothing.

    Attributes:
        images: float32 [B,H,W,C] in [0, 1].
        labels: int32 [B], -1 = unknown.
        ids: B strings, "" where there is no example.
        mask: bool [B], True where there is an example; these come first.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: tuple[str, ...]
    mask: np.ndarray


def batches(
    source: Source,
    batch_size: int,
    *,
    workers: int | None = None,
    on_damaged: Callable[[DamagedImage], None] | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Walks once through a source, or through one process's share of it.

    Shards are interleaved: process `index` of `count` takes the items index, index + count, ... Damaged items
    are skipped and the next ones move up, so that every batch is full but the last. All shards yield the same
    number of batches, as programs that run in step need it: `ceil(ceil(N / count) / batch_size)`; a shard
    that runs out of items ends with batches whose mask is all False. With a single shard there are no such
    batches.

    Args:
        source: where examples come from; read from several threads at once.
        batch_size: examples in a batch, B.
        workers: threads that read; by default one for each processor, at most 32.
        on_damaged: called in the consumer's thread and in the order of the source with every item of the
            shard that cannot be read; by default each becomes a warning.
        shard: (index, count).

    Yields:
        Batches of B examples in the order of the source. None at all where no item can be read.

    Raises:
        ValueError: an argument out of range; or, on the way, images of different shapes.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if workers is None:
        workers = min(os.cpu_count() or 1, 32)
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"shard: expected (index, count) with 0 <= index < count, got {shard}")
    return _batches(source, batch_size, workers, on_damaged or _warn, index, count)


def _warn(error: DamagedImage) -> None:
    warnings.warn(f"skipped {error}", stacklevel=4)  # the consumer's loop


def _batches(
    source: Source,
    batch_size: int,
    workers: int,
    on_damaged: Callable[[DamagedImage], None],
    index: int,
    count: int,
) -> Iterator[Batch]:
    # One batch is read while the previous one is in use, and no thread waits for its neighbours.
    examples = _examples(source, range(index, len(source), count), workers, batch_size + workers, on_damaged)
    last: Example | None = None
    done = 0
    try:
        while chunk := list(itertools.islice(examples, batch_size)):
            yield _stack(chunk, batch_size, filler=last or chunk[0])
            last = chunk[-1]
            done += 1
    finally:
        examples.close()
    if count == 1:
        return
    expected = math.ceil(math.ceil(len(source) / count) / batch_size)
    if done < expected:
        # Without an image of its own the shard borrows one: all shards need the same shape.
        last = last or _first(source)
        if last is not None:
            for _ in range(expected - done):
                yield _stack([], batch_size, filler=last)


def _examples(
    source: Source,
    indices: Sequence[int],
    workers: int,
    ahead: int,
    on_damaged: Callable[[DamagedImage], None],
) -> Generator[Example, None, None]:
    """The readable examples among `indices`, in order, with at most `ahead` being read or waiting."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="jaxinterp-data")
    waiting: deque[Future[Example]] = deque()
    todo = iter(indices)
    try:
        while True:
            for i in itertools.islice(todo, ahead - len(waiting)):
                waiting.append(pool.submit(source.__getitem__, i))
            if not waiting:
                return
            try:
                example = waiting.popleft().result()
            except DamagedImage as error:
                on_damaged(error)
            else:
                yield example
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _stack(examples: Sequence[Example], batch_size: int, filler: Example) -> Batch:
    shape = filler.image.shape
    for example in examples:
        if example.image.shape != shape:
            raise ValueError(
                f"{example.id} has the shape {list(example.image.shape)} and {filler.id} {list(shape)};"
                " images in batches need one shape: give the source a crop"
            )
    missing = batch_size - len(examples)
    rows = [*examples, *[(examples or [filler])[-1]] * missing]
    # A new array each time: on a CPU, JAX may use it without a copy.
    return Batch(
        images=np.stack([row.image for row in rows]).astype(np.float32, copy=False),
        labels=np.array([row.label for row in rows], np.int32),
        ids=(*(example.id for example in examples), *[""] * missing),
        mask=np.arange(batch_size) < len(examples),
    )


def _first(source: Source) -> Example | None:
    for i in range(len(source)):
        try:
            return source[i]
        except DamagedImage:
            continue
    return None
