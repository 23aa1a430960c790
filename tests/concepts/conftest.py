"""A network whose units are the colours of a picture, pictures of coloured squares, and a folder in Broden's format."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxinterp import Network, broden, models
from jaxinterp.data import Concepts, SegmentedArrays
from jaxinterp.weights import checkpoint, seeded

SIDE = 32
NAMES = ("", "red", "<b>green & co", "nowhere", "stuff")


def colours(params, images, tap):
    """Units red, green and blue at half the resolution, and twice the red."""
    x = images.reshape(-1, SIDE // 2, 2, SIDE // 2, 2, 3).mean(axis=(2, 4))
    x = tap("colours", jnp.concatenate([x, 2 * x[..., :1]], axis=-1) * params["scale"])
    return tap("pooled", x.mean(axis=(1, 2)))


@pytest.fixture
def network() -> tuple[Network, dict]:
    """Without weights, but for a scale."""
    return Network("colours", colours, ("colours", "pooled"), SIDE, 4), {"scale": jnp.ones(())}


@pytest.fixture
def squares() -> SegmentedArrays:
    """Eleven pictures: a red square in each, a green one in every second, labelled but for half of the red ones' rows.

    Label maps have the resolution of the units. The category `rest` occurs in pictures with a green square only.
    """
    images = np.zeros((11, SIDE, SIDE, 3), np.float32)
    planes = np.zeros((11, 2, SIDE // 2, SIDE // 2), np.int16)
    for i in range(11):
        images[i, 4:12, i : i + 8, 0] = 0.5 + i / 32
        planes[i, 0, 2:6, (i + 1) // 2 : (i + 1) // 2 + 2] = 1
        if i % 2:
            images[i, 20:24, 20:24, 1] = 1
            planes[i, 0, 10:12, 10:12] = 2
            planes[i, 1] = 4
    category = np.array([-1, 0, 0, 0, 1])
    return SegmentedArrays(
        images, planes, Concepts(NAMES, ("colour", "rest"), category), ids=[f"p{i}" for i in range(11)]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve images of 32 x 32 pixels with colours, and scenes as whole-image labels."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for scene in ("day", "night"):
        (root / scene).mkdir()
        for i in range(2):
            patches = rng.integers(0, 255, (5, 5, 3), dtype=np.uint8)
            Image.fromarray(patches.repeat(20, 0).repeat(20, 1)).save(root / scene / f"{scene}{i}.png")
    out = tmp_path_factory.mktemp("broden") / "set"
    broden.make([], out, scenes=root, size=SIDE, crops=3)
    return out


@pytest.fixture
def small_cnn(tmp_path, monkeypatch) -> Path:
    """Checkpoints with one of the small network, where commands look for it."""
    params = seeded.params(models.shapes("small_cnn"))
    source = {"file": "seeded", "sha256": "0", "known": False}
    checkpoint.save(params, tmp_path / "ckpts" / "small_cnn", name="small_cnn", classes=10, source=source)
    monkeypatch.setenv("JAXINTERP_CKPTS", str(tmp_path / "ckpts"))
    return tmp_path / "ckpts"
