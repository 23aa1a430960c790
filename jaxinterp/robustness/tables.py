"""Tables of an evaluation: a row for every picture and attack, and the summary with its intervals."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxinterp.network import Network
from jaxinterp.robustness.compute import NORMS, image_path
from jaxinterp.statistics import Estimate, proportion

COLUMNS = (
    *("id", "attack", "label", "label_name", "label_predicted"),
    *("target", "target_name", "success", "adversarial_class"),
    *(*NORMS, "first_success", "forward", "backward"),
    *("rounded_success", "rounded_class", "rounded_linf", "rounded_l2", "rounded_inside"),
    "image",
)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
ALL = "all attacks together"


def rows(
    network: Network, attack: str, arrays: Mapping[str, np.ndarray], *, unlabelled: Collection[str], images: bool
) -> Iterator[dict[str, Any]]:
    """One row for every picture of a chunk, with the columns `COLUMNS`; no target of an untargeted attack.

    Args:
        network: the network.
        attack: name of the attack.
        arrays: of the chunk.
        unlabelled: ids of pictures whose label is the network's own prediction.
        images: whether the adversarial images are stored: `image` is then the PNG of a success.
    """
    for i, name in enumerate(arrays["ids"]):
        target = int(arrays["targets"][i])
        yield {
            "id": str(name),
            "attack": attack,
            "label": int(arrays["labels"][i]),
            "label_name": network.class_name(int(arrays["labels"][i])),
            "label_predicted": str(name) in unlabelled,
            "target": target if target >= 0 else None,
            "target_name": network.class_name(target) if target >= 0 else None,
            "first_success": arrays["iterations"][i],
            **{key: arrays[key][i] for key in COLUMNS if key in arrays},
            "image": image_path(attack, str(name)).as_posix() if images and arrays["success"][i] else None,
        }


def summarise(
    table: Sequence[Mapping[str, Any]], names: Sequence[str], *, labelled: int, correct: int
) -> list[dict[str, Any]]:
    """One row for every attack, and one for all together where there are several.

    Args:
        table: the rows of all pictures and attacks.
        names: of the attacks.
        labelled: how many pictures could be read.
        correct: how many of them the network classifies correctly; these were attacked.

    Returns:
        For every attack: `success` among the attacked, `robust` the accuracy under attack among all that could be
        read, both with exact 95 % intervals (Clopper and Pearson) and again after rounding to 8 bits; `outside`, how
        many of the successes that remain then have left the attack's ball; quantiles of the norms of the successes
        before; median passes. An attack together with others succeeds where one of them does.
    """
    summary = []
    for name in [*names, ALL] if len(names) > 1 else names:
        mine = [row for row in table if row["attack"] == name or name == ALL]
        entry: dict[str, Any] = {"attack": name, "pictures": correct}
        for key in ("", "rounded_"):
            entry[f"{key}success"] = proportion(len({row["id"] for row in mine if row[f"{key}success"]}), correct)
            # A success leaves the label's decision region, whatever its target; one that has lost its confidence or its
            # target by rounding may still have.
            broken = {row["id"] for row in mine if row["success"] and (not key or row["rounded_class"] != row["label"])}
            entry[f"{key}robust"] = proportion(correct - len(broken), labelled)
        good = [row for row in mine if row["success"]]
        if name != ALL:
            entry["outside"] = sum(bool(row["rounded_success"] and not row["rounded_inside"]) for row in mine)
            for norm in NORMS:
                values = [float(row[norm]) for row in good]
                entry[norm] = [float(q) for q in np.quantile(values, QUANTILES)] if values else None
            for passes in ("forward", "backward"):
                entry[passes] = float(np.median([row[passes] for row in mine])) if mine else None
        summary.append(entry)
    return summary


def as_json(summary: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The summary with estimates as dicts; None for those of nothing."""

    def plain(value):
        if isinstance(value, Estimate):
            if value.count == 0:
                return None
            return {"value": value.mean, "low": value.low, "high": value.high, "count": value.count}
        return value

    return [{key: plain(value) for key, value in row.items()} for row in summary]


def lines(summary: Sequence[Mapping[str, Any]], *, clean: Estimate, predicted: int) -> Iterator[str]:
    """The summary as lines of text.

    Args:
        summary: as of `summarise`.
        clean: accuracy on the clean pictures; of none where all labels are predicted.
        predicted: how many labels are the network's own predictions.
    """
    if clean.count:
        yield f"\naccuracy on clean pictures  {clean:.1%}"
        if predicted:
            yield f"  {predicted} of {clean.count} labels are the network's own predictions, which count as right"
    else:
        yield "\naccuracy on clean pictures  unknown, as all labels are the network's own predictions"
        yield "  robust accuracy is the share of pictures that keep them"
    for row in summary:
        yield f"\n{row['attack']}"
        yield f"  success           {row['success']:.1%}   after rounding to 8 bits {row['rounded_success']:.1%}"
        yield f"  robust accuracy   {row['robust']:.1%}   after rounding to 8 bits {row['rounded_robust']:.1%}"
        if row.get("outside"):
            yield f"  after rounding    {row['outside']} of the successes lie outside of the attack's ball"
        if row.get("forward") is not None:
            yield f"  median passes     {row['forward']:.0f} forward, {row['backward']:.0f} backward"
        if row.get("l2") is not None:
            yield "  quantiles         " + "".join(f"{q:>11.0%}" for q in QUANTILES)
            for norm in NORMS:
                yield f"    {norm:<16}" + "".join(f"{value:>11.4g}" for value in row[norm])
