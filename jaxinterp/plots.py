"""Figures: one picture under attack, kinds of cells per attack, effects against norms, shares from row to column.

The notation is that of "Interpreting Adversarial Examples by Activation Promotion and Suppression" (arXiv
1904.02057): x₀ is the original picture, x′ the adversarial one, δ = x′ - x₀; t₀ is the true class, t the
target; s and p are the suppression and the promotion of a cell, PSR = log2(p / s); F(x, c) is the class
activation map of class c, whose positions add up to the logit of c without its bias. The four maps of a
picture share one colour scale: scaled one by one they could not be compared.

Every function builds a `matplotlib.figure.Figure` by itself. pyplot is not touched, and the caller's rcParams
are neither changed nor followed. `save` writes the same bytes for the same figure.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import os
import re
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.textpath import TextToPath
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import ArrayLike
from PIL import Image

from jaxinterp.effect import PAPER, Cell, Definition, sides
from jaxinterp.runs import replacing
from jaxinterp.statistics import Estimate, spearman

KINDS = ("none", "suppression", "balanced", "promotion")
"""Names of the kinds of cells; a kind's code is its position."""

# Blue, yellow and vermillion of Okabe and Ito's palette: apart in hue for the usual colour deficiencies, and
# yellow apart from both in lightness.
COLOURS = {"none": "#999999", "suppression": "#0072B2", "balanced": "#F0E442", "promotion": "#D55E00"}

RATIO_LIMIT = 10.0
"""Where infinite ratios (s = 0 or p = 0) are drawn."""

_FONT = "DejaVu Sans"  # comes with matplotlib, so that a figure does not depend on installed fonts
# matplotlib's defaults first, so that nothing depends on the settings of the caller or of the machine.
STYLE: list[Any] = [
    "default",
    {
        "font.family": _FONT,
        "text.color": "#111111",
        "axes.labelcolor": "#111111",
        "axes.edgecolor": "#555555",
        "axes.titlesize": 10.0,
        "xtick.labelsize": 9.0,
        "ytick.labelsize": 9.0,
        "xtick.color": "#333333",
        "ytick.color": "#333333",
        "legend.fontsize": 10.0,
    },
]
MAP_COLOURS = "viridis"
DIFFERENCE_COLOURS = "PuOr_r"  # no blue and no red: those stand for kinds of cells
_OPACITY = 0.7  # of a map over its picture
_MUTED = "#555555"


# ---- One picture -------------------------------------------------------------------------------------------


@style.context(STYLE)
def explanation(
    *,
    original: ArrayLike,
    adversarial: ArrayLike,
    kind: ArrayLike,
    suppression: ArrayLike,
    promotion: ArrayLike,
    maps: ArrayLike,
    true_name: str,
    target_name: str,
    predicted_name: str,
    attack: str,
    cell: Cell,
    subtitle: str = "",
    definition: Definition = PAPER,
    method: str = "cam",
) -> Figure:
    """What one perturbation does to one picture, as two rows of five panels.

    The first row belongs to the true class, the second to the target. From left to right: the pictures; the
    perturbation above the cells coloured by kind; F(x₀, ·); F(x′, ·); and their difference, which is the
    suppression in the first row and the promotion in the second.

    Args:
        original: x₀, [H,W,3], [H,W,1] or [H,W], in [0, 1].
        adversarial: x′, as `original`.
        kind: [gh,gw] codes, the positions in `KINDS`, as many as cells tile the picture.
        suppression: s, [gh,gw], in the unit of the definition.
        promotion: p, [gh,gw], likewise.
        maps: F(x₀, t₀), F(x′, t₀), F(x₀, t), F(x′, t) in that order, [4,h,w], at the resolution of the feature map;
            those of `cam` in logits per position.
        true_name: name of t₀.
        target_name: name of t.
        predicted_name: name of the class that the network gives x′.
        attack: name of the attack.
        cell: side of a cell in pixels, or its height and width. Cells in the last row and column may be smaller.
        subtitle: a line of facts below the title (norms, success, scores).
        definition: of s and p; one that is not the paper's is named.
        method: of the maps, see `jaxinterp.cam.METHODS`.

    Returns:
        A figure 17 inches wide; `save` makes it 1,700 pixels.

    Raises:
        ValueError: a shape, a range or a code does not fit, or a value is not finite.
    """
    before, after = _picture(original, "original"), _picture(adversarial, "adversarial")
    if before.shape != after.shape:
        raise ValueError(f"original has shape {before.shape}, adversarial {after.shape}; expected the same")
    size = before.shape[:2]
    codes = np.asarray(kind)
    strength = _finite(suppression, "suppression") + _finite(promotion, "promotion")
    if strength.shape != codes.shape:
        raise ValueError(f"kind has shape {codes.shape}, suppression + promotion {strength.shape}; expected the same")
    patches = cell_colours(codes, strength, cell, size)
    values = _finite(maps, "maps")
    if values.ndim != 3 or values.shape[0] != 4 or 0 in values.shape:
        raise ValueError(f"maps has shape {values.shape}, expected [4,h,w]")

    side, gap, margin, header, caption, footer = 3.1, 0.22, 0.31, 0.82, 0.78, 1.3
    height = side * min(max(size[0] / size[1], 0.5), 1.6)
    total = header + 2 * (caption + height) + footer
    figure = Figure(figsize=(17.0, total))

    def place(left: float, top: float, width: float, tall: float) -> Axes:
        """Axes at a position in inches, counted from the upper left corner."""
        return figure.add_axes((left / 17.0, 1 - (top + tall) / total, width / 17.0, tall / total))

    def panel(row: int, column: int, heading: str, line: str) -> Axes:
        left, top = margin + column * (side + gap), header + caption + row * (height + caption)
        axes = place(left, top, side, height)
        axes.set(xticks=[], yticks=[], xlim=(-0.5, size[1] - 0.5), ylim=(size[0] - 0.5, -0.5))
        axes.set_aspect("equal", adjustable="box", anchor="C")
        for spine in axes.spines.values():
            spine.set_linewidth(0.5)
        # Titles hang from the top of their strip: the headings of a row are level however long the names.
        x, y = (left + side / 2) / 17.0, 1 - (top - caption + 0.2) / total
        figure.text(x, y, heading, ha="center", va="top", weight="bold")
        figure.text(x, y - 0.19 / total, line, ha="center", va="top", size=9, color=_MUTED)
        return axes

    def show(axes: Axes, image: np.ndarray, **options) -> None:
        # Every layer has the picture's extent, so that a map's samples lie at half-pixel positions.
        axes.imshow(image, extent=(-0.5, size[1] - 0.5, size[0] - 0.5, -0.5), aspect="equal", **options)

    names = " → ".join(_wrap(name, 5.5, 14.0, lines=1) for name in (true_name, target_name))
    head = f"{_wrap(attack, 4.0, 14.0, lines=1)}: {names}"
    figure.text(margin / 17.0, 1 - 0.2 / total, head, size=14, weight="bold", va="top")
    figure.text(margin / 17.0, 1 - 0.53 / total, _wrap(subtitle, 16.3, 10.5), size=10.5, va="top", color=_MUTED)

    show(panel(0, 0, "original x₀", _wrap(f"true class t₀: {true_name}", side, 9.0)), before)
    if predicted_name == target_name:
        line = _wrap(f"predicted, as targeted (t): {target_name}", side, 9.0)
    else:
        parts = (f"predicted: {predicted_name}", f"target t: {target_name}")
        line = "\n".join(_wrap(part, side, 9.0, lines=1) for part in parts)
    show(panel(1, 0, "adversarial x′", line), after)

    delta = after - before
    factor = magnification(delta)
    heading, line = f"perturbation δ × {factor:,}", "mid grey is zero"
    if not delta.any():
        heading, line = "perturbation δ = 0", "nothing was changed"
    show(panel(0, 1, heading, line), np.clip(0.5 + factor * delta, 0.0, 1.0))

    dimmed = 0.08 + 0.34 * _grey(after)
    line = "{} × {} px; opaque where s + p is large".format(*sides(cell))
    axes = panel(1, 1, "cells by kind", line + _line(definition))
    show(axes, dimmed)
    show(axes, patches, interpolation="nearest")

    low, high = float(values.min()), float(values.max())
    if low == high:  # constant maps: any range does, as long as it is one
        low, high = low - 0.5, high + 0.5
    norm = Normalize(low, high)
    smooth = {"interpolation": "bilinear", "interpolation_stage": "data"}
    columns = (("F(x₀, {})", "{} on the original"), ("F(x′, {})", "{} on the adversarial picture"))
    for index, value in enumerate(values):
        row, column = divmod(index, 2)
        symbol, who = (("t₀", "true class"), ("t", "target"))[row]
        heading, line = columns[column]
        axes = panel(row, 2 + column, heading.format(symbol), line.format(who))
        show(axes, 0.2 + 0.6 * _grey((before, after)[column]))
        show(axes, value, cmap=MAP_COLOURS, norm=norm, alpha=_OPACITY, **smooth)
    scale = axes.images[-1]

    changes = (
        (values[0] - values[1], "suppression", "what the true class loses: F(x₀, t₀) − F(x′, t₀)"),
        (values[3] - values[2], "promotion", "what the target gains: F(x′, t) − F(x₀, t)"),
    )
    limit = max(float(np.abs(change).max()) for change, _, _ in changes) or 1.0
    balance = Normalize(-limit, limit)
    for row, (change, heading, line) in enumerate(changes):
        axes = panel(row, 4, heading, line)
        show(axes, 0.2 + 0.6 * _grey(after))
        show(axes, change, cmap=DIFFERENCE_COLOURS, norm=balance, alpha=_OPACITY, **smooth)

    # Below: what the colours mean, each under its own columns.
    top = header + 2 * (caption + height) + 0.24
    key = "x₀ original, x′ adversarial\nt₀ true class, t target\nF(x, c) activation map of class c"
    if method == "cam":
        key += ":\nits positions add up to c's logit\nwithout the bias"
        unit, moved = "contribution to the logit per position of the map (logits; ", "change of the contribution"
    else:
        key += f",\nby {method}"
        unit, moved = "value of the map (", "change of the value"
    x, y = margin / 17.0, 1 - (top - 0.08) / total
    figure.text(x, y, key, size=9, va="top", color=_MUTED, linespacing=1.25)
    figure.legend(
        handles=[Patch(facecolor=COLOURS[name], edgecolor="#333333", linewidth=0.5) for name in KINDS[1:]],
        labels=[f"{name} {text}" for name, text in _shares(codes)],
        title=_active(codes),
        title_fontsize=9,
        loc="upper center",
        bbox_to_anchor=((margin + side + gap + side / 2) / 17.0, 1 - (top - 0.2) / total),
        frameon=False,
        handlelength=1.4,
        labelspacing=0.3,
    )
    for start, count, mappable, label in (
        (2, 2, scale, f"{unit}one scale for the four maps)"),
        (4, 1, axes.images[-1], f"{moved}, same unit"),
    ):
        width = count * side + (count - 1) * gap
        # A little shorter than its panels: the numbers at its ends must not meet the next bar's.
        bar = place(margin + start * (side + gap) + 0.15, top, width - 0.3, 0.2)
        # The maps are translucent; over mid grey the bar shows the colours that are met in the panels.
        bar.set_facecolor("0.5")
        figure.colorbar(
            mappable,
            cax=bar,
            orientation="horizontal",
            label=label,
            ticks=MaxNLocator(5 * count, steps=[1, 2, 5, 10]),
        )
    return figure


