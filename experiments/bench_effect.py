"""Effects of cells, class activation maps and attributions: what they cost, against PyTorch and against passes.

    python experiments/bench_effect.py --out results/bench.jsonl

* Effects: `effect.pse` with whole passes and with windows, against the same masked images run through PyTorch (frozen
  weights, channels_last, no_grad, as many in a batch). Seconds for the same cells of the same images; cells without
  windows and PyTorch are timed on `--sampled` cells and scaled, since every pass costs the same. Weights are made by
  rule, since time does not depend on them. The effects of both ways are compared, too.
* Maps: `cam.maps` of one class and of ten, against a forward pass with the same batch.
* Integrated gradients with 50 steps against 50 jitted gradients.

Needs torch for the comparison (pip install "jaxinterp[torch]" torchvision); without it only JAX is timed. Expected
time: 15 minutes on two cores. Expected result: windows at least 2 times as fast as PyTorch for ResNet-50 and
EfficientNet-Lite0, and at least 2.3 times as fast as whole passes for ResNet-50; CAM at most 1.1 forward passes for one
class and 1.3 for ten; integrated gradients at least 0.95 times as fast as their gradients.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxinterp import attribution, cam, effect, models, windowed
from jaxinterp.bench.records import append
from jaxinterp.bench.timing import interleaved, middle, ratios, shown, verdict
from jaxinterp.canonical import canonical
from jaxinterp.weights import seeded

CELL = {224: 16, 240: 16, 260: 16, 299: 13, 32: 2}
CHUNK = 16


def seeded_network(name: str):
    """A network and parameters that are made by rule."""
    return models.network(name), jax.tree.map(jnp.asarray, seeded.params(models.shapes(name)))


def torch_passes(name: str, count: int) -> Callable[[], Any]:
    """`count` batches of masked images through PyTorch; the masks are made there, as a user would."""
    import torch  # pyright: ignore[reportMissingImports]  # optional: only comparisons with PyTorch need it
    from bench_zoo import torch_network

    network = torch_network(name)
    size = models.network(name).image_size
    first, second = (torch.from_numpy(seeded.images(1, size).transpose(0, 3, 1, 2).copy()) for _ in range(2))
    mask = torch.zeros(CHUNK, 1, size, size, dtype=torch.bool)
    for i in range(CHUNK):
        mask[i, :, i : i + 16, :16] = True

    def run():
        with torch.no_grad():
            for _ in range(count):
                network(torch.where(mask, first, second).contiguous(memory_format=torch.channels_last))

    return run


def effects(name: str, rounds: int, sampled: int) -> dict[str, Any]:
    """Effects of all cells of one image."""
    network, params = seeded_network(name)
    model, size = network.bind(params), network.image_size
    cell = CELL[size]
    clean = jnp.asarray(seeded.images(1, size))
    noise = 0.05 * np.random.default_rng(0).normal(size=clean.shape).astype(np.float32)
    adversarial = jnp.clip(clean + noise, 0, 1)
    rows, columns = effect.grid(size, size, cell)
    cells = rows * columns
    # Whole passes of some cells only: the others are not perturbed.
    number = effect.cell_map(size, size, cell)[..., None]
    some = jnp.where(number < sampled, adversarial, clean)
    labels, targets = np.array([0]), np.array([1])

    def pse(images, windows):
        return jax.block_until_ready(
            effect.pse(model, clean, images, labels, targets, cell, chunk=CHUNK, windows=windows)
        )

    scale = {"windows": 1.0, "whole": (cells + 1) / (sampled + 1)}
    programs: dict[str, Callable[[], Any]] = {
        "windows": lambda: pse(adversarial, True),
        "whole": lambda: pse(some, False),
    }
    if importlib.util.find_spec("torch"):
        batches = -(-sampled // CHUNK)
        programs["torch"] = torch_passes(name, batches)
        scale["torch"] = (cells + 1) / (batches * CHUNK)
    compiled = {}
    for key, run in programs.items():
        start = time.perf_counter()
        run()
        compiled[key] = time.perf_counter() - start
    same = jnp.array_equal(pse(some, True).label_change, programs["whole"]().label_change)
    times = {key: [t * scale[key] for t in taken] for key, taken in interleaved(programs, rounds).items()}
    specs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model)
    boxes = effect.boxes(effect.partition(cell, 1, size, size)[0], cells)
    image = jax.ShapeDtypeStruct(clean.shape, clean.dtype)
    cost = windowed.cost(lambda m, x: m(x), specs, image, np.array(boxes))
    found = {
        "network": name,
        "cells": cells,
        "equal bit for bit": bool(same),
        "arithmetic saved": cost.saving,
        "first call, s": compiled,
        "seconds": {key: middle(taken) for key, taken in times.items()},
    }
    print(f"{name}, {cells} cells of {cell} px: arithmetic saved {cost.saving:.2f}; equal bit for bit: {bool(same)}")
    for key, taken in times.items():
        print(f"  {key:10}{shown(taken, 1.0, 2):>28} s    first call {compiled[key]:.1f} s")
    for other, target in (("whole", 2.3 if name == "resnet50" else None), ("torch", 2.0)):
        if other in times:
            ratio = ratios(times[other], times["windows"])
            goal = "" if target is None else f"target >= {target}: {_at_least(middle(ratio)['median'], target)}"
            print(f"  {other + ' / windows':20}{shown(ratio, digits=2):>22}    {goal}")
            found[f"{other} / windows"] = middle(ratio)
    return found


def _at_least(value: float, target: float) -> str:
    return "met" if value >= target else "NOT met"


def maps(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Class activation maps and integrated gradients, in forward passes and gradients."""
    network, params = seeded_network(name)
    model, size = network.bind(params), network.image_size
    images = jnp.asarray(seeded.images(batch, size))
    one, ten = np.zeros(batch, np.int32), np.tile(np.arange(10, dtype=np.int32), (batch, 1))
    forward = jax.jit(canonical(lambda m, x: m(x)))
    gradient = jax.jit(canonical(jax.grad(lambda x, m: m(x)[:, 0].sum())))

    def fifty():
        for _ in range(50):
            jax.block_until_ready(gradient(images, model))

    cheap = {
        "forward": lambda: jax.block_until_ready(forward(model, images)),
        "CAM, 1 class": lambda: jax.block_until_ready(cam.maps(network, params, images, one)),
        "CAM, 10 classes": lambda: jax.block_until_ready(cam.maps(network, params, images, ten)),
    }
    dear = {
        "50 gradients": fifty,
        "integrated gradients": lambda: jax.block_until_ready(
            attribution.integrated_gradients(model, images, one, steps=50)
        ),
    }
    for run in (*cheap.values(), *dear.values()):
        run()
    times = interleaved(cheap, 3 * rounds) | interleaved(dear, max(2, rounds // 2))
    found: dict[str, Any] = {"network": name, "batch": batch}
    print(f"{name}, batch {batch}")
    for key, target in (("CAM, 1 class", 1.1), ("CAM, 10 classes", 1.3)):
        ratio = ratios(times[key], times["forward"])
        print(f"  {key + ' / forward':36}{shown(ratio, digits=2):>22}    {verdict(middle(ratio)['median'], target)}")
        found[f"{key} / forward"] = middle(ratio)
    ratio = ratios(times["50 gradients"], times["integrated gradients"])
    goal = f"target >= 0.95: {_at_least(middle(ratio)['median'], 0.95)}"
    print(f"  {'50 gradients / integrated gradients':36}{shown(ratio, digits=2):>22}    {goal}")
    found["50 gradients / integrated gradients"] = middle(ratio)
    return found


def main(
    networks: tuple[str, ...] = ("resnet50", "efficientnet_lite0", "vgg16"),
    mapped: tuple[str, ...] = ("efficientnet_lite0",),
    batch: int = 8,
    sampled: int = 48,
    rounds: int = 5,
    out: Path | None = None,
) -> None:
    """Times effects, maps and attributions.

    Args:
        networks: Networks whose effects are timed.
        mapped: Networks whose maps and attributions are timed.
        batch: Images in a batch, of maps.
        sampled: Cells that are timed with whole passes, and scaled to all.
        rounds: How often everything is timed.
        out: File to which one JSON line is appended.
    """
    if not importlib.util.find_spec("torch"):
        print("torch is not installed: JAX only")
    found = {
        "effects": [effects(name, rounds, sampled) for name in networks],
        "maps": [maps(name, batch, rounds) for name in mapped],
    }
    append(out, "effect", found)


if __name__ == "__main__":
    tyro.cli(main)
