"""Deletion, insertion, average drop and pointing against slow loops and by hand."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinterp import cam, faithfulness

BATCH, SIDE, CLASSES = 5, 8, 4
IMAGES = np.random.default_rng(0).uniform(0.1, 0.9, (BATCH, SIDE, SIDE, 3)).astype(np.float32)
CHOSEN = np.array([0, 1, 2, 3, 0])
MAPS = np.random.default_rng(1).normal(size=(BATCH, SIDE, SIDE)).astype(np.float32)


WEIGHTS = np.random.default_rng(2).normal(size=(SIDE * SIDE * 3, CLASSES)).astype(np.float32)


def model(x):
    return x.reshape(x.shape[0], -1) @ WEIGHTS


def probability(images):
    logits = np.asarray(model(jnp.asarray(images, jnp.float32)), np.float64)
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (e / e.sum(axis=1, keepdims=True))[np.arange(len(images)), CHOSEN[: len(images)]]


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        *(("deletion", 1), ("deletion", 64), ("insertion", 5), ("insertion", 100)),
        *(
            pytest.param(*more, marks=pytest.mark.exhaustive)
            for more in (("deletion", 5), ("deletion", 100), ("insertion", 1), ("insertion", 64))
        ),
    ],
)
def test_curves_by_a_slow_loop(kind, steps):
    base = np.full_like(IMAGES, 0.25)
    curve = getattr(faithfulness, kind)(model, IMAGES, CHOSEN, jnp.asarray(MAPS), baseline=0.25, steps=steps)
    first, second = (base, IMAGES) if kind == "deletion" else (IMAGES, base)
    order = np.argsort(-MAPS.reshape(BATCH, -1), axis=1, kind="stable")
    expected = []
    for step in range(steps + 1):
        taken = int(np.round(np.float32(step) * np.float32(SIDE * SIDE / steps)))
        images = second.reshape(BATCH, -1, 3).copy()
        for i in range(BATCH):
            images[i, order[i, :taken]] = first.reshape(BATCH, -1, 3)[i, order[i, :taken]]
        expected.append(probability(images.reshape(IMAGES.shape)))
    np.testing.assert_allclose(curve.probability, np.stack(expected, axis=1), atol=1e-5)
    np.testing.assert_allclose(curve.share, np.linspace(0, 1, steps + 1), atol=1e-6)
    np.testing.assert_allclose(curve.area, np.trapezoid(np.stack(expected, axis=1), dx=1 / steps, axis=1), atol=1e-5)
    ends = [probability(IMAGES), probability(base)]
    np.testing.assert_allclose(
        curve.probability[:, [0, -1]], np.stack(ends if kind == "deletion" else ends[::-1], axis=1), atol=1e-5
    )


def test_a_map_that_knows_beats_one_that_does_not_and_its_negative_is_worst():
    """The exact contributions of a linear model's pixels to one logit of two, against those turned round."""
    w = WEIGHTS.reshape(SIDE, SIDE, 3, CLASSES)

    def two(x):
        return jnp.stack([jnp.einsum("bhwc,hwc->b", x, w[..., 0]), jnp.zeros(x.shape[0])], axis=1)

    labels = np.zeros(BATCH, int)
    exact = jnp.asarray((IMAGES * w[..., 0]).sum(axis=-1))
    random = jax.random.uniform(jax.random.key(0), exact.shape)
    down = [faithfulness.deletion(two, IMAGES, labels, m, steps=32).area for m in (exact, random, -exact)]
    up = [faithfulness.insertion(two, IMAGES, labels, m, steps=32).area for m in (exact, random, -exact)]
    assert (down[0] < down[1]).all()
    assert (down[1] < down[2]).all()
    assert (up[0] > up[1]).all()
    assert (up[1] > up[2]).all()


def test_average_drop_by_hand():
    whole = probability(IMAGES)
    small = np.maximum(MAPS[:, :4, :4], 0)
    large = np.asarray(cam.resize(jnp.asarray(small), SIDE))
    low, high = large.min(axis=(1, 2), keepdims=True), large.max(axis=(1, 2), keepdims=True)
    part = probability(IMAGES * ((large - low) / (high - low))[..., None])
    found = faithfulness.average_drop(model, IMAGES, CHOSEN, jnp.asarray(MAPS[:, :4, :4]))
    np.testing.assert_allclose(found, np.maximum(whole - part, 0) / whole, atol=1e-5)
    assert (np.asarray(found) > 0).any()
    # A constant map shows nothing of the image.
    black = probability(np.zeros_like(IMAGES))
    nothing = faithfulness.average_drop(model, IMAGES, CHOSEN, jnp.ones((BATCH, 2, 2)))
    np.testing.assert_allclose(nothing, np.maximum(whole - black, 0) / whole, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, SIDE - 1), st.integers(0, SIDE - 1), st.integers(0, 2**32 - 1))
