"""Every attack on the same pictures, on one scale: how often, how far, how like the picture, and by which effects.

    python experiments/compare_all.py --model cifar10_cnn --cell 4 --batch-size 20
    python experiments/compare_all.py --model efficientnet_lite0 --cell 28 --limit 4 --passes 20 --queries 60
    python experiments/compare_all.py --model cifar10_cnn --cell 4 --batch-size 20 --attack fmn --attack "C&W"

Attacks the labelled pictures (or the given ones) with every attack of the registry, in each of its norms. All have the
same budget: `--passes` backward passes for those that know gradients (FGSM takes one, by its definition), `--queries`
forward passes for those that do not; what each has really paid stands in the table, and attacks beyond the budget are
named. Attacks in a ball get the same radius in the same norm. Every attack is run away from the true class, and towards
the same random class where it can be told one. An attack without gradients that looks for an overlay or a watermark,
or for a start by chance, is not, and neither are those that choose their classes themselves.

For every attack and goal: success with its exact interval; medians of the norms, of SSIM and of the number of groups of
pixels that changed, over successes (squares of 2 pixels up to 32, else 13, as StrAttack takes them); shares of the
kinds of cells (arXiv 1904.02057; without a target, towards the class that was reached); the interpretability score less
that of a perturbation spread evenly (its null); passes; and how often other networks err on what succeeded, of the
pictures that they see rightly.

Each attack has a directory of its own in OUT/attacks, so that a stopped run continues, and --attack (a name, or a part
of names) computes some now and others later. An attack that fails is listed, and the others go on. Writes
table.csv, images.csv, table.md, comparison.png and answers.json.

Expected time: 5 minutes on two cores for cifar10_cnn, compilation included; an hour and a half for efficientnet_lite0.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import tyro

from jaxinterp import attacks, cam, models, plots, processes, watermarks
from jaxinterp.attacks.spec import from_spec, record
from jaxinterp.cli import guarded
from jaxinterp.explain.compute import explain_batch, map_method
from jaxinterp.explain.tables import KINDS, image_rows
from jaxinterp.job import Job, attacking, choose_attacks
from jaxinterp.network import Network, Params
from jaxinterp.pictures import Progress, chunk_size, chunks, classify_resized, load_chunk
from jaxinterp.processes import open_run, read_part
from jaxinterp.runs import Run, file_name
from jaxinterp.similarity import ssim
from jaxinterp.statistics import Estimate, bootstrap_mean, proportion
from jaxinterp.study import Answer, Setting, conclude, survey, verdict
from jaxinterp.supplies import supplied
from jaxinterp.weights import checkpoint, load

Goal = Literal["untargeted", "targeted"]
GOALS: tuple[Goal, ...] = ("untargeted", "targeted")
NORMS = ("l0", "l1", "l2", "linf")
FOLDERS = 9  # of watermarks: the pictures of scikit-image
CHANGED = 1e-3  # of a pixel, that counts for groups
_SMALL = 64  # side up to which a picture is small
# Radii at which some pictures resist, of small and of other pictures.
RADII = {True: {"linf": "2/255", "l2": "0.5", "l1": "8"}, False: {"linf": "1/255", "l2": "1", "l1": "60"}}


@dataclasses.dataclass(frozen=True)
class Compared(Setting):
    """What `Setting` has, where `attack` is a name in the table, or a part of it, and the budgets.

    Attributes:
        attack: Only this attack, such as "C&W", or those of a kind, such as fmn; may be given several times.
        passes: Backward passes of each attack that knows gradients, at most.
        queries: Forward passes of each attack that does not, at most.
        linf: Radius of Linf balls, in 1/255; None means 2 up to 64 pixels a side, else 1.
        l2: Radius of L2 balls; None means 0.5, else 1.
        l1: Radius of L1 balls; None means 8, else 60.
        goals: untargeted, targeted, or both.
        transfer: Networks on which adversarial pictures are tried; None means all converted ones with as many classes.
        watermarks: Folder of class folders of pictures; None means crops of pictures that come with scikit-image.
    """

    passes: int = 40
    queries: int = 200
    linf: float | None = None
    l2: float | None = None
    l1: float | None = None
    goals: tuple[Goal, ...] = GOALS
    transfer: tuple[str, ...] | None = None
    watermarks: Path | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """An attack of the comparison.

    Attributes:
        name: in tables and figures.
        family: heading above it, of `jaxinterp.attacks.FAMILIES`.
        spec: the attack as text.
        goals: what it can be asked for.
    """

    name: str
    family: str
    spec: str
    goals: tuple[Goal, ...]


# ---- Which attacks, at which budgets

UNTARGETED = ("apgdt", "autoattack", "hopskipjump", "transparent-text", "watermark")
"""Attacks that choose the class themselves, or meet one by chance."""


def entries(setting: Compared, side: int) -> list[Entry]:
    """All attacks at the setting's budgets, for pictures of this side."""
    small, n, q = side <= _SMALL, setting.passes, setting.queries
    linf = RADII[small]["linf"] if setting.linf is None else f"{setting.linf:g}/255"
    l2, l1 = (
        RADII[small][norm] if value is None else f"{value:g}"
        for norm, value in (("l2", setting.l2), ("l1", setting.l1))
    )
    balls = {"Linf": f"norm=linf,eps={linf}", "L2": f"norm=l2,eps={l2}", "L1": f"norm=l1,eps={l1}"}
    problems = max(1, min(4, n // 8))
    search = f"search_steps={problems},steps={max(1, n // problems)}"
    refit = max(1, n // 8)
    rivals = min(4, n)
    named = {
        "FGSM": f"fgsm:eps={linf}",
        "I-FGSM": f"ifgsm:eps={linf},steps={n}",
        **{f"PGD {norm}": f"pgd:{ball},steps={n}" for norm, ball in balls.items()},
        "MI-FGSM": f"mifgsm:eps={linf},steps={n}",
        "MI-FGSM, NI DI TI": f"mifgsm:eps={linf},steps={n},transforms=ni+di+ti",
        **{f"APGD {norm}": f"apgd:{ball},steps={n}" for norm, ball in balls.items()},
        "APGD Linf, DLR": f"apgd:{balls['Linf']},loss=dlr,steps={n}",
        "APGD-T Linf": f"apgdt:{balls['Linf']},classes={rivals},steps={max(1, n // rivals)}",
        "C&W": f"cw:initial_const=1,{search}",
        "C&W Linf": f"cw-linf:initial_const=0.1,decrease=0.7,{search}",
        "C&W L0": f"cw-l0:initial_const=0.1,{search}",
        "EAD": f"ead:initial_const=1,beta=0.01,{search}",
        "EAD, L1 rule": f"ead:initial_const=1,beta=0.01,rule=l1,{search}",
        "StrAttack": f"strattack:search_steps=2,steps={max(1, n // 4)},refit_search_steps=2,refit_steps={2 * refit}",
        "DeepFool L2": f"deepfool:norm=l2,candidates=4,steps={max(1, n // 4)}",
        "DeepFool Linf": f"deepfool:norm=linf,candidates=4,steps={max(1, n // 4)}",
        "DDN": f"ddn:steps={n}",
        **{f"FMN {norm}": f"fmn:norm={norm.lower()},steps={n}" for norm in ("L0", "L1", "L2", "Linf")},
        **{
            f"FAB {norm}": f"fab:norm={norm.lower()},candidates=4,steps={max(1, n // 4)}"
            for norm in ("L2", "Linf", "L1")
        },
        "Key pixels": f"key-pixels:eps={l2},rounds={min(4, n)},steps={max(1, (n - 1) // 4)}",
        **{f"Square {norm}": f"square:{ball},steps={max(1, q - 1)}" for norm, ball in balls.items()},
        "SPSA": f"spsa:eps={linf},samples=9,steps={max(1, (q - 1) // 19)}",
        **{f"HopSkipJump {norm}": hop_skip_jump(norm, q) for norm in ("L2", "Linf")},
        "Transparent text": f"transparent-text:opacity=0.3,queries={max(1, q - 1)}"
        + (",text=go|no|stop" if small else ""),
        **{
            f"Watermark {name}": f"watermark:transform={name.lower()},rounds={rounds},"
            f"failures={max(1, min(10, (q - 1) // (FOLDERS * rounds)))}"
            for name, rounds in (("Haar", 2), ("DCT", 10))  # the method's; the budget cuts down its ten pictures
        },
        "sPGD L2": f"spgd:eps={l2},steps={n}",
        "sBIM": f"sbim:eps={linf},steps={n}",
        "sC&W": f"scw:{search}",
        "C&W, smoothed": f"smoothed:base=cw(initial_const=1,{search})",
        "AutoAttack Linf": f"autoattack:eps={linf},classes=2,steps={max(1, n // 5)},queries={q}",
    }
    family = {kind.name: name for name, kinds in attacks.FAMILIES.items() for kind in kinds}
    used = {spec.partition(":")[0] for spec in named.values()}
    named |= {name: name for name in attacks.ATTACKS if name not in used}
    order = list(attacks.FAMILIES)
    found = []
    for name, spec in named.items():
        kind = spec.partition(":")[0]
        goals: tuple[Goal, ...] = tuple(
            g for g in GOALS if g in setting.goals and (g == "untargeted" or kind not in UNTARGETED)
        )
        if goals:
            found.append(Entry(name, family[kind], spec, goals))
    return sorted(found, key=lambda entry: order.index(entry.family))


def selected(found: Sequence[Entry], asked: Sequence[str]) -> list[Entry]:
    """Those with one of the words as their name, or as that of their kind, or else in their name; all without words.

    Raises:
        ValueError: a word that is in no name.
    """
    chosen: set[str] = set()
    for word in (text.lower() for text in asked):
        same = {e.name for e in found if word in (e.name.lower(), e.spec.partition(":")[0])}
        same = same or {e.name for e in found if word in e.name.lower()}
        if not same:
            raise ValueError(f"--attack: {word!r} is in no name; known: {', '.join(e.name for e in found)}")
        chosen |= same
    return [entry for entry in found if not asked or entry.name in chosen]


def hop_skip_jump(norm: str, queries: int) -> str:
    """As text: as many iterations and samples as fit, with 25 queries for every start and every bisection."""
    steps = max(1, queries // 65)
    samples = (queries - 25 * (steps + 1)) / sum(np.sqrt(np.arange(1, steps + 1)))
    count = max(1, int(samples))
    return f"hopskipjump:norm={norm.lower()},steps={steps},evaluations={count},tries={max(1, queries // 10)}"


# ---- What is computed


def compute(
    job: Job,
    entry: Entry,
    goal: Goal,
    setting: Compared,
    marks: Callable[[], watermarks.Watermarks],
    others: Mapping[str, tuple[Network, Params]],
    progress: Progress,
) -> Run:
    """The parts of an attack that are missing: what `explain_batch` gives, SSIM, and what other networks see."""
    group, network, model_params = processes.current(), job.network, job.params
    bare = from_spec(entry.spec, attacks.ATTACKS)
    pictures = marks() if isinstance(bare, attacks.Watermark) else None
    attack = supplied({entry.name: bare}, network.image_size, pictures)[entry.name]
    config = {
        **{"attack": record(bare), "goal": goal, "of": job.run.config},
        **({} if pictures is None else {"watermarks": pictures.digest}),
    }
    run = open_run(job.run.directory / "attacks" / file_name(f"{entry.name} {goal}".replace(" ", "-")), config)
    every, size = chunks(job.pictures, setting.batch_size), chunk_size(job.pictures, setting.batch_size)
    for start in group.share(list(every)):
        part = f"{start:06d}"
        if run.read_part(part) is not None:
            continue
        began = time.process_time()
        batch, targets = load_chunk(job.source, job.pictures, every[start], size)
        arrays = explain_batch(
            network,
            model_params,
            attack,
            batch,
            targets,
            cell=setting.cell,
            cam=map_method(network, setting.maps),
            seed=setting.seed,
            run=run,
            part=part,
            targeted=goal == "targeted",
            progress=progress,
        )
        arrays["ssim"] = np.asarray(ssim(jnp.asarray(arrays["clean"]), jnp.asarray(arrays["adversarial"])))
        run.write_part(part, {**arrays, "seconds": np.array(time.process_time() - began)})
        run.remove_state(part)
    for start in group.share(list(every)):
        arrays = None
        for name, (other, params) in others.items():
            part = f"{start:06d}-on-{file_name(name)}"
            if run.read_part(part) is None:
                progress(f"on {name}", 0.0)
                arrays = arrays or read_part(run, f"{start:06d}")
                seen = {which: classify_resized(other, params, arrays[which]) for which in ("clean", "adversarial")}
                run.write_part(part, {which: classes == arrays["labels"] for which, classes in seen.items()})
    return run


def rows_of(
    job: Job, run: Run, entry: Entry, goal: Goal, setting: Compared, others: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """A row for every picture under an attack, from its parts."""
    side = 2 if job.network.image_size <= 32 else 13
    for start in chunks(job.pictures, setting.batch_size):
        arrays = read_part(run, f"{start:06d}")
        beyond = {name: read_part(run, f"{start:06d}-on-{file_name(name)}") for name in others}
        for i, row in enumerate(image_rows(job.network, entry.name, arrays)):
            yield {
                **row,
                "family": entry.family,
                "goal": goal,
                "ssim": float(arrays["ssim"][i]),
                "groups": groups(arrays["adversarial"][i] - arrays["clean"][i], side),
                "is_excess": row["is_label"] - row["is_null"],
                "seconds": float(arrays["seconds"]) / len(arrays["ids"]),
                **{f"right_{name}": bool(seen["clean"][i]) for name, seen in beyond.items()},
                **{f"errs_{name}": not seen["adversarial"][i] for name, seen in beyond.items()},
            }


def groups(delta: np.ndarray, side: int) -> int:
    """In how many squares of `side` pixels anything changes by more than 1e-3."""
    changed = np.abs(delta).max(axis=-1) > CHANGED
    height, width = (-(-size // side) * side for size in changed.shape)
    padded = np.zeros((height, width), bool)
    padded[: changed.shape[0], : changed.shape[1]] = changed
    return int(padded.reshape(height // side, side, width // side, side).any(axis=(1, 3)).sum())


# ---- What it comes to


def summarise(rows: Sequence[Mapping[str, Any]], others: Sequence[str], seed: int) -> dict[str, Any]:
    """One attack with one goal: medians and estimates over its successes, passes of all pictures."""
    won = [row for row in rows if row["success"]]

    def median(key: str) -> float:
        return float(np.median([float(row[key]) for row in won])) if won else float("nan")

    def mean(key: str) -> Estimate:
        return bootstrap_mean([row[key] for row in won], seed=seed)

    def tried(name: str) -> Estimate:
        seen = [row for row in won if row[f"right_{name}"]]
        return proportion(sum(row[f"errs_{name}"] for row in seen), len(seen))

    return {
        **{key: rows[0][key] for key in ("family", "attack", "goal")},
        "success": proportion(len(won), len(rows)),
        **{key: median(key) for key in (*NORMS, "ssim", "groups")},
        **{kind: mean(f"share_{kind}") for kind in KINDS},
        "is_label": mean("is_label"),
        "is_null": mean("is_null"),
        "is_excess": mean("is_excess"),
        **{passes: float(np.median([row[passes] for row in rows])) for passes in ("forward", "backward")},
        **{f"most_{passes}": int(np.max([row[passes] for row in rows])) for passes in ("forward", "backward")},
        **{f"transfer_{name}": tried(name) for name in others},
        "seconds": float(np.sum([row["seconds"] for row in rows])),
    }


def beyond_budget(summary: Sequence[Mapping[str, Any]], setting: Compared) -> list[str]:
    """Attacks of which a picture paid for more than the budget allows, in words."""
    found = []
    for row in summary:
        which, most = ("backward", setting.passes) if row["most_backward"] else ("forward", setting.queries)
        if row[f"most_{which}"] > most:
            found.append(f"{row['attack']} ({row['goal']}): {row[f'most_{which}']} {which} passes, not {most}")
    return found


# Name, name, what, and the factor below 1 by which it is expected to be less (METHODS' directions).
LESS = (
    ("EAD", "C&W", "l1", "EAD's L1 norm is below that of C&W"),
    ("C&W", "EAD", "l2", "C&W's L2 norm is below that of EAD"),
    ("StrAttack", "C&W", "groups", "StrAttack changes fewer groups of pixels than C&W"),
    ("FMN L0", "C&W", "l0", "FMN in L0 changes fewer components than C&W"),
    ("sC&W", "C&W", "l2", "sC&W has a smaller L2 norm than C&W"),
)
PAPER = ("C&W", "EAD", "StrAttack")  # whose scores should lie above the null and above I-FGSM's


def answers(table: Mapping[tuple[str, Goal], Sequence[Mapping[str, Any]]], seed: int) -> list[Answer]:
    """The directions that are expected, of every pair of attacks on the pictures on which both succeed.

    Args:
        table: attack and goal -> its rows, the same pictures in each.
        seed: of the bootstrap.
    """

    def both(a: str, b: str, goal: Goal) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        pairs = zip(table.get((a, goal), ()), table.get((b, goal), ()), strict=False)
        return [(x, y) for x, y in pairs if x["success"] and y["success"]]

    found = []
    for goal in GOALS:
        for a, b, what, claim in LESS:
            pairs = both(a, b, goal)
            if pairs:
                ratios = [np.log2(float(y[what])) - np.log2(float(x[what])) for x, y in pairs if x[what] and y[what]]
                less = bootstrap_mean(ratios, seed=seed)
                times = f"{2**-less.mean:.2f} times [{2**-less.high:.2f}, {2**-less.low:.2f}], {less.count} pictures"
                found.append(Answer(f"{goal}: {claim}", times, verdict(less, 0.0)))
        for name in PAPER:
            won = [row for row in table.get((name, goal), ()) if row["success"]]
            if won:
                more = bootstrap_mean([row["is_excess"] for row in won], seed=seed)
                claim = f"{goal}: the interpretability score of {name} is above its null"
                found.append(Answer(claim, f"by {more}, {more.count} pictures", verdict(more, 0.0)))
            pairs = both(name, "I-FGSM", goal)
            if pairs:
                more = bootstrap_mean([x["is_label"] - y["is_label"] for x, y in pairs], seed=seed)
                claim = f"{goal}: the interpretability score of I-FGSM is below that of {name}"
                found.append(Answer(claim, f"by {more}, {more.count} pictures", verdict(more, 0.0)))
    occur: dict[str, list[bool]] = {}
    for row in (row for rows in table.values() for row in rows if row["success"]):
        shares = [row[f"share_{kind}"] for kind in KINDS]
        if np.all(np.isfinite(shares)):
            occur.setdefault(row["id"], []).append(min(shares) > 0)
    if occur:  # perturbations of one picture are alike, so that the pictures are what is counted
        every = bootstrap_mean([np.mean(each) for each in occur.values()], seed=seed, bounds=(0, 1))
        claim = "all three kinds of cells occur in most perturbations, over all attacks"
        many = f"{sum(map(len, occur.values()))} perturbations, {every.count} pictures"
        found.append(Answer(claim, f"in {every:.2f} of {many}", verdict(every, 0.5)))
    return found


def markdown(summary: Sequence[Mapping[str, Any]], others: Sequence[str]) -> str:
    """The table, a line for each attack and goal."""

    def number(value: Any, spec: str) -> str:
        mean = value.mean if isinstance(value, Estimate) else value
        return "" if np.isnan(mean) else format(mean, spec)

    heads = ["attack", "goal", "success", "L0", "L1", "L2", "Linf x 255", "SSIM", "groups"]
    heads += [f"{kind} cells" for kind in KINDS] + ["IS - null", "forward", "backward"]
    lines = []
    for row in summary:
        cells = [row["attack"], row["goal"], number(row["success"], ".2f")]
        cells += [number(row["l0"], ".0f"), number(row["l1"], ".2f"), number(row["l2"], ".3f")]
        cells += [number(255 * row["linf"], ".2f"), number(row["ssim"], ".3f"), number(row["groups"], ".0f")]
        cells += [number(row[kind], ".2f") for kind in KINDS] + [format(row["is_excess"], ".2f")]
        cells += [number(row[key], ".0f") for key in ("forward", "backward")]
        lines.append(cells + [number(row[f"transfer_{name}"], ".2f") for name in others])
    heads += [f"errs: {name}" for name in others]
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *lines]) + "\n"


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the summary for the table: an estimate becomes its mean and the ends of its interval."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Estimate):
            found |= {key: value.mean, f"{key}_low": value.low, f"{key}_high": value.high}
        else:
            found[key] = value
    return found


def draw(summary: Sequence[Mapping[str, Any]], others: Sequence[str], title: str, components: int) -> Any:
    """The figure: a line for every attack, a colour for every goal."""

    def single(value: float) -> Estimate:
        return Estimate(value, value, value, 1)

    def panel(make: Callable[[Mapping[str, Any]], Estimate]) -> dict[str, dict[str, Estimate]]:
        goals = [goal for goal in GOALS if any(row["goal"] == goal for row in summary)]
        return {goal: {row["attack"]: make(row) for row in summary if row["goal"] == goal} for goal in goals}

    panels = {
        "success": panel(lambda row: row["success"]),
        "components changed, share": panel(lambda row: single(row["l0"] / components)),
        "L1": panel(lambda row: single(row["l1"])),
        "L2": panel(lambda row: single(row["l2"])),
        "Linf × 255": panel(lambda row: single(255 * row["linf"])),
        "SSIM": panel(lambda row: single(row["ssim"])),
        "interpretability score less its null": panel(lambda row: row["is_excess"]),
        "forward passes": panel(lambda row: single(row["forward"])),
        "backward passes (ring: none)": panel(lambda row: single(row["backward"])),
        **{f"errors of {name}": panel(lambda row, name=name: row[f"transfer_{name}"]) for name in others},
    }
    shares = {
        goal: {row["attack"]: {kind: row[kind].mean for kind in KINDS} for row in summary if row["goal"] == goal}
        for goal in panels["success"]
    }
    by_family: dict[str, list[str]] = {}
    for row in summary:
        names = by_family.setdefault(row["family"], [])
        if row["attack"] not in names:
            names.append(row["attack"])
    logs = ("L1", "L2", "Linf × 255", "forward passes", "backward passes (ring: none)")
    references = {"interpretability score less its null": 0.0}
    return plots.comparison(by_family, panels, shares, logs=logs, references=references, title=title)


# ---- All of it


def main(setting: Compared) -> None:
    """The comparison, or what is left of it."""
    for name in ("passes", "queries"):
        if getattr(setting, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(setting, name)}")
    for name in ("linf", "l2", "l1"):
        value = getattr(setting, name)
        if value is not None and not (value > 0 and np.isfinite(value)):
            raise ValueError(f"--{name} must be positive and finite, got {value}")
    if not setting.goals:
        raise ValueError("--goals must be untargeted, targeted or both, got none")
    network = models.network(setting.model)
    cam.check_method(network, map_method(network, setting.maps))
    side = network.image_size
    chosen = selected(entries(setting, side), setting.attack)
    if not chosen:
        raise ValueError(f"--goals {' '.join(setting.goals)} fits no attack")
    choose_attacks([entry.spec for entry in chosen])  # refuses a parameter that is out of range
    if setting.watermarks is not None:  # and pictures that cannot be read, before anything is computed
        watermarks.read(setting.watermarks, side)

    @functools.cache
    def marks() -> watermarks.Watermarks:
        return watermarks.installed(side) if setting.watermarks is None else watermarks.read(setting.watermarks, side)

    job = survey("compare_all", setting, {}, {"maps": setting.maps})
    others = {name: load(name) for name in others_of(setting, job.network)}
    runs: list[tuple[Entry, Goal]] = [(entry, goal) for entry in chosen for goal in entry.goals]
    done: dict[tuple[str, Goal], Run] = {}
    failed: dict[str, str] = {}
    group = processes.current()
    with attacking(job.pictures, 0) as progress:
        for entry, goal in runs:
            name, reason = f"{entry.name}, {goal}", ""
            try:
                shown = functools.partial(_named, progress, name)
                done[entry.name, goal] = compute(job, entry, goal, setting, marks, others, shown)
            except OSError:  # a full disk: no attack is to blame
                raise
            except Exception as error:  # whatever it is: the others go on
                reason = f"{type(error).__name__}: {error}"
            reason = group.settle(reason, lambda reasons: next(filter(None, reasons), ""))
            if reason:
                failed[name] = reason
                done.pop((entry.name, goal), None)
                print(f"\nfailed: {name}: {reason}", flush=True)
            progress(name, len(job.pictures.correct) / len(runs))
    table: dict[tuple[str, Goal], list[dict[str, Any]]] = {
        (entry.name, goal): list(rows_of(job, done[entry.name, goal], entry, goal, setting, tuple(others)))
        for entry, goal in runs
        if (entry.name, goal) in done
    }
    if not table:
        raise ValueError(f"no attack could be run: {'; '.join(failed.values())}")
    report(job, setting, table, failed, {entry.name: entry.spec for entry in chosen}, tuple(others))


def _named(progress: Progress, name: str, what: str, done: float) -> None:
    """Progress of one attack; its pictures are counted when it has ended."""
    progress(f"{name}: {what}", 0.0)


def others_of(setting: Compared, network: Network) -> tuple[str, ...]:
    """Names of the networks on which pictures are tried.

    Raises:
        ValueError: one has other classes.
    """
    if setting.transfer is None:
        root = checkpoint.default_root()
        there = sorted(path.parent.name for path in root.glob("*/manifest.json")) if root.is_dir() else []
        return tuple(n for n in there if n != network.name and models.network(n).num_classes == network.num_classes)
    for name in setting.transfer:
        count = models.network(name).num_classes
        if count != network.num_classes:
            raise ValueError(f"--transfer {name} has {count} classes, {network.name} has {network.num_classes}")
    return tuple(dict.fromkeys(setting.transfer))


def report(
    job: Job,
    setting: Compared,
    table: Mapping[tuple[str, Goal], Sequence[Mapping[str, Any]]],
    failed: Mapping[str, str],
    specs: Mapping[str, str],
    others: Sequence[str],
) -> None:
    """Writes tables, the figure and the answers."""
    run = job.run
    summary = [summarise(rows, others, setting.seed) for rows in table.values()]
    over = beyond_budget(summary, setting)
    text = markdown(summary, others)
    print(f"\n{text}")
    for line in over:
        print(f"beyond the budget: {line}")
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}")
    size = job.network.image_size
    spent = sum(row["seconds"] for row in summary)
    print(f"{spent:.0f} seconds of processor time, compilation included")
    if processes.current().first:
        plains = [plain(row) for row in summary]
        run.write_table("table.csv", list(dict.fromkeys(key for row in plains for key in row)), plains)
        rows = [row for each in table.values() for row in each]
        run.write_table("images.csv", list(dict.fromkeys(key for row in rows for key in row)), rows)
        (run.directory / "table.md").write_text(text)
        budget = f"{setting.passes} backward passes or {setting.queries} queries"
        count = len(job.pictures.correct)
        title = f"{setting.model}: {count} pictures, {budget}; medians, and means with 95 % intervals"
        plots.save(draw(summary, others, title, 3 * size**2), run.directory / "comparison.png")
    results = {
        "budget": {"backward passes": setting.passes, "queries": setting.queries, "beyond": over},
        "specs": dict(specs),
        "failed": dict(failed),
        "seconds of processor time": spent,
        "table": [{k: format(v, ".4g") if isinstance(v, Estimate) else v for k, v in row.items()} for row in summary],
    }
    conclude(run, "compare_all", len(job.pictures.correct), answers(table, setting.seed), results)
    print(f"{run.directory}/comparison.png, table.csv, images.csv, table.md")


if __name__ == "__main__":
    sys.exit(guarded(lambda words: main(tyro.cli(Compared, description=__doc__, args=words))))
