"""What a compiled program costs by the compiler's own account, and where that puts it on the roofline.

Williams, Waterman, Patterson, "Roofline" (CACM 2009): a program of I operations a byte reaches at most
min(peak, I x bandwidth) operations a second. Operations and bytes come from `cost_analysis`, which counts the body of a
loop once, whatever the number of iterations: of an attack's loop it tells the cost of one step. On several devices
it tells the share of one.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from jaxinterp.bench.device import Peak

COLLECTIVES = (
    *("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute", "collective-broadcast"),
    "ragged-all-to-all",
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one program, or of several runs of it.

    Attributes:
        flops: floating-point operations.
        bytes: bytes read and written, of every operation by itself.
    """

    flops: float | int
    bytes: float | int

    def times(self, runs: float | int) -> Cost:
        """The cost of several runs."""
        return Cost(self.flops * runs, self.bytes * runs)


def cost(program: Any) -> Cost | None:
    """The cost of a compiled (or lowered) program; None where the backend does not tell."""
    try:
        found: Any = program.cost_analysis()
    except NotImplementedError:
        return None
    found = found[0] if isinstance(found, list | tuple) and found else found
    if not found or found.get("flops", 0) <= 0:
        return None
    return Cost(float(found["flops"]), float(found.get("bytes accessed", 0)))


def program_bytes(program: Any) -> int | None:
    """Memory that one run of a compiled program takes: arguments, results and temporaries; None: not told."""
    found = program.memory_analysis()
    if found is None:
        return None
    parts = (found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes)
    return int(sum(parts)) - int(found.alias_size_in_bytes)


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a program stands.

    Attributes:
        flops_per_second: operations a second that it reached.
        share_of_peak: of the peak in its format.
        intensity: operations a byte; NaN where bytes are unknown.
        bound: "compute" or "memory", what limits it.
        share_of_roof: of what that limit allows.
    """

    flops_per_second: float
    share_of_peak: float
    intensity: float
    bound: str
    share_of_roof: float


def position(spent: Cost, seconds: float | int, peak: Peak, devices: int = 1) -> Position:
    """The position of a program that cost `spent` and took `seconds` on a number of devices of a given peak each."""
    reached, peaks = spent.flops / seconds, peak.flops * devices
    intensity = spent.flops / spent.bytes if spent.bytes else float("nan")
    roof = min(peaks, intensity * peak.bandwidth * devices) if spent.bytes else peaks
    bound = "memory" if intensity < peak.ridge else "compute"
    return Position(reached, reached / peaks, intensity, bound, reached / roof)


@dataclasses.dataclass(frozen=True)
class Communication:
    """Collective operations in a program.

    Attributes:
        total: all of them.
        in_loops: those that run once an iteration of some loop.
    """

    total: int
    in_loops: int


def collectives(text: str) -> Communication:
    """Counts the collectives of a compiled program, from its text (`compiled.as_text()`).

    An operation that begins and ends asynchronously counts once. Raises ValueError where the text is no HLO module.
    """
    bodies: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in text.splitlines():
        opened = re.match(r"\s*(?:ENTRY\s+)?%?([\w.\-]+)\s*\(.*\)\s*->\s*.*\{\s*$", line)
        if opened and "=" not in line.split("(", 1)[0]:
            current = bodies.setdefault(opened[1], [])
        elif line.strip() == "}":
            current = None
        elif current is not None:
            current.append(line)
    if not bodies:
        raise ValueError("not the text of an HLO module: it has no computations")
    own = {name: sum(map(_is_collective, lines)) for name, lines in bodies.items()}
    calls = {name: [c for line in lines for c in _called(line) if c in bodies] for name, lines in bodies.items()}
    loops = [c for lines in bodies.values() for line in lines if " while(" in line for c in _called(line)]
    inside: set[str] = set()
    waiting = [name for name in loops if name in bodies]
    while waiting:
        name = waiting.pop()
        if name not in inside:
            inside.add(name)
            waiting += calls[name]
    return Communication(sum(own.values()), sum(own[name] for name in inside))


_OPERATION = re.compile(rf"=\s.*?\s({'|'.join(COLLECTIVES)})(-start)?\(")


def _is_collective(line: str) -> bool:
    return _OPERATION.search(line) is not None


def _called(line: str) -> list[str]:
    """The computations that an operation runs."""
    found = re.findall(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", line)
    for group in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line):
        found += [name.strip().lstrip("%") for name in group.split(",")]
    return found
