"""Layers against definitions and against the operations that they replace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxinterp.canonical import canonical
from jaxinterp.models.layers import BatchNorm, Conv, Linear, conv, depthwise_conv, same_padding

quick = settings(max_examples=8, deadline=None, derandomize=True)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def grouped(x, kernel, stride, padding):
    return lax.conv_general_dilated(
        x, kernel, stride, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1]
    )


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * max(1, np.abs(expected).max()))


@quick
@given(
    kernel=st.tuples(*[st.sampled_from([1, 2, 3, 5])] * 2),
    stride=st.tuples(*[st.integers(1, 3)] * 2),
    size=st.tuples(*[st.integers(5, 12)] * 2),
    padding=st.one_of(st.none(), st.tuples(*[st.tuples(*[st.integers(0, 3)] * 2)] * 2)),
)
def test_depthwise_conv_is_the_grouped_convolution(kernel, stride, size, padding):
    """Values and both gradients; None is SAME padding, whose odd pixel makes it asymmetric."""
    if padding is None:
        padding = same_padding(size, kernel, stride)
    x, k = normal(0, 2, *size, 3), normal(1, *kernel, 1, 3)
    outputs = jax.eval_shape(lambda: grouped(x, k, stride, padding)).shape
    g = normal(2, *outputs)

    def all_three(f):
        def run(x, k, g):
            y, back = jax.vjp(lambda x, k: f(x, k, stride, padding), x, k)
            return y, *back(g)

        return jax.jit(run)(x, k, g)

    for actual, expected in zip(all_three(depthwise_conv), all_three(grouped), strict=True):
        assert_close(actual, expected)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="others keep the grouped convolution")
@pytest.mark.parametrize("stride", [1, 2])
def test_nothing_is_computed_twice_for_a_gradient(stride):
    """One convolution and two gradients, of a product, its rounding and a sum for every tap, and their margins."""
    side = 16

    def loss(x, kernel):
        y = jnp.clip(depthwise_conv(x, kernel, (1, 1), ((2, 2), (2, 2))), 0, 6)
        return jnp.sum(depthwise_conv(y, kernel, (stride, stride), ((2, 2), (2, 2))))

    program = jax.jit(canonical(jax.grad(loss))).lower(jnp.ones((1, side, side, 8)), jnp.ones((5, 5, 1, 8)))
    cost = program.compile().cost_analysis()
    of_one = 3 * 25 * side * side * 8
    assert cost is not None
    assert cost["flops"] < 5.3 * of_one  # 8.4 and 6.3 where the windows are read unpadded


@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 2, 10), (5, 2, 9), (5, 1, 8)])
def test_depthwise_conv_in_loops_and_under_vmap(kernel, stride, size):
    strides = (stride, stride)
    padding = same_padding((size, size), (kernel, kernel), strides)
    x, k = normal(0, 3, size, size, 4), normal(1, kernel, kernel, 1, 4)

    def climb(f):
        gradient = jax.grad(lambda x: jnp.sin(f(x, k, strides, padding)).sum())
        return jax.jit(lambda x: lax.fori_loop(0, 3, lambda _, x: x + 0.1 * gradient(x), x))(x)

    assert_close(climb(depthwise_conv), climb(grouped))

    def one(x, k):
        return jnp.asarray(depthwise_conv(x[None], k, strides, padding))[0]

    assert_close(jax.vmap(one, (0, None))(x, k), grouped(x, k, strides, padding))
    kernels = normal(2, 3, kernel, kernel, 1, 4)
    separate = jnp.concatenate([grouped(x[i : i + 1], kernels[i], strides, padding) for i in range(3)])
    assert_close(jax.vmap(one)(x, kernels), separate)
    by_example = jax.vmap(jax.grad(lambda x: jnp.sin(one(x, k)).sum()))(x)
    assert_close(by_example, jax.grad(lambda x: jnp.sin(grouped(x, k, strides, padding)).sum())(x))


@settings(quick, max_examples=200)
@given(
    size=st.tuples(*[st.integers(1, 300)] * 2),
    kernel=st.tuples(*[st.integers(1, 7)] * 2),
    stride=st.tuples(*[st.integers(1, 4)] * 2),
)
def test_same_padding(size, kernel, stride):
    assert list(same_padding(size, kernel, stride)) == lax.padtype_to_pads(size, kernel, stride, "SAME")


def test_conv_by_hand():
    """A kernel whose only entry is one moves the image; the odd pixel of SAME padding comes last."""
    x = normal(0, 1, 4, 4, 2)
    kernel = jnp.zeros((3, 3, 2, 1)).at[0, 2, 1, 0].set(1.0)  # reads one row up, one column to the right
    moved = conv(x, kernel, (1, 1), ((1, 1), (1, 1)))
    np.testing.assert_array_equal(moved[0, 1:, :-1, 0], x[0, :-1, 1:, 1])
    assert not moved[0, 0].any()
    assert not moved[0, :, -1].any()

    layer = Conv(2, 1, 3, stride=2, rngs=nnx.Rngs(0))
    layer.weight[...] = kernel
    np.testing.assert_array_equal(layer(x)[0, :, 0, 0], x[0, ::2, 2, 1])  # SAME pads only behind here
    assert not layer(x)[0, 1, 1].any()


def test_conv_layer_with_padding_and_bias():
    layer = Conv(2, 3, 3, padding=2, bias=True, rngs=nnx.Rngs(0))
    assert layer.bias is not None
    layer.bias[...] = jnp.array([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(layer(jnp.zeros((1, 4, 5, 2))), jnp.broadcast_to(layer.bias[...], (1, 6, 7, 3)))


def test_depthwise_layer_keeps_channels_apart():
    layer = Conv(4, 4, 3, depthwise=True, rngs=nnx.Rngs(0))
    assert layer.weight.shape == (3, 3, 1, 4)
    y = layer(jnp.zeros((1, 5, 5, 4)).at[..., 2].set(1.0))
    assert y[..., 2].any()
    assert not y[..., jnp.array([0, 1, 3])].any()


def test_batch_norm_definition():
    layer = BatchNorm(3, eps=1e-3, rngs=nnx.Rngs(0))
    layer.weight[...], layer.bias[...] = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.1, 0.2, 0.3])
    layer.running_mean[...], layer.running_var[...] = jnp.array([5.0, -1.0, 0.0]), jnp.array([4.0, 1e-3, 0.0])
    x = np.asarray(normal(0, 2, 4, 4, 3), np.float64)
    mean, var = np.array([5.0, -1.0, 0.0]), np.array([4.0, 1e-3, 0.0])
    expected = (x - mean) / np.sqrt(var + 1e-3) * np.array([1.0, -2.0, 0.5]) + np.array([0.1, 0.2, 0.3])
    np.testing.assert_allclose(layer(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5, atol=1e-5)


def test_linear_definition():
    layer = Linear(2, 3, rngs=nnx.Rngs(0))
    layer.weight[...] = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    layer.bias[...] = jnp.array([0.5, 0.0, -0.5])
    np.testing.assert_array_equal(layer(jnp.array([[1.0, 10.0]])), [[41.5, 52.0, 62.5]])
