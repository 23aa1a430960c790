"""Forward pass and input gradient of several architectures: JAX against PyTorch in channels_last, as one table.

    python experiments/bench_zoo.py --out results/bench.jsonl

Weights are seeded, so nothing needs to be converted. The originals are those of `make_references`, torchvision's or
this folder's, with the same preprocessing in front; PyTorch is in eval mode with frozen weights, under inference_mode
for the forward pass. Both gradients are those of the sum of all logits with respect to the images (one logit
of SqueezeNet stands behind a ReLU and may have none). "jax" is a plain jax.jit,
"canonical" the form in which attacks, effects and maps run a network. All programs of a row run in one process, in
turn; a ratio is the median of the ratios of the rounds. Needs torch and, for most networks, torchvision
(pip install torch && pip install --no-deps torchvision); without torch only JAX is timed.

Expected time: 10 minutes on two cores. Expected result: forward at most 1.2 times PyTorch's, input gradient at most 1.4
times.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxinterp import models
from jaxinterp.bench.records import append, cores
from jaxinterp.bench.timing import interleaved, middle, ratios, shown, verdict
from jaxinterp.canonical import canonical
from jaxinterp.weights import seeded

TARGETS = {"forward": 1.2, "input gradient": 1.4}
NETWORKS = ("resnet18", "resnet50", "vgg16", "efficientnet_lite0", "mobilenet_v2", "squeezenet1_1")


def jax_programs(name: str, images: Any) -> dict[str, dict[str, Callable[[], Any]]]:
    """What is timed of this library: by "forward" and "input gradient", then by form."""
    model = models.network(name).bind(jax.tree.map(jnp.asarray, seeded.params(models.shapes(name))))
    x = jnp.asarray(images)

    def by_image(model: Any, x: Any) -> Any:
        return jax.grad(lambda x: model(x).sum())(x)

    def program(function: Callable[..., Any]) -> Callable[[], Any]:
        compiled = jax.jit(function)
        return lambda: jax.block_until_ready(compiled(model, x))

    return {
        what: {"jax": program(function), "canonical": program(canonical(function))}
        for what, function in (("forward", lambda model, x: model(x)), ("input gradient", by_image))
    }


def torch_network(name: str) -> Callable[[Any], Any]:
    """The original on images in [0, 1], in channels_last and with frozen weights."""
    import make_references  # imports torch
    import torch  # pyright: ignore[reportMissingImports]  # optional: only comparisons with PyTorch need it
    import torch_zoo

    torch.set_num_threads(cores())
    network = make_references.original(name).float().eval().to(memory_format=torch.channels_last)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    own = name in torch_zoo.NETWORKS or name.startswith("efficientnet_lite")  # preprocess inside
    return network if own else lambda x: network(torch_zoo.NORMALIZE(x))


def torch_programs(name: str, images: Any) -> dict[str, Callable[[], Any]]:
    """The same of the original, in channels_last; the gradient comes as [B,H,W,C]."""
    import torch  # pyright: ignore[reportMissingImports]  # optional: only comparisons with PyTorch need it

    network = torch_network(name)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2)).contiguous(memory_format=torch.channels_last)

    def forward() -> Any:
        with torch.inference_mode():
            return network(x).numpy()

    def gradient() -> Any:
        leaf = x.detach().requires_grad_()
        (by_image,) = torch.autograd.grad(network(leaf).sum(), leaf)
        return by_image.permute(0, 2, 3, 1).numpy()

    return {"forward": forward, "input gradient": gradient}


def main(
    networks: tuple[str, ...] = NETWORKS,
    batch: int = 8,
    size: int | None = None,
    rounds: int = 9,
    out: Path | None = None,
) -> None:
    """Times the networks and prints a table.

    Args:
        networks: Their names.
        batch: Images in a batch.
        size: Side of the images, in pixels; by default each network's own.
        rounds: How often everything is timed.
        out: File to which one JSON line is appended.
    """
    has_torch = importlib.util.find_spec("torch") is not None
    if not has_torch:
        print("torch is not installed: JAX only, no ratios")
    print(f"batch {batch}, {cores()} cores, {rounds} rounds; median (quartiles), milliseconds and ratios")
    rows: list[dict[str, Any]] = []
    for name in networks:
        side = size or models.network(name).image_size
        images = seeded.images(batch, side, models.ARCHITECTURES[name].channels)
        programs = jax_programs(name, images)
        if has_torch:
            for what, run in torch_programs(name, images).items():
                programs[what]["torch"] = run
        for what, those in programs.items():
            results = {form: np.asarray(run()) for form, run in those.items()}  # compiles, too
            times = interleaved(those, rounds)
            row: dict[str, Any] = {"network": name, "size": side, "what": what}
            row["seconds"] = {form: middle(values) for form, values in times.items()}
            cells = [f"{form} {shown(values, 1e3)}" for form, values in times.items()]
            if has_torch:
                largest = np.abs(results["torch"]).max()
                row["difference"] = {f: float(np.abs(results[f] - results["torch"]).max() / largest) for f in results}
                row["ratios"] = {f: middle(ratios(times[f], times["torch"])) for f in ("jax", "canonical")}
                best = min(ratio["median"] for ratio in row["ratios"].values())
                cells += [f"{f}/torch {shown(ratios(times[f], times['torch']), digits=2)}" for f in row["ratios"]]
                cells += [verdict(best, TARGETS[what]), f"differs by {row['difference']['canonical']:.0e}"]
            print(f"{name:20}{side:4} px  {what:15}" + "  ".join(cells), flush=True)
            rows.append(row)
    torchvision = importlib.util.find_spec("torchvision") and importlib.metadata.version("torchvision")
    append(out, "zoo", {"batch": batch, "rounds": rounds, "torchvision": torchvision, "results": rows})


if __name__ == "__main__":
    tyro.cli(main)
