"""Reference outputs of the PyTorch originals of every network, with weights by rule.

    python experiments/make_references.py --out jaxinterp/weights/references.npz

The weights come from `jaxinterp.weights.seeded`, so that only outputs need to be stored: the logits of two images, a
sample of the first, the middle and the last feature map with its mean, standard deviation and largest value, and a
sample of the gradient of one class's logit with respect to the images; the class is that of the first image's largest
logit. PyTorch computes in float64, so what another implementation differs by is its own rounding. Needs torch and
torchvision:

    pip install torch && pip install --no-deps torchvision

(any build of torchvision will do: of its compiled operators none is used, and where they do not load, stubs are
declared so that the package imports). Expected time: 2 minutes on two cores. Expected result: one line for each
network, a file of about 330 kB, equal to the committed one up to the last bits.

Layout of the file, for a network NAME: NAME/size, NAME/tensors (UTF-8 JSON of the state dict's names and shapes),
NAME/logits [2,K], NAME/class, NAME/gradient [64], NAME/gradient_max, and for each node NAME/maps/NODE [64] and
NAME/moments/NODE [mean, std, max |.|]; float32, but the gradient float64. Sampled places are those of
`seeded.places`, in arrays laid out NHWC.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]  # optional: only comparisons with PyTorch need it
import torch_reference
import torch_zoo
import tyro

from jaxinterp import models
from jaxinterp.weights import seeded
from jaxinterp.weights.validation import torchvision_models


def image_size(name: str) -> int:
    """Side of the reference images: small where the network allows it, odd sides all along in EfficientNet-Lite."""
    if name == "inception_v3":
        return 139
    return min(models.ARCHITECTURES[name].image_size, 101 if name.startswith("efficientnet") else 96)


def original(name: str, tensors: Mapping[str, np.ndarray] | None = None) -> Any:
    """The PyTorch network for images [B,C,H,W] in [0, 1], in float64, in eval mode, parameters frozen.

    Its weights are `tensors` by the names of its state dict and in PyTorch's layout, or seeded ones.
    """
    with torch.device("meta"):
        if name.startswith("efficientnet_lite"):
            network = torch_reference.EfficientNetLite(int(name[-1]))
        elif name in torch_zoo.NETWORKS:
            network = torch_zoo.NETWORKS[name]()
        else:
            more = {"transform_input": True, "aux_logits": False} if name in ("inception_v3", "googlenet") else {}
            more |= {"init_weights": False} if more or name.startswith("vgg") else {}
            network = getattr(torchvision_models(), name)(weights=None, **more)
    state = {
        key: torch.from_numpy(seeded.tensor(key, tuple(value.shape)) if tensors is None else tensors[key]).double()
        if value.is_floating_point()
        else torch.zeros((), dtype=torch.int64)
        for key, value in network.state_dict().items()
    }
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def run(name: str, network: Any, images: Any, nodes: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    """Logits, and the named feature maps [B,C,h,w].

    The output of a submodule is read when the whole network has run: where an activation follows in place, as in
    DenseNet, the map is then the activated one.
    """
    seen: dict[str, Any] = {}
    if name.startswith("efficientnet_lite"):
        return network(images, seen), seen
    for node in nodes:

        def keep(module, inputs, output, node=node):
            seen[node] = output

        network.get_submodule(node.replace(*torch_zoo.MODULES.get(name, (node, node)))).register_forward_hook(keep)
    preprocess = torch_zoo.NORMALIZE if name not in torch_zoo.NETWORKS else (lambda x: x)
    return network(preprocess(images)), seen


def references(name: str) -> dict[str, np.ndarray]:
    """Everything stored of one network."""
    size, entry = image_size(name), models.ARCHITECTURES[name]
    network = original(name)
    x = torch.from_numpy(seeded.images(2, size, entry.channels).transpose(0, 3, 1, 2).copy()).double().requires_grad_()
    nodes = models.network(name).nodes
    logits, seen = run(name, network, x, nodes)
    target = int(logits[0].argmax())
    gradient = torch.autograd.grad(logits[:, target].sum(), x)[0].permute(0, 2, 3, 1).numpy().ravel()
    tensors = [[key, list(v.shape)] for key, v in network.state_dict().items() if v.is_floating_point()]
    stored = {
        "size": np.asarray(size),
        "tensors": np.frombuffer(json.dumps(tensors).encode(), np.uint8),
        "logits": logits.detach().numpy().astype(np.float32),
        "class": np.asarray(target),
        "gradient": gradient[seeded.places("gradient", gradient.size)],
        "gradient_max": np.abs(gradient).max(),
    }
    for node in dict.fromkeys((nodes[0], nodes[len(nodes) // 2], nodes[-1])):
        values = seen[node].detach().permute(0, 2, 3, 1).numpy().ravel()
        stored[f"maps/{node}"] = values[seeded.places(node, values.size)].astype(np.float32)
        stored[f"moments/{node}"] = np.asarray([values.mean(), values.std(), np.abs(values).max()], np.float32)
    return stored


def main(out: Path = Path("jaxinterp/weights/references.npz"), only: tuple[str, ...] = ()) -> None:
    """Writes the references.

    Args:
        out: The file.
        only: Networks to compute anew, keeping the others that the file holds; none means all.
    """
    stored = dict(np.load(out)) if only else {}
    for name in only or models.ARCHITECTURES:
        start = time.perf_counter()
        found = references(name)
        stored = {key: value for key, value in stored.items() if key.partition("/")[0] != name}
        stored |= {f"{name}/{key}": value for key, value in found.items()}
        logits, last = found["logits"], found[f"moments/{models.network(name).nodes[-1]}"]
        apart = np.abs(logits[0] - logits[1]).max() / np.abs(logits).max()
        print(
            f"{name:20} {found['size']:4} px  |logit| <= {np.abs(logits).max():8.3g}, images apart by {apart:.2f}; "
            f"last map {last[0]:8.3g} +- {last[1]:.3g}; |gradient| <= {found['gradient_max']:.2g}  "
            f"{time.perf_counter() - start:.1f} s",
            flush=True,
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, **stored)
    print(f"{out}: {out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    tyro.cli(main)
