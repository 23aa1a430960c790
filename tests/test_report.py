"""The page: one file that says what it was given, whatever the names contain."""

import base64
import tracemalloc
from html.parser import HTMLParser
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxinterp import report

NAME = "<b>\"x\"</b> & 'y'"


class Page(HTMLParser):
    """Elements, ids and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        self.texts.append(data)
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
