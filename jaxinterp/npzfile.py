"""numpy's .npz archives, read without pickles and with the size of every array checked before it is allocated.

`numpy.load` allocates whatever shape an entry's header claims. Here the header has to fit the length of its entry, and
the entries together have to fit a bound that the caller sets.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, struct.error, OverflowError)
_SLACK = 64 << 20


class BoundedFile(io.FileIO):
    """A file of which one read takes at most 16 MiB: `zipfile` reads a whole directory, however long, in one.

    In memory a directory takes ten to twenty times its length.
    """

    LIMIT = 16 << 20

    def read(self, size: int | None = -1, /) -> bytes:
        """As FileIO's. Raises zipfile.BadZipFile for a size that is larger."""
        if size is not None and size > self.LIMIT:
            raise zipfile.BadZipFile("the directory or a header in the zip archive is longer than 16 MiB")
        return super().read(size)


class Header(NamedTuple):
    """What the header of an array says: its shape, type and order, and how many bytes the header takes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    by_columns: bool
    length: int


class NpzFile:
    """A .npz archive, open for reading.

    Attributes:
        path: the file.
        names: names of the arrays, in file order.
    """

    def __init__(self, path: str | os.PathLike[str], *, expand: int) -> None:
        """Opens the archive and checks its directory; no array is read yet.

        Args:
            path: the file.
            expand: how many times the file's size the arrays may take together (plus 64 MiB).

        Raises:
            ValueError: not a .npz archive, a damaged one, or one that expands too far.
            OSError: the file cannot be opened.
        """
        self.path = os.fspath(path)
        self._file = BoundedFile(self.path)
        try:
            self._archive = zipfile.ZipFile(self._file)
        except (*_DAMAGE, ValueError) as error:
            self._file.close()
            raise ValueError(f"{self.path}: not a .npz archive, or a damaged one ({error})") from None
        self._entries: dict[str, zipfile.ZipInfo] = {}
        try:
            for info in self._archive.infolist():
                name = info.filename.removesuffix(".npy")
                if name == info.filename or name in self._entries:
                    raise ValueError(f"{self.path}: entry {info.filename!r} is not an array, or occurs twice")
                self._entries[name] = info
            total = sum(info.file_size for info in self._entries.values())
            if total > expand * os.path.getsize(self.path) + _SLACK:
                raise ValueError(f"{self.path}: the arrays expand to {total} bytes, far beyond the file's size")
        except BaseException:
            self.close()
            raise
        self.names = tuple(self._entries)

    def __enter__(self) -> NpzFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the archive. Arrays that were read or mapped stay valid."""
        self._archive.close()
        self._file.close()

    def header(self, name: str) -> Header:
        """Shape and type of an array. Raises ValueError where they are malformed or do not fit the entry."""
        with self._open(name) as stream:
            return self._header(name, stream)

    def read(self, name: str) -> np.ndarray:
        """An array, in C order. Raises ValueError where the entry is damaged or holds something else."""
        with self._open(name) as stream:
            header = self._header(name, stream)
            content = bytearray(self._entries[name].file_size - header.length)
            view = memoryview(content)
            while len(view):
                part = stream.read(min(len(view), 1 << 20))
                if not part:
                    raise ValueError("it is cut off")
                view[: len(part)] = part
                view = view[len(part) :]
            stream.read(1)  # at the end of the entry its checksum is compared
            return self._shaped(np.frombuffer(content, np.uint8), header)

    def map(self, name: str) -> np.ndarray:
        """An array that stays on disk where the entry is not compressed; read-only. Raises as `read` does."""
        info = self._entries[name]
        header = self.header(name)
        if info.compress_type != zipfile.ZIP_STORED or header.dtype == np.bool_ or not math.prod(header.shape):
            return self.read(name)
        with self._damage(name), open(self.path, "rb") as file:
            file.seek(info.header_offset + 26)
            start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4))) + header.length
        size = math.prod(header.shape) * header.dtype.itemsize
        if start + size > os.path.getsize(self.path):
            raise ValueError(f"{self.path}: array {name!r}: it is cut off")
        order = "F" if header.by_columns else "C"
        return np.memmap(self.path, header.dtype, "r", start, header.shape, order)

    def _header(self, name: str, stream: Any) -> Header:
        version = np.lib.format.read_magic(stream)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise ValueError(f"version {version} of the format")
        shape, by_columns, dtype = readers[version](stream)
        if dtype.kind not in "fiubU" or not dtype.itemsize:
            raise ValueError(f"it is of type {dtype}, not of numbers or text")
        if len(shape) > 32 or any(n < 0 for n in shape):
            raise ValueError(f"it has the shape {shape}")
        size = self._entries[name].file_size - stream.tell()
        if math.prod(shape) * dtype.itemsize != size or (0 in shape and max(shape) >= 1 << 40):
            raise ValueError(f"its shape {shape} of {dtype} does not fit its {size} bytes")
        return Header(shape, dtype, by_columns, stream.tell())

    @staticmethod
    def _shaped(content: np.ndarray, header: Header) -> np.ndarray:
        array = content != 0 if header.dtype == np.bool_ else content.view(header.dtype)
        array = array.reshape(header.shape, order="F" if header.by_columns else "C")
        return np.ascontiguousarray(array, dtype=header.dtype.newbyteorder("=")).reshape(header.shape)

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        with self._damage(name), self._archive.open(self._entries[name]) as stream:
            yield stream

    @contextlib.contextmanager
    def _damage(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # zipfile, zlib and the parser of headers raise many kinds for damaged bytes
            raise ValueError(f"{self.path}: array {name!r}: {error}") from None
