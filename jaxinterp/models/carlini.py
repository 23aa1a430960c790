"""The MNIST and CIFAR-10 networks of Carlini and Wagner 2017 (arXiv 1608.04644, table 1).

Two blocks of two 3x3 convolutions without padding and a 2x2 pool, then three linear layers. Inputs are x - 0.5, as
in the authors' code. Names are the places in a `torch.nn.Sequential` without dropout, and the first linear layer
follows PyTorch's order (channels first): weights of a Keras model need that layer's rows permuted.
"""

from __future__ import annotations

import jax
from flax import nnx

from jaxinterp.models.layers import Conv, Linear, MaxPool, Sequential, flatten
from jaxinterp.network import Tap

# data set: side and channels of the images, channels of the two blocks, width of the linear layers
DATASETS = {"mnist": (28, 1, (32, 64), 200), "cifar": (32, 3, (64, 128), 256)}


class Carlini(Sequential):
    """The network for `dataset` "mnist" or "cifar"."""

    def __init__(self, dataset: str, classes: int, *, rngs: nnx.Rngs):
        side, inputs, widths, hidden = DATASETS[dataset]
        layers = []
        for width in widths:
            layers += [
                Conv(inputs, width, 3, padding=0, bias=True, rngs=rngs),
                jax.nn.relu,
                Conv(width, width, 3, padding=0, bias=True, rngs=rngs),
                jax.nn.relu,
                MaxPool(2),
            ]
            inputs, side = width, (side - 4) // 2
        super().__init__(
            [
                *layers,
                flatten,
                Linear(side * side * inputs, hidden, rngs=rngs),
                jax.nn.relu,
                Linear(hidden, hidden, rngs=rngs),
                jax.nn.relu,
                Linear(hidden, classes, rngs=rngs),
            ]
        )

    def __call__(self, images: jax.Array, tap: Tap) -> jax.Array:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().__call__(images - 0.5, tap, nodes=self.nodes())

    def nodes(self) -> tuple[str, ...]:
        """Names of the feature maps, in order: the convolutions behind their ReLU."""
        return ("1", "3", "6", "8")
