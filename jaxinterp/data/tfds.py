"""Prepared TensorFlow Datasets as a source, without TensorFlow.

A data set is prepared once, with `tfds.builder(NAME, file_format="array_record").download_and_prepare()`, and read
here by random access. Pictures are decoded by `decode`, as everywhere in
this package, and not by tensorflow-datasets, which is imported when a source is made.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from jaxinterp.network import suggest

from .decode import Crop, decode
from .source import UNKNOWN, DamagedImage, Example

_ID_FEATURES = ("tfds_id", "id", "image_id", "image/id", "file_name", "filename", "image/filename")
_FORMAT = "array_record"


class Tfds:
    """One split, or part of one, of a prepared data set.

    Attributes:
        name: the data set, such as "cifar10" or "imagenet2012_corrupted/fog_3".
        split: as given, such as "test[:1000]".
        class_names: names of the classes in the order of the labels; empty where the data set has no classes.
        id_feature: the feature that gives the ids; None where they are made of split and position.
        label_origin: where the labels came from, in plain words.
        crop: as given.
    """

    def __init__(
        self,
        name: str,
        split: str,
        *,
        crop: Crop | None,
        data_dir: str | os.PathLike[str] | None = None,
        classes: int | None = None,
        labels: str = "auto",
    ) -> None:
        """Opens a prepared data set; no example is read yet.

        An example's id is what the data set calls it (a feature named id or file_name, assumed to be unique), else
        "SPLIT/POSITION", with the position in the whole split, whatever part was asked for.

        Args:
            name: NAME, NAME/CONFIG, NAME/VERSION or NAME/CONFIG/VERSION; without a version the latest prepared one.
            split: a split with or without a slice, or several joined by "+", in tensorflow-datasets' notation.
            crop: how every picture is resized and cropped; None keeps its own size.
            data_dir: where data sets were prepared; None means $TFDS_DATA_DIR or ~/tensorflow_datasets.
            classes: the number of classes, where the data set's is to be checked against it.
            labels: "auto" takes those of the data set, "predicted" none (all are -1).

        Raises:
            ValueError: the data set is not prepared (with the command), was prepared in a format that only TensorFlow
                reads, has no such split or no pictures, or its number of classes is another.
        """
        if labels not in ("auto", "predicted"):
            raise ValueError(f"labels: expected 'auto' or 'predicted' for a TFDS data set, got {labels!r}")
        import tensorflow_datasets

        tfds: Any = tensorflow_datasets
        root = Path(data_dir if data_dir is not None else tfds.core.constants.DATA_DIR).expanduser()
        try:
            builder = tfds.builder_from_directory(_find(name, root))
        except ValueError:
            raise
        except Exception as error:  # whatever a damaged description makes tensorflow-datasets raise
            raise ValueError(f"the data set {name!r} in {root} cannot be read ({_first_line(error)})") from error
        self.name, self.split, self.crop = name, split, crop
        self._image, label = _features(name, builder.info, tfds)
        self.class_names = () if label is None else tuple(builder.info.features[label].names)
        self._label = label if labels == "auto" else None
        if self._label is not None and classes is not None and len(self.class_names) != classes:
            raise ValueError(
                f"labels: the data set {name!r} has {len(self.class_names)} classes, expected {classes};"
                " with labels='predicted' its pictures can be used all the same"
            )
        self.label_origin = (
            f"the feature {label!r} of the data set {name}"
            if self._label is not None
            else "predicted by the model" + (", since the data set has no classes" if label is None else "")
        )
        self.id_feature = next((key for key in _ID_FEATURES if key in builder.info.features), None)
        self._bases, self._positions = _places(name, split, builder.info, tfds)
        formats = sorted(format.value for format in builder.info.available_file_formats())
        if _FORMAT not in formats:
            raise ValueError(
                f"the data set {name!r} in {root} is in the format {' and '.join(formats)}, expected {_FORMAT}, which"
                f" is read without TensorFlow; prepare it again in another folder: {_command(name, Path('FOLDER'))}"
            )
        # Only what is asked for is taken from a record, and the picture as it was encoded.
        used = [self._image, self._label, self.id_feature]
        self._features = tfds.features.FeaturesDict({key: builder.info.features[key] for key in used if key})
        self._decoders = {self._image: tfds.decode.SkipDecoding()}
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        try:
            self._records = {
                base: builder.as_data_source(base, deserialize_method=raw, file_format=_FORMAT) for base in self._used()
            }
        except Exception as error:
            raise ValueError(f"the data set {name!r} in {root} cannot be read ({_first_line(error)})") from error
        self._lock = threading.Lock()  # files are opened at the first read, which is not safe from several threads

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Example:
        base, position = self._bases[self._positions[index][0]], int(self._positions[index][1])
        place = f"{base}/{position}"
        try:
            with self._lock:
                raw = self._records[base][position]
            record: Any = self._features.deserialize_example_np(raw, decoders=self._decoders)
            name = self._id(record, place)
            content, label = record[self._image], UNKNOWN if self._label is None else int(record[self._label])
        except Exception as error:  # a damaged record, from the reader or from protobuf
            raise DamagedImage(place, f"the record cannot be read ({_first_line(error)})") from error
        try:
            return Example(decode(bytes(content), self.crop), label, name)
        except DamagedImage as error:
            raise DamagedImage(name, error.reason) from error

    def _used(self) -> list[str]:
        return [self._bases[number] for number in np.unique(self._positions[:, 0])]

    def _id(self, record: dict[str, Any], place: str) -> str:
        given = record.get(self.id_feature) if self.id_feature else None
        text = given.decode("utf-8", "replace") if isinstance(given, bytes) else "" if given is None else str(given)
        return text or place


def _find(name: str, root: Path) -> Path:
    """The folder of a prepared data set: root/NAME[/CONFIG]/VERSION."""
    parts = name.strip("/").split("/")
    folder = root.joinpath(*parts)
    if ".." in parts or not parts[0]:
        raise ValueError(f"expected the name of a data set, got {name!r}")
    if (folder / "dataset_info.json").is_file():
        return folder
    versions = sorted((v for v in _prepared(folder) if len(v) == 1), key=lambda v: _version(v[0]))
    if versions:
        return folder / versions[-1][0]
    configs = sorted({inner[0] for inner in _prepared(folder)})
    if configs:
        shown = ", ".join(f"{name}/{config}" for config in configs)
        raise ValueError(f"the data set {name!r} has several configurations: {shown}")
    from tensorflow_datasets import list_builders

    prepared = sorted({"/".join(inner[:-1]) for inner in _prepared(root)})
    if parts[0] in {known.split("/")[0] for known in prepared} or parts[0] in (
        known := list_builders(with_community_datasets=False)
    ):
        here = f"; prepared there: {', '.join(prepared[:24])}" if prepared else ""
        raise ValueError(f"the data set {name!r} is not prepared in {root}{here}; run: {_command(name, root)}")
    raise ValueError(f"unknown data set {name!r}{suggest(name, [*prepared, *known])}")


def _prepared(folder: Path, depth: int = 3) -> list[tuple[str, ...]]:
    """Paths below `folder`, as parts, of the prepared data sets in it."""
    if depth == 0 or not folder.is_dir():
        return []
    found: list[tuple[str, ...]] = []
    for inner in sorted(folder.iterdir()):
        if inner.name.startswith((".", "incomplete.")) or inner.name == "downloads" or not inner.is_dir():
            continue
        if (inner / "dataset_info.json").is_file():
            found.append((inner.name,))
        else:
            found += [(inner.name, *rest) for rest in _prepared(inner, depth - 1)]
    return found


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in text.split("."))


def _command(name: str, root: Path) -> str:
    options = f"data_dir='{root}', file_format='{_FORMAT}'"
    return f"python -c \"import tensorflow_datasets as t; t.builder('{name}', {options}).download_and_prepare()\""


def _features(name: str, info: Any, tfds: Any) -> tuple[str, str | None]:
    """The features that hold the picture and, where there is one, the class."""
    features = dict(info.features)
    supervised = [key for key in info.supervised_keys or () if isinstance(key, str)]
    ordered = [*(key for key in supervised if key in features), *features]
    images = [key for key in ordered if type(features[key]) is tfds.features.Image]
    labels = [key for key in ordered if isinstance(features[key], tfds.features.ClassLabel)]
    if not images:
        raise ValueError(f"the data set {name!r} has no pictures among its features: {', '.join(features)}")
    dtype = features[images[0]].np_dtype
    if dtype not in ("uint8", "uint16"):
        raise ValueError(f"the pictures of the data set {name!r} are of type {dtype}, expected uint8 or uint16")
    return images[0], labels[0] if labels else None


def _places(name: str, split: str, info: Any, tfds: Any) -> tuple[list[str], np.ndarray]:
    """All splits, and for every example that is asked for which of them it is in and where: [N,2]."""
    bases = list(info.splits)
    for part in split.split("+"):
        base = part.strip().split("[")[0]
        if base not in [*bases, "all"]:
            raise ValueError(f"the data set {name!r} has no split {base!r}{suggest(base, bases)}")
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(info.splits)
    except Exception as error:
        raise ValueError(f"the split {split!r} of the data set {name!r}: {_first_line(error)}") from None
    places = []
    for part in parts:
        count = info.splits[part.splitname].num_examples
        positions = np.arange(part.from_ or 0, count if part.to is None else part.to)
        places.append(np.stack([np.full_like(positions, bases.index(part.splitname)), positions], axis=1))
    found = np.concatenate(places)
    if not len(found):
        raise ValueError(f"the split {split!r} of the data set {name!r} is empty")
    if len(np.unique(found, axis=0)) < len(found):
        raise ValueError(f"the split {split!r} of the data set {name!r} names examples twice")
    return bases, found


def _first_line(error: BaseException) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:300]
