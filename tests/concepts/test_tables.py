"""The tables against the report of another program on the same features, and against counts made by hand."""

import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxinterp import dissect
from jaxinterp.concepts import read_released, tables
from jaxinterp.data import Broden, Concepts
from jaxinterp.dissect import topimages
from jaxinterp.runs import Run

ORACLE = Path(__file__).parents[3] / "shared" / "oracle" / "netdissect"


@pytest.fixture(scope="module")
def layer():
    """The layer of the reference: its features and thresholds, tallied here under its rule of the union."""
    if not ORACLE.exists():
        pytest.skip(f"the reference arrays are not at {ORACLE}")
    source = Broden(ORACLE / "broden")
    items = [source[i] for i in range(len(source))]
    with np.load(ORACLE / "raw.npz") as raw:
        features, thresholds = raw["features"].transpose(0, 2, 3, 1), raw["threshold"]
    tally = dissect.tally(
        features,
        thresholds,
        np.stack([item.planes for item in items]),
        np.stack([item.scalars for item in items]),
        source.concepts.category,
        union="lite",
    )
    top = topimages.init(24, 1)
    found = dissect.Dissection("conv3", 0.005, thresholds, tally, top, 40, (14, 14))
    return tables.layer(found, source.concepts)


@pytest.fixture(scope="module")
def written(layer, tmp_path_factory) -> Path:
    run = Run(tmp_path_factory.mktemp("run"), {})
    return run.write_table("tally.csv", tables.tally_columns(layer.concepts.categories), tables.tally_rows(layer))


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_tally_is_that_of_the_reference(written):
    ours, theirs = read(written), read(ORACLE / "tally.csv")
    assert list(ours[0])[:4] == list(theirs[0])[:4]
    assert {*ours[0]} == {*theirs[0], "union"}
    assert {row["union"] for row in ours} == {"lite"}
    assert [row["unit"] for row in ours if row["label"]] == [row["unit"] for row in theirs if row["label"]]
    scores = [float(row["score"]) for row in ours]
    assert scores == sorted(scores, reverse=True)
    by_unit = {row["unit"]: row for row in theirs}
    compared = 0
    for row in ours:
        other = by_unit[row["unit"]]
        assert row["label"] == other["label"]
        assert row["category"] == (other["category"] if other["label"] else "")
        for name, text in other.items():
            if name.endswith(("-truth", "-activation", "-intersect")):
                assert int(row[name]) == float(text), (row["unit"], name)
                compared += 1
            elif name.endswith(("-iou", "score")):
                assert float(row[name]) == pytest.approx(float(text), rel=1e-12)
            elif name.endswith("-label"):
                assert row[name] == text
    assert compared == 24 * 5 * 3


def test_the_same_table_has_the_same_bytes(layer, tmp_path):
    """Dictionary indices are packed, and their padding is whatever memory held."""
    written = tables.write_ious(tmp_path / "iou.parquet", {"conv3": layer})
    columns = pq.ParquetFile(written).metadata.row_group(0)
    used = {encoding for i in range(columns.num_columns) for encoding in columns.column(i).encodings}
    assert "PLAIN" in used
    assert not {"RLE_DICTIONARY", "PLAIN_DICTIONARY"} & used


def test_every_iou_is_in_the_parquet_file(layer, written, tmp_path):
    table = pq.read_table(tables.write_ious(tmp_path / "iou.parquet", {"conv3": layer, "again": layer})).to_pydict()
    labels = np.flatnonzero(layer.concepts.category >= 0)
    assert len(table["iou"]) == 2 * 24 * len(labels)
    assert table["node"] == ["conv3"] * (24 * len(labels)) + ["again"] * (24 * len(labels))
    assert set(table["union"]) == {"lite"}
    columns = ("intersection", "activation", "label_area", "iou")
    both, active, area, iou = (np.array(table[name]) for name in columns)
    np.testing.assert_array_equal(iou, both / (active + area - both + 1e-10))
    assert table["label"][: len(labels)] == labels.tolist()
    assert table["name"][: len(labels)] == [layer.concepts.names[n] for n in labels]
    for row in read(written):
        mine = [i for i in range(24 * len(labels)) if table["unit"][i] == int(row["unit"])]
        assert len(mine) == len(labels)
        best = max(mine, key=lambda i: table["iou"][i])
        assert table["iou"][best] == float(row["score"])
        if row["label"]:
            assert (table["name"][best], table["category"][best]) == (row["label"], row["category"])
            assert table["intersection"][best] == int(row[f"{row['category']}-intersect"])


