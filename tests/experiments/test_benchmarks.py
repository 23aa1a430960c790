"""The benchmarks, with tiny settings: what they compare is the same thing, and what they record is complete."""

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxinterp import data, models
from jaxinterp.weights import files, seeded
from jaxinterp.weights.names import from_jax_shape

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture(autouse=True)
def neighbours(monkeypatch):
    """The scripts import one another, as they do when one of them is run."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXPERIMENTS.parent), os.environ.get("PYTHONPATH", "")]))


def record(path: Path) -> dict:
    [line] = path.read_text().splitlines()
    found = json.loads(line)
    assert {"benchmark", "time", "cpu", "cores", "versions"} <= set(found)
    assert {"jax", "flax"} <= set(found["versions"])
    return found


@pytest.fixture
def without_torch(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("torch") else find_spec(name))


@pytest.mark.usefixtures("without_torch")
def test_zoo(tmp_path, capsys):
    bench = importlib.import_module("bench_zoo")
    assert all(name in models.ARCHITECTURES for name in bench.NETWORKS)
    bench.main(("small_cnn", "carlini_mnist"), batch=2, rounds=2, out=tmp_path / "r.jsonl")
    printed = capsys.readouterr().out
    assert "torch is not installed" in printed
    rows = record(tmp_path / "r.jsonl")["results"]
    assert [(row["network"], row["size"], row["what"]) for row in rows] == [
        (name, size, what)
        for name, size in (("small_cnn", 32), ("carlini_mnist", 28))
        for what in ("forward", "input gradient")
    ]
    for row in rows:
        assert set(row["seconds"]) == {"jax", "canonical"}
        assert all(0 < each["low"] <= each["median"] <= each["high"] for each in row["seconds"].values())


def test_zoo_programs_compute_what_they_say():
    bench = importlib.import_module("bench_zoo")
    images = jnp.asarray(seeded.images(2, 16))
    model = models.network("small_cnn").bind(jax.tree.map(jnp.asarray, seeded.params(models.shapes("small_cnn"))))
    programs = bench.jax_programs("small_cnn", images)
    for run in programs["forward"].values():
        np.testing.assert_allclose(run(), model(images), rtol=1e-5, atol=1e-6)
    direction = np.random.default_rng(1).normal(size=images.shape).astype(np.float32)
    step = np.float32(1e-4)
    slope = (model(images + step * direction) - model(images - step * direction)).sum() / (2 * step)
    for run in programs["input gradient"].values():
        assert np.vdot(run(), direction) == pytest.approx(float(slope), rel=2e-2)


def test_conversion(tmp_path, capsys):
    bench = importlib.import_module("bench_conversion")
    tensors = {
        name: seeded.tensor(name, from_jax_shape(spec.shape)) for name, spec in models.shapes("small_cnn").items()
    }
    bench.save(tensors, tmp_path / "net.pth")
    found = files.read(tmp_path / "net.pth")
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor, strict=True)
    with pytest.raises(RuntimeError, match="ended with 3"):
        bench.measured([sys.executable, "-c", "raise SystemExit(3)"])
    _, small = bench.measured([sys.executable, "-c", "pass"])
    _, large = bench.measured([sys.executable, "-c", "b'x' * 100_000_000"])
    assert 95 < large - small < 105
    bench.main("small_cnn", rounds=1, out=tmp_path / "r.jsonl")
    figures = record(tmp_path / "r.jsonl")
    assert figures["file_megabytes"] == pytest.approx(sum(t.nbytes for t in tensors.values()) / 1e6, abs=0.01)
    assert figures["peak_megabytes"]["median"] > figures["libraries_megabytes"] > 100
    assert "target <= 20" in capsys.readouterr().out


def test_decode(tmp_path, capsys):
    """Both ways give the same pixels, for upright pictures, too, and for a last batch that is not full."""
    bench = importlib.import_module("bench_decode")
    bench.write_pictures(tmp_path, 5, 60, 90)
    crop = data.Crop(24, 0.875, "bilinear")
    paths = sorted(tmp_path.iterdir())
    by_pil = np.concatenate(bench.by_pil(paths, crop, 2))
    assert by_pil.shape == (5, 24, 24, 3)
    np.testing.assert_array_equal(by_pil, np.concatenate(bench.by_folder(tmp_path, crop, 2)), strict=True)
    with Image.open(paths[0]) as picture:
        whole = picture.resize((27, 40), Image.Resampling.BILINEAR)
        expected = np.asarray(whole.crop((2, 8, 26, 32)), np.float32) / np.float32(255)
    np.testing.assert_array_equal(by_pil[0], expected)
    bench.main(count=6, width=40, height=30, size=16, batch=4, rounds=2, out=tmp_path / "r.jsonl")
    figures = record(tmp_path / "r.jsonl")
    assert set(figures["rates"]) == {"pil", "folder"}
    assert figures["share"]["median"] > 0
    assert "target >= 0.9" in capsys.readouterr().out


@pytest.mark.exhaustive
@pytest.mark.usefixtures("without_torch")
def test_attacks(tmp_path, capsys):
    bench = importlib.import_module("bench_attacks")
    bench.overhead(("small_cnn",), rounds=2, out=tmp_path / "overhead.jsonl")
    [row] = record(tmp_path / "overhead.jsonl")["results"]
    assert set(row["seconds"]) == {"jaxinterp", "gradients", "gradients, rewritten", "forward"}
    assert all(ratio["median"] > 0 for ratio in row["ratios"].values())
    bench.quality(("small_cnn",), search_steps=2, steps=12, rounds=1, out=tmp_path / "quality.jsonl")
    lines = (tmp_path / "quality.jsonl").read_text().splitlines()  # one for every network and attack
    rows = [row for line in lines for row in json.loads(line)["results"]]
    assert [row["attack"] for row in rows] == ["cw", "ead"]
    for row in rows:
        assert 0 < row["early"]["gradients"] <= row["as foolbox"]["gradients"] <= 8 * 2 * 12
    bench.compile_times("small_cnn", size=16, batch=2, names=("fgsm",), rounds=1, out=tmp_path / "compile.jsonl")
    figures = record(tmp_path / "compile.jsonl")
    assert 0 < figures["gradient"] < 60
    assert set(figures["results"]) == {"fgsm"}
    assert "target <= 2.5" in capsys.readouterr().out


@pytest.mark.usefixtures("without_torch")
def test_effect(tmp_path, capsys):
    bench = importlib.import_module("bench_effect")
    bench.main(("small_cnn",), ("small_cnn",), batch=2, sampled=16, rounds=2, out=tmp_path / "r.jsonl")
    assert "torch is not installed" in capsys.readouterr().out
    found = record(tmp_path / "r.jsonl")
    [effects], [maps] = found["effects"], found["maps"]
    assert effects["equal bit for bit"]
    assert effects["cells"] == 256
    assert effects["arithmetic saved"] > 1
    assert set(effects["seconds"]) == {"windows", "whole"}
    assert effects["whole / windows"]["median"] > 0
    for ratio in ("CAM, 1 class / forward", "CAM, 10 classes / forward", "50 gradients / integrated gradients"):
        assert maps[ratio]["median"] > 0
