"""The main job end to end on real pictures and real networks: pictures of every sort, kill and resume."""

import csv
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxinterp import cam, effect, explain, faithfulness
from jaxinterp.data import Crop, samples
from jaxinterp.explain.tables import CELL_COLUMNS, IMAGE_COLUMNS
from jaxinterp.pictures import random_targets
from jaxinterp.study import problem


@pytest.fixture(scope="module")
def pictures() -> list[Path]:
    """The first two ImageNet samples."""
    return [Path(path) for path in samples("imagenet", crop=Crop(224)).paths[:2]]


@pytest.fixture(scope="module")
def small_pictures() -> list[Path]:
    """The first two CIFAR-10 samples."""
    return [Path(path) for path in samples("cifar10", crop=Crop(32)).paths[:2]]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """One device, and compiled programs shared by the processes of this module."""
    cache = tmp_path_factory.mktemp("xla")
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["XLA_FLAGS_OF_ONE_DEVICE"],
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def command(pictures: list[Path], out: Path, *more: str) -> list[str]:
    """A short run of two attacks, a chunk for every picture."""
    options = ["--attack", "ifgsm:steps=4", "--attack", "ifgsm:steps=4,eps=0.5", "--cell", "11"]
    return [
        *(sys.executable, "-m", "jaxinterp", "explain", *map(str, pictures), "--labels", "names"),
        *("--model", "cifar10_cnn"),
        *(*options, "--batch-size", "1", "--out", str(out), *more),
    ]


def tables(out: Path) -> dict[str, bytes]:
    """The files that must not depend on how the run went."""
    return {name: (out / name).read_bytes() for name in ("images.csv", "cells.csv", "summary.json", "config.json")}


