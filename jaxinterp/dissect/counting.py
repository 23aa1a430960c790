"""How often units and concepts occur together: the counts behind the IoU of network dissection.

A unit's mask is where its feature map, interpolated to the label map, exceeds the unit's threshold (Bau et al. 2017,
section 2.2). Over all images are counted: pixels under the mask that carry a label (`intersection`), pixels under the
mask (`activation`), those of images in which a label's category occurs (`activation_by_category`), and pixels that
carry a label (`label_area`). All of them are integers, so the order of images, the size of batches and the number of
devices do not change anything.

The two published programs disagree about when a category occurs: anywhere in the image (`union="image"`, the
definition in the paper and its first program), or somewhere under the unit's mask (`union="lite"`, NetDissect-Lite).
Both are counted.

Only labels that are present in an image are compared, and where it is faster only what can be under a mask: `gated`
interpolates around the positions above the threshold, `dense` all units of all images at once. Feature maps larger than
label maps are counted densely.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jaxinterp.dissect import gated, quantiles, shares, wide
from jaxinterp.dissect.upsample import upsample
from jaxinterp.dissect.wide import Wide
from jaxinterp.pytree import pytree
from jaxinterp.sharding import mesh_of

Union = Literal["image", "lite"]
Form = Literal["auto", "gated", "dense"]
UNIONS: tuple[Union, ...] = ("image", "lite")
FORMS: tuple[Form, ...] = ("auto", "gated", "dense")


@dataclasses.dataclass(frozen=True, eq=False)
class Tally:
    """Counts of pixels, int64.

    Attributes:
        intersection: [U,L] under the mask of a unit and with a label. A label that a pixel carries in two channels
            counts twice, as in the published programs.
        activation: [U] under the mask.
        activation_by_category: [U,C] under the mask, in images where the category occurs under the rule `union`.
        label_area: [L] with the label; a whole-image label covers every pixel.
        union: the rule.
    """

    intersection: np.ndarray
    activation: np.ndarray
    activation_by_category: np.ndarray
    label_area: np.ndarray
    union: str


@pytree
class TallyState:
    """Counts so far. Label first, so that the rows of present labels are contiguous."""

    intersection: Wide  # [L,U]
    activation: Wide  # [U]
    by_category: Wide  # [2,C,U]: in the order of UNIONS
    label_area: Wide  # [L]


@pytree
class Present:
    """The labels of some images, reduced to those that are present.

    Attributes:
        places: [B,channels,sh,sw] the place of a pixel's label in `labels` plus 1; 0 = no label.
        labels: [B,P] the labels present in an image; places that are not needed hold 0.
        times: [B,P] how many whole-image labels have this number (0 for a label that only pixels carry).
        area: [B,P] pixels with the label.
    """

    places: Integer[Any, "batch channels sh sw"]
    labels: Integer[Any, "batch present"]
    times: Integer[Any, "batch present"]
    area: Integer[Any, "batch present"]


_MOST_PIXELS = 1 << 24  # of a label map, over all channels: what float32 counts


def present(planes: Any, scalars: Any, number: int, *, least: int = 8) -> Present:
    """Finds the labels that are present in each image, with NumPy.

    Args:
        planes: [B,channels,sh,sw] label numbers, 0 = none.
        scalars: [B,n] whole-image labels, 0 = none.
        number: L, one more than the largest label number.
        least: places that are kept at least; their number is the next power of two, so that few programs are needed.

    Raises:
        TypeError: labels are not integers.
        ValueError: a wrong rank, a label number out of range, or more than 2^24 pixels in the label maps of an image.
    """
    planes, scalars = np.asarray(planes), np.asarray(scalars)
    for name, labels, rank in (("planes", planes, 4), ("scalars", scalars, 2)):
        if not np.issubdtype(labels.dtype, np.integer):
            raise TypeError(f"{name}: expected integers, got {labels.dtype}")
        if labels.ndim != rank or len(labels) != len(planes):
            raise ValueError(f"{name}: expected {rank} axes, the first of length {len(planes)}, got {labels.shape}")
        if labels.size and not 0 <= labels.min() <= labels.max() < number:
            raise ValueError(
                f"{name}: expected label numbers from 0 to {number - 1}, got {labels.min()} to {labels.max()}"
            )
    if planes[:1].size > _MOST_PIXELS:
        raise ValueError(f"planes: expected at most {_MOST_PIXELS} pixels in an image, got {planes[:1].size}")
    pixels = planes.shape[2] * planes.shape[3]
    found, places = [], np.zeros(planes.shape, np.uint16)
    for i, (plane, scalar) in enumerate(zip(planes, scalars, strict=True)):
        counts = np.bincount(plane.ravel(), minlength=number)
        times = np.bincount(scalar, minlength=number)
        counts[0] = times[0] = 0
        labels = np.flatnonzero(counts + times)
        table = np.zeros(number, np.uint16)
        table[labels] = np.arange(1, len(labels) + 1)
        np.take(table, plane, out=places[i], mode="clip")  # none is out of range; by default NumPy copies first
        found.append((labels, times[labels], counts[labels] + times[labels] * pixels))
    most = max([least, *(len(labels) for labels, _, _ in found)])
    width = 1 << (most - 1).bit_length()
    packed = np.zeros((3, len(planes), width), np.int32)
    for i, columns in enumerate(found):
        for row, column in zip(packed, columns, strict=True):
            row[i, : len(column)] = column
    return Present(places.astype(np.uint8) if width < 255 else places, *packed)


def widened(labels: Present, width: int) -> Present:
    """The same with `width` places for labels, or as many as there are already."""
    more = [(0, 0), (0, max(0, width - labels.labels.shape[1]))]
    places = labels.places.astype(np.uint8 if width < 255 else np.uint16)
    return Present(places, *(np.pad(column, more) for column in (labels.labels, labels.times, labels.area)))


def init(units: int, labels: int, categories: int) -> TallyState:
    """Counts of no image."""
    return TallyState(
        wide.zeros(labels, units),
        wide.zeros(units),
        wide.zeros(len(UNIONS), categories, units),
        wide.zeros(labels),
    )


def update(
    state: TallyState,
    features: Float[Array, "batch h w units"],
    thresholds: Float[Array, " units"],
    labels: Present,
    membership: Float[Array, "labels categories"],
    *,
    form: Form = "auto",
) -> TallyState:
    """Adds a batch of images.

    Args:
        state: counts so far.
        features: feature maps of B images.
        thresholds: one for each unit.
        labels: what the images carry; an image without labels and with features below the thresholds adds nothing.
        membership: 1 where a label belongs to a category, see `memberships`.
        form: "gated" or "dense"; "auto" is gated on CPUs and dense elsewhere.
    """
    if form == "auto":
        form = "gated" if jax.default_backend() == "cpu" else "dense"
    apart = form == "gated" and gated.applies(features.shape[1:3], labels.places.shape[2:])
    count = gated.count if apart else _dense
    both, active = count(features, thresholds, labels.places, labels.labels.shape[1])
    both = both + labels.times[:, :, None] * active[:, None]
    member = membership[labels.labels]  # [B,P,C]
    anywhere = jnp.einsum("bp,bpc->bc", (labels.area > 0).astype(jnp.float32), member) > 0
    under = jnp.einsum("bpc,bpu->bcu", member, (both > 0).astype(jnp.float32)) > 0
    by_category = jnp.stack([jnp.where(occurs, active[:, None], 0) for occurs in (anywhere[:, :, None], under)], axis=1)
    intersection = jnp.zeros(state.intersection.low.shape, jnp.int32).at[labels.labels].add(both)
    counted = intersection, active.sum(axis=0), by_category.sum(axis=0)
    areas = jnp.zeros(state.label_area.low.shape, jnp.int32).at[labels.labels].add(labels.area)
    before = (state.intersection, state.activation, state.by_category, state.label_area)
    return TallyState(*map(wide.add, before, (*counted, areas)))


def merge(a: TallyState, b: TallyState) -> TallyState:
    """The counts of both."""
    return jax.tree.map(wide.merge, a, b, is_leaf=lambda node: isinstance(node, Wide))


def result(state: TallyState, union: Union = "image") -> Tally:
    """The counts on the host, with activations by category under the rule `union`.

    Raises:
        ValueError: `union` is neither "image" nor "lite".
    """
    check_union(union)
    return Tally(
        wide.total(state.intersection).T,
        wide.total(state.activation),
        wide.total(state.by_category)[UNIONS.index(union)].T,
        wide.total(state.label_area),
        union,
    )


def check_union(union: str) -> None:
    """Raises ValueError for a rule that does not exist."""
    if union not in UNIONS:
        raise ValueError(f"union: expected one of {', '.join(UNIONS)}, got {union!r}")


def check_form(form: str) -> None:
    """Raises ValueError for a form that does not exist."""
    if form not in FORMS:
        raise ValueError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")


def memberships(categories: Sequence[int] | np.ndarray, number: int | None = None) -> np.ndarray:
    """The matrix [L,C] of float32 that is 1 where a label belongs to a category; label 0 belongs to none.

    Args:
        categories: [L] the index of every label's category, -1 = none.
        number: C; by default the largest index plus one.

    Raises:
        ValueError: an index out of range, or no label at all.
    """
    index = np.asarray(categories)
    if index.ndim != 1 or not index.size or not np.issubdtype(index.dtype, np.integer):
        raise ValueError(f"categories: expected a list of integers, one for each label, got shape {index.shape}")
    number = int(index.max()) + 1 if number is None else number
    if index.min() < -1 or index.max() >= number or number < 1:
        raise ValueError(f"categories: expected indices from 0 to {number - 1}, got {index.min()} to {index.max()}")
    matrix = (index[:, None] == np.arange(number)).astype(np.float32)
    matrix[0] = 0
    return matrix


def _dense(features, thresholds, places, present: int):
    """Pixels under the masks: with each of the present labels [B,P,U], and all [B,U]; every unit on every pixel."""
    return jax.vmap(functools.partial(_of_image, present=present), in_axes=(0, None, 0))(features, thresholds, places)


def _of_image(features, thresholds, places, present: int):
    """The same of one image. Sums of at most 2^24 ones are exact in float32, whatever their order.

    So are the ones, and as many as there are channels, in bfloat16, which takes half the memory and the fastest units
    of an accelerator; on a CPU it is slow.
    """
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    sh, sw = places.shape[-2:]
    mask = (upsample(features, (sh, sw)) > thresholds) & (features.max(axis=(0, 1)) > thresholds)
    numbers = 1 + jnp.arange(present, dtype=places.dtype)
    hits = (places.reshape(len(places), 1, sh * sw) == numbers[:, None]).astype(dtype)
    counts = jnp.concatenate([hits.sum(axis=0), jnp.ones((1, sh * sw), dtype)])
    together = jnp.dot(counts, mask.reshape(sh * sw, -1).astype(dtype), preferred_element_type=jnp.float32)
    together = together.astype(jnp.int32)
    return together[:-1], together[-1]


def tally(
    features: Float[Any, "images h w units"],
    thresholds: Float[Any, " units"],
    planes: Integer[Any, "images channels sh sw"],
    scalars: Integer[Any, "images n"],
    categories: Integer[Any, " labels"],
    union: Union = "image",
    *,
    batch_size: int = 32,
    form: Form = "auto",
) -> Tally:
    """Counts how often units and concepts occur together, over all images.

    Features that are sharded by image over a mesh are counted where they are.

    Args:
        features: [N,h,w,U] feature maps.
        thresholds: [U], see `jaxinterp.dissect.thresholds`.
        planes: [N,channels,sh,sw] label numbers, 0 = none.
        scalars: [N,n] whole-image labels, 0 = none.
        categories: [L] the index of the category of every label, -1 = none.
        union: when a category occurs: anywhere in the "image", or under the mask ("lite").
        batch_size: images that are counted at once; the result does not depend on it.
        form: "gated" (units that fire, image after image), "dense", or "auto".

    Raises:
        TypeError: labels are not integers.
        ValueError: an unknown rule or form, shapes that do not fit, a label number without a category, or features
            or thresholds that are NaN.
    """
    check_union(union)
    check_form(form)
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    planes, scalars = np.asarray(planes), np.asarray(scalars)
    membership = memberships(categories)
    units = features.shape[-1] if len(features.shape) == 4 else 0
    if not units or len(planes) != len(features) or len(scalars) != len(features):
        raise ValueError(
            "features, planes, scalars: expected [N,h,w,U], [N,channels,sh,sw] and [N,n],"
            f" got {list(features.shape)}, {list(planes.shape)} and {list(scalars.shape)}"
        )
    limits = jnp.asarray(thresholds, jnp.float32)
    if limits.shape != (units,):
        raise ValueError(f"thresholds: expected {units}, one for each unit, got shape {list(limits.shape)}")
    if bool(jnp.isnan(limits).any()):
        raise ValueError("thresholds: expected numbers, got NaN")
    quantiles.refuse_nan(jnp.isnan(jnp.asarray(features)).any(axis=(0, 1, 2)))
    number = len(membership)
    mesh = mesh_of(features)
    labels = present(planes, scalars, number)
    states = shares.start(init, mesh, units, number, membership.shape[1])
    step = shares.step(update, mesh, (True, False, True, False), form=form)
    everything = jax.tree.map(lambda leaf: _by_share(leaf, shares.count(mesh)), (features, labels))
    for start in range(0, everything[0].shape[1], batch_size):
        maps, found = jax.tree.map(lambda leaf, i=start: leaf[:, i : i + batch_size], everything)
        maps, found = jax.tree.map(_together, (maps, found))
        states = step(states, maps, limits, found, membership)
    return result(shares.merged(states, merge, mesh), union)


def _by_share(leaf: Any, number: int) -> Any:
    """[N,...] as [number, N / number, ...]: each device of a mesh holds one share."""
    return leaf.reshape(number, leaf.shape[0] // number, *leaf.shape[1:])


def _together(leaf: Any) -> Any:
    """[number,n,...] as [number * n,...], of arrays without elements too."""
    return leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])
