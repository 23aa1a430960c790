"""Warnings for evaluations that mean little: set-ups in which attacks fail for reasons other than robustness.

After Athalye, Carlini and Wagner (2018, arXiv 1802.00420) on masked gradients, and Croce and Hein (2020, arXiv
2003.01690) on models that such evaluations are run on by mistake. docs/diagnostics.md explains each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp.attacks import objective
from jaxinterp.attacks.driver import check
from jaxinterp.canonical import canonical
from jaxinterp.network import Model, as_model

_PAGE = "docs/diagnostics.md"
_ZERO = 0.1  # share of inputs without a gradient that is "many"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One reason to doubt an evaluation.

    Attributes:
        name: "probabilities", "random", "zero-gradients", "transfer".
        message: what was seen, with numbers.
        section: where it is explained.
    """

    name: str
    message: str
    section: str

    def __str__(self) -> str:
        return f"{self.message}; see {self.section}"


def _finding(name: str, message: str) -> Finding:
    return Finding(name, message, f"{_PAGE}#{name}")


def diagnose(model: Model, images: Any, labels: Any, *, key: jax.Array) -> list[Finding]:
    """Looks for what makes attacks on a model fail although it is not robust.

    Costs five forward passes and one backward pass on the images; a few tens of images do.

    Args:
        model: images -> logits.
        images: [B,H,W,C] float in [0, 1].
        labels: [B] the classes that the model gives them.
        key: of the small noise that tells a model's randomness from a jump at one point.

    Returns:
        What was found; empty where nothing was.

    Raises:
        ValueError, TypeError: as `jaxinterp.attacks.run`.
    """
    model = as_model(model)
    images, labels, _, _ = check(model, images, labels)
    found = []

    # Two programs, traced apart: randomness of Python or NumPy is frozen into each.
    first, second = (np.asarray(jax.jit(lambda m, x: m(x))(model, images), np.float64) for _ in range(2))
    again = np.asarray(jax.jit(lambda m, x: m(x))(model, images), np.float64)
    spread = np.ptp(first, axis=1).max() or 1.0
    difference = max(np.abs(first - second).max(), np.abs(first - again).max()) / spread
    if difference > 1e-3:
        found.append(
            _finding(
                "random",
                f"the model gives different logits for the same images (by {difference:.0%} of their range): attacks "
                "on it need averages over its randomness",
            )
        )
    sums = first.sum(axis=1)
    if first.min() >= 0 and np.allclose(sums, 1, atol=1e-3):
        found.append(
            _finding(
                "probabilities",
                "the model returns probabilities instead of logits: margins saturate and gradients vanish",
            )
        )
    without, noisy = (float(np.mean(_without_gradient(model, x, labels))) for x in (images, _jittered(images, key)))
    if max(without, noisy) > _ZERO:
        found.append(
            _finding(
                "zero-gradients",
                f"the gradient is zero or not finite for {max(without, noisy):.0%} of the images: attacks that follow "
                "it stand still there",
            )
        )
    return found


def compare_access(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Finding]:
    """Whether attacks without gradients break examples that those with gradients do not.

    An attack that sees less should not find more: where it does, the gradients mislead.

    Args:
        rows: for every attack its examples, each with `id`, `success`, `backward` (passes) and `linf` and `l2`.
    """
    blind = {name: mine for name, mine in rows.items() if mine and not any(row["backward"] for row in mine)}
    seeing = {name: mine for name, mine in rows.items() if mine and name not in blind}
    if not blind or not seeing:
        return []
    broken = {row["id"] for mine in seeing.values() for row in mine if row["success"]}
    found = []
    for name, mine in blind.items():
        only = [row["id"] for row in mine if row["success"] and row["id"] not in broken]
        if len(only) > max(1, 0.05 * len(mine)):
            found.append(
                _finding(
                    "transfer",
                    f"{name}, which uses no gradients, breaks {len(only)} of {len(mine)} images that no attack with "
                    "gradients breaks",
                )
            )
    return found


def compare_transfer(model: Model, labels: Any, white: Any, transferred: Any) -> list[Finding]:
    """Whether images made on another model break more of this one's decisions than an attack on itself.

    Args:
        model: images -> logits.
        labels: [B] true classes.
        white: the `AttackResult` of an untargeted attack on this model.
        transferred: [B,H,W,C] adversarial images made on another model, within the same budget.

    Raises:
        ValueError, TypeError: as `jaxinterp.attacks.run`.
    """
    model = as_model(model)
    transferred, labels, _, _ = check(model, transferred, labels, names=("transferred", "labels"))
    broken = np.argmax(np.asarray(jax.jit(lambda m, x: m(x))(model, transferred)), axis=1) != np.asarray(labels)
    own = np.asarray(white.success)
    if broken.sum() <= own.sum():
        return []
    return [
        _finding(
            "transfer",
            f"images made on another model break {int(broken.sum())} of {len(own)}, an attack on the model itself "
            f"only {int(own.sum())}",
        )
    ]


@jax.jit
@canonical
def _without_gradient(model, images, labels):
    _, _, gradient = objective.value_and_gradient(
        model, images, lambda logits: objective.likelihood(logits, labels, None)
    )
    return jnp.all(gradient == 0, axis=(1, 2, 3))  # components that are not finite have become zero


def _jittered(images, key):
    noise = jax.random.uniform(key, images.shape, jnp.float32, -1.0) / 255
    return jnp.clip(images + noise, 0, 1)
