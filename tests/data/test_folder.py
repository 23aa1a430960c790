"""Which pictures a folder has, in which order, under which ids, and above all with which labels."""

import os

import numpy as np
import pytest
from PIL import Image

from jaxinterp.data import Crop, DamagedImage, Folder

NAMES = ("tench", "great white shark", "Cardigan", "cardigan")


@pytest.fixture
def put(tmp_path):
    """Writes one-coloured pictures below tmp_path; the value of the colour tells them apart."""

    def put(*names: str, value: int = 0) -> None:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (6, 4), value).save(path, "PNG")

    return put


def labels(paths, **arguments) -> dict[str, int]:
    folder = Folder(paths, crop=None, **{"classes": 1000, **arguments})
    return dict(zip(folder.ids, folder.labels.tolist(), strict=True))


# Finding pictures


def test_finds_pictures_of_any_suffix_and_case_in_order(tmp_path, put):
    names = ["B.JPG", "a.jpeg", "c/d/e.Tiff", "c/f.webp", "g.bmp", "h.gif", "i.tif", "j.png"]
    put(*reversed(names))
    put(".hidden.png", ".cache/x.png", "c/._f.webp")
    (tmp_path / "notes.txt").write_text("no picture")
    folder = Folder(tmp_path, crop=None, classes=10)
    assert folder.ids == tuple(names)
    assert folder.paths == tuple(str(tmp_path / name) for name in names)
    assert len(folder) == len(names)


def test_names_that_are_not_utf8_have_ids_that_can_be_written(tmp_path, put):
    put("a.png")
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes((tmp_path / "a.png").read_bytes())
    folder = Folder(tmp_path, crop=None, classes=10)
    assert set(folder.ids) == {"a.png", r"caf\xe9.png"}
    assert [folder[i].id.encode().decode() for i in range(2)] == list(folder.ids)
    put(r"caf\xe9.png")  # a name that spells out the other's bytes
    with pytest.raises(ValueError, match="cannot be told apart"):
        Folder(tmp_path, crop=None, classes=10)


def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    folder = Folder([tmp_path / "pipe.png", "/dev/zero"], crop=None, classes=10)
    for i in range(2):
        with pytest.raises(DamagedImage, match="not a file"):
            folder[i]


def test_items(tmp_path, put):
    put("a.png", value=51)
    put("b.png", value=255)
    (tmp_path / "c.png").write_text("broken")
    folder = Folder([tmp_path], crop=Crop(3), classes=10)
    for index, value in ((0, 0.2), (1, 1.0)):
        example = folder[index]
        assert example.label == -1
        np.testing.assert_allclose(example.image, np.full((3, 3, 3), value), atol=1e-7)
    with pytest.raises(DamagedImage, match=r"^c\.png: not a picture") as caught:
        folder[2]
    assert caught.value.id == "c.png"


def test_named_files_may_have_any_suffix(tmp_path, put):
    put("picture.dat", "x/other.png")
    folder = Folder([tmp_path / "picture.dat", tmp_path / "x"], crop=None, classes=10)
    assert folder.ids == ("picture.dat", "other.png")
    assert folder[0].image.shape == (4, 6, 3)


def test_order_of_paths_is_kept_and_doubles_count_once(tmp_path, put):
    put("a.png", "b.png", "c/d.png")
    paths = [tmp_path / "b.png", tmp_path / "c", tmp_path, tmp_path / "c" / ".." / "a.png"]
    assert Folder(paths, crop=None, classes=10).ids == ("b.png", "d.png", "a.png")


def test_equal_names_get_their_parents(tmp_path, put):
    put("x/1/a.png", "y/1/a.png", "y/2/a.png", "y/2/b.png")
    folder = Folder([tmp_path / "x/1/a.png", tmp_path / "y/1/a.png", tmp_path / "y/2"], crop=None, classes=10)
    assert folder.ids == ("x/1/a.png", "y/1/a.png", "2/a.png", "b.png")


def test_links_are_followed_but_not_in_circles(tmp_path, put):
    put("real/a.png")
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "top")
    (tmp_path / "top" / "gone.png").symlink_to(tmp_path / "nothing.png")
    folder = Folder(tmp_path / "top", crop=None, classes=10)
    assert folder.ids == ("gone.png", "link/a.png")
    with pytest.raises(DamagedImage, match="No such file"):
        folder[0]


def test_refuses_paths(tmp_path, put):
    put("full/a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").touch()
    with pytest.raises(ValueError, match="at least one"):
        Folder([], crop=None, classes=10)
    with pytest.raises(ValueError, match=r"no such file or folder: .*m0, .*m4 and 3 more$"):
        Folder([tmp_path / "full", *(tmp_path / f"m{i}" for i in range(8))], crop=None, classes=10)
    for name in ("empty", "text"):
        with pytest.raises(ValueError, match=rf"no pictures \(.jpg.*{name}$"):
            Folder([tmp_path / "full", tmp_path / name], crop=None, classes=10)
    for classes in (0, ()):
        with pytest.raises(ValueError, match="classes"):
            Folder(tmp_path / "full", crop=None, classes=classes)


