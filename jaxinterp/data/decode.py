"""Picture files as float32 RGB arrays, resized and cropped as ImageNet networks are evaluated.

The steps and their rounding are torchvision's on PIL images (`Resize`, `CenterCrop`, `ToTensor`), because
published accuracies were measured that way: convert to RGB, resize the short side with an antialiased filter
on 8-bit pixels, cut out the centre, divide by 255. As there, the EXIF orientation of a photograph is ignored
and the alpha channel is dropped, not blended.

One thing differs: 16-bit grey pictures are scaled to 8 bits. PIL's own conversion clips them at 255, which
turns nearly every such picture white. (16-bit colour arrives from PIL as its high byte, which is right to one
level.)
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from .source import DamagedImage, to_unit

# Told apart by content, whatever the file is called. The list leaves out formats that start programs (EPS).
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000")
_prepared = threading.Event()
_preparing = threading.Lock()


@dataclass(frozen=True)
class Crop:
    """How a picture of any size becomes a square one.

    Attributes:
        size: side of the result, in pixels.
        crop_pct: the short side is resized to `floor(size / crop_pct)`; in (0, 1].
        interpolation: PIL's name of the filter in lower case: nearest, box, bilinear, hamming, bicubic,
            lanczos.

    Raises:
        ValueError: a value out of range, or an unknown filter.
    """

    size: int
    crop_pct: float = 0.875
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size: expected at least one pixel, got {self.size}")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct: expected a number in (0, 1], got {self.crop_pct}")
        known = [filter.name.lower() for filter in Image.Resampling]
        if self.interpolation not in known:
            raise ValueError(f"interpolation: expected one of {', '.join(known)}, got {self.interpolation!r}")


def decode(file: str | os.PathLike[str] | bytes, crop: Crop | None) -> np.ndarray:
    """Reads one picture; of an animation, the first frame.

    Args:
        file: a path, or the content of a file.
        crop: how to resize and crop; None keeps the picture's own size.

    Returns:
        float32 [H,W,3] in [0, 1]; H = W = `crop.size` where there is a crop.

    Raises:
        DamagedImage: the file cannot be read, is not a picture, is cut short, has pixels without a defined
            range (32-bit), or is larger than `PIL.Image.MAX_IMAGE_PIXELS`. Its id is the path.
    """
    with _damaged(file):
        image = _rgb(_load(file))
        return to_unit(np.asarray(image if crop is None else _resize_and_crop(image, crop)))


def decode_pixels(file: str | os.PathLike[str] | bytes) -> np.ndarray:
    """Reads one picture as `decode` does without a crop, but leaves its pixels as uint8 [H,W,3]."""
    with _damaged(file):
        return np.asarray(_rgb(_load(file)))


def decode_stored(file: str | os.PathLike[str] | bytes) -> tuple[np.ndarray, str]:
    """Reads the numbers that a file stores, without converting them to colours; for maps of labels.

    Args:
        file: a path, or the content of a file.

    Returns:
        [H,W] (grey levels, or indices into a palette) or [H,W,channels], and PIL's name of the format, such as "PNG".

    Raises:
        DamagedImage: as in `decode`.
    """
    with _damaged(file):
        image = _load(file)
        return np.asarray(image), image.format or ""


def stored_size(file: str | os.PathLike[str] | bytes) -> tuple[int, int]:
    """Width and height that a picture file states, before anything is decoded.

    Raises:
        DamagedImage: as in `decode`.
    """
    with _damaged(file):
        return _open(file).size


def crop_pixels(pixels: np.ndarray, crop: Crop) -> np.ndarray:
    """Resizes and crops pixels in memory as `decode` does those of a file.

    Args:
        pixels: uint8 [H,W,1] or [H,W,3].
        crop: how to resize and crop.

    Returns:
        float32 in [0, 1], of crop.size x crop.size and as many channels.

    Raises:
        ValueError: the picture is so narrow that it would become larger than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    try:
        result = to_unit(np.asarray(_resize_and_crop(image, crop)))
    except _Unreadable as error:
        raise ValueError(str(error)) from None
    return result[..., None] if result.ndim == 2 else result


