"""What a device can do at most: published peaks, or else measured ones; its memory and its energy.

Peaks are dense ones, in operations a second, a product and a sum counting as two, by the format in which matrix
products are computed: float32 (not TF32), tf32, bf16. Sources are the vendors' data sheets: NVIDIA V100, T4, A10, A100,
L4, L40S, H100, H200, B200; Google Cloud's pages on TPU v4, v5e, v5p and v6e.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

FORMATS = ("float32", "tf32", "bf16")


@dataclasses.dataclass(frozen=True)
class Peak:
    """The limits of one device in one format.

    Attributes:
        flops: operations a second.
        bandwidth: bytes a second between the processor and its memory.
        source: "published" or "measured".
    """

    flops: float
    bandwidth: float
    source: str

    @property
    def ridge(self) -> float:
        """Operations a byte above which arithmetic is the limit, not memory."""
        return self.flops / self.bandwidth


# Pattern of device_kind -> TFLOP/s in float32, tf32, bf16 (None: the device has no such units), GB/s.
# The first match counts.
_PUBLISHED: tuple[tuple[str, tuple[float | None, float | None, float | None], float], ...] = (
    (r"\bB200", (75.0, 1100.0, 2250.0), 8000.0),
    (r"\bH200", (67.0, 494.7, 989.4), 4800.0),
    (r"H100 NVL", (60.0, 417.5, 835.5), 3938.0),
    (r"H100 PCIe", (51.0, 378.0, 756.0), 2039.0),
    (r"H100", (67.0, 494.7, 989.4), 3350.0),
    (r"A100.SXM4.80GB", (19.5, 156.0, 312.0), 2039.0),
    (r"A100 80GB PCIe", (19.5, 156.0, 312.0), 1935.0),
    (r"A100", (19.5, 156.0, 312.0), 1555.0),
    (r"L40S", (91.6, 183.0, 362.0), 864.0),
    (r"\bL4\b", (30.3, 60.0, 121.0), 300.0),
    (r"\bA10\b", (31.2, 62.5, 125.0), 600.0),
    (r"V100", (15.7, None, None), 900.0),
    (r"\bT4\b", (8.1, None, None), 320.0),
    (r"TPU v6 lite", (None, None, 918.0), 1640.0),
    (r"TPU v5 lite", (None, None, 197.0), 819.0),
    (r"TPU v5", (None, None, 459.0), 2765.0),
    (r"TPU v4", (None, None, 275.0), 1228.0),
)


def published(kind: str, form: str) -> Peak | None:
    """The published peak of a kind of device, as `device_kind` names it; None where the table has none."""
    for pattern, flops, bandwidth in _PUBLISHED:
        if re.search(pattern, kind):
            value = flops[FORMATS.index(form)]
            return None if value is None else Peak(value * 1e12, bandwidth * 1e9, "published")
    return None


def peak(form: str, device: Any = None, *, side: int | None = None, megabytes: int | None = None) -> Peak:
    """The peak of a device in a format: the published one, or else that of a matrix product and of a sum of vectors.

    Args:
        form: one of `FORMATS`.
        device: a JAX device; None is the default one.
        side: of the square matrices whose product is timed; by default 2048 on a CPU, 8192 elsewhere.
        megabytes: of each of the vectors that are added; by default 64 on a CPU, beyond its caches, 1024 elsewhere.

    Raises:
        ValueError: an unknown format.
    """
    if form not in FORMATS:
        raise ValueError(f"form must be one of {', '.join(FORMATS)}, got {form!r}")
    device = jax.devices()[0] if device is None else device
    found = published(device.device_kind, form)
    return found or measured(form, device, side=side, megabytes=megabytes)


def measured(form: str, device: Any, *, side: int | None = None, megabytes: int | None = None) -> Peak:
    """What a product of square matrices and a sum of two vectors reach, the best of several; arguments as in `peak`."""
    cpu = device.platform == "cpu"
    side, megabytes = side or (2048 if cpu else 8192), megabytes or (64 if cpu else 1024)
    dtype = jnp.bfloat16 if form == "bf16" else jnp.float32
    precision = {"float32": "highest", "tf32": "high", "bf16": "default"}[form]
    with jax.default_device(device):
        matrix = jnp.full((side, side), 1 / side, dtype)
        product = jax.jit(lambda a: jnp.dot(a, a, precision=precision, preferred_element_type=jnp.float32))
        arithmetic = 2 * side**3 / _best(lambda: product(matrix))
        # In place, so that no memory is asked for: two vectors are read and one is written.
        total = jax.jit(lambda a, b: 0.5 * a + b, donate_argnums=0)
        kept, other = jnp.ones(megabytes * 2**20 // 4, jnp.float32), jnp.ones(megabytes * 2**20 // 4, jnp.float32)

        def add():
            nonlocal kept
            kept = total(kept, other)
            return kept

        bandwidth = 3 * other.nbytes / _best(add)
    return Peak(arithmetic, bandwidth, "measured")


def _best(run: Callable[[], Any], rounds: int = 7) -> float:
    jax.block_until_ready(run())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)


# ---- Memory ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Memory:
    """The most memory that has been in use since the process began.

    Attributes:
        bytes: how much.
        of: "device" where the device tells, else "process", the resident set.
    """

    bytes: int
    of: str


def memory_used(device: Any = None) -> Memory:
    """The peak so far. It never falls, so that of one program among several is at most this."""
    device = jax.local_devices()[0] if device is None else device
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return Memory(int(stats["peak_bytes_in_use"]), "device")
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Memory(resident * (1 if sys.platform == "darwin" else 1024), "process")


def memory_limit(device: Any = None) -> int:
    """Bytes that programs may take: the device's limit, or what the system has free and this process holds already."""
    device = jax.local_devices()[0] if device is None else device
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return _available()


