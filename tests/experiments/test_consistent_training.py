"""The experiments on consistent training and on ensembles: answers follow from the numbers; bad input is named."""

import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest

import jaxinterp
from jaxinterp.statistics import Estimate, student_mean
from jaxinterp.study import CONFIRMED, NOT_CONFIRMED, UNDECIDED

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def training(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("consistent_training")


@pytest.fixture
def ensembles(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("ensemble_attack")


def test_answers_follow_from_the_measures(training):
    rng = np.random.default_rng(0)

    def seeds(*means):
        columns = dict(zip(training.MEASURES, means, strict=True))
        return [{name: value + 0.001 * rng.normal() for name, value in columns.items()} for _ in range(5)]

    found = {
        "standard": seeds(0.95, 0.1, 0.8, 0.7, 3, 2),
        "adversarial": seeds(0.95, 0.6, 0.8, 0.75, 3, 2),
        "consistent": seeds(0.90, 0.5, 0.9, 0.75, 4, 2),
    }
    verdicts = {answer.claim: answer.verdict for answer in training.answers(found)}

    def verdict(end):
        [value] = [value for claim, value in verdicts.items() if claim.endswith(end)]
        return value

    assert verdict("standard: levels are lower on adversarial pictures") == CONFIRMED
    assert verdict("consistent against standard: more accurate under PGD") == CONFIRMED
    assert verdict("consistent against adversarial: more accurate under PGD") == NOT_CONFIRMED
    assert verdict("less than a point of clean accuracy lost") == NOT_CONFIRMED
    assert verdict("consistent against standard: higher level on clean pictures") == CONFIRMED
    assert verdict("levels fall less from clean to adversarial pictures") == NOT_CONFIRMED
    assert verdict("consistent against adversarial: more detectors") == CONFIRMED
    for part in found["consistent"]:
        part["clean accuracy"] += 0.045  # half a point less
    answers = {answer.claim: answer for answer in training.answers(found)}
    assert answers["consistent against standard: less than a point of clean accuracy lost"].verdict == CONFIRMED
    one = {method: parts[:1] for method, parts in found.items()}
    assert {answer.verdict for answer in training.answers(one)} == {UNDECIDED}


def test_students_interval():
    found = student_mean([1.0, 2.0, 3.0, np.nan])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.high - found.mean == pytest.approx(4.302653 / np.sqrt(3), rel=1e-5)  # t of 2 degrees of freedom
    assert np.isnan(student_mean([1.0]).low)


def test_the_jackknife_of_a_mean_is_students_interval(ensembles):
    values = np.array([0.1, 0.4, 0.2, 0.9])
    found = ensembles.jackknife(values.mean(), [np.delete(values, i).mean() for i in range(4)])
    expected = student_mean(values)
    assert found.interval == pytest.approx(expected.interval, rel=1e-9)


def test_answers_follow_from_the_classes(ensembles):
    setting = ensembles.Transfer(members=("a", "b"), held_out=("c", "d"))
    yes, no, half = np.ones(20, bool), np.zeros(20, bool), np.arange(20) < 10
    names, judges = ("a", "b", "mean of logits", "mean of losses"), ("a", "b", "c", "d")
    lost = {(n, j): no for n in names for j in judges} | {("mean of losses", j): yes for j in judges}
    lost["b", "c"] = lost["b", "d"] = half
    reached = {(n, j): no for n in names for j in judges} | {("mean of losses", j): yes for j in "ab"}
    levels = {
        "fall from clean to adversarial": Estimate(0.1, 0.05, 0.2, 20),
        "fall from random signs to adversarial": Estimate(-0.1, -0.2, 0.05, 20),
    }
    pair = {"mean of losses": list(np.linspace(0.1, 0.3, 20)), "a": list(np.linspace(-0.3, 0.3, 20))}
    promoting = {"a": np.linspace(0.2, 0.4, 20), "b": np.linspace(-0.4, -0.2, 20)}
    found = ensembles.answers(setting, lost, reached, pair, promoting, levels)
    verdicts = [answer.verdict for answer in found]
    assert found[8].claim == "a alone: it sees more promotion-dominated cells in its pictures than b does"
    assert verdicts == [
        *(CONFIRMED, CONFIRMED, UNDECIDED, CONFIRMED, UNDECIDED),
        *(CONFIRMED, CONFIRMED, UNDECIDED),
        *(CONFIRMED, NOT_CONFIRMED, CONFIRMED, UNDECIDED),
    ]
    # With too few successes there are no levels.
    without = ensembles.answers(setting, lost, reached, pair, promoting, {})
    assert [answer.verdict for answer in without[:10]] == verdicts[:10]
    assert [answer.verdict for answer in without[10:]] == [UNDECIDED] * 2
    assert [ensembles.enough(n, 0.2) for n in (0, 1, 2, 3)] == [False, False, False, True]


def test_kinds_that_two_members_see_agree_as_kappa_says(ensembles):
    a, b = np.array([1, 1, 2, 2, 3, 3, 0]), np.array([1, 1, 2, 3, 3, 3, 1])
    # Of six cells five agree; by chance 2/6 2/6 + 2/6 1/6 + 2/6 3/6 = 1/3.
    assert ensembles.cohen(a, b) == pytest.approx((5 / 6 - 1 / 3) / (2 / 3))
    assert ensembles.cohen(a, a) == 1
    assert ensembles.cohen(np.array([1, 2]), np.array([2, 1])) == -1
    assert np.isnan(ensembles.cohen(np.ones(3), np.ones(3)))
    assert np.isnan(ensembles.cohen(np.zeros(3), np.ones(3)))
    nothing = ensembles.shares_of_kinds(np.zeros((0, 4), int), 0)  # no attack succeeded
    assert {(np.isnan(e.mean), e.count) for e in nothing.values()} == {(True, 0)}
    found = ensembles.shares_of_kinds(np.array([[1, 1, 2, 0], [3, 2, 2, 1]]), 0)
    assert [found[kind].mean for kind in ("suppression", "balanced", "promotion")] == pytest.approx(
        [(2 / 3 + 1 / 4) / 2, (1 / 3 + 1 / 2) / 2, 1 / 8]
    )


def test_bad_input_is_named(training, ensembles, tmp_path):
    np.savez(tmp_path / "few.npz", images=np.zeros((24, 28, 28, 3), np.uint8), labels=np.arange(24) % 10)
    few, out = str(tmp_path / "few.npz"), tmp_path / "out"
    for change, message in (
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"tree": "x"}, "unknown label tree 'x'"),
        ({"beta": -1.0}, "--beta must be finite and not negative, got -1.0"),
        ({"train_eps": 0.0}, "--train-eps must be above 0 and at most 1, got 0.0"),
        ({"eps": 1.5}, "--eps must be above 0 and at most 1, got 1.5"),
        ({"share": 1.0}, "share must be above 0 and below 1, got 1.0"),
        ({"share": 0.99}, "a share of 0.99 of 24 leaves no other images"),
        ({"batch_size": 12}, "batch_size must be a multiple of the 8 devices, got 12"),
    ):
        with pytest.raises(ValueError, match=message):
            training.main(dataclasses.replace(training.Training(train=few, test=few, out=out), **change))
    for change, message in (
        ({"members": ("a",)}, "--members: expected at least two different networks"),
        ({"members": ("efficientnet_lite0",) * 2}, "--members: expected at least two different networks"),
        ({"held_out": ("efficientnet_lite0",)}, "none of which is held out"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"limit": 0}, "--limit must be at least 1"),
        ({"seed": -1}, "--seed must be from 0 to"),
    ):
        with pytest.raises(ValueError, match=message):
            ensembles.main(dataclasses.replace(ensembles.Transfer(out=out), **change))
    assert not out.exists()


