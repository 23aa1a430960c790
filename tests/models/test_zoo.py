"""Every architecture against its PyTorch original, with weights by rule (references: experiments/make_references.py).

Layers against definitions written out in numpy.
"""

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp import cam, models, network
from jaxinterp.models import layers
from jaxinterp.weights import seeded
from jaxinterp.weights.names import from_jax_shape

REFERENCES = Path(models.__file__).parents[1] / "weights" / "references.npz"
HEADS = (
    "densenet121",
    "googlenet",
    "efficientnet_lite0",
    "squeezenet1_1",
)  # what lies behind the cam_node does not depend on depth
WITH_CAM = [name for name, entry in models.ARCHITECTURES.items() if entry.cam_node is not None]


@functools.cache
def _stored() -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(REFERENCES) as file:
        for key in file.files:
            name, _, what = key.partition("/")
            found.setdefault(name, {})[what] = file[key]
    return found


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_names_and_shapes(name: str):
    """The parameters are those of the original's state dict, by name and shape."""
    theirs = {key: tuple(shape) for key, shape in json.loads(_stored()[name]["tensors"].tobytes())}
    ours = {key: from_jax_shape(spec.shape) for key, spec in models.shapes(name).items()}
    assert ours == theirs


# Small members of most families. The others are deeper, or take long to compile; test_names_and_shapes and
# test_nodes_trace_at_full_size check them too, and their values are compared with --exhaustive. Of EfficientNet-Lite
# and SqueezeNet, test_efficientnet_lite.py and test_recipes.py have the classes of pictures.
DEEPER: tuple[str, ...] = ("densenet121", "googlenet", "inception_v3", "squeezenet1_0", "caffe_squeezenet1_1")
DEEPER += ("cifar_resnet18", "cifar_resnet56", "resnet34", "resnet50", "resnet101", "resnet152")
DEEPER += ("vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn")
DEEPER += tuple(f"efficientnet_lite{i}" for i in range(5))
DEEPER += ("alexnet", "squeezenet1_1", "detector_meso", "detector_residual")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.exhaustive if name in DEEPER else ()) for name in models.ARCHITECTURES],
)
def test_original(name: str):
    """In float32 logits and feature maps are within 1e-5 of their largest value; in float64 the gradient is equal.

    A ReLU whose input is zero up to rounding passes the gradient in one computation and not in another: one such unit
    among millions shows as a thousandth of the largest gradient, between any two implementations in float32. In
    float64 there is none, and the gradients must agree to 1e-9.
    """
    stored, net = _stored()[name], models.network(name)
    params = seeded.params(models.shapes(name))
    images = seeded.images(2, int(stored["size"]), models.ARCHITECTURES[name].channels)
    nodes = [key.removeprefix("maps/") for key in stored if key.startswith("maps/")]
    assert {net.nodes[0], net.nodes[-1]} <= set(nodes)

    logits, maps = jax.jit(lambda p, x: network.capture(net, p, x, nodes))(params, images)
    differences = {"logits": _difference(logits, stored["logits"], np.abs(stored["logits"]).max())}
    for node in nodes:
        values, moments = np.asarray(maps[node]).ravel(), stored[f"moments/{node}"]
        sample = values[seeded.places(node, values.size)]
        differences[node] = _difference(sample, stored[f"maps/{node}"], moments[2])
        ours = np.asarray([values.mean(dtype=np.float64), values.std(dtype=np.float64), np.abs(values).max()])
        differences[f"moments of {node}"] = _difference(ours, moments, moments[2])
    assert {what: d for what, d in differences.items() if not d <= 1e-5} == {}

    with jax.enable_x64(True):
        params, images = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (params, images))
        logit = lambda x, params: net.bind(params)(x)[:, int(stored["class"])].sum()  # noqa: E731
        values = np.asarray(jax.jit(jax.grad(logit))(images, params)).ravel()
    assert values.dtype == np.float64
    sample = values[seeded.places("gradient", values.size)]
    assert stored["gradient_max"] > 0
    assert np.abs(sample).max() > 0.01 * stored["gradient_max"]
    assert _difference(sample, stored["gradient"], stored["gradient_max"]) <= 1e-9


