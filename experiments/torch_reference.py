"""EfficientNet-Lite 0-4 in PyTorch, against which speed and numbers are compared. Needs torch.

A plain torch.nn.Module with the names of the published state dicts, written from TensorFlow's tpu/efficientnet/lite:
padding SAME as TensorFlow has it (the odd pixel goes to the right and the bottom), batch norm with eps 1e-3, ReLU6, no
squeeze-and-excitation. Images are float32 RGB in [0, 1], NCHW; (255 x - 127) / 128 is part of the network.
"""

from __future__ import annotations

import torch  # pyright: ignore[reportMissingImports]  # optional: only comparisons with PyTorch need it
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]  # as above

from jaxinterp.weights.recipes import recipe

# Kernel, stride of the first block and expansion of each stage; then, for each variant, repeats and output channels.
# These are compound scaling's results spelled out, so that a slip in the library's scaling shows here.
_STAGES = ((3, 1, 1), (3, 2, 6), (5, 2, 6), (3, 2, 6), (5, 1, 6), (5, 2, 6), (3, 1, 6))
_REPEATS = (
    (1, 2, 2, 3, 3, 4, 1),
    (1, 3, 3, 4, 4, 5, 1),
    (1, 3, 3, 4, 4, 5, 1),
    (1, 3, 3, 5, 5, 6, 1),
    (1, 4, 4, 6, 6, 8, 1),
)
_CHANNELS = (
    (16, 24, 40, 80, 112, 192, 320),
    (16, 24, 40, 80, 112, 192, 320),
    (16, 24, 48, 88, 120, 208, 352),
    (24, 32, 48, 96, 136, 232, 384),
    (24, 32, 56, 112, 160, 272, 448),
)
_EPS = 1e-3


class Conv(torch.nn.Conv2d):
    """A convolution without bias and with TensorFlow's SAME padding."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x):
        """Convolves x [B,C,H,W]; where padding is the same on both sides, the convolution itself pads."""
        (kernel, stride), (height, width) = (self.kernel_size[0], self.stride[0]), x.shape[-2:]
        top, bottom = _same(height, kernel, stride)
        left, right = _same(width, kernel, stride)
        if (top, left) == (bottom, right):
            return F.conv2d(x, self.weight, None, self.stride, (top, left), 1, self.groups)
        x = F.pad(x, (left, right, top, bottom))
        return F.conv2d(x, self.weight, None, self.stride, 0, 1, self.groups)


def _same(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class Block(torch.nn.Module):
    """Inverted residual block: expand 1x1, depthwise, project 1x1."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int):
        super().__init__()
        hidden = inputs * expand
        self.expands, self.skips = expand != 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = Conv(inputs, hidden, 1)
            self._bn0 = torch.nn.BatchNorm2d(hidden, _EPS)
        self._depthwise_conv = Conv(hidden, hidden, kernel, stride, groups=hidden)
        self._bn1 = torch.nn.BatchNorm2d(hidden, _EPS)
        self._project_conv = Conv(hidden, outputs, 1)
        self._bn2 = torch.nn.BatchNorm2d(outputs, _EPS)

    def forward(self, x):
        """Maps x [B,C,H,W] to the block's output."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


class EfficientNetLite(torch.nn.Module):
    """EfficientNet-Lite `variant` 0..4; `forward` takes a dict in which it leaves every named feature map."""

    def __init__(self, variant: int, classes: int = 1000):
        super().__init__()
        self._conv_stem = Conv(3, 32, 3, 2)
        self._bn0 = torch.nn.BatchNorm2d(32, _EPS)
        blocks, inputs = [], 32
        stages = zip(_STAGES, _REPEATS[variant], _CHANNELS[variant], strict=True)
        for (kernel, stride, expand), repeats, outputs in stages:
            for repeat in range(repeats):
                blocks.append(Block(inputs, outputs, kernel, stride if repeat == 0 else 1, expand))
                inputs = outputs
        self._blocks = torch.nn.ModuleList(blocks)
        self._conv_head = Conv(inputs, 1280, 1)
        self._bn1 = torch.nn.BatchNorm2d(1280, _EPS)
        self._fc = torch.nn.Linear(1280, classes)

    def forward(self, images, seen: dict | None = None):
        """Logits [B,K] of images [B,3,H,W] in [0, 1]; `seen` receives the feature maps [B,C,h,w] by node."""
        seen = {} if seen is None else seen
        x = (images * 255.0 - 127.0) / 128.0
        x = seen["_conv_stem"] = F.relu6(self._bn0(self._conv_stem(x)))
        for index, block in enumerate(self._blocks):
            x = seen[f"_blocks.{index}"] = block(x)
        x = seen["_conv_head"] = F.relu6(self._bn1(self._conv_head(x)))
        return self._fc(x.mean((2, 3)))


def load(name: str) -> EfficientNetLite:
    """The network `name` (efficientnet_lite0..2) with its published weights, in eval mode, parameters frozen.

    Raises:
        ValueError: the weight package is not installed.
        RuntimeError: a tensor is missing, unexpected or misshapen.
    """
    network = EfficientNetLite(int(name.removeprefix("efficientnet_lite")))
    state = torch.load(recipe(name).find(), map_location="cpu", weights_only=True)
    network.load_state_dict(state, strict=True)
    return network.eval().requires_grad_(False)
