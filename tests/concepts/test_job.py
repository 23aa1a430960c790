"""The job end to end: closed-form IoUs, a kill at any moment, any number of devices, bad input, what the page shows."""

import csv
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from jaxinterp import Network, cli, concepts, dissect
from jaxinterp.concepts import page as page_module
from jaxinterp.concepts import unit_pictures
from jaxinterp.data import Broden, Concepts, DamagedImage, SegmentedArrays
from jaxinterp.dissect import dissection
from jaxinterp.runs import Run

QUANTILE = 0.2  # of the colours' positions: more than are red, so that a threshold is 0 and a mask is what has colour


def silent(line: str) -> None:
    pass


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def job(network, squares):
    return concepts.prepare(squares, model=network, nodes=["colours"], quantile=QUANTILE, batch_size=8, top=3)


def tables_of(out: Path) -> dict[str, str]:
    """What must not depend on how the run went: files and counts, each with the digest of its content.

    Digests, because a failure is to name what differs, not to print it.
    """
    names = ("tally.csv", "summary.json", "config.json")
    found = {path.name: path.read_bytes() for path in out.glob("*") if path.name in names}
    # By its content: a format with padding and compression may hold the same in other bytes.
    found["iou.parquet"] = repr(parquet.read_table(out / "iou.parquet").to_pydict()).encode()
    for name, arrays in stored(out).items():
        found |= {f"{name}: {key}": array.tobytes() for key, array in arrays.items() if key not in SEEN}
    return {name: hashlib.sha256(content).hexdigest()[:12] for name, content in found.items()}


SEEN = ("top_value", "maps")  # of single images, as the network computes them