def _difference(ours: Any, theirs: Any, largest: Any) -> float:
    assert np.shape(ours) == np.shape(theirs)
    return float(np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)).max() / largest)


def test_references_are_complete():
    """Every architecture has references, and no other."""
    assert set(_stored()) == set(models.ARCHITECTURES)
    assert REFERENCES.stat().st_size < 1e6


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_nodes_trace_at_full_size(name: str):
    """At its own image size a network passes each of its nodes, a feature map, to the tap once and in order."""
    net, entry, seen = models.network(name), models.ARCHITECTURES[name], []

    def tap(node, x):
        assert x.ndim == 4
        seen.append(node)
        return x

    images = jax.ShapeDtypeStruct((1, net.image_size, net.image_size, entry.channels), jnp.float32)
    logits = jax.eval_shape(lambda p, x: net.apply(p, x, tap), models.shapes(name), images)
    assert tuple(seen) == net.nodes
    assert logits.shape == (1, net.num_classes)


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("resnet50", ["relu", *(f"layer{n}.{i}" for n, k in enumerate((3, 4, 6, 3), 1) for i in range(k))]),
        ("vgg11_bn", [f"features.{i}" for i in (2, 6, 10, 13, 17, 20, 24, 27)]),
        (
            "densenet121",
            ["features.relu0"]
            + [f"features.{kind}{n}" for n in (1, 2, 3) for kind in ("denseblock", "transition")]
            + ["features.denseblock4", "features.norm5"],
        ),
        ("mobilenet_v2", [f"features.{i}" for i in range(19)]),
    ],
)
def test_every_block_is_a_node(name: str, nodes: list[str]):
    """Under the names that torchvision's modules have."""
    assert list(models.network(name).nodes) == nodes


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.exhaustive if name in DEEPER and name not in HEADS else ())
        for name in WITH_CAM
    ],
)
def test_cam_sums_to_the_logit(name: str):
    """Logits are the cam_node's spatial means times weights, plus a bias: class activation maps sum to the rest."""
    net, entry = models.network(name), models.ARCHITECTURES[name]
    params, node = seeded.params(models.shapes(name)), str(net.cam_node)
    images = jnp.zeros((2, int(_stored()[name]["size"]), int(_stored()[name]["size"]), entry.channels))
    shape = jax.eval_shape(lambda p, x: network.features(net, p, x, node), params, images).shape
    maps = seeded.tensor("maps", shape) + 1
    assert min(shape[1:3]) > 1

    @jax.jit
    def program(params, maps):
        head = lambda f: network.head(net, params, node, f, images)  # noqa: E731
        logits, pull_back = jax.vjp(head, maps)
        (weights,) = pull_back(jax.nn.one_hot(jnp.asarray([1, 0]), net.num_classes))
        return logits, head(jnp.zeros_like(maps)), weights

    logits, bias, weights = map(np.asarray, program(params, maps))
    np.testing.assert_allclose(weights, np.broadcast_to(weights[:, :1, :1], shape), rtol=1e-6)
    sums = np.einsum("bhwu,bhwu->b", weights, maps)
    expected = (logits - bias)[[0, 1], [1, 0]]
    np.testing.assert_allclose(sums, expected, rtol=0, atol=1e-5 * np.abs(logits).max())
    assert np.all(np.abs(expected) > 1e-4 * np.abs(logits).max())


