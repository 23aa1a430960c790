"""Pixel attributions: completeness, closed forms of linear and quadratic models, finite differences, independence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from jaxinterp import attribution

BATCH, SIDE, CLASSES = 8, 6, 5
IMAGES = np.random.default_rng(0).uniform(0.1, 0.9, (BATCH, SIDE, SIDE, 3)).astype(np.float32)
CHOSEN = np.array([0, 1, 2, 3, 4, 0, 1, 2])
BOTH = np.stack([CHOSEN, (CHOSEN + 2) % CLASSES], axis=1)


@functools.cache
def net():
    keys = jax.random.split(jax.random.key(0), 2)
    params = [jax.random.normal(keys[0], (SIDE * SIDE * 3, 16)) * 0.2, jax.random.normal(keys[1], (16, CLASSES))]
    return Partial(lambda p, x: jnp.tanh((x - 0.5).reshape(x.shape[0], -1) @ p[0]) @ p[1], params)


@functools.cache
def weights():
    return np.random.default_rng(1).normal(size=(SIDE, SIDE, 3, CLASSES)).astype(np.float32)


def linear(x):
    return jnp.einsum("bhwc,hwck->bk", x, weights())


def quadratic(x):
    return jnp.einsum("bhwc,hwck->bk", jnp.square(x), weights())


METHODS = {
    "input_x_gradient": attribution.input_x_gradient,
    "integrated_gradients": functools.partial(attribution.integrated_gradients, steps=3),
    "smoothgrad": functools.partial(attribution.smoothgrad, key=jax.random.key(3), samples=3),
}


def of_classes(values):
    """[H,W,C,K] for each image's class."""
    return np.moveaxis(values[..., CHOSEN], -1, 0)


def test_linear_model_in_closed_form():
    w = of_classes(weights())
    np.testing.assert_allclose(attribution.input_x_gradient(linear, IMAGES, CHOSEN), w * IMAGES, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        attribution.integrated_gradients(linear, IMAGES, CHOSEN, baseline=0.5, steps=2),
        w * (IMAGES - 0.5),
        rtol=1e-4,
        atol=1e-6,
    )
    smooth = attribution.smoothgrad(linear, IMAGES, CHOSEN, key=jax.random.key(0), samples=4)
    np.testing.assert_allclose(smooth, w, rtol=1e-5, atol=1e-6)


def test_quadratic_model_in_closed_form():
    """The gradient 2 w x is linear on the way, so that one step at its middle integrates it exactly."""
    w, base = of_classes(weights()), np.random.default_rng(5).uniform(size=(SIDE, SIDE, 3)).astype(np.float32)
    for steps in (1, 7):
        found = attribution.integrated_gradients(quadratic, IMAGES, CHOSEN, baseline=base, steps=steps)
        np.testing.assert_allclose(found, w * (IMAGES**2 - base**2), rtol=1e-4, atol=1e-5)
    # The mean of 2 w (x + e): its error is 2 |w| sigma / sqrt(samples).
    samples, sigma = 400, 0.15
    smooth = attribution.smoothgrad(quadratic, IMAGES, CHOSEN, key=jax.random.key(0), samples=samples, sigma=sigma)
    error = (np.asarray(smooth) - 2 * w * IMAGES) / (2 * np.abs(w) * sigma / np.sqrt(samples))
    assert abs(error.mean()) < 0.1
    assert abs(error.std() - 1) < 0.1


def test_gradient_by_finite_differences():
    found = np.asarray(attribution.input_x_gradient(net(), IMAGES, CHOSEN))
    h, rows = 1e-2, np.arange(BATCH)
    for r, c, channel in ((0, 0, 0), (3, 4, 1), (5, 5, 2)):
        step = np.zeros_like(IMAGES)
        step[:, r, c, channel] = h
        up, down = (np.asarray(net()(jnp.asarray(IMAGES + s)), np.float64)[rows, CHOSEN] for s in (step, -step))
        expected = IMAGES[:, r, c, channel] * (up - down) / (2 * h)
        np.testing.assert_allclose(found[:, r, c, channel], expected, atol=2e-4)


