"""Figures of benchmarks: the roofline, the batch size, the number of devices.

As everywhere, a figure is a `matplotlib.figure.Figure` of its own; `jaxinterp.plots.save` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from jaxinterp.plots import LINES, STYLE, quiet

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")


@style.context(STYLE)
def roofline(
    rows: Sequence[Mapping[str, Any]], peaks: Mapping[str, Mapping[str, Any]], *, device: str
) -> Figure | None:
    """Measurements under the roofs of their formats, operations a second against operations a byte.

    Args:
        rows: see `jaxinterp.bench.measure.measure`; those without operations and bytes are left out.
        peaks: by format, with the fields of `jaxinterp.bench.device.Peak`.
        device: what it is called.

    Returns:
        None where no row tells operations and bytes.
    """
    rows = [row for row in rows if row.get("intensity") and row["devices"] == 1]
    if not rows:
        return None
    forms = [form for form in peaks if any(row["format"] == form for row in rows)]
    names = list(dict.fromkeys(_without_form(row) for row in rows))
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    axes = figure.subplots()
    x = np.array([row["intensity"] for row in rows])
    ridges = [peaks[form]["flops"] / peaks[form]["bandwidth"] for form in forms]
    low, high = min(x.min(), *ridges) / 4, max(x.max(), *ridges) * 4
    intensity = np.geomspace(low, high, 200)
    for form in forms:
        roof = np.minimum(peaks[form]["flops"], intensity * peaks[form]["bandwidth"]) / 1e9
        label = f"{form} roof, {peaks[form]['source']}: {_si(peaks[form]['flops'])}FLOP/s, "
        label += f"{_si(peaks[form]['bandwidth'])}B/s"
        axes.plot(intensity, roof, color=_colour(forms, form), linewidth=1.6, label=label)
    for row in rows:
        name = _without_form(row)
        axes.plot(
            row["intensity"],
            row["flops_per_second"] / 1e9,
            linestyle="none",
            marker=_MARKERS[names.index(name) % len(_MARKERS)],
            markersize=7,
            markerfacecolor=_colour(forms, row["format"]),
            markeredgecolor="#111111",
            markeredgewidth=0.7,
        )
    for name in names:
        marker = _MARKERS[names.index(name) % len(_MARKERS)]
        axes.plot(
            [], [], linestyle="none", marker=marker, markerfacecolor="#cccccc", markeredgecolor="#111111", label=name
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(
        top=2 * max(*(peaks[form]["flops"] for form in forms), *(row["flops_per_second"] for row in rows)) / 1e9
    )
    axes.set_xlabel("operations a byte")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"Roofline of {device}; operations and bytes by the compiler's account", size=10.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    quiet(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8.5)
    return figure


def _without_form(row: Mapping[str, Any]) -> str:
    return row["name"].removesuffix(f" {row['format']}")


def _colour(forms: Sequence[str], form: str) -> str:
    return LINES[forms.index(form) % len(LINES)]


def _si(value: float) -> str:
    for power, prefix in ((12, "T"), (9, "G"), (6, "M")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g} "


@style.context(STYLE)
def batches(rows: Sequence[Mapping[str, Any]], *, what: str, unit: str, limit: int) -> Figure:
    """Work a second and memory against the batch size.

    Args:
        rows: of `jaxinterp.bench.sweep.Sweep`.
        what: was run.
        unit: of work.
        limit: bytes of memory there are.
    """
    rows = sorted(rows, key=lambda row: row["batch"])
    size = np.array([row["batch"] for row in rows])
    known = [row for row in rows if row["program"] is not None]
    figure = Figure(figsize=(9.0 if known else 4.8, 3.6), layout="constrained")
    panels = figure.subplots(1, 2 if known else 1, squeeze=False)[0]
    seconds = {key: np.array([row["seconds"][key] for row in rows]) for key in ("median", "low", "high")}
    work = np.array([row["per_second"] for row in rows]) * seconds["median"]
    panels[0].fill_between(size, work / seconds["high"], work / seconds["low"], color=LINES[0], alpha=0.16, linewidth=0)
    names = list(dict.fromkeys(name for row in rows for name in row["others"]))
    ours = "jaxinterp" if names else None
    panels[0].plot(size, work / seconds["median"], color=LINES[0], linewidth=1.8, marker="o", markersize=4, label=ours)
    for i, name in enumerate(names, 2):
        there = [row for row in rows if row["others"].get(name)]
        rate = [row["others"][name]["per_second"] for row in there]
        color = LINES[i % len(LINES)]
        panels[0].plot([row["batch"] for row in there], rate, color=color, marker="s", markersize=3.5, label=name)
    if names:
        panels[0].legend(frameon=False, fontsize=8)
    panels[0].set_ylabel(f"{unit} a second")
    panels[0].set_ylim(bottom=0)
    if known:
        memory = np.array([row["program"] for row in known]) / 2**20
        panels[1].plot([row["batch"] for row in known], memory, color=LINES[1], linewidth=1.8, marker="o", markersize=4)
        panels[1].set_yscale("log", base=2)
        if limit / 2**20 < 100 * memory.max():
            panels[1].axhline(limit / 2**20, color="#111111", linestyle="--", linewidth=1.2)
            panels[1].annotate("memory there is", (size[0], limit / 2**20), xytext=(0, -11), textcoords="offset points")
        panels[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panels[1].yaxis.set_minor_formatter(NullFormatter())
        panels[1].set_ylabel("program, MiB")
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("batch")
        quiet(axes)
    figure.suptitle(what, size=10.5)
    return figure


@style.context(STYLE)
def scaling(rows: Sequence[Mapping[str, Any]], *, what: str, device: str) -> Figure:
    """Speed-up with the number of devices, strong and weak, beside the ideal.

    Args:
        rows: of `jaxinterp.bench.scaling.bench`.
        what: was run.
        device: what the devices are called.
    """
    figure = Figure(figsize=(5.6, 4.0), layout="constrained")
    axes = figure.subplots()
    for i, kind in enumerate(("strong", "weak")):
        some = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["devices"])
        label = {"strong": "strong: the same batch", "weak": "weak: the same share for each"}[kind]
        number, speedup = [row["devices"] for row in some], [row["speedup"] for row in some]
        axes.plot(number, speedup, color=LINES[i], linewidth=1.8, marker="os"[i], markersize=5, label=label)
    numbers = sorted({row["devices"] for row in rows})
    axes.plot(numbers, numbers, color="#111111", linestyle="--", linewidth=1.2, label="ideal", zorder=1)
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(6, min_n_ticks=3))
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"devices ({device})")
    axes.set_ylabel("speed-up over one device")
    axes.set_title(what, size=10.5)
    quiet(axes)
    axes.legend(loc="upper left", frameon=False)
    return figure
