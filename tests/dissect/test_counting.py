"""Counts of pixels against another program's, and against a slow one written from the definitions (see conftest.py)."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxinterp import dissect
from jaxinterp.data import Broden
from jaxinterp.dissect import counting, wide

CATEGORIES = np.array([-1, 0, 1, 1, 2, -1, 2, 0, 1, 3])  # category 3 has one label, which is absent


def scene(seed, images=5, maps=(4, 4), size=(8, 8), channels=2, units=40, scalars=2):
    """Features of small integers, thresholds between them, labels that repeat, are absent or have no category."""
    rng = np.random.default_rng(seed)
    features = rng.integers(-3, 4, (images, *maps, units)).astype(np.float32)
    thresholds = (rng.integers(-2, 4, units) + 0.37).astype(np.float32)
    thresholds[::5] = 3.37  # never fires
    features[0] = -4  # an image in which no unit fires
    planes = rng.choice([0, 0, 1, 2, 2, 4, 5, 6, 7, 8], (images, channels, *size))
    if channels > 1:
        planes[:, 1, : size[0] // 2] = planes[:, 0, : size[0] // 2]  # the same label in both channels
    planes[-1] = 0
    whole = rng.choice([0, 3, 3, 4, 2], (images, scalars))
    whole[-1] = 0
    return features, thresholds, planes, whole


@pytest.fixture(scope="module")
def reference(oracle):
    """Arguments of `tally` and the counts of the original program."""
    with np.load(oracle / "netdissect" / "raw.npz") as raw:
        whole = {name: raw[name] for name in raw.files}
    data = Broden(oracle / "netdissect" / "broden")
    items = [data[i] for i in range(len(data))]
    order = list(whole["categories"])  # of category.csv there, alphabetical in index.csv
    category = np.array([order.index(data.concepts.categories[c]) if c >= 0 else -1 for c in data.concepts.category])
    assert list(whole["label_names"]) == list(data.concepts.names)
    named = whole["label_names"] != ""
    np.testing.assert_array_equal(category[named], whole["primary_category"][named])
    features = np.ascontiguousarray(whole["features"].transpose(0, 2, 3, 1))
    labels = np.stack([item.planes for item in items]), np.stack([item.scalars for item in items])
    return (features, whole["threshold"].astype(np.float32), *labels, category), whole


@pytest.mark.parametrize("form", ["gated", "dense"])
def test_every_integer_of_the_original_program(reference, form):
    arguments, whole = reference
    found = dissect.tally(*arguments, union="lite", form=form, batch_size=40)
    np.testing.assert_array_equal(found.intersection, whole["tally_both"])
    np.testing.assert_array_equal(found.activation, whole["tally_units"])
    np.testing.assert_array_equal(found.activation_by_category, whole["tally_units_cat"])
    np.testing.assert_array_equal(found.label_area, whole["tally_labels"])
    assert found.intersection.dtype == found.label_area.dtype == np.int64
    assert found.intersection.sum() > 10_000
    assert (found.activation == 0).any()


def test_the_definition_of_the_paper_on_the_same_images(reference, slow, same_tally):
    (features, thresholds, planes, scalars, category), _ = reference
    few = features[:, :, :, :16:2], thresholds[:16:2], planes, scalars, category
    found = {}
    for union in dissect.UNIONS:
        found[union] = dissect.tally(*few, union=union, form="dense", batch_size=40)
        same_tally(found[union], slow.tally(*few, union))
    assert (found["image"].activation_by_category >= found["lite"].activation_by_category).all()
    assert (found["image"].activation_by_category > found["lite"].activation_by_category).any()


SHAPES = [  # of scenes, with a batch size and a form; few, because each is compiled
    ({"images": 4}, 1, "gated"),
    ({"maps": (3, 5), "size": (7, 6), "channels": 1, "units": 3, "scalars": 0}, 3, "gated"),
    ({"maps": (6, 4), "size": (3, 8), "channels": 3, "units": 7, "scalars": 1}, 7, "dense"),
    ({"maps": (1, 1), "size": (2, 5), "units": 2, "scalars": 5}, 1, "dense"),
]


@settings(max_examples=16, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.sampled_from(SHAPES))
def test_any_scene_is_counted_as_defined(slow, same_tally, seed, shape):
    sizes, batch_size, form = shape
    arguments = *scene(seed, **sizes), CATEGORIES
    for union in dissect.UNIONS:
        found = dissect.tally(*arguments, union=union, batch_size=batch_size, form=form)
        same_tally(found, slow.tally(*arguments, union))


@pytest.mark.parametrize("form", ["gated", "dense"])
def test_images_with_whole_image_labels_only(slow, same_tally, form):
    arguments = *scene(3, channels=0), CATEGORIES
    assert arguments[2].shape == (5, 0, 8, 8)
    for union in dissect.UNIONS:
        found = dissect.tally(*arguments, union=union, batch_size=2, form=form)
        same_tally(found, slow.tally(*arguments, union))
    assert found.intersection.sum() > 0


def test_by_hand():
    """One unit on the upper half. Label 1 covers the left half twice, label 2 the lower half; label 3 is a scene."""
    features = np.array([[1.0, 1.0], [0.0, 0.0]], np.float32).reshape(1, 2, 2, 1)
    planes = np.array([[[[1, 0], [1, 2]], [[1, 0], [1, 2]]]])
    arguments = features, np.array([0.5], np.float32), planes, np.array([[3, 0]]), np.array([-1, 0, 1, 2, 3])
    found = dissect.tally(*arguments)
    assert found.intersection.tolist() == [[0, 2, 0, 2, 0]]
    assert found.activation.tolist() == [2]
    assert found.activation_by_category.tolist() == [[2, 2, 2, 0]]
    assert found.label_area.tolist() == [0, 4, 2, 4, 0]
    assert found.union == "image"
    lite = dissect.tally(*arguments, union="lite")
    assert lite.activation_by_category.tolist() == [[2, 0, 2, 0]]
    assert lite.union == "lite"
    # A label that is named twice for the whole image counts twice; a category of one pixel occurs.
    twice = dissect.tally(*arguments[:2], np.array([[[[0, 0], [0, 2]]]]), np.array([[3, 3]]), arguments[4])
    assert twice.intersection.tolist() == [[0, 0, 0, 4, 0]]
    assert twice.label_area.tolist() == [0, 0, 1, 8, 0]
    assert twice.activation_by_category.tolist() == [[0, 2, 2, 0]]
    # At the threshold itself a unit is not active, nor anywhere else where it never exceeds it.
    assert dissect.tally(features, np.array([1.0], np.float32), *arguments[2:]).activation.tolist() == [0]
    plateau = np.array([[1.0, 1.0], [0.0, 2.0]], np.float32).reshape(1, 2, 2, 1)
    assert dissect.tally(plateau, np.array([1.0], np.float32), *arguments[2:]).activation.tolist() == [1]
    below = np.nextafter(np.float32(1), np.float32(0))
    assert dissect.tally(features, np.array([below]), *arguments[2:]).activation.tolist() == [2]


def test_batches_and_forms_give_the_same_integers(same_tally):
    features, thresholds, planes, scalars = scene(3, images=7)
    for union in dissect.UNIONS:
        expected = dissect.tally(features, thresholds, planes, scalars, CATEGORIES, union, form="dense", batch_size=8)
        for batch_size in (1, 3, 7):
            found = dissect.tally(
                features, thresholds, planes, scalars, CATEGORIES, union, form="gated", batch_size=batch_size
            )
            same_tally(found, expected)


@pytest.mark.parametrize("devices", [2, 8, pytest.param(4, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("form", ["gated", "dense"])
def test_sharded_features_are_counted_where_they_are(same_tally, meshes, devices, form):
    features, thresholds, planes, scalars = scene(4, images=16, units=7)
    spread = jax.device_put(features, NamedSharding(meshes[devices], PartitionSpec("data")))
    expected = dissect.tally(features, thresholds, planes, scalars, CATEGORIES, form="dense", batch_size=16)
    same_tally(dissect.tally(spread, thresholds, planes, scalars, CATEGORIES, form=form, batch_size=2), expected)


def test_units_that_fire_are_as_many_as_they_are(same_tally):
    """From no unit to all of 66, in more words of bits than one."""
    features = np.zeros((8, 2, 2, 66), np.float32)
    for image, firing in enumerate((0, 1, 17, 18, 33, 34, 65, 66)):
        features[image, 0, 0, np.random.default_rng(image).permutation(66)[:firing]] = 1
    planes = np.random.default_rng(0).integers(0, 5, (8, 1, 4, 4))
    arguments = features, np.zeros(66, np.float32), planes, np.zeros((8, 0), int), CATEGORIES
    gated, dense = (dissect.tally(*arguments, form=form, batch_size=8) for form in ("gated", "dense"))
    same_tally(gated, dense)
    # What fires lies above the threshold, not above 0.
    negative = features - 5, np.full(66, -5, np.float32), *arguments[2:]
    same_tally(dissect.tally(*negative, form="gated", batch_size=8), dense)
    assert gated.activation.sum() == 9 * (1 + 17 + 18 + 33 + 34 + 65 + 66)


def test_labels_present(rng):
    planes = np.zeros((3, 2, 2, 3), np.uint16)
    planes[0] = [[[5, 5, 0], [300, 0, 0]], [[5, 0, 0], [0, 0, 7]]]
    planes[1, 0] = 299
    scalars = np.array([[300, 300, 0], [0, 4, 0], [0, 0, 0]], np.int16)
    found = counting.present(planes, scalars, 301)
    assert found.labels.tolist() == [[5, 7, 300, 0, 0, 0, 0, 0], [4, 299, 0, 0, 0, 0, 0, 0], [0] * 8]
    assert found.times.tolist() == [[0, 0, 2, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [0] * 8]
    assert found.area.tolist() == [[3, 1, 13, 0, 0, 0, 0, 0], [6, 6, 0, 0, 0, 0, 0, 0], [0] * 8]
    for image in range(3):
        table = np.array([0, *found.labels[image]])
        np.testing.assert_array_equal(table[found.places[image]], planes[image])
    assert found.places.dtype == np.uint8


@pytest.mark.parametrize(("count", "width", "kind"), [(8, 8, "u1"), (9, 16, "u1"), (128, 128, "u1"), (129, 256, "u2")])
def test_places_for_labels_are_a_power_of_two(count, width, kind):
    planes = np.arange(1, count + 1).reshape(1, 1, 1, count)
    found = counting.present(planes, np.zeros((1, 0), int), count + 1)
    assert found.labels.shape == (1, width)
    assert found.places.dtype == np.dtype(kind)
    np.testing.assert_array_equal(found.places[0, 0, 0], np.arange(1, count + 1))
    wider = counting.widened(found, 512)
    assert wider.labels.shape == wider.area.shape == wider.times.shape == (1, 512)
    assert wider.places.dtype == np.uint16
    np.testing.assert_array_equal(wider.places, found.places)
    assert counting.widened(found, 2).labels.shape == (1, width)


def test_more_labels_in_an_image_than_a_byte_holds(slow, same_tally):
    """300 labels, all of them in one image; label 0 of the second image's places stays nothing."""
    planes = np.zeros((2, 1, 18, 18), int)
    planes[0].ravel()[:300] = np.arange(1, 301)
    features = np.random.default_rng(0).integers(-1, 2, (2, 9, 9, 2)).astype(np.float32)
    category = np.array([-1, *[i % 3 for i in range(300)]])
    arguments = features, np.array([0.3, 0.7], np.float32), planes, np.array([[300], [299]]), category
    same_tally(dissect.tally(*arguments, union="lite"), slow.tally(*arguments, "lite"))