def test_a_killed_run_continues_to_the_same_tables(small_pictures, environment, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = subprocess.run(command(small_pictures, whole), env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]

    started = subprocess.Popen(
        command(small_pictures, killed), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 400
    while len(list((killed / "parts").glob("*-*.npz"))) < 2 and started.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert not (killed / "images.csv").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in (killed / "parts").glob("*.npz")}
    assert 2 <= len(finished) - 1 < 4  # chunks, beside the survey of the pictures

    again = subprocess.run(
        command(small_pictures, killed), env=environment, capture_output=True, text=True, timeout=500
    )
    assert again.returncode == 0, again.stderr[-2000:]
    assert tables(killed) == tables(whole)
    for name, when in finished.items():
        assert (killed / "parts" / name).stat().st_mtime_ns == when, f"{name} was computed again"
    assert not list(killed.rglob(".*"))  # temporary files

    with open(whole / "images.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["attack"]) for row in rows] == [
        (path.name, attack) for path in small_pictures for attack in ("ifgsm:steps=4", "ifgsm:steps=4,eps=0.5")
    ]
    labels = [int(path.stem.rpartition("_")[2]) for path in small_pictures]
    assert [int(row["label"]) for row in rows] == [label for label in labels for _ in range(2)]
    with open(whole / "cells.csv", newline="") as file:
        cells = list(csv.DictReader(file))
    assert len(cells) == 4 * 9
    for row in rows:
        mine = [cell for cell in cells if (cell["id"], cell["attack"]) == (row["id"], row["attack"])]
        total = np.sqrt(sum(float(cell["norm"]) ** 2 for cell in mine))
        assert total == pytest.approx(float(row["l2"]), rel=1e-4)
        if row["success"] == "true":
            assert row["adversarial_class"] == row["target"]
            acting = [cell["kind"] for cell in mine if cell["kind"] != "none"]
            share = acting.count("promotion-dominated") / len(acting)
            assert float(row["share_promotion"]) == pytest.approx(share, abs=1e-6)
        else:
            assert row["l2"] == "0.0"
            assert row["is_label"] == ""
    html = (whole / "index.html").read_text()
    assert len(re.findall(r"data:image/png;base64,", html)) >= 4
    assert not re.search(r"(src|href)=[\"']https?:", html)


def test_pictures_of_every_sort_are_explained_or_listed(tmp_path, pictures):
    folder = tmp_path / "pictures"
    folder.mkdir()
    with Image.open(pictures[0]) as opened:
        picture = opened.convert("RGB").resize((300, 260))
    picture.save(folder / "plain.png")
    picture.convert("L").save(folder / "grey.png")
    picture.convert("RGBA").save(folder / "rgba.png")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(folder / "sixteen.png")
    Image.new("RGB", (1, 1), (255, 0, 0)).save(folder / "pixel.png")
    (folder / "text.jpg").write_text("this is not a picture")
    (folder / "truncated.jpg").write_bytes(pictures[0].read_bytes()[:5000])
    said: list[str] = []
    found = explain.explain(
        [folder],
        model="cifar10_cnn",
        specs=["ifgsm:steps=1"],
        cell=32,
        out=tmp_path / "out",
        batch_size=8,
        say=said.append,
    )
    readable = {"plain.png", "grey.png", "rgba.png", "cmyk.jpg", "sixteen.png", "pixel.png"}
    assert {row["id"] for row in found.rows} == readable
    assert {name for name, _ in found.pictures.damaged} == {"text.jpg", "truncated.jpg"}
    assert any("text.jpg: could not be read" in line for line in said)
    assert any("predict" in line for line in said)  # whose labels these are
    # The same picture in three forms: what the network sees must be close.
    labels = {row["id"]: row["label"] for row in found.rows}
    assert labels["rgba.png"] == labels["plain.png"]
    assert labels["grey.png"] == labels["sixteen.png"]
    # What directories of earlier versions hold: these continue.
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["cell"] == 32
    assert not config.keys() & {"effect", "scale", "faithfulness"}
    assert tuple(read(tmp_path / "out" / "images.csv")[0]) == IMAGE_COLUMNS
    assert tuple(read(tmp_path / "out" / "cells.csv")[0]) == CELL_COLUMNS
    record = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert record[0]["pictures"] == 6


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_effects_that_are_not_the_papers_of_oblong_cells_and_faithfulness(small_pictures, tmp_path):
    out, definition, cell = tmp_path / "out", effect.Definition("add_one_in", "log_softmax"), (16, 8)
    job = functools.partial(
        explain.explain,
        small_pictures[:1],
        model="cifar10_cnn",
        specs=["ifgsm:steps=3,eps=0.1"],
        out=out,
        labels="names",
        batch_size=1,
        say=lambda line: None,
    )
    found = job(cell=cell, definition=definition, faithful=True)
    ((_, _, arrays),) = found.parts()
    assert arrays["success"].all()
    expected = effect.pse(
        found.network.bind(found.params), *problem(arrays), cell, method="add_one_in", scale="log_softmax"
    )
    assert expected.kind.shape == (1, 2, 4)
    maps = np.asarray(cam.resize(jnp.asarray(arrays["maps"]), (32, 32)))[0]
    cells = read(out / "cells.csv")
    assert [(int(row["row"]), int(row["column"])) for row in cells] == list(np.ndindex(2, 4))
    for row in cells:
        i, j = int(row["row"]), int(row["column"])
        assert float(row["suppression"]) == pytest.approx(float(expected.suppression[0, i, j]), rel=1e-5)
        assert float(row["promotion"]) == pytest.approx(float(expected.promotion[0, i, j]), rel=1e-5)
        window = np.s_[16 * i : 16 * (i + 1), 8 * j : 8 * (j + 1)]
        assert float(row["map_label_clean"]) == pytest.approx(maps[0][window].mean(), rel=1e-4)
        assert float(row["map_target_adversarial"]) == pytest.approx(maps[3][window].mean(), rel=1e-4)
    named = "add one in, log-probabilities"
    assert {row["effect"] for row in (*cells, *read(out / "images.csv"), *found.summary)} == {named}
    html = (out / "index.html").read_text()
    assert "16 x 8 pixels" in html
    assert f"kinds ({named})" in html
    (row,) = read(out / "images.csv")
    clean, adversarial, labels, targets = problem(arrays)
    maps = jnp.asarray(arrays["maps"])
    for which, given in (("label", (clean, labels, maps[:, 0])), ("target", (adversarial, targets, maps[:, 3]))):
        model = found.network.bind(found.params)
        expected = {
            "deletion": faithfulness.deletion(model, *given).area,
            "insertion": faithfulness.insertion(model, *given).area,
            "drop": faithfulness.average_drop(model, *given),
        }
        for measure, value in expected.items():
            key = f"{measure}_{which}"
            assert float(row[key]) == pytest.approx(float(value[0]), rel=1e-5)
            assert found.summary[0][key].mean == pytest.approx(float(value[0]), rel=1e-5)
            assert 0 <= float(row[f"{key}_null"]) <= 1
        assert row[f"deletion_{which}_null"] != row[f"deletion_{which}"]
    assert "average drop, target, null" in html

    asked = {"cell": cell, "definition": definition, "faithful": True}
    for other in (effect.PAPER, effect.Definition("add_one_in"), effect.Definition(scale="log_softmax")):
        with pytest.raises(ValueError, match="holds results of another config"):
            job(**{**asked, "definition": other})
    for change in ({"cell": (8, 16)}, {"faithful": False}):
        with pytest.raises(ValueError, match="holds results of another config"):
            job(**{**asked, **change})
    assert "pse_backward" not in row
    job(cell=cell, definition=effect.Definition("first_order"), out=tmp_path / "estimated")
    (estimated,) = read(tmp_path / "estimated" / "images.csv")
    assert (estimated["pse_forward"], estimated["pse_backward"]) == ("1", "2")


def test_targets_depend_on_the_seed_and_the_name_alone():
    names = tuple(f"picture{i}.jpg" for i in range(500))
    labels = np.arange(500, dtype=np.int32) % 10
    targets = random_targets(names, labels, 10, seed=0)
    assert np.all((targets >= 0) & (targets < 10) & (targets != labels))
    shuffled = np.random.default_rng(0).permutation(500)
    moved = random_targets(tuple(names[i] for i in shuffled), labels[shuffled], 10, seed=0)
    np.testing.assert_array_equal(moved, targets[shuffled])
    assert np.mean(random_targets(names, labels, 10, seed=1) == targets) < 0.25
    counts = np.bincount((targets - labels) % 10, minlength=10)
    assert counts[0] == 0
    assert counts[1:].min() > 30  # uniform over the nine others: 55.6 expected
    # Two classes leave one target.
    np.testing.assert_array_equal(random_targets(names, labels % 2, 2, seed=0), 1 - labels % 2)
