"""The search over the constant of attacks that minimise D(x' - x0) + c f(x'): what C&W, EAD and StrAttack share.

A search is a sequence of problems, one for every constant c that is tried. `Bracket` chooses the constants,
`Progress` says when a problem has ended, `restart` begins the next one. Every example is at its own place: all values
are [B]. `Nearest` is a whole search for the nearest success in L2, by Adam on some variable: that of C&W and of sC&W.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.attacks import objective
from jaxinterp.attacks.attack import Examples, Real, Record, norm, per_example, select
from jaxinterp.network import Model
from jaxinterp.pytree import pytree

T = TypeVar("T")

TOLERANCE = 1e-4  # relative decrease of the loss that counts as progress
_CHECKS = 10  # times that progress is checked in one problem, unless an attack says how often,
_WINDOW = 10  # but then not more often than every so many iterations: Adam starts with a rising loss
_PATIENCE = 2, 0.1  # of a search step that polishes: its window and its tolerance, in those of the others


@pytree
class Bracket:
    """The constant of the present problem, the largest that failed, the smallest that succeeded."""

    const: Float[Array, " b"]
    lower: Float[Array, " b"]
    upper: Float[Array, " b"]

    @classmethod
    def start(cls, const: Real, images: Float[Array, "b h w c"]) -> Bracket:
        """Nothing has failed or succeeded yet."""
        return cls(per_example(const, images), per_example(0.0, images), per_example(jnp.inf, images))

    @property
    def closed(self) -> Bool[Array, " b"]:
        """Where a constant has succeeded."""
        return jnp.isfinite(self.upper)

    def narrow(self, found: Bool[Array, " b"], growth: float) -> Bracket:
        """After a problem with or without success: the mean of the bounds, or `growth` times c before any success."""
        # The original program tries the upper bound once more in the last of ten or more search steps; with early
        # successes kept, that only repeats what is known.
        upper = jnp.where(found, jnp.minimum(self.upper, self.const), self.upper)
        lower = jnp.where(found, self.lower, jnp.maximum(self.lower, self.const))
        narrowed = Bracket(self.const, lower, upper)
        return dataclasses.replace(narrowed, const=jnp.where(narrowed.closed, (lower + upper) / 2, self.const * growth))


@pytree
class Progress:
    """Where every example stands.

    Attributes:
        problem: number of the present problem.
        iteration: iterations made in it.
        count: iterations made in all problems.
        found: whether it has brought a success.
        checked_loss: the loss when progress was last checked.
        lowest: the lowest loss in it so far.
        checked_lowest: the same when progress was last checked.
        tolerance: relative decrease of the loss between two checks that counts as progress.
    """

    problem: Int[Array, " b"]
    iteration: Int[Array, " b"]
    count: Int[Array, " b"]
    found: Bool[Array, " b"]
    checked_loss: Float[Array, " b"]
    lowest: Float[Array, " b"]
    checked_lowest: Float[Array, " b"]
    tolerance: Float[Array, " b"]

    @classmethod
    def start(cls, images: Float[Array, "b h w c"], tolerance: Real = TOLERANCE) -> Progress:
        """Before the first iteration of the first problem."""
        zeros = jnp.zeros(images.shape[0], jnp.int32)
        loss, tolerance = per_example(jnp.inf, images), per_example(tolerance, images)
        return cls(zeros, zeros, zeros, zeros.astype(bool), loss, loss, loss, tolerance)

    def advance(
        self,
        success: Bool[Array, " b"],
        loss: Float[Array, " b"],
        *,
        steps: int | Int[Array, " b"],
        abort_early: bool,
        window: int | None = None,
        polishing: Bool[Array, " b"] | None = None,
    ) -> tuple[Progress, Bool[Array, " b"]]:
        """After one more iteration, and which problems have ended.

        They end after `steps` iterations, and with `abort_early` where the loss has not fallen by `tolerance`
        (relative) in `window` iterations; None means a tenth of `steps`. Where a window is given, the lowest loss must
        have stood still, too: within a few iterations the latest one may rise by chance. Those that are `polishing`
        have more patience.
        """
        iteration, checked_loss, checked_lowest = self.iteration + 1, self.checked_loss, self.checked_lowest
        lowest = jnp.minimum(self.lowest, loss)
        ended = iteration >= steps
        if abort_early:
            size: Any = jnp.maximum(steps // _CHECKS, _WINDOW) if window is None else window
            tolerance = self.tolerance
            if polishing is not None:
                longer, finer = _PATIENCE
                size = jnp.where(polishing, longer * size, size)
                tolerance = jnp.where(polishing, finer * tolerance, tolerance)
            due = iteration % size == 0
            stands = loss > (1 - tolerance) * checked_loss
            if window is not None:
                stands = stands & (lowest > (1 - tolerance) * checked_lowest)
            ended = ended | (due & stands)
            checked_loss = jnp.where(due, loss, checked_loss)
            checked_lowest = jnp.where(due, lowest, checked_lowest)
        progress = dataclasses.replace(
            self,
            iteration=iteration,
            count=self.count + 1,
            found=self.found | success,
            checked_loss=checked_loss,
            lowest=lowest,
            checked_lowest=checked_lowest,
        )
        return progress, ended

    def next_problem(self) -> Progress:
        """Before the first iteration of the next problem."""
        return dataclasses.replace(
            self,
            problem=self.problem + 1,
            iteration=jnp.zeros_like(self.iteration),
            found=jnp.zeros_like(self.found),
            checked_loss=jnp.full_like(self.checked_loss, jnp.inf),
            lowest=jnp.full_like(self.lowest, jnp.inf),
            checked_lowest=jnp.full_like(self.checked_lowest, jnp.inf),
        )


def judge_original(model: Model, examples: Examples, kappa: Float[Array, " b"]) -> Record:
    """The record after one forward pass: images that are adversarial already are successes at distance zero."""
    already = objective.succeeded(model(examples.images), examples.labels, examples.targets, kappa)
    every = jnp.ones_like(already)
    return Record.start(examples.images).update(
        images=examples.images,
        found=already,
        better=already,
        iteration=jnp.zeros_like(examples.labels),
        forward=every,
        backward=~every,
    )


def judge_if_warm(model: Model, state: Any, kappa: Float[Array, " b"], best: str = "best_l2") -> Any:
    """Before the first iteration of a warm start: images that are adversarial already are done, at distance zero.

    Args:
        model: images -> logits.
        state: a state with examples, record, progress and done as `Nearest` has them.
        kappa: confidence.
        best: the state's field for the distance of its best success.
    """
    if state.examples.initial is None:
        return state
    first = ~state.done & (state.progress.count == 0)
    old = {"record": state.record, "done": state.done, best: getattr(state, best)}

    def judged():
        record = judge_original(model, state.examples, kappa)
        return select(first, {"record": record, "done": record.success, best: nearest_so_far(record)}, old)

    return dataclasses.replace(state, **lax.cond(jnp.any(first), judged, lambda: old))


@pytree
class Searching:
    """A search that ranks its successes: min D(x') + c max(f(x') + kappa, 0) for one constant c after the other.

    Attributes:
        examples: the problem.
        record: the best success so far.
        bracket: of the constant.
        progress: where every example stands.
        kappa: confidence.
        lr: learning rate.
        done: examples that no further step changes.
    """

    examples: Examples
    record: Record
    bracket: Bracket
    progress: Progress
    kappa: Float[Array, " b"]
    lr: Float[Array, " b"]
    done: Bool[Array, " b"]

    def polishing(self, search_steps: int, polishes: int) -> Bool[Array, " b"]:
        """Which examples polish: they are in one of the last `polishes` problems, and one before has succeeded."""
        return (self.progress.problem >= search_steps - polishes) & self.bracket.closed


@pytree
class Nearest(Searching):
    """A search for the nearest success in L2.

    Attributes:
        best_l2: its distance.
        variable: what is optimised, with its optimiser.
    """

    best_l2: Float[Array, " b"]
    variable: Any


S = TypeVar("S", bound=Searching)
N = TypeVar("N", bound=Nearest)


def beginning(
    examples: Examples, *, variable: Any, initial_const: Real, kappa: Real, lr: Real, tolerance: Real
) -> dict[str, Any]:
    """The fields of a `Nearest` before the first iteration."""
    images = examples.images
    return {
        "examples": examples,
        "record": Record.start(images),
        "best_l2": per_example(jnp.inf, images),
        "variable": variable,
        "bracket": Bracket.start(initial_const, images),
        "progress": Progress.start(images, tolerance),
        "kappa": per_example(kappa, images),
        "lr": per_example(lr, images),
        "done": jnp.zeros(images.shape[0], bool),
    }


def evaluate(
    model: Model,
    state: N,
    x: Float[Array, "b h w c"],
    distance: Float[Array, " b"] | None = None,
    *,
    steps: int,
    abort_early: bool,
    window: int | None = None,
    loss: Literal["margin", "ce"] = "margin",
    polishing: Bool[Array, " b"] | None = None,
) -> tuple[N, Float[Array, "b h w c"], Bool[Array, " b"]]:
    """The state after an evaluation at images x, the gradient of c max(f + kappa, 0) there, and who ends a problem.

    An image that is adversarial already is done after the first, at distance zero.

    Args:
        model: images -> logits.
        state: the state before.
        x: the images.
        distance: D(x), which with the penalty is the loss that must go on falling; None: the squared L2 distance.
        steps: iterations for every constant, at most.
        abort_early: see `Progress.advance`.
        window: the same.
        loss: "margin", or "ce" for cross-entropy in place of max(f + kappa, 0).
        polishing: see `Progress.advance`.
    """
    state = judge_if_warm(model, state, state.kappa)
    examples, active, first = state.examples, ~state.done, state.progress.count == 0
    l2 = norm(x - examples.images)
    distance = jnp.square(l2) if distance is None else distance
    if examples.initial is None:  # the original itself, without the rounding of the variable
        x, l2 = select(first, (examples.images, jnp.zeros_like(l2)), (x, l2))

    def penalised(logits):
        if loss == "ce":
            f = jax.nn.softplus(objective.likelihood(logits, examples.labels, examples.targets))
        else:
            f = jnp.maximum(objective.margin(logits, examples.labels, examples.targets) + state.kappa, 0)
        return state.bracket.const * f

    logits, penalty, gradient = objective.value_and_gradient(model, x, penalised)
    success = active & objective.succeeded(logits, examples.labels, examples.targets, state.kappa)
    better = success & (l2 < state.best_l2)
    record = state.record.update(
        images=x, found=success, better=better, iteration=state.progress.count, forward=active, backward=active
    )
    progress, ended = state.progress.advance(
        success, distance + penalty, steps=steps, abort_early=abort_early, window=window, polishing=polishing
    )
    judged = dataclasses.replace(
        state,
        record=record,
        best_l2=jnp.where(better, l2, state.best_l2),
        progress=progress,
        done=state.done | (success & (l2 == 0)),  # nothing is nearer
    )
    return judged, gradient, active & ended


def next_problem(
    state: S,
    ended: Bool[Array, " b"],
    fresh: Callable[[Float[Array, "b h w c"]], dict[str, Any]],
    *,
    search_steps: int,
    polishes: int = 0,
) -> S:
    """Where a problem has ended: the next constant, from the start.

    The last `polishes` problems of an example that has succeeded begin at the best success, with the smallest constant
    that has succeeded. (In the last of ten or more search steps the program of Carlini and Wagner tries that
    constant again, too, but from the start.)

    Args:
        state: the state before.
        ended: whose problem has ended.
        fresh: from the images at which a problem begins to the fields of the state that are optimised.
        search_steps: number of problems.
        polishes: see above.
    """
    after = dataclasses.replace(
        state, bracket=state.bracket.narrow(state.progress.found, growth=10.0), progress=state.progress.next_problem()
    )
    begin = functools.partial(fresh, state.examples.start)
    if polishes:
        polishing = after.polishing(search_steps, polishes)
        const = jnp.where(polishing, after.bracket.upper, after.bracket.const)
        after = dataclasses.replace(after, bracket=dataclasses.replace(after.bracket, const=const))

        def begin():
            return fresh(select(polishing, state.record.best, state.examples.start))

    old = {name: getattr(state, name) for name in jax.eval_shape(begin)}
    return dataclasses.replace(
        state,
        **restart(ended, begin, old),
        bracket=select(ended, after.bracket, state.bracket),
        progress=select(ended, after.progress, state.progress),
        done=state.done | (ended & (state.progress.problem + 1 >= search_steps)),
    )


def nearest_so_far(record: Record) -> Float[Array, " b"]:
    """The distance of the best success before a search: zero where the original is one, else infinite."""
    return jnp.where(record.success, jnp.float32(0), jnp.float32(jnp.inf))


def restart(ended: Bool[Array, " b"], fresh: Callable[[], T], current: T) -> T:
    """The pytree `fresh()` for the examples whose problem has ended; it is computed only where one has."""
    return lax.cond(jnp.any(ended), lambda: select(ended, fresh(), current), lambda: current)
