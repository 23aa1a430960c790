"""The page: one file that says what it was given, whatever the names contain."""

import base64
import io
import json
import re
import shutil
import subprocess
import tracemalloc
from html.parser import HTMLParser
from typing import Any
from urllib.parse import unquote

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxinterp import cam, explorer, report
from jaxinterp.effect import Definition

NAME = "<b>\"x\"</b> & 'y'"


class Page(HTMLParser):
    """Elements, ids and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.in_cell = self.in_script = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True
        if tag == "script":
            self.in_script = True

    def handle_endtag(self, tag):
        if tag == "script":
            self.in_script = False
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        self.texts.append(data)
        if self.in_script:
            self.scripts.append((self.elements[-1][1], data))
        if self.in_cell:
            self.rows[-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def figure(path, seed=0, size=(24, 16)):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(path)
    return path


def arguments(folder, **changes: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    pictures = [
        {
            "id": f"img {index}",
            "attack": attack,
            "true": NAME,
            "target": "tabby cat",
            "success": success,
            "facts": {"l2": np.float32(0.5), "share": "31 %", "found": True, "score": float("nan")},
            "figure": figure(folder / f"{index}.png", index),
        }
        for index, (attack, success) in enumerate([("C&W", True), ("EAD", False), ("EAD", True)])
    ]
    return {
        "title": "Four attacks",
        "facts": {"network": NAME, "seed": "0"},
        "summary": [
            {"attack": "C&W", "success": 0.95, "l2": np.float32(0.70551), "n": 20},
            {"attack": "EAD", "success": 1.0, "l2": float("nan"), "n": jnp.asarray(7)},
            {"attack": "StrAttack", "success": None},
        ],
        "summary_columns": [
            ("attack", "attack", ""),
            ("success", "rate", ".0%"),
            ("l2", "L2", ".3f"),
            ("n", "n", "d"),
        ],
        "pictures": pictures,
        "notes": [f"Means over {NAME}."],
    } | changes


def written(tmp_path, **changes):
    values = arguments(tmp_path / "figures", **changes)
    return report.write(tmp_path / "out" / "page.html", **values).read_text(encoding="utf-8")


def test_figures_are_inside_byte_for_byte_in_order(tmp_path):
    wide = figure(tmp_path / "wide.png", 9, (4, 1000))
    page = Page(written(tmp_path, overview=[("Kinds of cells", wide)]))
    images = page.all("img")
    prefix = "data:image/png;base64,"
    found = [base64.b64decode((image["src"] or "").removeprefix(prefix)) for image in images]
    assert found == [wide.read_bytes()] + [(tmp_path / "figures" / f"{n}.png").read_bytes() for n in range(3)]
    assert all((image["src"] or "").startswith(prefix) for image in images)
    assert [(image["width"], image["height"]) for image in images] == [("1000", "4")] + [("16", "24")] * 3
    assert all(image["alt"] for image in images)


def test_nothing_is_fetched(tmp_path):
    text = written(tmp_path)
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    page = Page(text)
    assert not page.all("link")
    assert not any("src" in script for script in page.all("script"))
    assert all((anchor["href"] or "").startswith("#") for anchor in page.all("a"))
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert (policy or "").startswith("default-src 'none'; img-src data:;")


def test_names_are_text(tmp_path):
    text = written(tmp_path, title=NAME, skipped=[(NAME, NAME)], summary=[{"attack": NAME}])
    assert "<b>" not in text
    page = Page(text)
    assert not page.all("b")
    assert page.texts.count(NAME) >= 6  # title, heading, a fact, the contents, what was skipped and why
    assert f"Means over {NAME}." in page.texts
    assert any(image["alt"] == f"C&W on img 0, {NAME} to tabby cat" for image in page.all("img"))


def test_every_link_has_a_goal_and_every_id_is_unique(tmp_path):
    values = arguments(tmp_path / "figures")
    values["pictures"][2]["id"] = values["pictures"][1]["id"]  # the same attack and picture twice
    text = report.write(tmp_path / "page.html", **values).read_text(encoding="utf-8")
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {(anchor["href"] or "")[1:] for anchor in page.all("a")} <= set(ids)
    sections = [section["id"] for section in page.all("section")]
    assert sections == ["picture-c-w-img-0-1", "picture-ead-img-1-1", "picture-ead-img-1-2"]
    linked = [anchor["href"] for anchor in page.all("a")]
    assert all(f"#{section}" in linked for section in sections)


def test_summary_is_formatted_column_by_column(tmp_path):
    page = Page(written(tmp_path))
    assert page.rows[:4] == [
        ["attack", "rate", "L2", "n"],
        ["C&W", "95%", "0.706", "20"],
        ["EAD", "100%", "–", "7"],
        ["StrAttack", "–", "–", "–"],
    ]
    cells = page.all("td")[:12]
    assert [cell.get("data-sort") for cell in cells[:4]] == [None, "0.95", str(float(np.float32(0.70551))), "20.0"]
    assert ["class" in cell for cell in cells] == [False, True, True, True] * 3


def test_contents_and_sections_carry_what_the_filters_need(tmp_path):
    page = Page(written(tmp_path))
    expected = [("C&W", "yes"), ("EAD", "no"), ("EAD", "yes")]
    for tag in ("tr", "section"):
        found = [(a["data-attack"], a["data-success"]) for a in page.all(tag) if "data-attack" in a]
        assert found == expected
    assert page.rows[5] == ["img 0", "C&W", NAME, "tabby cat", "success"]
    assert page.rows[6][-1] == "failure"
    assert "Contents: 3 figures, 2 with the target reached" in page.texts
    facts = ["0.5", "31 %", "yes", "–"]
    assert [text for text in page.texts if text in facts][-4:] == facts


def test_what_the_figures_mean_is_said_with_the_null(tmp_path):
    text = " ".join(Page(written(tmp_path)).texts)
    for word in ("suppression-dominated", "promotion-dominated", "balanced", "shuffled", "√0.30 = 0.548"):
        assert word in text


@pytest.mark.parametrize(
    ("definition", "said"),
    [
        (Definition(), "The change is undone in one cell at a time, and the network is asked again."),
        (Definition("leave_one_out", "softmax"), "the cell had lowered the true class's probability"),
        (Definition("add_one_in", "log_softmax"), "alone lowers the true class's log-probability"),
        (Definition("first_order"), "is not computed but an estimate of first order"),
    ],
)
def test_the_page_says_what_an_effect_is(tmp_path, definition, said):
    page = Page(written(tmp_path, explorer=[explorer.item(**layers())], definition=definition))
    text = " ".join("".join(page.texts).split())
    assert said in text
    assert ("Kinds of cells (" in text) == (f'["effect", "{definition}"]' in text) == (definition != Definition())


def test_pictures_left_out_are_listed(tmp_path):
    text = written(tmp_path, skipped=[("a.jpg", "truncated"), ("b.jpg", "misclassified")])
    page = Page(text)
    assert page.rows[-2:] == [["a.jpg", "truncated"], ["b.jpg", "misclassified"]]
    assert "2 pictures were left out of what is above." in page.texts
    assert 'id="skipped"' not in written(tmp_path)


def test_a_page_without_anything_is_a_page(tmp_path):
    text = written(tmp_path, facts={}, summary=[], pictures=[], notes=[])
    assert "There is no picture to show." in text
    assert "There is nothing to summarise." in text


def test_the_same_input_gives_the_same_bytes(tmp_path):
    assert written(tmp_path) == written(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"attack": ...}, ValueError, r"pictures\[1\] lacks attack"),
        ({"figure": "missing.png"}, FileNotFoundError, r"missing\.png"),
        ({"figure": __file__}, ValueError, "is not a PNG"),
    ],
)
def test_bad_pictures_are_named_and_the_old_page_stays(tmp_path, change, error, message):
    values = arguments(tmp_path / "figures")
    for key, value in change.items():
        if value is ...:
            del values["pictures"][1][key]
        else:
            values["pictures"][1][key] = value
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(error, match=message):
        report.write(path, **values)
    assert path.read_text() == "old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["figures", "page.html"]


def test_a_format_that_does_not_fit_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"summary column 'success': 0\.95 does not fit the format 'd'"):
        written(tmp_path, summary_columns=[("success", "rate", "d")])


def test_many_figures_are_linked_by_relative_paths_and_not_inside(tmp_path):
    values = arguments(tmp_path / "figures of <all>")
    one = values["pictures"][0]
    values["pictures"] = [{**one, "id": str(n)} for n in range(report.EMBEDDED)]
    path = tmp_path / "out" / "page.html"
    page = Page(report.write(path, **values).read_text(encoding="utf-8"))
    assert len(page.all("img")) == report.EMBEDDED
    values["pictures"].append({**one, "id": "last"})
    wide = figure(tmp_path / "wide.png", 9, (4, 1000))
    text = report.write(path, **values, overview=[("Kinds of cells", wide)]).read_text(encoding="utf-8")
    page = Page(text)
    assert [image["width"] for image in page.all("img")] == ["1000"]  # figures over all pictures stay inside
    files = [href for anchor in page.all("a") if not (href := anchor["href"] or "").startswith("#")]
    assert files == ["../figures%20of%20%3Call%3E/0.png"] * (report.EMBEDDED + 1)
    assert (path.parent / unquote(files[0])).read_bytes() == one["figure"].read_bytes()
    assert any(f"more than {report.EMBEDDED} figures" in text for text in page.texts)
    assert f"figure: C&W on last, {NAME} to tabby cat" in page.texts
    with pytest.raises(FileNotFoundError):
        report.write(path, **{**values, "pictures": [{**one, "figure": "missing.png"}] * 30})


def test_figures_are_read_one_at_a_time(tmp_path):
    big = figure(tmp_path / "big.png", 0, (700, 700))
    values = arguments(tmp_path / "figures")
    values["pictures"] = [{**values["pictures"][0], "id": str(n), "figure": big} for n in range(24)]
    tracemalloc.start()
    path = report.write(tmp_path / "page.html", **values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 24 * big.stat().st_size
    assert peak < 10 * big.stat().st_size


def layers(id="img 0", attack="C&W", *, side=12, cell=(5, 4), seed=0, **changes: Any):
    """The arguments of `explorer.item` for a picture whose cells at the far edges are smaller than the others."""
    random = np.random.default_rng(seed)
    grid = tuple(-(-side // of_cell) for of_cell in cell)
    clean = random.random((side, side, 3), np.float32)
    suppression, promotion = random.random((2, *grid), np.float32)
    ratio = np.log2(promotion / suppression)
    return {
        **{"id": id, "attack": attack, "true": NAME, "target": "tabby cat", "predicted": "tabby cat", "success": True},
        "clean": clean,
        "adversarial": np.clip(clean + random.normal(0, 0.01, clean.shape), 0, 1).astype(np.float32),
        **{"suppression": suppression, "promotion": promotion, "ratio": ratio},
        "kind": 2 + (ratio > 1) - (ratio < -1),
        "norm": random.random(grid, np.float32),
        "maps": random.normal(size=(4, 3, 3)).astype(np.float32),
        "cell": cell,
    } | changes


def unchanged(**changes: Any):
    """As `layers`, of an attack that failed."""
    given = layers(**changes)
    none = np.zeros_like(given["norm"])
    given |= {"adversarial": given["clean"], "success": False, "ratio": np.full_like(none, np.nan)}
    return given | {"suppression": none, "promotion": none, "norm": none, "kind": none.astype(int)}


def test_the_page_holds_what_the_explorer_was_given(tmp_path):
    items = [explorer.item(**layers(attack="C&W")), explorer.item(**unchanged(attack=NAME))]
    page = Page(written(tmp_path, explorer=items))
    pictures = [json.loads(text) for attributes, text in page.scripts if "data-embedded" in attributes]
    found = [(attributes, json.loads(text)) for attributes, text in page.scripts if "data-explored" in attributes]
    assert [(a["data-explored"], a["data-by"]) for a, _ in found] == [("img 0", "C&W"), ("img 0", NAME)]
    for item, (_, embedded) in zip(items, found, strict=True):
        assert {**embedded, **{layer: pictures[embedded[layer]] for layer in explorer.LAYERS}} == item
    assert found[0][1]["original"] == found[1][1]["original"] == found[1][1]["adversarial"]
    stream = io.BytesIO(base64.b64decode(pictures[found[0][1]["original"]].partition(",")[2]))
    np.testing.assert_array_equal(np.asarray(Image.open(stream)), np.rint(layers()["clean"].astype(float) * 255))
    assert "#explorer" in [anchor["href"] for anchor in page.all("a")]
    assert page.all("noscript")
    radios = [field for field in page.all("input") if field["type"] == "radio"]
    assert len(radios) == 10
    assert next(a for _, a in page.elements if a.get("id") == "explore").keys() >= {"hidden", "aria-label"}


def test_names_in_the_explorer_are_text(tmp_path):
    hostile = "</script><b>x</b><!-- <script>"
    given = layers(id=hostile, attack=hostile, true=hostile, target=hostile, predicted=hostile)
    text = written(tmp_path, explorer=[explorer.item(**given)])
    page = Page(text)
    assert "<b>" not in text
    assert not page.all("b")
    assert text.count("</script>") == text.count("<script") == len(page.all("script"))
    attributes, found = next(script for script in page.scripts if "data-explored" in script[0])
    assert (attributes["data-explored"], attributes["data-by"]) == (hostile, hostile)
    assert json.loads(found)["predicted"] == hostile


def test_without_items_there_is_no_explorer(tmp_path):
    for items in ((), iter([])):
        text = written(tmp_path, explorer=items)
        assert 'id="explore' not in text
        assert "#explorer" not in text
        assert not Page(text).all("canvas")
    assert "The explorer holds" not in written(tmp_path, explorer=[explorer.item(**layers())] * 3)
    few = written(tmp_path, explorer=[explorer.item(**layers())])
    assert "The explorer holds the first 1 of 3 pairs" in few


def test_items_are_embedded_one_at_a_time(tmp_path):
    def items(count):
        for seed in range(count):
            yield explorer.item(**layers(id=str(seed), side=200, cell=(20, 20), seed=seed))

    def peak(count):
        tracemalloc.start()
        size = report.write(tmp_path / "page.html", **arguments(tmp_path / "figures", explorer=items(count)))
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used, size.stat().st_size

    peak(1)  # what is read once and kept, the template above all
    (few, small), (many, large) = peak(2), peak(12)
    assert large - small > 10 * 300_000
    assert many < few + 300_000


def test_an_item_that_does_not_fit_leaves_the_old_page(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    items = [explorer.item(**layers()), {"id": "img 1", "attack": "C&W"}]
    with pytest.raises(ValueError, match=r"explorer\[1\] lacks true"):
        report.write(path, **arguments(tmp_path / "figures", explorer=items))
    assert path.read_text() == "old"


# Steps through the explorer as a person would, and leaves what it saw in the document.
_STEPS = """<pre id="seen"></pre><script>
addEventListener("load", async () => {
  const root = document.getElementById("explore"), canvas = document.getElementById("explore-canvas"), seen = {};
  const drawn = async name => {
    while (root.dataset.drawn !== name) await new Promise(next => setTimeout(next, 10));
    delete root.dataset.drawn;
  };
  const press = (target, key) => target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const numbers = () => [...document.querySelectorAll("#explore-numbers dd")].map(entry => entry.textContent);
  const one = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const pixel = (y, x) => {
    const side = canvas.width / SIDE;
    one.drawImage(canvas, (x + .5) * side, (y + .5) * side, 1, 1, 0, 0, 1, 1);
    return [...one.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  await drawn("kinds");
  seen.start = numbers();
  for (const key of ["End", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowLeft"]) press(canvas, key);
  seen.moved = numbers();
  const layers = [...root.querySelectorAll("input[type=radio]")].map(radio => radio.value);
  seen.pixels = {};
  for (const [at, name] of layers.entries()) {
    press(canvas, String((at + 1) % 10));
    await drawn(name);
    const slider = document.getElementById("explore-opacity");
    slider.value = 100;
    if (!slider.disabled) { slider.dispatchEvent(new Event("input")); await drawn(name); }
    seen.pixels[name] = pixel(2, 2);
  }
  const box = canvas.getBoundingClientRect();
  const [clientX, clientY] = [box.left + box.width * .5, box.top + box.height * .1];
  canvas.dispatchEvent(new PointerEvent("pointermove", { clientX, clientY }));
  seen.hovered = numbers();
  canvas.dispatchEvent(new PointerEvent("pointerleave"));
  seen.left = numbers();
  const attack = document.getElementById("explore-attack");
  attack.value = "none";
  attack.dispatchEvent(new Event("change"));
  await drawn("promotion");
  seen.failed = numbers();
  seen.about = document.getElementById("explore-about").textContent;
  document.getElementById("seen").textContent = "seen:" + encodeURIComponent(JSON.stringify(seen)) + ":";
});
</script></body>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_the_explorer_draws_and_answers_in_a_browser(tmp_path):
    given, side, (tall, wide) = layers(), 12, (5, 4)
    items = [explorer.item(**given), explorer.item(**unchanged(attack="none"))]
    text = written(tmp_path, explorer=items)
    path = tmp_path / "stepped.html"
    path.write_text(text.replace("</body>", _STEPS.replace("SIDE", str(side))), encoding="utf-8")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--enable-logging=stderr")
    command = ["chromium", *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in ran.stderr, ran.stderr
    match = re.search("seen:([^:]+):", ran.stdout)
    assert match is not None, ran.stderr
    seen = json.loads(unquote(match[1]))

    full = np.asarray(cam.resize(jnp.asarray(given["maps"]), side))

    def numbers(row, column):
        window = np.s_[:, row * tall : (row + 1) * tall, column * wide : (column + 1) * wide]
        means = full[window].mean((1, 2))
        cells = [given[key][row, column] for key in ("suppression", "promotion", "ratio", "norm")]
        return [*cells, *means, means[0] - means[1], means[3] - means[2]]

    for name, at, pixels in (
        ("start", (0, 0), "x 0–3, y 0–4"),
        ("moved", (2, 1), "x 4–7, y 10–11"),
        ("hovered", (0, 1), "x 4–7, y 0–4"),
        ("left", (2, 1), "x 4–7, y 10–11"),
    ):
        place, where, kind, *texts = seen[name]
        assert (place, where) == (f"{at[0]}, {at[1]}", pixels)
        assert kind == ("suppression-dominated", "balanced", "promotion-dominated")[given["kind"][at] - 1]
        shown = [float(text.replace("−", "-")) for text in texts]
        np.testing.assert_allclose(shown, numbers(*at), rtol=6e-4, atol=2e-5)

    y = x = 2
    maps = {f"map{index}": (full[index], *items[0]["scale"], "maps") for index in range(4)}
    for name, change in (("suppression", full[0] - full[1]), ("promotion", full[3] - full[2])):
        maps[name] = (change, -items[0]["limit"], items[0]["limit"], "differences")
    for name, pixel in seen["pixels"].items():
        if name in explorer.LAYERS:
            stream = io.BytesIO(base64.b64decode(items[0][name].partition(",")[2]))
            assert pixel == np.asarray(Image.open(stream))[y, x].tolist()
        elif name != "kinds":
            values, low, high, key = maps[name]
            stops = [[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in explorer.colours()[key]]
            place = (values[y, x] - low) / (high - low) * (len(stops) - 1)
            expected = [np.interp(place, range(len(stops)), channel) for channel in zip(*stops, strict=True)]
            np.testing.assert_allclose(pixel, expected, atol=3)
    kinds = seen["pixels"]["kinds"]
    assert max(kinds) > min(kinds)  # coloured over grey
    assert seen["failed"][2:7] == ["none", "0", "0", "–", "0"]
    assert "failure; the picture is unchanged" in seen["about"]
