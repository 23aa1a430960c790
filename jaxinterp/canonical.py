"""The same function in the form that XLA's CPU backend computes fast and reproducibly.

Two properties of that backend matter to everything here that loops over a network, and neither can be asked of the
author of a network. `canonical` rewrites the traced function, so that any JAX model has both:

* Speed. Inside scan, while and cond a convolution takes the fast path only in the exact layout NHWC,HWIO->NHWC
  (jax-ml/jax#12868). The gradient with respect to the input, and every network in NCHW, comes in another one and
  runs many times slower. Explicit transposes around the convolution restore the fast path. And a convolution with few
  channels would keep to a single thread: where that matters, examples lie side by side, as one wide image.
* Reproducibility. A product or a sum with few rows is computed in another order than one with many, so an example's
  result would depend on the size of the batch it came in. Rows and columns of matrix products are padded to multiples
  of 64; convolutions that have few output pixels get more examples, those with few output channels more channels,
  from which on the order is fixed; none is left to Eigen, which divides sums among its threads; convolutions of single
  pixels become matrix products, which are faster; the gradient of one with strides is computed without the zeros
  between positions, that with respect to an image, whose channels are very few, as a matrix product; sums of floats
  become trees of elementwise additions; a product is rounded before it is added to something. All of this is small
  beside the convolutions, or faster than them.

On other backends the function is left as it is: their compilers choose layouts themselves, and they pick kernels by
batch size, so results there agree to rounding only.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray, Tracer

F = TypeVar("F", bound=Callable[..., Any])

# The libraries behind the backend choose their kernels by the size of the output: by the number of columns modulo 64,
# and by whether it has more than ten tiles of (on most processors) five or six neighbouring rows.
_SIDE = 64
_ROWS, _TILES, _TILE = 48, 12, 6
_IMAGE = 4  # output channels that an image has at most
_FEWEST = 16  # columns of a matrix product, from which on it is so from twelve tiles of rows
_WORTH_THREADS = 1 << 26  # operations of a convolution that are worth more than one thread
_COLUMNS = 32  # output channels of a convolution, from which on incomplete tiles of rows follow the same order


def canonical(function: F) -> F:
    """Returns `function`, rewritten as above where the default backend is the CPU.

    It computes the same values up to rounding (convolutions bit for bit, unless they are small enough to be padded) and
    can be jitted, vmapped and put into loops like the original. Arguments are pytrees; leaves that are not arrays
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
        results = zip(*_evaluate(closed, arrays), strict=True)
        hidden = [_hidden(x) if "constant" in kinds else x for x, kinds in results]
        return jax.tree.unflatten(jax.tree.structure(shape), hidden)

    return rewritten  # type: ignore[return-value]  # wraps() keeps the signature


def jitted(function: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    """`jax.jit(function, **kwargs)`, which asks the compiler for Eigen's convolutions on CPUs.

    jaxlib 0.10 gives convolutions and products to YNNPACK otherwise, with which the gradient of a network of 3 x 3
    convolutions takes up to one and a half times as long. Eigen's bits depend on the batch where there are many threads
    and few examples, so this is for programs of which only rounding is asked: training. Under somebody else's jit or
    grad, what is compiled and how is up to them. Those who name the option in XLA_FLAGS have decided already, and a
    compiler that does not know it is not asked.
    """
    within = jax.jit(function, **kwargs)

    @functools.cache
    def outermost():
        options = _compiler_options()
        return jax.jit(function, compiler_options=options, **kwargs) if options else within

    @functools.wraps(function)
    def run(*args, **named):
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((args, named))):
            return within(*args, **named)
        try:
            return outermost()(*args, **named)
        except ValueError as error:  # there are no tracers among the arguments, but a trace around
            if "top-level" not in str(error):
                raise
            return within(*args, **named)

    run.lower = lambda *args, **named: outermost().lower(*args, **named)  # type: ignore[attr-defined]  # functions take any
    return run


_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}  # an empty list


@functools.cache
def _compiler_options() -> dict[str, str]:
    if jax.default_backend() != "cpu" or any(name in os.environ.get("XLA_FLAGS", "") for name in _OPTIONS):
        return {}
    try:
        jax.jit(lambda: 0, compiler_options=_OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return _OPTIONS


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | int | float | complex) or hasattr(leaf, "__array__")


