"""The experiments on two small pictures: answers follow from the numbers, a study continues, bad input is refused."""

import contextlib
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

import jaxinterp
from jaxinterp import apis, attacks, cam, effect, localize, typesetting
from jaxinterp.apis import Label
from jaxinterp.attacks.driver import example_keys
from jaxinterp.data import Crop, samples
from jaxinterp.statistics import Estimate
from jaxinterp.study import CONFIRMED, NOT_CONFIRMED, UNDECIDED, Setting, problem, verdict

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
ATTACKS = ("ifgsm:steps=5,eps=0.1", "cw:search_steps=2,steps=30,initial_const=1")


@pytest.fixture(autouse=True)
def neighbours(monkeypatch):
    """The scripts import one another, as they do when one of them is run."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Two CIFAR-10 pictures in one results directory."""
    pictures = tuple(samples("cifar10", crop=Crop(32)).paths[:2])
    return Setting(
        pictures=pictures,
        model="cifar10_cnn",
        attack=ATTACKS,
        cell=(8, 16),
        out=tmp_path_factory.mktemp("study") / "run",
        labels="names",
        batch_size=2,
    )


def of(kind, setting, **more):
    return kind(**{field.name: getattr(setting, field.name) for field in dataclasses.fields(setting)}, **more)


def answers(setting, name):
    record = json.loads((setting.out / name / "answers.json").read_text())
    assert record["study"] == name
    assert record["pictures"] == 2
    assert "jax" in record["versions"]
    assert "devices" not in record["versions"]  # which differ where the results do not
    assert (setting.out / name / "machine.json").exists()
    assert all(answer["verdict"] in (CONFIRMED, NOT_CONFIRMED, UNDECIDED) for answer in record["answers"])
    return record


def stored(setting):
    """The pairs of pictures with the chunk of each attack."""
    parts = sorted((setting.out / "parts").glob("*-000000.npz"))
    return {path.name.partition("_")[0]: dict(np.load(path)) for path in parts}


def test_verdicts():
    assert verdict(Estimate(0.5, 0.2, 0.8, 9), 0.1) == CONFIRMED
    assert verdict(Estimate(0.5, 0.2, 0.8, 9), 0.9) == NOT_CONFIRMED
    assert verdict(Estimate(0.5, 0.2, 0.8, 9), 0.5) == UNDECIDED
    assert verdict(Estimate(0.5, np.nan, np.nan, 1), 0.1) == UNDECIDED
    assert verdict(Estimate(np.nan, np.nan, np.nan, 0), 0.1) == UNDECIDED


def test_statistics_and_localization(setting, capsys):
    for name in ("pse_statistics", "cam_localization"):
        importlib.import_module(name).main(setting)
    assert "(a) " in capsys.readouterr().out
    record = answers(setting, "pse_statistics")
    assert len(record["answers"]) == 2 * 3 + 2
    record = answers(setting, "cam_localization")
    network, params = jaxinterp.load("cifar10_cnn")
    arrays = next(a for name, a in stored(setting).items() if name.startswith("cw"))
    four = localize.four_maps(network, params, *problem(arrays), "gradcam")
    np.testing.assert_allclose(four.stacked(), arrays["maps"], rtol=1e-4, atol=1e-5)
    delta = jnp.asarray(arrays["adversarial"] - arrays["clean"])
    scores, _ = localize.score_curve(delta, four.label_clean)
    mean = np.mean(np.asarray(scores)[arrays["success"]], axis=0)
    curves = record["results"][ATTACKS[1]]
    shown = [float(text.split()[0]) for text in curves["map of t0"]["score"]]
    np.testing.assert_allclose(shown, mean, atol=3e-3)  # a pixel more or less
    # Shuffled pixels lie evenly: their scores are those of the null, at every percentile.
    found = {
        name: np.array([[float(text.split()[0]) for text in curves[name][what]] for what in ("score", "null")])
        for name in ("map of t", "ASM", "shuffled")
    }
    np.testing.assert_allclose(found["shuffled"][0], found["shuffled"][1], atol=0.03)
    np.testing.assert_allclose(found["shuffled"][1], np.sqrt(1 - np.arange(30, 91, 10) / 100), atol=0.02)
    assert all((np.diff(each) <= 0).all() for each in found.values())
    assert (setting.out / "cam_localization" / "curves.png").stat().st_size > 10_000
    assert (setting.out / "index.html").exists()


