"""What the explorer embeds: the pictures and numbers it was given, rounded as it says."""

import base64
import io
import json
import math
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from jaxinterp import effect, explorer, plots
from jaxinterp.explain import page


def arguments(size=(8, 8), cell=4, channels=3, seed=0, **changes: Any) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    grid = tuple(math.ceil(all / one) for all, one in zip(size, effect.sides(cell), strict=True))
    clean = random.random((*size, channels), np.float32)
    suppression, promotion = random.random((2, *grid), np.float32)
    ratio = np.log2(promotion / suppression)
    return {
        "id": "a.png",
        "attack": "C&W",
        "true": "tabby",
        "target": "tench",
        "predicted": "tench",
        "success": True,
        "clean": clean,
        "adversarial": np.clip(clean + random.normal(0, 0.01, clean.shape), 0, 1).astype(np.float32),
        "suppression": suppression,
        "promotion": promotion,
        "ratio": ratio,
        "kind": 2 + (ratio > 1) - (ratio < -1),
        "norm": random.random(grid, np.float32),
        "maps": random.normal(size=(4, 2, 3)).astype(np.float32),
        "cell": cell,
    } | changes


def decoded(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))))


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_those_of_the_arrays(channels):
    given = arguments(channels=channels)
    item = explorer.item(**given)
    shape = (8, 8) if channels == 1 else (8, 8, 3)
    before, after = given["clean"].astype(np.float64), given["adversarial"].astype(np.float64)
    for name, expected in (("original", before), ("adversarial", after)):
        np.testing.assert_array_equal(decoded(item[name]), np.rint(expected * 255).reshape(shape))
    factor = item["magnification"]
    assert factor == plots.magnification(after - before) > 1
    shown = np.clip(0.5 + factor * (after - before), 0, 1) * 255
    np.testing.assert_array_equal(decoded(item["perturbation"]), np.rint(shown).reshape(shape))


def test_numbers_are_those_of_the_arrays_row_by_row():
    given = arguments(size=(12, 8))
    item = json.loads(explorer.as_json(explorer.item(**given)))
    assert set(item) == set(explorer.KEYS)
    assert (item["size"], item["cell"], item["grid"], item["success"]) == ([12, 8], [4, 4], [3, 2], True)
    assert [item[key] for key in ("id", "attack", "true", "target", "predicted")] == [
        *("a.png", "C&W", "tabby", "tench", "tench")
    ]
    for key in ("suppression", "promotion", "ratio", "norm"):
        assert item[key] == [float(f"{value:.4g}") for value in given[key].ravel()]
    assert item["kind"] == given["kind"].ravel().tolist()
    np.testing.assert_allclose(item["maps"], given["maps"], rtol=5.1e-6)
    assert np.shape(item["maps"]) == (4, 2, 3)
    strength = (given["suppression"] + given["promotion"])[given["kind"] != 0]
    assert item["full"] == pytest.approx(np.percentile(strength, 98))


def test_the_four_maps_share_a_scale_and_so_do_the_differences():
    maps = np.zeros((4, 2, 2))
    maps[0, 0, 0], maps[1, 1, 1], maps[2, 0, 1], maps[3, 1, 0] = 5, 9, -3, 2
    item = explorer.item(**arguments(maps=maps))
    assert item["scale"] == [-3, 9]
    assert item["limit"] == 9  # of F(x₀, t₀) - F(x′, t₀), at its last place; the other difference reaches 3
    constant = explorer.item(**arguments(maps=np.full((4, 1, 1), 2.0)))
    assert (constant["scale"], constant["limit"]) == ([1.5, 2.5], 1)


def test_infinite_and_undefined_ratios_survive_json():
    ratio = np.array([[np.inf, -np.inf], [np.nan, -1.23456]])
    text = explorer.as_json(explorer.item(**arguments(ratio=ratio)))
    assert json.loads(text)["ratio"] == ["inf", "-inf", None, -1.235]
    assert "NaN" not in text
    assert "Infinity" not in text


def test_a_failed_attack_has_no_perturbation_and_cells_of_no_kind():
    given = arguments()
    none = np.zeros((2, 2))
    changes = {
        **{"adversarial": given["clean"], "success": False, "kind": none.astype(np.int32)},
        **{"suppression": none, "promotion": none, "norm": none, "ratio": np.full((2, 2), np.nan)},
    }
    item = explorer.item(**given | changes)
    assert item["success"] is False
    assert item["original"] == item["adversarial"]
    assert (decoded(item["perturbation"]) == 128).all()
    assert item["magnification"] == 1
    assert item["kind"] == [0, 0, 0, 0]
    assert item["ratio"] == [None] * 4
    assert item["full"] == 1
    json.loads(explorer.as_json(item))


