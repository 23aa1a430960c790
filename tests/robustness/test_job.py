"""The evaluation on a small network with seeded weights: counts, rounding, resuming inside an attack, the command."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.tree_util import Partial
from PIL import Image

from jaxinterp import attacks, cli, models, parallel, robustness, watermarks
from jaxinterp.data.decode import decode
from jaxinterp.resumable import run_to_end
from jaxinterp.robustness import compute, tables
from jaxinterp.runs import Run, file_name
from jaxinterp.weights import checkpoint, seeded

PICTURES = 5
SPECS = ("pgd:eps=24/255,steps=5", "cw:steps=20,search_steps=3,initial_const=10,lr=0.05")


@pytest.fixture(scope="module")
def small_cnn(tmp_path_factory) -> Path:
    """Checkpoints with one of the small network."""
    root = tmp_path_factory.mktemp("ckpts")
    params = seeded.params(models.shapes("small_cnn"))
    source = {"file": "seeded", "sha256": "0", "known": False}
    checkpoint.save(params, root / "small_cnn", name="small_cnn", classes=10, source=source)
    return root


@pytest.fixture
def pictures(tmp_path, small_cnn, monkeypatch) -> Path:
    """A folder of pictures; the network's own predictions are their labels."""
    monkeypatch.setenv("JAXINTERP_CKPTS", str(small_cnn))
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(PICTURES):
        pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{'abcde'[i]}.png")
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    return tmp_path / "pictures"


def evaluate(pictures: Path, out: Path, **more) -> robustness.Evaluated:
    arguments = {"model": "small_cnn", "specs": SPECS, "batch_size": 2, "say": lambda line: None}
    return robustness.evaluate([pictures], out=out, **{**arguments, **more})


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_counts_norms_and_pictures_agree_with_each_other(pictures, tmp_path):
    found = evaluate(pictures, tmp_path / "out")
    rows = read(tmp_path / "out" / "images.csv")
    assert [(row["id"], row["attack"]) for row in rows] == [(f"{c}.png", a) for c in "abcde" for a in SPECS]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["clean_accuracy"], summary["predicted_labels"]) == (None, PICTURES)
    assert {row["label_predicted"] for row in rows} == {"true"}
    text = "\n".join(tables.lines(found.summary, clean=found.clean, predicted=PICTURES))
    assert "accuracy on clean pictures  unknown, as all labels are the network's own predictions" in text
    network, params = models.network("small_cnn"), jax.tree.map(jnp.asarray, seeded.params(models.shapes("small_cnn")))
    some = False
    for entry in summary["attacks"][:2]:
        mine = [row for row in rows if row["attack"] == entry["attack"]]
        good = [row for row in mine if row["success"] == "true"]
        assert entry["success"]["value"] == len(good) / PICTURES
        assert entry["robust"]["value"] == pytest.approx(1 - len(good) / PICTURES)
        if good:
            assert entry["l2"][2] == pytest.approx(np.median([float(row["l2"]) for row in good]))
        for row in mine:
            stem = found.run.directory / "adversarial"
            [png] = stem.glob(f"{row['attack'].partition(':')[0]}*/{row['id']}") if row["success"] == "true" else [None]
            if png is None:
                assert (row["l2"], row["image"]) == ("0.0", "")
                continue
            assert found.run.directory / row["image"] == png
            some = True
            with np.load(png.with_suffix(".npz")) as stored:
                image = stored["image"]
                assert int(stored["labels"]) == int(row["label"])
            clean = np.asarray(Image.open(pictures / row["id"]), np.float32) / 255
            assert np.linalg.norm(image - clean) == pytest.approx(float(row["l2"]), rel=1e-4)
            rounded = np.asarray(Image.open(png), np.float32) / 255
            np.testing.assert_allclose(rounded, image, atol=0.5 / 255 + 1e-6)
            classes = np.argmax(network.bind(params)(jnp.stack([image, rounded])), axis=1)
            assert classes[0] == int(row["adversarial_class"]) != int(row["label"])
            assert (row["rounded_success"] == "true") == (classes[1] != int(row["label"]))
    assert some
    together = summary["attacks"][2]
    assert together["attack"] == tables.ALL
    assert together["success"]["value"] == len({row["id"] for row in rows if row["success"] == "true"}) / PICTURES
    assert (tmp_path / "out" / "curves.png").stat().st_size > 5000


