"""The strict map: what does not fit is named, what fits is laid out as JAX wants it."""

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxinterp.weights.names import from_jax_shape, map_tensors, to_jax_layout

SHAPES = {
    "conv.weight": (3, 2, 4, 5),  # HWIO
    "depthwise.weight": (3, 3, 1, 6),
    "bn.weight": (5,),
    "bn.running_var": (5,),
    "fc.weight": (7, 8),
}
EXPECTED = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def tensors(rng) -> dict[str, np.ndarray]:
    """A state dict that fits, in PyTorch's layouts."""
    return {
        "conv.weight": rng.normal(size=(5, 4, 3, 2)).astype(np.float32),
        "depthwise.weight": rng.normal(size=(6, 1, 3, 3)).astype(np.float32),
        "bn.weight": rng.normal(size=5).astype(np.float32),
        "bn.running_var": rng.random(5).astype(np.float32),
        "fc.weight": rng.normal(size=(8, 7)).astype(np.float32),
    }


def refused(tensors, match):
    with pytest.raises(ValueError, match=match) as error:
        map_tensors(tensors, EXPECTED, source="file.pth")
    assert "file.pth" in str(error.value)
    return str(error.value)


def test_layouts(tensors):
    """Every entry stands where JAX looks for it."""
    params = map_tensors(tensors, EXPECTED, source="file.pth")
    assert list(params) == list(EXPECTED)
    assert {name: value.shape for name, value in params.items()} == SHAPES
    assert all(value.dtype == np.float32 and value.flags.c_contiguous for value in params.values())
    for h, w, i, o in np.ndindex(3, 2, 4, 5):
        assert params["conv.weight"][h, w, i, o] == tensors["conv.weight"][o, i, h, w]
    for h, w, c in np.ndindex(3, 3, 6):
        assert params["depthwise.weight"][h, w, 0, c] == tensors["depthwise.weight"][c, 0, h, w]
    np.testing.assert_array_equal(params["fc.weight"], tensors["fc.weight"].T)
    np.testing.assert_array_equal(params["bn.running_var"], tensors["bn.running_var"])


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (6, 1, 3, 3), (8, 7), (5,), ()])
def test_shapes_go_back_and_forth(shape):
    assert from_jax_shape(to_jax_layout(np.zeros(shape)).shape) == shape


def test_convolution_and_linear_layer_mean_the_same(rng):
    """The laid out tensors give what PyTorch's definitions give, written out in numpy."""
    x, weight = rng.normal(size=(1, 4, 3, 2)), rng.normal(size=(5, 4, 3, 2))  # one window, NCHW
    kernel = to_jax_layout(weight)
    ours = jax.lax.conv_general_dilated(
        x.transpose(0, 2, 3, 1), kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(ours[0, 0, 0], np.einsum("ihw,oihw->o", x[0], weight), rtol=1e-5)
    linear = rng.normal(size=(8, 7))
    np.testing.assert_allclose(x[0, :, 0, 0] @ to_jax_layout(linear[:, :4]), linear[:, :4] @ x[0, :, 0, 0])


def test_missing_unexpected_and_misshapen_are_all_named(tensors):
    del tensors["bn.weight"]
    tensors["extra.bias"] = np.zeros(3, np.float32)
    tensors["fc.weight"] = tensors["fc.weight"].T
    message = refused(tensors, r"missing: bn\.weight; unexpected: extra\.bias; misshapen: fc\.weight")
    assert "(7, 8) instead of (8, 7)" in message


def test_equal_sizes_are_not_equal_shapes(tensors):
    tensors["conv.weight"] = tensors["conv.weight"].reshape(5, 4, 2, 3)
    refused(tensors, r"misshapen: conv\.weight")
    tensors["conv.weight"] = tensors["conv.weight"].reshape(5, 24)
    refused(tensors, r"misshapen: conv\.weight")


def test_long_lists_are_cut():
    message = refused({f"other{i}": np.zeros(1) for i in range(40)}, "missing: conv.weight, depthwise.weight")
    assert "(40 in all)" in message
    assert "other30" not in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_must_be_finite(tensors, value):
    tensors["bn.running_var"][3] = value
    refused(tensors, r"unusable: bn\.running_var with values that are not finite")


def test_doubles_that_float32_cannot_hold(tensors):
    tensors["bn.weight"] = np.full(5, 1e300)
    refused(tensors, r"bn\.weight with values that are not finite")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.int64])
def test_other_types_become_float32(tensors, dtype):
    tensors["fc.weight"] = np.arange(56).reshape(8, 7).astype(dtype)
    params = map_tensors(tensors, EXPECTED, source="file.pth")
    assert params["fc.weight"].dtype == np.float32
    np.testing.assert_array_equal(params["fc.weight"], np.arange(56).reshape(8, 7).T)


@pytest.mark.parametrize("dtype", [np.bool_, np.complex64, "U3"])
def test_types_that_are_no_real_numbers(tensors, dtype):
    tensors["bn.weight"] = np.zeros(5, dtype)
    refused(tensors, r"unusable: bn\.weight of type")


def test_count_of_batches_is_ignored(tensors):
    tensors["bn.num_batches_tracked"] = np.array(100)
    assert set(map_tensors(tensors, EXPECTED, source="file.pth")) == set(EXPECTED)
    tensors["bn.num_batches"] = np.array(100)
    refused(tensors, r"unexpected: bn\.num_batches$")


def test_nothing_is_assigned_by_order(tensors):
    """Two tensors of one shape under each other's names stay under these names."""
    tensors["bn.weight"], tensors["bn.running_var"] = np.zeros(5, np.float32), np.ones(5, np.float32)
    swapped = dict(reversed(tensors.items()))
    params = map_tensors(swapped, EXPECTED, source="file.pth")
    assert not params["bn.weight"].any()
    assert params["bn.running_var"].all()