@pytest.mark.parametrize(
    ("size", "cell", "grid"),
    [((3, 5), 1, [3, 5]), ((10, 7), 4, [3, 2]), ((10, 7), (5, 2), [2, 4]), ((4, 4), 9, [1, 1])],
)
def test_cells_of_a_pixel_oblong_ones_some_that_do_not_divide_the_side_and_one_over_all(size, cell, grid):
    item = explorer.item(**arguments(size=size, cell=cell))
    assert (item["grid"], item["cell"]) == (grid, list(effect.sides(cell)))
    assert len(item["suppression"]) == len(item["kind"]) == grid[0] * grid[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adversarial": np.zeros((8, 9, 3))}, r"adversarial \(8, 9, 3\)"),
        ({"clean": np.zeros((8, 8))}, r"clean has shape \(8, 8\), expected \[H,W,3\]"),
        ({"clean": np.full((8, 8, 3), np.nan)}, "finite"),
        ({"norm": np.zeros((3, 2))}, r"norm has shape \(3, 2\), expected \(2, 2\) for cells of 4 px"),
        ({"kind": np.full((2, 2), 4)}, r"codes \[4\], expected 0 to 3"),
        ({"maps": np.zeros((3, 2, 2))}, r"maps has shape \(3, 2, 2\)"),
        ({"maps": np.full((4, 2, 2), np.inf)}, "finite"),
        ({"cell": 0}, "at least 1 pixel"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        explorer.item(**arguments() | changes)


def test_every_picture_is_embedded_once():
    first, second = arguments(), arguments(seed=1)
    items = [
        explorer.item(**given | {"attack": attack, "adversarial": adversarial})
        for given in (first, second)
        for attack, adversarial in (("A", given["adversarial"]), ("B", given["clean"]))
    ]
    pieces = list(explorer.pieces(items))
    pictures = [json.loads(piece["json"]) for piece in pieces if "id" not in piece]
    found = [json.loads(piece["json"]) for piece in pieces if "id" in piece]
    assert [(piece["id"], piece["attack"]) for piece in pieces if "id" in piece] == [("a.png", "A"), ("a.png", "B")] * 2
    assert [item["original"] for item in found] == [0, 0, 4, 4]
    assert [item["adversarial"] for item in found] == [1, 0, 5, 4]  # B changed nothing
    assert found[1]["perturbation"] == found[3]["perturbation"]
    for item, embedded in zip(items, found, strict=True):
        for layer in explorer.LAYERS:
            assert pictures[embedded[layer]] == item[layer]
    assert len(pictures) == len(set(pictures)) == 7  # three layers of each, but the grey of B once


def test_items_are_asked_for_one_at_a_time():
    asked = []

    def items():
        for attack in "AB":
            asked.append(attack)
            yield explorer.item(**arguments(attack=attack))

    pieces = explorer.pieces(items())
    assert asked == []
    while "id" not in next(pieces):
        assert asked == ["A"]
    assert asked == ["A"]


def test_an_item_that_lacks_a_key_is_named():
    item = explorer.item(**arguments())
    del item["norm"], item["scale"]
    with pytest.raises(ValueError, match=r"explorer\[0\] lacks norm, scale"):
        list(explorer.pieces([item]))


@pytest.mark.parametrize("name", ["</script><b>", "<!-- <script>", "é\u2028\ud800", '"\\'])
def test_names_cannot_end_the_script(name):
    text = explorer.as_json({"id": name})
    assert "<" not in text
    assert text.isascii()
    assert json.loads(text) == {"id": name}


def test_colours_are_those_of_the_figures():
    stops = explorer.colours()
    for key, name in (("maps", "viridis"), ("differences", "PuOr_r")):
        known = np.array([[int(stop[at : at + 2], 16) for at in (1, 3, 5)] for stop in stops[key]])
        places = np.linspace(0, 1, 256)
        between = np.stack([np.interp(places, np.linspace(0, 1, len(known)), channel) for channel in known.T], axis=1)
        exact = matplotlib.colormaps[name](places)[:, :3] * 255
        assert np.abs(between - exact).max() < 4


def chunks(ids, attacks, size=2):
    """As `compute.stored_parts` yields them: the attacks of the same pictures one after the other."""
    for start in range(0, len(ids), size):
        some = ids[start : start + size]
        for attack in attacks:
            given = [arguments(seed=ids.index(name)) for name in some]
            arrays = {key: np.stack([each[key] for each in given]) for key in ("clean", "adversarial", "maps", "norm")}
            cells = ("suppression", "promotion", "ratio", "kind")
            arrays |= {key: np.stack([each[key] for each in given]) for key in cells}
            yield attack, arrays | {"ids": np.array(some), "adversarial_class": np.arange(len(some)) + start}


@pytest.mark.parametrize(
    ("most", "cells", "pictures"), [(96, 1e9, 5), (8, 1e9, 4), (7, 1e9, 3), (1, 1e9, 1), (96, 6, 3), (96, 0, 1)]
)
def test_a_run_shows_its_first_pictures_under_every_attack(monkeypatch, most, cells, pictures):
    """As many as allowed, by their number and by that of the cells (in cells of a picture)."""
    monkeypatch.setattr(page, "EXPLORED", most)
    monkeypatch.setattr(page, "EXPLORED_CELLS", int(cells * arguments()["kind"].size))
    ids, read = [f"{index}.png" for index in range(5)], []
    rows = [
        {"id": name, "attack": attack, "label_name": f"true {name}", "target_name": "t", "success": attack == "A"}
        for name in ids
        for attack in "AB"
    ]

    def reading():
        for attack, arrays in chunks(ids, "AB"):
            read.append(attack)
            yield attack, arrays

    items = list(page.explored("class {}".format, rows, reading(), 4))
    assert sorted((item["id"], item["attack"]) for item in items) == [(n, a) for n in ids[:pictures] for a in "AB"]
    assert len(read) <= 2 * -(-pictures // 2) + 1  # chunks beyond the last that is shown are not read
    for item in items:
        index = ids.index(item["id"])
        given = arguments(seed=index)
        assert item["suppression"] == [float(f"{value:.4g}") for value in given["suppression"].ravel()]
        assert (item["true"], item["predicted"]) == (f"true {item['id']}", f"class {index}")
        assert item["success"] == (item["attack"] == "A")
