"""Silenced units: the masked network, accuracy under masks, groups of units."""

import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp import Network, attacks
from jaxinterp.dissect import masking

UNITS, CLASSES = 6, 4


@pytest.fixture(scope="module")
def network() -> Network:
    def apply(params, images, tap):
        x = tap("first", jax.nn.relu(images[:, ::4, ::4].reshape(len(images), -1) @ params["in"]))
        x = tap("second", jax.nn.relu(x @ params["middle"]))
        return x @ params["out"] + params["bias"]

    return Network(name="small", apply=apply, nodes=("first", "second"), image_size=8, classes=CLASSES)


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"in": (12, 9), "middle": (9, UNITS), "out": (UNITS, CLASSES), "bias": (CLASSES,)}
    return {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(9), (11, 8, 8, 3))


def by_hand(params, images, kept):
    x = np.maximum(np.asarray(images[:, ::4, ::4]).reshape(len(images), -1) @ params["in"], 0)
    x = np.maximum(x @ params["middle"], 0) * kept
    return x @ params["out"] + params["bias"]


def test_a_masked_network_is_the_network_without_units(network, params, images):
    masked = masking.masked(network, "second")
    assert masked.nodes == network.nodes
    assert masked.image_size == network.image_size
    kept = masking.keep([4, 1, 0], 2, UNITS)
    np.testing.assert_array_equal(kept, [1, 0, 1, 1, 0, 1])
    logits = masked.bind({"params": params, "keep": kept})(images)
    np.testing.assert_allclose(logits, by_hand(params, images, kept), rtol=1e-5, atol=1e-5)
    whole = masked.bind({"params": params, "keep": jnp.ones(UNITS)})(images)
    np.testing.assert_array_equal(whole, network.bind(params)(images))
    # Other taps see the masked map.
    seen = {}
    masked.apply({"params": params, "keep": kept}, images, lambda name, x: seen.setdefault(name, x))
    assert (np.asarray(seen["second"])[:, kept == 0] == 0).all()


def test_masks_are_inputs_of_one_program(network, params, images):
    masked, count = masking.masked(network, "second"), 0

    def counted(params, images):
        nonlocal count
        count += 1
        return masked.bind(params)(images)

    program = jax.jit(counted)
    for number in range(3):
        program({"params": params, "keep": masking.keep(range(UNITS), number, UNITS)}, images)
    assert count == 1


def test_correct_under_several_masks_in_any_batches(network, params, images):
    kept = np.stack([masking.keep([2, 0, 5, 1, 3, 4], n, UNITS) for n in range(UNITS + 1)])
    labels = np.asarray(network.bind(params)(images)).argmax(1)
    labels[3] = (labels[3] + 1) % CLASSES
    found = masking.correct(network, params, "second", kept, images, labels)
    expected = np.stack([by_hand(params, images, one).argmax(1) == labels for one in kept])
    np.testing.assert_array_equal(found, expected)
    assert found[0].sum() == 10
    assert not expected.all(axis=0).any() or expected.std() > 0  # masks matter
    for size in (1, 4):
        np.testing.assert_array_equal(
            masking.correct(network, params, "second", kept, images, labels, batch_size=size), expected
        )


def test_a_masked_network_can_be_attacked(network, params, images):
    masked = masking.masked(network, "second")
    bound = masked.bind({"params": params, "keep": masking.keep([0, 1], 1, UNITS)})
    labels = jnp.argmax(bound(images), axis=-1)
    result = attacks.run(attacks.IFGSM(eps=0.3, steps=5), bound, images, labels, key=jax.random.key(0))
    assert np.asarray(result.success).any()
    predicted = np.asarray(bound(result.images)).argmax(1)
    np.testing.assert_array_equal(predicted != labels, result.success)


def test_bad_input(network, params, images):
    with pytest.raises(ValueError, match="no node 'secnd'; did you mean 'second'"):
        masking.masked(network, "secnd")
    with pytest.raises(ValueError, match="number: expected 0 to 2 units, got 3"):
        masking.keep([0, 1], 3, UNITS)
    with pytest.raises(ValueError, match="order: expected different units from 0 to 5"):
        masking.keep([0, 0], 1, UNITS)
    with pytest.raises(ValueError, match="order: expected different units from 0 to 5"):
        masking.keep([6], 1, UNITS)
    with pytest.raises(ValueError, match="kept: expected 6 units, those of second, got 5"):
        masking.correct(network, params, "second", np.ones((1, 5)), images, np.zeros(11, int))
    with pytest.raises(ValueError, match="kept, images, labels"):
        masking.correct(network, params, "second", np.ones((1, 6)), images, np.zeros(10, int))
    with pytest.raises(TypeError, match="order: expected the numbers of units, got float64"):
        masking.keep(np.array([0.7, 1.2]), 2, UNITS)
    assert masking.keep([], 0, UNITS).tolist() == [1] * UNITS
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size: expected at least 1, got {size}"):
            masking.correct(network, params, "second", np.ones((1, 6)), images, np.zeros(11, int), batch_size=size)
    with pytest.raises(ValueError, match="labels: expected classes from 0 to 3, got 4 to 4"):
        masking.correct(network, params, "second", np.ones((1, 6)), images, np.full(11, 4))
    with pytest.raises(TypeError, match="labels: expected integers, got float64"):
        inspect.unwrap(masking.correct)(network, params, "second", np.ones((1, 6)), images, np.zeros(11))


def test_groups():
    sensitivity, iou = [0.5, 3.0, 1.0, 2.0], [0.01, 0.2, 0.1, 0.0]
    found = masking.groups(sensitivity, iou, np.array([0, 1, 1, 0], bool), key=jax.random.key(0), draws=3)
    np.testing.assert_array_equal(found["sensitive"], [1, 3, 2, 0])
    np.testing.assert_array_equal(found["insensitive"], [0, 2, 3, 1])
    np.testing.assert_array_equal(found["detectors"], [1, 2])
    np.testing.assert_array_equal(found["others"], [3, 0])
    random = [found[f"random-{i}"] for i in range(3)]
    for order in random:
        np.testing.assert_array_equal(np.sort(order), range(4))
    again = masking.groups(sensitivity, iou, np.zeros(4, bool), key=jax.random.key(0), draws=5)
    np.testing.assert_array_equal(again["random-2"], random[2])
    assert len(again["detectors"]) == 0


def test_both_modules_are_attributes_in_a_fresh_interpreter():
    code = "from jaxinterp import dissect; print(dissect.masking.keep([1], 1, 2), dissect.sensitivity.MEASURES[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["[1.", "0.]", "plain"]
