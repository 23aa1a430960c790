"""Forward pass and input gradient of EfficientNet-Lite: JAX against PyTorch on the same CPU cores.

    python experiments/bench_network.py --model efficientnet_lite0 --batch 8 --out results/bench.jsonl

All programs run in one process, in turn, so that they share whatever else the machine does; a ratio is the median of
the ratios of the rounds. PyTorch is in eval mode with frozen weights, under inference_mode for the forward pass. Both
gradients are those of one class logit with respect to the images. The difference of the two is printed as well; where
the input of a ReLU6 rounds to the other side of 0 or 6, an image's gradient jumps by up to a few percent (see
tests/parity). Needs torch (pip install "jaxinterp[torch]"); without it only JAX is timed.

Expected time: 1 minute on two cores. Expected result: forward at most 1.1 times PyTorch's in channels_last, input
gradient at most 1.5 times.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from jaxinterp.bench.records import append, cores
from jaxinterp.bench.timing import interleaved, middle, ratios, shown, verdict

TARGETS = {"forward": 1.1, "input gradient": 1.5}


def main(model: str = "efficientnet_lite0", batch: int = 8, rounds: int = 15, out: Path | None = None) -> None:
    """Times forward pass and input gradient.

    Args:
        model: Network; its weights must have been converted with `jaxinterp convert`.
        batch: Images in a batch.
        rounds: How often everything is timed.
        out: File to which one JSON line is appended.
    """
    import jax
    import numpy as np

    import jaxinterp
    from jaxinterp.canonical import canonical

    network, params = jaxinterp.load(model)
    size = network.image_size
    images = np.random.default_rng(0).random((batch, size, size, 3), dtype=np.float32)
    bound, on_device = network.bind(params), jax.numpy.asarray(images)
    value, by_image = (lambda model, x: model(x)), jax.grad(lambda x, model: model(x)[:, 0].sum())
    forward, gradient = jax.jit(value), jax.jit(by_image)
    # As attacks, effects and maps run a network.
    canonical_forward, canonical_gradient = jax.jit(canonical(value)), jax.jit(canonical(by_image))
    programs: dict[str, dict[str, Callable[[], Any]]] = {
        "forward": {
            "jax": lambda: jax.block_until_ready(forward(bound, on_device)),
            "jax canonical": lambda: jax.block_until_ready(canonical_forward(bound, on_device)),
        },
        "input gradient": {
            "jax": lambda: jax.block_until_ready(gradient(on_device, bound)),
            "jax canonical": lambda: jax.block_until_ready(canonical_gradient(on_device, bound)),
        },
    }
    if importlib.util.find_spec("torch"):
        for what, those in _torch_programs(model, images).items():
            programs[what].update(those)
    else:
        print("torch is not installed: JAX only, no ratios")

    figures: dict[str, Any] = {"model": model, "batch": batch, "size": size, "rounds": rounds, "results": {}}
    print(f"{model}, batch {batch} at {size} px, {cores()} cores, {rounds} rounds; median (quartiles)")
    for what, those in programs.items():
        results = {name: np.asarray(run()) for name, run in those.items()}  # compiles, too
        times = interleaved(those, rounds)
        row: dict[str, Any] = {"seconds": {name: middle(values) for name, values in times.items()}}
        for name, values in times.items():
            print(f"  {what:15}{name:21}{shown(values, 1e3):>28} ms")
        if "torch" in times:
            nhwc = results["torch"].transpose(0, 2, 3, 1) if results["torch"].ndim == 4 else results["torch"]
            axes = tuple(range(1, nhwc.ndim))
            error = np.abs(results["jax"] - nhwc).max(axes) / np.abs(nhwc).max(axes)
            print(f"  {what:15}difference / largest value of an image, jax and torch: {_range(error)}")
            row["difference"] = error.tolist()
            for name in ("torch", "torch channels_last"):
                for ours in ("jax", "jax canonical"):
                    ratio = ratios(times[ours], times[name])
                    target = verdict(middle(ratio)["median"], TARGETS[what]) if name != "torch" else ""
                    print(f"  {what:15}{f'{ours} / {name}':37}{shown(ratio, digits=2):>22}    {target}")
                    row[f"{ours} / {name}"] = middle(ratio)
        figures["results"][what] = row
    append(out, "network", figures)


def _range(values: Any) -> str:
    return f"{min(values):.1e} to {max(values):.1e}"


def _torch_programs(model: str, images: Any) -> dict[str, dict[str, Callable[[], Any]]]:
    import torch  # pyright: ignore[reportMissingImports]  # optional: only comparisons with PyTorch need it
    import torch_reference

    torch.set_num_threads(cores())
    print(f"torch {torch.__version__} on {torch.get_num_threads()} threads")
    programs: dict[str, dict[str, Callable[[], Any]]] = {"forward": {}, "input gradient": {}}
    for name, layout in (("torch", torch.contiguous_format), ("torch channels_last", torch.channels_last)):
        network = torch_reference.load(model).to(memory_format=layout)
        x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).contiguous(memory_format=layout)

        def forward(network=network, x=x):
            with torch.inference_mode():
                return network(x)

        def gradient(network=network, x=x):
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(network(leaf)[:, 0].sum(), leaf)[0]

        programs["forward"][name] = forward
        programs["input gradient"][name] = gradient
    return programs


if __name__ == "__main__":
    tyro.cli(main)
