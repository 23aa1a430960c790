"""Network dissection: which units of a layer detect which concepts (Bau et al. 2017, "Network Dissection").

One walk through the data computes the feature maps of all layers asked for; the second compares their masks with the
labels. Between the walks the feature maps stay on the devices, or, where they do not fit, they are computed again
(three walks: two for the thresholds, which are exact either way). Every count and threshold is the same, to the last
bit, for any batch size and any number of devices and processes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinterp.canonical import canonical
from jaxinterp.data import DamagedImage
from jaxinterp.dissect import counting, quantiles, shares, topimages
from jaxinterp.dissect.counting import Form, Present, Tally, Union
from jaxinterp.dissect.topimages import TopImages
from jaxinterp.network import Network, Params, capture
from jaxinterp.sharding import on_mesh


@runtime_checkable
class Labelled(Protocol):
    """Images with their labels, one fixed shape; where `mask` is False there is none, and images repeat a real one."""

    @property
    def images(self) -> np.ndarray: ...
    @property
    def planes(self) -> np.ndarray: ...
    @property
    def scalars(self) -> np.ndarray: ...
    @property
    def ids(self) -> Sequence[str]: ...
    @property
    def mask(self) -> np.ndarray: ...


Walk = Callable[[], Iterable[tuple[np.ndarray, Labelled]]]
"""Starts a walk through the data of this process; yields the numbers of a batch's images, and the batch."""

Memo = Callable[[str, Callable[[], dict[str, np.ndarray]]], dict[str, np.ndarray]]
"""Returns the arrays that are stored under a name, or computes and stores them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dissection:
    """What the units of one layer detect.

    Attributes:
        node: the layer.
        quantile: share of positions that exceed a threshold.
        thresholds: float32 [U].
        tally: how often units and concepts occur together.
        top: the images on which each unit is most active, by number.
        images: how many images were counted.
        positions: height and width of the feature map.
        maps: float32 [U,top,h,w], each unit's feature maps on its top images (-inf where there are fewer images); None
            unless they were asked for.
    """

    node: str
    quantile: float
    thresholds: np.ndarray
    tally: Tally
    top: TopImages
    images: int
    positions: tuple[int, int]
    maps: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a dissection will hold in memory, known before it starts.

    Attributes:
        shapes: feature map [h,w,U] of every layer.
        image: [H,W,C] of every image.
        images: number of images, at most.
        batch_size: images in a batch of all processes together.
        features: bytes of the feature maps of all images.
        counts: bytes of thresholds' histograms (where features are computed again) and tallies, on each device.
        labels: bytes of the reduced labels of all images, in the memory of the processes; 0 where they are read again.
        working: bytes that computing takes for a while on each device, beside the network: what thresholds and tallies
            of the largest layer need, by a formula that was fitted to compiled programs (64 labels in an image).
        keep: whether feature maps stay on the devices; otherwise they are computed three times.
        budget: bytes that feature maps may take on all devices together.
        flops: of one forward pass of an image, to the last of the layers; None where there is no CPU to ask for.
    """

    shapes: dict[str, tuple[int, int, int]]
    image: tuple[int, int, int]
    images: int
    batch_size: int
    features: int
    counts: int
    labels: int
    working: int
    keep: bool
    budget: int
    flops: float | None

    @property
    def walks(self) -> int:
        """How often the network sees every image."""
        return 1 if self.keep else 3

    def lines(self) -> list[str]:
        """The plan in words."""
        layers = ", ".join(f"{node} ({h} x {w} x {u})" for node, (h, w, u) in self.shapes.items())
        kept = (
            f"kept in memory: {_size(self.features)} of at most {_size(self.budget)}"
            if self.keep
            else f"computed three times, as {_size(self.features)} are more than {_size(self.budget)}"
        )
        work = "" if self.flops is None else f"; {self.flops * self.images * self.walks / 1e12:.2f} TFLOP in all"
        return [
            f"{self.images} images in batches of {self.batch_size}; layers: {layers}",
            f"feature maps are {kept}; counts take {_size(self.counts)} on each device, computing them about"
            f" {_size(self.working)}, labels {_size(self.labels)}{work}",
        ]


