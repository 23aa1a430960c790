"""VGG: very deep networks of 3x3 convolutions (Simonyan and Zisserman 2015, arXiv 1409.1556), as torchvision has them.

The depths are columns A, B, D and E of the paper's table 1, each with or without batch norm. The 7x7 average pool in
front of the classifier is the identity at 224 px and lets other sizes through.
"""

from __future__ import annotations

import jax
from flax import nnx

from jaxinterp.models.layers import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    BatchNorm,
    Conv,
    Linear,
    MaxPool,
    Sequential,
    adaptive_avg_pool,
    dropout,
    flatten,
    standardize,
)
from jaxinterp.network import Tap

# depth: convolutions in each of the five stages; every stage ends in a 2x2 pool
DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)


class VGG(nnx.Module):
    """VGG of `depth` 11, 13, 16 or 19."""

    def __init__(self, depth: int, norm: bool, classes: int, *, rngs: nnx.Rngs):
        inputs, layers = 3, []
        for width, count in zip(WIDTHS, DEPTHS[depth], strict=True):
            for _ in range(count):
                layers.append(Conv(inputs, width, 3, padding=1, bias=True, rngs=rngs))
                if norm:
                    layers.append(BatchNorm(width, rngs=rngs))
                layers.append(jax.nn.relu)
                inputs = width
            layers.append(MaxPool(2))
        self.features = Sequential(layers)
        self.classifier = Sequential(
            [
                Linear(7 * 7 * 512, 4096, rngs=rngs),
                jax.nn.relu,
                dropout,
                Linear(4096, 4096, rngs=rngs),
                jax.nn.relu,
                dropout,
                Linear(4096, classes, rngs=rngs),
            ]
        )

    def __call__(self, images: jax.Array, tap: Tap) -> jax.Array:
        x = standardize(images, IMAGENET_MEAN, IMAGENET_STD)
        x = self.features(x, tap, "features.", self.nodes())
        return self.classifier(flatten(adaptive_avg_pool(x, 7)))

    def nodes(self) -> tuple[str, ...]:
        """Names of the feature maps, in order: the convolutions behind their ReLU."""
        return tuple(f"features.{i}" for i, layer in enumerate(self.features) if layer is jax.nn.relu)
