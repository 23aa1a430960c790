"""The same function in the form that XLA's CPU backend computes fast and reproducibly.

Two properties of that backend matter to everything here that loops over a network, and neither can be asked of the
author of a network. `canonical` rewrites the traced function, so that any JAX model has both:

* Speed. Inside scan, while and cond a convolution takes the fast path only in the exact layout NHWC,HWIO->NHWC
  (jax-ml/jax#12868). The gradient with respect to the input, and every network in NCHW, comes in another one and
  runs many times slower. Explicit transposes around the convolution restore the fast path.
* Reproducibility. A product or a sum with few rows is computed in another order than one with many, so an example's
  result would depend on the size of the batch it came in. Rows and columns of matrix products are padded to multiples
  of 64 and convolutions that have few output pixels get more examples, from which on the order is fixed; reductions
  become trees of elementwise operations. All of this is small beside the convolutions.

On other backends the function is left as it is: their compilers choose layouts themselves, and they pick kernels by
batch size, so results there agree to rounding only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

F = TypeVar("F", bound=Callable[..., Any])

# The libraries behind the backend choose their kernels by the size of the output: by the number of columns modulo 64,
# and by whether it has more than ten tiles of (on most processors) five or six neighbouring rows.
_SIDE = 64
_ROWS, _TILES, _TILE = 48, 12, 6


def canonical(function: F) -> F:
    """Returns `function`, rewritten as above where the default backend is the CPU.

    It computes the same values (convolutions bit for bit, unless they have so few output pixels that they are padded)
    and can be jitted, vmapped and put into loops like the original. Arguments are pytrees; leaves that are not arrays
    or numbers are taken as they are.
    """

    @functools.wraps(function)
    def rewritten(*args):
        if jax.default_backend() != "cpu":
            return function(*args)
        leaves, treedef = jax.tree.flatten(args)
        dynamic = [_is_array(leaf) for leaf in leaves]

        def of_arrays(*arrays):
            remaining = iter(arrays)
            merged = [next(remaining) if d else leaf for leaf, d in zip(leaves, dynamic, strict=True)]
            return function(*jax.tree.unflatten(treedef, merged))

        arrays = [leaf for leaf, d in zip(leaves, dynamic, strict=True) if d]
        closed, shape = jax.make_jaxpr(of_arrays, return_shape=True)(*arrays)
        return jax.tree.unflatten(jax.tree.structure(shape), _evaluate(closed, arrays))

    return rewritten  # type: ignore[return-value]  # wraps() keeps the signature


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | int | float | complex) or hasattr(leaf, "__array__")


def _evaluate(closed: jex.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr with the rules below in place of the primitives they are for."""
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for eqn in _needed(jaxpr):
        inputs = [read(atom) for atom in eqn.invars]
        rule = _RULES.get(eqn.primitive.name)
        if rule is not None:
            outputs = rule(eqn, *inputs)
        else:
            params = {name: _rewrite(value) for name, value in eqn.params.items()}
            outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(params))
        if not eqn.primitive.multiple_results:
            outputs = [outputs]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _needed(jaxpr: jex.Jaxpr) -> list[Any]:
    """The equations on which the results depend. The compiler would drop the others too, but later, at a price."""
    wanted = {atom for atom in jaxpr.outvars if isinstance(atom, jex.Var)}
    needed = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not wanted.isdisjoint(eqn.outvars):
            needed.append(eqn)
            wanted.update(atom for atom in eqn.invars if isinstance(atom, jex.Var))
    return needed[::-1]


def _rewrite(param: Any) -> Any:
    """A parameter of a primitive with the functions inside it (loop bodies, branches, calls) rewritten too."""
    if isinstance(param, jex.ClosedJaxpr):
        specs = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in param.in_avals]
        return jax.make_jaxpr(lambda *args: _evaluate(param, args))(*specs)
    if isinstance(param, tuple) and any(isinstance(each, jex.ClosedJaxpr) for each in param):
        return tuple(map(_rewrite, param))
    return param


