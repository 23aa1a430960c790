"""The decision boundaries of a network, linearised at an image: what DeepFool and FAB step to.

Between the class a that has to lose and the class b that has to win, the boundary is where Z_b - Z_a = kappa, to first
order the hyperplane <normal, d> = gap with normal = grad(Z_b - Z_a) and gap = kappa - (Z_b - Z_a). Without a target, a
is the label and b one of its rivals; with one, a is the largest other class and b the target.

The authors of both attacks take the boundary for nearest at which |gap| / ||normal||_q is least, q the dual of the norm
in which d is measured. That is its distance where the box does not limit d; where it does, another one may be nearer.
Here the boundaries are compared by the steps that are taken to them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinterp.attacks import objective
from jaxinterp.attacks.attack import Examples, along, select
from jaxinterp.attacks.constraint import DUAL, Norm, distance, to_hyperplane
from jaxinterp.pytree import pytree

_TINY = 1e-30
_SHORT = 1e-3  # part of the gap that rounding may leave of a step that arrives
_FAR = 1e12  # longer than any step


@pytree
class Boundary:
    """A hyperplane <normal, d> = gap for every example, scaled so that the largest |component| of the normal is 1.

    Attributes:
        normal: zero where the network has no slope.
        gap: zero there, too.
        step: the shortest d with which the image stays in the box, or the one that comes nearest to the hyperplane.
        distance: to rank boundaries by: the length of the step, more than any for one that the box keeps it from, and
            infinite without a slope.
    """

    normal: Float[Array, "b h w c"]
    gap: Float[Array, " b"]
    step: Float[Array, "b h w c"]
    distance: Float[Array, " b"]


def passes(logits: Float[Array, "b k"], examples: Examples, candidates: int) -> int:
    """How many backward passes `nearest` makes, if it is not given a rival."""
    return 1 if examples.targets is not None else min(candidates, logits.shape[-1] - 1)


def ranked(logits: Float[Array, "b k"], examples: Examples, count: int) -> Int[Array, "b n"]:
    """The largest classes other than the label, or than the target where there is one, the largest first.

    In place of classes that the model rules out the largest one is repeated.
    """
    chosen = examples.labels if examples.targets is None else examples.targets
    others = jnp.where(jnp.arange(logits.shape[-1]) == chosen[:, None], -jnp.inf, logits)
    values, classes = lax.top_k(others, min(count, logits.shape[-1]))
    return jnp.where(values == -jnp.inf, classes[:, :1], classes)


def nearest(
    pull_back: objective.PullBack,
    images: Float[Array, "b h w c"],
    logits: Float[Array, "b k"],
    examples: Examples,
    kappa: Float[Array, " b"],
    candidates: int,
    which: Norm,
    rival: Int[Array, " b"] | None = None,
) -> Boundary:
    """The boundary nearest to `images`, of those with the `candidates` rivals of largest logits, or that with `rival`.

    The backward passes run one after the other: together they would need `candidates` times the memory, and a batch
    gives the machine enough to do.
    """
    axes = tuple(range(1, examples.images.ndim))
    count = passes(logits, examples, candidates)
    rivals = ranked(logits, examples, count).T if rival is None else rival[None]

    def consider(i, best):
        losing, winning = (
            (rivals[i], examples.targets) if examples.targets is not None else (examples.labels, rivals[i])
        )
        normal = pull_back(covectors(logits, losing, winning))
        largest = jnp.max(jnp.abs(normal), axis=axes)
        scale = 1 / jnp.maximum(largest, _TINY)
        normal, gap = normal * along(scale, normal), scale * lacking(logits, losing, winning, kappa)
        # The box only makes the way longer.
        unlimited = jnp.abs(gap) / distance(normal, DUAL[which])
        nearer = jnp.isfinite(unlimited) & (unlimited < best.distance)

        def limited():
            step = to_hyperplane(images, normal, gap, which, examples.support)
            arrives = jnp.abs(jnp.sum(normal * step, axis=axes)) >= (1 - _SHORT) * jnp.abs(gap)
            away = jnp.where(arrives, distance(step, which), _FAR * (1 + jnp.minimum(unlimited, _FAR)))
            return select(nearer & (away < best.distance), Boundary(normal, gap, step, away), best)

        return lax.cond(jnp.any(nearer), limited, lambda: best)

    zeros = jnp.zeros_like(images)
    none = Boundary(zeros, jnp.zeros_like(kappa), zeros, jnp.full_like(kappa, jnp.inf))
    return lax.fori_loop(0, len(rivals), consider, none)


def covectors(logits: Float[Array, "b k"], losing: Int[Array, " b"], winning: Int[Array, " b"]) -> Float[Array, "b k"]:
    """Of the difference of two logits, the winning one's less the losing one's."""
    up, down = (jax.nn.one_hot(c, logits.shape[-1], dtype=logits.dtype) for c in (winning, losing))
    return up - down


def lacking(
    logits: Float[Array, "b k"], losing: Int[Array, " b"], winning: Int[Array, " b"], kappa: Float[Array, " b"]
) -> Float[Array, " b"]:
    """What the difference of two logits lacks for a success that is twice as safe from rounding as it must be."""
    return kappa + 2 * objective.rounding(logits) - (objective.pick(logits, winning) - objective.pick(logits, losing))


def pair(logits: Float[Array, "b k"], examples: Examples) -> tuple[Int[Array, " b"], Int[Array, " b"]]:
    """The class that has to lose and the one that has to win, at the boundary with the largest logits."""
    rival = ranked(logits, examples, 1)[:, 0]
    return (examples.labels, rival) if examples.targets is None else (rival, examples.targets)
