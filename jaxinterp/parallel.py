"""Where the examples of a batch are computed: one mesh axis, `data`, over the devices at hand."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh() -> Mesh | None:
    """The mesh of all local devices with the one axis `data`; None where there is only one device."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return None
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


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