def resize_pixels(pixels: np.ndarray, size: tuple[int, int], interpolation: str = "bicubic") -> np.ndarray:
    """Resizes a whole picture, uint8 [H,W,3], to (height, width) with an antialiased filter; the aspect may change."""
    if pixels.shape[:2] == size:
        return pixels
    filter = Image.Resampling[interpolation.upper()]
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), filter))


def _prepare() -> None:
    """What the process needs once before its first picture is decoded."""
    with _preparing:
        if _prepared.is_set():
            return
        Image.init()  # loads the formats, before threads would race to do it
        # PIL warns about odd metadata, which no pixel depends on, and about sizes, which are checked below. Decoding
        # runs in threads, where warnings.catch_warnings is not safe: the filters are set once, behind a user's own.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.", append=True)
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, append=True)
        _prepared.set()


class _Unreadable(Exception):
    """The reason why a picture cannot be read, before its id is known."""


@contextlib.contextmanager
def _damaged(file: str | os.PathLike[str] | bytes) -> Iterator[None]:
    if not _prepared.is_set():
        _prepare()
    try:
        yield
    except _Unreadable as error:
        name = "picture" if isinstance(file, bytes) else os.fspath(file)
        raise DamagedImage(name, str(error)) from error.__cause__


def _load(file: str | os.PathLike[str] | bytes) -> Image.Image:
    image = _open(file)
    with _refused():
        image.load()
    return image


def _open(file: str | os.PathLike[str] | bytes) -> Image.Image:
    """A picture of a known format and a size within the limit, its pixels not yet decoded."""
    if isinstance(file, bytes):
        data = file
    else:
        try:
            if stat.S_IFMT(os.stat(file).st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
                raise _Unreadable("a pipe or a device, not a file")  # to open a pipe would wait for its writer
            with open(file, "rb") as stream:
                data = stream.read()
        except OSError as error:
            raise _Unreadable(f"cannot be read ({error.strerror or error})") from error
    if not data:
        raise _Unreadable("the file is empty")
    with _refused():
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        _check_size(*image.size)
    return image


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """What PIL raises, as the reason why a picture cannot be read."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise _Unreadable("not a picture in a known format") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _Unreadable(f"more pixels than PIL's limit of {Image.MAX_IMAGE_PIXELS}") from error
    except (_Unreadable, MemoryError, Warning):
        raise
    except Exception as error:  # on damaged bytes PIL's readers raise nearly every built-in exception
        raise _Unreadable(f"damaged ({error or type(error).__name__})") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise _Unreadable("32-bit pixels have no defined range")
        # PIL hands some 16-bit files over as 32-bit integers. 65535 / 257 = 255: every level to its nearest.
        image = Image.fromarray(((levels.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise _Unreadable("32-bit pixels have no defined range")
    if image.mode == "RGB":
        return image
    image.info.pop("transparency", None)  # dropped in any case; PIL would spend time on it
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise _Unreadable(f"{image.mode} pixels cannot be converted to RGB") from error


def _resize_and_crop(image: Image.Image, crop: Crop) -> Image.Image:
    width, height = image.size
    short = int(crop.size / crop.crop_pct)
    long = int(short * max(width, height) / min(width, height))
    width, height = (short, long) if width <= height else (long, short)
    _check_size(width, height)  # a long picture a few pixels wide becomes enormous
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling[crop.interpolation.upper()])
    left = round((width - crop.size) / 2)
    top = round((height - crop.size) / 2)
    return image.crop((left, top, left + crop.size, top + crop.size))


def _check_size(width: int, height: int) -> None:
    # PIL only warns up to twice its limit; whether a picture is read must not depend on warning filters.
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise _Unreadable(f"{width} x {height} is more pixels than PIL's limit of {Image.MAX_IMAGE_PIXELS}")
