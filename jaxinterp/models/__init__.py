"""Architectures as Flax NNX definitions; everything outside sees `Network` and a flat dict of parameters."""

from jaxinterp.models.registry import ARCHITECTURES, imagenet_classes, init, network, shapes

__all__ = ["ARCHITECTURES", "imagenet_classes", "init", "network", "shapes"]
