"""What networks there are, and which of them have weights here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from jaxinterp import models
from jaxinterp.weights import checkpoint, recipes

_HEADINGS = ("network", "parameters", "input", "nodes", "CAM node", "checkpoint", "digest", "licence of the weights")


def rows(root: Path | None = None) -> Iterator[tuple[str, ...]]:
    """One row for every network, under the headings of `table`.

    Under "digest" stands whether the file that a checkpoint came from is a known one; without a checkpoint, whether
    the digest of such a file is on record.

    Args:
        root: folder of checkpoints; None means `checkpoint.default_root()`.
    """
    root = checkpoint.default_root() if root is None else root
    known = checkpoint.known_digests(root)
    for name in models.ARCHITECTURES:
        network = models.network(name)
        trained = {
            key: spec for key, spec in models.shapes(name).items() if not key.endswith(("running_mean", "running_var"))
        }
        present, digest = "no", "on record" if name in known else "-"
        if (root / name).is_dir():
            try:
                found = checkpoint.read_manifest(root / name, name=name)["source"].get("sha256")
                present, digest = "yes", "known" if found == known.get(name, {}).get("sha256") else "not known"
            except ValueError:
                present = "damaged"
        yield (
            name,
            f"{sum(math.prod(spec.shape) for spec in trained.values()):,}",
            str(network.image_size),
            str(len(network.nodes)),
            network.cam_node or "-",
            present,
            digest,
            recipes.RECIPES[name].license if name in recipes.RECIPES else "-",
        )


def table(root: Path | None = None) -> Iterator[str]:
    """The networks as lines of text, with headings."""
    body = [_HEADINGS, *rows(root)]
    widths = [max(len(row[column]) for row in body) for column in range(len(_HEADINGS))]
    for row in body:
        cells = [
            cell.rjust(width) if column in (1, 2, 3) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
