"""A vision service as a model, for attacks that need no gradients."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from jaxinterp.apis.protocol import BadAnswer, Label, VisionAPI

_LEAST = 1e-12  # the score of a label whose score is zero


class _Asking:
    """Images to logits through a service; equal to itself only, so that programs belong to one service."""

    def __init__(self, api: VisionAPI, classes: Sequence[str]):
        self.api, self.classes = api, len(classes)
        self.failure: Exception | None = None  # what the last request ended with
        self.positions: dict[str, list[int]] = defaultdict(list)
        for i, name in enumerate(classes):
            self.positions[name].append(i)

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b k"]:
        shape = jax.ShapeDtypeStruct((images.shape[0], self.classes), jnp.float32)
        return jax.pure_callback(self.ask, shape, images, vmap_method="sequential")

    def ask(self, images: Any) -> np.ndarray:
        """One request for every image."""
        logits = np.full((len(images), self.classes), -np.inf, np.float32)
        for row, image in zip(logits, np.asarray(images), strict=True):
            for label in self._labels(image):
                if label.score < 0:
                    raise self._negative(label)
                for i in self.positions.get(label.name, ()):
                    row[i] = max(row[i], np.log(max(label.score, _LEAST)))
        return logits

    def _negative(self, label: Label) -> Exception:
        self.failure = BadAnswer(
            f"scores must not be negative to have logarithms, got {label.score:g} of {label.name!r}"
        )
        return self.failure

    def _labels(self, image: np.ndarray) -> Sequence[Label]:
        self.failure = None
        try:
            return self.api.labels(image)
        except Exception as error:
            self.failure = error
            raise


@contextlib.contextmanager
def asking(model: Partial) -> Iterator[None]:
    """Raises what a service failed with as it was, where a compiled program makes an error of JAX's of it.

        with asking(model):
            result = attacks.run(attack, model, images, labels, key=key)

    Args:
        model: from `as_model`.

    Raises:
        ServiceError: as the service raised it, with its status; likewise anything else that it raised.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError:
        failure = getattr(model.func, "failure", None)
        if failure is None:
            raise
        raise failure from None


def as_model(api: VisionAPI, classes: Sequence[str]) -> Partial:
    """The model `images [B,H,W,3] -> logits [B,K]` that asks a service once for every image.

    A logit is the logarithm of the score, which must not be negative; classes that the service does not name have -inf,
    which attacks take for ruled out. A name that several classes share is given to all of them, so that no success
    hangs on which is meant.

    Attacks count what the same search costs one query after the other, but a step evaluates what it evaluates at
    once: with `population=1`, a `TransparentText` sends no more than it counts, but for examples that are done while
    others in the batch are not. A service that fails ends the attack with JAX's error, in which the service's stands;
    with `asking` it is the service's own.

    Args:
        api: the service.
        classes: names by class.

    Raises:
        ValueError: fewer than two classes.
        TypeError: not a service.
    """
    if not isinstance(api, VisionAPI):
        raise TypeError(f"api must be a VisionAPI, with labels and text, got {type(api).__name__}")
    if len(classes) < 2:
        raise ValueError(f"classes must be at least two names, got {len(classes)}")
    return Partial(_Asking(api, classes))
