"""The one driver of all attacks: checks the problem, then init, a loop of steps, result.

    run = start, advance, finish

`advance` can be called in pieces of any number of steps, and its state stored in between: the result is the same to
the last bit. It goes on with the unfinished examples alone when that saves work. Where the images are sharded over the
devices of a mesh, every device loops over its own examples and stops by itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxinterp.attacks import objective
from jaxinterp.attacks.attack import Attack, AttackResult, Staged, State
from jaxinterp.draws import reproducible
from jaxinterp.hoisting import ahead
from jaxinterp.network import Model, as_model
from jaxinterp.sharding import mesh_of, on_host, on_mesh, with_automatic_axes

S = TypeVar("S", bound=State)


@with_automatic_axes
def run(
    attack: Attack,
    model: Model,
    images: Any,
    labels: Any,
    targets: Any = None,
    *,
    key: jax.Array,
    support: Any = None,
    ids: Any = None,
    initial: Any = None,
    compact: bool = True,
) -> AttackResult:
    """Runs an attack to its end.

    An example's result depends on the example alone: not on its neighbours in the batch, its position, or the number
    of devices. On CPU that holds to the last bit; where a backend picks kernels by batch size, up to rounding.

    Args:
        attack: for instance `CW(kappa=5.0)`.
        model: `images [B,H,W,C] -> logits [B,K]`: a bound network, or any callable that treats every example by
            itself.
        images: [B,H,W,C] float in [0, 1].
        labels: [B] integers, the true classes.
        targets: [B] integers other than the labels; where given, the attack is targeted.
        key: a JAX random key; every example uses its own, folded from this one and the example's id. Keys of other
            implementations than Threefry, whose numbers depend on the batch, seed one of Threefry.
        support: boolean (or 0 and 1) [B,H,W,C], or any shape that broadcasts to it, such as [B,H,W,1]: where the
            images may change.
        ids: [B] integers that identify the examples for randomness. By default an example is identified by its
            pixels, so that neither order nor batch matters.
        initial: [B,H,W,C] in [0, 1], where the search begins (a warm start) in place of the originals, such as the
            result of another attack; off the support the originals are taken. For attacks that have a method `warm`.
        compact: go on with the unfinished examples alone when many are done, see `advance`.

    Returns:
        The result for every example.

    Raises:
        ValueError: images of the wrong rank, outside [0, 1] or not finite; labels or targets out of range; a target
            equal to its label; shapes that do not fit; a hyper-parameter that is negative or not finite; parameters of
            the model on other devices than the images.
        TypeError: a model that is not callable, images that are not floats, labels that are not integers, a key that
            is none or many, a warm start of an attack that has none.
    """
    model = as_model(model)
    parts, state = _started(attack, model, images, labels, targets, key, support, ids, initial)
    return _finished(parts, _advanced(parts, attack, model, state, None, compact))


@with_automatic_axes
def start(
    attack: Attack,
    model: Model,
    images: Any,
    labels: Any,
    targets: Any = None,
    *,
    key: jax.Array,
    support: Any = None,
    ids: Any = None,
    initial: Any = None,
) -> Any:
    """The state before the first step. Arguments and errors are those of `run`."""
    return _started(attack, as_model(model), images, labels, targets, key, support, ids, initial)[1]


def _started(
    attack: Attack, model: Any, images: Any, labels: Any, targets: Any, key: Any, support: Any, ids: Any, initial: Any
) -> tuple[tuple[Any, Any], Any]:
    """The attack as `apart` divides it, checked once for all that follows, and the state before the first step."""
    attack = coerce(attack)
    if 0 in getattr(images, "shape", ()):
        raise ValueError(f"images: expected at least one image of at least one pixel, got shape {images.shape}")
    images, labels, targets, support = check(model, images, labels, targets, support)
    attack = by_example(attack, images.shape[0])
    key, ids = _checked_key(key), _checked_ids(ids, images)
    if initial is not None:
        if not hasattr(attack, "warm"):
            raise TypeError(f"{type(attack).__name__} cannot begin at given images: it has no warm start")
        if np.shape(initial) != images.shape:
            raise ValueError(f"initial must have the images' shape {images.shape}, got {np.shape(initial)}")
        initial = check(model, initial, labels, names=("initial", "labels"))[0]
    own, common = apart(attack)
    problem = images, labels, targets, ids, support, initial
    state = _start(mesh_of(images))(own, (common, model, key), problem)
    return (own, common), state


@with_automatic_axes
def advance(attack: Attack, model: Model, state: S, steps: int | None = None, *, compact: bool = True) -> S:
    """The state after at most `steps` more steps (None: to the end), fewer where every example is done before.

    Examples that are done cost nothing, if they are many: when half of a batch is done the others are gathered into a
    smaller one, and so on. That changes no result, since an example's steps do not depend on its batch.

    On one device, the steps of every stage of an attack in stages are a program of their own, compiled when the stage
    is reached.

    Args:
        attack: as it was started.
        model: as it was started with.
        state: from `start`, or from here.
        steps: how many steps, at most.
        compact: gather the unfinished examples; without it all steps run in one program on the whole batch, as they
            do under somebody else's jit.

    Raises:
        ValueError: steps below zero, or an attack as `run` refuses it.
        TypeError: steps that are not a whole number, likewise.
    """
    steps = None if steps is None else whole(steps, "steps", least=0)
    return _advanced(_parts(attack, state), attack, as_model(model), state, steps, compact)


def _advanced(parts: tuple[Any, Any], attack: Attack, model: Any, state: S, steps: int | None, compact: bool) -> S:
    iterations, batch = attack.iterations, state.done.shape[0]
    limit = iterations if steps is None else min(steps, iterations)
    own, common = parts
    shared, mesh = (common, model), mesh_of(state)
    state = _beside(shared[1], state)
    if not compact or not _addressable(state) or _traced((own, shared)):
        return _advance(mesh)(own, shared, state, _counts(limit, mesh), np.int32(0))[1]

    devices = 1 if mesh is None else mesh.size
    staged = attack if isinstance(attack, Staged) and mesh is None else None  # devices of a mesh need not be in step
    if staged and finished(state):
        return state
    whole, rows, taken = state, np.arange(batch), 0
    while True:
        smaller = _smaller_batch(len(rows), devices) if iterations >= _WORTHWHILE else 0
        # A single device leaves the loop when its batch can be made smaller. The devices of a mesh must have taken
        # the same number of steps for that, so they stop now and then.
        pause = limit - taken if mesh is None or not smaller else min(limit - taken, _PAUSE)
        # What was gathered here belongs to nobody else. The whole state may: the caller has it, or the images in it.
        stage = int(staged.stage(state)) if staged else None
        loop = _advance(mesh, len(rows) < batch, stage)
        counted, state = loop(own, shared, state, _counts(pause, mesh), np.int32(smaller * (mesh is None)))
        taken += int(np.max(np.asarray(counted)))  # on the host: a program for it would have to be compiled
        done = np.asarray(state.done)
        unfinished = int(np.sum(~done))
        ended = taken >= limit or unfinished == 0
        if not ended and not 0 < unfinished <= smaller:
            continue
        whole = state if len(rows) == batch else _scatter(mesh)(whole, rows, state)
        if ended:
            return whole
        while unfinished <= (next_smaller := _smaller_batch(smaller, devices)):
            smaller = next_smaller
        chosen = np.argsort(done, kind="stable")[:smaller]  # the unfinished ones first; done ones fill up
        rows = rows[chosen]
        own, state = _gather(mesh)((own, state), chosen)


_WORTHWHILE = 64  # steps that an attack must have, since the program for a smaller batch must be compiled
_PAUSE = 16  # steps after which the devices of a mesh look whether the batch can be made smaller


def _smaller_batch(size: int, devices: int) -> int:
    """Half the batch, as a multiple of the number of devices; 0 where there is no smaller one."""
    half = -(-size // (2 * devices)) * devices
    return half if half < size else 0


def _counts(steps: int, mesh: Mesh | None) -> np.ndarray:
    """A number of steps for each device."""
    return np.full(1 if mesh is None else mesh.size, steps, np.int32)


def _beside(model: Model, state: S) -> S:
    """The state committed to the device to which the model's parameters are, if they are.

    What a step returns is, too; a state that is not, as at the start, would have a program compiled for its first step.
    """
    parameter = _committed(model) if _addressable(state) else None
    if parameter is None or len(parameter.devices()) > 1 or mesh_of(state) is not None:
        return state
    return jax.device_put(state, parameter.sharding)


def _committed(model: Model) -> Array | None:
    """A parameter that is committed to its devices; None where none is."""
    arrays = (leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer))
    return next((leaf for leaf in arrays if leaf.committed), None)


def _addressable(state: Any) -> bool:
    """Whether this process can look at the whole state: neither a trace nor spread over several processes."""
    return not _traced(state) and all(getattr(x, "is_fully_addressable", True) for x in jax.tree.leaves(state))


def _traced(tree: Any) -> bool:
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


@with_automatic_axes
def finish(attack: Attack, state: Any) -> AttackResult:
    """The result of a state, whether or not the attack has ended."""
    return _finished(_parts(attack, state), state)


def _finished(parts: tuple[Any, Any], state: Any) -> AttackResult:
    return _finish(mesh_of(state))(*parts, state)


def _parts(attack: Attack, state: Any) -> tuple[Any, Any]:
    """The attack as programs take it, as `apart` divides it."""
    return apart(by_example(coerce(attack), state.done.shape[0]))


@with_automatic_axes
def lowered(attack: Attack, model: Model, state: Any) -> jax.stages.Lowered:
    """The program in which `advance` takes its steps on a whole batch, before it is compiled.

    It tells what a step costs, what memory it takes and what devices exchange. `state` is one from `start`, or its
    shapes (`jax.eval_shape`); the other arguments are those of `advance`.
    """
    own, common = _parts(attack, state)
    shared, mesh = (common, as_model(model)), mesh_of(state)
    return _advance(mesh).lower(own, shared, state, _counts(attack.iterations, mesh), np.int32(0))


@with_automatic_axes
def finished(state: Any) -> bool:
    """Whether no further step changes anything."""
    return bool(jnp.all(state.done))


@functools.cache
def _start(mesh: Mesh | None):
    def one_program(own, shared, problem):
        common, model, key = shared
        attack = together(own, common)
        images, labels, targets, ids, support, initial = problem
        keys = _example_keys(key, images, ids)  # in here, so that attacks without chance do not pay for them
        state = attack.init(objective.single(model), images, labels, targets, keys, support)
        if initial is None:
            return state
        return attack.warm(state, initial if support is None else jnp.where(support, initial, images))

    return on_mesh(mesh, one_program, (True, False, True))


@functools.cache
def _advance(mesh: Mesh | None, donated: bool = False, stage: int | None = None):
    def one_program(own, shared, state, limit, enough):
        common, model = shared
        attack = together(own, common)

        def one_step(model, state):
            model = objective.single(model)
            return attack.step(model, state) if stage is None else attack.step_of(stage, model, state)

        step = ahead(one_step, model, state)

        def unfinished(carry):
            taken, state = carry
            going = (taken < limit[0]) & (jnp.sum(~state.done, dtype=jnp.int32) > enough)
            return going if stage is None else going & (attack.stage(state) == stage)

        def body(carry):
            taken, state = carry
            return taken + 1, step(state)

        taken, state = lax.while_loop(unfinished, body, (jnp.int32(0), state))
        return taken[None], state

    return on_mesh(mesh, one_program, (True, False, True, True, False), donate=(2,) if donated else ())


@functools.cache
def _gather(mesh: Mesh | None):
    return _placed(mesh, lambda tree, rows: jax.tree.map(lambda x: x[rows], tree))


@functools.cache
def _scatter(mesh: Mesh | None):
    return _placed(mesh, lambda whole, rows, part: jax.tree.map(lambda x, y: x.at[rows].set(y), whole, part))


def _placed(mesh: Mesh | None, function: Any) -> Any:
    """`function` jitted, with the examples of its result spread over the mesh again."""
    if mesh is None:
        return jax.jit(function)
    return jax.jit(function, out_shardings=NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])))


@functools.cache
def _finish(mesh: Mesh | None):
    return on_mesh(mesh, lambda own, common, state: together(own, common).result(state), (True, False, True))


def coerce(attack: Attack) -> Attack:
    """The attack with float32 arrays for leaves, so that Python numbers and arrays share one compiled program.

    Integers in fields that all examples share, such as pictures of 8 bits, stay as they are.

    Raises:
        ValueError: a leaf is negative, not finite or outside the attack's `ranges`, `steps` and the like are below 1,
            or a word is not one of the attack's `choices`.
        TypeError: the attack is a class instead of an instance; a hyper-parameter is of the wrong type.
    """
    if isinstance(attack, type):
        raise TypeError(f"attack must be an instance, such as {attack.__name__}(), not the class itself")
    checked = _checked(attack)

    def as_array(path, leaf):
        if _is_shared(checked, path) and jnp.issubdtype(jnp.result_type(leaf), jnp.integer):
            return jnp.asarray(leaf)
        # Numbers of the host stay there: the compiled program takes them along, and each array here would be a launch.
        return jnp.asarray(leaf, jnp.float32) if isinstance(leaf, jax.Array) else np.asarray(leaf, np.float32)

    return jax.tree_util.tree_map_with_path(as_array, checked)


RANGES: Mapping[str, Callable[[np.ndarray], Any]] = {
    "positive": lambda values: values > 0,
    "below 1": lambda values: values < 1,
    "from 0 to 1": lambda values: values <= 1,
    "from 1 to 100": lambda values: (values >= 1) & (values <= 100),
}
"""What `ranges` of an attack can say of its numbers, none of which are negative."""


def _checked(attack: Any) -> Any:
    """The attack with its fields checked, and lists of numbers made arrays."""
    choices, ranges = getattr(attack, "choices", {}), getattr(attack, "ranges", {})
    changed = {}
    for field in dataclasses.fields(attack) if dataclasses.is_dataclass(attack) else ():
        value, whole = getattr(attack, field.name), f"{type(attack).__name__}.{field.name}"
        static = field.metadata.get("static")
        if isinstance(value, list) and any(map(dataclasses.is_dataclass, value)):
            raise TypeError(f"{whole} must be a tuple of its parts, got a list")
        if dataclasses.is_dataclass(value) and not isinstance(value, type):  # an attack made of attacks
            changed[field.name] = _checked(value)
        elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
            changed[field.name] = tuple(_checked(part) if dataclasses.is_dataclass(part) else part for part in value)
        if field.name in choices and isinstance(value, tuple) and not isinstance(field.default, tuple):
            raise ValueError(f"{whole} must be one of {', '.join(choices[field.name])}, got {value!r}")
        for part in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(part):
                if isinstance(part, type):
                    raise TypeError(f"{whole} must hold instances, such as {part.__name__}(), got the class")
                continue
            elif field.name in choices and part is not field.default:
                if part not in choices[field.name]:
                    raise ValueError(f"{whole} must be one of {', '.join(choices[field.name])}, got {part!r}")
            elif isinstance(field.default, bool):
                if not isinstance(part, bool | np.bool_):
                    raise TypeError(f"{whole} must be True or False, got {part!r}")
            elif isinstance(part, str) and not (static and isinstance(field.default, int)):
                continue
            elif static and part is not None and isinstance(field.default, int | None):
                if isinstance(part, bool) or not isinstance(part, int | np.integer):
                    raise TypeError(f"{whole} must be a whole number, got {part!r}")
                if not 1 <= part < 2**31:
                    raise ValueError(f"{whole} must be at least 1{' and below 2**31' if part > 0 else ''}, got {part}")
            elif part is None and field.default is not None and not static:
                raise TypeError(f"{whole} must be a number, or one for every example, got None")
        if not static and not isinstance(value, tuple | Tracer | None) and not dataclasses.is_dataclass(value):
            array = _numbers(value, whole, ranges.get(field.name))
            changed |= {field.name: jnp.asarray(array)} if isinstance(value, list) else {}
    return dataclasses.replace(attack, **changed) if changed else attack  # type: ignore[type-var]  # a dataclass then


def _numbers(value: Any, name: str, within: str | None) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):
            array = np.asarray(on_host(value), np.float32)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name} must be a number, or one for every example, got {value!r}") from None
    if not np.all(np.isfinite(array)) or np.any(array < 0):
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    if within is not None and not np.all(RANGES[within](array)):
        raise ValueError(f"{name} must be {within}, got {value}")
    return array


def by_example(attack: Attack, batch: int) -> Attack:
    """The attack with leaves [B], so that one number and one an example are the same program, on any devices.

    Leaves that are images [B,H,W,C] stay as they are, and so do those that all examples share.

    Raises:
        ValueError: a leaf is neither one number nor one for every example.
    """

    def spread(path, leaf):
        if _is_shared(attack, path) or (_lists(attack, path, "arrays") and leaf.ndim == 4 and leaf.shape[0] == batch):
            return leaf
        if leaf.shape not in ((), (batch,)):
            name = f"{type(attack).__name__}{jax.tree_util.keystr(path)}"
            raise ValueError(f"{name} must be one number, or one for each of {batch} examples, got shape {leaf.shape}")
        return (jnp if isinstance(leaf, jax.Array) else np).broadcast_to(leaf, (batch,))

    return jax.tree_util.tree_map_with_path(spread, attack)


def apart(attack: Attack) -> tuple[Any, Any]:
    """The attack without the leaves that all examples share, and without those that belong to one each."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(attack)
    shared = [_is_shared(attack, path) for path, _ in flat]
    own = [None if common else leaf for (_, leaf), common in zip(flat, shared, strict=True)]
    common = [leaf if common else None for (_, leaf), common in zip(flat, shared, strict=True)]
    return treedef.unflatten(own), treedef.unflatten(common)


