"""Layers that are fast on every backend, with the tensor names of PyTorch.

Parameters keep PyTorch's names (weight, bias, running_mean, running_var) in JAX's layouts: convolutions HWIO, linear
layers [in, out]. Batch norm is frozen: it uses its running statistics.

XLA's CPU backend lowers a grouped convolution to a scalar loop, several times slower than the arithmetic needs. A
depthwise convolution is therefore written there as a sum of shifted products, and so is its gradient with respect
to the input; other backends keep the grouped convolution. Pools are written the same way, on every backend: their
windows are small, and a maximum or sum of shifted slices beats the reduction over windows.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxinterp.network import Tap, identity

# Mean and standard deviation of ImageNet's channels, as torchvision has them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Pads = tuple[tuple[int, int], tuple[int, int]]
_NHWC = ("NHWC", "HWIO", "NHWC")


def same_padding(size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int]) -> Pads:
    """TensorFlow's SAME padding of an input of `size`, ((top, bottom), (left, right)); the odd pixel goes last."""

    def one(n, k, s):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        return total // 2, total - total // 2

    return one(size[0], kernel[0], stride[0]), one(size[1], kernel[1], stride[1])


def conv(x: jax.Array, kernel: jax.Array, stride: tuple[int, int], padding: Pads) -> jax.Array:
    """Convolution of x [B,H,W,I] with kernel [h,w,I,O]."""
    return lax.conv_general_dilated(x, kernel, stride, padding, dimension_numbers=_NHWC)


def _grouped(x, kernel, stride, padding):
    return lax.conv_general_dilated(
        x, kernel, stride, padding, dimension_numbers=_NHWC, feature_group_count=x.shape[-1]
    )


def _shifted(x, kernel, stride, padding):
    """Depthwise convolution as a sum of shifted products, one for each tap of the kernel."""
    (sh, sw), (kh, kw) = stride, kernel.shape[:2]
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (*padding[0], 0), (*padding[1], 0), (0, 0, 0)))
    oh, ow = (x.shape[1] - kh) // sh + 1, (x.shape[2] - kw) // sw + 1
    products = [
        x[:, i : i + (oh - 1) * sh + 1 : sh, j : j + (ow - 1) * sw + 1 : sw, :] * kernel[i, j, 0]
        for i in range(kh)
        for j in range(kw)
    ]
    return functools.reduce(jnp.add, products)


class _Side(NamedTuple):
    """Along one axis, which windows of an operation reach its inputs, a stride of neighbouring inputs at a time.

    Input q * stride + p stands in window q + o of the padded windows at tap firsts[o] + p, for every o. That is none
    of the taps where it is negative or not below the size of the kernel.
    """

    count: int  # of q
    pad: tuple[int, int, int]  # of the windows, so that every q finds something at every o
    firsts: range
    stride: int

    def taps(self, offset: int, kernel: int) -> np.ndarray:
        """[stride] At `offset`, the tap of each neighbour, -1 for none."""
        taps = self.firsts[offset] + np.arange(self.stride)
        return np.where((taps >= 0) & (taps < kernel), taps, -1)


