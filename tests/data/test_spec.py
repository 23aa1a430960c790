"""Sources by name: which text means which source, and what is said about the others."""

import importlib.util

import numpy as np
import pytest
from PIL import Image

from jaxinterp.data import Crop, Folder, Npz, open_source

samples_installed = pytest.mark.skipif(importlib.util.find_spec("foolbox") is None, reason="foolbox is not installed")


@samples_installed
def test_samples():
    source = open_source("samples", crop=Crop(32), classes=1000)
    assert (len(source), source[0].label, source[0].image.shape) == (20, 243, (32, 32, 3))
    assert "foolbox" in source.label_origin
    assert open_source("samples:cifar10", crop=None, classes=10)[0].id.startswith("cifar10_00")
    with pytest.raises(ValueError, match="imagenet have 1000 classes, expected 10; with labels='predicted'"):
        open_source("samples", crop=None, classes=10)
    predicted = open_source("samples", crop=None, classes=10, labels="predicted")
    assert {example.label for example in predicted} == {-1}
    with pytest.raises(ValueError, match=r"expected one of imagenet, .* got 'cifar'"):
        open_source("samples:cifar", crop=None, classes=10)


def test_npz(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4, 3), np.uint8), labels=[0, 3])
    source = open_source(tmp_path / "a.npz", crop=Crop(4), classes=4)
    assert isinstance(source, Npz)
    with pytest.raises(ValueError, match=r"0\.\.2"):
        open_source(str(tmp_path / "a.npz"), crop=None, classes=3)
    with pytest.raises(ValueError, match="no such file"):
        open_source("none.npz", crop=None, classes=3)


def test_folders_and_files(tmp_path, monkeypatch):
    for name in ("0/a.png", "1/b.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("L", (4, 4)).save(tmp_path / name)
    for spec in (tmp_path, [tmp_path], [tmp_path / "0" / "a.png", str(tmp_path)]):
        source = open_source(spec, crop=None, classes=2)
        assert isinstance(source, Folder)
        assert len(source) == 2
    assert [example.label for example in open_source(tmp_path, crop=None, classes=2)] == [0, 1]
    predicted = open_source(tmp_path, crop=None, classes=2, labels="predicted")
    assert [example.label for example in predicted] == [-1, -1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples").symlink_to(tmp_path / "0")
    assert len(open_source("./samples", crop=None, classes=2)) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no/such/place", "no such file or folder: 'no/such/place'; expected samples.*tfds:.*npz"),
        ([], "expected samples"),
        (["samples", "."], "'samples' cannot be combined"),
        ([".", "x.npz"], "'x.npz' cannot be combined"),
        ("tfds:cifar10", "expected tfds:NAME.*got 'tfds:cifar10'"),
        ("tfds:", "expected tfds:NAME"),
        ("tfds:/test", "expected tfds:NAME"),
    ],
)
def test_refuses(spec, message):
    with pytest.raises(ValueError, match=message):
        open_source(spec, crop=None, classes=10)
