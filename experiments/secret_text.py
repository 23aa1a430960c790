"""Can a program read text that a person in a hurry would not see?

    python experiments/secret_text.py --out results/secret_text
    python experiments/secret_text.py --out results/secret_service --service http://127.0.0.1:8080

The secret embedding of arXiv 2105.09685, where OCR services read 90 % of such texts. Every picture gets a phrase at
every opacity, at a random place and where the picture is flattest, black on light and white on dark ground. It is
rounded to 8 bits and read by RapidOCR (the `ocr` extra), tesseract or a service (`jaxinterp serve --ocr`). A secret is
recovered where all its letters and digits stand in what was read, in order and next to each other; the share of them
that stand there in order at all is reported, too. The same pictures without a text are the control.

Whether a person sees the text is not measured: SSIM, PSNR and the contrast of the letters with their ground (difference
of luma, 0 to 1) stand beside the rates. Writes answers.json, recovery.png and examples.png.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from jaxinterp import apis, plots, processes, typesetting
from jaxinterp.attacks import lettering
from jaxinterp.cli import guarded
from jaxinterp.data import Crop, DamagedImage, Example, open_source
from jaxinterp.data.samples import CLASSES
from jaxinterp.job import check_seed, identity
from jaxinterp.processes import open_run, read_part
from jaxinterp.similarity import psnr, ssim
from jaxinterp.statistics import bootstrap_mean, proportion
from jaxinterp.study import Answer, conclude, verdict

PUBLISHED = 0.9
PLACES = ("random", "flat")
PHRASES = ("meet at noon", "north gate 17", "burn the letter", "code 4096", "trust no one", "sell at dawn")
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
SHOWN = 3  # pictures of examples.png


@dataclasses.dataclass(frozen=True)
class Secrets:
    """What is embedded, where, and who reads it.

    Attributes:
        pictures: Picture files and folders, or a source as in `jaxinterp explain`; none means the ImageNet pictures of
            the `samples` extra.
        opacities: Of the letters, 0 to 1.
        font: Size of the letters, in pixels.
        side: Pictures are cropped to squares of as many pixels.
        engine: OCR engine: auto, rapidocr or tesseract.
        service: URL of a vision service that reads, in place of an engine.
        key_variable: Environment variable with the service's key.
        rate: Requests to the service a second, at most.
        limit: Use only the first so many pictures.
        seed: Of the places and the bootstrap.
        out: Results directory.
    """

    pictures: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    opacities: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
    font: int = 28
    side: int = 448
    engine: Literal["auto", "rapidocr", "tesseract"] = "auto"
    service: str | None = None
    key_variable: str | None = None
    rate: float | None = None
    limit: int | None = None
    seed: int = 0
    out: Path = Path("results/secret_text")


def letters(text: str) -> str:
    """Letters and digits, in lower case."""
    return "".join(c for c in text.lower() if c.isalnum())


def recovered(secret: str, read: tuple[str, ...]) -> tuple[bool, float]:
    """Whether the secret was read, and which share of it, in order."""
    wanted, found = letters(secret), letters("".join(read))
    blocks = difflib.SequenceMatcher(None, wanted, found, autojunk=False).get_matching_blocks()
    return wanted in found, sum(block.size for block in blocks) / len(wanted)


def corner(image: np.ndarray, ink: tuple[int, int], place: str, rng: np.random.Generator) -> tuple[int, int]:
    """Row and column where a text of this size begins: anywhere, or where luma has the smallest variance."""
    height, width = ink
    rows, columns = image.shape[0] - height + 1, image.shape[1] - width + 1
    if place == "random":
        return int(rng.integers(rows)), int(rng.integers(columns))
    luma = (image @ LUMA).astype(np.float64)

    def windows(values):
        total = np.pad(values.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        return total[height:, width:] - total[:-height, width:] - total[height:, :-width] + total[:-height, :-width]

    variance = windows(luma**2) / (height * width) - (windows(luma) / (height * width)) ** 2
    row, column = np.unravel_index(int(np.argmin(variance)), variance.shape)
    return int(row), int(column)


def embed(image: np.ndarray, mask: np.ndarray, at: tuple[int, int], opacity: float) -> tuple[np.ndarray, float]:
    """The image with the text, rounded to 8 bits, and the contrast of full letters with their ground."""
    ground = image[at[0] : at[0] + mask.shape[0], at[1] : at[1] + mask.shape[1]] @ LUMA
    level = 0.0 if ground.mean() > 0.5 else 1.0
    tile = np.zeros(image.shape[:2], np.uint8)
    tile[: mask.shape[0], : mask.shape[1]] = mask
    size = np.array(image.shape[:2], np.int32)
    placed = lettering.place(jnp.asarray(tile), jnp.asarray(size), jnp.asarray(at, jnp.int32))
    blended = lettering.blend(jnp.asarray(image), placed, opacity, jnp.full(3, level))
    made = np.round(np.asarray(blended) * 255).astype(np.uint8).astype(np.float32) / 255
    full = np.asarray(placed) == 1
    return made, float(np.abs((made - image) @ LUMA)[full].mean())


@contextlib.contextmanager
def reading(setting: Secrets) -> Iterator[tuple[apis.OCREngine, str]]:
    """Who reads, and the name."""
    if setting.service is None:
        engine = apis.ocr_engine(setting.engine)
        yield engine, type(engine).__name__
        return
    with apis.HTTPVision(setting.service, key_variable=setting.key_variable, rate=setting.rate) as service:
        yield service, service.url


def tried(example: Example, reader: apis.OCREngine, setting: Secrets, opacities: list[float]) -> dict[str, np.ndarray]:
    """One picture at every place and opacity: recovered, similar, SSIM, PSNR, contrast; and read without a text."""
    number = zlib.crc32(example.id.encode())
    secret, rng = PHRASES[number % len(PHRASES)], np.random.default_rng((setting.seed, number))
    mask = typesetting.render(secret, setting.font)
    image = np.asarray(example.image)
    measured, shown = [], []
    for place in PLACES:
        at = corner(image, mask.shape, place, rng)
        for opacity in opacities:
            made, contrast = embed(image, mask, at, opacity)
            likeness = (float(f(jnp.asarray(image[None]), jnp.asarray(made[None]))[0]) for f in (ssim, psnr))
            measured.append((*recovered(secret, reader.text(made)), *likeness, contrast))
            shown.append(np.round(made * 255).astype(np.uint8))
    shape = (len(PLACES), len(opacities))
    return {
        "measured": np.array(measured, np.float64).reshape(*shape, -1),
        "clean": np.array(recovered(secret, reader.text(image)), np.float64),
        "secret": np.array(secret),
        "shown": np.array(shown).reshape(*shape, *image.shape),
        "original": image,
    }


def main(setting: Secrets) -> None:
    """Rates of recovery against opacity."""
    opacities = sorted(set(setting.opacities))
    if not opacities or not 0 < opacities[0] <= opacities[-1] <= 1:
        raise ValueError(f"--opacities must be above 0 and at most 1, got {setting.opacities}")
    if setting.limit is not None and setting.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {setting.limit}")
    for name in ("font", "side"):
        if getattr(setting, name) < 1:
            raise ValueError(f"--{name} must be at least 1 pixel, got {getattr(setting, name)}")
    check_seed(setting.seed)
    for phrase in PHRASES:
        if max(typesetting.render(phrase, setting.font).shape) > setting.side:
            what = typesetting.what_fits(phrase, (0.0,), setting.side, setting.side)
            raise ValueError(f"--font {setting.font}: {phrase!r} does not fit in {setting.side} pixels; {what}")
    given = list(setting.pictures) or ["samples:imagenet"]
    crop, classes = Crop(setting.side), CLASSES["imagenet"]
    source = open_source(given if len(given) > 1 else given[0], crop=crop, classes=classes, labels="predicted")
    count = len(source) if setting.limit is None else min(setting.limit, len(source))
    with reading(setting) as (reader, name):
        config = {"study": "secret_text", "reader": name, "opacities": opacities, "pictures": count}
        config |= {"source": identity(source, given, count), "phrases": PHRASES}
        config |= {"font": setting.font, "side": setting.side, "seed": setting.seed}
        run = open_run(setting.out, config)
        group = processes.current()
        names = [f"picture-{i:06d}" for i in range(count)]
        missing = group.told([i for i, part in enumerate(names) if run.read_part(part) is None])
        for i in tqdm(group.share(missing), desc="secrets", unit="picture"):
            try:
                example = source[i]
            except DamagedImage as error:
                run.write_part(names[i], {"damaged": np.array((error.id, error.reason))})
                continue
            made = tried(example, reader, setting, opacities)
            kept = made if i < SHOWN else {key: made[key] for key in ("measured", "clean", "secret")}
            run.write_part(names[i], kept)
        group.wait()
    every_part = [read_part(run, part) for part in names]
    damaged = [tuple(map(str, part["damaged"])) for part in every_part if "damaged" in part]
    for picture, reason in damaged:
        print(f"  {picture}: could not be read: {reason}")
    parts = [part for part in every_part if "damaged" not in part]
    count = len(parts)
    if not count:
        raise ValueError("no picture could be read")
    measured = np.stack([part["measured"] for part in parts])  # [pictures, places, opacities, 5]
    whole, similar, likeness, ratio, contrast = np.moveaxis(measured, -1, 0)
    clean = np.stack([part["clean"] for part in parts])

    def mean(values):
        return bootstrap_mean(values, seed=setting.seed)

    every = range(len(opacities))
    rates = {place: [proportion(int(whole[:, p, i].sum()), count) for i in every] for p, place in enumerate(PLACES)}
    panels = {
        f"secrets recovered by {name}": rates,
        "share of letters read": {place: [mean(similar[:, p, i]) for i in every] for p, place in enumerate(PLACES)},
        "SSIM": {place: [mean(likeness[:, p, i]) for i in every] for p, place in enumerate(PLACES)},
        "PSNR, dB": {place: [mean(ratio[:, p, i]) for i in every] for p, place in enumerate(PLACES)},
        "contrast of letters": {place: [mean(contrast[:, p, i]) for i in every] for p, place in enumerate(PLACES)},
    }
    answers = []
    for place in PLACES:
        for i, opacity in enumerate(opacities):
            claim = f"{place} place, opacity {opacity:g}: {PUBLISHED:.0%} of the secrets are recovered"
            beside = (
                f"SSIM {panels['SSIM'][place][i].mean:.4f}, contrast {panels['contrast of letters'][place][i].mean:.3f}"
            )
            answers.append(Answer(claim, f"{rates[place][i]}, {beside}", verdict(rates[place][i], PUBLISHED)))
    more = bootstrap_mean(whole[:, 1].mean(1) - whole[:, 0].mean(1), seed=setting.seed, bounds=(-1, 1))
    answers.append(
        Answer("secrets are recovered more often on flat ground, over all opacities", f"by {more}", verdict(more, 0.0))
    )
    plots.save(plots.curves(panels, opacities, xlabel="opacity", log=True), run.directory / "recovery.png")
    rows = []
    for part in (part for part in parts if "shown" in part):
        for p, place in enumerate(PLACES):
            row = [(f"{part['secret']}, {place}", part["original"])]
            for i, opacity in enumerate(opacities):
                says = "read" if part["measured"][p, i, 0] else "not read"
                row.append((f"{opacity:g}: {says}", part["shown"][p, i] / 255))
            rows.append(row)
    if rows:
        plots.save(plots.gallery(rows), run.directory / "examples.png")
    results: dict[str, Any] = {
        title: {
            place: {f"{o:g}": format(e) for o, e in zip(opacities, each, strict=True)} for place, each in lines.items()
        }
        for title, lines in panels.items()
    }
    results["damaged"] = damaged
    results["recovered without a text"] = f"{int(clean[:, 0].sum())} of {count}"
    results["share of letters read without a text"] = format(mean(clean[:, 1]))
    conclude(run, "secret_text", count, answers, results)


if __name__ == "__main__":
    sys.exit(guarded(lambda words: main(tyro.cli(Secrets, description=__doc__, args=words))))