def stored(out: Path) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of all parts that a finished run has."""
    found = {}
    for path in sorted((out / "parts").glob("*.npz")):
        with np.load(path) as arrays:
            found[path.name] = {key: arrays[key] for key in arrays.files if key != "names of the arrays"}
    return found


def assert_same(out: Path, other: Path) -> None:
    assert tables_of(out) == tables_of(other)
    for name, arrays in stored(out).items():
        for key in arrays.keys() & set(SEEN):
            np.testing.assert_allclose(arrays[key], stored(other)[name][key], rtol=1e-6, atol=1e-7, err_msg=key)


def test_ious_of_coloured_squares(job, tmp_path):
    """A red square covers 4 x 4 or 4 x 5 positions; 4 x 2 of them are labelled."""
    found = concepts.dissect(job, tmp_path / "out", say=silent)
    layer = found.layers["colours"]
    area, red, green = 16 * 16, 4 * (6 * 4 + 5 * 5), 5 * 2 * 2
    np.testing.assert_array_equal(layer.dissection.tally.activation, [red, green, 0, red])
    np.testing.assert_array_equal(layer.dissection.tally.label_area, [0, 11 * 8, green, 0, 5 * area])
    rows = {row["unit"]: row for row in read(tmp_path / "out" / "tally.csv")}
    assert rows["2"]["label"] == "<b>green & co"
    assert float(rows["2"]["score"]) == pytest.approx(1)
    assert rows["3"]["label"] == rows["3"]["category"] == ""
    for unit in ("1", "4"):
        assert (rows[unit]["label"], rows[unit]["category"]) == ("red", "colour")
        assert float(rows[unit]["score"]) == pytest.approx(11 * 8 / red)
        # `rest` covers the pictures with odd numbers, in which the red squares cover 4 x 5 positions.
        assert int(rows[unit]["rest-activation"]) == int(rows[unit]["rest-intersect"]) == 5 * 4 * 5
        assert float(rows[unit]["rest-iou"]) == pytest.approx(5 * 4 * 5 / (5 * area))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["images"], summary["union"], summary["quantile"]) == (11, "image", QUANTILE)
    assert summary["labels_present"] == 3
    record = summary["layers"]["colours"]
    assert record["silent"] == [3]
    assert record["conventions"]["best"]["detectors"] == record["conventions"]["best"]["units"] == 3
    assert record["conventions"]["best"]["categories"]["rest"] == {"detectors": 0, "concepts": 0}
    assert record["conventions"]["category"]["categories"]["rest"] == {"detectors": 2, "concepts": 1}
    assert record["conventions"]["category"]["detectors"] == 5


def test_top_images_and_their_masks(job, squares, tmp_path):
    found = concepts.dissect(job, tmp_path / "out", say=silent)
    layer = found.layers["colours"]
    np.testing.assert_array_equal(layer.dissection.top.image[0], [10, 9, 8])  # red grows with the number
    np.testing.assert_array_equal(layer.dissection.top.image[1], [1, 3, 5])  # green does not
    assert layer.dissection.maps is not None
    np.testing.assert_allclose(
        layer.dissection.maps[0, 1], squares[9].image[..., 0].reshape(16, 2, 16, 2).mean(axis=(1, 3)), atol=1e-6
    )
    masks = unit_pictures.masks(layer, 0, (16, 16))
    for mask, number in zip(masks, (10, 9, 8), strict=True):
        np.testing.assert_array_equal(mask, squares[number].image[..., 0].reshape(16, 2, 16, 2).any(axis=(1, 3)))
    with Image.open(tmp_path / "out" / "units" / "colours" / "0001.jpg") as opened:
        picture = np.asarray(opened).astype(int)
    tile, gap, head = unit_pictures.TILE, unit_pictures.GAP, unit_pictures.HEAD
    assert picture.shape == (head + tile, 3 * tile + 2 * gap, 3)
    first = picture[head:, :tile]
    inside, outside = first[24:32, 50:60], first[60:, :]  # the square lies in rows 14 to 42, columns 35 to 63
    assert np.abs(inside - [(0.5 + 10 / 32) * 255, 0, 0]).max() < 30  # JPEG
    assert outside.max() < 12
    shown = unit_pictures.shown(np.full((tile, tile, 3), 200, np.uint8), masks[0])
    assert {tuple(pixel) for pixel in shown.reshape(-1, 3)} == {(200,) * 3, (80,) * 3, (255, 214, 0)}


class Page(HTMLParser):
    """Collects rows of the units' table, links, images and addresses."""

    def __init__(self, path: Path):
        super().__init__()
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self._inside = False
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.add(tag)
        self.links += [values["href"] or ""] if tag == "a" else []
        self.sources += [values["src"] or ""] if "src" in values else []
        if tag == "tr" and "data-label" in values:
            self.rows.append([])
            self._inside = True
        elif tag == "tr":
            self._inside = False
        elif tag == "td" and self._inside:
            self.rows[-1].append("")

    def handle_data(self, data):
        if self._inside and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def test_the_page(network, squares, tmp_path, monkeypatch):
    job = concepts.prepare(squares, model=network, nodes=["colours", "pooled"], quantile=QUANTILE, batch_size=8)
    found = concepts.dissect(job, tmp_path / "out", say=silent)
    page = Page(found.page)
    assert len(page.rows) == 4 + 4
    assert page.rows[0][:4] == ["2", "<b>green & co", "colour", "1.0000"]
    assert page.rows[1][4] == "stuff (rest) 0.078"
    assert "b" not in page.tags  # names are text
    for link in page.links:
        assert link.startswith("#") or (tmp_path / "out" / link).is_file(), link
    assert all(source.startswith("data:image/") for source in page.sources)
    assert sum(source.startswith("data:image/jpeg") for source in page.sources) == 8
    text = found.page.read_text()
    for convention in dissect.CONVENTIONS:
        assert f"Convention “{convention}”" in text
    assert "union=image" in text
    assert {path.name for path in (tmp_path / "out").glob("*.csv")} == {"tally-colours.csv", "tally-pooled.csv"}

    # Of many units each layer has its own page, and only some of the images are inside it.
    monkeypatch.setattr(page_module, "TOGETHER", 7)
    monkeypatch.setattr(page_module, "EMBEDDED", 2)
    page = Page(concepts.dissect(job, tmp_path / "out", say=silent).page)
    assert not page.rows
    assert "units-colours.html" in page.links
    part = Page(tmp_path / "out" / "units-colours.html")
    assert len(part.rows) == 4
    assert sum(source.startswith("data:image/jpeg") for source in part.sources) == 2
    assert {"index.html", "units/colours/0003.jpg"} <= {*part.links}


