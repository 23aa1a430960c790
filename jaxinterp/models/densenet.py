"""DenseNet: every layer sees all before it (Huang et al. 2017, arXiv 1608.06993), as torchvision has it.

This is DenseNet-BC: bottlenecks of 4k channels in front of each 3x3 convolution of k (the growth rate), and
transitions that halve the channels. Activations stand in front of the convolutions, so what a dense block returns
is not rectified; only the stem and the last feature map are.
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
    avg_pool,
    max_pool,
    standardize,
)
from jaxinterp.network import Tap

# depth: growth rate, channels of the stem, layers of each dense block
DEPTHS = {121: (32, 64, (6, 12, 24, 16))}


class DenseLayer(nnx.Module):
    """BN-ReLU-conv 1x1, BN-ReLU-conv 3x3; returns the `growth` new channels."""

    def __init__(self, inputs: int, growth: int, *, rngs: nnx.Rngs):
        self.norm1 = BatchNorm(inputs, rngs=rngs)
        self.conv1 = Conv(inputs, 4 * growth, 1, padding=0, rngs=rngs)
        self.norm2 = BatchNorm(4 * growth, rngs=rngs)
        self.conv2 = Conv(4 * growth, growth, 3, padding=1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv1(jax.nn.relu(self.norm1(x)))
        return self.conv2(jax.nn.relu(self.norm2(x)))


class DenseBlock(nnx.Module):
    """Layers denselayer1, denselayer2, ..., each fed with the input and what all before it returned."""

    def __init__(self, inputs: int, growth: int, layers: int, *, rngs: nnx.Rngs):
        for index in range(layers):
            setattr(self, f"denselayer{index + 1}", DenseLayer(inputs + index * growth, growth, rngs=rngs))
        self.layers = layers

    def __call__(self, x: jax.Array) -> jax.Array:
        for index in range(self.layers):
            x = jnp.concatenate([x, getattr(self, f"denselayer{index + 1}")(x)], axis=-1)
        return x


class Transition(nnx.Module):
    """BN-ReLU-conv 1x1 and a 2x2 average pool."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.norm = BatchNorm(inputs, rngs=rngs)
        self.conv = Conv(inputs, outputs, 1, padding=0, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return avg_pool(self.conv(jax.nn.relu(self.norm(x))), 2)


class Features(nnx.Module):
    """Everything in front of the classifier."""

    def __init__(self, growth: int, stem: int, blocks: tuple[int, ...], *, rngs: nnx.Rngs):
        self.conv0 = Conv(3, stem, 7, stride=2, padding=3, rngs=rngs)
        self.norm0 = BatchNorm(stem, rngs=rngs)
        channels = stem
        for index, layers in enumerate(blocks, start=1):
            setattr(self, f"denseblock{index}", DenseBlock(channels, growth, layers, rngs=rngs))
            channels += layers * growth
            if index < len(blocks):
                setattr(self, f"transition{index}", Transition(channels, channels // 2, rngs=rngs))
                channels //= 2
        self.norm5 = BatchNorm(channels, rngs=rngs)
        self.channels, self.blocks = channels, len(blocks)

    def __call__(self, x: jax.Array, tap: Tap) -> jax.Array:
        x = tap("features.relu0", jax.nn.relu(self.norm0(self.conv0(x))))
        x = max_pool(x, 3, stride=2, padding=1)
        for index in range(1, self.blocks + 1):
            x = tap(f"features.denseblock{index}", getattr(self, f"denseblock{index}")(x))
            if index < self.blocks:
                x = tap(f"features.transition{index}", getattr(self, f"transition{index}")(x))
        return tap("features.norm5", jax.nn.relu(self.norm5(x)))


class DenseNet(nnx.Module):
    """DenseNet of `depth` 121."""

    def __init__(self, depth: int, classes: int, *, rngs: nnx.Rngs):
        self.features = Features(*DEPTHS[depth], rngs=rngs)
        self.classifier = Linear(self.features.channels, classes, rngs=rngs)

    def __call__(self, images: jax.Array, tap: Tap) -> jax.Array:
        x = self.features(standardize(images, IMAGENET_MEAN, IMAGENET_STD), tap)
        return self.classifier(jnp.mean(x, axis=(1, 2)))

    def nodes(self) -> tuple[str, ...]:
        """Names of the feature maps, in order; features.norm5 is taken behind its ReLU.

        What a layer adds is not named apart: it is a range of the channels of its block.
        """
        blocks = range(1, self.features.blocks + 1)
        inner = [f"features.{kind}{index}" for index in blocks for kind in ("denseblock", "transition")][:-1]
        return ("features.relu0", *inner, "features.norm5")
