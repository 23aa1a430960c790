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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

_WHOLE = 0.7  # the part of a map from which on a window is taken for the whole map: cutting has its price, too


# Regions


# Rows and columns are followed apart: each axis has as many places as rectangles have different extents along it.

Place = tuple[Array, Array]
"""Which of the places along each axis is meant."""


@dataclasses.dataclass(frozen=True)
class Region:
    """A window of a feature map: for both axes where it starts, at each place, and its size."""

    start: tuple[np.ndarray, np.ndarray]
    size: tuple[int, int]

    def key(self) -> tuple:
        """What tells regions apart."""
        return self.size, *(start.tobytes() for start in self.start)

    def moved(self, by: Sequence[Any]) -> Region:
        """Further on by so many rows and columns."""
        return Region((self.start[0] + by[0], self.start[1] + by[1]), self.size)

    def seen(self, stride: Sequence[int], kernel: Sequence[int], low: Sequence[int]) -> Region:
        """The inputs that outputs in this region see, with `low` rows and columns of padding."""
        start = (self.start[0] * stride[0] - low[0], self.start[1] * stride[1] - low[1])
        size = ((n - 1) * s + k for n, s, k in zip(self.size, stride, kernel, strict=True))
        return Region(start, tuple(size))  # type: ignore[arg-type]  # two of them


