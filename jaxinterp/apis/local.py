"""A network and an OCR engine as a vision service in this process."""

from __future__ import annotations

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp.apis.ocr import OCREngine
from jaxinterp.apis.protocol import Label, ServiceError, pixels
from jaxinterp.data.decode import Crop, crop_pixels
from jaxinterp.data.source import to_unit
from jaxinterp.network import Network, Params


class LocalVision:
    """Labels by a network with softmax scores, text by an OCR engine; threads may share one."""

    def __init__(self, network: Network, params: Params, *, ocr: OCREngine | None = None, top: int = 5):
        """Args:
            network: any network.
            params: its parameters.
            ocr: reads text; None means that `text` is refused.
            top: number of labels.

        Raises:
            ValueError: no label is asked for, or a network that does not take RGB images.
        """
        if top < 1:
            raise ValueError(f"top must be at least 1, got {top}")
        self.network, self.ocr, self.top = network, ocr, top
        self._model, self._one = network.bind(params), threading.Lock()
        side = network.image_size
        try:
            jax.eval_shape(self._model, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{network.name} does not take RGB images, as services get them: {error}") from error
        self._crop = Crop(network.image_size, network.crop_pct, network.interpolation)

    def labels(self, image: Any) -> tuple[Label, ...]:
        """The most likely classes. An image of the network's size is taken as it is, another one resized and cropped.

        Raises:
            ServiceError: the network's answer is not finite.
            ValueError, TypeError: not an image, or one that cannot be cropped.
        """
        seen = pixels(image)
        exact = seen.shape[:2] == (self.network.image_size,) * 2
        ready = to_unit(seen) if exact else crop_pixels(seen, self._crop)
        with self._one:
            scores = np.asarray(_scores(self._model, ready[None]))[0]
        if not np.isfinite(scores).all():
            raise ServiceError(f"{self.network.name} gives logits that are not finite for this image")
        order = np.argsort(-scores, kind="stable")[: self.top]
        return tuple(Label(self.network.class_name(int(i)), float(scores[i])) for i in order)

    def text(self, image: Any) -> tuple[str, ...]:
        """What the OCR engine reads.

        Raises:
            ServiceError: there is no engine, or it failed.
            ValueError, TypeError: not an image.
        """
        if self.ocr is None:
            raise ServiceError("this service has no OCR engine", 501)
        return self.ocr.text(image)


@jax.jit
def _scores(model, images):
    return jax.nn.softmax(model(images), axis=-1)