def _convolution(eqn, lhs, rhs):
    p = dict(eqn.params)
    lhs_spec, rhs_spec, out_spec = p["dimension_numbers"]
    if p["batch_group_count"] != 1:
        return eqn.primitive.bind(lhs, rhs, **p)
    rank = len(lhs_spec)
    last = (0, rank - 1, *range(1, rank - 1))  # where batch, feature and spatial stand in N...C
    to_lhs = (lhs_spec[0], *lhs_spec[2:], lhs_spec[1])
    to_rhs = (*rhs_spec[2:], rhs_spec[1], rhs_spec[0])
    to_out = (out_spec[0], *out_spec[2:], out_spec[1])
    p["dimension_numbers"] = lax.ConvDimensionNumbers(last, (rank - 1, rank - 2, *range(rank - 2)), last)
    lhs, rhs = _transpose(lhs, to_lhs), _transpose(rhs, to_rhs)
    batch, (*others, last_size) = lhs.shape[0], [eqn.outvars[0].aval.shape[axis] for axis in to_out[1:-1]] or [1]
    rows, tiles = math.prod(others) * last_size, math.prod(others) * -(-last_size // _TILE)
    if batch and rows:
        lhs = _pad(lhs, 0, max(batch, -(-_ROWS // rows), -(-_TILES // tiles)))
    out = lax.slice_in_dim(eqn.primitive.bind(lhs, rhs, **p), 0, batch)
    return _transpose(out, tuple(sorted(range(rank), key=to_out.__getitem__)))


def _transpose(x, permutation):
    return x if permutation == tuple(range(x.ndim)) else lax.transpose(x, permutation)


def _dot(eqn, lhs, rhs):
    p = dict(eqn.params)
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = p["dimension_numbers"]
    lhs_free = [axis for axis in range(lhs.ndim) if axis not in (*lhs_contract, *lhs_batch)]
    rhs_free = [axis for axis in range(rhs.ndim) if axis not in (*rhs_contract, *rhs_batch)]
    out_shape = eqn.outvars[0].aval.shape
    lhs, rhs = _pad_side(lhs, lhs_free), _pad_side(rhs, rhs_free)
    if lhs_free and rhs_free and lhs_contract and lhs_contract[-1] < lhs_free[-1] and rhs_contract[-1] > rhs_free[-1]:
        # A left side whose rows are not contiguous goes to another library: exchange the sides.
        p["dimension_numbers"] = ((rhs_contract, lhs_contract), (rhs_batch, lhs_batch))
        out = eqn.primitive.bind(rhs, lhs, **p)
        first = len(lhs_batch)
        middle = first + len(rhs_free)
        out = lax.transpose(out, (*range(first), *range(middle, out.ndim), *range(first, middle)))
    else:
        out = eqn.primitive.bind(lhs, rhs, **p)
    return out if out.shape == out_shape else lax.slice(out, [0] * out.ndim, out_shape)


def _checkpoint(eqn, *args):
    p = eqn.params
    body = jex.ClosedJaxpr(p["jaxpr"], ())
    return jax.checkpoint(lambda *args: _evaluate(body, args), prevent_cse=p["prevent_cse"], policy=p["policy"])(*args)


def _tree(combine):
    """The rule for a reduction: a tree of elementwise operations, whose order the compiler cannot choose.

    The backend hands reductions, with whatever elementwise operations surround them, to one of two libraries by
    their size; the two differ in the order of additions and in the last bit of exp.
    """

    def rule(eqn, x):
        if 0 in x.shape:
            return eqn.primitive.bind(x, **eqn.params)
        for axis in sorted(eqn.params["axes"], reverse=True):
            while (size := x.shape[axis]) > 1:
                half = 1 << ((size - 1).bit_length() - 1)
                paired = combine(
                    lax.slice_in_dim(x, 0, size - half, axis=axis), lax.slice_in_dim(x, half, size, axis=axis)
                )
                x = lax.concatenate([paired, lax.slice_in_dim(x, size - half, half, axis=axis)], axis)
            x = lax.squeeze(x, [axis])
        return x

    return rule


def _pad_side(x, axes):
    """Pads the first of `axes` with zeros until the product of their sizes is a multiple of 64."""
    if not axes or math.prod(x.shape) == 0:
        return x
    first, *others = axes
    step = _SIDE // math.gcd(_SIDE, math.prod(x.shape[axis] for axis in others))
    return _pad(x, first, -(-x.shape[first] // step) * step)


def _pad(x, axis, size):
    """Pads one axis with zeros at its end."""
    if x.shape[axis] == size:
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, (size - x.shape[axis]) * (i == axis), 0) for i in range(x.ndim)])


_RULES = {
    "conv_general_dilated": _convolution,
    "dot_general": _dot,
    "remat2": _checkpoint,  # the name of jax.checkpoint in a trace
    "reduce_sum": _tree(lax.add),
    "reduce_max": _tree(lax.max),
    "reduce_min": _tree(lax.min),
}
