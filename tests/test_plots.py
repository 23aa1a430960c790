"""Figures: what is drawn, where and in which colour; files that are whole and repeatable."""

import itertools
import math
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.container import BarContainer
from matplotlib.text import Annotation
from PIL import Image
from scipy import stats

from jaxinterp import effect, plots
from jaxinterp.statistics import Estimate

PERTURBATION, KINDS = 2, 3  # positions of the panels among the figure's axes


def case(size=(12, 10), grid_cell: effect.Cell = 4, **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    grid = tuple(math.ceil(all / one) for all, one in zip(size, effect.sides(grid_cell), strict=True))
    original = rng.uniform(0.2, 0.8, (*size, 3))
    values = {
        "original": original,
        "adversarial": np.clip(original + rng.uniform(-0.01, 0.01, original.shape), 0, 1),
        "kind": rng.integers(0, 4, grid),
        "suppression": rng.uniform(0, 1, grid),
        "promotion": rng.uniform(0, 1, grid),
        "maps": rng.normal(size=(4, 3, 2)),
        "true_name": "tench",
        "target_name": "goldfish",
        "predicted_name": "goldfish",
        "attack": "C&W",
        "cell": grid_cell,
        "subtitle": "",
    }
    return values | changes


def data(image) -> np.ndarray:
    return np.asarray(image.get_array())


def texts(figure):
    return [text.get_text() for text in figure.texts]


def render(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


def window(axes, picture):
    """The pixels of an axes' inside, without its frame."""
    box, tall = axes.get_window_extent(), picture.shape[0]
    left, right = round(box.x0) + 2, round(box.x1) - 2
    return picture[tall - round(box.y1) + 2 : tall - round(box.y0) - 2, left:right]


# ---- Cells


@pytest.mark.parametrize(
    ("row", "column", "rows", "columns"),
    [(0, 0, slice(0, 4), slice(0, 4)), (1, 0, slice(4, 8), slice(0, 4)), (2, 1, slice(8, 10), slice(4, 7))],
)
@pytest.mark.parametrize("code", [1, 2, 3])
def test_one_cell_colours_exactly_its_pixels(row, column, rows, columns, code):
    kind = np.zeros((3, 2), int)
    kind[row, column] = code
    colours = plots.cell_colours(kind, np.ones((3, 2)), 4, (10, 7))
    expected = np.zeros((10, 7), bool)
    expected[rows, columns] = True
    np.testing.assert_array_equal(colours[..., 3] > 0, expected)
    rgba = (*to_rgb(plots.COLOURS[plots.KINDS[code]]), 0.95)
    np.testing.assert_allclose(colours[expected], np.broadcast_to(rgba, (expected.sum(), 4)))


def test_cells_may_be_oblong():
    kind = np.array([[0, 0], [0, 3]])
    colours = plots.cell_colours(kind, np.ones((2, 2)), (3, 4), (5, 7))
    expected = np.zeros((5, 7), bool)
    expected[3:, 4:] = True
    np.testing.assert_array_equal(colours[..., 3] > 0, expected)
    figure = plots.explanation(**case((6, 8), (3, 4)))
    assert "3 × 4 px; opaque where s + p is large" in texts(figure)


def test_opacity_follows_the_root_of_the_strength_of_the_cells_that_act():
    kind = np.array([[1, 2, 3, 3, 0]])
    alpha = plots.cell_colours(kind, np.array([[0.0, 1.0, 4.0, 4.0, 900.0]]), 1, (1, 5))[0, :, 3]
    np.testing.assert_allclose(alpha, [0.3, 0.3 + 0.65 / 2, 0.95, 0.95, 0.0])


def test_cells_are_drawn_where_they_are():
    size, cell = (12, 10), 4
    kind = np.zeros((3, 3), int)
    same = {"original": np.full((*size, 3), 0.5), "adversarial": np.full((*size, 3), 0.5)}
    empty = plots.explanation(**case(size, cell, **same, kind=kind))
    before = render(empty)
    kind[1, 2] = 1  # rows 4 to 7, columns 8 and 9: cut off by the picture's border
    figure = plots.explanation(**case(size, cell, **same, kind=kind))
    axes = figure.axes[KINDS]
    (ys, xs) = np.nonzero((window(axes, render(figure)) != window(axes, before)).any(-1))
    tall, wide = window(axes, before).shape[:2]
    assert ys.min() / tall == pytest.approx(4 / 12, abs=0.012)
    assert (ys.max() + 1) / tall == pytest.approx(8 / 12, abs=0.012)
    assert xs.min() / wide == pytest.approx(8 / 10, abs=0.012)
    assert xs.max() + 1 == wide
    assert len(ys) == (np.ptp(ys) + 1) * (np.ptp(xs) + 1)


def test_legend_carries_the_shares_among_the_cells_that_act():
    kind = np.array([[1, 1, 2, 2], [2, 3, 3, 3], [3, 3, 0, 0], [0, 0, 0, 0]])
    figure = plots.explanation(**case((16, 16), 4, kind=kind))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "suppression 20 %",
        "balanced 30 %",
        "promotion 50 %",
    ]
    assert legend.get_title().get_text() == "10 of 16 cells act"
    colours = [patch.get_facecolor()[:3] for patch in legend.get_patches()]
    assert colours == [to_rgb(plots.COLOURS[name]) for name in plots.KINDS[1:]]


# ---- Pictures and perturbation


@pytest.mark.parametrize(
    ("delta", "factor"),
    [
        ([0.01, -0.01], 32),
        ([-0.0156], 32),
        ([0.0157], 16),
        ([0.5], 1),
        ([0.9], 1),
        ([0.0, 0.0], 1),
        ([0.0] * 5000 + [0.03], 16),
        ([0.01] * 1000 + [0.4], 32),
    ],
)
def test_magnification_is_the_largest_power_of_two_that_fits(delta, factor):
    assert plots.magnification(delta) == factor


def test_the_perturbation_is_magnified_by_the_factor_in_its_title_around_mid_grey():
    values = case()
    values["adversarial"] = values["original"].copy()
    values["adversarial"][3, 4] += [0.03, -0.03, 0.0]
    figure = plots.explanation(**values)
    assert "perturbation δ × 16" in texts(figure)
    shown = data(figure.axes[PERTURBATION].images[0]).copy()
    np.testing.assert_allclose(shown[3, 4], [0.5 + 0.48, 0.5 - 0.48, 0.5], atol=1e-9)
    shown[3, 4] = 0.5
    np.testing.assert_array_equal(shown, np.full((12, 10, 3), 0.5))


def test_nothing_changed_and_no_cell_acts():
    values = case(kind=np.zeros((3, 3), int), maps=np.zeros((4, 1, 1)))
    values["adversarial"] = values["original"]
    figure = plots.explanation(**values)
    assert "perturbation δ = 0" in texts(figure)
    assert figure.legends[0].get_title().get_text() == "none of 9 cells acts"
    assert [text.get_text()[-1] for text in figure.legends[0].get_texts()] == ["–"] * 3
    render(figure)


@pytest.mark.parametrize("channels", [(1,), ()])
def test_a_picture_of_one_channel_looks_like_the_same_in_three(channels):
    grey = np.random.default_rng(1).uniform(0.1, 0.9, (12, 10))
    one, three = grey.reshape(12, 10, *channels), np.repeat(grey[..., None], 3, -1)
    first = render(plots.explanation(**case(original=one, adversarial=one + 0.02)))
    second = render(plots.explanation(**case(original=three, adversarial=three + 0.02)))
    np.testing.assert_array_equal(first, second)


def test_arrays_of_jax_are_taken():
    values = case()
    arrays = {key: jnp.asarray(value) for key, value in values.items() if isinstance(value, np.ndarray)}
    singles = {key: np.asarray(value) for key, value in arrays.items()}
    first, second = (render(plots.explanation(**{**values, **one})) for one in (arrays, singles))
    np.testing.assert_array_equal(first, second)


def test_the_prediction_is_told_from_the_target():
    assert any("as targeted (t): goldfish" in text for text in texts(plots.explanation(**case())))
    failed = texts(plots.explanation(**case(predicted_name="tench")))
    assert "predicted: tench\ntarget t: goldfish" in failed


@pytest.mark.filterwarnings("error")
def test_characters_that_the_font_lacks_are_boxes_without_a_warning(tmp_path):
    plots.save(plots.explanation(**case(subtitle="图片 naïve ☺", true_name="猫 → cat")), tmp_path / "f.png")
    assert plots._wrap("图片 naïve ☺ $1", 9.0, 10.0) == r"□□ naïve ☺ \$1"


def test_lines_end_behind_words_and_marks():
    assert plots._wrap("ifgsm:steps=3,eps=0.1", 1.6, 10.0).split("\n") == ["ifgsm:steps=3,", "eps=0.1"]
    assert plots._wrap("efficientnet_lite0", 1.1, 9.0).split("\n") == ["efficientnet_", "lite0"]
    assert plots._wrap("a_wide_name_of_a_network", 1.1, 9.0).split("\n")[0] != "a_", "the rest would not fit"
    assert plots._wrap("two words", 0.6, 10.0).split("\n") == ["two", "words"]
    assert plots._wrap("and 1,000 cells", 0.75, 10.0).split("\n")[0] == "and"


def test_maps_are_explained_by_their_method():
    assert "add up to c's logit" in "".join(texts(plots.explanation(**case())))
    other = "".join(texts(plots.explanation(**case(), method="gradcam")))
    assert "by gradcam" in other
    assert "logit" not in other


LONG_NAMES = ("W" * 400, "a long name, with $5 and $6 in it, " * 9)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=() if (len(name) > 9) == (size != (224, 224)) else pytest.mark.exhaustive)
        for name in (*LONG_NAMES, "x\ny", "")
        for size in ((224, 224), (28, 28), (60, 180), (180, 60))
    ],
)
def test_long_names_stay_apart_and_inside(size, name):
    figure = plots.explanation(
        **case(size, 16, true_name=name, target_name=name + "!", predicted_name="an " + name, subtitle=name)
    )
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    whole = figure.bbox
    pieces = [text for text in figure.texts if text.get_text()]
    boxes = [text.get_window_extent() for text in pieces] + [figure.legends[0].get_window_extent()]
    frames = [axes.get_window_extent() for axes in figure.axes]
    for box in boxes:
        assert box.x0 >= 0
        assert box.x1 <= whole.width
        assert box.y0 >= 0
        assert box.y1 <= whole.height
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    assert not any(box.overlaps(frame) for box in boxes for frame in frames)