def test_counts_beyond_32_bits():
    """An image added many times over: states merge with themselves."""
    features, thresholds, planes, scalars = scene(5, units=7)
    once = dissect.tally(features, thresholds, planes, scalars, CATEGORIES)
    labels = counting.present(planes, scalars, len(CATEGORIES))
    state = jax.jit(counting.update)(
        counting.init(7, 10, 4),
        jnp.asarray(features),
        jnp.asarray(thresholds),
        labels,
        jnp.asarray(counting.memberships(CATEGORIES)),
    )
    merge = jax.jit(counting.merge)
    for _ in range(30):
        state = merge(state, state)
    found = counting.result(state)
    np.testing.assert_array_equal(found.intersection, once.intersection << 30)
    np.testing.assert_array_equal(found.activation, once.activation << 30)
    np.testing.assert_array_equal(found.activation_by_category, once.activation_by_category << 30)
    np.testing.assert_array_equal(found.label_area, once.label_area << 30)
    assert found.activation.max() > 2**34


def test_merging_is_associative_and_commutative(rng):
    def state(seed):
        numbers = iter(np.random.default_rng(seed).integers(0, 2**40, (100, 4)))

        def some(shape):
            flat = np.resize(next(numbers), shape)
            return wide.Wide(jnp.asarray(flat & 65535, jnp.int32), jnp.asarray(flat >> 16, jnp.int32))

        return counting.TallyState(some((5, 3)), some((3,)), some((2, 2, 3)), some((5,)))

    a, b, c = state(0), state(1), state(2)
    merge = jax.jit(counting.merge)
    whole = merge(merge(a, b), c)
    for other in (merge(a, merge(b, c)), merge(merge(c, b), a)):
        jax.tree.map(np.testing.assert_array_equal, other, whole)
    expected = functools.reduce(np.add, (wide.total(s.intersection).T for s in (a, b, c)))
    np.testing.assert_array_equal(counting.result(whole).intersection, expected)
    image, lite = (counting.result(whole, union).activation_by_category for union in dissect.UNIONS)
    np.testing.assert_array_equal(image, wide.total(whole.by_category)[0].T)
    np.testing.assert_array_equal(lite, wide.total(whole.by_category)[1].T)