def test_a_run_that_stopped_computes_only_the_rest(job, tmp_path, monkeypatch):
    whole = concepts.dissect(job, tmp_path / "whole", say=silent)
    computed, write = [], Run.write_part
    real = dissection.extractor
    monkeypatch.setattr(
        dissection, "extractor", lambda *given: lambda *more: (computed.append(0), real(*given)(*more))[1]
    )

    def full(run, name, arrays):
        if name == "features-00001":
            raise OSError(28, "No space left on device")
        write(run, name, arrays)

    monkeypatch.setattr(Run, "write_part", full)
    with pytest.raises(OSError, match="No space"):
        concepts.dissect(job, tmp_path / "out", say=silent)
    assert len(computed) == 2
    monkeypatch.setattr(Run, "write_part", write)
    computed.clear()
    said: list[str] = []
    found = concepts.dissect(job, tmp_path / "out", say=said.append)
    assert len(computed) == 1
    assert_same(tmp_path / "out", tmp_path / "whole")
    assert any("feature maps are stored until the end" in line for line in said)
    assert any("were removed" in line for line in said)
    assert not list((tmp_path / "out" / "parts").glob("features*"))
    assert found.summary == whole.summary

    # With everything counted, tables and pages are made again without the network, under another minimum too.
    computed.clear()
    (tmp_path / "out" / "tally.csv").unlink()
    again = concepts.dissect(job, tmp_path / "out", minimum=0.5, say=said.append)
    assert not computed
    assert (tmp_path / "out" / "tally.csv").read_bytes() == (tmp_path / "whole" / "tally.csv").read_bytes()
    assert again.summary["layers"]["colours"]["conventions"]["best"]["detectors"] == 1
    assert "everything has been counted" in said[-1]


@pytest.mark.parametrize("spill", [True, False])
def test_feature_maps_that_do_not_fit_into_memory(job, network, squares, tmp_path, spill):
    """Read again from the disk, or computed three times: the same tables, and the same feature maps on top images."""
    concepts.dissect(job, tmp_path / "kept", say=silent)
    asked = {"model": network, "nodes": ["colours"], "quantile": QUANTILE, "batch_size": 8, "top": 3, "memory": 0}
    small = concepts.prepare(squares, **asked)
    assert job.plan.keep
    assert not small.plan.keep
    concepts.dissect(small, tmp_path / "out", spill=spill, say=silent)
    assert_same(tmp_path / "out", tmp_path / "kept")
    name = "layer-colours.npz"
    assert (tmp_path / "out/parts" / name).read_bytes() == (tmp_path / "kept/parts" / name).read_bytes()


@pytest.mark.parametrize("changes", [{"quantile": 0.1}, {"union": "lite"}, {"nodes": ["pooled"]}, {"top": 4}])
def test_another_config_is_refused(job, network, squares, tmp_path, changes):
    Run(tmp_path / "out", job.config)
    asked = {"model": network, "nodes": ["colours"], "quantile": QUANTILE, "batch_size": 8, "top": 3, **changes}
    with pytest.raises(ValueError, match=f"another config.*{next(iter(changes))}"):
        concepts.dissect(concepts.prepare(squares, **asked), tmp_path / "out", say=silent)


def test_grey_pictures(network, squares, tmp_path):
    """One channel into a network that sees three equal ones: the counts of the same pictures in colour."""
    images = np.stack([squares[i].image for i in range(11)])[..., :1]
    planes = np.stack([squares[i].planes for i in range(11)])
    asked = {"nodes": ["colours"], "quantile": QUANTILE, "batch_size": 8, "top": 3}
    repeated = Network("repeated", lambda p, x, tap: network[0].apply(p, x.repeat(3, 3), tap), network[0].nodes, 32, 4)
    found = []
    for name, channels, one in (("grey", 1, repeated), ("colour", 3, network[0])):
        source = SegmentedArrays(images.repeat(channels, 3), planes, squares.concepts)
        job = concepts.prepare(source, model=(one, network[1]), **asked)
        assert job.plan.image == (32, 32, channels)
        found.append(concepts.dissect(job, tmp_path / name, say=silent).layers["colours"].dissection.tally)
        pictures = sorted((tmp_path / name / "units").rglob("*.jpg"))
        assert len(pictures) == 4
    np.testing.assert_array_equal(found[0].intersection, found[1].intersection)
    assert found[0].intersection.sum() > 0


def test_pictures_of_another_size_are_refused_before_anything_is_written(network, tmp_path):
    large = SegmentedArrays(
        np.zeros((2, 40, 40, 3), np.float32), np.zeros((2, 4, 4), int), Concepts(("", "a"), ("b",), np.array([-1, 0]))
    )
    with pytest.raises(ValueError, match="data: expected images of 32 x 32 x 3 for colours, got 40 x 40 x 3"):
        concepts.prepare(large, model=network)


