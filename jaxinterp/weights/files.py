"""Files of weights as numpy arrays: the format is recognised by content, and nothing in a file is run.

PyTorch checkpoints (`torchfile`), safetensors, numpy's .npz, HDF5 as Keras writes it, and pickled numpy arrays
(`numpypickle`). Tensors keep the names and the layout of the file. What a damaged or hostile file can cost is bounded
by its own length, except for HDF5, whose C library parses the file: read HDF5 files from sources you trust.
"""

from __future__ import annotations

import os
import zipfile

import numpy as np

from jaxinterp.npzfile import BoundedFile, NpzFile
from jaxinterp.weights import numpypickle, torchfile

_EXPAND = 4  # how many times the file's size its tensors may take, beyond 64 MiB
_SLACK = 64 << 20
_HDF5 = b"\x89HDF\r\n\x1a\n"
_TORCH_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".npz", ".h5", ".hdf5", ".pkl")
"""Endings of the files that can be read; the content decides, whatever the ending."""


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the tensors of a file.

    Args:
        path: the file.

    Returns:
        The tensors by name, in the file's layout. bfloat16 has the type of ml_dtypes. A PyTorch file's
        `state_dict` or `model` and a Keras file's `model_weights` are unwrapped, the rest of such a file is dropped.

    Raises:
        ValueError: the file is damaged, of an unknown format, or holds something that is not a tensor; the message
            names the file and the tensor. Also where HDF5 is to be read and h5py is not installed.
        OSError: the file cannot be opened.
    """
    path = os.fspath(path)
    return _READERS[_format(path)](path)


def _format(path: str) -> str:
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would never be open, /dev/zero never at its end
        raise ValueError(f"{path}: not a file but a folder, a pipe or a device")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(16)
        tar = os.pread(file.fileno(), 5, 257) == b"ustar"
    if not size:
        raise ValueError(f"{path}: the file is empty")
    if head.startswith(b"PK\x03\x04"):
        return "npz" if _holds_arrays(path) else "torch"
    if head.startswith(_HDF5):
        return "hdf5"
    if head.startswith(_TORCH_LEGACY) or tar:
        return "torch"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size:
        return "safetensors"
    if head.startswith(b"\x80"):
        return "pickle"
    # Damaged at its beginning: the reader for its suffix says how.
    suffix = os.path.splitext(path)[1].lower()
    by_suffix = {".safetensors": "safetensors", ".npz": "npz", ".h5": "hdf5", ".hdf5": "hdf5", ".pkl": "pickle"}
    by_suffix |= {".pth": "torch", ".pt": "torch", ".bin": "torch", ".npy": "npy"}
    if suffix not in by_suffix:
        raise ValueError(f"{path}: not a file of weights in a known format ({' '.join(SUFFIXES)})")
    return by_suffix[suffix]


def _holds_arrays(path: str) -> bool:
    """Whether a zip archive is numpy's and not PyTorch's."""
    try:
        with BoundedFile(path) as file, zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except Exception:  # a damaged archive: the reader for its suffix says how
        return path.lower().endswith(".npz")
    return bool(names) and all(name.endswith(".npy") for name in names)


def _npz(path: str) -> dict[str, np.ndarray]:
    with NpzFile(path, expand=_EXPAND) as file:
        return {name: file.read(name) for name in file.names}


def _npy(path: str) -> dict[str, np.ndarray]:
    raise ValueError(f"{path}: a single array without names; save the tensors by name with numpy.savez")


def _safetensors(path: str) -> dict[str, np.ndarray]:
    import ml_dtypes  # noqa: F401  (teaches numpy the name of bfloat16)
    import safetensors

    try:
        with safetensors.safe_open(path, framework="np") as file:
            names = list(file.keys())
            tensors = {}
            for name in names:
                kind = file.get_slice(name).get_dtype()
                try:
                    tensors[name] = np.array(file.get_tensor(name))
                except (safetensors.SafetensorError, AttributeError, TypeError, ValueError) as error:
                    raise ValueError(f"{path}: tensor {name!r} of type {kind} cannot be read ({error})") from None
            return tensors
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or a damaged one ({error})") from None


def _hdf5(path: str) -> dict[str, np.ndarray]:
    try:
        import h5py
    except ImportError:
        raise ValueError(f'{path}: reading HDF5 needs h5py; run: pip install "jaxinterp[hdf5]"') from None

    tensors: dict[str, np.ndarray] = {}
    budget = _EXPAND * os.path.getsize(path) + _SLACK

    def visit(name: str, item: object) -> None:
        nonlocal budget
        if not isinstance(item, h5py.Dataset):
            return
        if item.external or item.is_virtual:
            raise _TensorError(f"tensor {name!r} is kept in another file")
        if item.dtype.kind not in "fiub" or item.shape is None:
            raise _TensorError(f"tensor {name!r} is of type {item.dtype}, not of numbers")
        budget -= item.nbytes
        if budget < 0:
            raise _TensorError(f"tensor {name!r}: with the shape {item.shape} it expands far beyond the file's size")
        try:
            tensors[name] = np.array(item[()], dtype=item.dtype.newbyteorder("="))
        except Exception as error:  # h5py passes on whatever the C library or a filter reports
            raise _TensorError(f"tensor {name!r} is damaged ({error})") from None

    try:
        with h5py.File(path, "r") as file:
            # A link to another file would be followed here; within a group, visititems follows none.
            own = isinstance(file.get("model_weights", getlink=True), h5py.HardLink)
            inner = file["model_weights"] if own else None
            (inner if isinstance(inner, h5py.Group) else file).visititems(visit)
    except _TensorError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:
        raise ValueError(f"{path}: not an HDF5 file, or a damaged one ({error})") from None
    return tensors


class _TensorError(Exception):
    """What is wrong with a tensor, before the file is named."""


_READERS = {
    "torch": torchfile.read,
    "safetensors": _safetensors,
    "npz": _npz,
    "npy": _npy,
    "hdf5": _hdf5,
    "pickle": numpypickle.read,
}
