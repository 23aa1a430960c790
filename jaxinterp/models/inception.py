"""Inception-v3: factorised Inception modules (Szegedy et al. 2016, arXiv 1512.00567), as torchvision has it.

Modules A, C and E are those of the paper's figures 5, 6 and 7; B and D reduce the grid (figure 10). n x n convolutions
are factorised into 1 x n and n x 1. The auxiliary classifier serves training only and is left out.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinterp.models.layers import ConvNormRelu, Linear, avg_pool, max_pool, standardize
from jaxinterp.network import Tap


def _same(inputs, outputs, kernel, *, rngs):
    """A convolution that keeps the size of the map; kernel is one number or two."""
    rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
    return ConvNormRelu(inputs, outputs, (rows, columns), padding=(rows // 2, columns // 2), rngs=rngs)


def _concatenate(*branches: jax.Array) -> jax.Array:
    return jnp.concatenate(branches, axis=-1)


_mean = functools.partial(avg_pool, kernel=3, stride=1, padding=1)
_reduce = functools.partial(max_pool, kernel=3, stride=2)


class InceptionA(nnx.Module):
    """1x1, 5x5 and two 3x3 convolutions, pool."""

    def __init__(self, inputs: int, pooled: int, *, rngs: nnx.Rngs):
        self.branch1x1 = _same(inputs, 64, 1, rngs=rngs)
        self.branch5x5_1 = _same(inputs, 48, 1, rngs=rngs)
        self.branch5x5_2 = _same(48, 64, 5, rngs=rngs)
        self.branch3x3dbl_1 = _same(inputs, 64, 1, rngs=rngs)
        self.branch3x3dbl_2 = _same(64, 96, 3, rngs=rngs)
        self.branch3x3dbl_3 = _same(96, 96, 3, rngs=rngs)
        self.branch_pool = _same(inputs, pooled, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return _concatenate(
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(_mean(x)),
        )


class InceptionB(nnx.Module):
    """Halves the grid: 3x3 and two 3x3 convolutions, pool."""

    def __init__(self, inputs: int, *, rngs: nnx.Rngs):
        self.branch3x3 = ConvNormRelu(inputs, 384, 3, stride=2, rngs=rngs)
        self.branch3x3dbl_1 = _same(inputs, 64, 1, rngs=rngs)
        self.branch3x3dbl_2 = _same(64, 96, 3, rngs=rngs)
        self.branch3x3dbl_3 = ConvNormRelu(96, 96, 3, stride=2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return _concatenate(
            self.branch3x3(x),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            _reduce(x),
        )


class InceptionC(nnx.Module):
    """1x1, 7x7 and two 7x7 convolutions, factorised, pool; `width` channels inside."""

    def __init__(self, inputs: int, width: int, *, rngs: nnx.Rngs):
        self.branch1x1 = _same(inputs, 192, 1, rngs=rngs)
        self.branch7x7_1 = _same(inputs, width, 1, rngs=rngs)
        self.branch7x7_2 = _same(width, width, (1, 7), rngs=rngs)
        self.branch7x7_3 = _same(width, 192, (7, 1), rngs=rngs)
        self.branch7x7dbl_1 = _same(inputs, width, 1, rngs=rngs)
        self.branch7x7dbl_2 = _same(width, width, (7, 1), rngs=rngs)
        self.branch7x7dbl_3 = _same(width, width, (1, 7), rngs=rngs)
        self.branch7x7dbl_4 = _same(width, width, (7, 1), rngs=rngs)
        self.branch7x7dbl_5 = _same(width, 192, (1, 7), rngs=rngs)
        self.branch_pool = _same(inputs, 192, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return _concatenate(
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(_mean(x)),
        )


class InceptionD(nnx.Module):
    """Halves the grid: 3x3 convolution, factorised 7x7 and 3x3 convolution, pool."""

    def __init__(self, inputs: int, *, rngs: nnx.Rngs):
        self.branch3x3_1 = _same(inputs, 192, 1, rngs=rngs)
        self.branch3x3_2 = ConvNormRelu(192, 320, 3, stride=2, rngs=rngs)
        self.branch7x7x3_1 = _same(inputs, 192, 1, rngs=rngs)
        self.branch7x7x3_2 = _same(192, 192, (1, 7), rngs=rngs)
        self.branch7x7x3_3 = _same(192, 192, (7, 1), rngs=rngs)
        self.branch7x7x3_4 = ConvNormRelu(192, 192, 3, stride=2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return _concatenate(self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(seven), _reduce(x))


class InceptionE(nnx.Module):
    """1x1, 3x3 and two 3x3 convolutions, the last of each as 1x3 beside 3x1, pool."""

    def __init__(self, inputs: int, *, rngs: nnx.Rngs):
        self.branch1x1 = _same(inputs, 320, 1, rngs=rngs)
        self.branch3x3_1 = _same(inputs, 384, 1, rngs=rngs)
        self.branch3x3_2a = _same(384, 384, (1, 3), rngs=rngs)
        self.branch3x3_2b = _same(384, 384, (3, 1), rngs=rngs)
        self.branch3x3dbl_1 = _same(inputs, 448, 1, rngs=rngs)
        self.branch3x3dbl_2 = _same(448, 384, 3, rngs=rngs)
        self.branch3x3dbl_3a = _same(384, 384, (1, 3), rngs=rngs)
        self.branch3x3dbl_3b = _same(384, 384, (3, 1), rngs=rngs)
        self.branch_pool = _same(inputs, 192, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return _concatenate(
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(_mean(x)),
        )


class InceptionV3(nnx.Module):
    """Inception-v3."""

    def __init__(self, classes: int, *, rngs: nnx.Rngs):
        self.Conv2d_1a_3x3 = ConvNormRelu(3, 32, 3, stride=2, rngs=rngs)
        self.Conv2d_2a_3x3 = ConvNormRelu(32, 32, 3, rngs=rngs)
        self.Conv2d_2b_3x3 = _same(32, 64, 3, rngs=rngs)
        self.Conv2d_3b_1x1 = _same(64, 80, 1, rngs=rngs)
        self.Conv2d_4a_3x3 = ConvNormRelu(80, 192, 3, rngs=rngs)
        self.Mixed_5b = InceptionA(192, 32, rngs=rngs)
        self.Mixed_5c = InceptionA(256, 64, rngs=rngs)
        self.Mixed_5d = InceptionA(288, 64, rngs=rngs)
        self.Mixed_6a = InceptionB(288, rngs=rngs)
        self.Mixed_6b = InceptionC(768, 128, rngs=rngs)
        self.Mixed_6c = InceptionC(768, 160, rngs=rngs)
        self.Mixed_6d = InceptionC(768, 160, rngs=rngs)
        self.Mixed_6e = InceptionC(768, 192, rngs=rngs)
        self.Mixed_7a = InceptionD(768, rngs=rngs)
        self.Mixed_7b = InceptionE(1280, rngs=rngs)
        self.Mixed_7c = InceptionE(2048, rngs=rngs)
        self.fc = Linear(2048, classes, rngs=rngs)

    def __call__(self, images: jax.Array, tap: Tap) -> jax.Array:
        # What is left of the standard preprocessing when torchvision's transform_input has undone it.
        x = standardize(images, (0.5,), (0.5,))
        for name in self.nodes():
            x = tap(name, getattr(self, name)(x))
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = _reduce(x)
        return self.fc(jnp.mean(x, axis=(1, 2)))

    def nodes(self) -> tuple[str, ...]:
        """Names of the feature maps, in order."""
        stem = ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")
        mixed = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
        return (*(f"Conv2d_{name}" for name in stem), *(f"Mixed_{name}" for name in mixed))
