"""The activation that a unit exceeds at a given share of all positions of all images, exactly.

Floats are mapped to unsigned integers of the same order, and the value of a given rank is found by counting: 32 steps
of bisection where the features are at hand, each an integer count over all devices; two passes with a histogram of the
upper and then of the lower 16 bits where they come batch by batch. Counts are exact, so the result has the same bits
for any number of devices and any batches. The quantile between two ranks is interpolated linearly, as NumPy does.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, UInt32

from jaxinterp.pytree import pytree
from jaxinterp.sharding import mesh_of

QUANTILE = 0.005
"""Share of positions that exceed the threshold (Bau et al. 2017, section 2.2)."""

Method = Literal["linear", "higher"]
METHODS: tuple[Method, ...] = ("linear", "higher")
"""Between two ranks: interpolation, as NumPy's default; or the higher value, which at most the share exceeds."""

_BINS = 1 << 16
_LAST = 0xFFFFFFFF  # the largest key
MOST = 2**31 - 1
"""Positions that 32-bit counts can hold."""


def check(quantile: float, method: str = "linear") -> None:
    """Raises TypeError unless `quantile` is a number, ValueError unless it is in (0, 1) and the method exists."""
    if isinstance(quantile, bool) or not isinstance(quantile, numbers.Real):
        raise TypeError(f"quantile: expected a number, got {quantile!r}")
    if not 0 < quantile < 1:
        raise ValueError(f"quantile: expected a share between 0 and 1 (both excluded), got {quantile}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")


