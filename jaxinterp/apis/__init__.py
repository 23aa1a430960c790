"""Vision services behind one protocol: a client over HTTP, a network and an OCR engine in this process, a server.

    api.labels(image) -> ranked names with scores
    api.text(image)   -> recognised strings

`HTTPVision` asks a service, `LocalVision` a network of the zoo and an OCR engine, and `Server` puts the second behind
what the first speaks. `as_model` makes any of them a model, so that attacks which need no gradients run on a service.
"""

from jaxinterp.apis.client import HTTPVision
from jaxinterp.apis.local import LocalVision
from jaxinterp.apis.model import as_model, asking
from jaxinterp.apis.ocr import MissingEngine, OCREngine, ocr_engine
from jaxinterp.apis.protocol import BadAnswer, Label, ServiceError, VisionAPI
from jaxinterp.apis.server import Server

__all__ = [
    "BadAnswer",
    "HTTPVision",
    "Label",
    "LocalVision",
    "MissingEngine",
    "OCREngine",
    "Server",
    "ServiceError",
    "VisionAPI",
    "as_model",
    "asking",
    "ocr_engine",
]
