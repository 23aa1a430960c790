"""What attacks minimise, and when they have succeeded. Logits are [B,K]; results are [B].

Every objective is computed from differences of logits, so a constant added to all of them changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.network import Model

# Another program (another batch size, another framework) computes the same logits with other rounding. A success
# must survive that, so its margin exceeds the confidence by this fraction of the largest difference of logits.
ROUNDING = 1e-5
_ULPS = 4  # of the largest logit

# From a covector of the logits to a gradient with respect to the images.
PullBack = Callable[[Float[Array, "b k"]], Float[Array, "b h w c"]]


def single(model: Model) -> Partial:
    """The model with logits of 16 or 64 bits as float32, in which margins and losses keep their types."""
    return Partial(_single, model)


def _single(model, images):
    logits = model(images)
    return logits.astype(jnp.float32)


def log_odds(logits: Float[Array, "b k"], classes: Int[Array, " b"]) -> Float[Array, " b"]:
    """log((1 - p_c) / p_c) of each example's class c; cross-entropy is softplus of it.

    Its gradient has the direction of the gradient of cross-entropy but does not underflow when p_c nears 1, so that
    attacks which normalise the gradient are not stopped by confident networks.
    """
    others = jnp.where(_one_hot(logits, classes), -jnp.inf, logits)
    return jax.nn.logsumexp(others, axis=-1) - pick(logits, classes)


def likelihood(
    logits: Float[Array, "b k"], labels: Int[Array, " b"], targets: Int[Array, " b"] | None
) -> Float[Array, " b"]:
    """The objective with the direction of cross-entropy: against the targets, or for leaving the labels."""
    return -log_odds(logits, labels) if targets is None else log_odds(logits, targets)


def margin(
    logits: Float[Array, "b k"], labels: Int[Array, " b"], targets: Int[Array, " b"] | None
) -> Float[Array, " b"]:
    """Difference of logits that is negative on success (Carlini and Wagner 2017, f_6).

    max_{j != t} Z_j - Z_t with targets t, else Z_y - max_{j != y} Z_j with labels y.
    """
    chosen = labels if targets is None else targets
    others = jnp.max(jnp.where(_one_hot(logits, chosen), -jnp.inf, logits), axis=-1)
    difference = others - pick(logits, chosen)
    return -difference if targets is None else difference


def dlr(logits: Float[Array, "b k"], labels: Int[Array, " b"], targets: Int[Array, " b"] | None) -> Float[Array, " b"]:
    """Difference of logits ratio, negative on success: a margin that no scaling of the logits changes.

    (Z_y - max_{j != y} Z_j) / (Z_1 - Z_3), with Z_1 >= Z_2 >= ... the sorted logits; with targets
    (max_{j != t} Z_j - Z_t) / (Z_1 - (Z_3 + Z_4) / 2). Croce and Hein (2020, arXiv 2003.01690, equations 6 and 7)
    have Z_y in place of the maximum in the latter, which does not see a third class that stays above the target.
    Where there are fewer classes than the divisor names, those with -inf aside, it is one. (With the third in place of
    a fourth one, the ratio of the lowest class is one everywhere, without a slope.)
    """
    return margin(logits, labels, targets) / _dlr_scale(logits, 3 if targets is None else 4)


def dlr_of_rival(logits: Float[Array, "b k"], labels: Int[Array, " b"], rivals: Int[Array, " b"]) -> Float[Array, " b"]:
    """(Z_y - Z_r) / (Z_1 - (Z_3 + Z_4) / 2), negative where the rival r exceeds the label (the same, equation 7)."""
    return (pick(logits, labels) - pick(logits, rivals)) / _dlr_scale(logits, 4)


def _dlr_scale(logits, lowest):
    """Z_1 - (Z_3 + Z_4) / 2 where the `lowest` logit to use is the fourth, Z_1 - Z_3 where it is the third."""
    if logits.shape[-1] < lowest:
        return jnp.ones_like(logits[:, 0])
    ruled_out = logits == -jnp.inf
    few = jnp.sum(~ruled_out, axis=-1, dtype=jnp.int32) < lowest
    logits = jnp.where(ruled_out, jnp.min(jnp.where(ruled_out, jnp.inf, logits), axis=-1, keepdims=True), logits)
    _, order = lax.top_k(logits, lowest)
    first, third, last = (pick(logits, order[:, i]) for i in (0, 2, -1))
    return jnp.where(few, 1.0, jnp.maximum(first - (third + last) / 2, 1e-12))


def succeeded(
    logits: Float[Array, "b k"],
    labels: Int[Array, " b"],
    targets: Int[Array, " b"] | None,
    kappa: Float[Array, " b"] | Float[Array, ""] | float,
) -> Bool[Array, " b"]:
    """Whether the margin exceeds the confidence `kappa`, and by more than rounding; never with NaN or +inf.

    A logit of -inf is a class that the model rules out: it takes part in nothing.
    """
    return -margin(logits, labels, targets) > kappa + rounding(logits)


def shortfall(
    logits: Float[Array, "b k"],
    labels: Int[Array, " b"],
    targets: Int[Array, " b"] | None,
    kappa: Float[Array, " b"] | Float[Array, ""] | float,
) -> Float[Array, " b"]:
    """What the margin lacks: negative exactly where `succeeded` is true, not a number for logits not finite."""
    return margin(logits, labels, targets) + (kappa + rounding(logits))


def linearised(
    model: Model, images: Float[Array, "b h w c"], support: Bool[Array, "b h w c"] | None = None
) -> tuple[Float[Array, "b k"], PullBack]:
    """Logits, and the backward pass that takes a covector of the logits [B,K] to a gradient on the support.

    The backward pass can be called any number of times, or inside `lax.cond` where it may not be needed. Components
    that are not finite become zero, so that a network which returns NaN leaves an image unchanged instead of
    destroying it.
    """
    logits, transposed = jax.vjp(model, images)

    def pull_back(by_logits):
        (gradient,) = transposed(by_logits)
        kept = jnp.isfinite(gradient) & (gradient != 0)  # no zero has a sign
        return jnp.where(kept if support is None else kept & support, gradient, 0)

    return logits, pull_back


def value_and_gradient(
    model: Model, images: Float[Array, "b h w c"], objective: Callable[[Array], Float[Array, " b"]]
) -> tuple[Float[Array, "b k"], Float[Array, " b"], Float[Array, "b h w c"]]:
    """Logits, objective(logits) [B] and the gradient of each example's objective with respect to its image.

    No gradient with respect to parameters is computed. Components that are not finite become zero.
    """
    logits, pull_back = linearised(model, images)
    values, covectors = values_and_covectors(logits, objective)
    return logits, values, pulled_back(pull_back, covectors, images)


def pulled_back(
    pull_back: PullBack,
    covectors: Float[Array, "b k"],
    images: Float[Array, "b h w c"],
    needed: Bool[Array, ""] | None = None,
) -> Float[Array, "b h w c"]:
    """The gradient, or zeros where nobody needs it; None stands for a gradient that is always needed.

    As a branch the backward pass has from the forward pass what is stored for it, such as where a rectifier was open.
    In one program with it, XLA for CPUs (jax 0.10) computes that again from what it keeps instead, which is more:
    EfficientNet-Lite0 then takes a seventh longer and three times the memory. So on CPUs it always is one.
    """
    if needed is None:
        if jax.default_backend() != "cpu":
            return pull_back(covectors)
        needed = jnp.any(jnp.isfinite(covectors))  # as good as always; without one, no gradient is finite either
    return lax.cond(needed, pull_back, lambda _: jnp.zeros_like(images), covectors)


def values_and_covectors(
    logits: Float[Array, "b k"], objective: Callable[[Array], Float[Array, " b"]]
) -> tuple[Float[Array, " b"], Float[Array, "b k"]]:
    """objective(logits) [B], and what a backward pass takes for its gradient: that with respect to the logits [B,K]."""
    values, by_logits = jax.vjp(objective, logits)
    return values, by_logits(jnp.ones_like(values))[0]


def rounding(logits: Float[Array, "b k"]) -> Float[Array, " b"]:
    """What the margin of the same image may be off by in another program.

    The difference of two classes is the margin itself, which says nothing of what it was computed from: with no more
    than two it is taken to be one at least. Large logits have few digits left for their differences.
    """
    high, low = _range(logits)
    few = jnp.sum(logits != -jnp.inf, axis=-1, dtype=jnp.int32) <= 2
    digits = _ULPS * jnp.finfo(logits.dtype).eps * jnp.maximum(jnp.abs(high), jnp.abs(low))
    return jnp.maximum(ROUNDING * jnp.where(few, jnp.maximum(high - low, 1), high - low), digits)


def _range(logits):
    """The largest and the smallest logit, classes ruled out left aside, by one reduction."""
    lowest = jnp.where(logits == -jnp.inf, -jnp.inf, -logits)
    high, minus_low = jnp.max(jnp.stack([logits, lowest]), axis=-1)
    return high, -minus_low


@jax.custom_jvp
def pick(logits: Float[Array, "b k"], classes: Int[Array, " b"]) -> Float[Array, " b"]:
    """The logit of the given class of every example."""
    return jnp.take_along_axis(logits, classes[:, None], axis=-1, mode="clip")[:, 0]


@pick.defjvp
def _pick_jvp(primals, tangents):
    """A sum, since the transposed gather, a scatter, is a loop on CPUs."""
    (logits, classes), (tangent, _) = primals, tangents
    return pick(logits, classes), jnp.sum(jnp.where(_one_hot(logits, classes), tangent, 0), axis=-1)


def _one_hot(logits, classes):
    return jnp.arange(logits.shape[-1]) == classes[:, None]
