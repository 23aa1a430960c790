"""Do a few key pixels deceive a detector of generated images, and at what L0 and L2?

    python experiments/key_pixels.py

Key pixels (arXiv 2106.01615) against PGD, PGD in L2 and MI-FGSM, on three detectors of different architecture: white
box (made and tried on one) and black box (made on one, tried on the other two). The squares are of held-out pictures,
real and generated alike; see `jaxinterp.training.generated`. What does not exist yet is made first: the set, and the
detectors, as by train_detectors.py.

Success is made equal in two ways. The others run at the smallest radius at which they succeed on as many squares as key
pixels do; and, on every square, at the smallest radius that succeeds there, which is generous, since nobody who attacks
would know it. L0 is the share of pixels that change. Means, success among them, are over pictures, and so are their
intervals: squares of one picture are alike, so their mean counts as one value.

Writes answers.json, norms.png, transfer.png, kinds.png and pictures.png. A stopped run continues.

Expected time on one core: a quarter of an hour.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from jaxinterp import attacks, cam, effect, load, plots, processes
from jaxinterp.attacks.driver import coerce
from jaxinterp.cellsize import CellSize
from jaxinterp.cli import guarded
from jaxinterp.job import check_seed
from jaxinterp.models.detectors import IMAGE_SIZE
from jaxinterp.network import Network, Params
from jaxinterp.pictures import classify
from jaxinterp.processes import open_run, read_part
from jaxinterp.runs import Run
from jaxinterp.statistics import Estimate, bootstrap_mean
from jaxinterp.study import UNDECIDED, Answer, conclude, verdict
from jaxinterp.training import detectors, generated
from jaxinterp.weights import checkpoint

KEYS = ("key pixels", "key pixels, weighted")  # ranked by gradients; by gradients times Grad-CAM
OTHERS = ("PGD", "PGD_2", "MI-FGSM")
KAPPAS = (0.0, 1.0, 3.0)  # confidences of key pixels; white box: the first
LINF = tuple(float(eps) for eps in np.geomspace(0.25, 16, 9) / 255)
L2 = tuple(float(eps) for eps in np.geomspace(0.02, 2.0, 9))
RADII = {"PGD": LINF, "PGD_2": L2, "MI-FGSM": LINF}
STRENGTHS = {**dict.fromkeys(KEYS, KAPPAS), **RADII}
KINDS = ("suppression", "balanced", "promotion")
_ROUNDING = 1e-9  # of means of shares
WELL_BELOW = 0.5  # of the other attack's, what "well below" means here


@dataclasses.dataclass(frozen=True)
class Keys:
    """What the study is asked.

    Attributes:
        data: Results directory of the set of squares.
        training: Results directory of the detectors' training.
        out: Results directory.
        crops: Squares of every held-out picture that are attacked, as real and as generated ones; at most 30.
        eps: Radius of the ball of key pixels, L2.
        rho: The first share of key pixels.
        rounds: How often the share is doubled, plus one.
        steps: Steps of every round, and of the other attacks.
        cell: Side of a cell, for kinds beside those of PGD.
        batch_size: Squares that are attacked at once.
        seed: Of random starts and of the bootstrap.
    """

    data: Path = Path("results/generated")
    training: Path = Path("results/detectors")
    out: Path = Path("results/key_pixels")
    crops: int = 3
    eps: float = 1.0
    rho: float = 0.01
    rounds: int = 4
    steps: int = 20
    cell: CellSize = 4
    batch_size: int = 30
    seed: int = 0


def main(setting: Keys) -> None:
    """Key pixels against PGD and MI-FGSM."""
    for name in ("crops", "rounds", "steps", "cell", "batch_size"):
        if getattr(setting, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(setting, name)}")
    if setting.crops > generated.HELD_OUT_CROPS:
        raise ValueError(f"--crops must be at most {generated.HELD_OUT_CROPS}, got {setting.crops}")
    check_seed(setting.seed)
    effect.grid(IMAGE_SIZE, IMAGE_SIZE, setting.cell)
    coerce(attacks.KeyPixels(eps=setting.eps, rho=setting.rho))
    data = generated.make(setting.data)
    accuracy = detectors.ensure(data, setting.training)
    squares = chosen(data.test, setting.crops)
    loaded = {name: load(name) for name in detectors.NAMES}
    weights = {name: checkpoint.read_manifest(checkpoint.default_root() / name, name=name) for name in loaded}
    config = {
        **{"study": "key_pixels", "weights": {name: m["source"]["sha256"] for name, m in weights.items()}},
        **{"data": data.digest},
        **{key: value for key, value in dataclasses.asdict(setting).items() if key not in ("data", "training", "out")},
        **{"strengths": {name: list(values) for name, values in STRENGTHS.items()}},
    }
    run = open_run(setting.out, config)
    parts = analysed(run, squares, loaded, setting)
    found = {name: {key: np.concatenate([part[key] for part in group]) for key in group[0]} for name, group in parts}
    right = {name: of["right"] for name, of in found.items()}
    pictures = np.array(squares.pictures)

    print(f"\n{len(squares.labels)} squares of {len(set(pictures))} held-out pictures")
    for name, by in accuracy.items():
        print(f"{name:20}" + "  ".join(f"{group} {estimate:.2f}" for group, estimate in by.items()))
    tables = {name: Table(name, found[name], right, pictures, setting.seed) for name in found}
    results: dict[str, Any] = {name: table.as_json() for name, table in tables.items()}
    results["accuracy"] = {n: {group: format(e, ".2f") for group, e in by.items()} for n, by in accuracy.items()}
    for name, table in tables.items():
        print(f"\n{name}")
        for attack, row in table.as_json().items():
            print(f"  {attack:22}" + "  ".join(f"{key} {value}" for key, value in row.items()))
    draw(run, tables, found, squares, setting)
    conclude(run, "key_pixels", len(set(pictures)), [a for t in tables.values() for a in t.answers()], results)


def chosen(squares: generated.Squares, crops: int) -> generated.Squares:
    """The first squares of every picture, real and generated."""
    rows = [i for i, name in enumerate(squares.ids) if int(name.rsplit("_", 2)[1]) < crops]
    return generated.Squares(squares.images[rows], squares.labels[rows], tuple(squares.ids[i] for i in rows))


# ---- What is computed


def analysed(
    run: Run, squares: generated.Squares, loaded: Mapping[str, tuple[Network, Params]], setting: Keys
) -> list[tuple[str, list[dict[str, np.ndarray]]]]:
    """For every detector the parts of all squares, computed where they are not stored."""
    starts = range(0, len(squares.labels), setting.batch_size)
    every = [f"{name}-{start:06d}" for name in loaded for start in starts]
    group = processes.current()
    missing = group.told([part for part in every if run.read_part(part) is None])
    with tqdm(total=len(missing), desc="key_pixels", unit="chunk") as bar:
        for part in group.share(missing):
            name, _, start = part.rpartition("-")
            rows = slice(int(start), int(start) + setting.batch_size)
            images = jnp.asarray(squares.images[rows].astype(np.float32) / 255)
            run.write_part(part, attacked(name, loaded, images, jnp.asarray(squares.labels[rows]), setting))
            bar.update()
    group.wait()
    return [(name, [read_part(run, f"{name}-{start:06d}") for start in starts]) for name in loaded]


def attacked(
    name: str,
    loaded: Mapping[str, tuple[Network, Params]],
    images: jax.Array,
    labels: jax.Array,
    setting: Keys,
) -> dict[str, np.ndarray]:
    """Everything about a chunk of squares [b] and a detector.

    By attack, at every strength, [b,strengths]: success, l0 (share of pixels), l2, linf, the passes, and [b,strengths,
    detectors] whether each detector errs. Kinds of pixels and cells; images of the weakest success.
    """
    network, params = loaded[name]
    models = {other: each.bind(values) for other, (each, values) in loaded.items()}
    model, key = models[name], jax.random.key(setting.seed)
    clean_classes = [np.asarray(classify(models[other], images)) for other in loaded]
    kept: dict[str, np.ndarray] = {"right": np.asarray(clean_classes[list(loaded).index(name)] == labels)}
    maps = cam.normalised(cam.maps(network, params, images, labels, "gradcam"))
    weights = cam.resize(maps, images.shape[1])[..., None]
    for attack, strengths in STRENGTHS.items():
        many = len(strengths)

        def tiled(x, many=many):
            return jnp.repeat(x, many, axis=0)

        strength = jnp.tile(jnp.asarray(strengths, jnp.float32), len(labels))
        made = build(attack, strength, tiled(weights), setting)
        # Smaller batches would be programs of their own, which take longer to compile than they save.
        result = attacks.run(made, model, tiled(images), tiled(labels), key=key, compact=False)
        errs = [np.asarray(classify(models[other], result.images) != tiled(labels)) for other in loaded]
        delta = np.asarray(result.images - tiled(images))
        shape = (len(labels), many)
        kept |= {
            f"{attack}/success": np.asarray(result.success).reshape(shape),
            f"{attack}/l0": (delta != 0).any(-1).mean((1, 2)).reshape(shape),
            f"{attack}/l2": np.asarray(result.l2).reshape(shape),
            f"{attack}/linf": np.asarray(result.linf).reshape(shape),
            f"{attack}/passes": np.asarray(result.forward + result.backward).reshape(shape),
            f"{attack}/errs": np.stack([each.reshape(shape) for each in errs], axis=-1),
        }
        # Of every square the weakest success; the original where there is none.
        success = kept[f"{attack}/success"]
        first = np.argmax(success, axis=1)
        weakest = np.asarray(result.images).reshape(*shape, *images.shape[1:])[np.arange(len(labels)), first]
        kept[f"{attack}/images"] = weakest
        kept[f"{attack}/kinds"] = kinds(model, images, weakest, labels, setting.cell)
        if attack in KEYS:
            kept[f"{attack}/kinds of pixels"] = kinds(model, images, weakest, labels, 1)
    return kept


def build(attack: str, strength: jax.Array, weights: jax.Array, setting: Keys) -> Any:
    """The attack at a strength for every example."""
    steps = setting.steps
    if attack in KEYS:
        return attacks.KeyPixels(
            eps=setting.eps,
            kappa=strength,
            rho=setting.rho,
            weights=weights if attack != KEYS[0] else jnp.ones_like(weights),
            steps=steps,
            rounds=setting.rounds,
        )
    if attack == "MI-FGSM":
        return attacks.MIFGSM(eps=strength, steps=steps)
    return attacks.PGD(eps=strength, norm="l2" if attack == "PGD_2" else "linf", steps=steps)


def kinds(model: Any, clean: jax.Array, adversarial: np.ndarray, labels: jax.Array, cell: effect.Cell) -> np.ndarray:
    """[b,3] shares of the kinds of cells; not numbers where nothing changed."""
    found = effect.pse(model, clean, jnp.asarray(adversarial), labels, 1 - labels, cell)
    shares = np.array(effect.shares(found.kind), np.float64)
    shares[np.all(adversarial == np.asarray(clean), axis=(1, 2, 3))] = np.nan
    return shares


# ---- What follows


@dataclasses.dataclass(frozen=True)
class Table:
    """A detector's results on the squares that it sees rightly.

    Attributes:
        name: of the detector on which attacks were made.
        found: see `attacked`.
        right: by detector, which squares it sees rightly.
        pictures: of every square the picture.
        seed: of the bootstrap.
    """

    name: str
    found: Mapping[str, np.ndarray]
    right: Mapping[str, np.ndarray]
    pictures: np.ndarray
    seed: int

    def mean(self, values: np.ndarray) -> Estimate:
        """The mean over pictures of the means over their squares, values that are not finite left out."""
        return bootstrap_mean(self.by_picture(values), seed=self.seed)

    def share(self, flags: np.ndarray) -> Estimate:
        """The mean over pictures of the shares of their squares, of 1, 0 and what does not count, not a number.

        Squares of one picture are alike: an interval over all squares would be too narrow.
        """
        return bootstrap_mean(self.by_picture(flags), seed=self.seed, bounds=(0, 1))

    def by_picture(self, values: np.ndarray) -> np.ndarray:
        """Means over the squares of every picture; not a number where no value is finite."""
        groups = [values[self.pictures == name] for name in dict.fromkeys(self.pictures)]
        return np.array([np.mean(g[np.isfinite(g)]) if np.isfinite(g).any() else np.nan for g in groups])

    def get(self, attack: str, what: str) -> np.ndarray:
        """Values at every strength, not numbers where the square was not seen rightly."""
        values = self.found[f"{attack}/{what}"].astype(np.float64)
        values[~self.right[self.name]] = np.nan
        return values

    def weakest(self, attack: str, what: str) -> np.ndarray:
        """[squares] at the weakest strength that succeeds on the square; not a number where none does."""
        success = np.nan_to_num(self.get(attack, "success")).astype(bool)
        values = self.get(attack, what)[np.arange(len(success)), np.argmax(success, axis=1)]
        return np.where(success.any(axis=1), values, np.nan)

    def at_rate(self, attack: str, rate: float, errs: str | None = None) -> int | None:
        """The weakest strength at which the attack deceives this share of squares; None where none does."""
        strengths = range(len(STRENGTHS[attack]))
        return next((k for k in strengths if self.rate(attack, k, errs) >= rate - _ROUNDING), None)

    def rate(self, attack: str, k: int, errs: str | None = None) -> float:
        """The share of squares on which the detector, or another one, is deceived at a strength, as `share` has it."""
        shares = self.by_picture(self.deceived(attack, k, errs))
        return float(np.nanmean(shares)) if np.isfinite(shares).any() else float("nan")

    def deceived(self, attack: str, k: int, errs: str | None = None) -> np.ndarray:
        """[squares] 1 or 0, not a number where a detector was wrong before."""
        if errs is None:
            return self.get(attack, "success")[:, k]
        wrong = self.get(attack, "errs")[:, k, list(self.right).index(errs)]
        return np.where(self.right[errs], wrong, np.nan)

    def equal(self, attack: str, what: str) -> np.ndarray:
        """[squares] at the strength at which the attack succeeds as often as key pixels do, where it succeeds."""
        k = self.at_rate(attack, self.rate(KEYS[0], 0))
        return np.full(len(self.pictures), np.nan) if k is None else self.won(attack, what, k)

    def won(self, attack: str, what: str, k: int, errs: str | None = None) -> np.ndarray:
        """[squares] at a strength, where the attack succeeds; not a number where it does not."""
        return np.where(self.deceived(attack, k, errs) == 1, self.get(attack, what)[:, k], np.nan)

    def as_json(self) -> dict[str, dict[str, str]]:
        """A row for every attack: at its own smallest strength, at the rate of key pixels, and on other detectors."""
        rows = {}
        for attack in STRENGTHS:
            success = np.isfinite(self.first(attack, "success"))
            row = {"success": format(self.share(np.where(self.right[self.name], success, np.nan)), ".3f")}
            for what in ("l0", "l2", "linf"):
                own = self.first(attack, what)
                row[what] = format(self.mean(own), ".4f")
                if attack in OTHERS:
                    row[f"{what} at equal rate"] = format(self.mean(self.equal(attack, what)), ".4f")
            for other in self.right:
                if other != self.name:
                    row[f"deceives {other}"] = format(self.transferred(attack, other), ".3f")
            row["kinds"] = " ".join(
                f"{kind} {self.mean(self.get(attack, 'kinds')[:, i]):.2f}" for i, kind in enumerate(KINDS)
            )
            if attack in KEYS:
                row["kinds of pixels"] = " ".join(
                    f"{kind} {self.mean(self.get(attack, 'kinds of pixels')[:, i]):.2f}" for i, kind in enumerate(KINDS)
                )
            rows[attack] = row
        return rows

    def first(self, attack: str, what: str) -> np.ndarray:
        """[squares] of key pixels at confidence zero, of others at the weakest strength; only of successes."""
        if attack in KEYS:
            return self.won(attack, what, 0)
        return self.weakest(attack, what)

    def transferred(self, attack: str, other: str) -> Estimate:
        """The share of squares on which another detector errs, at the strengths of `first`."""
        success = np.nan_to_num(self.get(attack, "success")).astype(bool)
        place = np.zeros(len(success), int) if attack in KEYS else np.argmax(success, axis=1)
        errs = self.found[f"{attack}/errs"][np.arange(len(success)), place, list(self.right).index(other)]
        rows = self.right[self.name] & self.right[other]
        won = success[np.arange(len(success)), place]
        return self.share(np.where(rows, errs & won, np.nan))

    def answers(self) -> list[Answer]:
        """L0 and L2 below those of the others, white box and black box."""
        found = []
        for other in OTHERS:
            k = self.at_rate(other, self.rate(KEYS[0], 0))
            for what in ("l0", "l2"):
                mine = self.first(KEYS[0], what)
                claim = f"{self.name}: {what.upper()} of key pixels well below that of {other} at"
                equal = f"{claim} the radius of equal success"
                if k is None:
                    found.append(Answer(equal, f"{other} does not succeed as often", UNDECIDED))
                else:
                    found.append(self.compared(equal, mine, self.equal(other, what)))
                found.append(self.compared(f"{claim} each square's own", mine, self.first(other, what)))
        for target in self.right:
            if target != self.name:
                found += self.black_box(target)
        return found

    def compared(self, claim: str, mine: np.ndarray, theirs: np.ndarray) -> Answer:
        """Whether mine is less than half of theirs; the ratio says whether it is less at all."""
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = self.mean(np.log2(theirs / mine))
        return Answer(claim, times(gain), verdict(gain, -np.log2(WELL_BELOW)))

    def black_box(self, target: str) -> list[Answer]:
        """On another detector, at the radius at which the others deceive it as often as key pixels do at their best."""
        rates = [self.rate(KEYS[0], k, target) for k in range(len(KAPPAS))]
        best = int(np.argmax(rates))
        found = []
        for other in ("PGD", "MI-FGSM"):
            k = self.at_rate(other, rates[best], target)
            for what in ("l0", "l2"):
                claim = f"{self.name} to {target}: {what.upper()} of key pixels well below that of {other}"
                if k is None or rates[best] == 0:
                    found.append(Answer(claim, f"{other} does not deceive it as often, {rates[best]:.2f}", UNDECIDED))
                    continue
                # One deceives other squares than the other does: pictures are compared by their means.
                mine, theirs = (self.by_picture(self.won(a, what, s, target)) for a, s in ((KEYS[0], best), (other, k)))
                gain = bootstrap_mean(np.log2(theirs / mine), seed=self.seed)
                rate = f"deceived {self.rate(KEYS[0], best, target):.2f} and {self.rate(other, k, target):.2f}"
                found.append(Answer(claim, f"{times(gain)}; {rate}", verdict(gain, -np.log2(WELL_BELOW))))
        return found


def times(gain: Estimate) -> str:
    """The ratio that a mean of log2 stands for."""
    if gain.count < 2:
        return f"{gain.count} pictures on which both succeed"
    return f"{2**-gain.mean:.2f} times [{2**-gain.high:.2f}, {2**-gain.low:.2f}], {gain.count} pictures"


def short(model: str) -> str:
    """A detector's name in figures."""
    return model.removeprefix("detector_")