@dataclasses.dataclass(frozen=True)
class Reach:
    """The positions that rectangles reach: for both axes the first, and the one after the last, at each place."""

    low: tuple[np.ndarray, np.ndarray]
    high: tuple[np.ndarray, np.ndarray]

    def region(self, full: tuple[int, int]) -> Region:
        """The window of a map of size `full` that holds them."""
        pairs = list(zip(self.low, self.high, full, strict=True))
        size = [min(max(int(np.max(high - low)), 1), n) for low, high, n in pairs]
        if math.prod(size) >= _WHOLE * math.prod(full):
            return self.whole(full)
        start = [np.clip(low, 0, n - k) for (low, _, n), k in zip(pairs, size, strict=True)]
        return Region((start[0], start[1]), (size[0], size[1]))

    def whole(self, full: tuple[int, int]) -> Region:
        """The region that is the whole map."""
        return Region((np.zeros_like(self.low[0]), np.zeros_like(self.low[1])), full)

    def union(self, other: Reach) -> Reach:
        """What either reaches."""
        low = np.minimum(self.low[0], other.low[0]), np.minimum(self.low[1], other.low[1])
        return Reach(low, (np.maximum(self.high[0], other.high[0]), np.maximum(self.high[1], other.high[1])))

    def moved(self, by: Sequence[Any]) -> Reach:
        """Further on by so many rows and columns."""
        return Reach((self.low[0] + by[0], self.low[1] + by[1]), (self.high[0] + by[0], self.high[1] + by[1]))

    def through(self, stride: Sequence[int], kernel: Sequence[int], low: Sequence[int], full: Sequence[int]) -> Reach:
        """The outputs that see the positions through windows of size `kernel`, `low` rows and columns of padding."""

        def along(axis):
            k, s, p, last = kernel[axis], stride[axis], low[axis], full[axis]
            first = np.clip(-((k - 1 - self.low[axis] - p) // s), 0, last)  # the ceiling of (low + p - k + 1) / s
            return first, np.clip((self.high[axis] - 1 + p) // s + 1, first, last)

        (top, bottom), (left, right) = along(0), along(1)
        return Reach((top, left), (bottom, right))


def _places(boxes: np.ndarray) -> tuple[Reach, list[np.ndarray]]:
    """The extents along each axis, and for every rectangle which of them is its own."""
    rows, of_rows = np.unique(boxes[:, [0, 2]].astype(np.int64), axis=0, return_inverse=True)
    columns, of_columns = np.unique(boxes[:, [1, 3]].astype(np.int64), axis=0, return_inverse=True)
    reach = Reach((rows[:, 0], columns[:, 0]), (rows[:, 1], columns[:, 1]))
    return reach, [of_rows.reshape(-1), of_columns.reshape(-1)]


# Values: what a variable of the traced function is for an image with one rectangle changed


class Window:
    """A feature map that differs from the unchanged image's in a window."""

    def __init__(self, base: Array, region: Region, value: Array, reach: Reach):
        self.base, self.region, self.value, self.reach = base, region, value, reach
        self.full = (base.shape[1], base.shape[2])

    def at(self, region: Region, place: Place) -> Array:
        """The values in another region, which may lie partly outside the map, where zeros stand."""
        if region.key() == self.region.key():
            return self.value
        # A piece of the unchanged map around the region and the window; the window is put in its place.
        before, size, outside = [], [], []
        for axis in (0, 1):
            mine, wanted = self.region.start[axis], region.start[axis]
            ahead = max(0, int(np.max(wanted - mine)))
            behind = max(0, int(np.max(mine + self.region.size[axis] - wanted - region.size[axis])))
            start, extent = wanted - ahead, region.size[axis] + ahead + behind
            before.append(ahead)
            size.append(extent)
            outside.append((max(0, -int(np.min(start))), max(0, int(np.max(start)) + extent - self.full[axis])))
        everything = self.region.size == self.full
        source = _pad(self.value if everything else self.base, outside)
        around = Region(region.start, (size[0], size[1])).moved([-x for x in before])
        piece = _cut(source, around.moved([low for low, _ in outside]), place)
        if not everything:
            inside = self.region.moved((-around.start[0], -around.start[1]))
            piece = _put(piece, self.value, inside, place)
        return _slice(piece, before, region.size)


class Lazy:
    """Elementwise operations on shifted pieces of a map, computed where and when somebody asks."""

    def __init__(self, base: Array, reach: Reach, compute: Callable[[Region, Place], Array]):
        self.base, self.reach, self.compute = base, reach, compute
        self.full = (base.shape[1], base.shape[2])
        self.known: dict[tuple, Array] = {}

    def at(self, region: Region, place: Place) -> Array:
        """The values in a region inside the map."""
        if region.key() not in self.known:
            self.known[region.key()] = self.compute(region, place)
        return self.known[region.key()]

    def settled(self, place: Place) -> Window:
        """As a window."""
        region = self.reach.region(self.full)
        return Window(self.base, region, self.at(region, place), self.reach)


@dataclasses.dataclass(frozen=True)
class Plain:
    """A value that is computed as a whole: not a feature map, or of unknown extent."""

    value: Array


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A value that does not depend on the image."""

    value: Any

    def at(self, region: Region, place: Place, full: tuple[int, int]) -> Array:
        """The values in a region, where it has that extent at all."""
        value = self.value
        for axis in (0, 1):
            if value.shape[1 + axis] == full[axis] > 1:
                value = lax.dynamic_slice_in_dim(value, _of(region, axis, place), region.size[axis], 1 + axis)
        return value


def _of(region: Region, axis: int, place: Place) -> Array:
    """Where the region starts along an axis, at a place."""
    starts = region.start[axis]
    return jnp.int32(int(starts[0])) if np.all(starts == starts[0]) else jnp.asarray(starts, jnp.int32)[place[axis]]


def _cut(x: Array, region: Region, place: Place) -> Array:
    start = (0, _of(region, 0, place), _of(region, 1, place), 0)
    return lax.dynamic_slice(x, start, (x.shape[0], *region.size, x.shape[3]))


def _put(x: Array, window: Array, region: Region, place: Place) -> Array:
    return lax.dynamic_update_slice(x, window, (0, _of(region, 0, place), _of(region, 1, place), 0))


def _slice(x: Array, start: Sequence[int], size: tuple[int, int]) -> Array:
    if x.shape[1:3] == size:
        return x
    high = (x.shape[0], start[0] + size[0], start[1] + size[1], x.shape[3])
    return lax.slice(x, (0, start[0], start[1], 0), high)


def _pad(x: Array, sides: Sequence[tuple[int, int]]) -> Array:
    if not any(map(any, sides)):
        return x
    (top, bottom), (left, right) = sides
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (top, bottom, 0), (left, right, 0), (0, 0, 0)))


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
            first = jnp.int32(0), jnp.int32(0)
            return _Evaluation(function, arguments, image, _places(some)[0], counter).run(image, first)

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
    reach, numbers = _places(boxes)
    evaluation = _Evaluation(function, arguments, base, reach, Counter())
    of_rows, of_columns = (jnp.asarray(each, jnp.int32) for each in numbers)
    return lambda image, cell: evaluation.run(image[None], (of_rows[cell], of_columns[cell]))[0]


class _Evaluation:
    """Values of all variables for the unchanged image, and the rules by which a changed one is computed."""

    def __init__(self, function: Callable, arguments: Any, base: Array, reach: Reach, counter: Counter):
        self.counter, self.reach = counter, reach
        self.closed = _flat(jax.make_jaxpr(function)(arguments, base))
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

    def run(self, image: Array, place: Place) -> Array:
        """The logits [1,K] of an image [1,H,W,C] with the rectangle at a place changed."""
        jaxpr, reach = self.closed.jaxpr, self.reach
        full = (image.shape[1], image.shape[2])
        region = reach.region(full)
        values: dict[Any, Any] = {}  # of what depends on the image
        given = jaxpr.invars[-1]
        values[given] = Window(self.base[given], region, _cut(image, region, place), reach)
        for eqn in jaxpr.eqns:
            inputs = [
                values.get(atom, Fixed(self.base[atom])) if isinstance(atom, jex.Var) else Fixed(jnp.asarray(atom.val))
                for atom in eqn.invars
            ]
            if all(isinstance(x, Fixed) for x in inputs):
                continue
            rule = _RULES.get(eqn.primitive.name)
            output = None if rule is None else rule(self, eqn, inputs, place)
            outputs = self._as_a_whole(eqn, inputs, place) if output is None else [output]
            values.update(zip(eqn.outvars, outputs, strict=True))
        (result,) = jaxpr.outvars
        found = values.get(result)
        return self._read(self.base, result) if found is None else self._whole(found, place)

    def _whole(self, value, place):
        if isinstance(value, Fixed | Plain):
            return value.value
        return value.at(value.reach.whole(value.full), place)

    def _as_a_whole(self, eqn, inputs, place):
        arrays = [self._whole(x, place) for x in inputs]
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

    def _elementwise(self, eqn, inputs, place):
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

        def compute(region, place):
            def read(x):
                if isinstance(x, Fixed):
                    return x.at(region, place, full) if x.value.ndim else x.value
                return x.at(region, place)

            return eqn.primitive.bind(*map(read, inputs), **eqn.primitive.get_bind_params(eqn.params))

        base = self.base[eqn.outvars[0]]
        lazy = Lazy(base, reach, compute)
        return lazy if any(isinstance(x, Lazy) for x in maps) else lazy.settled(place)

    def _concatenate(self, eqn, inputs, place):
        return self._elementwise(eqn, inputs, place) if eqn.params["dimension"] == 3 else None

    def _padding(self, eqn, inputs, place):
        x, fill = inputs
        sides = eqn.params["padding_config"]
        if isinstance(x, Lazy):
            x = x.settled(place)
        local = sides[0] == sides[3] == (0, 0, 0) and all(low >= 0 and high >= 0 and not i for low, high, i in sides)
        if not isinstance(x, Window) or not isinstance(fill, Fixed) or not local:
            return None
        low = (sides[1][0], sides[2][0])
        base = self.base[eqn.outvars[0]]
        reach = x.reach.moved(low)
        if x.region.size == x.full:
            value = eqn.primitive.bind(x.value, fill.value, **eqn.params)
            return Window(base, reach.whole((base.shape[1], base.shape[2])), value, reach)
        return Window(base, x.region.moved(low), x.value, reach)

    def _piece(self, eqn, inputs, place):
        (x,) = inputs
        p, shape = eqn.params, eqn.invars[0].aval.shape
        if not isinstance(x, Window | Lazy) or len(shape) != 4:
            return None
        strides = p["strides"] or (1,) * 4
        if any(p["start_indices"][a] or p["limit_indices"][a] != shape[a] or strides[a] != 1 for a in (0, 3)):
            return None
        if isinstance(x, Lazy):
            x = x.settled(place)
        # Output o reads input start + stride o, as a convolution of one tap does with -start rows of padding.
        low, stride = [-first for first in p["start_indices"][1:3]], strides[1:3]
        base = self.base[eqn.outvars[0]]

        def compute(region, place):
            piece = x.at(region.seen(stride, (1, 1), low), place)
            return piece if tuple(stride) == (1, 1) else piece[:, :: stride[0], :: stride[1]]

        reach = x.reach.through(stride, (1, 1), low, base.shape[1:3])
        return Lazy(base, reach, compute)

    def _convolution(self, eqn, inputs, place):
        x, kernel = inputs
        p = dict(eqn.params)
        spec = p["dimension_numbers"]
        local = spec.lhs_spec == spec.out_spec == (0, 3, 1, 2) and all(d == 1 for d in p["lhs_dilation"])
        if not isinstance(x, Window | Lazy) or not isinstance(kernel, Fixed) or not local or p["batch_group_count"] > 1:
            return None
        if isinstance(x, Lazy):
            x = x.settled(place)
        base = self.base[eqn.outvars[0]]
        full = (base.shape[1], base.shape[2])
        taps = [kernel.value.shape[axis] for axis in spec.rhs_spec[2:]]
        extent = [(k - 1) * d + 1 for k, d in zip(taps, p["rhs_dilation"], strict=True)]
        stride, low = p["window_strides"], [side[0] for side in p["padding"]]
        reach = x.reach.through(stride, extent, low, full)
        region = reach.region(full)
        if x.region.size == x.full and region.size == full:
            value = eqn.primitive.bind(x.value, kernel.value, **p)
        else:
            seen = x.at(region.seen(stride, extent, low), place)
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
