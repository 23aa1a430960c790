"""PyTorch checkpoints as numpy arrays, read without torch and without running anything the file says.

Two formats of `torch.save` are read:

- zip (torch >= 1.6): an uncompressed archive with NAME/data.pkl (the object, whose storages are persistent
  ids), NAME/data/KEY (the bytes of one storage each) and NAME/byteorder;
- legacy: pickles of a magic number, the protocol 1001, facts about the writer, the object and the list of its
  storage keys, then, for each key in that order, a little-endian int64 count of elements and the elements.

The pickles are run by the machine of `pickles`, which knows the opcodes that `torch.save` writes for tensors and
containers, and refuses a name that is not in the table `_GLOBALS`. It builds descriptions of tensors; the arrays are
cut from the mapped file afterwards, each checked against its storage.

What a hostile file can cost is bounded: pickles and the zip directory are read up to 16 MiB (a state dict takes 100
to 200 bytes a tensor) and pickles up to a million opcodes, in time proportional to their length; the arrays together
may take at most four times the file's size plus 64 MiB, because tied weights and expanded views are copied for each of
their names: a legitimate file can exceed its own size, but not by much.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from jaxinterp.npzfile import BoundedFile
from jaxinterp.weights.pickles import Machine, PickleError, dict_key, function

_PICKLE_LIMIT = 16 << 20
_SLACK = 64 << 20
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")


class TorchFileError(PickleError):
    """A file that is no readable PyTorch checkpoint; the message names the file and what is wrong in it."""


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the state dict of a PyTorch checkpoint.

    A top-level dict whose `state_dict`, `model_state_dict`, `model` or `net` is a dict (the first of these) is
    unwrapped and its other entries are dropped. Names are returned as they stand in the file.

    Args:
        path: a file that `torch.save` wrote, in the zip or in the legacy format.

    Returns:
        The tensors by name, in file order, as C-contiguous arrays that own their memory. bfloat16 and float8
        have the types of ml_dtypes.

    Raises:
        TorchFileError: the file is damaged or of another format, names a global or uses an opcode outside
            the closed set, or an entry of its state dict is not a tensor that lies within its storage.
        OSError: the file cannot be opened.
    """
    path = os.fspath(path)
    with open(path, "rb") as file:
        try:
            if not os.fstat(file.fileno()).st_size:
                raise TorchFileError("the file is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                if data[:4] == b"PK\x03\x04":
                    return _read_zip(file, data)
                if data[257:262] == b"ustar":
                    raise TorchFileError("a tar archive, the oldest format: load it with torch and save it again")
                return _read_legacy(data)
        except PickleError as error:
            raise TorchFileError(f"{path}: {error}") from None


# What a pickle may name, and what comes of it.


@dataclass(frozen=True, eq=False)
class _StorageType:
    dtype: np.dtype


@dataclass(frozen=True, eq=False)
class _ElementType:
    dtype: np.dtype


@dataclass(frozen=True, eq=False)
class _Storage:
    key: str
    dtype: np.dtype
    start: int  # bytes; not 0 only in a legacy view of another storage
    nbytes: int


@dataclass(frozen=True, eq=False)
class _Tensor:
    storage: _Storage
    dtype: np.dtype
    offset: Any  # this and the next two are checked where the array is made and the tensor's name is known
    shape: Any
    strides: Any


def _tensor(storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None, kind=None):
    kind = storage if kind is None else kind
    if not isinstance(storage, _Storage) or not isinstance(kind, _Storage | _ElementType):
        raise TorchFileError("a tensor is rebuilt from something that is not a storage or a dtype")
    if metadata:
        raise TorchFileError("a tensor is a conjugate or negated view, which is not read: save a copy of it")
    return _Tensor(storage, kind.dtype, offset, shape, strides)


def _tensor_v3(storage, offset, shape, strides, requires_grad, hooks, kind, metadata=None):
    return _tensor(storage, offset, shape, strides, requires_grad, hooks, metadata, kind)


def _parameter(data, *_):
    if not isinstance(data, _Tensor):
        raise TorchFileError("a parameter is rebuilt from something that is not a tensor")
    return data


def _ordered_dict(items=None):
    result = OrderedDict()
    if items is not None:  # Python 2 passes a list of [key, value]
        if not isinstance(items, list) or not all(isinstance(i, list | tuple) and len(i) == 2 for i in items):
            raise TorchFileError("an OrderedDict is built from something that is not a list of pairs")
        for key, value in items:
            result[dict_key(key)] = value
        items.clear()  # one list serves one dict, else a short pickle could copy a long list again and again
    return result


def _size(items):
    if not isinstance(items, tuple | list) or len(items) > 64:
        raise TorchFileError("a torch.Size is built from something that is not a shape")
    return tuple(items)


_DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (
        *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    )
}
_STORAGES = {
    "Byte": "uint8", "Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64", "Bool": "bool",
    "Half": "float16", "BFloat16": "bfloat16", "Float": "float32", "Double": "float64",
    "ComplexFloat": "complex64", "ComplexDouble": "complex128",
}  # fmt: skip
_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): function(_ordered_dict, 0, 1),
    ("torch", "Size"): function(_size, 1),
    ("torch", "device"): function(lambda *_: None, 1, 2),
    ("torch._utils", "_rebuild_tensor"): function(_tensor, 4),
    ("torch._utils", "_rebuild_tensor_v2"): function(_tensor, 6, 7),
    ("torch._utils", "_rebuild_tensor_v3"): function(_tensor_v3, 7, 8),
    ("torch._utils", "_rebuild_parameter"): function(_parameter, 3),
    ("torch._utils", "_rebuild_parameter_with_state"): function(_parameter, 4),
    ("torch.nn.parameter", "Parameter"): function(_parameter, 1, 2),  # before torch 0.4
    ("torch.storage", "UntypedStorage"): _StorageType(_DTYPES["uint8"]),
    **{("torch", f"{name}Storage"): _StorageType(_DTYPES[dtype]) for name, dtype in _STORAGES.items()},
    **{("torch", name): _ElementType(dtype) for name, dtype in _DTYPES.items()},
}


