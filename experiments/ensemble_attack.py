"""Do pictures that fool several networks at once fool another one, and what do the neurons see in them?

    python experiments/ensemble_attack.py
    python experiments/ensemble_attack.py --tree wordnet.is_a.txt --classes LOC_synset_mapping.txt

Targeted attacks (arXiv 1708.05493: x* = argmin lambda d(x*, x) + mean_i CE(f_i(x*), y*); in a ball by MI-FGSM, or with
the distance as a penalty by `--attack cw:loss=ce`) on each member alone, on the mean of the members' logits and on the
mean of their losses; the pictures are tried on the members and on held-out networks: whether
these lose the true class, and whether they see the target. All networks see pictures of one size, resized
differentiably to theirs; attacked are those that every network classifies correctly.

What the cells of the pictures do is asked of every member: the kinds of cells towards the target of the pictures that
succeeded on what they were made on, and whether two members see the same kinds in the same cells, as Cohen's kappa of
every picture (0: as often as chance has it, 1: everywhere). SSIM stands beside.

Then the consistency level of the units of the first member's layer: on the clean pictures, on those of the attack on
the mean of the losses, which it succeeded on, with the classes of their originals, and on clean pictures with random
signs of the same Linf norm. Units are many but pictures few, so intervals are the jackknife's over pictures.

Writes answers.json, transfer.png, kinds.png, levels.png and pictures.png. A stopped run continues.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from scipy.stats import t as student

from jaxinterp import attacks, effect, ensemble, labeltrees, plots, processes
from jaxinterp.attacks.spec import record
from jaxinterp.cellsize import CellSize
from jaxinterp.cli import guarded
from jaxinterp.data import Crop, open_source
from jaxinterp.dissect import consistency
from jaxinterp.explain.tables import KINDS
from jaxinterp.job import check_seed, choose_attacks, identity
from jaxinterp.network import Network, features
from jaxinterp.pictures import Selection, classify, labelled, random_targets
from jaxinterp.processes import open_run
from jaxinterp.resumable import run_to_end
from jaxinterp.runs import Run
from jaxinterp.similarity import ssim
from jaxinterp.statistics import Estimate, bootstrap_mean, proportion
from jaxinterp.study import UNDECIDED, Answer, conclude, verdict
from jaxinterp.weights import digest, load

LOSSES, LOGITS = "mean of losses", "mean of logits"


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What is attacked, and how neurons are looked at.

    Attributes:
        pictures: Picture files and folders; none means the labelled ImageNet pictures of the `samples` extra.
        members: Networks of the ensemble.
        held_out: Networks that the pictures are tried on.
        attack: As in `jaxinterp attack`.
        cell: Side of a cell, in pixels.
        node: Layer of the first member; None means its last feature map.
        tree: Label tree: imagenet (coarse), or a file with lines PARENT CHILD, such as ImageNet's wordnet.is_a.txt.
        classes: File with a line for every class that begins with its label in the tree; None means the classes' names.
        share: Of the pictures that are a unit's top ones; few pictures need a large one.
        pool: A unit's activation on a picture: its highest value, where units that saturate are tied, or its mean.
        labels: As in `jaxinterp attack`; pictures without a label are left out.
        limit: Use only the first so many pictures.
        seed: Of targets and random signs.
        batch_size: Pictures that are attacked at once.
        out: Results directory.
    """

    pictures: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    members: tuple[str, ...] = ("efficientnet_lite0", "efficientnet_lite1")
    held_out: tuple[str, ...] = ("caffe_squeezenet1_1", "efficientnet_lite2")
    attack: str = "mifgsm:eps=16/255,steps=10"
    cell: CellSize = 28
    node: str | None = None
    tree: str = "imagenet"
    classes: Path | None = None
    share: float = 0.2
    pool: Literal["max", "mean"] = "mean"
    labels: str = "auto"
    limit: int | None = None
    seed: int = 0
    batch_size: int = 6
    out: Path = Path("results/ensemble_attack")


