"""IoUs, best labels and the two conventions of counting, worked out by hand."""

import csv
import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinterp import dissect

# Labels 1 and 2 are of category 0, labels 3 and 4 of category 1, label 5 of none.
CATEGORIES = np.array([-1, 0, 0, 1, 1, -1])
TALLY = dissect.Tally(
    intersection=np.array([[0, 10, 20, 0, 5, 9], [0, 0, 0, 0, 0, 0], [0, 0, 40, 30, 0, 0]]),
    activation=np.array([50, 0, 80]),
    activation_by_category=np.array([[40, 20], [0, 0], [80, 60]]),
    label_area=np.array([0, 100, 200, 60, 10, 70]),
    union="image",
)


def test_iou_by_hand():
    found = dissect.iou(TALLY, CATEGORIES)
    assert found.dtype == np.float64
    expected = [
        [0, 10 / (40 + 100 - 10), 20 / (40 + 200 - 20), 0, 5 / (20 + 10 - 5), 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 40 / (80 + 200 - 40), 30 / (60 + 60 - 30), 0, 0],
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-11)


def test_a_denominator_of_zero_gives_zero():
    zeros = np.zeros((1, 2), np.int64)
    empty = dissect.Tally(zeros, zeros[:, 0], zeros[:, :1], zeros[0], "image")
    assert dissect.iou(empty, np.array([-1, 0])).tolist() == [[0, 0]]


def test_the_denominator_is_that_of_the_original():
    """1e-10 is added to it, which shows where it is small."""
    tally = dissect.Tally(np.array([[0, 1]]), np.array([1]), np.array([[1]]), np.array([0, 1]), "image")
    assert dissect.iou(tally, np.array([-1, 0]))[0, 1] == 1 / (1 + 1e-10) < 1


def test_best_by_hand():
    found = dissect.best(dissect.iou(TALLY, CATEGORIES), CATEGORIES, 2)
    assert found.label.tolist() == [[2, 4], [0, 0], [2, 3]]
    np.testing.assert_allclose(found.iou, [[20 / 220, 5 / 25], [0, 0], [40 / 240, 30 / 90]], rtol=1e-11)
    assert found.category.tolist() == [1, 0, 1]
    assert found.concept.tolist() == [4, 0, 3]
    np.testing.assert_allclose(found.score, [0.2, 0, 1 / 3], rtol=1e-11)


def test_ties_go_to_the_lowest_number_and_the_first_category():
    scores = np.array([[0.9, 0.2, 0.2, 0.2, 0.1, 0.8], [0.9, 0.1, 0.3, 0.2, 0.3, 0.8]])
    found = dissect.best(scores, CATEGORIES, 2)
    assert found.label.tolist() == [[1, 3], [2, 4]]
    assert found.category.tolist() == [0, 0]
    assert found.concept.tolist() == [1, 2]


def test_labels_without_a_category_and_label_0_are_nobodys_best():
    scores = np.full((2, 6), 0.5)
    found = dissect.best(scores, np.array([0, -1, -1, 1, -1, -1]), 2)
    assert found.label.tolist() == [[0, 3], [0, 3]]
    assert found.iou.tolist() == [[0, 0.5], [0, 0.5]]
    np.testing.assert_array_equal(dissect.iou(TALLY, CATEGORIES)[:, [0, 5]], 0)


def test_a_category_without_labels():
    found = dissect.best(dissect.iou(TALLY, CATEGORIES), CATEGORIES, 3)
    assert found.label[:, 2].tolist() == [0, 0, 0]
    assert found.iou[:, 2].tolist() == [0, 0, 0]
    assert [array.tolist() for array in dissect.counts(found, "category")] == [[2, 2, 0], [1, 2, 0]]


def test_both_conventions_and_their_concepts():
    found = dissect.Best(
        label=np.array([[1, 3], [1, 4], [2, 3], [0, 0], [1, 3]]),
        iou=np.array([[0.05, 0.06], [0.07, 0.01], [0.03, 0.02], [0.0, 0.0], [0.08, 0.05]]),
    )
    assert found.detects().tolist() == [[False, True], [True, False], [False, False], [False, False], [True, False]]
    both = [[True, True], [True, False], [False, False], [False, False], [True, True]]
    assert found.detects("category").tolist() == both
    units, concepts = dissect.counts(found)
    assert (units.tolist(), concepts.tolist()) == ([2, 1], [1, 1])
    units, concepts = dissect.counts(found, "category")
    assert (units.tolist(), concepts.tolist()) == ([3, 2], [1, 1])
    units, concepts = dissect.counts(found, "category", 0.02)
    assert (units.tolist(), concepts.tolist()) == ([4, 2], [2, 1])
    units, concepts = dissect.counts(found, "best", 0.005)
    assert (units.tolist(), concepts.tolist()) == ([3, 1], [2, 1])


