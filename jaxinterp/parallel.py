"""Where the examples of a batch are computed, and where parameters lie: devices, meshes, processes.

One mesh axis, `data`, over the devices at hand: those of this process for work on single examples, which needs nobody
else, and those of all processes for statistics that are merged. Parameters have a copy on every device, or are spread
by a table of patterns and partition specs where they do not fit.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxinterp.network import Params

Table = Sequence[tuple[str, PartitionSpec]]
"""Regular expressions of parameters' names, each with how such parameters are spread; the first that fits counts."""


def data_mesh() -> Mesh | None:
    """The mesh of all devices of this process with the one axis `data`; None where there is only one device."""
    devices = jax.local_devices()
    return None if len(devices) == 1 else _mesh(devices, "data")


def global_mesh() -> Mesh | None:
    """The mesh of the devices of all processes with the one axis `data`, those of a process side by side."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return None if len(devices) == 1 else _mesh(devices, "data")


def model_mesh() -> Mesh:
    """The mesh of all devices of this process with the one axis `model`, over which parameters are spread."""
    return _mesh(jax.local_devices(), "model")


def _mesh(devices: Sequence[Any], axis: str) -> Mesh:
    return Mesh(np.array(devices), (axis,), axis_types=(AxisType.Auto,))


def multiple(mesh: Mesh | None) -> int:
    """What the size of a batch must be a multiple of."""
    return 1 if mesh is None else mesh.size


def shard(batch: Any, mesh: Mesh | None) -> Any:
    """A batch (a pytree of arrays with the example as first axis) with its examples spread over the mesh."""
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, batch)
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


def replicate(params: Any, mesh: Mesh | None) -> Any:
    """Parameters with a copy on every device of the mesh."""
    return params if mesh is None else jax.device_put(params, NamedSharding(mesh, PartitionSpec()))


def placement(mesh: Mesh, table: Table) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """Where every parameter goes, for `jaxinterp.load(name, placement=...)`: no device ever holds all of them.

    Args:
        mesh: the devices; its axes are those that the specs name.
        table: see `Table`; patterns are searched for in the name, so `$` and `^` mean its ends. A parameter that no
            pattern fits has a copy on every device.

    Returns:
        A function from a parameter's name and shape to its sharding. It raises ValueError where the spec has more axes
        than the parameter, or one that does not divide it.

    Raises:
        ValueError: a pattern that is no regular expression, or a spec with an axis that the mesh does not have.
    """
    rules = []
    for pattern, spec in table:
        try:
            rules.append((re.compile(pattern), spec))
        except re.error as error:
            raise ValueError(f"table: {pattern!r} is no regular expression: {error}") from None
        for axis in (axis for entry in spec for axis in _axes(entry)):
            if axis not in mesh.axis_names:
                raise ValueError(f"table: {pattern!r} names the axis {axis!r}; the mesh has {mesh.axis_names}")

    def of(name: str, shape: tuple[int, ...]) -> NamedSharding:
        spec = next((spec for pattern, spec in rules if pattern.search(name)), PartitionSpec())
        if len(spec) > len(shape):
            raise ValueError(f"table: {name} has the shape {list(shape)}, fewer axes than {spec}")
        for size, entry in zip(shape, spec, strict=False):
            parts = int(np.prod([mesh.shape[axis] for axis in _axes(entry)], dtype=int))
            if size % parts:
                raise ValueError(
                    f"table: {name} of shape {list(shape)} cannot be spread by {spec}: {size} into {parts} parts"
                )
        return NamedSharding(mesh, spec)

    return of


def place(params: Params, mesh: Mesh, table: Table) -> Params:
    """Parameters spread over a mesh by a table, for networks that do not fit on one device.

    Computations on them are divided by the compiler, so their results agree with those on one device to rounding, not
    to the last bit. Images go on the same mesh, with a copy on every device: `replicate(images, mesh)`.

    Args:
        params: a pytree of arrays; the name of a leaf is its path, joined by dots.
        mesh: as in `placement`, like table.
        table: every pattern must fit some parameter.

    Raises:
        ValueError: as `placement` and what it returns; a pattern that fits no parameter.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    where = placement(mesh, table)
    for pattern, _ in table:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(f"table: {pattern!r} fits no parameter; there are {', '.join(names[:5])}, ...")
    placed = [jax.device_put(leaf, where(name, leaf.shape)) for name, (_, leaf) in zip(names, leaves, strict=True)]
    return jax.tree.unflatten(treedef, placed)


def _axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    start_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> None:
    """Starts JAX on several processes, before any array is made. Nothing hangs: all waiting has a time limit.

    Args:
        coordinator_address: HOST:PORT of process 0. What is None is taken from the environment, see
            `jax.distributed.initialize`: Slurm, Open MPI, Kubernetes, the metadata of TPUs.
        num_processes: how many processes there are.
        process_id: which of them this is, from 0.
        start_timeout: seconds in which all must have come.
        heartbeat_timeout: seconds after which JAX takes a silent process for dead, and ends the others.

    Raises:
        ValueError: numbers out of range, an address that is none, or no cluster in the environment.
        OSError: nobody answers at the address within the limit, or its port is taken.
    """
    given = (coordinator_address, num_processes, process_id)
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"--num-processes must be at least 1, got {num_processes}")
    if process_id is not None and not 0 <= process_id < (num_processes or process_id + 1):
        raise ValueError(f"--process-id must be from 0 to {(num_processes or 1) - 1}, got {process_id}")
    if coordinator_address is not None:
        host, colon, port = coordinator_address.rpartition(":")
        if not colon or not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise ValueError(f"--coordinator-address: expected HOST:PORT, got {coordinator_address!r}")
        if process_id == 0:
            _check_free(int(port))
        elif process_id is not None:
            began = time.monotonic()
            _wait_for(host.strip("[]"), int(port), float(start_timeout))
            start_timeout = max(1, start_timeout - int(time.monotonic() - began))
    # Its handler of SIGTERM would keep the process alive.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *given,
            initialization_timeout=start_timeout,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=heartbeat_timeout,
        )
    except ValueError as error:
        if not str(error).endswith("must be defined.") and not str(error).endswith("should be defined."):
            raise
        missing = [
            name
            for name, value in zip(("coordinator-address", "num-processes", "process-id"), given, strict=True)
            if value is None
        ]
        raise ValueError(
            "--distributed: no cluster was found in the environment (Slurm, Open MPI, Kubernetes, TPU); give "
            + ", ".join(f"--{name}" for name in missing)
        ) from None
    except RuntimeError as error:
        raise OSError(f"the processes did not come together: {error}") from None


def _check_free(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise OSError(
                f"--coordinator-address: port {port} of this host cannot be used ({error.strerror}); choose another"
            ) from None


def _wait_for(host: str, port: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host, port), timeout=min(5.0, timeout)):
                return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise OSError(
                    f"--coordinator-address: nobody answered at {host}:{port} within {timeout:.0f} s "
                    f"({error.strerror or error}); is process 0 running there, and can its port be reached from here?"
                ) from None
        time.sleep(0.2)
