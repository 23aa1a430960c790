"""What adversarial perturbations do to a network, at the pixel, the image and the network level.

`import jaxinterp` loads jax and numpy only; the parts are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxinterp.network import Network

if TYPE_CHECKING:
    from jaxinterp import (
        apis,
        attacks,
        attribution,
        cam,
        data,
        dissect,
        effect,
        ensemble,
        faithfulness,
        labeltrees,
        localize,
        models,
        network,
        training,
        weights,
    )
    from jaxinterp.weights import load

__version__ = "0.1.0"
__all__ = [
    "Network",
    "apis",
    "attacks",
    "attribution",
    "cam",
    "data",
    "dissect",
    "effect",
    "ensemble",
    "faithfulness",
    "labeltrees",
    "load",
    "localize",
    "models",
    "network",
    "training",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name == "load":
        from jaxinterp.weights import load

        return load
    if name in __all__:
        return importlib.import_module(f"jaxinterp.{name}")
    raise AttributeError(f"module 'jaxinterp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
