"""Pixels under the masks of units, counted only where a unit can exceed its threshold.

An interpolated pixel lies between four positions of the feature map and does not exceed the largest of them. A
threshold is exceeded at few positions (one in two hundred, by default), so of all squares between four neighbouring
positions only those with one above the threshold are interpolated. Two lists tell which: units that fire in an image,
and the squares of such a unit. The lists are as long as they are, and are worked off in pieces of fixed shape by
loops that stop at their end: one program for any data.

Masks and labels are packed, 32 pixels to an integer, and counted by population counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Integer, UInt32

from jaxinterp.canonical import rounded
from jaxinterp.dissect.upsample import taps

_BITS = 32
_SQUARES = 2048  # interpolated at once
_CANDIDATES = 1 << 18  # squares looked through at once


@dataclasses.dataclass(frozen=True, eq=False)
class _Intervals:
    """The pixels of one axis, grouped by the two positions they lie between.

    Attributes:
        lower, upper: [n] the positions; the same one beyond the middle of the first and of the last.
        pixels: [n,m] the pixels, in order; places that are not needed repeat the last one.
        needed: bool [n,m].
        nearer: bool [n,m], whether `upper` is the nearer position.
        factor: [n,m] the weight of the other position.
    """

    lower: np.ndarray
    upper: np.ndarray
    pixels: np.ndarray
    needed: np.ndarray
    nearer: np.ndarray
    factor: np.ndarray


def _intervals(size: int, target: int) -> _Intervals:
    base, others, factors = taps(size, target)
    other, factor = (others[0], factors[0]) if others else (base, np.zeros(target, np.float32))
    pairs = np.stack([np.minimum(base, other), np.maximum(base, other)], axis=1)
    starts = np.flatnonzero(np.r_[True, (pairs[1:] != pairs[:-1]).any(axis=1)])
    lengths = np.diff(np.r_[starts, target])
    steps = np.arange(lengths.max())
    pixels = starts[:, None] + np.minimum(steps, lengths[:, None] - 1)
    needed = steps < lengths[:, None]
    nearer = (base > other)[pixels]
    return _Intervals(pairs[starts, 0], pairs[starts, 1], pixels, needed, nearer, factor[pixels])


def applies(maps: Sequence[int], size: Sequence[int]) -> bool:
    """Whether every pixel of a label map of this size lies between four positions of the feature maps."""
    return maps[0] <= size[0] and maps[1] <= size[1]


def count(
    features: Float[Array, "batch h w units"],
    thresholds: Float[Array, " units"],
    places: Integer[Array, "batch channels sh sw"],
    present: int,
) -> tuple[Int[Array, "batch present units"], Int[Array, "batch units"]]:
    """Counts the pixels under the mask of every unit: those with each label, and all.

    Args:
        features: feature maps, not larger than the label maps.
        thresholds: one for each unit.
        places: the label of a pixel, from 1 to `present`; 0 = none.
        present: P.
    """
    batch, h, w, units = features.shape
    rows, columns = _intervals(h, places.shape[2]), _intervals(w, places.shape[3])
    squares = len(rows.lower) * len(columns.lower)
    labels = _label_words(places, present, rows, columns)
    firing = _listed(features.max(axis=(1, 2)) > thresholds)
    at_once = min(batch * units, max(1, _CANDIDATES // squares))

    def some_units(carry):
        start, both, active = carry
        unit, there = _picked(firing, start + jnp.arange(at_once))
        image, channel = unit // units, unit % units
        maps = features[image, :, :, channel]
        under = _of_units(maps, thresholds[channel], there, labels, image, present, rows, columns)
        unit = jnp.where(there, unit, batch * units)
        both = both.at[unit].set(under[:, :-1], mode="drop")
        return start + at_once, both, active.at[unit].set(under[:, -1], mode="drop")

    nothing = jnp.zeros((batch * units, present), jnp.int32), jnp.zeros(batch * units, jnp.int32)
    _, both, active = lax.while_loop(lambda carry: carry[0] < firing.number, some_units, (jnp.int32(0), *nothing))
    return both.reshape(batch, units, present).swapaxes(1, 2), active.reshape(batch, units)


def _of_units(maps, limits, there, labels, image, present: int, rows: _Intervals, columns: _Intervals):
    """Counts [G,P+1] of G units, each in its image; those that are not `there` count nothing."""
    above = (maps > limits[:, None, None]) & there[:, None, None]
    above = above[:, rows.lower] | above[:, rows.upper]
    above = above[:, :, columns.lower] | above[:, :, columns.upper]
    across = len(columns.lower)
    squares = len(rows.lower) * across
    listed = _listed(above.reshape(len(maps), -1))
    needed = jnp.asarray(_packed(rows.needed[:, None, :, None] & columns.needed[None, :, None, :]))
    numbers = 1 + jnp.arange(present, dtype=labels.dtype)

    def some_squares(carry):
        start, counts = carry
        place, more = _picked(listed, start + jnp.arange(_SQUARES))
        unit, square = place // squares, place % squares
        row, column = square // across, square % across
        mask = _interpolated(maps, unit, row, column, rows, columns) > limits[unit][:, None, None]
        mask = jnp.where(more[:, None], _words(mask.reshape(_SQUARES, -1)) & needed[row, column], 0)
        bits = labels[image[unit], square]  # [K,channels,bits,words]
        hits = mask[:, None, None]
        for bit in range(bits.shape[2]):
            chosen = (numbers >> bit & 1).astype(bool)[:, None]
            word = bits[:, :, bit][:, :, None]
            hits = hits & jnp.where(chosen, word, ~word)
        having = lax.population_count(hits).sum(axis=(1, 3), dtype=jnp.int32)
        area = lax.population_count(mask).sum(axis=1, dtype=jnp.int32)
        return start + _SQUARES, counts.at[unit].add(jnp.concatenate([having, area[:, None]], axis=1))

    counts = jnp.zeros((len(maps), present + 1), jnp.int32)
    return lax.while_loop(lambda carry: carry[0] < listed.number, some_squares, (jnp.int32(0), counts))[1]


def _interpolated(maps, unit, row, column, rows: _Intervals, columns: _Intervals):
    """The pixels [K,m,n] of K squares, by the arithmetic of `upsample`: along rows, then along columns."""
    upper, left = jnp.asarray(rows.lower)[row], jnp.asarray(columns.lower)[column]
    lower, right = jnp.asarray(rows.upper)[row], jnp.asarray(columns.upper)[column]
    top, bottom = (
        _between(maps[unit, at, left][:, None], maps[unit, at, right][:, None], columns, column)
        for at in (upper, lower)
    )
    inside = rows.nearer[:, :, None], rows.factor[:, :, None]
    return _blended(top[:, None], bottom[:, None], *(jnp.asarray(table)[row] for table in inside))


def _between(first, second, intervals: _Intervals, which):
    return _blended(first, second, jnp.asarray(intervals.nearer)[which], jnp.asarray(intervals.factor)[which])


def _blended(first, second, nearer, factor):
    base, other = jnp.where(nearer, second, first), jnp.where(nearer, first, second)
    return base + rounded((other - base) * factor)


def _label_words(places, present: int, rows: _Intervals, columns: _Intervals):
    """The bits of every pixel's label [B,squares,channels,bits,words]: square by square, 32 pixels to an integer."""
    at = places[:, :, rows.pixels[:, None, :, None], columns.pixels[None, :, None, :]]  # [B,channels,r,c,m,n]
    batch, channels, r, c, m, n = at.shape
    at = at.reshape(batch, channels, r * c, m * n).swapaxes(1, 2)
    shifts = jnp.arange(present.bit_length(), dtype=at.dtype)
    return _words((at[:, :, :, None] >> shifts[:, None] & 1).astype(bool))


