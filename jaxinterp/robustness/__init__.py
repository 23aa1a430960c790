"""How well a network withstands attacks: success, robust accuracy, norms, and what is left after rounding to 8 bits."""

from jaxinterp.robustness.job import DEFAULT_ATTACKS, Evaluated, evaluate

__all__ = ["DEFAULT_ATTACKS", "Evaluated", "evaluate"]
