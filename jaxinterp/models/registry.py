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

from jaxinterp.models.efficientnet_lite import SCALES, EfficientNetLite
from jaxinterp.network import Network, suggest


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How to build a network.

    Attributes:
        build: `build(classes, rngs=rngs)` makes the NNX module: `module(images, tap)`, `module.nodes()`.
        image_size: side of the input, in pixels.
        cam_node: see `Network`.
    """

    build: Callable[..., Any]
    image_size: int
    cam_node: str | None


ARCHITECTURES: dict[str, Architecture] = {
    f"efficientnet_lite{variant}": Architecture(
        functools.partial(EfficientNetLite, variant), SCALES[variant][2], "_conv_head"
    )
    for variant in (0, 1, 2)
}


@dataclasses.dataclass(frozen=True)
class Module:
    """An NNX module as a pure function of a flat dict of parameters, `{"_fc.weight": array, ...}`."""

    graphdef: Any

    def __call__(self, params, images, tap):
        return nnx.merge(self.graphdef, _nested(params))(images, tap)


def architecture(name: str) -> Architecture:
    """The architecture called `name`. Raises ValueError, with the closest names, where there is none."""
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown model {name!r}{suggest(name, ARCHITECTURES)}")
    return ARCHITECTURES[name]


@functools.cache
def network(name: str, classes: int = 1000) -> Network:
    """The network called `name`, without parameters; one of 1,000 classes bears ImageNet's class names.

    Raises:
        ValueError: unknown name.
    """
    entry = architecture(name)
    module = nnx.eval_shape(lambda: entry.build(classes, rngs=nnx.Rngs(0)))
    return Network(
        name=name,
        apply=Module(nnx.graphdef(module)),
        nodes=module.nodes(),
        image_size=entry.image_size,
        classes=imagenet_classes() if classes == 1000 else classes,
        cam_node=entry.cam_node,
    )


@functools.cache
def shapes(name: str, classes: int = 1000) -> dict[str, jax.ShapeDtypeStruct]:
    """Name, shape and dtype of every parameter and running statistic. Raises ValueError for an unknown name."""
    entry = architecture(name)
    state = nnx.state(nnx.eval_shape(lambda: entry.build(classes, rngs=nnx.Rngs(0))))
    return {
        ".".join(map(str, path)): jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
        for path, leaf in nnx.to_flat_state(state)
    }


def init(name: str, key: jax.Array, classes: int = 1000) -> dict[str, jax.Array]:
    """Random parameters, for tests and training. Raises ValueError for an unknown name."""
    seed = jax.random.key_data(key).astype(np.uint32)
    module = architecture(name).build(classes, rngs=nnx.Rngs(int(seed.ravel()[-1])))
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(module))}


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