def test_nan_activations(network, squares, tmp_path):
    params = {"scale": jnp.float32(np.nan)}
    job = concepts.prepare(squares, model=(network[0], params), nodes=["colours"], batch_size=8)
    with pytest.raises(ValueError, match="colours: NaN among the activations of 4 units"):
        concepts.dissect(job, tmp_path / "out", say=silent)


def command(folder: Path, out: Path, *more: str) -> list[str]:
    return [
        *("dissect", "--data", f"broden:{folder}", "--model", "small_cnn", "--node", "conv2"),
        *("--quantile", "0.1", "--minimum", "0.02", "--batch-size", "8", "--out", str(out), *more),
    ]


def test_a_killed_run_continues_on_other_devices_to_the_same_tables(folder, small_cnn, tmp_path, capsys):
    """Killed on one device, in the middle of its batches; continued there; the whole run has eight devices."""
    environment = {
        **os.environ,
        "XLA_FLAGS": os.environ["XLA_FLAGS_OF_ONE_DEVICE"],
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"],
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = [sys.executable, "-m", "jaxinterp", *command(folder, killed, "--batch-size", "8")]
    started = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (killed / "parts" / "features-00000.npz").exists() and started.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert started.returncode == -signal.SIGKILL
    assert not (killed / "tally.csv").exists()
    again = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr[-2000:]
    assert cli.main(command(folder, whole)) == 0
    assert_same(killed, whole)
    assert len(tables_of(whole)) == 4 + 1 + 7
    assert not [path for path in killed.rglob(".*") if path.name != ".lock"]
    printed = capsys.readouterr().out
    for shown in (printed, again.stdout):
        assert "convention 'category'" in shown
        assert "conv2: 16 units" in shown


def test_a_dry_run_says_what_it_takes_and_writes_nothing(folder, small_cnn, tmp_path, capsys):
    before = sorted(path for root in (tmp_path, folder) for path in root.rglob("*"))
    assert cli.main(command(folder, tmp_path / "out", "--dry-run")) == 0
    assert sorted(path for root in (tmp_path, folder) for path in root.rglob("*")) == before
    printed = capsys.readouterr().out
    source = Broden(folder)
    assert f"small_cnn: {len(source)} images; {(source.concepts.category >= 0).sum()} labels" in printed
    assert "conv2 (16 x 16 x 16)" in printed
    assert "kept in memory" in printed
    assert "GFLOP an image" in printed
    assert "on the disk" in printed
    assert "expected time" in printed
    assert cli.main(command(folder, tmp_path / "out", "--dry-run", "--memory", "0", "--no-spill")) == 0
    printed = capsys.readouterr().out
    assert "computed three times" in printed
    assert "feature maps are not stored" in printed


def test_damaged_images_are_skipped_and_listed(folder, small_cnn, tmp_path, capsys):
    """The numbers of the others stay those of index.csv."""
    source = Broden(folder)
    broken = [source.ids[2], source.ids[5]]
    kept = {name: (folder / "images" / name).read_bytes() for name in broken}
    try:
        for name in broken:
            (folder / "images" / name).write_bytes(b"no picture")
        assert cli.main(command(folder, tmp_path / "strict", "--strict")) == 2
        assert broken[0] in capsys.readouterr().err
        job = concepts.prepare(f"broden:{folder}", model="small_cnn", nodes=["conv2"], batch_size=8, top=1)
        said: list[str] = []
        found = concepts.dissect(job, tmp_path / "out", say=said.append)
        with pytest.raises(ValueError, match=broken[0]):  # what has been counted leaves them out
            concepts.dissect(dataclasses.replace(job, strict=True), tmp_path / "out", say=silent)
        (folder / "images" / broken[0]).write_bytes(kept[broken[0]])
        pictures = sorted((tmp_path / "out" / "units").rglob("*.jpg"))
        pictures[0].write_bytes(b"of what was counted before")
        page, again = found.page.read_text(), []
        mended = concepts.dissect(job, tmp_path / "out", say=again.append)
    finally:
        for name, content in kept.items():
            (folder / "images" / name).write_bytes(content)
    assert [each["id"] for each in found.summary["damaged"]] == sorted(broken)
    assert found.summary["images"] == len(source) - 2
    assert sum("skipped" in line and any(name in line for name in broken) for line in said) == 2
    assert all(name in page for name in broken)
    top = found.layers["conv2"].dissection.top
    maps = np.stack([_features(job, source[int(n)].image) for n in top.image[:, 0]])
    np.testing.assert_array_equal([maps[unit, ..., unit].max() for unit in range(16)], top.value[:, 0])
    assert "images that could not be read before and can be now: 1; all are counted again" in again
    assert [each["id"] for each in mended.summary["damaged"]] == broken[1:]
    assert pictures[0].read_bytes().startswith(b"\xff\xd8")
    assert mended.summary["images"] == len(source) - 1
    areas = [each.layers["conv2"].dissection.tally.label_area for each in (found, mended)]
    item = source[2]
    added = np.bincount(item.planes.ravel(), minlength=len(areas[0])) + item.planes[0].size * np.bincount(
        item.scalars, minlength=len(areas[0])
    )
    np.testing.assert_array_equal((areas[1] - areas[0])[1:], added[1:])


def _features(job, image):
    return np.asarray(dissection.extractor(job.network, job.nodes)(job.params, image[None])[0][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "small_cmm"], "unknown model 'small_cmm'; did you mean 'small_cnn'"),
        (["--node", "conv9"], "small_cnn has no node 'conv9'; did you mean 'conv"),
        (["--node", "conv2"], "expected different layers"),
        (["--categories", "colour"], "has no 'colour'; did you mean 'color'"),
        (["--split", "vall"], "did you mean 'val'"),
        (["--quantile", "0"], "quantile: expected a share between 0 and 1"),
        (["--quantile", "1"], "quantile: expected a share between 0 and 1"),
        (["--quantile", "nan"], "quantile: expected a share between 0 and 1"),
        (["--minimum", "1"], "--minimum: expected an IoU from 0 to below 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--top", "0"], "--top must be at least 1"),
        (["--memory", "-1"], "--memory must not be negative"),
        (["--memory", "inf"], "--memory must be a number of GiB, got inf"),
        (["--data", "broden:nowhere"], "no such folder: nowhere"),
        (["--data", "nowhere"], "--data: expected broden:DIR"),
        (["--from-csv", "tally.csv"], "give one of them"),
    ],
)
def test_bad_arguments(arguments, message, folder, small_cnn, tmp_path, capsys):
    assert cli.main([*command(folder, tmp_path / "out"), *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_goes_on_behind_damaged_images(network, squares, tmp_path):
    """As the run does; only where nothing can be read there is nothing to measure."""

    class Damaged:
        concepts = squares.concepts

        def __init__(self, first):
            self.first = first

        def __len__(self):
            return len(squares)

        def __getitem__(self, index):
            if index < self.first:
                raise DamagedImage(f"p{index}", "damaged")
            return squares[index]

    lines = list(concepts.estimate(concepts.prepare(Damaged(9), model=network, batch_size=2), tmp_path / "out"))
    assert lines[-1].startswith("expected time: ")
    with pytest.raises(ValueError, match="data: none of the 11 images can be read: p0: damaged"):
        list(concepts.estimate(concepts.prepare(Damaged(11), model=network, batch_size=2), tmp_path / "out"))


def test_no_data_and_no_image(folder, small_cnn, tmp_path, capsys):
    assert cli.main(["dissect"]) == 2
    assert "--data: expected broden:DIR" in capsys.readouterr().err
    assert cli.main(["dissect", "--data", str(folder), "--model", "small_cnn"]) == 2
    assert f"did you mean broden:{folder}?" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.main(["dissect", "--data", f"broden:{tmp_path / 'empty'}", "--model", "small_cnn"]) == 2
    assert "empty" in capsys.readouterr().err


def test_from_csv(job, tmp_path, capsys):
    concepts.dissect(job, tmp_path / "out", say=silent)
    assert cli.main(["dissect", "--from-csv", str(tmp_path / "out" / "tally.csv"), "--minimum", "0.05"]) == 0
    printed = capsys.readouterr().out
    assert "4 units, categories colour, rest" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert [line for line in lines if line[:1] == ["rest"]] == [["rest", "0", "0"], ["rest", "2", "1"]]
    assert [line for line in lines if line[:1] == ["colour"]] == [["colour", "3", "2"], ["colour", "3", "2"]]
    assert [line for line in lines if line[:1] == ["together"]] == [["together", "3", "2"], ["together", "5", "3"]]
    assert cli.main(["dissect", "--from-csv", str(tmp_path / "out" / "config.json")]) == 2
    assert "is no tally.csv" in capsys.readouterr().err
    assert cli.main(["dissect", "--from-csv", str(tmp_path / "missing.csv")]) == 2
    assert "missing.csv" in capsys.readouterr().err