def test_cell_sizes_and_definitions(setting):
    sizes = importlib.import_module("cell_size")
    sizes.main(of(sizes.Sizes, setting, sizes=(16, 8)))
    record = answers(setting, "cell_size")
    network, params = jaxinterp.load("cifar10_cnn")
    arrays = next(a for name, a in stored(setting).items() if name.startswith("cw"))
    e = effect.pse(network.bind(params), *problem(arrays), 16)
    expected = np.nanmean(np.asarray(effect.shares(e.kind))[arrays["success"]], axis=0)
    found = [float(text.split()[0]) for text in record["results"][ATTACKS[1]]["16"].values()]
    np.testing.assert_allclose(found, expected, atol=6e-4)

    definitions = importlib.import_module("definitions")
    agreement, chance, rho = definitions.compare(e, e)
    assert set(agreement[np.isfinite(agreement)]) <= {1.0}
    assert set(np.round(rho[np.isfinite(rho)], 6)) <= {1.0}
    assert (chance[np.isfinite(chance)] <= 1).all()
    definitions.main(of(definitions.Definitions, setting, size=8))
    record = answers(setting, "definitions")
    assert set(record["results"][ATTACKS[1]]) == set(definitions.DEFINITIONS)


class Reader:
    """A service that sees whether an image is bright, and reads one and the same text."""

    def labels(self, image):
        return (Label("bright" if np.mean(image) > 0.5 * np.max(image) else "dark", 1.0),)

    def text(self, image):
        return ("MEET AT", "noon!")


@pytest.mark.exhaustive
def test_transparent_text(tmp_path, monkeypatch):
    text = importlib.import_module("transparent_text")
    monkeypatch.setattr(apis, "HTTPVision", lambda url, **settings: contextlib.nullcontext(Reader()))
    assert tyro.cli(text.Texts, args=["--opacities", "0.1", "0.3"]).opacities == (0.1, 0.3)
    pictures = tuple(samples("cifar10", crop=Crop(32)).paths[:2])
    asked = text.Texts(pictures, "cifar10_cnn", 16, tmp_path / "text", labels="names", batch_size=2)
    asked = dataclasses.replace(asked, opacities=(0.9, 0.001), text="go", draws=3, queries=15, service="there")
    text.main(asked)
    record = json.loads((tmp_path / "text" / "answers.json").read_text())
    assert record["pictures"] == 2
    weak, strong = record["results"]["0.001"], record["results"]["0.9"]
    assert weak["one overlay"].startswith("0.000")
    assert weak["search, 15 queries"].startswith("0.000")
    assert weak["queries"].startswith("16.000")
    assert float(weak["ssim"].split()[0]) > 0.999 > float(strong["ssim"].split()[0])
    # What the numbers say, found again by hand.
    network, params = jaxinterp.load("cifar10_cnn")
    model, key = network.bind(params), jax.random.key(0)
    [part] = (tmp_path / "text" / "parts").glob("transparent-text-*.npz")
    least = np.load(part)["least"]
    assert record["results"]["the faintest that is found"]["pictures"] == np.isfinite(least[:, 0]).sum()
    assert not (least[:, 0] > 0.9).any()
    clean = jnp.asarray(np.load(part)["clean"])
    attack = typesetting.written(attacks.TransparentText(opacity=0.9, text="go", queries=15), 32, 32)
    drawn = text._draw(attack, clean, example_keys(key, clean), 3)
    predicted = np.stack([np.asarray(model(drawn[:, j])).argmax(-1) for j in range(3)], 1)
    rate = float(np.mean(predicted != np.asarray(model(clean)).argmax(-1)[:, None]))
    assert float(strong["one overlay"].split()[0]) == pytest.approx(rate, abs=6e-4)
    noisy = text.signs_of_size(jax.random.split(key, 2), clean, jnp.asarray([[3.0, 7.0]] * 2))
    np.testing.assert_allclose(jnp.sqrt(jnp.sum((noisy - clean[:, None]) ** 2, (2, 3, 4))), [[3, 7]] * 2, rtol=1e-4)
    for name in ("success", "kinds", "examples"):
        assert (tmp_path / "text" / f"{name}.png").stat().st_size > 10_000
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "text" / "parts").iterdir()}
    text.main(asked)
    assert {path: path.stat().st_mtime_ns for path in parts} == parts
    with pytest.raises(ValueError, match="--opacities must be above 0 and at most 1"):
        text.main(dataclasses.replace(asked, opacities=(0.0, 0.5)))


