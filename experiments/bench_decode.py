"""How fast a folder of pictures becomes batches, against what PIL itself does on as many cores.

    python experiments/bench_decode.py --out results/bench.jsonl

JPEG pictures of ImageNet's usual size, 500 x 375, are made from noise that was blurred. The reference is a loop on one
core that opens, converts, resizes, crops and scales each with PIL and numpy, and stacks them to batches; PIL's rate is
that rate times the number of cores. This library walks through `batches(Folder(...))` with one thread a core. Both run
in turn; a ratio is the median of the ratios of the rounds.

Expected time: 1 minute on two cores. Expected result: at least 0.9 of PIL's rate times cores.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from jaxinterp import data
from jaxinterp.bench.records import append, cores
from jaxinterp.bench.timing import interleaved, middle, shown

TARGET = 0.9


def write_pictures(folder: Path, count: int, width: int, height: int) -> None:
    """JPEG files of smooth noise."""
    rng = np.random.default_rng(0)
    for index in range(count):
        coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(folder / f"{index:05}.jpg", quality=90)


def by_pil(paths: list[Path], crop: data.Crop, batch: int) -> list[np.ndarray]:
    """The pictures by PIL and numpy alone, in batches [B,H,W,3]."""
    return [
        np.stack([one_by_pil(path, crop) for path in paths[start : start + batch]])
        for start in range(0, len(paths), batch)
    ]


def one_by_pil(path: Path, crop: data.Crop) -> np.ndarray:
    """A picture by PIL and numpy alone, [H,W,3]."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    short = int(crop.size / crop.crop_pct)
    scale = short / min(picture.size)
    sides = [short if side == min(picture.size) else int(side * scale) for side in picture.size]
    picture = picture.resize((sides[0], sides[1]), Image.Resampling[crop.interpolation.upper()])
    left, top = (round((side - crop.size) / 2) for side in picture.size)
    picture = picture.crop((left, top, left + crop.size, top + crop.size))
    return np.asarray(picture, np.float32) / np.float32(255)


def by_folder(folder: Path, crop: data.Crop, batch: int) -> list[np.ndarray]:
    """The same through this library; the last batch is filled up."""
    source = data.Folder(folder, crop=crop, labels="predicted", classes=1000)
    return [part.images[: part.mask.sum()] for part in data.batches(source, batch, workers=cores())]


def main(
    count: int = 400,
    width: int = 500,
    height: int = 375,
    size: int = 224,
    batch: int = 32,
    rounds: int = 9,
    out: Path | None = None,
) -> None:
    """Decodes a folder in both ways.

    Args:
        count: Pictures.
        width: Of each, in pixels.
        height: Of each, in pixels.
        size: Side of the crop, in pixels.
        batch: Pictures in a batch.
        rounds: How often everything is timed.
        out: File to which one JSON line is appended.
    """
    crop = data.Crop(size, 0.875, "bilinear")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder, count, width, height)
        paths = sorted(folder.iterdir())
        programs = {"pil": lambda: by_pil(paths, crop, batch), "folder": lambda: by_folder(folder, crop, batch)}
        start = time.perf_counter()
        if not np.array_equal(np.concatenate(programs["pil"]()), np.concatenate(programs["folder"]())):
            raise RuntimeError("the folder source and PIL give different pixels")
        print(f"both give the same pixels ({time.perf_counter() - start:.1f} s)")
        times = interleaved(programs, rounds)
    rates = {name: [count / seconds for seconds in values] for name, values in times.items()}
    shares = [pil / folder / cores() for pil, folder in zip(times["pil"], times["folder"], strict=True)]
    print(f"{count} pictures of {width} x {height}, {cores()} cores, {rounds} rounds; median (quartiles)")
    for name, rate in rates.items():
        print(f"  {name:8}{shown(rate, digits=0)} pictures/s")
    reached = "met" if middle(shares)["median"] >= TARGET else "NOT met"
    print(f"  folder / (pil x cores) {shown(shares, digits=2)}    target >= {TARGET:g}: {reached}")
    figures = {"count": count, "picture": [width, height], "size": size, "batch": batch, "rounds": rounds}
    figures |= {"rates": {name: middle(rate) for name, rate in rates.items()}, "share": middle(shares)}
    append(out, "decode", figures)


if __name__ == "__main__":
    tyro.cli(main)
