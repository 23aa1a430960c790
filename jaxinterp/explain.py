"""The main job: attack pictures, and explain every perturbation at the pixel and the image level.

For every correctly classified picture and every attack: the adversarial image, the effect of every cell, the four
class activation maps, the interpretability score with its null; tables, figures and one page of HTML, in a results
directory that resumes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import platform
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp import attacks, cam, effect, localize, parallel
from jaxinterp.attacks.attack import Attack
from jaxinterp.attacks.driver import example_keys
from jaxinterp.data import Batch, DamagedImage, Example, Source, batches
from jaxinterp.network import Network, Params
from jaxinterp.runs import Run
from jaxinterp.statistics import Estimate, bootstrap_mean

# Settings for explaining: enough for a perturbation near the attack's best at a cost of minutes on a laptop. The
# classes themselves keep their papers' defaults.
PRESETS: dict[str, dict[str, Any]] = {"cw": {"search_steps": 4, "steps": 100, "initial_const": 0.3}}

IMAGE_COLUMNS = (
    *("id", "attack", "label", "label_name", "target", "target_name", "success", "adversarial_class"),
    *("l0", "l1", "l2", "linf", "first_success", "forward", "backward", "pse_forward"),
    *("cells", "cells_none", "share_suppression", "share_balanced", "share_promotion", "rho_effect_norm"),
    *("is_label", "is_target", "is_null", "is_shuffled", "is_shuffled_sd"),
)
CELL_COLUMNS = (
    *("id", "attack", "row", "column", "suppression", "promotion", "ratio", "kind", "norm"),
    *("map_label_clean", "map_target_adversarial"),
)


SHARE_COLUMNS = ("share_suppression", "share_balanced", "share_promotion")
KIND_LABELS = tuple(kind.label for kind in list(effect.Kind)[1:])
SUMMARY_COLUMNS = (
    ("attack", "attack", ""),
    ("pictures", "pictures", "d"),
    ("success", "success", ".0%"),
    ("l2", "median L2", ".3f"),
    ("linf", "median Linf", ".4f"),
    ("l1", "median L1", ".1f"),
    ("l0", "median L0", ".0f"),
    ("forward", "median forward passes", ".0f"),
    ("share_suppression", "suppression-dominated cells", ".3f"),
    ("share_balanced", "balanced cells", ".3f"),
    ("share_promotion", "promotion-dominated cells", ".3f"),
    ("rho_effect_norm", "Spearman of s + p with the cell's norm", ".3f"),
    ("is_label", "IS on the true class's map", ".3f"),
    ("is_target", "IS on the target's map", ".3f"),
    ("is_null", "IS of an even perturbation (null)", ".3f"),
    ("is_shuffled", "IS of shuffled pixels", ".3f"),
)
NOTES = (
    "Norms and passes are medians over the pictures for which the attack succeeded; shares, correlations and scores "
    "are means over them with 95 % bootstrap intervals over pictures.",
    "Shares leave out cells that have no effect. IS is the interpretability score at the 70th percentile of the map.",
)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Some items of a source, in the given order."""

    source: Source
    indices: tuple[int, ...]
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[self.indices[index]]


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The clean pictures as the network sees them: one entry for every readable picture, in order."""

    indices: np.ndarray
    ids: tuple[str, ...]
    labels: np.ndarray
    predicted: np.ndarray
    targets: np.ndarray
    damaged: tuple[tuple[str, str], ...]

    @property
    def correct(self) -> np.ndarray:
        """Positions of the correctly classified pictures: the ones that are attacked."""
        return np.flatnonzero(self.labels == self.predicted)


Progress = Callable[[str, float], None]
"""Called with what is being done, and how many attacked pictures were finished since the last call."""


def silent(what: str, done: float) -> None:
    """The progress that is not shown."""


def survey(
    run: Run, network: Network, params: Params, source: Source, *, seed: int, batch_size: int, progress: Progress
) -> Pictures:
    """What the network makes of the clean pictures, and the random but seeded target of each.

    A picture without a label gets the network's own prediction for one.

    Raises:
        ValueError: a label is not one of the network's classes.
    """
    stored = run.read_part("pictures")
    if stored is None:
        damaged: list[DamagedImage] = []
        model = network.bind(params)
        columns: dict[str, list[Any]] = {"ids": [], "labels": [], "predicted": []}
        for batch in batches(source, batch_size, on_damaged=damaged.append):
            progress("reading pictures", 0)
            kept = batch.mask
            columns["ids"] += [name for name, keep in zip(batch.ids, kept, strict=True) if keep]
            columns["labels"] += list(batch.labels[kept])
            columns["predicted"] += list(np.asarray(_classify(model, batch.images))[kept])
        labels, predicted = (np.array(columns[k], np.int32) for k in ("labels", "predicted"))
        labels = np.where(labels < 0, predicted, labels)
        outside = np.flatnonzero(labels >= network.num_classes)
        if outside.size:
            raise ValueError(
                f"labels must be from 0 to {network.num_classes - 1}, the classes of {network.name}, but "
                f"{columns['ids'][outside[0]]} has {labels[outside[0]]}"
            )
        stored = {
            "ids": np.array(columns["ids"], dtype=np.str_),
            "labels": labels,
            "predicted": predicted,
            "damaged": np.array([(d.id, d.reason) for d in damaged], dtype=np.str_).reshape(-1, 2),
        }
        run.write_part("pictures", stored)
    ids = tuple(str(name) for name in stored["ids"])
    return Pictures(
        indices=_positions(source, ids, {str(name) for name, _ in stored["damaged"]}),
        ids=ids,
        labels=stored["labels"],
        predicted=stored["predicted"],
        targets=random_targets(ids, stored["labels"], network.num_classes, seed),
        damaged=tuple((str(name), str(reason)) for name, reason in stored["damaged"]),
    )


def random_targets(ids: Sequence[str], labels: np.ndarray, classes: int, seed: int) -> np.ndarray:
    """A class other than the label for every picture, from the seed and the picture's id alone."""
    digests = np.array([zlib.crc32(name.encode()) for name in ids], np.uint32)
    key = jax.random.key(seed)
    draw = jax.vmap(lambda i: jax.random.randint(jax.random.fold_in(key, i), (), 0, classes - 1))
    other = np.asarray(draw(digests)) if len(ids) else np.zeros(0, np.int32)
    return (other + (other >= labels)).astype(np.int32)