@pytest.mark.parametrize("baseline", [0.0, 0.5, "images"])
def test_integrated_gradients_are_complete(baseline):
    """They sum to Z(x) - Z(b); the error of the sum falls with the square of the number of steps."""
    base = IMAGES[::-1].copy() if baseline == "images" else np.float32(baseline)
    rows = np.arange(BATCH)
    change = net()(jnp.asarray(IMAGES)) - net()(jnp.broadcast_to(base, IMAGES.shape))
    expected = np.asarray(change, np.float64)[rows, CHOSEN]

    def error(steps):
        found = attribution.integrated_gradients(net(), IMAGES, CHOSEN, baseline=base, steps=steps)
        return np.abs(np.asarray(found, np.float64).sum(axis=(1, 2, 3)) - expected).max()

    assert np.abs(expected).max() > 0.3
    assert error(100) < 1e-4
    assert error(4) < error(2) / 2 < error(1) / 4


def test_smoothgrad_without_noise_is_the_gradient():
    plain = np.asarray(attribution.input_x_gradient(net(), IMAGES, CHOSEN)) / IMAGES
    smooth = attribution.smoothgrad(net(), IMAGES, CHOSEN, key=jax.random.key(0), sigma=0.0, samples=2)
    np.testing.assert_allclose(smooth, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_an_images_attribution_is_its_own(method):
    """In any batch, at any place, on eight devices, and of several classes at once."""
    attribute = METHODS[method]
    whole = np.asarray(attribute(net(), IMAGES, BOTH))
    assert whole.shape == (BATCH, 2, *IMAGES.shape[1:])
    assert np.abs(whole[:, 0] - whole[:, 1]).max() > 0.01
    for i in (0, 5):
        np.testing.assert_array_equal(attribute(net(), IMAGES[i : i + 1], BOTH[i : i + 1])[0], whole[i])
    np.testing.assert_allclose(attribute(net(), IMAGES, CHOSEN), whole[:, 0], rtol=1e-4, atol=1e-6)
    order = np.array([3, 1, 0, 7, 2, 6, 5, 4])
    np.testing.assert_array_equal(attribute(net(), IMAGES[order], BOTH[order]), whole[order])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = attribute(net(), jax.device_put(IMAGES, NamedSharding(mesh, PartitionSpec("data"))), BOTH)
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_array_equal(sharded, whole)


def test_heat_is_the_sum_of_absolute_values_over_channels():
    values = np.random.default_rng(2).normal(size=(2, 3, 4, 5, 3)).astype(np.float32)
    np.testing.assert_allclose(attribution.heat(jnp.asarray(values)), np.abs(values).sum(axis=-1), rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "change", "error", "message"),
    [
        ("input_x_gradient", {"classes": CHOSEN + 4}, ValueError, "classes must be classes from 0 to 4"),
        ("input_x_gradient", {"classes": CHOSEN / 2}, ValueError, r"classes must be integers \[B\] or \[B,n\]"),
        ("input_x_gradient", {"classes": CHOSEN[:3]}, ValueError, r"classes must have shape \[8\]"),
        ("input_x_gradient", {"images": IMAGES * np.nan}, ValueError, r"images must be finite and in \[0, 1\]"),
        ("integrated_gradients", {"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ("integrated_gradients", {"baseline": np.zeros((5, 5, 3))}, ValueError, r"baseline \(5, 5, 3\) must broadcast"),
        ("integrated_gradients", {"baseline": np.inf}, ValueError, r"baseline must be finite and in \[0, 1\], got inf"),
        ("input_x_gradient", {"classes": [[0, 1], [1]] * 4}, ValueError, "as many for every image"),
        ("smoothgrad", {"samples": 0}, ValueError, "samples must be at least 1"),
        ("smoothgrad", {"sigma": -0.1}, ValueError, "sigma must be finite and not negative"),
    ],
)
def test_bad_input_is_refused_by_name(method, change, error, message):
    with pytest.raises(error, match=message):
        METHODS[method](**{"model": net(), "images": IMAGES, "classes": CHOSEN, **change})