def _packed(mask: np.ndarray) -> np.ndarray:
    """`_words` in NumPy, of a mask [r,c,m,n] by square."""
    flat = mask.reshape(*mask.shape[:2], -1)
    flat = np.pad(flat, [(0, 0), (0, 0), (0, -flat.shape[-1] % _BITS)])
    return np.packbits(flat, axis=-1, bitorder="little").view("<u4").astype(np.uint32)


def _words(mask):
    """The last axis of a mask as integers of 32 bits."""
    mask = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, -mask.shape[-1] % _BITS)])
    apart = mask.reshape(*mask.shape[:-1], mask.shape[-1] // _BITS, _BITS).astype(jnp.uint32)
    return jnp.sum(apart << jnp.arange(_BITS, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


@dataclasses.dataclass(frozen=True, eq=False)
class _Listed:
    """The set places of a mask [n,m], in order, found by counting bits."""

    words: UInt32[Array, " words"]
    before: Int[Array, " words"]  # how many places are set up to and including this word
    row: int  # length of a row, which is filled up to whole words

    @property
    def number(self):
        return self.before[-1]


def _listed(mask) -> _Listed:
    words = _words(mask).ravel()
    return _Listed(words, jnp.cumsum(lax.population_count(words).astype(jnp.int32)), mask.shape[1])


def _picked(listed: _Listed, which):
    """Where the places number `which` are in the flattened mask, and whether there are so many; else 0."""
    there = which < listed.number
    at = jnp.where(there, jnp.searchsorted(listed.before, which, side="right"), 0)
    word = listed.words[at]
    left = which - (listed.before[at] - lax.population_count(word).astype(jnp.int32))
    place = jnp.zeros_like(left)
    for half in (16, 8, 4, 2, 1):
        lower = lax.population_count(word & jnp.uint32((1 << half) - 1)).astype(jnp.int32)
        beyond = left >= lower
        left = jnp.where(beyond, left - lower, left)
        place = jnp.where(beyond, place + half, place)
        word = jnp.where(beyond, word >> half, word)
    across = -(-listed.row // _BITS)
    flat = at // across * listed.row + at % across * _BITS + place
    return jnp.where(there, flat, 0), there
