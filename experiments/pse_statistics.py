"""How often do perturbations suppress, promote, or do both in balance?

    python experiments/pse_statistics.py --model efficientnet_lite0

Attacks the labelled ImageNet pictures (or the given ones) with the attacks of the paper, takes the effect of every
cell, and answers its finding (arXiv 1904.02057, section 4) with numbers:

(a) all three kinds of cells occur, and the overall effect s + p grows with the norm of the cell's perturbation
    (Spearman above 0.5 for C&W and StrAttack).

An answer is "confirmed" or "not confirmed" where the 95 % bootstrap interval over pictures lies on one side, else
"undecided at this sample size". A stopped run continues. Writes pse_statistics/answers.json beside the tables, figures
and page of `jaxinterp explain`, which show s + p against the norm and the ratio against s + p.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import tyro

from jaxinterp.cli import guarded
from jaxinterp.explain.tables import SHARE_COLUMNS, as_json, summary_lines
from jaxinterp.statistics import Estimate
from jaxinterp.study import NOT_CONFIRMED, Answer, Setting, begin, verdict

RHO = 0.5


def occurs(share: Estimate) -> str:
    """Whether there are any: a share is never below 0, and in no picture above it where there are none."""
    return NOT_CONFIRMED if share.count > 1 and share.high == 0 else verdict(share, 0.0)


def answers(summary: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """Direction (a) for the attacks that were run."""
    found = []
    for row in summary:
        for key in SHARE_COLUMNS:
            kind = key.removeprefix("share_")
            found.append(Answer(f"(a) {row['attack']}: {kind} cells occur", f"share {row[key]}", occurs(row[key])))
    for row in summary:
        rho = row["rho_effect_norm"]
        claim = f"(a) {row['attack']}: s + p grows with the norm, Spearman > {RHO}"
        found.append(Answer(claim, f"rho {rho}", verdict(rho, RHO)))
    return found


def main(setting: Setting) -> None:
    """Statistics of suppression, promotion and balance, with the paper's directions answered."""
    study = begin("pse_statistics", setting, {})
    for line in summary_lines(study.found.summary):
        print(line)
    study.conclude(answers(study.found.summary), as_json(study.found.summary))


if __name__ == "__main__":
    sys.exit(guarded(lambda words: main(tyro.cli(Setting, description=__doc__, args=words))))
