"""Every inconsistency is reported, all of those in a folder at once, and nothing else."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxinterp import broden, cli

from .conftest import write_map

ORACLE = Path(__file__).parents[3] / "shared" / "oracle" / "netdissect"


def test_a_sound_folder(broden_folder, capsys):
    steps = []
    found = broden.check(broden_folder, progress=lambda done, total: steps.append((done, total)))
    assert found.errors == []
    assert found.notes == [
        "index.csv line 5: object: the whole-image label 0 stands for nothing",
        "index.csv line 4: s/nothing.jpg has no label",
        "index.csv line 5: s/zero.jpg has no label",
        "5 files have a format that their names do not say, such as images/s/a.jpg",
    ]
    assert found.summary == "5 images, 6 labels in 4 categories: color 2, material 1, object 2, scene 2"
    assert steps == [(n, 5) for n in range(1, 6)]
    assert cli.main(["broden", "check", str(broden_folder)]) == 0
    assert f"{broden_folder} is sound: 5 images" in capsys.readouterr().out


@pytest.mark.skipif(not ORACLE.is_dir(), reason="no reference arrays in ../shared/oracle/netdissect")
def test_the_reference_is_sound():
    assert broden.check(ORACLE / "broden").errors == []


def _edit(name, old, new):
    def change(folder):
        path = folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


def _map(name, numbers):
    return lambda folder: write_map(folder / "images" / "s" / name, numbers)


def _unlink(name):
    return lambda folder: (folder / name).unlink()


def _save(name, image):
    return lambda folder: image.save(folder / "images" / "s" / name, "PNG")


B = [[1, 1, 1, 0]] * 3

CASES = [
    (_unlink("c_scene.csv"), ["c_scene.csv is missing in FOLDER", "c_scene.csv: the category 'scene' has no labels"]),
    (_edit("index.csv", ",material,", ",stuff,"), ["index.csv line 1: the column 'stuff' is no category"]),
    (_edit("index.csv", "s/c.jpg", "../c.jpg"), ["index.csv line 6: expected a path inside"]),
    (_edit("index.csv", "s/c.jpg", "s/a.jpg"), ["index.csv line 6: the image s/a.jpg is on line 2 already"]),
    (
        _edit("index.csv", "s/c.jpg,val,6", "s/c.jpg,val,7"),
        [
            "index.csv line 6: ih, iw: expected 6 x 8 as on line 2, got 7 x 8",
            "index.csv line 6: images/s/c.jpg: expected 7 x 8 pixels, as in index.csv, got 6 x 8",
        ],
    ),
    (_edit("index.csv", "5;6", "5;6;6"), ["index.csv line 6: scene: the same label or file is there twice"]),
    (
        _edit("index.csv", "5;6", "5;300"),
        [
            "index.csv line 6: scene: c_scene.csv has no label number 300 (car)",
            "c_scene.csv line 3: label number 6 (field, wide-s): frequency: 1 in the table, 0 in the files",
        ],
    ),
    (_edit("label.csv", "2,blue-c", "1,blue-c"), ["label.csv line 3: label number 1 is on line 2 already"]),
    (
        _edit("label.csv", "blue-c", "teal-c"),
        ["c_color.csv line 3: label number 2 is called 'blue-c', and 'teal-c' in"],
    ),
    (
        _edit("label.csv", "scene(2),2", "scene(3),3"),
        ["label.csv line 5: category: expected scene(2), as in c_scene.csv"],
    ),
    (
        _edit("label.csv", "color(2),2", "color(2),3"),
        ["label.csv line 2: label number 1: frequency: expected 2, the sum"],
    ),
    (
        _edit("label.csv", "object(1),1,", "object(1);sky(2),3,"),
        ["label.csv line 7: label number 300: category.csv has no category 'sky'"],
    ),
    (
        _edit("label.csv", "object(1),1,", "object(1);scene(2),3,"),
        ["label.csv line 7: label number 300: c_scene.csv has no such label"],
    ),
    (
        _edit("label.csv", "0.250000", "0.250003"),
        ["label.csv line 7: label number 300 (car): coverage: 0.250003 in the table, 0.25 in"],
    ),
    (
        _edit("c_object.csv", "car,1,2.5e-1", "car,1,0.2"),
        ["c_object.csv line 3: label number 300 (car): coverage: 0.2 in the table, 0.25 in"],
    ),
    (_edit("c_object.csv", "2,300", "3,300"), ["c_object.csv: codes: expected 1 to 2, got [1] to [3]"]),
    (
        _edit("c_object.csv", "2,300,car,1,2.5e-1\n", ""),
        [
            "category.csv line 4: object: last: expected 3, as in c_object.csv, got 300",
            "category.csv line 4: object: count: expected 1, as in c_object.csv, got 2",
            "category.csv line 4: object: frequency: expected 1, as in c_object.csv, got 2",
            "label.csv line 7: label number 300: c_object.csv has no such label",
            "index.csv line 2: object: c_object.csv has no label number 300 (car)",
        ],
    ),
    (
        _edit("category.csv", "scene,5", "scene,4"),
        ["category.csv line 5: scene: first: expected 5, as in c_scene.csv, got 4"],
    ),
    (
        lambda folder: (folder / "c_extra.csv").write_text("code,number,name,frequency,coverage\n1,1,red-c,1,1.0\n"),
        ["c_extra.csv: category.csv has no category 'extra'"],
    ),
    (_edit("index.csv", "s/c.jpg,val", "s/c.jpg,"), ["index.csv line 6: split: expected a name such as train, got"]),
    (_unlink("images/s/c.jpg"), ["index.csv line 6: images/s/c.jpg: cannot be read (No such file"]),
    (_unlink("images/s/b_color.png"), ["index.csv line 3: images/s/b_color.png: cannot be read (No such file"]),
    (_save("b_color.png", Image.new("RGB", (5, 5))), ["index.csv line 3: images/s/b_color.png: expected 3 x 4 pixels"]),
    (_save("c.jpg", Image.new("RGB", (5, 5))), ["index.csv line 6: images/s/c.jpg: expected 6 x 8 pixels"]),
    (
        _save("b_color.png", Image.new("L", (4, 3))),
        ["index.csv line 3: images/s/b_color.png: expected a PNG of 8-bit RGB"],
    ),
    (_map("b_color.png", [[1, 1, 1, 77]] * 3), ["index.csv line 3: color: label number 77 has no row in label.csv"]),
    (_map("b_color.png", [[1, 1, 1, 300]] * 3), ["index.csv line 3: color: c_color.csv has no label number 300 (car)"]),
    (
        _map("b_color.png", [[1, 1, 1, 2]] * 3),
        [
            "c_color.csv line 3: label number 2 (blue-c): frequency: 1 in the table, 2 in the files",
            "c_color.csv line 3: label number 2 (blue-c): coverage: 0.5 in the table, 0.75 in the files",
            "label.csv line 3: label number 2 (blue-c): coverage: 0.5 in the table, 0.75 in the files",
        ],
    ),
]


@pytest.mark.parametrize(("change", "expected"), CASES)
def test_errors(broden_folder, change, expected):
    change(broden_folder)
    found = broden.check(broden_folder).errors
    for message in expected:
        assert any(error.startswith(message.replace("FOLDER", str(broden_folder))) for error in found), found


@pytest.mark.parametrize(
    "number",
    [
        n
        for n, (_, expected) in enumerate(CASES)
        if expected[0].startswith(("index.csv line 3: images", "index.csv line 6: images"))
    ],
)
def test_a_picture_that_cannot_be_read_is_one_error(broden_folder, number):
    """What is counted is less without it, which is no further error."""
    CASES[number][0](broden_folder)
    assert len(broden.check(broden_folder).errors) == 1


def test_all_errors_at_once(broden_folder, capsys):
    for number in (5, 7, 9, 20, 21):
        CASES[number][0](broden_folder)
    errors = broden.check(broden_folder).errors
    for number in (5, 7, 9, 20, 21):
        assert any(error.startswith(CASES[number][1][0]) for error in errors)
    assert cli.main(["broden", "check", str(broden_folder)]) == 2
    printed = capsys.readouterr()
    assert printed.out.count("error: ") == len(errors)
    assert f"{broden_folder} has {len(errors)} errors" in printed.err
    assert "sound" not in printed.out


def test_notes(broden_folder):
    (broden_folder / "images" / "s" / "left.png").write_text("")
    for name, line in (("label.csv", "9,spare,color(0),0,0,\n"), ("c_color.csv", "3,9,spare,0,0\n")):
        with open(broden_folder / name, "a") as file:
            file.write(line)
    (broden_folder / "category.csv").write_text(
        (broden_folder / "category.csv").read_text().replace("color,1,2,2", "color,1,9,3")
    )
    path = broden_folder / "images" / "s" / "b_material.png"
    Image.fromarray(np.asarray(Image.open(path)) + np.array([0, 0, 9], np.uint8)).save(path)
    _edit("index.csv", "s/a.jpg,train", "s/a.jpg,trian")(broden_folder)
    for name in ("a", "b"):
        Image.new("RGB", (8, 6)).save(broden_folder / "images" / "s" / f"{name}.jpg", "JPEG")
    found = broden.check(broden_folder)
    assert found.errors == []
    assert found.notes[:2] == [
        "index.csv line 5: object: the whole-image label 0 stands for nothing",
        "index.csv line 2: the split 'trian' (1 images) is none of train, val, test",
    ]
    assert found.notes[3:] == [
        "index.csv line 4: s/nothing.jpg has no label",
        "index.csv line 5: s/zero.jpg has no label",
        "c_color.csv line 4: label number 9 (spare) is in no image",
        "3 files have a format that their names do not say, such as images/s/nothing.jpg",
        "1 files in images are not in index.csv, such as s/left.png",
    ]
    assert found.notes[2] == "index.csv line 3: images/s/b_material.png has blue in it, which stands for nothing"


def test_tolerance(broden_folder):
    """What was counted on larger maps: coverages a little off, a label lost in one image."""
    write_map(broden_folder / "images" / "s" / "b_color.png", [[1, 1, 1, 2], [1, 1, 1, 0], [1, 1, 1, 0]])
    assert broden.check(broden_folder).errors
    assert broden.check(broden_folder, tolerance=0.01).errors == []
    _edit("c_scene.csv", "street-s,2,2.0", "street-s,4,4.0")(broden_folder)
    _edit("label.csv", "scene(2),2,2.0", "scene(4),4,4.0")(broden_folder)
    _edit("category.csv", "scene,5,6,2,3", "scene,5,6,2,5")(broden_folder)
    assert len(broden.check(broden_folder, tolerance=0.2).errors) == 3
    assert broden.check(broden_folder, tolerance=0.3).errors == []  # 4 - 2 <= 1 + 0.3 * 4
    with pytest.raises(ValueError, match="tolerance"):
        broden.check(broden_folder, tolerance=-0.1)


def test_no_folder(tmp_path, capsys):
    assert cli.main(["broden", "check", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