def test_both_conventions():
    #        object  part   texture
    iou = [[0.30, 0.10, 0.0], [0.20, 0.25, 0.0], [0.05, 0.01, 0.0], [0.04, 0.0, 0.0], [0.2, 0.0, 0.5]]
    label = [[1, 7, 0], [1, 8, 0], [2, 7, 0], [3, 0, 0], [1, 0, 9]]
    record = tables.reported(dissect.Best(np.array(label), np.array(iou)), ("object", "part", "texture"), 0.04)

    def shown(convention):
        found = record[convention]
        categories = {name: (row["detectors"], row["concepts"]) for name, row in found["categories"].items()}
        return found["units"], found["detectors"], found["concepts"], categories

    assert shown("best") == (4, 4, 4, {"object": (2, 2), "part": (1, 1), "texture": (1, 1)})
    assert shown("category") == (4, 7, 5, {"object": (4, 2), "part": (2, 2), "texture": (1, 1)})
    lines = "\n".join(tables.report_lines(record, "IoU > 0.04, union=image", 5))
    assert "convention 'best': a unit counts once, for its best concept (IoU > 0.04, union=image)" in lines
    assert lines.count("4 of 5 units detect a concept") == 2


def test_labels_of_one_name_are_counted_apart():
    concepts = Concepts(("", "pole", "tree", "pole"), ("object",), np.array([-1, 0, 0, 0]))
    both, active = np.array([[0, 50, 0, 0], [0, 0, 0, 50], [0, 60, 0, 0], [0, 0, 55, 0]]), np.full(4, 60)
    tally = dissect.Tally(both, active, active[:, None], np.array([0, 100, 100, 100]), "image")
    layer = tables.layer(
        dissect.Dissection("n", 0.005, np.zeros(4, np.float32), tally, topimages.init(4, 1), 5, (1, 1)), concepts
    )
    assert tables.unique_detectors(layer, "best", 0.04) == {"object": {"pole #1": 2, "tree": 1, "pole #3": 1}}


def test_a_tally_read_back_gives_the_same_report(layer, written):
    for minimum in (0.01, 0.04):
        found = read_released(written)
        assert found.union == "lite"
        expected = tables.reported(layer.best, layer.concepts.categories, minimum)
        assert tables.reported(found.best, found.categories, minimum) == expected
        assert expected["category"]["detectors"] > 0
    assert "union=lite" in "\n".join(found.lines())


def test_a_published_tally_gives_its_counts():
    """Counted here in another way: row by row, from the columns category, label and score, and the CAT-iou."""
    if not ORACLE.exists():
        pytest.skip(f"the reference tables are not at {ORACLE}")
    rows, found = read(ORACLE / "tally.csv"), read_released(ORACLE / "tally.csv")
    record = tables.reported(found.best, found.categories, 0.01)
    for category in found.categories:
        best = [row["label"] for row in rows if row["category"] == category and float(row["score"]) > 0.01]
        every = [row[f"{category}-label"] for row in rows if float(row[f"{category}-iou"]) > 0.01]
        for convention, labels in (("best", best), ("category", every)):
            counted = {"detectors": len(labels), "concepts": len(set(labels))}
            assert record[convention]["categories"][category] == counted
    assert record["best"]["detectors"] == sum(float(row["score"]) > 0.01 for row in rows) == record["best"]["units"]
    assert record["category"]["detectors"] > record["best"]["detectors"]
    assert "union=not stated in the file" in "\n".join(found.lines())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unit,object-iou\n1,0.5\n", "lacks the columns object-label"),
        ("object-iou,object-label\n0.5,car\n", "lacks the columns unit"),
        ("id,name\n1,cat\n", "lacks the columns unit"),
        ("unit,label\n1,cat\n", "lacks the columns CAT-iou"),
        ("", "lacks the columns"),
        ("unit,object-label,object-iou\n", "has no row"),
        ("unit,object-label,object-iou\n1,car,0.5\n1,car,0.4\n", "line 3: unit 1 is also on line 2"),
        ("unit,object-label,object-iou\nx,car,0.5\n", "line 2: unit: expected a number, got 'x'"),
        ("unit,object-label,object-iou\n1,car,nan\n", "line 2: object-iou: expected a number from 0 to 1, got 'nan'"),
        ("unit,object-label,object-iou\n1,car,1.5\n", "expected a number from 0 to 1, got '1.5'"),
        ("unit,object-label,object-iou\n1,car\n", "expected a number from 0 to 1, got None"),
        ("unit,object-label,object-iou\n1,car,much\n", "expected a number from 0 to 1, got 'much'"),
    ],
)
def test_a_file_that_is_no_tally(text, message, tmp_path):
    (tmp_path / "tally.csv").write_text(text)
    with pytest.raises(ValueError, match=r"tally\.csv") as raised:
        read_released(tmp_path / "tally.csv")
    assert message in str(raised.value)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "tally.csv").write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match="no table of text"):
        read_released(tmp_path / "tally.csv")
