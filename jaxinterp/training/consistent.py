"""Adversarial training with a consistent loss (Dong et al. 2017, arXiv 1708.05493; 2019, arXiv 1901.09035).

    min CE(f(x), y) + CE(f(x*), y) + beta ||phi(x) - phi(x*)||^2

with x* by FGSM at a distance eps that is drawn for every example in every step, and phi the last feature map. beta = 0
is adversarial training. What follows are losses for `jaxinterp.training.loop.fit`.

Batch norm is frozen as it is everywhere else, or works as in training (`batch_norm="batch"`): x and x* then are one
batch of 2B images, normalised by its statistics, which the running ones follow; x* is made with the running ones.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxinterp.attacks import FGSM
from jaxinterp.attacks.attack import Real
from jaxinterp.network import Network, Params, capture
from jaxinterp.training.loop import Loss, Outcome

BATCH_NORM = ("frozen", "batch")


def standard(network: Network, *, batch_norm: str = "frozen") -> Loss:
    """CE(f(x), y), with the accuracy as a metric.

    Raises:
        ValueError: as `consistent`.
        TypeError: as `consistent`.
    """
    _check_batch_norm(network, batch_norm)

    def loss(params: Params, images: Float[Array, "b h w c"], labels: Int[Array, " b"], keys: Any) -> Outcome:
        logits, _, statistics = _forward(network, params, images, None, batch_norm)
        return Outcome(_cross_entropy(logits, labels), {"accuracy": _correct(logits, labels)}, statistics)

    return loss


def consistent(
    network: Network,
    *,
    beta: float,
    eps: tuple[float, float],
    node: str | None = None,
    batch_norm: str = "frozen",
) -> Loss:
    """CE(f(x), y) + CE(f(x*), y) + beta ||phi(x) - phi(x*)||^2.

    The squared norm is the sum over all entries of the feature map. x* is not differentiated.

    Args:
        network: the network.
        beta: weight of the consistent loss; 0 is adversarial training.
        eps: the bounds between which eps is uniform, in pixel units of [0, 1].
        node: phi; None means the network's `cam_node`, or else its last node.
        batch_norm: see the module.

    Returns:
        The loss, with the metrics accuracy, "adversarial accuracy" (of x*) and "distance" (the squared norm).

    Raises:
        ValueError: a negative beta, bounds out of order or [0, 1], an unknown node, a network without nodes, an unknown
            `batch_norm`.
        TypeError: batch norm as in training of a network that is not one of `jaxinterp.models`.
    """
    if not beta >= 0:
        raise ValueError(f"beta must not be negative, got {beta}")
    low, high = eps
    if not 0 <= low <= high <= 1 or high == 0:
        raise ValueError(f"eps must be two bounds with 0 <= low <= high <= 1 and high above 0, got {eps}")
    if not network.nodes:
        raise ValueError(f"{network.name} has no nodes, and so no last feature map")
    chosen = network.check_node(node) if node is not None else network.cam_node or network.nodes[-1]
    _check_batch_norm(network, batch_norm)

    def loss(params: Params, images: Float[Array, "b h w c"], labels: Int[Array, " b"], keys: Any) -> Outcome:
        lengths = jax.vmap(lambda key: jax.random.uniform(key, minval=low, maxval=high))(keys)
        attacked = fast_gradient(network, params, images, labels, lengths)
        # Side by side, so that both images of an example stay on its device.
        both = jnp.stack([images, attacked], axis=1)
        logits, phi, statistics = _forward(network, params, both.reshape(-1, *images.shape[1:]), chosen, batch_norm)
        clean, adversarial = jnp.moveaxis(logits.reshape(len(images), 2, -1), 1, 0)
        assert phi is not None
        maps = phi.reshape(len(images), 2, -1)
        distance = jnp.sum(jnp.square(maps[:, 0] - maps[:, 1]), axis=-1)
        losses = _cross_entropy(clean, labels) + _cross_entropy(adversarial, labels) + beta * distance
        metrics = {
            "accuracy": _correct(clean, labels),
            "adversarial accuracy": _correct(adversarial, labels),
            "distance": distance,
        }
        return Outcome(losses, metrics, statistics)

    return loss


def fast_gradient(
    network: Network,
    params: Params,
    images: Float[Array, "b h w c"],
    labels: Int[Array, " b"],
    eps: Real,
) -> Float[Array, "b h w c"]:
    """clip(x + eps sign grad CE(f(x), y)), whether or not it changes the class; not differentiated.

    `attacks.FGSM` returns it only where it succeeds.
    """
    attack = FGSM(eps=jnp.broadcast_to(jnp.asarray(eps, jnp.float32), labels.shape))
    model = network.bind(jax.lax.stop_gradient(params))
    state = attack.init(model, jax.lax.stop_gradient(images), labels, None, None)
    return jax.lax.stop_gradient(attack.step(model, state).images)


def _forward(network, params, images, node, batch_norm):
    """Logits, the feature map of `node`, and new running statistics."""
    seen = {}

    def reading(name, x):
        if name == node:
            seen[name] = x
        return x

    if batch_norm == "batch":
        logits, statistics = network.apply.in_training(params, images, reading)
        return logits, seen.get(node), statistics
    logits, maps = capture(network, params, images, [] if node is None else [node])
    return logits, None if node is None else maps[node], {}


def _check_batch_norm(network: Network, batch_norm: str) -> None:
    if batch_norm not in BATCH_NORM:
        raise ValueError(f"batch_norm must be one of {', '.join(BATCH_NORM)}, got {batch_norm!r}")
    if batch_norm == "batch" and not hasattr(network.apply, "in_training"):
        raise TypeError(f'batch_norm="batch" takes a network of jaxinterp.models, got {network.name}')


def _cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _correct(logits, labels):
    return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