def together(own: Any, common: Any) -> Any:
    """The attack that `apart` divided."""
    return jax.tree.map(lambda a, b: b if a is None else a, own, common, is_leaf=lambda leaf: leaf is None)


def _is_shared(attack: Any, path: Any) -> bool:
    """Whether a leaf lies in a field that the attack, or the attack in it that has the field, lists in `shared`."""
    return _lists(attack, path, "shared")


def _lists(attack: Any, path: Any, which: str) -> bool:
    for key in path:
        if isinstance(key, jax.tree_util.GetAttrKey):
            if key.name in getattr(attack, which, ()):
                return True
            attack = getattr(attack, key.name)
        else:
            attack = attack[key.idx]
    return False


def example_keys(key: jax.Array, images: Float[Array, "b h w c"], ids: Any = None) -> jax.Array:
    """One key for every example, folded from `key` and the example's id, or from its pixels without ids.

    Raises:
        ValueError: ids of the wrong shape or out of range.
        TypeError: ids that are not integers; a key that is none or many.
    """
    return _example_keys(_checked_key(key), images, _checked_ids(ids, images))


def _checked_key(key: Any) -> Any:
    dtype, shape = (key.dtype, key.shape) if isinstance(key, jax.Array | np.ndarray) else (None, ())
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if (shape != ()) if typed else (dtype != np.uint32 or len(shape) != 1):
        what = f"{shape} {dtype}" if dtype is not None else repr(key)
        raise TypeError(f"key must be a single key of jax.random, such as jax.random.key(0), got {what}")
    return key


