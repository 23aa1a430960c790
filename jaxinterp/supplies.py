"""What attacks need beside numbers and words: rendered texts, and pictures to embed.

Both are arrays that all examples share, of the images' size, so that they are known when the network is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from jaxinterp.attacks import TransparentText, Watermark
from jaxinterp.attacks.attack import Attack
from jaxinterp.attacks.embedding import check_even
from jaxinterp.watermarks import Watermarks


def supplied(chosen: Mapping[str, Attack], size: int, marks: Watermarks | None = None) -> dict[str, Attack]:
    """The attacks with texts for images of size x size, and with watermarks where there are any.

    An attack made of others gets what these need.

    Args:
        chosen: attacks by name.
        size: side of the images, in pixels.
        marks: for every `Watermark`; without them it embeds pictures of noise.

    Raises:
        ValueError: a text that does not fit; a side that the transform cannot take; watermarks without an attack that
            embeds them.
    """
    if marks is not None and not any(isinstance(part, Watermark) for each in chosen.values() for part in _parts(each)):
        raise ValueError(f"--watermarks goes with the attack watermark, got {', '.join(chosen)}")
    return {name: _supplied(attack, size, marks) for name, attack in chosen.items()}


def _parts(attack: Any) -> Iterator[Any]:
    """The attack and those that it is made of."""
    yield attack
    for field in dataclasses.fields(attack):
        value = getattr(attack, field.name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Attack) and not isinstance(part, type):
                yield from _parts(part)


def _supplied(attack: Any, size: int, marks: Watermarks | None) -> Any:
    if isinstance(attack, TransparentText):
        from jaxinterp import typesetting

        return typesetting.written(attack, size, size)
    if isinstance(attack, Watermark):
        if attack.transform == "haar":
            check_even((size, size, 1))
        if marks is None:
            return attack
        return dataclasses.replace(attack, watermarks=jnp.asarray(marks.images), folders=marks.folders)
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(attack):
        value = getattr(attack, field.name)
        if isinstance(value, Attack):
            changed[field.name] = _supplied(value, size, marks)
        elif isinstance(value, tuple) and any(isinstance(part, Attack) for part in value):
            changed[field.name] = tuple(_supplied(part, size, marks) for part in value)
    return dataclasses.replace(attack, **changed) if changed else attack
