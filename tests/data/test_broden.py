"""Broden's folders: every number of a small one and of the reference folder, and everything that can be malformed."""

import inspect
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxinterp.data import Broden, DamagedImage, SegmentedSource, segmented_batches
from jaxinterp.data.broden import primary_categories
from jaxinterp.data.broden_tables import Coded

from .conftest import MAPS, write_map

ORACLE = Path(__file__).parents[3] / "shared" / "oracle" / "netdissect"
oracle = pytest.mark.skipif(not ORACLE.is_dir(), reason="no reference arrays in ../shared/oracle/netdissect")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# The reference folder


@pytest.fixture(scope="module")
def reference():
    with np.load(ORACLE / "raw.npz") as arrays:
        return dict(arrays)


@oracle
def test_labels_of_the_reference(reference):
    source = Broden(ORACLE / "broden")
    assert source.concepts.categories == tuple(reference["categories"])
    assert source.concepts.names == tuple(reference["label_names"])
    there = reference["label_names"] != ""
    np.testing.assert_array_equal(source.concepts.category[there], reference["primary_category"][there])
    assert set(source.concepts.category[~there]) == {-1}


@oracle
def test_label_areas_of_the_reference(reference):
    """The areas that the original counted, from label maps and whole-image labels, of every label."""
    source = Broden(ORACLE / "broden")
    areas = np.zeros(302, np.int64)
    for batch in segmented_batches(source, 7):
        own = batch.planes[batch.mask]
        areas += np.bincount(own.ravel(), minlength=302)
        whole = np.bincount(batch.scalars[batch.mask].ravel(), minlength=302)
        areas += whole * own.shape[2] * own.shape[3]
    areas[0] = 0
    np.testing.assert_array_equal(areas, reference["tally_labels"])


@oracle
def test_images_of_the_reference():
    source = Broden(ORACLE / "broden")
    assert len(source) == 40
    assert source.ids == tuple(f"syn/img_{i:03d}.png" for i in range(40))
    with Image.open(ORACLE / "broden" / "images" / source.ids[7]) as image:
        np.testing.assert_array_equal(np.rint(source[7].image * 255), np.asarray(image.convert("RGB")))


# A folder worked out by hand


def test_items(broden_folder):
    source = Broden(broden_folder)
    assert isinstance(source, SegmentedSource)
    assert source.ids == ("s/a.jpg", "s/b.jpg", "s/c.jpg")
    assert (source.left_out, source.channels, source.scalars) == (2, 3, 2)
    assert (source.image_size, source.label_size) == ((6, 8), (3, 4))
    none = np.zeros((3, 4), int)
    expected = {
        "s/a.jpg": ([MAPS["a_color"], MAPS["a_object_1"], MAPS["a_object_2"]], [5, 0]),
        "s/b.jpg": ([MAPS["b_color"], MAPS["b_material"], none], [0, 0]),
        "s/c.jpg": ([none] * 3, [5, 6]),
    }
    for item in (source[i] for i in range(3)):
        planes, scalars = expected[item.id]
        np.testing.assert_array_equal(item.planes, planes)
        assert item.scalars.tolist() == scalars
        assert (item.image.dtype, item.planes.dtype, item.scalars.dtype) == (np.float32, np.int16, np.int16)
        pixels = (np.arange(6 * 8 * 3) + ord(item.id[2])).astype(np.uint8).reshape(6, 8, 3)
        np.testing.assert_array_equal(item.image, pixels / np.float32(255))


def test_concepts(broden_folder):
    concepts = Broden(broden_folder).concepts
    assert concepts.categories == ("color", "material", "object", "scene")
    assert len(concepts.names) == 301
    named = {number: name for number, name in enumerate(concepts.names) if name}
    assert named == {1: "red-c", 2: "blue-c", 3: "wood", 5: "street-s", 6: "field, wide-s", 300: "car"}
    categories = {number: int(concepts.category[number]) for number in named}
    assert categories == {1: 0, 2: 0, 3: 2, 5: 3, 6: 3, 300: 2}  # 3: equal coverages, the last one
    assert set(np.delete(concepts.category, list(named))) == {-1}


def test_the_larger_coverage_decides(broden_folder):
    edit(broden_folder / "c_material.csv", "wood,1,0.5", "wood,1,0.500001")
    assert Broden(broden_folder).concepts.category[3] == 1


