"""FAB, the fast adaptive boundary attack (Croce and Hein 2020, arXiv 1907.02044, algorithm 1).

    d = proj_p(x; pi, box),  d_0 = proj_p(x_0; pi, box)       pi the nearest of the linearised boundaries
    a = min(||d||_p / (||d||_p + ||d_0||_p), alpha_max)
    x <- proj_box((1 - a) (x + eta d) + a (x_0 + eta d_0))
    x <- (1 - beta) x_0 + beta x                               after a success

from x_0 and from random starts; then three steps of a search between x_0 and the nearest success. FAB-T does so for one
rival of the label after the other, with the boundary between the two alone (2003.01690, section 4).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxinterp.attacks import boundary, objective
from jaxinterp.attacks.attack import AttackResult, Examples, Real, Record, along, per_example, select
from jaxinterp.attacks.constraint import Norm, distance, to_hyperplane
from jaxinterp.canonical import canonical
from jaxinterp.draws import shaped, wrapped
from jaxinterp.pytree import pytree, static

_SEARCH = 3  # steps of the final search
_BEYOND = 0.01  # of the rest of the segment
_REACH = {"linf": 0.3, "l2": 1.0, "l1": 5.0}  # of the authors' program
_TINY = 1e-30


@pytree
class FABState:
    """Every example's iterate, nearest success and place in the search; `count` is the number of iterations so far.

    An iteration is two steps: from the iterate `images` to its successor, and, where that has `moved`, a look at it.
    """

    examples: Examples
    record: Record
    best: Float[Array, " b"]  # norm of the nearest success
    best_logits: Float[Array, "b k"]
    inner: Float[Array, " b"]  # part of the way to the nearest success up to which there is none
    inner_logits: Float[Array, "b k"]
    part: Float[Array, " b"]  # of the way to the nearest success, where the final search looks next
    images: Float[Array, "b h w c"]
    alpha_max: Float[Array, " b"]
    beta: Float[Array, " b"]
    eta: Float[Array, " b"]
    reach: Float[Array, " b"]
    kappa: Float[Array, " b"]
    rivals: Int[Array, "b n"] | None  # of FAB-T: one for each run
    key: UInt[Array, "b n"] | None
    moved: Bool[Array, " b"]
    slopes: Bool[Array, " b"]  # whether there was one at the iterate before
    count: Int[Array, " b"]
    done: Bool[Array, " b"]


@pytree
class FAB:
    """The smallest perturbation in L2, Linf or L1, by projections onto linearised boundaries inside the box.

        x <- (1 - a) (x + eta d) + a (x_0 + eta d_0)      (Croce and Hein 2020, arXiv 1907.02044)

    with d and d_0 the shortest ways from x and x_0 to the nearest linearised boundary. An iteration costs two forward
    passes and a backward pass for every candidate, or one with a target. In L1 the shortest way takes few components as
    far as the box lets them: where the logits curve along it, as with the squared distance from a point, the iterates
    may jump to and fro and never meet a success; so do those of the paper's algorithm.

    Attributes:
        alpha_max: largest bias a towards the original, from 0 to 1.
        beta: after a success, the iterate goes back to this part, from 0 to 1, of its distance from the original.
        eta: extrapolation beyond the boundary.
        reach: a restart begins at half this distance from the original, or half the distance of the nearest success
            where that is less; None means 0.3 in Linf, 1 in L2, 5 in L1.
        kappa: confidence, the margin of logits that counts as success; the boundaries are moved by it.
        norm: "l2", "linf" or "l1".
        candidates: how many rivals of the label are considered without a target: those with the largest logits at the
            current iterate. (The authors' program takes all, at a backward pass for each class.)
        classes: FAB-T, without a target: how many rivals of the label have starts of their own, those with the largest
            logits at the original first. An iteration then costs one backward pass.
        restarts: number of starts (for each rival); the first is at the original.
        steps: iterations after every start.
    """

    name: ClassVar[str] = "fab"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"norm": ("l2", "linf", "l1")}
    ranges: ClassVar[dict[str, str]] = {"alpha_max": "from 0 to 1", "beta": "from 0 to 1"}

    alpha_max: Real = 0.1
    beta: Real = 0.9
    eta: Real = 1.05
    reach: Real | None = None
    kappa: Real = 0.0
    norm: Norm = static(default="l2")
    candidates: int = static(default=10)
    classes: int | None = static(default=None)
    restarts: int = static(default=1)
    steps: int = static(default=100)

    @property
    def iterations(self) -> int:
        """Two for each iteration of all starts, and the final search; fewer with fewer rivals, or a target."""
        return 2 * (self.classes or 1) * self.restarts * self.steps + _SEARCH

    @property
    def one_gradient(self) -> bool:
        """With one rival at a time."""
        return self.classes is not None

    def _total(self, state: FABState) -> int:
        """Iterations of all starts."""
        return (1 if state.rivals is None else state.rivals.shape[1]) * self.restarts * self.steps

    @canonical
    def init(self, model, images, labels, targets, keys, support=None) -> FABState:
        """Starts at the original."""
        zeros = jnp.zeros(images.shape[0], jnp.int32)
        logits = jnp.zeros(jax.eval_shape(model, images).shape, jnp.float32)
        rivals = None
        if self.classes is not None and targets is None:
            rivals = jnp.zeros((len(images), min(self.classes, logits.shape[1] - 1)), jnp.int32)
        return FABState(
            examples=Examples(images, labels, targets, support),
            record=Record.start(images),
            best=per_example(jnp.inf, images),
            best_logits=logits,
            inner=per_example(0.0, images),
            inner_logits=logits,
            part=per_example(0.0, images),
            images=images,
            alpha_max=per_example(self.alpha_max, images),
            beta=per_example(self.beta, images),
            eta=per_example(self.eta, images),
            reach=per_example(_REACH[self.norm] if self.reach is None else self.reach, images),
            kappa=per_example(self.kappa, images),
            rivals=rivals,
            key=jax.random.key_data(keys) if self.restarts > 1 else None,
            moved=zeros.astype(bool),
            slopes=zeros.astype(bool),
            count=zeros,
            done=zeros.astype(bool),
        )

    @canonical
    def step(self, model, state: FABState) -> FABState:
        """Half an iteration of the algorithm, or one step of the final search, for each example by its own count."""
        return self.update(state, *objective.linearised(model, self.points(state), state.examples.support))

    def points(self, state: FABState) -> Float[Array, "b h w c"]:
        """The iterates, their successors, or points of the final search."""
        return state.images

    def covectors(self, state: FABState, logits: Float[Array, "b k"]) -> tuple[Float[Array, "b k"], Bool[Array, " b"]]:
        """Of the one boundary that is considered, for those that go on from their iterate."""
        examples, rival = state.examples, self._rival(self._ranked(state, logits))
        rival = boundary.ranked(logits, examples, 1)[:, 0] if rival is None else rival
        classes = (examples.labels, rival) if examples.targets is None else (rival, examples.targets)
        return boundary.covectors(logits, *classes), self._moves(state)

    def update(self, state: FABState, logits: Float[Array, "b k"], pull_back: objective.PullBack) -> FABState:
        """From the iterates to their successors, or onwards from those."""
        examples, x = state.examples, state.images
        state = self._ranked(state, logits)
        rival, arrives, moves = self._rival(state), ~state.done & state.moved, self._moves(state)
        start = moves & (state.count == 0)
        searching = ~state.done & ~arrives & ~moves
        # The original judges an iterate before the backward step only. Its logits after it are here without another
        # pass, and it may still be a success, and then a nearer one.
        found = ~state.done & objective.succeeded(logits, examples.labels, examples.targets, state.kappa)
        moves = moves & ~(start & found)
        passes = 1 if rival is not None else boundary.passes(logits, examples, self.candidates)
        state = self._judge(state, logits, found, backward=moves * passes)
        state = self._narrow(state, logits, searching | start, found)

        def iterate():
            near = boundary.nearest(pull_back, x, logits, examples, state.kappa, self.candidates, self.norm, rival)
            return self._towards(near, state), jnp.isfinite(near.distance)

        towards, slopes = lax.cond(jnp.any(moves), iterate, lambda: (x, jnp.zeros_like(moves)))
        back = examples.images + along(state.beta, x) * (x - examples.images)
        # Without a slope all further iterations from this start would be the same.
        left = jnp.where(arrives & ~state.slopes, self.steps - state.count % self.steps, 1)
        state = dataclasses.replace(
            state,
            images=select(moves, towards, select(arrives & found, back, x)),
            moved=jnp.where(state.done, state.moved, moves),
            slopes=jnp.where(moves, slopes, state.slopes),
            count=state.count + jnp.where(state.done | moves, 0, left),
            done=state.done | (start & found),
        )
        return self._next_start(state, arrives)

    def _moves(self, state: FABState) -> Bool[Array, " b"]:
        """Which examples go on from their iterate, unless that is the original and a success."""
        return ~state.done & ~state.moved & (state.count < self._total(state))

    def _ranked(self, state: FABState, logits) -> FABState:
        """With the rivals in the order of the original's logits, which are seen first."""
        if state.rivals is None:
            return state
        first = (state.count == 0) & ~state.moved
        ranked = boundary.ranked(logits, state.examples, state.rivals.shape[1])
        return dataclasses.replace(state, rivals=select(first, ranked, state.rivals))

    def _rival(self, state: FABState) -> Int[Array, " b"] | None:
        """The rival of the run that an example is in."""
        if state.rivals is None:
            return None
        place = jnp.minimum(state.count // (self.restarts * self.steps), state.rivals.shape[1] - 1)
        return jnp.take_along_axis(state.rivals, place[:, None], axis=1)[:, 0]

    def _judge(self, state: FABState, logits, found, backward) -> FABState:
        """The state with the points of all that are not done taken into account."""
        size = distance(state.images - state.examples.images, self.norm)
        better = found & (size < state.best)
        record = state.record.update(
            images=state.images,
            found=found,
            better=better,
            iteration=state.count,
            forward=~state.done,
            backward=backward,
        )
        best, best_logits = select(better, (size, logits), (state.best, state.best_logits))
        return dataclasses.replace(state, record=record, best=best, best_logits=best_logits)

    def _towards(self, near: boundary.Boundary, state: FABState) -> Float[Array, "b h w c"]:
        """The next iterate, from the nearest boundary at this one."""
        x, x0, support = state.images, state.examples.images, state.examples.support
        delta = x - x0
        gap_0 = near.gap + jnp.sum(near.normal * delta, axis=tuple(range(1, x.ndim)))
        d, d_0 = near.step, to_hyperplane(x0, near.normal, gap_0, self.norm, support)
        size, size_0 = distance(d, self.norm), distance(d_0, self.norm)
        alpha = along(jnp.minimum(size / jnp.maximum(size + size_0, _TINY), state.alpha_max), x)
        eta = along(state.eta, x)
        # The formula of the paper, written so that a component that no projection moves stays the very same.
        return jnp.clip(x0 + (1 - alpha) * (delta + eta * d) + alpha * eta * d_0, 0, 1)

    def _narrow(self, state: FABState, logits, who, found) -> FABState:
        """The segment of the final search: its outer end is the nearest success, a new one or the same."""
        inner = jnp.where(found, state.inner / jnp.maximum(state.part, _TINY), state.part)
        inner_logits = select(found, state.inner_logits, logits)
        inner, inner_logits = select(who, (inner, inner_logits), (state.inner, state.inner_logits))
        return dataclasses.replace(state, inner=inner, inner_logits=inner_logits)

    def _next_start(self, state: FABState, moves: Bool[Array, " b"]) -> FABState:
        """A new start for examples whose iterations from the last one have ended, or a point of the final search."""
        x0, total = state.examples.images, self._total(state)
        images = state.images
        begins = moves & (state.count % self.steps == 0) & (state.count < total)
        if state.key is not None:
            random = lax.cond(jnp.any(begins), lambda: self._random(state), lambda: images)
            images = select(begins, random, images)
        if state.rivals is not None:
            images = select(begins & (state.count % (self.restarts * self.steps) == 0), x0, images)
        # Where the difference of logits of the classes at the outer end would be zero if it were linear on the segment.
        losing, winning = boundary.pair(state.best_logits, state.examples)
        inside = boundary.lacking(state.inner_logits, losing, winning, state.kappa)
        outside = -boundary.lacking(state.best_logits, losing, winning, state.kappa)
        part = inside / (inside + outside)
        part = jnp.where((part >= 0) & (part <= 1), part, 1)
        # A little farther than in the paper: where it is linear, that point fails or succeeds by rounding.
        part = state.inner + (1 - state.inner) * (part + _BEYOND * (1 - part))
        between = x0 + along(part, x0) * (state.record.best - x0)
        searches = ~state.done & (state.count >= total)
        return dataclasses.replace(
            state,
            images=select(searches, between, images),
            part=jnp.where(searches, part, state.part),
            done=state.done | (searches & (~state.record.success | (state.count >= total + _SEARCH))),
        )

    def _random(self, state: FABState) -> Float[Array, "b h w c"]:
        """Points at half the reach from the originals, in the box and on the support."""
        assert state.key is not None
        x0, support = state.examples.images, state.examples.support

        def direction(key_data, count):
            key = jax.random.fold_in(wrapped(key_data), count)
            shape = x0.shape[1:]
            if self.norm == "linf":
                return shaped(jax.random.uniform, key, shape, jnp.float32, -1.0)
            return shaped(jax.random.normal, key, shape, jnp.float32)

        delta = jax.vmap(direction)(state.key, state.count)
        if support is not None:
            delta = jnp.where(support, delta, 0)
        length = jnp.minimum(state.best, state.reach) / 2 / jnp.maximum(distance(delta, self.norm), _TINY)
        return jnp.clip(x0 + along(length, x0) * delta, 0, 1)

    @canonical
    def result(self, state: FABState) -> AttackResult:
        """The nearest success."""
        return state.record.result(state.examples.images)
