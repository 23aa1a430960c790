"""Class activation maps: where in an image a network sees a class.

For a network that ends in the mean over the u positions of a feature map f and one linear layer w (Zhou et al. 2016,
arXiv 1512.04150),

    F(x, c)_i = (1/u) sum_k w_k^c f_k(x)_i,     sum_i F(x, c)_i = Z(x)_c - bias_c

and for any node of any network, with G = dZ_c / df, sums and means over positions i:

    gradcam       sum_k mean(G_k) f_k                                  Selvaraju et al. 2017, arXiv 1610.02391
    gradcam++     sum_k sum(a_k relu(G_k)) f_k,                        Chattopadhay et al. 2018, arXiv 1710.11063
                  a_k = G_k^2 / (2 G_k^2 + sum(f_k) G_k^3)
    xgradcam      sum_k (sum(G_k f_k) / sum(f_k)) f_k                  Fu et al. 2020, arXiv 2008.02312
    hirescam      sum_k G_k f_k                                        Draelos and Carin 2020, arXiv 2011.08891
    layercam      sum_k relu(G_k) f_k                                  Jiang et al. 2021, TIP
    eigencam      f projected on its first principal component         Muhammad and Yeasin 2020, arXiv 2008.00299
    scorecam      sum_k softmax_k(Z_c(x * unit(upsampled f_k))) f_k    Wang et al. 2020, arXiv 1910.01279
    ablationcam   sum_k ((Z_c - Z_c without unit k) / Z_c) f_k         Desai and Ramaswamy 2020, WACV

All are returned raw: without the final ReLU and scaling that most of the papers apply to show them. Features are
computed once, and gradients are those of the head alone, so that any number of classes costs one forward pass and one
small backward pass each; scorecam costs a forward pass for each unit, ablationcam one of the head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxinterp.attacks.driver import check_several
from jaxinterp.canonical import canonical
from jaxinterp.network import Network, Params, capture, features, head, suggest
from jaxinterp.sharding import with_automatic_axes

_TINY = 1e-12
_PLUS = 1e-6  # in the denominator of Grad-CAM++, as in pytorch-grad-cam; where gradients are small it decides


@with_automatic_axes
def maps(
    network: Network,
    params: Params,
    images: Any,
    classes: Any,
    method: str = "cam",
    node: str | None = None,
) -> Float[Array, "b *n h w"]:
    """Raw class activation maps at the resolution of the feature map: no final ReLU, no scaling.

    Args:
        network: the network.
        params: its parameters.
        images: [B,H,W,C] float in [0, 1].
        classes: [B], one class for each image, or [B,n], several.
        method: one of `METHODS`.
        node: the feature map; None means the network's `cam_node`, or where it has none its last feature map of more
            than one position. "cam" is defined for the `cam_node` only.

    Returns:
        [B,h,w], or [B,n,h,w] for several classes. The map of "eigencam" does not depend on the class; its sign is
        the one with the larger extreme.

    Raises:
        ValueError: an unknown method or node; "cam" of a network that does not end in global average pooling and one
            linear layer; a network without nodes; classes out of range; images as in `jaxinterp.attacks.run`.
    """
    check_method(network, method, node)
    images, several = check_several(network.bind(params), images, classes)
    if node is None:
        node = network.cam_node or _last_map(network, params, images)
    result = _program(network, method, node)(params, images, several)
    return result if np.ndim(classes) == 2 else result[:, 0]


def check_method(network: Network, method: str, node: str | None = None) -> None:
    """Raises ValueError as `maps` where method, node and network do not fit together."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}{suggest(method, METHODS)}")
    if method == "cam" and network.cam_node is None:
        raise ValueError(
            f"{network.name} has no cam_node: class activation maps in the original sense need a network that ends in "
            f"global average pooling and one linear layer; the others do not: {', '.join(METHODS[1:])}"
        )
    if node is not None:
        network.check_node(node)
        if method == "cam" and node != network.cam_node:
            raise ValueError(f'method "cam" is defined for node {network.cam_node!r} of {network.name}, not {node!r}')
    elif network.cam_node is None and not network.nodes:
        raise ValueError(f"{network.name} has no nodes: nothing passes through its tap")