def _available(proc: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Free memory of the system, within what a container may have."""
    free = None
    if proc.is_file():
        found = re.search(r"^MemAvailable:\s+(\d+) kB", proc.read_text(), re.MULTILINE)
        free = int(found[1]) * 1024 if found else None
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used) if free is not None else limit - used
    return free if free is not None else 4 << 30


# ---- Energy ------------------------------------------------------------------------------------------------


def energy_meter(number: int = 1, powercap: Path = Path("/sys/class/powercap")) -> Callable[[], float] | None:
    """A function that returns the joules that the first devices have used so far, or None where nothing tells.

    The counters of NVIDIA GPUs through NVML, where the package nvidia-ml-py is installed; for CPUs the counters of the
    machine's packages (RAPL), where the system lets this user read them. The latter count every process.
    """
    devices = jax.local_devices()[:number]
    if devices[0].platform in ("gpu", "cuda"):
        return _nvml([getattr(device, "local_hardware_id", None) or 0 for device in devices])
    return _rapl(powercap) if devices[0].platform == "cpu" else None


def _nvml(indices: Sequence[int]) -> Callable[[], float] | None:
    """Of GPUs by their numbers among those that this process sees; NVML itself sees all of the machine."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    try:
        import pynvml  # pyright: ignore[reportMissingImports]  # optional: only GPUs have it

        pynvml.nvmlInit()
        names = [visible[i] if visible else str(i) for i in indices]
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)
            for name in names
        ]

        def joules() -> float:
            return sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles) / 1e3

        joules()
    except Exception:  # not installed, no driver, an older GPU: it has no counter, and measuring goes on without
        return None
    return joules


def _rapl(powercap: Path) -> Callable[[], float] | None:
    zones = [zone for zone in sorted(powercap.glob("*-rapl:*")) if re.fullmatch(r"[a-z-]+rapl:\d+", zone.name)]
    try:
        last = {zone: int((zone / "energy_uj").read_text()) for zone in zones}
        largest = {zone: int((zone / "max_energy_range_uj").read_text()) for zone in zones}
    except (OSError, ValueError):
        return None
    if not zones:
        return None
    total = 0

    def joules() -> float:
        nonlocal total
        for zone in zones:
            now = int((zone / "energy_uj").read_text())
            total += (now - last[zone]) % (largest[zone] + 1)  # the counters begin again at 0
            last[zone] = now
        return total / 1e6

    return joules
