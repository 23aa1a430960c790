"""OCR engines: absent ones say how to install them, present ones read."""

import importlib.util
import stat

import numpy as np
import pytest

from jaxinterp import typesetting
from jaxinterp.apis import MissingEngine, OCREngine, ServiceError, ocr, ocr_engine


def page(phrase="north gate 17", size=32):
    """Black text on white."""
    mask = typesetting.render(phrase, size)
    image = np.ones((120, 400, 3), np.float32)
    image[40 : 40 + mask.shape[0], 60 : 60 + mask.shape[1]] -= mask[..., None] / 255
    return image


def program(folder, monkeypatch, script):
    """A program named tesseract, alone on the path."""
    path = folder / "tesseract"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_absent_engines_say_how_to_install_them(monkeypatch):
    monkeypatch.setattr(ocr.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(ocr.shutil, "which", lambda name: None)
    messages: tuple[tuple[ocr.Engine, str], ...] = (
        ("auto", r"no OCR engine is installed: pip install 'jaxinterp\[ocr\]' .*3\.13\), or apt-get install tess"),
        ("rapidocr", r"the OCR engine rapidocr is not installed: pip install 'jaxinterp\[ocr\]'"),
        ("tesseract", "the OCR engine tesseract is not installed: apt-get install tesseract-ocr"),
    )
    for name, message in messages:
        with pytest.raises(MissingEngine, match=message):
            ocr_engine(name)


def test_tesseract_is_given_a_png_and_its_lines_are_kept(tmp_path, monkeypatch):
    program(
        tmp_path, monkeypatch, f"cat > {tmp_path}/got; echo \"$@\" > {tmp_path}/asked; printf ' two words \\n\\n17\\n'"
    )
    engine = ocr_engine("tesseract")
    assert isinstance(engine, OCREngine)
    assert engine.text(page()) == ("two words", "17")
    assert (tmp_path / "got").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "asked").read_text().split() == ["stdin", "stdout", "--psm", "11"]


def test_a_tesseract_that_fails_or_hangs(tmp_path, monkeypatch):
    program(tmp_path, monkeypatch, "cat > /dev/null; echo 'no language data' >&2; exit 3")
    with pytest.raises(ServiceError, match="tesseract failed with status 3: no language data"):
        ocr.Tesseract().text(page())
    program(tmp_path, monkeypatch, "exec sleep 20")
    with pytest.raises(ServiceError, match=r"did not finish within 0\.2 seconds"):
        ocr.Tesseract(timeout=0.2).text(page())


@pytest.mark.skipif(importlib.util.find_spec("rapidocr_onnxruntime") is None, reason="the ocr extra is not installed")
def test_rapidocr_reads():
    engine = ocr_engine("rapidocr")
    read = "".join("".join(engine.text(page())).split())
    assert read.lower() == "northgate17"
    assert engine.text(np.ones((120, 400, 3), np.float32)) == ()
    assert engine.text(np.ones((1, 400, 3), np.float32)) == ()  # enlarged to 30 x 12,000, it would take gigabytes


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(1, 400, (3, 400)), (9000, 7, (9000, 68)), (8, 900, (8, 900))]
)
def test_narrow_pictures_are_made_wider_for_rapidocr(rng, height, width, expected):
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    made = ocr._wide_enough(image)
    assert made.shape == (*expected, 3)
    top, left = ((a - b) // 2 for a, b in zip(expected, image.shape, strict=False))
    np.testing.assert_array_equal(made[top : top + height, left : left + width], image)
    assert 30 * max(expected) <= 4000 * min(expected)


@pytest.mark.skipif(ocr.shutil.which("tesseract") is None, reason="tesseract is not installed")
def test_tesseract_reads():
    read = "".join("".join(ocr_engine("tesseract").text(page())).split())
    assert read.lower() == "northgate17"
