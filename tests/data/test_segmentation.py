"""Segmented arrays and concepts, and batches of segmented items: what is checked, and what comes out."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinterp.data import Concepts, DamagedImage, Segmented, SegmentedArrays, SegmentedSource, segmented_batches


def concepts(labels=3):
    return Concepts(("", *map(str, range(1, labels + 1))), ("object", "part"), np.array([-1, *[0, 1, 0, 1][:labels]]))


def test_concepts():
    found = Concepts(("", "a", "b"), ("x",), np.array([-1, 0, -1]))
    assert (found.names, found.categories) == (("", "a", "b"), ("x",))
    assert found.category.dtype == np.int32


@pytest.mark.parametrize(
    ("names", "categories", "category", "message"),
    [
        (("",), ("x",), [-1], "got 0"),
        (("",) * 32769, ("x",), [-1] * 32769, "1 to 32767 labels after label 0, got 32768"),
        (("", "a"), ("x",), [-1], "expected 2 integers"),
        (("", "a"), ("x",), [-1.0, 0.0], "expected 2 integers"),
        (("", "a"), (), [-1, -1], "categories: expected different names"),
        (("", "a"), ("x", "x"), [-1, 0], "categories: expected different names"),
        (("", "a"), ("x",), [-1, 1], "indices below 1, or -1 = none, got -1 to 1"),
        (("", "a"), ("x",), [-2, 0], "got -2 to 0"),
        (("", "a"), ("x",), [0, 0], "label 0 stands for no label"),
    ],
)
def test_concepts_refuse(names, categories, category, message):
    with pytest.raises(ValueError, match=message):
        Concepts(names, categories, np.array(category))


def test_the_most_labels():
    assert len(Concepts(("",) * 32768, ("x",), np.full(32768, -1)).names) == 32768


def test_arrays(rng):
    images = rng.integers(0, 256, (4, 6, 6, 3), np.uint8)
    planes = rng.integers(0, 4, (4, 3, 3))
    source = SegmentedArrays(images, planes, concepts(), scalars=np.array([[1], [0], [3], [2]]), ids=list("abcd"))
    assert isinstance(source, SegmentedSource)
    assert len(source) == 4
    item = source[2]
    assert (item.id, item.scalars.tolist()) == ("c", [3])
    assert (item.image.dtype, item.planes.dtype, item.scalars.dtype) == (np.float32, np.int16, np.int16)
    np.testing.assert_array_equal(item.image, images[2] / np.float32(255))
    np.testing.assert_array_equal(item.planes, planes[2][None])
    bare = SegmentedArrays(images, np.stack([planes, planes], 1), concepts())
    assert bare[1].planes.shape == (2, 3, 3)
    assert bare[1].scalars.shape == (0,)
    assert bare[1].id == "1"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"planes": np.zeros((2, 3, 3))}, TypeError, "planes: expected integers, got float64"),
        ({"planes": np.zeros((3, 3, 3), int)}, ValueError, "planes: .*first of length 2"),
        ({"planes": np.zeros((2, 9), int)}, ValueError, "planes: expected 4 dimensions"),
        ({"planes": np.full((2, 3, 3), 4)}, ValueError, "planes: .*from 0 to 3, got 4 to 4"),
        ({"planes": np.full((2, 3, 3), -1)}, ValueError, "planes: .*got -1 to -1"),
        ({"scalars": np.zeros((2, 1))}, TypeError, "scalars: expected integers"),
        ({"scalars": np.zeros(2, int)}, ValueError, "scalars: expected 2 dimensions"),
        ({"scalars": np.full((2, 1), 70000)}, ValueError, "scalars: .*got 70000 to 70000"),
        ({"ids": ["a", "a"]}, ValueError, "'a' twice"),
    ],
)
def test_arrays_refuse(arguments, error, message):
    given = {"planes": np.zeros((2, 3, 3), int), **arguments}
    with pytest.raises(error, match=message):
        SegmentedArrays(np.zeros((2, 6, 6, 3), np.uint8), concepts=concepts(), **given)


class Numbers:
    """N items, item i full of i everywhere; some of them damaged."""

    def __init__(self, count, damaged=()):
        self.count, self.damaged = count, damaged
        self.concepts = Concepts(("", *map(str, range(1, 99))), ("x",), np.array([-1] + [0] * 98))

    def __len__(self):
        return self.count

    def __getitem__(self, index: int, /) -> Segmented:
        if index in self.damaged:
            raise DamagedImage(f"n{index}", "made so")
        planes = np.full((2, 2, 3), index, np.int16)
        scalars = np.array([index, 0, 0], np.int16)
        return Segmented(np.full((4, 6, 3), index / 99, np.float32), planes, scalars, f"n{index}")


def test_padding():
    first, last = segmented_batches(Numbers(5), 3)
    assert first.mask.tolist() == [True] * 3
    assert (last.ids, last.mask.tolist()) == (("n3", "n4", ""), [True, True, False])
    assert (first.images.shape, first.planes.shape, first.scalars.shape) == ((3, 4, 6, 3), (3, 2, 2, 3), (3, 3))
    assert last.planes[:, 0, 0, 0].tolist() == [3, 4, 4]  # a copy of a real one
    assert last.scalars.tolist() == [[3, 0, 0], [4, 0, 0], [4, 0, 0]]
    assert (first.images.dtype, first.planes.dtype, first.scalars.dtype) == (np.float32, np.int16, np.int16)


@pytest.mark.parametrize(("field", "shape"), [("planes", (1, 2, 3)), ("planes", (2, 3, 3)), ("scalars", (2,))])
def test_shapes_must_agree(field, shape):
    class Ragged(Numbers):
        def __getitem__(self, index: int, /) -> Segmented:
            item = super().__getitem__(index)
            if index == 2:
                object.__setattr__(item, field, np.zeros(shape, np.int16))
            return item

    for batch_size in (2, 3):  # the odd one comes in a later batch, or in the same
        with pytest.raises(ValueError, match=f"n2 has {field} of shape"):
            list(segmented_batches(Ragged(4), batch_size))


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"batch_size": 1, "shard": (1, 1)}])
def test_refuses_at_once(arguments):
    with pytest.raises(ValueError, match="expected"):
        segmented_batches(Numbers(3), **arguments)


@settings(max_examples=80, deadline=None)
@given(
    count=st.integers(0, 20),
    batch_size=st.integers(1, 6),
    shards=st.integers(1, 4),
    damaged=st.sets(st.integers(0, 19)),
    workers=st.integers(1, 3),
)
def test_shards_cover_everything_once(count, batch_size, shards, damaged, workers):
    """All shards have as many batches, every readable item is in one place, and its fields belong together."""
    errors, found, lengths = [], [], []
    for index in range(shards):
        walk = segmented_batches(
            Numbers(count, damaged), batch_size, workers=workers, on_damaged=errors.append, shard=(index, shards)
        )
        shard = list(walk)
        lengths.append(len(shard))
        for batch in shard:
            number = batch.planes[:, 0, 0, 0]
            assert (batch.planes == number[:, None, None, None]).all()
            assert (batch.scalars == number[:, None] * np.array([1, 0, 0])).all()
            np.testing.assert_array_equal(batch.images[:, 0, 0, 0], (number / 99).astype(np.float32))
            expected = [f"n{n}" if real else "" for n, real in zip(number, batch.mask, strict=True)]
            assert list(batch.ids) == expected
            assert len(batch.mask) == batch_size
        found.append([name for batch in shard for name in batch.ids if name])
    good = [i for i in range(count) if i not in damaged]
    assert found == [[f"n{i}" for i in good if i % shards == index] for index in range(shards)]
    assert sorted(error.id for error in errors) == sorted(f"n{i}" for i in damaged if i < count)
    assert len(set(lengths)) == 1
    assert list(itertools.chain(*found)) or lengths == [0] * shards
