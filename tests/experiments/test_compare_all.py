"""The comparison of all attacks: every one is in it at the same budget, answers follow from rows, one may fail."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxinterp import attacks, models
from jaxinterp.job import choose_attacks
from jaxinterp.statistics import Estimate
from jaxinterp.study import CONFIRMED, NOT_CONFIRMED
from jaxinterp.weights import checkpoint, seeded

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("compare_all")


@pytest.mark.parametrize(("passes", "queries"), [(40, 200), (1, 1), (400, 5000)])
def test_every_attack_of_the_registry_is_compared_at_the_budget(script, passes, queries):
    found = script.entries(script.Compared(passes=passes, queries=queries), 32)
    assert {entry.spec.partition(":")[0] for entry in found} == set(attacks.ATTACKS)
    assert len({entry.name for entry in found}) == len(found) >= 40
    families = [entry.family for entry in found]
    assert families == sorted(families, key=list(attacks.FAMILIES).index)
    built: dict[str, Any] = {**choose_attacks([entry.spec for entry in found])}
    for entry in found:
        attack = built[entry.spec]
        assert ("targeted" in entry.goals) == (attack.name not in script.UNTARGETED)
        if entry.family == "at a budget" and attack.name != "apgdt":
            assert attack.iterations <= passes + 1  # the last one judges
        if attack.name in ("square", "transparent-text"):
            tried = attack.steps if attack.name == "square" else attack.queries
            assert tried <= max(1, queries - 1)  # the input is asked about, too
        if attack.name == "watermark":
            assert attack.rounds == {"haar": 2, "dct": 10}[attack.transform]
            assert 1 + script.FOLDERS * attack.failures * attack.rounds <= queries or attack.failures == 1
            assert queries != 5000 or attack.failures == 10
    # Attacks in balls of one norm have one radius.
    radii = {
        norm: {float(a.eps) for a in built.values() if hasattr(a, "eps") and getattr(a, "norm", "linf") == norm}
        for norm in ("l2", "l1")
    }
    assert radii == {"l2": {0.5}, "l1": {8.0}}


def test_an_attack_that_nobody_chose_a_budget_for_is_compared_too(script, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class New(attacks.FGSM):
        name = "new"

    monkeypatch.setitem(attacks.ATTACKS, "new", New)
    monkeypatch.setitem(attacks.FAMILIES, "at a budget", (*attacks.FAMILIES["at a budget"], New))
    [entry] = script.selected(script.entries(script.Compared(), 32), ["new"])
    assert (entry.spec, entry.family) == ("new", "at a budget")


def test_attacks_are_chosen_by_name_by_kind_or_by_a_part_of_a_name(script):
    found = script.entries(script.Compared(), 32)

    def names(*words):
        return [entry.name for entry in script.selected(found, words)]

    assert names() == [entry.name for entry in found]
    assert names("fgsm") == ["FGSM"]
    assert names("c&w", "DDN") == ["C&W", "DDN"]
    assert names("fmn") == ["FMN L0", "FMN L1", "FMN L2", "FMN Linf"]
    assert names("water") == ["Watermark Haar", "Watermark DCT"]
    with pytest.raises(ValueError, match="--attack: 'voodoo' is in no name; known: FGSM, I-FGSM"):
        names("voodoo")


def test_groups_are_squares_in_which_anything_changes(script):
    delta = np.zeros((5, 6, 3), np.float32)
    assert script.groups(delta, 2) == 0
    delta[0, 0, 0] = delta[1, 1, 2] = 0.5  # one square
    delta[4, 5, 1] = -0.1  # a square that is cut off at the border
    delta[2, 2, 0] = 1e-4  # too small to count
    assert script.groups(delta, 2) == 2
    assert script.groups(delta, 13) == 1


def rows(attack, count=12, **values):
    """Rows of successes, alike but for a little."""
    base = {"l0": 100, "l1": 1.0, "l2": 1.0, "groups": 10, "is_label": 0.6, "is_excess": 0.05, "linf": 0.1, "ssim": 0.9}
    base |= dict.fromkeys(("share_suppression", "share_balanced", "share_promotion"), 1 / 3)
    base |= {"success": True, "attack": attack, "family": "f", "goal": "targeted", "is_null": 0.55, "seconds": 0.5}
    base |= {"forward": 9, "backward": 8, "right_b": True, "errs_b": False}
    base |= values
    spread = np.random.default_rng(len(attack) + ord(attack[0])).uniform(0.99, 1.01, count)
    made = [{k: v * float(x) if isinstance(v, float) else v for k, v in base.items()} for x in spread]
    return [{"id": f"{i}.png", **row} for i, row in enumerate(made)]


def test_answers_follow_from_the_rows(script):
    table = {
        ("C&W", "targeted"): rows("C&W", l1=2.0, l2=0.5),
        ("EAD", "targeted"): rows("EAD", l1=1.0, l2=1.0),
        ("StrAttack", "targeted"): rows("StrAttack", groups=20, is_excess=-0.05),
        ("I-FGSM", "targeted"): rows("I-FGSM", is_label=0.7),
    }
    found = {answer.claim: answer for answer in script.answers(table, 0)}

    def verdict(start):
        [answer] = [answer for claim, answer in found.items() if claim.startswith(f"targeted: {start}")]
        return answer.verdict

    assert verdict("EAD's L1 norm is below") == CONFIRMED
    assert "0.50 times" in found["targeted: EAD's L1 norm is below that of C&W"].measured
    assert verdict("C&W's L2 norm is below") == CONFIRMED
    assert verdict("StrAttack changes fewer groups") == NOT_CONFIRMED
    assert verdict("the interpretability score of EAD is above its null") == CONFIRMED
    assert verdict("the interpretability score of StrAttack is above its null") == NOT_CONFIRMED
    assert verdict("the interpretability score of I-FGSM is below that of C&W") == NOT_CONFIRMED
    every = found["all three kinds of cells occur in most perturbations, over all attacks"]
    assert every.verdict == CONFIRMED
    assert every.measured == "in 1.00 [0.74, 1.00] of 48 perturbations, 12 pictures"
    assert not [claim for claim in found if claim.startswith("untargeted")]
    lost = [{**row, "success": False} for row in rows("EAD")]
    fewer = script.answers({**table, ("EAD", "targeted"): lost}, 0)
    assert not [answer for answer in fewer if "EAD" in answer.claim]


def test_a_summary_counts_successes_passes_and_transfer(script):
    some = rows("a", 4, l2=2.0)
    some[0]["success"] = False
    some[1] |= {"right_b": False, "errs_b": True}
    some[2] |= {"errs_b": True, "backward": 41}
    l2s, ssims = (np.median([row[key] for row in some[1:]]) for key in ("l2", "ssim"))
    found = script.summarise(some, ("b",), 0)
    assert (found["success"].mean, found["success"].count) == (0.75, 4)
    assert (found["l2"], found["ssim"]) == (pytest.approx(l2s), pytest.approx(ssims))
    assert (found["transfer_b"].mean, found["transfer_b"].count) == (0.5, 2)
    assert found["seconds"] == pytest.approx(sum(row["seconds"] for row in some))
    assert (found["backward"], found["most_backward"]) == (8, 41)
    assert script.beyond_budget([found], script.Compared()) == ["a (targeted): 41 backward passes, not 40"]
    assert script.beyond_budget([found], script.Compared(passes=41)) == []
    black = {**found, "most_backward": 0, "most_forward": 201}
    assert script.beyond_budget([black], script.Compared()) == ["a (targeted): 201 forward passes, not 200"]
    text = script.markdown([found], ("b",))
    l1, linf = (np.median([row[key] for row in some[1:]]) for key in ("l1", "linf"))
    cells = f"| a | targeted | 0.75 | 100 | {l1:.2f} | {l2s:.3f} | {255 * linf:.2f} | {ssims:.3f} | 10 | 0.33 |"
    assert text.splitlines()[2].startswith(cells)
    assert text.splitlines()[2].endswith("| 0.50 |")
    nothing = script.summarise([{**row, "success": False} for row in some], ("b",), 0)
    assert script.markdown([nothing], ("b",)).splitlines()[2].startswith("| a | targeted | 0.00 |  |  |  |  |  |  |")
    assert script.plain({"x": Estimate(1.0, 0.5, 2.0, 3), "y": 1}) == {"x": 1.0, "x_low": 0.5, "x_high": 2.0, "y": 1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"passes": 0}, "--passes must be at least 1, got 0"),
        ({"queries": 0}, "--queries must be at least 1, got 0"),
        ({"l2": -1.0}, "--l2 must be positive and finite, got -1.0"),
        ({"goals": ()}, "--goals must be untargeted, targeted or both"),
        ({"goals": ("targeted",), "attack": ("watermark",)}, "--attack: 'watermark' is in no name"),
        ({"watermarks": Path("nowhere")}, "watermarks: no such folder: nowhere"),
        ({"transfer": ("resnet50",)}, "--transfer resnet50 has 1000 classes, small_cnn has 10"),
    ],
)
def test_bad_input_is_named(script, given, message, small):
    with pytest.raises(ValueError, match=message):
        script.main(dataclasses.replace(small, **given))


@pytest.fixture
def small(script, tmp_path, monkeypatch):
    """Three pictures and a small network with seeded weights; its own predictions are the labels."""
    root = tmp_path / "ckpts"
    source = {"file": "seeded", "sha256": "0", "known": False}
    params = seeded.params(models.shapes("small_cnn"))
    checkpoint.save(params, root / "small_cnn", name="small_cnn", classes=10, source=source)
    monkeypatch.setenv("JAXINTERP_CKPTS", str(root))
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for name in "abc":
        pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{name}.png")
    return script.Compared(
        pictures=(str(tmp_path / "pictures"),),
        model="small_cnn",
        cell=8,
        out=tmp_path / "out",
        batch_size=2,
        passes=4,
        queries=9,
        linf=24.0,
        goals=("untargeted",),
        transfer=("small_cnn",),
        attack=("FGSM", "I-FGSM"),
    )


def test_one_attack_fails_and_the_others_go_on(script, small, monkeypatch, capsys):
    def broken(self, model, state):
        raise RuntimeError("no step")

    with monkeypatch.context() as patched:
        patched.setattr(attacks.IFGSM, "step", broken)
        script.main(small)
    printed = capsys.readouterr().out
    assert "failed: I-FGSM, untargeted: RuntimeError: no step" in printed
    answers = json.loads((small.out / "answers.json").read_text())
    assert answers["results"]["failed"] == {"I-FGSM, untargeted": "RuntimeError: no step"}
    [row] = answers["results"]["table"]
    parts = sorted((small.out / "attacks").glob("FGSM-untargeted*/parts/??????.npz"))
    stored = [dict(np.load(path)) for path in parts]
    assert [len(each["ids"]) for each in stored] == [2, 1]
    success = np.concatenate([each["success"] for each in stored])
    assert row["success"].startswith(f"{success.mean():.4g} ")
    assert success.any()
    delta = np.concatenate([each["adversarial"] - each["clean"] for each in stored])[success]
    assert row["l2"] == pytest.approx(np.median(np.linalg.norm(delta.reshape(len(delta), -1), axis=1)), rel=1e-5)
    # Without a target, that of the explanation is the class that was reached.
    for each in stored:
        np.testing.assert_array_equal(each["targets"][each["success"]], each["adversarial_class"][each["success"]])
        assert (each["adversarial_class"] != each["labels"]).tolist() == each["success"].tolist()
    assert row["transfer_small_cnn"].startswith("1 ")  # onto the network itself
    assert (row["most_forward"], row["most_backward"]) == (2, 1)

    before = {path: path.stat().st_mtime_ns for path in (small.out / "attacks").rglob("parts/*.npz")}
    script.main(small)  # what failed is made, and nothing else
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    answers = json.loads((small.out / "answers.json").read_text())
    assert answers["results"]["failed"] == {}
    assert [row["attack"] for row in answers["results"]["table"]] == ["FGSM", "I-FGSM"]
    assert answers["results"]["budget"]["beyond"] == []
    assert (small.out / "comparison.png").stat().st_size > 10_000
    lines = (small.out / "table.csv").read_text().splitlines()
    assert len(lines) == 3
    assert len((small.out / "images.csv").read_text().splitlines()) == 7
    # Another budget is another attack.
    with pytest.raises(ValueError, match=r"no attack could be run: ValueError: .*holds results of another config"):
        script.main(dataclasses.replace(small, passes=5, attack=("I-FGSM",)))


@pytest.mark.exhaustive
def test_all_attacks_run_within_their_budgets(script, small, capsys):
    script.main(dataclasses.replace(small, attack=(), goals=script.GOALS, passes=10, queries=100))
    answers = json.loads((small.out / "answers.json").read_text())
    assert answers["results"]["failed"] == {}
    assert answers["results"]["budget"]["beyond"] == []
    found = script.entries(script.Compared(), 32)
    assert len(answers["results"]["table"]) == sum(len(entry.goals) for entry in found)
