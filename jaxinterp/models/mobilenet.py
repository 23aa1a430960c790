"""MobileNetV2: inverted residuals with linear bottlenecks (Sandler et al. 2018, arXiv 1801.04381, table 2).

As torchvision has it, at width 1. A block expands, filters each channel and projects without an activation, so what
it returns is not rectified; only the first and the last feature map are.
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
    dropout,
    standardize,
)
from jaxinterp.network import Tap

# expansion, channels, blocks, stride of the first: t, c, n, s of the paper
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _unit(inputs, outputs, kernel, *, stride=1, depthwise=False, rngs):
    """Convolution, batch norm, ReLU6."""
    padding = (kernel - 1) // 2
    conv = Conv(inputs, outputs, kernel, stride=stride, padding=padding, depthwise=depthwise, rngs=rngs)
    return Sequential([conv, BatchNorm(outputs, rngs=rngs), jax.nn.relu6])


class InvertedResidual(nnx.Module):
    """Expand 1x1, depthwise 3x3, project 1x1; added to the input where the shape stays."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, expand: int, rngs: nnx.Rngs):
        hidden = inputs * expand
        self.conv = Sequential(
            [
                *([_unit(inputs, hidden, 1, rngs=rngs)] if expand != 1 else []),
                _unit(hidden, hidden, 3, stride=stride, depthwise=True, rngs=rngs),
                Conv(hidden, outputs, 1, padding=0, rngs=rngs),
                BatchNorm(outputs, rngs=rngs),
            ]
        )
        self.skips = stride == 1 and inputs == outputs

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv(x)
        return x + y if self.skips else y


class MobileNetV2(nnx.Module):
    """MobileNetV2."""

    def __init__(self, classes: int, *, rngs: nnx.Rngs):
        layers: list[nnx.Module] = [_unit(3, 32, 3, stride=2, rngs=rngs)]
        inputs = 32
        for expand, outputs, repeats, stride in STAGES:
            for repeat in range(repeats):
                first = stride if repeat == 0 else 1
                layers.append(InvertedResidual(inputs, outputs, stride=first, expand=expand, rngs=rngs))
                inputs = outputs
        layers.append(_unit(inputs, 1280, 1, rngs=rngs))
        self.features = Sequential(layers)
        self.classifier = Sequential([dropout, Linear(1280, classes, rngs=rngs)])

    def __call__(self, images: jax.Array, tap: Tap) -> jax.Array:
        x = standardize(images, IMAGENET_MEAN, IMAGENET_STD)
        x = self.features(x, tap, "features.", self.nodes())
        return self.classifier(jnp.mean(x, axis=(1, 2)))

    def nodes(self) -> tuple[str, ...]:
        """Names of the feature maps, in order: the stem, the blocks, the head."""
        return tuple(f"features.{index}" for index in range(len(self.features)))