def test_pointing_is_whether_the_highest_pixel_is_on_the_object(row, column, seed):
    maps = np.random.default_rng(seed).uniform(size=(1, SIDE, SIDE)).astype(np.float32)
    maps[0, row, column] = 2
    objects = np.random.default_rng(seed + 1).uniform(size=(1, SIDE, SIDE)) < 0.5
    assert bool(faithfulness.pointing(jnp.asarray(maps), jnp.asarray(objects))[0]) == objects[0, row, column]
    coarse = jnp.zeros((1, 2, 2)).at[0, row // 4, column // 4].set(1)
    quarter = np.zeros((1, SIDE, SIDE), bool)
    quarter[0, row // 4 * 4 : row // 4 * 4 + 4, column // 4 * 4 : column // 4 * 4 + 4] = True
    assert bool(faithfulness.pointing(coarse, jnp.asarray(quarter))[0])
    assert not bool(faithfulness.pointing(coarse, jnp.asarray(~quarter))[0])


def test_an_images_curve_is_its_own():
    whole = faithfulness.deletion(model, IMAGES, CHOSEN, jnp.asarray(MAPS), steps=7)
    for i in range(BATCH):
        one = slice(i, i + 1)
        alone = faithfulness.deletion(model, IMAGES[one], CHOSEN[one], jnp.asarray(MAPS[one]), steps=7)
        np.testing.assert_array_equal(alone.probability[0], whole.probability[i])
        np.testing.assert_array_equal(alone.area[0], whole.area[i])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": jnp.asarray(MAPS[:3])}, r"maps must be \[5,h,w\], one for every image, got \(3, 8, 8\)"),
        ({"maps": jnp.asarray(MAPS * np.nan)}, "maps must be finite"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"baseline": np.zeros((3, 3, 3))}, r"baseline \(3, 3, 3\) must broadcast to the images \(5, 8, 8, 3\)"),
        ({"baseline": np.nan}, r"baseline must be finite and in \[0, 1\], got nan"),
        ({"baseline": 7.0}, r"baseline must be finite and in \[0, 1\], got 7"),
        ({"classes": CHOSEN + 3}, "classes must be classes from 0 to 3"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    arguments = {"model": model, "images": IMAGES, "classes": CHOSEN, "maps": jnp.asarray(MAPS)}
    with pytest.raises(ValueError, match=message):
        faithfulness.insertion(**{**arguments, **change})


def test_steps_are_whole():
    with pytest.raises(TypeError, match=r"steps must be a whole number, got 2\.5"):
        inspect.unwrap(faithfulness.deletion)(model, IMAGES, CHOSEN, jnp.asarray(MAPS), steps=2.5)


def test_a_class_without_probability_loses_nothing():
    """The softmax of a logit that is 300 below another underflows to zero."""
    drop = faithfulness.average_drop(lambda x: 1e3 * model(x), IMAGES, CHOSEN, jnp.asarray(MAPS))
    assert np.all((np.asarray(drop) >= 0) & (np.asarray(drop) <= 1))


@pytest.mark.parametrize(
    ("maps", "objects", "error", "message"),
    [
        (
            MAPS[:3],
            np.ones((2, 8, 8), bool),
            ValueError,
            r"maps must be \[2,h,w\], one for every image, got \(3, 8, 8\)",
        ),
        (MAPS[:1], np.ones((3, 8, 8), bool), ValueError, r"maps must be \[3,h,w\]"),
        (MAPS[:2] * np.nan, np.ones((2, 8, 8), bool), ValueError, "maps must be finite"),
        (MAPS[:2], np.ones((2, 8, 8), int), TypeError, "objects must be boolean, got int"),
        (MAPS[:2], np.ones((2, 64), bool), ValueError, r"objects must be \[B,H,W\]"),
    ],
)
def test_pointing_refuses_what_does_not_belong_together(maps, objects, error, message):
    with pytest.raises(error, match=message):
        inspect.unwrap(faithfulness.pointing)(maps, objects)
