"""The packed cache: the same items bit for bit, made again when anything is stale, whole after a kill at any moment."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from jaxinterp.data import Broden, DamagedImage, packed, segmented_batches

from .conftest import write_map


def same(a, b):
    assert a.id == b.id
    for name in ("image", "planes", "scalars"):
        one, other = getattr(a, name), getattr(b, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


class Reads(Broden):
    """Counts what is decoded."""

    count = 0

    def read(self, index):
        self.count += 1
        return super().read(index)


@pytest.mark.parametrize(
    "arguments", [{}, {"image_size": 5}, {"categories": ["scene"]}, {"categories": ["object"]}, {"split": "val"}]
)
def test_items_are_equal(broden_folder, tmp_path, arguments):
    source = Reads(broden_folder, **arguments)
    steps = []
    cache = packed(source, tmp_path / "cache", progress=steps.append)
    assert sum(steps) == source.count == len(source)
    again = packed(source, tmp_path / "cache", progress=steps.append)
    for one in (cache, again):
        assert (len(one), one.ids, one.concepts.names) == (len(source), source.ids, source.concepts.names)
        for i in range(-1, len(source)):
            same(one[i], Broden(broden_folder, **arguments)[i])
    assert source.count == sum(steps) == len(source)  # nothing was decoded again
    for a, b in zip(segmented_batches(again, 2), segmented_batches(source, 2), strict=True):
        assert a.ids == b.ids
        np.testing.assert_array_equal(a.images, b.images)
    with pytest.raises(IndexError):
        cache[len(source)]


def test_damaged_items(broden_folder, tmp_path):
    (broden_folder / "images" / "s" / "b_color.png").write_bytes(b"no")
    source = Broden(broden_folder)
    cache = packed(source, tmp_path / "cache")
    assert list(cache.damaged) == [1]
    with pytest.raises(DamagedImage, match="line 3") as caught:
        cache[1]
    with pytest.raises(DamagedImage) as expected:
        source[1]
    assert str(caught.value) == str(expected.value)
    same(cache[0], source[0])
    same(cache[2], source[2])
    with pytest.raises(ValueError, match="line 3"):
        packed(Broden(broden_folder, strict=True), tmp_path / "strict")
    assert not (tmp_path / "strict").exists()


def test_items_that_can_be_read_again_are_decoded_again(broden_folder, tmp_path):
    kept = {}
    for name in ("b_color.png", "a.jpg"):
        path = broden_folder / "images" / "s" / name
        kept[path] = path.read_bytes()
        path.write_bytes(b"no")
    assert list(packed(Broden(broden_folder), tmp_path / "cache").damaged) == [0, 1]
    path = broden_folder / "images" / "s" / "b_color.png"
    path.write_bytes(kept[path])
    source = Reads(broden_folder)
    cache = packed(source, tmp_path / "cache")
    assert list(cache.damaged) == [0]
    before = source.count
    for i in (1, 2):
        same(cache[i], Broden(broden_folder)[i])
    assert source.count == before  # what was decoded is in the cache
    with pytest.raises(DamagedImage, match="line 2"):
        cache[0]
    with pytest.raises(ValueError, match="line 2"):
        packed(Broden(broden_folder, strict=True), tmp_path / "cache")
    assert sorted(os.listdir(tmp_path / "cache")) == ["cache.json", "images.bin", "items.txt", "planes.bin"]
    assert not list(tmp_path.glob("cache.items"))


def _touch_index(folder):
    os.utime(folder / "index.csv", (1, 1))


def _other_label(folder):
    (folder / "label.csv").write_text((folder / "label.csv").read_text().replace("red-c", "crimson-c"))


def _cut_images(folder):
    path = folder.parent / "cache" / "images.bin"
    path.write_bytes(path.read_bytes()[:-1])


def _cut_items(folder):
    path = folder.parent / "cache" / "items.txt"
    path.write_bytes(path.read_bytes()[:-1])


def _no_plan(folder):
    (folder.parent / "cache" / "cache.json").write_text("{")


@pytest.mark.parametrize("change", [_touch_index, _other_label, _cut_images, _cut_items, _no_plan])
def test_stale_or_damaged_caches_are_made_again(broden_folder, tmp_path, change):
    packed(Broden(broden_folder), tmp_path / "cache")
    change(broden_folder)
    source = Reads(broden_folder)
    cache = packed(source, tmp_path / "cache")
    assert source.count == 3
    for i in range(3):
        same(cache[i], Broden(broden_folder)[i])


@pytest.mark.parametrize("arguments", [{"image_size": 7}, {"categories": ["color"]}, {"limit": 2}])
def test_other_parameters_are_another_cache(broden_folder, tmp_path, arguments):
    packed(Broden(broden_folder), tmp_path / "cache")
    source = Reads(broden_folder, **arguments)
    cache = packed(source, tmp_path / "cache")
    assert source.count == len(source)
    same(cache[0], Broden(broden_folder, **arguments)[0])


@pytest.mark.parametrize("name", ["images.bin", "planes.bin"])
def test_flipped_bits_are_noticed(broden_folder, tmp_path, name):
    packed(Broden(broden_folder), tmp_path / "cache")
    path = tmp_path / "cache" / name
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    source = Reads(broden_folder)
    cache = packed(source, tmp_path / "cache")
    for i in range(3):
        same(cache[i], Broden(broden_folder)[i])
    assert source.count == 1  # the item that has the bit


def test_other_files_are_left_alone(broden_folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no packed cache"):
        packed(Broden(broden_folder), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="workers"):
        packed(Broden(broden_folder), tmp_path / "new", workers=0)


@pytest.fixture
def many(tmp_path):
    """150 images, more than are written at once."""
    folder = tmp_path / "many"
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(150):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(folder / "images" / f"{i}.png")
        write_map(folder / "images" / f"{i}_m.png", np.full((2, 2), 1 + i % 2))
        rows.append(f"{i}.png,train,4,4,2,2,{i}_m.png" + (f";{i}_m.png" if i % 3 == 0 else ""))
    (folder / "index.csv").write_text("\n".join(["image,split,ih,iw,sh,sw,object", *rows]))
    (folder / "category.csv").write_text("name,first,last,count,frequency\nobject,1,2,2,150")
    (folder / "label.csv").write_text(
        "number,name,category,frequency,coverage,syns\n1,a,object(75),75,75,\n2,b,object(75),75,75,"
    )
    (folder / "c_object.csv").write_text("code,number,name,frequency,coverage\n1,1,a,75,75\n2,2,b,75,75")
    return folder


def test_goes_on_after_a_kill(many, tmp_path):
    """Killed without warning in the second chunk: no cache is there, and the first chunk is not decoded again."""
    code = f"""
