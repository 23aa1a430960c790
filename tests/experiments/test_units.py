"""The experiments on units, on a small network, two pictures and a Broden-format set of a few crops."""

import csv
import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxinterp import broden
from jaxinterp.data import Crop, samples
from jaxinterp.study import CONFIRMED, NOT_CONFIRMED, UNDECIDED, Units

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
ATTACK = "ifgsm:steps=5,eps=0.1"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The scripts import one another, as they do when one of them is run."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Crops of three pictures of coloured fields."""
    pictures, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(3):
        fields = rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)
        Image.fromarray(np.kron(fields, np.ones((40, 40, 1), np.uint8))).save(pictures / f"fields{i}.png")
    out = tmp_path_factory.mktemp("sets") / "broden"
    broden.make([pictures], out, size=32, crops=4)
    return out


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The studies of all tests share a run and a dissection, as those of a user do."""
    return tmp_path_factory.mktemp("results")


@pytest.fixture
def setting(folder, results, monkeypatch) -> Units:
    """Two CIFAR-10 pictures."""
    monkeypatch.chdir(results)
    return Units(
        pictures=tuple(samples("cifar10", crop=Crop(32)).paths[:2]),
        model="cifar10_cnn",
        attack=(ATTACK,),
        cell=16,
        out=results / "run",
        labels="names",
        batch_size=2,
        data=folder,
        node=("conv2d_3",),
        quantile=0.02,
    )


def of(kind, setting, **more):
    return kind(**{field.name: getattr(setting, field.name) for field in dataclasses.fields(setting)} | more)


def answers(setting, name):
    record = json.loads((setting.out / name / "answers.json").read_text())
    assert record["study"] == name
    assert all(answer["verdict"] in (CONFIRMED, NOT_CONFIRMED, UNDECIDED) for answer in record["answers"])
    return record


def test_sensitivity_and_masking(setting):
    sensitivity = importlib.import_module("unit_sensitivity")
    sensitivity.main(of(sensitivity.Sensitive, setting, top=10))
    record = answers(setting, "unit_sensitivity")
    [found] = record["results"].values()
    with open(setting.out / "unit_sensitivity" / "units.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == found["units"]
    order = np.argsort([-float(row["plain"]) for row in rows], kind="stable")
    detectors = sum(rows[i]["detector"] == "true" for i in order[:10])
    assert found["plain"]["enrichment"]["found"] == detectors
    assert found["detectors"] == sum(row["detector"] == "true" for row in rows)
    assert -1 <= found["relative"]["rho with best IoU"]["mean"] <= 1
    with pytest.raises(ValueError, match="--top: expected 1 to"):
        sensitivity.main(of(sensitivity.Sensitive, setting, top=10_000))

    masking = importlib.import_module("neuron_masking")
    chosen = of(masking.Masking, setting, numbers=(0, 8, found["units"]), draws=2)
    masking.main(chosen)
    record = answers(setting, "neuron_masking")
    accuracy = record["results"]["accuracy"][ATTACK]
    assert set(accuracy) == {"natural images", "fixed images", "adaptive images"}
    natural = {
        group: [float(text.split()[0]) for text in series if text != "-"]  # there may be fewer detectors than that
        for group, series in accuracy["natural images"].items()
    }
    assert natural["sensitive"][0] == natural["random"][0] == 1.0
    # Without any unit left the logits are the same for every image.
    assert natural["sensitive"][-1] == natural["insensitive"][-1] == natural["random"][-1] <= 0.5
    assert set(accuracy["adaptive images"]) == {"sensitive", "insensitive", "detectors", "others", "random"}
    fixed, adaptive = (
        [float(t.split()[0]) for t in accuracy[f"{k} images"]["sensitive"]] for k in ("fixed", "adaptive")
    )
    assert adaptive[0] == fixed[0]  # nothing is silenced: the same attack
    parts = sorted((setting.out / "neuron_masking" / "parts").glob("*.npz"))
    before = {path: path.stat().st_mtime_ns for path in parts}
    masking.main(chosen)
    assert {path: path.stat().st_mtime_ns for path in parts} == before
    with pytest.raises(ValueError, match="--numbers: expected 0 to"):
        masking.main(of(masking.Masking, setting, numbers=(0, 10_000)))


def test_without_a_success_claims_stay_open(setting, tmp_path):
    weak = {"attack": ("ifgsm:steps=1,eps=0.00001",), "out": tmp_path / "out"}
    sensitivity, masking = (importlib.import_module(name) for name in ("unit_sensitivity", "neuron_masking"))
    sensitivity.main(dataclasses.replace(of(sensitivity.Sensitive, setting, top=10), **weak))
    masking.main(dataclasses.replace(of(masking.Masking, setting, numbers=(0, 8), draws=1), **weak))
    for name, count in (("unit_sensitivity", 5), ("neuron_masking", 1)):
        told = json.loads((tmp_path / "out" / name / "answers.json").read_text())["answers"]
        assert [answer["verdict"] for answer in told] == [UNDECIDED] * count
        assert {answer["measured"] for answer in told} == {"no picture was attacked with success"}
    with pytest.raises(ValueError, match="--numbers: expected at least one"):
        masking.main(of(masking.Masking, setting, numbers=()))


def test_layers_and_rotations(setting):
    layers = importlib.import_module("dissect_layers")
    layers.main(of(Units, setting, node=("conv2d", "conv2d_3")))
    record = answers(setting, "dissect_layers")
    assert list(record["results"]) == ["conv2d", "conv2d_3"]
    for found in record["results"].values():
        most = {c: sum(n["detectors"] for n in found[c].values()) for c in ("best", "category")}
        assert most["best"] <= most["category"]
    with pytest.raises(ValueError, match="--node: expected at least two layers"):
        layers.main(setting)

    rotations = importlib.import_module("random_rotation")
    rotations.main(of(rotations.Rotations, setting, rotations=2, amounts=(0.5,)))
    record = answers(setting, "random_rotation")
    assert record["results"]["amounts"] == [0.0, 0.5, 1.0]
    assert record["answers"][-1]["verdict"] == CONFIRMED  # the same function
    units = np.array(record["results"]["units that detect"])
    assert units.shape == (2, 3)
    assert units[0, 0] == units[1, 0]


def test_rotations():
    rotation = importlib.import_module("random_rotation").rotation
    whole, half = rotation(12, 3, 1.0), rotation(12, 3, 0.5)
    for turn in (whole, half):
        np.testing.assert_allclose(turn @ turn.T, np.eye(12), atol=1e-5)
        assert np.linalg.det(turn.astype(np.float64)) == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(half @ half, whole, atol=1e-4)
    np.testing.assert_array_equal(rotation(12, 3, 0.0), np.eye(12))
    assert np.abs(whole - rotation(12, 4, 1.0)).max() > 0.1