# Labels in file names


def test_file_names(tmp_path, put):
    put("imagenet_00_243.jpg", "imagenet_01_0.jpg", "x_999.png")
    folder = Folder(tmp_path, crop=None, classes=1000)
    assert folder.labels.tolist() == [243, 0, 999]
    assert folder.labels.dtype == np.int32
    assert folder.label_origin == "the last number in each file name"


@pytest.mark.parametrize(
    "other", ["IMG_0231.jpg", "IMG_2034.jpg", "x_1000.png", "cat.png", "a_1b.png", "_1_.png", "12.png"]
)
def test_one_other_name_and_none_is_a_label(tmp_path, put, other):
    put("imagenet_00_243.jpg", other)
    folder = Folder(tmp_path, crop=None, classes=1000)
    assert folder.labels.tolist() == [-1, -1]
    assert folder.label_origin == "predicted by the model, since no labels were found"


def test_file_names_on_request(tmp_path, put):
    put("x_007.png", "y_9.png")
    assert labels(tmp_path, labels="names", classes=10) == {"x_007.png": 7, "y_9.png": 9}
    with pytest.raises(ValueError, match=r"y_9.png has the label 9; expected a class index in 0\.\.8"):
        labels(tmp_path, labels="names", classes=9)
    put("cat.png")
    with pytest.raises(ValueError, match=r"cat.png has no number.*0\.\.9"):
        labels(tmp_path, labels="names", classes=10)


def test_predicted(tmp_path, put):
    put("x_1.png")
    (tmp_path / "labels.csv").write_text("no labels at all")
    folder = Folder(tmp_path, crop=None, labels="predicted", classes=10)
    assert (folder.labels.tolist(), folder.label_origin) == ([-1], "predicted by the model")


# Class folders


def test_class_folders_by_index_and_name(tmp_path, put):
    put(
        "0/a.png",
        "Great_White_Shark/b.png",
        "Great_White_Shark/deep/c_3.png",
        "cardigan/a.png",
        "Cardigan/a.png",
    )
    folder = Folder(tmp_path, crop=None, classes=NAMES)
    assert dict(zip(folder.ids, folder.labels.tolist(), strict=True)) == {
        "0/a.png": 0,
        "Cardigan/a.png": 2,
        "Great_White_Shark/b.png": 1,
        "Great_White_Shark/deep/c_3.png": 1,
        "cardigan/a.png": 3,
    }
    assert folder.label_origin == "the names of the class folders"


@pytest.mark.parametrize("other", ["4/a.png", "holiday/a.png", "CARDIGAN/a.png", "loose.png", "-1/a.png"])
def test_one_other_folder_and_none_is_a_class(tmp_path, put, other):
    put("tench/a.png", other)
    folder = Folder(tmp_path, crop=None, classes=NAMES)
    assert folder.labels.tolist() == [-1, -1]
    why = "the names of the class folders are not used, since pictures lie outside of them"
    assert folder.label_origin == f"predicted by the model: {why}: {other}"
    put("more.png")
    assert Folder(tmp_path, crop=None, classes=NAMES).label_origin.endswith(" and 1 more")


def test_folders_without_pictures_do_not_count(tmp_path, put):
    put("tench/a.png")
    (tmp_path / "notes").mkdir()
    assert labels(tmp_path, classes=NAMES) == {"tench/a.png": 0}


def test_a_number_that_is_also_another_class_name_is_no_label(tmp_path, put):
    put("1/a.png")
    assert labels(tmp_path, classes=("1", "2", "3")) == {"1/a.png": -1}
    assert labels(tmp_path, classes=("0", "1", "2")) == {"1/a.png": 1}


# Labels files


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.csv", "a b.png,1\nc.png,great white shark\nd/e.png,Great_White_Shark\n"),
        ("l.csv", 'file,label\r\n"a b.png","1"\r\nc.png, 1\r\n\r\nd/e.png,001\r\n'),
        ("l.csv", "\ufeffa b.png,1\nc.png,1\ne.png,1\n"),
        ("l.tsv", "image\tclass\na b.png\t1\nc.png\tgreat white shark\n./d/e.png\t1\n"),
        ("l.txt", "a b.png,1\nc.png,great white shark\nd/e.png,1"),
        ("l.txt", "a b.png 1\nc.png great white shark\nd/e.png\t 1\n"),
        ("l.txt", "picture label\na b.png great_white_shark\nc.png 1\nd/e.png 1\n"),
    ],
)
def test_labels_file(tmp_path, put, name, text):
    put("data/a b.png", "data/c.png", "data/d/e.png", "data/d/a.png")
    (tmp_path / "data/d/a.png").unlink()
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    folder = Folder(tmp_path / "data", crop=None, labels=path, classes=NAMES)
    assert folder.ids == ("a b.png", "c.png", "d/e.png")
    assert folder.labels.tolist() == [1, 1, 1]
    assert folder.label_origin == f"the labels file {path}"


