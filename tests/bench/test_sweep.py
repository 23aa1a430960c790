"""Batch sizes: the limit is found, programs that would not fit are not run, what gives out in spite of that counts."""

import time

import jax
import pytest

from jaxinterp.bench.sweep import Trial, ending, lines, sweep


def machine(ran, *, fixed=0, each: int | None = 10, fails=None, seconds=0.0):
    """Programs of fixed + each x batch bytes; those above `fails` give out when they run."""

    def make(batch):
        def run():
            if fails is not None and batch > fails:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
            ran.append(batch)
            time.sleep(seconds * batch)

        return Trial(None if each is None else fixed + each * batch, run, 3.0 * batch)

    return make


def test_the_limit_is_found_without_running_beyond_it():
    ran = []
    found = sweep(machine(ran, each=10), limit=1000, rounds=1)  # 900 are used: 90 images
    assert found.ended == "memory"
    assert found.largest in range(78, 91)
    assert max(ran) == found.largest
    assert [row["batch"] for row in found.rows][:7] == [1, 2, 4, 8, 16, 32, 64]
    assert f"0.0 MiB: {found.largest} (to within an eighth)" in ending(found)


def test_memory_that_gives_out_while_running():
    ran = []
    found = sweep(machine(ran, each=None, fails=20), limit=10**9, rounds=1)
    assert found.ended == "memory"
    assert found.largest in range(18, 21)
    assert max(ran) == found.largest
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        sweep(lambda batch: Trial(None, lambda: _fail(), 1.0), limit=1, rounds=1)


def _fail():
    raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_ending_before_the_limit_predicts_it():
    found = sweep(machine([], fixed=500, each=10), limit=10_000, largest=8, rounds=1)
    assert (found.ended, found.largest, found.predicted) == ("largest", None, 850)
    assert [row["batch"] for row in found.rows] == [1, 2, 4, 8]
    assert "850 would fit" in ending(found)
    slow = sweep(machine([], seconds=0.005), limit=10**6, seconds=0.015, rounds=1)
    assert slow.ended == "time"
    assert slow.rows[-1]["batch"] == 4


def test_throughput():
    [row] = sweep(machine([], seconds=0.05), limit=10**6, largest=1, rounds=1).rows
    assert row["per_second"] == pytest.approx(3.0 / row["seconds"]["median"])
    assert 30 < row["per_second"] <= 60


def test_given_sizes_are_tried_in_order():
    ran = []
    told = []
    found = sweep(machine(ran, each=10), limit=1000, rounds=1, batches=(64, 8, 256, 512), told=told.append)
    assert told == found.rows
    assert "memory: the next does not fit" in ending(found)
    assert [row["batch"] for row in found.rows] == [8, 64]
    assert (found.ended, found.largest) == ("memory", None)
    assert set(ran) == {8, 64}
    with pytest.raises(ValueError, match="not even a batch of 8 fits"):
        sweep(machine([], each=10), limit=10, batches=(16, 8))


def test_others_run_beside_each():
    def make(batch):
        def other():
            if batch > 2:
                raise RuntimeError("CUDA out of memory. Tried to allocate 1 bytes")
            time.sleep(0.06)

        return Trial(batch, lambda: time.sleep(0.02), batch, lambda: {"a peer": other})

    found = sweep(make, limit=10**6, rounds=1, batches=(2, 4))
    first, second = (row["others"]["a peer"] for row in found.rows)
    assert 2 < first["over"]["median"] < 4
    assert first["per_second"] == pytest.approx(found.rows[0]["per_second"] / first["over"]["median"])
    assert second is None
    assert lines(found.rows[1], "images")[1].strip() == "a peer: out of memory"
    assert "times our time" in lines(found.rows[0], "images")[1]

    def fails(batch):
        return Trial(1, lambda: None, 1.0, lambda: {"a peer": lambda: 1 / 0})

    with pytest.raises(ZeroDivisionError):
        sweep(fails, limit=10, batches=(1,))


def test_not_even_one():
    with pytest.raises(ValueError, match="--memory: not even a batch of one fits into 10 bytes"):
        sweep(machine([], each=10), limit=10)
