"""AlexNet in one column (Krizhevsky 2014, arXiv 1404.5997, section 5), as torchvision has it.

Five convolutions and three linear layers; neither groups nor local response normalisation. The 6x6 average pool in
front of the classifier is the identity at 224 px.
"""

from __future__ import annotations

import jax
from flax import nnx

from jaxinterp.models.layers import (
    IMAGENET_MEAN,
    IMAGENET_STD,
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


class AlexNet(nnx.Module):
    """AlexNet."""

    def __init__(self, classes: int, *, rngs: nnx.Rngs):
        self.features = Sequential(
            [
                Conv(3, 64, 11, stride=4, padding=2, bias=True, rngs=rngs),
                jax.nn.relu,
                MaxPool(3, stride=2),
                Conv(64, 192, 5, padding=2, bias=True, rngs=rngs),
                jax.nn.relu,
                MaxPool(3, stride=2),
                Conv(192, 384, 3, padding=1, bias=True, rngs=rngs),
                jax.nn.relu,
                Conv(384, 256, 3, padding=1, bias=True, rngs=rngs),
                jax.nn.relu,
                Conv(256, 256, 3, padding=1, bias=True, rngs=rngs),
                jax.nn.relu,
                MaxPool(3, stride=2),
            ]
        )
        self.classifier = Sequential(
            [
                dropout,
                Linear(6 * 6 * 256, 4096, rngs=rngs),
                jax.nn.relu,
                dropout,
                Linear(4096, 4096, rngs=rngs),
                jax.nn.relu,
                Linear(4096, classes, rngs=rngs),
            ]
        )

    def __call__(self, images: jax.Array, tap: Tap) -> jax.Array:
        x = standardize(images, IMAGENET_MEAN, IMAGENET_STD)
        x = self.features(x, tap, "features.", self.nodes())
        return self.classifier(flatten(adaptive_avg_pool(x, 6)))

    def nodes(self) -> tuple[str, ...]:
        """Names of the feature maps, in order: the convolutions behind their ReLU."""
        return tuple(f"features.{i}" for i, layer in enumerate(self.features) if layer is jax.nn.relu)
