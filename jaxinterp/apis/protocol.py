"""What a vision service answers, how pictures are sent to one, and how it may fail.

The wire format of `HTTPVision` and `Server`: a POST of a picture (PNG, lossless, 8 bits a channel) to URL/labels or
URL/text, answered with status 200 and

    {"labels": [{"name": "tench", "score": 0.93}, ...]}      the most likely first
    {"text": ["all rights reserved", ...]}                   in the order of reading

or with another status and {"error": "what was wrong"}.
"""

from __future__ import annotations

import io
import json
import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

MOST_LABELS, MOST_STRINGS, LONGEST = 10_000, 10_000, 10_000  # of an answer; characters in a name or a string


class ServiceError(OSError):
    """A service that could not be reached, refused, or failed.

    Attributes:
        status: HTTP status of its last answer; None where there was none.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class BadAnswer(ServiceError):
    """An answer that is not what was agreed: not JSON, of another form, too large, with scores that are no numbers."""


class Label(NamedTuple):
    """What a service sees in an image, and how sure it is; only the order of scores means anything."""

    name: str
    score: float


@runtime_checkable
class VisionAPI(Protocol):
    """A vision service, wherever it runs. Images are [H,W,3], float in [0, 1] or uint8."""

    def labels(self, image: Any, /) -> tuple[Label, ...]:
        """What is in the image, the most likely first.

        Raises:
            ServiceError: the service cannot answer.
            ValueError, TypeError: not an image.
        """
        ...

    def text(self, image: Any, /) -> tuple[str, ...]:
        """What is written in the image, in the order of reading. Errors are those of `labels`."""
        ...


def pixels(image: Any) -> np.ndarray:
    """An image as uint8 [H,W,3].

    Args:
        image: [H,W,3], float in [0, 1] or uint8.

    Raises:
        ValueError: another shape, no pixels, values outside [0, 1] or not finite.
        TypeError: neither floats nor uint8.
    """
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(f"image must be [H,W,3], got shape {array.shape}")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"image must be floats in [0, 1] or uint8, got {array.dtype}")
    if not (np.min(array) >= 0 and np.max(array) <= 1):
        raise ValueError(f"image must be finite and in [0, 1], got values from {np.min(array):g} to {np.max(array):g}")
    return np.rint(array * 255).astype(np.uint8)


def to_png(image: Any) -> bytes:
    """An image as a PNG file of 8 bits a channel. Arguments and errors are those of `pixels`."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels(image)).save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def read_labels(body: bytes) -> tuple[Label, ...]:
    """The labels of an answer, the highest score first.

    Raises:
        BadAnswer: it is not JSON or of another form, or a score is not a finite number.
    """
    found = _listed(body, "labels", MOST_LABELS)
    labels = []
    for each in found:
        name, score = (each.get("name"), each.get("score")) if isinstance(each, dict) else (None, None)
        if not isinstance(name, str) or not 0 < len(name) <= LONGEST:
            raise BadAnswer("labels: expected a name and a score for each, got another form")
        if isinstance(score, bool) or not isinstance(score, int | float) or not _finite(score):
            raise BadAnswer("labels: a score is not a finite number")
        labels.append(Label(name, float(score)))
    return tuple(sorted(labels, key=lambda label: -label.score))  # a stable sort: ties as the service ranks them


def read_text(body: bytes) -> tuple[str, ...]:
    """The strings of an answer. Errors are those of `read_labels`."""
    found = _listed(body, "text", MOST_STRINGS)
    if not all(isinstance(each, str) and len(each) <= LONGEST for each in found):
        raise BadAnswer("text: expected strings, got another form")
    return tuple(found)


def _listed(body: bytes, name: str, most: int) -> list[Any]:
    """The list under `name` in a JSON object."""
    try:
        answer = json.loads(body.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError):  # what is not UTF-8, too
        raise BadAnswer(f"the answer is not JSON ({len(body)} bytes)") from None
    found = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(found, list):
        raise BadAnswer(f'the answer is JSON, but not an object with a list "{name}"')
    if len(found) > most:
        raise BadAnswer(f"the answer has {len(found)} {name}, more than {most}")
    return found


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _finite(score: int | float) -> bool:
    try:
        return math.isfinite(float(score))
    except OverflowError:
        return False
