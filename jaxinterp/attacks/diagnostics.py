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
from jaxinterp.attacks.attack import Attack, Real
from jaxinterp.attacks.driver import check
from jaxinterp.canonical import canonical
from jaxinterp.draws import shaped
from jaxinterp.network import Model, as_model
from jaxinterp.sharding import on_host, with_automatic_axes

_PAGE = "docs/diagnostics.md"
_ZERO = 0.1  # share of inputs without a gradient that is "many"
_CLEARLY = 2.0  # factor between distances that the search of a nearest point does not explain, see CW, DDN and EAD
_RADIUS = 1e-3  # part of a radius that rounding may add
_NOISE = 1e-3  # smallest part of an image's range of logits that is noise
_ROUNDING = 1e-4  # part of the size of an image's logits that float32 does not explain
_DECIDING = 100  # margins behind an image's first class, beyond which a class is masked or without a chance
# Of attacks that have no field for it, see `norm_of`.
_NORMS: dict[str, str | None] = {
    **{"fgsm": "linf", "ifgsm": "linf", "mifgsm": "linf", "strattack": "linf", "spsa": "linf"},
    **{"cw": "l2", "cw-linf": "linf", "cw-l0": "l0", "ead": "l1", "ddn": "l2"},
    **{"key-pixels": None, "spgd": None, "sbim": None},
}


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


