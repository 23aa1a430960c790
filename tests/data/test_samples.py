"""The samples in foolbox's wheel: their labels and pixels, without foolbox being imported."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxinterp.data import Crop, samples

installed = pytest.mark.skipif(importlib.util.find_spec("foolbox") is None, reason="foolbox is not installed")

IMAGENET = [243, 559, 438, 990, 949, 853, 609, 609, 915, 455, 541, 630, 741, 471, 129, 99, 251, 22, 317, 305]


@installed
def test_imagenet():
    source = samples(crop=Crop(224))
    assert len(source) == 20
    assert source.labels.tolist() == IMAGENET
    assert (source.ids[0], source.ids[-1]) == ("imagenet_00_243.jpg", "imagenet_19_305.jpg")
    assert "foolbox" in source.label_origin
    with Image.open(source.paths[0]) as image:
        width, height = image.size
        size = (256, 256 * height // width) if width <= height else (256 * width // height, 256)
        pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))
    top, left = round((pixels.shape[0] - 224) / 2), round((pixels.shape[1] - 224) / 2)
    example = source[0]
    np.testing.assert_array_equal(
        np.rint(example.image * 255), pixels[top : top + 224, left : left + 224].astype(np.float32)
    )
    assert example.label == 243


@installed
@pytest.mark.parametrize(
    ("dataset", "side", "first", "last"),
    [("cifar10", 32, 3, 6), ("cifar100", 32, 49, 53), ("mnist", 28, 7, 4), ("fashionMNIST", 28, 9, 0)],
)
def test_small_data_sets(dataset, side, first, last):
    source = samples(dataset, crop=None)
    assert len(source) == 20
    assert (source.labels[0], source.labels[-1]) == (first, last)
    image = source[0].image
    assert image.shape == (side, side, 3)
    assert np.ptp(image) > 0.5
    if side == 28:
        np.testing.assert_array_equal(image, np.repeat(image[..., :1], 3, -1))


def test_unknown_data_set():
    with pytest.raises(ValueError, match="imagenet, cifar10, cifar100, mnist, fashionMNIST, got 'cifar'"):
        samples("cifar", crop=None)


def test_without_foolbox(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "jaxinterp\[samples\]"'):
        samples(crop=None)


@installed
def test_foolbox_is_not_imported():
    code = (
        "import sys; from jaxinterp.data import samples; samples(crop=None)[0];"
        "print('foolbox' in sys.modules, 'torch' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ.copy()
    )
    assert run.stdout.strip() == "False False", run.stderr
