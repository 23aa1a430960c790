"""APGD, projected gradient descent that chooses its step sizes (Croce and Hein 2020, arXiv 2003.01690, section 3).

    z = P(x_k - a D(grad L(x_k)))
    x_{k+1} = P(x_k + 3/4 (z - x_k) + 1/4 (x_k - x_{k-1}))

In Linf and L2 the step size a is halved, and the search goes back to the best point, at checkpoints where there was
too little progress. In L1 a step moves a number of components that follows from the sparsity of the best point, and
there is no momentum (Croce and Hein 2021, arXiv 2103.01208, algorithm 1). Every example has checkpoints, step size,
best point and restarts of its own.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.attacks import boundary, descent, objective
from jaxinterp.attacks.attack import AttackResult, Examples, Real, along, per_example, select
from jaxinterp.attacks.constraint import distance, project, random_in_ball, sparse_step, steepest
from jaxinterp.canonical import canonical
from jaxinterp.pytree import pytree, static

_ALPHA = 0.75  # the share of the gradient in a step; the rest is momentum
_RHO = 0.75  # the share of steps between checkpoints that must lower the loss

Loss = Callable[[Float[Array, "b k"]], Float[Array, " b"]]


@pytree
class Halving:
    """Step size and progress since the last checkpoint, in Linf and L2.

    Attributes:
        size: step size a.
        lowered: steps since the checkpoint that lowered the loss.
        checked: number of the step at the checkpoint.
        best_loss: the lowest loss at the checkpoint.
        halved: whether a was halved there.
    """

    size: Float[Array, " b"]
    lowered: Int[Array, " b"]
    checked: Int[Array, " b"]
    best_loss: Float[Array, " b"]
    halved: Bool[Array, " b"]

    @classmethod
    def start(cls, size: Float[Array, " b"]) -> Halving:
        """Before the first step."""
        zeros = jnp.zeros(size.shape, jnp.int32)
        return cls(size, zeros, zeros, jnp.full_like(size, -jnp.inf), zeros.astype(bool))

    def update(self, k: Int[Array, " b"], steps: int, search: Search) -> tuple[Halving, Bool[Array, " b"]]:
        """The rule after k steps of `steps`, and who goes back to the best point."""
        lowered = self.lowered + search.lowered
        due = jnp.any(k[:, None] == jnp.asarray(checkpoints(steps)), axis=1)
        too_few = lowered < _RHO * (k - self.checked)
        stuck = ~self.halved & (search.best_loss == self.best_loss)
        halve = due & (too_few | stuck)
        checked = Halving(jnp.where(halve, self.size / 2, self.size), jnp.zeros_like(k), k, search.best_loss, halve)
        return select(due, checked, dataclasses.replace(self, lowered=lowered)), halve


@pytree
class Sparsity:
    """Step size and number of components that a step moves, in L1.

    Attributes:
        size: step size a, between its start and a tenth of it.
        largest: step size at the start.
        moved: number of components that a step moves.
        changed: number of components in which the best point at the last checkpoint differed from the original.
    """

    size: Float[Array, " b"]
    largest: Float[Array, " b"]
    moved: Float[Array, " b"]
    changed: Float[Array, " b"]

    @classmethod
    def start(cls, size: Float[Array, " b"], components: int) -> Sparsity:
        """Before the first step: a fifth of all components."""
        return cls(size, size, jnp.full_like(size, components // 5), jnp.full_like(size, components))

    def update(
        self, k: Int[Array, " b"], steps: int, search: Search, original: Float[Array, "b h w c"]
    ) -> tuple[Sparsity, Bool[Array, " b"]]:
        """The rule after k steps of `steps`, and who goes back to the best point."""
        due = (k > 0) & (k % max(int(0.04 * steps), 1) == 0)
        changed = distance(search.best - original, "l0")
        sparser = changed < 0.95 * self.changed
        size = jnp.where(sparser, self.largest, jnp.maximum(self.size / 1.5, self.largest / 10))
        checked = Sparsity(size, self.largest, jnp.maximum(jnp.floor(changed / 1.5), 1), changed)
        return select(due, checked, self), due & sparser


@pytree
class Search:
    """What APGD remembers in a run, beside the iterate.

    Attributes:
        previous: the iterate before.
        best: the iterate with the lowest loss.
        best_ascent: gradient there, in Linf and L2 its direction.
        best_loss: loss there.
        loss: of the iterate before.
        lowered: whether the step to the iterate lowered the loss.
        rule: how step sizes are chosen.
        rivals: classes to be reached one after the other, a run or more for each.
    """

    previous: Float[Array, "b h w c"]
    best: Float[Array, "b h w c"]
    best_ascent: Float[Array, "b h w c"]
    best_loss: Float[Array, " b"]
    loss: Float[Array, " b"]
    lowered: Bool[Array, " b"]
    rule: Halving | Sparsity
    rivals: Int[Array, "b m"] | None

    def evaluated(
        self, images: Float[Array, "b h w c"], loss: Float[Array, " b"], ascent: Float[Array, "b h w c"]
    ) -> Search:
        """With the loss and its ascent at the iterate."""
        best, best_ascent, best_loss = select(
            loss < self.best_loss, (images, ascent, loss), (self.best, self.best_ascent, self.best_loss)
        )
        return dataclasses.replace(
            self, best=best, best_ascent=best_ascent, best_loss=best_loss, loss=loss, lowered=loss < self.loss
        )


@functools.cache
def checkpoints(steps: int) -> tuple[int, ...]:
    """Numbers of steps after which progress is judged: ceil(p_j K), p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)."""
    # In whole hundredths, so that a product which is a whole number is not rounded up.
    before, now, found = 0, 22, []
    while now <= 100:
        found.append(-(-now * steps // 100))
        before, now = now, now + max(now - before - 3, 6)
    return tuple(sorted(set(found)))


class _Descent(abc.ABC):
    """The steps that both attacks take: they look at the iterate, and nowhere else."""

    one_gradient: ClassVar[bool] = True
    eps: Real
    step_size: Real | None
    kappa: Real
    norm: Literal["linf", "l2", "l1"]
    steps: int
    restarts: int
    random_start: bool
    stop_on_success: bool

    @canonical
    def step(self, model, state: descent.DescentState) -> descent.DescentState:
        """One step for every example, at its own place in its own search."""
        return self.update(state, *objective.linearised(model, self.points(state), state.examples.support))

    def points(self, state: descent.DescentState) -> Float[Array, "b h w c"]:
        """The iterates."""
        return state.images

    def covectors(
        self, state: descent.DescentState, logits: Float[Array, "b k"]
    ) -> tuple[Float[Array, "b k"], Bool[Array, " b"]]:
        """The gradient of the loss with respect to the logits, for those that move on."""
        return objective.values_and_covectors(logits, self._loss(state))[1], descent.moving(state, self.steps)

    def update(
        self, state: descent.DescentState, logits: Float[Array, "b k"], pull_back: objective.PullBack
    ) -> descent.DescentState:
        """A step down the loss, or a new start for those that begin another run."""
        rivals, runs = state.memory.rivals, self.restarts
        loss, covectors = objective.values_and_covectors(logits, self._loss(state))
        if rivals is not None:
            runs *= rivals.shape[1]
            ranked = boundary.ranked(logits, state.examples, rivals.shape[1])
            memory = dataclasses.replace(state.memory, rivals=select(state.count < 0, ranked, rivals))
            state = dataclasses.replace(state, memory=memory)
        moves = jnp.any(descent.moving(state, self.steps))
        gradient = objective.pulled_back(pull_back, covectors, state.images, moves)
        images, memory = _moved(state, loss, gradient, norm=self.norm, steps=self.steps)
        stop = self.stop_on_success
        state = descent.settle(state, logits, images, memory, steps=self.steps, runs=runs, stop_on_success=stop)
        return _begin(self, state) if runs > 1 or (rivals is not None and self.random_start) else state

    @canonical
    def result(self, state: descent.DescentState) -> AttackResult:
        """The latest iterate that succeeded."""
        return descent.result(state)

    @abc.abstractmethod
    def _loss(self, state: descent.DescentState) -> Loss:
        """What every example descends, from its logits."""


@pytree
class APGD(_Descent):
    """Descent of cross-entropy or of the difference of logits ratio, in an Linf, L2 or L1 ball.

    The latest iterate that succeeded is returned.

    Attributes:
        eps: radius of the ball, in pixel units of [0, 1]; one number, or one for every example.
        step_size: the first step size, in the ball's norm; None means 2 eps, in L1 eps.
        kappa: confidence, the margin of logits that counts as success.
        norm: "linf", "l2" or "l1".
        loss: "ce", cross-entropy, or "dlr", the difference of logits ratio.
        steps: number of steps K of a run.
        restarts: number of runs. An example that has succeeded starts no further one.
        random_start: start the first run, too, at a point uniform in the ball instead of the original image.
        stop_on_success: stop an example at its first success.
    """

    name: ClassVar[str] = "apgd"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"norm": ("linf", "l2", "l1"), "loss": ("ce", "dlr")}

    eps: Real = 8 / 255
    step_size: Real | None = None
    kappa: Real = 0.0
    norm: Literal["linf", "l2", "l1"] = static(default="linf")
    loss: Literal["ce", "dlr"] = static(default="ce")
    steps: int = static(default=100)
    restarts: int = static(default=1)
    random_start: bool = static(default=True)
    stop_on_success: bool = static(default=False)

    @property
    def iterations(self) -> int:
        """In every run K steps, and one that judges the last iterate."""
        return self.restarts * (self.steps + 1)

    @canonical
    def init(self, model, images, labels, targets, keys, support=None) -> descent.DescentState:
        """Starts at a random point of the ball, on the support and in the box."""
        return _start(self, Examples(images, labels, targets, support), keys, rivals=None)

    def _loss(self, state: descent.DescentState) -> Loss:
        examples, loss = state.examples, objective.likelihood if self.loss == "ce" else objective.dlr
        return lambda logits: loss(logits, examples.labels, examples.targets)


@pytree
class APGDT(_Descent):
    """APGD on the difference of logits ratio towards one rival class after the other.

    The rivals are those with the largest logits of the original image, which the first step looks at; any class but
    the label is a success. Where targets are given, only these are attacked. The latest iterate that succeeded is
    returned.

    Attributes:
        eps: radius of the ball, in pixel units of [0, 1]; one number, or one for every example.
        step_size: the first step size, in the ball's norm; None means 2 eps, in L1 eps.
        kappa: confidence, the margin of logits that counts as success.
        norm: "linf", "l2" or "l1".
        classes: number of rivals.
        steps: number of steps K of a run.
        restarts: number of runs for every rival. An example that has succeeded starts no further one.
        random_start: start the first run, too, at a point uniform in the ball instead of the original image.
        stop_on_success: stop an example at its first success.
    """

    name: ClassVar[str] = "apgdt"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"norm": ("linf", "l2", "l1")}

    eps: Real = 8 / 255
    step_size: Real | None = None
    kappa: Real = 0.0
    norm: Literal["linf", "l2", "l1"] = static(default="linf")
    classes: int = static(default=9)
    steps: int = static(default=100)
    restarts: int = static(default=1)
    random_start: bool = static(default=True)
    stop_on_success: bool = static(default=False)

    @property
    def iterations(self) -> int:
        """One that ranks the rivals, and their runs; fewer where there are fewer rivals, or targets."""
        return 1 + self.classes * self.restarts * (self.steps + 1)

    @canonical
    def init(self, model, images, labels, targets, keys, support=None) -> descent.DescentState:
        """Starts at the original, whose logits rank the rivals in the first step."""
        examples = Examples(images, labels, targets, support)
        rivals = None
        if targets is None:
            classes = jax.eval_shape(model, images).shape[1]
            rivals = jnp.zeros((len(images), min(self.classes, classes - 1)), jnp.int32)
        return _start(self, examples, keys, rivals)

    def _loss(self, state: descent.DescentState) -> Loss:
        examples, rivals = state.examples, state.memory.rivals
        if rivals is None:
            return lambda logits: objective.dlr(logits, examples.labels, examples.targets)
        # The last run's rival for those that are done, any for those that have none yet.
        place = jnp.clip(state.count // (self.steps + 1), 0, rivals.shape[1] * self.restarts - 1) // self.restarts
        rival = jnp.take_along_axis(rivals, place[:, None], axis=1)[:, 0]
        return lambda logits: objective.dlr_of_rival(logits, examples.labels, rival)


def _start(attack: _Descent, examples: Examples, keys: Any, rivals: Any) -> descent.DescentState:
    """The state before the first step, which judges the original where there are rivals to be ranked."""
    first = (1 if attack.norm == "l1" else 2) * attack.eps if attack.step_size is None else attack.step_size
    state = descent.start(examples, examples.images, eps=attack.eps, step_size=first, kappa=attack.kappa, keys=keys)
    search = _search(attack, examples.images, per_example(first, examples.images), rivals)
    state = dataclasses.replace(state, memory=search)
    if rivals is not None:
        return dataclasses.replace(state, count=state.count - 1)
    return _begin(attack, state) if attack.random_start else state


def _search(attack, images, size, rivals):
    """The memory at the start of a run."""
    rule = Sparsity.start(size, images[0].size) if attack.norm == "l1" else Halving.start(size)
    return Search(
        previous=images,
        best=images,
        best_ascent=jnp.zeros_like(images),
        best_loss=jnp.full_like(size, jnp.inf),
        loss=jnp.full_like(size, -jnp.inf),
        lowered=jnp.zeros(size.shape, bool),
        rule=rule,
        rivals=rivals,
    )


def _begin(attack: _Descent, state: descent.DescentState) -> descent.DescentState:
    """A random start for the examples that begin a run."""
    original, support = state.examples.images, state.examples.support

    # The authors' program scales the random direction to the surface of the ball in Linf and L2.
    def begin(keys):
        start = random_in_ball(keys, original, state.eps, attack.norm)
        start = project(start, original, state.eps, attack.norm, support)
        return start, _search(attack, start, state.step_size, state.memory.rivals)

    return descent.restart(state, begin, steps=attack.steps, first=attack.random_start)


def _moved(state: descent.DescentState, loss, gradient, *, norm, steps):
    """Algorithm 1, from the iterate x_k with its loss and gradient to the next; and what to remember."""
    examples, search = state.examples, state.memory
    ascent = gradient if norm == "l1" else steepest(gradient, norm)
    search = search.evaluated(state.images, loss, ascent)

    k = state.count % (steps + 1)
    if norm == "l1":
        rule, back = search.rule.update(k, steps, search, examples.images)
    else:
        rule, back = search.rule.update(k, steps, search)
    x, ascent = select(back, (search.best, search.best_ascent), (state.images, ascent))

    def inside(point):
        return project(point, examples.images, state.eps, norm, examples.support)

    if norm == "l1":
        # The authors' step is of equal parts of `moved` components, whether or not the box leaves room for them.
        moved = inside(x - sparse_step(ascent, x, rule.size, rule.moved))
    else:
        moved = inside(x - along(rule.size, x) * ascent)
        alpha = along(jnp.where(k == 0, 1.0, _ALPHA), x)
        moved = inside(x + alpha * (moved - x) + (1 - alpha) * (x - search.previous))
    return moved, dataclasses.replace(search, previous=x, rule=rule)