def cell_colours(kind: ArrayLike, strength: ArrayLike, cell: Cell, size: tuple[int, int]) -> np.ndarray:
    """Colours of the cells at the picture's resolution.

    Opacity grows with the root of the strength, from 0.3 for a cell that barely acts to 0.95 for the 98th
    percentile of the cells that act and all above it, so that one extreme cell does not hide the others.

    Args:
        kind: [gh,gw] codes, the positions in `KINDS`.
        strength: s + p, [gh,gw], not negative.
        cell: side of a cell in pixels, or its height and width.
        size: height and width of the picture in pixels.

    Returns:
        [H,W,4] float64 RGBA in [0, 1]; transparent where the kind is none.

    Raises:
        ValueError: the grid does not tile the picture, or a code is unknown.
    """
    codes, power = np.asarray(kind), _finite(strength, "strength")
    tall, wide = sides(cell)
    if min(tall, wide) < 1:
        raise ValueError(f"cell is {cell}, expected at least 1 pixel")
    grid = (math.ceil(size[0] / tall), math.ceil(size[1] / wide))
    if codes.shape != grid or power.shape != grid:
        raise ValueError(
            f"kind has shape {codes.shape} and strength {power.shape}; "
            f"expected {grid} for cells of {cell} px in a picture of {size[0]} x {size[1]}"
        )
    if not np.isin(codes, range(len(KINDS))).all():
        raise ValueError(f"kind holds the codes {np.unique(codes).tolist()}, expected 0 to {len(KINDS) - 1}")
    codes = codes.astype(int)
    share = np.clip(power / full_strength(codes, power), 0.0, 1.0)
    opacity = np.where(codes != 0, 0.3 + 0.65 * np.sqrt(share), 0.0)
    palette = np.array([to_rgb(COLOURS[name]) for name in KINDS])
    colours = np.concatenate([palette[codes], opacity[..., None]], axis=-1)
    return colours.repeat(tall, axis=0).repeat(wide, axis=1)[: size[0], : size[1]]


def full_strength(kind: ArrayLike, strength: ArrayLike) -> float:
    """The strength from which a cell is drawn with full opacity.

    Args:
        kind: codes of the cells, the positions in `KINDS`.
        strength: s + p, as `kind`.

    Returns:
        The 98th percentile of the cells that act, above 0; 1 where none acts.
    """
    acts = np.asarray(kind) != 0
    if not acts.any():
        return 1.0
    return max(float(np.percentile(np.asarray(strength, np.float64)[acts], 98)), float(np.finfo(np.float64).tiny))