def test_space_separated_names_that_begin_alike(tmp_path, put):
    put("a", "a 1", "a 1 2")
    path = tmp_path / "l.txt"
    path.write_text("a 3\na 1 4\na 1 2 5\n")
    assert labels([tmp_path / "a", tmp_path / "a 1", tmp_path / "a 1 2"], labels=path) == {
        "a": 3,
        "a 1": 4,
        "a 1 2": 5,
    }


@pytest.mark.parametrize("name", ["labels.csv", "labels.txt"])
def test_labels_file_in_the_folder_comes_first(tmp_path, put, name):
    put("0/x_5.png", "1/y_6.png")
    (tmp_path / name).write_text("0/x_5.png,8\n1/y_6.png,9\n")
    assert labels(tmp_path, classes=10) == {"0/x_5.png": 8, "1/y_6.png": 9}
    assert labels(tmp_path, classes=10, labels="names") == {"0/x_5.png": 5, "1/y_6.png": 6}
    (tmp_path / ("labels.txt" if name == "labels.csv" else "labels.csv")).write_text("")
    with pytest.raises(ValueError, match="both"):
        labels(tmp_path, classes=10)


def test_labels_file_may_cover_more_than_was_asked_for(tmp_path, put):
    put("a.png", "b.png")
    path = tmp_path / "l.csv"
    path.write_text("a.png,1\nb.png,2\n")
    assert labels([tmp_path / "b.png"], labels=path) == {"b.png": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png,10\nb.png,1\n", r"line 1: a.png: the label '10' is not a class index in 0\.\.9"),
        ("a.png,1\nb.png,-1\n", r"line 2: b.png: the label '-1'.*0\.\.9"),
        ("a.png,1\nb.png,dog\n", r"b.png: the label 'dog'"),
        ("a.png,1\nb.png,\n", r"b.png: the label ''"),
        ("a.png,1\n", r"no label for .*b.png$"),
        ("", r"no label for .*a.png, .*b.png$"),
        ("a.png,1\nb.png,1\nc.png,1\n", "pictures that do not exist: c.png$"),
        ("c.png,dog\na.png,1\nb.png,1\n", "pictures that do not exist: c.png$"),
        ("a.png,1\nb.png,1\na.png,2\n", "line 3: a.png has the label 2, and 1"),
        ("a.png,1,2\nb.png,1,2\n", "line 1: expected a file and a label, got 3"),
        ("a.png;1\n", "line 1: expected a file and a label, got 1"),
    ],
)
def test_refuses_labels_files(tmp_path, put, text, message):
    put("a.png", "b.png")
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        labels(tmp_path, classes=10)


def test_refuses_ambiguous_entries(tmp_path, put):
    put("x/a.png", "y/a.png")
    path = tmp_path / "l.csv"
    path.write_text("a.png,1\n")
    for paths in ([tmp_path / "x", tmp_path / "y"], [tmp_path]):
        with pytest.raises(ValueError, match=r"several pictures: .*x/a.png, .*y/a.png"):
            labels(paths, labels=path)
    path.write_text("x/a.png,1\ny/a.png,CARDIGAN\n")
    with pytest.raises(ValueError, match=r"'CARDIGAN' means any of the classes \[2, 3\]"):
        labels(tmp_path, labels=path, classes=NAMES)


def test_refuses_unreadable_labels_files(tmp_path, put):
    put("a.png")
    with pytest.raises(ValueError, match=r"no such file: 'name'; expected 'auto', 'names'"):
        labels(tmp_path, labels="name")
    (tmp_path / "l.csv").write_bytes(b"a.png,\xff\xfe")
    with pytest.raises(ValueError, match=r"cannot read .*l.csv"):
        labels(tmp_path, labels=tmp_path / "l.csv")


# Several folders


def test_refuses_a_labels_file_with_an_endless_cell(tmp_path, put):
    put("a.png")
    (tmp_path / "labels.csv").write_text('"' + "x" * 200_000)
    with pytest.raises(ValueError, match=r"cannot read .*labels\.csv, line 1: field larger"):
        Folder(tmp_path, crop=None, classes=10)


def test_every_folder_has_its_own_labels(tmp_path, put):
    put("list/a.png", "classes/3/a.png", "plain/a.png", "x_4.png")
    (tmp_path / "list" / "labels.txt").write_text("a.png 2")
    folder = Folder([tmp_path / name for name in ("list", "classes", "plain", "x_4.png")], crop=None, classes=1000)
    assert folder.ids == ("list/a.png", "3/a.png", "plain/a.png", "x_4.png")
    assert folder.labels.tolist() == [2, 3, -1, 4]
    assert folder.label_origin == "; ".join(
        [
            f"the labels file {tmp_path / 'list' / 'labels.txt'}",
            "the names of the class folders",
            "predicted by the model, since no labels were found",
            "the last number in each file name",
        ]
    )


def test_relative_paths_survive_a_change_of_folder(tmp_path, put, monkeypatch):
    put("data/a.png")
    monkeypatch.chdir(tmp_path)
    folder = Folder("data", crop=None, classes=10)
    os.chdir("data")
    assert folder[0].image.shape == (4, 6, 3)
