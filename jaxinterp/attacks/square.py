"""The Square Attack: random search with square-shaped changes (Andriushchenko et al. 2020, arXiv 1912.00049).

    while not adversarial:   x_new = P(x + square of random place and colour);   x <- x_new if L(x_new) < L(x)

It sees logits only, no gradients. L is the margin of logits, and the side of the squares shrinks by a fixed schedule.
The search in L1 is that in L2 with the other norm (Croce and Hein 2021, arXiv 2103.01208, section 4).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxinterp.attacks import objective
from jaxinterp.attacks.attack import AttackResult, Examples, Real, Record, along, per_example, select
from jaxinterp.attacks.constraint import distance, farthest, project
from jaxinterp.canonical import canonical
from jaxinterp.draws import wrapped
from jaxinterp.pytree import pytree, static

# Section 4.1 and the appendix: p is halved at these iterations out of 10,000.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_OUT_OF = 10_000
_TILES = 5  # the L2 and L1 attacks start from a grid of 5 x 5 patterns
_TINY = 1e-12


@pytree
class SquareState:
    """The best point so far of every example and its loss, and the point that is judged next.

    `count` is the number of evaluations so far.
    """

    examples: Examples
    record: Record
    images: Float[Array, "b h w c"]
    candidate: Float[Array, "b h w c"]
    loss: Float[Array, " b"]
    keys: UInt[Array, "b n"]
    eps: Float[Array, " b"]
    p: Float[Array, " b"]
    kappa: Float[Array, " b"]
    count: Int[Array, " b"]
    done: Bool[Array, " b"]


@pytree
class Square:
    """Random search in an Linf, L2 or L1 ball with forward passes only; an example ends at its first success.

    Algorithm 1 with the sampling distributions of Algorithms 2 (Linf) and 3 (L2). In Linf it starts from vertical
    stripes of +-eps, and every square is filled with +-eps of one sign a channel. In L2 and L1 it starts from a grid
    of patterns, and each proposal moves the norm of one window into a pattern in another. The loss is the margin of
    logits, for labels or for targets; that deviates from the paper and its program, which have cross-entropy for
    targets. The input itself is judged first, which costs one more pass.

    Every change is made of squares of one colour a channel, or of windows of two bumps. Where all components matter
    independently, as in a linear model of dense random weights, no such pattern is the nearest perturbation: in L2 and
    L1 a budget of 1.25 of the smallest norm does not suffice there (2 in L2 and 4 in L1 did for 6 x 6 pixels).

    Attributes:
        eps: radius of the ball, in pixel units of [0, 1]; one number, or one for every example.
        p: fraction of the image that the first squares cover, from 0 to 1. The paper takes 0.05 (Linf) and 0.1 (L2)
            for ImageNet, AutoAttack 0.8.
        kappa: confidence, the margin of logits that counts as success.
        norm: "linf", "l2" or "l1".
        steps: number of perturbed images that are evaluated, at most.
        horizon: number of steps over which the schedule of p extends; None means `steps`. AutoAttack takes 10,000
            for its 5,000 steps.
    """

    name: ClassVar[str] = "square"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"norm": ("linf", "l2", "l1")}
    ranges: ClassVar[dict[str, str]] = {"p": "from 0 to 1"}

    eps: Real = 8 / 255
    p: Real = 0.8
    kappa: Real = 0.0
    norm: Literal["linf", "l2", "l1"] = static(default="linf")
    steps: int = static(default=5000)
    horizon: int | None = static(default=None)

    @property
    def iterations(self) -> int:
        """The input and every perturbed image."""
        return self.steps + 1

    @canonical
    def init(self, model, images, labels, targets, keys, support=None) -> SquareState:
        """Stripes, or a grid of patterns, on the support and in the box. No pass is made."""
        # A ball that holds the box is as good as any larger one, whose powers could be too large for a float.
        eps = jnp.minimum(per_example(self.eps, images), farthest(images, support, self.norm))
        shape = images.shape[1:]
        first = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
        if self.norm == "linf":
            numbers = _draw(first, shape[1] * shape[2])
            delta = jax.vmap(lambda u: _stripes(u, shape))(numbers)
        else:
            _, *counts = _tiles(shape)
            numbers = _draw(first, math.prod(counts) * (1 + shape[2]))
            delta = jax.vmap(lambda u: _grid(u, shape))(numbers)
            delta = delta if support is None else jnp.where(support, delta, 0)
            delta = delta / along(jnp.maximum(distance(delta, self.norm), _TINY), delta)
        start = project(images + along(eps, images) * delta, images, eps, self.norm, support)
        zeros = jnp.zeros(images.shape[0], jnp.int32)
        return SquareState(
            examples=Examples(images, labels, targets, support),
            record=Record.start(images),
            images=start,
            candidate=images,
            loss=per_example(jnp.inf, images),
            keys=jax.random.key_data(keys),
            eps=eps,
            p=per_example(self.p, images),
            kappa=per_example(self.kappa, images),
            count=zeros,
            done=zeros.astype(bool),
        )

    @canonical
    def step(self, model, state: SquareState) -> SquareState:
        """Judges the input, then the start, then one proposal in every step."""
        examples, active, x = state.examples, ~state.done, state.candidate
        logits = model(x)
        loss = objective.margin(logits, examples.labels, examples.targets)
        loss = jnp.where(jnp.isnan(loss), jnp.inf, loss)
        found = active & objective.succeeded(logits, examples.labels, examples.targets, state.kappa)
        record = state.record.update(
            images=x, found=found, better=found, iteration=state.count, forward=active, backward=jnp.zeros_like(found)
        )
        accepted = (state.count > 0) & (loss < state.loss)
        moved = dataclasses.replace(
            state,
            record=record,
            images=select(accepted, x, state.images),
            loss=jnp.where(accepted, loss, state.loss),
            count=state.count + 1,
            done=found | (state.count >= self.steps),
        )
        proposal = select(moved.count > 1, self._propose(moved), moved.images)
        return select(active, dataclasses.replace(moved, candidate=proposal), state)

    @canonical
    def result(self, state: SquareState) -> AttackResult:
        """The first image that succeeded."""
        return state.record.result(state.examples.images)

    def _propose(self, state: SquareState) -> Float[Array, "b h w c"]:
        """The best point so far with a new square, in ball and box and on the support."""
        original, (height, width) = state.examples.images, state.images.shape[1:3]
        keys = jax.vmap(jax.random.fold_in)(wrapped(state.keys), state.count)
        fraction = state.p / (1 << self._halvings(state.count - 2))
        side = jnp.round(jnp.sqrt(fraction * (height * width))).astype(jnp.int32)
        side = jnp.clip(side, 1, min(height, width))
        delta = state.images - original
        if self.norm == "linf":
            delta = jax.vmap(_fill_square)(_draw(keys, 2 + delta.shape[3]), side, delta, state.eps)
        else:
            # As in the released program, sides are odd and at least 3, where the image has room for that.
            side = jnp.maximum(side, 3)
            side = jnp.minimum(side + 1 - side % 2, (min(height, width) + 1) // 2 * 2 - 1)
            numbers = _draw(keys, 5 + delta.shape[3])
            move = functools.partial(_move_norm, which=self.norm)
            delta = jax.vmap(move)(numbers, side, delta, state.eps, state.examples.support)
        return project(original + delta, original, state.eps, self.norm, state.examples.support)

    def _halvings(self, iteration: Int[Array, " b"]) -> Int[Array, " b"]:
        """How often p has been halved before the given iteration (from 0)."""
        horizon = self.steps if self.horizon is None else self.horizon
        starts = jnp.asarray([-(-(i + 1) * horizon // _OUT_OF) for i in _HALVINGS], jnp.int32)
        return jnp.sum(iteration[:, None] >= starts, axis=1, dtype=jnp.int32)


# Of one example: numbers uniform in [0, 1), the side of the square, the perturbation [h,w,c]. Every step takes one draw
# of all the numbers that it needs, as each draw is a small program of its own.


def _draw(keys, count):
    """Uniform numbers [b,count], one row for each key."""
    return jax.vmap(lambda key: jax.random.uniform(key, (count,), jnp.float32))(keys)


def _signs(numbers):
    return jnp.where(numbers < 0.5, 1.0, -1.0)


def _window(numbers, side, shape):
    """Rows and columns relative to a window of this side at a random place, and which pixels are in it [h,w,1]."""
    # The released program never reaches the last row and column; the paper's places are all that fit.
    places = jnp.asarray(shape[:2], jnp.int32) - side + 1
    corner = jnp.minimum((numbers * places).astype(jnp.int32), places - 1)
    rows = lax.broadcasted_iota(jnp.int32, shape[:2], 0) - corner[0]
    columns = lax.broadcasted_iota(jnp.int32, shape[:2], 1) - corner[1]
    inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
    return rows, columns, inside[..., None]


def _fill_square(numbers, side, delta, eps):
    """Algorithm 2: a square of +-eps, of one random sign a channel."""
    # The paper adds +-2 eps to a perturbation of +-eps and projects, which comes to the same.
    inside = _window(numbers[:2], side, delta.shape)[2]
    return jnp.where(inside, eps * _signs(numbers[2:]), delta)


def _move_norm(numbers, side, delta, eps, support, *, which):
    """Algorithm 3: the norm in two windows, and what is left of eps, goes into a pattern in the first of them."""

    def unit(part):
        """Every channel by itself scaled to norm 1."""
        return part / jnp.maximum(_root(jnp.sum(_power(part, which), axis=(0, 1)), which), _TINY)

    rows, columns, inside = _window(numbers[:2], side, delta.shape)
    other = _window(numbers[2:4], side, delta.shape)[2]
    pattern = jnp.where(inside, _pattern(rows, columns, side, numbers[4] < 0.5)[..., None], 0)
    pattern = unit(pattern) * _signs(numbers[5:]) + unit(jnp.where(inside, delta, 0))
    if support is not None:
        pattern = jnp.where(support, pattern, 0)
    unused = (_power(eps, which) - jnp.sum(_power(delta, which))) / delta.shape[2]
    # Of every channel by itself, as in the paper; AutoAttack's program takes the norm of all channels here.
    available = jnp.sum(_power(jnp.where(inside | other, delta, 0), which), axis=(0, 1)) + jnp.maximum(unused, 0)
    # Divided, not multiplied, for the reason given in _power: the image will be added to it.
    pattern = unit(pattern) / (1 / jnp.maximum(_root(available, which), _TINY))
    return jnp.where(inside, pattern, jnp.where(other, 0, delta))


def _power(values, which):
    """The terms of which a norm is the root of the sum."""
    # A product that is added to something may be rounded once or twice, as the compiler likes, and it decides by the
    # size of the batch. The maximum comes between.
    return jnp.abs(values) if which == "l1" else jnp.maximum(jnp.square(values), 0)


def _root(values, which):
    return values if which == "l1" else jnp.sqrt(values)


def _stripes(numbers, shape):
    """Vertical stripes one pixel wide, of one random sign a column and channel."""
    return jnp.broadcast_to(_signs(numbers).reshape(1, *shape[1:]), shape)


def _tiles(shape):
    """Side of the tiles of the initial grid, and how many there are in a column and in a row."""
    side = max(min(shape[:2]) // _TILES, 1)
    return side, shape[0] // side, shape[1] // side


def _grid(numbers, shape):
    """A tiling with patterns, each of a random direction and of one random sign a channel."""
    side, *counts = _tiles(shape)
    relative = [np.arange(size) - (size - n * side) // 2 for size, n in zip(shape[:2], counts, strict=True)]
    covered = [(r >= 0) & (r < n * side) for r, n in zip(relative, counts, strict=True)]
    tile = np.ix_(*(np.clip(r // side, 0, n - 1) for r, n in zip(relative, counts, strict=True)))
    numbers = numbers.reshape(*counts, 1 + shape[2])[tile]
    rows, columns = np.ix_(*(r % side for r in relative))
    pattern = _pattern(rows, columns, side, numbers[..., 0] < 0.5)
    return jnp.where(np.logical_and.outer(*covered)[..., None], pattern[..., None] * _signs(numbers[..., 1:]), 0)


def _pattern(rows, columns, side, turned):
    """The update eta of equations (2) and (3): two neighbouring bumps of opposite sign, one above the other, or
    side by side where `turned`. Rows and columns [h,w] are relative to the window; values outside it mean nothing.
    """
    rows, columns = jnp.where(turned, columns, rows), jnp.where(turned, rows, columns)
    half = side // 2
    upper = rows < half
    centre = jnp.where(upper, half // 2, half + (side - half) // 2)
    # Every pixel is in the nested boxes k = m+1..n around the centre, and the k-th one adds 1 / k^2. Distances are
    # floats: XLA for GPUs (jax 0.11.2) loses the absolute value of these integers.
    down, across = (rows - centre).astype(jnp.float32), (columns - side // 2).astype(jnp.float32)
    m = jnp.maximum(jnp.abs(down), jnp.abs(across)).astype(jnp.int32)
    n = side // 2 + 1
    sums = jnp.asarray(np.cumsum([0, *(1 / np.arange(1, max(rows.shape) // 2 + 2) ** 2)]), jnp.float32)
    value = sums[n] - sums[jnp.minimum(m, n)]
    return jnp.where(upper, value, -value)
