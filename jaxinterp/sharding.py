"""Programs that run on every device of a mesh over that device's own examples.

Functions of the core look at where their examples are. On one device, or under somebody else's jit, they are plain
programs. Where the examples are sharded over a mesh, each device runs the program on its share, so that a loop ends
on a device when that device's examples are done and no step waits for another device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec


def mesh_of(tree: Any, *, anyhow: bool = False) -> Mesh | None:
    """The mesh over whose first axis the examples of `tree` are sharded; None on one device or under a trace.

    Args:
        tree: arrays.
        anyhow: the mesh also where the examples are replicated, for programs that share their work otherwise.

    Raises:
        ValueError: under a trace over a mesh with explicit axes, such as those of `jax.make_mesh`.
    """
    leaf = jax.tree.leaves(tree)[0]
    if isinstance(leaf, Tracer):
        sharding = jax.typeof(leaf).sharding
        if _is_explicit(sharding.mesh) and any(sharding.spec):
            raise ValueError(
                "under somebody else's jit, the axes of a mesh must be automatic: "
                "jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto, ...)), or jaxinterp.parallel.data_mesh()"
            )
        return None
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or len(sharding.device_set) == 1:
        return None
    mesh = sharding.mesh
    if not isinstance(mesh, Mesh) or (anyhow and len(mesh.axis_names) > 1):
        return None
    return _automatic(mesh) if anyhow or sharding.spec[:1] == mesh.axis_names[:1] else None


def on_mesh(
    mesh: Mesh | None, function: Callable, by_example: tuple[bool, ...], *, donate: tuple[int, ...] = ()
) -> Callable:
    """`function` jitted, on `mesh` as one program a device.

    Args:
        mesh: the mesh, or None for a single program.
        function: its results have the example as the first axis of every leaf.
        by_example: for every argument, whether its leaves are sharded by example; the others are replicated.
        donate: positions of arguments whose memory the results take; the caller must not use those again.
    """
    if mesh is None:
        return jax.jit(function, donate_argnums=donate)
    shares = PartitionSpec(mesh.axis_names[0])
    specs = tuple(shares if sharded else PartitionSpec() for sharded in by_example)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=shares, check_vma=False)
    jitted = jax.jit(mapped, donate_argnums=donate)

    @functools.wraps(function)
    def run(*args):
        return jitted(*jax.tree.map(_with_automatic_axes, args))

    run.lower = jitted.lower  # type: ignore[attr-defined]  # functions take any
    return run


def _is_explicit(mesh: Mesh | AbstractMesh) -> bool:
    return AxisType.Explicit in mesh.axis_types


def _automatic(mesh: Mesh) -> Mesh:
    return Mesh(mesh.devices, mesh.axis_names) if _is_explicit(mesh) else mesh


def _with_automatic_axes(x: Any) -> Any:
    """The same array. Under types with explicit axes every operation would have to say where its result is."""
    sharding = getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and _is_explicit(sharding.mesh):
        return jax.device_put(x, NamedSharding(_automatic(sharding.mesh), sharding.spec))
    return x
