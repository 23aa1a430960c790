"""Records: read back, compared, and refused where they are none."""

import importlib.metadata
import json

import pytest

from jaxinterp import precision
from jaxinterp.bench import records


def record(path, times, benchmark="bench attacks", **more):
    rows = [
        {"name": name, "seconds": {"median": m, "low": low, "high": high}} for name, (low, m, high) in times.items()
    ]
    records.append(path, benchmark, {"results": rows, **more})


def test_the_last_record_of_each_counts(tmp_path, capsys):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    record(a, {"pgd float32": (9.0, 9.0, 9.0)}, device="cpu")
    record(a, {"pgd float32": (0.9, 1.0, 1.1), "cw": (1.0, 2.0, 3.0), "same": (1.0, 1.5, 2.0)}, device="cpu")
    record(b, {"pgd float32": (0.4, 0.5, 0.6), "same": (1.9, 2.0, 2.1), "new": (1.0, 1.0, 1.0)}, device="H200")
    record(b, {"x": (1.0, 1.0, 1.0)}, benchmark="bench cam")
    text = records.compare(a, b)
    assert f"appended to {a}" in capsys.readouterr().out
    assert "bench attacks" in text
    assert "bench cam" not in text
    [pgd] = [line for line in text if "pgd" in line]
    assert pgd.split() == ["pgd", "float32", "1000.00", "ms", "->", "500.00", "ms", "x", "0.50", "faster"]
    [same] = [line for line in text if "same" in line]
    assert same.endswith("x 1.33   within spread")
    assert "  note: device: cpu in A, H200 in B" in text
    assert "  only in A: cw" in text
    assert "  only in B: new" in text
    [back] = [line for line in records.compare(b, a) if "pgd" in line]
    assert back.endswith("x 2.00   slower")


def test_what_a_record_says(tmp_path):
    path = tmp_path / "deep" / "r.jsonl"
    with precision.using("highest"):
        records.append(path, "x", {"a": 1})
    [found] = records.read(path)
    assert found["benchmark"] == "x"
    assert found["matmul_precision"] == "highest"
    assert {"time", "cpu", "cores", "system", "versions", "a"} <= set(found)
    assert {"python", "jax", "flax"} <= set(found["versions"])
    assert records.read(path) == [json.loads(path.read_text())]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no record"),
        ('{"benchmark": "x"}\n{"bench', "line 2 is not JSON"),
        ("[1]\n", "line 1 is no record"),
        ('{"benchmark": "network", "results": {}}', "no measurement in common"),
    ],
)
def test_files_that_hold_none(text, message, tmp_path):
    whole, broken = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    record(whole, {"pgd": (1.0, 1.0, 1.0)})
    broken.write_text(text)
    with pytest.raises(ValueError, match=message):
        records.compare(whole, broken)
    with pytest.raises(FileNotFoundError):
        records.compare(whole, tmp_path / "none")


def test_a_source_tree_that_is_not_installed_is_recorded(tmp_path, monkeypatch):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    record(tmp_path / "r.jsonl", {"pgd": (1.0, 1.0, 1.0)})
    [found] = records.read(tmp_path / "r.jsonl")
    assert found["versions"]["jaxinterp"] == "not installed as a package"


def test_variables_that_change_times_are_recorded_and_compared(tmp_path, monkeypatch):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    record(a, {"pgd": (1.0, 1.0, 1.0)})
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=")
    record(b, {"pgd": (1.0, 1.0, 1.0)})
    assert records.read(a)[0]["environment"] == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    [note] = [line for line in records.compare(a, b) if "note" in line and "environment" in line]
    assert "ynn_fusion_type" in note
