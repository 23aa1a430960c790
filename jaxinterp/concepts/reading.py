"""Which data a text names, what tells one set of data from another, and how it is read by threads."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
from collections.abc import Callable, Generator, Sequence

import numpy as np

from jaxinterp.data import (
    Broden,
    Concepts,
    DamagedImage,
    Packed,
    Segmented,
    SegmentedBatch,
    SegmentedSource,
    segmented_batches,
)

OnDamaged = Callable[[DamagedImage], None]
"""Is told of an image that cannot be read."""


def open_segmented(
    text: str,
    *,
    categories: Sequence[str] | None = None,
    split: str | None = None,
    limit: int | None = None,
    image_size: int,
    strict: bool = False,
) -> Broden:
    """The segmented source that a text names: "broden:DIR", a folder in Broden's format.

    Args:
        text: the text.
        categories: which to use; None means all.
        split: use only this split.
        limit: use only the first so many images.
        image_size: side that images are resized to.
        strict: an image that cannot be read is an error.

    Raises:
        ValueError: no such source or folder, or tables that do not fit; see `jaxinterp.data.Broden`.
    """
    kind, colon, directory = text.partition(":")
    if kind != "broden" or not colon or not directory:
        meant = f"; did you mean broden:{text}?" if os.path.isdir(text) else ""
        raise ValueError(f"--data: expected broden:DIR, a folder in Broden's format, got {text!r}{meant}")
    return Broden(directory, categories=categories, split=split, limit=limit, image_size=image_size, strict=strict)


def fingerprint(source: SegmentedSource) -> str:
    """What tells one set of data from another: the tables of a Broden folder, or the contents of all items.

    A picture of a Broden folder that is replaced while no table changes is not noticed.
    """
    whole = hashlib.sha256()
    if isinstance(source, Packed):
        source = source.source
    if isinstance(source, Broden):
        for table in sorted(glob.glob(os.path.join(glob.escape(source.directory), "*.csv"))):
            with open(table, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            whole.update(f"{os.path.basename(table)} {content}\n".encode())
        return f"sha256 of the tables: {whole.hexdigest()}"
    for index in range(len(source)):
        try:
            item = source[index]
        except DamagedImage as error:
            whole.update(f"{error}\n".encode())
            continue
        whole.update(f"{item.id} {item.image.shape} {item.planes.shape}\n".encode())
        for array in (item.image, item.planes, item.scalars):
            whole.update(np.ascontiguousarray(array).tobytes())
    return f"sha256 of ids, images and labels: {whole.hexdigest()}"


@dataclasses.dataclass(frozen=True)
class Numbered:
    """A segmented source whose ids begin with the position in it: what a batch leaves out is then known."""

    source: SegmentedSource

    @property
    def concepts(self) -> Concepts:
        """As in the source."""
        return self.source.concepts

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Segmented:
        item = self.source[index]
        return dataclasses.replace(item, id=f"{index}:{item.id}")


def walk(
    source: SegmentedSource, batch_size: int, on_damaged: OnDamaged, shard: tuple[int, int] = (0, 1)
) -> Generator[tuple[np.ndarray, SegmentedBatch]]:
    """Walks once through a source, by threads, as `jaxinterp.dissect.dissect` takes it.

    Args:
        source: the source.
        batch_size: images in a batch.
        on_damaged: see `OnDamaged`; such an image is skipped, and its number too.
        shard: (index, count) of this process, which reads whole blocks, see `jaxinterp.data.segmented_batches`.

    Yields:
        The numbers of a batch's images (positions in the source, int32; 0 where there is no image), and the batch.
    """
    for batch in segmented_batches(Numbered(source), batch_size, on_damaged=on_damaged, shard=shard, blocks=True):
        yield np.array([int(name.partition(":")[0] or 0) for name in batch.ids], np.int32), batch
