"""Images in a .npz file: values, what stays on disk, and everything that is refused."""

import io
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxinterp.data import Crop, Npz
from jaxinterp.data.decode import decode

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)


@pytest.fixture
def save(tmp_path):
    def save(*, compressed=False, **arrays):
        path = tmp_path / "images.npz"
        (np.savez_compressed if compressed else np.savez)(path, **arrays)
        return path

    return save


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("names", [("images", "labels"), ("x", "y"), ("x_test", "y_test")])
def test_values(save, compressed, names):
    path = save(compressed=compressed, **{names[0]: PIXELS, names[1]: np.array([[0], [1], [2], [-1], [9]])})
    source = Npz(path, classes=10)
    assert isinstance(source.images, np.memmap) != compressed
    assert source.labels.tolist() == [0, 1, 2, -1, 9]
    assert source.label_origin == f"the array {names[1]!r} of the file"
    assert len(source) == 5
    for i in range(5):
        example = source[i]
        np.testing.assert_array_equal(example.image, PIXELS[i] / np.float32(255))
        assert (example.image.dtype, example.id) == (np.float32, str(i))


def test_fortran_order_other_types_and_ids(save):
    images = np.asfortranarray(PIXELS.astype(np.float64) / 255)
    source = Npz(save(images=images, ids=np.array(["a", "b", "c", "d", "é"])))
    assert source.ids == ("a", "b", "c", "d", "é")
    np.testing.assert_array_equal(source[3].image, images[3].astype(np.float32))
    assert (source.labels.tolist(), source[0].label) == ([-1] * 5, -1)
    assert source.label_origin == "predicted by the model, since the file has no labels"
    unknown = Npz(save(images=PIXELS, labels=np.full(5, -1)))
    assert unknown.label_origin == "predicted by the model, since the array 'labels' of the file has none"
    assert Npz(save(images=PIXELS[..., 0], ids=np.arange(5) + 7))[2].image.shape == (8, 6, 1)
    assert Npz(save(images=PIXELS, ids=np.arange(5) + 7)).ids == ("7", "8", "9", "10", "11")
    assert Npz(save(images=PIXELS, labels=np.arange(5)), labels="predicted").labels.tolist() == [-1] * 5
    assert len(Npz(save(images=PIXELS[:0], labels=np.zeros(0, int)))) == 0


def test_crop(save):
    """What has another size is resized as a file with the same pixels; what has the size is left alone."""
    crop = Crop(4)
    source = Npz(save(images=PIXELS), crop=crop)
    for i in range(5):
        stream = io.BytesIO()
        Image.fromarray(PIXELS[i]).save(stream, "PNG")
        np.testing.assert_array_equal(source[i].image, decode(stream.getvalue(), crop))
    grey = Npz(save(images=PIXELS[..., :1]), crop=crop)[0].image
    assert grey.shape == (4, 4, 1)
    square = PIXELS[:, :6]
    np.testing.assert_array_equal(Npz(save(images=square), crop=Crop(6))[0].image, square[0] / np.float32(255))
    with pytest.raises(ValueError, match=r"images: cannot resize float32 of shape \[5, 8, 6, 3\] to 4 x 4"):
        Npz(save(images=PIXELS.astype(np.float32)), crop=crop)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": PIXELS}, "expected an array 'images', found 'pictures'"),
        ({"images": PIXELS[0, 0]}, r"\[N,H,W,C\], got \[6, 3\]"),
        ({"images": PIXELS.astype(int)}, "images: expected uint8 or floating point, got int64"),
        ({"images": PIXELS, "labels": np.zeros(4, int)}, r"labels: expected 5, one for each image, got \[4\]"),
        ({"images": PIXELS, "labels": np.zeros(5)}, "labels: expected integers, got float64"),
        ({"images": PIXELS, "labels": np.arange(5)}, r"labels: expected classes in 0\.\.3, or -1 .*, got 4 at 4"),
        ({"images": PIXELS, "labels": np.full(5, -2)}, r"got -2 at 0"),
        ({"images": PIXELS, "labels": np.full(5, 1 << 40)}, "labels: expected class indices"),
        ({"images": PIXELS, "ids": np.array([1, 2, 3, 2, 4])}, "ids: expected different ones, got 2 2 times"),
        ({"images": PIXELS, "ids": np.zeros(5)}, "ids: expected 5 integers or texts"),
        ({"images": PIXELS, "labels": np.array([None] * 5)}, "array 'labels': it is of type object"),
    ],
)
def test_refuses(save, arrays, message):
    with pytest.raises(ValueError, match=message) as caught:
        Npz(save(**arrays), classes=4)
    assert "images.npz" in str(caught.value)


def test_values_out_of_range(save):
    for value in (1.5, -0.1, np.nan):
        images = np.zeros((2, 3, 3, 3), np.float32)
        images[1, 2, 2, 0] = value
        source = Npz(save(images=images))
        assert source[0].image.max() == 0
        with pytest.raises(ValueError, match=r"images: expected values in \[0, 1\], got .* at 1"):
            source[1]


def test_headers_that_lie(tmp_path):
    def archive(header: str, content: bytes):
        text = header.encode().ljust(117) + b"\n"
        path = tmp_path / "images.npz"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("images.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content)
        return path

    good = "{'descr': '|u1', 'fortran_order': False, 'shape': (1, 2, 2, 1)}"
    assert Npz(archive(good, b"\x00\x01\x02\xff"))[0].image[1, 1, 0] == 1
    for header in (
        good.replace("(1, 2, 2, 1)", f"({1 << 40}, 2, 2, 1)"),
        good.replace("(1, 2, 2, 1)", "(-1, 2, 2, -1)"),
        good.replace("(1, 2, 2, 1)", f"(0, {1 << 60}, 2, 1)"),
        good.replace("|u1", "|O"),
        good.replace("|u1", "<U0"),
        good.replace("|u1", "|V4"),
        good.replace("False", "0"),
        good[:-9],
        "__import__('os').getcwd()",
        "(" * 100,
    ):
        with pytest.raises(ValueError, match=r"images\.npz: array 'images': "):
            Npz(archive(header, b"\x00\x01\x02\xff"))


def test_bombs_and_other_files(tmp_path):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("images.npy", bytes(100 << 20))
    with pytest.raises(ValueError, match="far beyond the file's size"):
        Npz(path)
    for content in (b"", b"PK\x03\x04", b"nothing"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.npz: not a \.npz archive"):
            Npz(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.pkl", b"")
    with pytest.raises(ValueError, match=r"entry 'data\.pkl' is not an array"):
        Npz(path)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), compressed=st.booleans())
def test_damage_ends_in_a_value_error(tmp_path, data, compressed):
    stream = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, images=PIXELS, labels=np.arange(5), ids=np.arange(5))
    content = bytearray(stream.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.sampled_from([len(content), len(content) // 2, len(content) - 3]))]
    path = tmp_path / "images.npz"
    path.write_bytes(content)
    problem = ""
    try:
        source = Npz(path)
        assert [example.image.dtype for example in source] == [np.float32] * len(source)
    except ValueError as error:
        problem = str(error)
    assert not problem or "images.npz" in problem