def stored(found, rows, pictures):
    """(row, its PNG as floats, the original) for the successes."""
    for row in rows:
        if row["success"] == "true":
            folder = found.run.directory / "adversarial" / file_name(row["attack"])
            png, clean = (
                np.asarray(Image.open(path), np.float32) / 255 for path in (folder / row["id"], pictures / row["id"])
            )
            yield row, png, clean


def test_pictures_of_8_bits_stay_in_a_ball_in_linf(pictures, tmp_path):
    """The level next to a radius of 24.6 levels is the 25th, which lies outside; in L2 rounding adds to the radius."""
    for name in "abcde":  # away from the ends of the box, which keep a step in L2 inside the ball
        pixels = np.random.default_rng(ord(name)).integers(100, 155, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{name}.png")
    specs = ["pgd:eps=24.6/255,steps=5", "pgd:eps=2.5,norm=l2,steps=10"]
    found = evaluate(pictures, tmp_path / "out", specs=specs)
    rows = list(stored(found, read(tmp_path / "out" / "images.csv"), pictures))
    assert {row["attack"] for row, _, _ in rows} == set(specs)
    outside = dict.fromkeys(specs, 0)
    for row, png, clean in rows:
        linf, l2 = np.abs(png - clean).max(), np.linalg.norm(png - clean)
        assert float(row["rounded_linf"]) == pytest.approx(linf, rel=1e-4)
        assert float(row["rounded_l2"]) == pytest.approx(l2, rel=1e-4)
        if row["attack"] == specs[0]:
            assert linf == pytest.approx(24 / 255)
        inside = row["attack"] == specs[0] or l2 <= 2.50025
        assert (row["rounded_inside"] == "true") == inside
        outside[row["attack"]] += row["rounded_success"] == "true" and not inside
    assert outside[specs[1]] > 0  # a rounding that leaves the ball
    assert {row["attack"]: row["outside"] for row in found.summary if row["attack"] in specs} == outside
    text = "\n".join(tables.lines(found.summary, clean=found.clean, predicted=0))
    assert f"{outside[specs[1]]} of the successes lie outside of the attack's ball" in text


def test_pictures_of_8_bits_have_the_confidence(pictures, tmp_path):
    found = evaluate(pictures, tmp_path / "out", specs=["ddn:steps=100,kappa=0.003"])
    network, params = models.network("small_cnn"), jax.tree.map(jnp.asarray, seeded.params(models.shapes("small_cnn")))
    rows = list(stored(found, read(tmp_path / "out" / "images.csv"), pictures))
    margins = []
    for row, png, _ in rows:
        logits, label = np.asarray(network.bind(params)(jnp.asarray(png)[None]))[0], int(row["label"])
        margins.append(np.delete(logits, label).max() - logits[label])
        assert (row["rounded_success"] == "true") == (margins[-1] > 0.003)
    assert any(0 < margin <= 0.003 for margin in margins)  # another class, but not surely enough
    [entry] = found.summary
    assert entry["rounded_success"].mean == sum(margin > 0.003 for margin in margins) / PICTURES
    assert entry["rounded_robust"].mean == pytest.approx(1 - sum(margin > 0 for margin in margins) / PICTURES)


def test_the_picture_of_8_bits_that_is_judged_is_the_one_that_is_read(tmp_path):
    """Bit for bit; one that is not changed has no distance."""
    levels = np.random.default_rng(0).permutation(np.repeat(np.arange(256, dtype=np.uint8), 3)).reshape(16, 16, 3)
    Image.fromarray(levels).save(tmp_path / "a.png")
    clean = decode(tmp_path / "a.png", None)[None]
    for norm in (None, "linf", "l2"):
        rounded, distances, inside = compute._rounded(None, norm)(clean + np.float32(1e-3), clean, np.zeros(1))
        assert np.asarray(rounded).tobytes() == clean.tobytes()
        assert {name: float(value[0]) for name, value in distances.items()} == dict.fromkeys(compute.NORMS, 0)
        assert np.asarray(inside).all()


def test_pictures_of_8_bits_succeed_by_more_than_rounding():
    model = Partial(lambda x: 100 * x[:, 0, 0])
    images = np.zeros((2, 1, 1, 3), np.float32)
    images[:, 0, 0] = [[0.5, 0.500001, 0], [0.5, 0.51, 0]]  # ahead by 1e-4 of 50, and by 1
    classes, reached = compute._judged(None)(model, images, np.zeros(2, int), None, np.zeros(2, np.float32))
    assert (np.asarray(classes).tolist(), np.asarray(reached).tolist()) == ([1, 1], [False, True])


def test_labels_that_are_predictions_are_counted(pictures, tmp_path, capsys):
    images = np.stack([np.asarray(Image.open(pictures / f"{name}.png")) for name in "abcde"])
    network, params = models.network("small_cnn"), jax.tree.map(jnp.asarray, seeded.params(models.shapes("small_cnn")))
    seen = np.argmax(network.bind(params)(jnp.asarray(images, jnp.float32) / 255), axis=1)
    labels = [seen[0], -1, (seen[2] + 1) % 10, -1, seen[4]]
    np.savez(tmp_path / "some.npz", images=images, labels=np.array(labels))
    command = ["attack", str(tmp_path / "some.npz"), "--model", "small_cnn", "--attack", "fgsm", "--no-images"]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "5 pictures; labels: the array 'labels' of the file; for 2 of 5 pictures, the network's own pred" in printed
    assert "accuracy on clean pictures  80.0%" in printed
    assert "  2 of 5 labels are the network's own predictions, which count as right\n" in printed
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["predicted_labels"], summary["clean_accuracy"]["value"]) == (2, 0.8)
    rows = {row["id"]: (row["label_predicted"], row["image"]) for row in read(tmp_path / "out" / "images.csv")}
    assert rows == {"0": ("false", ""), "1": ("true", ""), "3": ("true", ""), "4": ("false", "")}
    assert cli.main([*command, "--limit", "1", "--out", str(tmp_path / "one")]) == 0
    assert "own prediction" not in capsys.readouterr().out


