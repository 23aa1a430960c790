"""The command line: help, and bad input that ends with one clear line and exit status 2, with nothing written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from jaxinterp import cli


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A grey square."""
    path = tmp_path / "square.png"
    Image.new("RGB", (64, 64), (120, 130, 140)).save(path)
    return path


def test_help_names_the_commands_and_is_quick_to_import():
    code = "import sys, jaxinterp.cli; print(sorted({'jax', 'optax', 'matplotlib', 'orbax'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "['jax']"
    shown = subprocess.run([sys.executable, "-m", "jaxinterp", "--help"], capture_output=True, text=True, check=True)
    assert "explain" in shown.stdout
    assert "convert" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "efficientnet_lite9"], "unknown model 'efficientnet_lite9'; did you mean 'efficientnet_lite"),
        (["--attack", "ifgms"], "unknown attack 'ifgms'; did you mean 'ifgsm'"),
        (["--attack", "cw:kapa=3"], "did you mean 'kappa'"),
        (["--attack", "ifgsm:eps=-1"], "IFGSM.eps must be finite and not negative"),
        (["--attack", "cw:steps=0"], "CW.steps must be at least 1"),
        (["--attack", "cw", "--attack", "cw"], "given twice"),
        (["--cell", "225"], "from 1 pixel to the image's 224 x 224 pixels"),
        (["--cell", "0"], "from 1 pixel to the image's 224 x 224 pixels, got 0 x 0"),
        (["--cell", "14x225"], "from 1 pixel to the image's 224 x 224 pixels, got 14 x 225"),
        (["--effect", "first_oder"], "unknown effect 'first_oder'; did you mean 'first_order'"),
        (["--scale", "probit"], "unknown scale 'probit'"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--seed", "-1"], "--seed must be from 0 to 4294967295, got -1"),
        (["--seed", "4294967296"], "--seed must be from 0 to 4294967295"),
        (["--attack", "ifgsm:steps=2147483647"], "attack ifgsm:steps=2147483647 has more than 2147483647 steps"),
        (["--labels", "missing.csv"], "missing.csv"),
        (["--labels", "names"], "square.png"),
    ],
)
def test_bad_arguments(arguments, message, picture, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["explain", str(picture), "--out", str(out), *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert not out.exists()


def test_output_that_the_terminal_cannot_show():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    code = [sys.executable, "-m", "jaxinterp", "explain", "--help"]
    shown = subprocess.run(code, capture_output=True, env=environment, check=True)
    assert b"--batch-size" in shown.stdout


def test_bad_pictures(tmp_path, capsys):
    out = tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    for given in (empty, tmp_path / "missing", tmp_path / "missing.jpg", tmp_path / "missing.npz"):
        assert cli.main(["explain", str(given), "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert given.name in error
        assert "continues from there" not in error  # nothing was begun
        assert not out.exists()


def test_a_label_out_of_range(picture, tmp_path, capsys):
    labels = tmp_path / "labels.csv"
    labels.write_text("square.png,1000\n")
    assert cli.main(["explain", str(picture), "--labels", str(labels), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "square.png" in error
    assert "1000" in error
    assert "999" in error


def test_an_output_directory_of_another_run(picture, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text('{"command": "explain", "cell": 9}')
    assert cli.main(["explain", str(picture), "--out", str(out)]) == 2
    assert "cell: 9 there, 14 asked" in capsys.readouterr().err
    assert os.listdir(out) == ["config.json"]


def test_an_output_directory_that_cannot_be_made(picture, capsys):
    assert cli.main(["explain", str(picture), "--out", "/proc/none/out"]) == 2
    assert "/proc/none" in capsys.readouterr().err


def test_a_missing_checkpoint_says_what_to_run(picture, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXINTERP_CKPTS", str(tmp_path / "nowhere"))
    assert cli.main(["explain", str(picture), "--out", str(tmp_path / "out")]) == 2
    assert "run: jaxinterp convert efficientnet_lite0" in capsys.readouterr().err


def test_convert_reports_and_refuses(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXINTERP_CKPTS", str(tmp_path))
    assert cli.main(["convert", "efficientnet_lite0"]) == 0
    assert "efficientnet_lite0: 247 tensors from efficientnet-lite0-57934424.pth" in capsys.readouterr().out
    assert (tmp_path / "efficientnet_lite0" / "manifest.json").is_file()
    assert cli.main(["convert", "efficientnet"]) == 2
    assert "did you mean" in capsys.readouterr().err
    text = tmp_path / "notes.pth"
    text.write_text("not weights")
    assert cli.main(["convert", "efficientnet_lite1", "--from", str(text)]) == 2
    assert "notes.pth" in capsys.readouterr().err
    assert cli.main(["convert", "efficientnet_lite1", "--from", str(tmp_path / "none.pth")]) == 2
    assert not (tmp_path / "efficientnet_lite1").exists()
