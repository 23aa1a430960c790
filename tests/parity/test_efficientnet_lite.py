"""EfficientNet-Lite agrees with PyTorch on real pictures: logits, every node, input gradients, an attack, the crop.

The tolerances are what two frameworks reach in float32 (see also experiments/torch_reference.py).
"""

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
    assert list(maps) == list(seen) == list(network.nodes)
    for node in network.nodes:
        theirs, ours = seen[node].numpy().transpose(0, 2, 3, 1), np.asarray(maps[node])
        assert ours.shape == theirs.shape, node
        assert _error(ours, theirs) <= 1e-4, node
        assert _cosine(ours, theirs) >= 1 - 1e-9, node


def test_input_gradients(pair: Pair):
    """Gradients of the label's logit within 1e-4 of the largest component."""
    model = pair.network.bind(pair.params)
    logit = lambda x: jnp.take_along_axis(model(x), pair.labels[:, None], 1).sum()  # noqa: E731
    ours = np.asarray(jax.jit(jax.grad(logit))(pair.images))
    x = pair.to_torch(pair.images).requires_grad_()
    index = pair.torch.from_numpy(pair.labels[:, None].astype(np.int64))
    theirs = pair.torch.autograd.grad(pair.reference(x).gather(1, index).sum(), x)[0]
    assert _error(ours, theirs.numpy().transpose(0, 2, 3, 1)) <= 1e-4


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
