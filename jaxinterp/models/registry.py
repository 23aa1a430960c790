"""Architectures by name: each builds a `Network` and knows the shapes of its parameters."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinterp.models.alexnet import AlexNet
from jaxinterp.models.caffe_squeezenet import CaffeSqueezeNet
from jaxinterp.models.carlini import Carlini
from jaxinterp.models.cifar10_cnn import Cifar10CNN
from jaxinterp.models.cifar_resnet import CifarResNet, CifarResNet18
from jaxinterp.models.densenet import DenseNet
from jaxinterp.models.detectors import CLASSES as REAL_OR_GENERATED
from jaxinterp.models.detectors import IMAGE_SIZE as DETECTED
from jaxinterp.models.detectors import MesoNet, ResidualDetector, SeparableDetector
from jaxinterp.models.efficientnet_lite import SCALES, EfficientNetLite
from jaxinterp.models.googlenet import GoogLeNet
from jaxinterp.models.inception import InceptionV3
from jaxinterp.models.mobilenet import MobileNetV2
from jaxinterp.models.resnet import DEPTHS as RESNETS
from jaxinterp.models.resnet import ResNet
from jaxinterp.models.small import SmallCNN
from jaxinterp.models.squeezenet import SqueezeNet
from jaxinterp.models.vgg import DEPTHS as VGGS
from jaxinterp.models.vgg import VGG
from jaxinterp.network import Network, identity, suggest

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_DIGITS = tuple("0123456789")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How to build a network.

    Attributes:
        build: `build(classes, rngs=rngs)` makes the NNX module: `module(images, tap)`, `module.nodes()`.
        reference: the paper.
        image_size: side of the input, in pixels.
        cam_node: see `Network`.
        channels: of the input.
        crop_pct: see `Network`.
        interpolation: see `Network`.
        classes: the number of classes unless another is asked for.
        class_names: their names, where there are as many as classes; empty where they have none. Those of ImageNet
            are not listed here: see `imagenet_classes`.
    """

    build: Callable[..., Any]
    reference: str
    image_size: int = 224
    cam_node: str | None = None
    channels: int = 3
    crop_pct: float = 0.875
    interpolation: str = "bilinear"
    classes: int = 1000
    class_names: tuple[str, ...] = ()


def _tiny(build: Callable[..., Any], reference: str, image_size: int = 32, **more: Any) -> Architecture:
    """A network for ten classes and small images, which are neither resized nor cropped."""
    return Architecture(build, reference, image_size, crop_pct=1.0, classes=10, **more)


def _architectures() -> dict[str, Architecture]:
    table: dict[str, Architecture] = {}
    for depth, (_, repeats) in RESNETS.items():
        build = functools.partial(ResNet, depth)
        table[f"resnet{depth}"] = Architecture(build, "He et al. 2016", cam_node=f"layer4.{repeats[-1] - 1}")
    for depth in VGGS:
        for suffix, norm in (("", False), ("_bn", True)):
            build = functools.partial(VGG, depth, norm)
            table[f"vgg{depth}{suffix}"] = Architecture(build, "Simonyan and Zisserman 2015")
    table["inception_v3"] = Architecture(
        InceptionV3, "Szegedy et al. 2016", image_size=299, crop_pct=0.8742, cam_node="Mixed_7c"
    )
    table["googlenet"] = Architecture(GoogLeNet, "Szegedy et al. 2015", cam_node="inception5b")
    table["alexnet"] = Architecture(AlexNet, "Krizhevsky 2014")
    for version in ("1.0", "1.1"):
        build = functools.partial(SqueezeNet, version)
        name = "squeezenet" + version.replace(".", "_")
        table[name] = Architecture(build, "Iandola et al. 2016", cam_node="classifier.2")
    table["caffe_squeezenet1_1"] = Architecture(
        CaffeSqueezeNet, "Iandola et al. 2016", cam_node="fire9", interpolation="bicubic"
    )
    table["densenet121"] = Architecture(
        functools.partial(DenseNet, 121), "Huang et al. 2017", cam_node="features.norm5"
    )
    table["mobilenet_v2"] = Architecture(MobileNetV2, "Sandler et al. 2018", cam_node="features.18")
    for variant, (_, _, size) in SCALES.items():
        table[f"efficientnet_lite{variant}"] = Architecture(
            functools.partial(EfficientNetLite, variant),
            "Tan and Le 2019",
            image_size=size,
            cam_node="_conv_head",
            interpolation="bicubic",
        )
    for depth in (20, 56):
        build, last = functools.partial(CifarResNet, depth), f"layer3.{(depth - 2) // 6 - 1}"
        table[f"cifar_resnet{depth}"] = _tiny(build, "He et al. 2016", cam_node=last, class_names=_CIFAR10)
    table["cifar_resnet18"] = _tiny(CifarResNet18, "He et al. 2016", cam_node="layer4.1", class_names=_CIFAR10)
    table["cifar10_cnn"] = _tiny(Cifar10CNN, "the package cifar-10-model", class_names=_CIFAR10)
    mnist, cifar = (functools.partial(Carlini, dataset) for dataset in ("mnist", "cifar"))
    table["carlini_mnist"] = _tiny(mnist, "Carlini and Wagner 2017", 28, channels=1, class_names=_DIGITS)
    table["carlini_cifar"] = _tiny(cifar, "Carlini and Wagner 2017", class_names=_CIFAR10)
    for name, build, reference, node in (
        ("meso", MesoNet, "Afchar et al. 2018", None),
        ("residual", ResidualDetector, "He et al. 2016", "block3"),
        ("separable", SeparableDetector, "Chollet 2017", "sep3"),
    ):
        table[f"detector_{name}"] = Architecture(
            build,
            reference,
            DETECTED,
            cam_node=node,
            crop_pct=1.0,
            classes=len(REAL_OR_GENERATED),
            class_names=REAL_OR_GENERATED,
        )
    table["small_cnn"] = _tiny(SmallCNN, "Zhou et al. 2016", cam_node="conv3")
    return table