def _side(size: int, windows: int, kernel: int, stride: int, low: int) -> _Side:
    count, before = -(-size // stride), max(0, (kernel - 1 - low) // stride)
    after = (stride - 1 + low) // stride
    firsts = range(before * stride + low, -after * stride + low - 1, -stride)
    return _Side(count, (before, max(0, count + after - windows), 0), firsts, stride)


def _padded(x, row: _Side, column: _Side):
    """The windows [B,h,w,C] with zeros around them.

    The barrier keeps the windows that need none from being read before the padding: whatever computes `x` would be
    computed a second time for them.
    """
    pads = ((0, 0, 0), row.pad, column.pad, (0, 0, 0))
    return lax.optimization_barrier(lax.pad(x, jnp.zeros((), x.dtype), pads))


def _sum_over_windows(term, row: _Side, column: _Side, size):
    """[B,H,W,C] For each of the inputs, the sum of what it gets from the windows that it is in.

    What that is for the offsets (i, j), term(where, i, j) [B,h,strides,w,strides,C] says, whose windows (padded by the
    sides) lie `where`. All neighbours within a stride have a term for every offset, if only zeros: compilers make one
    loop of such a sum, but one with a branch for every element of sums that are computed apart and interleaved.
    """
    terms = [
        term(np.s_[:, i : i + row.count, None, j : j + column.count, None, :], i, j)
        for i in range(len(row.firsts))
        for j in range(len(column.firsts))
    ]
    whole = functools.reduce(jnp.add, terms)
    whole = whole.reshape(len(whole), row.count * row.stride, column.count * column.stride, -1)
    return whole[:, : size[0], : size[1]]


def _shifted_input_gradient(g, kernel, size, stride, padding):
    """Gradient of `_shifted` by its input of `size`, as shifted products of `g`.

    Where `g` is not finite, the neighbours within a stride are NaN, too.
    """
    shape = kernel.shape[:2]
    sides = zip(size, g.shape[1:3], shape, stride, (low for low, _ in padding), strict=True)
    row, column = (_side(*side) for side in sides)
    g = _padded(g, row, column)
    edges = [(-s.firsts[-1], s.firsts[0] + s.stride - taps, 0) for s, taps in zip((row, column), shape, strict=True)]
    kernel = lax.pad(kernel[:, :, 0], jnp.zeros((), kernel.dtype), (*edges, (0, 0, 0)))

    def term(where, i, j):
        top, left = row.firsts[i] - row.firsts[-1], column.firsts[j] - column.firsts[-1]
        taps = kernel[top : top + row.stride, left : left + column.stride]
        return g[where] * taps[:, None]

    return _sum_over_windows(term, row, column, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: tuple[int, int], padding: Pads) -> jax.Array:
    """Depthwise convolution of x [B,H,W,C] with kernel [h,w,1,C], fast on every backend.

    Reverse-mode differentiable; forward mode (jvp) is not defined for it.
    """
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, k: _shifted(x, k, stride, padding),
        default=lambda x, k: _grouped(x, k, stride, padding),
    )


def _depthwise_forward(x, kernel, stride, padding):
    return depthwise_conv(x, kernel, stride, padding), (x, kernel)


def _depthwise_backward(stride, padding, residuals, g):
    x, kernel = residuals
    by_input = lax.platform_dependent(
        g,
        kernel,
        cpu=lambda g, k: _shifted_input_gradient(g, k, x.shape[1:3], stride, padding),
        default=lambda g, k: jax.linear_transpose(lambda x: _grouped(x, k, stride, padding), x)(g)[0],
    )
    by_kernel = lax.platform_dependent(
        x,
        g,
        cpu=lambda x, g: jax.linear_transpose(lambda k: _shifted(x, k, stride, padding), kernel)(g)[0],
        default=lambda x, g: jax.linear_transpose(lambda k: _grouped(x, k, stride, padding), kernel)(g)[0],
    )
    return by_input, by_kernel


depthwise_conv.defvjp(_depthwise_forward, _depthwise_backward)


