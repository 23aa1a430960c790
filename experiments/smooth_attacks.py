"""Does smoothing hide a perturbation without making it fail, longer, or another kind of perturbation?

    python experiments/smooth_attacks.py --model cifar10_cnn --cell 4
    python experiments/smooth_attacks.py --model efficientnet_lite0 --transfer efficientnet_lite1 caffe_squeezenet1_1

Attacks the labelled pictures (or the given ones) with PGD in L2, I-FGSM and C&W, with their smooth forms sPGD_2, sBIM
and sC&W, and with the first and the last smoothed afterwards. Zhang et al. (2019, arXiv 1903.11862) find that smooth
attacks succeed as often at an equal or smaller L2 norm, with less noise where the image is flat. Asked of every pair:

(a) does the smooth attack succeed as often: at most 10 points less;
(b) is its L2 norm equal or smaller: at most 5 % larger, over the pictures on which both succeed;
(c) is the perturbation quieter in flat areas, where the picture's local standard deviation is among the lowest 30 %:
    a lower total variation, the mean of |d_i - d_j| over neighbouring pixels;
(d) is that more than what it loses in textured areas, the highest 30 %;
(e) is it quieter in flat areas relative to its L2 norm?

Shares of kinds of cells come from the effects that `jaxinterp explain` computes. With --transfer, untargeted attacks on
each of the networks, at --transfer-budget times the radii, are tried on all others: the adversarial pictures are
resized to what the other network takes, and pictures count which both networks classify correctly, the resized clean
one too. An answer is "confirmed" or "not
confirmed" where the 95 % bootstrap interval over pictures lies on one side. A stopped run continues. Writes
smooth_attacks/answers.json, variation.png, kinds.png, magnified-*.png and transfer.png.

Expected time: 5 minutes on two cores for cifar10_cnn; hours for an ImageNet network with all its pictures,
and a quarter of an hour for transfer between three of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from scipy.ndimage import uniform_filter

import jaxinterp
from jaxinterp import data, plots
from jaxinterp.cli import guarded
from jaxinterp.explain.tables import SHARE_COLUMNS, as_json
from jaxinterp.network import Network
from jaxinterp.pictures import Selection, classify_resized
from jaxinterp.robustness import evaluate
from jaxinterp.runs import file_name, stem
from jaxinterp.statistics import Estimate, bootstrap_mean, proportion
from jaxinterp.study import Answer, Setting, Study, begin, verdict

FEWER = 0.1  # of the pictures, that a smooth attack may fail on more
LONGER = 1.05  # times the L2 norm that it may have
SHARE = 0.3  # of the picture that counts as flat, and as textured
REGIONS = ("flat", "textured")
_SMALL = 64  # side up to which a picture is small


@dataclasses.dataclass(frozen=True)
class Smooth(Setting):
    """What `Setting` has, the budgets, and where adversarial pictures are tried.

    Attributes:
        l2: Radius of the L2 ball; None means 0.5 up to 64 pixels a side, else 1.
        linf: Radius of the Linf ball, in 1/255; None means 3, else 1.
        steps: Steps of PGD, I-FGSM and their smooth forms.
        search_steps: Constants that C&W and sC&W try.
        search_iterations: Iterations for each constant.
        transfer: Further networks on which adversarial pictures are made and tried.
        transfer_budget: Times the radii, of those pictures: what just suffices on one network hardly moves another.
        drawn: Pictures of which a figure is drawn.
    """

    l2: float | None = None
    linf: float | None = None
    steps: int = 20
    search_steps: int = 9
    search_iterations: int = 100
    transfer: tuple[str, ...] = ()
    transfer_budget: float = 8.0
    drawn: int = 3


def specs(setting: Smooth, side: int, times: float = 1.0) -> dict[str, str]:
    """Attacks as text by a short name, at so many times the radii."""
    small = side <= _SMALL
    radius = (0.5 if small else 1.0) if setting.l2 is None else setting.l2
    largest = (3.0 if small else 1.0) if setting.linf is None else setting.linf
    l2, linf = f"eps={times * radius:g},steps={setting.steps}", f"eps={times * largest:g}/255,steps={setting.steps}"
    search = f"search_steps={setting.search_steps},steps={setting.search_iterations}"
    pgd, cw = f"norm=l2,random_start=false,{l2}", f"initial_const=0.3,{search}"
    return {
        "PGD_2": f"pgd:{pgd}",
        "sPGD_2": f"spgd:{l2}",
        "PGD_2, smoothed": f"smoothed:base=pgd({pgd})",
        "I-FGSM": f"ifgsm:{linf}",
        "sBIM": f"sbim:{linf}",
        "C&W": f"cw:{cw}",
        "sC&W": f"scw:{search}",
        "C&W, smoothed": f"smoothed:base=cw({cw})",
    }


PAIRS = {
    "sPGD_2": "PGD_2",
    "PGD_2, smoothed": "PGD_2",
    "sBIM": "I-FGSM",
    "sC&W": "C&W",
    "C&W, smoothed": "C&W",
}
TRANSFERRED = ("PGD_2", "sPGD_2", "I-FGSM", "sBIM")  # made on every network


# ---- Flat and textured areas


def roughness(image: np.ndarray) -> np.ndarray:
    """Local standard deviation [H,W] of a picture [H,W,C], in windows of about a 45th of the side, mean of channels."""
    window = max(3, image.shape[0] // 45 | 1)
    exact = image.astype(np.float64)
    mean = uniform_filter(exact, window, axes=(0, 1))
    variance = uniform_filter(np.square(exact), window, axes=(0, 1)) - np.square(mean)
    return np.sqrt(np.maximum(variance, 0)).mean(-1)


def areas(image: np.ndarray) -> dict[str, np.ndarray]:
    """Masks [H,W] of the flat and of the textured area."""
    order = np.argsort(np.argsort(roughness(image), axis=None, kind="stable")).reshape(image.shape[:2])
    rank = order / (order.size - 1)
    return {"flat": rank <= SHARE, "textured": rank >= 1 - SHARE}


def variation(delta: np.ndarray, area: np.ndarray) -> float:
    """Mean of |d_i - d_j| over the pairs of neighbouring pixels inside the area, and over channels."""
    total, pairs = 0.0, 0
    for axis in (0, 1):
        near, far = [np.take(area, range(start, area.shape[axis] - 1 + start), axis) for start in (0, 1)]
        change = np.abs(np.diff(delta, axis=axis))[near & far]
        total, pairs = total + float(change.sum()), pairs + change.size
    return total / max(pairs, 1)


def analyse(_: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of every picture the variation [B,2] of the perturbation in flat and in textured areas."""
    deltas = arrays["adversarial"].astype(np.float64) - arrays["clean"]
    masks = [areas(image) for image in arrays["clean"]]
    return {"variation": np.array([[variation(d, m[r]) for r in REGIONS] for d, m in zip(deltas, masks, strict=True)])}