def _evaluate(
    closed: jex.ClosedJaxpr, args: Sequence[Any], kinds: Sequence[frozenset[str]] = ()
) -> tuple[list[Any], list[frozenset[str]]]:
    """Evaluates a jaxpr with the rules below in place of the primitives they are for.

    Args:
        closed: the function.
        args: its arguments.
        kinds: what is known of each of them.

    Returns:
        The results, and what is known of each of them.
    """
    jaxpr, numbers = closed.jaxpr, _Numbers(closed.jaxpr, kinds)
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for eqn in _needed(jaxpr):
        name = eqn.primitive.name
        inputs = [_hidden(read(atom)) if numbers.must_be_hidden(atom, eqn) else read(atom) for atom in eqn.invars]
        inputs = [rounded(x) if must else x for x, must in zip(inputs, numbers.must_be_rounded(eqn), strict=True)]
        rule = _RULES.get(name)
        if name in _CALLS:
            outputs, found = _evaluate(eqn.params["jaxpr"], inputs, list(map(numbers.kinds, eqn.invars)))
            numbers.take(eqn.outvars, found)
        elif rule is not None:
            outputs = rule(eqn, *inputs)
            if name in _WEIGHTED and _is_short(outputs.dtype):
                outputs = rounded(outputs)
        else:
            told = list(map(numbers.kinds, eqn.invars)) if name in _CUSTOM else ()
            params = {key: _rewrite(value, told) for key, value in eqn.params.items()}
            outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(params))
        if not eqn.primitive.multiple_results:
            outputs = [outputs]
        numbers.add(eqn)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return list(map(read, jaxpr.outvars)), list(map(numbers.kinds, jaxpr.outvars))


# The compiler simplifies arithmetic where it sees that it may, and what it sees depends on the batch: on what it fuses,
# and on whether an array of the shape of one example is repeated for others, which in a batch of one it is not.
#
# * A product that is added to something may be rounded on its own, or only with the sum; so may one that was chosen, as
#   the larger of two, before. A sigmoid is a quotient to the compiler, and a power may be a product.
# * A product that is multiplied with a smaller array, such as the norm of every example, may become one with the
#   product of both factors; the smaller array may itself be a product.
# * Two products of which each has a constant factor may become one with the product of the constants, if they stand in
#   the same program: not where one of the factors is repeated, nor where there is more than one example of one number.
# * A product of powers may become the power of a sum.
# * A quotient may become a product with the reciprocal, if the divisor is repeated, or with the inverse function, if it
#   is a root or a power; a quotient of a quotient becomes one with the product of the divisors.
# * A number of 16 bits may keep the digits of 32 on its way into or out of a product of matrices or a convolution, if
#   nothing is padded before or cut off behind.
# * Two constant arrays with which the same number is computed become one; one that divides, its reciprocal.
#
# A barrier for the optimizer hides divisors and constants, but is gone when operations are fused. A single instruction
# that it cannot see through, the one in `rounded`, remains. Weights are not hidden from convolutions and products of
# matrices: the compiler brings those of which it knows the values into their order once, not in every run.
_SUMS = (
    *("add", "sub", "add_any", "reduce_sum", "reduce_window_sum", "cumsum"),
    *("scatter-add", "scatter-sub", "select_and_scatter_add"),
)
_POWERS = ("exp", "exp2", "pow")
_MOVES = (  # what returns numbers that it was given, but for their signs
    *("neg", "reshape", "broadcast_in_dim", "squeeze", "slice", "dynamic_slice", "transpose", "rev", "copy", "abs"),
    *("select_n", "concatenate", "pad", "dynamic_update_slice", "gather", "scatter", "stop_gradient"),
    *("stack", "unstack", "split", "tile", "broadcast_to", "convert_element_type", "name", "optimization_barrier"),
    *("max", "min", "clamp"),
)
_CALLS = ("jit", "pjit")
_WEIGHTED = ("conv_general_dilated", "dot_general")
_CUSTOM = ("custom_jvp_call", "custom_vjp_call")
_KINDS = ("products", "spread", "powers", "computed", "constant", "single", "scaled", "moved")