def test_the_files_of_one_picture_are_called_alike(pictures, tmp_path):
    (pictures / "sub dir").mkdir()
    for name in ("d.png", "e.png"):
        (pictures / name).rename(pictures / "sub dir" / name)
    (pictures / "sub dir" / "e.png").rename(pictures / "sub dir" / "e.PNG")
    found = evaluate(pictures, tmp_path / "out", specs=["pgd:eps=0.3,steps=10"])
    named = [row["image"] for row in read(tmp_path / "out" / "images.csv") if row["success"] == "true"]
    assert any("sub_dir" in name for name in named)
    files = {path.relative_to(found.run.directory) for path in found.run.directory.glob("adversarial/*/*")}
    assert files == {Path(name).with_suffix(suffix) for name in named for suffix in (".png", ".npz")}


def test_a_ball_in_linf_around_pictures_between_the_levels():
    """The levels next to its border are inside, as exactly as levels can be told apart."""
    clean = np.random.default_rng(0).uniform(size=(4, 32, 32, 3)).astype(np.float32)
    for eps in (0.00784, 2 / 255, 8 / 255):
        radius = np.full(4, eps, np.float32)
        images = np.clip(clean + eps, 0, 1)
        rounded, distances, inside = compute._rounded(None, "linf")(jnp.asarray(images), jnp.asarray(clean), radius)
        assert np.asarray(inside).all()
        assert (np.asarray(distances["linf"]) <= eps + 2e-3 / 255).all()
        np.testing.assert_allclose(np.asarray(rounded) * 255, np.round(np.asarray(rounded) * 255), atol=1e-4)


