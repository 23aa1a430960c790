"""The main job: attack pictures, and explain every perturbation at the pixel and the image level."""

from jaxinterp.explain.job import DEFAULT_ATTACKS, PRESETS, Explained, explain

__all__ = ["DEFAULT_ATTACKS", "PRESETS", "Explained", "explain"]
