"""An ensemble: a network made of networks, which every attack, map and effect takes like any other.

Images are those of the ensemble; a member of another input size gets them resized, bilinearly and differentiably, and
does its own preprocessing. With weights w_i that sum to one, logits Z^i and p^i = softmax(Z^i) of the members, the
logits of the ensemble are

    "logits"    Z_c = sum_i w_i Z^i_c
    "losses"    Z_c = sum_i w_i log p^i_c,   Z_none = log(1 - sum_c exp Z_c)

The mean of the logits differs from the mean of the log-probabilities by a number that is the same for all classes,
which no attack sees: softmax of both is the members' weighted geometric mean, normalised. So its cross-entropy is not
the mean of the members' but

    CE(Z, c) = sum_i w_i CE(Z^i, c) - D,   D = -log sum_c prod_i (p^i_c)^w_i >= 0

with D the members' disagreement, which does not depend on the class (differences between classes, and so the margins of
Carlini and Wagner, are exact means). No logits of K classes have the mean of the losses as their cross-entropy for
every class, because the geometric means of probabilities sum to exp(-D). "losses" gives what is missing to one more
class, of no name, that stands for none of them. Then softmax(Z)_c = prod_i (p^i_c)^w_i and

    CE(Z, c) = sum_i w_i CE(Z^i, c)

exactly: attacks that lower cross-entropy lower x* = argmin mean_i CE(f_i(x*), y*) of the ensemble attack (Dong et al.
2017, arXiv 1708.05493; the two ways of Dong et al. 2018, arXiv 1710.06081, section 3.4). A class is only decided for
where it exceeds "none": where the members agree. So an untargeted success may mean nothing but that they do not, while
every member still sees the true class; with targets it means that the members' geometric mean reaches them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinterp.network import Network, Params, Tap

COMBINE = ("logits", "losses")


@dataclasses.dataclass(frozen=True)
class Members:
    """`apply` of an ensemble; comparable, so that two bindings of one ensemble share compiled programs.

    Attributes:
        networks: the members.
        names: what distinguishes them.
        weights: one for each, with the sum one.
        combine: "logits" or "losses".
        size: side of the ensemble's images.
    """

    networks: tuple[Network, ...]
    names: tuple[str, ...]
    weights: tuple[float, ...]
    combine: str
    size: int

    def __call__(self, params: Params, images: Float[Array, "b h w c"], tap: Tap) -> Float[Array, "b k"]:
        """Logits [B,K], or [B,K+1] for "losses". The members' nodes are called MEMBER/NODE."""
        logits = []
        for name, network in zip(self.names, self.networks, strict=True):
            seen = images if network.image_size == self.size else resized(images, network.image_size)
            logits.append(network.apply(params[name], seen, lambda node, x, name=name: tap(f"{name}/{node}", x)))
        if self.combine == "logits":
            return sum(w * z for w, z in zip(self.weights, logits, strict=True))  # type: ignore[return-value]
        return _of_losses([jax.nn.log_softmax(z) for z in logits], self.weights)