def _pool_padding(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> tuple[int, int]:
    """Windows along one axis, as PyTorch counts them, and the padding that the last of them needs behind the input.

    With `ceil_mode` a last window may hang over, unless it would begin in the padding. The second number is negative
    where no window reaches the end of the input.
    """
    beyond = size + 2 * padding - kernel
    windows = (-(-beyond // stride) if ceil_mode else beyond // stride) + 1
    if ceil_mode and (windows - 1) * stride >= size + padding:
        windows -= 1
    return windows, (windows - 1) * stride + kernel - size - padding


def _window_slices(
    x: jax.Array, fill: float, kernel: int, stride: int, padding: int, ceil_mode: bool
) -> list[jax.Array]:
    """For every place in the window, in row-major order, what stands there in each of the windows."""
    (rows, bottom), (columns, right) = (_pool_padding(n, kernel, stride, padding, ceil_mode) for n in x.shape[1:3])
    x = lax.pad(x, jnp.asarray(fill, x.dtype), ((0, 0, 0), (padding, bottom, 0), (padding, right, 0), (0, 0, 0)))
    return [
        x[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride, :]
        for i in range(kernel)
        for j in range(kernel)
    ]


class _Windows(NamedTuple):
    """Of `max_pool`, and the size of its input."""

    size: tuple[int, int]
    kernel: int
    stride: int
    padding: int
    ceil_mode: bool


def _larger(b, a):
    return (b > a) | jnp.isnan(b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool(x, windows):
    slices = _window_slices(x, -jnp.inf, *windows[1:])
    return functools.reduce(lambda a, b: jnp.where(_larger(b, a), b, a), slices)


def _max_pool_forward(x, windows):
    """The maxima, and in which place of its window, in row-major order, each of them stands."""
    slices = _window_slices(x, -jnp.inf, *windows[1:])
    number = jnp.uint8 if windows.kernel**2 <= 255 else jnp.uint32  # whose largest value is no place
    largest, place = slices[0], jnp.zeros(slices[0].shape, number)
    for i, other in enumerate(slices[1:], 1):
        wins = _larger(other, largest)
        largest, place = jnp.where(wins, other, largest), jnp.where(wins, number(i), place)
    return largest, place


def _max_pool_backward(windows, place, g):
    """What the windows send to the places where their maxima stand.

    The derivative of `_window_slices` writes every place of the windows into a dilated array of zeros and adds these
    arrays: several times as slow on the CPU.
    """
    size, kernel, stride, padding, _ = windows
    row, column = (_side(n, out, kernel, stride, padding) for n, out in zip(size, g.shape[1:3], strict=True))
    g, place = _padded(g, row, column), _padded(place, row, column)  # any place: nothing is sent from there
    none = jnp.iinfo(place.dtype).max

    def term(where, i, j):
        rows, columns = np.ix_(row.taps(i, kernel), column.taps(j, kernel))
        own = np.where((rows < 0) | (columns < 0), none, rows * kernel + columns)
        return jnp.where(place[where] == own.astype(place.dtype)[:, None, :, None], g[where], 0)

    return (_sum_over_windows(term, row, column, size),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def max_pool(
    x: jax.Array, kernel: int, *, stride: int | None = None, padding: int = 0, ceil_mode: bool = False
) -> jax.Array:
    """The maximum of each window of x [B,H,W,C], as PyTorch's: padded with -inf, NaN wins.

    The gradient goes to the first maximum of a window in row-major order. That is PyTorch's choice, too; it shows
    where a picture is flat. Reverse-mode differentiable; forward mode (jvp) is not defined for it.
    """
    stride = kernel if stride is None else stride
    return _max_pool(x, _Windows((x.shape[1], x.shape[2]), kernel, stride, padding, ceil_mode))


def avg_pool(
    x: jax.Array,
    kernel: int,
    *,
    stride: int | None = None,
    padding: int = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> jax.Array:
    """The mean of each window of x [B,H,W,C], as PyTorch's.

    The padding counts as zeros where `count_include_pad`, else not at all; what hangs over beyond the padding
    (`ceil_mode`) never counts.
    """
    stride = kernel if stride is None else stride

    def counts(size):
        windows, _ = _pool_padding(size, kernel, stride, padding, ceil_mode)
        start = np.arange(windows) * stride - padding
        low, high = (start, size + padding) if count_include_pad else (np.maximum(start, 0), size)
        return np.minimum(start + kernel, high) - low

    total = functools.reduce(jnp.add, _window_slices(x, 0.0, kernel, stride, padding, ceil_mode))
    return total / jnp.asarray(np.multiply.outer(*map(counts, x.shape[1:3]))[..., None], x.dtype)


def adaptive_avg_pool(x: jax.Array, size: int) -> jax.Array:
    """Means of x [B,H,W,C] over size x size windows that cover it: window i of n pixels is [in/size, (i+1)n/size).

    The bounds are rounded outwards, so windows may overlap, and repeat where the input is smaller than `size`.
    """
    for axis in (1, 2):
        n = x.shape[axis]
        if n != size:
            bounds = [(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
            windows = [lax.slice_in_dim(x, low, high, axis=axis) for low, high in bounds]
            x = jnp.concatenate([jnp.mean(window, axis=axis, keepdims=True) for window in windows], axis=axis)
    return x


def flatten(x: jax.Array) -> jax.Array:
    """[B,H,W,C] -> [B,CHW]: channels first, the order in which PyTorch's linear layers expect them."""
    return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)


def dropout(x: jax.Array) -> jax.Array:
    """Dropout outside training: the identity. It keeps its place in a `Sequential`."""
    return x


def standardize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """(images - mean) / std for each channel."""
    return (images - jnp.asarray(mean, images.dtype)) / jnp.asarray(std, images.dtype)


class Conv(nnx.Module):
    """Convolution; `padding=None` means TensorFlow's SAME, `depthwise` one filter for each channel.

    Kernel and padding are one number, or two: rows, columns.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] | None = None,
        depthwise: bool = False,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        shape = (*_pair(kernel), 1 if depthwise else inputs, outputs)
        self.weight = nnx.Param(jax.nn.initializers.he_normal()(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
        self.stride, self.depthwise = (stride, stride), depthwise
        self.padding = None if padding is None else _pair(padding)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.weight[...]
        if self.padding is None:
            pads = same_padding((x.shape[1], x.shape[2]), (kernel.shape[0], kernel.shape[1]), self.stride)
        else:
            rows, columns = self.padding
            pads = ((rows, rows), (columns, columns))
        x = (depthwise_conv if self.depthwise else conv)(x, kernel, self.stride, pads)
        return x if self.bias is None else x + self.bias[...]


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


class BatchNorm(nnx.Module):
    """Batch norm, frozen: (x - running_mean) / sqrt(running_var + eps) * weight + bias.

    Only where `use_running_average` is switched off, by `registry.Module.in_training`, mean and variance are those of
    the batch, and the running ones follow them as PyTorch's do: r + momentum (b - r), with the unbiased variance.
    """

    def __init__(self, features: int, *, eps: float = 1e-5, rngs: nnx.Rngs):
        self.weight = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.running_mean = nnx.BatchStat(jnp.zeros(features))
        self.running_var = nnx.BatchStat(jnp.ones(features))
        self.eps = eps
        self.use_running_average, self.momentum = True, 0.1

    def __call__(self, x: jax.Array) -> jax.Array:
        mean, variance = self.running_mean[...], self.running_var[...]
        if not self.use_running_average:
            count, axes = x.size // x.shape[-1], tuple(range(x.ndim - 1))
            known, (mean, variance) = (mean, variance), (jnp.mean(x, axes), jnp.var(x, axes))
            unbiased = variance * (count / max(count - 1, 1))
            self.running_mean[...] = known[0] + self.momentum * (mean - known[0])
            self.running_var[...] = known[1] + self.momentum * (unbiased - known[1])
        scale = self.weight[...] * lax.rsqrt(variance + self.eps)
        return x * scale + (self.bias[...] - mean * scale)


class Linear(nnx.Module):
    """x @ weight + bias, with weight [inputs, outputs]."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(jax.nn.initializers.lecun_normal()(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.weight[...] + self.bias[...]


class ConvNormRelu(nnx.Module):
    """Convolution, batch norm with eps 1e-3, ReLU: what Inception networks are made of."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(inputs, outputs, kernel, stride=stride, padding=padding, rngs=rngs)
        self.bn = BatchNorm(outputs, eps=1e-3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(self.bn(self.conv(x)))


class MaxPool(nnx.Module):
    """`max_pool` as a layer."""

    def __init__(self, kernel: int, *, stride: int | None = None, padding: int = 0, ceil_mode: bool = False):
        self.kernel, self.stride, self.padding, self.ceil_mode = kernel, stride, padding, ceil_mode

    def __call__(self, x: jax.Array) -> jax.Array:
        return max_pool(x, self.kernel, stride=self.stride, padding=self.padding, ceil_mode=self.ceil_mode)


@typing.no_type_check  # of a generic class beartype would check flax's methods, too
class Sequential(nnx.List):
    """Layers and functions, one after the other; their names are their places, "0", "1", ..., as in PyTorch."""

    def __call__(self, x: jax.Array, tap: Tap = identity, prefix: str = "", nodes: Collection[str] = ()) -> jax.Array:
        """Applies the layers; the output of the one in place i goes through the tap if `prefix`i is in `nodes`."""
        for index, layer in enumerate(self):
            x = layer(x)
            if (name := f"{prefix}{index}") in nodes:
                x = tap(name, x)
        return x