def windows(image: np.ndarray) -> dict[str, tuple[int, int, int]]:
    """The flattest and the most textured square of a sixth of the side, as (row, column, side)."""
    side = max(4, min(image.shape[:2]) // 6)
    low, high = side // 2, -(-side // 2)
    mean = uniform_filter(roughness(image), side)[low : 1 - high, low : 1 - high]  # centres of squares that are inside
    found = {}
    for name, place in zip(REGIONS, (np.argmin(mean), np.argmax(mean)), strict=True):
        row, column = np.unravel_index(place, mean.shape)
        found[name] = (int(row), int(column), side)
    return found


# ---- Transfer


def made(setting: Smooth, source: str, out: Path) -> tuple[Network, dict[str, dict[str, np.ndarray]], dict[str, int]]:
    """The network, the adversarial pictures by attack and id, and the labels of what was attacked; failures are absent.

    Untargeted: towards a random class hardly anything transfers.
    """
    size = jaxinterp.models.network(source).image_size
    texts = specs(setting, size, setting.transfer_budget)
    found = evaluate(
        setting.pictures,
        model=source,
        specs=[texts[name] for name in TRANSFERRED],
        out=out / file_name(source),
        labels=setting.labels,
        limit=setting.limit,
        seed=setting.seed,
        batch_size=setting.batch_size,
    )
    images: dict[str, dict[str, np.ndarray]] = {}
    for name in TRANSFERRED:
        folder = found.run.directory / "adversarial" / file_name(texts[name])
        images[name] = {}
        for row in found.rows:
            if row["attack"] == texts[name] and row["success"]:
                with np.load(folder / f"{stem(row['id'])}.npz") as stored:
                    images[name][row["id"]] = stored["image"]
    labels = {row["id"]: row["label"] for row in found.rows}
    return found.network, images, labels


def clean_pictures(setting: Smooth, network: Network) -> dict[str, np.ndarray]:
    """The clean pictures as a network takes them, by id."""
    crop = data.Crop(network.image_size, network.crop_pct, network.interpolation)
    installed = "samples:imagenet" if network.num_classes == 1000 else "samples:cifar10"
    pictures = list(setting.pictures) or [installed]
    asked = pictures if len(pictures) > 1 else pictures[0]
    source = data.open_source(asked, crop=crop, classes=network.classes, labels=setting.labels)
    count = len(source) if setting.limit is None else min(setting.limit, len(source))
    whole = data.batches(Selection(source, tuple(range(count))), count, on_damaged=lambda error: None)  # listed before
    return {name: image for batch in whole for name, image in zip(batch.ids, batch.images, strict=True) if name}


def transfer(setting: Smooth, study: Study) -> tuple[dict[str, Any], list[Answer]]:
    """Shares of pictures on which networks err, by attack, source and network, and whether smoothing changes them."""
    names = list(dict.fromkeys((setting.model, *setting.transfer)))
    sources = {name: made(setting, name, study.run.directory / "transfer") for name in names}
    models = {name: jaxinterp.load(name) for name in names}
    broken: dict[str, dict[tuple[str, str], dict[str, float]]] = {name: {} for name in TRANSFERRED}
    for source, (network, images, labels) in sources.items():
        clean = clean_pictures(setting, network)
        ids = sorted(labels)
        for other in names:
            target, params = models[other]
            truth = np.array([labels[i] for i in ids])
            right = classify_resized(target, params, np.stack([clean[i] for i in ids])) == truth
            for name in TRANSFERRED:
                shown = np.stack([images[name].get(i, clean[i]) for i in ids])
                wrong = classify_resized(target, params, shown) != truth
                broken[name][source, other] = {i: float(wrong[k]) for k, i in enumerate(ids) if right[k]}

    def share(found: dict[str, float]) -> Estimate:
        return proportion(int(sum(found.values())), len(found))

    panels = {name: {a: {b: share(broken[name][a, b]) for b in names} for a in names} for name in TRANSFERRED}
    figure = plots.matrices(panels, row="made on", column="tried on", unit="share of pictures on which it errs")
    plots.save(figure, study.run.directory / "transfer.png")
    answers = []
    for smooth, rough in PAIRS.items():
        if smooth not in TRANSFERRED or len(names) < 2:
            continue
        gained: dict[str, list[float]] = {}
        for pair in itertools.permutations(names, 2):
            for i, wrong in broken[smooth][pair].items():
                gained.setdefault(i, []).append(wrong - broken[rough][pair][i])
        more = bootstrap_mean([np.mean(each) for each in gained.values()], seed=setting.seed, bounds=(-1, 1))
        claim = f"{smooth} transfers to other networks more often than {rough}"
        answers.append(Answer(claim, f"by {more}, {more.count} pictures", verdict(more, 0.0)))
    table = {
        name: {a: {b: f"{e} of {e.count}" for b, e in line.items()} for a, line in found.items()}
        for name, found in panels.items()
    }
    return table, answers


# ---- All of it


def compared(smooth: str, rough: str, found: Mapping[str, Mapping[str, np.ndarray]], seed: int) -> list[Answer]:
    """(a) to (e) for a smooth attack and the one that it comes from."""

    def mean(values):
        return bootstrap_mean(values, seed=seed)

    a, b = found[smooth], found[rough]
    more = bootstrap_mean(a["success"].astype(float) - b["success"].astype(float), seed=seed, bounds=(-1, 1))
    rates = f"{a['success'].mean():.0%} and {b['success'].mean():.0%}"
    answers = [
        Answer(f"(a) {smooth} succeeds as often as {rough}", f"{rates}, difference {more}", verdict(more, -FEWER))
    ]
    both = a["success"] & b["success"] & (a["l2"] > 0) & (b["l2"] > 0)
    if not both.any():
        return answers
    shorter = mean(np.log2(b["l2"][both] / a["l2"][both]))
    times = f"L2 {_times(shorter)}"
    claim = f"(b) {smooth} is not longer than {rough}"
    answers.append(Answer(claim, f"{times}, {shorter.count} pictures", verdict(shorter, -np.log2(LONGER))))
    quieter = np.log2(b["variation"][both] / np.maximum(a["variation"][both], 1e-12))
    in_flat, difference = mean(quieter[:, 0]), mean(quieter[:, 0] - quieter[:, 1])
    times = f"variation {_times(in_flat)}"
    answers.append(Answer(f"(c) {smooth} is quieter than {rough} in flat areas", times, verdict(in_flat, 0.0)))
    in_texture = mean(quieter[:, 1])
    times = f"{2**-in_texture.mean:.2f} times in textured areas, the difference of logarithms {difference}"
    claim = f"(d) {smooth} loses more of it there than in textured areas"
    answers.append(Answer(claim, times, verdict(difference, 0.0)))
    alike = mean(quieter[:, 0] - np.log2(b["l2"][both] / a["l2"][both]))
    times = _times(alike)
    claim = f"(e) {smooth} is quieter than {rough} in flat areas, relative to its length"
    return [*answers, Answer(claim, times, verdict(alike, 0.0))]


def _times(smaller: Estimate) -> str:
    """How many times as large, from the logarithm to base two of how many times smaller."""
    between = "(one picture)" if smaller.count == 1 else f"[{2**-smaller.high:.2f}, {2**-smaller.low:.2f}]"
    return f"{2**-smaller.mean:.2f} times as large {between}"


def main(setting: Smooth) -> None:
    """Attacks with and without smoothing, side by side."""
    if setting.attack:
        raise ValueError("--attack: this study chooses its attacks; see --l2, --linf, --steps and --search-steps")
    network = jaxinterp.models.network(setting.model)
    if not 0 < setting.transfer_budget < np.inf:
        raise ValueError(f"--transfer-budget must be positive and finite, got {setting.transfer_budget:g}")
    for name in setting.transfer:
        if (classes := jaxinterp.load(name)[0].num_classes) != network.num_classes:
            raise ValueError(f"--transfer {name} has {classes} classes, {network.name} has {network.num_classes}")
    side = network.image_size
    texts = specs(setting, side)
    asked = dataclasses.replace(setting, attack=tuple(texts.values()))
    tried = {"transfer": list(setting.transfer), "transfer_budget": setting.transfer_budget} if setting.transfer else {}
    study = begin("smooth_attacks", asked, {"share": SHARE, **tried})
    names = {text: name for name, text in texts.items()}

    collected: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in texts}
    pictures: dict[str, dict[str, Any]] = {}
    for text, arrays, extra in study.analysed(analyse):
        name, kept = names[text], collected[names[text]]
        for key in ("success", "l2", "linf"):
            kept.setdefault(key, []).append(arrays[key])
        kept.setdefault("variation", []).append(extra["variation"])
        for i, picture in enumerate(arrays["ids"]):
            if str(picture) in pictures or len(pictures) < setting.drawn:
                shown = pictures.setdefault(str(picture), {"clean": arrays["clean"][i], "attacks": {}})
                if arrays["success"][i]:
                    shown["attacks"][name] = arrays["adversarial"][i]
    found = {name: {key: np.concatenate(parts) for key, parts in kept.items()} for name, kept in collected.items()}

    answers = [answer for smooth, rough in PAIRS.items() for answer in compared(smooth, rough, found, setting.seed)]

    def size(values):
        return bootstrap_mean(values, seed=setting.seed).within(0, np.inf)

    table: dict[str, Any] = {}
    for name, of in found.items():
        won = of["success"]
        table[name] = {
            "attack": texts[name],
            "success": format(proportion(int(won.sum()), len(won)), ".2f"),
            "l2": format(size(of["l2"][won]), ".4g"),
            "linf": format(size(of["linf"][won]), ".4g"),
            **{
                f"variation in {region} areas": format(size(of["variation"][won, i]), ".3g")
                for i, region in enumerate(REGIONS)
            },
        }
    draw(study, texts, found, pictures, setting.seed)
    results: dict[str, Any] = {"attacks": table, "kinds": as_json(study.found.summary)}
    for name, row in table.items():
        print(f"{name:18}" + "  ".join(f"{key} {value}" for key, value in row.items() if key != "attack"))
    if setting.transfer:
        results["transfer"], more = transfer(setting, study)
        answers += more
    study.conclude(answers, results)