def of(
    members: Sequence[tuple[Network, Params]],
    *,
    weights: Sequence[float | int] | None = None,
    combine: str = "logits",
    image_size: int | None = None,
    name: str | None = None,
) -> tuple[Network, dict[str, Any]]:
    """The network made of several, and its parameters.

    Args:
        members: networks with their parameters, as `jaxinterp.load` returns them. Their numbers of classes must be the
            same, and so must the names of the classes where both have some.
        weights: one for each member, positive; they are divided by their sum. None means equal ones.
        combine: "logits" or "losses", see the module. With "losses" the logits have one column more than there are
            classes.
        image_size: side of the ensemble's images, in pixels; None means the largest of the members'. Crop and filter
            are those of the first member of that size, or else of the first.
        name: how tables call it; None joins the members' names.

    Returns:
        The network and its parameters, a dict from a member's name to that member's. A name that occurs twice is
        followed by `#` and its place. Nodes are called MEMBER/NODE. It has no `cam_node`.

    Raises:
        ValueError: no member, members with different classes, weights that are not positive numbers or not one for each
            member, an unknown way to combine, a size below one.
        TypeError: a member that is not a network with its parameters.
    """
    if not members:
        raise ValueError("members is empty, expected at least one network with its parameters")
    for place, member in enumerate(members):
        if not isinstance(member, tuple) or len(member) != 2 or not isinstance(member[0], Network):
            raise TypeError(f"members[{place}] must be a network with its parameters, got {type(member).__name__}")
    networks = [network for network, _ in members]
    for network in networks[1:]:
        _same_classes(networks[0], network)
    if combine not in COMBINE:
        raise ValueError(f"combine must be one of {', '.join(COMBINE)}, got {combine!r}")
    given = [1.0] * len(networks) if weights is None else [float(w) for w in weights]
    if len(given) != len(networks):
        raise ValueError(f"weights must be one for each of {len(networks)} members, got {len(given)}")
    if not all(math.isfinite(w) and w > 0 for w in given):
        raise ValueError(f"weights must be positive numbers, got {given}")
    size = max(network.image_size for network in networks) if image_size is None else image_size
    if size < 1:
        raise ValueError(f"image_size must be at least 1, got {size}")
    plain = [network.name for network in networks]
    names = [f"{n}#{i}" if plain.count(n) > 1 else n for i, n in enumerate(plain)]
    like = next((network for network in networks if network.image_size == size), networks[0])
    named = next((n.classes for n in networks if not isinstance(n.classes, int)), networks[0].classes)
    apply = Members(tuple(networks), tuple(names), tuple(w / math.fsum(given) for w in given), combine, size)
    whole = Network(
        name="+".join(plain) if name is None else name,
        apply=apply,
        nodes=tuple(f"{n}/{node}" for n, network in zip(names, networks, strict=True) for node in network.nodes),
        image_size=size,
        classes=named,
        crop_pct=like.crop_pct,
        interpolation=like.interpolation,
    )
    return whole, {n: params for n, (_, params) in zip(names, members, strict=True)}


def resized(images: Float[Array, "b h w c"], size: int) -> Float[Array, "b s t c"]:
    """Images of `size` pixels' side: half-pixel bilinear, each pixel a weighted mean where they become smaller.

    It is linear in the images, and keeps constant ones, so that the result is in [0, 1] too.
    """
    batch, _, _, channels = images.shape
    return jax.image.resize(images, (batch, size, size, channels), "bilinear")


def _of_losses(log_p: Sequence[Float[Array, "b k"]], weights: Sequence[float]) -> Float[Array, "b k1"]:
    """sum_i w_i log p^i, and log(1 - sum_c of its exponentials) as one more column."""
    mean = sum(w * l for w, l in zip(weights, log_p, strict=True))
    assert isinstance(mean, jax.Array)
    # 1 - sum_c g_c is the sum over classes of arithmetic less geometric mean, both of p^i_c, each of which is precise:
    # g sum_i w_i (exp(d_i) - 1 - d_i), d_i = log p^i - log g, since sum_i w_i d_i = 0.
    ruled_out = mean == -jnp.inf
    missing = jnp.zeros_like(mean)
    for w, l in zip(weights, log_p, strict=True):
        d = jnp.where(ruled_out, 0.0, l - jnp.where(ruled_out, 0.0, mean))
        near = jnp.abs(d) < 0.5
        small = jnp.where(near, d, 0.0)
        precise = jnp.exp(jnp.where(near, mean, -1.0)) * (jnp.expm1(small) - small)
        plain = jnp.exp(l) - jnp.exp(mean) * jnp.where(near, 1.0, 1.0 + d)
        missing = missing + w * jnp.where(ruled_out, jnp.exp(l), jnp.where(near, precise, plain))
    whole = jnp.sum(jnp.maximum(missing, 0), axis=-1, keepdims=True)
    return jnp.concatenate([mean, jnp.log(jnp.maximum(whole, 1e-30))], axis=-1)


def _same_classes(first: Network, other: Network) -> None:
    if first.num_classes != other.num_classes:
        raise ValueError(
            f"members must have the same classes, but {first.name} has {first.num_classes} and {other.name} "
            f"{other.num_classes}"
        )
    if isinstance(first.classes, int) or isinstance(other.classes, int):
        return
    for place, (a, b) in enumerate(zip(first.classes, other.classes, strict=True)):
        if a != b:
            raise ValueError(
                f"members must have the same classes, but class {place} is {a!r} in {first.name} and {b!r} in "
                f"{other.name}"
            )