# ---- Figures


def draw(
    run: Run,
    tables: Mapping[str, Table],
    found: Mapping[str, Mapping[str, np.ndarray]],
    squares: generated.Squares,
    setting: Keys,
) -> None:
    """The figures."""
    if not processes.current().first:
        return
    names = (*KEYS, *OTHERS)
    panels = {
        title: {short(model): {a: t.mean(t.first(a, what)) for a in names} for model, t in tables.items()}
        for what, title in (("l0", "share of pixels that change"), ("l2", "L2 norm"))
    }
    plots.save(plots.bars(panels, ylabel="mean over pictures, at equal success"), run.directory / "norms.png")

    def deceived(attack: str) -> dict[str, dict[str, Estimate]]:
        return {
            short(model): {
                short(other): t.share(t.deceived(attack, 0 if attack in KEYS else -1))
                if other == model
                else t.transferred(attack, other)
                for other in tables
            }
            for model, t in tables.items()
        }

    transfers = {attack: deceived(attack) for attack in names}
    figure = plots.matrices(transfers, row="made on", column="tried on", unit="share of squares deceived")
    plots.save(figure, run.directory / "transfer.png")
    shares = {
        f"{attack}, {short(model)}": {
            kind: t.mean(t.get(attack, "kinds")[:, i]).interval for i, kind in enumerate(KINDS)
        }
        for model, t in tables.items()
        for attack in (KEYS[0], "PGD")
    }
    plots.save(plots.kinds_bar(shares), run.directory / "kinds.png")
    plots.save(plots.gallery(pictures(tables, found, squares)), run.directory / "pictures.png", bits=8)


