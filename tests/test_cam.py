"""Class activation maps against arrays of another program, the identity of the logits, and the half-pixel rule.

The reference arrays (`shared/oracle` beside the project) come from a small CNN in PyTorch: three convolutions with
ReLU, the mean over u positions, one linear layer with weights w.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxinterp import Network, cam
from jaxinterp.network import features, head

ORACLE = Path(__file__).parents[2] / "shared" / "oracle"
PADDING = {"conv1": 2, "conv2": 1, "conv3": 1}


def apply(params, images, tap):
    """The reference network as a user would bring it: parameters with PyTorch's names and layouts."""
    x = jnp.transpose(images, (0, 3, 1, 2))
    for layer, p in PADDING.items():
        x = lax.conv_general_dilated(x, params[f"{layer}.0.weight"], (2, 2), ((p, p), (p, p)))
        x = jax.nn.relu(x + params[f"{layer}.0.bias"][:, None, None])
        x = jnp.transpose(tap(layer, jnp.transpose(x, (0, 2, 3, 1))), (0, 3, 1, 2))
    return jnp.mean(x, axis=(2, 3)) @ params["fc.weight"].T + params["fc.bias"]


NETWORK = Network(name="tinynet", apply=apply, nodes=tuple(PADDING), image_size=112, classes=6, cam_node="conv3")


def random_params():
    shapes = {
        "conv1.0.weight": (8, 3, 5, 5),
        "conv1.0.bias": (8,),
        "conv2.0.weight": (16, 8, 3, 3),
        "conv2.0.bias": (16,),
        "conv3.0.weight": (24, 16, 3, 3),
        "conv3.0.bias": (24,),
        "fc.weight": (6, 24),
        "fc.bias": (6,),
    }
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape) * 0.2, jnp.float32) for name, shape in shapes.items()}


