"""A results directory: a config, one part for every finished chunk, merged tables. Nothing computed is ever lost.

    DIR/config.json       what was asked; starting again with the same config continues, with another one refuses
    DIR/parts/NAME.npz    arrays of one finished chunk; NAME.state.npz, of an unfinished one
    DIR/*.csv, *.json     tables and records made from the parts

Every file is written under a temporary name and renamed, so a run that is killed at any moment leaves whole files
only, and loses at most the chunk it was computing.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import struct
import tempfile
import time
import tokenize
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import jax
import numpy as np

T = TypeVar("T")

_ZIP = b"PK\x03\x04"  # what an archive begins with
_NAMES = "names of the arrays"  # in a part, that none is lost unnoticed
# What zipfile, zlib and the parser of headers raise for damaged bytes, beside OSError.
_DAMAGE = (
    *(zipfile.BadZipFile, ValueError, EOFError, KeyError, NotImplementedError, RuntimeError, TypeError, zlib.error),
    *(struct.error, OverflowError, SyntaxError, tokenize.TokenError, MemoryError),
)
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}")  # as `replacing` names them


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends without an error, and vanishes otherwise.

    Raises:
        OSError: the disk is full or not writable.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def file_name(name: str) -> str:
    """A name as part of a file name, with its checksum where characters were replaced or cut off."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:80] or "_"
    return safe if safe == name else f"{safe}-{zlib.crc32(name.encode()):08x}"


def stem(name: str) -> str:
    """The names of this picture's files without their suffix: `x` of x.png and of x, `x.jpg` of x.jpg."""
    return file_name(name.removesuffix(".png"))


def png_name(name: str) -> str:
    """The file that is drawn of the picture with this name: `x.png` of x.png and of x, `x.jpg.png` of x.jpg."""
    return f"{stem(name)}.png"


