"""GoogLeNet: Inception modules (Szegedy et al. 2015, arXiv 1409.4842, table 1), as torchvision has it.

Every convolution has batch norm, pools round their size up (ceil_mode), and the "5x5" branch has 3x3 kernels; all
three come from the published weights. The auxiliary classifiers serve training only and are left out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinterp.models.layers import ConvNormRelu, Linear, MaxPool, Sequential, max_pool, standardize
from jaxinterp.network import Tap

# module: input channels; 1x1; 3x3 reduced and full; 5x5 reduced and full; 1x1 behind the pool
MODULES = {
    "inception3a": (192, 64, 96, 128, 16, 32, 32),
    "inception3b": (256, 128, 128, 192, 32, 96, 64),
    "inception4a": (480, 192, 96, 208, 16, 48, 64),
    "inception4b": (512, 160, 112, 224, 24, 64, 64),
    "inception4c": (512, 128, 128, 256, 24, 64, 64),
    "inception4d": (512, 112, 144, 288, 32, 64, 64),
    "inception4e": (528, 256, 160, 320, 32, 128, 128),
    "inception5a": (832, 256, 160, 320, 32, 128, 128),
    "inception5b": (832, 384, 192, 384, 48, 128, 128),
}


class Inception(nnx.Module):
    """Four branches side by side: 1x1, 3x3, "5x5", pool."""

    def __init__(self, inputs, ones, threes_reduced, threes, fives_reduced, fives, pooled, *, rngs):
        self.branch1 = ConvNormRelu(inputs, ones, 1, rngs=rngs)
        self.branch2 = Sequential(
            [
                ConvNormRelu(inputs, threes_reduced, 1, rngs=rngs),
                ConvNormRelu(threes_reduced, threes, 3, padding=1, rngs=rngs),
            ]
        )
        self.branch3 = Sequential(
            [
                ConvNormRelu(inputs, fives_reduced, 1, rngs=rngs),
                ConvNormRelu(fives_reduced, fives, 3, padding=1, rngs=rngs),
            ]
        )
        self.branch4 = Sequential(
            [
                MaxPool(3, stride=1, padding=1, ceil_mode=True),
                ConvNormRelu(inputs, pooled, 1, rngs=rngs),
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        branches = (self.branch1, self.branch2, self.branch3, self.branch4)
        return jnp.concatenate([branch(x) for branch in branches], axis=-1)


class GoogLeNet(nnx.Module):
    """GoogLeNet."""

    def __init__(self, classes: int, *, rngs: nnx.Rngs):
        self.conv1 = ConvNormRelu(3, 64, 7, stride=2, padding=3, rngs=rngs)
        self.conv2 = ConvNormRelu(64, 64, 1, rngs=rngs)
        self.conv3 = ConvNormRelu(64, 192, 3, padding=1, rngs=rngs)
        for name, channels in MODULES.items():
            setattr(self, name, Inception(*channels, rngs=rngs))
        self.fc = Linear(1024, classes, rngs=rngs)

    def __call__(self, images: jax.Array, tap: Tap) -> jax.Array:
        # What is left of the standard preprocessing when torchvision's transform_input has undone it.
        x = standardize(images, (0.5,), (0.5,))
        x = tap("conv1", self.conv1(x))
        x = max_pool(x, 3, stride=2, ceil_mode=True)
        x = tap("conv2", self.conv2(x))
        x = tap("conv3", self.conv3(x))
        x = max_pool(x, 3, stride=2, ceil_mode=True)
        for name in MODULES:
            if name == "inception4a":
                x = max_pool(x, 3, stride=2, ceil_mode=True)
            elif name == "inception5a":
                x = max_pool(x, 2, stride=2, ceil_mode=True)
            x = tap(name, getattr(self, name)(x))
        return self.fc(jnp.mean(x, axis=(1, 2)))

    def nodes(self) -> tuple[str, ...]:
        """Names of the feature maps, in order."""
        return ("conv1", "conv2", "conv3", *MODULES)