class _Numbers:
    """What is known of the variables of a jaxpr, equation by equation."""

    def __init__(self, jaxpr: jex.Jaxpr, kinds: Sequence[frozenset[str]]):
        constants: list[Any] = jaxpr.constvars
        self.products: set[Any] = set()
        self.spread: set[Any] = set()  # that stand in several places each
        self.moved: set[Any] = set()  # made of those, which the compiler may see and may not
        self.powers: set[Any] = set()
        self.scaled: set[Any] = set()  # products with, or quotients by, a literal number
        # Of no input: those that are no floats (positions, 8-bit levels, masks), the first floats, and single numbers.
        self.computed = {var for var in constants if not _is_float(var.aval.dtype)}
        self.constant = {var for var in constants if _is_float(var.aval.dtype) and var.aval.size > 1}
        self.single = {var for var in constants if getattr(var.aval, "size", 0) == 1}
        self.take(jaxpr.invars, kinds)

    def take(self, variables: Sequence[Any], kinds: Sequence[frozenset[str]]) -> None:
        """Takes note of variables of which everything is known."""
        for var, names in zip(variables, kinds, strict=False):
            for name in names:
                getattr(self, name).add(var)

    def kinds(self, atom: Any) -> frozenset[str]:
        """What functions are told of their arguments, and tell of their results."""
        if isinstance(atom, jex.Literal):
            several = "constant" if _is_float(np.result_type(atom.val)) else "computed"
            return frozenset([several if np.size(atom.val) > 1 else "single"])
        return frozenset(name for name in _KINDS if atom in getattr(self, name))

    def is_product(self, atom: Any) -> bool:
        return isinstance(atom, jex.Var) and atom in self.products

    def is_constant(self, atom: Any) -> bool:
        return isinstance(atom, jex.Literal) or atom in self.constant

    def is_spread(self, atom: Any, eqn: Any) -> bool:
        if isinstance(atom, jex.Literal):
            return not _is_exact(atom)
        return atom in self.spread or atom in self.single or atom.aval.size < eqn.outvars[0].aval.size

    @staticmethod
    def are_all(kind: set[Any], atoms: Sequence[Any]) -> bool:
        return all(not isinstance(atom, jex.Literal) and atom in kind and _is_float(atom.aval.dtype) for atom in atoms)

    def must_be_rounded(self, eqn: Any) -> list[bool]:
        """Which inputs of an equation must be."""
        name, flags = eqn.primitive.name, list(map(self.is_product, eqn.invars))
        if name in _WEIGHTED:
            return [_is_short(atom.aval.dtype) and not self.is_constant(atom) for atom in eqn.invars]
        if name in _SUMS or (name not in (*_CALLS, *_CUSTOM) and any(map(_is_body, eqn.params.values()))):
            return flags
        if name == "div":
            exact = isinstance(eqn.invars[1], jex.Literal) and _is_exact(eqn.invars[1])
            return [flags[0] and not exact, False]
        if name == "mul":
            if any(self.are_all(kind, eqn.invars) for kind in (self.powers, self.scaled)):
                return [True, True]
            spread = [self.is_spread(atom, eqn) for atom in eqn.invars]
            meets = any(spread) or not self.moved.isdisjoint(atom for atom in eqn.invars if isinstance(atom, jex.Var))
            return [product and meets and not each for product, each in zip(flags, spread, strict=True)]
        if name in ("square", "integer_pow", "pow"):
            return [self.are_all(self.scaled, eqn.invars[:1]), False][: len(flags)]
        return [False] * len(flags)

    def must_be_hidden(self, atom: Any, eqn: Any) -> bool:
        """Whether it is a constant with which the compiler must not compute.

        What is only moved remains a constant, and is hidden where it meets something else. Of a single number that is
        taken out of it nothing is hidden.
        """
        name = eqn.primitive.name
        if not self.is_constant(atom) or name in _CALLS:
            return False
        if name in _MOVES and any(var.aval.size == 1 for var in eqn.outvars):
            return True
        return name not in (*_MOVES, *_WEIGHTED) or (name in _WEIGHTED) == self.are_fixed(eqn.invars)

    def are_fixed(self, atoms: Sequence[Any]) -> bool:
        """Whether they depend on no input."""
        return all(self.is_constant(atom) or atom in self.computed for atom in atoms)

    def add(self, eqn: Any) -> None:
        """Takes note of the outputs of an equation."""
        name, inputs = eqn.primitive.name, [atom for atom in eqn.invars if isinstance(atom, jex.Var)]
        if _rounds(eqn) or (name in _MOVES and any(map(self.is_product, inputs))):
            self.products.update(var for var in eqn.outvars if _is_float(var.aval.dtype))
        literal = [isinstance(atom, jex.Literal) or atom in self.single for atom in eqn.invars]
        if literal and all(literal):
            self.single.update(eqn.outvars)
        if (name in ("mul", "div") and any(literal)) or (name in _MOVES and not self.scaled.isdisjoint(inputs)):
            self.scaled.update(eqn.outvars)
        if name == "broadcast_in_dim" and self.is_spread(eqn.invars[0], eqn):
            self.spread.update(eqn.outvars)
        elif name in _MOVES and not (self.spread | self.moved).isdisjoint(inputs):
            self.moved.update(eqn.outvars)
        if name in _POWERS:
            self.powers.update(eqn.outvars)
        if name in _MOVES and inputs and self.are_fixed(inputs):
            for var in eqn.outvars:
                if _is_float(var.aval.dtype):
                    (self.constant if var.aval.size > 1 else self.single).add(var)
        if name == "iota" or (inputs and self.computed.issuperset(inputs)):
            for var in eqn.outvars:
                (self.constant if _is_float(var.aval.dtype) else self.computed).add(var)