def _last_map(network: Network, params: Params, images: Float[Array, "b H W c"]) -> str:
    leaves, treedef = jax.tree.flatten((params, images[:1]))
    specs = tuple(jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    return _last_map_of(network, treedef, specs)


@functools.cache
def _last_map_of(network: Network, treedef, specs) -> str:
    def every(params, images):
        return capture(network, params, images, network.nodes)[1]

    shapes = jax.eval_shape(every, *jax.tree.unflatten(treedef, specs))
    large = [name for name, x in shapes.items() if x.ndim == 4 and x.shape[1] * x.shape[2] > 1]
    return large[-1] if large else network.nodes[-1]


@functools.cache
def _program(network: Network, method: str, node: str):
    @canonical
    def program(params, images, classes):
        activation = features(network, params, images, node)
        if activation.ndim != 4:
            raise ValueError(f"node {node!r} of {network.name} is no feature map [B,h,w,C]: shape {activation.shape}")

        def logits_of(maps):
            return head(network, params, node, maps, images)

        if method in _WITHOUT_GRADIENT:
            return _WITHOUT_GRADIENT[method](activation, classes, images, logits_of, network.bind(params))
        logits, pull_back = jax.vjp(logits_of, activation)

        def of_class(c):
            (gradient,) = pull_back(jax.nn.one_hot(c, logits.shape[-1], dtype=logits.dtype))
            return _BY_GRADIENT[method](activation, gradient)

        return jax.vmap(of_class, in_axes=1, out_axes=1)(classes)

    return jax.jit(program)


def _positions(values: Float[Array, "b h w c"]) -> Float[Array, "b 1 1 c"]:
    return jnp.sum(values, axis=(1, 2), keepdims=True)


def _weighted(activation: Float[Array, "b h w c"], weights: Array) -> Float[Array, "b h w"]:
    """Weights [B,h,w,C] or [B,1,1,C]."""
    return jnp.sum(weights * activation, axis=-1)


def _gradcam(activation, gradient):
    return _weighted(activation, jnp.mean(gradient, axis=(1, 2), keepdims=True))


def _gradcam_plus_plus(activation, gradient):
    below = 2 * jnp.square(gradient) + _positions(activation) * gradient**3 + _PLUS
    share = jnp.where(gradient != 0, jnp.square(gradient) / (below + _below(below)), 0)
    return _weighted(activation, _positions(share * jnp.maximum(gradient, 0)))


def _xgradcam(activation, gradient):
    below = _positions(activation)
    return _weighted(activation, _positions(gradient * activation) / (below + _below(below)))


def _below(values):
    """What keeps a denominator from zero."""
    return jnp.where(jnp.abs(values) < _TINY, _TINY, 0)


# The last is CAM itself: the head is linear in the mean, so that its gradient is w_k / u at every position.
_BY_GRADIENT: dict[str, Callable[..., Any]] = {
    "gradcam": _gradcam,
    "gradcam++": _gradcam_plus_plus,
    "xgradcam": _xgradcam,
    "hirescam": _weighted,
    "layercam": lambda activation, gradient: _weighted(activation, jnp.maximum(gradient, 0)),
    "cam": _weighted,
}


def _eigencam(activation, classes, images, logits_of, model):
    flat = activation.reshape(activation.shape[0], -1, activation.shape[-1])
    flat = flat.astype(jnp.promote_types(flat.dtype, jnp.float32))  # there is no decomposition in less
    centred = flat - jnp.mean(flat, axis=1, keepdims=True)
    _, _, components = jnp.linalg.svd(centred, full_matrices=False)
    projection = jnp.sum(centred * components[:, :1], axis=-1).reshape(activation.shape[:-1])
    # A principal component has no sign of its own.
    high, low = jnp.max(projection, axis=(1, 2), keepdims=True), jnp.min(projection, axis=(1, 2), keepdims=True)
    projection = jnp.where(-low > high, -projection, projection)
    return jnp.broadcast_to(projection[:, None], (*classes.shape, *projection.shape[1:]))


def _by_unit(activation, classes, score):
    """`score(k) [B,K]` of every unit, for the given classes: [B,n,U]. One unit after the other."""
    scores = lax.map(score, jnp.arange(activation.shape[-1]))
    return jnp.moveaxis(jnp.take_along_axis(scores, classes[None], axis=2), 0, 2)


def _sum_of_units(activation, weights):
    return jnp.sum(weights[:, :, None, None, :] * activation[:, None], axis=-1)


def _scorecam(activation, classes, images, logits_of, model):
    def masked(k):
        unit = resize(activation[..., k], images.shape[1:3])
        low, high = jnp.min(unit, axis=(1, 2), keepdims=True), jnp.max(unit, axis=(1, 2), keepdims=True)
        return model(images * ((unit - low) / jnp.maximum(high - low, _TINY))[..., None])

    return _sum_of_units(activation, jax.nn.softmax(_by_unit(activation, classes, masked), axis=-1))


def _ablationcam(activation, classes, images, logits_of, model):
    whole = jnp.take_along_axis(logits_of(activation), classes, axis=1)[..., None]

    def without(k):
        return logits_of(jnp.where(jnp.arange(activation.shape[-1]) == k, 0, activation))

    drop = whole - _by_unit(activation, classes, without)
    return _sum_of_units(activation, drop / (whole + _below(whole)))


_WITHOUT_GRADIENT: dict[str, Callable[..., Any]] = {
    "eigencam": _eigencam,
    "scorecam": _scorecam,
    "ablationcam": _ablationcam,
}

METHODS = ("cam", *(name for name in _BY_GRADIENT if name != "cam"), *_WITHOUT_GRADIENT)


def normalised(maps: Float[Array, "*n h w"]) -> Float[Array, "*n h w"]:
    """Every map shifted and scaled to [0, 1]; zero where it is constant."""
    low, high = jnp.min(maps, axis=(-2, -1), keepdims=True), jnp.max(maps, axis=(-2, -1), keepdims=True)
    return (maps - low) / jnp.maximum(high - low, _TINY)


def resize(maps: Float[Array, "*n h w"], size: int | tuple[int, int]) -> Float[Array, "*n H W"]:
    """Maps at `size` pixels (a side, or height and width) by half-pixel bilinear interpolation."""
    height, width = (size, size) if isinstance(size, int | np.integer) else size
    return jax.image.resize(maps, (*maps.shape[:-2], height, width), method="bilinear", antialias=False)
