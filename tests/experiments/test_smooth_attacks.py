"""The study of smooth attacks: what is flat, what is rough, and the whole of it on two small pictures."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from jaxinterp.data import Crop, samples
from jaxinterp.study import CONFIRMED, NOT_CONFIRMED, UNDECIDED

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture
def study(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("smooth_attacks")


def half_and_half(side: int = 48) -> np.ndarray:
    """Flat on the left, noise on the right."""
    image = np.full((side, side, 3), 0.5, np.float32)
    image[:, side // 2 :] = np.random.default_rng(0).uniform(0, 1, (side, side // 2, 3))
    return image


def test_areas_and_windows_are_where_the_picture_is_flat_and_textured(study):
    image = half_and_half()
    found = study.areas(image)
    for name, columns in (("flat", slice(24, None)), ("textured", slice(0, 24))):
        assert found[name].mean() == pytest.approx(0.3, abs=0.01)
        assert not found[name][:, columns].any()
    windows = study.windows(image)
    for name, (row, column, side) in windows.items():
        assert 0 <= row <= 48 - side
        assert side == 8
        assert column + side <= 24 if name == "flat" else column >= 23
    assert study.roughness(image)[:, :20].max() == pytest.approx(0, abs=1e-4)


def test_variation_is_the_mean_change_between_neighbours_inside_an_area(study):
    rows, columns = np.indices((6, 5)).astype(float)
    delta = (2 * rows + 3 * columns)[..., None]
    area = np.zeros((6, 5), bool)
    area[1:4, 2:4] = True  # four pairs down, three across
    assert study.variation(delta, area) == pytest.approx((4 * 2 + 3 * 3) / 7)
    delta[0] = 100  # outside
    assert study.variation(delta, area) == pytest.approx((4 * 2 + 3 * 3) / 7)
    assert study.variation(delta, np.zeros_like(area)) == 0


def test_a_pair_is_compared_picture_by_picture(study):
    rough = {
        "success": np.array([True] * 8),
        "l2": np.linspace(1, 2, 8),
        "variation": np.linspace(0.1, 0.2, 16).reshape(8, 2),
    }
    smooth = {"success": rough["success"], "l2": rough["l2"] * 0.9, "variation": rough["variation"] * [0.25, 0.5]}
    smooth["variation"] *= np.stack([np.linspace(1.1, 0.9, 8), np.linspace(0.9, 1.1, 8)], 1)
    answers = study.compared("s", "r", {"s": smooth, "r": rough}, seed=0)
    # That as many of eight succeed is no proof of at most ten points less.
    assert [answer.verdict for answer in answers] == [UNDECIDED] + [CONFIRMED] * 4
    assert "0.90 times" in answers[1].measured
    assert "0.25 times" in answers[2].measured
    answers = study.compared("r", "s", {"s": smooth, "r": rough}, seed=0)
    assert [answer.verdict for answer in answers] == [UNDECIDED] + [NOT_CONFIRMED] * 4
    many = {"success": np.array([True] * 40), "l2": np.ones(40), "variation": np.ones((40, 2))}
    assert study.compared("m", "m", {"m": many}, 0)[0].verdict == CONFIRMED
    nothing = {**smooth, "success": np.array([False] * 8)}
    assert [answer.verdict for answer in study.compared("n", "r", {"n": nothing, "r": rough}, 0)] == [NOT_CONFIRMED]


def test_transfer_leaves_out_a_damaged_picture(study, tmp_path):
    (tmp_path / "a.png").write_text("not a picture")
    pictures = (str(tmp_path / "a.png"), *samples("cifar10", crop=Crop(32)).paths[:2])
    found = study.clean_pictures(study.Smooth(pictures), study.jaxinterp.models.network("cifar10_cnn"))
    assert [*found] == [Path(path).name for path in pictures[1:]]
    assert all(image.shape == (32, 32, 3) for image in found.values())


@pytest.mark.exhaustive
def test_the_whole_study_on_two_pictures(study, tmp_path):
    pictures = tuple(samples("cifar10", crop=Crop(32)).paths[:2])
    setting = study.Smooth(
        pictures=pictures,
        model="cifar10_cnn",
        cell=8,
        out=tmp_path / "run",
        labels="names",
        batch_size=2,
        steps=3,
        search_steps=1,
        search_iterations=20,
        transfer=("cifar10_cnn",),
        drawn=1,
    )
    study.main(setting)
    folder = tmp_path / "run" / "smooth_attacks"
    record = json.loads((folder / "answers.json").read_text())
    assert all(answer["verdict"] in (CONFIRMED, NOT_CONFIRMED, UNDECIDED) for answer in record["answers"])
    assert set(record["results"]["attacks"]) == set(study.specs(setting, 32))
    assert set(record["results"]["transfer"]) == set(study.TRANSFERRED)
    for name in ("variation.png", "kinds.png", "transfer.png"):
        assert (folder / name).stat().st_size > 5_000
    with pytest.raises(ValueError, match="--attack: this study chooses its attacks"):
        study.main(study.Smooth(attack=("cw",), out=tmp_path / "other"))
