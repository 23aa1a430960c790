"""Wall-clock times that can be compared: in turn, synchronised, medians with quartiles.

Absolute times are not stable on shared machines. What is compared runs in one process, in turn, so that whatever else
the machine does falls on all alike; a ratio is the median of the ratios of the rounds.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax


def interleaved(
    functions: Mapping[str, Callable[[], Any]], rounds: int, *, least: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of every function in every round; each round runs all of them, each one first in its turn.

    What a function returns is waited for: JAX hands arrays out before they are computed.

    Args:
        functions: what is timed.
        rounds: how often.
        least: seconds for which a function is repeated in a round, whose mean is taken. What ran before leaves threads
            that are still waiting for work, of which a short function would have its share.
    """
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start, runs, spent = time.perf_counter(), 0, 0.0
            while not runs or spent < least:
                jax.block_until_ready(functions[name]())
                runs, spent = runs + 1, time.perf_counter() - start
            times[name].append(spent / runs)
    return times


def ratios(times: Sequence[float], references: Sequence[float]) -> list[float]:
    """Round by round, so that what slows a whole round cancels."""
    return [a / b for a, b in zip(times, references, strict=True)]


def middle(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, as "median", "low" and "high"."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median, "low": low, "high": high}


def shown(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """Median and quartiles as text."""
    m = {name: f"{value * scale:.{digits}f}" for name, value in middle(values).items()}
    return f"{m['median']} ({m['low']} to {m['high']})"


def verdict(value: float, target: float | int) -> str:
    """Whether `value` is at most `target`, as text."""
    return f"target <= {target:g}: {'met' if value <= target else 'NOT met'}"


@dataclasses.dataclass
class Compiling:
    """What JAX did to make programs while it was watched.

    Attributes:
        seconds: from Python to machine code: tracing, lowering, compiling (or reading from the persistent cache).
        programs: how many executables were asked for.
        cached: how many of them the persistent cache had, so that nothing was compiled.
    """

    seconds: float = 0.0
    programs: int = 0
    cached: int = 0

    @property
    def compiled(self) -> int:
        """How many programs were really compiled."""
        return self.programs - self.cached


@contextmanager
def watching_compiler() -> Iterator[Compiling]:
    """Counts and times compilations of this process inside the block."""
    seen = Compiling()

    def duration(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            seen.seconds += duration_secs
            seen.programs += event.endswith("backend_compile_duration")

    def happened(event: str, **kwargs: str | int) -> None:
        seen.cached += event == "/jax/compilation_cache/cache_hits"

    jax.monitoring.register_event_duration_secs_listener(duration)
    jax.monitoring.register_event_listener(happened)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(duration)
        jax.monitoring.unregister_event_listener(happened)


def warmed(functions: Mapping[str, Callable[[], Any]]) -> dict[str, Compiling]:
    """Runs every function once, to its end, and tells what had to be compiled for it."""
    found = {}
    for name, function in functions.items():
        with watching_compiler() as found[name]:
            jax.block_until_ready(function())
    return found
