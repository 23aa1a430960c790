"""How much attacks move each unit, and whether the units they move are the ones that mean something.

For unit k over pairs of a natural image x and an adversarial x' (Xu et al. 2019, "Interpreting Adversarial Examples by
Activation Promotion and Suppression", network level):

* magnitude: the mean of ||f_k(x) - f_k(x')||_2; also divided by ||f_k(x)||_2 (`relative`), and as the mean squared
  difference of a position (`squared`);
* position: the mean distance between the places of the maximum, in positions of the feature map (`shift`); also one
  minus the IoU of the masks f_k > T_k (`mask`).

A unit with large activations changes much in absolute terms whatever the attack does: magnitude without `relative`
ranks units by their scale first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxinterp.canonical import canonical
from jaxinterp.dissect import exactsum, shares, wide
from jaxinterp.dissect.dissection import extractor
from jaxinterp.dissect.exactsum import ExactSum
from jaxinterp.dissect.wide import Wide
from jaxinterp.network import Network, Params
from jaxinterp.pytree import pytree

MEASURES = ("plain", "relative", "squared", "shift", "mask")


@pytree
class Change:
    """What an attack did to each unit in each pair; NaN where a measure is not defined.

    Attributes:
        plain: [B,U] ||f(x) - f(x')||_2.
        norm: [B,U] ||f(x)||_2.
        relative: [B,U] plain / norm; 0 where the unit is silent for both images, NaN where only for the natural one.
        squared: [B,U] mean over positions of the squared difference.
        shift: [B,U] distance between the places of the maximum (the first one of several).
        mask: [B,U] 1 - IoU of the masks; NaN where both are empty.
    """

    plain: Float[Array, "batch units"]
    norm: Float[Array, "batch units"]
    relative: Float[Array, "batch units"]
    squared: Float[Array, "batch units"]
    shift: Float[Array, "batch units"]
    mask: Float[Array, "batch units"]


def change(
    natural: Float[Any, "batch h w units"], adversarial: Float[Any, "..."], thresholds: Float[Any, "..."]
) -> Change:
    """Compares feature maps of pairs of images; a pair's values do not depend on the batch.

    Args:
        natural: feature maps of natural images.
        adversarial: feature maps of the same images under attack.
        thresholds: of each unit, for masks; see `jaxinterp.dissect.thresholds`.

    Raises:
        ValueError: shapes that differ.
    """
    if natural.shape != adversarial.shape or natural.ndim != 4 or thresholds.shape != natural.shape[-1:]:
        raise ValueError(
            "natural, adversarial, thresholds: expected [B,h,w,U] twice and [U],"
            f" got {list(natural.shape)}, {list(adversarial.shape)} and {list(thresholds.shape)}"
        )
    return _change(natural, adversarial, thresholds)


@jax.jit
@canonical
def _change(natural, adversarial, thresholds):
    _, h, w, _ = natural.shape
    squares = jnp.sum((natural - adversarial) ** 2, axis=(1, 2))
    plain, norm = jnp.sqrt(squares), jnp.sqrt(jnp.sum(natural**2, axis=(1, 2)))
    silent = norm == 0
    relative = jnp.where(silent, jnp.where(plain == 0, 0.0, jnp.nan), plain / jnp.where(silent, 1.0, norm))
    places = [jnp.argmax(x.reshape(x.shape[0], h * w, -1), axis=1) for x in (natural, adversarial)]
    rows, columns = (((a - b) ** 2).astype(jnp.float32) for a, b in zip(*(divmod(p, w) for p in places), strict=True))
    masks = [x > thresholds for x in (natural, adversarial)]
    both = jnp.sum((masks[0] & masks[1]).astype(jnp.int32), axis=(1, 2))
    either = jnp.sum((masks[0] | masks[1]).astype(jnp.int32), axis=(1, 2))
    missed = (either - both).astype(jnp.float32) / jnp.maximum(either, 1).astype(jnp.float32)
    return Change(
        plain, norm, relative, squares / (h * w), jnp.sqrt(rows + columns), jnp.where(either > 0, missed, jnp.nan)
    )


# Over many pairs


@pytree
class Sensitivity:
    """Sums over pairs of every measure, exact, and how many pairs each is defined for."""

    sums: dict[str, ExactSum]
    defined: dict[str, Wide]


def init(units: int) -> Sensitivity:
    """No pair seen."""
    return Sensitivity(
        {name: exactsum.init(units) for name in (*MEASURES, "norm")},
        {name: wide.zeros(units) for name in (*MEASURES, "norm")},
    )


def update(sensitivity: Sensitivity, changes: Change, valid: Any = None) -> Sensitivity:
    """Adds a batch of at most 64 pairs.

    Args:
        sensitivity: what was seen so far.
        changes: of the batch, see `change`.
        valid: bool [B], which pairs count; None means all.
    """
    sums, defined = {}, {}
    for name, total in sensitivity.sums.items():
        values = getattr(changes, name)
        there = ~jnp.isnan(values) if valid is None else ~jnp.isnan(values) & valid[:, None]
        sums[name] = exactsum.update(total, jnp.where(there, values, 0.0), valid)
        defined[name] = wide.add(sensitivity.defined[name], there.sum(axis=0, dtype=jnp.int32))
    return Sensitivity(sums, defined)


def merge(a: Sensitivity, b: Sensitivity) -> Sensitivity:
    """The pairs of both."""
    return Sensitivity(
        {name: exactsum.merge(a.sums[name], b.sums[name]) for name in a.sums},
        {name: wide.merge(a.defined[name], b.defined[name]) for name in a.defined},
    )


def result(sensitivity: Sensitivity) -> dict[str, np.ndarray]:
    """The mean of every measure over the pairs for which it is defined, float64 [U]; NaN where there is none."""
    found = {}
    for name, total in sensitivity.sums.items():
        number = wide.total(sensitivity.defined[name])
        found[name] = np.where(number > 0, exactsum.result(total) / np.maximum(number, 1), np.nan)
    return found


def measure(
    network: Network,
    params: Params,
    nodes: Sequence[str],
    pairs: Iterable[tuple[Any, Any, Any]],
    thresholds: Sequence[Any],
    *,
    mesh: Mesh | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """The mean of every measure over all pairs: every device looks at its own, and exact sums are merged once.

    Neither the batches nor the devices change a bit of the result.

    Args:
        network: the network.
        params: its parameters.
        nodes: layers.
        pairs: batches of natural images [B,H,W,C], the same under attack, and bool [B], which pairs count (of images
            that were filled up, or not attacked with success). B is a multiple of the devices, at most 64 for each.
        thresholds: [U] of every layer, see `jaxinterp.dissect.thresholds`.
        mesh: the devices of this process; None means one.

    Returns:
        By node what `result` returns.

    Raises:
        ValueError: no pair, an unknown node, or shapes that do not fit.
    """
    for node in nodes:
        network.check_node(node)
    if len(nodes) != len(thresholds):
        raise ValueError(f"thresholds: expected those of {len(nodes)} layers, got {len(thresholds)}")
    run, placed = extractor(network, tuple(nodes), mesh), shares.replicated(params, mesh)
    limits = [shares.replicated(jnp.asarray(each), mesh) for each in thresholds]
    add = shares.step(_add, mesh, (True, True, False, True))
    states = [shares.start(init, mesh, int(limit.shape[0])) for limit in limits]
    seen = False
    for natural, adversarial, valid in pairs:
        seen = True
        natural, adversarial, valid = shares.placed((natural, adversarial, np.asarray(valid, bool)), mesh)
        both = zip(run(placed, natural), run(placed, adversarial), limits, strict=True)
        states = [add(state, *maps, valid) for state, maps in zip(states, both, strict=True)]
    if not seen:
        raise ValueError("pairs: expected at least one batch")
    return {node: result(shares.merged(state, merge, mesh)) for node, state in zip(nodes, states, strict=True)}


def _add(sensitivity: Sensitivity, natural: Any, adversarial: Any, thresholds: Any, valid: Any) -> Sensitivity:
    return update(sensitivity, change(natural, adversarial, thresholds), valid)


# What the sensitive units are


@dataclasses.dataclass(frozen=True)
class Enrichment:
    """Detectors among the most sensitive units, against units drawn at random.

    Attributes:
        drawn: number N of most sensitive units.
        units: number U of all units.
        detectors: number K of detectors among all.
        found: number of detectors among the N.
        expected: N K / U, the mean of a random draw.
        interval: the number in 95 % of random draws, from the 2.5th to the 97.5th percentile.
        more: probability that a random draw has at least as many (hypergeometric, exact).
        fewer: probability that it has at most as many.
    """

    drawn: int
    units: int
    detectors: int
    found: int
    expected: float
    interval: tuple[int, int]
    more: float
    fewer: float


def ranking(sensitivity: Sequence[float] | np.ndarray) -> np.ndarray:
    """Units from the most to the least sensitive; of equal ones the lower number first, undefined ones (NaN) last."""
    values = np.asarray(sensitivity, np.float64)
    return np.argsort(np.where(np.isnan(values), np.inf, -values), kind="stable")


def enrichment(sensitivity: Sequence[float] | np.ndarray, detects: np.ndarray, number: int) -> Enrichment:
    """Whether the `number` most sensitive units hold more detectors than units drawn at random.

    Args:
        sensitivity: [U].
        detects: bool [U].
        number: N, from 1 to U.

    Raises:
        ValueError: shapes that differ, or a number out of range.
    """
    from scipy.stats import hypergeom

    values, on = np.asarray(sensitivity), np.asarray(detects, bool)
    if values.shape != on.shape or values.ndim != 1:
        raise ValueError(f"sensitivity, detects: expected [U] twice, got {list(values.shape)} and {list(on.shape)}")
    units = len(values)
    if not 1 <= number <= units:
        raise ValueError(f"number: expected 1 to {units} units, got {number}")
    found, detectors = int(on[ranking(values)[:number]].sum()), int(on.sum())
    null = hypergeom(units, detectors, number)
    low, high = (int(null.ppf(p)) for p in (0.025, 0.975))
    return Enrichment(
        number,
        units,
        detectors,
        found,
        number * detectors / units,
        (low, high),
        float(null.sf(found - 1)),
        float(null.cdf(found)),
    )


def mean_over_pairs(values: np.ndarray) -> np.ndarray:
    """[U] the mean over pairs of [N,U] where it is defined; NaN where it never is."""
    there = ~np.isnan(values)
    number = there.sum(axis=0)
    return np.where(number > 0, np.where(there, values, 0.0).sum(axis=0) / np.maximum(number, 1), np.nan)


@functools.lru_cache(maxsize=4)
def resamples(pairs: int, draws: int, seed: int) -> np.ndarray:
    """[draws,pairs] pairs drawn with replacement."""
    return np.random.default_rng(seed).integers(0, pairs, (draws, pairs))


def correlation(
    values: np.ndarray, scores: Sequence[float] | np.ndarray, *, seed: int, draws: int = 1000, level: float = 0.95
) -> tuple[float, float, float]:
    """Spearman's rank correlation of the units' sensitivity with their IoU.

    Args:
        values: [N,U] a measure in every pair, NaN where it is not defined.
        scores: [U] the best IoU of every unit.
        seed: of the bootstrap over pairs.
        draws: of the bootstrap.
        level: of the interval.

    Returns:
        The correlation, and the ends of its basic bootstrap interval (NaN of fewer than two pairs, or where a side is
        constant). Resampled pairs are noisier than the pairs, so their correlations are weaker; the basic interval
        turns that around, percentiles would be off.

    Raises:
        ValueError: shapes that do not fit.
    """
    from scipy.stats import rankdata

    scores = np.asarray(scores, np.float64)
    if values.ndim != 2 or scores.shape != values.shape[1:]:
        raise ValueError(f"values, scores: expected [N,U] and [U], got {list(values.shape)} and {list(scores.shape)}")

    def rho(rows: np.ndarray) -> float:
        mean = mean_over_pairs(values[rows])
        there = ~np.isnan(mean)
        a, b = rankdata(mean[there]), rankdata(scores[there])
        if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
            return float("nan")
        return float(np.corrcoef(a, b)[0, 1])

    found = rho(np.arange(len(values)))
    if len(values) < 2 or np.isnan(found):
        return found, float("nan"), float("nan")
    drawn = [rho(rows) for rows in resamples(len(values), draws, seed)]
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return found, max(-1.0, float(2 * found - high)), min(1.0, float(2 * found - low))
