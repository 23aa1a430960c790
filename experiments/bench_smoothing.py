"""What smoothing a batch costs, in gradients of a network.

    python experiments/bench_smoothing.py --model efficientnet_lite0 --batch 8 --out results/bench.jsonl

A smooth attack smooths once for every step, and sC&W solves the transposed system once more. The reference is the
gradient of one logit with respect to the images, as attacks compute it. All run in one process, in turn; a ratio is
the median of the ratios of the rounds.

Expected time: 2 minutes on two cores. Expected result: 50 iterations of conjugate gradients on 8 images of 224 pixels
take at most as long as 2 gradients of EfficientNet-Lite0.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jaxinterp
from jaxinterp.attacks import smoothing
from jaxinterp.attacks.smoothing import Smoother
from jaxinterp.bench.records import append, cores
from jaxinterp.bench.timing import interleaved, middle, ratios, shown, verdict
from jaxinterp.canonical import canonical

TARGET = 2.0


def main(
    model: str = "efficientnet_lite0", batch: int = 8, iterations: int = 50, rounds: int = 15, out: Path | None = None
) -> None:
    """Times smoothing against gradients.

    Args:
        model: Network; its weights must have been converted with `jaxinterp convert`.
        batch: Images in a batch.
        iterations: Of conjugate gradients.
        rounds: How often everything is timed.
        out: File to which one JSON line is appended.
    """
    network, params = jaxinterp.load(model)
    size = network.image_size
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.random((batch, size, size, 3), dtype=np.float32))
    z = jnp.asarray(rng.normal(size=images.shape), jnp.float32)
    bound = network.bind(params)
    gradient = jax.jit(canonical(jax.grad(lambda x, model: model(x)[:, 0].sum())))
    smoother = jax.jit(lambda images: Smoother.of(images, iterations=iterations))(images)
    smooth = jax.jit(canonical(lambda smoother, z: smoother(z)))

    programs = {
        "input gradient": lambda: gradient(images, bound),
        "smoothing": lambda: smooth(smoother, z),
        "smoothing, and its weights": lambda: smoothing.smooth(z, images, iterations=iterations),
    }
    for run in programs.values():
        jax.block_until_ready(run())
    times = interleaved(programs, rounds)
    print(f"{model}, batch {batch} at {size} px, {iterations} iterations, {cores()} cores, {rounds} rounds")
    for name, values in times.items():
        print(f"  {name:32}{shown(values, 1e3):>28} ms")
    compared = {name: ratios(times[name], times["input gradient"]) for name in list(times)[1:]}
    for name, values in compared.items():
        target = verdict(middle(values)["median"], TARGET) if name == "smoothing" else ""
        print(f"  {f'{name} / input gradient':50}{shown(values, digits=2):>22}    {target}")
    append(
        out,
        "smoothing",
        {
            "model": model,
            "batch": batch,
            "size": size,
            "iterations": iterations,
            "rounds": rounds,
            "seconds": {name: middle(values) for name, values in times.items()},
            "ratios": {f"{name} / input gradient": middle(values) for name, values in compared.items()},
        },
    )


if __name__ == "__main__":
    tyro.cli(main)
