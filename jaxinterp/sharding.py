"""Programs that run on every device of a mesh over that device's own examples.

Functions of the core look at where their examples are. On one device, or under somebody else's jit, they are plain
programs. Where the examples are sharded over a mesh, each device runs the program on its share, so that a loop ends
on a device when that device's examples are done and no step waits for another device.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


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
    return mesh if anyhow or sharding.spec[:1] == mesh.axis_names[:1] else None


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
    return jax.jit(mapped, donate_argnums=donate)


def on_host(values: Any) -> np.ndarray:
    """The values, on the host. Where they are spread over several processes, all of them ask for the values at once."""
    if isinstance(values, jax.Array) and not (values.is_fully_addressable or values.is_fully_replicated):
        return multihost_utils.process_allgather(values, tiled=True)
    return np.asarray(values)


def with_automatic_axes(function: F) -> F:
    """`function`, also of arrays on a mesh with explicit axes, where its results are then as well.

    The axes of `jax.make_mesh` are explicit by default: every operation on such arrays must say where its result is,
    also in a model that knows nothing of meshes. Within `function` they are automatic.
    """

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        meshes = [_context(), *map(_mesh_of, jax.tree.leaves((args, kwargs)))]
        explicit = next((mesh for mesh in meshes if mesh is not None and _is_explicit(mesh)), None)
        if explicit is None:
            return function(*args, **kwargs)
        args, kwargs = _moved((args, kwargs), _is_explicit, _automatic)
        with contextlib.nullcontext() if meshes[0] is None else jax.set_mesh(_automatic(meshes[0])):
            result = function(*args, **kwargs)
        return _moved(result, _automatic(explicit).__eq__, lambda _: explicit)

    return cast(F, wrapped)


def _mesh_of(x: Any) -> Mesh | None:
    """The mesh of an array on devices."""
    sharding = None if isinstance(x, Tracer) else getattr(x, "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None


def _moved(tree: T, chosen: Callable[[Mesh], bool], to: Callable[[Mesh], Mesh]) -> T:
    """`tree` with arrays on a chosen mesh on another one, of the same devices."""

    def move(x):
        mesh = _mesh_of(x)
        return x if mesh is None or not chosen(mesh) else jax.device_put(x, NamedSharding(to(mesh), x.sharding.spec))

    return jax.tree.map(move, tree)


def _context() -> Mesh | None:
    """The mesh of `jax.set_mesh`; None under a trace, where no other can be set."""
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError:
        return None
    return None if mesh.empty else mesh


def _is_explicit(mesh: Mesh | AbstractMesh) -> bool:
    return AxisType.Explicit in mesh.axis_types


def _automatic(mesh: Mesh) -> Mesh:
    return Mesh(mesh.devices, mesh.axis_names)
