"""A folder in Broden's format from pictures: colours from pixels, textures and scenes from tags, masks of one's own.

Every picture is cut into square crops, and each crop is an image of the set. Label maps have half the image's side, as
in the published sets.

| category | from | label |
|---|---|---|
| color | the pixels of every image, see `colors` | COLOUR-c |
| texture | the picture's sub-folder of `textures`, or its file name without a number at the end | as named |
| scene | the picture's sub-folder of `scenes` | NAME-s |
| any other | `masks` | as in names.csv |

Masks are PNGs of numbers (8 or 16 bits, grey or with a palette; 0 = none) of the size of their picture. That of the
picture a/b.jpg for the category object is a/b.object.png below `masks`; further ones, where a pixel has several
labels, are a/b.object.2.png and so on. names.csv in that folder says what the numbers mean, with the columns
category,value,name.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from jaxinterp.data import DamagedImage, Folder, samples
from jaxinterp.data.batches import read_ahead
from jaxinterp.data.broden_tables import META, Row
from jaxinterp.data.decode import decode_pixels, decode_stored, resize_pixels
from jaxinterp.data.folder import some
from jaxinterp.data.segmentation import MOST_LABELS
from jaxinterp.network import suggest
from jaxinterp.runs import file_name

from .colors import NAMES, color_names
from .tables import Counts, write_tables

Paths = str | os.PathLike[str]

SKIMAGE_PICTURES = (
    "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "retina.jpg", "rocket.jpg",
)  # fmt: skip
SKIMAGE_TEXTURES = ("brick.png", "grass.png", "gravel.png")
PROVENANCE = (
    "Pictures of the `samples` extra: twenty ImageNet pictures from foolbox (the rights are their photographers'; for"
    " research), and from scikit-image astronaut, hubble_deep_field (NASA) and rocket (SpaceX), in the public domain,"
    " and chelsea, coffee, retina, and the textures brick, grass, gravel, CC0."
)
_TRAIN = 0.7  # of all pictures; the others are "val", as in the published sets
_LEAST = 0.5  # of a picture's short side, for a crop


@dataclasses.dataclass(frozen=True)
class Made:
    """What was written.

    Attributes:
        folder: the folder.
        images: how many images it has.
        labels: by category, how many labels.
        damaged: name and reason of every picture that was left out.
    """

    folder: Path
    images: int
    labels: dict[str, int]
    damaged: list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class _Picture:
    path: str
    id: str  # below the folder it came from
    group: str  # sub-folder of images/
    numbers: dict[str, tuple[int, ...]]  # whole-image labels
    masks: tuple[tuple[str, str], ...] = ()  # category and path


@dataclasses.dataclass(frozen=True)
class _Plan:
    names: dict[int, str]  # of all labels that may occur, by number
    pictures: list[_Picture]
    values: dict[str, dict[int, int]]  # by category, the label numbers of the values in masks


def make(
    pictures: Sequence[Paths],
    out: Paths,
    *,
    textures: Paths | None = None,
    scenes: Paths | None = None,
    masks: Paths | None = None,
    size: int = 224,
    crops: int = 12,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> Made:
    """Builds the folder. Where nothing is given, from what is installed: see `PROVENANCE`.

    The first crop of a picture is its largest square in the middle; the others lie anywhere, their sides between half
    and all of its short side. They depend on the seed and on the picture's name alone, so that another picture more
    changes no crop. Images are JPEGs, and their colours are those that a reader of the JPEG sees. Lines of index.csv
    are in the order of a digest of the image's name, so that the first so many are a fair sample; all crops of a
    picture are in one split.

    Args:
        pictures: picture files and folders.
        out: the folder to make; it may exist where it is empty. It appears when everything is written.
        textures: a folder of pictures of one texture each.
        scenes: a folder with a sub-folder for each scene.
        masks: a folder of masks of the `pictures`, see above.
        size: side of the images, in pixels; label maps have half of it.
        crops: images that are cut from every picture.
        seed: of the crops.
        progress: is told how many pictures are done and how many there are.

    Raises:
        ValueError: no pictures, or none that can be read; `out` is not empty; a mask without a picture, of another
            size, or with a number that names.csv does not have; arguments out of range.
        OSError: the folder cannot be written.
    """
    target = Path(out).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{out} exists and is not empty; choose another folder, or remove it")
    for name, value, least in (("size", size, 16), ("crops", crops, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    plan = _gather(pictures, textures, scenes, masks)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        rows, counts, damaged = _write_images(plan, work, size, crops, seed, progress or (lambda done, total: None))
        if not rows:
            raise ValueError(f"no picture can be read: {some(f'{name} ({reason})' for name, reason in damaged)}")
        write_tables(os.fspath(work), rows, plan.names, counts)
        installed = PROVENANCE if not (pictures or textures or scenes) else "Pictures as given."
        (work / "README.txt").write_text(
            f"A data set in Broden's format, made by `jaxinterp broden make` from {len(plan.pictures)} pictures with"
            f" --size {size} --crops {crops} --seed {seed}.\n{installed}\n"
        )
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(work, 0o777 & ~umask)  # mkdtemp makes folders that only their owner can enter
        os.replace(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return Made(target, len(rows), {c: len(counts.labels(c)) for c in counts.categories()}, damaged)


# What there is


def _gather(pictures: Sequence[Paths], textures: Paths | None, scenes: Paths | None, masks: Paths | None) -> _Plan:
    if masks is not None and not pictures:
        raise ValueError("masks: expected pictures that they belong to")
    numbers = {f"{name}-c": number for number, name in enumerate(NAMES, 1)}

    def number(name: str) -> int:
        # As in Broden a name has one number, whatever its category.
        return numbers.setdefault(name, len(numbers) + 1)

    found: list[_Picture] = []
    values: dict[str, dict[int, int]] = {}
    if not (pictures or textures or scenes):
        plain, tagged = installed()
        found += [_Picture(path, os.path.basename(path), "pictures", {}) for path in plain]
        tagged = [(path, os.path.basename(path)) for path in tagged]
    else:
        tagged = _listed([textures]) if textures else []
        given = _listed(pictures) if pictures else []
        own: dict[str, tuple[tuple[str, str], ...]] = {}
        if masks is not None:
            own, values = _masks(masks, [id for _, id in given], number)
        found += [_Picture(path, id, "pictures", {}, own.get(id, ())) for path, id in given]
    for path, id in _listed([scenes]) if scenes else ():
        if "/" not in id:
            raise ValueError(f"scenes: expected pictures in sub-folders that are named after scenes, got {id}")
        found.append(_Picture(path, id, "scenes", {"scene": (number(f"{id.split('/')[0]}-s"),)}))
    for path, id in tagged:
        stem = os.path.splitext(id)[0]
        name = id.split("/")[0] if "/" in id else re.sub(r"[ _-]*[0-9]+$", "", stem) or stem
        found.append(_Picture(path, id, "textures", {"texture": (number(name),)}))
    if len(numbers) > MOST_LABELS:
        raise ValueError(f"expected at most {MOST_LABELS} labels, got {len(numbers)}")
    return _Plan({n: name for name, n in numbers.items()}, found, values)


def installed() -> tuple[list[str], list[str]]:
    """The paths of the pictures and of the textures that packages have installed.

    Raises:
        ValueError: neither foolbox nor scikit-image is installed.
    """
    pictures: list[str] = []
    textures: list[str] = []
    if importlib.util.find_spec("foolbox") is not None:
        pictures += samples(crop=None).paths
    # find_spec only locates a top-level package, without importing it.
    spec = importlib.util.find_spec("skimage")
    for place in () if spec is None else spec.submodule_search_locations or ():
        for names, paths in ((SKIMAGE_PICTURES, pictures), (SKIMAGE_TEXTURES, textures)):
            paths += [path for name in names if os.path.isfile(path := os.path.join(place, "data", name))]
    if not pictures:
        raise ValueError(
            'give pictures, or install some that come with foolbox and scikit-image: pip install "jaxinterp[samples]"'
        )
    return pictures, textures


def _listed(paths: Sequence[Paths]) -> list[tuple[str, str]]:
    folder = Folder(paths, crop=None, labels="predicted", classes=1)
    return list(zip(folder.paths, folder.ids, strict=True))


def _masks(
    folder: Paths, ids: Sequence[str], number: Callable[[str], int]
) -> tuple[dict[str, tuple[tuple[str, str], ...]], dict[str, dict[int, int]]]:
    """The masks of every picture, as category and path, and by category the label numbers of the values in them."""
    values = _mask_values(os.path.join(folder, "names.csv"), number)
    stems: dict[str, list[str]] = {}
    for id in ids:
        stems.setdefault(os.path.splitext(id)[0], []).append(id)
    found: dict[str, list[tuple[str, int, str]]] = {}
    for path, id in _listed([folder]):
        match = re.fullmatch(r"(.+)\.([^./0-9][^./]*)(?:\.([0-9]{1,4}))?\.png", id)
        owners = stems.get(match[1], []) if match else []
        if match is None or len(owners) != 1:
            which = f"any of {some(owners)}" if owners else "no picture"
            raise ValueError(f"masks: {id} belongs to {which}; expected PICTURE.CATEGORY.png or PICTURE.CATEGORY.2.png")
        if match[2] not in values:
            raise ValueError(f"masks: {id}: names.csv has no category {match[2]!r}{suggest(match[2], values)}")
        found.setdefault(owners[0], []).append((match[2], int(match[3] or 1), path))
    return {id: tuple((category, path) for category, _, path in sorted(own)) for id, own in found.items()}, values


def _mask_values(path: str, number: Callable[[str], int]) -> dict[str, dict[int, int]]:
    values: dict[str, dict[int, int]] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, restkey="more", restval="")
            lines = [(reader.line_num, cells) for cells in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"masks: expected names.csv with the columns category,value,name; cannot read it: {error}"
        ) from None
    for line, cells in lines:
        category, value, name = (cells.get(column, "").strip() for column in ("category", "value", "name"))
        where = f"masks: names.csv line {line}"
        if not re.fullmatch(r'[^./\\;"0-9][^./\\;"]*', category) or category in (*META, "color"):
            raise ValueError(f"{where}: {category!r} cannot be the category of a mask")
        if not re.fullmatch("[0-9]{1,5}", value) or not 1 <= int(value) <= 65535 or not name:
            raise ValueError(
                f"{where}: expected category,value,name with a value from 1 to 65535, got {value!r}, {name!r}"
            )
        if int(value) in values.setdefault(category, {}):
            raise ValueError(f"{where}: {category} has the value {value} twice")
        values[category][int(value)] = number(name)
    return values


# Cutting and writing


def _write_images(
    plan: _Plan, work: Path, size: int, crops: int, seed: int, progress: Callable[[int, int], object]
) -> tuple[list[Row], Counts, list[tuple[str, str]]]:
    for group in {picture.group for picture in plan.pictures}:
        (work / "images" / group).mkdir(parents=True)
    stems = _stems(plan.pictures)
    rows: list[Row] = []
    counts, damaged = Counts(), []

    def cut(index: int) -> tuple[list[Row], Counts]:
        return _cut(plan.pictures[index], stems[index], plan.values, work / "images", size, crops, seed)

    with contextlib.closing(read_ahead(cut, range(len(plan.pictures)))) as reading:
        for index, future in enumerate(reading):
            try:
                own, counted = future.result()
            except DamagedImage as error:
                damaged.append((plan.pictures[index].id, error.reason))
            else:
                rows += own
                counts.merge(counted)
            progress(index + 1, len(plan.pictures))
    rows.sort(key=lambda row: (_fraction(row.image), row.image))
    return rows, counts, damaged


def _stems(pictures: Sequence[_Picture]) -> list[str]:
    """Where the images of each picture go, below images/."""
    taken: dict[str, str] = {}
    for picture in pictures:
        stem = f"{picture.group}/{file_name(os.path.splitext(picture.id)[0])}"
        if stem.casefold() in taken:  # a.jpg and a.png, or A.jpg
            stem = f"{stem}-{zlib.crc32(picture.id.encode()):08x}"
        taken[stem.casefold()] = stem
    return list(taken.values())


def _cut(
    picture: _Picture,
    stem: str,
    values: Mapping[str, Mapping[int, int]],
    images: Path,
    size: int,
    crops: int,
    seed: int,
) -> tuple[list[Row], Counts]:
    """Writes the images of one picture and their label maps."""
    pixels = decode_pixels(picture.path)
    masks = [(category, _mask(path, values[category], pixels.shape[:2])) for category, path in picture.masks]
    side = size // 2
    split = "train" if _fraction(picture.id) <= _TRAIN else "val"
    rows, counts = [], Counts()
    for k, (top, left, length) in enumerate(squares(pixels.shape[:2], crops, [seed, zlib.crc32(picture.id.encode())])):
        name = f"{stem}_{k:02d}"
        square = resize_pixels(pixels[top : top + length, left : left + length], (size, size))
        Image.fromarray(square).save(images / f"{name}.jpg", quality=95, subsampling=0)
        # Colours as a reader sees them: on average over the pixels that one of the label map stands for.
        seen = resize_pixels(decode_pixels(images / f"{name}.jpg"), (side, side), "box")
        # The nearest pixel of the mask to the middle of each one of the label map.
        middles = ((np.arange(side) + 0.5) * length / side).astype(int)
        maps = {"color": [color_names(seen).astype(np.uint16) + 1]}
        for category, mask in masks:
            maps.setdefault(category, []).append(mask[np.ix_(top + middles, left + middles)])
        files: dict[str, tuple[str, ...]] = {}
        for category, channels in maps.items():
            ends = [category] if len(channels) == 1 else [f"{category}_{i}" for i in range(1, len(channels) + 1)]
            files[category] = tuple(f"{name}_{end}.png" for end in ends)
            for path, channel in zip(files[category], channels, strict=True):
                _write_map(images / path, channel)
        for category in {*maps, *picture.numbers}:
            counts.add(category, maps.get(category, ()), picture.numbers.get(category, ()), side * side)
        rows.append(Row(0, f"{name}.jpg", split, (size, size), (side, side), files, picture.numbers))
    return rows, counts


def squares(shape: tuple[int, ...], count: int, seed: Sequence[int]) -> list[tuple[int, int, int]]:
    """Top, left and side of each crop; the first is the largest in the middle."""
    height, width = shape
    short = min(height, width)
    rng = np.random.default_rng(seed)
    squares = [((height - short) // 2, (width - short) // 2, short)]
    for _ in range(count - 1):
        side = int(rng.integers(max(1, round(_LEAST * short)), short, endpoint=True))
        top, left = (int(rng.integers(0, length - side, endpoint=True)) for length in (height, width))
        squares.append((top, left, side))
    return squares


def _mask(path: str, values: Mapping[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """A mask with label numbers in place of its values, uint16."""
    name = os.path.basename(path)
    try:
        stored, _ = decode_stored(path)
    except DamagedImage as error:
        raise ValueError(f"masks: {name}: {error.reason}") from error
    if stored.ndim != 2 or stored.dtype.kind not in "bui":
        raise ValueError(f"masks: {name}: expected a PNG of numbers, grey or with a palette, got colours")
    if stored.shape != shape:
        found, expected = (f"{height} x {width}" for height, width in (stored.shape, shape))
        raise ValueError(f"masks: {name}: expected the {expected} pixels of its picture, got {found}")
    table = np.zeros(1 << 16, np.uint16)
    for value, number in values.items():
        table[value] = number
    found = np.unique(stored)
    unknown = [int(value) for value in found if value and not (0 <= value < len(table) and table[value])]
    if unknown:
        raise ValueError(f"masks: {name} has the values {some(map(str, unknown))}, which names.csv does not have")
    return table[stored.astype(np.int64)]


def _write_map(path: Path, labels: np.ndarray) -> None:
    parts = [labels % 256, labels // 256, np.zeros_like(labels)]
    Image.fromarray(np.stack(parts, axis=-1).astype(np.uint8)).save(path, optimize=True)


def _fraction(name: str) -> float:
    """A number in [0, 1) that depends on a name, evenly spread."""
    return int.from_bytes(hashlib.md5(name.encode(), usedforsecurity=False).digest()[:8]) / 2**64
