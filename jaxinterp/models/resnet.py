"""ResNet: deep residual networks for ImageNet (He et al. 2016, arXiv 1512.03385, table 1), as torchvision has them.

A block adds a residual to its input, y = relu(F(x) + x), with a projection of x where the shape changes. Bottlenecks
are of version 1.5: the stride is in the 3x3 convolution, not in the first 1x1 convolution as in the paper.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinterp.models.layers import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    BatchNorm,
    Conv,
    Linear,
    Sequential,
    max_pool,
    standardize,
)
from jaxinterp.network import Tap


def projection(inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs) -> nnx.Module | None:
    """The shortcut of a block: a 1x1 convolution and batch norm where the shape changes, else None."""
    if stride == 1 and inputs == outputs:
        return None
    return Sequential(
        [Conv(inputs, outputs, 1, stride=stride, padding=0, rngs=rngs), BatchNorm(outputs, rngs=rngs)],
    )


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, *, rngs: nnx.Rngs):
        self.conv1 = Conv(inputs, width, 3, stride=stride, padding=1, rngs=rngs)
        self.bn1 = BatchNorm(width, rngs=rngs)
        self.conv2 = Conv(width, width, 3, padding=1, rngs=rngs)
        self.bn2 = BatchNorm(width, rngs=rngs)
        self.downsample = projection(inputs, width, stride, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return jax.nn.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolution, the last to four times the width."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, *, rngs: nnx.Rngs):
        self.conv1 = Conv(inputs, width, 1, padding=0, rngs=rngs)
        self.bn1 = BatchNorm(width, rngs=rngs)
        self.conv2 = Conv(width, width, 3, stride=stride, padding=1, rngs=rngs)
        self.bn2 = BatchNorm(width, rngs=rngs)
        self.conv3 = Conv(width, 4 * width, 1, padding=0, rngs=rngs)
        self.bn3 = BatchNorm(4 * width, rngs=rngs)
        self.downsample = projection(inputs, 4 * width, stride, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        y = jax.nn.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return jax.nn.relu(y + (x if self.downsample is None else self.downsample(x)))


# depth: block, and how many in each of the four layers
DEPTHS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


class ResNet(nnx.Module):
    """ResNet of `depth` 18, 34, 50, 101 or 152."""

    def __init__(self, depth: int, classes: int, *, rngs: nnx.Rngs):
        block, repeats = DEPTHS[depth]
        self.conv1 = Conv(3, 64, 7, stride=2, padding=3, rngs=rngs)
        self.bn1 = BatchNorm(64, rngs=rngs)
        inputs, layers = 64, []
        for index, count in enumerate(repeats):
            width, blocks = 64 << index, []
            for repeat in range(count):
                blocks.append(block(inputs, width, 2 if index > 0 and repeat == 0 else 1, rngs=rngs))
                inputs = width * block.expansion
            layers.append(nnx.List(blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.fc = Linear(inputs, classes, rngs=rngs)

    def __call__(self, images: jax.Array, tap: Tap) -> jax.Array:
        x = standardize(images, IMAGENET_MEAN, IMAGENET_STD)
        x = tap("relu", jax.nn.relu(self.bn1(self.conv1(x))))
        x = max_pool(x, 3, stride=2, padding=1)
        for index, layer in enumerate((self.layer1, self.layer2, self.layer3, self.layer4), start=1):
            for repeat, block in enumerate(layer):
                x = tap(f"layer{index}.{repeat}", block(x))
        return self.fc(jnp.mean(x, axis=(1, 2)))

    def nodes(self) -> tuple[str, ...]:
        """Names of the feature maps, in order."""
        layers = (self.layer1, self.layer2, self.layer3, self.layer4)
        return ("relu", *(f"layer{n}.{i}" for n, layer in enumerate(layers, start=1) for i in range(len(layer))))
