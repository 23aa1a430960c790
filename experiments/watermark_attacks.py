"""Do embedded watermarks change decisions, and is it the watermark that does it?

    python experiments/watermark_attacks.py --model cifar10_cnn --cell 4 --batch-size 20
    python experiments/watermark_attacks.py --model efficientnet_lite0 --cell 28 --failures 3

AdvEWM (arXiv 2009.05107): one watermark after the other is embedded in the Haar or the cosine transform, rounded,
written as a JPEG of quality 75, until the class changes. Only the class is asked for. Watermarks are the pictures in
the class folders of --watermarks, or else crops of pictures that come with scikit-image, each picture a class. Beside
them: pictures of Gaussian noise (the paper's baseline), random signs of what a watermark adds (a control of exactly
the same norms), and the JPEG without a watermark. Published: CIFAR-10 95.47 % success on average, 1.17 s an image.

Every success is made once more with Pillow's own JPEG files, from the original through all rounds, and its class asked
again. Kinds of cells (arXiv 1904.02057) stand beside those of targeted I-FGSM on the same pictures; the target of a
watermark is the class that it reached.

Writes watermark_attacks/answers.json, queries.png, kinds.png, likeness.png and pictures.png. A stopped run continues.
"""

from __future__ import annotations

import dataclasses
import io
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image

from jaxinterp import attacks, effect, models, plots, processes, similarity, watermarks
from jaxinterp.attacks import embedding
from jaxinterp.attacks.driver import example_keys
from jaxinterp.bench.records import machine
from jaxinterp.cli import guarded
from jaxinterp.jpeg import recompress
from jaxinterp.pictures import classify
from jaxinterp.statistics import Estimate, bootstrap_mean, proportion
from jaxinterp.study import Answer, Setting, Study, begin, verdict

TRANSFORMS = ("haar", "dct")
SOURCES = ("pictures", "noise", "random signs")
VARIANTS = tuple(f"{transform}, {source}" for transform in TRANSFORMS for source in SOURCES)
KINDS = ("suppression", "balanced", "promotion")
COLUMNS = (
    *("success", "queries", "l2", "linf", "ssim", "psnr", *KINDS),
    *("replayed", "levels"),  # with Pillow: whether it succeeds there too, and the largest difference in levels
)
PUBLISHED, PUBLISHED_SECONDS, FACTOR = 0.9547, 1.17, 20.0


@dataclasses.dataclass(frozen=True)
class Watermarking(Setting):
    """What `Setting` has, and the watermarks.

    Attributes:
        watermarks: Folder of class folders of pictures; None means crops of pictures that come with scikit-image.
        quality: Of the JPEG.
        failures: Pictures of a class folder that are tried, at most.
        candidates: Watermarks that are tried at once.
        repeats: Timed runs of the search in Haar coefficients on the first batch of pictures.
    """

    watermarks: Path | None = None
    quality: int = 75
    failures: int = 10
    candidates: int = 1
    repeats: int = 5


