"""The main job from pictures to page: attack, explain, tables, figures, in a results directory that resumes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxinterp import cam, effect, processes
from jaxinterp.attacks.attack import Attack
from jaxinterp.explain import compute, page, tables
from jaxinterp.job import attacking, begin, choose_attacks
from jaxinterp.network import Network, Params
from jaxinterp.pictures import Pictures, shared_chunks, stored_parts
from jaxinterp.runs import Run

# Settings for explaining: a perturbation near the attack's best, at a cost of minutes on a laptop. The classes
# themselves keep their papers' defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "scw": {"search_steps": 4},
    "cw": {"search_steps": 4, "steps": 100, "initial_const": 0.3},
    "ead": {"search_steps": 4, "steps": 100, "initial_const": 0.3},
    "strattack": {"search_steps": 3, "steps": 100, "refit_search_steps": 2, "refit_steps": 50},
}
DEFAULT_ATTACKS = ("ifgsm", "cw")
FORMAT = 2  # of the stored chunks; directories of another one are refused


@dataclasses.dataclass(frozen=True)
class Explained:
    """What a finished run found.

    Attributes:
        run: the results directory.
        network: the network that was attacked.
        params: its parameters.
        attacks: by the name under which tables list them.
        pictures: all pictures, attacked or not.
        rows: one for every picture and attack, with `tables.IMAGE_COLUMNS`.
        summary: one for every attack, with `tables.SUMMARY_COLUMNS`.
        page: index.html.
        batch_size: pictures in a chunk, at most.
    """

    run: Run
    network: Network
    params: Params
    attacks: dict[str, Attack]
    pictures: Pictures
    rows: list[dict[str, Any]]
    summary: list[dict[str, Any]]
    page: Path
    batch_size: int

    def parts(self, attacks: Collection[str] | None = None) -> Iterator[tuple[str, str, dict[str, np.ndarray]]]:
        """Every chunk: its name, its attack's, and the arrays of `compute.explain_batch`; of all attacks or of some."""
        wanted = [name for name in self.attacks if attacks is None or name in attacks]
        return stored_parts(self.run, wanted, self.pictures, self.batch_size)


def explain(
    pictures: Sequence[str | Path] = (),
    *,
    model: str = "efficientnet_lite0",
    specs: Sequence[str] = DEFAULT_ATTACKS,
    cell: effect.Cell = 14,
    definition: effect.Definition = effect.PAPER,
    faithful: bool = False,
    method: str = "auto",
    out: Path,
    labels: str = "auto",
    data_dir: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 4,
    watermarks: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> Explained:
    """Runs the job, or what is left of it.

    Args:
        pictures: files and folders, or one source such as "tfds:imagenet2012/validation[:100]", see
            `jaxinterp.data.open_source`; none means the labelled pictures of the `samples` extra.
        model: name of the network; its weights must have been converted.
        specs: attacks as text, see `jaxinterp.attacks.spec`.
        cell: side of a cell in pixels, or its height and width.
        definition: of the effects of cells.
        faithful: also measure how faithful the maps are, by `jaxinterp.faithfulness`.
        method: of the class activation maps, one of `jaxinterp.cam.METHODS`; "auto" means "cam" where the network has
            them, else "gradcam" on its last feature map.
        out: results directory.
        labels: "auto", "names", "predicted", or the path of a labels file; see `jaxinterp.data.Folder`.
        data_dir: where TensorFlow data sets were prepared.
        limit: use only the first so many pictures.
        seed: of targets, random starts and shuffled controls; 0 to 2^32 - 1.
        batch_size: pictures that are attacked at once.
        watermarks: a folder of class folders of pictures, for attacks that embed them (else they embed noise).
        say: is told what a person should know, line by line.

    Raises:
        ValueError: bad arguments, no pictures, no weights, an output directory of another config, no picture that
            the network classifies correctly.
        OSError: the results cannot be written.
    """
    tall, wide = effect.sides(cell)
    cell = tall if tall == wide else (tall, wide)  # one config for one grid
    chosen = choose_attacks(specs, PRESETS)

    # What is not asked for is not in the config, so that runs of earlier versions continue.
    options = (
        ("effect", definition.method, effect.PAPER.method),
        ("scale", definition.scale, effect.PAPER.scale),
        ("faithfulness", faithful, False),
    )
    further = {name: value for name, value, default in options if value != default}

    def check(network: Network) -> None:
        effect.grid(network.image_size, network.image_size, cell)
        cam.check_method(network, compute.map_method(network, method))

    job = begin(
        "explain",
        pictures,
        model=model,
        chosen=chosen,
        config={"cell": cell, "maps": method, "format": FORMAT, **further},
        check=check,
        out=out,
        labels=labels,
        data_dir=data_dir,
        limit=limit,
        seed=seed,
        batch_size=batch_size,
        say=say,
        watermarks=watermarks,
    )
    run, network, seen, chosen = job.run, job.network, job.pictures, job.attacks

    def rows_of(name: str, arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        return list(tables.image_rows(network, name, arrays, definition))

    mine, done = shared_chunks(run, chosen, seen, batch_size)
    with attacking(seen, done) as progress:
        for name, arrays in compute.parts(
            run,
            network,
            job.params,
            job.source,
            seen,
            chosen,
            cell=cell,
            definition=definition,
            faithful=faithful,
            cam=compute.map_method(network, method),
            seed=seed,
            batch_size=batch_size,
            starts=mine,
            progress=progress,
        ):
            progress(f"{name}: figures", 0.0)
            page.draw_missing(run, network, name, arrays, rows_of(name, arrays), cell, definition)

    group = processes.current()
    rows: list[dict[str, Any]] = []
    for _, name, arrays in stored_parts(run, chosen, seen, batch_size, without=tables.NOT_IN_ROWS):
        rows += rows_of(name, arrays)

    def stored():
        return ((name, arrays) for _, name, arrays in stored_parts(run, chosen, seen, batch_size))

    place = {(picture, name): (i, j) for i, picture in enumerate(seen.ids) for j, name in enumerate(chosen)}
    rows.sort(key=lambda row: place[row["id"], row["attack"]])
    summary = tables.summarise(rows, list(chosen), seed=seed)
    written = run.directory / "index.html"
    if group.first:
        if not all(page.figure_path(run, row["attack"], row["id"]).exists() for row in rows):
            for name, arrays in stored():
                page.draw_missing(run, network, name, arrays, rows_of(name, arrays), cell, definition)
        named = tuple(tables.named(definition))
        measured = tables.GRADIENT_COLUMNS if definition.method == "first_order" else ()
        measured += tables.FAITHFULNESS_COLUMNS if faithful else ()
        run.write_table("images.csv", tables.IMAGE_COLUMNS + measured + named, rows)
        run.write_table(
            "cells.csv",
            tables.CELL_COLUMNS + named,
            (row for name, arrays in stored() for row in tables.cell_rows(name, arrays, cell, definition)),
        )
        run.write_json("summary.json", tables.as_json(summary))
        page.write_page(run, network, seen, job.label_origin, chosen, cell, definition, rows, summary, stored)
    group.wait()
    return Explained(run, network, job.params, chosen, seen, rows, summary, written, batch_size)
