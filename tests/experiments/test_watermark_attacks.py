"""The experiment on watermarks: answers follow from the columns, the whole of it on two small pictures."""

import dataclasses
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from jaxinterp.data import Crop, samples
from jaxinterp.study import CONFIRMED, NOT_CONFIRMED, UNDECIDED

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("watermark_attacks")


def columns(script, success, queries):
    """Results of one variant, alike in all but success and queries."""
    size = len(success)
    made = {name: np.full(size, 0.5) for name in script.COLUMNS}
    return made | {"success": np.asarray(success, float), "queries": np.asarray(queries, float)}


def test_answers_follow_from_success_and_queries(script):
    half, all_, none = [1, 0] * 50, [1] * 100, [0] * 100
    few, many = [3] * 100, [100] * 100
    by = {
        "haar, pictures": columns(script, all_, few),
        "haar, noise": columns(script, half, [3, 100] * 50),
        "haar, random signs": columns(script, all_, few),
        "dct, pictures": columns(script, none, many),
        "dct, noise": columns(script, all_, few),
        "dct, random signs": columns(script, half, [3, 100] * 50),
    }
    seconds = {"seconds": 0.01, "slowest": 0.02, "fastest": 0.005, "repeats": 5}
    study = SimpleNamespace(found=SimpleNamespace(network=SimpleNamespace(image_size=32)))
    found = script.answers(study, by, np.zeros(100, bool), seconds, script.Watermarking())
    verdicts = {answer.claim: answer.verdict for answer in found}

    def verdict(start):
        [value] = [value for claim, value in verdicts.items() if claim.startswith(start)]
        return value

    assert verdict("haar: success above the published 95.47%") == CONFIRMED  # 100 of 100: from 96.4 %
    assert verdict("dct: success above the published 95.47%") == NOT_CONFIRMED
    assert verdict("haar: succeeds more often than the JPEG alone") == CONFIRMED
    assert verdict("dct: succeeds more often than the JPEG alone") == UNDECIDED  # both never
    assert verdict("haar: succeeds more often than pictures of noise") == CONFIRMED
    assert verdict("dct: succeeds more often than pictures of noise") == NOT_CONFIRMED
    assert verdict("haar: succeeds more often than random signs") == UNDECIDED
    assert verdict("haar: needs fewer queries than pictures of noise") == CONFIRMED
    assert verdict("dct: needs fewer queries than random signs") == NOT_CONFIRMED
    assert verdict("haar: 20 times as fast") == CONFIRMED  # 58.5 times even in the slowest run
    seconds["slowest"] = 0.5
    found = script.answers(study, by, np.zeros(100, bool), seconds, script.Watermarking())
    assert found[-1].verdict == UNDECIDED


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"failures": 0}, "--failures must be at least 1, got 0"),
        ({"quality": 101}, "--quality must be from 1 to 100, got 101"),
        ({"watermarks": Path("nowhere")}, "watermarks: no such folder: nowhere"),
        ({"model": "inception_v3"}, "the Haar transform needs sides that two divides, got 299 x 299 pixels"),
    ],
)
def test_bad_input_is_named(script, given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        script.main(dataclasses.replace(script.Watermarking(model="cifar10_cnn", out=tmp_path / "out"), **given))
    assert not (tmp_path / "out").exists()


@pytest.mark.exhaustive
def test_two_pictures_with_two_folders_of_watermarks(script, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "marks" / name).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / "marks" / name / "x.png")
    setting = script.Watermarking(
        pictures=tuple(samples("cifar10", crop=Crop(32)).paths[:2]),
        model="cifar10_cnn",
        cell=8,
        out=tmp_path / "run",
        labels="names",
        batch_size=2,
        watermarks=tmp_path / "marks",
        repeats=1,
    )
    script.main(setting)
    assert "haar, pictures" in capsys.readouterr().out
    folder = tmp_path / "run" / "watermark_attacks"
    record = json.loads((folder / "answers.json").read_text())
    assert record["config"]["folders"] == [1, 1]
    for name in script.VARIANTS:
        rounds = 2 if name.startswith("haar") else 10
        assert 2 <= record["results"]["variants"][name]["queries, median"] <= 1 + 2 * rounds
    part = dict(np.load(next((folder / "parts").glob("ifgsm*.npz"))))
    levels = part["found"][..., script.COLUMNS.index("levels")]
    assert (levels[np.isfinite(levels)] == 0).all()
    for figure in ("queries", "kinds", "likeness", "pictures"):
        assert (folder / f"{figure}.png").stat().st_size > 5_000
    script.main(setting)
    assert json.loads((folder / "answers.json").read_text()) == record
    with pytest.raises(ValueError, match=r"holds results of another config.*quality"):
        script.main(dataclasses.replace(setting, quality=50))
