"""The batch size from 1 to the largest that fits into memory, and how fast each is.

Before a batch runs, its program is compiled and the compiler asked what memory it takes: a program that would not fit
is not run. Where memory gives out in spite of that, the batch counts as too large. Sizes double; between the last that
fits and the first that does not, halving finds the limit to within an eighth. Or the sizes are given. Other libraries
may run beside each, in turn.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxinterp.bench.timing import interleaved, middle, ratios, warmed

_USABLE = 0.9  # of the memory's limit


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """A batch size that is ready to be tried.

    Attributes:
        program: bytes that it takes by the compiler's account; None: not told, so it is tried.
        run: runs it once and returns its arrays.
        work: units of work in a run; a function where only a run tells.
        others: prepares what else does the same work, by name; called when it is clear that the batch fits.
    """

    program: int | None
    run: Callable[[], Any]
    work: float | int | Callable[[], float | int]
    others: Callable[[], Mapping[str, Callable[[], Any]]] = dict


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Attributes:
        rows: for every size that was timed: "batch", "seconds", "per_second", "program", and "others": by name,
            "per_second" and "over" (their time over ours), or None where their memory gave out.
        largest: the largest batch that fits; None where the sweep ended before, or sizes were given.
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
    batches: Sequence[int] = (),
    told: Callable[[Mapping[str, Any]], Any] = lambda row: None,
) -> Sweep:
    """Times batches until memory or patience ends.

    Args:
        make: prepares a batch size without allocating what a run takes.
        limit: bytes of memory; nine tenths are used.
        largest: the largest batch to try.
        seconds: no larger batch is timed once a run took longer.
        rounds: how often each is timed.
        batches: the sizes to try; none: from 1 on, doubling.
        told: is given every row as soon as it is there.

    Raises:
        ValueError: not even the smallest batch fits.
    """
    usable, rows = int(limit * _USABLE), []
    failed, ended = None, "largest"
    for batch in sorted(batches) or (1 << i for i in itertools.count()):
        if largest is not None and batch > largest:
            break
        row = _tried(make(batch), batch, usable, rounds)
        if row is None:
            failed, ended = batch, "memory"
            break
        rows.append(row)
        told(row)
        if row["seconds"]["median"] > seconds:
            ended = "time"
            break
    if not rows:
        smallest = min(batches, default=1)
        fewest = "one" if smallest == 1 else str(smallest)
        raise ValueError(f"--memory: not even a batch of {fewest} fits into {limit} bytes")
    if failed is None or batches:
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
            told(row)
    return Sweep(rows, fits, None, ended, limit)


def _tried(trial: Trial, batch: int, usable: int, rounds: int) -> dict[str, Any] | None:
    """A row, or None where the batch does not fit."""
    if trial.program is not None and trial.program > usable:
        return None
    if _exhausted(trial.run):
        return None
    others = dict(trial.others())
    without = [name for name, run in others.items() if _exhausted(run)]
    runs = {"": trial.run, **{name: run for name, run in others.items() if name not in without}}
    times = interleaved(runs, rounds)
    seconds = middle(times[""])
    work = trial.work() if callable(trial.work) else trial.work
    row = {"batch": batch, "seconds": seconds, "per_second": work / seconds["median"], "program": trial.program}
    row["others"] = {
        name: None
        if name in without
        else {
            "per_second": work / middle(times[name])["median"],
            "over": middle(ratios(times[name], times[""])),
        }
        for name in others
    }
    return row


def _exhausted(run: Callable[[], Any]) -> bool:
    """Runs it, and tells whether memory gave out."""
    try:
        warmed({"run": run})
    except (RuntimeError, MemoryError) as error:  # XLA's and PyTorch's are RuntimeErrors
        if isinstance(error, MemoryError) or re.search(r"RESOURCE_EXHAUSTED|out of memory", str(error)):
            return True
        raise
    return False


def _predicted(rows: list[dict[str, Any]], usable: int) -> int | None:
    """The batch whose program takes all memory, on the line through the last two programs."""
    if len(rows) < 2 or rows[-1]["program"] is None or rows[-2]["program"] is None:
        return None
    (b0, m0), (b1, m1) = ((row["batch"], row["program"]) for row in rows[-2:])
    each = (m1 - m0) / (b1 - b0)
    return max(b1, int(b1 + (usable - m1) / each)) if each > 0 else None


# JAX keeps what it has taken of a GPU, three quarters by default.
_NO_ROOM = {"gpu": "out of memory, of what JAX leaves it (XLA_PYTHON_CLIENT_PREALLOCATE=false: all it does not need)"}


def lines(row: Mapping[str, Any], unit: str) -> list[str]:
    """A row as text."""
    program = "" if row["program"] is None else f"{row['program'] / 2**20:10.1f} MiB"
    text = [f"batch {row['batch']:6}  {row['per_second']:12,.1f} {unit} a second  {program}".rstrip()]
    for name, other in row["others"].items():
        if other is None:
            told = _NO_ROOM.get(jax.default_backend(), "out of memory")
        else:
            told = f"{other['over']['median']:.2f} times our time"
        text.append(f"{'':14}{name}: {told}")
    return text


def ending(found: Sweep) -> str:
    """How a sweep ended, as text."""
    unit_of = ("GiB", 2**30) if found.limit >= 2**30 else ("MiB", 2**20)
    memory = f"{_USABLE:.0%} of {found.limit / unit_of[1]:.1f} {unit_of[0]}"
    if found.largest is not None:
        return f"the largest batch that fits into {memory}: {found.largest} (to within an eighth)"
    guess = "" if found.predicted is None else f"; {found.predicted:,} would fit into {memory}, as programs grow"
    why = {"time": "its time limit", "memory": f"memory: the next does not fit into {memory}"}
    return f"ended by {why.get(found.ended, 'the largest batch asked for')}{guess}"