@pytest.mark.parametrize(
    "name", ["cifar_resnet20", pytest.param("squeezenet1_1", marks=pytest.mark.exhaustive), "small_cnn"]
)
def test_cam_maps(name: str):
    """cam.maps is what the definition says; SqueezeNet's maps are the classes' own feature maps."""
    net, params = models.network(name), jax.tree.map(jnp.asarray, seeded.params(models.shapes(name)))
    images, classes, node = jnp.asarray(seeded.images(2, 32)), np.asarray([1, 0]), str(net.cam_node)
    maps = np.asarray(cam.maps(net, params, images, classes))
    features = np.asarray(network.features(net, params, images, node))
    positions = features.shape[1] * features.shape[2]
    if name.startswith("squeezenet"):
        weight = np.eye(net.num_classes, dtype=np.float32)
    else:
        (weight,) = (params[key] for key in ("fc.weight", "linear.weight") if key in params)
    expected = np.einsum("bhwu,ub->bhw", features, weight[:, classes]) / positions
    np.testing.assert_allclose(maps, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_class_names():
    """Names belong to the data set and the number of classes."""
    assert models.network("resnet18").class_name(0) == "tench"
    assert models.network("cifar_resnet20").class_name(9) == "truck"
    assert models.network("carlini_mnist").class_name(7) == "7"
    assert models.network("small_cnn").class_name(1) == "class 1"
    assert models.network("resnet18", 7).classes == 7
    assert models.shapes("resnet18", 7)["fc.weight"].shape == (512, 7)


def test_published_crops():
    """The short side to which pictures are resized: 256 for 224, 342 for Inception's 299, none for small images."""
    for name, entry in models.ARCHITECTURES.items():
        net = models.network(name)
        short = int(net.image_size / net.crop_pct)
        wanted = {224: 256, 299: 342, 240: 274, 260: 297, 280: 320, 300: 342, 32: 32, 28: 28}[net.image_size]
        assert short == wanted, name
        assert net.interpolation == ("bicubic" if name.startswith(("efficientnet", "caffe")) else "bilinear")
        assert entry.image_size == net.image_size


def test_init():
    """Random parameters have the announced shapes and give logits."""
    params = models.init("small_cnn", jax.random.key(0), 4)
    assert {key: value.shape for key, value in params.items()} == {
        key: spec.shape for key, spec in models.shapes("small_cnn", 4).items()
    }
    logits = models.network("small_cnn", 4).bind(params)(jnp.asarray(seeded.images(3, 16)))
    assert logits.shape == (3, 4)
    assert np.ptp(np.asarray(logits), axis=0).min() > 0


# Pools


def _windows(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> list[int]:
    """Where PyTorch's windows begin: while they fit or, with ceil_mode, while they begin inside the input."""
    starts = itertools.takewhile(
        lambda start: start < size if ceil_mode else start + kernel <= size + padding,
        itertools.count(-padding, stride),
    )
    # A window that only repeats the end, its predecessor having reached it already, is not made.
    return [start for start in starts if start == -padding or start - stride + kernel < size + padding]


def _pooled(x: np.ndarray, kernel: int, stride: int, padding: int, ceil_mode: bool, value: Any) -> np.ndarray:
    """`value(entries inside, number of places inside input and padding)` for every window."""
    (batch, height, width, channels), out = x.shape, []
    rows, columns = (_windows(n, kernel, stride, padding, ceil_mode) for n in (height, width))
    for b, top, left, c in itertools.product(range(batch), rows, columns, range(channels)):
        inside = x[b, max(top, 0) : top + kernel, max(left, 0) : left + kernel, c]
        places = (min(top + kernel, height + padding) - top) * (min(left + kernel, width + padding) - left)
        out.append(value(inside.astype(np.float64), places))
    return np.asarray(out).reshape(batch, len(rows), len(columns), channels)


POOLS = [
    (kernel, stride, padding, ceil_mode, size)
    for kernel, stride, padding in ((2, 2, 0), (3, 2, 0), (3, 2, 1), (3, 1, 1), (2, 3, 1), (3, 5, 1))
    for ceil_mode in (False, True)
    for size in ((7, 8), (9, 12), (5, 6))
]


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "ceil_mode", "size"),
    [pytest.param(*pool, marks=() if pool[-1] == (7, 8) else pytest.mark.exhaustive) for pool in POOLS],
)
def test_pools(kernel, stride, padding, ceil_mode, size, rng: np.random.Generator):
    """Maximum and mean of every window, all values negative so that padding with zeros would show."""
    x = rng.normal(size=(2, *size, 3)).astype(np.float32) - 9
    how = {"stride": stride, "padding": padding, "ceil_mode": ceil_mode}
    definition = functools.partial(_pooled, x, kernel, stride, padding, ceil_mode)
    np.testing.assert_array_equal(layers.max_pool(jnp.asarray(x), kernel, **how), definition(lambda v, _: v.max()))
    for count_include_pad in (True, False):
        ours = layers.avg_pool(jnp.asarray(x), kernel, **how, count_include_pad=count_include_pad)
        theirs = definition(lambda v, places, padded=count_include_pad: v.sum() / (places if padded else v.size))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "ceil_mode", "size"),
    [pytest.param(*pool, marks=() if pool[-1] == (7, 8) else pytest.mark.exhaustive) for pool in POOLS],
)
def test_max_pool_gradient(kernel, stride, padding, ceil_mode, size, rng: np.random.Generator):
    """What every window gives goes to its first maximum in row-major order; the pictures have few different values."""
    x = rng.integers(-5, -2, size=(2, *size, 3)).astype(np.float32)
    pool = functools.partial(layers.max_pool, kernel=kernel, stride=stride, padding=padding, ceil_mode=ceil_mode)
    rows, columns = (_windows(n, kernel, stride, padding, ceil_mode) for n in size)
    given = rng.integers(1, 100, size=(2, len(rows), len(columns), 3)).astype(np.float32)
    expected = np.zeros_like(x)
    for b, (i, top), (j, left), c in itertools.product(range(2), enumerate(rows), enumerate(columns), range(3)):
        inside = x[b, max(top, 0) : top + kernel, max(left, 0) : left + kernel, c]
        row, column = np.unravel_index(np.argmax(inside), inside.shape)
        expected[b, max(top, 0) + row, max(left, 0) + column, c] += given[b, i, j, c]
    (gradient,) = jax.vjp(pool, jnp.asarray(x))[1](jnp.asarray(given))
    np.testing.assert_array_equal(gradient, expected)