def test_a_choice_of_categories(broden_folder):
    source = Broden(broden_folder, categories=["scene", "material"])  # in the order of the file
    assert source.concepts.categories == ("material", "scene")
    assert source.ids == ("s/a.jpg", "s/b.jpg", "s/c.jpg")
    assert source.concepts.category[[1, 3, 5, 300]].tolist() == [-1, 0, 1, -1]
    assert source.concepts.names[300] == "car"
    np.testing.assert_array_equal(source[1].planes, [MAPS["b_material"]])
    only = Broden(broden_folder, categories=["object"])
    assert (only.ids, only.left_out, only.scalars) == (("s/a.jpg",), 4, 0)
    assert only[0].scalars.shape == (0,)
    scenes = Broden(broden_folder, categories=["scene"])
    assert scenes[1].planes.shape == (0, 3, 4)


def test_splits_and_limits(broden_folder):
    assert Broden(broden_folder, split="val").ids == ("s/b.jpg", "s/c.jpg")
    assert Broden(broden_folder, split="val", limit=1).ids == ("s/b.jpg",)
    assert Broden(broden_folder, limit=9).ids == ("s/a.jpg", "s/b.jpg", "s/c.jpg")
    assert Broden(broden_folder, limit=1, categories=["scene", "color"]).channels == 1


def test_another_image_size(broden_folder):
    source = Broden(broden_folder, image_size=5)
    assert source.image_size == (5, 5)
    item = source[0]
    with Image.open(broden_folder / "images" / "s" / "a.jpg") as image:
        resized = np.asarray(image.resize((5, 5), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(np.rint(item.image * 255), resized)
    np.testing.assert_array_equal(item.planes[0], MAPS["a_color"])


def test_numbers_and_files_in_one_cell(broden_folder):
    edit(broden_folder / "index.csv", "s/b_material.png,,", "3;s/b_material.png;,,")
    item = Broden(broden_folder)[1]
    assert item.scalars.tolist() == [3, 0]
    np.testing.assert_array_equal(item.planes[1], MAPS["b_material"])


def test_alpha_and_blue_stand_for_nothing(broden_folder):
    path = broden_folder / "images" / "s" / "b_material.png"
    pixels = np.asarray(Image.open(path))
    Image.fromarray(np.concatenate([pixels[..., :2], pixels[..., 2:] + 9, pixels[..., :1]], -1)).save(path)
    np.testing.assert_array_equal(Broden(broden_folder)[1].planes[1], MAPS["b_material"])


@given(st.lists(st.dictionaries(st.integers(1, 6), st.sampled_from([0.0, 0.25, 0.5, 3.0])), min_size=1, max_size=4))
def test_primary_categories(tables):
    """By the definition: the largest coverage, the last of equals, none where no category has the label."""
    codes = [{n: Coded(0, 0, n, "", 1, coverage) for n, coverage in table.items()} for table in tables]
    found = primary_categories(7, codes)
    for number in range(7):
        own = [(table[number], index) for index, table in enumerate(tables) if number in table]
        assert found[number] == (max(own)[1] if own else -1)


# Malformed tables


@pytest.mark.parametrize("name", ["index.csv", "category.csv", "label.csv", "c_object.csv"])
def test_a_missing_table(broden_folder, name):
    (broden_folder / name).unlink()
    with pytest.raises(ValueError, match=f"broden: {name} is missing"):
        Broden(broden_folder)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("index.csv", "split,", "part,", r"index\.csv line 1: the columns split are missing"),
        ("index.csv", ",material,", ",stuff,", r"index\.csv line 1: the columns material are missing"),
        ("index.csv", ",material,", ",color,", r"index\.csv line 1: the columns material are missing"),
        ("index.csv", "s/a.jpg,train,6", "s/a.jpg,6", r"index\.csv line 2: expected 10 cells, got 9"),
        ("index.csv", "s/b.jpg,val,6", "s/b.jpg,val,six", r"index\.csv line 3: ih: .*got 'six'"),
        ("index.csv", "s/b.jpg,val,6", "s/b.jpg,val,0", r"index\.csv line 3: ih: .*from 1, got '0'"),
        (
            "index.csv",
            "s/b.jpg,val,6,8",
            "s/b.jpg,val,6,9",
            r"line 3: expected images of 6 x 8 as on line 2, got 6 x 9",
        ),
        ("index.csv", "s/c.jpg,val,6,8,3", "s/c.jpg,val,6,8,4", r"line 6: expected label maps of 3 x 4 as .*got 4 x 4"),
        ("index.csv", ",5;6", ",5;7", r"index\.csv line 6: scene: label number 7 has no row in label\.csv"),
        ("index.csv", ",5;6", ",5;99999999999999999999", r"index\.csv line 6: scene: expected a whole number"),
        ("index.csv", "s/c.jpg", "s/a.jpg", r"index\.csv line 6: the image s/a\.jpg is on line 2 already"),
        ("index.csv", "s/c.jpg", "../c.jpg", r"index\.csv line 6: expected a path inside .*'\.\./c\.jpg'"),
        ("index.csv", "s/c.jpg", "/etc/passwd", r"index\.csv line 6: expected a path inside .*'/etc/passwd'"),
        ("index.csv", "s/b_color.png", "s/../../x.png", r"index\.csv line 3: expected a path inside"),
        ("index.csv", "s/b_color.png", "s\\b.png", r"index\.csv line 3: expected a path inside"),
        ("index.csv", "s/c.jpg,", ",", r"index\.csv line 6: expected a path inside .*''"),
        ("index.csv", "s/c.jpg,", '"s/c.jpg,', r"index\.csv line 6: unexpected end of data"),
        ("label.csv", "coverage,", "area,", r"label\.csv line 1: the columns coverage are missing"),
        ("label.csv", "2,blue-c", "1,blue-c", r"label\.csv line 3: label number 1 is on line 2 already"),
        ("label.csv", "2,blue-c", "0,blue-c", r"label\.csv line 3: number: .*from 1, got '0'"),
        ("label.csv", "2,blue-c", "-2,blue-c", r"label\.csv line 3: number: .*got '-2'"),
        ("label.csv", "2,blue-c", "two,blue-c", r"label\.csv line 3: number: .*got 'two'"),
        ("label.csv", "300,car", "32768,car", r"label\.csv line 7: .*up to 32767.*got 32768"),
        ("label.csv", "0.500000", "half", r"label\.csv line 3: coverage: expected a number, got 'half'"),
        ("label.csv", "0.500000", "nan", r"label\.csv line 3: coverage: expected a number, got 'nan'"),
        ("label.csv", "color(1),1", "color(1),1.5", r"label\.csv line 3: frequency: .*got '1\.5'"),
        ("label.csv", "color(1)", "color", r"label\.csv line 3: category: .*got 'color'"),
        ("label.csv", "300,car", "301,car", r"c_object\.csv line 3: label number 300 has no row in label\.csv"),
        ("label.csv", "blue-c", "", r"label\.csv line 3: label 2 has no name"),
        ("category.csv", "scene,5", "object,5", r"category\.csv line 5: the category 'object' is on line 4 already"),
        ("category.csv", "scene,5", "../x,5", r"category\.csv line 5: '\.\./x' cannot be the name"),
        ("category.csv", "scene,5", "split,5", r"category\.csv line 5: 'split' cannot be the name"),
        ("category.csv", "scene,5", "scene,five", r"category\.csv line 5: first: .*got 'five'"),
        ("c_object.csv", "2,300", "2,3", r"c_object\.csv line 3: label number 3 is on line 2 already"),
        ("c_object.csv", "2,300", "1,300", r"c_object\.csv line 3: code 1 is on line 2 already"),
        ("c_object.csv", "2.5e-1", "inf", r"c_object\.csv line 3: coverage: .*got 'inf'"),
        ("c_material.csv", "1,3,wood,1,0.5\n", "", r"c_material\.csv: the category 'material' has no labels"),
    ],
)
def test_malformed_tables(broden_folder, file, old, new, message):
    edit(broden_folder / file, old, new)
    with pytest.raises(ValueError, match=message) as caught:
        Broden(broden_folder)
    assert str(broden_folder) in str(caught.value)
    assert not isinstance(caught.value, DamagedImage)  # that would be skipped