def test_a_detector_exceeds_the_minimum():
    above = np.nextafter(0.04, 1)
    found = dissect.Best(np.ones((2, 1), int), np.array([[0.04], [above]]))
    assert dissect.MINIMUM == 0.04
    for convention in dissect.CONVENTIONS:
        assert found.detects(convention).tolist() == [[False], [True]]


quick = settings(max_examples=60, deadline=None, derandomize=True)


@quick
@given(st.integers(0, 2**32), st.sampled_from(dissect.UNIONS), st.integers(1, 2))
def test_an_iou_lies_between_0_and_1_unless_a_label_repeats(seed, union, channels):
    """Counts of random masks; in two channels a pixel carries two different labels, of which each has one channel."""
    rng = np.random.default_rng(seed)
    planes = np.stack([rng.integers(0, 3, (3, 4, 4)) + (2 * c) for c in range(channels)], axis=1)
    planes[planes == 2 * (channels - 1)] *= channels == 2 and rng.integers(0, 2)
    category = np.array([-1, *rng.integers(-1, 2, 5)])
    category[5] = 1
    masks = rng.random((3, 4, 4, 2)) < 0.3
    both, area = np.zeros((2, 6), np.int64), np.zeros(6, np.int64)
    by_category = np.zeros((2, 2), np.int64)
    for plane, mask in zip(planes, masks, strict=True):
        for label in range(1, 6):
            labelled = (plane == label).any(axis=0)  # a repeated label counts once here
            area[label] += labelled.sum()
            both[:, label] += (mask & labelled[..., None]).sum(axis=(0, 1))
        for c in range(2):
            occurs = np.isin(plane, np.flatnonzero(category == c)).any(axis=0)
            for unit in range(2):
                there = (occurs & mask[..., unit]).any() if union == "lite" else occurs.any()
                by_category[unit, c] += mask[..., unit].sum() if there else 0
    tally = dissect.Tally(both, masks.sum(axis=(0, 1, 2)), by_category, area, union)
    scores = dissect.iou(tally, category)
    assert ((scores >= 0) & (scores <= 1)).all()


def test_a_repeated_label_counts_twice_as_in_the_original():
    """Both channels of every pixel carry label 1: the intersection is twice the mask, and so is the area."""
    tally = dissect.tally(
        np.ones((1, 2, 2, 1), np.float32),
        np.zeros(1, np.float32),
        np.ones((1, 2, 2, 2), int),
        np.zeros((1, 0), int),
        np.array([-1, 0]),
    )
    assert (tally.intersection[0, 1], tally.label_area[1], tally.activation[0]) == (8, 8, 4)
    np.testing.assert_allclose(dissect.iou(tally, [-1, 0]), [[0, 8 / 4]], rtol=1e-9)


@pytest.mark.parametrize("categories", [[-1, 0], np.zeros((6, 1), int), [-1, 0, 0, 1, 1, -1, -1]])
def test_categories_of_another_length_are_refused(categories):
    with pytest.raises(ValueError, match="categories: expected 6, one for each label, got shape"):
        dissect.iou(TALLY, categories)


def test_an_unknown_convention_is_refused():
    found = dissect.best(dissect.iou(TALLY, CATEGORIES), CATEGORIES, 2)
    with pytest.raises(ValueError, match="convention: expected one of best, category, got 'both'"):
        inspect.unwrap(dissect.Best.detects)(found, "both")  # type: ignore[arg-type]


def test_the_report_of_the_original_program(oracle):
    """Its integers give its labels and its IoUs in every category."""
    with np.load(oracle / "netdissect" / "raw.npz") as raw:
        whole = {name: raw[name] for name in raw.files}
    category = whole["primary_category"].copy()
    category[whole["label_names"] == ""] = -1
    tally = dissect.Tally(
        whole["tally_both"].astype(np.int64),
        whole["tally_units"].astype(np.int64),
        whole["tally_units_cat"].astype(np.int64),
        whole["tally_labels"].astype(np.int64),
        "lite",
    )
    names = list(whole["categories"])
    found = dissect.best(dissect.iou(tally, category), category, len(names))
    with open(oracle / "netdissect" / "tally.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    for row in rows:
        unit = int(row["unit"]) - 1
        for c, name in enumerate(names):
            np.testing.assert_allclose(found.iou[unit, c], float(row[f"{name}-iou"]), rtol=1e-9, atol=1e-12)
            if found.iou[unit, c] > 0:
                assert whole["label_names"][found.label[unit, c]] == row[f"{name}-label"]
        np.testing.assert_allclose(found.score[unit], float(row["score"]), rtol=1e-9, atol=1e-12)
        if found.score[unit] > 0:
            assert names[found.category[unit]] == row["category"]
            assert whole["label_names"][found.concept[unit]] == row["label"]
