"""Which pictures a run belongs to, on a small network with seeded weights."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxinterp import explain, models
from jaxinterp import job as jobs
from jaxinterp import pictures as seen
from jaxinterp.data import DamagedImage, Example
from jaxinterp.explain.page import figure_path
from jaxinterp.runs import Run, file_name
from jaxinterp.weights import checkpoint, seeded


@pytest.fixture(autouse=True)
def small_cnn(tmp_path, monkeypatch) -> None:
    """A checkpoint of the small network."""
    params = seeded.params(models.shapes("small_cnn"))
    source = {"file": "seeded", "sha256": "0", "known": False}
    checkpoint.save(params, tmp_path / "ckpts" / "small_cnn", name="small_cnn", classes=10, source=source)
    monkeypatch.setenv("JAXINTERP_CKPTS", str(tmp_path / "ckpts"))


def noise(folder: Path, *names: str, seed: int = 0) -> Path:
    """Writes pictures of noise."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / name)
    return folder


def job(folder: Path, out: Path, **more) -> explain.Explained:
    arguments = {"model": "small_cnn", "specs": ["ifgsm:steps=1"], "cell": 32, "say": lambda line: None}
    return explain.explain([folder], out=out, **{**arguments, **more})


def test_other_pictures_under_the_same_names_are_another_run(tmp_path):
    names = ("a.png", "b.png")
    first, second = noise(tmp_path / "first", *names), noise(tmp_path / "second", *names, seed=1)
    moved = tmp_path / "moved"
    shutil.copytree(first, moved)
    job(first, tmp_path / "out")
    job(moved, tmp_path / "out")  # the same pictures elsewhere: nothing is left to do
    with pytest.raises(ValueError, match=r"results of another config.*source"):
        job(second, tmp_path / "out")


def test_a_picture_that_breaks_during_the_run_is_said_and_shifts_no_labels(tmp_path, monkeypatch):
    folder = noise(tmp_path / "pictures", "a.png", "b.png")
    survey = jobs.survey

    def then_break(*args, **kwargs):
        found = survey(*args, **kwargs)
        (folder / "a.png").write_text("broken")
        return found

    monkeypatch.setattr(jobs, "survey", then_break)
    with pytest.raises(ValueError, match=r"a\.png: not a picture .*could be read when the run began"):
        job(folder, tmp_path / "out")


def test_only_unreadable_pictures(tmp_path):
    (tmp_path / "a.png").write_text("not a picture")
    with pytest.raises(ValueError, match="no picture could be read"):
        job(tmp_path / "a.png", tmp_path / "out")


def test_images_that_the_network_cannot_take(tmp_path):
    np.savez(tmp_path / "grey.npz", images=np.zeros((2, 32, 32), np.uint8))
    with pytest.raises(ValueError, match=r"small_cnn cannot take images of 32 x 32 pixels and 1 channel: "):
        job(tmp_path / "grey.npz", tmp_path / "out")


class Mixed:
    """Four pictures: one is damaged, one has no label."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 1:
            raise DamagedImage("b", "cut short")
        return Example(np.full((2, 2, 3), index / 4, np.float32), (3, 5, -1, 7)[index], "abcd"[index])


def test_pictures_that_are_damaged_or_have_no_label_are_left_out_and_said():
    said = []
    images, labels, ids = seen.labelled(Mixed(), said.append)
    np.testing.assert_array_equal(images[:, 0, 0, 0], [0, 0.75])
    assert (labels.tolist(), ids) == ([3, 7], ("a", "d"))
    assert said == ["2 of 4 pictures are left out", "  b: could not be read: cut short", "  c: has no label"]
    for few in ((1, 2), (1,), ()):
        with pytest.raises(ValueError, match=f"none of {len(few)} can be read and has a label"):
            seen.labelled(seen.Selection(Mixed(), few), said.append)


def test_the_survey_takes_no_larger_batches_than_there_are_pictures(tmp_path, monkeypatch):
    sizes = []
    classify = seen.classify
    monkeypatch.setattr(seen, "classify", lambda m, x: (sizes.append(len(x)), classify(m, x))[1])
    job(noise(tmp_path / "pictures", "a.png", "b.png"), tmp_path / "out", batch_size=4000)
    assert sizes == [2]


def test_attacks_and_pictures_whose_names_are_cut_off_have_figures_of_their_own(tmp_path):
    run = Run(tmp_path / "run", {})
    long = "pgd:eps=8/255,step_size=2/255,kappa=0.0,norm=linf,steps=20,random_start=true,stop_on_success="
    names = [long + "true", long + "false", "pgd:eps=8/255", "pgd:eps=8_255", "pgd"]
    paths = [figure_path(run, attack, picture) for attack in names for picture in ("a b", "a_b", "x" * 99, "x" * 98)]
    assert len(set(paths)) == len(paths)
    assert len({path.parent for path in paths}) == len(names)
    assert file_name("pgd") == "pgd"


def test_what_an_older_version_stored_is_looked_at_again(tmp_path):
    """It did not store which labels are predictions."""
    folder = noise(tmp_path / "pictures", "a.png", "b.png")
    found = job(folder, tmp_path / "out")
    stored = found.run.read_part("pictures")
    assert stored is not None
    assert stored.pop("unlabelled").tolist() == [True, True]
    found.run.write_part("pictures", stored)
    job(folder, tmp_path / "out")
    again = found.run.read_part("pictures")
    assert again is not None
    assert again.pop("unlabelled").tolist() == [True, True]
    assert all(np.array_equal(again[name], stored[name]) for name in {*again, *stored})