def test_tables_that_are_no_text(broden_folder):
    (broden_folder / "label.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"label\.csv cannot be read"):
        Broden(broden_folder)


def test_byte_order_marks_and_line_ends(broden_folder):
    expected = Broden(broden_folder)
    for path in broden_folder.glob("*.csv"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    found = Broden(broden_folder)
    assert (found.ids, found.concepts.names) == (expected.ids, expected.concepts.names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"categories": ["colour"]}, "has no 'colour'; did you mean 'color'"),
        ({"categories": []}, "expected different names"),
        ({"categories": ["color", "color"]}, "expected different names"),
        ({"split": "test"}, "no 'test'; known: train, val"),
        ({"limit": 0}, "limit: expected at least 1, got 0"),
        ({"image_size": 0}, "image_size: expected at least 1, got 0"),
        ({"split": "train", "categories": ["material"]}, "no image with a label in material"),
    ],
)
def test_bad_arguments(broden_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        Broden(broden_folder, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"categories": "scene"}, r"categories: expected several names, such as \['scene'\], got one text"),
        ({"limit": 3.5}, "limit: expected a whole number, got 3.5"),
        ({"image_size": 8.0}, "image_size: expected a whole number, got 8.0"),
    ],
)
def test_arguments_of_another_type(broden_folder, arguments, message):
    bare = inspect.unwrap(Broden.__init__)  # without the types that only tests check
    with pytest.raises(TypeError, match=message):
        bare(object.__new__(Broden), broden_folder, **arguments)


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        Broden(tmp_path / "none")


