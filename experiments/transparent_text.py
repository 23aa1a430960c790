"""Does a classifier lose the object under text of low opacity, and is it the text or the size of the change?

    python experiments/transparent_text.py --model efficientnet_lite0
    python experiments/transparent_text.py --out results/text-service --service http://127.0.0.1:8080

The overlays of arXiv 2105.09685: a phrase in some size, at some angle and place, once or on a grid, without any query
of the network under attack. There, 52 % of the pictures were lost on one service and 36 % on another. Here, at every
opacity:

* one overlay: the share of `draws` random overlays that change the predicted class,
* noise: the same with random signs of the same L2 norm, in the box; the control,
* any of them: whether any of the `draws` does, for both,
* search: `attacks.TransparentText`, which may ask the network `queries` times, with its queries and kinds of cells,
* search of the opacity, too: the share of pictures that as many queries find an overlay for that is no less faint.

A service (`jaxinterp serve --model caffe_squeezenet1_1`, for instance), if one is given, sees one overlay and the noise
of its size for every picture. A stopped run continues. Writes answers.json, success.png, kinds.png and examples.png.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from jaxinterp import apis, attacks, effect, plots, processes
from jaxinterp.attacks.attack import norm
from jaxinterp.attacks.driver import coerce, example_keys
from jaxinterp.cellsize import CellSize
from jaxinterp.cli import guarded
from jaxinterp.explain.tables import KINDS
from jaxinterp.network import Model
from jaxinterp.pictures import chunk_size, chunks, classify, load_chunk, part_name, shared_chunks, stored_parts
from jaxinterp.similarity import psnr, ssim
from jaxinterp.statistics import bootstrap_mean, proportion
from jaxinterp.study import Answer, Asked, conclude, survey, verdict

PUBLISHED = {"36 %": 0.36, "52 %": 0.52}  # of pictures lost, on two services
SHOWN = 3  # pictures of examples.png
_draw = jax.jit(attacks.TransparentText.drawn, static_argnums=3)


@dataclasses.dataclass(frozen=True)
class Texts(Asked):
    """What `Asked` has, and the texts.

    Attributes:
        cell: Side of a cell, in pixels.
        opacities: Of the letters, 0 to 1.
        text: Phrases, separated by |.
        draws: Overlays of each picture that are tried without a query.
        queries: Of the search, for each picture.
        service: URL of a vision service that sees the overlays, too; None means none.
        key_variable: Environment variable with the service's key.
        rate: Requests to the service a second, at most.
    """

    cell: CellSize = 28
    opacities: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5)
    text: str = "sample|copyright|confidential"
    draws: int = 20
    queries: int = 100
    service: str | None = None
    key_variable: str | None = None
    rate: float | None = None


LEAST = ("opacity", "ssim", "psnr")
NAMES = ("one", "noise", "any", "any noise", "search", "queries", "ssim", "psnr", "service", "service noise")


def signs_of_size(keys: jax.Array, images: jax.Array, sizes: jax.Array) -> jax.Array:
    """Images [B,n,H,W,C] with random signs of the L2 norms `sizes` [B,n] added, turned round where the box ends."""
    shape = images.shape[1:]

    def one(key, image, size):
        step = size / np.sqrt(np.prod(shape)) * jax.random.rademacher(key, shape, jnp.float32)
        moved = image + step
        return jnp.clip(jnp.where((moved < 0) | (moved > 1), image - step, moved), 0, 1)

    split = jax.vmap(lambda key: jax.random.split(key, sizes.shape[1]))(keys)
    return jax.vmap(jax.vmap(one, (0, None, 0)))(split, images, sizes)


def fooled(model: Model, images: jax.Array, labels: np.ndarray) -> np.ndarray:
    """[B,n] where the class of images [B,n,H,W,C] is not the label."""
    return np.stack([np.asarray(classify(model, images[:, j])) != labels for j in range(images.shape[1])], axis=1)


def first_labels(service: apis.VisionAPI | None, images: Any, counts: np.ndarray) -> np.ndarray:
    """[B] what the service sees first, asked about the pictures that count only; NaN where it is not asked."""

    def first(image: np.ndarray) -> str:
        labels = service.labels(image) if service is not None else ()
        return labels[0].name if labels else ""

    asked = counts & (service is not None)
    return np.array([first(np.asarray(x)) if ask else np.nan for x, ask in zip(images, asked, strict=True)], object)


def lost(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """[B] whether first labels differ; NaN where the service was not asked."""
    return np.array([np.nan if isinstance(a, float) else float(a != b) for a, b in zip(before, after, strict=True)])


def shares_of_kinds(
    model: Model, clean: jax.Array, found: attacks.AttackResult, labels: np.ndarray, targets: np.ndarray, cell: Any
) -> np.ndarray:
    """[B,kinds] shares of the kinds of cells of what succeeded, towards the class that is seen; else NaN."""
    success = np.asarray(found.success)
    reached = np.where(success, np.asarray(classify(model, found.images)), targets)
    e = effect.pse(model, clean, found.images, labels, reached, cell)
    return np.where(success[:, None], np.asarray(effect.shares(e.kind)), np.nan)


def client(setting: Texts) -> contextlib.AbstractContextManager[apis.VisionAPI | None]:
    """The service, if there is one; nobody is asked yet. Raises ValueError as `apis.HTTPVision`."""
    if setting.service is None:
        return contextlib.nullcontext()
    return apis.HTTPVision(setting.service, key_variable=setting.key_variable, rate=setting.rate)


def analyse(
    setting: Texts,
    text: attacks.TransparentText,
    opacities: Sequence[float],
    model: Model,
    images: np.ndarray,
    labels: np.ndarray,
    targets: np.ndarray,
    counts: np.ndarray,
    service: apis.VisionAPI | None,
) -> dict[str, np.ndarray]:
    """Of every picture [B,H,W,3] and opacity the numbers `NAMES`, shares of kinds, and an example.

    Of the faintest overlay that a search up to the highest opacity finds, the numbers `LEAST` and shares of kinds.

    The service is asked about the pictures that count [B] only, and once about each as it is.
    """
    clean, key = jnp.asarray(images), jax.random.key(setting.seed)
    keys = example_keys(key, clean)
    others = jax.vmap(lambda k: jax.random.fold_in(k, 1))(keys)
    before = first_labels(service, images, counts)
    measured, shares, examples = [], [], []
    for opacity in opacities:
        attack = dataclasses.replace(text, opacity=opacity)
        drawn = _draw(attack, clean, keys, setting.draws)
        noise = signs_of_size(others, clean, jax.vmap(norm, 1, 1)(drawn - clean[:, None]))
        by_text, by_noise = fooled(model, drawn, labels), fooled(model, noise, labels)
        result = attacks.run(attack, model, clean, labels, key=key)
        success = np.asarray(result.success)
        seen = [lost(before, first_labels(service, x[:, 0], counts)) for x in (drawn, noise)]
        columns = [
            *(x.mean(1) for x in (by_text, by_noise)),
            *(x.any(1) for x in (by_text, by_noise)),
            success,
            result.forward,
            *(f(clean, drawn[:, 0]) for f in (ssim, psnr)),
            *seen,
        ]
        measured.append(np.column_stack(columns))
        shares.append(shares_of_kinds(model, clean, result, labels, targets, setting.cell))
        shown = np.where(success[:, None, None, None], result.images, drawn[:, 0])
        examples.append(np.round(shown * 255).astype(np.uint8))
    stacked = (np.stack(each, axis=1) for each in (measured, shares, examples))
    attack = dataclasses.replace(text, opacity=opacities[-1], faintest=0.0)
    state = attacks.advance(attack, model, attacks.start(attack, model, clean, labels, key=key))
    result = attacks.finish(attack, state)
    least = np.column_stack([state.opacity, *(f(clean, result.images) for f in (ssim, psnr))])
    return {
        **dict(zip(("measured", "shares", "examples"), stacked, strict=True)),
        "least": np.where(np.asarray(result.success)[:, None], least, np.nan),
        "least shares": shares_of_kinds(model, clean, result, labels, targets, setting.cell),
        "least examples": np.round(np.asarray(result.images) * 255).astype(np.uint8),
        "clean": images,
    }


def main(setting: Texts) -> None:
    """Success against opacity, of text and of noise of the same size."""
    opacities = sorted(set(setting.opacities))
    if not opacities or not 0 < opacities[0] <= opacities[-1] <= 1:
        raise ValueError(f"--opacities must be above 0 and at most 1, got {setting.opacities}")
    if setting.draws < 1:
        raise ValueError(f"--draws must be at least 1, got {setting.draws}")
    text = attacks.TransparentText(text=setting.text, queries=setting.queries)
    coerce(text)
    service = client(setting)
    config = {"opacities": opacities, "draws": setting.draws, "service": setting.service}
    job = survey("transparent_text", setting, {text.name: text}, config)
    run, seen, model = job.run, job.pictures, job.network.bind(job.params)
    every, size = chunks(seen, setting.batch_size), chunk_size(seen, setting.batch_size)
    equipped = job.attacks[text.name]
    assert isinstance(equipped, attacks.TransparentText)
    mine, _ = shared_chunks(run, (text.name,), seen, setting.batch_size)
    with service as vision:
        for start in tqdm(mine, desc="overlays", unit="chunk"):
            batch, targets = load_chunk(job.source, seen, every[start], size)
            pictures = batch.images, batch.labels, targets, np.asarray(batch.mask)
            made = analyse(setting, equipped, opacities, model, *pictures, vision)
            run.write_part(part_name(text.name, start), {name: each[batch.mask] for name, each in made.items()})
    processes.current().wait()
    parts = [arrays for _, _, arrays in stored_parts(run, (text.name,), seen, setting.batch_size)]
    measured = np.concatenate([part["measured"] for part in parts])  # [pictures, opacities, names]
    shares = np.concatenate([part["shares"] for part in parts])  # [pictures, opacities, kinds]
    least = np.concatenate([part["least"] for part in parts])  # [pictures, LEAST]
    least_shares = np.concatenate([part["least shares"] for part in parts])  # [pictures, kinds]
    of = {name: measured[..., i] for i, name in enumerate(NAMES)}
    shown = tuple(range(len(opacities)))

    def mean(values, *bounds):
        return bootstrap_mean(values, seed=setting.seed, bounds=bounds or None)

    def share(values):
        return proportion(int(values.sum()), len(values))

    unasked = {
        "one overlay": [mean(of["one"][:, i], 0, 1) for i in shown],
        "noise of its size": [mean(of["noise"][:, i], 0, 1) for i in shown],
        f"any of {setting.draws} overlays": [share(of["any"][:, i]) for i in shown],
        f"any of {setting.draws} noises": [share(of["any noise"][:, i]) for i in shown],
    }
    searched = {
        f"search, {setting.queries} queries": [share(of["search"][:, i]) for i in shown],
        "search of the opacity, too": [share(least[:, 0] <= opacity) for opacity in opacities],
    }
    served = {}
    if setting.service is not None:
        served = {
            "one overlay": [share(of["service"][:, i]) for i in shown],
            "noise of its size": [share(of["service noise"][:, i]) for i in shown],
        }
    found = {**unasked, **searched, **{f"service, {name}": each for name, each in served.items()}}
    answers = []
    for i, opacity in enumerate(opacities):
        for name, level in PUBLISHED.items():
            claim = f"opacity {opacity:g}: one overlay, without a query, loses {name} of the pictures"
            answers.append(Answer(claim, format(found["one overlay"][i]), verdict(found["one overlay"][i], level)))
        more = mean(of["one"][:, i] - of["noise"][:, i], -1, 1)
        claim = f"opacity {opacity:g}: one overlay loses more pictures than noise of its size"
        answers.append(Answer(claim, f"by {more}", verdict(more, 0.0)))
        if setting.service is not None:
            more = mean(of["service"][:, i] - of["service noise"][:, i], -1, 1)
            claim = f"opacity {opacity:g}: on the service, one overlay loses more pictures than noise of its size"
            answers.append(Answer(claim, f"by {more}", verdict(more, 0.0)))
    if len(opacities) > 1:
        more = mean(of["one"][:, -1] - of["one"][:, 0], -1, 1)
        claim = f"one overlay of opacity {opacities[-1]:g} loses more pictures than one of {opacities[0]:g}"
        answers.append(Answer(claim, f"by {more}", verdict(more, 0.0)))
    within = {"ssim": (-1, 1), "psnr": (), "queries": (1, setting.queries + 1), "opacity": (0, 1)}
    likeness = {name: [mean(of[name][:, i], *within[name]) for i in shown] for name in ("ssim", "psnr", "queries")}
    panels = {
        "pictures lost, without a query": unasked,
        "pictures lost, with queries": searched,
        **({"pictures lost on the service": served} if served else {}),
        "SSIM of one overlay": {"one overlay": likeness["ssim"]},
        "PSNR of one overlay, dB": {"one overlay": likeness["psnr"]},
    }
    directory = run.directory
    plots.save(plots.curves(panels, opacities, xlabel="opacity", log=True), directory / "success.png")
    by_kind = {kind: [mean(shares[:, i, j], 0, 1) for i in shown] for j, kind in enumerate(KINDS)}
    faintest = {kind: mean(each, 0, 1) for kind, each in zip(KINDS, least_shares.T, strict=True)}
    successes = {f"opacity {o:g}": {k: by_kind[k][i] for k in KINDS} for i, o in enumerate(opacities)}
    successes["the faintest found"] = faintest
    plots.save(
        plots.bars({"kinds of cells of the overlays that the search found": successes}, ylabel="share of cells"),
        directory / "kinds.png",
    )
    rows = []
    names = ("clean", "examples", "measured", "least examples", "least")
    for clean, examples, numbers, faint, (lowest, *_) in zip(*(parts[0][name][:SHOWN] for name in names), strict=True):
        lost_at = numbers[:, NAMES.index("search")]
        captions = (
            f"opacity {o:g}, {'lost' if lost else 'not lost'}" for o, lost in zip(opacities, lost_at, strict=True)
        )
        caption = f"faintest, {lowest:.2g}" if np.isfinite(lowest) else "none found"
        rows.append([("original", clean), *zip(captions, examples / 255, strict=True), (caption, faint / 255)])
    plots.save(plots.gallery(rows), directory / "examples.png")
    conclude(
        run,
        "transparent_text",
        len(seen.correct),
        answers,
        {
            **{
                f"{opacity:g}": {
                    **{name: format(each[i]) for name, each in {**found, **likeness}.items()},
                    **{kind: format(by_kind[kind][i]) for kind in KINDS},
                }
                for i, opacity in enumerate(opacities)
            },
            "the faintest that is found": {
                "pictures": int(np.isfinite(least[:, 0]).sum()),
                **{name: format(mean(values, *within[name])) for name, values in zip(LEAST, least.T, strict=True)},
                **{kind: format(value) for kind, value in faintest.items()},
            },
        },
    )


if __name__ == "__main__":
    sys.exit(guarded(lambda words: main(tyro.cli(Texts, description=__doc__, args=words))))
