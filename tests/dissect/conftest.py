"""What the tests of network dissection share: reference arrays, and a slow program for the counts.

The reference arrays (`shared/oracle` beside the project) are those of NetDissect-Lite on a small network.
"""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from PIL import Image

ORACLE = Path(__file__).parents[3] / "shared" / "oracle"


@pytest.fixture(scope="session")
def oracle() -> Path:
    """The folder of reference arrays."""
    if not (ORACLE / "netdissect" / "raw.npz").exists():
        pytest.skip(f"the reference arrays are not at {ORACLE}")
    return ORACLE


@pytest.fixture(scope="session")
def meshes():
    """The mesh over the first n devices; None for one device."""
    made = {
        n: jax.make_mesh((n,), ("data",), devices=jax.devices()[:n], axis_types=(AxisType.Auto,)) for n in (2, 4, 8)
    }
    return {1: None, **made}


def pil_resize(one: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h,w] at `size` = (sh, sw), by PIL's bilinear filter on 32-bit floats."""
    return np.asarray(Image.fromarray(one, "F").resize((size[1], size[0]), Image.Resampling.BILINEAR))


def slow_tally(features, thresholds, planes, scalars, categories, union):
    """The counts as their definitions say, image after image and unit after unit, with PIL and NumPy."""
    count, _, _, units = features.shape
    labels, size = len(categories), planes.shape[2:]
    both, area = np.zeros((units, labels), np.int64), np.zeros(labels, np.int64)
    active = np.zeros(units, np.int64)
    by_category = np.zeros((units, max(categories) + 1), np.int64)

    def coverage(image, mask):
        """How often each label occurs under a mask; a whole-image label covers every pixel."""
        found = np.zeros(labels, np.int64)
        for plane in planes[image]:
            found += np.bincount(plane[mask], minlength=labels)
        for number in scalars[image]:
            found[number] += mask.sum()
        found[0] = 0
        return found

    for image in range(count):
        everywhere = coverage(image, np.ones(size, bool))
        area += everywhere
        for unit in range(units):
            mask = pil_resize(features[image, :, :, unit], size) > thresholds[unit]
            under = coverage(image, mask)
            both[unit] += under
            active[unit] += mask.sum()
            occurs = everywhere if union == "image" else under
            for category in {categories[label] for label in np.flatnonzero(occurs)} - {-1}:
                by_category[unit, category] += mask.sum()
    return SimpleNamespace(
        intersection=both, activation=active, activation_by_category=by_category, label_area=area, union=union
    )


@pytest.fixture(scope="session")
def slow():
    """The slow programs."""
    return SimpleNamespace(tally=slow_tally, resize=pil_resize)


COUNTS = ("intersection", "activation", "activation_by_category", "label_area")


@pytest.fixture(scope="session")
def same_tally():
    """Asserts that every integer of two tallies is equal."""

    def same(a, b):
        assert a.union == b.union
        for name in COUNTS:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)

    return same
