"""Weights and images by rule: every value follows from a name and a shape, in any framework.

Reference outputs of a network with these weights can be stored without the weights, and compared wherever the
network is implemented. The scales keep activations of order one through deep networks: convolutions and linear
layers as He et al. 2015 (arXiv 1502.01852) have them, batch norms near the identity, and the last batch norm of a
residual block damped, so that a sum over many blocks does not grow.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxinterp.weights.names import from_jax_shape, to_jax_layout

# Blocks that end in a ReLU (ResNet), and those that do not (MobileNetV2, EfficientNet).
_DAMPING = {re.compile(r"\bbn[23]\.weight"): 0.4, re.compile(r"(_bn2|\bconv\.[23])\.weight"): 0.55}


def _generator(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode())))


def _uniform(name: str, shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
    values = _generator(name).random(shape, dtype=np.float32)
    values *= np.float32(high - low)
    values += np.float32(low)
    return values


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor called `name` of a PyTorch state dict: float32, in PyTorch's layout (OIHW, [out, in]).

    Args:
        name: such as "layer1.0.conv1.weight".
        shape: four dimensions are a convolution's weight, two a linear layer's; one is a bias, a running statistic
            or a batch norm's weight.
    """
    if len(shape) > 1:
        bound = math.sqrt(6 / math.prod(shape[1:]))  # variance 2 / fan in
        return _uniform(name, shape, -bound, bound)
    if name.endswith("running_var"):
        return _uniform(name, shape, 0.6, 1.5)
    if name.endswith("weight"):
        scale = next((factor for pattern, factor in _DAMPING.items() if pattern.search(name)), 1.0)
        return _uniform(name, shape, 0.8 * scale, 1.2 * scale)
    return _uniform(name, shape, -0.1, 0.1)


def params(expected: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Parameters of a network in JAX's layouts.

    Args:
        expected: name -> anything with a shape, as `jaxinterp.models.shapes` returns it.
    """
    return {
        name: np.ascontiguousarray(to_jax_layout(tensor(name, from_jax_shape(tuple(spec.shape)))))
        for name, spec in expected.items()
    }


def images(count: int, size: int, channels: int = 3) -> np.ndarray:
    """Images [count,size,size,channels], float32 in [0, 1]: coarse patches of colour under noise."""
    shape = (count, size, size, channels)
    patches = _uniform("patches", (count, 5, 5, channels), 0.0, 1.0)
    of_pixel = np.arange(size) * 5 // size
    return (_uniform("noise", shape, 0.0, 1.0) + patches[:, of_pixel][:, :, of_pixel]) / np.float32(2)


def places(name: str, size: int, count: int = 64) -> np.ndarray:
    """Some indices into an array of `size` entries, in ascending order."""
    return np.sort(_generator(name).integers(0, size, count))