def _size(count: int | float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def feature_shapes(
    network: Network, params: Params, nodes: Sequence[str], channels: int = 3
) -> dict[str, tuple[int, int, int]]:
    """[h,w,U] of every layer for images of so many channels; a layer without positions counts as one position.

    Raises:
        ValueError: no layer, one that is named twice or unknown, or that is not a feature map of floats; a network that
            does not take such images.
    """
    if not nodes or len(set(nodes)) != len(nodes):
        raise ValueError(f"nodes: expected different layers, got {list(nodes)}")
    for node in nodes:
        network.check_node(node)
    return dict(_shapes(network, tuple(nodes), channels, *_described(params)))


def item_shapes(network: Network, data: Any) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """[H,W,C] of the images of a source and [channels,sh,sw] of their label maps, by the first that can be read.

    If none can be, images of the network's size in RGB without label maps.

    Raises:
        ValueError: they do not have the network's input size.
    """
    for index in range(len(data)):
        try:
            item = data[index]
        except DamagedImage:
            continue
        found = np.shape(item.image)
        if len(found) != 3:
            raise ValueError(f"data: expected images [H,W,C], got the shape {list(found)}")
        _check_image(network, found, (network.image_size, network.image_size, found[2]))
        return found, np.shape(item.planes)
    return (network.image_size, network.image_size, 3), (0, 0, 0)


def _check_image(network: Network, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        got, wanted = (" x ".join(map(str, shape)) for shape in (found, expected))
        raise ValueError(
            f"data: expected images of {wanted} for {network.name}, got {got};"
            f" resize them, those of a Broden folder by Broden(image_size={network.image_size})"
        )


def _described(params: Params) -> tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]:
    """The structure of parameters, and shape and type of every leaf: what tracing depends on, and can be looked up."""
    leaves, treedef = jax.tree.flatten(params)
    return treedef, tuple(jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)


def _image(network: Network, channels: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, network.image_size, network.image_size, channels), jnp.float32)


# Tracing a network takes as long as some batches, and jobs ask several times.
@functools.lru_cache(maxsize=64)
def _shapes(
    network: Network, nodes: tuple[str, ...], channels: int, treedef: Any, specs: Any
) -> dict[str, tuple[int, int, int]]:
    params, image = jax.tree.unflatten(treedef, specs), _image(network, channels)
    try:
        _, maps = jax.eval_shape(lambda params, images: capture(network, params, images, nodes), params, image)
    except (TypeError, ValueError) as error:
        size = " x ".join(map(str, image.shape[1:]))
        raise ValueError(f"data: {network.name} does not take images of {size}: {error}") from error
    found = {}
    for node in nodes:  # shapes come back in the order of names
        leaf = maps[node]
        if leaf.ndim not in (2, 4) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"node: {node} of {network.name} is {leaf.dtype} {list(leaf.shape)}, not a feature map")
        found[node] = leaf.shape[1:] if leaf.ndim == 4 else (1, 1, leaf.shape[1])
    return found


