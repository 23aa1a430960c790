"""Layers that are fast on every backend, with the tensor names of PyTorch.

Parameters keep PyTorch's names (weight, bias, running_mean, running_var) in JAX's layouts: convolutions HWIO, linear
layers [in, out]. Batch norm is frozen: it uses its running statistics.

XLA's CPU backend lowers a grouped convolution to a scalar loop, several times slower than the arithmetic needs. A
depthwise convolution is therefore written there as a sum of shifted products, and so is its gradient with respect
to the input; other backends keep the grouped convolution.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

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


def _shifted_input_gradient(g, kernel, size, stride, padding):
    """Gradient of `_shifted` with respect to its input of `size`: `g` dilated, times the flipped kernel."""
    kh, kw = kernel.shape[:2]
    pads = []
    for n, out, k, s, (low, _) in zip(size, g.shape[1:3], (kh, kw), stride, padding, strict=True):
        before = k - 1 - low
        pads.append((before, n + k - 1 - before - ((out - 1) * s + 1), s - 1))
    g = lax.pad(g, jnp.zeros((), g.dtype), ((0, 0, 0), *pads, (0, 0, 0)))
    return _shifted(g, kernel[::-1, ::-1], (1, 1), ((0, 0), (0, 0)))


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


class Conv(nnx.Module):
    """Convolution; `padding=None` means TensorFlow's SAME, `depthwise` one filter for each channel."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int | None = None,
        depthwise: bool = False,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        shape = (kernel, kernel, 1 if depthwise else inputs, outputs)
        self.weight = nnx.Param(jax.nn.initializers.he_normal()(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
        self.stride, self.padding, self.depthwise = (stride, stride), padding, depthwise

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.weight[...]
        if self.padding is None:
            pads = same_padding((x.shape[1], x.shape[2]), (kernel.shape[0], kernel.shape[1]), self.stride)
        else:
            pads = ((self.padding, self.padding), (self.padding, self.padding))
        x = (depthwise_conv if self.depthwise else conv)(x, kernel, self.stride, pads)
        return x if self.bias is None else x + self.bias[...]


class BatchNorm(nnx.Module):
    """Frozen batch norm: (x - running_mean) / sqrt(running_var + eps) * weight + bias."""

    def __init__(self, features: int, *, eps: float = 1e-5, rngs: nnx.Rngs):
        self.weight = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.running_mean = nnx.BatchStat(jnp.zeros(features))
        self.running_var = nnx.BatchStat(jnp.ones(features))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.weight[...] * lax.rsqrt(self.running_var[...] + self.eps)
        return x * scale + (self.bias[...] - self.running_mean[...] * scale)


class Linear(nnx.Module):
    """x @ weight + bias, with weight [inputs, outputs]."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(jax.nn.initializers.lecun_normal()(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.weight[...] + self.bias[...]
