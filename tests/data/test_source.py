"""The in-memory source: values, and everything that it refuses."""

import pickle

import numpy as np
import pytest

from jaxinterp.data import Arrays, DamagedImage


def test_uint8_is_divided_by_255():
    images = np.arange(2 * 2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 2, 3) * 10
    source = Arrays(images, labels=[4, -1], ids=["a", "b"])
    example = source[1]
    assert len(source) == 2
    assert (example.label, example.id) == (-1, "b")
    assert example.image.dtype == np.float32
    np.testing.assert_array_equal(example.image, (images[1] / 255).astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floating_point_is_kept(dtype):
    images = np.linspace(0, 1, 12).reshape(1, 2, 2, 3).astype(dtype)
    example = Arrays(images)[0]
    assert (example.label, example.id, example.image.dtype) == (-1, "0", np.float32)
    np.testing.assert_array_equal(example.image, images[0].astype(np.float32))


ONE = np.zeros((1, 2, 2, 3), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"images": ONE[0]}, ValueError, r"\[N,H,W,C\], got \[2, 2, 3\]"),
        ({"images": ONE.astype(np.int32)}, TypeError, "int32"),
        ({"images": ONE + 1.5}, ValueError, r"\[1.5, 1.5\]"),
        ({"images": ONE - 0.5}, ValueError, r"\[0, 1\]"),
        ({"images": ONE + np.nan}, ValueError, "nan"),
        ({"images": ONE, "labels": [1, 2]}, ValueError, r"expected 1.*\[2\]"),
        ({"images": ONE, "labels": np.array([0.5])}, TypeError, "float64"),
        ({"images": ONE, "labels": [-2]}, ValueError, "-2"),
        ({"images": ONE, "ids": ["a", "b"]}, ValueError, "expected 1.*got 2"),
        ({"images": np.repeat(ONE, 3, 0), "ids": ["a", "b", "b"]}, ValueError, "'b' twice"),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        Arrays(**arguments)


def test_ends_like_a_sequence():
    assert [example.id for example in Arrays(np.repeat(ONE, 3, 0))] == ["0", "1", "2"]
    assert len(Arrays(ONE[:0])) == 0


def test_damaged_image_survives_pickling():
    error = pickle.loads(pickle.dumps(DamagedImage("a/b.jpg", "the file is empty")))
    assert (error.id, error.reason, str(error)) == (
        "a/b.jpg",
        "the file is empty",
        "a/b.jpg: the file is empty",
    )
