"""Sets made from pictures: what is read back is what was put in, and the folder is consistent."""

import importlib.util
import os

import numpy as np
import pytest
from PIL import Image

from jaxinterp import broden, cli
from jaxinterp.broden.colors import NAMES, _lab, color_names
from jaxinterp.data import Broden, segmented_batches

# Focal colours of the eleven terms, as they are shown to people, and everyday colours.
COLORS = {
    "black": [(0, 0, 0), (20, 18, 16), (8, 8, 24)],
    "blue": [(0, 0, 255), (135, 206, 235), (70, 100, 140)],
    "brown": [(101, 67, 33), (120, 80, 40), (150, 110, 70)],
    "grey": [(128, 128, 128), (70, 70, 72), (200, 200, 200)],
    "green": [(0, 128, 0), (0, 255, 0), (100, 120, 60)],
    "orange": [(255, 140, 0), (240, 120, 20)],
    "pink": [(255, 192, 203), (255, 105, 180)],
    "purple": [(128, 0, 128), (90, 40, 130)],
    "red": [(255, 0, 0), (180, 20, 30), (104, 4, 12)],
    "white": [(255, 255, 255), (248, 248, 248), (255, 246, 244)],
    "yellow": [(255, 255, 0), (240, 220, 80)],
}


@pytest.mark.parametrize(("name", "color"), [(name, color) for name, colors in COLORS.items() for color in colors])
def test_colors(name, color):
    pixels = np.array([[color, (0, 0, 0)]], np.uint8)
    names = color_names(pixels)
    assert (names.shape, names.dtype) == ((1, 2), np.uint8)
    assert NAMES[names[0, 0]] == name


def test_lab():
    """CIE L*a*b* of sRGB's primaries and of grey, as tables give them."""
    found = _lab(np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [119, 119, 119], [255, 255, 255], [2, 2, 2]]))
    expected = [[53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86], [50.03, 0, 0], [100, 0, 0]]
    np.testing.assert_allclose(found[:5], expected, atol=0.05)
    np.testing.assert_allclose(found[5], [903.3 * 2 / 255 / 12.92, 0, 0], atol=0.01)  # the straight parts of both


def test_every_color_has_one_of_the_names_and_each_is_used():
    levels = np.arange(0, 256, 5, dtype=np.uint8)
    everything = np.stack(np.meshgrid(levels, levels, levels), -1)
    assert set(np.unique(color_names(everything))) == set(range(11))