def test_a_success_outside_the_ball_says_nothing_about_gradients(pictures, tmp_path):
    specs = ["pgd:eps=0.0001,steps=1", "square:eps=1,steps=300"]
    found = evaluate(pictures, tmp_path / "out", specs=specs, images=False)
    broken = {name: [row["success"] for row in found.rows if row["attack"] == name] for name in specs}
    assert sum(broken[specs[1]]) >= sum(broken[specs[0]]) + 2
    assert "transfer" not in {finding.name for finding in found.findings}


def test_a_targeted_evaluation_reaches_its_targets(pictures, tmp_path):
    found = evaluate(pictures, tmp_path / "out", targeted=True, specs=["pgd:eps=0.3,steps=10"], images=False)
    assert any(row["success"] for row in found.rows)
    for row in found.rows:
        assert row["target"] != row["label"]
        assert (row["adversarial_class"] == row["target"]) == row["success"]
    assert not (tmp_path / "out" / "adversarial").exists()


def test_an_ensemble_of_losses_is_attacked_towards_classes_only(pictures, tmp_path):
    """Else members that only disagree would count as deceived."""
    with pytest.raises(ValueError, match="combine=losses has a class that stands for none"):
        evaluate(pictures, tmp_path / "out", model="small_cnn+small_cnn:combine=losses")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("before", "after"), [(1, 1), (8, 2), (2, 8)])
def test_an_attack_goes_on_in_the_middle_of_its_search(tmp_path, monkeypatch, before, after):
    """Stopped when its state was stored, in the third search step; the last bit is that of an uninterrupted run.

    Three images are filled up to four on two devices, and to eight on eight.
    """
    network, params = models.network("small_cnn"), seeded.params(models.shapes("small_cnn"))
    model = network.bind(jax.tree.map(jnp.asarray, params))
    images = jnp.asarray(np.random.default_rng(1).uniform(size=(3, 32, 32, 3)), jnp.float32)
    labels = np.argmax(model(images), axis=1)
    attack, key = attacks.CW(search_steps=5, steps=20, initial_const=1.0, lr=0.05), jax.random.key(0)
    run = Run(tmp_path / "run", {})

    def placed(devices: int) -> tuple[Any, Any, Any]:
        """The problem on so many devices."""
        if devices == 1:
            return model, images, labels
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
        padding = -len(images) % devices
        rows = jnp.pad(images, ((0, padding), (0, 0), (0, 0), (0, 0))), np.pad(labels, (0, padding))
        return network.bind(parallel.replicate(params, mesh)), *parallel.shard(rows, mesh)

    write, stored = run.write_state, []

    def stop(name, state):
        write(name, state)
        stored.append(state)
        unfinished = ~np.asarray(state["state"].done)[:3]
        if np.all(np.asarray(state["state"].progress.problem)[:3][unfinished] >= 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "write_state", stop)
    arguments = {"key": key, "run": run, "part": "cw", "store_every": 0.0}
    with pytest.raises(KeyboardInterrupt):
        run_to_end(attack, *placed(before), None, **arguments)
    steps_before = int(stored[-1]["steps"])
    assert 0 < steps_before < attack.iterations
    monkeypatch.setattr(run, "write_state", lambda name, state: stored.append(state))
    result = run_to_end(attack, *placed(after), None, **arguments)
    assert all(int(state["steps"]) > steps_before for state in stored[len(stored) - 1 :])
    whole = attacks.run(attack, model, images, labels, key=key)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(result), jax.tree.leaves(whole), strict=True):
        assert np.asarray(a)[:3].tobytes() == np.asarray(b).tobytes(), path
    assert np.asarray(whole.success).any()

    # A state of another shape is not taken for this one's.
    assert run.read_state("cw", {"steps": np.zeros((), np.int64), "state": np.zeros(3)}) is None
    run.remove_state("cw")
    assert not list((tmp_path / "run" / "parts").iterdir())