def magnification(delta: ArrayLike) -> int:
    """The power of two by which a perturbation is multiplied to be seen around mid grey.

    Args:
        delta: a perturbation of any shape, in pixel units of [0, 1].

    Returns:
        The largest power of two, at least 1, that keeps 99.5 % of the changed values within ±0.5; 1 for a
        zero perturbation. The few beyond are clipped: without that, one pixel of a sparse attack would turn
        all others grey.
    """
    size = np.abs(np.asarray(delta, np.float64))
    size = size[size > 0]
    if not size.size:
        return 1
    return 2 ** max(math.floor(math.log2(0.5 / float(np.percentile(size, 99.5)))), 0)


@style.context(STYLE)
def magnified(
    original: ArrayLike,
    adversarial: Mapping[str, ArrayLike],
    windows: Mapping[str, tuple[int, int, int]],
    *,
    title: str,
) -> Figure:
    """Perturbations of one picture, all magnified by the same factor, and parts of the picture enlarged.

    The first row shows the picture, every further one an attack: the adversarial picture, the perturbation, and what it
    is in each window. The factor is the middle one of those of `magnification`; what is far stronger is clipped.

    Args:
        original: x₀, [H,W,3], [H,W,1] or [H,W], in [0, 1].
        adversarial: attack -> x′, as `original`.
        windows: name -> (row, column, side) of a square, in pixels.
        title: a line above.

    Returns:
        A figure with one row for the picture and one for each attack.

    Raises:
        ValueError: no attack, pictures of different shapes, or a window that is not inside the picture.
    """
    if not adversarial:
        raise ValueError("adversarial is empty, expected at least one attack")
    before = _picture(original, "original")
    changed = {name: _picture(image, f"adversarial[{name!r}]") for name, image in adversarial.items()}
    for name, image in changed.items():
        if image.shape != before.shape:
            raise ValueError(f"adversarial[{name!r}] has shape {image.shape}, original {before.shape}")
    height, width = before.shape[:2]
    for name, (row, column, side) in windows.items():
        if side < 1 or min(row, column) < 0 or row + side > height or column + side > width:
            raise ValueError(f"windows[{name!r}] is {(row, column, side)}, which is not inside {height} x {width}")
    deltas = {name: image - before for name, image in changed.items()}
    # One factor for all, or the strongest would look like the weakest: the middle one, lest a giant hide the others.
    factor = statistics.median_low([magnification(delta) for delta in deltas.values() if delta.any()] or [1])
    columns, rows = 2 + len(windows), 1 + len(changed)
    figure = Figure(
        figsize=(2.5 * columns + 0.3, 2.5 * rows * height / width + 0.34 * rows + 0.5), layout="constrained"
    )
    figure.suptitle(_wrap(title, 2.4 * columns, 12.0), size=12, weight="bold")
    grid = figure.subplots(rows, columns, squeeze=False)

    def show(axes: Axes, image: np.ndarray, heading: str, marked: bool = False) -> None:
        axes.imshow(np.clip(image, 0, 1), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.set_title(_wrap(heading, 2.4, 9.0, lines=1), size=9)
        for (row, column, side), colour in zip(windows.values() if marked else (), itertools.cycle(LINES)):
            spot = (column - 0.5, row - 0.5)
            axes.add_patch(Rectangle(spot, side, side, fill=False, edgecolor=colour, linewidth=1.4))

    def parts(image: np.ndarray) -> Iterator[np.ndarray]:
        return (image[row : row + side, column : column + side] for row, column, side in windows.values())

    show(grid[0, 0], before, "original x₀", marked=True)
    grid[0, 1].set_axis_off()
    note = f"below: perturbations δ × {factor:,},\nthe same for all;\nmid grey is zero"
    grid[0, 1].text(0.5, 0.5, note, ha="center", va="center", size=9, color=_MUTED, transform=grid[0, 1].transAxes)
    for axes, name, part in zip(grid[0, 2:], windows, parts(before), strict=True):
        show(axes, part, name)
    for line, (name, delta) in zip(grid[1:], deltas.items(), strict=True):
        raised = 0.5 + factor * delta
        show(line[0], changed[name], name)
        show(line[1], raised, f"δ × {factor:,}", marked=True)
        for axes, window, part in zip(line[2:], windows, parts(raised), strict=True):
            show(axes, part, f"δ in {window}")
    for line in grid:
        for axes, colour in zip(line[2:], itertools.cycle(LINES)):
            for spine in axes.spines.values():
                spine.set(color=colour, linewidth=2.0)
    return figure


# ---- Many pictures -----------------------------------------------------------------------------------------


@style.context(STYLE)
def kinds_bar(
    shares: Mapping[str, Mapping[str, tuple[float, float, float]]], *, definition: Definition = PAPER
) -> Figure:
    """Shares of the kinds of cells for each attack, with confidence intervals.

    Args:
        shares: attack -> kind (a name in `KINDS`) -> (mean, low, high), fractions in [0, 1]. A kind that is
            missing or whose mean is NaN (no cell acted) is marked as having no data.
        definition: of the effects; one that is not the paper's is named.

    Returns:
        A figure with one group of bars per attack and whiskers from low to high.

    Raises:
        ValueError: no attack, an unknown kind, a mean outside [0, 1], or an interval without its mean.
    """
    if not shares:
        raise ValueError("shares is empty, expected at least one attack")
    for attack, kinds in shares.items():
        for name, (mean, low, high) in kinds.items():
            if name not in KINDS:
                raise ValueError(f"shares[{attack!r}] has the kind {name!r}, expected one of {', '.join(KINDS)}")
            # A mean of identical values may leave its interval by a rounding error.
            if not math.isnan(mean) and not (0 <= mean <= 1 + 1e-9 and low - 1e-9 <= mean <= high + 1e-9):
                raise ValueError(
                    f"shares[{attack!r}][{name!r}] is {(mean, low, high)}, "
                    "expected low <= mean <= high with the mean in [0, 1]"
                )
    names = [name for name in (*KINDS[1:], KINDS[0]) if any(name in kinds for kinds in shares.values())]
    figure = Figure(figsize=(max(7.0, 2.2 + 1.9 * len(shares)), 4.6), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(names)
    for order, name in enumerate(names):
        rows = np.array([kinds.get(name, (np.nan,) * 3) for kinds in shares.values()], np.float64) * 100
        spots = np.arange(len(shares)) + (order - (len(names) - 1) / 2) * width
        whiskers = np.maximum([rows[:, 0] - rows[:, 1], rows[:, 2] - rows[:, 0]], 0.0)
        axes.bar(
            spots,
            rows[:, 0],
            width * 0.92,
            color=COLOURS[name],
            edgecolor="#333333",
            linewidth=0.6,
            label=name,
        )
        axes.errorbar(spots, rows[:, 0], yerr=whiskers, fmt="none", ecolor="#111111", elinewidth=1.2, capsize=4)
        for spot, (mean, _, high) in zip(spots, rows, strict=True):
            lost = math.isnan(mean)
            text, level = ("no data", 0.0) if lost else (f"{mean:.0f} %", mean if math.isnan(high) else high)
            _above(axes, spot, level, text, rotation=90 if lost else 0)
    axes.set_xticks(range(len(shares)), [_wrap(attack, 1.7, 10.0) for attack in shares], size=10)
    axes.set_xlim(-0.6, len(shares) - 0.4)
    axes.set_ylim(0, 100 if axes.dataLim.y1 < 94 else 108)  # room for the number above a full bar
    axes.set_yticks(range(0, 101, 20), [f"{value} %" for value in range(0, 101, 20)])
    axes.set_ylabel("share of the cells" + ("" if "none" in names else " that act") + _line(definition))
    quiet(axes)
    figure.legend(loc="outside upper center", ncols=len(names), frameon=False)
    return figure


@style.context(STYLE)
def scatter_effect(
    norms: Mapping[str, ArrayLike], effects: Mapping[str, ArrayLike], *, definition: Definition = PAPER
) -> Figure:
    """Overall effect of every cell against the size of its perturbation, one panel per attack, on log axes.

    A zero has no place on a log axis: it is drawn as a ring on the dotted line at the edge, and counts in
    Spearman's correlation, which needs ranks only.

    Args:
        norms: attack -> ||δ_i||₂ of the cells, any shape, in pixel units of [0, 1].
        effects: attack -> s_i + p_i of the same cells; the same attacks and shapes.
        definition: of the effects, for the axis.

    Returns:
        A figure with up to four panels in a row; Spearman's rho and the number of cells in each title.

    Raises:
        ValueError: attacks or shapes differ, or a value is negative or not finite.
    """
    points = _pairs(norms, effects, "norms", "effects")
    for attack, (size, effect) in points.items():
        for name, values in (("norms", size), ("effects", effect)):
            if not np.isfinite(values).all() or (values < 0).any():
                raise ValueError(f"{name}[{attack!r}] has negative or non-finite values")
    figure, panels = _panels(len(points))
    left, right = _log_range([size for size, _ in points.values()])
    bottom, top = _log_range([effect for _, effect in points.values()])
    zeros = False
    for axes, (attack, (size, effect)) in zip(panels, points.items(), strict=True):
        # The floors stand a little inside the limits, below every positive value.
        floor = (left * (right / left) ** 0.03, bottom * (top / bottom) ** 0.03)
        zero = (size == 0) | (effect == 0)
        zeros |= bool(zero.any())
        x, y = np.where(size > 0, size, floor[0]), np.where(effect > 0, effect, floor[1])
        opacity = _opacity(size.size)
        axes.plot(x[~zero], y[~zero], "o", ms=3, mew=0, color="#0072B2", alpha=opacity)
        axes.plot(x[zero], y[zero], "o", ms=4, mew=0.8, mec="#D55E00", mfc="none", alpha=max(opacity, 0.25))
        axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
        if zero.any():
            axes.axvline(floor[0], color="#999999", lw=0.8, ls=":", zorder=0)
            axes.axhline(floor[1], color="#999999", lw=0.8, ls=":", zorder=0)
        correlation = spearman(size, effect)
        rho = f"= {correlation:.2f}" if math.isfinite(correlation) else "undefined"
        cells = f"{size.size:,} cells" + (f", {int(zero.sum()):,} with a zero" if zero.any() else "")
        axes.set_title(f"{_wrap(attack, 3.2, 10.0, lines=1)}\nSpearman's ρ {rho}; {cells}", size=9.5)
        axes.grid(color="#dddddd", lw=0.6)
        axes.set_axisbelow(True)
    note = "  (rings: zero)" if zeros else ""
    figure.supxlabel(f"size of the cell's perturbation, ‖δᵢ‖₂{note}", size=10)
    figure.supylabel(_overall(definition), size=10, multialignment="center")
    return figure


@style.context(STYLE)
def scatter_ratio(
    effects: Mapping[str, ArrayLike], ratios: Mapping[str, ArrayLike], *, definition: Definition = PAPER
) -> Figure:
    """Ratio of promotion to suppression of every cell against its overall effect, one panel per attack.

    Args:
        effects: attack -> s_i + p_i of the cells, any shape.
        ratios: attack -> PSR_i = log2(p_i / s_i) of the same cells; may be infinite, is drawn within ±10. NaN
            marks a cell without effect, which is left out, as is a cell whose effect is 0.
        definition: of the effects, for the axis.

    Returns:
        A figure with up to four panels in a row, the balanced band from -1 to 1 shaded, points coloured by
        kind and the share of each kind in the title.

    Raises:
        ValueError: attacks or shapes differ, or an effect is negative or not finite.
    """
    points = _pairs(effects, ratios, "effects", "ratios")
    for attack, (effect, _) in points.items():
        if not np.isfinite(effect).all() or (effect < 0).any():
            raise ValueError(f"effects[{attack!r}] has negative or non-finite values")
    figure, panels = _panels(len(points))
    left, right = _log_range([effect for effect, _ in points.values()])
    for axes, (attack, (effect, ratio)) in zip(panels, points.items(), strict=True):
        acts = ~np.isnan(ratio) & (effect > 0)
        x, exact = effect[acts], ratio[acts]
        y = np.clip(exact, -RATIO_LIMIT, RATIO_LIMIT)
        axes.axhspan(-1, 1, color=COLOURS["balanced"], alpha=0.22, lw=0)
        for level in (-1, 1):
            axes.axhline(level, color="#777777", lw=0.8, ls="--")
        axes.axhline(0, color="#777777", lw=0.6)
        parts = []
        for name, chosen in (
            ("suppression", exact < -1),
            ("balanced", (exact >= -1) & (exact <= 1)),
            ("promotion", exact > 1),
        ):
            # Yellow on white needs an edge; it is the darker gold here.
            colour = "#B8A800" if name == "balanced" else COLOURS[name]
            axes.plot(x[chosen], y[chosen], "o", ms=3, mew=0, color=colour, alpha=_opacity(x.size), label=name)
            parts.append(f"{name} {chosen.mean():.0%}" if x.size else f"{name} –")
        axes.set(xscale="log", xlim=(left, right), ylim=(-RATIO_LIMIT * 1.08, RATIO_LIMIT * 1.08))
        axes.set_yticks([-10, -5, -1, 1, 5, 10], ["≤ −10", "−5", "−1", "1", "5", "≥ 10"])
        axes.tick_params(labelleft=True)
        heading = f"{_wrap(attack, 2.4, 10.0, lines=1)} ({x.size:,} cells)"
        axes.set_title(heading + "\n" + ", ".join(parts).replace("%", " %"), size=9)
        axes.grid(axis="x", color="#dddddd", lw=0.6)
        axes.set_axisbelow(True)
    figure.supxlabel(_overall(definition), size=10)
    figure.supylabel("PSR = log₂(p / s)", size=10)
    return figure


def _overall(definition: Definition) -> str:
    return "effect of the cell, s + p" + (_line(definition) or f" ({definition.unit})")


def _line(definition: Definition) -> str:
    """The note of a definition on a line of its own, which axes are long enough for."""
    return definition.note.replace(" ", "\n", 1)


_NORM_LABELS = {"l0": "L0: components changed", "l1": "L1", "l2": "L2", "linf": "Linf"}
_BUDGETS = {"l0": (1.0, 1e3), "l1": (1.0, 1e3), "l2": (0.1, 10.0), "linf": (1e-3, 1.0)}  # drawn where none breaks any
# Okabe and Ito's palette without its yellow, which is too light for a line.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#111111")
_DASHES = ("-", "--", ":", "-.")


@style.context(STYLE)
def success_curves(distances: Mapping[str, Mapping[str, ArrayLike]], *, total: int) -> Figure:
    """How many pictures each attack breaks within a budget, for every norm.

    Args:
        distances: norm -> attack -> the distances of its successes, in pixel units.
        total: how many pictures were attacked.

    Returns:
        A figure with one panel per norm.

    Raises:
        ValueError: no norm, no attack, or more successes than pictures.
    """
    if not distances or not all(distances.values()):
        raise ValueError("distances is empty, expected at least one norm and one attack")
    columns = min(2, len(distances))
    rows = math.ceil(len(distances) / columns)
    names = [_wrap(name, 4.2 * columns, 10.0) for name in next(iter(distances.values()))]
    legend = 0.22 * len(names) + 0.2 * sum(name.count("\n") for name in names)
    figure = Figure(figsize=(4.6 * columns + 0.4, 3.5 * rows + 0.3 + legend), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes in grid[len(distances) :]:
        axes.remove()
    for axes, (norm, by_attack) in zip(grid, distances.items(), strict=False):
        values = {name: np.sort(np.asarray(given, np.float64).ravel()) for name, given in by_attack.items()}
        low, high = _log_range(list(values.values()), _BUDGETS.get(norm, (1e-3, 1.0)))
        low, high = min(low, high / 4), max(high, 4 * low)  # a tick or two at least
        for i, (name, budget) in enumerate(values.items()):
            if len(budget) > total:
                raise ValueError(f"{norm} of {name} has {len(budget)} successes, expected at most {total} pictures")
            share = np.arange(1, len(budget) + 1) / max(total, 1)
            axes.step(
                [low, *np.maximum(budget, low), high],
                [0, *share, share[-1] if len(share) else 0],
                where="post",
                color=LINES[i % len(LINES)],
                linestyle=_DASHES[i // len(LINES) % len(_DASHES)],
                linewidth=1.8,
                label=name,
            )
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(0, 1.03)
        axes.set_xlabel(f"budget, {_NORM_LABELS.get(norm, norm)}")
        quiet(axes)
    for axes in grid[: len(distances) : columns]:
        axes.set_ylabel(f"share of {total} pictures broken")
    handles, _ = grid[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", frameon=False, ncols=1)
    return figure


@style.context(STYLE)
def curves(
    panels: Mapping[str, Mapping[str, Sequence[Estimate]]],
    x: Sequence[float | int],
    *,
    xlabel: str,
    reference: tuple[str, ArrayLike] | None = None,
    log: bool = False,
    names: Sequence[str] | None = None,
    colours: Mapping[str, str] | None = None,
) -> Figure:
    """Means with their 95 % intervals against a parameter.

    Args:
        panels: what is measured -> line -> its estimate at every value of `x`.
        x: values of the parameter.
        xlabel: its name.
        reference: name and values of a line without an interval, drawn in every panel.
        log: whether `x` has a logarithmic axis.
        names: of the values of `x`, where they are no numbers.
        colours: of lines, by name.

    Returns:
        A figure with one panel for each measure.

    Raises:
        ValueError: nothing to draw, or a line that is not as long as `x`.
    """
    if not panels or not all(panels.values()):
        raise ValueError("panels is empty, expected at least one measure and one line")
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    every = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    figure = Figure(figsize=(max(4.2 * columns, 5.4) + 0.4, 3.4 * rows + 0.7), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes, (title, lines) in zip(grid, panels.items(), strict=False):
        for name, estimates in lines.items():
            if len(estimates) != len(x):
                raise ValueError(f"{title}, {name}: {len(estimates)} estimates for {len(x)} values of {xlabel}")
            mean, low, high = np.array([e.interval for e in estimates], np.float64).T
            i = every.index(name)
            colour = (colours or {}).get(name, LINES[i % len(LINES)])
            axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
            axes.plot(x, mean, color=colour, linewidth=1.8, marker="o", markersize=3.5, label=name)
        if reference is not None:
            axes.plot(x, np.asarray(reference[1]), color="#111111", linestyle="--", linewidth=1.2, label=reference[0])
        if log:
            axes.set_xscale("log")
            axes.set_xticks(list(x), [f"{value:g}" for value in x])
            axes.xaxis.set_minor_formatter(NullFormatter())
        if names is not None:
            axes.set_xticks(list(x), list(names), rotation=25, ha="right", rotation_mode="anchor")
        axes.set_title(title, size=10.5)
        axes.set_xlabel(xlabel)
        quiet(axes)
    _legend_below(
        figure,
        {
            label: handle
            for axes in figure.axes
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        },
    )
    return figure


def _legend_below(figure: Figure, handles: Mapping[str, Any]) -> None:
    """A legend under all panels, in as many columns as the figure is wide enough for."""
    widest = 0.07 * max(map(len, handles), default=0) + 0.6  # inches, with its handle
    columns = max(1, min(5, len(handles), int(figure.get_figwidth() / widest)))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", frameon=False, ncols=columns)


@style.context(STYLE)
def bars(
    panels: Mapping[str, Mapping[str, Mapping[str, Estimate]]],
    *,
    ylabel: str,
    colours: Mapping[str, str] | None = None,
) -> Figure:
    """Means with their 95 % intervals, in groups of bars.

    Args:
        panels: title -> group -> bar -> its estimate; one whose mean is NaN is marked as having no data.
        ylabel: what is measured.
        colours: of bars, by name; without them, those of kinds for kinds and of lines for others.

    Returns:
        A figure with one panel for each title.

    Raises:
        ValueError: nothing to draw.
    """
    if not panels or not all(panels.values()):
        raise ValueError("panels is empty, expected at least one title and one group")
    chosen = {name: COLOURS.get(name, LINES[i % len(LINES)]) for i, name in enumerate(_bar_names(panels))}
    chosen |= dict(colours or {})
    groups = max(len(each) for each in panels.values())
    figure = Figure(figsize=(len(panels) * max(4.4, 1.2 + 1.5 * groups) + 0.4, 4.4), layout="constrained")
    for axes, (title, by_group) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        width = 0.8 / max(1, len(chosen))
        for order, name in enumerate(chosen):
            found = [by_group[group].get(name) for group in by_group]
            values = np.array([e.interval if e is not None else (np.nan,) * 3 for e in found], np.float64)
            spots = np.arange(len(by_group)) + (order - (len(chosen) - 1) / 2) * width
            axes.bar(spots, values[:, 0], width * 0.92, color=chosen[name], edgecolor="#333333", linewidth=0.6)
            axes.vlines(spots, values[:, 1], values[:, 2], color="#111111", linewidth=1.2)
            for spot, estimate in zip(spots, found, strict=True):
                if estimate is not None and math.isnan(estimate.mean):
                    _above(axes, spot, 0.0, "no data", rotation=90)
        axes.axhline(0, color="#555555", linewidth=0.8)
        axes.set_xticks(range(len(by_group)), [_wrap(group, 1.4, 10.0) for group in by_group], size=10)
        axes.set_title(title, size=10.5)
        axes.set_ylabel(ylabel)
        quiet(axes)
    _legend_below(figure, {name: Patch(facecolor=colour, edgecolor="#333333") for name, colour in chosen.items()})
    return figure


def _above(axes: Axes, spot: float, level: float, text: str, *, rotation: int) -> None:
    """A small word on a bar, or where one would stand."""
    axes.annotate(
        text,
        (spot, level),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        va="bottom",
        size=8.5,
        rotation=rotation,
        color=_MUTED,
    )


@style.context(STYLE)
def comparison(
    groups: Mapping[str, Sequence[str]],
    panels: Mapping[str, Mapping[str, Mapping[str, Estimate]]],
    shares: Mapping[str, Mapping[str, Mapping[str, float]]],
    *,
    logs: Collection[str] = (),
    references: Mapping[str, float] | None = None,
    title: str = "",
) -> Figure:
    """Many rows side by side: a dot with its interval in every panel, and a bar of the kinds of cells.

    Args:
        groups: heading -> names of its rows, from top to bottom.
        panels: what is measured -> series -> row -> its estimate. Rows may be missing. In a panel with a logarithmic
            axis a zero stands as an open ring at the left edge.
        shares: series -> row -> kind (a name in `KINDS`) -> its share, drawn in a panel of its own; may be empty.
        logs: panels with a logarithmic axis.
        references: value of a dashed line, by panel.
        title: a line above.

    Returns:
        A figure that is a quarter of an inch high for each row, with all panels in a line.

    Raises:
        ValueError: nothing to draw, a row that is in no group, or a negative value on a logarithmic axis.
    """
    if not panels or not any(groups.values()):
        raise ValueError("panels and groups must hold at least one panel and one row")
    places: dict[str, float] = {}
    headings: dict[str, float] = {}
    line = 0.0
    for heading, names in groups.items():
        if not names:
            continue
        headings[heading], line = line, line + 1.0
        for name in names:
            places[name], line = line, line + 1.0
        line += 0.4
    series = list(dict.fromkeys([*(name for by in panels.values() for name in by), *shares]))
    unknown = {row for by in (*panels.values(), shares) for rows in by.values() for row in rows} - places.keys()
    if unknown:
        raise ValueError(f"groups lack the rows {', '.join(sorted(unknown))}")
    offsets = {name: (i - (len(series) - 1) / 2) * 0.42 for i, name in enumerate(series)}
    named = 0.3 + max(len(row) for row in (*places, *headings)) * 0.073
    count, tall = len(panels) + bool(shares), 1.4 + 0.25 * line
    wide, gap = 1.5, 0.16
    width = named + count * (wide + gap) + 0.1
    figure = Figure(figsize=(width, tall))
    top, bottom = 0.8 / tall, 0.6 / tall
    figure.text(0.1 / width, 1 - 0.12 / tall, _wrap(title, width - 0.2, 12.0, 1), size=12, weight="bold", va="top")

    def panel(i: int, heading: str) -> Axes:
        left = (named + i * (wide + gap)) / width
        axes = figure.add_axes((left, bottom, wide / width, 1 - top - bottom))
        axes.set_ylim(line - 0.4, -0.7)
        axes.set_title(_wrap(heading, wide, 9.0, 2), size=9)
        axes.set_yticks([])
        axes.tick_params(labelsize=7.5)
        for spine in ("top", "right", "left"):
            axes.spines[spine].set_visible(False)
        for order, place in enumerate(places.values()):
            if order % 2 == 0:
                axes.axhspan(place - 0.5, place + 0.5, color="#f1f1f1", lw=0, zorder=0)
        return axes

    for i, (heading, by_series) in enumerate(panels.items()):
        axes = panel(i, heading)
        axes.grid(axis="x", color="#d5d5d5", lw=0.6)
        axes.set_axisbelow(True)
        floor = None
        if heading in logs:
            values = np.array([e.interval for rows in by_series.values() for e in rows.values()], np.float64).ravel()
            if (values < 0).any():
                raise ValueError(f"panels[{heading!r}] has negative values on a logarithmic axis")
            left, right = _log_range([values[np.isfinite(values)]])
            floor = left * (right / left) ** 0.03
            axes.set(xscale="log", xlim=(left, right))
            axes.xaxis.set_major_locator(LogLocator(numticks=5))
            axes.xaxis.set_minor_formatter(NullFormatter())
        for name, rows in by_series.items():
            colour = LINES[series.index(name) % len(LINES)]
            for row, estimate in rows.items():
                mean, low, high = estimate.interval
                if math.isnan(mean):
                    continue
                y = places[row] + offsets[name]
                if floor is not None:
                    low, high = max(low, floor), max(high, floor)
                if not math.isnan(low):
                    axes.plot([low, high], [y, y], color=colour, lw=1.1, alpha=0.55, solid_capstyle="butt")
                empty = floor is not None and mean <= floor
                x = floor if empty and floor is not None else mean
                axes.plot(x, y, "o", ms=4, color=colour, mfc="none" if empty else colour, mew=0.9, clip_on=False)
        if references and heading in references:
            axes.axvline(references[heading], color="#111111", lw=0.9, ls="--", zorder=1)
        if floor is None:
            axes.xaxis.set_major_locator(MaxNLocator(4))
    if shares:
        axes = panel(len(panels), "kinds of cells, share")
        high = 0.8 / max(1, len(shares))
        for name, rows in shares.items():
            for row, by_kind in rows.items():
                start = 0.0
                for kind in KINDS[1:]:
                    part = by_kind.get(kind, math.nan)
                    if math.isnan(part):
                        continue
                    spot = places[row] + offsets[name] * (high / 0.42 if len(series) > 1 else 0)
                    axes.barh(spot, part, high, left=start, color=COLOURS[kind], edgecolor="#333333", lw=0.3)
                    start += part
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.5, 1])
    scale = (1 - top - bottom) / (line + 0.3)
    for names, size, weight in ((places, 8.5, "normal"), (headings, 9.0, "bold")):
        for name, place in names.items():
            spot = ((named - 0.1) / width, bottom + (line - 0.4 - place) * scale)
            figure.text(*spot, name, ha="right", va="center", size=size, weight=weight)
    handles: list[Any] = [
        Line2D([], [], marker="o", ms=4, color=LINES[i % len(LINES)], label=name) for i, name in enumerate(series)
    ]
    if shares:
        handles += [Patch(facecolor=COLOURS[kind], edgecolor="#333333", lw=0.5, label=kind) for kind in KINDS[1:]]
        if len(shares) > 1:
            handles.append(Patch(facecolor="none", edgecolor="none", label=f"bars: {', then '.join(shares)}"))
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=9)
    return figure


@style.context(STYLE)
def matrices(
    panels: Mapping[str, Mapping[str, Mapping[str, Estimate]]], *, row: str, column: str, unit: str = ""
) -> Figure:
    """Shares from every row to every column, as numbers on colours of one scale from 0 to 1.

    Args:
        panels: title -> row -> column -> its estimate, a share; all panels have the same rows and columns.
        row: what rows are.
        column: what columns are.
        unit: what the shares are of, below the scale.

    Returns:
        A figure with one panel for each title, at most three in a line.

    Raises:
        ValueError: nothing to draw, rows or columns that differ, or a share outside [0, 1].
    """
    if not panels or not all(panels.values()):
        raise ValueError("panels is empty, expected at least one title and one row")
    names = {title: (list(found), [list(line) for line in found.values()]) for title, found in panels.items()}
    rows, columns = next(iter(names.values()))
    if any(found != (rows, columns) for found in names.values()) or any(line != columns[0] for line in columns):
        raise ValueError("panels differ in their rows or columns, expected the same in all")
    down = math.ceil(len(panels) / 3)
    across = math.ceil(len(panels) / down)
    wide, tall = 1.5 + 1.15 * len(columns[0]), 1.2 + 0.62 * len(rows)
    figure = Figure(figsize=(max(across * wide, 4.5) + 0.9, down * tall + 0.5), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes, (title, found) in zip(grid, panels.items(), strict=False):
        means = np.array([[estimate.mean for estimate in line.values()] for line in found.values()], np.float64)
        if not np.all(np.isnan(means) | ((means >= 0) & (means <= 1))):
            raise ValueError(f"panels[{title!r}] has shares outside [0, 1]")
        drawn = axes.imshow(means, cmap=MAP_COLOURS, vmin=0, vmax=1, aspect="auto")
        for (i, j), mean in np.ndenumerate(means):
            estimate = found[rows[i]][columns[0][j]]
            text = "–" if math.isnan(mean) else f"{mean:.0%}\n{estimate.low:.0%} to {estimate.high:.0%}"
            colour = "#111111" if mean > 0.6 else "#ffffff"
            axes.text(j, i, text.replace("%", " %"), ha="center", va="center", size=7.5, color=colour)
        axes.set_xticks(range(len(columns[0])), [_wrap(name, 1.1, 9.0) for name in columns[0]], size=8)
        axes.set_yticks(range(len(rows)), [_wrap(name, 1.1, 9.0) for name in rows], size=8)
        axes.set_title(_wrap(title, wide - 0.2, 10.0), size=10)
        axes.set(xlabel=column, ylabel=row)
    figure.colorbar(drawn, ax=grid[: len(panels)].tolist(), label=unit, shrink=0.8)
    return figure


def _bar_names(panels: Mapping[str, Mapping[str, Mapping[str, Estimate]]]) -> list[str]:
    return list(dict.fromkeys(name for by_group in panels.values() for named in by_group.values() for name in named))


@style.context(STYLE)
def gallery(rows: Sequence[Sequence[tuple[str, ArrayLike]]]) -> Figure:
    """Pictures with captions, in rows.

    Args:
        rows: (caption, picture) one after the other; a picture is [H,W,3], [H,W,1] or [H,W], in [0, 1].

    Returns:
        A figure with a panel for each picture.

    Raises:
        ValueError: nothing to draw, or a picture of another shape or range.
    """
    if not rows or not all(rows):
        raise ValueError("rows is empty, expected at least one picture in each row")
    columns = max(map(len, rows))
    figure = Figure(figsize=(2.5 * columns, 2.85 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, row in zip(grid, rows, strict=True):
        for axes in line:
            axes.set_axis_off()
        for axes, (caption, picture) in zip(line, row, strict=False):
            axes.imshow(_picture(picture, f"picture {caption!r}"), interpolation="nearest")
            axes.set_title(_wrap(caption, 2.3, 8.5, 3), size=8.5)
    return figure


# ---- Concepts ----------------------------------------------------------------------------------------------


@style.context(STYLE)
def concept_bars(groups: Mapping[str, Mapping[str, int]], *, title: str, subtitle: str = "") -> Figure:
    """How many units detect each concept, category by category: a bar for every concept, the most detected first.

    The list of bars is broken into columns like the lines of a newspaper, so that every name can be read however many
    there are; all bars have one scale.

    Args:
        groups: category -> concept -> units that detect it. Categories without concepts are left out.
        title: heading of the figure.
        subtitle: a line of facts below it.

    Returns:
        A figure of about 1.5 times as wide as high, which grows with the number of concepts.

    Raises:
        ValueError: nothing to draw, or a concept without a unit.
    """
    colours = dict(zip(groups, itertools.cycle(LINES), strict=False))
    groups = {name: found for name, found in groups.items() if found}
    if not groups:
        raise ValueError("groups is empty, expected at least one concept")
    if min(min(found.values()) for found in groups.values()) < 1:
        raise ValueError("groups: expected at least one unit for each concept")
    ordered = sorted(groups.items(), key=lambda group: -sum(group[1].values()))
    lines = [line for name, found in ordered for line in ((name, None), *((name, each) for each in _falling(found)))]
    count = max(1, math.ceil(math.sqrt(len(lines) / 14)))
    tall = math.ceil(len(lines) / count)
    while len(columns := _newspaper(lines, tall)) > count:  # headings are repeated where a category goes on
        tall += 1
    high = max(map(len, columns))
    wide = max(3.3, 6.4 / len(columns))
    figure = Figure(figsize=(wide * len(columns), 0.9 + 0.2 * high))
    width, height = figure.get_size_inches()
    for text, size, below, colour in ((title, 11.0, 0.14, "#111111"), (subtitle, 9.0, 0.4, _MUTED)):
        spot = (0.15 / width, 1 - below / height)
        figure.text(*spot, _wrap(text, width - 0.3, size, 1), size=size, va="top", color=colour)
    most = max(max(found.values()) for found in groups.values())
    for i, column in enumerate(columns):
        left, names = wide * i / width, 1.85 / width
        box = (left + names, 0.1 / height, (wide - 2.3) / width, 0.2 * high / height)
        axes = figure.add_axes(box, xlim=(0, most), ylim=(high - 0.5, -0.5))
        axes.set_axis_off()
        for line, (category, each) in enumerate(column):
            if each is None:
                continued = line == 0 and i > 0 and category in {name for name, _ in columns[i - 1]}
                total, concepts = sum(groups[category].values()), len(groups[category])
                plural = "" if concepts == 1 else "s"
                whole = f"{category}: {total} unit{'' if total == 1 else 's'}, {concepts} concept{plural}"
                text = f"{category}, continued" if continued else whole
                axes.annotate(
                    _wrap(text, wide - 0.2, 9.0, 1),
                    (0, line),
                    (-1.7 * 72, 0),
                    textcoords="offset points",
                    size=9,
                    weight="bold",
                    va="center",
                    annotation_clip=False,
                )
                continue
            name, units = each
            axes.barh(line, units, 0.72, color=colours[category], edgecolor="#333333", linewidth=0.4, clip_on=False)
            axes.annotate(
                _wrap(name, 1.7, 8.0, 1),
                (0, line),
                (-4, 0),
                textcoords="offset points",
                size=8,
                ha="right",
                va="center",
                annotation_clip=False,
            )
            axes.annotate(
                f"{units}",
                (units, line),
                (3, 0),
                textcoords="offset points",
                size=8,
                va="center",
                color=_MUTED,
                annotation_clip=False,
            )
    return figure


def _falling(found: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(found.items(), key=lambda item: (-item[1], item[0]))


def _newspaper(lines: Sequence[tuple[str, Any]], high: int) -> list[list[tuple[str, Any]]]:
    """Lines in columns of at most about `high`; one that begins within a category begins with its heading."""
    columns: list[list[tuple[str, Any]]] = [[]]
    for i, (category, each) in enumerate(lines):
        alone = each is None and len(columns[-1]) >= high - 1 and i + 1 < len(lines)
        if len(columns[-1]) >= high or alone:
            columns.append([] if each is None else [(category, None)])
        columns[-1].append((category, each))
    return columns


# ---- Files -------------------------------------------------------------------------------------------------


@style.context(STYLE)
def save(figure: Figure, path: str | os.PathLike, *, dpi: int = 100, bits: int = 6) -> Path:
    """Writes a figure as PNG, whole or not at all.

    The file holds no date and no version: the same figure gives the same bytes.

    Args:
        figure: the figure.
        path: where to write; missing folders are made, an existing file is replaced.
        dpi: pixels per inch.
        bits: bits kept of each channel, 1 to 8. The noise of photographs does not compress: without the two
            lowest bits, which are not seen, the file is a third smaller. Black and white stay exact.

    Returns:
        The path.

    Raises:
        ValueError: `bits` is not from 1 to 8.
        OSError: the folder cannot be written.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}, expected 1 to 8")
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    steps = 2**bits - 1
    levels = np.rint(np.rint(np.arange(256) / 255 * steps) * (255 / steps)).astype(np.uint8)
    picture = Image.fromarray(levels[np.asarray(canvas.buffer_rgba())[..., :3]])
    with replacing(path) as stream:
        picture.save(stream, format="PNG", compress_level=6, dpi=(dpi, dpi))
    return Path(path)


# ---- Pieces ------------------------------------------------------------------------------------------------


def _finite(values: ArrayLike, name: str) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has values that are not finite")
    return array


def _picture(values: ArrayLike, name: str) -> np.ndarray:
    """A picture as [H,W,3] in [0, 1]."""
    array = _finite(values, name)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3) or 0 in array.shape:
        raise ValueError(f"{name} has shape {array.shape}, expected [H,W,3], [H,W,1] or [H,W]")
    if array.min() < -1e-3 or array.max() > 1 + 1e-3:
        raise ValueError(f"{name} lies in [{array.min():.4g}, {array.max():.4g}], expected [0, 1]")
    return np.broadcast_to(np.clip(array, 0.0, 1.0), (*array.shape[:2], 3))


def _grey(picture: np.ndarray) -> np.ndarray:
    """Luma of [H,W,3] (Rec. 601), as three equal channels."""
    return np.repeat((picture @ np.array([0.299, 0.587, 0.114]))[..., None], 3, axis=-1)


def _shares(codes: np.ndarray) -> list[tuple[str, str]]:
    """The share of each kind among the cells that act, as text."""
    acts = int((codes != 0).sum())
    counts = [int((codes == code).sum()) for code in range(1, len(KINDS))]
    return [(name, f"{100 * n / acts:.0f} %" if acts else "–") for name, n in zip(KINDS[1:], counts, strict=True)]


def _active(codes: np.ndarray) -> str:
    acts = int((codes != 0).sum())
    return f"{acts:,} of {codes.size:,} cells act" if acts else f"none of {codes.size:,} cells acts"


@functools.cache
def _drawn(character: str) -> str:
    """The character, or a box where the font has no glyph for it."""
    faces = (get_font(findfont(FontProperties(family=_FONT, weight=weight))) for weight in ("normal", "bold"))
    return character if all(face.get_char_index(ord(character)) for face in faces) else "\N{WHITE SQUARE}"


def _wrap(text: str, width: float, size: float, lines: int = 2) -> str:
    """Breaks a text into lines of at most `width` inches at `size` points and shortens what does not fit.

    Measured, not counted: names in capitals are twice as wide as names in small letters. Dollar signs are
    escaped, because matplotlib would read mathematics between two of them. Characters that the font lacks become
    boxes, which is what matplotlib draws for them after a warning for each.
    """
    font, measure = FontProperties(family=_FONT, size=size, weight="bold"), TextToPath()

    def fits(string: str) -> float:
        return measure.get_text_width_height_descent(string, font, False)[0] / 72

    rest, rows = "".join(map(_drawn, " ".join(str(text)[:1000].split()))), []
    while rest and len(rows) < lines:
        count = bisect.bisect_right(range(1, len(rest) + 1), width, key=lambda n: fits(rest[:n]))
        cut = max(count, 1)
        if cut < len(rest):
            if len(rows) == lines - 1:
                rows.append(rest[: max(cut - 1, 1)].rstrip() + "…")
                break
            marks = re.finditer(r"[,:](?=\D)", rest[: cut + 1])  # not those inside 1,000 or 12:30
            best = max(rest.rfind(" ", 0, cut + 1), *(mark.end() for mark in marks), 0)
            inside = rest.rfind("_", 0, cut) + 1  # names of networks
            if best <= 0 and inside > 0 and (len(rows) < lines - 2 or fits(rest[inside:]) <= width):
                best = inside
            cut = best if best > 0 else cut
        rows.append(rest[:cut])
        rest = rest[cut:].lstrip()
    return "\n".join(rows).replace("$", r"\$")


def _pairs(
    first: Mapping[str, ArrayLike], second: Mapping[str, ArrayLike], one: str, two: str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Flat arrays of two mappings with the same attacks and shapes."""
    if not first or list(first) != list(second):
        raise ValueError(f"{one} has the attacks {list(first)}, {two} {list(second)}; expected the same, at least one")
    points = {}
    for attack in first:
        a, b = np.asarray(first[attack], np.float64), np.asarray(second[attack], np.float64)
        if a.shape != b.shape:
            raise ValueError(f"{one}[{attack!r}] has shape {a.shape}, {two}[{attack!r}] {b.shape}; expected the same")
        points[attack] = (a.ravel(), b.ravel())
    return points


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """Axes for `count` panels, at most four in a row, on shared scales."""
    rows = math.ceil(count / 4)
    columns = math.ceil(count / rows)
    figure = Figure(figsize=(max(4.1 * columns, 5.0) + 0.4, 4.0 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes in grid[count:]:
        axes.remove()
    for axes in grid[max(count - columns, 0) : count]:
        axes.tick_params(labelbottom=True)
    return figure, list(grid[:count])


def _log_range(groups: Sequence[np.ndarray], empty: tuple[float, float] = (1e-3, 1.0)) -> tuple[float, float]:
    """Limits of a log axis around the positive values, with room for the zeros' line below them; else `empty`."""
    values = np.concatenate(groups)
    values = values[values > 0]
    if not values.size:
        return empty
    low, high = float(values.min()), float(values.max())
    room = max((high / low) ** 0.08, 1.3)
    return low / room, high * room


def _opacity(count: int) -> float:
    """Opacity of a point among `count`: crowds must stay readable."""
    return float(np.clip(30 / math.sqrt(max(count, 1)), 0.08, 0.8))


def quiet(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