def ordered(x: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """float32 as unsigned integers of the same order; -0 counts as 0, NaN lies beyond both infinities."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    bits = jnp.where(bits == sign, jnp.uint32(0), bits)  # not x == 0, which a CPU finds true of subnormal numbers
    return jnp.where(bits >> 31 == 1, ~bits, bits | sign)


def value(keys: UInt32[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The floats behind ordered integers."""
    bits = jnp.where(keys >> 31 == 1, keys & jnp.uint32((1 << 31) - 1), ~keys)
    return lax.bitcast_convert_type(bits, jnp.float32)


def ranks(count: int, quantile: float, method: Method = "linear") -> tuple[int, float]:
    """Where the threshold lies among `count` sorted values: after the value of this rank (from 0), by this share."""
    position = (count - 1) * (1 - quantile)
    lower = min(math.floor(position), count - 1)
    share = position - lower
    return lower, float(math.ceil(share)) if method == "higher" else share


def between(lower: np.ndarray, upper: np.ndarray, share: float) -> np.ndarray:
    """Linear interpolation in float64, rounded to float32; exact at both ends, infinite where one end is."""
    if share in (0, 1):
        return upper if share else lower
    low, high = lower.astype(np.float64), upper.astype(np.float64)
    step = np.subtract(high, low, out=np.zeros_like(low), where=np.isfinite(low) & (low != high))
    return (low + share * step).astype(np.float32)


def thresholds(
    features: Float[Any, "images h w units"] | Iterable[Any],
    quantile: float = QUANTILE,
    *,
    method: Method = "linear",
) -> Float[Array, " units"]:
    """The value that each unit exceeds at the share `quantile` of all positions.

    Args:
        features: [N,h,w,U], sharded or not; or batches of such features. Those are walked through twice and never held
            together, unless they come from an iterator, which can be walked through only once and is kept in memory.
        quantile: between 0 and 1.
        method: what is taken between two ranks: "linear" interpolation, or the "higher" value.

    Returns:
        [U] float32. With n positions it is the value at rank (n - 1) (1 - quantile) of the sorted activations.

    Raises:
        TypeError: features are not floating point, or the quantile is no number.
        ValueError: a quantile out of range, no features, a wrong rank, batches of different shapes, or NaN among the
            activations (the message names units).
    """
    check(quantile, method)
    if hasattr(features, "shape"):
        features = _checked(features)
        return of_kept(features, None, len(features), quantile, method, mesh=mesh_of(features))
    batches: Iterable = list(features) if isinstance(features, Iterator) else features
    return streamed(lambda: ((batch, None) for batch in batches), quantile, method)


def _checked(features: Any) -> jax.Array:
    if len(features.shape) != 4 or 0 in features.shape:
        raise ValueError(f"features: expected [N,h,w,U] with at least one of each, got {list(features.shape)}")
    if not jnp.issubdtype(features.dtype, jnp.floating):
        raise TypeError(f"features: expected floating point, got {features.dtype}")
    if math.prod(features.shape[:3]) > MOST:
        raise ValueError(f"features: expected at most {MOST} positions, got {math.prod(features.shape[:3])}")
    return jnp.asarray(features, jnp.float32)


def refuse_nan(found: Any, node: str = "features") -> None:
    """Raises ValueError where a unit of the layer `node` has a NaN; `found` [U] says which."""
    units = np.flatnonzero(np.asarray(found))
    if units.size:
        shown = ", ".join(map(str, units[:8])) + (", ..." if units.size > 8 else "")
        raise ValueError(f"{node}: NaN among the activations of {units.size} units: {shown}")


# Features at hand


def of_kept(
    features: jax.Array,
    valid: Any,
    images: int,
    quantile: float,
    method: Method = "linear",
    *,
    mesh: Mesh | None,
    node: str = "features",
) -> jax.Array:
    """The thresholds of features that are on the devices.

    Args:
        features: [N,h,w,U], spread over `mesh`.
        valid: bool [N], which images count; None means all.
        images: how many count.
        quantile: between 0 and 1.
        method: see `thresholds`.
        mesh: the devices; None for one.
        node: the layer, for messages.
    """
    rank, share = ranks(images * features.shape[1] * features.shape[2], quantile, method)
    lower, upper, nan = _select(mesh)(features, valid, np.int32(rank))
    refuse_nan(nan, node)
    return jnp.asarray(between(np.asarray(lower), np.asarray(upper), share))


@functools.cache
def _select(mesh: Mesh | None) -> Any:
    block = _BLOCK if jax.default_backend() == "cpu" else None
    if mesh is None:
        return jax.jit(functools.partial(_selected, block=block))
    axis = mesh.axis_names[0]
    share, whole = PartitionSpec(axis), PartitionSpec()
    select = functools.partial(_selected, block=block, axis=axis)
    return jax.jit(jax.shard_map(select, mesh=mesh, in_specs=(share, share, whole), out_specs=whole, check_vma=False))


_BLOCK = 1 << 16  # keys that a CPU compares at once: they and the counts stay in a core's cache


def _selected(features, valid, rank, block: int | None, axis: str | None = None):
    """The values of `rank` and of the next one in every unit, and whether the unit has a NaN.

    Keys are compared in blocks of about `block`, one after the other, or all at once: an accelerator reads them faster
    than it starts a program for each of many blocks. With `axis`, of the features of all devices along it.
    """

    def total(counts):
        return counts if axis is None else lax.psum(counts, axis)

    units = features.shape[-1]
    keys, nan = ordered(features), jnp.isnan(features)
    if valid is not None:
        absent = ~valid[:, None, None, None]
        keys, nan = jnp.where(absent, jnp.uint32(_LAST), keys), nan & ~absent
    keys = keys.reshape(-1, units)
    rows = len(keys) if block is None else max(1, block // units)
    keys = jnp.pad(keys, [(0, -len(keys) % rows), (0, 0)], constant_values=np.uint32(_LAST)).reshape(-1, rows, units)

    def count(limit):  # positions up to `limit`, [U]
        def add(counts, block):
            return counts + jnp.sum(block <= limit, axis=0, dtype=jnp.int32), None

        return total(lax.scan(add, jnp.zeros(units, jnp.int32), keys)[0])

    def halve(_, ends):
        low, high = ends
        middle = low + (high - low) // 2
        enough = count(middle) > rank
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    low, _ = lax.fori_loop(0, 32, halve, (jnp.zeros(units, jnp.uint32), jnp.full(units, _LAST, jnp.uint32)))

    def least(smallest, block):
        beyond = jnp.where(block > low, block, jnp.uint32(_LAST))
        return jnp.minimum(smallest, beyond.min(axis=0)), None

    following = lax.scan(least, jnp.full(units, _LAST, jnp.uint32), keys)[0]
    following = following if axis is None else lax.pmin(following, axis)
    more = count(low) > rank + 1
    last = following == jnp.uint32(_LAST)
    return (
        value(low),
        value(jnp.where(more | last, low, following)),
        total(nan.any(axis=(0, 1, 2)).astype(jnp.int32)) > 0,
    )


# Features batch by batch


@pytree
class Histogram:
    """Counts of the upper (or, of the values with known upper, the lower) 16 bits of every unit's activations.

    A statistic: `init`, `update`, `merge`; counts are integers, and the smallest value beyond is a minimum, so the
    order and the size of batches do not matter.
    """

    counts: Int[Array, "bins units"]
    beyond: UInt32[Array, " units"]  # the smallest key whose upper half exceeds the known one
    nan: Int[Array, " units"]


def init(units: int) -> Histogram:
    """Nothing counted."""
    return Histogram(
        jnp.zeros((_BINS, units), jnp.int32), jnp.full(units, _LAST, jnp.uint32), jnp.zeros(units, jnp.int32)
    )


def update(
    histogram: Histogram,
    features: Float[Array, "batch h w units"],
    valid: Any = None,
    upper: UInt32[Array, " units"] | None = None,
) -> Histogram:
    """Counts a batch.

    Args:
        histogram: counts so far.
        features: activations.
        valid: bool [B], which images count; None means all.
        upper: the known upper halves; None in the first pass.
    """
    units = features.shape[-1]
    keys = ordered(features).reshape(-1, units)
    counted = jnp.ones(keys.shape, bool)
    if valid is not None:
        counted = jnp.broadcast_to(valid[:, None, None, None], features.shape).reshape(-1, units)
    nan = jnp.isnan(features).reshape(-1, units) & counted
    beyond = histogram.beyond
    bins = keys >> 16
    if upper is not None:
        after = jnp.where(counted & (bins > upper), keys, jnp.uint32(_LAST))
        beyond = jnp.minimum(beyond, after.min(axis=0))
        counted, bins = counted & (bins == upper), keys & jnp.uint32(_BINS - 1)
    counts = histogram.counts.at[bins.astype(jnp.int32), jnp.arange(units)].add(counted.astype(jnp.int32))
    return Histogram(counts, beyond, histogram.nan + nan.sum(axis=0, dtype=jnp.int32))


def merge(a: Histogram, b: Histogram) -> Histogram:
    """The counts of both."""
    return Histogram(a.counts + b.counts, jnp.minimum(a.beyond, b.beyond), a.nan + b.nan)


@jax.jit
def upper_half(histogram: Histogram, rank: Int[Array, ""]) -> tuple[UInt32[Array, " units"], Int[Array, " units"]]:
    """After the first pass: the upper half of the value of `rank`, and its rank among the values with this half."""
    cumulative = jnp.cumsum(histogram.counts, axis=0)
    upper = jnp.sum(cumulative <= rank, axis=0, dtype=jnp.int32)
    before = jnp.take_along_axis(cumulative, jnp.maximum(upper - 1, 0)[None], axis=0)[0]
    return upper.astype(jnp.uint32), rank - jnp.where(upper > 0, before, 0)


@jax.jit
def neighbours(
    histogram: Histogram, upper: UInt32[Array, " units"], rank: Int[Array, " units"]
) -> tuple[Float[Array, " units"], Float[Array, " units"]]:
    """After the second pass: the value of the rank, and the next one (itself where it is the last)."""
    cumulative = jnp.cumsum(histogram.counts, axis=0)
    low = jnp.sum(cumulative <= rank, axis=0, dtype=jnp.int32).astype(jnp.uint32)
    high = jnp.sum(cumulative <= rank + 1, axis=0, dtype=jnp.int32).astype(jnp.uint32)
    first = (upper << 16) | low
    outside = jnp.where(histogram.beyond == jnp.uint32(_LAST), first, histogram.beyond)
    return value(first), value(jnp.where(high < _BINS, (upper << 16) | high, outside))


_update = jax.jit(update, donate_argnums=0)


def streamed(
    batches: Callable[[], Iterable[tuple[Any, Any]]], quantile: float = QUANTILE, method: Method = "linear"
) -> jax.Array:
    """The same thresholds from features that are never held together: 256 KiB a unit, two passes.

    Args:
        batches: starts a pass; yields pairs of features [B,h,w,U] and of which images count (bool [B], or None).
        quantile: between 0 and 1.
        method: see `thresholds`.

    Raises:
        ValueError: as `thresholds`; or the second pass yields other values than the first.
    """
    check(quantile, method)
    first, count = _pass(batches, None)
    refuse_nan(first.nan)
    rank, share = ranks(count, quantile, method)
    upper, inner = upper_half(first, jnp.int32(rank))
    second, again = _pass(batches, upper)
    expected = np.take_along_axis(np.asarray(first.counts), np.asarray(upper, np.int64)[None], axis=0)[0]
    if again != count or not np.array_equal(np.asarray(second.counts).sum(axis=0), expected):
        raise ValueError("features: the second walk through the batches gave other values than the first")
    lower, following = neighbours(second, upper, inner)
    return jnp.asarray(between(np.asarray(lower), np.asarray(following), share))


def _pass(batches: Callable[[], Iterable[tuple[Any, Any]]], upper: Any) -> tuple[Histogram, int]:
    histogram, count = None, 0
    shape: tuple[int, ...] = ()
    for batch, valid in batches():
        features = _checked(batch)
        if histogram is None:
            histogram, shape = init(features.shape[-1]), features.shape[1:]
        if features.shape[1:] != shape:
            raise ValueError(f"features: expected batches of {list(shape)}, got {list(features.shape[1:])}")
        images = len(features) if valid is None else int(np.sum(np.asarray(valid)))
        count += images * features.shape[1] * features.shape[2]
        if count > MOST:
            raise ValueError(f"features: expected at most {MOST} positions, got more")
        histogram = _update(histogram, features, None if valid is None else jnp.asarray(valid), upper)
    if histogram is None or count == 0:
        raise ValueError("features: expected at least one image, got none")
    return histogram, count
