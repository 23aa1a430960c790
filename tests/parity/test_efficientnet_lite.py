"""EfficientNet-Lite agrees with PyTorch on real pictures: logits, every node, input gradients, an attack, the crop.

The tolerances are what two frameworks reach in float32. Gradients have jumps where the input of a ReLU6 passes 0 or 6:
of some six million inputs a picture, a few round to the other side, and the gradient then differs by up to some percent
of its largest component. It does so between PyTorch's own two layouts as well. Gradients are therefore compared in
float32 with the jumps where PyTorch has them, after counting how many were elsewhere, and in float64 as they are.
"""

import copy
import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxinterp
from jaxinterp import attacks, data

NETWORKS = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
EPS, STEPS = 2 / 255, 10


@dataclasses.dataclass
class Pair:
    """A network in both frameworks, and the pictures with their labels."""

    network: Any
    params: Any
    reference: Any
    images: np.ndarray
    labels: np.ndarray
    torch: ModuleType

    def to_torch(self, images: np.ndarray) -> Any:
        """NHWC -> NCHW."""
        return self.torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


@pytest.fixture(scope="module", params=NETWORKS)
def pair(request: pytest.FixtureRequest, torch: ModuleType, torch_reference: ModuleType) -> Pair:
    """Each network with foolbox's 20 pictures of ImageNet."""
    network, params = jaxinterp.load(request.param)
    source = data.samples("imagenet", crop=data.Crop(network.image_size, network.crop_pct, network.interpolation))
    images = np.stack([source[i].image for i in range(len(source))])
    assert len(images) == 20
    return Pair(network, params, torch_reference.load(request.param), images, source.labels, torch)


def test_logits_and_nodes(pair: Pair):
    """Logits within 1e-5 of the largest, every node within 1e-4 of its largest value."""
    network, params = pair.network, pair.params
    capture = jax.jit(lambda p, x: jaxinterp.network.capture(network, p, x, network.nodes))
    logits, maps = capture(params, pair.images)
    seen: dict[str, Any] = {}
    with pair.torch.inference_mode():
        expected = pair.reference(pair.to_torch(pair.images), seen).numpy()
    assert _error(logits, expected) <= 1e-5
    assert np.array_equal(np.argmax(logits, -1), np.argmax(expected, -1))
    assert list(seen) == list(network.nodes)
    for node in network.nodes:
        theirs, ours = seen[node].numpy().transpose(0, 2, 3, 1), np.asarray(maps[node])
        assert ours.shape == theirs.shape, node
        assert _error(ours, theirs) <= 1e-4, node
        assert _cosine(ours, theirs) >= 1 - 1e-9, node


