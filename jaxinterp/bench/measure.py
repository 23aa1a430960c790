"""From things to be timed to rows of a table: time, work a second, share of the peak, memory, energy, compilation."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxinterp.bench import device
from jaxinterp.bench.cost import Cost, cost, position, program_bytes
from jaxinterp.bench.device import Peak
from jaxinterp.bench.sweep import Trial
from jaxinterp.bench.timing import interleaved, middle, ratios, warmed

_ENERGY = 2.0  # seconds of repetition, since counters of energy are read a few times a second only


@dataclasses.dataclass(frozen=True)
class Account:
    """What one run of a task was, known when it has run.

    Attributes:
        work: units of work.
        cost: of all of it, by the compiler's account of the compiled program; None: not told.
        network: operations of the network alone as it is written, without what this library or the compiler add
            (padding that keeps the order of sums, for instance); None: not told.
        program: bytes that its largest program takes; None: not told.
    """

    work: float | int
    cost: Cost | None = None
    network: Cost | None = None
    program: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Something to be timed.

    Attributes:
        name: unique among the tasks of a record.
        run: does it once and returns its arrays, which are waited for.
        account: tells what a run was; called after the runs, so that what it compiles is not counted.
        unit: what is counted as work: "image steps", "images", "cells".
        form: the format it is computed in.
        devices: how many it runs on.
        over: name of the task that the time is divided by, and how often it counts.
        more: what else belongs in the row.
    """

    name: str
    run: Callable[[], Any]
    account: Callable[[], Account]
    unit: str
    form: str = "float32"
    devices: int = 1
    over: tuple[str, float | int] | None = None
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class Found:
    """What a subject found.

    Attributes:
        rows: see `measure`.
        changes: for every format but the first, what it changes in results, by name.
        trial: prepares a batch size, where the subject can be swept over them.
        swept: what is swept,
        form: in which format; "" is the first of the setting.
        notes: what a person should know.
        more: further entries of the record.
    """

    rows: list[dict[str, Any]]
    changes: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    trial: Callable[[int], Trial] | None = None
    swept: str = ""
    form: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)
    more: dict[str, Any] = dataclasses.field(default_factory=dict)


def program(function: Callable[..., Any], *args: Any) -> tuple[Cost | None, int | None]:
    """Cost and memory of a jitted function's program for these arguments, or for their shapes."""
    compiled = function.lower(*args).compile()  # type: ignore[attr-defined]  # what jax.jit returns
    return cost(compiled), program_bytes(compiled)


def as_written(function: Callable[..., Any], *args: Any) -> Cost | None:
    """The cost of a function before the compiler changes it, as CPUs would compute it; nothing is compiled.

    Other backends do not tell. None where there is no CPU (`JAX_PLATFORMS=cuda` without it).
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), args)
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
    with jax.default_device(cpu):
        return cost(jax.jit(function).lower(*shapes))


def measure(tasks: Sequence[Task], *, rounds: int, peak: Callable[[str], Peak]) -> list[dict[str, Any]]:
    """Runs every task once to compile it, then all in turn, and returns a row for each, as JSON holds it.

    Args:
        tasks: what to time.
        rounds: how often.
        peak: the device's peak in a format.
    """
    runs = {task.name: task.run for task in tasks}
    compiling, times = warmed(runs), interleaved(runs, rounds)
    meters = {number: device.energy_meter(number) for number in sorted({task.devices for task in tasks})}
    rows = []
    for task in tasks:
        seconds, made, account = middle(times[task.name]), compiling[task.name], task.account()
        row: dict[str, Any] = {
            "name": task.name,
            "format": task.form,
            "devices": task.devices,
            "seconds": seconds,
            "compile": {"seconds": made.seconds, "programs": made.programs, "from cache": made.cached},
            "work": account.work,
            "unit": task.unit,
            "per_second": account.work / seconds["median"],
            **task.more,
        }
        devices = 1 if jax.default_backend() == "cpu" else task.devices  # those of a CPU share its cores
        if account.cost is not None:
            row |= _position(account.cost, seconds["median"], peak(task.form), devices)
        if account.network is not None:
            useful = position(account.network, seconds["median"], peak(task.form), devices)
            row |= {"network_flops": account.network.flops, "network_share_of_peak": useful.share_of_peak}
        if task.over is not None:
            other, count = task.over
            row["over"] = {"what": other, "times": count}
            row["over"] |= middle([r / count for r in ratios(times[task.name], times[other])])
        if (meter := meters[task.devices]) is not None:
            joules = _joules(task.run, meter)
            row["joules"] = {"of a run": joules, "of a unit of work": joules / account.work}
        used = device.memory_used()
        row["memory"] = {"program": account.program, "peak": used.bytes, "of": used.of}
        rows.append(row)
    return rows


def _position(spent: Cost, seconds: float, peak: Peak, devices: int) -> dict[str, Any]:
    found = position(spent, seconds, peak, devices)
    row = {"flops": spent.flops, "bytes": spent.bytes, **dataclasses.asdict(found)}
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}


def _joules(run: Callable[[], Any], meter: Callable[[], float]) -> float:
    """Of one run, from as many as take a while."""
    count, began, before = 0, time.perf_counter(), meter()
    while time.perf_counter() - began < _ENERGY:
        jax.block_until_ready(run())
        count += 1
    return (meter() - before) / count


COLUMNS = ("", "ms", "a second", "GFLOP/s", "of peak", "useful", "FLOP/B", "bound", "compile s", "program MiB")


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows as aligned text: medians with quartiles."""
    cells = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    return ["  ".join(map(_aligned, line, widths, range(len(line)))).rstrip() for line in cells]


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column else cell.ljust(width)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    s, made = row["seconds"], row["compile"]
    program = row["memory"]["program"]
    compile_seconds = f"{made['seconds']:.1f}" + ("*" if made["from cache"] else "")

    def given(key: str, text: Callable[[Any], str]) -> str:
        return "" if row.get(key) is None else text(row[key])

    return (
        row["name"],
        f"{s['median'] * 1e3:.2f} ({s['low'] * 1e3:.2f} to {s['high'] * 1e3:.2f})",
        f"{_short(row['per_second'])} {row['unit']}",
        given("flops_per_second", lambda x: f"{x / 1e9:.1f}"),
        given("share_of_peak", lambda x: f"{x:.1%}"),
        given("network_share_of_peak", lambda x: f"{x:.1%}"),
        given("intensity", lambda x: f"{x:.1f}"),
        given("bound", str),
        compile_seconds,
        "" if program is None else f"{program / 2**20:.1f}",
    )


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