IMAGES = np.random.default_rng(1).uniform(size=(4, 40, 32, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def reference():
    if not (ORACLE / "cam.npz").exists():
        pytest.skip(f"the reference arrays are not at {ORACLE}")
    with np.load(ORACLE / "cam.npz") as arrays, np.load(ORACLE / "tinynet.npz") as weights:
        return dict(arrays), {name: jnp.asarray(weights[name]) for name in weights.files}


@pytest.fixture(scope="module")
def reference_maps(reference):
    """Maps of the reference network, whose images lie between -3 and 3: a network for [0, 1] that scales them."""
    arrays, params = reference
    network = Network(
        name="scaled",
        apply=lambda params, images, tap: apply(params, 6 * images - 3, tap),
        nodes=tuple(PADDING),
        classes=6,
        cam_node="conv3",
    )
    images = (arrays["x"].transpose(0, 2, 3, 1) + 3) / 6
    classes = arrays["cls"].astype(np.int32)
    return {
        method: np.asarray(cam.maps(network, params, images, classes, method))
        for method in cam.METHODS
        if method != "scorecam"
    }


# Against the reference arrays


def test_features_logits_and_gradients_equal_the_reference(reference):
    arrays, params = reference
    images = jnp.asarray(arrays["x"].transpose(0, 2, 3, 1))
    activation = features(NETWORK, params, images, "conv3")
    np.testing.assert_allclose(NETWORK.bind(params)(images), arrays["logits"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        np.transpose(activation, (0, 3, 1, 2)), arrays["act"], rtol=1e-4, atol=1e-5 * arrays["act"].max()
    )

    def of_class(maps):
        return jnp.sum(head(NETWORK, params, "conv3", maps, images)[jnp.arange(4), arrays["cls"]])

    gradient = jax.grad(of_class)(activation)
    np.testing.assert_allclose(
        np.transpose(gradient, (0, 3, 1, 2)), arrays["grad"], rtol=1e-5, atol=1e-6 * np.abs(arrays["grad"]).max()
    )


def test_maps_equal_weights_times_the_reference_activations(reference, reference_maps):
    arrays, params = reference
    weights = np.asarray(params["fc.weight"])[arrays["cls"]]
    expected = np.einsum("bk,bkhw->bhw", weights, arrays["act"]) / (14 * 14)
    np.testing.assert_allclose(reference_maps["cam"], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


REFERENCES = {
    "gradcam": "GradCAM",
    "gradcam++": "GradCAMPlusPlus",
    "xgradcam": "XGradCAM",
    "hirescam": "HiResCAM",
    "layercam": "LayerCAM",
    "eigencam": "EigenCAM",
}


@pytest.mark.parametrize("method", REFERENCES)
def test_maps_equal_the_reference(reference, reference_maps, method):
    raw, mine = reference[0][f"{REFERENCES[method]}/raw"], reference_maps[method]
    if method == "eigencam":  # whose sign is arbitrary there, and the one with the larger extreme here
        raw = raw * np.sign(raw.max(axis=(1, 2)) + raw.min(axis=(1, 2)))[:, None, None]
        assert (mine.max(axis=(1, 2)) >= -mine.min(axis=(1, 2))).all()
    np.testing.assert_allclose(mine, raw, atol=1e-5 * np.abs(raw).max())
    assert np.abs(raw).max() > 0


@pytest.mark.parametrize("method", [method for method in REFERENCES if method != "eigencam"])
def test_scaled_and_resized_maps_equal_the_final_reference_maps(reference, reference_maps, method):
    small = cam.normalised(jnp.maximum(reference_maps[method], 0))
    large = cam.normalised(cam.resize(small, 112))
    np.testing.assert_allclose(large, reference[0][f"{REFERENCES[method]}/final"], atol=1e-5)


# Identities


def test_maps_sum_to_logits_without_bias_for_every_class():
    params = random_params()
    logits = np.asarray(NETWORK.bind(params)(jnp.asarray(IMAGES)))
    every = cam.maps(NETWORK, params, IMAGES, np.tile(np.arange(6), (4, 1)))
    assert every.shape == (4, 6, 5, 4)
    np.testing.assert_allclose(every.sum(axis=(2, 3)), logits - np.asarray(params["fc.bias"]), atol=1e-4)
    assert np.abs(logits - logits.mean(0)).max() > 1e-2
    # Raw: the maps of a class with mixed weights have both signs.
    assert (np.asarray(every).min(axis=(2, 3)) < 0).any()


def test_relatives_by_loops():
    """Score-CAM and Ablation-CAM, a unit at a time, at a node in the middle of the network."""
    params, classes = random_params(), np.array([5, 0, 3, 3])
    model = NETWORK.bind(params)
    activation = np.asarray(features(NETWORK, params, jnp.asarray(IMAGES), "conv2"))
    logits = np.asarray(model(IMAGES), np.float64)
    units, rows = activation.shape[-1], np.arange(4)
    scores, drops = np.zeros((2, 4, units))
    for k in range(units):
        large = np.stack([half_pixel(one, IMAGES.shape[1:3]) for one in activation[..., k]])
        low, high = large.min(axis=(1, 2), keepdims=True), large.max(axis=(1, 2), keepdims=True)
        unit = (large - low) / np.maximum(high - low, 1e-12)
        scores[:, k] = np.asarray(model((IMAGES * unit[..., None]).astype(np.float32)))[rows, classes]
        without = activation.copy()
        without[..., k] = 0
        cut = np.asarray(head(NETWORK, params, "conv2", jnp.asarray(without), jnp.asarray(IMAGES)))
        drops[:, k] = (logits[rows, classes] - cut[rows, classes]) / logits[rows, classes]
    weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    for method, by_unit in (("scorecam", weights), ("ablationcam", drops)):
        expected = np.einsum("bk,bhwk->bhw", by_unit, activation)
        actual = cam.maps(NETWORK, params, IMAGES, classes, method, node="conv2")
        np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def test_relatives_on_a_network_that_ends_in_a_mean_and_a_linear_layer():
    """The gradient is w_k / u everywhere: most methods are CAM, and without unit k a logit lacks w_k mean(f_k)."""
    params, classes = random_params(), np.tile(np.arange(6), (4, 1))
    plain = np.asarray(cam.maps(NETWORK, params, IMAGES, classes))
    for method in ("gradcam", "hirescam", "xgradcam"):
        relative = np.asarray(cam.maps(NETWORK, params, IMAGES, classes, method))
        np.testing.assert_allclose(relative, plain, atol=1e-5 * np.abs(plain).max())
    activation = np.asarray(features(NETWORK, params, jnp.asarray(IMAGES), "conv3"), np.float64)
    weights, logits = np.asarray(params["fc.weight"]), np.asarray(NETWORK.bind(params)(IMAGES))
    lacking = weights * activation.mean(axis=(1, 2))[:, None] / logits[:, :, None]
    np.testing.assert_allclose(
        cam.maps(NETWORK, params, IMAGES, classes, "ablationcam"),
        np.einsum("bck,bhwk->bchw", lacking, activation),
        rtol=1e-3,
        atol=1e-4 * np.abs(lacking).max() * activation.max(),
    )


@pytest.mark.parametrize("method", cam.METHODS)
def test_every_method_takes_several_classes_and_treats_images_alone(method):
    params, classes = random_params(), np.array([[0, 5], [1, 1], [4, 2], [3, 0]])
    whole = np.asarray(cam.maps(NETWORK, params, IMAGES, classes, method))
    assert whole.shape == (4, 2, 5, 4)
    scale = np.abs(whole).max()
    for i in range(4):
        alone = np.asarray(cam.maps(NETWORK, params, IMAGES[i : i + 1], classes[i : i + 1, 1], method))
        np.testing.assert_allclose(alone[0], whole[i, 1], atol=1e-5 * scale)


def test_normalised_maps():
    maps = jnp.array([[[1.0, 3.0], [2.0, 5.0]], [[2.0, 2.0], [2.0, 2.0]]])
    np.testing.assert_allclose(cam.normalised(maps), [[[0, 0.5], [0.25, 1]], [[0, 0], [0, 0]]])


def test_maps_are_weighted_features():
    params = random_params()
    activation = np.asarray(features(NETWORK, params, jnp.asarray(IMAGES), "conv3"), np.float64)
    classes = np.array([5, 0, 3, 3])
    expected = np.einsum("bhwk,bk->bhw", activation, np.asarray(params["fc.weight"], np.float64)[classes]) / 20
    np.testing.assert_allclose(cam.maps(NETWORK, params, IMAGES, classes), expected, atol=1e-5)


def test_several_classes_are_one_class_at_a_time():
    params = random_params()
    classes = np.array([[0, 5], [1, 1], [4, 2], [3, 0]])
    both = np.asarray(cam.maps(NETWORK, params, IMAGES, classes))
    for column in range(2):
        one = np.asarray(cam.maps(NETWORK, params, IMAGES, classes[:, column]))
        np.testing.assert_allclose(both[:, column], one, atol=1e-6)
    np.testing.assert_array_equal(both[1, 0], both[1, 1])


def test_the_named_node_is_the_default_one():
    params = random_params()
    classes = np.zeros(4, np.int32)
    np.testing.assert_array_equal(
        cam.maps(NETWORK, params, IMAGES, classes, node="conv3"), cam.maps(NETWORK, params, IMAGES, classes)
    )


def test_a_batch_is_maps_of_one():
    params = random_params()
    classes = np.array([5, 0, 3, 3])
    whole = np.asarray(cam.maps(NETWORK, params, IMAGES, classes))
    for i in range(4):
        alone = cam.maps(NETWORK, params, IMAGES[i : i + 1], classes[i : i + 1])
        np.testing.assert_allclose(alone[0], whole[i], atol=1e-6)


# Resizing


def half_pixel(values, size):
    """Bilinear interpolation of [h,w] at pixel centres: output i reads (i + 1/2) h / H - 1/2, edges repeated."""
    for axis, new in enumerate(size):
        old = values.shape[axis]
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, old - 1)
        part = (at - low).reshape(-1, *[1] * (values.ndim - 1 - axis))
        values = np.take(values, low, axis) * (1 - part) + np.take(values, high, axis) * part
    return values


@settings(max_examples=10, deadline=None)
@given(st.tuples(st.integers(1, 7), st.integers(1, 7)), st.tuples(st.integers(1, 20), st.integers(1, 20)))
def test_resize_is_half_pixel_bilinear(old, new):
    maps = np.random.default_rng(0).normal(size=(2, *old)).astype(np.float32)
    large = np.asarray(cam.resize(jnp.asarray(maps), new))
    assert large.shape == (2, *new)
    for one, expected in zip(large, maps, strict=True):
        np.testing.assert_allclose(one, half_pixel(expected.astype(np.float64), new), atol=1e-5)


def test_resize_by_hand_and_with_leading_axes():
    np.testing.assert_allclose(cam.resize(jnp.array([[0.0, 1.0]]), (1, 4)), [[0, 0.25, 0.75, 1]], atol=1e-6)
    maps = jnp.arange(24.0).reshape(2, 3, 2, 2)
    np.testing.assert_allclose(cam.resize(maps, 5)[1, 2], cam.resize(maps[1, 2], 5), rtol=1e-6)
    np.testing.assert_array_equal(cam.resize(maps, 2), maps)


# Errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "gradcam2"}, ValueError, "unknown method 'gradcam2'.*cam"),
        ({"node": "conv2"}, ValueError, "defined for node 'conv3' of tinynet, not 'conv2'"),
        ({"node": "conv4"}, ValueError, "no node 'conv4'; did you mean 'conv"),
        ({"classes": np.array([0, 6, 1, 2])}, ValueError, "classes must be classes from 0 to 5, but example 1 has 6"),
        (
            {"classes": np.array([[0, 1], [2, 3], [0, -1], [0, 0]])},
            ValueError,
            "classes must be classes from 0 to 5, but example 2 has -1",
        ),
        ({"classes": np.zeros(4)}, ValueError, r"classes must be integers \[B\] or \[B,n\], got float"),
        ({"classes": np.array(1)}, ValueError, r"classes must be integers \[B\] or \[B,n\], got .* shape \(\)"),
        ({"classes": np.zeros(3, int)}, ValueError, r"classes must have shape \[4\].*\(3,\)"),
        ({"classes": np.zeros((4, 0), int)}, ValueError, r"classes must be .*\(4, 0\)"),
        ({"classes": [[0, 1], [1], [2], [3]]}, ValueError, "as many for every image"),
        ({"classes": ["cat"] * 4}, ValueError, r"classes must be integers \[B\] or \[B,n\]"),
        ({"images": IMAGES + 1}, ValueError, r"images must be finite and in \[0, 1\]"),
        ({"images": IMAGES[0]}, ValueError, r"images must be \[B,H,W,C\]"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, message):
    arguments = {"network": NETWORK, "params": random_params(), "images": IMAGES, "classes": np.zeros(4, int)}
    with pytest.raises(error, match=f"(?s){message}"):
        cam.maps(**{**arguments, **change})


def test_a_network_without_pooling_and_linear_layer_is_refused():
    network = Network(name="plain", apply=apply, nodes=tuple(PADDING), classes=6)
    classes = np.zeros(4, int)
    with pytest.raises(ValueError, match=r"plain has no cam_node.*global average pooling and one linear.*gradcam"):
        cam.maps(network, random_params(), IMAGES, classes)
    # Those that need no such end take the last node.
    np.testing.assert_array_equal(
        cam.maps(network, random_params(), IMAGES, classes, "layercam"),
        cam.maps(NETWORK, random_params(), IMAGES, classes, "layercam"),
    )
    # The last one with more than one position.
    pooled = Network(
        name="pooled",
        apply=lambda params, images, tap: (
            apply(params, images, tap)
            + 0 * jnp.sum(tap("mean", jnp.mean(images, axis=(1, 2), keepdims=True)), axis=(1, 2))[:, :1]
        ),
        nodes=(*PADDING, "mean"),
        classes=6,
    )
    np.testing.assert_allclose(
        cam.maps(pooled, random_params(), IMAGES, classes, "layercam"),
        cam.maps(NETWORK, random_params(), IMAGES, classes, "layercam"),
        rtol=1e-5,
        atol=1e-6,
    )
    without = Network(name="bare", apply=lambda params, images: images.mean((1, 2)) @ params, classes=6)
    with pytest.raises(ValueError, match="bare has no nodes"):
        cam.maps(without, jnp.ones((3, 6)), IMAGES, classes, "gradcam")


@pytest.mark.parametrize("method", ["cam", "gradcam"])
def test_a_second_call_traces_nothing(method):
    """Tracing a network takes longer than a forward pass of it."""
    traced = []

    def counted(params, images, tap):
        traced.append(1)
        return apply(params, images, tap)

    network, params = Network("counted", counted, tuple(PADDING), classes=6, cam_node="conv3"), random_params()
    first = cam.maps(network, params, IMAGES, np.array([[0, 1, 2]] * 4), method)
    before = len(traced)
    assert before > 0
    again = cam.maps(network, params, IMAGES, np.array([[0, 1, 5]] * 4), method)
    assert len(traced) == before
    np.testing.assert_array_equal(again[:, :2], first[:, :2])