def explain_batch(
    network: Network,
    params: Params,
    attack: Attack,
    batch: Batch,
    targets: np.ndarray,
    *,
    cell: int,
    seed: int,
    progress: Progress = silent,
) -> dict[str, np.ndarray]:
    """Attacks one batch and explains the perturbations.

    Args:
        network: the network.
        params: its parameters.
        attack: the attack.
        batch: pictures [B,H,W,C]; rows that only pad it are dropped from the result.
        targets: [B] the class that each picture is attacked towards.
        cell: side of a cell, in pixels.
        seed: of the attack's randomness and the shuffled control.
        progress: see `Progress`.

    Returns:
        Arrays by name, the picture being their first axis.
    """
    mesh = parallel.data_mesh()
    params = parallel.replicate(params, mesh)
    model = network.bind(params)
    clean, labels, wanted = parallel.shard((batch.images, batch.labels, targets), mesh)
    key = jax.random.key(seed)
    state = attacks.start(attack, model, clean, labels, wanted, key=key)
    pieces = min(50, attack.iterations)
    for piece in range(pieces):
        progress(f"attack {piece / pieces:4.0%}", 0)
        state = attacks.advance(attack, model, state, -(-attack.iterations // pieces))
        if attacks.finished(state):
            break
    found = attacks.finish(attack, state)
    # Rows that only pad the batch are left unperturbed, which makes their cells free.
    mask = parallel.shard(batch.mask, mesh)
    adversarial = jnp.where(mask[:, None, None, None], found.images, clean)
    progress("cells", 0)
    cells = effect.pse(model, clean, adversarial, labels, wanted, cell)
    jax.block_until_ready(cells)
    progress("maps", 0)
    both = jnp.stack([labels, wanted], axis=1)
    before = cam.maps(network, params, clean, both)
    after = cam.maps(network, params, adversarial, both)
    four = jnp.stack([before[:, 0], after[:, 0], before[:, 1], after[:, 1]], axis=1)
    delta = adversarial - clean
    shuffled = localize.shuffled_score(delta, before[:, 0], example_keys(key, clean))
    result = {
        "adversarial": adversarial,
        "adversarial_class": _classify(model, adversarial),
        **{name: getattr(found, name) for name in ("success", "l0", "l1", "l2", "linf")},
        **{name: getattr(found, name) for name in ("iterations", "forward", "backward")},
        **{name: getattr(cells, name) for name in ("suppression", "promotion", "ratio", "kind", "norm")},
        "pse_forward": cells.forward,
        "maps": four,
        "is_label": localize.interpretability_score(delta, before[:, 0]),
        "is_target": localize.interpretability_score(delta, after[:, 1]),
        "is_null": localize.null_score(delta, before[:, 0]),
        "is_shuffled": shuffled,
    }
    kept = {name: np.asarray(value)[batch.mask] for name, value in result.items()}
    kept["ids"] = np.array([i for i, keep in zip(batch.ids, batch.mask, strict=True) if keep], dtype=np.str_)
    kept["labels"], kept["targets"] = batch.labels[batch.mask], targets[batch.mask]
    kept["clean"] = batch.images[batch.mask]
    return kept


@jax.jit
def _classify(model, images):
    return jnp.argmax(model(images), axis=-1)


def parts(
    run: Run,
    network: Network,
    params: Params,
    source: Source,
    pictures: Pictures,
    chosen: Mapping[str, Attack],
    *,
    cell: int,
    seed: int,
    batch_size: int,
    progress: Progress = silent,
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Every finished chunk, (name of the attack, arrays as `explain_batch` gives them), computed or read back.

    Chunks come picture by picture, all attacks of one before the next, so that a stopped run has whole comparisons.
    """
    positions = pictures.correct
    size = chunk_size(pictures, batch_size)
    for start in range(0, len(positions), size):
        chunk = positions[start : start + size]
        batch = None
        for name, attack in chosen.items():
            part = _part_name(name, start)
            arrays = run.read_part(part)
            if arrays is None:
                progress(name, 0)
                if batch is None:
                    names = tuple(pictures.ids[i] for i in chunk)
                    selection = Selection(source, tuple(int(i) for i in pictures.indices[chunk]), names)
                    batch = next(iter(batches(selection, size)))
                    batch = dataclasses.replace(batch, labels=_padded(pictures.labels[chunk], size))
                arrays = explain_batch(
                    network,
                    params,
                    attack,
                    batch,
                    _padded(pictures.targets[chunk], size),
                    cell=cell,
                    seed=seed,
                    progress=lambda what, done, name=name: progress(f"{name}: {what}", done),
                )
                run.write_part(part, arrays)
            yield name, arrays
            progress(name, len(chunk) / len(chosen))


def chunk_size(pictures: Pictures, batch_size: int) -> int:
    """How many pictures are attacked at once: `batch_size` or all there are, a multiple of the devices."""
    unit = parallel.multiple(parallel.data_mesh())
    return -(-min(batch_size, max(1, len(pictures.correct))) // unit) * unit


def stored_parts(
    run: Run, names: Iterable[str], pictures: Pictures, batch_size: int
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Every chunk of a finished run, read back in order."""
    for start in range(0, len(pictures.correct), chunk_size(pictures, batch_size)):
        for name in names:
            arrays = run.read_part(_part_name(name, start))
            if arrays is not None:
                yield name, arrays


def image_rows(network: Network, attack: str, arrays: Mapping[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """One row for every picture of a chunk, with the columns `IMAGE_COLUMNS`."""
    shares = np.asarray(effect.shares(jnp.asarray(arrays["kind"])))
    for i, name in enumerate(arrays["ids"]):
        label, target = int(arrays["labels"][i]), int(arrays["targets"][i])
        kind = arrays["kind"][i]
        yield {
            "id": str(name),
            "attack": attack,
            "label": label,
            "label_name": network.class_name(label),
            "target": target,
            "target_name": network.class_name(target),
            "success": bool(arrays["success"][i]),
            "adversarial_class": int(arrays["adversarial_class"][i]),
            **{key: arrays[key][i] for key in ("l0", "l1", "l2", "linf", "forward", "backward", "pse_forward")},
            "first_success": arrays["iterations"][i],
            "cells": kind.size,
            "cells_none": int(np.sum(kind == effect.Kind.NONE)),
            "share_suppression": shares[i, 0],
            "share_balanced": shares[i, 1],
            "share_promotion": shares[i, 2],
            "rho_effect_norm": _rho(arrays, i),
            **{key: arrays[key][i] for key in ("is_label", "is_target", "is_null")},
            "is_shuffled": np.mean(arrays["is_shuffled"][i]),
            "is_shuffled_sd": np.std(arrays["is_shuffled"][i]),
        }


def cell_rows(attack: str, arrays: Mapping[str, np.ndarray], cell: int) -> Iterator[dict[str, Any]]:
    """One row for every cell of every picture of a chunk, with the columns `CELL_COLUMNS`."""
    size = arrays["clean"].shape[1:3]
    maps = np.asarray(cam.resize(jnp.asarray(arrays["maps"]), size))
    for i, name in enumerate(arrays["ids"]):
        kind = arrays["kind"][i]
        for row, column in np.ndindex(kind.shape):
            window = (slice(row * cell, (row + 1) * cell), slice(column * cell, (column + 1) * cell))
            yield {
                "id": str(name),
                "attack": attack,
                "row": row,
                "column": column,
                **{k: arrays[k][i, row, column] for k in ("suppression", "promotion", "ratio", "norm")},
                "kind": effect.Kind(kind[row, column]).label,
                "map_label_clean": np.mean(maps[i, 0][window]),
                "map_target_adversarial": np.mean(maps[i, 3][window]),
            }


def summarise(rows: Sequence[Mapping[str, Any]], names: Sequence[str], *, seed: int) -> list[dict[str, Any]]:
    """One row for every attack: success, median norms, and means over pictures with 95 % bootstrap intervals."""
    summary = []
    for name in names:
        mine = [row for row in rows if row["attack"] == name]
        good = [row for row in mine if row["success"]]

        def median(key, good=good):
            return float(np.median([row[key] for row in good])) if good else float("nan")

        def mean(key, good=good) -> Estimate:
            return bootstrap_mean([row[key] for row in good], seed=seed)

        summary.append(
            {
                "attack": name,
                "pictures": len(mine),
                "success": len(good) / len(mine) if mine else float("nan"),
                **{key: median(key) for key in ("l0", "l1", "l2", "linf", "forward", "backward")},
                **{key: mean(key) for key in ("share_suppression", "share_balanced", "share_promotion")},
                **{key: mean(key) for key in ("is_label", "is_target", "is_null", "is_shuffled")},
                "rho_effect_norm": mean("rho_effect_norm"),
            }
        )
    return summary


def as_json(summary: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The summary with estimates as dicts, and None for what is not a number."""

    def plain(value):
        if isinstance(value, Estimate):
            return {key: plain(v) for key, v in dataclasses.asdict(value).items()}
        return None if isinstance(value, float) and not np.isfinite(value) else value

    return [{key: plain(value) for key, value in row.items()} for row in summary]


@dataclasses.dataclass(frozen=True)
class CellColumns:
    """Norms, overall effects and ratios of all perturbed cells, by attack."""

    norms: dict[str, np.ndarray]
    effects: dict[str, np.ndarray]
    ratios: dict[str, np.ndarray]


def overview_columns(chunks: Iterable[tuple[str, Mapping[str, np.ndarray]]]) -> CellColumns:
    """The columns of all cells with a perturbation, for the overview figures."""
    gathered: dict[str, list[np.ndarray]] = {}
    for name, arrays in chunks:
        touched = arrays["norm"] > 0
        overall = arrays["suppression"] + arrays["promotion"]
        stacked = np.stack([arrays["norm"][touched], overall[touched], arrays["ratio"][touched]])
        gathered.setdefault(name, []).append(stacked)
    whole = {name: np.concatenate(columns, axis=1) for name, columns in gathered.items()}
    return CellColumns(*({name: columns[i] for name, columns in whole.items()} for i in range(3)))


def machine() -> dict[str, str]:
    """Versions and machine, for records."""
    packages = ("jaxinterp", "jax", "jaxlib", "flax", "optax", "numpy")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed as a package"
    device = jax.devices()[0]
    return {
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": f"{jax.device_count()} x {device.device_kind}",
    }


def pictures_digest(source: Source, ids: Sequence[str], labels: Sequence[int]) -> str:
    """sha256 over the ids and labels of the pictures, for the config."""
    text = "\n".join(f"{name}\t{int(label)}" for name, label in zip(ids, labels, strict=True))
    return hashlib.sha256(text.encode()).hexdigest()


def figure_path(run: Run, attack: str, picture: str) -> Path:
    """Where the figure of a picture and attack is stored."""
    stem = _safe(picture)
    if stem != picture:  # two ids may become one name
        stem = f"{stem}-{zlib.crc32(picture.encode()):08x}"
    return run.directory / "figures" / _safe(attack) / f"{stem}.png"


def draw(
    network: Network, attack: str, arrays: Mapping[str, np.ndarray], i: int, row: Mapping[str, Any], cell: int
) -> Any:
    """The figure of picture `i` of a chunk."""
    from jaxinterp import plots

    return plots.explanation(
        original=arrays["clean"][i],
        adversarial=arrays["adversarial"][i],
        kind=arrays["kind"][i],
        suppression=arrays["suppression"][i],
        promotion=arrays["promotion"][i],
        maps=arrays["maps"][i],
        true_name=row["label_name"],
        target_name=row["target_name"],
        predicted_name=network.class_name(row["adversarial_class"]),
        attack=attack,
        cell=cell,
        subtitle=_subtitle(row),
    )


def picture_facts(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the page says beside a picture."""
    if not row["success"]:
        return {"result": "the attack failed"}
    return {
        "L2": f"{row['l2']:.3f}",
        "Linf": f"{row['linf']:.4f}",
        "L0": f"{row['l0']:.0f}",
        "passes": f"{row['forward']} forward, {row['backward']} backward",
        "kinds": ", ".join(f"{label} {row[key]:.0%}" for label, key in zip(KIND_LABELS, SHARE_COLUMNS, strict=True)),
        "interpretability score": f"{row['is_label']:.3f} on the true class's map, {row['is_target']:.3f} on the "
        f"target's (null {row['is_null']:.3f}, shuffled {row['is_shuffled']:.3f} ± {row['is_shuffled_sd']:.3f})",
    }


def _part_name(attack: str, start: int) -> str:
    return f"{_safe(attack)}-{zlib.crc32(attack.encode()):08x}-{start:06d}"


def _subtitle(row: Mapping[str, Any]) -> str:
    if not row["success"]:
        return f"{row['id']}: the attack failed; the picture is unchanged"
    return (
        f"{row['id']}   L2 {row['l2']:.2f}   Linf {row['linf'] * 255:.1f}/255   "
        f"interpretability score {row['is_label']:.3f} (null {row['is_null']:.3f})"
    )


def _rho(arrays: Mapping[str, np.ndarray], i: int) -> float:
    """Spearman's rho between the overall effect s + p of the cells and the norm of the perturbation in them."""
    from scipy.stats import spearmanr

    norms = arrays["norm"][i].ravel()
    touched = norms > 0
    overall = (arrays["suppression"][i] + arrays["promotion"][i]).ravel()[touched]
    if len(overall) < 3 or np.ptp(norms[touched]) == 0 or np.ptp(overall) == 0:
        return float("nan")
    return float(spearmanr(overall, norms[touched]).statistic)  # type: ignore[attr-defined]


def _positions(source: Source, ids: Sequence[str], damaged: set[str]) -> np.ndarray:
    """Where in the source the pictures called `ids` stand."""
    known = getattr(source, "ids", None)
    if known is None:
        known = [source[i].id for i in range(len(source))]
    where = {name: i for i, name in enumerate(known)}
    missing = [name for name in ids if name not in where]
    if missing:
        raise ValueError(f"pictures of the earlier run are no longer there: {', '.join(missing[:5])}")
    return np.array([where[name] for name in ids], np.int64)


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    """Values for a batch of `size`, the last one repeated."""
    return np.concatenate([values, np.repeat(values[-1:], size - len(values))]).astype(np.int32)


def _safe(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:80] or "_"