def _differences(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of finite values; infinite where one of two is not finite and the other not the same."""
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    apart = np.abs(np.subtract(one, other, where=~same, out=np.zeros_like(one)))
    return np.where(np.isnan(apart), np.inf, apart)


def _tolerance(logits: np.ndarray, precision: float) -> np.ndarray:
    """[B,K] the largest differences between two evaluations that rounding may explain.

    Each image is judged by its own logits, of the classes that may decide: one masked by a large finite number says
    nothing of the noise in others. What is usual in the batch counts only where an image has a tie, or logits near 0.
    """
    finite = np.isfinite(logits)
    first = np.max(logits, axis=1, keepdims=True, where=finite, initial=np.finfo(logits.dtype).min)
    behind = np.where(finite, first - logits, np.inf)
    margin = np.nan_to_num(np.sort(behind, axis=1)[:, 1:2], posinf=0)  # infinite where a single class is finite
    deciding = behind <= _DECIDING * np.maximum(margin, np.median(margin))
    spread = np.max(behind, axis=1, keepdims=True, where=deciding, initial=0)
    sizes = np.where(finite, np.abs(logits), 0)
    size = np.max(sizes, axis=1, keepdims=True, where=deciding, initial=0)
    size = np.maximum(np.maximum(size, 0.01 * np.median(size)), sizes)
    return np.maximum(_NOISE * spread, max(_ROUNDING, 2 * precision) * size)


def _finding(name: str, message: str) -> Finding:
    return Finding(name, message, f"{_PAGE}#{name}")


@with_automatic_axes
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
    if 0 in getattr(images, "shape", ()):
        raise ValueError(f"images: expected at least one image of at least one pixel, got shape {images.shape}")
    images, labels, _, _ = check(model, images, labels)
    found = []

    # Two programs, traced apart: randomness of Python or NumPy is frozen into each.
    first, second = (jax.jit(lambda m, x: m(x))(model, images) for _ in range(2))
    precision = float(jnp.finfo(first.dtype).eps) if jnp.issubdtype(first.dtype, jnp.floating) else 0.0
    first, second = (on_host(logits).astype(np.float64) for logits in (first, second))
    again = on_host(jax.jit(lambda m, x: m(x))(model, images)).astype(np.float64)
    tolerance = _tolerance(first, precision)
    changed = np.any([_differences(first, other) > tolerance for other in (second, again)], axis=(0, 2))
    if changed.any():
        decisions = [logits.argmax(axis=1) for logits in (first, second, again)]
        others = changed & (np.ptp(decisions, axis=0) > 0)
        found.append(
            _finding(
                "random",
                f"the model gives different logits for the same images ({changed.sum()} of {len(changed)}, and "
                f"different classes for {others.sum()}): attacks on it need averages over its randomness",
            )
        )
    rows = first[np.isfinite(first).all(axis=1)]
    if rows.size and rows.min() >= 0 and np.allclose(rows.sum(axis=1), 1, atol=max(1e-3, 4 * precision)):
        found.append(
            _finding(
                "probabilities",
                "the model returns probabilities instead of logits: margins saturate and gradients vanish",
            )
        )
    without, noisy = (
        float(np.mean(on_host(_without_gradient(model, x, labels)))) for x in (images, _jittered(images, key))
    )
    if max(without, noisy) > _ZERO:
        found.append(
            _finding(
                "zero-gradients",
                f"the gradient is zero or not finite for {max(without, noisy):.0%} of the images: attacks that follow "
                "it stand still there",
            )
        )
    return found


def compare_access(rows: Mapping[str, Sequence[Mapping[str, Any]]], attacks: Mapping[str, Attack]) -> list[Finding]:
    """Whether attacks without gradients break images that those with gradients should have broken and did not.

    An attack that sees less should not find more: where it does, the gradients mislead. A success without gradients
    counts where an attack with gradients

    - looks for any success in a ball (it has `eps`), failed, and the success lies in that ball;
    - looks for the nearest success, and failed or found one more than twice as far away in its norm;

    unless another attack with gradients succeeded within that ball, or that distance. Attacks with gradients
    whose norm is not known, or that may change a few pixels only or smoothly only, are left aside: what they miss
    proves nothing. So are they beside an attack that asks for less confidence.

    Args:
        rows: for every attack its examples, each with `id`, `success`, `backward` (passes) and the distances `l0`,
            `l1`, `l2` and `linf`, of which only those in the attacks' norms are looked at.
        attacks: by the names of `rows`; of several `eps` and `kappa` the strictest count.
    """
    blind = {name: mine for name, mine in rows.items() if mine and not any(row["backward"] for row in mine)}
    seeing = {name: {row["id"]: row for row in mine} for name, mine in rows.items() if mine and name not in blind}
    found = []
    for name, mine in blind.items():
        able = {other: norm for other in seeing if (norm := _comparable(attacks[other], attacks[name]))}
        missed = [row for row in mine if row["success"] and _missed(row, able, seeing, attacks)]
        if _more_than_chance(len(missed), len(mine)):
            found.append(
                _finding(
                    "transfer",
                    f"{name}, which uses no gradients, breaks {len(missed)} of {len(mine)} images with changes that "
                    "attacks with gradients could have made and did not find",
                )
            )
    return found


def _more_than_chance(missed: int, images: int) -> bool:
    return missed > max(1, 0.05 * images)


def _comparable(seeing: Attack, blind: Attack) -> str | None:
    """The norm in which results of an attack with gradients can be held against those of one without, if any."""
    sure = np.min(getattr(blind, "kappa", 0)) >= np.max(getattr(seeing, "kappa", 0))
    return norm_of(seeing) if sure else None


def norm_of(attack: Attack) -> str | None:
    """The norm of the ball that an attack fills, or of what it makes small; None where there is more to it."""
    return _NORMS.get(attack.name, getattr(attack, "norm", None))


def _missed(row, able, seeing, attacks) -> bool:
    """Whether an attack in `able` should have found the success `row`, and none in `seeing` found one as near."""
    for name, norm in able.items():
        own = seeing[name].get(row["id"])
        if own is None:
            continue
        eps = getattr(attacks[name], "eps", None)
        if eps is None:
            reach = _CLEARLY * row[norm]
            failed = not own["success"] or own[norm] > reach
        else:
            reach = np.min(eps) * (1 + _RADIUS)
            failed = not own["success"] and row[norm] <= reach
        others = (mine.get(row["id"]) for other, mine in seeing.items() if other != name)
        if failed and not any(other and other["success"] and other[norm] <= reach for other in others):
            return True
    return False


@with_automatic_axes
def compare_transfer(model: Model, labels: Any, white: Any, transferred: Any, *, kappa: Real = 0.0) -> list[Finding]:
    """Whether images made on another model break decisions of this one that an attack on itself did not.

    Images are compared one by one: others that only the attack itself broke do not make up for them. A single image,
    or 5 %, may be chance.

    Args:
        model: images -> logits.
        labels: [B] true classes.
        white: the `AttackResult` of an untargeted attack on this model.
        transferred: [B,H,W,C] adversarial images made on another model, within the same budget.
        kappa: the confidence that was asked of `white`, one number or [B]; the other images must reach it too.

    Returns:
        One finding; empty where there are no such images but by chance.

    Raises:
        ValueError, TypeError: as `jaxinterp.attacks.run`.
    """
    model = as_model(model)
    transferred, labels, _, _ = check(model, transferred, labels, names=("transferred", "labels"))
    asked = np.broadcast_to(on_host(kappa).astype(np.float32), labels.shape)
    broken = on_host(_breaks(model, transferred, labels, asked))
    own = on_host(white.success)
    missed = int((broken & ~own).sum())
    if not _more_than_chance(missed, len(own)):
        return []
    return [
        _finding(
            "transfer",
            f"images made on another model break {missed} of {len(own)} decisions that an attack on the model itself "
            f"did not (they break {int(broken.sum())} in all, the attack {int(own.sum())})",
        )
    ]


@jax.jit
@canonical
def _breaks(model, images, labels, kappa):
    return objective.succeeded(objective.single(model)(images), labels, None, kappa)


@jax.jit
@canonical
def _without_gradient(model, images, labels):
    _, _, gradient = objective.value_and_gradient(
        objective.single(model), images, lambda logits: objective.likelihood(logits, labels, None)
    )
    return jnp.all(gradient == 0, axis=(1, 2, 3))  # components that are not finite have become zero


def _jittered(images, key):
    noise = shaped(jax.random.uniform, key, images.shape, jnp.float32, -1.0) / 255
    return jnp.clip(images + noise, 0, 1)