def test_a_service_is_asked_about_pictures_that_count(tmp_path):
    """Fillers of the last chunk are not sent; without a service nothing is known."""
    text, sent = importlib.import_module("transparent_text"), []

    class Counting(Reader):
        def labels(self, image):
            sent.append(image)
            return super().labels(image)

    images = np.stack([np.full((4, 4, 3), 0.9), np.eye(4)[..., None] * np.ones(3), np.full((4, 4, 3), 0.9)])
    counts = np.array([True, True, False])
    before = text.first_labels(Counting(), images, counts)
    assert before[:2].tolist() == ["bright", "dark"]
    assert len(sent) == 2
    after = text.first_labels(Counting(), images[::-1], counts)
    np.testing.assert_array_equal(text.lost(before, after), [0, 0, np.nan])
    after = text.first_labels(Counting(), images[[1, 1, 0]], counts)
    np.testing.assert_array_equal(text.lost(before, after), [1, 0, np.nan])
    assert np.isnan(text.lost(text.first_labels(None, images, counts), after)).all()
    with pytest.raises(ValueError, match="url must not hold a query") as found:
        text.main(text.Texts(service="https://there.example/v1?key=abc123", out=tmp_path / "out"))
    assert "abc123" not in str(found.value)
    assert not (tmp_path / "out").exists()


def test_secret_text(tmp_path, monkeypatch, capsys):
    secret = importlib.import_module("secret_text")
    assert secret.recovered("burn the letter", ("B urn", "THE lettering")) == (True, 1.0)
    assert secret.recovered("code 4096", ("code", "x", "40 96")) == (False, 1.0)
    assert secret.recovered("code 4096", ()) == (False, 0.0)
    image = np.random.default_rng(0).random((60, 90, 3), np.float32)
    image[20:41, 30:72] = 0.25
    assert secret.corner(image, (21, 42), "flat", np.random.default_rng(0)) == (20, 30)
    made, contrast = secret.embed(image, np.full((21, 42), 255, np.uint8), (20, 30), 0.1)
    np.testing.assert_allclose(made[20:41, 30:72], 0.25 + 0.1 * 0.75, atol=1 / 255)
    assert contrast == pytest.approx(0.075, abs=1 / 255)
    np.testing.assert_allclose(made[:20], image[:20], atol=1 / 255)

    monkeypatch.setattr(apis, "ocr_engine", lambda name: Reader())
    assert tyro.cli(secret.Secrets, args=["--engine", "tesseract"]).engine == "tesseract"
    (tmp_path / "broken.jpg").write_text("not a picture")
    pictures = (str(tmp_path / "broken.jpg"), *samples("imagenet", crop=None).paths)
    asked = secret.Secrets(pictures, (0.05, 0.5), font=12, side=96, limit=5, out=tmp_path / "secret")
    secret.main(asked)
    assert "broken.jpg: could not be read: not a picture" in capsys.readouterr().out
    record = json.loads((asked.out / "answers.json").read_text())
    damaged, *parts = [np.load(path) for path in sorted((asked.out / "parts").iterdir())]
    assert str(damaged["damaged"][0]) == record["results"]["damaged"][0][0] == "broken.jpg"
    assert record["pictures"] == 4
    ids = samples("imagenet", crop=None).ids[:4]
    phrases = [secret.PHRASES[zlib.crc32(name.encode()) % 6] for name in ids]
    assert [str(part["secret"]) for part in parts] == phrases
    rate = np.mean([phrase == "meet at noon" for phrase in phrases])
    assert len(parts) == 4
    assert record["config"]["reader"] == "Reader"
    for place in secret.PLACES:
        assert record["results"]["secrets recovered by Reader"][place]["0.5"].startswith(f"{rate:.3f}")
    assert record["results"]["recovered without a text"] == f"{round(4 * rate)} of 4"
    assert np.all(parts[0]["measured"][:, 0, 2] > parts[0]["measured"][:, 1, 2])  # SSIM falls with opacity
    for name in ("recovery", "examples"):
        assert (asked.out / f"{name}.png").stat().st_size > 10_000
    before = {path: path.stat().st_mtime_ns for path in (asked.out / "parts").iterdir()}
    secret.main(asked)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        # Longer phrases than that of the first picture count, too.
        ({"font": 60, "side": 420}, r"--font 60: 'burn the letter' does not fit in 420 pixels; size \d+ fits"),
        ({"font": 0}, "--font must be at least 1 pixel, got 0"),
        ({"side": 0}, "--side must be at least 1 pixel, got 0"),
        ({"seed": -1}, "--seed must be from 0 to"),
    ],
)
def test_secrets_that_do_not_fit_are_refused_before_anything_is_read(tmp_path, given, message):
    secret = importlib.import_module("secret_text")
    with pytest.raises(ValueError, match=message):
        secret.main(secret.Secrets(out=tmp_path / "out", **given))
    assert not (tmp_path / "out").exists()


