"""A network on images that differ from one image in a small rectangle: only what the rectangle reaches is computed.

Convolutions and pools see their neighbourhood, so a change of a few pixels changes a window of each feature map, which
grows from layer to layer until it is the whole map. `evaluator` follows the windows of given rectangles through the
traced function, and computes them alone; what surrounds a window is cut out of the feature maps of the unchanged image.
The arithmetic of an output is the same as in the whole network, and so are the results.

Windows have one size for all rectangles, and a place for each. What is no local operation (a mean over positions, a
transpose, a reshape) gets the whole map, and what follows is computed as usual; so do maps that are nearly all window.
Whatever the function is made of, the result is right; whether windows save anything, `cost` tells beforehand.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

_WHOLE = 0.7  # the part of a map from which on a window is taken for the whole map: cutting has its price, too


# Regions


@dataclasses.dataclass(frozen=True)
class Region:
    """A window of a feature map for every rectangle: [n,2] its first row and column, and its height and width."""

    start: np.ndarray
    size: tuple[int, int]

    def key(self) -> tuple:
        """What tells regions apart."""
        return self.size, self.start.tobytes()


@dataclasses.dataclass(frozen=True)
class Reach:
    """The positions that a rectangle reaches, [n,2] the first and [n,2] the one after the last."""

    low: np.ndarray
    high: np.ndarray

    def region(self, full: tuple[int, int]) -> Region:
        """The window of a map of size `full` that holds them."""
        size = np.minimum(np.maximum(np.max(self.high - self.low, axis=0), 1), full)
        if math.prod(size) >= _WHOLE * math.prod(full):
            return whole(full, len(self.low))
        return Region(np.clip(self.low, 0, np.array(full) - size), (int(size[0]), int(size[1])))

    def union(self, other: Reach) -> Reach:
        """What either reaches."""
        return Reach(np.minimum(self.low, other.low), np.maximum(self.high, other.high))

    def through(self, kernel: Any, stride: Any, low: Any, full: Any) -> Reach:
        """The outputs that see the positions through windows of size `kernel`, `low` rows and columns of padding."""
        k, s, p, last = (np.asarray(x) for x in (kernel, stride, low, full))
        first = -((k - 1 - self.low - p) // s)  # the ceiling of (low + p - k + 1) / s
        after = (self.high - 1 + p) // s + 1
        first = np.clip(first, 0, last)
        return Reach(first, np.clip(after, first, last))


def whole(full: tuple[int, int], count: int) -> Region:
    """The region that is the whole map."""
    return Region(np.zeros((count, 2), np.int64), full)


# Values: what a variable of the traced function is for an image with one rectangle changed


class Window:
    """A feature map that differs from the unchanged image's in a window."""

    def __init__(self, base: Array, region: Region, value: Array, reach: Reach):
        self.base, self.region, self.value, self.reach = base, region, value, reach
        self.full = (base.shape[1], base.shape[2])

    def at(self, region: Region, cell: Array, fill: float | Array = 0.0) -> Array:
        """The values in another region, which may lie partly outside the map, where `fill` stands."""
        if region.key() == self.region.key():
            return self.value
        # A piece of the unchanged map around the region and the window; the window is put in its place.
        before = np.maximum(np.max(region.start - self.region.start, axis=0), 0)
        ends = self.region.start + self.region.size, region.start + region.size
        behind = np.maximum(np.max(ends[0] - ends[1], axis=0), 0)
        start, size = region.start - before, np.array(region.size) + before + behind
        outside = np.maximum(-np.min(start, axis=0), 0), np.maximum(np.max(start + size, axis=0) - self.full, 0)
        everything = self.region.size == self.full
        source = self.value if everything else self.base
        if np.any(outside):
            source = _pad(source, outside[0], outside[1], fill)
        piece = _cut(source, start + outside[0], size, cell)
        if not everything:
            piece = _put(piece, self.value, self.region.start - start, cell)
        return _slice(piece, before, before + region.size)


