"""Networks as pure functions with named feature maps.

A `Network` is a small frozen record around one function, `apply(params, images, tap) -> logits`. The function
passes every named feature map through the tap, `x = tap("layer4.2", x)`, and goes on with what the tap returns.
That single hook captures, replaces, masks and perturbs feature maps; under `jax.jit` whatever the result does not
depend on is removed from the compiled program.

Images are float32 in [0, 1], NHWC. Preprocessing (mean, standard deviation, order of channels, padding) is part of
`apply`, so that perturbations are measured in pixel units whatever the network.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

Params = Any
Tap = Callable[[str, Any], Any]


@runtime_checkable
class Model(Protocol):
    """Anything that maps images [B,H,W,C] to logits [B,K]."""

    def __call__(self, images: Any, /) -> Any: ...


def identity(name: str, x: Any) -> Any:
    """The tap that changes nothing."""
    return x


@dataclasses.dataclass(frozen=True)
class _Untapped:
    """A user's `function(params, images)` without feature maps, under the three-argument signature."""

    function: Callable

    def __call__(self, params, images, tap=identity):
        return self.function(params, images)


@dataclasses.dataclass(frozen=True)
class _Logits:
    """`apply` with the identity tap; comparable, so that two bindings of one network share compiled programs."""

    apply: Callable

    def __call__(self, params, images):
        return self.apply(params, images, identity)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network as a pure function with named feature maps.

    Attributes:
        name: how tables and messages call it.
        apply: `apply(params, images, tap) -> logits`, with images [B,H,W,C] float32 in [0, 1], logits [B,K] and
            `tap(node, x) -> x` called once for every name in `nodes`. A function without feature maps may leave
            the tap out.
        nodes: names of the feature maps, in the order in which they are computed.
        image_size: side of the square input, in pixels.
        classes: the number of classes, or their names. There may be more logits (see `jaxinterp.ensemble`).
        cam_node: the node whose spatial mean feeds one linear layer that gives the logits; None where the network
            does not end that way (class activation maps in the original sense exist only there).
        crop_pct: published evaluation crop: the short side is resized to `image_size / crop_pct` before the
            centre crop.
        interpolation: filter of that resize, by PIL's name in lower case.

    Raises:
        ValueError: a node is named twice, `cam_node` is not among `nodes`, or there are no classes.
        TypeError: `apply` cannot be called as described, or one text stands for the names of nodes or classes.
    """

    name: str
    apply: Callable[..., Any]
    nodes: tuple[str, ...] = ()
    image_size: int = 224
    classes: int | tuple[str, ...] = 1000
    cam_node: str | None = None
    crop_pct: float = 0.875
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if not callable(self.apply):
            raise TypeError(f"apply must be a function of (params, images, tap), got {type(self.apply).__name__}")
        if isinstance(self.nodes, str) or isinstance(self.classes, str):
            raise TypeError(f"nodes and classes of {self.name} must be tuples of names, got one text")
        object.__setattr__(self, "nodes", tuple(self.nodes))
        whole = hasattr(self.classes, "__index__")  # numpy's integers too
        object.__setattr__(self, "classes", operator.index(self.classes) if whole else tuple(self.classes))  # type: ignore[arg-type]  # names
        if self.num_classes < 1:
            raise ValueError(f"classes of {self.name}: expected at least one, got {self.classes}")
        if len(set(self.nodes)) != len(self.nodes):
            raise ValueError(f"nodes of {self.name} are not unique: {self.nodes}")
        if self.cam_node is not None:
            self.check_node(self.cam_node, argument="cam_node")
        if not _takes_tap(self.apply, bool(self.nodes)):
            if self.nodes:
                raise TypeError(f"apply of {self.name} takes no tap, so its nodes cannot be reached: {self.nodes}")
            object.__setattr__(self, "apply", _Untapped(self.apply))

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return self.classes if isinstance(self.classes, int) else len(self.classes)

    def class_name(self, index: int) -> str:
        """Name of class `index`, "class INDEX" where the network has no names; "none" of a logit beyond the classes."""
        if int(index) >= self.num_classes:
            return "none"
        return f"class {int(index)}" if isinstance(self.classes, int) else self.classes[int(index)]

    def bind(self, params: Params) -> Partial:
        """The model `images -> logits`: a pytree with the params as leaves, so jit does not see constants."""
        return Partial(_Logits(self.apply), params)

    def check_node(self, node: str, *, argument: str = "node") -> str:
        """Returns `node`.

        Raises:
            ValueError: the network has no such node; the message names the closest ones.
        """
        if node not in self.nodes:
            raise ValueError(f"{argument}: {self.name} has no node {node!r}{suggest(node, self.nodes)}")
        return node


def _takes_tap(function: Callable, nodes: bool) -> bool:
    """Whether the third argument is the tap. In a function without nodes an optional one may be anything."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return True
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) >= 3:
        third = positional[2]
        return nodes or third.name == "tap" or third.default is third.empty
    return any(p.kind is p.VAR_POSITIONAL for p in parameters)


