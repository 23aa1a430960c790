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
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from .segmentation import Segmented, SegmentedSource
from .source import DamagedImage, Example, Source

T = TypeVar("T")
B = TypeVar("B")
I = TypeVar("I", Example, Segmented)
I_co = TypeVar("I_co", covariant=True)


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


@dataclass(frozen=True, eq=False)
class SegmentedBatch:
    """Some items of a segmented source, side by side. `mask` and what stands where it is False are as in `Batch`.

    Attributes:
        images: float32 [B,H,W,3] in [0, 1].
        planes: int16 [B,channels,sh,sw] label numbers, 0 = none.
        scalars: int16 [B,n] whole-image labels, 0 = none.
        ids: B strings, "" where there is no item.
        mask: bool [B], True where there is an item; these come first.
    """

    images: np.ndarray
    planes: np.ndarray
    scalars: np.ndarray
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
    return _walk(source, batch_size, _stack, workers, on_damaged, shard)


def segmented_batches(
    source: SegmentedSource,
    batch_size: int,
    *,
    workers: int | None = None,
    on_damaged: Callable[[DamagedImage], None] | None = None,
    shard: tuple[int, int] = (0, 1),
    blocks: bool = False,
) -> Iterator[SegmentedBatch]:
    """Walks once through a segmented source, or through one process's share of it, as `batches` does through others.

    Args:
        source: where items come from; read from several threads at once.
        batch_size: items in a batch, B.
        workers: as in `batches`.
        on_damaged: as in `batches`.
        shard: (index, count), as in `batches`.
        blocks: shards are interleaved by blocks of B items, and no item moves up: whatever the number of shards, block
            k is a batch of the readable ones among the items k B, k B + 1, ... Shards end with empty batches where
            others have one more block.

    Yields:
        Batches of B items in the order of the source. None at all where no item can be read.

    Raises:
        ValueError: an argument out of range; or, on the way, images or label maps of different shapes.
    """
    return _walk(source, batch_size, _stack_segmented, workers, on_damaged, shard, blocks)


def read_ahead(
    read: Callable[[int], T], indices: Iterable[int], workers: int | None = None, ahead: int | None = None
) -> Generator[Future[T], None, None]:
    """Calls `read` in threads and yields what it returns, or raises, in the order of `indices`.

    Args:
        read: called with one index, in any thread.
        indices: what it is called with.
        workers: threads; by default one for each processor, at most 32.
        ahead: results that may be in the making or waiting; by default four for each thread.

    Yields:
        Finished futures. When the generator is closed, calls that have not begun never begin.
    """
    workers = workers or default_workers()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="jaxinterp-data")
    waiting: deque[Future[T]] = deque()
    todo = iter(indices)
    try:
        while True:
            for i in itertools.islice(todo, (ahead or 4 * workers) - len(waiting)):
                waiting.append(pool.submit(read, i))
            if not waiting:
                return
            futures.wait([waiting[0]])
            yield waiting.popleft()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def default_workers() -> int:
    """One thread for each processor, at most 32."""
    return min(os.cpu_count() or 1, 32)


@runtime_checkable
class _Indexable(Protocol[I_co]):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> I_co: ...


def _walk(
    source: _Indexable[I],
    batch_size: int,
    stack: Callable[[Sequence[I], int, I], B],
    workers: int | None,
    on_damaged: Callable[[DamagedImage], None] | None,
    shard: tuple[int, int],
    blocks: bool = False,
) -> Iterator[B]:
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if workers is None:
        workers = default_workers()
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"shard: expected (index, count) with 0 <= index < count, got {shard}")
    walk = _blocks if blocks else _batches
    return walk(source, batch_size, stack, workers, on_damaged or _warn, index, count)


def _warn(error: DamagedImage) -> None:
    warnings.warn(f"skipped {error}", stacklevel=4)  # the consumer's loop


