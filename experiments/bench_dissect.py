"""Network dissection: what counting costs beside the network, and beside the loop of NetDissect-Lite.

    python experiments/bench_dissect.py --out results/bench.jsonl

* Tally: `dissect.tally` against a loop over images and units as NetDissect-Lite (CSAILVision) has it: one PIL
  resize, one comparison and one bincount for each unit that fires. That loop is written here afresh and is the baseline
  only. Both count the same images; every integer is compared. Feature maps are smooth random maps after a ReLU, label
  maps random regions, with as many labels in an image as Broden has.
* Whole job: `dissect.dissect` of one layer against the forward passes alone, with labels and images in memory; the
  network sees an image once (feature maps are kept). Peak memory of the process is stated with what was planned.

Expected time: 6 minutes on two cores. Expected result: tally at least 4 times as fast as the loop for 512 units, 5
times for 2,048, equal integers; whole job at most 1.15 times the forward passes for ResNet-50.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image

from jaxinterp import dissect, models
from jaxinterp.bench.dissect import CATEGORIES, LABELS, SIDE, concepts, label_maps
from jaxinterp.bench.records import append
from jaxinterp.bench.timing import interleaved, middle, ratios, shown
from jaxinterp.data import SegmentedArrays
from jaxinterp.dissect.counting import memberships
from jaxinterp.dissect.dissection import extractor
from jaxinterp.weights import seeded

TARGETS = {512: 4.0, 2048: 5.0}
WHOLE = 1.15


def feature_maps(images: int, side: int, units: int) -> np.ndarray:
    """Smooth random maps after a ReLU, with images on which a unit is more active than on others."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(3)
    noise = gaussian_filter(rng.standard_normal((images, side, side, units), np.float32), (0, 1, 1, 0))
    scale = np.exp(0.7 * rng.standard_normal((images, 1, 1, units))).astype(np.float32)
    return np.maximum(noise / noise.std() * scale - 0.5, 0)