# ---- Maps


def test_four_maps_share_one_scale_and_one_colour_bar():
    maps = np.random.default_rng(3).normal(size=(4, 3, 2)) * np.array([1, 5, 0.1, 2])[:, None, None]
    figure = plots.explanation(**case(maps=maps))
    layers = {}
    for axes in figure.axes:
        for image in axes.images:
            if data(image).shape == (3, 2):
                layers[axes] = image
    ordered = sorted(layers, key=lambda axes: (-round(axes.get_position().y0, 3), axes.get_position().x0))
    top, bottom = ordered[:3], ordered[3:]
    for axes, value in zip([*top[:2], *bottom[:2]], maps, strict=True):
        np.testing.assert_array_equal(data(layers[axes]), value)
        assert layers[axes].get_clim() == (maps.min(), maps.max())
        assert layers[axes].norm is layers[top[0]].norm
    np.testing.assert_array_equal(data(layers[top[2]]), maps[0] - maps[1])
    np.testing.assert_array_equal(data(layers[bottom[2]]), maps[3] - maps[2])
    limit = max(np.abs(maps[0] - maps[1]).max(), np.abs(maps[3] - maps[2]).max())
    assert layers[top[2]].get_clim() == layers[bottom[2]].get_clim() == (-limit, limit)
    bars = [axes for axes in figure.axes if axes.get_xlabel()]
    assert [bar.get_xlim() for bar in bars] == [(maps.min(), maps.max()), (-limit, limit)]
    assert "logit" in bars[0].get_xlabel()