def _checked_ids(ids: Any, images: Any) -> Any:
    if ids is None:
        return None
    ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"ids must be integers, got {ids.dtype}")
    if ids.shape != images.shape[:1]:
        raise ValueError(f"ids must have shape [{images.shape[0]}], one for every image, got {ids.shape}")
    if ids.size and not isinstance(ids, Tracer):
        known = on_host(ids)  # the limit is no number of a JAX array
        if not 0 <= np.min(known) <= np.max(known) < 2**32:
            raise ValueError(f"ids must be from 0 to 2**32 - 1, got {np.min(known)} to {np.max(known)}")
    return jnp.asarray(ids, jnp.uint32)


@jax.jit
def _example_keys(key, images, ids):
    if ids is None:
        # A multiplicative hash of the bits; integer sums are exact in any order, and so the same on any device.
        bits = lax.bitcast_convert_type(images, jnp.uint32).reshape(images.shape[0], -1)
        weights = 2 * lax.iota(jnp.uint32, bits.shape[1]) + 1
        mixed = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B) * weights
        ids = jnp.sum(mixed ^ (mixed >> 13), axis=1, dtype=jnp.uint32)
    key = reproducible(key)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids.astype(jnp.uint32))


def check(
    model: Model,
    images: Any,
    labels: Any,
    targets: Any = None,
    support: Any = None,
    *,
    names: tuple[str, str] = ("images", "labels"),
) -> tuple[Array, Array, Array | None, Array | None]:
    """The problem as arrays: float32 images, int32 labels and targets, boolean support of the images' shape.

    Values are checked where they are known; under a trace only shapes and types are. Errors are those of `run`, with
    `names` for the images and the labels.
    """
    name = names[0]
    images = _array(images, name)
    if images.ndim != 4:
        raise ValueError(f"{name} must be [B,H,W,C], got shape {images.shape}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"{name} must be floats in [0, 1], got {images.dtype}; divide 8-bit pixels by 255")
    low, high = (0.0, 1.0) if isinstance(images, Tracer) or not images.size else _range(images)
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{name} must be finite and in [0, 1], got values from {low:g} to {high:g}")
    images = images.astype(jnp.float32)
    _check_devices(model, images, name)
    logits = _logits(model, images)
    if getattr(logits, "ndim", None) != 2 or logits.shape[0] != images.shape[0]:
        raise ValueError(
            f"model must map images {images.shape} to logits [{images.shape[0]},K], got "
            f"{getattr(logits, 'shape', type(logits).__name__)}"
        )
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"model must return floats, got {logits.dtype}")
    batch, classes = logits.shape
    if classes < 2:
        raise ValueError(f"model must have at least two classes, got logits of shape {logits.shape}")
    labels = _classes(labels, names[1], batch, classes)
    if targets is not None:
        targets = _classes(targets, "targets", batch, classes)
        if not any(isinstance(x, Tracer) for x in (labels, targets)):
            known = on_host(labels)
            same = np.flatnonzero(known == on_host(targets))
            if same.size:
                raise ValueError(f"targets must differ from labels, but example {same[0]} has both {known[same[0]]}")
    if support is not None:
        support = _array(support, "support")
        if not jnp.issubdtype(support.dtype, jnp.bool_):
            if not isinstance(support, Tracer) and not np.all(np.isin(on_host(support), (0, 1))):
                raise ValueError("support must be boolean, or 0 and 1")
            support = support != 0
        try:
            support = jnp.broadcast_to(support, images.shape)
        except ValueError:
            raise ValueError(
                f"support must broadcast to the images' shape {images.shape}, got {support.shape}"
            ) from None
    return images, labels, targets, support


