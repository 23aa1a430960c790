"""Decoding against PIL called step by step, every kind of pixel, and every kind of damage."""

import io
import math
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxinterp.data import Crop, DamagedImage, decode

NOISE = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def png16(levels: np.ndarray) -> bytes:
    """A 16-bit PNG written by hand: [H,W] grey, [H,W,2] grey and alpha, [H,W,3] RGB, [H,W,4] RGBA."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = levels.shape[:2]
    color = {1: 0, 2: 4, 3: 2, 4: 6}[levels.size // (height * width)]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# Resizing and cropping


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (61, 61), (33, 100), (5, 7), (256, 301), (300, 257)])
@pytest.mark.parametrize(
    "crop",
    [Crop(224), Crop(48), Crop(31, 0.8, "bilinear"), Crop(20, 1.0, "lanczos"), Crop(48, 0.9, "nearest")],
)
def test_crop_is_pils_own(shape, crop):
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    height, width = shape
    short = math.floor(crop.size / crop.crop_pct)
    portrait = (short, int(short * height / width))
    landscape = (int(short * width / height), short)
    size = portrait if width < height else landscape
    filters = {"bicubic": 3, "bilinear": 2, "lanczos": 1, "nearest": 0}
    resized = Image.fromarray(pixels).resize(size, Image.Resampling(filters[crop.interpolation]))
    top, left = (round((side - crop.size) / 2.0) for side in (size[1], size[0]))
    expected = np.asarray(resized)[top : top + crop.size, left : left + crop.size]

    result = decode(encoded(Image.fromarray(pixels), "PNG"), crop)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, expected.astype(np.float32) / np.float32(255))


def test_crop_of_known_pixels():
    """Short side 4 stays; the middle four of 7 columns begin at round(1.5) = 2, as in torchvision."""
    pixels = np.arange(28, dtype=np.uint8).reshape(4, 7)
    result = decode(encoded(Image.fromarray(pixels), "PNG"), Crop(4, 1.0))
    np.testing.assert_array_equal(np.rint(result[..., 0] * 255), pixels[:, 2:6])


def test_one_pixel():
    result = decode(encoded(Image.new("RGB", (1, 1), (255, 51, 0)), "PNG"), Crop(32))
    np.testing.assert_allclose(result, np.broadcast_to([1, 0.2, 0], (32, 32, 3)), atol=1e-7)
    assert decode(encoded(Image.new("L", (1, 1)), "PNG"), None).shape == (1, 1, 3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": 0},
        {"size": 8, "crop_pct": 0.0},
        {"size": 8, "crop_pct": 1.1},
        {"size": 8, "interpolation": "cubic"},
    ],
)
def test_crop_refuses(arguments):
    with pytest.raises(ValueError, match=list(arguments)[-1]):
        Crop(**arguments)


# Kinds of pixels


def levels(data: bytes) -> np.ndarray:
    return np.rint(decode(data, None) * 255).astype(int)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP", "PPM"])
def test_lossless_formats(format):
    options = {"lossless": True} if format == "WEBP" else {}
    np.testing.assert_array_equal(levels(encoded(Image.fromarray(NOISE), format, **options)), NOISE)


def test_grey():
    np.testing.assert_array_equal(
        levels(encoded(Image.fromarray(NOISE[..., 0]), "PNG")), np.repeat(NOISE[..., :1], 3, -1)
    )


def test_alpha_is_dropped_not_blended():
    np.testing.assert_array_equal(
        levels(encoded(Image.fromarray(NOISE[..., :2], "LA"), "PNG")), np.repeat(NOISE[..., :1], 3, -1)
    )
    rgba = np.concatenate([NOISE, NOISE[..., :1]], -1)
    np.testing.assert_array_equal(levels(encoded(Image.fromarray(rgba), "PNG")), NOISE)


def test_palette_with_and_without_transparency():
    indices = (NOISE[..., 0] % 3).astype(np.uint8)
    colors = np.array([[255, 0, 0], [0, 7, 0], [1, 2, 250]], np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(colors.tobytes())
    assert image.mode == "P"
    for format, options in [
        ("PNG", {}),
        ("PNG", {"transparency": b"\0\x80\xff"}),
        ("GIF", {"transparency": 1}),
    ]:
        np.testing.assert_array_equal(levels(encoded(image, format, **options)), colors[indices])


def test_one_bit():
    bits = NOISE[..., 0] > 127
    np.testing.assert_array_equal(
        levels(encoded(Image.fromarray(bits), "PNG")), np.repeat(bits[..., None] * 255, 3, -1)
    )


def test_cmyk_jpeg():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow ink: red
    data = encoded(image, "JPEG", quality=100)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    np.testing.assert_allclose(levels(data), np.broadcast_to([255, 0, 0], (16, 16, 3)), atol=3)


GREY16 = np.array([[0, 128, 129, 257], [32768, 40000, 65406, 65535]])
GREY8 = np.array([[0, 0, 1, 1], [128, 156, 254, 255]])  # round(level / 257), by hand


@pytest.mark.parametrize("kind", ["png by hand", "PNG", "TIFF", "32-bit TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    if kind == "png by hand":
        data = png16(GREY16)
    elif kind == "32-bit TIFF":
        data = encoded(Image.fromarray(GREY16.astype(np.int32)), "TIFF")
    else:
        data = encoded(Image.fromarray(GREY16.astype(np.uint16)), kind)
    np.testing.assert_array_equal(levels(data), np.repeat(GREY8[..., None], 3, -1))


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_color_is_right_to_one_level(channels):
    wide = np.random.default_rng(2).integers(0, 65536, (20, 20, channels))
    expected = np.repeat(wide[..., :1], 3, -1) if channels == 2 else wide[..., :3]
    assert np.abs(levels(png16(wide)) - expected / 257).max() <= 1


def test_pixels_without_a_range():
    for pixels in (
        np.full((2, 2), 70000, np.int32),
        np.full((2, 2), -1, np.int32),
        np.ones((2, 2), np.float32),
    ):
        with pytest.raises(DamagedImage, match="no defined range"):
            decode(encoded(Image.fromarray(pixels), "TIFF"), None)


def test_first_frame_of_an_animation():
    first, second = Image.new("L", (4, 4), 10), Image.new("L", (4, 4), 200)
    data = encoded(first, "GIF", save_all=True, append_images=[second])
    np.testing.assert_array_equal(levels(data), 10)


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    assert decode(encoded(Image.fromarray(NOISE), "JPEG", exif=exif), None).shape == (60, 90, 3)


# Damage


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF"])
@pytest.mark.parametrize("part", [0.05, 0.3, 0.9])
def test_truncated(format, part):
    data = encoded(Image.fromarray(NOISE), format)
    with pytest.raises(DamagedImage):
        decode(data[: int(len(data) * part)], None)


def test_reasons(tmp_path):
    text, empty, cut = tmp_path / "text.jpg", tmp_path / "empty.jpg", tmp_path / "cut.jpg"
    text.write_text("not a picture at all, although the name says so")
    empty.touch()
    data = encoded(Image.fromarray(NOISE), "JPEG")
    cut.write_bytes(data[: len(data) // 2])
    for path, reason in [
        (text, "not a picture in a known format"),
        (empty, "the file is empty"),
        (cut, "truncated"),
        (tmp_path / "none.jpg", "No such file"),
        (tmp_path, "cannot be read"),
    ]:
        with pytest.raises(DamagedImage, match=reason) as caught:
            decode(path, Crop(32))
        assert caught.value.id == str(path)


@pytest.mark.filterwarnings("ignore")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/null")):
        with pytest.raises(DamagedImage, match="a pipe or a device, not a file"):
            decode(path, None)
    with pytest.raises(DamagedImage, match="cannot be read"):
        decode(tmp_path, None)


def test_flipped_bytes_never_give_another_exception():
    rng = np.random.default_rng(3)
    small = Image.fromarray(NOISE[:12, :12])
    for format in ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000"):
        good = encoded(small, format)
        for _ in range(40):
            data = bytearray(good)
            for place in rng.integers(0, len(data), 4):
                data[place] = rng.integers(256)
            try:
                image = decode(bytes(data), Crop(8))
            except DamagedImage:
                continue
            assert image.shape == (8, 8, 3)
            assert np.isfinite(image).all()


def test_postscript_is_not_run():
    with pytest.raises(DamagedImage, match="known format"):
        decode(encoded(Image.new("RGB", (4, 4)), "EPS"), None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("factor", [1.5, 3.0])
def test_decompression_bomb(monkeypatch, factor):
    """Up to twice its limit PIL only warns; here the limit is the limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(60 * 90 / factor))
    with pytest.raises(DamagedImage, match="PIL's limit"):
        decode(encoded(Image.fromarray(NOISE), "PNG"), None)


