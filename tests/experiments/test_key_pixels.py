"""The study of key pixels: what is equal success, and answers that follow from the arrays."""

import dataclasses
import importlib
from pathlib import Path

import numpy as np
import pytest

from jaxinterp.study import CONFIRMED, NOT_CONFIRMED, UNDECIDED
from jaxinterp.training.generated import Squares

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
MODELS = ("detector_meso", "detector_residual")
COUNT = 24
PICTURES = np.repeat([f"{i}.png" for i in range(6)], 4)


@pytest.fixture
def study(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("key_pixels")


def table(study, **more):
    """Key pixels of L2 1 on 2 % of the pixels; others succeed from the third strength on, of L2 4 on all pixels."""
    vary = np.repeat(np.linspace(0.9, 1.1, 6), 4)[:, None]
    found = {}
    for attack, strengths in study.STRENGTHS.items():
        many = len(strengths)
        mine = attack in study.KEYS
        success = np.ones((COUNT, many), bool) if mine else np.tile(np.arange(many) >= 2, (COUNT, 1))
        found |= {
            f"{attack}/success": success,
            f"{attack}/l0": np.where(success, 0.02 * vary if mine else 1.0, 0),
            f"{attack}/l2": np.where(success, vary if mine else 4 * vary * (1 + np.arange(many)) / 3, 0),
            f"{attack}/errs": np.stack([success, success & (np.arange(many) >= (2 if mine else 4))], axis=-1),
        }
    right = {name: np.ones(COUNT, bool) for name in MODELS}
    return study.Table(MODELS[0], {**found, **more}, right, PICTURES, 0)


def test_equal_success_is_the_weakest_strength_that_suffices(study):
    found = table(study)
    assert found.at_rate("PGD", 1.0) == 2
    assert found.at_rate("PGD", 0.0) == 0
    assert found.at_rate("PGD", 1.0, MODELS[1]) == 4
    np.testing.assert_allclose(found.first("PGD", "l2"), 4 * np.repeat(np.linspace(0.9, 1.1, 6), 4))
    success = np.tile(np.arange(9) >= 2, (COUNT, 1))
    success[:4] = np.arange(9) >= 5  # one picture is harder
    harder = table(study, **{"PGD/success": success})
    assert harder.at_rate("PGD", 1.0) == 5
    assert harder.at_rate("PGD", 20 / 24) == 2
    assert np.isnan(table(study, **{"PGD/success": success & False}).first("PGD", "l2")).all()


def test_squares_that_were_wrong_before_do_not_count(study):
    found = table(study)
    right = {MODELS[0]: np.arange(COUNT) >= 4, MODELS[1]: np.arange(COUNT) >= 8}
    found = dataclasses.replace(found, right=right)
    assert found.share(found.deceived("PGD", 3)).count == 5  # pictures
    assert found.share(found.deceived("PGD", 3, MODELS[1])).count == 4
    assert found.transferred("PGD", MODELS[1]).count == 4
    assert found.transferred("PGD", MODELS[1]).mean == 0  # at its own weakest strength
    assert found.mean(found.first("PGD", "l2")).count == 5


def test_rates_have_the_spread_of_pictures_and_not_of_squares(study):
    success = np.tile(np.arange(9) >= 2, (COUNT, 1))
    success[:8] = np.arange(9) >= 5  # two of six pictures are harder
    found = table(study, **{"PGD/success": success})
    share = found.share(found.deceived("PGD", 3))
    assert found.rate("PGD", 3) == pytest.approx(share.mean) == pytest.approx(4 / 6)
    assert share.high - share.low > 0.6  # of 24 squares it would be 0.4
    everyone = found.share(found.deceived("PGD", 8))
    assert (everyone.mean, everyone.high) == (1, 1)
    assert everyone.low < 0.6


def test_answers_follow_from_l0_and_l2(study):
    by = {answer.claim: answer for answer in table(study).answers()}

    def one(*words):
        [found] = [answer for claim, answer in by.items() if all(word in claim for word in words)]
        return found

    assert one("L0", "PGD at each square's own").verdict == CONFIRMED
    assert one("L2", "PGD at each square's own").verdict == CONFIRMED
    assert "0.25 times" in one("L2", "PGD at the radius").measured
    assert one(MODELS[1], "L2", "PGD").verdict == CONFIRMED
    assert "deceived 1.00" in one(MODELS[1], "L2", "PGD").measured
    closer = np.where(np.arange(9) >= 2, 1.5 * np.ones((COUNT, 1)), 0)  # less, but not well below
    by = {a.claim: a for a in table(study, **{"MI-FGSM/l2": closer}).answers()}
    assert one("L2", "MI-FGSM at each square's own").verdict == NOT_CONFIRMED
    never = {"PGD/success": np.zeros((COUNT, 9), bool), "PGD/errs": np.zeros((COUNT, 9, 2), bool)}
    by = {a.claim: a for a in table(study, **never).answers()}
    assert one("L2", "PGD at the radius").verdict == UNDECIDED
    assert one(MODELS[1], "L2", "PGD").verdict == UNDECIDED


def test_the_first_squares_of_every_picture_are_attacked(study):
    names = [f"{name}_{k:02d}" for name in ("a_1.png", "b.png") for k in range(4)]
    ids = tuple(f"{name}_{what}" for name in names for what in ("real", "splice"))
    squares = Squares(np.zeros((16, 32, 32, 3), np.uint8), np.tile(np.array([0, 1], np.int32), 8), ids)
    found = study.chosen(squares, 2)
    assert found.ids == (*ids[:4], *ids[8:12])
    assert set(found.pictures) == {"a_1.png", "b.png"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"crops": 31}, "--crops must be at most 30, got 31"),
        ({"eps": -1.0}, "KeyPixels.eps must be finite and not negative, got -1.0"),
        ({"rho": 1.5}, "KeyPixels.rho must be from 0 to 1, got 1.5"),
        ({"cell": 33}, "cells must be from 1 pixel to the image's 32 x 32"),
        ({"seed": -1}, "--seed must be from 0 to"),
    ],
)
def test_bad_input_is_named(study, tmp_path, monkeypatch, given, message):
    monkeypatch.setattr(study.generated, "make", lambda *_: pytest.fail("the set is made"))
    with pytest.raises(ValueError, match=message):
        study.main(study.Keys(out=tmp_path, **given))


def test_no_training_of_detectors_is_no_number_of_epochs(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    script = importlib.import_module("train_detectors")
    monkeypatch.setattr(script.generated, "make", lambda *_: pytest.fail("the set is made"))
    with pytest.raises(ValueError, match="--epochs must be at least 1, got 0"):
        script.main(tmp_path, tmp_path, epochs=0)
