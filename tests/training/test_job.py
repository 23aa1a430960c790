"""`jaxinterp train`: a checkpoint that other commands take, curves, resume."""

import json

import numpy as np
import pytest

from jaxinterp import cli, models, weights
from jaxinterp.data import Arrays
from jaxinterp.training import job


@pytest.fixture
def examples(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (12, 32, 32, 3), np.uint8), np.arange(12) % 10
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    return str(tmp_path / "data.npz")


def test_a_trained_network_is_loaded_like_any_other(examples, tmp_path, capsys):
    words = ["train", "--data", examples, "--method", "standard", "--epochs", "2", "--batch-size", "8"]
    words += ["--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "12 pictures; labels: the array 'labels' of the file" in printed
    network, params = weights.load("small_cnn", root=tmp_path / "out" / "ckpts")
    assert network.num_classes == 10
    assert (tmp_path / "out" / "training.png").stat().st_size > 1000
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert f"{summary['loss']:.4f}" in printed
    assert cli.main(words) == 0  # nothing is left to do
    again = weights.load("small_cnn", root=tmp_path / "out" / "ckpts")[1]
    assert all(np.array_equal(params[name], again[name]) for name in params)
    assert cli.main([*words, "--lr", "1"]) == 2
    assert "holds results of another config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "small_cn"], "unknown model 'small_cn'"),
        (["--eps", "0"], "eps must be two bounds"),
        (["--epochs", "0"], "epochs must be at least 1"),
        (["--batch-size", "12"], "batch_size must be a multiple of the 8 devices, got 12"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--data", "mnist5k:all"], "expected mnist5k:train or mnist5k:test"),
        (["--node", "conv4"], "small_cnn has no node 'conv4'"),
    ],
)
def test_bad_input(examples, tmp_path, capsys, words, message):
    data = [] if "--data" in words else ["--data", examples]
    assert cli.main(["train", *data, "--batch-size", "8", *words, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_held_out_pictures_without_a_label_do_not_count(examples, tmp_path, monkeypatch, capsys):
    images, labels = np.load(examples)["images"], np.array([-1] * 4 + [1] * 6 + [2] * 2)
    with monkeypatch.context() as patched:  # a network that sees class 1 everywhere, and 2 where it is attacked
        patched.setattr(job, "_correct", lambda network: lambda params, x, y, eps: (y == 1, y == 2))
        found = job.accuracies(models.network("small_cnn"), Arrays(images, labels), 0.1, 8)({})
    assert found == {"held-out accuracy": 0.75, "held-out adversarial accuracy": 0.25}
    held_out = str(tmp_path / "held_out.npz")
    np.savez(held_out, images=images, labels=np.full(12, -1))
    words = ["train", "--data", examples, "--held-out", held_out, "--batch-size", "8", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 2
    assert "held_out: none of 12 pictures has a label" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.exhaustive
def test_consistent_training_with_held_out_pictures(examples, tmp_path, capsys):
    words = ["train", "--data", examples, "--held-out", examples, "--epochs", "1", "--batch-size", "8"]
    assert cli.main([*words, "--limit", "9", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for name in ("adversarial accuracy", "distance", "held-out accuracy", "held-out adversarial accuracy"):
        assert name in printed
