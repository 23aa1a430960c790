"""The main job from pictures to page: attack, explain, tables, figures, in a results directory that resumes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxinterp import attacks, effect
from jaxinterp.attacks.attack import Attack
from jaxinterp.attacks.driver import coerce
from jaxinterp.attacks.spec import from_spec, parameters
from jaxinterp.data import AnySource, Crop, Folder, Tfds, open_source
from jaxinterp.explain import compute, page, tables
from jaxinterp.explain.pictures import Pictures, Selection, survey
from jaxinterp.network import Network
from jaxinterp.runs import Run, machine
from jaxinterp.weights import checkpoint, load

# Settings for explaining: a perturbation near the attack's best, at a cost of minutes on a laptop. The classes
# themselves keep their papers' defaults.
PRESETS: dict[str, dict[str, Any]] = {"cw": {"search_steps": 4, "steps": 100, "initial_const": 0.3}}
DEFAULT_ATTACKS = ("ifgsm", "cw")
_LARGEST_SEED = 2**32 - 1  # beyond, seeds of JAX repeat; numpy takes none below 0
_MOST_STEPS = 2**31 - 1
_SAMPLES = {1000: "samples:imagenet", 10: "samples:cifar10"}  # by number of classes


@dataclasses.dataclass(frozen=True)
class Explained:
    """What a finished run found.

    Attributes:
        run: the results directory.
        network: the network that was attacked.
        attacks: by the name under which tables list them.
        pictures: all pictures, attacked or not.
        rows: one for every picture and attack, with `tables.IMAGE_COLUMNS`.
        summary: one for every attack, with `tables.SUMMARY_COLUMNS`.
        page: index.html.
    """

    run: Run
    network: Network
    attacks: dict[str, Attack]
    pictures: Pictures
    rows: list[dict[str, Any]]
    summary: list[dict[str, Any]]
    page: Path


def explain(
    pictures: Sequence[str | Path] = (),
    *,
    model: str = "efficientnet_lite0",
    specs: Sequence[str] = DEFAULT_ATTACKS,
    cell: int = 14,
    out: Path,
    labels: str = "auto",
    data_dir: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 4,
    say: Callable[[str], None] = print,
) -> Explained:
    """Runs the job, or what is left of it.

    Args:
        pictures: files and folders, or one source such as "tfds:imagenet2012/validation[:100]", see
            `jaxinterp.data.open_source`; none means the labelled pictures of the `samples` extra.
        model: name of the network; its weights must have been converted.
        specs: attacks as text, see `jaxinterp.attacks.spec`.
        cell: side of a cell, in pixels.
        out: results directory.
        labels: "auto", "names", "predicted", or the path of a labels file; see `jaxinterp.data.Folder`.
        data_dir: where TensorFlow data sets were prepared.
        limit: use only the first so many pictures.
        seed: of targets, random starts and shuffled controls; 0 to 2^32 - 1.
        batch_size: pictures that are attacked at once.
        say: is told what a person should know, line by line.

    Raises:
        ValueError: bad arguments, no pictures, no weights, an output directory of another config, no picture that
            the network classifies correctly.
        OSError: the results cannot be written.
    """
    for name, value in (("--cell", cell), ("--batch-size", batch_size), ("--limit", 1 if limit is None else limit)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= seed <= _LARGEST_SEED:
        raise ValueError(f"--seed must be from 0 to {_LARGEST_SEED}, got {seed}")
    chosen = _attacks(specs)
    network, params = load(model)
    effect.grid(network.image_size, network.image_size, cell)
    crop = Crop(network.image_size, network.crop_pct, network.interpolation)
    if network.cam_node is None:
        raise ValueError(f"{model} has no class activation maps, which explaining needs; see jaxinterp models")
    if not pictures:
        pictures = [_SAMPLES.get(network.num_classes, "samples")]
    source = open_source(
        pictures if len(pictures) > 1 else pictures[0],
        crop=crop,
        classes=network.classes,
        labels=labels,
        data_dir=data_dir,
    )
    count = len(source) if limit is None else min(limit, len(source))
    run = Run(
        out,
        {
            "command": "explain",
            "model": model,
            "weights": checkpoint.read_manifest(checkpoint.default_root() / model, name=model)["source"]["sha256"],
            "attacks": {name: {"attack": attack.name, **parameters(attack)} for name, attack in chosen.items()},
            "cell": cell,
            "seed": seed,
            "batch_size": batch_size,
            "pictures": count,
            "source": _identity(source, pictures, count),
        },
    )
    run.write_json("machine.json", machine())
    selected = Selection(source, tuple(range(count)))
    say(f"{count} pictures; labels: {source.label_origin}")

    with tqdm(total=count, unit="picture", desc="reading pictures", leave=False) as bar:

        def read(what: str, done: float) -> None:
            bar.update(done)

        seen = survey(
            run,
            network,
            params,
            selected,
            seed=seed,
            batch_size=batch_size,
            progress=read,
        )
    for name, reason in page.left_out(network, seen):
        say(f"  {name}: {reason}")
    say(f"{len(seen.correct)} of {count} pictures are classified correctly and attacked")
    if not seen.ids:
        raise ValueError("no picture could be read, so there is nothing to attack")
    if not len(seen.correct):
        raise ValueError("no picture is classified correctly, so there is nothing to attack")

    rows: list[dict[str, Any]] = []
    with tqdm(total=len(seen.correct), bar_format=_BAR) as bar:

        def progress(what: str, done: float) -> None:
            bar.set_description_str(what, refresh=not done)
            bar.update(done)

        for name, arrays in compute.parts(
            run,
            network,
            params,
            selected,
            seen,
            chosen,
            cell=cell,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        ):
            fresh = list(tables.image_rows(network, name, arrays))
            bar.set_description_str(f"{name}: figures")
            page.draw_missing(run, network, name, arrays, fresh, cell)
            rows += fresh
        bar.set_description_str("done")

    def stored():
        return compute.stored_parts(run, chosen, seen, batch_size)

    place = {(picture, name): (i, j) for i, picture in enumerate(seen.ids) for j, name in enumerate(chosen)}
    rows.sort(key=lambda row: place[row["id"], row["attack"]])
    run.write_table("images.csv", tables.IMAGE_COLUMNS, rows)
    run.write_table(
        "cells.csv", tables.CELL_COLUMNS, (row for name, a in stored() for row in tables.cell_rows(name, a, cell))
    )
    summary = tables.summarise(rows, list(chosen), seed=seed)
    run.write_json("summary.json", tables.as_json(summary))
    written = page.write_page(run, network, seen, source.label_origin, chosen, rows, summary, stored())
    return Explained(run, network, chosen, seen, rows, summary, written)


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} pictures [{elapsed}<{remaining}]"


def _attacks(specs: Sequence[str]) -> dict[str, Attack]:
    chosen: dict[str, Attack] = {}
    for spec in specs:
        if spec in chosen:
            raise ValueError(f"attack {spec} is given twice")
        chosen[spec] = from_spec(spec, attacks.ATTACKS, PRESETS)
        coerce(chosen[spec])
        if chosen[spec].iterations > _MOST_STEPS:
            raise ValueError(f"attack {spec} has more than {_MOST_STEPS} steps in all")
    if not chosen:
        raise ValueError("at least one attack is needed")
    return chosen


def _identity(source: AnySource, pictures: Sequence[str | Path], count: int) -> str:
    """What tells one set of pictures from another: ids, labels and contents, or the name of a prepared data set."""
    if isinstance(source, Tfds):
        return str(pictures[0])
    whole = hashlib.sha256()
    for i, (name, label) in enumerate(zip(source.ids[:count], source.labels[:count], strict=True)):
        content = (
            _file_digest(source.paths[i]) if isinstance(source, Folder) else checkpoint.tensor_digest(source.images[i])
        )
        whole.update(f"{name}\t{int(label)}\t{content}\n".encode())
    return f"sha256 of ids, labels and pictures: {whole.hexdigest()}"


def _file_digest(path: str) -> str:
    """sha256 of a picture's file; empty where there is nothing to read, which is said when it should be decoded."""
    try:
        return checkpoint.file_digest(Path(path)) if Path(path).is_file() else ""
    except OSError:
        return ""
