"""The strict map from the tensors of a file to the parameters of a network.

Definitions in `jaxinterp.models` carry the names of the original state dict, so a name maps to itself, or to what the
network's recipe says; what changes is layout: from PyTorch, convolutions OIHW -> HWIO (depthwise C1hw -> hw1C by the
same transpose) and linear layers [out, in] -> [in, out]; Keras has JAX's layouts already.

Some tensors are handled by rule: the prefix `module.` that DataParallel gives to every name is taken away, as often as
it was given; batch norm's `num_batches_tracked` and the auxiliary heads of Inception-v3 and GoogLeNet are dropped; half
and double precision become float32. Whatever else does not fit, one tensor at least, makes the map fail.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np

Layout = Literal["torch", "keras"]

# PyTorch counts the batches that a batch norm has seen; a frozen one has no use for the count.
_IGNORED = ("num_batches_tracked",)
_PREFIX = "module."
# Heads that only training uses; nothing that is built here has them.
AUXILIARY = {"inception_v3": ("AuxLogits.",), "googlenet": ("aux1.", "aux2.")}
"""By network, how the names of auxiliary heads begin."""


class Row(NamedTuple):
    """One line of the map.

    Attributes:
        source: name in the file; None where the file lacks the parameter.
        source_shape: shape in the file.
        source_dtype: type in the file.
        name: the parameter; None where the tensor is dropped or unexpected.
        shape: the parameter's shape, in JAX's layout.
        note: what is done to the tensor beyond a change of layout, or why it is dropped.
        problem: "" or one of missing, unexpected, misshapen, unusable, twice.
    """

    source: str | None
    source_shape: tuple[int, ...] | None
    source_dtype: str | None
    name: str | None
    shape: tuple[int, ...] | None
    note: str = ""
    problem: str = ""


def plan(
    tensors: Mapping[str, np.ndarray],
    expected: Mapping[str, jax.ShapeDtypeStruct],
    *,
    network: str = "",
    layout: Layout = "torch",
    rename: Callable[[str], str] | None = None,
) -> list[Row]:
    """The mapping table: parameters in the order of `expected`, then what is dropped, then what is unexpected.

    Args:
        tensors: what the file holds.
        expected: name, shape and dtype of every parameter of the network.
        network: its name, for the rules about auxiliary heads.
        layout: whose layouts the file has.
        rename: the parameter's name from the file's, where the two differ.
    """
    prefix = _prefix(tensors, expected)
    found: dict[str, tuple[str, str]] = {}
    dropped, twice = [], []
    for source in tensors:
        name = source.removeprefix(prefix)
        note = f"prefix {prefix} removed" if prefix else ""
        if name.rsplit(".", 1)[-1] in _IGNORED:
            dropped.append((source, "dropped: not used in evaluation"))
        elif name.startswith(AUXILIARY.get(network, ())) and name not in expected:
            dropped.append((source, "dropped: auxiliary head"))
        else:
            name = rename(name) if rename else name
            if name in found:
                twice.append(source)
            else:
                found[name] = (source, note)

    def row(source: str, name: str | None, *, note: str = "", problem: str = "") -> Row:
        tensor = tensors[source]
        shape = expected[name].shape if name is not None and name in expected else None
        return Row(source, tensor.shape, tensor.dtype.name, name, shape, note, problem)

    rows = []
    for name, spec in expected.items():
        if name not in found:
            rows.append(Row(None, None, None, name, spec.shape, problem="missing"))
            continue
        source, note = found[name]
        tensor = tensors[source]
        problem = ""
        if not _is_real(tensor.dtype):
            problem = "unusable"
        elif to_jax_layout(tensor, layout).shape != spec.shape:
            problem = "misshapen"
        elif tensor.dtype != np.float32:
            note = "; ".join(filter(None, (note, f"{tensor.dtype.name} -> float32")))
        rows.append(row(source, name, note=note, problem=problem))
    rows += [row(source, None, note=note) for source, note in dropped]
    rows += [row(source, None, problem="unexpected") for name, (source, _) in found.items() if name not in expected]
    rows += [row(source, None, problem="twice") for source in twice]
    return rows


def map_tensors(
    tensors: Mapping[str, np.ndarray],
    expected: Mapping[str, jax.ShapeDtypeStruct],
    *,
    source: str,
    network: str = "",
    layout: Layout = "torch",
    rename: Callable[[str], str] | None = None,
) -> dict[str, np.ndarray]:
    """The parameters named in `expected`, float32, in JAX's layouts.

    Args:
        tensors: what the file holds.
        expected: name, shape and dtype of every parameter of the network.
        source: what messages call the file.
        network: see `plan`.
        layout: see `plan`.
        rename: see `plan`.

    Raises:
        ValueError: tensors are missing, unexpected, of another shape, or not finite numbers; the message lists them.
    """
    rows = plan(tensors, expected, network=network, layout=layout, rename=rename)
    params, infinite = {}, []
    for row in rows:
        if row.source is None or row.name is None or row.problem:
            continue
        with np.errstate(over="ignore"):  # a double that float32 cannot hold is reported below
            param = np.ascontiguousarray(to_jax_layout(tensors[row.source], layout), dtype=np.float32)
        if np.all(np.isfinite(param)):
            params[row.name] = param.reshape(row.shape)
        else:
            infinite.append(f"{row.source} with values that are not finite")
    problems = _problems(rows, layout, infinite)
    if problems:
        raise ValueError(f"{source} does not fit the network: " + "; ".join(problems))
    return params


def classes_of(
    tensors: Mapping[str, np.ndarray],
    head: str,
    axis: int,
    *,
    source: str,
    layout: Layout = "torch",
    rename: Callable[[str], str] | None = None,
) -> int:
    """The number of classes of the network whose weights a file holds.

    Args:
        tensors: what the file holds.
        head: a parameter whose axis `axis`, in JAX's layout, runs over the classes (see `class_axis`).
        axis: that axis.
        source: what messages call the file.
        layout: see `plan`.
        rename: see `plan`.

    Raises:
        ValueError: the file has no such tensor, or one without that axis.
    """
    prefix = _prefix(tensors, (head,))
    for given, tensor in tensors.items():
        name = given.removeprefix(prefix)
        if (rename(name) if rename else name) == head:
            shape = to_jax_layout(tensor, layout).shape
            if len(shape) <= axis or not shape[axis]:
                raise ValueError(f"{source} does not fit the network: {given} of shape {tensor.shape} has no classes")
            return shape[axis]
    raise ValueError(f"{source} does not fit the network: missing: {head}, whose length is the number of classes")


def class_axis(one: Mapping[str, jax.ShapeDtypeStruct], other: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[str, int]:
    """The parameter and its axis that run over the classes: what differs between two numbers of classes.

    Of several, the one with the fewest axes (a bias) is taken.

    Args:
        one: the parameters of a network for some number of classes.
        other: the parameters of the same network for another.

    Raises:
        ValueError: nothing differs: the network's number of classes is fixed.
    """
    differing = [
        (len(spec.shape), name, axis)
        for name, spec in one.items()
        for axis, (a, b) in enumerate(zip(spec.shape, other[name].shape, strict=True))
        if a != b
    ]
    if not differing:
        raise ValueError("no parameter depends on the number of classes")
    _, name, axis = min(differing)
    return name, axis


def to_jax_layout(tensor: np.ndarray, layout: Layout = "torch") -> np.ndarray:
    """From PyTorch OIHW -> HWIO and [out, in] -> [in, out]; anything else as it is."""
    if layout == "keras":
        return tensor
    return tensor.transpose({4: (2, 3, 1, 0), 2: (1, 0)}.get(tensor.ndim, tuple(range(tensor.ndim))))


def from_jax_shape(shape: tuple[int, ...], layout: Layout = "torch") -> tuple[int, ...]:
    """The shape that the file's framework gives the tensor of this shape in JAX's layout."""
    if layout == "keras":
        return shape
    order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(shape), range(len(shape)))
    return tuple(shape[axis] for axis in order)


def _prefix(tensors: Collection[str], expected: Iterable[str]) -> str:
    """What DataParallel put in front of every name: "module.", twice where it wrapped a wrapped network, or ""."""
    if any(name.startswith(_PREFIX) for name in expected):
        return ""
    prefix = ""
    while tensors and all(name.startswith(prefix + _PREFIX) for name in tensors):
        prefix += _PREFIX
    return prefix


def _is_real(dtype: np.dtype) -> bool:
    return dtype.kind in "fiu" or dtype.name == "bfloat16"


def _problems(rows: Sequence[Row], layout: Layout, infinite: Sequence[str]) -> list[str]:
    def named(problem: str) -> list[Row]:
        return [row for row in rows if row.problem == problem]

    problems = _list("missing", [str(row.name) for row in named("missing")])
    problems += _list("unexpected", [str(row.source) for row in named("unexpected")])
    problems += _list("given twice", [str(row.source) for row in named("twice")])
    problems += _list(
        "misshapen",
        [
            f"{row.source} {row.source_shape} instead of {from_jax_shape(row.shape or (), layout)}"
            for row in named("misshapen")
        ],
    )
    unusable = [f"{row.source} of type {row.source_dtype}" for row in named("unusable")]
    return problems + _list("unusable", [*unusable, *infinite])


def _list(kind: str, names: Sequence[str], most: int = 12) -> list[str]:
    if not names:
        return []
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return [f"{kind}: {', '.join(names[:most])}{more}"]
