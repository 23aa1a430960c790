"""Every attack on every network whose weights are here: success, norms, passes, and how local the changes are.

    python experiments/attack_table.py --out results/attack_table

Attacks the sample pictures that each network classifies correctly (20 of CIFAR-10, 20 of ImageNet), untargeted. Prints
a table for each network and writes it to table.md and table.json; everything else is what `jaxinterp attack` keeps, in
a directory for each network. A stopped run continues.

"groups" is the number of square groups of pixels (2 x 2 on CIFAR-10, 13 x 13 on ImageNet, as StrAttack takes them) in
which anything changes by more than 1e-3, the median over successes; `strattack` minimises what this counts, `cw` and
`ead` do not.

Expected time on two cores: 30 minutes for cifar10_cnn, some hours for an ImageNet network with all its pictures
(--limit 4 --quick: 30 minutes). Expected result: StrAttack changes far fewer groups than C&W, EAD fewer components.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from jaxinterp import data
from jaxinterp.robustness import Evaluated, evaluate
from jaxinterp.runs import file_name, machine

NETWORKS = {"cifar10_cnn": "cifar10", "caffe_squeezenet1_1": "imagenet", "efficientnet_lite0": "imagenet"}
# Budgets at which some pictures resist. The others look for the smallest perturbation.
BUDGETS = {"cifar10_cnn": {"linf": "1/255", "l2": "0.15", "l1": "3"}}
IMAGENET = {"linf": "0.5/255", "l2": "0.5", "l1": "40"}
CHANGED = 1e-3


def specs(network: str, quick: bool) -> list[str]:
    """Attacks as text."""
    eps = BUDGETS.get(network, IMAGENET)
    linf, l2, l1 = (eps[norm] for norm in ("linf", "l2", "l1"))
    search, steps = ("search_steps=4", "steps=50") if quick else ("search_steps=9", "steps=200")
    searching = f"{search},{steps},initial_const=0.1"
    one, many = (20, 300) if quick else (100, 1000)
    return [
        f"fgsm:eps={linf}",
        f"ifgsm:eps={linf}",
        f"pgd:eps={linf}",
        f"pgd:eps={l2},norm=l2",
        f"pgd:eps={l1},norm=l1",
        f"mifgsm:eps={linf}",
        f"apgd:eps={linf},steps={one}",
        f"apgdt:eps={linf},steps={one}",
        f"cw:{searching}",
        f"cw-linf:{steps},search_steps=10",
        f"cw-l0:{steps},search_steps=10",
        f"ead:beta=0.01,{searching}",
        f"strattack:{search},{steps},refit_search_steps=4,refit_{steps}",
        f"deepfool:steps={one}",
        f"ddn:steps={one}",
        *(f"fmn:norm={norm},steps={one}" for norm in ("l0", "l1", "l2", "linf")),
        *(f"fab:norm={norm},steps={one}" for norm in ("l2", "linf")),
        f"square:eps={linf},steps={many}",
        f"spsa:eps={linf},steps={one}",
        f"hopskipjump:steps={4 if quick else 20}",
        f"autoattack:eps={linf},steps={one},queries={many}",
    ]


def groups(delta: np.ndarray, side: int) -> int:
    """In how many squares of `side` pixels anything changes."""
    changed = np.abs(delta).max(axis=-1) > CHANGED
    height, width = (-(-size // side) * side for size in changed.shape)
    padded = np.zeros((height, width), bool)
    padded[: changed.shape[0], : changed.shape[1]] = changed
    return int(padded.reshape(height // side, side, width // side, side).any(axis=(1, 3)).sum())


def measure(found: Evaluated, originals: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """A row for every attack."""
    side = 2 if found.network.image_size <= 32 else 13  # as StrAttack chooses
    table = []
    for name in found.attacks:
        mine = [row for row in found.rows if row["attack"] == name]
        good = [row for row in mine if row["success"]]
        folder = found.run.directory / "adversarial" / file_name(name)
        counts = []
        for row in good:
            with np.load(folder / f"{file_name(row['id'])}.npz") as stored:
                counts.append(groups(stored["image"] - originals[row["id"]], side))
        table.append(
            {
                "attack": name,
                "success": len(good),
                "pictures": len(mine),
                **{norm: _median(row[norm] for row in good) for norm in ("l0", "l1", "l2", "linf")},
                "groups": _median(counts),
                **{passes: _median(row[passes] for row in mine) for passes in ("forward", "backward")},
            }
        )
    return table


def _median(values: Iterable[Any]) -> float | None:
    known = np.asarray(list(values), float)
    return float(np.median(known)) if len(known) else None


def markdown(network: str, table: Sequence[dict[str, Any]]) -> str:
    """The table of a network."""

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    lines = [
        f"### {network}\n",
        "| attack | success | L0 | L1 | L2 | Linf x 255 | groups | forward | backward |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        linf = None if row["linf"] is None else 255 * row["linf"]
        cells = [number(row["l0"], 0), number(row["l1"], 2), number(row["l2"], 3), number(linf, 2)]
        cells += [number(row[key], 0) for key in ("groups", "forward", "backward")]
        lines.append(f"| `{row['attack']}` | {row['success']}/{row['pictures']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(
    networks: tuple[str, ...] = tuple(NETWORKS),
    limit: int | None = None,
    quick: bool = False,
    batch_size: int = 20,
    out: Path = Path("results/attack_table"),
) -> None:
    """Attacks and tabulates.

    Args:
        networks: Their names; weights must have been converted with `jaxinterp convert`.
        limit: Use only the first so many pictures.
        quick: Few steps.
        batch_size: Pictures that are attacked at once.
        out: Results directory.
    """
    tables: dict[str, list[dict[str, Any]]] = {}
    for name in networks:
        if name not in NETWORKS:
            raise SystemExit(f"unknown network {name!r}; known: {', '.join(NETWORKS)}")
        found = evaluate(
            [f"samples:{NETWORKS[name]}"],
            model=name,
            specs=specs(name, quick),
            out=out / name,
            limit=limit,
            batch_size=batch_size,
        )
        crop = data.Crop(found.network.image_size, found.network.crop_pct, found.network.interpolation)
        source = data.samples(NETWORKS[name], crop=crop)
        originals = {(item := source[i]).id: np.asarray(item.image) for i in range(len(source))}
        tables[name] = measure(found, originals)
        print(markdown(name, tables[name]), flush=True)
    (out / "table.md").write_text("\n".join(markdown(name, table) for name, table in tables.items()))
    (out / "table.json").write_text(json.dumps({"machine": machine(), "quick": quick, "tables": tables}, indent=1))
    print(f"{out}/table.md, {out}/table.json")


if __name__ == "__main__":
    tyro.cli(main)