def test_input_gradients(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    """Gradients of the label's logit within 1e-4 of an image's largest component, with PyTorch's choices of ReLU6."""
    theirs, gates = _torch_gradients(pair, pair.torch.float32)

    def logit(x, params, gates):
        remaining, differing = iter(gates), []

        def relu6(x):
            gate = next(remaining)
            differing.append(jnp.sum(((x > 0) & (x < 6)) != gate))
            return jnp.where(gate, x, jax.lax.stop_gradient(jnp.clip(x, 0, 6)))

        monkeypatch.setattr(jax.nn, "relu6", relu6)
        value = jnp.take_along_axis(pair.network.bind(params)(x), pair.labels[:, None], 1).sum()
        assert next(remaining, None) is None
        return value, sum(differing)

    ours, differing = jax.jit(jax.grad(logit, has_aux=True))(pair.images, pair.params, gates)
    assert int(differing) <= 1e-6 * sum(gate.size for gate in gates)
    for index in range(len(theirs)):
        assert _error(ours[index], theirs[index]) <= 1e-4, index


def test_input_gradients_in_float64(pair: Pair):
    """Every picture's gradient within 1e-10 of its largest component."""
    theirs, _ = _torch_gradients(pair, pair.torch.float64)
    with jax.enable_x64(True):
        params = {name: jnp.asarray(np.asarray(value), jnp.float64) for name, value in pair.params.items()}

        def logit(x, params):
            return jnp.take_along_axis(pair.network.bind(params)(x), jnp.asarray(pair.labels)[:, None], 1).sum()

        ours = np.asarray(jax.jit(jax.grad(logit))(jnp.asarray(pair.images, jnp.float64), params))
    assert ours.dtype == np.float64
    for index in range(len(theirs)):
        assert _error(ours[index], theirs[index]) <= 1e-10, index


def _torch_gradients(pair: Pair, dtype: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """Gradients of the labels' logits [B,H,W,C], and where each ReLU6 passes them on, in order [B,h,w,c]."""
    torch, gates = pair.torch, []

    def record(module, inputs, output):
        gates.append(((output > 0) & (output < 6)).numpy().transpose(0, 2, 3, 1))

    reference = copy.deepcopy(pair.reference).to(dtype)
    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d) and not name.endswith("._bn2"):  # no ReLU6 follows those
            module.register_forward_hook(record)
    x = pair.to_torch(pair.images).to(dtype).requires_grad_()
    index = torch.from_numpy(pair.labels[:, None].astype(np.int64))
    gradients = torch.autograd.grad(reference(x).gather(1, index).sum(), x)[0]
    return gradients.numpy().transpose(0, 2, 3, 1), gates


def test_ifgsm_success(pair: Pair):
    """Ten untargeted signed steps succeed on the same pictures, all but at most one."""
    model = pair.network.bind(pair.params)
    attack = attacks.IFGSM(eps=EPS, steps=STEPS)
    result = attacks.run(attack, model, pair.images, pair.labels, key=jax.random.key(0))
    theirs = _torch_ifgsm(pair)
    assert np.sum(np.asarray(result.success) != theirs) <= 1
    assert theirs.any()


def _torch_ifgsm(pair: Pair) -> np.ndarray:
    """Whether any iterate of cross-entropy's signed ascent is misclassified, by picture."""
    torch = pair.torch
    original, labels = pair.to_torch(pair.images), torch.from_numpy(pair.labels.astype(np.int64))
    x, success = original, torch.zeros(len(labels), dtype=torch.bool)
    for step in range(STEPS + 1):
        x = x.detach().requires_grad_()
        logits = pair.reference(x)
        success |= logits.argmax(1) != labels
        if step == STEPS:
            break
        gradient = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), x)[0]
        moved = x.detach() + 2.5 * EPS / STEPS * gradient.sign()
        x = (original + (moved - original).clamp(-EPS, EPS)).clamp(0, 1)
    return success.numpy()


def test_crop_is_torchvisions():
    """Resize(floor(size / crop_pct), bicubic), CenterCrop(size), ToTensor, written with PIL alone."""
    spec = importlib.util.find_spec("foolbox")
    assert spec is not None
    assert spec.origin is not None
    files = sorted((Path(spec.origin).parent / "data").glob("imagenet_*"))
    source = data.samples("imagenet", crop=data.Crop(224, 0.875, "bicubic"))
    assert [file.name for file in files] == list(source.ids)
    for index, file in enumerate(files):
        picture = Image.open(file).convert("RGB")
        width, height = picture.size
        if width <= height:
            picture = picture.resize((256, int(256 * height / width)), Image.Resampling.BICUBIC)
        else:
            picture = picture.resize((int(256 * width / height), 256), Image.Resampling.BICUBIC)
        left, top = round((picture.width - 224) / 2.0), round((picture.height - 224) / 2.0)
        cropped = picture.crop((left, top, left + 224, top + 224))
        expected = np.asarray(cropped, np.float32) / np.float32(255)
        np.testing.assert_array_equal(source[index].image, expected)


def _error(ours: Any, theirs: np.ndarray) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def _cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    a, b = ours.astype(np.float64).ravel(), theirs.astype(np.float64).ravel()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
