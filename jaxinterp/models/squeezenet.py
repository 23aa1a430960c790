"""SqueezeNet: AlexNet's accuracy with few parameters (Iandola et al. 2016, arXiv 1602.07360), as torchvision has it.

A fire module squeezes to few channels by 1x1 convolutions and expands by 1x1 and 3x3 convolutions side by side.
Version 1.0 is the paper's, 1.1 the authors' later one with earlier pools. The logits are the spatial means of the
classes' own feature maps, so the last node is at once a class activation map (its linear layer is the identity).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinterp.models.layers import IMAGENET_MEAN, IMAGENET_STD, Conv, MaxPool, Sequential, dropout, standardize
from jaxinterp.network import Tap


class Fire(nnx.Module):
    """Fire module: squeeze, then two kinds of expansion to `expand` channels each."""

    def __init__(self, inputs: int, squeeze: int, expand: int, *, rngs: nnx.Rngs):
        self.squeeze = Conv(inputs, squeeze, 1, padding=0, bias=True, rngs=rngs)
        self.expand1x1 = Conv(squeeze, expand, 1, padding=0, bias=True, rngs=rngs)
        self.expand3x3 = Conv(squeeze, expand, 3, padding=1, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.squeeze(x))
        return jax.nn.relu(jnp.concatenate([self.expand1x1(x), self.expand3x3(x)], axis=-1))


# Squeeze and expand channels of the fire modules; for each version, channels and kernel of the stem, and the order of
# modules and pools (None).
_FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
VERSIONS = {
    "1.0": (96, 7, (None, *_FIRES[:3], None, *_FIRES[3:7], None, *_FIRES[7:])),
    "1.1": (64, 3, (None, *_FIRES[:2], None, *_FIRES[2:4], None, *_FIRES[4:])),
}


class SqueezeNet(nnx.Module):
    """SqueezeNet of version "1.0" or "1.1"."""

    def __init__(self, version: str, classes: int, *, rngs: nnx.Rngs):
        inputs, kernel, modules = VERSIONS[version]
        layers = [Conv(3, inputs, kernel, stride=2, padding=0, bias=True, rngs=rngs), jax.nn.relu]
        for module in modules:
            if module is None:
                layers.append(MaxPool(3, stride=2, ceil_mode=True))
            else:
                layers.append(Fire(inputs, *module, rngs=rngs))
                inputs = 2 * module[1]
        self.features = Sequential(layers)
        self.classifier = Sequential(
            [dropout, Conv(inputs, classes, 1, padding=0, bias=True, rngs=rngs), jax.nn.relu],
        )

    def __call__(self, images: jax.Array, tap: Tap) -> jax.Array:
        x = standardize(images, IMAGENET_MEAN, IMAGENET_STD)
        x = self.features(x, tap, "features.", self.nodes())
        x = self.classifier(x, tap, "classifier.", self.nodes())
        return jnp.mean(x, axis=(1, 2))

    def nodes(self) -> tuple[str, ...]:
        """Names of the feature maps, in order: the stem behind its ReLU, the fire modules, the classes' own maps."""
        fires = (f"features.{i}" for i, layer in enumerate(self.features) if isinstance(layer, Fire))
        return ("features.1", *fires, "classifier.2")
