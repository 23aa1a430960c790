"""The CIFAR-10 network of the package cifar-10-model: six convolutions and three linear layers, in Keras's names.

Pictures are RGB on 0..255. Each 3x3 convolution (no padding) is followed by a ReLU and then by batch norm. The
original ends in a ReLU, which hides every logit that is negative; here the logits are the values before it, and the
predicted class is the same wherever any of them is positive.
"""

from __future__ import annotations

import jax
from flax import nnx

from jaxinterp.models.layers import BatchNorm, Conv, Linear, max_pool
from jaxinterp.network import Tap

IMAGE_SIZE = 32

_CHANNELS = (64, 64, 128, 128, 64, 64)
_POOLED = (1, 3)  # a max-pool follows the second and the fourth convolution
_EPS = 1e-3


def _layer(kind: str, index: int) -> str:
    """Keras's name of the layer number `index` of a kind."""
    return f"{kind}_{index}" if index else kind


class Cifar10CNN(nnx.Module):
    """Six convolutions and three linear layers on 32 x 32 pictures."""

    def __init__(self, classes: int, *, rngs: nnx.Rngs):
        inputs = 3
        for index, outputs in enumerate(_CHANNELS):
            setattr(self, _layer("conv2d", index), Conv(inputs, outputs, 3, padding=0, bias=True, rngs=rngs))
            setattr(self, _layer("batch_normalization", index), BatchNorm(outputs, eps=_EPS, rngs=rngs))
            inputs = outputs
        self.dense = Linear(inputs, 1024, rngs=rngs)
        self.dense_1 = Linear(1024, 512, rngs=rngs)
        self.dense_2 = Linear(512, classes, rngs=rngs)

    def __call__(self, images: jax.Array, tap: Tap) -> jax.Array:
        x = images * 255.0
        for index in range(len(_CHANNELS)):
            x = jax.nn.relu(getattr(self, _layer("conv2d", index))(x))
            x = tap(_layer("conv2d", index), getattr(self, _layer("batch_normalization", index))(x))
            if index in _POOLED:
                x = max_pool(x, 2)
        x = x.reshape(x.shape[0], -1)  # 1 x 1 x 64 for a picture of 32 x 32
        x = jax.nn.relu(self.dense(x))
        x = jax.nn.relu(self.dense_1(x))
        return self.dense_2(x)

    def nodes(self) -> tuple[str, ...]:
        """Names of the feature maps, in order; each is the convolution with its ReLU and batch norm."""
        return tuple(_layer("conv2d", index) for index in range(len(_CHANNELS)))
