"""Small detectors of generated images, for 32 x 32 pixels: classes "real" and "generated".

Three ways to look for the traces of generation, so that what deceives one may leave the others alone:

* `MesoNet`, large kernels and max-pools (Afchar et al. 2018, arXiv 1809.00888, Meso-4), twice as wide;
* `ResidualDetector`, residual blocks (He et al. 2016, arXiv 1512.03385) on the image and what a 3 x 3 mean takes from
  it, since generation shows in high frequencies;
* `SeparableDetector`, depthwise separable convolutions (Chollet 2017, arXiv 1610.02357, Xception in small).

None has batch norm: they train in a minute without, and are the same function in training and afterwards.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinterp.models.layers import Conv, Linear, Sequential, avg_pool, flatten, max_pool, standardize
from jaxinterp.network import Tap

IMAGE_SIZE = 32
CLASSES = ("real", "generated")

_MEAN, _STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
_LEAK = 0.1
# Of MesoNet: channels and kernel of every convolution, and the pool behind it.
_MESO = ((16, 3, 2), (16, 5, 2), (32, 5, 2), (32, 5, 2))
_HIDDEN = 16


class MesoNet(nnx.Module):
    """Four convolutions, each with a ReLU and a max-pool, and two linear layers."""

    def __init__(self, classes: int, *, rngs: nnx.Rngs):
        inputs = 3
        for index, (outputs, kernel, _) in enumerate(_MESO, 1):
            layer = Conv(inputs, outputs, kernel, padding=kernel // 2, bias=True, rngs=rngs)
            setattr(self, f"conv{index}", Sequential([layer, jax.nn.relu]))
            inputs = outputs
        self.fc1 = Linear(inputs * 2 * 2, _HIDDEN, rngs=rngs)  # 2 x 2 positions of a 32 x 32 image
        self.fc2 = Linear(_HIDDEN, classes, rngs=rngs)

    def __call__(self, images: jax.Array, tap: Tap) -> jax.Array:
        x = standardize(images, _MEAN, _STD)
        for name, (_, _, pool) in zip(self.nodes(), _MESO, strict=True):
            x = max_pool(tap(name, getattr(self, name)(x)), pool)
        return self.fc2(jax.nn.leaky_relu(self.fc1(flatten(x)), _LEAK))

    def nodes(self) -> tuple[str, ...]:
        """Names of the feature maps, in order."""
        return tuple(f"conv{index}" for index in range(1, 1 + len(_MESO)))


class _Block(nnx.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, width: int, stride: int, *, rngs: nnx.Rngs):
        self.conv1 = Conv(inputs, width, 3, stride=stride, padding=1, bias=True, rngs=rngs)
        self.conv2 = Conv(width, width, 3, padding=1, bias=True, rngs=rngs)
        changes = stride != 1 or inputs != width
        self.shortcut = Conv(inputs, width, 1, stride=stride, padding=0, rngs=rngs) if changes else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv2(jax.nn.relu(self.conv1(x)))
        return jax.nn.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResidualDetector(nnx.Module):
    """A convolution, three residual blocks, global average pool and a linear layer, on six channels."""

    def __init__(self, classes: int, *, rngs: nnx.Rngs):
        self.conv1 = Sequential([Conv(6, 16, 3, stride=2, padding=1, bias=True, rngs=rngs), jax.nn.relu])
        self.block1 = _Block(16, 16, 1, rngs=rngs)
        self.block2 = _Block(16, 32, 2, rngs=rngs)
        self.block3 = _Block(32, 64, 2, rngs=rngs)
        self.fc = Linear(64, classes, rngs=rngs)

    def __call__(self, images: jax.Array, tap: Tap) -> jax.Array:
        x = standardize(images, _MEAN, _STD)
        residual = x - avg_pool(x, 3, stride=1, padding=1, count_include_pad=False)
        x = jnp.concatenate([x, 4 * residual], axis=-1)
        for name in self.nodes():
            x = tap(name, getattr(self, name)(x))
        return self.fc(jnp.mean(x, axis=(1, 2)))

    def nodes(self) -> tuple[str, ...]:
        """Names of the feature maps, in order."""
        return ("conv1", "block1", "block2", "block3")


class SeparableDetector(nnx.Module):
    """A convolution, three depthwise separable ones with max-pools, global average pool and a linear layer."""

    def __init__(self, classes: int, *, rngs: nnx.Rngs):
        def separable(inputs, outputs):
            return Sequential(
                [
                    Conv(inputs, inputs, 3, padding=1, depthwise=True, rngs=rngs),
                    Conv(inputs, outputs, 1, padding=0, bias=True, rngs=rngs),
                    jax.nn.relu,
                ]
            )

        self.conv1 = Sequential([Conv(3, 24, 3, stride=2, padding=1, bias=True, rngs=rngs), jax.nn.relu])
        self.sep1, self.sep2, self.sep3 = separable(24, 32), separable(32, 64), separable(64, 64)
        self.fc = Linear(64, classes, rngs=rngs)

    def __call__(self, images: jax.Array, tap: Tap) -> jax.Array:
        x = tap("conv1", self.conv1(standardize(images, _MEAN, _STD)))
        x = tap("sep1", self.sep1(x))
        x = tap("sep2", self.sep2(max_pool(x, 2)))
        x = tap("sep3", self.sep3(max_pool(x, 2)))
        return self.fc(jnp.mean(x, axis=(1, 2)))

    def nodes(self) -> tuple[str, ...]:
        """Names of the feature maps, in order."""
        return ("conv1", "sep1", "sep2", "sep3")