def _rounds(eqn: Any) -> bool:
    """Whether it is a product or a quotient of floats that needs rounding; one with a power of two does not."""
    name = eqn.primitive.name
    if name not in ("mul", "div", "square", "integer_pow", "pow", "logistic"):
        return False
    factors = {"mul": eqn.invars, "div": eqn.invars[1:]}.get(name, [])
    exact = any(isinstance(atom, jex.Literal) and _is_exact(atom) for atom in factors)
    return _is_float(eqn.outvars[0].aval.dtype) and not exact


def _is_float(dtype: Any) -> bool:
    """Whether it is one that can be rounded."""
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1


def _is_short(dtype: Any) -> bool:
    """Whether the compiler may compute with more digits than it has, until it sees something else than arithmetic."""
    return _is_float(dtype) and dtype.itemsize < 4


def _is_exact(literal: Any) -> bool:
    """Whether a product with this number needs no rounding."""
    if jnp.ndim(literal.val) or jnp.issubdtype(literal.aval.dtype, jnp.complexfloating):
        return False
    return abs(math.frexp(float(literal.val))[0]) in (0, 0.5)


@jax.custom_jvp
def rounded(x: Any) -> Any:
    """The same values of at least 16 bits. As an integer, the number that is taken away is a NaN, and stays one."""
    integer = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    bits = lax.bitcast_convert_type(x, integer)
    return lax.bitcast_convert_type(lax.min(bits, jnp.asarray(jnp.iinfo(integer).max - 1, integer)), x.dtype)


@rounded.defjvp
def _rounded_jvp(primals, tangents):
    return rounded(*primals), tangents[0]


def _hidden(constant: Any) -> Any:
    """An array of floats that the compiler does not take for a constant; a single number it may."""
    several = hasattr(constant, "dtype") and np.size(constant) > 1
    if several and isinstance(jax.typeof(constant), ShapedArray) and _is_float(constant.dtype):
        return lax.optimization_barrier(constant)
    return constant


def _needed(jaxpr: jex.Jaxpr) -> list[Any]:
    """The equations on which the results depend. The compiler would drop the others too, but later, at a price."""
    wanted = {atom for atom in jaxpr.outvars if isinstance(atom, jex.Var)}
    needed = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not wanted.isdisjoint(eqn.outvars):
            needed.append(eqn)
            wanted.update(atom for atom in eqn.invars if isinstance(atom, jex.Var))
    return needed[::-1]


def _rewrite(param: Any, kinds: Sequence[frozenset[str]] = ()) -> Any:
    """A parameter of a primitive with the functions inside it (loop bodies, branches, calls) rewritten too.

    Those that the compiler will see as part of what surrounds them are told the kinds of their arguments; the others it
    may see so too, such as a loop of a single step. What they return is rounded.
    """
    if isinstance(param, jex.ClosedJaxpr):
        specs = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in param.in_avals]
        return jax.make_jaxpr(_rounding(param, kinds))(*specs)
    if isinstance(param, tuple) and any(isinstance(each, jex.ClosedJaxpr) for each in param):
        rewritten = map(_rewrite, param)
        return type(param)(*rewritten) if hasattr(param, "_fields") else tuple(rewritten)  # linear solves name theirs
    return param


def _rounding(closed: jex.ClosedJaxpr, kinds: Sequence[frozenset[str]] = ()) -> Callable[..., list[Any]]:
    """The function of a jaxpr, of whose results those that are products are rounded, and constants are hidden."""

    def ended(x, names):
        x = _hidden(x) if "constant" in names else x
        return rounded(x) if "products" in names and not jax.typeof(x).weak_type else x

    return lambda *args: list(map(ended, *_evaluate(closed, args, kinds)))


def _is_body(param: Any) -> bool:
    if isinstance(param, tuple):
        return any(map(_is_body, param))
    return isinstance(param, jex.ClosedJaxpr | jex.Jaxpr)


def _convolution(eqn, lhs, rhs):
    p = dict(eqn.params)
    lhs_spec, rhs_spec, out_spec = p["dimension_numbers"]
    if p["batch_group_count"] != 1:
        return eqn.primitive.bind(lhs, rhs, **p)
    rank = len(lhs_spec)
    to_lhs = (lhs_spec[0], *lhs_spec[2:], lhs_spec[1])
    to_rhs = (*rhs_spec[2:], rhs_spec[1], rhs_spec[0])
    to_out = (out_spec[0], *out_spec[2:], out_spec[1])
    p["dimension_numbers"] = _order(rank)
    lhs, rhs = _transpose(lhs, to_lhs), _transpose(rhs, to_rhs)
    shape = tuple(eqn.outvars[0].aval.shape[axis] for axis in to_out)
    out = _of_images(eqn, *_with_rows(lhs, rhs, p, shape)) if rank == 3 else _of_images(eqn, lhs, rhs, p, shape)
    return _transpose(lax.reshape(out, shape), tuple(sorted(range(rank), key=to_out.__getitem__)))


