"""What a compiled program costs by the compiler's own account, and where that puts it on the roofline.

Williams, Waterman, Patterson, "Roofline" (CACM 2009): a program of I operations a byte reaches at most
min(peak, I x bandwidth) operations a second. Operations and bytes come from `cost_analysis`, which counts the body of a
loop once, whatever the number of iterations: of an attack's loop it tells the cost of one step. On several devices
it tells the share of one. It counts nothing for calls of libraries, which convolutions are on NVIDIA GPUs (cuDNN), and
products of large matrices (cuBLAS); these are counted here, from the text of the program.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax

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
    except NotImplementedError:  # what JAX raises where a backend has no such analysis
        return None
    found = found[0] if isinstance(found, list | tuple) and found else found
    calls = library_calls(program.as_text() or "") if isinstance(program, jax.stages.Compiled) else Cost(0, 0)
    if not found or found.get("flops", 0) + calls.flops <= 0:
        return None
    return Cost(float(found.get("flops", 0) + calls.flops), float(found.get("bytes accessed", 0) + calls.bytes))


# ---- Calls of libraries on NVIDIA GPUs ----------------------------------------------------------------------

_DEFINED = re.compile(r"^\s*(?:ROOT\s+)?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(([^)]*)\)(.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_WIDTHS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class _Shape:
    sides: tuple[int, ...]
    bits: int

    @property
    def bytes(self) -> float:
        return math.prod(self.sides) * self.bits / 8


def library_calls(text: str) -> Cost:
    """What cuDNN's convolutions and cuBLAS's products in a compiled program cost, by the text of the program.

    As `cost_analysis` counts others: a product and a sum are two operations, positions of padding are left out, every
    operand is read and the result written once.
    """
    shapes: dict[str, _Shape] = {}
    flops = size = 0.0
    for line in text.splitlines():
        if (found := _DEFINED.match(line)) is None:
            continue
        name, result, operation, operands, rest = found.groups()
        if (array := _ARRAY.search(result)) is not None:  # the first of a tuple is the result, others work space
            sides = tuple(int(side) for side in array[2].split(",") if side)
            bits = _WIDTHS.get(array[1]) or int((re.findall(r"\d+", array[1]) or ["32"])[0])
            shapes[name] = _Shape(sides, bits)
        target = re.search(r'custom_call_target="__(cudnn\$conv\w+|cublas\$\S*?)"', rest)
        if operation != "custom-call" or target is None:
            continue
        given = [shapes.get(part.split()[-1].lstrip("%")) for part in operands.split(",") if part.strip()]
        known = [shape for shape in given if shape is not None]
        of_call = (_convolution if target[1].startswith("cudnn") else _product)(target[1], shapes[name], known, rest)
        if of_call is not None:
            flops += of_call
            size += shapes[name].bytes + sum(shape.bytes for shape in known)
    return Cost(flops, size)


def _convolution(target: str, result: _Shape, operands: list[_Shape], rest: str) -> float | None:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    if labels is None or len(operands) < 2:
        return None
    # (images, kernel, feature maps), as the forward convolution has them.
    images, kernel, maps = {
        "cudnn$convBackwardInput": (result, operands[1], operands[0]),
        "cudnn$convBackwardFilter": (operands[0], result, operands[1]),
    }.get(target, (operands[0], operands[1], result))
    lhs, rhs, out = (
        dict(zip(label, shape.sides, strict=True))
        for label, shape in zip(labels.groups(), (images, kernel, maps), strict=True)
    )
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", rest) or [""])[0]))
    products = out["b"] * out["f"] * rhs["i"]
    for axis, label in enumerate(sorted(label for label in out if label.isdigit())):
        step, spread, hole = (_entry(window, key, axis, 1) for key in ("stride", "rhs_dilate", "lhs_dilate"))
        before = _entry(window, "pad", axis, 0)
        products *= sum(
            0 <= (place := o * step + k * spread - before) < (lhs[label] - 1) * hole + 1 and place % hole == 0
            for o in range(out[label])
            for k in range(rhs[label])
        )
    return 2.0 * products


def _entry(window: Mapping[str, str], key: str, axis: int, default: int) -> int:
    """Of one axis, as in stride=2x2 or pad=3_3x3_3, where the first number counts."""
    return int(window[key].split("x")[axis].split("_")[0]) if key in window else default


def _product(target: str, result: _Shape, operands: list[_Shape], rest: str) -> float | None:
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', rest)
    if contracted is None or not operands:
        return None
    axes = [int(axis.strip('" ')) for axis in contracted[1].split(",") if axis.strip()]
    return 2.0 * math.prod(result.sides) * math.prod(operands[0].sides[axis] for axis in axes)


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
