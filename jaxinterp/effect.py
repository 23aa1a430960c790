"""The promotion-suppression effect (PSE) of every cell of a perturbation (arXiv 1904.02057, section 4).

With x' = x0 + d the adversarial image and d^(i) the perturbation without cell i,

    s_i = max(Z(x0 + d^(i))_t0 - Z(x')_t0, 0)     suppression: how much cell i lowers the true class's logit
    p_i = max(Z(x')_t - Z(x0 + d^(i))_t, 0)       promotion: how much cell i raises the target's logit
    PSR_i = log2(p_i / s_i)

PSR < -1 is suppression-dominated, -1 <= PSR <= 1 balanced, PSR > 1 promotion-dominated.

That is the paper's definition, "leave_one_out" on logits. Beside it stand "add_one_in" (x0 with cell i alone against
x0), an estimate from one gradient, "first_order" (the changes of the logits are taken for <grad Z(x'), d_i>), and the
log-softmax and the softmax in place of the logits. For a linear model the three agree on logits.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import operator
from collections.abc import Callable
from typing import Any, SupportsIndex, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxinterp import windowed
from jaxinterp.attacks.driver import check, whole
from jaxinterp.canonical import canonical
from jaxinterp.network import Model, as_model, suggest
from jaxinterp.pytree import pytree
from jaxinterp.sharding import mesh_of, on_mesh, with_automatic_axes

Cell: TypeAlias = SupportsIndex | tuple[SupportsIndex, SupportsIndex]
"""A cell's side in pixels, or its height and width; whole numbers of any type."""

_METHODS = {"leave_one_out": "leave one out", "add_one_in": "add one in", "first_order": "first-order estimate"}
_SCALES = {
    "logit": ("logit", "logits"),
    "log_softmax": ("log-probability", "log-probabilities"),
    "softmax": ("probability", "probabilities"),
}
METHODS, SCALES = tuple(_METHODS), tuple(_SCALES)

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


def _choice(name: str, given: str, known: tuple[str, ...]) -> str:
    if (chosen := str(given).replace("-", "_")) not in known:
        raise ValueError(f"unknown {name} {given!r}{suggest(given, known)}")
    return chosen


@dataclasses.dataclass(frozen=True)
class Definition:
    """What is taken for the effect of a cell, and its words for tables and figures.

    Attributes:
        method: one of `METHODS`, see `pse`.
        scale: one of `SCALES`.

    Raises:
        ValueError: an unknown one.
    """

    method: str = "leave_one_out"
    scale: str = "logit"

    def __post_init__(self):
        object.__setattr__(self, "method", _choice("effect", self.method, METHODS))
        object.__setattr__(self, "scale", _choice("scale", self.scale, SCALES))

    def __str__(self) -> str:
        return f"{_METHODS[self.method]}, {self.unit}"

    @property
    def score(self) -> str:
        """What effects are differences of: logit, log-probability or probability."""
        return _SCALES[self.scale][0]

    @property
    def unit(self) -> str:
        """Of effects: logits, log-probabilities or probabilities."""
        return _SCALES[self.scale][1]

    @property
    def note(self) -> str:
        """What stands beside numbers and names: the definition in parentheses; of the paper's, nothing."""
        return "" if self == PAPER else f" ({self})"


PAPER = Definition()
"""The paper's: one cell is left out, and the effects are on logits."""


