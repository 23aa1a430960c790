"""Does a network compute what its PyTorch original computes? Feature maps, logits and input gradients, with verdicts.

Without torch the network is run with seeded weights and compared with stored outputs of the original (see
`experiments/make_references.py`). With torch the two are compared live, on the original's own weights.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.resources
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp import models
from jaxinterp.canonical import canonical
from jaxinterp.network import Network, capture, identity
from jaxinterp.weights import conversion, names, seeded

PRECISION = "highest"
"""Of matrix products in every comparison, whatever `jaxinterp --precision` says."""

# Relative to the largest value. Maps and logits are compared in float32, gradients in float64: an input of a ReLU that
# is nearly zero rounds to one side in one program and to the other in the next, and the float32 gradient behind it is
# then another one, in any two programs.
TOLERANCES = {"logits": 1e-5, "map": 1e-4, "gradient": 1e-9}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One array of the network beside the original's.

    Attributes:
        what: "logits", "gradient" or the name of a node.
        difference: largest absolute difference, relative to the largest absolute value of the original.
        cosine: of the two as vectors.
        tolerance: of `difference`.
    """

    what: str
    difference: float
    cosine: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the difference is a number within the tolerance."""
        return self.difference <= self.tolerance


def compare(what: str, ours: Any, original: Any, *, largest: float | None = None) -> Comparison:
    """Compares two arrays of the same shape; `largest` of the original where the arrays are samples of it."""
    a, b = (np.asarray(x, np.float64).ravel() for x in (ours, original))
    scale = float(np.max(np.abs(b))) if largest is None else float(largest)
    cosine = float(a @ b / np.sqrt((a @ a) * (b @ b))) if np.any(a) and np.any(b) else float(np.array_equal(a, b))
    kind = what if what in TOLERANCES else "map"
    return Comparison(what, float(np.max(np.abs(a - b))) / (scale or 1.0), cosine, TOLERANCES[kind])


def against_references(name: str, references: Mapping[str, np.ndarray] | None = None) -> list[Comparison]:
    """Compares a network with seeded weights with the stored outputs of its original.

    Args:
        name: the architecture.
        references: as `experiments/make_references.py` writes them; None means those of the package.

    Raises:
        ValueError: an unknown architecture, or one of which nothing is stored.
    """
    stored = _stored() if references is None else references
    network = models.network(name)
    if f"{name}/logits" not in stored:
        raise ValueError(f"no reference outputs of {name} are stored; compare with --against")
    mine = {key.removeprefix(f"{name}/"): value for key, value in stored.items() if key.startswith(f"{name}/")}
    channels = models.ARCHITECTURES[name].channels
    images = seeded.images(len(mine["logits"]), int(mine["size"]), channels)
    params = jax.tree.map(jnp.asarray, seeded.params(models.shapes(name)))
    nodes = tuple(key.removeprefix("maps/") for key in mine if key.startswith("maps/"))
    logits, maps, gradient = _run(network, params, images, nodes, int(mine["class"]))
    found = []
    for node in nodes:
        values = np.ravel(maps[node])
        sample = values[seeded.places(node, values.size)]
        found.append(compare(node, sample, mine[f"maps/{node}"], largest=float(mine[f"moments/{node}"][2])))
    found.append(compare("logits", logits, mine["logits"]))
    values = np.ravel(gradient)
    sample = values[seeded.places("gradient", values.size)]
    found.append(compare("gradient", sample, mine["gradient"], largest=float(mine["gradient_max"])))
    return found


def against_torch(name: str, against: str, images: Any = None) -> list[Comparison]:
    """Compares a network with a live PyTorch module, on the module's own weights.

    Args:
        name: the architecture.
        against: "torchvision", for torchvision's module with seeded weights, or "FILE.py:factory", for the module
            that `factory()` of that file returns. The module takes images [B,C,H,W] as its own preprocessing leaves
            them: the network's preprocessing is applied beforehand. Nodes are compared with the submodules of their
            names; those that the module does not have, or whose activation follows outside, are left out
            (see `left_out`).
        images: [B,H,W,C] in [0, 1]; None means two seeded ones of the network's size.

    Raises:
        ValueError: torch or the file or the factory is missing; the module's state dict does not fit the network.
    """
    found = original(name, against)
    import torch  # pyright: ignore[reportMissingImports]  # there, or `original` would have said so

    network, params, module, entry = found.network, found.params, found.inner, models.ARCHITECTURES[name]
    if images is None:
        images = seeded.images(2, network.image_size, entry.channels)
    submodules = dict(module.named_modules())
    nodes = tuple(n for n in network.nodes if n in submodules and n not in _INSIDE.get(_family(name), ()))

    seen: dict[str, Any] = {}
    for node in nodes:
        submodules[node].register_forward_hook(lambda _, __, output, node=node: seen.__setitem__(node, output))
    x = torch.from_numpy(np.ascontiguousarray(np.transpose(images, (0, 3, 1, 2)))).requires_grad_()

    out = found.module(x)
    # Copied after the whole forward pass: an activation in place changes what a hook saw.
    maps_of_original = {node: value.detach().clone() for node, value in seen.items()}
    target = int(out[0].argmax())  # the gradient of a logit behind a ReLU may be zero, which compares nothing
    logits, maps, gradient = _run(network, params, images, nodes, target)
    x = x.detach().double().requires_grad_()
    (by_image,) = torch.autograd.grad(found.module.double()(x)[:, target].sum(), x)
    found = [compare(node, maps[node], maps_of_original[node].permute(0, 2, 3, 1).numpy()) for node in nodes]
    found.append(compare("logits", logits, out.detach().numpy()))
    found.append(compare("gradient", gradient, by_image.permute(0, 2, 3, 1).numpy()))
    return found


@dataclasses.dataclass(frozen=True)
class Original:
    """A PyTorch network and ours on its weights.

    Attributes:
        module: the torch.nn.Module on images [B,C,H,W] in [0, 1], in eval mode, float32, parameters frozen.
        inner: the same without preprocessing, a submodule named "inner" of `module`.
        network: ours, with as many classes.
        params: made from the module's state dict.
    """

    module: Any
    inner: Any
    network: Network
    params: dict[str, Any]


def original(name: str, against: str) -> Original:
    """The PyTorch original of a network; arguments and errors are those of `against_torch`."""
    try:
        import torch  # pyright: ignore[reportMissingImports]  # optional: only comparisons with PyTorch need it
    except ImportError:
        raise ValueError('comparing live needs torch; run: pip install "jaxinterp[torch]"') from None

    models.network(name)  # an unknown name is said first
    inner = _torchvision_module(name) if against == "torchvision" else _factory(against)()
    if not isinstance(inner, torch.nn.Module):
        raise ValueError(f"{against} must give a torch.nn.Module, got {type(inner).__name__}")
    inner = inner.eval().requires_grad_(False).float()
    state = {key: value.numpy() for key, value in inner.state_dict().items()}
    head, axis = conversion.head_of(name)
    classes = names.classes_of(state, head, axis, source=f"the state dict of {against}")
    expected = models.shapes(name, classes)
    params = jax.tree.map(
        jnp.asarray, names.map_tensors(state, expected, source=f"the state dict of {against}", network=name)
    )
    mean, std = _NORMALIZATION.get(_family(name), _IMAGENET)
    reverse = name.startswith("caffe_")  # BGR

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner
            # In double precision, so that they are exact where the module is computed in it.
            for name, values in (("mean", mean), ("std", std)):
                self.register_buffer(name, torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1))

        def forward(self, x: Any) -> Any:
            mean, std = self.mean.to(x.dtype), self.std.to(x.dtype)
            return self.inner(((x.flip(1) if reverse else x) - mean) / std)

    return Original(Whole().eval(), inner, models.network(name, classes), params)


def left_out(name: str, found: list[Comparison], *, live: bool) -> dict[str, str]:
    """The nodes of a network that were not compared, and why.

    Args:
        name: the architecture.
        found: what was compared.
        live: with a PyTorch module; otherwise with stored outputs.
    """
    compared = {each.what for each in found}
    inside = _INSIDE.get(_family(name), ())

    def why(node: str) -> str:
        if not live:
            return "no reference output is stored"
        if node in inside:
            return "the original's module of this name ends before batch norm and activation"
        return "the original has no module of this name"

    return {node: why(node) for node in models.network(name).nodes if node not in compared}


def lines(found: list[Comparison], skipped: Mapping[str, str] | None = None) -> Iterator[str]:
    """The comparisons as lines of text, and the nodes that were left out, by reason."""
    width = max(len(each.what) for each in found)
    yield f"{'':{width}}  max |difference|     cosine  tolerance"
    for each in found:
        verdict = "PASS" if each.passed else "FAIL"
        yield f"{each.what:{width}}  {each.difference:16.2e}  {each.cosine:.7f}  {each.tolerance:9.0e}  {verdict}"
    reasons: dict[str, list[str]] = {}
    for node, reason in (skipped or {}).items():
        reasons.setdefault(reason, []).append(node)
    for reason, nodes in reasons.items():
        yield f"not compared, as {reason}: {', '.join(nodes)}"


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# By family, what stands between pixels in [0, 1] and the original's input where it is not ImageNet's standard one.
_NORMALIZATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "efficientnet_lite": ((127 / 255,) * 3, (128 / 255,) * 3),
    "caffe_squeezenet": ((104 / 255, 117 / 255, 123 / 255), (1 / 255,) * 3),  # BGR
    "cifar_resnet18": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar10_cnn": ((0.0,), (1 / 255,)),
    "carlini": ((0.5,), (1.0,)),
    "small_cnn": ((0.0,), (1.0,)),
}
# By family, nodes that bear the name of a convolution whose batch norm or activation follows
# outside of it, so that the submodule's output is not the node's.
_INSIDE: dict[str, tuple[str, ...]] = {
    "efficientnet_lite": ("_conv_stem", "_conv_head"),
    "caffe_squeezenet": ("conv1",),
    "cifar10_cnn": ("conv2d", *(f"conv2d_{index}" for index in range(1, 6))),
}


def _family(name: str) -> str:
    """The key of `name` in the tables above, "" where it is in none."""
    return next((key for key in (*_NORMALIZATION, *_INSIDE) if name.startswith(key)), "")


def _run(
    network: Network, params: Any, images: Any, nodes: tuple[str, ...], of: int
) -> tuple[Any, dict[str, Any], Any]:
    """Logits, the named maps and the gradient of the logit of class `of`."""

    @jax.jit
    @canonical
    def forward(params, images):
        return capture(network, params, images, nodes)

    @jax.jit
    def gradient(params, images):
        return jax.grad(lambda x: jnp.sum(network.apply(params, x, identity)[:, of]))(images)

    with jax.default_matmul_precision(PRECISION):
        logits, maps = jax.tree.map(np.asarray, forward(params, jnp.asarray(images)))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), (params, images))
        return logits, maps, np.asarray(gradient(*wide))


def _stored() -> dict[str, np.ndarray]:
    resource = importlib.resources.files("jaxinterp.weights").joinpath("references.npz")
    with importlib.resources.as_file(resource) as path, np.load(path, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


@functools.cache
def torchvision_models() -> Any:
    """The module torchvision.models.

    Where torchvision's compiled operators do not fit the build of torch, they are declared without content, so that
    the package imports: no network here uses any of them.

    Raises:
        ValueError: torchvision is not installed, or does not import for another reason.
    """
    import torch  # pyright: ignore[reportMissingImports]  # as above

    try:
        try:
            return importlib.import_module("torchvision.models")
        except RuntimeError:
            for operator in ("nms", "qnms"):
                torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou) -> Tensor")
            return importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"torchvision cannot be imported ({error}); run: pip install torchvision, or name a file with"
            " --against FILE.py:factory"
        ) from None


def _torchvision_module(name: str) -> Any:
    import torch  # pyright: ignore[reportMissingImports]  # as above

    originals = torchvision_models()
    if not hasattr(originals, name):
        raise ValueError(f"torchvision has no {name}; name a file with --against FILE.py:factory")
    more = {"transform_input": True, "aux_logits": False, "init_weights": False}
    module = getattr(originals, name)(weights=None, **(more if name in ("inception_v3", "googlenet") else {}))
    state = {
        key: torch.from_numpy(seeded.tensor(key, tuple(value.shape))) if value.is_floating_point() else value
        for key, value in module.state_dict().items()
    }
    module.load_state_dict(state)
    return module


def _factory(against: str) -> Any:
    path, colon, function = against.rpartition(":")
    if not colon or not Path(path).is_file():
        raise ValueError(f"--against must be torchvision or FILE.py:factory with an existing file, got {against!r}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"{path} has no function {function!r}")
    return getattr(module, function)