def suggest(given: str, known: Iterable[str]) -> str:
    """The tail of an error message about an unknown name: the closest known ones, or all of them if few."""
    known = list(known)
    close = difflib.get_close_matches(str(given), known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    shown = ", ".join(known[:24]) + (f", ... ({len(known)} in all)" if len(known) > 24 else "")
    return f"; known: {shown}" if known else "; it has none"


# Taps


def replace(values: dict[str, Any]) -> Tap:
    """The tap that puts `values[node]` in place of each named feature map."""

    def tap(name, x):
        return jnp.broadcast_to(values[name], x.shape).astype(x.dtype) if name in values else x

    return tap


def mask(masks: dict[str, Any]) -> Tap:
    """The tap that multiplies each named feature map by `masks[node]` (units [U], or anything that broadcasts)."""

    def tap(name, x):
        return x * jnp.asarray(masks[name], x.dtype) if name in masks else x

    return tap


def perturb(deltas: dict[str, Any]) -> Tap:
    """The tap that adds `deltas[node]` to each named feature map."""

    def tap(name, x):
        return x + jnp.asarray(deltas[name], x.dtype) if name in deltas else x

    return tap


def compose(*taps: Tap) -> Tap:
    """The tap that applies `taps` from left to right."""

    def tap(name, x):
        for each in taps:
            x = each(name, x)
        return x

    return tap


# What taps are for


def capture(
    network: Network,
    params: Params,
    images: Float[Array, "b h w c"],
    nodes: Sequence[str],
    *,
    tap: Tap = identity,
) -> tuple[Float[Array, "b k"], dict[str, Array]]:
    """Logits and the named feature maps, in one forward pass.

    Args:
        network: the network.
        params: its parameters.
        images: in [0, 1].
        nodes: names of feature maps; with jit, leave the logits unused and everything behind the last named node
            is compiled away.
        tap: applied before the maps are read.

    Returns:
        logits [B,K], and a dict from node to its feature map, in the order of `nodes`.

    Raises:
        ValueError: an unknown node, or one that `apply` never passed to its tap.
    """
    for node in nodes:
        network.check_node(node)
    seen: dict[str, Array] = {}

    def reading(name, x):
        x = tap(name, x)
        if name in nodes:
            seen[name] = x
        return x

    logits = network.apply(params, images, reading)
    for node in nodes:
        if node not in seen:
            raise ValueError(f"apply of {network.name} never passed the node {node!r} to its tap")
    return logits, {node: seen[node] for node in nodes}


def features(network: Network, params: Params, images: Float[Array, "b h w c"], node: str) -> Array:
    """The feature map of one node. Raises ValueError for an unknown node."""
    return capture(network, params, images, [node])[1][node]


def head(
    network: Network, params: Params, node: str, maps: Array, images: Float[Array, "b h w c"]
) -> Float[Array, "b k"]:
    """Logits as a function of the feature map of `node`: what lies behind it, applied to `maps`.

    Args:
        network: the network.
        params: its parameters.
        node: name of the feature map.
        maps: values of that feature map, as `features` returns them.
        images: the images that feed whatever bypasses the node; in a network where nothing does, only their
            shape matters and the part before the node is compiled away.

    Raises:
        ValueError: an unknown node.
    """
    network.check_node(node)
    return network.apply(params, images, replace({node: maps}))


# Any callable as a model


@dataclasses.dataclass(frozen=True)
class _Rebuild:
    """The static part of a callable pytree: its structure and the leaves that are not arrays."""

    treedef: Any
    static: tuple[Any, ...]

    def __call__(self, arrays, images):
        leaves = [s if a is None else a for s, a in zip(self.static, arrays, strict=True)]
        return jax.tree.unflatten(self.treedef, leaves)(images)


def as_model(model: Model) -> Partial:
    """Any callable `images -> logits` as a pytree that crosses jit without its arrays becoming constants.

    A bound network is returned as it is. Of a callable pytree (an Equinox or NNX module) the arrays become leaves;
    of a plain function nothing does, and its closure is compiled in.

    Raises:
        TypeError: `model` cannot be called.
    """
    if isinstance(model, Partial):
        return model
    if not callable(model):
        raise TypeError(f"model must be a callable images -> logits, got {type(model).__name__}")
    leaves, treedef = jax.tree.flatten(model)
    arrays = [isinstance(leaf, jax.Array) or hasattr(leaf, "__array__") for leaf in leaves]
    static = tuple(None if dynamic else leaf for leaf, dynamic in zip(leaves, arrays, strict=True))
    return Partial(_Rebuild(treedef, static), [leaf if d else None for leaf, d in zip(leaves, arrays, strict=True)])