def loop(features, thresholds, planes, scalars, membership) -> tuple[np.ndarray, ...]:
    """The baseline: intersections [U,L], activations [U], activations by category [U,C], label areas [L]."""
    units, (labels, categories) = features.shape[-1], membership.shape
    intersection, activation = np.zeros((units, labels), np.int64), np.zeros(units, np.int64)
    by_category, area = np.zeros((units, categories), np.int64), np.zeros(labels, np.int64)
    for maps, plane, whole in zip(features, planes, scalars, strict=True):
        area[whole] += SIDE * SIDE
        counts = np.bincount(plane.ravel(), minlength=labels)
        counts[0] = 0
        area += counts
        for unit in range(units):
            single = np.ascontiguousarray(maps[:, :, unit])
            if single.max() > thresholds[unit]:
                large = np.asarray(Image.fromarray(single).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
                rows, columns = np.nonzero(large > thresholds[unit])
                under = np.bincount(plane[:, rows, columns].ravel(), minlength=labels)
                under[0] = 0
                under[whole] += len(rows)
                intersection[unit] += under
                activation[unit] += len(rows)
                by_category[unit] += len(rows) * (under @ membership > 0)
    return intersection, activation, by_category, area


def tallies(units: int, images: int, rounds: int) -> dict[str, Any]:
    """The tally alone."""
    side = 14 if units <= 512 else 7
    features, (planes, scalars) = feature_maps(images, side, units), label_maps(images)
    category = concepts().category
    membership = memberships(category, CATEGORIES)
    limits = np.asarray(dissect.thresholds(features))
    runs: dict[str, Callable[[], Any]] = {
        "loop": lambda: loop(features, limits, planes, scalars, membership),
        "tally": lambda: dissect.tally(features, limits, planes, scalars, category, "lite"),
    }
    expected, counted = runs["loop"](), runs["tally"]()
    found = (counted.intersection, counted.activation, counted.activation_by_category, counted.label_area)
    equal = all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    times = interleaved(runs, rounds)
    ratio, target = ratios(times["loop"], times["tally"]), TARGETS.get(units)
    fired = float((features.max(axis=(1, 2)) > limits).sum(axis=1).mean())
    goal = (
        "" if target is None else f"    target >= {target}: {'met' if middle(ratio)['median'] >= target else 'NOT met'}"
    )
    print(f"tally, {units} units of {side} x {side}, {fired:.0f} fire in an image; equal integers: {equal}")
    for name, taken in times.items():
        print(f"  {name:8}{shown(taken, 1e3 / images, 2):>26} ms an image")
    print(f"  loop / tally {shown(ratio, digits=2)}{goal}")
    return {
        "units": units,
        "images": images,
        "fire in an image": fired,
        "equal integers": equal,
        "ms an image": {name: middle([1e3 * t / images for t in taken]) for name, taken in times.items()},
        "loop / tally": middle(ratio),
    }


def whole(name: str, node: str, images: int, batch: int, rounds: int) -> dict[str, Any]:
    """A dissection against its forward passes."""
    network, params = models.network(name), jax.tree.map(jnp.asarray, seeded.params(models.shapes(name)))
    pictures = np.concatenate([seeded.images(batch, network.image_size) for _ in range(images // batch)])
    planes, scalars = label_maps(images)
    source = SegmentedArrays(pictures, planes, concepts(), scalars=scalars)
    run = extractor(network, (node,))

    def forward():
        for i in range(0, images, batch):
            jax.block_until_ready(run(params, jnp.asarray(pictures[i : i + batch])))

    kept = jnp.concatenate([run(params, jnp.asarray(pictures[i : i + batch]))[0] for i in range(0, images, batch)])
    runs = {
        "forward": forward,
        "dissect": lambda: dissect.dissect(network, params, node, source, batch_size=batch),
        "thresholds": lambda: jax.block_until_ready(dissect.thresholds(kept)),
    }
    for warm in runs.values():
        warm()
    times = interleaved(runs, rounds)
    ratio = ratios(times["dissect"], times["forward"])
    plan = dissect.plan(network, params, [node], images, labels=LABELS, categories=CATEGORIES, batch_size=batch)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    met = "met" if middle(ratio)["median"] <= WHOLE else "NOT met"
    print(f"whole job, {name} at {node} {plan.shapes[node]}, {images} images in batches of {batch}")
    for key, taken in times.items():
        print(f"  {key:12}{shown(taken, 1e3 / images, 2):>26} ms an image")
    print(f"  dissect / forward {shown(ratio, digits=3)}    target <= {WHOLE}: {met}")
    print(f"  feature maps {plan.features / 2**20:.0f} MiB, counts {plan.counts / 2**20:.0f} MiB;", end=" ")
    print(f"peak of the process {peak / 2**20:.0f} MiB")
    return {
        "network": name,
        "node": node,
        "images": images,
        "batch": batch,
        "ms an image": {key: middle([1e3 * t / images for t in taken]) for key, taken in times.items()},
        "dissect / forward": middle(ratio),
        "planned bytes": plan.features + plan.counts,
        "peak bytes of the process": peak,
    }


def main(
    out: Path | None = None, units: tuple[int, ...] = (512, 2048), images: int = 64, rounds: int = 5, batch: int = 16
) -> None:
    """Runs the benchmark.

    Args:
        out: JSON lines file to which the record is added.
        units: Numbers of units of the tally.
        images: Images that are counted.
        rounds: Interleaved repetitions.
        batch: Images in a batch of the whole job.
    """
    began = time.perf_counter()
    results = {
        "tally": [tallies(number, images, rounds) for number in units],
        "whole": [
            whole("resnet50", "layer4.2", images, batch, rounds),
            whole("efficientnet_lite0", "_conv_head", images, batch, rounds),
        ],
    }
    print(f"{time.perf_counter() - began:.0f} s")
    if out is not None:
        append(out, "dissect", {"rounds": rounds, "results": results})


if __name__ == "__main__":
    tyro.cli(main)
