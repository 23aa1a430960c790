"""Windows: what a rectangle reaches, by brute force; effects bit for bit those of whole forward passes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from jaxinterp import effect, models, windowed
from jaxinterp.models.layers import avg_pool, depthwise_conv, max_pool, same_padding

SIDE, CLASSES = 40, 5
LABELS, TARGETS = np.array([0, 1, 2]), np.array([2, 3, 4])
FIELDS = ("suppression", "promotion", "kind", "ratio", "norm", "label_change", "target_change", "forward")


# What is reached


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_what_a_convolution_passes_on_is_in_the_window(data):
    """A positive kernel passes on every change; the window holds what changed, and is no larger than need be."""
    size = data.draw(st.tuples(st.integers(4, 14), st.integers(4, 14)))
    kernel = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    pads = data.draw(st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2))] * 2))
    low = [data.draw(st.integers(0, n - 1)) for n in size]
    high = [data.draw(st.integers(a + 1, n)) for a, n in zip(low, size, strict=True)]
    x = np.zeros((1, *size, 1), np.float32)
    x[0, low[0] : high[0], low[1] : high[1]] = 1
    if any(n + sum(p) < k for n, p, k in zip(size, pads, kernel, strict=True)):
        return
    out = lax.conv_general_dilated(
        jnp.asarray(x), jnp.ones((*kernel, 1, 1)), stride, pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    full = out.shape[1:3]
    (top, left), (bottom, right) = (map(np.atleast_1d, edge) for edge in (low, high))
    box = windowed.Reach((top, left), (bottom, right))
    reach = box.through(stride, kernel, [p[0] for p in pads], full)
    changed = np.argwhere(np.asarray(out)[0, :, :, 0] != 0)
    if not len(changed):
        assert any(h <= a for a, h in zip(reach.low, reach.high, strict=True))
        return
    np.testing.assert_array_equal(np.ravel(reach.low), changed.min(axis=0))
    np.testing.assert_array_equal(np.ravel(reach.high), changed.max(axis=0) + 1)


# Networks of every kind of layer


def conv(x, kernel, stride=1, padding=1, dilation=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((padding, padding),) * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def plain(p, x):
    x = jax.nn.relu(conv(x - 0.5, p["first"], 2))
    x = jax.nn.silu(conv(x, p["second"], dilation=2, padding=2))
    return jnp.mean(conv(x, p["third"]), axis=(1, 2)) @ p["head"]


def residual(p, x):
    x = max_pool(jax.nn.relu(conv(x, p["first"], 2)), 3, stride=2, padding=1)
    x = jax.nn.relu(x + conv(jax.nn.relu(conv(x, p["second"])), p["third"]))
    return jnp.mean(x, axis=(1, 2)) @ p["head"]


def mobile(p, x):
    x = jnp.clip(conv(x, p["first"], 2), 0, 6)
    pads = same_padding((x.shape[1], x.shape[2]), (3, 3), (2, 2))
    x = depthwise_conv(x, p["depth"], (2, 2), pads)
    x = jnp.clip(x * p["scale"] + 0.1, 0, 6)
    x = x + conv(depthwise_conv(x, p["depth"], (1, 1), ((1, 1), (1, 1))), p["point"], padding=0)
    return jnp.mean(x, axis=(1, 2)) @ p["head"]


def branches(p, x):
    x = jax.nn.relu(conv(x, p["first"]))
    x = jnp.concatenate([conv(x, p["second"]), max_pool(x, 3, stride=1, padding=1), x[..., ::2]], axis=-1)
    x = avg_pool(x, 2, padding=1, count_include_pad=False)
    x = max_pool(x, 3, stride=2, ceil_mode=True)
    return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1) @ p["wide"]


def channels_first(p, x):
    """Nothing that windows can follow: still right."""
    x = jnp.transpose(x, (0, 3, 1, 2))
    x = lax.conv_general_dilated(x, jnp.transpose(p["first"], (3, 2, 0, 1)), (2, 2), ((1, 1), (1, 1)))
    return jnp.mean(jax.nn.relu(x), axis=(2, 3)) @ p["head"]


def ignorant(p, x):
    """An image that does not matter."""
    return jnp.ones((x.shape[0], 1)) @ p["head"][:1]


NETWORKS = {f.__name__: f for f in (plain, residual, mobile, branches, channels_first, ignorant)}


@functools.cache
def params():
    shapes = {
        "first": (3, 3, 3, 8),
        "second": (3, 3, 8, 8),
        "third": (3, 3, 8, 8),
        "depth": (3, 3, 1, 8),
        "point": (1, 1, 8, 8),
        "scale": (8,),
        "head": (8, CLASSES),
        "wide": (10 * 10 * 20, CLASSES),
    }
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32) for name, shape in shapes.items()}


def pairs():
    rng = np.random.default_rng(1)
    clean = rng.uniform(0.2, 0.8, (3, SIDE, SIDE, 3)).astype(np.float32)
    adversarial = clean + rng.normal(size=clean.shape).astype(np.float32) * 0.1
    adversarial[1, 7:19, 3:30] = clean[1, 7:19, 3:30]
    adversarial[2] = clean[2]
    return clean, np.clip(adversarial, 0, 1)


def assert_same(a, b):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


# The other method differs in what is put where; of residual, test_windows_of_any_cells has the effects too.
QUICK = (("plain", "leave_one_out"), ("mobile", "add_one_in"), ("branches", "leave_one_out"))
QUICK += (("channels_first", "add_one_in"), ("ignorant", "leave_one_out"))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.exhaustive)
        for pair in itertools.product(NETWORKS, ("leave_one_out", "add_one_in"))
    ],
)
def test_windows_change_no_bit(name, method):
    model = Partial(NETWORKS[name], params())
    how = {"method": method, "chunk": 7}
    whole = effect.pse(model, *pairs(), LABELS, TARGETS, 6, windows=False, **how)
    mine = effect.pse(model, *pairs(), LABELS, TARGETS, 6, windows=True, **how)
    assert_same(mine, whole)
    if name != "ignorant":
        assert (np.asarray(whole.suppression[:2]) > 0).any(axis=(1, 2)).all()
    assert not np.asarray(whole.forward)[2]


@pytest.mark.parametrize(
    "cells",
    ["of each", *(pytest.param(more, marks=pytest.mark.exhaustive) for more in ((1, 7), "stripes", 40))],
    ids=str,
)
def test_windows_of_any_cells(cells):
    rows, columns = np.indices((SIDE, SIDE))
    if cells == "stripes":
        cells = (rows + columns) // 11
    elif cells == "of each":
        cells = np.stack([(rows // 9) * 5 + columns // 8, rows // 5 + 3, np.zeros_like(rows)])
    model = Partial(residual, params())
    arguments = (model, *pairs(), LABELS, TARGETS, cells)
    assert_same(effect.pse(*arguments, windows=True), effect.pse(*arguments, windows=False))


def test_windows_on_eight_devices_and_of_one_image():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    model, (clean, adversarial) = Partial(plain, params()), pairs()
    how = {"windows": True, "chunk": 7}  # as above
    whole = effect.pse(model, clean, adversarial, LABELS, TARGETS, 6, **how)
    there = NamedSharding(mesh, PartitionSpec())
    spread = jax.device_put(clean, there), jax.device_put(adversarial, there)
    assert_same(effect.pse(model, *spread, LABELS, TARGETS, 6, windows=True, chunk=3), whole)
    alone = effect.pse(model, clean[1:2], adversarial[1:2], LABELS[1:2], TARGETS[1:2], 6, **how)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(alone, name)[0], getattr(whole, name)[1])


# Cost


def boxes(side, cell):
    starts = [(r, c) for r in range(0, side, cell) for c in range(0, side, cell)]
    return np.array([(r, c, min(r + cell, side), min(c + cell, side)) for r, c in starts])


@pytest.mark.parametrize(
    ("name", "products", "saving"),
    [("vgg16", 15.47e9, 6.8), pytest.param("resnet50", 4.089e9, 2.0, marks=pytest.mark.exhaustive)],
)
def test_cost_of_known_networks(name, products, saving):
    """The multiplications are those that the literature gives for these networks."""
    network = models.network(name)

    def function(p, x):
        return network.bind(p)(x)

    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    cost = windowed.cost(function, models.shapes(name), image, boxes(224, 16))
    assert cost.whole == pytest.approx(products, rel=1e-3)
    assert cost.saving == pytest.approx(saving, rel=0.05)
    assert windowed.cost(function, models.shapes(name), image, boxes(224, 224)).saving == pytest.approx(1, rel=1e-6)


def test_windows_cost_less_arithmetic_in_the_compiled_program():
    """By XLA's own count, for one cell."""
    model, base = Partial(plain, params()), jnp.asarray(pairs()[0][:1])

    def call(model, x):
        return model(x)

    def through(model, base, image, cell):
        return windowed.evaluator(call, model, base, boxes(SIDE, 5))(image, cell)

    def flops(function, *args):
        analysis = jax.jit(function).lower(*args).compile().cost_analysis()
        assert analysis is not None
        return analysis["flops"]

    whole = flops(call, model, base)
    once = flops(through, model, base, base[0], jnp.int32(9))  # with the feature maps of the unchanged image
    assert once < 1.6 * whole
    cost = windowed.cost(call, model, jax.ShapeDtypeStruct(base.shape, jnp.float32), boxes(SIDE, 5))
    assert cost.saving > 2


def test_windows_are_chosen_where_they_pay(monkeypatch):
    model, images = Partial(plain, params()), pairs()
    seen = []
    monkeypatch.setattr(effect, "_through_windows", lambda *args: seen.append(1) or effect._all_together(*args))
    monkeypatch.setitem(effect._SAVED, "cpu", 1.0)
    effect._one_at_a_time.cache_clear()
    effect.pse(model, *images, LABELS, TARGETS, 5)
    assert not seen  # too little work to look at
    monkeypatch.setattr(effect, "_PIXELS", 1.0)
    effect.pse(model, *images, LABELS, TARGETS, 40)
    assert not seen  # a cell that is the image saves nothing
    effect.pse(model, *images, LABELS, TARGETS, 5)
    assert seen
    effect._one_at_a_time.cache_clear()