def _build(target: object, state: object) -> bool:
    """The _metadata of a state dict, or the flags of a Parameter before torch 0.4: neither is kept."""
    flags = isinstance(target, _Tensor) and isinstance(state, tuple) and len(state) == 3
    return flags or isinstance(target, OrderedDict)


class _Machine(Machine):
    """Runs one pickle. `declared` maps the storages that were named to their types and counts of elements."""

    def __init__(self, file: io.BytesIO, at_end: str = "is cut off before its end"):
        super().__init__(
            file, names=_GLOBALS, build=_build, persistent=self._storage, what="a state dict", at_end=at_end
        )
        self.declared: dict[str, tuple[np.dtype, int]] = {}

    def _storage(self, identity: Any) -> _Storage:
        if isinstance(identity, tuple) and identity[:1] == ("module",):
            raise TorchFileError("a whole module was saved, not its state dict")
        if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
            raise TorchFileError("a persistent id that is not a storage's")
        _, kind, key, _, count, *view = identity
        if not isinstance(kind, _StorageType) or not isinstance(dict_key(key), str):
            raise TorchFileError("a storage whose type or key is malformed")
        if type(count) is not int or count < 0:
            raise TorchFileError(f"storage {key!r} has a malformed number of elements")
        if self.declared.setdefault(key, (kind.dtype, count)) != (kind.dtype, count):
            raise TorchFileError(f"storage {key!r} is declared twice, with different types or sizes")
        start, length, itemsize = 0, count, kind.dtype.itemsize
        if view and view[0] is not None:
            if not isinstance(view[0], tuple) or len(view[0]) != 3:
                raise TorchFileError(f"storage {key!r} has a malformed view")
            _, start, length = view[0]
            if type(start) is not int or type(length) is not int or not 0 <= start <= start + length <= count:
                raise TorchFileError(f"storage {key!r} has a view that reaches outside it")
        return _Storage(key, kind.dtype, start * itemsize, length * itemsize)