@pytree
class Effect:
    """Suppression and promotion of every cell: [B,gh,gw] for a grid, [B,n] for a partition, except where stated.

    Attributes:
        suppression: s, in logits (or on the scale that was asked for).
        promotion: p, likewise.
        ratio: PSR = log2(p / s); +inf where only s is zero, -inf where only p is, NaN where both are.
        kind: codes of `Kind`.
        norm: Euclidean norm of the perturbation in the cell, in pixel units.
        label_change: how the cell changes the true class's logit, signed: s = max(-label_change, 0).
        target_change: how the cell changes the target's logit, signed: p = max(target_change, 0).
        forward: [B] forward passes that the image paid for: one for every cell with a perturbation, and one for the
            image they are compared with.
        backward: [B] backward passes: two for an estimate of first order, else none.
    """

    suppression: Float[Array, " b *cells"]
    promotion: Float[Array, " b *cells"]
    ratio: Float[Array, " b *cells"]
    kind: Int[Array, " b *cells"]
    norm: Float[Array, " b *cells"]
    label_change: Float[Array, " b *cells"]
    target_change: Float[Array, " b *cells"]
    forward: Int[Array, " b"]
    backward: Int[Array, " b"]


def sides(cell: Cell) -> tuple[int, int]:
    """Height and width of a cell. Raises TypeError where they are no whole numbers."""
    try:
        given: Any = cell
        height, width = given if np.shape(given) == (2,) else (given, given)
        if any(isinstance(side, bool | np.bool_) for side in (height, width)):
            raise TypeError
        return operator.index(height), operator.index(width)
    except (TypeError, ValueError):
        raise TypeError(f"cells must be a whole number of pixels, or a height and a width, got {cell!r}") from None