class Lazy:
    """Elementwise operations on shifted pieces of a map, computed where and when somebody asks."""

    def __init__(self, base: Array, reach: Reach, compute: Callable[[Region, Array], Array]):
        self.base, self.reach, self.compute = base, reach, compute
        self.full = (base.shape[1], base.shape[2])
        self.known: dict[tuple, Array] = {}

    def at(self, region: Region, cell: Array, fill: float | Array = 0.0) -> Array:
        """The values in a region inside the map."""
        if region.key() not in self.known:
            self.known[region.key()] = self.compute(region, cell)
        return self.known[region.key()]

    def settled(self, cell: Array) -> Window:
        """As a window."""
        region = self.reach.region(self.full)
        return Window(self.base, region, self.at(region, cell), self.reach)


@dataclasses.dataclass(frozen=True)
class Plain:
    """A value that is computed as a whole: not a feature map, or of unknown extent."""

    value: Array


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A value that does not depend on the image."""

    value: Any

    def at(self, region: Region, cell: Array, full: tuple[int, int]) -> Array:
        """The values in a region, where it has that extent at all."""
        value = self.value
        for axis, size in ((1, full[0]), (2, full[1])):
            if value.shape[axis] == size and size > 1:
                start = _of(region.start[:, axis - 1], cell)
                value = lax.dynamic_slice_in_dim(value, start, region.size[axis - 1], axis)
        return value


def _of(table: np.ndarray, cell: Array) -> Array:
    """The entry of a rectangle."""
    return jnp.int32(int(table[0])) if np.all(table == table[0]) else jnp.asarray(table, jnp.int32)[cell]


def _cut(x: Array, start: np.ndarray, size: np.ndarray, cell: Array) -> Array:
    place = (0, _of(start[:, 0], cell), _of(start[:, 1], cell), 0)
    return lax.dynamic_slice(x, place, (x.shape[0], int(size[0]), int(size[1]), x.shape[3]))


def _put(x: Array, window: Array, start: np.ndarray, cell: Array) -> Array:
    return lax.dynamic_update_slice(x, window, (0, _of(start[:, 0], cell), _of(start[:, 1], cell), 0))


def _slice(x: Array, start: np.ndarray, stop: np.ndarray) -> Array:
    low, high = (0, int(start[0]), int(start[1]), 0), (x.shape[0], int(stop[0]), int(stop[1]), x.shape[3])
    return x if (high[1] - low[1], high[2] - low[2]) == x.shape[1:3] else lax.slice(x, low, high)


def _pad(x: Array, before: np.ndarray, behind: np.ndarray, fill: Any) -> Array:
    sides = ((int(before[0]), int(behind[0]), 0), (int(before[1]), int(behind[1]), 0))
    return lax.pad(x, jnp.asarray(fill, x.dtype), ((0, 0, 0), *sides, (0, 0, 0)))


# The traced function


@dataclasses.dataclass(frozen=True)
class Cost:
    """Multiplications in convolutions and matrix products, for one image.

    Attributes:
        whole: of the whole function,
        windowed: and of what a rectangle reaches.
    """

    whole: int
    windowed: int

    @property
    def saving(self) -> float:
        """How many times as much arithmetic the whole function takes."""
        return self.whole / max(self.windowed, 1)


def cost(function: Callable, arguments: Any, image: Any, boxes: Int[np.ndarray, "n 4"]) -> Cost:
    """What windows would save, before anything is compiled.

    Args:
        function: `function(arguments, images [1,H,W,C]) -> logits [1,K]`.
        arguments: a pytree of arrays or their shapes.
        image: the shape of an image, [1,H,W,C].
        boxes: first row, first column, the row after the last and the column after the last of every rectangle.
    """
    _, height, width, _ = image.shape
    counts = []
    for some in (np.array([[0, 0, height, width]]), boxes):
        counter = Counter()

        def trace(arguments, image, some=some, counter=counter):
            return _Evaluation(function, arguments, image, some, counter).run(image, jnp.int32(0))

        jax.eval_shape(trace, arguments, image)
        counts.append(counter.products)
    return Cost(*counts)


@dataclasses.dataclass
class Counter:
    """Multiplications counted while a function is traced."""

    products: int = 0


def evaluator(
    function: Callable, arguments: Any, base: Float[Array, "1 h w c"], boxes: Int[np.ndarray, "n 4"]
) -> Callable[[Float[Array, "h w c"], Int[Array, ""]], Float[Array, " k"]]:
    """A function of (image, rectangle) that gives the logits of an image that is `base` but for that rectangle.

    What depends on `base` alone is computed here; call and vmap the result any number of times.

    Args:
        function: `function(arguments, images [1,H,W,C]) -> logits [1,K]`.
        arguments: a pytree of arrays.
        base: the unchanged image.
        boxes: first row, first column, the row after the last and the column after the last of every rectangle.
    """
    evaluation = _Evaluation(function, arguments, base, boxes, Counter())
    return lambda image, cell: evaluation.run(image[None], cell)[0]


class _Evaluation:
    """Values of all variables for the unchanged image, and the rules by which a changed one is computed."""

    def __init__(self, function: Callable, arguments: Any, base: Array, boxes: np.ndarray, counter: Counter):
        self.counter, self.closed = counter, _flat(jax.make_jaxpr(function)(arguments, base))
        self.reach = Reach(boxes[:, :2].astype(np.int64), boxes[:, 2:].astype(np.int64))
        self.base: dict[Any, Any] = {}
        leaves = jax.tree.leaves(arguments)
        jaxpr = self.closed.jaxpr
        self.base.update(zip(jaxpr.constvars, self.closed.consts, strict=True))
        self.base.update(zip(jaxpr.invars, [*leaves, base], strict=True))
        for eqn in jaxpr.eqns:
            inputs = [self._read(self.base, atom) for atom in eqn.invars]
            outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
            self.base.update(zip(eqn.outvars, outputs if eqn.primitive.multiple_results else [outputs], strict=True))

    @staticmethod
    def _read(values, atom):
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    def run(self, image: Array, cell: Array) -> Array:
        """The logits [1,K] of an image [1,H,W,C] with rectangle number `cell` changed."""
        jaxpr, reach = self.closed.jaxpr, self.reach
        full = (image.shape[1], image.shape[2])
        region = reach.region(full)
        values: dict[Any, Any] = {}  # of what depends on the image
        given = jaxpr.invars[-1]
        values[given] = Window(self.base[given], region, _cut(image, region.start, np.array(region.size), cell), reach)
        for eqn in jaxpr.eqns:
            inputs = [
                values.get(atom, Fixed(self.base[atom])) if isinstance(atom, jex.Var) else Fixed(jnp.asarray(atom.val))
                for atom in eqn.invars
            ]
            if all(isinstance(x, Fixed) for x in inputs):
                continue
            rule = _RULES.get(eqn.primitive.name)
            output = None if rule is None else rule(self, eqn, inputs, cell)
            outputs = self._as_a_whole(eqn, inputs, cell) if output is None else [output]
            values.update(zip(eqn.outvars, outputs, strict=True))
        (result,) = jaxpr.outvars
        found = values.get(result)
        return self._read(self.base, result) if found is None else self._whole(found, cell)

    def _whole(self, value, cell):
        if isinstance(value, Fixed | Plain):
            return value.value
        return value.at(whole(value.full, len(value.reach.low)), cell)

    def _as_a_whole(self, eqn, inputs, cell):
        arrays = [self._whole(x, cell) for x in inputs]
        outputs = eqn.primitive.bind(*arrays, **eqn.primitive.get_bind_params(eqn.params))
        outputs = outputs if eqn.primitive.multiple_results else [outputs]
        if eqn.primitive.name == "dot_general":
            ((contracted, _), _) = eqn.params["dimension_numbers"]
            self.counter.products += outputs[0].size * math.prod(arrays[0].shape[axis] for axis in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            self._count(eqn, outputs[0], arrays[1])
        return [Plain(x) for x in outputs]

    def _count(self, eqn, output, kernel):
        features = eqn.params["dimension_numbers"].rhs_spec[0]
        self.counter.products += output.size * kernel.size // kernel.shape[features]

    # Rules; None where the operation is not the kind that they are for

    def _elementwise(self, eqn, inputs, cell):
        output = eqn.outvars[0].aval
        maps = [x for x in inputs if isinstance(x, Window | Lazy)]
        if any(isinstance(x, Plain) for x in inputs) or output.ndim != 4:
            return None
        full = (output.shape[1], output.shape[2])
        if any(x.full != full for x in maps):
            return None
        if any(isinstance(x, Fixed) and x.value.ndim not in (0, 4) for x in inputs):
            return None
        reach = maps[0].reach
        for other in maps[1:]:
            reach = reach.union(other.reach)

        def compute(region, cell):
            def read(x):
                if isinstance(x, Fixed):
                    return x.at(region, cell, full) if x.value.ndim else x.value
                return x.at(region, cell)

            return eqn.primitive.bind(*map(read, inputs), **eqn.primitive.get_bind_params(eqn.params))

        base = self.base[eqn.outvars[0]]
        lazy = Lazy(base, reach, compute)
        return lazy if any(isinstance(x, Lazy) for x in maps) else lazy.settled(cell)

    def _concatenate(self, eqn, inputs, cell):
        return self._elementwise(eqn, inputs, cell) if eqn.params["dimension"] == 3 else None

    def _padding(self, eqn, inputs, cell):
        x, fill = inputs
        sides = eqn.params["padding_config"]
        if isinstance(x, Lazy):
            x = x.settled(cell)
        local = sides[0] == sides[3] == (0, 0, 0) and all(low >= 0 and high >= 0 and not i for low, high, i in sides)
        if not isinstance(x, Window) or not isinstance(fill, Fixed) or not local:
            return None
        low = np.array([sides[1][0], sides[2][0]])
        base = self.base[eqn.outvars[0]]
        reach = Reach(x.reach.low + low, x.reach.high + low)
        if x.region.size == x.full:
            full = (base.shape[1], base.shape[2])
            value = eqn.primitive.bind(x.value, fill.value, **eqn.params)
            return Window(base, whole(full, len(reach.low)), value, reach)
        return Window(base, Region(x.region.start + low, x.region.size), x.value, reach)

    def _piece(self, eqn, inputs, cell):
        (x,) = inputs
        p, shape = eqn.params, eqn.invars[0].aval.shape
        if not isinstance(x, Window | Lazy) or len(shape) != 4:
            return None
        strides = p["strides"] or (1,) * 4
        if any(p["start_indices"][a] or p["limit_indices"][a] != shape[a] or strides[a] != 1 for a in (0, 3)):
            return None
        if isinstance(x, Lazy):
            x = x.settled(cell)
        start, stride = np.array(p["start_indices"][1:3]), np.array(strides[1:3])
        base = self.base[eqn.outvars[0]]

        def compute(region, cell):
            size = (np.array(region.size) - 1) * stride + 1
            piece = x.at(Region(region.start * stride + start, (int(size[0]), int(size[1]))), cell)
            return piece if np.all(stride == 1) else piece[:, :: stride[0], :: stride[1]]

        # Output o reads input start + stride o, as a convolution of one tap does with -start rows of padding.
        reach = x.reach.through((1, 1), stride, -start, base.shape[1:3])
        return Lazy(base, reach, compute)

    def _convolution(self, eqn, inputs, cell):
        x, kernel = inputs
        p = dict(eqn.params)
        spec = p["dimension_numbers"]
        local = spec.lhs_spec == spec.out_spec == (0, 3, 1, 2) and all(d == 1 for d in p["lhs_dilation"])
        if not isinstance(x, Window | Lazy) or not isinstance(kernel, Fixed) or not local or p["batch_group_count"] > 1:
            return None
        if isinstance(x, Lazy):
            x = x.settled(cell)
        base = self.base[eqn.outvars[0]]
        full = (base.shape[1], base.shape[2])
        taps = np.array([kernel.value.shape[axis] for axis in spec.rhs_spec[2:]])
        extent = (taps - 1) * np.array(p["rhs_dilation"]) + 1
        stride, low = np.array(p["window_strides"]), np.array([side[0] for side in p["padding"]])
        reach = x.reach.through(extent, stride, low, full)
        region = reach.region(full)
        if x.region.size == x.full and region.size == full:
            value = eqn.primitive.bind(x.value, kernel.value, **p)
        else:
            size = (np.array(region.size) - 1) * stride + extent
            seen = x.at(Region(region.start * stride - low, (int(size[0]), int(size[1]))), cell)
            value = eqn.primitive.bind(seen, kernel.value, **{**p, "padding": ((0, 0), (0, 0))})
        self._count(eqn, value, kernel.value)
        return Window(base, region, value, reach)


_ELEMENTWISE = (
    *("add", "sub", "mul", "div", "max", "min", "neg", "abs", "sign", "floor", "pow", "integer_pow", "square"),
    *("sqrt", "rsqrt", "exp", "expm1", "log", "log1p", "tanh", "logistic", "erf", "sin", "cos"),
    *("gt", "ge", "lt", "le", "eq", "ne", "and", "or", "not", "is_finite"),
    *("select_n", "clamp", "convert_element_type", "copy", "stop_gradient"),
)
_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_ELEMENTWISE, _Evaluation._elementwise),
    "concatenate": _Evaluation._concatenate,
    "pad": _Evaluation._padding,
    "slice": _Evaluation._piece,
    "conv_general_dilated": _Evaluation._convolution,
}


def _flat(closed: jex.ClosedJaxpr) -> jex.ClosedJaxpr:
    """The function without calls of functions, and with the branch for the backend where there is one for each."""

    def run(closed, args):
        jaxpr = closed.jaxpr
        values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
        values.update(zip(jaxpr.invars, args, strict=True))
        platforms: dict[Any, int] = {}

        def read(atom):
            return atom.val if isinstance(atom, jex.Literal) else values[atom]

        for eqn in jaxpr.eqns:
            name, inputs, body = eqn.primitive.name, [read(atom) for atom in eqn.invars], _body(eqn)
            if name == "platform_index":
                platforms[eqn.outvars[0]] = _branch(eqn.params["platforms"])
                outputs = [jnp.int32(platforms[eqn.outvars[0]])]
            elif name == "cond" and isinstance(eqn.invars[0], jex.Var) and eqn.invars[0] in platforms:
                outputs = run(eqn.params["branches"][platforms[eqn.invars[0]]], inputs[1:])
            elif body is not None:
                outputs = run(body, inputs)
            else:
                outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
                outputs = outputs if eqn.primitive.multiple_results else [outputs]
            values.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    specs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in closed.in_avals]
    return jax.make_jaxpr(lambda *args: run(closed, args)[0])(*specs)


def _body(eqn: Any) -> jex.ClosedJaxpr | None:
    """The function that an equation calls."""
    if eqn.primitive.name in ("jit", "pjit", "closed_call"):
        return eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
    if eqn.primitive.name in ("custom_jvp_call", "custom_vjp_call"):
        return eqn.params["call_jaxpr"]
    return None


def _branch(platforms: Any) -> int:
    """The index of the branch for the default backend; the last one is for all that are not named."""
    backend = jax.default_backend()
    for index, names in enumerate(platforms):
        if names is None or backend in names:
            return index
    return len(platforms) - 1