def version(package: str) -> str:
    """Of a package; a source tree that is only on the path has none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"


def machine() -> dict[str, str]:
    """Versions and machine, for records."""
    packages = ("jaxinterp", "jax", "jaxlib", "flax", "optax", "numpy")
    device = jax.devices()[0]
    return {
        **{package: version(package) for package in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device.device_kind,
        "devices": f"{jax.device_count()} x {device.device_kind}",
    }


def versions() -> dict[str, str]:
    """What of `machine` every process of a job has in common, on any devices."""
    return {key: value for key, value in machine().items() if key not in ("devices", "platform")}


class Run:
    """A results directory that belongs to one config."""

    def __init__(self, directory: str | os.PathLike, config: Mapping[str, Any]):
        """Opens the directory, or starts it.

        Args:
            directory: made where it does not exist; it may not hold anything but a run.
            config: what determines the results, as JSON.

        Raises:
            ValueError: the directory belongs to another config (the message lists what differs), holds other
                things, or its config is unreadable.
            OSError: it cannot be written.
        """
        self.directory = Path(directory)
        self.config = json.loads(json.dumps(config))
        path = self.directory / "config.json"
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"{self.directory} is not a directory")
        if path.exists():
            try:
                found = json.loads(path.read_text())
            except ValueError as error:
                raise ValueError(f"{path} is damaged ({error}); choose another directory") from error
            differing = differences(found, self.config)
            if differing:
                raise ValueError(
                    f"{self.directory} holds results of another config; choose another directory, or remove it. "
                    "It differs in " + "; ".join(differing)
                )
        elif self.directory.exists() and any(f for f in self.directory.iterdir() if not f.name.startswith(".")):
            raise ValueError(f"{self.directory} is not empty and holds no config.json: it is not a results directory")
        else:
            self.write_json("config.json", self.config)

    def remove_left_over(self, age: float = 3600.0) -> None:
        """Removes what killed processes left under temporary names: what nobody has written to for `age` seconds.

        Whatever is younger may be another process's, which is writing it.
        """
        for path in self.directory.rglob(".*"):
            if _TEMPORARY.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > age:
                        path.unlink()

    def write_part(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Stores the arrays of a finished chunk. Raises OSError where that fails; an older part is kept then."""
        with replacing(self._part(name)) as file:
            names = np.array(list(arrays), np.str_)
            np.savez(file, **{_NAMES: names}, **arrays)  # type: ignore[arg-type]  # mappings of names to arrays

    def read_part(self, name: str, *, without: Collection[str] = ()) -> dict[str, np.ndarray] | None:
        """The arrays of a chunk; None where it has not been finished, or is damaged and must be made again.

        Args:
            name: of the chunk.
            without: names of arrays that are not wanted, and not read.
        """
        try:
            with open(self._part(name), "rb") as file:
                if file.read(len(_ZIP)) != _ZIP:
                    return None
                file.seek(0)
                with np.load(file, allow_pickle=False) as arrays:
                    if _NAMES in arrays.files and sorted(arrays[_NAMES]) != sorted({*arrays.files} - {_NAMES}):
                        return None  # the archive's directory has lost some
                    return {key: arrays[key] for key in arrays.files if key not in (_NAMES, *without)}
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno not in (None, errno.EINVAL):  # which damaged offsets end in
                raise
            return None
        except _DAMAGE:
            return None

    def write_state(self, name: str, state: Any) -> None:
        """Stores an unfinished computation, a pytree of arrays. Raises OSError where that fails."""
        leaves = jax.tree_util.tree_leaves_with_path(state)
        self.write_part(f"{name}.state", {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})

    def read_state(self, name: str, like: T, *, padded: bool = False) -> T | None:
        """A stored computation, placed on the devices as `like` is; None where there is none, or of another shape.

        Args:
            name: of the computation.
            like: arrays of the same names, shapes and types.
            padded: rows beyond a number that is the same in both, and unknown, only fill up the devices: where there
                are more of them than were stored, those of `like` are taken.
        """
        stored = self.read_part(f"{name}.state")
        leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
        if stored is None or {jax.tree_util.keystr(path) for path, _ in leaves} != stored.keys():
            return None
        found = [(stored[jax.tree_util.keystr(path)], leaf) for path, leaf in leaves]
        if padded:
            found = [(_refilled(array, leaf), leaf) for array, leaf in found]
        if any(array.shape != leaf.shape or array.dtype != leaf.dtype for array, leaf in found):
            return None
        placed = [jax.device_put(a, leaf.sharding) if isinstance(leaf, jax.Array) else a for a, leaf in found]
        return jax.tree.unflatten(treedef, placed)

    def remove_part(self, name: str) -> None:
        """Forgets a chunk, if there is one."""
        self._part(name).unlink(missing_ok=True)

    def remove_state(self, name: str) -> None:
        """Forgets a stored computation, if there is one."""
        self.remove_part(f"{name}.state")

    def write_json(self, name: str, record: Any) -> Path:
        """Writes a record as indented JSON and returns its path."""
        return self._write(name, json.dumps(record, indent=1, ensure_ascii=False, sort_keys=False) + "\n")

    def write_table(self, name: str, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Path:
        """Writes a CSV table. Floats are written so that reading gives the same float32; NaN and None are empty.

        Returns:
            The table's path.
        """
        path = self.directory / name
        with replacing(path) as file:
            text = io.TextIOWrapper(file, "utf-8", newline="")
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(columns)
            for row in rows:
                writer.writerow([_cell(row.get(column)) for column in columns])
            text.detach()  # flushed, and the file left open to be synced
        return path

    def _write(self, name: str, text: str) -> Path:
        path = self.directory / name
        with replacing(path) as file:
            file.write(text.encode())
        return path

    def _part(self, name: str) -> Path:
        return self.directory / "parts" / f"{name}.npz"


def _refilled(array: np.ndarray, like: Any) -> np.ndarray:
    """As many rows as `like` has: those of the array, then those of `like`; as it is where rows are not alike."""
    rows = array.shape[:1]
    if (
        rows == like.shape[:1]
        or array.dtype != like.dtype
        or (array.shape[1:], array.ndim) != (like.shape[1:], like.ndim)
    ):
        return array
    return np.concatenate([array[: like.shape[0]], np.asarray(like)[rows[0] :]])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, np.floating | float):
        return "" if math.isnan(value) else repr(value.item() if isinstance(value, np.float64) else float(str(value)))
    return str(value)


def differences(found: Any, wanted: Any, name: str = "", *, there: str = "there", asked: str = "asked") -> list[str]:
    """What differs between two configs, as "name: old there, new asked"."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [
            line
            for key in sorted(found.keys() | wanted.keys())
            for line in differences(
                found.get(key), wanted.get(key), f"{name}.{key}" if name else key, there=there, asked=asked
            )
        ]
    return [] if found == wanted else [f"{name}: {json.dumps(found)} {there}, {json.dumps(wanted)} {asked}"]