@pytest.mark.exhaustive
def test_refinement_and_strength_continue_where_they_were(setting):
    refined = importlib.import_module("refined_attacks")
    asked = of(refined.Refined, setting, refine=(ATTACKS[0],), fractions=(0.5, 1.0))
    refined.main(asked)
    record = answers(setting, "refined_attacks")
    whole = record["results"][ATTACKS[0]]["1"]
    assert whole["top cells by s + p"]["part of the picture"].startswith("1.000")
    of_these = whole["top cells by s + p"]["of these"]
    assert {*of_these} == {"l0", "l1", "l2", "linf"}
    refined_l2, original_l2, ratio = (float(of_these["l2"][w].split()[0]) for w in of_these["l2"])
    assert refined_l2 > 0
    assert ratio == pytest.approx(refined_l2 / original_l2, rel=0.3)  # a mean of ratios, not the ratio of means
    parts = {path: path.stat().st_mtime_ns for path in (setting.out / "refined_attacks" / "parts").iterdir()}
    assert parts
    refined.main(asked)
    assert answers(setting, "refined_attacks") == record
    assert all(path.stat().st_mtime_ns == when for path, when in parts.items())
    with pytest.raises(ValueError, match=r"holds results of another config.*fractions"):
        refined.main(dataclasses.replace(asked, fractions=(0.3,)))
    with pytest.raises(ValueError, match="--refine names pgd, which is not among the attacks: ifgsm"):
        refined.main(dataclasses.replace(asked, refine=("pgd",)))
    arrays = next(a for name, a in stored(setting).items() if name.startswith("ifgsm"))
    masks = refined.supports(arrays, asked.cell, 0.5, jax.random.key(0))
    np.testing.assert_array_equal(masks["union of maps"], masks["map of t0"] | masks["map of t"])
    for name in ("top cells by s + p", "random cells"):
        assert np.mean(masks[name], axis=(1, 2)).tolist() == [0.5, 0.5]
    resized = cam.resize(jnp.asarray(arrays["maps"][:, 0]), 32)
    upper = resized >= np.percentile(resized, 50, axis=(1, 2), keepdims=True)
    assert np.mean(np.asarray(masks["map of t0"]) != upper) < 0.005  # pixels at the percentile, by rounding

    strength = importlib.import_module("untargeted_and_strength")
    strength.main(of(strength.Strengths, setting, strengths=(2, 16), size=8))
    results = answers(setting, "untargeted_and_strength")["results"]
    assert results["untargeted"]["16"]["success"] == "2 of 2"


def test_claims_without_a_case_stay_open():
    """No attack succeeded, I-FGSM has other parameters than by default, a kind of cell occurs in no picture."""
    found = {"ifgsm:steps=5": [], "cw": []}
    told = importlib.import_module("cam_localization").answers(found, 0)
    assert len(told) == 2 * 2 + 1 + 2 * 2
    assert {answer.verdict for answer in told} == {UNDECIDED}
    assert any(answer.claim == "(b) I-FGSM scores lower than cw" for answer in told)
    occurs = importlib.import_module("pse_statistics").occurs
    assert occurs(Estimate(0.0, 0.0, 0.0, 18)) == NOT_CONFIRMED
    assert occurs(Estimate(0.1, 0.0, 0.3, 18)) == UNDECIDED


@pytest.mark.parametrize(
    ("name", "kind", "more", "message"),
    [
        ("cell_size", "Sizes", {"sizes": ()}, r"--sizes: expected at least two sizes to compare, got \[\]"),
        ("cell_size", "Sizes", {"sizes": (8, 33)}, "cells must be from 1 pixel to the image's 32 x 32"),
        ("definitions", "Definitions", {"size": 0}, "cells must be from 1 pixel"),
        ("refined_attacks", "Refined", {"fractions": ()}, "--fractions must be above 0 and at most 1"),
        ("refined_attacks", "Refined", {"fractions": (0.0, 0.5)}, "--fractions must be above 0 and at most 1"),
        ("untargeted_and_strength", "Strengths", {"strengths": ()}, "--strengths must be above 0"),
        ("untargeted_and_strength", "Strengths", {"strengths": (-1, 8)}, "--strengths must be above 0"),
    ],
)
def test_what_is_out_of_range_is_refused_before_anything_is_written(setting, tmp_path, name, kind, more, message):
    module = importlib.import_module(name)
    asked = dataclasses.replace(of(getattr(module, kind), setting, **more), out=tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        module.main(asked)
    assert not (tmp_path / "out").exists()


def test_which_attacks_are_refined(setting):
    refined = importlib.import_module("refined_attacks")

    def chosen(*attack):
        return refined.chosen(dataclasses.replace(of(refined.Refined, setting), attack=attack))[1]

    assert chosen() == ["cw", "ifgsm"]
    assert chosen("ifgsm:steps=5", "ead") == ["ifgsm:steps=5"]
    assert chosen("pgd", "ead") == ["ead", "pgd"]


def test_bad_input_ends_in_a_message(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXPERIMENTS.parent), str(EXPERIMENTS)])}
    command = [sys.executable, str(EXPERIMENTS / "cell_size.py"), "--model", "resnet5", "--out", str(tmp_path / "o")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "resnet50" in done.stderr
