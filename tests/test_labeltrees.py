"""Trees of labels: distances, given trees, files."""

import numpy as np
import pytest

from jaxinterp import labeltrees, models
from jaxinterp.labeltrees import LabelTree, nested


def test_distances_are_steps_up_and_down():
    tree = nested("t", {"animal": {"dog": ("beagle", "boxer"), "cat": ("tabby",)}, "tool": ("saw",)})
    found = tree.distances(["beagle", "boxer", "tabby", "saw", "dog"])
    expected = [[0, 2, 4, 5, 1], [2, 0, 4, 5, 1], [4, 4, 0, 5, 3], [5, 5, 5, 0, 4], [1, 1, 3, 4, 0]]
    np.testing.assert_array_equal(found, expected)


def test_of_several_parents_the_nearest_counts():
    tree = LabelTree("t", {"a": ("x", "y"), "b": ("x2",), "x2": ("x",), "c": ("y",), "x": ("root",), "y": ("root",)})
    np.testing.assert_array_equal(tree.distances(["a", "b", "c"]), [[0, 3, 2], [3, 0, 5], [2, 5, 0]])


def test_a_missing_class_is_named():
    tree = nested("birds", {"bird": ("robin", "magpie")})
    with pytest.raises(ValueError, match=r"label tree birds misses the class 'magpies'; did you mean 'magpie'"):
        tree.distances(["robin", "magpies"])
    with pytest.raises(ValueError, match=r"misses the class 'p' and 1 more classes"):
        tree.distances(["p", "robin", "q"])


def test_classes_without_a_common_ancestor():
    with pytest.raises(ValueError, match="'a' and 'b' have no common ancestor"):
        LabelTree("t", {"a": ("x",), "b": ("y",)}).distances(["a", "b"])


def test_labels_above_themselves():
    parents = {"a": ("x",), "b": ("x",), "x": ("y",), "y": ("z",), "z": ("x",)}
    with pytest.raises(ValueError, match=r"tree t: labels are above themselves: '[xyz]' above '[xyz]' above '[xyz]'"):
        LabelTree("t", parents).distances(["a", "b"])


def test_files(tmp_path):
    path = tmp_path / "is_a.txt"
    path.write_text("# WordNet\nn1 n2\nn1 n3\n\nn0 n1\n")
    tree = labeltrees.open_tree(path)
    np.testing.assert_array_equal(tree.distances(["n2", "n3", "n0"]), [[0, 2, 2], [2, 0, 2], [2, 2, 0]])
    path.write_text("ice cream\tvanilla ice\n")
    assert labeltrees.read(path).parents == {"vanilla ice": ("ice cream",)}
    for text, message in (("a b c\n", "line 1: expected PARENT CHILD"), ("a a\n", "two different"), ("", "found none")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            labeltrees.read(path)
    path.write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    assert labeltrees.read_classes(path) == ("n01440764", "n01443537")
    with pytest.raises(ValueError, match="unknown label tree 'fashio'; did you mean 'fashion'"):
        labeltrees.open_tree("fashio")


def test_given_trees_have_their_classes():
    for name, classes in (
        ("digits", models.network("carlini_mnist").classes),
        ("fashion", labeltrees.FASHION),
        ("cifar10", models.network("cifar10_cnn").classes),
        ("imagenet", models.imagenet_classes()),
    ):
        assert isinstance(classes, tuple)
        d = labeltrees.given(name).distances(classes)
        assert d.shape == (len(classes),) * 2
        np.testing.assert_array_equal(d, d.T)
        assert not np.diag(d).any()
        assert d[~np.eye(len(d), dtype=bool)].min() == 2
    d = labeltrees.given("imagenet").distances([models.imagenet_classes()[i] for i in (151, 268, 281, 609)])
    assert d[0, 1] == 2  # dogs
    assert d[0, 1] < d[0, 2] < d[0, 3]  # a cat is nearer than a jeep


def test_a_label_twice():
    with pytest.raises(ValueError, match="'a' twice"):
        nested("t", {"x": ("a",), "y": ("a",)})
