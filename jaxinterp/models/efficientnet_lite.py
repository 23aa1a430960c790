"""EfficientNet-Lite: EfficientNet without squeeze-and-excitation, with ReLU6 (TensorFlow's tpu/efficientnet/lite).

Attribute names are those of the PyTorch port's state dict. Compound scaling is that of EfficientNet (Tan and Le 2019,
arXiv 1905.11946, section 3.3), except that the stem, the head and the first and last stage's depth are not scaled.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinterp.models.layers import BatchNorm, Conv, Linear
from jaxinterp.network import Tap

_EPS = 1e-3


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of blocks: how many, kernel, stride of the first, expansion, input and output channels."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    inputs: int
    outputs: int


STAGES = (
    Stage(1, 3, 1, 1, 32, 16),
    Stage(2, 3, 2, 6, 16, 24),
    Stage(2, 5, 2, 6, 24, 40),
    Stage(3, 3, 2, 6, 40, 80),
    Stage(3, 5, 1, 6, 80, 112),
    Stage(4, 5, 2, 6, 112, 192),
    Stage(1, 3, 1, 6, 192, 320),
)

# variant: width, depth, image size
SCALES = {0: (1.0, 1.0, 224), 1: (1.0, 1.1, 240), 2: (1.1, 1.2, 260), 3: (1.2, 1.4, 280), 4: (1.4, 1.8, 300)}


def scaled(channels: int, width: float) -> int:
    """`channels * width` rounded to a multiple of 8, never more than a tenth below."""
    rounded = max(8, int(channels * width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels * width else rounded


class MBConv(nnx.Module):
    """Inverted residual block: expand 1x1, depthwise, project 1x1."""

    def __init__(self, inputs, outputs, *, kernel, stride, expand, rngs):
        hidden = inputs * expand
        if expand != 1:
            self._expand_conv = Conv(inputs, hidden, 1, rngs=rngs)
            self._bn0 = BatchNorm(hidden, eps=_EPS, rngs=rngs)
        self._depthwise_conv = Conv(hidden, hidden, kernel, stride=stride, depthwise=True, rngs=rngs)
        self._bn1 = BatchNorm(hidden, eps=_EPS, rngs=rngs)
        self._project_conv = Conv(hidden, outputs, 1, rngs=rngs)
        self._bn2 = BatchNorm(outputs, eps=_EPS, rngs=rngs)
        self.expands, self.skips = expand != 1, stride == 1 and inputs == outputs

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        if self.expands:
            y = jax.nn.relu6(self._bn0(self._expand_conv(y)))
        y = jax.nn.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


class EfficientNetLite(nnx.Module):
    """EfficientNet-Lite `variant` 0..4."""

    def __init__(self, variant: int, classes: int, *, rngs: nnx.Rngs):
        width, depth, _ = SCALES[variant]
        self._conv_stem = Conv(3, 32, 3, stride=2, rngs=rngs)
        self._bn0 = BatchNorm(32, eps=_EPS, rngs=rngs)
        blocks = []
        for index, stage in enumerate(STAGES):
            fixed = index in (0, len(STAGES) - 1)
            inputs = 32 if index == 0 else scaled(stage.inputs, width)
            outputs = scaled(stage.outputs, width)
            for repeat in range(stage.repeats if fixed else math.ceil(depth * stage.repeats)):
                blocks.append(
                    MBConv(
                        inputs if repeat == 0 else outputs,
                        outputs,
                        kernel=stage.kernel,
                        stride=stage.stride if repeat == 0 else 1,
                        expand=stage.expand,
                        rngs=rngs,
                    )
                )
        self._blocks = nnx.List(blocks)
        self._conv_head = Conv(scaled(320, width), 1280, 1, rngs=rngs)
        self._bn1 = BatchNorm(1280, eps=_EPS, rngs=rngs)
        self._fc = Linear(1280, classes, rngs=rngs)

    def __call__(self, images: jax.Array, tap: Tap) -> jax.Array:
        x = (images * 255.0 - 127.0) / 128.0
        x = tap("_conv_stem", jax.nn.relu6(self._bn0(self._conv_stem(x))))
        for index, block in enumerate(self._blocks):
            x = tap(f"_blocks.{index}", block(x))
        x = tap("_conv_head", jax.nn.relu6(self._bn1(self._conv_head(x))))
        return self._fc(jnp.mean(x, axis=(1, 2)))

    def nodes(self) -> tuple[str, ...]:
        """Names of the feature maps, in order."""
        return ("_conv_stem", *(f"_blocks.{i}" for i in range(len(self._blocks))), "_conv_head")