def test_long_thin_picture_does_not_explode():
    data = encoded(Image.new("L", (30000, 1)), "PNG")
    with pytest.raises(DamagedImage, match="256 is more pixels"):
        decode(data, Crop(224))


def test_no_file_stays_open(tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(encoded(Image.fromarray(NOISE), "PNG"))
    bad.write_bytes(good.read_bytes()[:1000])
    for _ in range(3):
        decode(good, None)
        with pytest.raises(DamagedImage):
            decode(bad, None)
    if os.path.isdir("/proc/self/fd"):
        links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        assert not [link for link in links if os.path.islink(link) and str(tmp_path) in os.readlink(link)]


def test_pil_warnings_are_silenced(tmp_path):
    """In a process of its own, since pytest replaces the warning filters."""
    path = tmp_path / "odd.jpg"
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0"  # promises five entries, has none
    data = encoded(Image.fromarray(NOISE), "JPEG", exif=exif)
    start = data.index(b"\xff\xe0")  # without a JFIF segment, PIL looks for the resolution in the EXIF data
    length = struct.unpack(">H", data[start + 2 : start + 4])[0]
    path.write_bytes(data[:start] + data[start + 2 + length :])
    with pytest.warns(UserWarning, match="EXIF"):
        Image.open(path).close()
    code = "import sys; from jaxinterp.data import decode; print(decode(sys.argv[1], None).shape)"
    run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=120)
    assert (run.stdout.strip(), run.stderr) == ("(60, 90, 3)", "")


def test_importing_changes_no_filters_and_threads_share_one_preparation():
    """The filters are set at the first picture, once, behind a user's own."""
    code = """
import concurrent.futures, io, warnings
warnings.filterwarnings("error", category=UserWarning)
before = list(warnings.filters)
from jaxinterp.data import decode
assert not [f for f in warnings.filters if "PIL" in str(f)], "set by the import"
from PIL import Image
stream = io.BytesIO()
Image.new("L", (4, 4)).save(stream, "PNG")
with concurrent.futures.ThreadPoolExecutor(16) as pool:
    list(pool.map(lambda i: decode(stream.getvalue(), None), range(200)))
assert len([f for f in warnings.filters if "PIL" in str(f[3])]) == 1
places = [i for i, f in enumerate(warnings.filters) if f == before[0] or "PIL" in str(f[3])]
assert len(places) == 2 and warnings.filters[places[0]] == before[0]
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