# From the description to the arrays.


def _state_dict(value: Any) -> dict[str, _Tensor]:
    if not isinstance(value, dict):
        raise TorchFileError(f"holds an object of type {type(value).__name__}, not a dict of tensors")
    value = next((value[name] for name in _WRAPPERS if isinstance(value.get(name), dict)), value)
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise TorchFileError(
                f"entry {name!r} is of type {type(tensor).__name__}: every entry of a state dict has to be a "
                f"tensor under a text key (a dict that wraps one is recognised by a key among {_WRAPPERS})"
            )
    return value


def _arrays(value: Any, declared: dict, data: mmap.mmap, locate: Callable[[str, int], int]):
    """Copies every tensor out of `data`; `locate(key, nbytes)` says where a storage of that size begins."""
    budget = 4 * len(data) + _SLACK
    starts: dict[str, int] = {}
    arrays = {}
    for name, tensor in _state_dict(value).items():
        try:
            storage, shape, strides, offset = tensor.storage, tensor.shape, tensor.strides, tensor.offset
            if not isinstance(shape, tuple | list) or not isinstance(strides, tuple | list):
                raise TorchFileError("its shape and strides are not tuples")
            if len(shape) > 64 or len(shape) != len(strides):
                raise TorchFileError(f"it has {len(shape)} sizes and {len(strides)} strides")
            if any(type(n) is not int or n < 0 for n in (offset, *shape, *strides)):
                raise TorchFileError("its offset, sizes and strides are not all integers >= 0")
            itemsize = tensor.dtype.itemsize
            # An empty axis counts as 1: numpy refuses an empty array whose other axes are huge.
            budget -= math.prod(max(n, 1) for n in shape) * itemsize
            if budget < 0:
                raise TorchFileError(f"the tensors expand far beyond the file's size, here with shape {shape}")
            last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
            if 0 not in shape and (last + 1) * itemsize > storage.nbytes:
                raise TorchFileError(f"its element {last} is outside its storage {storage.key!r}")
            if storage.key not in starts:
                dtype, count = declared[storage.key]
                starts[storage.key] = locate(storage.key, count * dtype.itemsize)
            start = starts[storage.key] + storage.start + offset * itemsize
            arrays[name] = _copy(data, tensor.dtype, start, tuple(shape), strides)
        except PickleError as error:
            raise TorchFileError(f"tensor {name!r}: {error}") from None
    return arrays


def _copy(data: mmap.mmap, dtype: np.dtype, start: int, shape: tuple[int, ...], strides) -> np.ndarray:
    if 0 in shape:
        return np.empty(shape, dtype)
    # The stride of an axis of length 1 is never used and may be any number.
    steps = [step * dtype.itemsize if n > 1 else 0 for n, step in zip(shape, strides, strict=True)]
    if dtype == np.bool_:  # a byte other than 0 and 1 would be a bool that equals neither
        return np.ndarray(shape, np.uint8, data, start, steps).astype(np.bool_, order="C")
    return np.array(np.ndarray(shape, dtype, data, start, steps), order="C")


def _read_legacy(data: mmap.mmap) -> dict[str, np.ndarray]:
    file = io.BytesIO(data[:_PICKLE_LIMIT])
    at_end = "is longer than 16 MiB" if len(data) > _PICKLE_LIMIT else "is cut off before its end"
    try:
        magic = _Machine(file).run()
    except PickleError:
        magic = None
    if type(magic) is not int or magic != _MAGIC:
        raise TorchFileError("neither a zip archive nor a file that begins with PyTorch's magic number")
    protocol = _Machine(file, at_end).run()
    if type(protocol) is not int or protocol != _PROTOCOL:
        raise TorchFileError(f"a version of the legacy format other than {_PROTOCOL}")
    _Machine(file, at_end).run()  # facts about the writer: storages are little-endian whatever it was
    machine = _Machine(file, at_end)
    value = machine.run()
    keys = _Machine(file, at_end).run()
    if not isinstance(keys, list):
        raise TorchFileError("the list of storage keys is missing")
    position, places = file.tell(), {}
    for key in keys:
        if not isinstance(key, str) or dict_key(key) not in machine.declared or key in places:
            raise TorchFileError("the list of storage keys has one that is repeated or that no tensor names")
        dtype, count = machine.declared[key]
        if position + 8 + count * dtype.itemsize > len(data):
            raise TorchFileError(f"the file is cut off in storage {key!r} of {count} elements")
        (stored,) = struct.unpack_from("<q", data, position)
        if stored != count:
            raise TorchFileError(f"storage {key!r} has {stored} elements, {count} were declared")
        places[key] = position + 8
        position = places[key] + count * dtype.itemsize

    def locate(key: str, nbytes: int) -> int:
        if key not in places:
            raise TorchFileError(f"its storage {key!r} is missing")
        return places[key]

    return _arrays(value, machine.declared, data, locate)