def grid(height: int, width: int, cell: Cell) -> tuple[int, int]:
    """How many cells of `cell` pixels (a side, or height and width) tile an image, smaller ones at the far edges.

    Raises:
        ValueError: the cell is smaller than a pixel or larger than the image.
    """
    ch, cw = sides(cell)
    if not (1 <= ch <= height and 1 <= cw <= width):
        raise ValueError(f"cells must be from 1 pixel to the image's {height} x {width} pixels, got {ch} x {cw}")
    return -(-height // ch), -(-width // cw)


def cell_map(height: int, width: int, cell: Cell) -> Int[Array, "h w"]:
    """The index of the cell of every pixel, counted row by row. Raises ValueError as `grid` does."""
    return jnp.asarray(_numbered(height, width, cell))


def _numbered(height: int, width: int, cell: Cell) -> Int[np.ndarray, "h w"]:
    ch, cw = sides(cell)
    _, columns = grid(height, width, cell)
    return (np.arange(height, dtype=np.int32) // ch * columns)[:, None] + np.arange(width, dtype=np.int32) // cw


def partition(cells: Any, batch: int, height: int, width: int) -> tuple[Int[np.ndarray, "n h w"], tuple[int, ...]]:
    """The number of the cell of every pixel, and the shape in which results are arranged.

    Args:
        cells: the side of a cell in pixels, or its height and width: a grid; or the partition itself, integers [H,W]
            for all images or [B,H,W], such as superpixels, numbered from 0.
        batch: B.
        height: H.
        width: W.

    Returns:
        [1,H,W] or [B,H,W], and (gh, gw) for a grid, (n,) for a partition whose largest number is n - 1. A number
        that no pixel has is a cell without perturbation.

    Raises:
        ValueError: a cell smaller than a pixel or larger than the image; a partition of another shape, that leaves
            pixels out (negative numbers), or with numbers beyond the count of pixels.
        TypeError: cells that are no whole numbers; a partition that is traced.
    """
    if not hasattr(cells, "shape") or len(cells.shape) < 2:
        cell = sides(cells)
        return _numbered(height, width, cell)[None], grid(height, width, cell)
    if isinstance(cells, Tracer):
        raise TypeError("a partition must be concrete, since its largest number decides the shape of the result")
    given = np.asarray(cells)
    if given.dtype.kind not in "iu":
        raise TypeError(f"a partition into cells must be integers [H,W] or [B,H,W], got {given.dtype}")
    if given.shape not in ((height, width), (batch, height, width)):
        expected = f"[{height},{width}] or [{batch},{height},{width}]"
        raise ValueError(f"a partition into cells must have shape {expected}, got {given.shape}")
    given = given.reshape(-1, height, width)
    if np.any(given < 0):
        example, row, column = np.argwhere(given < 0)[0]
        which = f" of example {example}" if len(given) > 1 else ""
        raise ValueError(
            f"the partition leaves {np.sum(given < 0)} pixels out: cells are numbered from 0, but row {row}, column "
            f"{column}{which} has {given[example, row, column]}"
        )
    if (largest := int(np.max(given))) >= height * width:
        raise ValueError(f"a partition has at most as many cells as pixels, {height * width}, got number {largest}")
    return given.astype(np.int32), (largest + 1,)


@with_automatic_axes
def pse(
    model: Model,
    clean: Any,
    adversarial: Any,
    labels: Any,
    targets: Any,
    cells: Any = 14,
    *,
    method: str = "leave_one_out",
    scale: str = "logit",
    tolerance: float = 1e-6,
    chunk: int | None = None,
    windows: bool | None = None,
) -> Effect:
    """The effect of every cell.

    A cell without perturbation costs no forward pass. Any number of cells, of any shape, runs in one compiled program,
    and under jit too. Where the images are on a mesh, its devices share the cells of all images, and one image
    occupies them all.

    Args:
        model: images -> logits.
        clean: x0 [B,H,W,C] float in [0, 1].
        adversarial: x' [B,H,W,C] float in [0, 1].
        labels: t0 [B], true classes.
        targets: t [B], the classes that the attack promotes (of an untargeted attack: the class it reached).
        cells: side of a cell in pixels, or its height and width, or any partition, see `partition`.
        method: "leave_one_out", the paper's; "add_one_in", what the cell does alone; "first_order", an estimate of
            the first from gradients at x', for all cells at the price of one forward and two backward passes.
        scale: "logit", the paper's; "log_softmax" or "softmax" of the logits.
        tolerance: effects up to this fraction of the range of an image's scores are rounding: a cell with both
            effects below is of kind NONE.
        chunk: cells in one forward pass; None chooses by backend.
        windows: compute only what a cell can reach, see `jaxinterp.windowed`: the same effects from less arithmetic, by
            a program of its own for each set of cells. None chooses: on CPUs and GPUs, where that saves more than it
            costs to compile. (On GPUs the same to rounding.)

    Raises:
        ValueError: shapes that differ, images outside [0, 1], classes out of range, a target equal to its label,
            cells as in `partition`, an unknown method or scale, a tolerance that is negative or not finite, a chunk
            below 1, windows of an estimate of first order.
        TypeError: as `jaxinterp.attacks.run` and `partition`.
    """
    model = as_model(model)
    method, scale = _choice("method", method, METHODS), _choice("scale", scale, SCALES)
    if np.shape(adversarial) != np.shape(clean):
        raise ValueError(f"adversarial images {np.shape(adversarial)} and clean images {np.shape(clean)} must match")
    clean, labels, targets, _ = check(model, clean, labels, targets, names=("clean", "labels"))
    adversarial = check(model, adversarial, labels, names=("adversarial", "labels"))[0]
    if not clean.size:
        raise ValueError(f"clean: expected at least one image of at least one pixel, got shape {clean.shape}")
    if targets is None:
        raise ValueError("targets are needed: the classes that the perturbation promotes")
    batch, height, width, _ = clean.shape
    where, shape = partition(cells, batch, height, width)
    if not isinstance(tolerance, Tracer):
        try:
            known = float(tolerance)
        except (TypeError, ValueError):
            raise TypeError(f"tolerance must be one number, got {tolerance!r}") from None
        if not 0 <= known < float("inf"):
            raise ValueError(f"tolerance must be finite and not negative, got {tolerance}")
    if chunk is None:
        chunk = _CHUNK.get(jax.default_backend(), _CHUNK_ACCELERATOR)
    chunk = whole(chunk, "chunk")
    if windows is not None and not isinstance(windows, bool):
        raise TypeError(f"windows must be True, False or None, got {windows!r}")
    if windows and method == "first_order":
        raise ValueError("windows: an estimate of first order has none")
    if method == "first_order":
        program = _first_order(mesh_of(clean), scale, where.shape[0] > 1)
    else:
        # A power of two below `chunk` where there are fewer cells than that.
        chunk = min(chunk, 1 << (batch * (math.prod(shape) + 1) - 1).bit_length())
        around = None if windows is False else boxes(where, math.prod(shape))
        if windows is None and around is not None and not _pays(model, clean, around):
            around = None
        program = _one_at_a_time(mesh_of(clean, anyhow=True), method, scale, chunk, around)
    changes = program(model, clean, adversarial, where, labels, targets)
    return _effect(shape)(*changes, jnp.float32(tolerance))


def boxes(numbers: Int[np.ndarray, "n h w"], cells: int) -> tuple[tuple[int, int, int, int], ...]:
    """The rectangle around every cell, over all images.

    Args:
        numbers: of the cell of every pixel, [1,H,W] or [B,H,W], see `partition`.
        cells: how many cells there are.

    Returns:
        First row, first column, the row after the last and the column after the last of every cell, in pixels; a pixel
        in a corner for a number that no pixel has.
    """
    lows, highs = np.full((cells, 2), np.iinfo(np.int64).max), np.zeros((cells, 2), np.int64)
    for axis in (0, 1):
        places = np.broadcast_to(np.expand_dims(np.arange(numbers.shape[1 + axis]), 1 - axis), numbers.shape)
        np.minimum.at(lows[:, axis], numbers.ravel(), places.ravel())
        np.maximum.at(highs[:, axis], numbers.ravel(), places.ravel() + 1)
    lows = np.where(highs == 0, 0, lows)  # a number that no pixel has
    return tuple(map(tuple, np.concatenate([lows, np.maximum(highs, 1)], axis=1).tolist()))


# What must be saved in one call, in multiplications by backend and relative to all: compiling takes some seconds more.
# The last is the work, in pixels, below which no network saves as much.
_SAVED, _SAVING, _PIXELS = {"cpu": 3e11, "gpu": 3e12}, 1.2, 1e6


def _pays(model: Model, clean: Array, boxes: tuple[tuple[int, int, int, int], ...]) -> bool:
    batch, height, width, _ = clean.shape
    enough = _SAVED.get(jax.default_backend())
    if enough is None or batch * len(boxes) * height * width < _PIXELS:
        return False
    leaves, treedef = jax.tree.flatten(model)
    specs = tuple(jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    cost = _cost(treedef, specs, clean.shape[1:], boxes)
    saved = (cost.whole - cost.windowed) * len(boxes) * clean.shape[0]
    return cost.saving >= _SAVING and saved >= enough


@functools.lru_cache(maxsize=64)
def _cost(treedef, specs, shape: tuple[int, ...], boxes) -> windowed.Cost:
    model = jax.tree.unflatten(treedef, specs)
    return windowed.cost(_call, model, jax.ShapeDtypeStruct((1, *shape), jnp.float32), np.array(boxes))


def _call(model: Model, images: Array) -> Array:
    return model(images)


def _score(logits: Float[Array, "b k"], scale: str) -> Float[Array, "b k"]:
    return logits if scale == "logit" else getattr(jax.nn, scale)(logits, axis=-1)


def _by_cell(values: Array, where: Int[Array, "n h w"]) -> Array:
    """Sums of the values [B,H,W] over every cell, [B,H*W]: as many as there can be cells."""
    capacity = where.shape[1] * where.shape[2]

    def of_image(values, where):
        return jax.ops.segment_sum(values.reshape(-1), where.reshape(-1), num_segments=capacity)

    return jax.vmap(of_image)(values, jnp.broadcast_to(where, values.shape))


def _perturbation(clean, adversarial, where):
    """Norm of the perturbation of every cell, and whether there is any, [B,H*W]."""
    squares = _by_cell(jnp.sum(jnp.square(adversarial - clean), axis=-1), where)
    touched = jnp.any(adversarial != clean, axis=-1).astype(jnp.int32)
    return jnp.sqrt(squares), _by_cell(touched, where) > 0


def _of(scores: Float[Array, "b k"], classes: Int[Array, " b"]) -> Float[Array, " b"]:
    return jnp.take_along_axis(scores, classes[:, None], axis=1)[:, 0]


def _range(scores: Float[Array, "b k"]) -> Float[Array, " b"]:
    return jnp.max(scores, axis=-1) - jnp.min(scores, axis=-1)


@functools.cache
def _one_at_a_time(
    mesh: Mesh | None, method: str, scale: str, chunk: int, boxes: tuple[tuple[int, int, int, int], ...] | None
):
    devices = 1 if mesh is None else mesh.size
    together = _through_windows if boxes is not None else _all_together

    @canonical
    def passes(me, model, clean, adversarial, where, labels, targets):
        norm, perturbed = _perturbation(clean, adversarial, where)
        if boxes is not None:
            norm, perturbed = norm[:, : len(boxes)], perturbed[:, : len(boxes)]
        base, cell = (clean, adversarial) if method == "add_one_in" else (adversarial, clean)
        # One pair (image, cell) a forward pass; the number after the last is no cell, and its pass the one of the
        # image that the others are compared with, in the same program, so that a cell without effect gives exactly
        # zero.
        needed = jnp.concatenate([perturbed, jnp.any(perturbed, axis=1, keepdims=True)], axis=1)

        def measures(logits, image):
            scores = _score(logits, scale)
            return _of(scores, labels[image]), _of(scores, targets[image]), _range(scores)

        found = together(model, base, cell, where, needed, measures, me, devices, chunk, boxes)
        return found, norm, perturbed

    def changes(found, norm, perturbed):
        by_label, by_target, spread = found
        sign = 1 if method == "add_one_in" else -1  # with the cell minus without it
        label_change = jnp.where(perturbed, sign * (by_label[:, :-1] - by_label[:, -1:]), 0)
        target_change = jnp.where(perturbed, sign * (by_target[:, :-1] - by_target[:, -1:]), 0)
        forward = jnp.sum(perturbed, axis=1, dtype=jnp.int32) + jnp.any(perturbed, axis=1)
        return label_change, target_change, norm, spread[:, -1], forward, jnp.zeros_like(forward)

    if mesh is None:
        return jax.jit(lambda *args: changes(*passes(jnp.int32(0), *args)))

    def on_each(*args):
        axis = mesh.axis_names[0]
        found, norm, perturbed = passes(lax.axis_index(axis), *args)
        return changes(lax.psum(found, axis), norm, perturbed)  # all but one device have zeros

    nowhere = PartitionSpec()
    return jax.jit(jax.shard_map(on_each, mesh=mesh, in_specs=nowhere, out_specs=nowhere, check_vma=False))


def _loop(needed: Bool[Array, " n"], score: Callable, me: Array, devices: int, chunk: int) -> list[Array]:
    """Three measures of every entry that is needed, chunk by chunk, each chunk on one of the devices; else zeros."""
    count = jnp.sum(needed, dtype=jnp.int32)
    (entries,) = jnp.nonzero(needed, size=needed.size, fill_value=0)
    entries = jnp.concatenate([entries, jnp.zeros(chunk, entries.dtype)])

    def body(carry):
        start, *found = carry
        chosen = lax.dynamic_slice(entries, (start,), (chunk,))
        to = jnp.where(start + jnp.arange(chunk) < count, chosen, needed.size)  # beyond the end: dropped
        measured = score(chosen)
        return start + devices * chunk, *(x.at[to].set(y, mode="drop") for x, y in zip(found, measured, strict=True))

    start, empty = jnp.asarray(me * chunk, jnp.int32), jnp.zeros(needed.size)
    return list(lax.while_loop(lambda carry: carry[0] < count, body, (start, empty, empty, empty))[1:])


def _all_together(model, base, cell, where, needed, measures, me, devices, chunk, boxes):
    """Whole forward passes, of any cells of any images."""

    def score(chosen):
        image, cut = chosen // needed.shape[1], chosen % needed.shape[1]
        inside = (where[image % where.shape[0]] == cut[:, None, None])[..., None]
        return measures(model(jnp.where(inside, cell[image], base[image])), image)

    return [x.reshape(needed.shape) for x in _loop(needed.reshape(-1), score, me, devices, chunk)]


def _through_windows(model, base, cell, where, needed, measures, me, devices, chunk, boxes):
    """What a cell reaches, image by image: the feature maps of an image are computed once, and kept for its cells."""

    def of_image(i):
        logits = windowed.evaluator(_call, model, base[i][None], np.array(boxes))
        numbers = where[i % where.shape[0]]

        def score(chosen):
            def one(cut):
                changed = jnp.where((numbers == cut)[..., None], cell[i], base[i])
                return logits(changed, jnp.minimum(cut, len(boxes) - 1))

            return measures(jax.vmap(one)(chosen), jnp.full(chosen.shape, i))

        return _loop(needed[i], score, me, devices, chunk)

    def nothing(i):
        return [jnp.zeros(needed.shape[1])] * 3

    work = me * chunk < jnp.sum(needed, axis=1)
    return lax.map(lambda i: lax.cond(work[i], of_image, nothing, i), jnp.arange(needed.shape[0]))


@functools.cache
def _first_order(mesh: Mesh | None, scale: str, of_each: bool):
    @canonical
    def program(model, clean, adversarial, where, labels, targets):
        norm, perturbed = _perturbation(clean, adversarial, where)
        scores, pull_back = jax.vjp(lambda x: _score(model(x), scale), adversarial)

        def change(classes):
            (gradient,) = pull_back(jax.nn.one_hot(classes, scores.shape[-1], dtype=scores.dtype))
            return _by_cell(jnp.sum(gradient * (adversarial - clean), axis=-1), where)

        paid = jnp.any(perturbed, axis=1).astype(jnp.int32)
        return change(labels), change(targets), norm, _range(scores), paid, 2 * paid

    return on_mesh(mesh, program, (False, True, True, of_each, True, True))


@functools.cache
def _effect(shape: tuple[int, ...]):
    @jax.jit
    def effect(label_change, target_change, norm, spread, forward, backward, tolerance):
        def arranged(x):
            return x[:, : math.prod(shape)].reshape(x.shape[0], *shape)

        label_change, target_change, norm = arranged(label_change), arranged(target_change), arranged(norm)
        suppression, promotion = jnp.maximum(0 - label_change, 0), jnp.maximum(target_change, 0)  # no -0.0
        ratio, kind = classify(suppression, promotion, tolerance * jnp.expand_dims(spread, range(1, 1 + len(shape))))
        return Effect(
            suppression=suppression,
            promotion=promotion,
            ratio=ratio,
            kind=kind,
            norm=norm,
            label_change=label_change,
            target_change=target_change,
            forward=forward,
            backward=backward,
        )

    return effect


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


def shares(kind: Int[Array, " b *cells"]) -> Float[Array, "b 3"]:
    """Shares of suppression-dominated, balanced and promotion-dominated cells among those not of kind NONE.

    NaN for an image all of whose cells are of kind NONE.
    """
    flat = kind.reshape(kind.shape[0], math.prod(kind.shape[1:]))
    counts = jnp.stack([jnp.sum(flat == k, axis=1) for k in list(Kind)[1:]], axis=-1)
    return counts / jnp.sum(counts, axis=-1, keepdims=True)
