"""Batches: fixed shape, padding, order, damage, and shards that share a source out exactly."""

import itertools
import math
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinterp.data import Arrays, DamagedImage, Example, batches


class Numbers:
    """N tiny images, image i full of i / N; some of them damaged, some slow."""

    def __init__(self, count, damaged=(), delay=None):
        self.count, self.damaged, self.delay = count, set(damaged), delay
        self.started = []

    def __len__(self):
        return self.count

    def __getitem__(self, index: int, /) -> Example:
        self.started.append(index)
        if self.delay:
            time.sleep(self.delay(index))
        if index in self.damaged:
            raise DamagedImage(f"n{index}", "made so")
        return Example(np.full((2, 3, 1), index / self.count, np.float32), index + 100, f"n{index}")


def test_padding():
    first, last = batches(Numbers(5), 3)
    assert first.mask.tolist() == [True] * 3
    assert (last.ids, last.mask.tolist()) == (("n3", "n4", ""), [True, True, False])
    assert last.labels.tolist() == [103, 104, 104]
    for batch in (first, last):
        assert batch.images.shape == (3, 2, 3, 1)
        assert (batch.images.dtype, batch.labels.dtype, batch.mask.dtype) == (np.float32, np.int32, np.bool_)
    np.testing.assert_array_equal(last.images[:, 0, 0, 0], np.array([0.6, 0.8, 0.8], np.float32))
    np.testing.assert_array_equal(first.images[:, 1, 2, 0], np.array([0.0, 0.2, 0.4], np.float32))


def test_no_padding_where_none_is_needed():
    assert [batch.mask.tolist() for batch in batches(Numbers(4), 2)] == [[True, True]] * 2
    assert list(batches(Numbers(0), 2)) == []


def test_batches_do_not_share_memory():
    first, second = batches(Arrays(np.zeros((4, 1, 1, 3), np.float32)), 2)
    first.images[:] = 1
    assert second.images.max() == 0


def test_number_of_threads_changes_nothing():
    """Later items are ready first, and still come later."""
    damaged = {0, 6, 7, 8, 20}

    def run(workers):
        errors = []
        source = Numbers(21, damaged, delay=lambda i: 0.004 * (i % 3 == 0))
        return list(batches(source, 4, workers=workers, on_damaged=errors.append)), errors

    expected, expected_errors = run(1)
    assert [e.id for e in expected_errors] == ["n0", "n6", "n7", "n8", "n20"]
    assert list(itertools.chain(*(b.ids for b in expected))) == [f"n{i}" for i in range(21) if i not in damaged]
    for workers in (2, 8, 30, None):
        got, errors = run(workers)
        assert [str(e) for e in errors] == [str(e) for e in expected_errors]
        for a, b in zip(got, expected, strict=True):
            assert a.ids == b.ids
            for field in ("images", "labels", "mask"):
                np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


def test_damaged_items_warn_by_default():
    with pytest.warns(UserWarning, match="skipped n1: made so"):
        (batch,) = batches(Numbers(3, {1}), 2)
    assert batch.ids == ("n0", "n2")


@pytest.mark.parametrize("shard", [(0, 1), (1, 2)])
def test_all_damaged_gives_nothing(shard):
    errors = []
    assert list(batches(Numbers(5, range(5)), 2, on_damaged=errors.append, shard=shard)) == []
    assert [e.id for e in errors] == [f"n{i}" for i in range(shard[0], 5, shard[1])]


def test_other_errors_are_not_swallowed():
    class Broken(Numbers):
        def __getitem__(self, index: int, /) -> Example:
            if index == 3:
                raise RuntimeError("disk on fire")
            return super().__getitem__(index)

    walk = batches(Broken(9), 2, workers=2)
    assert next(walk).ids == ("n0", "n1")
    with pytest.raises(RuntimeError, match="disk on fire"):
        next(walk)


def test_shapes_must_agree():
    class Ragged(Numbers):
        def __getitem__(self, index: int, /) -> Example:
            return Example(np.zeros((2, 2 + index // 2, 3), np.float32), 0, f"n{index}")

    for batch_size in (2, 3):  # the odd one comes in a later batch, or in the same
        with pytest.raises(ValueError, match=r"n2 has the shape \[2, 3, 3\].*\[2, 2, 3\].*crop"):
            list(batches(Ragged(4), batch_size))


def test_reading_ahead_is_bounded_and_stops_with_the_consumer():
    source = Numbers(1000)
    walk = batches(source, 4, workers=2)
    next(walk)
    time.sleep(0.05)
    assert len(source.started) <= 4 + 4 + 2
    walk.close()  # type: ignore[attr-defined]
    started = len(source.started)
    time.sleep(0.05)
    assert len(source.started) == started
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("jaxinterp-data")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 1, "workers": 0}, "workers"),
        ({"batch_size": 1, "shard": (1, 1)}, "shard"),
        ({"batch_size": 1, "shard": (-1, 2)}, "shard"),
        ({"batch_size": 1, "shard": (0, 0)}, "shard"),
    ],
)
def test_refuses_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        batches(Numbers(3), **arguments)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), count=st.integers(0, 30), batch_size=st.integers(1, 7), shards=st.integers(1, 6))
def test_shards_cover_everything_once(data, count, batch_size, shards):
    damaged = data.draw(st.sets(st.integers(0, max(count - 1, 0))))
    good = [i for i in range(count) if i not in damaged]
    ids, errors, lengths = [], [], []
    for index in range(shards):
        walk = batches(Numbers(count, damaged), batch_size, workers=2, on_damaged=errors.append, shard=(index, shards))
        shard = list(walk)
        lengths.append(len(shard))
        mine = []
        for batch in shard:
            assert batch.images.shape == (batch_size, 2, 3, 1)
            assert batch.mask.tolist() == [name != "" for name in batch.ids]
            assert set(batch.labels.tolist()) <= {i + 100 for i in good}
            np.testing.assert_array_equal(
                batch.images,
                np.broadcast_to(((batch.labels - 100) / count)[:, None, None, None], batch.images.shape).astype(
                    np.float32
                ),
            )
            mine += [int(label) - 100 for label in batch.labels[batch.mask]]
        assert mine == [i for i in good if i % shards == index]
        # Every batch is full but the last one that holds an example.
        assert [int(batch.mask.sum()) for batch in shard[: len(mine) // batch_size]] == [batch_size] * (
            len(mine) // batch_size
        )
        ids += mine
    assert sorted(ids) == good
    assert sorted(int(error.id[1:]) for error in errors) == sorted(i for i in damaged if i < count)
    if shards == 1:
        assert lengths == [math.ceil(len(good) / batch_size)]
    else:
        assert set(lengths) == {math.ceil(math.ceil(count / shards) / batch_size) if good else 0}