def _check_devices(model: Model, images: Array, name: str) -> None:
    parameter = None if isinstance(images, Tracer) or not images.committed else _committed(model)
    if parameter is not None and parameter.devices() != images.devices():
        raise ValueError(
            f"{name} are on {len(images.devices())} devices and parameters of the model on "
            f"{len(parameter.devices())}, not the same: put the parameters where the {name} are, with "
            "jaxinterp.parallel.replicate(params, mesh)"
        )


def _range(images: Array) -> tuple[float, float]:
    """The smallest and the largest value, NaN where there is one.

    A device that is not the host looks for them itself: fetching 512 images of 224 pixels takes longer than a step.
    """
    if images.is_fully_addressable and all(device.platform == "cpu" for device in images.devices()):
        known = np.asarray(images)
        return float(np.min(known)), float(np.max(known))
    low, high = jax.device_get(_extremes(images))
    return float(low), float(high)


@jax.jit
def _extremes(values: Array) -> tuple[Array, Array]:
    return jnp.min(values), jnp.max(values)


def _logits(model: Model, images: Array) -> Any:
    """What the model returns, as shapes. Tracing it takes as long as running it, so it is traced once for a structure.

    JAX remembers that of the same object only, and a bound network is a new one wherever it is bound.
    """
    leaves, treedef = jax.tree.flatten((model, images))
    if not all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves):
        return jax.eval_shape(model, images)
    return _logits_of(treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves))