# Damaged pictures


def _missing(path):
    path.unlink()


def _cut_short(path):
    path.write_bytes(path.read_bytes()[:44])


def _other_size(path):
    Image.new("RGB", (5, 3)).save(path, "PNG")


def _grey(path):
    Image.new("L", (4, 3)).save(path, "PNG")


def _sixteen_bits(path):
    """The same labels in 16 bits a channel, which Pillow does not write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = np.zeros((3, 4, 3), ">u2")
    rows[..., 0] = 1
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", 4, 3, 16, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def _jpeg(path):
    Image.new("RGB", (4, 3)).save(path, "JPEG")


def _unknown_label(path):
    write_map(path, [[1, 1, 1, 299]] * 3)


def _beyond_16_bits(path):
    write_map(path, [[1, 1, 1, 40000]] * 3)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("b.jpg", _missing, "No such file"),
        ("b.jpg", _cut_short, "damaged"),
        ("b.jpg", _other_size, "expected 6 x 8 pixels, as in index.csv, got 3 x 5"),
        ("b_color.png", _missing, "No such file"),
        ("b_color.png", _cut_short, "damaged"),
        ("b_color.png", _other_size, "expected 3 x 4 pixels, as in index.csv, got 3 x 5"),
        ("b_color.png", _grey, "expected a PNG of 8-bit RGB, got PNG of uint8 x 1"),
        ("b_color.png", _sixteen_bits, "expected a PNG of 8-bit RGB, got PNG of 16-bit x 3"),
        ("b_color.png", _jpeg, "expected a PNG of 8-bit RGB, got JPEG"),
        ("b_color.png", _unknown_label, "label number 299 has no row in label.csv"),
        ("b_color.png", _beyond_16_bits, "label number 40000 has no row in label.csv"),
    ],
)
@pytest.mark.parametrize("image_size", [None, 5])
def test_damage(broden_folder, name, damage, message, image_size):
    damage(broden_folder / "images" / "s" / name)
    source = Broden(broden_folder, image_size=image_size)
    with pytest.raises(DamagedImage) as caught:
        source[1]
    assert caught.value.id == "s/b.jpg"
    assert str(caught.value).startswith(f"s/b.jpg: index.csv line 3, images/s/{name}: ")
    assert message in str(caught.value)
    errors = []
    (batch,) = segmented_batches(source, 2, on_damaged=errors.append)
    assert batch.ids == ("s/a.jpg", "s/c.jpg")
    assert [error.id for error in errors] == ["s/b.jpg"]
    strict = Broden(broden_folder, strict=True, image_size=image_size)
    with pytest.raises(ValueError, match="line 3") as caught:
        list(segmented_batches(strict, 2, on_damaged=errors.append))
    assert not isinstance(caught.value, DamagedImage)
    assert len(errors) == 1


def test_shards(broden_folder):
    source = Broden(broden_folder)
    found = [list(segmented_batches(source, 1, shard=(index, 2))) for index in range(2)]
    assert [[batch.ids for batch in shard] for shard in found] == [
        [("s/a.jpg",), ("s/c.jpg",)],
        [("s/b.jpg",), ("",)],
    ]
    np.testing.assert_array_equal(found[1][1].planes, found[1][0].planes)


def test_links_and_odd_names(broden_folder):
    name = "s/é ü.jpg"
    os.symlink(broden_folder / "images" / "s" / "c.jpg", broden_folder / "images" / name)
    edit(broden_folder / "index.csv", "s/c.jpg", name)
    assert Broden(broden_folder)[2].id == name


@oracle
def test_categories_of_the_reference_in_another_order(tmp_path):
    """Ties go to the last category of category.csv, whatever the order of the columns."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in (ORACLE / "broden").glob("*.csv"):
        shutil.copyfile(path, folder / path.name)
    for category in ("texture", "object"):
        edit(
            folder / f"c_{category}.csv",
            "smooth,15,15.0" if category == "texture" else "0.6428571428571429",
            ("smooth,15,15.0" if category == "texture" else "15.0"),
        )
    concepts = Broden(folder).concepts
    assert concepts.categories[concepts.category[23]] == "texture"
    lines = (folder / "category.csv").read_text().splitlines()
    (folder / "category.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    concepts = Broden(folder).concepts
    assert concepts.categories[concepts.category[23]] == "object"
