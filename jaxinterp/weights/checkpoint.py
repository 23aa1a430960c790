"""Converted weights on disk: an Orbax checkpoint and a manifest that says what it holds and where it came from.

    ckpts/NAME/params/         Orbax, a flat dict from name to float32 array
    ckpts/NAME/manifest.json   source file and its sha256; shape and sha256 of every tensor; versions

Orbax does not notice flipped bytes, so every tensor is checked against the manifest when it is loaded. A folder is
written under a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp import processes

FORMAT = 1
_MANIFEST = "manifest.json"
_WRITTEN_AT_ONCE = 64 << 20  # bytes, beyond the parameters themselves

Placement = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""A sharding for all parameters, or a function from a parameter's name and shape to its sharding."""


def default_root() -> Path:
    """Where checkpoints are kept: $JAXINTERP_CKPTS, or ckpts/ of the source tree, or ckpts/ here."""
    if given := os.environ.get("JAXINTERP_CKPTS"):
        return Path(given)
    return (_tree() if (_tree() / "pyproject.toml").is_file() else Path.cwd()) / "ckpts"


def _tree() -> Path:
    """Where the package lies: the source tree, unless it was installed elsewhere."""
    return Path(__file__).resolve().parents[2]


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_digest(array: np.ndarray) -> str:
    """sha256 of an array's bytes in C order, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def known_digests(root: Path) -> dict[str, dict[str, str]]:
    """The record of source files: network -> {"sha256": ..., "source": ...}.

    That of `root` and, for networks that it does not mention, the committed one in ckpts/ of the source tree.
    """
    known: dict[str, dict[str, str]] = {}
    for folder in (_tree() / "ckpts", root):
        path = folder / "known.json"
        if path.is_file():
            known |= json.loads(path.read_text())
    return known


def save(
    params: Mapping[str, np.ndarray],
    folder: Path,
    *,
    name: str,
    classes: int,
    source: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> None:
    """Writes a checkpoint and its manifest, replacing an older one only when the new one is complete.

    Of several processes all must call this, with the same arrays; they share the folder, and the first writes.

    Args:
        params: name -> float32 array.
        folder: where to, such as ckpts/NAME.
        name: the network.
        classes: number of classes.
        source: what the manifest says of the source (file, sha256, licence).
        notes: what was done to tensors beyond a change of layout.

    Raises:
        OSError: the disk is full or not writable.
    """
    from orbax.checkpoint import v1 as ocp

    group = processes.current()
    made = ""
    if group.first:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)
    temporary = Path(group.told(made))
    try:
        # The writer works while nobody changes the parameters, so it needs no copy of them.
        context = ocp.Context()
        context.memory.write_concurrent_bytes, context.memory.deepcopy_host_arrays = _WRITTEN_AT_ONCE, False
        with context:
            ocp.save(str(temporary.resolve() / "params"), dict(params))
        if not group.first:
            return
        manifest = {
            "format": FORMAT,
            "network": name,
            "classes": classes,
            "source": dict(source),
            "notes": list(notes),
            "tensors": {
                key: {"shape": list(value.shape), "dtype": str(value.dtype), "sha256": tensor_digest(value)}
                for key, value in params.items()
            },
            "versions": {p: importlib.metadata.version(p) for p in ("jax", "numpy", "orbax-checkpoint")},
        }
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        os.chmod(temporary, 0o755)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
            os.rename(folder, old / "replaced")
            try:
                os.rename(temporary, folder)
            except BaseException:
                os.rename(old / "replaced", folder)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(temporary, folder)
    except BaseException:
        if group.first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_manifest(folder: Path, *, name: str) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        ValueError: there is no complete checkpoint of the network `name` here; the message says what to run.
    """
    path = folder / _MANIFEST
    remedy = f"run: jaxinterp convert {name}"
    if not folder.is_dir():
        left = sorted(path.name for path in folder.parent.glob(f".{folder.name}.*"))
        interrupted = f"; a conversion was interrupted and left {', '.join(left)}, to be deleted" if left else ""
        raise ValueError(f"no checkpoint of {name} in {folder.parent}{interrupted}; {remedy}")
    try:
        manifest = json.loads(path.read_text())
        format_, network, tensors = manifest["format"], manifest["network"], manifest["tensors"]
        manifest["source"], manifest["classes"] = dict(manifest["source"]), int(manifest["classes"])
        _ = [(tuple(entry["shape"]), entry["sha256"]) for entry in dict(tensors).values()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); {remedy}") from error
    if format_ != FORMAT or network != name or not isinstance(tensors, dict):
        raise ValueError(f"{path} is of format {format_} for {network!r}, expected {FORMAT} for {name!r}; {remedy}")
    return manifest


def load(
    folder: Path,
    expected: Mapping[str, jax.ShapeDtypeStruct],
    *,
    name: str,
    placement: Placement | None = None,
) -> dict[str, jax.Array]:
    """The parameters of a checkpoint, verified tensor by tensor.

    Of several processes all must call it: a tensor that is spread over them is gathered to be verified, and the same
    error is raised by each.

    Args:
        folder: such as ckpts/NAME.
        expected: name, shape and dtype of every parameter of the network.
        name: the network.
        placement: where the parameters go; None means the default device, to which they are not committed: what is
            computed from them and other arrays stays as free as those, and has no programs of its own.

    Raises:
        ValueError: no checkpoint, a missing, unexpected, misshapen or damaged tensor (by name), an unreadable file.
    """
    from orbax.checkpoint import v1 as ocp

    manifest = read_manifest(folder, name=name)
    remedy = f"run: jaxinterp convert {name} --force"
    tensors = manifest["tensors"]
    wrong = sorted(set(expected) ^ set(tensors)) or [
        key for key, spec in expected.items() if tuple(tensors[key]["shape"]) != spec.shape
    ]
    if wrong:
        raise ValueError(f"checkpoint {folder} does not fit {name}: {', '.join(wrong[:8])}; {remedy}")
    place = placement or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = {
        key: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=place(key, spec.shape) if callable(place) else place)
        for key, spec in expected.items()
    }
    try:
        params = ocp.load(str((folder / "params").resolve()), abstract)
    except Exception as error:  # Orbax and tensorstore raise many kinds for a damaged folder
        reason = str(error).strip().split("\n")[0][:300]
        raise ValueError(f"checkpoint {folder} cannot be read ({reason}); {remedy}") from error
    for key, value in params.items():
        if tensor_digest(_whole(value)) != tensors[key]["sha256"]:
            raise ValueError(f"checkpoint {folder} is damaged: tensor {key} does not match its sha256; {remedy}")
    return params if placement is not None else {key: jnp.asarray(np.asarray(x)) for key, x in params.items()}


def _whole(value: jax.Array) -> np.ndarray:
    """A tensor on the host, also where other processes hold parts of it."""
    if value.is_fully_addressable or value.is_fully_replicated:
        return np.asarray(value)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(value, tiled=True))