@functools.lru_cache(maxsize=256)
def _logits_of(treedef: Any, specs: tuple[tuple[tuple[int, ...], Any], ...]) -> Any:
    model, images = jax.tree.unflatten(treedef, [jax.ShapeDtypeStruct(*spec) for spec in specs])
    return jax.eval_shape(lambda model, images: model(images), model, images)


def check_several(model: Model, images: Any, classes: Any) -> tuple[Array, Array]:
    """Images as `check` gives them, and classes [B] or [B,n] as [B,n].

    Raises:
        ValueError, TypeError: as `check`; classes of another shape, or not as many for every image.
    """
    numpy = jnp if isinstance(classes, Tracer) else np
    try:
        several = jnp.asarray(classes) if isinstance(classes, Tracer) else on_host(classes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"classes must be integers [B] or [B,n], as many for every image: {error}") from None
    if several.ndim not in (1, 2) or 0 in several.shape[1:] or not jnp.issubdtype(several.dtype, jnp.integer):
        raise ValueError(f"classes must be integers [B] or [B,n], got {several.dtype} of shape {several.shape}")
    several = several if several.ndim == 2 else several[:, None]
    low, high = (extreme(several, axis=1) for extreme in (numpy.min, numpy.max))
    images, _, _, _ = check(model, images, numpy.where(low < 0, low, high), names=("images", "classes"))
    return images, jnp.asarray(several, jnp.int32)


def whole(value: Any, name: str, *, least: int = 1) -> int:
    """A number of steps, samples and the like.

    Raises:
        TypeError: it is not whole.
        ValueError: it is below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def _array(value: Any, name: str) -> Array:
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array, got {type(value).__name__}") from error


def _classes(values: Any, name: str, batch: int, classes: int) -> Array:
    if not isinstance(values, jax.Array):  # 64 bits are kept until they have been looked at
        values = np.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {values.dtype}")
    if values.shape != (batch,):
        raise ValueError(f"{name} must have shape [{batch}], one for every image, got {values.shape}")
    if not isinstance(values, Tracer):
        known = on_host(values)
        outside = np.flatnonzero((known < 0) | (known >= classes))
        if outside.size:
            raise ValueError(
                f"{name} must be classes from 0 to {classes - 1}, but example {outside[0]} has {int(known[outside[0]])}"
            )
    return jnp.asarray(values, jnp.int32)
