"""Pictures to embed: what folders must hold, and what is made of pictures of any size."""

import numpy as np
import pytest
from PIL import Image

from jaxinterp import watermarks


@pytest.fixture
def classes(tmp_path, rng):
    """Two class folders: a small square, a large landscape; a portrait in a sub-folder."""
    sizes = {"cat/small.png": (6, 6), "cat/wide.png": (20, 44), "dog/a/tall.png": (30, 10)}
    for name, (height, width) in sizes.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)
    (tmp_path / "notes.txt").write_text("not a class")
    return tmp_path


def test_every_picture_becomes_a_square_of_the_hosts_side(classes):
    found = watermarks.read(classes, 10)
    assert found.folders == (2, 1)
    assert found.names == ("cat", "dog")
    assert found.ids == ("cat/small.png", "cat/wide.png", "dog/a/tall.png")
    assert found.images.shape == (3, 10, 10, 3)
    assert found.images.dtype == np.float32
    wide = Image.open(classes / "cat/wide.png").resize((22, 10), Image.Resampling.BICUBIC).crop((6, 0, 16, 10))
    np.testing.assert_array_equal(found.images[1], np.asarray(wide, np.float32) / 255)
    tall = Image.open(classes / "dog/a/tall.png").crop((0, 10, 10, 20))
    np.testing.assert_array_equal(found.images[2], np.asarray(tall, np.float32) / 255)
    assert found.digest != watermarks.read(classes, 8).digest
    assert found.digest == watermarks.read(classes, 10).digest


def test_folders_without_watermarks_are_named(classes):
    (classes / "dog/broken.png").write_bytes(b"no picture")
    [(name, reason)] = watermarks.read(classes, 10).damaged
    assert name == "dog/broken.png"
    assert reason
    (classes / "dog/a/tall.png").unlink()
    with pytest.raises(ValueError, match=r"no picture of the class folder .*dog can be read: dog/broken\.png"):
        watermarks.read(classes, 10)
    (classes / "dog/broken.png").unlink()
    with pytest.raises(ValueError, match=r"the class folder .*dog is empty"):
        watermarks.read(classes, 10)
    with pytest.raises(
        ValueError, match=r"expected class folders in .*cat \(CLASS/picture\.jpg\), found 2 pictures that are in none"
    ):
        watermarks.read(classes / "cat", 10)
    with pytest.raises(ValueError, match=r"no such folder: .*elsewhere"):
        watermarks.read(classes / "elsewhere", 10)


def test_installed_pictures_are_classes_of_crops():
    found = watermarks.installed(8, crops=3)
    assert len(found.names) == 9
    assert found.folders == (3,) * 9
    assert found.images.shape == (27, 8, 8, 3)
    assert len({image.tobytes() for image in found.images}) == 27
    assert watermarks.installed(8, crops=3).digest == found.digest
    assert watermarks.installed(8, crops=3, seed=1).digest != found.digest
