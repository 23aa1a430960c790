"""The evaluation from pictures to tables: attack, round, count, draw, in a results directory that resumes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinterp import attacks, processes
from jaxinterp.attacks.attack import Attack
from jaxinterp.attacks.diagnostics import Finding
from jaxinterp.ensemble import Members
from jaxinterp.job import Job, Say, attacking, begin, choose_attacks
from jaxinterp.network import Network
from jaxinterp.pictures import Pictures, load_chunk, shared_chunks, stored_parts
from jaxinterp.robustness import compute, tables
from jaxinterp.runs import Run
from jaxinterp.statistics import Estimate, proportion

DEFAULT_ATTACKS = ("pgd",)
_DIAGNOSED = 8  # pictures on which the model is diagnosed


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What a finished evaluation found.

    Attributes:
        run: the results directory.
        network: the network that was attacked.
        attacks: by the name under which tables list them.
        pictures: all pictures, attacked or not.
        rows: one for every picture and attack, with `tables.COLUMNS`.
        summary: one for every attack, see `tables.summarise`.
        clean: accuracy on the clean pictures; of none where all labels are the network's own predictions.
        findings: what makes the evaluation doubtful.
        curves: the figure.
    """

    run: Run
    network: Network
    attacks: dict[str, Attack]
    pictures: Pictures
    rows: list[dict[str, Any]]
    summary: list[dict[str, Any]]
    clean: Estimate
    findings: list[Finding]
    curves: Path


def evaluate(
    pictures: Sequence[str | Path] = (),
    *,
    model: str = "efficientnet_lite0",
    specs: Sequence[str] = DEFAULT_ATTACKS,
    targeted: bool = False,
    out: Path,
    labels: str = "auto",
    data_dir: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    images: bool = True,
    watermarks: str | Path | None = None,
    say: Say = print,
) -> Evaluated:
    """Runs the evaluation, or what is left of it; an attack goes on in the middle.

    Args:
        pictures: as in `jaxinterp.explain.explain`, like model, labels, data_dir, limit and say.
        model: name of the network.
        specs: attacks as text, see `jaxinterp.attacks.spec`.
        targeted: attack each picture towards a random class that depends on the seed and the picture's name.
        out: results directory: images.csv, summary.json, curves.png, adversarial/ATTACK/PICTURE.png and .npz.
        labels: where labels come from.
        data_dir: where TensorFlow data sets were prepared.
        limit: use only the first so many pictures.
        seed: of the attacks' randomness and the targets.
        batch_size: pictures that are attacked at once.
        images: store the adversarial images.
        watermarks: a folder of class folders of pictures, for attacks that embed them (else they embed noise).
        say: is told what a person should know.

    Raises:
        ValueError: as `jaxinterp.explain.explain`.
        OSError: the results cannot be written.
    """
    chosen = choose_attacks(specs)
    job = begin(
        "attack",
        pictures,
        model=model,
        chosen=chosen,
        config={"targeted": targeted, "images": images, "rounding": "inside the ball, at the confidence, as read"},
        check=functools.partial(_check, targeted),
        out=out,
        labels=labels,
        data_dir=data_dir,
        limit=limit,
        seed=seed,
        batch_size=batch_size,
        say=say,
        watermarks=watermarks,
    )
    run, seen, chosen = job.run, job.pictures, job.attacks
    group = processes.current()
    findings = _diagnose(job, seed) if group.first else []
    mine, done = shared_chunks(run, chosen, seen, batch_size)
    with attacking(seen, done) as progress:
        compute.compute_parts(
            run,
            job.network,
            job.params,
            job.source,
            seen,
            chosen,
            targeted=targeted,
            images=images,
            seed=seed,
            batch_size=batch_size,
            starts=mine,
            progress=progress,
        )
    rows: list[dict[str, Any]] = []
    unlabelled = {seen.ids[i] for i in np.flatnonzero(seen.unlabelled)}
    for _, name, arrays in stored_parts(run, chosen, seen, batch_size):
        rows += tables.rows(job.network, name, arrays, unlabelled=unlabelled, images=images)

    place = {(picture, name): (i, j) for i, picture in enumerate(seen.ids) for j, name in enumerate(chosen)}
    rows.sort(key=lambda row: place[row["id"], row["attack"]])
    findings += attacks.compare_access(
        {name: [row for row in rows if row["attack"] == name] for name in chosen}, chosen
    )
    measured = len(unlabelled) < len(seen.ids)
    clean = proportion(len(seen.correct), len(seen.ids)) if measured else proportion(0, 0)
    summary = tables.summarise(rows, list(chosen), labelled=len(seen.ids), correct=len(seen.correct))
    curves = run.directory / "curves.png"
    if group.first:
        run.write_table("images.csv", tables.COLUMNS, rows)
        run.write_json(
            "summary.json",
            {
                "predicted_labels": len(unlabelled),
                "clean_accuracy": tables.as_json([{"clean": clean}])[0]["clean"],
                "attacks": tables.as_json(summary),
                "quantiles": tables.QUANTILES,
                "warnings": [dataclasses.asdict(finding) for finding in findings],
            },
        )
        _draw(curves, rows, list(chosen), len(seen.correct))
    for finding in findings:
        say(f"warning: {finding}")
    group.wait()
    return Evaluated(run, job.network, chosen, seen, rows, summary, clean, findings, curves)


def _check(targeted: bool, network: Network) -> None:
    if not targeted and isinstance(network.apply, Members) and network.apply.combine == "losses":
        raise ValueError(
            f"{network.name}: combine=losses has a class that stands for none, and an untargeted attack would succeed "
            "where members only disagree; attack towards classes (--targeted), or use combine=logits"
        )


def _diagnose(job: Job, seed: int) -> list[Finding]:
    """What is doubtful about the model itself, on the first pictures that it classifies correctly."""
    chunk = job.pictures.correct[:_DIAGNOSED]
    batch, _ = load_chunk(job.source, job.pictures, chunk, len(chunk))
    model = job.network.bind(job.params)
    return attacks.diagnose(model, batch.images, batch.labels, key=jax.random.key(seed))


def _draw(path: Path, rows: Sequence[dict[str, Any]], names: Sequence[str], total: int) -> None:
    from jaxinterp import plots

    distances = {
        norm: {name: np.array([r[norm] for r in rows if r["attack"] == name and r["success"]], float) for name in names}
        for norm in compute.NORMS
    }
    plots.save(plots.success_curves(distances, total=total), path)
