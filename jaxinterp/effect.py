"""The promotion-suppression effect (PSE) of every cell of a perturbation (arXiv 1904.02057, section 4).

With x' = x0 + d the adversarial image and d^(i) the perturbation without cell i,

    s_i = max(Z(x0 + d^(i))_t0 - Z(x')_t0, 0)     suppression: how much cell i lowers the true class's logit
    p_i = max(Z(x')_t - Z(x0 + d^(i))_t, 0)       promotion: how much cell i raises the target's logit
    PSR_i = log2(p_i / s_i)

PSR < -1 is suppression-dominated, -1 <= PSR <= 1 balanced, PSR > 1 promotion-dominated.
"""

from __future__ import annotations

import enum
import functools
import operator
from typing import Any, SupportsIndex, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxinterp.attacks.driver import check
from jaxinterp.canonical import canonical
from jaxinterp.network import Model, as_model
from jaxinterp.pytree import pytree
from jaxinterp.sharding import mesh_of, on_mesh

Cell: TypeAlias = SupportsIndex | tuple[SupportsIndex, SupportsIndex]
"""A cell's side in pixels, or its height and width; whole numbers of any type."""

# Cells in one forward pass: enough to fill the machine.
_CHUNK = {"cpu": 16}
_CHUNK_ACCELERATOR = 128


class Kind(enum.IntEnum):
    """What a cell of a perturbation does."""

    NONE = 0
    SUPPRESSION = 1
    BALANCED = 2
    PROMOTION = 3

    @property
    def label(self) -> str:
        """How tables and figures call it."""
        return _LABELS[self]


_LABELS = {
    Kind.NONE: "none",
    Kind.SUPPRESSION: "suppression-dominated",
    Kind.BALANCED: "balanced",
    Kind.PROMOTION: "promotion-dominated",
}


@pytree
class Effect:
    """Suppression and promotion of every cell; [B,gh,gw] except where stated.

    Attributes:
        suppression: s, in logits.
        promotion: p, in logits.
        ratio: PSR = log2(p / s); +inf where only s is zero, -inf where only p is, NaN where both are.
        kind: codes of `Kind`.
        norm: Euclidean norm of the perturbation in the cell, in pixel units.
        forward: [B] forward passes that the image paid for: one for every cell with a perturbation, one for x'.
    """

    suppression: Float[Array, "b gh gw"]
    promotion: Float[Array, "b gh gw"]
    ratio: Float[Array, "b gh gw"]
    kind: Int[Array, "b gh gw"]
    norm: Float[Array, "b gh gw"]
    forward: Int[Array, " b"]


def _sides(cell: Cell) -> tuple[int, int]:
    try:
        height, width = cell if isinstance(cell, tuple | list) else (cell, cell)
        return operator.index(height), operator.index(width)
    except (TypeError, ValueError):
        raise TypeError(f"cells must be a whole number of pixels, or a height and a width, got {cell!r}") from None


