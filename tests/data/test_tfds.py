"""Prepared TensorFlow data sets: a tiny one is built here, in the format that needs no TensorFlow."""

import io
import shutil
import sys
import types
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxinterp.data import Crop, DamagedImage, Tfds, batches, open_source

CLASSES = ("cat", "dog", "fish")
TRAIN, TEST = 7, 12


def picture(value: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 10, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Data sets `tinypics` (class, no id), `tinypics_named` (id and class) and `tinypics_plain` (no class)."""
    import tensorflow_datasets
    from tensorflow_datasets.core import registered

    tfds: Any = tensorflow_datasets
    root = tmp_path_factory.mktemp("tfds")

    def build(name, extra, damaged=()):
        features = {"image": tfds.features.Image(shape=(None, None, 3)), **extra}

        def generate(self, count):
            for i in range(count):
                example: dict[str, Any] = {"image": io.BytesIO(b"broken" if i in damaged else picture(10 * i))}
                if "label" in extra:
                    example["label"] = i % 3 if i else -1
                if "id" in extra:
                    example["id"] = f"named_{i}"
                yield i, example

        def body(namespace):
            namespace |= {
                "VERSION": tfds.core.Version("1.2.0"),
                "_info": lambda self: tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                ),
                "_split_generators": lambda self, manager: {
                    "train": self._generate_examples(TRAIN),
                    "test": self._generate_examples(TEST),
                },
                "_generate_examples": generate,
            }

        with registered.skip_registration():
            builder = types.new_class(name, (tfds.core.GeneratorBasedBuilder,), exec_body=body)
            builder(data_dir=root, file_format="array_record").download_and_prepare()

    label = {"label": tfds.features.ClassLabel(names=CLASSES)}
    build("Tinypics", label)
    build("TinypicsNamed", {**label, "id": tfds.features.Text()})
    build("TinypicsPlain", {}, damaged={3})
    return root


def values(source) -> list[int]:
    return [round(float(example.image[0, 0, 0]) * 255) for example in source]


def test_whole_split(root):
    source = Tfds("tinypics", "test", crop=None, data_dir=root)
    examples = [source[i] for i in range(TEST)]
    assert len(source) == TEST
    assert [example.id for example in examples] == [f"test/{i}" for i in range(TEST)]
    assert sorted(values(source)) == [10 * i for i in range(TEST)]  # the order is the one of preparation
    for example, value in zip(examples, values(source), strict=True):
        assert example.image.shape == (8, 10, 3)
        assert example.label == (value // 10 % 3 if value else -1)
    assert source.class_names == CLASSES
    assert source.label_origin == "the feature 'label' of the data set tinypics"
    assert "tensorflow" not in sys.modules


def test_parts_keep_the_positions_of_the_whole(root):
    whole = {
        example.id: example
        for split in ("train", "test")
        for example in Tfds("tinypics", split, crop=None, data_dir=root)
    }
    for split, ids in [
        ("test[3:7]", ["test/3", "test/4", "test/5", "test/6"]),
        ("test[-2:]", ["test/10", "test/11"]),
        ("test[:25%]", ["test/0", "test/1", "test/2"]),
        ("train[5:]+test[:1]", ["train/5", "train/6", "test/0"]),
        ("all", [*(f"train/{i}" for i in range(TRAIN)), *(f"test/{i}" for i in range(TEST))]),
    ]:
        source = Tfds("tinypics", split, crop=None, data_dir=root)
        assert sorted(example.id for example in source) == sorted(ids)
        for example in source:
            assert example.label == whole[example.id].label
            np.testing.assert_array_equal(example.image, whole[example.id].image)


def test_ids_of_the_data_set(root):
    source = Tfds("tinypics_named/1.2.0", "train", crop=None, data_dir=root)
    assert source.id_feature == "id"
    assert [example.id for example in source] == [f"named_{value // 10}" for value in values(source)]


def test_crop_and_batches(root):
    source = open_source("tfds:tinypics/train", crop=Crop(6), classes=3, data_dir=root)
    first, second = batches(source, 4)
    assert first.images.shape == second.images.shape == (4, 6, 6, 3)
    assert second.mask.tolist() == [True, True, True, False]
    assert first.ids == ("train/0", "train/1", "train/2", "train/3")


def test_without_classes_and_with_damage(root):
    source = Tfds("tinypics_plain", "train", crop=None, data_dir=root, classes=1000)
    assert (source.class_names, source.label_origin) == (
        (),
        "predicted by the model, since the data set has no classes",
    )
    errors = []
    [batch] = batches(source, TRAIN, on_damaged=errors.append)
    assert batch.mask.sum() == TRAIN - 1
    assert (batch.labels == -1).all()
    assert [error.reason for error in errors] == ["not a picture in a known format"]
    assert errors[0].id.startswith("train/")


def test_damaged_records(root, tmp_path):
    shutil.copytree(root / "tinypics", tmp_path / "tinypics")
    [file] = (tmp_path / "tinypics").rglob("*test*array_record*")
    source = Tfds("tinypics", "test", crop=None, data_dir=tmp_path)
    file.write_bytes(b"\0" * 10)
    with pytest.raises(DamagedImage, match="test/0: the record cannot be read"):
        source[0]


def test_labels_of_another_kind(root):
    with pytest.raises(ValueError, match="has 3 classes, expected 1000; with labels='predicted'"):
        Tfds("tinypics", "test", crop=None, data_dir=root, classes=1000)
    source = Tfds("tinypics", "test", crop=None, data_dir=root, classes=1000, labels="predicted")
    assert {example.label for example in source} == {-1}
    with pytest.raises(ValueError, match="labels: expected 'auto' or 'predicted'"):
        Tfds("tinypics", "test", crop=None, data_dir=root, labels="names")


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("tinypics", "tset", "no split 'tset'; did you mean 'test'"),
        ("tinypics", "test[3:", r"the split 'test\[3:'"),
        ("tinypics", "test[50:60]", "incompatible with 12 examples"),
        ("tinypics", "test[5:3]", "is empty"),
        ("tinypics", "test[5:4]", "is empty"),
        ("tinypics", "test+test[:1]", "names examples twice"),
        ("tinypix", "test", "unknown data set 'tinypix'; did you mean 'tinypics'"),
        ("tinypics/9.9.9", "test", "'tinypics/9.9.9' is not prepared in .*prepared there: tinypics"),
        ("../tinypics", "test", "expected the name of a data set"),
        ("cifar10", "test", r"'cifar10' is not prepared in .*run: python -c .*file_format='array_record'"),
        ("cifr10", "test", "unknown data set 'cifr10'; did you mean 'cifar10'"),
    ],
)
def test_refuses(root, name, split, message):
    with pytest.raises(ValueError, match=message):
        Tfds(name, split, crop=None, data_dir=root)


def test_other_formats_and_damaged_descriptions(root, tmp_path):
    shutil.copytree(root / "tinypics", tmp_path / "tinypics")
    info = tmp_path / "tinypics" / "1.2.0" / "dataset_info.json"
    text = info.read_text()
    info.write_text(text.replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"is in the format tfrecord, expected array_record.*prepare it again"):
        Tfds("tinypics", "test", crop=None, data_dir=tmp_path)
    info.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"'tinypics' in .* cannot be read"):
        Tfds("tinypics", "test", crop=None, data_dir=tmp_path)


def test_newest_version(root, tmp_path):
    for version in ("1.2.0", "1.10.0"):
        shutil.copytree(root / "tinypics" / "1.2.0", tmp_path / "tinypics" / version)
        info = tmp_path / "tinypics" / version / "dataset_info.json"
        info.write_text(info.read_text().replace("1.2.0", version))
    (tmp_path / "tinypics" / "1.2.0" / "features.json").unlink()
    assert len(Tfds("tinypics", "test", crop=None, data_dir=tmp_path)) == TEST
