"""Class activation maps (Zhou et al. 2016, arXiv 1512.04150): where in an image a network sees a class.

For a network that ends in the mean over the u positions of a feature map f and one linear layer w,

    F(x, c)_i = (1/u) sum_k w_k^c f_k(x)_i,     sum_i F(x, c)_i = Z(x)_c - bias_c

Features are computed once, and the weights come from a gradient of the head alone, so that any number of classes
costs one forward pass and one small backward pass each.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinterp.attacks.driver import check
from jaxinterp.canonical import canonical
from jaxinterp.network import Network, Params, features, head, suggest

METHODS = ("cam",)


def maps(
    network: Network,
    params: Params,
    images: Any,
    classes: Any,
    method: str = "cam",
    node: str | None = None,
) -> Float[Array, "b *n h w"]:
    """Raw class activation maps at the resolution of the feature map: no ReLU, no scaling.

    Args:
        network: the network.
        params: its parameters.
        images: [B,H,W,C] float in [0, 1].
        classes: [B], one class for each image, or [B,n], several.
        method: "cam".
        node: the feature map; None means the network's `cam_node`, the only one for which "cam" is defined.

    Returns:
        [B,h,w], or [B,n,h,w] for several classes.

    Raises:
        ValueError: an unknown method or node; a network that does not end in global average pooling and one linear
            layer; classes out of range; images as in `jaxinterp.attacks.run`.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}{suggest(method, METHODS)}")
    if network.cam_node is None:
        raise ValueError(
            f"{network.name} has no cam_node: class activation maps need a network that ends in global average "
            "pooling and one linear layer"
        )
    node = network.cam_node if node is None else network.check_node(node)
    if node != network.cam_node:
        raise ValueError(f'method "cam" is defined for node {network.cam_node!r} of {network.name}, not {node!r}')
    classes = jnp.asarray(classes)
    if classes.ndim not in (1, 2) or 0 in classes.shape[1:] or not jnp.issubdtype(classes.dtype, jnp.integer):
        raise ValueError(f"classes must be integers [B] or [B,n], got {classes.dtype} of shape {classes.shape}")
    model = network.bind(params)
    several = classes if classes.ndim == 2 else classes[:, None]
    for column in range(several.shape[1]):
        images, _, _, _ = check(model, images, several[:, column], names=("images", "classes"))
    result = _cam(network, node)(params, images, several)
    return result if classes.ndim == 2 else result[:, 0]


@functools.cache
def _cam(network: Network, node: str):
    @canonical
    def program(params, images, classes):
        activation = features(network, params, images, node)
        logits, pull_back = jax.vjp(lambda f: head(network, params, node, f, images), activation)

        def of_class(c):
            # The head is linear in the mean, so its gradient is w_k / u at every position.
            (weights,) = pull_back(jax.nn.one_hot(c, logits.shape[-1], dtype=logits.dtype))
            return jnp.sum(weights * activation, axis=-1)

        return jax.vmap(of_class, in_axes=1, out_axes=1)(classes)

    return jax.jit(program)


def resize(maps: Float[Array, "*n h w"], size: int | tuple[int, int]) -> Float[Array, "*n H W"]:
    """Maps at `size` pixels (a side, or height and width) by half-pixel bilinear interpolation."""
    height, width = (size, size) if isinstance(size, int) else size
    return jax.image.resize(maps, (*maps.shape[:-2], height, width), method="bilinear", antialias=False)