def grid(height: int, width: int, cell: Cell) -> tuple[int, int]:
    """How many cells of `cell` pixels (a side, or height and width) tile an image, smaller ones at the far edges.

    Raises:
        ValueError: the cell is smaller than a pixel or larger than the image.
    """
    ch, cw = _sides(cell)
    if not (1 <= ch <= height and 1 <= cw <= width):
        raise ValueError(f"cells must be from 1 pixel to the image's {height} x {width} pixels, got {ch} x {cw}")
    return -(-height // ch), -(-width // cw)


def cell_map(height: int, width: int, cell: Cell) -> Int[Array, "h w"]:
    """The index of the cell of every pixel, counted row by row. Raises ValueError as `grid` does."""
    ch, cw = _sides(cell)
    _, columns = grid(height, width, cell)
    return (jnp.arange(height) // ch * columns)[:, None] + jnp.arange(width) // cw


def pse(
    model: Model,
    clean: Any,
    adversarial: Any,
    labels: Any,
    targets: Any,
    cells: Cell = 14,
    *,
    tolerance: float = 1e-6,
    chunk: int | None = None,
) -> Effect:
    """The effect of every cell, by leaving one out at a time, on logits.

    A cell without perturbation costs no forward pass. Any number of perturbed cells runs in one compiled program,
    and under jit too.

    Args:
        model: images -> logits.
        clean: x0 [B,H,W,C] float in [0, 1].
        adversarial: x' [B,H,W,C] float in [0, 1].
        labels: t0 [B], true classes.
        targets: t [B], the classes that the attack promotes (of an untargeted attack: the class it reached).
        cells: side of a cell in pixels, or its height and width.
        tolerance: effects up to this fraction of the range of an image's logits are rounding: a cell with both
            effects below is of kind NONE.
        chunk: cells in one forward pass; None chooses by backend.

    Raises:
        ValueError: shapes that differ, images outside [0, 1], classes out of range, a target equal to its label, a
            cell larger than the image, a tolerance that is negative or not finite, a chunk below 1.
        TypeError: as `jaxinterp.attacks.run`.
    """
    model = as_model(model)
    clean, labels, targets, _ = check(model, clean, labels, targets, names=("clean", "labels"))
    adversarial = check(model, adversarial, labels, names=("adversarial", "labels"))[0]
    if adversarial.shape != clean.shape:
        raise ValueError(f"adversarial images {adversarial.shape} and clean images {clean.shape} must match")
    if targets is None:
        raise ValueError("targets are needed: the classes that the perturbation promotes")
    cell = _sides(cells)
    rows, columns = grid(clean.shape[1], clean.shape[2], cell)
    if not isinstance(tolerance, Tracer) and not 0 <= tolerance < float("inf"):
        raise ValueError(f"tolerance must be finite and not negative, got {tolerance}")
    if chunk is None:
        chunk = _CHUNK.get(jax.default_backend(), _CHUNK_ACCELERATOR)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    chunk = min(chunk, clean.shape[0] * (rows * columns + 1))
    program = _leave_one_out(mesh_of(clean), cell, chunk)
    return program(model, clean, adversarial, labels, targets, jnp.float32(tolerance))


@functools.cache
def _leave_one_out(mesh, cell: tuple[int, int], chunk: int):
    @canonical
    def program(model, clean, adversarial, labels, targets, tolerance):
        batch, height, width, _ = clean.shape
        rows, columns = grid(height, width, cell)
        cells, where = rows * columns, cell_map(height, width, cell)
        squares = _cell_sums(jnp.square(adversarial - clean), cell)
        perturbed = _cell_sums((adversarial != clean).astype(jnp.float32), cell).reshape(batch, cells) > 0

        # One pair (image, cell) a forward pass; cell number `cells` is no cell, and its pass the one of x' itself,
        # in the same program as the others, so that a cell without effect gives a difference of exactly zero.
        needed = jnp.concatenate([perturbed, jnp.any(perturbed, axis=1, keepdims=True)], axis=1)
        count = jnp.sum(needed, dtype=jnp.int32)
        pairs = jnp.argsort(~needed.reshape(-1), stable=True)
        pairs = jnp.concatenate([pairs, jnp.zeros(chunk, pairs.dtype)])

        def body(carry):
            start, by_label, by_target, spread = carry
            chosen = lax.dynamic_slice(pairs, (start,), (chunk,))
            image, cut = chosen // (cells + 1), chosen % (cells + 1)
            without = where[None, :, :, None] == cut[:, None, None, None]
            logits = model(jnp.where(without, clean[image], adversarial[image]))
            valid = start + jnp.arange(chunk) < count
            to = jnp.where(valid, chosen, needed.size)  # beyond the end: dropped
            row = jnp.arange(chunk)
            return (
                start + chunk,
                by_label.at[to].set(logits[row, labels[image]], mode="drop"),
                by_target.at[to].set(logits[row, targets[image]], mode="drop"),
                spread.at[to].set(jnp.max(logits, axis=-1) - jnp.min(logits, axis=-1), mode="drop"),
            )

        empty = jnp.zeros(needed.size)
        _, by_label, by_target, spread = lax.while_loop(
            lambda carry: carry[0] < count, body, (jnp.int32(0), empty, empty, empty)
        )
        by_label, by_target, spread = (x.reshape(batch, cells + 1) for x in (by_label, by_target, spread))
        zero = jnp.float32(0)
        suppression = jnp.where(perturbed, jnp.maximum(by_label[:, :-1] - by_label[:, -1:], 0), zero)
        promotion = jnp.where(perturbed, jnp.maximum(by_target[:, -1:] - by_target[:, :-1], 0), zero)
        ratio, kind = classify(suppression, promotion, tolerance * spread[:, -1:])
        shape = (batch, rows, columns)
        return Effect(
            suppression=suppression.reshape(shape),
            promotion=promotion.reshape(shape),
            ratio=ratio.reshape(shape),
            kind=kind.reshape(shape),
            norm=jnp.sqrt(squares),
            forward=jnp.sum(needed, axis=1, dtype=jnp.int32),
        )

    return on_mesh(mesh, program, (False, True, True, True, True, False))


def classify(
    suppression: Float[Array, "*shape"],
    promotion: Float[Array, "*shape"],
    tolerance: Float[Array, ...] | float,
) -> tuple[Float[Array, "*shape"], Int[Array, "*shape"]]:
    """PSR and kind of cells with the given effects.

    Both effects within `tolerance`, or one that is not a number: kind NONE, with ratio NaN.
    """
    nothing = (suppression <= tolerance) & (promotion <= tolerance)
    nothing = nothing | jnp.isnan(suppression + promotion)
    ratio = jnp.where(nothing, jnp.nan, jnp.log2(promotion / suppression))
    # Compared without the logarithm, so that p = 2 s is balanced to the last bit.
    kind = jnp.where(
        promotion > 2 * suppression,
        Kind.PROMOTION,
        jnp.where(suppression > 2 * promotion, Kind.SUPPRESSION, Kind.BALANCED),
    )
    return ratio, jnp.where(nothing, Kind.NONE, kind).astype(jnp.int32)


def shares(kind: Int[Array, "b gh gw"]) -> Float[Array, "b 3"]:
    """Shares of suppression-dominated, balanced and promotion-dominated cells among those not of kind NONE.

    NaN for an image all of whose cells are of kind NONE.
    """
    counts = jnp.stack([jnp.sum(kind == k, axis=(1, 2)) for k in list(Kind)[1:]], axis=-1)
    return counts / jnp.sum(counts, axis=-1, keepdims=True)


def _cell_sums(values: Float[Array, "b h w c"], cell: tuple[int, int]) -> Float[Array, "b gh gw"]:
    """Sums over the pixels and channels of every cell."""
    batch, height, width, channels = values.shape
    rows, columns = grid(height, width, cell)
    padded = jnp.pad(values, ((0, 0), (0, rows * cell[0] - height), (0, columns * cell[1] - width), (0, 0)))
    return jnp.sum(padded.reshape(batch, rows, cell[0], columns, cell[1], channels), axis=(2, 4, 5))
