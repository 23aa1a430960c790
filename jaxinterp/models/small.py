"""A small network for tests and examples: three convolutions, global average pool, one linear layer.

It has 6,362 parameters for ten classes, takes images of any size as they are, and ends in the way for which class
activation maps were defined (Zhou et al. 2016, arXiv 1512.04150).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinterp.models.layers import Conv, Linear, Sequential
from jaxinterp.network import Tap


class SmallCNN(nnx.Module):
    """Convolutions to 8, 16 and 32 channels; the last two halve the image."""

    def __init__(self, classes: int, *, rngs: nnx.Rngs):
        def unit(inputs, outputs, stride):
            return Sequential([Conv(inputs, outputs, 3, stride=stride, padding=1, bias=True, rngs=rngs), jax.nn.relu])

        self.conv1 = unit(3, 8, 1)
        self.conv2 = unit(8, 16, 2)
        self.conv3 = unit(16, 32, 2)
        self.fc = Linear(32, classes, rngs=rngs)

    def __call__(self, images: jax.Array, tap: Tap) -> jax.Array:
        x = images
        for name in self.nodes():
            x = tap(name, getattr(self, name)(x))
        return self.fc(jnp.mean(x, axis=(1, 2)))

    def nodes(self) -> tuple[str, ...]:
        """Names of the feature maps, in order."""
        return ("conv1", "conv2", "conv3")