def main(setting: Transfer) -> None:
    """Attacks, tries, looks at neurons, answers."""
    if len(set(setting.members)) < max(2, len(setting.members)) or set(setting.members) & set(setting.held_out):
        raise ValueError("--members: expected at least two different networks, none of which is held out")
    for name, value in (("batch-size", setting.batch_size), ("limit", 1 if setting.limit is None else setting.limit)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    check_seed(setting.seed)
    loaded = {name: load(name) for name in (*setting.members, *setting.held_out)}
    together = [loaded[name] for name in setting.members]
    sources = {name: loaded[name] for name in setting.members}
    sources[LOGITS], sources[LOSSES] = ensemble.of(together), ensemble.of(together, combine="losses")
    whole = sources[LOGITS][0]
    size, count = whole.image_size, whole.num_classes
    judges = {name: ensemble.of([member], image_size=size) for name, member in loaded.items()}
    members = {name: judges[name] for name in setting.members}
    tried = {name: judges.get(name, source) for name, source in sources.items()}  # all take pictures of one size
    ensemble.of(list(loaded.values()))  # refuses other classes
    effect.grid(size, size, setting.cell)  # cells that do not fit
    consistency.count(10**9, setting.share)  # and a share that is none
    if setting.node is not None:
        loaded[setting.members[0]][0].check_node(setting.node, argument="--node")
    [attack] = choose_attacks([setting.attack]).values()

    names = labeltrees.read_classes(setting.classes) if setting.classes else whole.classes
    if not isinstance(names, tuple) or len(names) != count:
        given = names if isinstance(names, int) else len(names)
        raise ValueError(f"--classes: expected a label for each of {count} classes, got {given}")
    affinity = consistency.affinity(labeltrees.open_tree(setting.tree).distances(names))

    crop = Crop(size, whole.crop_pct, whole.interpolation)
    asked = list(setting.pictures) or ["samples:imagenet" if count == 1000 else "samples:cifar10"]
    source = open_source(asked if len(asked) > 1 else asked[0], crop=crop, classes=whole.classes, labels=setting.labels)
    total = len(source) if setting.limit is None else min(setting.limit, len(source))
    images, labels, ids = labelled(Selection(source, tuple(range(total))))
    run = open_run(
        setting.out,
        {
            "study": "ensemble_attack",
            **{
                key: value
                for key, value in dataclasses.asdict(setting).items()
                if key not in ("out", "pictures", "limit")
            },
            "classes": None if setting.classes is None else list(names),
            "attack": record(attack),
            "source": identity(source, asked, total),
            "pictures": total,
            "weights": {name: digest(name) for name in loaded},
        },
    )
    seen = {name: predicted(judge, images, setting.batch_size) for name, judge in judges.items()}
    right = np.flatnonzero(np.all([found == labels for found in seen.values()], axis=0))
    print(f"{len(right)} of {len(labels)} pictures are classified correctly by all {len(seen)} networks, and attacked")
    if len(right) < 2:
        raise ValueError(f"expected at least two pictures that all networks classify correctly, got {len(right)}")
    images, labels = images[right], labels[right]
    targets = random_targets([ids[i] for i in right], labels, count, setting.seed)

    made = {}
    for name in tried:
        made[name] = attacked(run, name, tried[name], attack, images, labels, targets, setting)
        made[name] |= explained(run, name, members, images, labels, targets, made[name]["images"], setting)
    lost, reached = {}, {}
    for name, found in made.items():
        for judge, (network, params) in judges.items():
            classes = predicted((network, params), found["images"], setting.batch_size)
            lost[name, judge], reached[name, judge] = classes != labels, classes == targets
    results = {
        "target": {n: {j: share(reached[n, j]) for j in judges} for n in made},
        "lost": {n: {j: share(lost[n, j]) for j in judges} for n in made},
    }
    for title, table in (("the target is seen", results["target"]), ("the true class is lost", results["lost"])):
        print(f"\n{title}")
        for name, row in table.items():
            print(f"  {name:<22}" + "   ".join(f"{judge}: {value:.2f}" for judge, value in row.items()))
    seed = setting.seed
    by_kind = {
        member: {name: shares_of_kinds(found["kinds"][found["success"], i], seed) for name, found in made.items()}
        for i, member in enumerate(members)
    }
    pair = {name: [cohen(*each[:2]) for each in found["kinds"][found["success"]]] for name, found in made.items()}
    promoting = {  # of pictures made on a member, the share of its cells that promote there less that on another one
        own: promotion(made[own]["kinds"][:, i]) - promotion(made[own]["kinds"][:, 1 - i])
        for i, own in enumerate(setting.members[:2])
    }
    similar = {
        name: bootstrap_mean(found["ssim"][found["success"]], seed=seed, bounds=(-1, 1)) for name, found in made.items()
    }
    levels = None
    if enough(int(np.sum(made[LOSSES]["success"])), setting.share):
        levels = neurons(setting, judges[setting.members[0]], images, labels, made[LOSSES], affinity)
    estimates = {} if levels is None else levels["estimates"]
    for name, value in estimates.items():
        print(f"{name:<58}{value}")
    draw(run, whole, results, by_kind, levels, made, images, labels, targets)
    conclude(
        run,
        "ensemble_attack",
        len(right),
        answers(setting, lost, reached, pair, promoting, estimates),
        {
            **{
                title: {n: {j: f"{e:.2f}" for j, e in row.items()} for n, row in found.items()}
                for title, found in results.items()
            },
            "success on the source": {name: f"{share(found['success']):.2f}" for name, found in made.items()},
            "l2": {name: f"{np.mean(found['l2']):.3g}" for name, found in made.items()},
            "ssim": {name: f"{value:.4f}" for name, value in similar.items()},
            "kinds": {
                member: {name: {kind: f"{e:.2f}" for kind, e in row.items()} for name, row in rows.items()}
                for member, rows in by_kind.items()
            },
            f"kappa of the kinds that {' and '.join(setting.members[:2])} see": {
                name: f"{bootstrap_mean(each, seed=seed, bounds=(-1, 1)):.2f}" for name, each in pair.items()
            },
            "levels": {name: format(value, ".4f") for name, value in estimates.items()},
            "units": None if levels is None else levels["units"],
        },
    )


def share(flags: np.ndarray) -> Estimate:
    """The share of pictures, with its interval."""
    return proportion(int(np.sum(flags)), len(flags))


def predicted(source: tuple[Network, Any], images: np.ndarray, size: int) -> np.ndarray:
    """[N] classes of pictures, a batch of fixed size at a time."""
    network, params = source
    model, found = network.bind(params), []
    for chosen in rows(len(images), size):
        found.append(np.asarray(classify(model, jnp.asarray(images[chosen]))))
    return np.concatenate(found)[: len(images)]


def rows(count: int, size: int) -> list[np.ndarray]:
    """Numbers of pictures in batches of `size`, the last one filled up with the last picture."""
    return [np.minimum(np.arange(start, start + size), count - 1) for start in range(0, count, size)]


def by_chunk(
    run: Run, name: str, count: int, size: int, compute: Callable[[np.ndarray, str], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Arrays of `count` pictures, computed once, chunk by chunk, by all processes.

    Args:
        run: where every chunk is stored.
        name: of what is computed, for its parts.
        count: number of pictures.
        size: of a chunk.
        compute: numbers of pictures (those of the last chunk are filled up) and a part's name -> its arrays.
    """
    group, chunks = processes.current(), rows(count, size)
    names = [f"{name.replace(' ', '-')}-{number:06d}" for number in range(len(chunks))]
    missing = group.told([number for number, part in enumerate(names) if run.read_part(part) is None])
    for number in group.share(missing):
        chosen, part = chunks[number], names[number]
        print(f"{name}: pictures {chosen[0] + 1} to {chosen[-1] + 1}", flush=True)
        run.write_part(part, compute(chosen, part))
        run.remove_state(part)
    group.wait()
    parts = [processes.read_part(run, part) for part in names]
    return {key: np.concatenate([part[key] for part in parts])[:count] for key in parts[0]}


def attacked(
    run: Run,
    name: str,
    source: tuple[Network, Any],
    attack: attacks.Attack,
    images: np.ndarray,
    labels: np.ndarray,
    targets: np.ndarray,
    setting: Transfer,
) -> dict[str, np.ndarray]:
    """The targeted attack on one network or ensemble: images, success and norms of every picture."""
    network, params = source

    def compute(chosen: np.ndarray, part: str) -> dict[str, np.ndarray]:
        found = run_to_end(
            attack,
            network.bind(params),
            jnp.asarray(images[chosen]),
            jnp.asarray(labels[chosen]),
            jnp.asarray(targets[chosen]),
            key=jax.random.key(setting.seed),
            run=run,
            part=part,
        )
        return {key: np.asarray(getattr(found, key)) for key in ("images", "success", "l2", "linf")}

    return by_chunk(run, f"attack on {name}", len(images), setting.batch_size, compute)


def explained(
    run: Run,
    name: str,
    members: dict[str, tuple[Network, Any]],
    images: np.ndarray,
    labels: np.ndarray,
    targets: np.ndarray,
    changed: np.ndarray,
    setting: Transfer,
) -> dict[str, np.ndarray]:
    """SSIM [N] of changed pictures, and the kinds of their cells [N,members,cells] as every member sees them."""

    def compute(chosen: np.ndarray, _part: str) -> dict[str, np.ndarray]:
        # What fills up the last chunk is left as it was, which costs nothing.
        repeated = np.append(False, chosen[1:] == chosen[:-1])[:, None, None, None]
        clean = jnp.asarray(images[chosen])
        made = jnp.where(repeated, clean, changed[chosen])
        kinds = [
            effect.pse(network.bind(params), clean, made, labels[chosen], targets[chosen], setting.cell).kind
            for network, params in members.values()
        ]
        flat = np.stack([np.asarray(kind).reshape(len(chosen), -1) for kind in kinds], axis=1)
        return {"kinds": flat, "ssim": np.asarray(ssim(clean, made))}

    return by_chunk(run, f"cells of {name}", len(images), setting.batch_size, compute)


def shares_of_kinds(kinds: np.ndarray, seed: int) -> dict[str, Estimate]:
    """Of kinds [N,cells] the mean shares of the cells of a picture."""
    shares = np.asarray(effect.shares(jnp.asarray(kinds)))
    return {kind: bootstrap_mean(shares[:, i], seed=seed, bounds=(0, 1)) for i, kind in enumerate(KINDS)}


def promotion(kinds: np.ndarray) -> np.ndarray:
    """Of kinds [N,cells] the shares [N] of promotion-dominated cells."""
    return np.asarray(effect.shares(jnp.asarray(kinds)))[:, KINDS.index("promotion")]


def cohen(kinds: np.ndarray, others: np.ndarray) -> float:
    """Cohen's kappa of the kinds of cells [n] that two networks see in a picture, of cells that neither calls none.

    NaN where chance alone would make them the same everywhere, or no such cell is left.
    """
    both = (kinds != effect.Kind.NONE) & (others != effect.Kind.NONE)
    if not both.any():
        return float("nan")
    first, second = (np.array([np.mean(each[both] == kind) for kind in effect.Kind]) for each in (kinds, others))
    chance = float(first @ second)
    return float((np.mean(kinds[both] == others[both]) - chance) / (1 - chance)) if chance < 1 else float("nan")


def neurons(
    setting: Transfer,
    judge: tuple[Network, Any],
    images: np.ndarray,
    labels: np.ndarray,
    found: dict[str, np.ndarray],
    affinity: jax.Array,
) -> dict[str, Any]:
    """Levels of the units on clean, adversarial and randomly changed pictures, and their differences."""
    network, params = judge
    [alone] = network.apply.networks  # type: ignore[attr-defined]  # of one member
    node = f"{alone.name}/{setting.node or alone.cam_node or alone.nodes[-1]}"
    network.check_node(node, argument="--node")
    kept = np.flatnonzero(found["success"])
    rng = np.random.default_rng(setting.seed)
    signs = rng.choice(np.array([-1, 1], np.float32), images.shape) * found["linf"][:, None, None, None]
    sets = {"clean": images, "adversarial": found["images"], "random signs": np.clip(images + signs, 0, 1)}
    program = jax.jit(lambda params, x: features(network, params, x, node))

    def activations(pictures: np.ndarray) -> np.ndarray:
        maps = [np.asarray(program(params, jnp.asarray(pictures[c]))) for c in rows(len(pictures), setting.batch_size)]
        whole = np.concatenate(maps)[: len(pictures)]
        return whole.max((1, 2)) if setting.pool == "max" else whole.mean((1, 2))

    values = {name: activations(pictures[kept]) for name, pictures in sets.items()}
    known = labels[kept]

    def level(name: str, chosen: np.ndarray) -> np.ndarray:
        maxima = values[name][chosen][:, None, None, :]
        top = consistency.init(maxima.shape[-1], len(chosen), setting.share)
        top = consistency.update(top, jnp.asarray(maxima), jnp.arange(len(chosen)))
        return np.asarray(consistency.result(top, known[chosen], affinity).level)

    def means(chosen: np.ndarray) -> dict[str, float]:
        of = {name: level(name, chosen) for name in sets}
        both = np.all([np.isfinite(v) for v in of.values()], axis=0)
        mean = {name: float(np.mean(v[both])) for name, v in of.items()}
        return {
            **{f"level on {name} pictures": value for name, value in mean.items()},
            "fall from clean to adversarial": mean["clean"] - mean["adversarial"],
            "fall from random signs to adversarial": mean["random signs"] - mean["adversarial"],
        }

    every = np.arange(len(kept))
    whole, without = means(every), [means(np.delete(every, i)) for i in every]
    chance = consistency.chance(known, affinity, consistency.count(len(kept), setting.share))
    return {
        "estimates": {
            **{name: jackknife(value, [w[name] for w in without]) for name, value in whole.items()},
            "level of random pictures": Estimate(chance, chance, chance, len(kept)),
        },
        "by unit": {name: level(name, every) for name in sets},
        "units": {"node": node, "pictures": len(kept), "top": consistency.count(len(kept), setting.share)},
        "chance": chance,
    }


def enough(successes: int, share: float) -> bool:
    """Whether levels can be told from so many pictures, and from all of them but one."""
    try:
        consistency.count(successes - 1, share)
    except ValueError:
        return False
    return True


def jackknife(whole: float, without: list[float]) -> Estimate:
    """A statistic of all pictures with its interval, from the same without each of them (Tukey 1958)."""
    n = len(without)
    error = float(np.sqrt((n - 1) / n * np.sum((np.array(without) - np.mean(without)) ** 2)))
    reach = float(student.ppf(0.975, n - 1)) * error
    return Estimate(whole, whole - reach, whole + reach, n)


def answers(
    setting: Transfer,
    lost: dict[tuple[str, str], np.ndarray],
    reached: dict[tuple[str, str], np.ndarray],
    pair: dict[str, list[float]],
    promoting: dict[str, np.ndarray],
    levels: dict[str, Estimate],
) -> list[Answer]:
    """The papers' directions, paired by picture."""

    def gain(claim: str, flags: dict[tuple[str, str], np.ndarray], name: str, other: str, judges: Any) -> Answer:
        by_picture = np.mean([flags[name, j].astype(float) - flags[other, j] for j in judges], axis=0)
        estimate = bootstrap_mean(by_picture, seed=setting.seed, bounds=(-1, 1))
        return Answer(claim, f"by {estimate}, {estimate.count} pictures", verdict(estimate, 0.0))

    found = []
    both = np.all([reached[LOSSES, m] for m in setting.members], axis=0)
    estimate = share(both)
    claim = "mean of losses: all members see the target, more often than not"
    found.append(Answer(claim, f"{estimate}, {estimate.count} pictures", verdict(estimate, 0.5)))
    for member in setting.members:
        claim = f"mean of losses: held-out networks lose the true class more often than with {member} alone"
        found.append(gain(claim, lost, LOSSES, member, setting.held_out))
        claim = f"mean of losses: held-out networks see the target more often than with {member} alone"
        found.append(gain(claim, reached, LOSSES, member, setting.held_out))
    claim = "mean of losses: held-out networks lose the true class more often than with the mean of logits"
    found.append(gain(claim, lost, LOSSES, LOGITS, setting.held_out))
    for name in (LOSSES, setting.members[0]):
        estimate = bootstrap_mean(pair[name], seed=setting.seed, bounds=(-1, 1))
        claim = f"{name}: the first two members see the same kinds in the same cells more often than by chance"
        found.append(Answer(claim, f"kappa {estimate}, {estimate.count} pictures", verdict(estimate, 0.0)))
    for (name, more), other in zip(promoting.items(), reversed(promoting), strict=True):
        estimate = bootstrap_mean(more, seed=setting.seed, bounds=(-1, 1))
        claim = f"{name} alone: it sees more promotion-dominated cells in its pictures than {other} does"
        found.append(Answer(claim, f"by {estimate}, {estimate.count} pictures", verdict(estimate, 0.0)))
    for what, name in (
        ("levels are lower on adversarial than on clean pictures", "fall from clean to adversarial"),
        ("levels are lower on adversarial pictures than with random signs", "fall from random signs to adversarial"),
    ):
        if name not in levels:
            found.append(Answer(what, "too few pictures were attacked with success", UNDECIDED))
            continue
        fall = levels[name]
        found.append(Answer(what, f"by {fall}, {fall.count} pictures", verdict(fall, 0.0)))
    return found


def draw(
    run: Run,
    network: Network,
    results: dict[str, dict[str, dict[str, Estimate]]],
    by_kind: dict[str, dict[str, dict[str, Estimate]]],
    levels: dict[str, Any] | None,
    made: dict[str, dict[str, np.ndarray]],
    images: np.ndarray,
    labels: np.ndarray,
    targets: np.ndarray,
) -> None:
    """The figures."""
    if not processes.current().first:
        return
    panels = {"the target is seen": results["target"], "the true class is lost": results["lost"]}
    figure = plots.matrices(panels, row="made on", column="tried on", unit="share of pictures")
    plots.save(figure, run.directory / "transfer.png")
    panels = {f"cells as {member} sees them": by_source for member, by_source in by_kind.items()}
    plots.save(plots.bars(panels, ylabel="share of cells"), run.directory / "kinds.png")
    if levels is not None:
        draw_levels(run, levels)
    shown = []
    for i in range(min(4, len(images))):
        row = [(f"{network.class_name(int(labels[i]))}, target {network.class_name(int(targets[i]))}", images[i])]
        row += [
            (name if found["success"][i] else f"{name}: failed", found["images"][i]) for name, found in made.items()
        ]
        delta = made[LOSSES]["images"][i] - images[i]
        factor = plots.magnification(delta)
        shown.append([*row, (f"change × {factor}", np.clip(0.5 + factor * delta, 0, 1))])
    plots.save(plots.gallery(shown), run.directory / "pictures.png", bits=8)


def draw_levels(run: Run, levels: dict[str, Any]) -> None:
    """Consistency levels of all units, from the highest on."""
    sorted_ = {name: np.sort(v[np.isfinite(v)])[::-1] for name, v in levels["by unit"].items()}
    shares = np.linspace(0, 1, 41)
    lines = {
        name: [Estimate(v := float(np.quantile(values, 1 - s)), v, v, 1) for s in shares]
        for name, values in sorted_.items()
    }
    figure = plots.curves(
        {f"consistency level of {levels['units']['node']}": lines},
        list(shares),
        xlabel="share of units, by falling level",
        reference=("random pictures", np.full(len(shares), levels["chance"])),
    )
    plots.save(figure, run.directory / "levels.png")


if __name__ == "__main__":
    sys.exit(guarded(lambda words: main(tyro.cli(Transfer, description=__doc__, args=words))))