def put(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


@pytest.fixture
def pictures(tmp_path):
    """Two pictures, left half red and right half blue, with masks; one of them in a sub-folder."""
    halves = np.zeros((40, 80, 3), np.uint8)
    halves[:, :40], halves[:, 40:] = (255, 0, 0), (0, 0, 255)
    put(tmp_path / "in" / "one.png", halves)
    put(tmp_path / "in" / "sub" / "two.png", halves)
    boxes = np.zeros((40, 80), np.uint8)
    boxes[:20] = 7
    put(tmp_path / "masks" / "one.object.png", boxes)
    put(tmp_path / "masks" / "one.object.2.png", boxes[::-1])
    put(tmp_path / "masks" / "one.part.png", np.where(boxes, 0, 9))
    put(tmp_path / "masks" / "sub" / "two.object.png", np.full((40, 80), 8))
    (tmp_path / "masks" / "names.csv").write_text("category,value,name\nobject,7,box\nobject,8,all\npart,9,box\n")
    return tmp_path


def test_colors_and_masks_of_the_middle_crop(pictures):
    made = broden.make([pictures / "in"], pictures / "out", masks=pictures / "masks", size=32, crops=1)
    assert (made.images, made.labels, made.damaged) == (2, {"color": 2, "object": 2, "part": 1}, [])
    source = Broden(pictures / "out")
    assert (source.image_size, source.label_size, source.channels) == ((32, 32), (16, 16), 4)
    names = np.array(source.concepts.names)
    items = {item.id: item for item in (source[i] for i in range(2))}
    one = items["pictures/one_00.jpg"]
    color, first, second, part = names[one.planes]
    assert (color[:, :7] == "red-c").all()  # the middle column may mix the two
    assert (color[:, 9:] == "blue-c").all()
    assert (first[:8] == "box").all()
    assert (first[8:] == "").all()
    np.testing.assert_array_equal(second, first[::-1])
    np.testing.assert_array_equal(part, second)
    [two] = [item for name, item in items.items() if "two" in name]
    assert (names[two.planes[1]] == "all").all()
    assert (two.planes[2:] == 0).all()
    assert source.concepts.names[12:] == ("box", "all")
    box = source.concepts.names.index("box")  # as in Broden a name has one number, whatever its category
    assert source.concepts.categories[source.concepts.category[box]] == "object"
    assert broden.check(pictures / "out").errors == []
    table = (pictures / "out" / "label.csv").read_text()
    assert f"{box},box,object(1);part(1),2,1.500000," in table


def test_colors_are_those_of_the_stored_pixels(tmp_path, rng):
    put(tmp_path / "in" / "noise.png", np.kron(rng.integers(0, 256, (16, 16, 3)), np.ones((4, 4, 1))))
    broden.make([tmp_path / "in"], tmp_path / "out", size=32, crops=5)
    source = Broden(tmp_path / "out")
    for item in (source[i] for i in range(5)):
        with Image.open(tmp_path / "out" / "images" / item.id) as image:
            seen = np.asarray(image.resize((16, 16), Image.Resampling.BOX))
        np.testing.assert_array_equal(item.planes[0], color_names(seen) + 1)


def test_textures_and_scenes(tmp_path, rng):
    grey = rng.integers(0, 256, (30, 30))
    for name in ("woven/a.png", "woven/b.png", "brick_1.png", "brick_2.png"):
        put(tmp_path / "textures" / name, grey)
    put(tmp_path / "scenes" / "street" / "x.png", grey)
    made = broden.make(
        [], tmp_path / "out", textures=tmp_path / "textures", scenes=tmp_path / "scenes", size=16, crops=3
    )
    assert made.images == 15
    source = Broden(tmp_path / "out")
    names = np.array(source.concepts.names)
    found = {}
    for batch in segmented_batches(source, 4):
        for id, scalars in zip(batch.ids, batch.scalars, strict=True):
            found.setdefault(id.rpartition("_")[0], set()).add(str(names[scalars][0]))
    found.pop("", None)
    assert sorted(map(sorted, found.values())) == [["brick"], ["brick"], ["street-s"], ["woven"], ["woven"]]
    assert {str(name) for name in names} >= {"brick", "woven", "street-s", "grey-c"}
    checked = broden.check(tmp_path / "out")
    assert (checked.errors, checked.notes) == ([], [])
    category = (tmp_path / "out" / "category.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in category[1:]] == ["color", "scene", "texture"]
    assert category[3].endswith(",2,12")


def files(folder):
    return {
        os.path.relpath(os.path.join(place, name), folder): open(os.path.join(place, name), "rb").read()
        for place, _, names in os.walk(folder)
        for name in names
    }


def test_the_same_seed_gives_the_same_bytes(pictures):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        broden.make([pictures / "in"], pictures / name, size=32, crops=4, seed=seed)
    assert files(pictures / "a") == files(pictures / "b")
    assert files(pictures / "a") != files(pictures / "c")


def test_another_picture_changes_no_crop(pictures, rng):
    broden.make([pictures / "in"], pictures / "a", size=32, crops=4)
    put(pictures / "in" / "another.png", rng.integers(0, 256, (50, 40, 3)))
    broden.make([pictures / "in"], pictures / "b", size=32, crops=4)
    before, after = files(pictures / "a"), files(pictures / "b")
    kept = {name for name in before if name.endswith(".jpg")}
    assert len(kept) == 8
    assert all(after[name] == before[name] for name in kept)


def test_crops_differ_and_splits_keep_pictures_together(tmp_path, rng):
    for i in range(20):
        put(tmp_path / "in" / f"{i}.png", rng.integers(0, 256, (40, 60, 3)))
    broden.make([tmp_path / "in"], tmp_path / "out", size=16, crops=4)
    source = Broden(tmp_path / "out")
    splits = {}
    for row in source.rows:
        splits.setdefault(row.image.rpartition("_")[0], set()).add(row.split)
    assert all(len(own) == 1 for own in splits.values())
    assert set().union(*splits.values()) == {"train", "val"}
    contents = {content for name, content in files(tmp_path / "out").items() if name.endswith(".jpg")}
    assert len(contents) == 80
    assert list(source.ids) != sorted(source.ids)


def test_damaged_pictures_are_left_out(pictures):
    (pictures / "in" / "broken.jpg").write_text("no picture")
    made = broden.make([pictures / "in"], pictures / "out", size=16, crops=2)
    assert made.damaged == [("broken.jpg", "not a picture in a known format")]
    assert made.images == 4
    assert broden.check(pictures / "out").errors == []
    with pytest.raises(ValueError, match=r"no picture can be read: broken\.jpg \(not a picture"):
        broden.make([pictures / "in" / "broken.jpg"], pictures / "none")
    assert sorted(path.name for path in pictures.iterdir()) == ["in", "masks", "out"]  # nothing half-made is left


def test_names_that_would_meet(tmp_path, rng):
    for name in ("a.png", "a.bmp", "a;b,c.png", "x/a.png", "é.png"):
        put(tmp_path / "in" / name, rng.integers(0, 256, (20, 20, 3)))
    made = broden.make([tmp_path / "in"], tmp_path / "out", size=16, crops=2)
    assert made.images == 10
    assert len(Broden(tmp_path / "out", strict=True)[9].planes) == 1
    assert broden.check(tmp_path / "out").errors == []


def _mask_of_nothing(folder):
    put(folder / "masks" / "three.object.png", np.zeros((4, 4)))


def _no_category(folder):
    put(folder / "masks" / "one.thing.png", np.zeros((40, 80)))


def _no_name(folder):
    put(folder / "masks" / "one.part.png", np.full((40, 80), 200))


def _wrong_size(folder):
    put(folder / "masks" / "one.part.png", np.zeros((40, 81)))


def _colors(folder):
    put(folder / "masks" / "one.part.png", np.zeros((40, 80, 3)))


def _broken(folder):
    (folder / "masks" / "one.part.png").write_text("no")


def _no_names_file(folder):
    (folder / "masks" / "names.csv").unlink()


def _value_twice(folder):
    with open(folder / "masks" / "names.csv", "a") as file:
        file.write("part,9,again\n")


def _reserved(folder):
    with open(folder / "masks" / "names.csv", "a") as file:
        file.write("color,9,again\n")


def _two_owners(folder):
    put(folder / "in" / "one.bmp", np.zeros((40, 80, 3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_mask_of_nothing, r"three\.object\.png belongs to no picture"),
        (_no_category, r"one\.thing\.png: names\.csv has no category 'thing'; known: object, part"),
        (_no_name, r"one\.part\.png has the values 200, which names\.csv does not have"),
        (_wrong_size, r"one\.part\.png: expected the 40 x 80 pixels of its picture, got 40 x 81"),
        (_colors, r"one\.part\.png: expected a PNG of numbers"),
        (_broken, r"one\.part\.png: not a picture"),
        (_no_names_file, r"expected names\.csv"),
        (_value_twice, r"names\.csv line 5: part has the value 9 twice"),
        (_reserved, r"names\.csv line 5: 'color' cannot be the category of a mask"),
        (_two_owners, r"belongs to any of one\.bmp, one\.png"),
    ],
)
def test_bad_masks(pictures, change, message):
    change(pictures)
    with pytest.raises(ValueError, match=message):
        broden.make([pictures / "in"], pictures / "out", masks=pictures / "masks", size=16, crops=1)
    assert not (pictures / "out").exists()


def test_sixteen_bit_masks_and_palettes(pictures):
    wide = np.zeros((40, 80), np.uint16)
    wide[:, 40:] = 300
    Image.fromarray(wide).save(pictures / "masks" / "one.part.png")
    palette = Image.fromarray(np.full((40, 80), 7, np.uint8)).convert("P")
    palette.putpalette([i // 3 % 256 for i in range(768)])
    palette.save(pictures / "masks" / "sub" / "two.object.png")
    with open(pictures / "masks" / "names.csv", "a") as file:
        file.write("part,300,far\n")
    broden.make([pictures / "in"], pictures / "out", masks=pictures / "masks", size=16, crops=1)
    source = Broden(pictures / "out", categories=["part"])
    names = np.array(source.concepts.names)
    assert (names[source[0].planes[0]] == np.where(np.arange(8) < 4, "", "far")).all()
    objects = Broden(pictures / "out", categories=["object"])
    [two] = [item for item in (objects[i] for i in range(2)) if "two" in item.id]
    assert set(np.array(objects.concepts.names)[two.planes[0]].ravel()) == {"box"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "15"], "size: expected at least 16, got 15"),
        (["--crops", "0"], "crops: expected at least 1, got 0"),
        (["--seed", "-1"], "seed: expected at least 0, got -1"),
        (["--masks", "nowhere"], "names.csv"),
        (["--textures", "nowhere"], "no such file or folder: nowhere"),
    ],
)
def test_bad_arguments(pictures, arguments, message, capsys):
    assert cli.main(["broden", "make", str(pictures / "in"), "--out", str(pictures / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (pictures / "out").exists()


def test_scenes_need_folders(pictures):
    with pytest.raises(ValueError, match=r"sub-folders that are named after scenes, got one\.png"):
        broden.make([], pictures / "out", scenes=pictures / "in")
    with pytest.raises(ValueError, match="masks: expected pictures"):
        broden.make([], pictures / "out", masks=pictures / "masks")


def test_command(pictures, capsys):
    out = pictures / "deep" / "out"
    command = ["broden", "make", str(pictures / "in"), "--out", str(out), "--size", "32", "--crops", "2"]
    assert cli.main(command) == 0
    # Where the halves meet, some pixels are purple.
    assert f"{out}: 4 images, 3 labels (color 3)" in capsys.readouterr().out
    assert cli.main(["broden", "check", str(out)]) == 0
    assert "is sound: 4 images, 3 labels in 1 categories: color 3" in capsys.readouterr().out
    before = files(out)
    assert cli.main(command) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert files(out) == before


@pytest.mark.skipif(importlib.util.find_spec("foolbox") is None, reason="foolbox is not installed")
def test_installed_pictures(tmp_path):
    made = broden.make([], tmp_path / "out", size=32, crops=1)
    textures = importlib.util.find_spec("skimage") is not None
    assert made.images == (29 if textures else 20)
    assert made.labels.get("texture", 0) == (3 if textures else 0)
    assert made.damaged == []
    assert broden.check(tmp_path / "out").errors == []
    assert "CC0" in (tmp_path / "out" / "README.txt").read_text()


def test_without_installed_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "jaxinterp\[samples\]"'):
        broden.make([], tmp_path / "out")
