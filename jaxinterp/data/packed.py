"""A Broden folder decoded once: its pixels and label maps in plain files that are mapped into memory.

    PATH/cache.json    what the cache was made from
    PATH/images.bin    uint8, all images
    PATH/planes.bin    int16, the label maps of all images, without those that only fill up
    PATH/items.txt     a line for every item: the checksum of its part of both, or why it could not be read

It is written to PATH.partial and renamed when it is whole. A process that is killed before leaves what it has decoded
there, and the next one goes on from it.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import itertools
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import PIL

from .batches import default_workers, read_ahead
from .broden import Broden
from .segmentation import Concepts, Segmented
from .source import DamagedImage

_FILES = ("cache.json", "images.bin", "planes.bin", "items.txt")
_VERSION = 1
_CHUNK = 64  # items that are written before it is noted that they are


class Packed:
    """A Broden source that reads from its cache; items are equal to the source's, bit for bit.

    Where a part of the cache does not have its checksum any more, the item is decoded from its files.

    Attributes:
        source: the source.
        path: the folder of the cache.
        concepts: as in the source.
        ids: as in the source.
        damaged: for items that could not be read, by index, why.
    """

    def __init__(self, source: Broden, path: str) -> None:
        """Opens a cache that `packed` has found to be whole."""
        self.source, self.path = source, path
        self.ids = source.ids
        notes = _notes(path)
        self.damaged = {i: note for i, note in enumerate(notes) if isinstance(note, str)}
        self._checksums = [note if isinstance(note, int) else None for note in notes]
        self._offsets = _offsets(source)
        self._images = _map(path, "images.bin", np.uint8, (len(source), *source.image_size, 3))
        self._planes = _map(path, "planes.bin", np.int16, (int(self._offsets[-1]), *source.label_size))

    @property
    def concepts(self) -> Concepts:
        """What the label numbers mean."""
        return self.source.concepts

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Segmented:
        """The item at `index`. Raises DamagedImage where it could not be read when the cache was made."""
        index = range(len(self))[index]
        if index in self.damaged:
            raise DamagedImage(self.ids[index], self.damaged[index])
        pixels = np.array(self._images[index])
        planes = np.array(self._planes[self._offsets[index] : self._offsets[index + 1]])
        if _checksum(pixels, planes) != self._checksums[index]:
            return self.source[index]
        return self.source.item(index, pixels, planes)


def packed(
    source: Broden,
    path: str | os.PathLike[str],
    *,
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Packed:
    """The source with its cache, which is made where there is none, or one of something else.

    A cache belongs to the tables of the folder, to the chosen images, categories and sizes, and to the version of
    Pillow that decoded it. A picture that was replaced while no table changed is not noticed, but for those that could
    not be read: they are tried again. Processes that share a file system wait for the first of them to make it.

    Args:
        source: what is decoded; items that cannot be read are noted, or with its `strict` end the making.
        path: the folder of the cache; it may exist, but hold nothing else.
        workers: threads that decode; by default one for each processor, at most 32.
        progress: is told how many more items are done, while the cache is made.

    Raises:
        ValueError: `path` holds other files, or an item cannot be read and the source is strict.
        OSError: the disk is full, or not writable.
    """
    path = os.path.abspath(os.fspath(path))
    if workers is not None and workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    for folder in (path, f"{path}.partial"):
        _check_ours(folder)
    made_from = _made_from(source)
    if not _whole(source, path, made_from):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with _alone(f"{path}.lock"):
            if not _whole(source, path, made_from):
                _make(source, path, made_from, workers or default_workers(), progress or (lambda _: None))
    elif _readable(source, path):
        with _alone(f"{path}.lock"):
            _mend(source, path)
    return Packed(source, path)


def size(source: Broden) -> int:
    """Bytes that the cache of a source takes on the disk."""
    return sum(_sizes(source, len(source)).values())


def _make(source: Broden, path: str, made_from: str, workers: int, progress: Callable[[int], object]) -> None:
    partial = f"{path}.partial"
    if _read_json(partial) != made_from:
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
        with open(os.path.join(partial, "cache.json"), "w") as file:
            json.dump({"made_from": made_from}, file)
    done = _continue(source, partial)
    progress(done)
    offsets = _offsets(source)
    _check_space(source, partial, done)
    reading = read_ahead(source.read, range(done, len(source)), workers)
    with contextlib.ExitStack() as stack:
        stack.callback(reading.close)
        names = ("images.bin", "planes.bin", "items.txt")
        images, planes, items = (stack.enter_context(open(os.path.join(partial, name), "ab")) for name in names)
        for start in range(done, len(source), _CHUNK):
            notes = []
            for index, future in enumerate(itertools.islice(reading, _CHUNK), start):
                try:
                    pixels, maps = future.result()
                except DamagedImage as error:
                    notes.append(error.reason)
                    pixels = np.zeros((*source.image_size, 3), np.uint8)
                    maps = np.zeros((offsets[index + 1] - offsets[index], *source.label_size), np.int16)
                else:
                    notes.append(_checksum(pixels, maps))
                images.write(pixels.tobytes())
                planes.write(maps.tobytes())
                progress(1)
            # Noted only when it is on the disk.
            for file in (images, planes):
                file.flush()
                os.fsync(file.fileno())
            items.write("".join(json.dumps(note) + "\n" for note in notes).encode())
            items.flush()
            os.fsync(items.fileno())
    shutil.rmtree(path, ignore_errors=True)
    os.rename(partial, path)


def _readable(source: Broden, path: str) -> list[int]:
    """Items of a cache that could not be read when they were decoded, and can be now."""
    found = []
    for index, note in enumerate(_notes(path)):
        if isinstance(note, str):
            with contextlib.suppress(DamagedImage):
                source.read(index)
                found.append(index)
    return found


def _mend(source: Broden, path: str) -> None:
    """Decodes what can be read now into its places in a whole cache."""
    notes, offsets = _notes(path), _offsets(source)
    with (
        open(os.path.join(path, "images.bin"), "r+b") as images,
        open(os.path.join(path, "planes.bin"), "r+b") as planes,
    ):
        for index in _readable(source, path):
            pixels, maps = source.read(index)
            images.seek(index * pixels.nbytes)
            images.write(pixels.tobytes())
            planes.seek(int(offsets[index]) * source.label_size[0] * source.label_size[1] * 2)
            planes.write(maps.tobytes())
            notes[index] = _checksum(pixels, maps)
        for file in (images, planes):
            file.flush()
            os.fsync(file.fileno())
    items = f"{path}.items"  # beside the folder, in which nothing else may be
    with open(items, "w") as file:
        file.writelines(json.dumps(note) + "\n" for note in notes)
    os.replace(items, os.path.join(path, "items.txt"))


def _continue(source: Broden, partial: str) -> int:
    """Cuts off what a process that was killed wrote without noting it; returns how many items are done."""
    for name in _FILES[1:]:
        with open(os.path.join(partial, name), "ab"):
            pass
    notes = _notes(partial)[: len(source)]
    sizes = _sizes(source, len(notes))
    if any(os.path.getsize(os.path.join(partial, name)) < size for name, size in sizes.items()):
        notes, sizes = [], _sizes(source, 0)
    for name, size in sizes.items():
        os.truncate(os.path.join(partial, name), size)
    with open(os.path.join(partial, "items.txt"), "w") as file:
        file.writelines(json.dumps(note) + "\n" for note in notes)
    return len(notes)


def _notes(folder: str) -> list[int | str]:
    """The lines of items.txt up to the first that is not whole."""
    notes: list[int | str] = []
    with open(os.path.join(folder, "items.txt"), "rb") as file:
        for line in file:
            try:
                note = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(note, int | str):
                break
            notes.append(note)
    return notes


def _whole(source: Broden, path: str, made_from: str) -> bool:
    try:
        sizes = _sizes(source, len(source))
        return (
            _read_json(path) == made_from
            and len(_notes(path)) == len(source)
            and all(os.path.getsize(os.path.join(path, name)) == size for name, size in sizes.items())
        )
    except OSError:
        return False


def _read_json(folder: str) -> str | None:
    try:
        with open(os.path.join(folder, "cache.json")) as file:
            found = json.load(file)
    except (OSError, ValueError):
        return None
    return found.get("made_from") if isinstance(found, dict) else None


def _made_from(source: Broden) -> str:
    """A digest of all that determines what the cache holds."""
    whole = hashlib.sha256()
    for table in sorted(glob.glob(os.path.join(glob.escape(source.directory), "*.csv"))):
        with open(table, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{os.path.basename(table)} {content} {os.stat(table).st_mtime_ns}\n".encode())
    chosen = [(row.image, row.image_size, list(row.files.items())) for row in source.rows]
    setting = [_VERSION, PIL.__version__, source.image_size, source.label_size, chosen]
    whole.update(json.dumps(setting).encode())
    return whole.hexdigest()


def _offsets(source: Broden) -> np.ndarray:
    """Where the label maps of every item begin, and where those of the last end: int64 [N+1]."""
    counts = [sum(map(len, row.files.values())) for row in source.rows]
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _sizes(source: Broden, items: int) -> dict[str, int]:
    """How long the files are when so many items are done."""
    image, plane = source.image_size[0] * source.image_size[1] * 3, source.label_size[0] * source.label_size[1] * 2
    return {"images.bin": items * image, "planes.bin": int(_offsets(source)[items]) * plane}


def _map(folder: str, name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    if not np.prod(shape):
        return np.zeros(shape, dtype)  # an empty file cannot be mapped
    return np.memmap(os.path.join(folder, name), dtype, "r", shape=shape)


def _checksum(pixels: np.ndarray, planes: np.ndarray) -> int:
    return zlib.crc32(planes.tobytes(), zlib.crc32(pixels.tobytes()))


def _check_ours(folder: str) -> None:
    """Raises ValueError where a folder that would be replaced holds anything but a cache."""
    if os.path.lexists(folder) and (not os.path.isdir(folder) or set(os.listdir(folder)) - set(_FILES)):
        raise ValueError(f"{folder} exists and is no packed cache; choose another path")


def _check_space(source: Broden, partial: str, done: int) -> None:
    needed = size(source) - sum(_sizes(source, done).values())
    free = shutil.disk_usage(partial).free
    if needed > free:
        what = f"the packed cache needs {needed / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free"
        raise OSError(errno.ENOSPC, what, partial)


@contextlib.contextmanager
def _alone(path: str) -> Iterator[None]:
    """Lets one process at a time make a cache, where the system has locks that end with their process."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
