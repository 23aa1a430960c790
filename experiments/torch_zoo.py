"""Networks that torchvision does not have, in PyTorch, with the names of the published state dicts. Needs torch.

Images are float32 in [0, 1], NCHW; preprocessing is part of each network. Every feature map that the library names is
the output of the submodule of that name, unless `MODULES` says otherwise.
"""

from __future__ import annotations

import functools

import torch  # pyright: ignore[reportMissingImports]  # optional: only comparisons with PyTorch need it
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]  # as above
from torch import nn  # pyright: ignore[reportMissingImports]  # as above


class Normalize(nn.Module):
    """(x - mean) / std for each channel."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x):
        """Maps images [B,C,H,W]."""
        return (x - _channels(self.mean, x.dtype, x.device)) / _channels(self.std, x.dtype, x.device)


@functools.cache  # copied to a GPU once
def _channels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1)


class ShortcutA(nn.Module):
    """Every other pixel, with as many channels of zeros in front as behind."""

    def __init__(self, added: int):
        super().__init__()
        self.each_side = added // 2

    def forward(self, x):
        """Maps x [B,C,H,W] to [B,C+added,H/2,W/2]."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.each_side, self.each_side))


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut of option "A" (akamaster) or "B" (kuangliu)."""

    def __init__(self, inputs: int, width: int, stride: int, option: str):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if inputs != width:
            self.shortcut = (
                ShortcutA(width - inputs)
                if option == "A"
                else nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
            )

    def forward(self, x):
        """Maps x [B,C,H,W] to the block's output."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """A 3x3 stem, layers of blocks, global average pool, linear."""

    def __init__(self, widths: tuple[int, ...], blocks: int, option: str, normalize: Normalize):
        super().__init__()
        self.normalize = normalize
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        inputs, names = widths[0], []
        for index, width in enumerate(widths, start=1):
            layer = []
            for repeat in range(blocks):
                layer.append(Block(inputs, width, 2 if index > 1 and repeat == 0 else 1, option))
                inputs = width
            self.add_module(f"layer{index}", nn.Sequential(*layer))
            names.append(f"layer{index}")
        self.linear = nn.Linear(inputs, 10)
        self.names = names

    def forward(self, images):
        """Logits [B,10] of images [B,3,32,32]."""
        x = self.relu(self.bn1(self.conv1(self.normalize(images))))
        for name in self.names:
            x = self.get_submodule(name)(x)
        return self.linear(F.avg_pool2d(x, x.shape[-1]).flatten(1))


class Carlini(nn.Sequential):
    """The networks of Carlini and Wagner 2017, table 1, for x - 0.5."""

    def __init__(self, channels: int, first: int, second: int, flat: int, hidden: int):
        super().__init__(
            nn.Conv2d(channels, first, 3),
            nn.ReLU(),
            nn.Conv2d(first, first, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 3),
            nn.ReLU(),
            nn.Conv2d(second, second, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(flat, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 10),
        )

    def forward(self, images):
        """Logits [B,10] of images [B,C,H,W]."""
        return super().forward(images - 0.5)


class Fire(nn.Module):
    """Squeeze 1x1, then expand 1x1 beside 3x3."""

    def __init__(self, inputs: int, squeeze: int, expand: int):
        super().__init__()
        self.squeeze1x1 = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x):
        """Maps x [B,C,H,W] to [B,2 expand,H,W]."""
        x = F.relu(self.squeeze1x1(x))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], 1))


class CaffeSqueezeNet(nn.Module):
    """SqueezeNet 1.1 on BGR pictures of 0..255 less the means, without a ReLU behind conv10."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 2)
        channels = 64
        for index, expand in enumerate((64, 64, 128, 128, 192, 192, 256, 256)):
            self.add_module(f"fire{index + 2}", Fire(channels, expand // 4, expand))
            channels = 2 * expand
        self.conv10 = nn.Conv2d(channels, 1000, 1)

    def forward(self, images):
        """Logits [B,1000] of images [B,3,H,W]; the first convolution pads as TensorFlow's SAME does."""
        means = torch.tensor((104.0, 117.0, 123.0), dtype=images.dtype).view(1, 3, 1, 1)
        x = images.flip(1) * 255 - means
        height, width = x.shape[-2:]
        x = F.pad(x, (width % 2, 1, height % 2, 1))
        # In place, so that a hook on conv1 keeps the activated map.
        x = F.max_pool2d(F.relu_(self.conv1(x)), 3, 2)
        for number in range(2, 10):
            x = self.get_submodule(f"fire{number}")(x)
            if number in (3, 5):
                x = F.max_pool2d(x, 3, 2)
        return self.conv10(x).mean((2, 3))