def plan(
    network: Network,
    params: Params,
    nodes: Sequence[str],
    images: int,
    *,
    labels: int,
    categories: int,
    batch_size: int,
    channels: int = 3,
    planes: tuple[int, ...] = (0, 0, 0),
    form: Form = "auto",
    mesh: Mesh | None = None,
    memory: int | None = None,
) -> Plan:
    """What `dissect` would do.

    Args:
        network: the network.
        params: its parameters.
        nodes: the layers.
        images: number of images of all processes.
        labels: L.
        categories: C.
        batch_size: images in a batch of all processes together.
        channels: of the images.
        planes: the shape [channels,sh,sw] of an image's label maps; without it their memory is not stated.
        form: of the tally, see `jaxinterp.dissect.tally`.
        mesh: the devices; None is the default device.
        memory: bytes that feature maps may take on all devices together; by default half of what is free.

    Raises:
        ValueError: a layer that does not exist, a network that does not take such images, no image, more positions than
            2^31 - 1, a batch size out of range, or a mesh over some processes.
    """
    shapes = feature_shapes(network, params, nodes, channels)
    number = shares.count(mesh)
    if images < 1:
        raise ValueError("data: expected at least one image")
    if memory is not None and not memory >= 0:
        raise ValueError(f"memory: expected bytes, not negative, got {memory}")
    if batch_size < 1 or batch_size % number:
        raise ValueError(f"batch_size: expected a multiple of the {number} devices, got {batch_size}")
    padded = -(-images // batch_size) * batch_size
    for node, (h, w, _) in shapes.items():
        if padded * h * w > quantiles.MOST:
            raise ValueError(f"data: expected at most {quantiles.MOST} positions of {node}, got {padded * h * w}")
    features = 4 * padded * sum(h * w * u for h, w, u in shapes.values())
    budget = _agreed(_free(mesh) // 2, mesh, min) if memory is None else memory
    units = sum(u for _, _, u in shapes.values())
    counts = 8 * units * (labels + 2 * categories + 1)
    keep = features <= budget
    return Plan(
        shapes,
        (network.image_size, network.image_size, channels),
        images,
        batch_size,
        features,
        counts + (0 if keep else 4 * units * (1 << 16)),
        _held(padded, labels, planes, budget),
        max(_working(padded, batch_size, number, shape, planes, form, keep) for shape in shapes.values()),
        keep,
        budget,
        _flops(network, tuple(nodes), channels, *_described(params)),
    )


_PRESENT = 64  # labels in an image, for what is stated beforehand


def _held(images: int, labels: int, planes: tuple[int, ...], budget: int) -> int:
    """Bytes of the reduced labels: a number for every pixel, and three for every label of an image."""
    size = images * (math.prod(planes) * (1 if labels <= 255 else 2) + 12 * _PRESENT) if any(planes) else 0
    return size if size <= min(budget, _LABELS) else 0


def _working(
    images: int, batch: int, devices: int, shape: tuple[int, int, int], planes: tuple[int, ...], form: Form, keep: bool
) -> int:
    """Bytes that thresholds or a tally of a layer take while they are computed."""
    (h, w, units), (channels, sh, sw), own = shape, planes, batch // devices
    keys = 2 * 4 * images // devices * h * w * units if keep else 2 * 4 * own * h * w * units
    if form == "gated" or (form == "auto" and jax.default_backend() == "cpu"):
        return max(keys, (1 << 20) + 16 * own * units * _PRESENT)
    return max(keys, own * sh * sw * (5 * units + 4 * (channels + 1) * _PRESENT))


@functools.lru_cache(maxsize=64)
def _flops(network: Network, nodes: tuple[str, ...], channels: int, treedef: Any, specs: Any) -> float | None:
    """Operations for one image, as a CPU computes it (GPUs do not tell); None where there is none."""
    params = jax.tree.unflatten(treedef, specs)
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
    with jax.default_device(cpu):
        program = jax.jit(functools.partial(_maps, network, nodes)).lower(params, _image(network, channels))
    cost = program.cost_analysis()
    return float((cost or {}).get("flops") or 0) or None


def _free(mesh: Mesh | None) -> int:
    """Bytes that are free on the devices of this process, times the processes."""
    import os

    devices = jax.local_devices() if mesh is not None else jax.local_devices()[:1]
    statistics = [device.memory_stats() for device in devices]
    local = 0
    for entry in statistics:
        if entry and "bytes_limit" in entry:
            local += entry["bytes_limit"] - entry.get("bytes_in_use", 0)
    if not local:  # a CPU: all devices share the machine's memory
        try:
            local = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            local = 4 << 30
    return local * shares.processes(mesh)


def _maps(network: Network, nodes: tuple[str, ...], params: Params, images: Any) -> tuple[jax.Array, ...]:
    """Feature maps [B,h,w,U] of the layers."""
    _, maps = capture(network, params, images, nodes)
    return tuple((leaf if leaf.ndim == 4 else leaf[:, None, None, :]).astype(jnp.float32) for leaf in maps.values())


@functools.cache
def extractor(
    network: Network, nodes: tuple[str, ...], mesh: Mesh | None = None
) -> Callable[..., tuple[jax.Array, ...]]:
    """The jitted function (params, images) -> feature maps [B,h,w,U] of the layers; any batch gives the same bits.

    On a mesh every device runs it on its own images: a program that the compiler divides has other bits.
    """
    return on_mesh(mesh, canonical(functools.partial(_maps, network, nodes)), (False, True))


def dissect(
    network: Network,
    params: Params,
    node: str | Sequence[str],
    data: Any,
    *,
    quantile: float = quantiles.QUANTILE,
    method: quantiles.Method = "linear",
    union: Union = "image",
    top: int = 9,
    maps: bool = False,
    batch_size: int = 32,
    mesh: Mesh | None = None,
    memory: int | None = None,
    form: Form = "auto",
    walk: Walk | None = None,
    memo: Memo | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> Any:
    """Dissects layers of a network.

    Args:
        network: the network.
        params: its parameters.
        node: a layer, or several, which are computed together.
        data: a segmented source (see `jaxinterp.data.SegmentedSource`): `data.concepts`, `len(data)`, `data[i]` with
            image, planes and scalars. Every process of a multi-process run gives the same one.
        quantile: share of positions that exceed a unit's threshold.
        method: of the threshold between two ranks, see `jaxinterp.dissect.thresholds`.
        union: when a category occurs: anywhere in the "image", or under the mask ("lite").
        top: how many images are listed for each unit.
        maps: also keep each unit's feature maps on those images.
        batch_size: images in a batch, of all processes together; a multiple of the devices.
        mesh: devices that share the images; None is the default device.
        memory: bytes that feature maps may take on all devices together; by default half of what is free.
        form: of the tally, see `jaxinterp.dissect.tally`.
        walk: how to read `data`; by default one item after the other, in this thread.
        memo: how to keep the feature maps of a batch outside of memory, so that none is computed twice, in this run or
            after it was stopped; by default they are not kept.
        progress: called with what is being done and how many images were finished.

    Returns:
        A `Dissection`, or for several layers a dict of them.

    Raises:
        ValueError: an argument out of range, an unknown layer, no image, images that are not of the network's input
            size or channels, NaN among the activations.
    """
    nodes = (node,) if isinstance(node, str) else tuple(node)
    quantiles.check(quantile, method)
    counting.check_union(union)
    counting.check_form(form)
    if top < 1:
        raise ValueError(f"top: expected at least 1, got {top}")
    concepts = data.concepts
    membership = counting.memberships(concepts.category, len(concepts.categories))
    image, planes = item_shapes(network, data)
    found = plan(
        network,
        params,
        nodes,
        len(data),
        labels=len(membership),
        categories=membership.shape[1],
        batch_size=batch_size,
        channels=image[2],
        planes=planes,
        form=form,
        mesh=mesh,
        memory=memory,
    )
    passes = Passes(
        network,
        params,
        nodes,
        len(membership),
        mesh,
        found,
        walk or functools.partial(in_order, data, batch_size // shares.processes(mesh), shares.processes(mesh)),
        progress or (lambda what, images: None),
        memo or (lambda name, compute: compute()),
        spilled=memo is not None,
    )
    seen = passes.first(top)
    if not seen.images:
        raise ValueError("data: expected at least one image that can be read")
    limits = passes.thresholds(seen, quantile, method)
    counted, found_maps = passes.tally(seen, limits, membership, form, top if maps else 0)
    dissections = {
        name: Dissection(
            name,
            quantile,
            np.asarray(limit),
            counting.result(state, union),
            topimages.result(best),
            seen.images,
            found.shapes[name][:2],
            np.asarray(of_top) if maps else None,
        )
        for name, limit, state, best, of_top in zip(nodes, limits, counted, seen.top, found_maps, strict=True)
    }
    return dissections[nodes[0]] if isinstance(node, str) else dissections


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """What the first walk leaves.

    Attributes:
        images: how many there are, over all processes.
        top: of every layer.
        kept: feature maps of every layer [images, h, w, U], spread over the devices; None where they did not fit.
        valid: bool [images], which of them are there; None where feature maps did not fit.
        histograms: of every layer, where feature maps did not fit.
        labels: of every batch the reduced labels, the numbers of its images, which are there, and how many are there in
            this process; None where they did not fit either.
    """

    images: int
    top: list[TopImages]
    kept: list[jax.Array] | None
    valid: jax.Array | None
    histograms: list[Any] | None
    labels: list[tuple[Present, jax.Array, jax.Array, int]] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Passes:
    """The walks through the data."""

    network: Network
    params: Params
    nodes: tuple[str, ...]
    labels: int
    mesh: Mesh | None
    plan: Plan
    start: Walk
    told: Callable[[str, int], None]
    memo: Memo
    spilled: bool

    @property
    def units(self) -> list[int]:
        return [self.plan.shapes[node][2] for node in self.nodes]

    def walk(self, what: str) -> Iterator[tuple[int, jax.Array, jax.Array, Labelled]]:
        """Number of the batch, numbers of its images and which are there (on the devices), and the batch."""
        batches = -(-self.plan.images // self.plan.batch_size)
        size = self.plan.batch_size // shares.processes(self.mesh)
        for i, (numbers, batch) in enumerate(self.start()):
            if i >= batches or len(batch.mask) != size:
                raise ValueError(
                    f"walk: expected at most {batches} batches of {size} images, got {len(batch.mask)} in batch {i + 1}"
                )
            _check_image(self.network, np.shape(batch.images)[1:], self.plan.image)
            yield i, *shares.placed((numbers, np.asarray(batch.mask)), self.mesh), batch
            self.told(what, int(np.sum(batch.mask)))

    def maps(self, i: int, batch: Labelled) -> list[jax.Array]:
        """The feature maps of a batch, from a stored part where there is one.

        Every process computes its own, so that one which finds them stored need not wait for another.
        """
        here = shares.local(self.mesh)
        run = extractor(self.network, self.nodes, here)

        def compute() -> dict[str, Any]:
            maps = run(self._params, shares.placed(np.asarray(batch.images, np.float32), here))
            return dict(zip(self.nodes, maps, strict=True))

        if not self.spilled:
            return shares.joined(list(compute().values()), self.mesh)
        number = shares.processes(self.mesh)
        block = i * number + (jax.process_index() if number > 1 else 0)
        stored = self.memo(
            f"features-{block:05d}", lambda: {node: np.asarray(leaf) for node, leaf in compute().items()}
        )
        return [shares.placed(np.asarray(stored[node]), self.mesh) for node in self.nodes]

    @functools.cached_property
    def _params(self) -> Params:
        return shares.replicated(self.params, shares.local(self.mesh))

    def first(self, top: int) -> Seen:
        """Computes feature maps, keeps or counts them, and finds the top images."""
        mesh, keep = self.mesh, self.plan.keep
        tops = [shares.start(topimages.init, mesh, units, top) for units in self.units]
        best = shares.step(topimages.update, mesh, (True, True, True))
        histograms = [shares.start(quantiles.init, mesh, units) for units in self.units if not keep]
        count = shares.step(quantiles.update, mesh, (True, True))
        rows = -(-self.plan.images // self.plan.batch_size) * self.plan.batch_size // shares.count(mesh)
        kept = [
            shares.start(jnp.full, mesh, (rows, *self.plan.shapes[node]), -math.inf, jnp.float32)
            for node in self.nodes
            if keep
        ]
        there = shares.start(jnp.zeros, mesh, rows, bool)
        put = shares.step(_put, mesh, (True, False))
        labels: list[tuple[Present, jax.Array, jax.Array, int]] | None = []
        for i, numbers, valid, batch in self.walk("feature maps"):
            maps = self.maps(i, batch)
            tops = [best(state, x, numbers, valid) for state, x in zip(tops, maps, strict=True)]
            there = put(there, valid, jnp.int32(i))
            if keep:
                kept = [put(store, _absent(x, valid), jnp.int32(i)) for store, x in zip(kept, maps, strict=True)]
            else:
                histograms = [count(state, x, valid) for state, x in zip(histograms, maps, strict=True)]
            if labels is not None:
                batches = -(-self.plan.images // self.plan.batch_size)
                present, some = self.present(batch), (numbers, valid, int(np.sum(batch.mask)))
                fits = sum(leaf.nbytes for leaf in jax.tree.leaves(present)) * batches
                labels = [*labels, (present, *some)] if fits <= min(self.plan.budget, _LABELS) else None
        images = int(_total(mesh)(there))
        return Seen(
            images,
            [shares.merged(state, topimages.merge, mesh) for state in tops],
            [_flat(mesh)(store) for store in kept] if keep else None,
            _flat(mesh)(there) if keep else None,
            None if keep else [shares.merged(state, quantiles.merge, mesh) for state in histograms],
            labels,
        )

    def present(self, batch: Labelled) -> Present:
        """The reduced labels of a batch, as wide as every process needs them; none where there is no image."""
        mask = np.asarray(batch.mask)
        planes = np.asarray(batch.planes) * mask[:, None, None, None]
        scalars = np.asarray(batch.scalars) * mask[:, None]
        found = counting.present(planes, scalars, self.labels)
        return counting.widened(found, _agreed(found.labels.shape[1], self.mesh, max))

    def thresholds(self, seen: Seen, quantile: float, method: quantiles.Method) -> list[jax.Array]:
        """Of every layer, exact."""
        if seen.kept is not None:
            return [
                quantiles.of_kept(store, seen.valid, seen.images, quantile, method, mesh=self.mesh, node=node)
                for store, node in zip(seen.kept, self.nodes, strict=True)
            ]
        assert seen.histograms is not None
        sides = []
        for histogram, node in zip(seen.histograms, self.nodes, strict=True):
            quantiles.refuse_nan(histogram.nan, node)
            h, w, _ = self.plan.shapes[node]
            rank, share = quantiles.ranks(seen.images * h * w, quantile, method)
            sides.append((*quantiles.upper_half(histogram, jnp.int32(rank)), share))
        states = [shares.start(quantiles.init, self.mesh, units) for units in self.units]
        count = shares.step(quantiles.update, self.mesh, (True, True, False))
        for i, _, valid, batch in self.walk("thresholds"):
            maps = self.maps(i, batch)
            states = [count(s, x, valid, side[0]) for s, x, side in zip(states, maps, sides, strict=True)]
        limits = []
        for state, (upper, inner, share) in zip(states, sides, strict=True):
            lower, following = quantiles.neighbours(shares.merged(state, quantiles.merge, self.mesh), upper, inner)
            limits.append(jnp.asarray(quantiles.between(np.asarray(lower), np.asarray(following), share)))
        return limits

    def tally(
        self, seen: Seen, limits: Sequence[jax.Array], membership: np.ndarray, form: Form, top: int
    ) -> tuple[list[counting.TallyState], list[jax.Array]]:
        """Counts of every layer, and its units' feature maps on their first `top` images."""
        mesh = self.mesh
        limits, member = shares.replicated((list(map(np.asarray, limits)), membership), mesh)
        states = [shares.start(counting.init, mesh, units, *membership.shape) for units in self.units]
        pictured = [
            shares.start(topimages.no_maps, mesh, units, top, (h, w)) for h, w, units in self.plan.shapes.values()
        ]
        kept, size = seen.kept is not None, self.plan.batch_size // shares.count(mesh)
        spread = (True, False) if kept else (True,)  # all feature maps and which batch, or those of the batch
        part = {"size": size} if kept else {}
        update = _update_kept if kept else counting.update
        count = shares.step(update, mesh, (*spread, False, True, False), form=form, **part)
        update = _update_maps_of_kept if kept else topimages.update_maps
        picture = shares.step(update, mesh, (*spread, True, True, False), **part)

        def add(i, maps, labels, numbers, valid):
            nonlocal states, pictured
            labels = shares.placed(labels, mesh)
            where = (jnp.int32(i),) if kept else ()
            states = [count(s, x, *where, t, labels, member) for s, x, t in zip(states, maps, limits, strict=True)]
            if top:
                pictured = [
                    picture(s, x, *where, numbers, valid, best.image)
                    for s, x, best in zip(pictured, maps, seen.top, strict=True)
                ]

        if seen.kept is not None and seen.labels is not None:
            for i, (labels, numbers, valid, images) in enumerate(seen.labels):
                add(i, seen.kept, labels, numbers, valid)
                self.told("tally", images)
        else:
            for i, numbers, valid, batch in self.walk("tally"):
                maps = seen.kept or [_absent(x, valid) for x in self.maps(i, batch)]
                add(i, maps, self.present(batch), numbers, valid)
        return (
            [shares.merged(state, counting.merge, mesh) for state in states],
            [shares.merged(state, topimages.merge_maps, mesh) for state in pictured],
        )


_LABELS = 4 << 30  # bytes of reduced labels that are held at most


def _update_kept(state, kept, i, thresholds, labels, membership, *, form, size):
    maps = lax.dynamic_slice_in_dim(kept, i * size, size)
    return counting.update(state, maps, thresholds, labels, membership, form=form)


def _update_maps_of_kept(state, kept, i, images, valid, top, *, size):
    return topimages.update_maps(state, lax.dynamic_slice_in_dim(kept, i * size, size), images, valid, top)


def _put(store, x, i):
    return lax.dynamic_update_slice_in_dim(store, x, i * x.shape[0], 0)


@jax.jit
def _absent(maps, valid):
    """Feature maps that exceed no threshold where there is no image."""
    return jnp.where(valid[:, None, None, None], maps, -jnp.inf)


@functools.cache
def _flat(mesh: Mesh | None) -> Any:
    """[shares, rows, ...] as [shares * rows, ...], where it is."""

    def flat(store):
        return store.reshape(-1, *store.shape[2:])

    if mesh is None:
        return jax.jit(flat, donate_argnums=0)
    return jax.jit(flat, donate_argnums=0, out_shardings=NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])))


@functools.cache
def _total(mesh: Mesh | None) -> Any:
    """How many are True, the same number on every device."""

    def total(there):
        return jnp.sum(there, dtype=jnp.int32)

    return jax.jit(total) if mesh is None else jax.jit(total, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _agreed(number: int, mesh: Mesh | None, choose: Callable[[list[int]], int]) -> int:
    """The smallest (`min`) or the largest (`max`) of the numbers that the processes of a mesh have."""
    if shares.processes(mesh) == 1:
        return number
    from jax.experimental import multihost_utils

    halves = multihost_utils.process_allgather(np.array([number >> 31, number & (1 << 31) - 1], np.int32))
    return choose([(int(high) << 31) + int(low) for high, low in np.reshape(halves, (-1, 2))])


@dataclasses.dataclass(frozen=True)
class _Rows:
    images: np.ndarray
    planes: np.ndarray
    scalars: np.ndarray
    ids: tuple[str, ...]
    mask: np.ndarray


def in_order(data: Any, batch_size: int, processes: int = 1) -> Iterator[tuple[np.ndarray, Labelled]]:
    """Reads a source item after item: this process's share in batches of one shape, as all processes need it."""
    index = jax.process_index() if processes > 1 else 0
    share = range(index, len(data), processes)
    batches = math.ceil(math.ceil(len(data) / processes) / batch_size)
    for i in range(batches):
        numbers = list(share[i * batch_size : (i + 1) * batch_size])
        items = [data[number] for number in numbers] or [data[0]]
        rows = [*items, *[items[-1]] * (batch_size - len(items))]
        mask = np.arange(batch_size) < len(numbers)
        yield (
            np.array(numbers + [0] * (batch_size - len(numbers)), np.int32),
            _Rows(
                np.stack([row.image for row in rows]),
                np.stack([row.planes for row in rows]),
                np.stack([row.scalars for row in rows]),
                tuple(row.id for row in rows),
                mask,
            ),
        )