def main(setting: Watermarking) -> None:
    """Success, queries and likeness of watermarks and their controls."""
    for name in ("failures", "candidates", "repeats"):
        if getattr(setting, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(setting, name)}")
    if not 1 <= setting.quality <= 100:
        raise ValueError(f"--quality must be from 1 to 100, got {setting.quality}")
    size = models.network(setting.model).image_size
    embedding.check_even((size, size, 3))
    marks = watermarks.installed(size) if setting.watermarks is None else watermarks.read(setting.watermarks, size)
    for name, reason in marks.damaged:
        print(f"left out: {name}: {reason}")
    config = {
        **{"watermarks": marks.digest, "folders": list(marks.folders), "quality": setting.quality},
        **{"failures": setting.failures},
    }
    study = begin("watermark_attacks", setting, config, ("ifgsm:steps=10",))
    chosen = searches(marks, setting)
    model, key = study.found.network.bind(study.found.params), jax.random.key(setting.seed)

    def analyse(_, arrays):
        clean, labels = jnp.asarray(arrays["clean"]), jnp.asarray(arrays["labels"])
        alone = classify(model, recompress(clean, setting.quality)) != labels
        rows, images = [], []
        for attack in chosen.values():
            result = attacks.run(attack, model, clean, labels, key=key)
            rows.append(measure(model, attack, result, arrays, setting.cell, key))
            images.append(np.round(np.asarray(result.images) * 255).astype(np.uint8))
        return {"found": np.stack(rows, 1), "images": np.stack(images, 1), "alone": alone}

    first = next(iter(study.found.attacks))  # whose chunks hold all pictures
    parts = [(arrays, extra) for _, arrays, extra in study.analysed(analyse, [first])]
    found = np.concatenate([extra["found"] for _, extra in parts])  # [pictures, variants, columns]
    alone = np.concatenate([extra["alone"] for _, extra in parts])
    by = {name: dict(zip(COLUMNS, found[:, i].T, strict=True)) for i, name in enumerate(VARIANTS)}
    seconds = timed(study, model, chosen["haar, pictures"], parts[0][0], key, setting.repeats)

    results = {name: summary(by[name], setting.seed) for name in VARIANTS}
    results["JPEG alone"] = {"success": proportion(int(alone.sum()), len(alone))}
    for name, row in results.items():
        print(f"\n{name}")
        for what, value in row.items():
            print(f"  {what:<24}{value:.3f}" if isinstance(value, Estimate) else f"  {what:<24}{value}")
    print(
        f"\nhaar, pictures: {1 / seconds['seconds']:.1f} images/s, {seconds['seconds']:.4f} s an image, "
        f"{seconds['hosts']} at once; first run with compilation {seconds['first']:.1f} s"
    )
    draw(study, by, alone, parts, setting)
    study.conclude(
        answers(study, by, alone, seconds, setting),
        {
            "watermarks": {"folders": dict(zip(marks.names, marks.folders, strict=True)), "damaged": marks.damaged},
            "variants": {
                name: {k: format(v, ".4g") if isinstance(v, Estimate) else v for k, v in row.items()}
                for name, row in results.items()
            },
            "seconds": seconds,
            "machine": machine(),
        },
    )


def searches(marks: watermarks.Watermarks, setting: Watermarking) -> dict[str, attacks.Watermark]:
    """The attack of every variant; noise comes in as many folders as there are."""
    made = {}
    for transform in TRANSFORMS:
        for source in SOURCES:
            made[f"{transform}, {source}"] = attacks.Watermark(
                watermarks=None if source == "noise" else jnp.asarray(marks.images),
                quality=float(setting.quality),
                transform=transform,
                signs="random" if source == "random signs" else "published",
                failures=setting.failures,
                folders=marks.folders,
                candidates=setting.candidates,
            )
    return made


def measure(
    model: Any,
    attack: attacks.Watermark,
    result: Any,
    arrays: Mapping[str, np.ndarray],
    cell: effect.Cell,
    key: jax.Array,
) -> np.ndarray:
    """[pictures, columns] of a search's results, with COLUMNS."""
    clean, labels, success = jnp.asarray(arrays["clean"]), arrays["labels"], np.asarray(result.success)
    reached = np.where(success, np.asarray(classify(model, result.images)), arrays["targets"])
    kinds = np.asarray(effect.shares(effect.pse(model, clean, result.images, labels, reached, cell).kind))
    again = np.full((len(labels), 2), np.nan)
    if attack.signs == "published" and attack.watermarks is not None:
        images = replay(attack, result, clean, key)
        again[:, 0] = np.where(success, np.asarray(classify(model, images)) != labels, np.nan)
        again[:, 1] = np.where(success, np.abs(images - result.images).max((1, 2, 3)) * 255, np.nan)
    columns = [
        *(success, result.forward, result.l2, result.linf),
        *(similarity.ssim(clean, result.images), similarity.psnr(clean, result.images), *kinds.T, *again.T),
    ]
    table = np.stack([np.asarray(column, np.float64) for column in columns], axis=1)
    table[~success, 2:] = np.nan
    return table


