"""Networks without some of their units, and what that does to accuracy.

Units are silenced by setting their feature map to zero through the tap. Which are silenced is an input of the compiled
program, so a curve over any number of units needs one program.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxinterp.canonical import canonical
from jaxinterp.network import Network, Params, compose, features, head, identity, mask


def masked(network: Network, node: str) -> Network:
    """The network whose parameters are a dict: the original `params`, and `keep` [U], 1 or 0 for each unit.

    It can be attacked like any other: `masked(network, node).bind({"params": params, "keep": keep})`.

    Raises:
        ValueError: an unknown node.
    """
    network.check_node(node)
    return Network(
        name=f"{network.name}, masked at {node}",
        apply=functools.partial(_apply, network, node),
        nodes=network.nodes,
        image_size=network.image_size,
        classes=network.classes,
        cam_node=network.cam_node,
        crop_pct=network.crop_pct,
        interpolation=network.interpolation,
    )


def _apply(network: Network, node: str, params: Params, images: Any, tap: Any = identity) -> Any:
    return network.apply(params["params"], images, compose(mask({node: params["keep"]}), tap))


def keep(order: Sequence[int] | np.ndarray, number: int, units: int) -> np.ndarray:
    """float32 [units]: 0 for the first `number` units of `order`, 1 for the others.

    Raises:
        TypeError: units that are not integers.
        ValueError: fewer units in `order` than `number`, or a unit that does not exist or comes twice.
    """
    chosen = np.asarray(order)
    if chosen.size and not np.issubdtype(chosen.dtype, np.integer):
        raise TypeError(f"order: expected the numbers of units, got {chosen.dtype}")
    chosen = chosen.astype(np.int64)
    if not 0 <= number <= len(chosen):
        raise ValueError(f"number: expected 0 to {len(chosen)} units, got {number}")
    if len(np.unique(chosen)) != len(chosen) or (chosen.size and not 0 <= chosen.min() <= chosen.max() < units):
        raise ValueError(f"order: expected different units from 0 to {units - 1}, got {chosen.tolist()[:8]}")
    kept = np.ones(units, np.float32)
    kept[chosen[:number]] = 0
    return kept


def correct(
    network: Network,
    params: Params,
    node: str,
    kept: Any,
    images: Any,
    labels: Int[Any, " images"],
    *,
    batch_size: int = 32,
) -> Bool[np.ndarray, "masks images"]:
    """Which images are classified correctly under each of several masks.

    What lies before the node is computed once for every image.

    Args:
        network: the network.
        params: its parameters.
        node: the layer whose units are silenced.
        kept: [M,U], see `keep`.
        images: [N,H,W,C].
        labels: [N] true classes.
        batch_size: images in a batch; the result does not depend on it.

    Raises:
        TypeError: labels that are not integers.
        ValueError: an unknown node, shapes that do not fit, a label that is no class, or a batch of no image.
    """
    network.check_node(node)
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    kept, labels = jnp.asarray(kept, jnp.float32), np.asarray(labels)
    if len(labels) != len(images) or kept.ndim != 2:
        raise ValueError(
            "kept, images, labels: expected [M,U], [N,H,W,C] and [N],"
            f" got {list(kept.shape)}, {list(np.shape(images))} and {list(labels.shape)}"
        )
    if labels.size and not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels: expected integers, got {labels.dtype}")
    if labels.size and not 0 <= labels.min() <= labels.max() < network.num_classes:
        raise ValueError(
            f"labels: expected classes from 0 to {network.num_classes - 1}, got {labels.min()} to {labels.max()}"
        )
    before, behind = _programs(network, node)
    found = np.zeros((len(kept), len(labels)), bool)
    for start in range(0, len(labels), batch_size):
        rows = np.arange(start, min(start + batch_size, len(labels)))
        padded = np.concatenate([rows, np.repeat(rows[-1:], batch_size - len(rows))])
        batch = jnp.asarray(np.asarray(images)[padded])
        maps = before(params, batch)
        if maps.shape[-1] != kept.shape[1]:
            raise ValueError(f"kept: expected {maps.shape[-1]} units, those of {node}, got {kept.shape[1]}")
        for i, one in enumerate(kept):
            predicted = np.asarray(behind(params, maps, batch, one))
            found[i, rows] = predicted[: len(rows)] == labels[rows]
    return found


@functools.lru_cache(maxsize=16)
def _programs(network: Network, node: str) -> tuple[Any, Any]:
    def before(params, images):
        return features(network, params, images, node)

    def behind(params, maps, images, kept):
        return jnp.argmax(head(network, params, node, maps * kept, images), axis=-1)

    return jax.jit(canonical(before)), jax.jit(canonical(behind))


def groups(
    sensitivity: Sequence[float] | np.ndarray,
    scores: Sequence[float] | np.ndarray,
    detects: np.ndarray,
    *,
    key: Array,
    draws: int,
) -> dict[str, np.ndarray]:
    """Orders in which units are silenced, for comparison.

    Args:
        sensitivity: [U].
        scores: [U] best IoU.
        detects: bool [U], which units are concept detectors.
        key: of the random orders.
        draws: how many random orders.

    Returns:
        "sensitive" and "insensitive" (from the most and the least sensitive), "detectors" (from the highest IoU) and
        "others" (not detectors, from the lowest IoU), and "random-0", "random-1", ...
    """
    from jaxinterp.dissect.sensitivity import ranking

    order, on, iou = ranking(sensitivity), np.asarray(detects, bool), np.asarray(scores, np.float64)
    by_score = np.argsort(-iou, kind="stable")
    found = {
        "sensitive": order,
        "insensitive": order[::-1],
        "detectors": by_score[on[by_score]],
        "others": by_score[::-1][~on[by_score[::-1]]],
    }
    for i in range(draws):
        found[f"random-{i}"] = np.asarray(jax.random.permutation(jax.random.fold_in(key, i), len(order)))
    return found
