"""The batch size from 1 to the largest that fits into memory, and how fast each is.

Before a batch runs, its program is compiled and the compiler asked what memory it takes: a program that would not fit
is not run. Where memory gives out in spite of that, the batch counts as too large. Sizes double; between the last that
fits and the first that does not, halving finds the limit to within an eighth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxinterp.bench.timing import interleaved, middle, warmed

_USABLE = 0.9  # of the memory's limit


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """A batch size that is ready to be tried.

    Attributes:
        program: bytes that it takes by the compiler's account; None: not told, so it is tried.
        run: runs it once and returns its arrays.
        work: units of work in a run.
    """

    program: int | None
    run: Callable[[], Any]
    work: float | int


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Attributes:
        rows: for every size that was timed: "batch", "seconds", "per_second", "program".
        largest: the largest batch that fits; None where the sweep ended before.
        predicted: where it ended before, what program sizes, which grow in proportion, say it would be.
        ended: why it ended: "memory", "time" or "largest".
        limit: bytes that programs may take.
    """

    rows: list[dict[str, Any]]
    largest: int | None
    predicted: int | None
    ended: str
    limit: int


def sweep(
    make: Callable[[int], Trial],
    *,
    limit: int,
    largest: int | None = None,
    seconds: float | int = 10.0,
    rounds: int = 3,
) -> Sweep:
    """Times doubling batches until memory or patience ends.

    Args:
        make: prepares a batch size without allocating what a run takes.
        limit: bytes of memory; nine tenths are used.
        largest: the largest batch to try.
        seconds: no larger batch is timed once a run took longer.
        rounds: how often each is timed.

    Raises:
        ValueError: not even a batch of one fits.
    """
    usable, rows = int(limit * _USABLE), []
    batch, failed, ended = 1, None, "largest"
    while largest is None or batch <= largest:
        row = _tried(make(batch), batch, usable, rounds)
        if row is None:
            failed, ended = batch, "memory"
            break
        rows.append(row)
        if row["seconds"]["median"] > seconds:
            ended = "time"
            break
        batch *= 2
    if not rows:
        raise ValueError(f"--memory: not even a batch of one fits into {limit} bytes")
    if failed is None:
        return Sweep(rows, None, _predicted(rows, usable), ended, limit)
    fits = rows[-1]["batch"]
    while failed - fits > max(1, fits // 8):
        middle_batch = (fits + failed) // 2
        row = _tried(make(middle_batch), middle_batch, usable, rounds)
        if row is None:
            failed = middle_batch
        else:
            fits = middle_batch
            rows.append(row)
    return Sweep(rows, fits, None, ended, limit)


def _tried(trial: Trial, batch: int, usable: int, rounds: int) -> dict[str, Any] | None:
    """A row, or None where the batch does not fit."""
    if trial.program is not None and trial.program > usable:
        return None
    try:
        warmed({"run": trial.run})
        seconds = middle(interleaved({"run": trial.run}, rounds)["run"])
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            return None
        raise
    return {"batch": batch, "seconds": seconds, "per_second": trial.work / seconds["median"], "program": trial.program}


def _predicted(rows: list[dict[str, Any]], usable: int) -> int | None:
    """The batch whose program takes all memory, on the line through the last two programs."""
    if len(rows) < 2 or rows[-1]["program"] is None or rows[-2]["program"] is None:
        return None
    (b0, m0), (b1, m1) = ((row["batch"], row["program"]) for row in rows[-2:])
    each = (m1 - m0) / (b1 - b0)
    return max(b1, int(b1 + (usable - m1) / each)) if each > 0 else None


def lines(found: Sweep, unit: str) -> list[str]:
    """A sweep as text."""
    text = []
    for row in sorted(found.rows, key=lambda row: row["batch"]):
        program = "" if row["program"] is None else f"{row['program'] / 2**20:10.1f} MiB"
        text.append(f"batch {row['batch']:6}  {row['per_second']:12,.1f} {unit} a second  {program}")
    unit_of = ("GiB", 2**30) if found.limit >= 2**30 else ("MiB", 2**20)
    memory = f"{_USABLE:.0%} of {found.limit / unit_of[1]:.1f} {unit_of[0]}"
    if found.largest is not None:
        return [*text, f"the largest batch that fits into {memory}: {found.largest} (to within an eighth)"]
    why = "its time limit" if found.ended == "time" else "the largest batch asked for"
    guess = "" if found.predicted is None else f"; {found.predicted:,} would fit into {memory}, as programs grow"
    return [*text, f"ended by {why}{guess}"]
