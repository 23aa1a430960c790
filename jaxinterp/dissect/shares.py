"""Statistics over data that is spread over devices: every device counts its own share; the shares are merged once.

A statistic is a pytree with pure functions, in the manner of optax: `init` makes one that has seen nothing, `update`
adds a batch, `merge` combines two; `result` is what it says, on the host. Merging is associative and exact, so the
result is the same for any number of devices and processes, and any batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

S = TypeVar("S")


def count(mesh: Mesh | None) -> int:
    """Number of shares: the devices of the mesh."""
    return 1 if mesh is None else mesh.size


def processes(mesh: Mesh | None) -> int:
    """How many processes share the examples: 1 or all of them.

    Raises:
        ValueError: the mesh has the devices of several processes, but not of all.
    """
    number = 1 if mesh is None else len({device.process_index for device in mesh.devices.flat})
    if number not in (1, jax.process_count()):
        raise ValueError(f"mesh: expected devices of one process or of all {jax.process_count()}, got {number}")
    return number


def placed(tree: Any, mesh: Mesh | None) -> Any:
    """A batch of this process on the devices: its examples (the first axis) are spread over the mesh.

    Where several processes take part, every one gives its own examples, as many as the others.
    """
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree)


def local(mesh: Mesh | None) -> Mesh | None:
    """The devices of the mesh that belong to this process: what is computed for single examples needs no others."""
    if mesh is None or processes(mesh) == 1:
        return mesh
    mine = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return Mesh(np.array(mine), mesh.axis_names, axis_types=mesh.axis_types)


def joined(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays on the devices of `local(mesh)` as this process's part of arrays on the whole mesh, where they are."""
    if mesh is None or processes(mesh) == 1:
        return tree
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))

    def join(leaf):
        shape = (leaf.shape[0] * processes(mesh), *leaf.shape[1:])
        parts = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(shape, sharding, parts)

    return jax.tree.map(join, tree)


def replicated(tree: Any, mesh: Mesh | None) -> Any:
    """The same values on every device."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree)


def start(init: Callable[..., S], mesh: Mesh | None, *sizes: Any) -> S:
    """A statistic `init(*sizes)` that has seen nothing, for every share: a first axis is added to each leaf."""
    return _start(init, mesh, sizes)()


@functools.cache
def _start(init: Callable[..., Any], mesh: Mesh | None, sizes: tuple[Any, ...]) -> Any:
    def every():
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count(mesh), *leaf.shape)), init(*sizes))

    if mesh is None:
        return jax.jit(every)
    return jax.jit(every, out_shardings=NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])))


@functools.cache
def step(update: Callable[..., Any], mesh: Mesh | None, by_example: tuple[bool, ...], **options: Any) -> Any:
    """The jitted `update(states, *arguments)` of every share's own statistic, on the share's device.

    The old statistics are given up to the new ones. The same function with the same options is compiled once, however
    often it is asked for.

    Args:
        update: of one statistic, `update(state, *arguments, **options) -> state`.
        mesh: the devices; None is the default device.
        by_example: for every argument, whether its leaves are spread by example; the others are replicated.
        options: fixed, hashable keyword arguments of `update`.
    """

    def every(states, *arguments):
        new = update(jax.tree.map(lambda leaf: leaf[0], states), *arguments, **options)
        return jax.tree.map(lambda leaf: leaf[None], new)

    if mesh is not None:
        share, whole = PartitionSpec(mesh.axis_names[0]), PartitionSpec()
        specs = (share, *(share if spread else whole for spread in by_example))
        every = jax.shard_map(every, mesh=mesh, in_specs=specs, out_specs=share, check_vma=False)
    return jax.jit(every, donate_argnums=0)


def merged(states: S, merge: Callable[[S, S], S], mesh: Mesh | None) -> S:
    """The statistic of all shares together, on every device."""
    return _merge(merge, mesh)(states)


@functools.cache
def _merge(merge: Callable[[Any, Any], Any], mesh: Mesh | None) -> Any:
    def whole(states):
        shares = jax.tree.leaves(states)[0].shape[0]
        while shares > 1:
            half = shares // 2
            first, second, rest = (
                jax.tree.map(lambda leaf, i=i, j=j: leaf[i:j], states)
                for i, j in ((0, half), (half, 2 * half), (2 * half, shares))
            )
            states = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), jax.vmap(merge)(first, second), rest)
            shares -= half
        return jax.tree.map(lambda leaf: leaf[0], states)

    return jax.jit(whole) if mesh is None else jax.jit(whole, out_shardings=NamedSharding(mesh, PartitionSpec()))