def test_maps_are_drawn_half_pixel_aligned_over_the_whole_picture():
    grey = np.full((16, 16, 3), 0.5)  # the picture below the map is 0.5 everywhere
    maps = np.zeros((4, 1, 2))
    maps[0] = [[0.0, 1.0]]
    figure = plots.explanation(**case((16, 16), original=grey, adversarial=grey, maps=maps))
    axes = next(a for a in figure.axes if a.images and np.array_equal(data(a.images[-1]), maps[0]))
    picture = window(axes, render(figure))
    wide = picture.shape[1]
    place = (np.arange(wide) + 2.5) / (wide + 4)  # `window` takes two pixels off each side
    level = np.clip((place - 0.25) / 0.5, 0, 1)  # samples at 1/4 and 3/4 of the width
    alpha = float(axes.images[-1].get_alpha() or 0)
    expected = alpha * matplotlib.colormaps["viridis"](level)[:, :3] + (1 - alpha) * 0.5
    np.testing.assert_allclose(picture[picture.shape[0] // 2] / 255, expected, atol=0.02)
    assert np.ptp(picture, axis=0).max() <= 3


# ---- Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"original": np.zeros((12, 11, 3))}, r"original has shape \(12, 11, 3\), adversarial \(12, 10, 3\)"),
        ({"original": np.zeros((12, 10, 2))}, r"original has shape \(12, 10, 2\), expected"),
        ({"adversarial": np.full((12, 10, 3), 1.5)}, r"adversarial lies in \[1.5, 1.5\]"),
        ({"adversarial": np.full((12, 10, 3), np.nan)}, "adversarial has values that are not finite"),
        ({"maps": np.full((4, 2, 2), np.inf)}, "maps has values that are not finite"),
        ({"maps": np.zeros((3, 2, 2))}, r"maps has shape \(3, 2, 2\), expected \[4,h,w\]"),
        ({"kind": np.full((3, 3), 4)}, r"kind holds the codes \[4\]"),
        ({"kind": np.zeros((3, 2), int)}, r"kind has shape \(3, 2\), suppression \+ promotion \(3, 3\)"),
        ({"cell": 5}, r"expected \(3, 2\) for cells of 5 px in a picture of 12 x 10"),
        ({"cell": 0}, "cell is 0"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        plots.explanation(**case(**changes))


# ---- Figures over many pictures


def test_bars_and_whiskers_stand_at_the_shares():
    nan = float("nan")
    shares = {
        "I-FGSM": {"suppression": (0.2, 0.1, 0.35), "balanced": (0.3, 0.3, 0.3), "promotion": (0.5, 0.4, 0.6)},
        "EAD": {"suppression": (nan, nan, nan), "balanced": (1.0, 0.9, 1.0)},
    }
    figure = plots.kinds_bar(shares)
    (axes,) = figure.axes
    bars = [container for container in axes.containers if isinstance(container, BarContainer)]
    heights = {bar.get_label(): [patch.get_height() for patch in bar.patches] for bar in bars}
    np.testing.assert_allclose(heights["suppression"], [20, nan])
    np.testing.assert_allclose(heights["balanced"], [30, 100])
    np.testing.assert_allclose(heights["promotion"], [50, nan])
    whiskers = next(item for item in axes.collections if isinstance(item, LineCollection)).get_segments()
    np.testing.assert_allclose(np.asarray(whiskers[0])[:, 1], [10, 35])
    assert [text.get_text() for text in axes.texts] == ["20 %", "no data", "30 %", "100 %", "50 %", "no data"]
    spots = [patch.get_x() + patch.get_width() / 2 for bar in bars for patch in bar.patches[:1]]
    np.testing.assert_allclose(np.diff(spots), 0.8 / 3)
    assert np.mean(spots) == pytest.approx(0)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({}, "empty"),
        ({"a": {"neutral": (0.1, 0.0, 0.2)}}, "has the kind 'neutral'"),
        ({"a": {"balanced": (0.3, 0.4, 0.5)}}, "low <= mean"),
        ({"a": {"balanced": (30.0, 20.0, 40.0)}}, r"\[0, 1\]"),
    ],
)
def test_shares_are_checked(shares, message):
    with pytest.raises(ValueError, match=message):
        plots.kinds_bar(shares)


def test_effects_against_norms_with_zeros_at_the_edge():
    size = np.array([[0.0, 0.0, 1e-3], [1e-2, 1e-1, 1.0]])
    effect = np.array([[0.0, 2.0, 0.0], [0.4, 0.2, 5.0]])
    figure = plots.scatter_effect({"C&W": size, "rising": [1, 2, 3], "falling": [1, 2, 3], "flat": [1, 2, 3]},
                                  {"C&W": effect, "rising": [1, 9, 10], "falling": [3, 2, 0.1], "flat": [1, 1,
                                  1]})  # fmt: skip
    titles = [axes.get_title() for axes in figure.axes]
    rho = stats.spearmanr(size.ravel(), effect.ravel())[0]
    assert titles[0] == f"C&W\nSpearman's ρ = {rho:.2f}; 6 cells, 3 with a zero"
    assert titles[1].endswith("ρ = 1.00; 3 cells")
    assert titles[2].endswith("ρ = -1.00; 3 cells")
    assert titles[3].endswith("ρ undefined; 3 cells")
    axes = figure.axes[0]
    points, rings = axes.lines[:2]
    np.testing.assert_array_equal(points.get_xydata(), [[1e-2, 0.4], [1e-1, 0.2], [1.0, 5.0]])
    (left, _), (bottom, _) = axes.get_xlim(), axes.get_ylim()
    x, y = np.asarray(rings.get_xydata()).T
    assert left < x[0] == x[1] < 1e-3 == x[2]
    assert bottom < y[0] == y[2] < 0.1 < y[1] == 2.0
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_ratios_are_clipped_and_cells_without_effect_left_out():
    ratio = np.array([np.inf, -np.inf, np.nan, 1.0, -1.0, 1.01, 40.0, 0.0])
    effect = np.array([1.0, 2.0, 0.0, 3.0, 4.0, 5.0, 6.0, 0.0])
    figure = plots.scatter_ratio({"EAD": effect}, {"EAD": ratio})
    (axes,) = figure.axes
    groups = {line.get_label(): np.asarray(line.get_xydata()).tolist() for line in axes.lines}
    assert groups["suppression"] == [[2.0, -10.0]]
    assert groups["balanced"] == [[3.0, 1.0], [4.0, -1.0]]
    assert groups["promotion"] == [[1.0, 10.0], [5.0, 1.01], [6.0, 10.0]]
    assert axes.get_title() == "EAD (6 cells)\nsuppression 17 %, balanced 33 %, promotion 50 %"
    levels = [np.asarray(line.get_ydata())[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert levels == [-1, 1]


@pytest.mark.parametrize(
    ("definition", "overall", "note"),
    [
        (effect.PAPER, "effect of the cell, s + p (logits)", ""),
        (effect.Definition("add_one_in", "log_softmax"), None, "\n(add one in, log-probabilities)"),
        (effect.Definition("first_order", "softmax"), None, "\n(first-order estimate, probabilities)"),
    ],
)
def test_figures_name_effects_that_are_not_the_papers(definition, overall, note):
    one = {"a": [1.0, 2.0]}
    overall = overall or f"effect of the cell, s + p{note}"
    assert plots.scatter_effect(one, one, definition=definition).get_supylabel() == overall
    assert plots.scatter_ratio(one, one, definition=definition).get_supxlabel() == overall
    (axes,) = plots.kinds_bar({"a": {"balanced": (0.1, 0.0, 0.2)}}, definition=definition).axes
    assert axes.get_ylabel() == f"share of the cells that act{note}"
    assert f"4 × 4 px; opaque where s + p is large{note}" in texts(plots.explanation(**case(definition=definition)))


@pytest.mark.parametrize("draw", [plots.scatter_effect, plots.scatter_ratio])
def test_scatter_arguments_must_match(draw):
    with pytest.raises(ValueError, match="attacks"):
        draw({"a": [1.0]}, {"b": [1.0]})
    with pytest.raises(ValueError, match="shape"):
        draw({"a": [1.0]}, {"a": [1.0, 2.0]})
    with pytest.raises(ValueError, match="negative"):
        draw({"a": [-1.0]}, {"a": [1.0]})


def test_scatter_without_any_positive_value_is_drawn():
    render(plots.scatter_effect({"a": [0.0, 0.0]}, {"a": [0.0, 0.0]}))
    render(plots.scatter_ratio({"a": [0.0, 0.0]}, {"a": [np.nan, np.nan]}))


# ---- Files


def test_the_same_figure_gives_the_same_bytes_whatever_the_callers_settings(tmp_path):
    def draw(name):
        plots.save(plots.explanation(**case()), tmp_path / name)
        plots.save(plots.scatter_ratio({"a": [1.0, 2.0]}, {"a": [0.5, 3.0]}), tmp_path / f"scatter-{name}")

    draw("1.png")
    settings: dict[Any, Any] = {
        "font.size": 30,
        "axes.facecolor": "red",
        "image.cmap": "hot",
        "lines.linewidth": 9,
        "figure.dpi": 50,
    }
    with matplotlib.rc_context(settings):
        draw("2.png")
        assert matplotlib.rcParams["font.size"] == 30
    for prefix in ("", "scatter-"):
        assert (tmp_path / f"{prefix}1.png").read_bytes() == (tmp_path / f"{prefix}2.png").read_bytes()
    with Image.open(tmp_path / "1.png") as picture:
        assert picture.size[0] == 1700
        assert set(picture.info) == {"dpi"}  # no date, no version


def test_a_saved_figure_keeps_the_bits_asked_for(tmp_path):
    figure = plots.explanation(**case())
    exact = render(figure)
    plots.save(figure, tmp_path / "deep" / "6.png")
    plots.save(plots.explanation(**case()), tmp_path / "8.png", bits=8)
    with Image.open(tmp_path / "8.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), exact)
    with Image.open(tmp_path / "deep" / "6.png") as picture:
        saved = np.asarray(picture).astype(int)
    assert len(np.unique(saved)) <= 64
    assert np.abs(saved - exact).max() <= 3
    assert (saved[0, 0] == 255).all()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    def fail(self, stream, **options):
        stream.write(b"half")
        raise OSError("disk full")

    path = tmp_path / "figure.png"
    path.write_text("old")
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        plots.save(plots.kinds_bar({"a": {"balanced": (0.5, 0.4, 0.6)}}), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["figure.png"]
    assert path.read_text() == "old"


def test_pyplot_is_not_imported():
    code = "import sys, jaxinterp.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_success_curves_rise_at_the_distances_to_the_share_broken():
    distances = {
        "l2": {"pgd": [0.5, 0.25, 1.0], "cw:steps=5": []},
        "linf": {"pgd": [0.03, 0.03, 0.03], "cw:steps=5": [0.1]},
    }
    figure = plots.success_curves(distances, total=4)
    l2, linf = figure.axes
    x, y = (np.asarray(v, float) for v in l2.lines[0].get_data())
    for budget, share in ((0.249, 0), (0.251, 1 / 4), (0.6, 2 / 4), (1.1, 3 / 4)):
        assert y[np.searchsorted(x, budget, side="right") - 1] == share
    assert not np.any(l2.lines[1].get_ydata())
    assert np.max(np.asarray(linf.lines[0].get_ydata(), float)) == 3 / 4
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["pgd", "cw:steps=5"]
    for wrong in ({}, {"l2": {}}):
        with pytest.raises(ValueError, match="empty"):
            plots.success_curves(wrong, total=4)
    with pytest.raises(ValueError, match="3 successes, expected at most 2"):
        plots.success_curves(distances, total=2)


def test_long_names_and_norms_without_a_success_leave_success_curves_their_panels():
    """A name on two lines is as high as two; axes without data have the range of their norm."""
    rng = np.random.default_rng(0)

    def drawn(*names):
        distances = {norm: {name: rng.uniform(1, 2, 3) for name in names} for norm in ("l1", "l2")}
        figure = plots.success_curves({"l0": {name: [] for name in names}, **distances}, total=4)
        FigureCanvasAgg(figure).draw()
        return figure, figure.axes[0].get_window_extent().height / figure.dpi

    long = [f"mifgsm:eps={i}/255,decay=0.9,transforms=vmi(samples=5,beta=1.5)+ni+si+" + "x" * 40 for i in range(20)]
    figure, height = drawn(*long)
    assert all("\n" in text.get_text() for text in figure.legends[0].get_texts())
    assert height == pytest.approx(drawn("pgd")[1], abs=0.2)
    assert figure.axes[0].get_xlim() == (1, 1000)


def estimates(*means):
    return [Estimate(mean, mean - 0.1, mean + 0.2, 9) for mean in means]


def test_curves_draw_means_bands_and_the_reference():
    panels = {"one": {"a": estimates(0.2, 0.5), "b": estimates(0.9, 0.1)}, "two": {"b": estimates(0.3, 0.4)}}
    figure = plots.curves(panels, (1, 4), xlabel="eps", reference=("null", [0.5, 0.6]), log=True)
    first, second = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["one", "two"]
    lines = {line.get_label(): line for line in first.lines}
    np.testing.assert_allclose(np.asarray(lines["a"].get_ydata()), [0.2, 0.5])
    np.testing.assert_allclose(np.asarray(lines["null"].get_ydata()), [0.5, 0.6])
    heights = np.asarray(first.collections[0].get_paths()[0].vertices)[:, 1]
    np.testing.assert_allclose([heights.min(), heights.max()], [0.1, 0.7])
    # A line has the same colour in every panel.
    assert lines["b"].get_color() == next(line for line in second.lines if line.get_label() == "b").get_color()
    assert lines["a"].get_color() != lines["b"].get_color()
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"a", "b", "null"}
    named = plots.curves(panels, (0, 1), xlabel="layer", names=("stem", "head"))
    assert [label.get_text() for label in named.axes[0].get_xticklabels()] == ["stem", "head"]
    with pytest.raises(ValueError, match="one, a: 2 estimates for 3 values of eps"):
        plots.curves(panels, (1, 2, 4), xlabel="eps")
    with pytest.raises(ValueError, match="at least one measure"):
        plots.curves({}, (1, 2), xlabel="eps")


def test_bars_draw_means_and_intervals_in_groups():
    some: dict[str, Estimate] = dict(zip(("suppression", "promotion"), estimates(0.2, 0.5), strict=True))
    nothing = {"promotion": Estimate(np.nan, np.nan, np.nan, 0)}
    figure = plots.bars({"map": {"cw": some, "ead": nothing}}, ylabel="mean")
    (axes,) = figure.axes
    drawn = [bar for group in axes.containers if isinstance(group, BarContainer) for bar in group.patches]
    heights = sorted(bar.get_height() for bar in drawn if np.isfinite(bar.get_height()))
    np.testing.assert_allclose(heights, [0.2, 0.5])
    colours = {to_hex(bar.get_facecolor()).upper() for bar in drawn}
    assert colours == {plots.COLOURS["suppression"], plots.COLOURS["promotion"]}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cw", "ead"]
    [mark] = axes.texts  # where there is no estimate at all, as of suppression, nothing is missing
    assert mark.get_text() == "no data"
    assert isinstance(mark, Annotation)
    assert mark.xy[0] > 1
    with pytest.raises(ValueError, match="at least one title"):
        plots.bars({}, ylabel="mean")


def test_magnified_perturbations_share_a_factor_and_windows_show_what_is_in_them():
    original = np.full((12, 12, 3), 0.5)
    strong, weak = original.copy(), original.copy()
    strong[2, 3] += 0.125
    weak[8, 8] -= 0.015625
    figure = plots.magnified(
        original, {"strong": strong, "weak": weak}, {"flat": (0, 0, 4), "edge": (6, 6, 6)}, title="t"
    )
    assert len(figure.axes) == 12
    of_weak = [data(axes.images[0]) for axes in figure.axes[8:]]
    assert of_weak[1].shape == (12, 12, 3)
    assert of_weak[1][8, 8, 0] == pytest.approx(0.5 - 4 * 0.015625)  # the factor of the strong one
    np.testing.assert_allclose(of_weak[3], of_weak[1][6:, 6:])
    np.testing.assert_allclose(data(figure.axes[6].images[0])[2, 3], 1.0)
    np.testing.assert_allclose(data(figure.axes[2].images[0]), original[:4, :4])
    with pytest.raises(ValueError, match=r"windows\['w'\] is \(9, 0, 4\), which is not inside 12 x 12"):
        plots.magnified(original, {"a": weak}, {"w": (9, 0, 4)}, title="")
    with pytest.raises(ValueError, match="at least one attack"):
        plots.magnified(original, {}, {}, title="")
    with pytest.raises(ValueError, match=r"adversarial\['a'\] has shape"):
        plots.magnified(original, {"a": weak[:5]}, {}, title="")


def test_a_comparison_has_a_dot_for_every_row_and_shares_of_kinds():
    some = {"one": {"a": Estimate(0.5, 0.2, 0.8, 9), "b": Estimate(0.0, 0.0, 0.3, 9)}}
    some["two"] = {"a": Estimate(1.0, 0.9, 1.0, 9), "b": Estimate(np.nan, np.nan, np.nan, 0)}
    shares = {"one": {"a": {"suppression": 0.25, "balanced": 0.25, "promotion": 0.5}}}
    figure = plots.comparison(
        {"first": ["a"], "none": [], "second": ["b"]}, {"x": some, "y": some}, shares, logs=("y",), title="t"
    )
    linear, log, kinds = figure.axes

    def dots(axes) -> list[Any]:
        return [line for line in axes.lines if line.get_marker() == "o"]

    assert [tuple(dot.get_xdata()) for dot in dots(linear)] == [(0.5,), (0.0,), (1.0,)]
    assert [dot.get_markerfacecolor() == "none" for dot in dots(linear)] == [False, False, False]
    one, zero, two = dots(log)
    assert zero.get_markerfacecolor() == "none"
    assert log.get_xlim()[0] < zero.get_xdata()[0] < 0.2
    assert (one.get_xdata()[0], two.get_xdata()[0]) == (0.5, 1.0)
    places = [dot.get_ydata()[0] for dot in dots(linear)]
    assert places[0] < places[2] < places[1]  # both of the first row above the second
    bars: list[Any] = list(kinds.patches)
    [widths] = [[bar.get_width() for bar in bars if bar.get_width() < 1]]
    np.testing.assert_allclose(widths, [0.25, 0.25, 0.5])
    assert {"a", "b", "first", "second", "t"} <= {text.get_text() for text in figure.texts}
    with pytest.raises(ValueError, match="at least one panel and one row"):
        plots.comparison({}, {"x": some}, {})
    with pytest.raises(ValueError, match="groups lack the rows b"):
        plots.comparison({"first": ["a"]}, {"x": some}, {})
    negative = {"x": {"one": {"a": Estimate(-1.0, -2.0, 0.0, 3)}}}
    with pytest.raises(ValueError, match="negative values on a logarithmic axis"):
        plots.comparison({"first": ["a"]}, negative, {}, logs=("x",))


def test_matrices_have_one_scale_and_a_number_in_every_place():
    some = {"x": {"x": Estimate(1.0, 0.8, 1.0, 9), "y": Estimate(0.25, 0.1, 0.5, 8)}}
    some["y"] = {"x": Estimate(np.nan, np.nan, np.nan, 0), "y": Estimate(0.5, 0.2, 0.8, 9)}
    figure = plots.matrices({"one": some, "two": some}, row="from", column="to")
    for axes in figure.axes[:2]:
        np.testing.assert_array_equal(data(axes.images[0]), [[1, 0.25], [np.nan, 0.5]])
        assert axes.images[0].get_clim() == (0, 1)
        shown = [text.get_text() for text in axes.texts]
        assert shown == ["100 %\n80 % to 100 %", "25 %\n10 % to 50 %", "–", "50 %\n20 % to 80 %"]
    for wrong, message in (
        ({}, "at least one title"),
        ({"one": some, "two": {"x": some["x"]}}, "differ in their rows or columns"),
        ({"one": {"x": {"x": Estimate(1.5, 1.0, 2.0, 3)}}}, r"outside \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.matrices(wrong, row="from", column="to")


def test_concepts_stand_in_columns_under_their_categories():
    groups = {
        "part": {f"part {i}": 1 for i in range(30)},
        "empty": {},
        "object": {"cat": 2, "dog": 40, "$ant$": 2},
    }
    figure = plots.concept_bars(groups, title="a layer", subtitle="how")
    assert texts(figure) == ["a layer", "how"]
    lines = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert lines[0][:7] == ["object: 44 units, 3 concepts", "dog", "40", r"\$ant\$", "2", "cat", "2"]
    assert lines[0][7] == "part: 30 units, 30 concepts"
    assert [column[0] for column in lines[1:]] == ["part, continued"] * (len(lines) - 1)
    named = [text for column in lines for text in column if text.startswith("part ")]
    assert named == sorted(groups["part"])  # of equals by name, each once
    bars = [
        patch for axes in figure.axes for each in axes.containers if isinstance(each, BarContainer) for patch in each
    ]
    assert [patch.get_width() for patch in bars] == [40, 2, 2] + [1] * 30
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    colours = [to_hex(patch.get_facecolor()) for patch in bars]
    assert len(set(colours[:3])) == len(set(colours[3:])) == 1
    assert colours[0] != colours[3]


@pytest.mark.parametrize("count", [1, 14, 15, 57, pytest.param(250, marks=pytest.mark.exhaustive)])
def test_no_concept_is_cut_off_or_overlaps(count):
    names = {f"swimming pool-outdoor {i}": 1 + i for i in range(count)}
    figure = plots.concept_bars({"scene": names, "color": {"red-c": 3}}, title="a layer with a name", subtitle="how")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = figure.get_size_inches() * figure.dpi
    boxes = [text.get_window_extent() for axes in figure.axes for text in axes.texts]
    boxes += [text.get_window_extent() for text in figure.texts]
    assert len(boxes) >= 2 * (count + 1) + 4
    for box in boxes:
        assert 0 <= box.x0 < box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height
    for one, other in itertools.combinations(boxes, 2):
        assert not one.shrunk(0.9, 0.6).overlaps(other.shrunk(0.9, 0.6))


@pytest.mark.parametrize("groups", [{}, {"scene": {}}, {"scene": {"street": 0}}])
def test_concepts_are_checked(groups):
    with pytest.raises(ValueError, match="expected at least one"):
        plots.concept_bars(groups, title="")