def _batches(
    source: _Indexable[I],
    batch_size: int,
    stack: Callable[[Sequence[I], int, I], B],
    workers: int,
    on_damaged: Callable[[DamagedImage], None],
    index: int,
    count: int,
) -> Iterator[B]:
    # One batch is read while the previous one is in use, and no thread waits for its neighbours.
    read = _items(source, range(index, len(source), count), workers, batch_size + workers, on_damaged)
    items = (item for item in read if item is not None)
    last: I | None = None
    done = 0
    try:
        while chunk := list(itertools.islice(items, batch_size)):
            yield stack(chunk, batch_size, last or chunk[0])
            last = chunk[-1]
            done += 1
    finally:
        items.close()
        read.close()
    if count == 1:
        return
    expected = math.ceil(math.ceil(len(source) / count) / batch_size)
    if done < expected:
        # Without an image of its own the shard borrows one: all shards need the same shape.
        last = last or _first(source)
        if last is not None:
            for _ in range(expected - done):
                yield stack([], batch_size, last)


def _blocks(
    source: _Indexable[I],
    batch_size: int,
    stack: Callable[[Sequence[I], int, I], B],
    workers: int,
    on_damaged: Callable[[DamagedImage], None],
    index: int,
    count: int,
) -> Iterator[B]:
    mine = [range(i, min(i + batch_size, len(source))) for i in range(0, len(source), batch_size)][index::count]
    items = _items(source, list(itertools.chain(*mine)), workers, batch_size + workers, on_damaged)
    empty = math.ceil(math.ceil(len(source) / batch_size) / count) - len(mine)
    last: I | None = None
    try:
        for block in [*mine, *[range(0)] * empty]:
            chunk = [item for item in itertools.islice(items, len(block)) if item is not None]
            last = chunk[-1] if chunk else last or _first(source)
            if last is not None:
                yield stack(chunk, batch_size, last)
    finally:
        items.close()


def _items(
    source: _Indexable[I],
    indices: Sequence[int],
    workers: int,
    ahead: int,
    on_damaged: Callable[[DamagedImage], None],
) -> Generator[I | None, None, None]:
    """The items at `indices`, in order, None where one is damaged; at most `ahead` are being read or waiting."""
    reading = read_ahead(source.__getitem__, indices, workers, ahead)
    try:
        for future in reading:
            try:
                item = future.result()
            except DamagedImage as error:
                on_damaged(error)
                yield None
            else:
                yield item
    finally:
        reading.close()


def _stack(examples: Sequence[Example], batch_size: int, filler: Example) -> Batch:
    rows, ids, mask = _padded(examples, batch_size, filler)
    # A new array each time: on a CPU, JAX may use it without a copy.
    return Batch(
        images=_images(examples, rows, filler),
        labels=np.array([row.label for row in rows], np.int32),
        ids=ids,
        mask=mask,
    )


def _stack_segmented(items: Sequence[Segmented], batch_size: int, filler: Segmented) -> SegmentedBatch:
    rows, ids, mask = _padded(items, batch_size, filler)
    for name in ("planes", "scalars"):
        shape = getattr(filler, name).shape
        for item in items:
            if getattr(item, name).shape != shape:
                given = list(getattr(item, name).shape)
                raise ValueError(f"{item.id} has {name} of shape {given} and {filler.id} {list(shape)}; expected one")
    return SegmentedBatch(
        images=_images(items, rows, filler),
        planes=np.stack([row.planes for row in rows]).astype(np.int16, copy=False),
        scalars=np.stack([row.scalars for row in rows]).astype(np.int16, copy=False),
        ids=ids,
        mask=mask,
    )


def _padded(items: Sequence[I], batch_size: int, filler: I) -> tuple[list[I], tuple[str, ...], np.ndarray]:
    """The items and copies of a real one up to `batch_size`, the ids and the mask."""
    missing = batch_size - len(items)
    rows = [*items, *[(items or [filler])[-1]] * missing]
    return rows, (*(item.id for item in items), *[""] * missing), np.arange(batch_size) < len(items)


def _images(items: Sequence[I], rows: Sequence[I], filler: I) -> np.ndarray:
    shape = filler.image.shape
    for item in items:
        if item.image.shape != shape:
            raise ValueError(
                f"{item.id} has the shape {list(item.image.shape)} and {filler.id} {list(shape)};"
                " images in batches need one shape: give the source a crop"
            )
    return np.stack([row.image for row in rows]).astype(np.float32, copy=False)


def _first(source: _Indexable[I]) -> I | None:
    for i in range(len(source)):
        try:
            return source[i]
        except DamagedImage:
            continue
    return None