import os, signal, time
from jaxinterp.data import Broden, packed
class Slow(Broden):
    def read(self, index):
        if index == 100:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)
packed(Slow({str(many)!r}), {str(tmp_path / "cache")!r}, workers=1)
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "cache").exists()
    assert len((tmp_path / "cache.partial" / "items.txt").read_bytes().splitlines()) == 64
    with open(tmp_path / "cache.partial" / "images.bin", "ab") as file:
        file.write(b"half an image")
    source = Reads(many)
    steps = []
    cache = packed(source, tmp_path / "cache", progress=steps.append)
    assert steps[0] == 64
    assert sum(steps) == 150
    plain = Broden(many)
    for i in range(150):
        same(cache[i], plain[i])
    assert source.count == 150 - 64  # what the first process had noted is used, and none of it is damaged
    assert not (tmp_path / "cache.partial").exists()


def test_an_unfinished_cache_of_something_else_is_dropped(many, tmp_path):
    partial = tmp_path / "cache.partial"
    partial.mkdir()
    (partial / "cache.json").write_text(json.dumps({"made_from": "other"}))
    (partial / "images.bin").write_bytes(bytes(64 * 48))
    (partial / "items.txt").write_text("0\n" * 64)
    source = Reads(many)
    same(packed(source, tmp_path / "cache")[3], Broden(many)[3])
    assert source.count == 150


def test_an_interrupted_making_leaves_no_thread(many, tmp_path):
    class Broken(Broden):
        def read(self, index):
            if index == 70:
                raise RuntimeError("disk on fire")
            return super().read(index)

    with pytest.raises(RuntimeError, match="disk on fire"):
        packed(Broken(many), tmp_path / "cache", workers=2)
    assert not (tmp_path / "cache").exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("jaxinterp-data")]


def test_two_processes_make_it_once(many, tmp_path):
    code = f"""
import time
from jaxinterp.data import Broden, packed
class Slow(Broden):
    count = 0
    def read(self, index):
        self.count += 1
        time.sleep(0.01)
        return super().read(index)
source = Slow({str(many)!r})
cache = packed(source, {str(tmp_path / "cache")!r}, workers=1)
print(source.count, int(cache[149].image[0, 0, 0] * 255))
"""
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = sorted(process.communicate(timeout=120)[0].strip() for process in both)
    assert printed == ["0 149", "150 149"]


def test_a_disk_without_room(broden_folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(OSError, match=r"the packed cache needs 0\.0 GB more"):
        packed(Broden(broden_folder), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
