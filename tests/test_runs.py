"""Results directories: whole files only, resume with the same config, refusal of another, tables that read back."""

import csv
import os

import numpy as np
import pytest

from jaxinterp.runs import Run, replacing

CONFIG = {"model": "m", "attacks": {"cw": {"steps": 3, "lr": 0.01}}, "cell": 14}


def test_the_same_config_continues_and_parts_read_back(tmp_path):
    run = Run(tmp_path / "r", CONFIG)
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "names": np.array(["x", "yy"])}
    run.write_part("one", arrays)
    again = Run(tmp_path / "r", CONFIG)
    back = again.read_part("one")
    assert back is not None
    assert back.keys() == arrays.keys()
    for key, value in arrays.items():
        assert back[key].dtype == value.dtype
        np.testing.assert_array_equal(back[key], value)
    assert again.read_part("two") is None


def test_another_config_is_refused_and_the_difference_named(tmp_path):
    Run(tmp_path / "r", CONFIG)
    other = {**CONFIG, "attacks": {"cw": {"steps": 4, "lr": 0.01}}}
    with pytest.raises(ValueError, match=r"attacks\.cw\.steps: 3 there, 4 asked") as caught:
        Run(tmp_path / "r", other)
    assert "lr" not in str(caught.value)
    assert "cell" not in str(caught.value)


def test_a_directory_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not a results directory"):
        Run(tmp_path, CONFIG)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="not a directory"):
        Run(file, CONFIG)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        Run(damaged, CONFIG)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 truncated", b"not a zip"])
def test_a_damaged_part_counts_as_unfinished(tmp_path, damage):
    run = Run(tmp_path / "r", CONFIG)
    run.write_part("one", {"a": np.ones(4)})
    path = tmp_path / "r" / "parts" / "one.npz"
    path.write_bytes(damage)
    assert run.read_part("one") is None


def test_a_part_with_a_flipped_bit_is_whole_or_unfinished(tmp_path):
    run = Run(tmp_path / "r", CONFIG)
    arrays = {"images": np.arange(6, dtype=np.float32).reshape(2, 3), "success": np.array([True, False])}
    run.write_part("one", arrays)
    path = tmp_path / "r" / "parts" / "one.npz"
    content = path.read_bytes()
    damaged = 0
    for bit in range(0, 8 * len(content), 3):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        found = run.read_part("one")
        damaged += found is None
        if found is not None:
            assert found.keys() == arrays.keys()
            assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
    assert damaged > len(content)
    with open(path, "wb") as file:
        np.save(file, np.ones(3))
    assert run.read_part("one") is None


def test_a_part_that_an_older_version_wrote_is_read(tmp_path):
    run = Run(tmp_path / "r", CONFIG)
    run.write_part("one", {"a": np.zeros(1)})
    np.savez(tmp_path / "r" / "parts" / "one.npz", a=np.ones(2))
    found = run.read_part("one")
    assert found is not None
    assert {**found}.keys() == {"a"}


def test_a_part_with_a_pickle_is_not_unpickled(tmp_path):
    run = Run(tmp_path / "r", CONFIG)
    run.write_part("one", {"a": np.ones(1)})
    np.savez(tmp_path / "r" / "parts" / "one.npz", a=np.array([{"an": "object"}], dtype=object))
    assert run.read_part("one") is None


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")

    def fail():
        with replacing(path) as file:
            file.write(b"half of the ")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["table.csv"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    run = Run(tmp_path / "r", CONFIG)
    (run.directory / "parts").mkdir()
    left, young, other = (run.directory / "parts" / name for name in (".a.npz.ab12_xyz", ".b.npz.00000000", ".keep"))
    for path in (left, young, other):
        path.write_bytes(b"half")
    for path in (left, other, run.directory / "config.json"):
        os.utime(path, (1e9, 1e9))
    run.remove_left_over()
    assert [path.exists() for path in (left, young, other)] == [False, True, True]
    assert (run.directory / "config.json").exists()
    with pytest.raises(FileNotFoundError), replacing(run.directory / "c.npz"):  # these are the names it gives
        run.remove_left_over(age=-1.0)
    assert not young.exists()


def test_a_table_reads_back_to_the_same_float32(tmp_path, rng):
    run = Run(tmp_path / "r", CONFIG)
    values = rng.standard_normal(50).astype(np.float32) * np.float32(10.0) ** rng.integers(-20, 20, 50).astype(
        np.float32
    )
    rows = [{"x": v, "n": np.int32(i), "name": 'a "quoted", name', "ok": np.bool_(i % 2)} for i, v in enumerate(values)]
    path = run.write_table("t.csv", ["name", "x", "n", "ok", "absent"], [*rows, {"x": np.float32("nan"), "n": None}])
    with open(path, newline="") as file:
        back = list(csv.DictReader(file))
    np.testing.assert_array_equal(np.array([row["x"] for row in back[:-1]], np.float32), values)
    assert back[3]["name"] == 'a "quoted", name'
    assert back[3]["ok"] == "true"
    assert back[4]["n"] == "4"
    assert back[-1]["x"] == back[-1]["n"] == back[0]["absent"] == ""
    infinite = run.write_table("i.csv", ["x"], [{"x": np.float32("inf")}, {"x": -np.inf}])
    assert infinite.read_text() == "x\ninf\n-inf\n"