KILLED = """
import os, signal, sys
import jax, numpy as np
from jaxinterp.resumable import run_to_end
from jaxinterp.runs import Run, file_name
from tests.robustness.test_job import SEARCH, searched

class Killed(Run):
    def write_state(self, name, state):
        super().write_state(name, state)
        if np.any(np.asarray(state["state"].progress.problem) == 4):
            os.kill(os.getpid(), signal.SIGKILL)

run_to_end(SEARCH, *searched(), None, key=jax.random.key(0), run=Killed(sys.argv[1], {}), part="cw", store_every=0.0)
"""
SEARCH = attacks.CW(search_steps=6, steps=15, initial_const=1.0, lr=0.05, abort_early=False)


def searched() -> tuple[Any, Any, Any]:
    """A network, images and labels."""
    network, params = models.network("small_cnn"), seeded.params(models.shapes("small_cnn"))
    model = network.bind(jax.tree.map(jnp.asarray, params))
    images = jnp.asarray(np.random.default_rng(1).uniform(size=(2, 32, 32, 3)), jnp.float32)
    return model, images, np.argmax(model(images), axis=1)


def test_a_process_killed_in_the_fifth_search_step_is_gone_on_with(tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "run")], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    run = Run(tmp_path / "run", {})
    arguments = {"key": jax.random.key(0), "run": run, "part": "cw", "store_every": 0.0}
    first = attacks.start(SEARCH, *searched(), key=jax.random.key(0))
    stored = run.read_state("cw", {"steps": np.zeros((), np.int64), "state": first}, padded=True)
    assert stored is not None
    assert 4 * 15 <= int(stored["steps"]) < SEARCH.iterations
    result, whole = (
        run_to_end(SEARCH, *searched(), None, **arguments),
        attacks.run(SEARCH, *searched(), key=arguments["key"]),
    )
    assert np.asarray(whole.success).all()
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(whole), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_stages_go_on_where_they_were_on_more_devices(tmp_path, monkeypatch):
    """Images that fill up a batch begin the first stage anew; nobody may wait for them."""
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(48, 3)) * 3, jnp.float32)
    model = Partial(lambda w, x: (x.reshape(x.shape[0], -1) - 0.5) @ w, weights)
    images = jnp.asarray(np.random.default_rng(1).uniform(size=(3, 4, 4, 3)), jnp.float32)
    labels, key = np.argmax(model(images), axis=1), jax.random.key(0)
    attack = attacks.Chain((attacks.PGD(eps=0.0, steps=30), attacks.PGD(eps=0.3, steps=30)))
    run = Run(tmp_path / "run", {})
    write = run.write_state

    def stop(name, state):
        write(name, state)
        if np.all(np.asarray(state["state"].stage) == 1):
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "write_state", stop)
    arguments = {"key": key, "run": run, "part": "chain", "store_every": 0.0}
    with pytest.raises(KeyboardInterrupt):
        run_to_end(attack, model, images, labels, None, **arguments)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    rows, truth = parallel.shard((jnp.pad(images, ((0, 1), (0, 0), (0, 0), (0, 0))), np.pad(labels, (0, 1))), mesh)
    copied = Partial(model.func, parallel.replicate(weights, mesh))
    monkeypatch.setattr(run, "write_state", write)
    result = run_to_end(attack, copied, rows, truth, None, **arguments)
    whole = attacks.run(attack, model, images, labels, key=key)
    assert np.all(whole.success)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(result), jax.tree.leaves(whole), strict=True):
        assert np.asarray(a)[:3].tobytes() == np.asarray(b).tobytes(), path