def test_memberships():
    matrix = counting.memberships([0, 1, -1, 1], 3)
    assert matrix.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 1, 0]]  # label 0 belongs to none
    assert matrix.dtype == np.float32
    assert counting.memberships([-1, 1]).shape == (2, 2)


def test_no_image_and_labels_of_unsigned_bytes(same_tally):
    features, thresholds, planes, scalars = scene(6)
    none = dissect.tally(features[:0], thresholds, planes[:0], scalars[:0], CATEGORIES)
    assert not none.intersection.any()
    assert none.intersection.shape == (40, 10)
    same_tally(
        dissect.tally(features, thresholds, planes.astype(np.uint8), scalars.astype(np.uint8), CATEGORIES),
        dissect.tally(features, thresholds, planes, scalars, CATEGORIES),
    )


# Errors

FEATURES, THRESHOLDS, PLANES, SCALARS = scene(0, images=2, units=3)
NAN = FEATURES.copy()
NAN[1, 2, 2, 1] = np.nan


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
        ({"features": NAN}, ValueError, "features: NaN among the activations of 1 units: 1"),
        ({"features": FEATURES[:1]}, ValueError, r"features, planes, scalars: .*got \[1, 4, 4, 3\], \[2, 2, 8, 8\]"),
        ({"scalars": SCALARS[:1]}, ValueError, r"features, planes, scalars: .*\[1, 2\]"),
        ({"features": FEATURES[..., :0]}, ValueError, "features, planes, scalars: "),
        ({"thresholds": THRESHOLDS[:2]}, ValueError, r"thresholds: expected 3, one for each unit, got shape \[2\]"),
        ({"thresholds": THRESHOLDS * np.float32(np.nan)}, ValueError, "thresholds: expected numbers, got NaN"),
        ({"planes": PLANES + 2}, ValueError, "planes: expected label numbers from 0 to 9, got 2 to 10"),
        ({"planes": PLANES - 1}, ValueError, "planes: expected label numbers from 0 to 9, got -1 to"),
        ({"scalars": SCALARS + 9}, ValueError, "scalars: expected label numbers from 0 to 9, got 9 to"),
        ({"categories": np.array([-1, -2])}, ValueError, "categories: expected indices from 0 to "),
        ({"categories": np.array([-1, -1])}, ValueError, "categories: expected indices from 0 to "),
        ({"categories": np.zeros(0, int)}, ValueError, "categories: expected a list of integers"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, message):
    arguments = {
        "features": FEATURES,
        "thresholds": THRESHOLDS,
        "planes": PLANES,
        "scalars": SCALARS,
        "categories": CATEGORIES,
    }
    with pytest.raises(error, match=message):
        inspect.unwrap(dissect.tally)(**{**arguments, **change})  # without the check of shapes, which only tests have


def test_what_types_would_refuse_is_refused_by_value_too():
    with pytest.raises(ValueError, match="union: expected one of image, lite, got 'both'"):
        counting.check_union("both")
    with pytest.raises(TypeError, match="planes: expected integers, got float64"):
        counting.present(PLANES / 1, SCALARS, 10)
    with pytest.raises(TypeError, match="scalars: expected integers, got float64"):
        counting.present(PLANES, SCALARS / 1, 10)
    with pytest.raises(ValueError, match=r"planes: expected 4 axes, .* got \(2, 8, 8\)"):
        counting.present(PLANES[:, 0], SCALARS, 10)
    with pytest.raises(ValueError, match="planes: expected at most 16777216 pixels in an image, got 16781312"):
        counting.present(np.broadcast_to(np.int8(0), (1, 1, 4096, 4097)), np.zeros((1, 0), int), 2)
    with pytest.raises(ValueError, match="categories: expected indices from 0 to 1"):
        counting.memberships([-1, 2], 2)
