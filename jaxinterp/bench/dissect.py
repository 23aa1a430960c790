"""Network dissection: feature maps, thresholds, the tally in its forms and the whole, in images a second.

Images are made by rule, label maps are random regions with as many labels in an image as Broden has, so that nothing
is read from a disk; they repeat after a few hundred. Parts are timed on a share of them, which memory holds many times.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp import dissect
from jaxinterp.bench import formats
from jaxinterp.bench.formats import computing_in, network_in
from jaxinterp.bench.measure import Account, Found, Task, as_written, measure, program
from jaxinterp.bench.setting import Setting
from jaxinterp.data import Concepts, Segmented, SegmentedBatch
from jaxinterp.dissect.counting import Form
from jaxinterp.dissect.dissection import extractor
from jaxinterp.network import capture

LABELS, CATEGORIES, SIDE = 1198, 6, 112  # of Broden at 224 pixels
_PART = 512  # images of which parts are timed, at most, unless a batch is larger


def concepts() -> Concepts:
    """As many labels and categories as Broden has."""
    category = np.random.default_rng(1).integers(0, CATEGORIES, LABELS)
    category[0] = -1
    names = ["", *(f"label {i}" for i in range(1, LABELS))]
    return Concepts(tuple(names), tuple(f"category {i}" for i in range(CATEGORIES)), category)


def label_maps(
    images: int, channels: int = 3, regions: int = 7, present: int = 4, side: int = SIDE
) -> tuple[np.ndarray, np.ndarray]:
    """Random regions of a few labels in every channel, and two whole-image labels.

    Returns:
        int16 [images,channels,side,side] and [images,2]; `side` must be a multiple of `regions`.
    """
    rng = np.random.default_rng(2)
    planes = np.zeros((images, channels, side, side), np.int16)
    block = np.ones((side // regions, side // regions), np.int16)
    for plane in planes.reshape(-1, side, side):
        chosen = np.append(rng.integers(1, LABELS, present), 0).astype(np.int16)
        plane[:] = np.kron(chosen[rng.integers(0, present + 1, (regions, regions))], block)
    return planes, rng.integers(1, LABELS, (images, 2)).astype(np.int16)


@dataclasses.dataclass(frozen=True)
class Repeated:
    """A source of any length over few items, which it repeats in order.

    Attributes:
        images: [N,H,W,C].
        planes: [N,channels,sh,sw].
        scalars: [N,n].
        concepts: what the labels mean.
        count: its length.
    """

    images: np.ndarray
    planes: np.ndarray
    scalars: np.ndarray
    concepts: Concepts
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Segmented:
        i = range(self.count)[index] % len(self.images)
        return Segmented(self.images[i], self.planes[i], self.scalars[i], str(index))

    def walk(self, batch_size: int) -> Iterator[tuple[np.ndarray, SegmentedBatch]]:
        """Batches as `jaxinterp.dissect.dissect` walks through them."""
        for start in range(0, self.count, batch_size):
            number = np.arange(start, start + batch_size, dtype=np.int32)
            mask = number < self.count
            number *= mask
            first = start % len(self.images)
            view = slice(first, first + batch_size)  # where it can be had; NumPy copies what indices choose
            i = view if mask.all() and view.stop <= len(self.images) else number % len(self.images)
            ids = tuple(map(str, number[mask]))
            yield number, SegmentedBatch(self.images[i], self.planes[i], self.scalars[i], ids, mask)


def check(setting: Setting, images: int, node: str | None) -> str:
    """The layer that is dissected. Arguments and errors are those of `bench`."""
    if images < setting.batch:
        raise ValueError(f"--images must be at least --batch, {setting.batch}, got {images}")
    node = node or setting.network.cam_node or setting.network.nodes[-1]
    return setting.network.check_node(node, argument="--node")


def bench(setting: Setting, images: int = 64, node: str | None = None) -> Found:
    """Times a dissection and its parts.

    Args:
        setting: what is run.
        images: how many images are dissected, at least a batch.
        node: the layer; None is the network's CAM node, or else its last.

    Raises:
        ValueError: fewer images than a batch, an unknown layer.
    """
    node = check(setting, images, node)
    part = min(images // setting.batch, max(1, _PART // setting.batch)) * setting.batch
    pictures = np.asarray(setting.images(part))
    side = SIDE if setting.network.image_size >= SIDE else 7 * max(1, setting.network.image_size // 14)
    planes, scalars = label_maps(part, side=side)
    names = concepts()
    source = Repeated(pictures, planes, scalars, names, images)
    batches = [jnp.asarray(pictures[i : i + setting.batch]) for i in range(0, part, setting.batch)]
    tasks, results = [], {}
    ways: tuple[Form, ...] = ("gated", "dense") if jax.default_backend() == "cpu" else ("dense",)
    for form in setting.forms:
        network, params = network_in(form, setting.network, setting.params)
        extract = extractor(network, (node,))

        def forward(extract=extract, params=params, form=form):
            with computing_in(form):
                return [extract(params, batch)[0] for batch in batches]

        def forward_account(network=network, extract=extract, params=params, form=form):
            def written(params, images):
                return capture(network, params, images, (node,))[1]

            with computing_in(form):
                spent, size = program(extract, params, batches[0])
                bare = as_written(written, params, batches[0])
            times = len(batches)
            return Account(part, spent and spent.times(times), bare and bare.times(times), size)

        def whole(network=network, params=params, form=form):
            with computing_in(form):
                results["whole", form] = dissect.dissect(
                    network,
                    params,
                    node,
                    source,
                    batch_size=setting.batch,
                    top=min(9, images),
                    walk=functools.partial(source.walk, setting.batch),
                )

        passed = (f"feature maps {form}", 1.0)
        counted = functools.partial(Account, part)
        tasks.append(Task(f"feature maps {form}", forward, forward_account, "images", form))
        all_of_them, passes = functools.partial(Account, images), (passed[0], images / part)
        tasks.append(Task(f"whole dissection {form}", whole, all_of_them, "images", form, over=passes))
        if form != setting.forms[0]:
            continue
        kept = functools.cache(lambda forward=forward: jnp.concatenate(forward()))  # after its own first run
        limits = functools.cache(lambda kept=kept: np.asarray(dissect.thresholds(kept())))

        def thresholds(kept=kept):
            return dissect.thresholds(kept())

        tasks.append(Task(f"thresholds {form}", thresholds, counted, "images", form, over=passed))
        for way in ways:

            def tally(way: Form = way, kept=kept, limits=limits):
                results[way] = dissect.tally(kept(), limits(), planes, scalars, names.category, "lite", form=way)

            tasks.append(Task(f"tally, {way} {form}", tally, counted, "images", form, over=passed))
    found = Found(measure(tasks, rounds=setting.rounds, peak=setting.peak))
    found.more = {"node": node, "images": images, "images of parts": part, "label maps": side}
    if len(ways) > 1:
        counts = [dataclasses.astuple(results[way]) for way in ways]
        same = all(np.array_equal(a, b) for a, b in zip(*counts, strict=True))
        found.notes.append(f"{' and '.join(ways)} tallies are equal integers: {same}")
    first = setting.forms[0]
    there = _detected(results["whole", first], names)
    for form in setting.forms[1:]:
        here = _detected(results["whole", form], names)
        both = [np.asarray(results["whole", f].thresholds) for f in (form, first)]
        found.changes[form] = {
            "than": first,
            "thresholds, largest difference over largest": formats.difference(*both),
            "best concepts that agree": formats.agreement(here, there),
        }
    return found


def _detected(found: Any, names: Concepts) -> np.ndarray:
    """[U] the label with the largest IoU of every unit."""
    return dissect.iou(found.tally, names.category).argmax(axis=1)