@pytest.mark.exhaustive  # tests/test_distributed.py kills other commands
def test_a_killed_command_continues_to_the_same_tables(pictures, tmp_path):
    environment = {
        **os.environ,
        **{
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": os.environ["XLA_FLAGS_OF_ONE_DEVICE"],
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"),
    }

    def command(out):
        options = [word for spec in SPECS for word in ("--attack", spec)]
        return [
            *(sys.executable, "-m", "jaxinterp", "attack", "--data", str(pictures), "--model", "small_cnn"),
            *(*options, "--batch-size", "2", "--out", str(out)),
        ]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = subprocess.run(command(whole), env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "robust accuracy" in done.stdout
    assert "broken.png: could not be read" in done.stdout

    started = subprocess.Popen(command(killed), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(killed.glob("parts/pgd*.npz")) and time.monotonic() < deadline and started.poll() is None:
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert not (killed / "images.csv").exists()
    again = subprocess.run(command(killed), env=environment, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr[-2000:]
    for name in ("images.csv", "summary.json", "config.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_watermarks_of_a_folder(pictures, tmp_path, capsys):
    marks = tmp_path / "marks"
    rng = np.random.default_rng(1)
    for name in ("cat/a.png", "cat/b.png", "dog/c.png"):
        (marks / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(marks / name)
    spec = "watermark:rounds=1,strength=3"
    command = ["attack", str(pictures), "--model", "small_cnn", "--batch-size", "5", "--attack", spec]

    def run(*more):
        return cli.main([*command, *more]), capsys.readouterr()

    status, printed = run("--watermarks", str(marks), "--out", str(tmp_path / "out"))
    assert status == 0, printed.err
    assert "3 watermarks in 2 folders" in printed.out
    rows = read(tmp_path / "out" / "images.csv")
    queries = {int(row["forward"]) for row in rows if row["success"] == "false"}
    assert queries <= {4}  # the input and three pictures
    assert max(int(row["forward"]) for row in rows) <= 4
    # The same as in Python, where the pictures are given as arrays.
    found = watermarks.read(marks, 32)
    attack = attacks.Watermark(watermarks=jnp.asarray(found.images), folders=(2, 1), rounds=1, strength=3.0)
    network, params = models.network("small_cnn"), jax.tree.map(jnp.asarray, seeded.params(models.shapes("small_cnn")))
    clean = np.stack([np.asarray(Image.open(pictures / row["id"]), np.float32) / 255 for row in rows])
    labels = np.array([int(row["label"]) for row in rows])
    result = attacks.run(attack, network.bind(params), clean, labels, key=jax.random.key(0))
    assert [row["success"] == "true" for row in rows] == np.asarray(result.success).tolist()
    assert [int(row["forward"]) for row in rows] == np.asarray(result.forward).tolist()

    for name in ("cat/b.png", "dog/c.png"):
        (marks / name).unlink()
    for more, message in (
        (("--watermarks", str(marks)), "the class folder"),
        (("--watermarks", str(marks / "cat")), "expected class folders in"),
        (("--watermarks", str(tmp_path / "none")), "watermarks: no such folder"),
        (("--watermarks", str(pictures), "--attack", "fgsm"), "expected class folders in"),
    ):
        status, printed = run(*more, "--out", str(tmp_path / "other"))
        assert status == 2
        assert message in printed.err
    (marks / "dog").rmdir()
    status, printed = run("--watermarks", str(marks), "--out", str(tmp_path / "out"))
    assert status == 2
    assert "holds results of another config" in printed.err
    assert "watermarks" in printed.err
    command[-1] = "fgsm"
    status, printed = run("--watermarks", str(marks), "--out", str(tmp_path / "other"))
    assert (status, "--watermarks goes with the attack watermark, got fgsm" in printed.err) == (2, True)
    assert not (tmp_path / "other").exists()