def draw(
    study: Study,
    texts: Mapping[str, str],
    found: Mapping[str, Mapping[str, np.ndarray]],
    pictures: Mapping[str, Mapping[str, Any]],
    seed: int,
) -> None:
    """Variation by area, shares of kinds, and the perturbations of some pictures side by side."""
    folder = study.run.directory

    def relative(name: str, i: int) -> Estimate:
        of = found[name]
        won = of["success"] & (of["l2"] > 0)
        size = of["l2"][won] / np.sqrt(study.found.network.image_size**2 * 3)  # root mean square of the perturbation
        return bootstrap_mean(of["variation"][won, i] / size, seed=seed).within(0, np.inf)

    panels = {
        "total variation, perturbation of unit strength": {
            name: {region: relative(name, i) for i, region in enumerate(REGIONS)} for name in found
        }
    }
    colours: dict[str, str] = dict(zip(REGIONS, plots.LINES, strict=False))
    plots.save(plots.bars(panels, ylabel="mean |d_i - d_j| / rms(d)", colours=colours), folder / "variation.png")
    names = {text: name for name, text in texts.items()}
    shares = {
        names[row["attack"]]: {key.removeprefix("share_"): row[key].interval for key in SHARE_COLUMNS}
        for row in study.found.summary
    }
    plots.save(plots.kinds_bar(shares), folder / "kinds.png")
    for name, shown in pictures.items():
        if shown["attacks"]:
            figure = plots.magnified(shown["clean"], shown["attacks"], windows(shown["clean"]), title=name)
            plots.save(figure, folder / f"magnified-{file_name(name)}.png")


if __name__ == "__main__":
    sys.exit(guarded(lambda words: main(tyro.cli(Smooth, description=__doc__, args=words))))