def pictures(
    tables: Mapping[str, Table],
    found: Mapping[str, Mapping[str, np.ndarray]],
    squares: generated.Squares,
    count: int = 5,
) -> list[list[tuple[str, np.ndarray]]]:
    """Generated squares that key pixels and PGD make real ones of: the images, and what changed, magnified."""
    model = next(iter(tables))
    both = [found[model][f"{attack}/success"].any(axis=1) for attack in (KEYS[0], "PGD")]
    shown = tables[model].right[model] & both[0] & both[1] & (squares.labels == 1)
    rows: Sequence[int] = np.flatnonzero(shown).tolist()
    lines = []
    for i in rows[:: max(1, len(rows) // count)][:count]:
        clean = squares.images[i].astype(np.float32) / 255
        line = [(squares.ids[i], clean)]
        for attack in (KEYS[0], "PGD"):
            image = found[model][f"{attack}/images"][i]
            delta = image - clean
            factor, share = plots.magnification(delta), (delta != 0).any(-1).mean()
            line += [
                (f"{attack}: seen as real", image),
                (
                    f"{share:.1%} of pixels, L2 {np.linalg.norm(delta):.2f}, × {factor}",
                    np.clip(0.5 + factor * delta, 0, 1),
                ),
            ]
        lines.append(line)
    return lines


if __name__ == "__main__":
    sys.exit(guarded(lambda words: main(tyro.cli(Keys, description=__doc__, args=words))))
