"""One JSON line for each measurement: what, when, on which machine, with which versions and precision.

    {"benchmark": ..., "time": ..., "cpu": ..., "cores": ..., "versions": {...}, "matmul_precision": ..., ...}

`compare` sets two such files beside each other.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxinterp import precision, runs

PACKAGES = ("jaxinterp", "jax", "jaxlib", "flax", "torch")
_ENVIRONMENT = ("XLA_FLAGS", "GLIBC_TUNABLES")


def machine() -> dict[str, Any]:
    """Processor, cores, system, and the versions, precision and variables that timings depend on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        if importlib.util.find_spec(package):
            versions[package] = runs.version(package)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.processor()
    return {
        "cpu": cpu,
        "cores": cores(),
        "system": platform.platform(),
        "versions": versions,
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "matmul_precision": precision.current(),
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def append(out: Path | None, benchmark: str, figures: Mapping[str, Any]) -> None:
    """Appends one JSON line to `out`, which is made where it does not exist; None: nothing is written.

    Raises:
        OSError: it cannot be written.
    """
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    line = {"benchmark": benchmark, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **machine(), **figures}
    with open(out, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(f"appended to {out}")


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file, oldest first.

    Raises:
        ValueError: a line that is no record; the message names it.
        OSError: the file cannot be read.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(record, dict) or "benchmark" not in record:
            raise ValueError(f"{path}, line {number} is no record of a benchmark: it has no field benchmark")
        found.append(record)
    if not found:
        raise ValueError(f"{path} holds no record")
    return found


_SETTING = ("cpu", "cores", "environment", "device", "devices", "network", "weights", "size", "matmul_precision")
_SETTING += ("batch", "formats", "attack", "swept", "swept format", "cell", "node", "images", "seed")


def compare(a: Path, b: Path) -> list[str]:
    """The last record of every benchmark of two files, measurement by measurement, as lines of text.

    A change is called faster or slower where the quartiles of the two do not overlap, otherwise "within spread".

    Raises:
        ValueError: as `read`, or the files have no measurement in common.
        OSError: a file cannot be read.
    """
    first, second = (_last(read(path)) for path in (a, b))
    lines = [f"A = {a}", f"B = {b}"]
    common = 0
    for benchmark in first:
        if benchmark not in second:
            continue
        one, other = first[benchmark], second[benchmark]
        lines += ["", benchmark]
        lines += [f"  note: {note}" for note in _setting(one, other)]
        rows, others = _rows(one), _rows(other)
        width = max((len(name) for name in rows), default=0)
        for name, row in rows.items():
            if name not in others:
                continue
            common += 1
            lines.append(f"  {name:{width}}  {_change(row['seconds'], others[name]['seconds'])}")
        missing = [f"only in {which}: {name}" for which, x, y in (("A", rows, others), ("B", others, rows))
                   for name in x if name not in y]  # fmt: skip
        lines += [f"  {each}" for each in missing]
    if not common:
        raise ValueError(f"{a} and {b} have no measurement in common")
    return lines


def _last(found: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {record["benchmark"]: record for record in found}


def _rows(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The measurements of a record of `jaxinterp bench` by name; those of a sweep are called after the batch."""
    if isinstance(swept := record.get("sweep"), dict):
        return {f"batch {row['batch']}": row for row in swept.get("rows", [])}
    results = record.get("results")
    rows = results if isinstance(results, list) else []
    return {row["name"]: row for row in rows if isinstance(row, dict) and "name" in row and "seconds" in row}


def _setting(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    notes = [f"{key}: {one.get(key)} in A, {other.get(key)} in B" for key in _SETTING if one.get(key) != other.get(key)]
    versions = one.get("versions", {}), other.get("versions", {})
    for package in dict.fromkeys([*versions[0], *versions[1]]):
        given = [version.get(package, "none") for version in versions]
        if given[0] != given[1]:
            notes.append(f"{package} {given[0]} in A, {given[1]} in B")
    return notes


def _change(a: Mapping[str, float], b: Mapping[str, float]) -> str:
    times = b["median"] / a["median"]
    word = "slower" if b["low"] > a["high"] else "faster" if b["high"] < a["low"] else "within spread"
    return f"{a['median'] * 1e3:10.2f} ms -> {b['median'] * 1e3:10.2f} ms   x {times:.2f}   {word}"
