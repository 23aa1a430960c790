"""How often do perturbations suppress, promote, or do both in balance - and do they follow the maps?

    python experiments/pse_statistics.py --out results/pse_statistics

Attacks the labelled ImageNet pictures (or the given ones) with I-FGSM, PGD in L2 and C&W, takes the effect of every
cell, and answers two of the paper's findings with numbers (arXiv 1904.02057):

(a) all three kinds of cells occur, and the overall effect s + p grows with the norm of the cell's perturbation
    (Spearman above 0.5 for C&W);
(b) the interpretability score is above its null for C&W, and lowest for I-FGSM.

An answer is "confirmed" or "not confirmed" where the 95 % bootstrap interval over pictures lies on one side, else
"undecided at this sample size". Takes about ten minutes on two cores for 18 pictures; a stopped run continues.
Writes statistics.json and is.png beside the tables, figures and page of `jaxinterp explain`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from jaxinterp import plots
from jaxinterp.explain import Explained, explain
from jaxinterp.explain.tables import SHARE_COLUMNS, summary_lines
from jaxinterp.runs import machine
from jaxinterp.statistics import Estimate, bootstrap_mean

ATTACKS = ("ifgsm", "pgd:norm=l2,eps=2", "cw")
RHO = 0.5


@dataclasses.dataclass(frozen=True)
class Answer:
    """A claim, what was measured, and whether that settles it."""

    claim: str
    measured: str
    verdict: str


def verdict(estimate: Estimate, above: float) -> str:
    """Whether the interval lies above a value, below it, or around it."""
    if estimate.count < 2:
        return "undecided at this sample size"
    if estimate.low > above:
        return "confirmed"
    return "not confirmed" if estimate.high < above else "undecided at this sample size"


def answers(rows: Sequence[Mapping[str, Any]], summary: Sequence[Mapping[str, Any]], seed: int) -> list[Answer]:
    """The directions (a) and (b) for the attacks that were run."""
    good = [row for row in rows if row["success"]]
    found = []
    for row in summary:
        for key in SHARE_COLUMNS:
            kind = key.removeprefix("share_")
            found.append(
                Answer(f"(a) {row['attack']}: {kind} cells occur", f"share {row[key]}", verdict(row[key], 0.0))
            )
    for row in summary:
        estimate = row["rho_effect_norm"]
        claim = f"(a) {row['attack']}: s + p grows with the norm, Spearman > {RHO}"
        found.append(Answer(claim, f"rho {estimate}", verdict(estimate, RHO)))
    for row in summary:
        mine = [r for r in good if r["attack"] == row["attack"]]
        gain = bootstrap_mean([r["is_label"] - r["is_null"] for r in mine], seed=seed)
        shuffled = row["is_shuffled"]
        claim = f"(b) {row['attack']}: interpretability score above its null"
        measured = f"IS {row['is_label']}, above the null by {gain}; shuffled {shuffled}"
        found.append(Answer(claim, measured, verdict(gain, 0.0)))
    lowest = {r["id"]: r["is_label"] for r in good if r["attack"].startswith("ifgsm")}
    for row in summary:
        if row["attack"].startswith("ifgsm"):
            continue
        pairs = [r["is_label"] - lowest[r["id"]] for r in good if r["attack"] == row["attack"] and r["id"] in lowest]
        estimate = bootstrap_mean(pairs, seed=seed)
        claim = f"(b) I-FGSM scores lower than {row['attack']}"
        found.append(Answer(claim, f"difference {estimate} over {estimate.count} pictures", verdict(estimate, 0.0)))
    return found


def write(found: Explained, seed: int) -> list[Answer]:
    """Answers the questions for a finished run, and stores statistics.json and is.png in its directory."""
    settled = answers(found.rows, found.summary, seed)
    found.run.write_json(
        "statistics.json",
        {
            "command": "python experiments/pse_statistics.py",
            "config": found.run.config,
            "machine": machine(),
            "answers": [dataclasses.asdict(answer) for answer in settled],
        },
    )
    scores = {
        name: np.array([r["is_label"] for r in found.rows if r["attack"] == name and r["success"]])
        for name in found.attacks
    }
    null = float(np.nanmean([r["is_null"] for r in found.rows]))
    plots.save(plots.scores(scores, null=null), found.run.directory / "figures" / "is.png")
    return settled


def main(
    pictures: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    *,
    model: str = "efficientnet_lite0",
    attack: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    cell: int = 14,
    out: Path = Path("results/pse_statistics"),
    labels: str = "auto",
    limit: int | None = None,
    seed: int = 0,
) -> None:
    """Statistics of suppression, promotion and balance, with the paper's directions answered.

    Args:
        pictures: Picture files and folders; none means the labelled ImageNet pictures of the `samples` extra.
        model: Network, converted with `jaxinterp convert`.
        attack: As in `jaxinterp explain`; may be given several times.
        cell: Side of a cell, in pixels.
        out: Results directory.
        labels: As in `jaxinterp explain`.
        limit: Use only the first so many pictures.
        seed: Of targets, random starts, shuffled controls and the bootstrap.
    """
    found = explain(
        pictures,
        model=model,
        specs=attack or ATTACKS,
        cell=cell,
        out=out,
        labels=labels,
        limit=limit,
        seed=seed,
    )
    for line in summary_lines(found.summary):
        print(line)
    print()
    for answer in write(found, seed):
        print(f"{answer.verdict:<30} {answer.claim}: {answer.measured}")
    print(f"\n{found.run.directory}/statistics.json, {found.page}")


if __name__ == "__main__":
    tyro.cli(main)