class Cifar10CNN(nn.Module):
    """Six convolutions, each with ReLU and then batch norm, and three linear layers, on pictures of 0..255."""

    def __init__(self):
        super().__init__()
        inputs = 3
        for index, width in enumerate((64, 64, 128, 128, 64, 64)):
            suffix = f"_{index}" if index else ""
            self.add_module(f"conv2d{suffix}", nn.Conv2d(inputs, width, 3))
            self.add_module(f"batch_normalization{suffix}", nn.BatchNorm2d(width, 1e-3))
            inputs = width
        self.dense = nn.Linear(64, 1024)
        self.dense_1 = nn.Linear(1024, 512)
        self.dense_2 = nn.Linear(512, 10)

    def forward(self, images):
        """Logits [B,10] of images [B,3,32,32]."""
        x = images * 255
        for index in range(6):
            suffix = f"_{index}" if index else ""
            x = F.relu(self.get_submodule(f"conv2d{suffix}")(x))
            x = self.get_submodule(f"batch_normalization{suffix}")(x)
            if index in (1, 3):
                x = F.max_pool2d(x, 2)
        return self.dense_2(F.relu(self.dense_1(F.relu(self.dense(x.flatten(1))))))


class SmallCNN(nn.Module):
    """Three convolutions, global average pool, linear."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.conv3 = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU())
        self.fc = nn.Linear(32, 10)

    def forward(self, images):
        """Logits [B,10] of images [B,3,H,W]."""
        return self.fc(self.conv3(self.conv2(self.conv1(images))).mean((2, 3)))


def _detector_input(images):
    return (images - 0.5) / 0.25


class MesoNet(nn.Module):
    """Four convolutions with max-pools, two linear layers."""

    def __init__(self):
        super().__init__()
        inputs = 3
        for index, (outputs, kernel) in enumerate(((16, 3), (16, 5), (32, 5), (32, 5)), 1):
            conv = nn.Conv2d(inputs, outputs, kernel, 1, kernel // 2)
            self.add_module(f"conv{index}", nn.Sequential(conv, nn.ReLU()))
            inputs = outputs
        self.fc1, self.fc2 = nn.Linear(128, 16), nn.Linear(16, 2)

    def forward(self, images):
        """Logits [B,2] of images [B,3,32,32]."""
        x = _detector_input(images)
        for index in range(1, 5):
            x = F.max_pool2d(self.get_submodule(f"conv{index}")(x), 2)
        return self.fc2(F.leaky_relu(self.fc1(x.flatten(1)), 0.1))


class BiasedBlock(nn.Module):
    """Two 3x3 convolutions without batch norm, and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)
        self.shortcut = nn.Conv2d(inputs, width, 1, stride, bias=False) if inputs != width else nn.Identity()

    def forward(self, x):
        """Maps x [B,C,H,W] to the block's output."""
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class ResidualDetector(nn.Module):
    """Three blocks on an image and what a mean filter takes from it."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(6, 16, 3, 2, 1), nn.ReLU())
        self.block1, self.block2 = BiasedBlock(16, 16, 1), BiasedBlock(16, 32, 2)
        self.block3, self.fc = BiasedBlock(32, 64, 2), nn.Linear(64, 2)

    def forward(self, images):
        """Logits [B,2] of images [B,3,H,W]."""
        x = _detector_input(images)
        residual = x - F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        x = self.block3(self.block2(self.block1(self.conv1(torch.cat([x, 4 * residual], 1)))))
        return self.fc(x.mean((2, 3)))


class SeparableDetector(nn.Module):
    """A convolution and three separable ones."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU())
        for index, (inputs, outputs) in enumerate(((24, 32), (32, 64), (64, 64)), 1):
            depthwise = nn.Conv2d(inputs, inputs, 3, 1, 1, groups=inputs, bias=False)
            self.add_module(f"sep{index}", nn.Sequential(depthwise, nn.Conv2d(inputs, outputs, 1), nn.ReLU()))
        self.fc = nn.Linear(64, 2)

    def forward(self, images):
        """Logits [B,2] of images [B,3,H,W]."""
        x = self.get_submodule("sep1")(self.conv1(_detector_input(images)))
        x = self.get_submodule("sep2")(F.max_pool2d(x, 2))
        return self.fc(self.get_submodule("sep3")(F.max_pool2d(x, 2)).mean((2, 3)))


NORMALIZE = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # what torchvision's networks expect in front
_NORMALIZE_CIFAR = Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))

# akamaster's repository (option A) preprocesses CIFAR-10 with ImageNet's mean and standard deviation.
NETWORKS = {
    "cifar_resnet20": lambda: CifarResNet((16, 32, 64), 3, "A", NORMALIZE),
    "cifar_resnet56": lambda: CifarResNet((16, 32, 64), 9, "A", NORMALIZE),
    "cifar_resnet18": lambda: CifarResNet((64, 128, 256, 512), 2, "B", _NORMALIZE_CIFAR),
    "carlini_mnist": lambda: Carlini(1, 32, 64, 1024, 200),
    "carlini_cifar": lambda: Carlini(3, 64, 128, 3200, 256),
    "detector_meso": MesoNet,
    "detector_residual": ResidualDetector,
    "detector_separable": SeparableDetector,
    "small_cnn": SmallCNN,
    "caffe_squeezenet1_1": CaffeSqueezeNet,
    "cifar10_cnn": Cifar10CNN,
}

# network: from the start of a feature map's name to the start of the submodule's
MODULES = {"cifar10_cnn": ("conv2d", "batch_normalization")}
