"""The strict map from the tensors of a PyTorch state dict to the parameters of a network.

Definitions in `jaxinterp.models` carry PyTorch's attribute names, so a name maps to itself; what changes is layout:
convolutions OIHW -> HWIO (depthwise C1hw -> hw1C by the same transpose), linear layers [out, in] -> [in, out].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np

# PyTorch counts the batches that a batch norm has seen; a frozen one has no use for the count.
_IGNORED = ("num_batches_tracked",)


def map_tensors(
    tensors: Mapping[str, np.ndarray], expected: Mapping[str, jax.ShapeDtypeStruct], *, source: str
) -> dict[str, np.ndarray]:
    """The parameters named in `expected`, float32, in JAX's layouts.

    Args:
        tensors: a PyTorch state dict.
        expected: name, shape and dtype of every parameter of the network.
        source: what messages call the state dict.

    Raises:
        ValueError: tensors are missing, unexpected, of another shape, or not finite numbers; the message lists them.
    """
    given = {name: tensor for name, tensor in tensors.items() if name.rsplit(".", 1)[-1] not in _IGNORED}
    problems = _list("missing", [name for name in expected if name not in given])
    problems += _list("unexpected", [name for name in given if name not in expected])
    params, misshapen, unusable = {}, [], []
    for name, spec in expected.items():
        if name not in given:
            continue
        tensor = given[name]
        if not np.issubdtype(tensor.dtype, np.number) and tensor.dtype.name != "bfloat16":
            unusable.append(f"{name} of type {tensor.dtype}")
            continue
        laid_out = to_jax_layout(tensor)
        if laid_out.shape != spec.shape:
            wanted = from_jax_shape(spec.shape)
            misshapen.append(f"{name} {tensor.shape} instead of {wanted}")
        elif not np.all(np.isfinite(laid_out.astype(np.float32))):
            unusable.append(f"{name} with values that are not finite")
        else:
            params[name] = np.ascontiguousarray(laid_out, dtype=np.float32)
    problems += _list("misshapen", misshapen) + _list("unusable", unusable)
    if problems:
        raise ValueError(f"{source} does not fit the network: " + "; ".join(problems))
    return params


def to_jax_layout(tensor: np.ndarray) -> np.ndarray:
    """OIHW -> HWIO and [out, in] -> [in, out]; anything else as it is."""
    return tensor.transpose({4: (2, 3, 1, 0), 2: (1, 0)}.get(tensor.ndim, tuple(range(tensor.ndim))))


def from_jax_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that PyTorch gives the tensor of this shape in JAX's layout."""
    order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(shape), range(len(shape)))
    return tuple(shape[axis] for axis in order)


def _list(kind: str, names: Sequence[str], most: int = 12) -> list[str]:
    if not names:
        return []
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return [f"{kind}: {', '.join(names[:most])}{more}"]
