"""How long `jaxinterp convert` takes for a large network, and how much memory.

    python experiments/bench_conversion.py --out results/bench.jsonl

A file of seeded weights is written in torch.save's zip format (torch is not needed), ResNet-152's being 241 MB, and
converted by fresh processes, whose time and peak resident memory are taken. What a process takes that has only loaded
the same libraries is given beside it. The first conversion is not counted: it warms the cache of files.

Expected time: 2 minutes. Expected result: under 20 s, and under 3 times the file in memory beyond the libraries.
"""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import tempfile
import types
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tyro

from jaxinterp import models
from jaxinterp.bench.records import append
from jaxinterp.bench.timing import middle, shown, verdict
from jaxinterp.weights import seeded
from jaxinterp.weights.names import from_jax_shape

SECONDS, TIMES_THE_FILE = 20.0, 3.0


class _Storage:
    """A tensor's bytes; pickled as a persistent id."""

    def __init__(self, key: str, size: int):
        self.key, self.size = key, size


class _Tensor:
    """Pickled as torch pickles one: a call of torch._utils._rebuild_tensor_v2."""

    def __init__(self, key: str, array: np.ndarray):
        strides = tuple(step // array.itemsize for step in array.strides)
        self.arguments = (_Storage(key, array.size), 0, array.shape, strides, False, {})


# Classes that bear torch's names: a pickle stores no more than these.
_STORAGE_TYPE = type("FloatStorage", (), {"__module__": "torch"})
_REBUILD = type("_rebuild_tensor_v2", (), {"__module__": "torch._utils"})


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return ("storage", _STORAGE_TYPE, obj.key, "cpu", obj.size) if isinstance(obj, _Storage) else None

    def reducer_override(self, obj: Any) -> Any:
        return (_REBUILD, obj.arguments) if isinstance(obj, _Tensor) else NotImplemented


def save(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes float32 tensors, C-contiguous, as torch.save writes a state dict."""
    stand_ins = {"torch": types.ModuleType("torch"), "torch._utils": types.ModuleType("torch._utils")}
    for named in (_STORAGE_TYPE, _REBUILD):
        setattr(stand_ins[named.__module__], named.__name__, named)
    content = io.BytesIO()
    with mock.patch.dict(sys.modules, stand_ins):
        _Pickler(content, 2).dump({name: _Tensor(str(i), array) for i, (name, array) in enumerate(tensors.items())})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content.getvalue())
        archive.writestr("archive/byteorder", "little")
        for i, array in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{i}", array.tobytes())


# A process's peak counts from its fork, with the memory of its parent, so a small one stands in between.
_WATCHED = """
import resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(code, time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def measured(command: list[str], **environment: str) -> tuple[float, float]:
    """Seconds and peak resident megabytes of a process. Raises RuntimeError where it fails."""
    watched = [sys.executable, "-S", "-c", _WATCHED, *command]
    printed = subprocess.run(watched, env=os.environ | environment, stdout=subprocess.PIPE, check=True).stdout
    code, seconds, peak = printed.split()
    if int(code):
        raise RuntimeError(f"{' '.join(command)} ended with {int(code)}")
    return float(seconds), int(peak) * (1 if sys.platform == "darwin" else 1024) / 1e6


def main(network: str = "resnet152", rounds: int = 5, out: Path | None = None) -> None:
    """Converts a file and takes time and memory.

    Args:
        network: Its architecture.
        rounds: How many conversions.
        out: File to which one JSON line is appended.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{network}.pth"
        specs = models.shapes(network)
        save({name: seeded.tensor(name, from_jax_shape(spec.shape)) for name, spec in specs.items()}, file)
        size = file.stat().st_size / 1e6
        convert = [sys.executable, "-m", "jaxinterp", "convert", network, "--from", str(file), "--force"]
        libraries = "import jax, flax.nnx, tyro, jaxinterp.models; from orbax.checkpoint import v1; jax.devices()"
        environment = {"JAXINTERP_CKPTS": str(Path(folder) / "ckpts"), "JAX_PLATFORMS": "cpu"}
        measured(convert, **environment)
        _, bare = measured([sys.executable, "-c", libraries], **environment)
        seconds, peaks = zip(*(measured(convert, **environment) for _ in range(rounds)), strict=True)
    beyond = [(peak - bare) / size for peak in peaks]
    print(f"{network}, {size:.0f} MB, {rounds} conversions; median (quartiles)")
    print(f"  time   {shown(seconds, digits=2)} s    {verdict(middle(seconds)['median'], SECONDS)}")
    print(f"  memory {shown(peaks, digits=0)} MB at the peak, of which {bare:.0f} MB for the libraries")
    print(f"  the rest / file {shown(beyond, digits=2)}    {verdict(middle(beyond)['median'], TIMES_THE_FILE)}")
    figures = {"network": network, "rounds": rounds, "file_megabytes": size, "libraries_megabytes": bare}
    figures |= {
        "seconds": middle(seconds),
        "peak_megabytes": middle(peaks),
        "beyond_libraries_over_file": middle(beyond),
    }
    append(out, "conversion", figures)


if __name__ == "__main__":
    tyro.cli(main)
