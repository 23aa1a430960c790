"""OCR engines: RapidOCR, a Python package with its models, and tesseract, a program."""

from __future__ import annotations

import importlib.util
import math
import shutil
import subprocess
import threading
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from jaxinterp.apis.protocol import ServiceError, pixels, to_png

Engine = Literal["auto", "rapidocr", "tesseract"]
_INSTALL = {
    "rapidocr": "pip install 'jaxinterp[ocr]' (with Python below 3.13)",
    "tesseract": "apt-get install tesseract-ocr (or your system's package of tesseract)",
}
_SHORT, _LONG = 30, 4000  # pixels: sides that RapidOCR enlarges a picture to, and that it may come to have
_SPARSE = "11"  # tesseract's page segmentation: find as much text as possible, in no particular layout


class MissingEngine(ValueError):
    """An OCR engine that is not installed; the message says how to install it."""


@runtime_checkable
class OCREngine(Protocol):
    """Reads text in images."""

    def text(self, image: Any, /) -> tuple[str, ...]:
        """The strings in an image [H,W,3], float in [0, 1] or uint8."""
        ...


def ocr_engine(name: Engine = "auto") -> OCREngine:
    """An OCR engine.

    Args:
        name: "rapidocr", "tesseract", or "auto": the first of them that is installed.

    Raises:
        MissingEngine: it is not installed.
        ValueError: another name.
    """
    installed = {
        "rapidocr": importlib.util.find_spec("rapidocr_onnxruntime") is not None,
        "tesseract": shutil.which("tesseract") is not None,
    }
    if name not in ("auto", *installed):
        raise ValueError(f"OCR engine must be auto, rapidocr or tesseract, got {name!r}")
    chosen = next((each for each in installed if installed[each]), None) if name == "auto" else name
    if chosen is None:
        raise MissingEngine("no OCR engine is installed: " + ", or ".join(_INSTALL.values()))
    if not installed[chosen]:
        raise MissingEngine(f"the OCR engine {chosen} is not installed: {_INSTALL[chosen]}")
    return RapidOCR() if chosen == "rapidocr" else Tesseract()


class RapidOCR:
    """RapidOCR on ONNX Runtime: finds lines of text, turns them upright, and recognises them."""

    name = "rapidocr"

    def __init__(self) -> None:
        from rapidocr_onnxruntime import RapidOCR as Pipeline  # type: ignore[import-not-found]  # an extra

        self._pipeline, self._one = Pipeline(), threading.Lock()

    def text(self, image: Any) -> tuple[str, ...]:
        """The recognised lines. Errors are those of `jaxinterp.apis.protocol.pixels`."""
        with self._one:
            found, _ = self._pipeline(_wide_enough(pixels(image))[..., ::-1].copy())  # it takes blue first
        return tuple(str(line[1]) for line in found or ())


def _wide_enough(image: np.ndarray) -> np.ndarray:
    """The picture [H,W,3], with edges repeated where it is so narrow that RapidOCR would make it huge.

    It enlarges what is narrower than 30 pixels until it is not, however long that gets; a row of pixels would take
    gigabytes and minutes.
    """
    needed = math.ceil(_SHORT * max(image.shape[:2]) / _LONG)
    lacking = [max(0, needed - side) for side in image.shape[:2]]
    return np.pad(image, [*((lack // 2, lack - lack // 2) for lack in lacking), (0, 0)], mode="edge")


class Tesseract:
    """The program tesseract, as installed."""

    name = "tesseract"

    def __init__(self, timeout: float | int = 60.0):
        """Args: timeout: seconds for an image."""
        self.timeout = timeout

    def text(self, image: Any) -> tuple[str, ...]:
        """The recognised lines.

        Raises:
            ServiceError: tesseract failed or took too long.
            ValueError, TypeError: not an image.
        """
        command = ["tesseract", "stdin", "stdout", "--psm", _SPARSE]
        try:
            done = subprocess.run(command, input=to_png(image), capture_output=True, timeout=self.timeout, check=True)
        except subprocess.TimeoutExpired:
            raise ServiceError(f"tesseract did not finish within {self.timeout:g} seconds") from None
        except subprocess.CalledProcessError as error:
            said = " ".join(error.stderr.decode("utf-8", "replace").split())[:200]
            raise ServiceError(f"tesseract failed with status {error.returncode}: {said}") from None
        lines = done.stdout.decode("utf-8", "replace").splitlines()
        return tuple(line.strip() for line in lines if line.strip())
