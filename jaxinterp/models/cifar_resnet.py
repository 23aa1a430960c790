"""Residual networks for 32x32 images (He et al. 2016, arXiv 1512.03385).

`CifarResNet` is that of section 4.2: three layers of n blocks with 16, 32 and 64 channels, 6n + 2 deep, and shortcuts
without parameters (option A: every other pixel, channels padded with zeros). Names and preprocessing, which is
ImageNet's, are those of akamaster/pytorch_resnet_cifar10.

`CifarResNet18` is the ImageNet network of table 1 with a 3x3 stem, without the pool behind it, as in
kuangliu/pytorch-cifar, with that repository's names and preprocessing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinterp.models.layers import IMAGENET_MEAN, IMAGENET_STD, BatchNorm, Conv, Linear, Sequential, standardize
from jaxinterp.models.resnet import projection
from jaxinterp.network import Tap

_CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
_CIFAR_STD = (0.2023, 0.1994, 0.2010)


class Block(nnx.Module):
    """Two 3x3 convolutions; the shortcut is a projection (option B) or has no parameters (option A)."""

    def __init__(self, inputs: int, width: int, stride: int, *, projects: bool, rngs: nnx.Rngs):
        self.conv1 = Conv(inputs, width, 3, stride=stride, padding=1, rngs=rngs)
        self.bn1 = BatchNorm(width, rngs=rngs)
        self.conv2 = Conv(width, width, 3, padding=1, rngs=rngs)
        self.bn2 = BatchNorm(width, rngs=rngs)
        shortcut = projection(inputs, width, stride, rngs=rngs) if projects else None
        self.shortcut = Sequential() if shortcut is None else shortcut
        self.stride, self.added = stride, 0 if projects else width - inputs

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.added:
            half = self.added // 2
            x = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (half, half)))
        return jax.nn.relu(y + self.shortcut(x))


class _Residual(nnx.Module):
    """A 3x3 convolution, layers of blocks, global average pool and a linear layer."""

    def __init__(self, widths, blocks, classes, *, mean, std, projects, rngs):
        self.conv1 = Conv(3, widths[0], 3, padding=1, rngs=rngs)
        self.bn1 = BatchNorm(widths[0], rngs=rngs)
        inputs = widths[0]
        for index, width in enumerate(widths):
            layer = nnx.List([])
            for repeat in range(blocks):
                stride = 2 if index > 0 and repeat == 0 else 1
                layer.append(Block(inputs, width, stride, projects=projects, rngs=rngs))
                inputs = width
            setattr(self, f"layer{index + 1}", layer)
        self.linear = Linear(inputs, classes, rngs=rngs)
        self.mean, self.std, self.layers, self.blocks = mean, std, len(widths), blocks

    def __call__(self, images: jax.Array, tap: Tap) -> jax.Array:
        x = standardize(images, self.mean, self.std)
        x = tap("relu", jax.nn.relu(self.bn1(self.conv1(x))))
        for index in range(1, self.layers + 1):
            for repeat, block in enumerate(getattr(self, f"layer{index}")):
                x = tap(f"layer{index}.{repeat}", block(x))
        return self.linear(jnp.mean(x, axis=(1, 2)))

    def nodes(self) -> tuple[str, ...]:
        """Names of the feature maps, in order."""
        return ("relu", *(f"layer{n}.{i}" for n in range(1, self.layers + 1) for i in range(self.blocks)))


class CifarResNet(_Residual):
    """ResNet of `depth` 6n + 2, such as 20 or 56."""

    def __init__(self, depth: int, classes: int, *, rngs: nnx.Rngs):
        blocks = (depth - 2) // 6
        super().__init__((16, 32, 64), blocks, classes, mean=IMAGENET_MEAN, std=IMAGENET_STD, projects=False, rngs=rngs)


class CifarResNet18(_Residual):
    """ResNet-18 with a 3x3 stem."""

    def __init__(self, classes: int, *, rngs: nnx.Rngs):
        super().__init__((64, 128, 256, 512), 2, classes, mean=_CIFAR_MEAN, std=_CIFAR_STD, projects=True, rngs=rngs)