@pytest.mark.exhaustive
def test_a_small_training_is_measured(training, tmp_path, capsys):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (120, 28, 28, 3), np.uint8)
    labels = np.arange(120) % 10
    np.savez(tmp_path / "train.npz", images=images, labels=labels)
    np.savez(tmp_path / "test.npz", images=images, labels=np.where(labels == 3, -1, labels))
    data, test = (str(tmp_path / f"{name}.npz") for name in ("train", "test"))
    setting = training.Training(
        train=data, test=test, seeds=2, epochs=1, batch_size=40, steps=2, share=0.05, out=tmp_path / "out"
    )
    training.main(setting)
    first = capsys.readouterr().out
    assert "12 of 120 pictures are left out" in first
    assert "level of units whose top pictures are random" in first
    for figure in ("measures", "levels", "units", "consistent-1"):
        assert (tmp_path / "out" / f"{figure}.png").stat().st_size > 5_000
    training.main(setting)  # from the parts
    assert capsys.readouterr().out.replace("\r", "") == first.replace("\r", "")


@pytest.mark.exhaustive
def test_three_networks_that_are_nearly_the_same_deceive_one_another(ensembles, monkeypatch, tmp_path, capsys):
    """The whole experiment on CIFAR-10 pictures; run again, it finds everything done and says the same."""
    network, params = jaxinterp.load("cifar10_cnn")
    rng = np.random.default_rng(0)
    networks = {"one": params} | {
        name: {
            key: value * (1 + 1e-3 * rng.normal(size=value.shape).astype(np.float32)) for key, value in params.items()
        }
        for name in ("two", "three")
    }
    monkeypatch.setattr(ensembles, "load", lambda name: (network, networks[name]))
    monkeypatch.setattr(ensembles, "digest", str)
    setting = ensembles.Transfer(
        members=("one", "two"),
        held_out=("three",),
        attack="mifgsm:eps=24/255,steps=8",
        tree="cifar10",
        limit=8,
        share=0.5,
        batch_size=3,
        cell=8,
        out=tmp_path / "run",
    )
    ensembles.main(setting)
    said = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(("attack on ", "cells of "))]
    found = json.loads((setting.out / "answers.json").read_text())
    assert found["pictures"] >= 4
    rates = {name: float(row["three"].split()[0]) for name, row in found["results"]["target"].items()}
    assert rates.keys() == {"one", "two", ensembles.LOGITS, ensembles.LOSSES}
    assert min(rates.values()) > 0.5
    [kappa] = (row for title, row in found["results"].items() if title.startswith("kappa"))
    assert min(float(value.split()[0]) for value in kappa.values()) > 0.7  # they see nearly the same
    one, two = (found["results"]["kinds"][member] for member in ("one", "two"))
    assert one.keys() == two.keys() == rates.keys()
    assert all(0 < float(value.split()[0]) < 1 for value in found["results"]["ssim"].values())
    for name in ("transfer.png", "kinds.png", "pictures.png"):
        assert (setting.out / name).read_bytes().startswith(b"\x89PNG")
    stored = {path: path.stat().st_mtime_ns for path in (setting.out / "parts").iterdir()}
    ensembles.main(setting)
    assert capsys.readouterr().out.splitlines() == said
    assert {path: path.stat().st_mtime_ns for path in (setting.out / "parts").iterdir()} == stored
