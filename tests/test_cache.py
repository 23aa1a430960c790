"""The second run of a command compiles nothing: counted in processes that share nothing but the cache on the disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxinterp import broden, models
from jaxinterp.weights import checkpoint, seeded

# Runs commands, one after the other, and prints for each the exit status, the programs that were asked for, and those
# that had to be compiled.
_COUNTING = """
import contextlib, json, sys
from jaxinterp import cli
from jaxinterp.bench.timing import watching_compiler

for arguments in json.loads(sys.argv[1]):
    with watching_compiler() as seen, contextlib.redirect_stdout(sys.stderr):
        status = cli.main(arguments)
    print(json.dumps([status, seen.programs, seen.compiled]))
"""


def run(commands: list[list[str]], environment: dict[str, str]) -> list[list[int]]:
    """[exit status, programs, programs that were compiled] of every command, in one fresh process."""
    code = [sys.executable, "-c", _COUNTING, json.dumps(commands)]
    done = subprocess.run(code, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(commands), done.stderr
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Weights of the small network, two pictures, and four in Broden's format."""
    root = tmp_path_factory.mktemp("cache")
    source = {"file": "seeded", "sha256": "0", "known": False}
    params = seeded.params(models.shapes("small_cnn"))
    checkpoint.save(params, root / "ckpts" / "small_cnn", name="small_cnn", classes=10, source=source)
    rng = np.random.default_rng(0)
    (root / "pictures" / "day").mkdir(parents=True)
    for name in "ab":
        pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "pictures" / "day" / f"{name}.png")
    broden.make([], root / "broden", scenes=root / "pictures", size=32, crops=2)
    return root


@pytest.fixture
def environment(place) -> dict[str, str]:
    """As a user has it: nothing is said about the cache but where the user's own lies; one device."""
    kept = {key: value for key, value in os.environ.items() if "CACHE" not in key}
    return {
        **kept,
        "XLA_FLAGS": os.environ["XLA_FLAGS_OF_ONE_DEVICE"],
        "JAX_PLATFORMS": "cpu",
        "JAXINTERP_CKPTS": str(place / "ckpts"),
        "XDG_CACHE_HOME": str(place / "home"),
    }


def commands(place: Path, out: Path) -> list[list[str]]:
    """Every command that computes, with results in a folder of its own."""
    pictures = [str(path) for path in sorted((place / "pictures" / "day").iterdir())]
    small = ["--model", "small_cnn"]
    labels = ["--labels", "predicted", "--batch-size", "2"]
    return [
        ["attack", *pictures, *small, *labels, "--attack", "fgsm", "--out", str(out / "attack")],
        ["explain", *pictures, *small, *labels, "--attack", "fgsm", "--cell", "16", "--out", str(out / "explain")],
        ["dissect", "--data", f"broden:{place / 'broden'}", *small, "--batch-size", "4", "--out", str(out / "dissect")],
        ["validate", "carlini_mnist", "--out", str(out / "v.json")],
        ["bench", "models", *small, "--size", "8", "--batch", "2", "--rounds", "1", "--out", str(out / "bench")],
    ]


def test_a_second_run_compiles_nothing(place, environment, tmp_path):
    first = run(commands(place, tmp_path / "first"), environment)
    second = run(commands(place, tmp_path / "second"), environment)
    assert [status for status, _, _ in first + second] == [0] * 10
    assert all(compiled > 5 for _, _, compiled in first)
    assert all(programs > 5 for _, programs, _ in second)
    assert [compiled for _, _, compiled in second] == [0] * 5
    assert list((place / "home" / "jaxinterp").glob("xla-*/*"))


def test_jax_s_own_variables_move_it_and_switch_it_off(place, environment, tmp_path):
    again = [each for each in commands(place, tmp_path) if each[0] == "validate"]
    moved = {
        **environment,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "moved"),
        "XDG_CACHE_HOME": str(tmp_path / "home"),
    }
    [[status, _, compiled]] = run(again, moved)
    assert status == 0
    assert compiled > 5
    assert list((tmp_path / "moved").iterdir())
    assert not (tmp_path / "home" / "jaxinterp").exists()
    off = {**environment, "JAX_ENABLE_COMPILATION_CACHE": "0"}
    [[status, programs, compiled]] = run(again, off)
    assert (status, programs) == (0, compiled)


def test_help_states_it():
    shown = subprocess.run([sys.executable, "-m", "jaxinterp", "--help"], capture_output=True, text=True, check=True)
    text = " ".join(shown.stdout.replace("│", " ").split())
    for word in ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE=0", "~/.cache/jaxinterp", "--precision"):
        assert word in text