ARCHITECTURES: dict[str, Architecture] = _architectures()


@dataclasses.dataclass(frozen=True)
class Module:
    """An NNX module as a pure function of a flat dict of parameters, `{"_fc.weight": array, ...}`."""

    graphdef: Any

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """A graph definition walks through all its modules for it, every time, and every call of a network asks."""
        return hash(self.graphdef)

    def __call__(self, params, images, tap):
        return nnx.merge(self.graphdef, _nested(params))(images, tap)

    def in_training(self, params, images, tap=identity, *, momentum: float = 0.1):
        """Logits with the batch's own means and variances in every batch norm, and the new running statistics.

        Args:
            params: a flat dict.
            images: [B,H,W,C] in [0, 1].
            tap: see `Network`.
            momentum: how far the running statistics follow those of the batch.

        Returns:
            logits [B,K], and the running statistics by name; none in a network without batch norm. The given parameters
            stay as they are.
        """
        module = nnx.merge(self.graphdef, _nested(params))
        module.set_attributes(use_running_average=False, momentum=momentum, raise_if_not_found=False)
        logits = module(images, tap)
        found = nnx.to_flat_state(nnx.state(module, nnx.BatchStat))
        return logits, {".".join(map(str, path)): leaf[...] for path, leaf in found}


def architecture(name: str) -> Architecture:
    """The architecture called `name`. Raises ValueError, with the closest names, where there is none."""
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown model {name!r}{suggest(name, ARCHITECTURES)}")
    return ARCHITECTURES[name]


@functools.cache
def network(name: str, classes: int | None = None) -> Network:
    """The network called `name`, without parameters.

    Args:
        name: the architecture.
        classes: number of classes; None means the architecture's own. Classes bear the names of ImageNet, CIFAR-10
            or digits where the architecture is for these and the number is theirs.

    Raises:
        ValueError: unknown name.
    """
    entry = architecture(name)
    classes = entry.classes if classes is None else classes
    module = _abstract(name, classes)
    names = imagenet_classes() if entry.classes == 1000 else entry.class_names
    return Network(
        name=name,
        apply=Module(nnx.graphdef(module)),
        nodes=module.nodes(),
        image_size=entry.image_size,
        classes=names if classes == len(names) else classes,
        cam_node=entry.cam_node,
        crop_pct=entry.crop_pct,
        interpolation=entry.interpolation,
    )


@functools.cache
def shapes(name: str, classes: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Name, shape and dtype of every parameter and running statistic, as `network` has them.

    Raises:
        ValueError: unknown name.
    """
    entry = architecture(name)
    state = nnx.state(_abstract(name, entry.classes if classes is None else classes))
    return {
        ".".join(map(str, path)): jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
        for path, leaf in nnx.to_flat_state(state)
    }


def init(name: str, key: jax.Array, classes: int | None = None) -> dict[str, jax.Array]:
    """Random parameters, for tests and training. Raises ValueError for an unknown name."""
    entry = architecture(name)
    seed = jax.random.key_data(key).astype(np.uint32)
    module = entry.build(entry.classes if classes is None else classes, rngs=nnx.Rngs(int(seed.ravel()[-1])))
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(module))}


class _OneKey(nnx.Rngs):
    """Gives the same key every time, which does for shapes; to count keys under a trace takes quadratic time."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


@functools.cache
def _abstract(name: str, classes: int) -> Any:
    """The module with shapes in place of arrays."""
    return nnx.eval_shape(lambda: architecture(name).build(classes, rngs=_OneKey(0)))


@functools.cache
def imagenet_classes() -> tuple[str, ...]:
    """The 1,000 class names of ImageNet-1k, in the usual order."""
    text = importlib.resources.files("jaxinterp.models").joinpath("imagenet.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def _nested(params: dict[str, Any]) -> dict[Any, Any]:
    nested: dict[Any, Any] = {}
    for name, value in params.items():
        *path, last = (int(part) if part.isdigit() else part for part in name.split("."))
        level = nested
        for part in path:
            level = level.setdefault(part, {})
        level[last] = value
    return nested