def test_max_pool_gradient_goes_to_the_first_maximum():
    """On a flat picture every window's gradient goes to its first place, and NaN is not lost."""
    x = jnp.ones((1, 4, 4, 1))
    gradient = jax.grad(lambda x: layers.max_pool(x, 2).sum())(x)
    expected = np.zeros((4, 4))
    expected[::2, ::2] = 1
    np.testing.assert_array_equal(gradient[0, :, :, 0], expected)
    for place in range(4):
        holed = x.at[0, place // 2, place % 2, 0].set(jnp.nan)
        assert np.isnan(layers.max_pool(holed, 2)[0, 0, 0, 0])


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (14, 7),
        (10, 7),
        (2, 6),
        (6, 1),
        *(pytest.param(*more, marks=pytest.mark.exhaustive) for more in ((3, 7), (7, 7), (5, 6))),
    ],
)
def test_adaptive_avg_pool(given: int, size: int, rng: np.random.Generator):
    """Window i of n pixels runs from floor(in/size) to ceil((i+1)n/size)."""
    x = rng.normal(size=(2, given, given + 1, 3)).astype(np.float32)
    ours = np.asarray(layers.adaptive_avg_pool(jnp.asarray(x), size))
    assert ours.shape == (2, size, size, 3)
    for i, j in itertools.product(range(size), repeat=2):
        rows = slice(int(np.floor(i * given / size)), int(np.ceil((i + 1) * given / size)))
        columns = slice(int(np.floor(j * (given + 1) / size)), int(np.ceil((j + 1) * (given + 1) / size)))
        np.testing.assert_allclose(ours[:, i, j], x[:, rows, columns].mean((1, 2)), rtol=1e-5, atol=1e-6)


def test_flatten_is_channels_first(rng: np.random.Generator):
    """Entry chw of the flat vector is [h,w,c]."""
    x = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    flat = np.asarray(layers.flatten(jnp.asarray(x)))
    for h, w, c in itertools.product(range(3), range(4), range(5)):
        np.testing.assert_array_equal(flat[:, c * 12 + h * 4 + w], x[:, h, w, c])


def test_networks_made_twice_are_equal_and_have_one_hash():
    """Both are keys of every program that is compiled for a network."""
    made = [models.network.__wrapped__("small_cnn") for _ in range(2)]
    assert made[0].apply is not made[1].apply
    assert made[0] == made[1]
    assert hash(made[0]) == hash(made[1])
    assert hash(made[0].apply) == hash(made[0].apply.graphdef)