def _order(rank):
    """Where batch, features and positions stand in N...C and ...IO."""
    last = (0, rank - 1, *range(1, rank - 1))
    return lax.ConvDimensionNumbers(last, (rank - 1, rank - 2, *range(rank - 2)), last)


def _with_rows(lhs, rhs, p, shape):
    """A convolution along one axis as one of images with a single row."""
    names = {"window_strides": 1, "lhs_dilation": 1, "rhs_dilation": 1, "padding": (0, 0)}
    p = {**p, **{name: (one, *p[name]) for name, one in names.items()}}
    return lhs[:, None], rhs[None], {**p, "dimension_numbers": _order(4)}, (shape[0], 1, *shape[1:])


def _of_images(eqn, lhs, rhs, p, shape):
    """A convolution whose dimensions stand in the order of N...C and ...IO."""
    rank = lhs.ndim
    if rank > 4 and 0 not in (*shape, *rhs.shape) and lhs.dtype != bool:
        return _by_plane(eqn, lhs, rhs, p, shape)
    plain = all(size == 1 for size in (p["feature_group_count"], *p["window_strides"], *p["rhs_dilation"]))
    if plain and rank == 4 and 0 not in shape and shape[-1] <= _IMAGE and math.prod(rhs.shape[:2]) > 1:
        return _by_tap(eqn, lhs, rhs, p, shape)
    if plain and rank == 4 and 0 not in shape and math.prod(p["lhs_dilation"]) > 1:
        return _by_phase(eqn, lhs, rhs, p, shape)
    return _enough(eqn, lhs, rhs, p, shape)


def _by_plane(eqn, lhs, rhs, p, shape):
    """A convolution along more than two axes as a sum of convolutions along all but the first, one for each tap."""
    names = ("window_strides", "lhs_dilation", "rhs_dilation", "padding")
    (stride, distance, dilation, (low, high)) = (p[name][0] for name in names)
    around = [(0, 0, 0) for _ in shape]
    around[1] = (low, high, distance - 1)
    lhs = lax.pad(lhs, jnp.zeros((), lhs.dtype), around)
    p = {**p, **{name: p[name][1:] for name in names}, "dimension_numbers": _order(len(shape) - 1)}
    batch, planes = shape[:2]

    def of_tap(tap):
        first = tap * dilation
        seen = lax.slice_in_dim(lhs, first, first + (planes - 1) * stride + 1, stride, axis=1)
        seen = lax.reshape(seen, (batch * planes, *seen.shape[2:]))
        return _of_images(eqn, seen, rhs[tap], p, (batch * planes, *shape[2:]))

    return lax.reshape(functools.reduce(lax.add, map(of_tap, range(rhs.shape[0]))), shape)