def replay(attack: attacks.Watermark, result: Any, clean: jax.Array, key: jax.Array) -> np.ndarray:
    """The images of the successes once more, through files that Pillow writes and reads in every round."""
    assert attack.watermarks is not None
    order = np.asarray(jax.jit(attacks.Watermark.order)(attack, example_keys(key, clean)))
    images = np.array(clean)
    for i in np.flatnonzero(np.asarray(result.success) & (np.asarray(result.iterations) > 0)):
        tried, rounds = divmod(int(result.iterations[i]) - 1, attack.most_rounds)
        added = np.asarray(embedding.change(attack.watermarks[order[i, tried]], transform=attack.transform))
        for _ in range(rounds + 1):
            images[i] = through_file(images[i] + np.float32(attack.strength) * added, int(attack.quality))
    return images


def through_file(image: np.ndarray, quality: int) -> np.ndarray:
    """An image [H,W,3] as Pillow reads the file that it has written."""
    pixels = np.floor(np.clip(image * 255, 0, 255) + 0.5).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer), np.float32) / 255


def timed(
    study: Study, model: Any, attack: attacks.Watermark, arrays: Mapping[str, np.ndarray], key: jax.Array, repeats: int
) -> dict[str, Any]:
    """Seconds an image of the whole search on one batch, and of the first run, which compiles; measured once."""
    clean, labels = jnp.asarray(arrays["clean"]), jnp.asarray(arrays["labels"])
    stored = study.run.read_part("time")
    if stored is None:
        jax.clear_caches()
        spent = []
        for _ in range(1 + repeats):
            began = time.perf_counter()
            jax.block_until_ready(attacks.run(attack, model, clean, labels, key=key))
            spent.append(time.perf_counter() - began)
        stored = {"spent": np.array(spent), "hosts": np.array(len(labels))}
        if processes.current().first:
            study.run.write_part("time", stored)
    hosts, spent = int(stored["hosts"]), stored["spent"]
    again = spent[1:] / hosts
    return {
        **{"seconds": float(np.median(again)), "fastest": float(again.min()), "slowest": float(again.max())},
        **{"hosts": hosts, "repeats": len(again), "first": float(spent[0])},
    }