def _entries(file: io.BufferedReader, data: mmap.mmap) -> dict[str, tuple[int, zipfile.ZipInfo]]:
    """Where the data of each entry begins. Entries that do not lie one behind another are refused."""
    try:
        archive = zipfile.ZipFile(BoundedFile(file.fileno(), closefd=False))
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, OverflowError, struct.error) as error:
        raise TorchFileError(f"the zip archive is cut off or damaged ({error})") from None
    entries: dict[str, tuple[int, zipfile.ZipInfo]] = {}
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    ends = [*(info.header_offset for info in infos), archive.start_dir][1:]
    for info, end in zip(infos, ends, strict=True):
        begin = info.header_offset
        if info.filename in entries:
            raise TorchFileError(f"the zip archive has two entries {info.filename!r}")
        if not 0 <= begin <= len(data) - 30 or data[begin : begin + 4] != b"PK\x03\x04":
            raise TorchFileError(f"the zip entry {info.filename!r} is not where the directory says")
        begin += 30 + sum(struct.unpack_from("<HH", data, begin + 26))
        if begin + info.compress_size > min(end, len(data)):
            raise TorchFileError(f"the zip entry {info.filename!r} overlaps the next or is cut off")
        entries[info.filename] = begin, info
    return entries


def _read_zip(file: io.BufferedReader, data: mmap.mmap) -> dict[str, np.ndarray]:
    entries = _entries(file, data)
    inner = {name.partition("/")[2] for name in entries}
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        raise TorchFileError("a TorchScript archive (torch.jit.save): save the module's state_dict instead")
    roots = [name[:-8] for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise TorchFileError(f"a zip archive with {len(roots)} entries NAME/data.pkl, where one was expected")

    def content(name: str) -> tuple[int, int]:
        if roots[0] + name not in entries:
            raise TorchFileError(f"the zip entry {name!r} is missing")
        begin, info = entries[roots[0] + name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise TorchFileError(f"the zip entry {name!r} is compressed or encrypted: torch writes neither")
        if info.compress_size != info.file_size:
            raise TorchFileError(f"the zip entry {name!r} has two different sizes")
        # 0: written under torch.serialization.set_crc32_options(False)
        with memoryview(data) as whole, whole[begin : begin + info.file_size] as part:
            if info.CRC and zlib.crc32(part) != info.CRC:
                raise TorchFileError(f"the zip entry {name!r} is damaged: its checksum does not match")
        return begin, info.file_size

    def locate(key: str, nbytes: int) -> int:
        begin, length = content(f"data/{key}")
        if length != nbytes:
            raise TorchFileError(f"its storage {key!r} has {length} bytes, {nbytes} were declared")
        return begin

    if roots[0] + "byteorder" in entries:
        begin, length = content("byteorder")
        if data[begin : begin + min(length, 16)] != b"little":
            raise TorchFileError("the byte order is not little-endian: save it on a little-endian machine")
    begin, length = content("data.pkl")
    if length > _PICKLE_LIMIT:
        raise TorchFileError("data.pkl is longer than 16 MiB")
    machine = _Machine(io.BytesIO(data[begin : begin + length]))
    return _arrays(machine.run(), machine.declared, data, locate)