def _enough(eqn, lhs, rhs, p, shape):
    """A convolution with enough rows (positions of examples) and output channels."""
    lhs, rhs, p = _as_accepted(lhs, rhs, p, shape)
    if _is_pointwise(rhs, p) and 0 not in shape:
        return _pointwise(eqn, lhs, rhs, p, shape)
    batch, (*others, size) = shape[0], shape[1:-1] or (1,)
    rows, tiles = math.prod(others) * size, math.prod(others) * -(-size // _TILE)
    if batch and rows:
        lhs = _pad(lhs, 0, max(batch, -(-_ROWS // rows), -(-_TILES // tiles)))
    if p["feature_group_count"] == 1:
        rhs = _pad(rhs, rhs.ndim - 1, max(shape[-1], _COLUMNS))
    if _is_narrow(lhs, rhs, p, shape):
        return lax.slice(_side_by_side(eqn, lhs, rhs, p), [0] * len(shape), shape)
    if lhs.ndim == 4 and lhs.shape[1] > shape[1] and all(pads == (0, 0) for pads in p["padding"]):
        # Without padding YNNPACK takes up to five times as long: one more row, for an output that is cut off again.
        p["padding"] = ((0, 1), (0, 0))
    return lax.slice(eqn.primitive.bind(lhs, rhs, **p), [0] * len(shape), shape)


def _is_narrow(lhs, rhs, p, shape):
    """Whether a convolution is worth more threads than it gets with its examples one after the other."""
    if lhs.ndim != 4 or lhs.dtype != jnp.float32 or len(lhs) == 1 or 0 in shape:
        return False
    if any(size != 1 for size in (p["feature_group_count"], *p["lhs_dilation"])):
        return False
    stride, (low, high), terms = p["window_strides"][1], p["padding"][1], math.prod(rhs.shape[:-1])
    if min(low, high, _reach(rhs, p) - stride - low) < 0:
        return False
    # Only with enough tiles of rows is the order of sums the same.
    tiles = shape[1] * -(-len(lhs) * _between(lhs, p) // stride // _TILE)
    if tiles < _TILES:
        return False
    operations = 2 * len(lhs) * math.prod(shape[1:-1]) * terms * rhs.shape[-1]
    return operations >= _WORTH_THREADS and _parts(shape[2], rhs.shape[-1], terms) < _threads()


def _side_by_side(eqn, lhs, rhs, p):
    """The examples of a convolution beside each other, as one wide image with zeros between them.

    YNNPACK divides the positions in a row and the output channels among its threads, but neither the rows nor the
    examples, so that convolutions with few channels would have one thread only. The order of sums stays as it is.
    """
    batch, height, width, channels = lhs.shape
    stride, low, between = p["window_strides"][1], p["padding"][1][0], _between(lhs, p)
    lhs = lax.pad(lhs, jnp.zeros((), lhs.dtype), ((0, 0, 0), (0, 0, 0), (0, between - width, 0), (0, 0, 0)))
    wide = lax.reshape(lax.transpose(lhs, (1, 0, 2, 3)), (1, height, batch * between, channels))
    p = {**p, "padding": (p["padding"][0], (low, _reach(rhs, p) - stride - low))}
    out = eqn.primitive.bind(wide, rhs, **p)
    return lax.transpose(lax.reshape(out, (out.shape[1], batch, between // stride, out.shape[3])), (1, 0, 2, 3))


def _between(lhs, p):
    """Columns from one example to the next."""
    stride = p["window_strides"][1]
    return -(-(lhs.shape[2] + max(p["padding"][1])) // stride) * stride


def _reach(rhs, p):
    """How many neighbouring columns a convolution looks at."""
    return (rhs.shape[1] - 1) * p["rhs_dilation"][1] + 1


def _parts(rows, columns, terms):
    """Into how many parts YNNPACK divides a matrix product of so many rows and columns, sums of so many terms."""
    terms, fewest = min(terms, 1024), min(rows, 64) * min(columns, 64)
    some_rows, some_columns = min(rows, 16), min(columns, 64)
    while True:
        area, cost = some_rows * some_columns, (some_rows + some_columns) * terms
        if area >= fewest and (cost >= 1 << 16 or area >= 1 << 16):
            break
        if (4 * some_columns <= some_rows or some_rows >= rows) and some_columns < columns:
            some_columns *= 2
        elif some_rows <= 4 * some_columns and some_rows < rows:
            some_rows *= 2
        else:
            break
    return -(-rows // some_rows) * -(-columns // some_columns)


@functools.cache
def _threads():
    """Of YNNPACK; one where somebody gives the convolutions to other libraries, which do as they please."""
    if any(name in os.environ.get("XLA_FLAGS", "") for name in _OPTIONS):
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _as_accepted(lhs, rhs, p, shape):
    """A convolution as YNNPACK accepts it: no axis of the output or the kernel is longer than that of the input.

    What that library declines goes to Eigen, which divides sums among its threads where there are few examples, so that
    their order depends on both. A kernel with more positions than its input is exchanged with it before, and gets the
    slowest loops (at 2 x 2 pixels, to which networks for large images bring small ones, a fiftieth of the speed). Zeros
    around the input would be taken for padding of the convolution, if nothing stood in between.
    """
    sizes, dtype = lhs.shape[1:-1], lhs.dtype
    if 0 in (*shape, *lhs.shape, *rhs.shape) or not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize == 1:
        return lhs, rhs, p
    kept, around, padding = [], [], []
    names = ("window_strides", "rhs_dilation", "lhs_dilation", "padding")
    axes = zip(sizes, rhs.shape, shape[1:-1], *(p[name] for name in names), strict=False)
    for size, taps, outputs, stride, dilation, distance, (low, high) in axes:
        size = 1 + (size - 1) * distance
        first, last = 0, taps - 1
        if taps > size:  # outer taps may see padding only
            seeing = [
                t for t in range(taps) if any(0 <= t * dilation + i * stride - low < size for i in range(outputs))
            ]
            first, last = (seeing[0], seeing[-1]) if seeing else (0, 0)
        low, high = low - first * dilation, high - (taps - 1 - last) * dilation
        missing = max(outputs, last + 1 - first) - size
        before = max(min(missing, low), 0)
        after = max(min(missing - before, high), 0)
        kept.append(slice(first, last + 1))
        around.append((before, after, distance - 1))
        padding.append((low - before, high - after))
    rhs, p = rhs[tuple(kept)], {**p, "padding": tuple(padding), "lhs_dilation": (1,) * len(sizes)}
    if any(any(each) for each in around):
        lhs = rounded(lax.pad(lhs, jnp.zeros((), dtype), ((0, 0, 0), *around, (0, 0, 0))))
    return lhs, rhs, p


def _is_pointwise(rhs, p):
    """Whether every output position sees one input position."""
    alone = all(size == 1 for size in (*rhs.shape[:-2], p["feature_group_count"], *p["lhs_dilation"]))
    return alone and all(pads == (0, 0) for pads in p["padding"])


def _pointwise(eqn, lhs, rhs, p, shape):
    """A convolution of single positions as a matrix product, several times as fast where channels are few."""
    strides = (1, *p["window_strides"], 1)
    lhs = lax.slice(lhs, [0] * lhs.ndim, lhs.shape, strides)
    rows, (channels, columns) = math.prod(shape[1:-1]), rhs.shape[-2:]
    lhs = _pad(lhs, 0, max(shape[0], -(-_TILES * _TILE // rows)))
    kernel = _pad(lax.reshape(rhs, (channels, columns)), 1, max(columns, _FEWEST))
    contract = (((lhs.ndim - 1,), (0,)), ((), ()))
    dtype = eqn.outvars[0].aval.dtype
    out = lax.dot_general(lhs, kernel, contract, precision=p["precision"], preferred_element_type=dtype)
    return lax.slice(out, [0] * out.ndim, shape)


# The gradient of a convolution with stride s is a convolution of a dilated input: input position i contributes through
# tap t of the kernel to output position s i + low - t. Outputs whose position has the same rest modulo s, a phase, see
# the same taps, t = first, first + s, ..., and no zeros between the dilated positions.


def _phases(stride, taps, low):
    """For each phase the tap `first`, how many there are, and the input position where output 0 meets it."""
    for phase in range(stride):
        first = (low - phase) % stride
        yield first, len(range(first, taps, stride)), (first - low + phase) // stride


def _interleave(parts, shape):
    """Outputs by phase of rows and of columns, [s_h][s_w] arrays [B,h,w,C], as one of `shape`."""
    (sh, sw), (batch, rows, columns, channels) = (len(parts), len(parts[0])), parts[0][0].shape
    whole = jnp.stack([jnp.stack(row, axis=3) for row in parts], axis=2) if sh * sw > 1 else parts[0][0]
    return lax.slice(lax.reshape(whole, (batch, rows * sh, columns * sw, channels)), [0] * 4, shape)


def _by_phase(eqn, lhs, rhs, p, shape):
    """A convolution of a dilated input as one convolution for each phase."""
    (sh, sw), (kh, kw) = p["lhs_dilation"], rhs.shape[:2]
    size = (-(-shape[1] // sh), -(-shape[2] // sw))
    undilated = {**p, "lhs_dilation": (1, 1)}
    empty = jnp.zeros((shape[0], *size, shape[3]), eqn.outvars[0].aval.dtype)

    def phase(of_rows, of_columns):
        sides = list(zip((of_rows, of_columns), lhs.shape[1:3], size, strict=True))
        if 0 in (of_rows[1], of_columns[1]):
            return empty
        # Output 0 to `length` - 1 read input positions `start` to `start + length + taps - 2`.
        pads = [(-start, start + length + taps - 1 - given) for (_, taps, start), given, length in sides]
        x = lax.pad(
            lhs, jnp.zeros((), lhs.dtype), ((0, 0, 0), *((min(a, 0), min(b, 0), 0) for a, b in pads), (0, 0, 0))
        )
        kernel = rhs[of_rows[0] :: sh, of_columns[0] :: sw]
        padding = tuple((max(a, 0), max(b, 0)) for a, b in pads)
        return _enough(eqn, x, kernel, {**undilated, "padding": padding}, empty.shape)

    by_row, by_column = (
        list(_phases(*side)) for side in zip((sh, sw), (kh, kw), (low for low, _ in p["padding"]), strict=True)
    )
    return _interleave([[phase(r, c) for c in by_column] for r in by_row], shape)


def _by_tap(eqn, lhs, rhs, p, shape):
    """A convolution with few output channels as one matrix product with all taps, and a sum of its shifted columns.

    A convolution computes its output channels in groups of 16 or 32, of which an image would fill three.
    """
    (kh, kw, channels, out_channels), (sh, sw) = rhs.shape, p["lhs_dilation"]
    batch, height, width, _ = lhs.shape
    rows, columns = batch * height * width, kh * kw * out_channels
    flat = _pad(lax.reshape(lhs, (rows, channels)), 0, -(-rows // _SIDE) * _SIDE)
    taps = lax.reshape(lax.transpose(rhs, (2, 0, 1, 3)), (channels, columns))
    taps = _pad(taps, 1, -(-columns // _SIDE) * _SIDE)
    product = lax.dot(flat, taps, precision=p["precision"], preferred_element_type=eqn.outvars[0].aval.dtype)
    product = lax.reshape(lax.slice(product, (0, 0), (rows, columns)), (batch, height, width, kh, kw, out_channels))
    size = (-(-shape[1] // sh), -(-shape[2] // sw))
    zero = jnp.zeros((), product.dtype)

    def phase(of_rows, of_columns):
        (first_row, row_taps, top), (first_column, column_taps, left) = of_rows, of_columns
        total = jnp.zeros((batch, *size, out_channels), product.dtype)
        for i, j in itertools.product(range(row_taps), range(column_taps)):
            tap = product[:, :, :, first_row + i * sh, first_column + j * sw]
            above, before = -top - i, -left - j
            pads = ((above, size[0] - height - above, 0), (before, size[1] - width - before, 0))
            total = total + lax.pad(tap, zero, ((0, 0, 0), *pads, (0, 0, 0)))
        return total

    by_row, by_column = (
        list(_phases(*side)) for side in zip((sh, sw), (kh, kw), (low for low, _ in p["padding"]), strict=True)
    )
    return _interleave([[phase(r, c) for c in by_column] for r in by_row], shape)


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


def _quotient(eqn, x, divisor):
    """A quotient that remains one."""
    out = eqn.outvars[0].aval
    if _is_float(out.dtype) and isinstance(eqn.invars[1], jex.Var):
        divisor = lax.optimization_barrier(jnp.broadcast_to(divisor, out.shape))
    return eqn.primitive.bind(x, divisor, **eqn.params)


def _checkpoint(eqn, *args):
    p = eqn.params
    body = jex.ClosedJaxpr(p["jaxpr"], ())
    return jax.checkpoint(_rounding(body), prevent_cse=p["prevent_cse"], policy=p["policy"])(*args)


# The backend hands reductions, with whatever elementwise operations surround them, to one of two libraries by their
# size; the two differ in the order of additions and in the last bit of exp.


def _sum(eqn, x):
    """A sum as a tree of elementwise additions, whose order the compiler cannot choose."""
    if 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.inexact):  # whole numbers are exact in any order
        return eqn.primitive.bind(x, **eqn.params)
    for axis in sorted(eqn.params["axes"], reverse=True):
        while (size := x.shape[axis]) > 1:
            half = 1 << ((size - 1).bit_length() - 1)
            paired = lax.slice_in_dim(x, 0, size - half, axis=axis) + lax.slice_in_dim(x, half, size, axis=axis)
            x = (
                paired
                if size == 2 * half
                else lax.concatenate([paired, lax.slice_in_dim(x, size - half, half, axis=axis)], axis)
            )
        x = lax.squeeze(x, [axis])
    return x


def _extreme(eqn, x):
    """A largest or smallest value, exact in any order: only what surrounds it must not be taken into it.

    A barrier for the optimizer is gone when that is decided; an operation that the other library does not know is not.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize == 1:
        return eqn.primitive.bind(x, **eqn.params)
    return rounded(eqn.primitive.bind(rounded(x), **eqn.params))


def _sum_in_windows(eqn, x):
    """Sums in windows, first along one axis, then along the next, of elementwise additions."""
    p = eqn.params
    if 0 in (*x.shape, *eqn.outvars[0].aval.shape) or not jnp.issubdtype(x.dtype, jnp.inexact):
        return eqn.primitive.bind(x, **p)
    around = [(low, high, distance - 1) for (low, high), distance in zip(p["padding"], p["base_dilation"], strict=True)]
    if any(any(each) for each in around):
        x = lax.pad(x, jnp.zeros((), x.dtype), around)
    axes = zip(p["window_dimensions"], p["window_strides"], p["window_dilation"], strict=True)
    for axis, (taps, stride, dilation) in enumerate(axes):
        last = x.shape[axis] - (taps - 1) * dilation
        seen = (lax.slice_in_dim(x, t * dilation, t * dilation + last, stride, axis) for t in range(taps))
        x = functools.reduce(lax.add, seen)
    return x


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
    "div": _quotient,
    "remat2": _checkpoint,  # the name of jax.checkpoint in a trace
    "reduce_sum": _sum,
    "reduce_max": _extreme,
    "reduce_min": _extreme,
    "reduce_window_sum": _sum_in_windows,
    "reduce_window_max": _extreme,
    "reduce_window_min": _extreme,
}