def summary(columns: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Means over the successes, with their intervals; queries of all pictures."""
    success = columns["success"].astype(bool)
    row: dict[str, Any] = {
        "success": proportion(int(success.sum()), len(success)),
        "queries, median": float(np.median(columns["queries"])),
        "queries, mean": bootstrap_mean(columns["queries"], seed=seed),
    }
    for what in ("l2", "linf", "ssim", "psnr", *KINDS):
        found = bootstrap_mean(columns[what], seed=seed)
        row[f"share {what}" if what in KINDS else what] = found.within(0, 1) if what in KINDS else found
    replayed = columns["replayed"][np.isfinite(columns["replayed"])]
    if len(replayed):
        row["with Pillow's files"] = f"{int(replayed.sum())} of {len(replayed)} succeed"
        row["largest difference"] = f"{np.nanmax(columns['levels']):.3g} levels"
    return row


def answers(
    study: Study,
    by: Mapping[str, Mapping[str, np.ndarray]],
    alone: np.ndarray,
    seconds: Mapping[str, Any],
    setting: Watermarking,
) -> list[Answer]:
    """The paper's directions, and what the controls say."""

    def more(claim: str, gain: np.ndarray, bounds: tuple[int, int] | None = None) -> Answer:
        estimate = bootstrap_mean(gain, seed=setting.seed, bounds=bounds)
        return Answer(claim, f"by {estimate}, {estimate.count} pictures", verdict(estimate, 0.0))

    found = []
    cifar = study.found.network.image_size == 32
    for transform in TRANSFORMS:
        mine = by[f"{transform}, pictures"]
        if cifar:
            share = proportion(int(mine["success"].sum()), len(mine["success"]))
            claim = f"{transform}: success above the published {PUBLISHED:.2%} (other networks)"
            found.append(Answer(claim, f"{share:.1%}, {share.count} pictures", verdict(share, PUBLISHED)))
        found.append(more(f"{transform}: succeeds more often than the JPEG alone", mine["success"] - alone, (-1, 1)))
        for source, other in (("noise", "pictures of noise"), ("random signs", "random signs of the same norms")):
            theirs = by[f"{transform}, {source}"]
            gain = mine["success"] - theirs["success"]
            found.append(more(f"{transform}: succeeds more often than {other}", gain, (-1, 1)))
            gain = np.log2(theirs["queries"]) - np.log2(mine["queries"])
            found.append(more(f"{transform}: needs fewer queries than {other} (log2 of the ratio)", gain))
    if cifar:
        mean, low, high = (PUBLISHED_SECONDS / seconds[which] for which in ("seconds", "slowest", "fastest"))
        estimate = Estimate(mean, low, high, seconds["repeats"])
        claim = f"haar: {FACTOR:.0f} times as fast as the published {PUBLISHED_SECONDS} s an image"
        found.append(Answer(claim, f"{estimate:.0f} times, slowest to fastest run", verdict(estimate, FACTOR)))
    return found


def draw(
    study: Study,
    by: Mapping[str, Mapping[str, np.ndarray]],
    alone: np.ndarray,
    parts: Sequence[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]],
    setting: Watermarking,
) -> None:
    """The figures."""
    if not processes.current().first:
        return
    folder = study.run.directory
    steps = [2**i for i in range(1 + int(np.ceil(np.log2(max(c["queries"].max() for c in by.values())))))]

    def reached(columns: Mapping[str, np.ndarray]) -> list[Estimate]:
        success = columns["success"].astype(bool)
        return [proportion(int(np.sum(success & (columns["queries"] <= n))), len(success)) for n in steps]

    panels = {
        f"success, {transform}": {source: reached(by[f"{transform}, {source}"]) for source in SOURCES}
        for transform in TRANSFORMS
    }
    level = ("JPEG alone", np.full(len(steps), alone.mean()))
    plots.save(plots.curves(panels, steps, xlabel="queries", log=True, reference=level), folder / "queries.png")

    shares = {
        name: {kind: bootstrap_mean(c[kind], seed=setting.seed).within(0, 1).interval for kind in KINDS}
        for name, c in by.items()
    }
    for row in study.found.summary:
        shares[f"{row['attack']}, targeted"] = {kind: row[f"share_{kind}"].interval for kind in KINDS}
    plots.save(plots.kinds_bar(shares), folder / "kinds.png")

    likeness = {
        title: {
            transform: {
                source: bootstrap_mean(by[f"{transform}, {source}"][what], seed=setting.seed) for source in SOURCES
            }
            for transform in TRANSFORMS
        }
        for what, title in (("ssim", "SSIM"), ("psnr", "PSNR, dB"))
    }
    plots.save(plots.bars(likeness, ylabel="mean of the successes"), folder / "likeness.png")
    plots.save(pictures(study, parts), folder / "pictures.png", bits=8)


def pictures(study: Study, parts: Sequence[Any], count: int = 3) -> Any:
    """The first pictures, their watermarked forms, and what was added to them, magnified: a row for each transform."""
    arrays, extra = parts[0]
    rows = []
    for i in range(min(count, len(arrays["labels"]))):
        clean, label = np.asarray(arrays["clean"][i]), study.found.network.class_name(int(arrays["labels"][i]))
        for transform in TRANSFORMS:
            row = [(f"{label} ({transform})", clean)]
            for source in SOURCES:
                k = VARIANTS.index(f"{transform}, {source}")
                success, queries = extra["found"][i, k, :2]
                image = extra["images"][i, k].astype(np.float32) / 255 if success else clean
                delta = image - clean
                factor = plots.magnification(delta)
                row.append((f"{source}: {'' if success else 'failed, '}{queries:.0f} queries", image))
                row.append((f"its change × {factor}" if success else "", np.clip(0.5 + factor * delta, 0, 1)))
            rows.append(row)
    return plots.gallery(rows)


if __name__ == "__main__":
    sys.exit(guarded(lambda words: main(tyro.cli(Watermarking, description=__doc__, args=words))))
