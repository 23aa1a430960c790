"""HopSkipJump: the nearest adversarial image from decisions alone (Chen, Jordan and Wainwright 2020, arXiv 1904.02144).

    x_t = nearest adversarial point between x~_{t-1} and x_0, by bisection
    v_t = estimate of the gradient of the decision at x_t, from the decisions at x_t + delta_t u_b, b = 1..B_t
    x~_t = x_t + xi_t v_t,  xi_t = ||x_t - x_0|| / sqrt(t), halved until x~_t is adversarial

It sees nothing but whether an image is adversarial. Here a step is one query of every example: its state says what it
is doing (judging, starting, bisecting, sampling, jumping), so that examples never wait for each other.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxinterp.attacks import objective
from jaxinterp.attacks.attack import AttackResult, Examples, Real, Record, along, per_example, select
from jaxinterp.attacks.constraint import distance, steepest
from jaxinterp.canonical import canonical
from jaxinterp.draws import shaped, wrapped
from jaxinterp.pytree import pytree, static

_JUDGE, _START, _BISECT, _SAMPLE, _JUMP = range(5)
_BISECTIONS = 20  # the released program goes on to d^(-3/2) or d^(-2), which float32 does not resolve for large images
_HALVINGS = 20  # of a jump, without end in the released program
_FIRST_DELTA = 0.1


@pytree
class HopSkipJumpState:
    """What every example is doing, with which point, and what it has learnt.

    Attributes:
        examples: the problem.
        record: the nearest adversarial image of all queries.
        best: its distance.
        candidate: the point of the next query.
        images: x_t, the nearest adversarial point of this iteration.
        far: x~_t, the other end of the bisection.
        low: part of the way to x~_t at which there is no adversarial point.
        high: part of the way at which `images` lies.
        signed: sum of decision times direction over the samples; then the direction v_t itself.
        plain: sum of the directions.
        decisions: sum of the decisions, each +-1.
        delta: radius of the samples.
        jump: length xi_t.
        theta: bisection ends when `high - low` is as small.
        kappa: confidence.
        keys: data of the examples' keys.
        doing: one of judging, starting, bisecting, sampling, jumping.
        turn: number of the query within that.
        t: number of the iteration, from 1.
        count: number of queries so far.
        done: examples that no further step changes.
    """

    examples: Examples
    record: Record
    best: Float[Array, " b"]
    candidate: Float[Array, "b h w c"]
    images: Float[Array, "b h w c"]
    far: Float[Array, "b h w c"]
    low: Float[Array, " b"]
    high: Float[Array, " b"]
    signed: Float[Array, "b h w c"]
    plain: Float[Array, "b h w c"]
    decisions: Int[Array, " b"]
    delta: Float[Array, " b"]
    jump: Float[Array, " b"]
    theta: Float[Array, " b"]
    kappa: Float[Array, " b"]
    keys: UInt[Array, "b n"]
    doing: Int[Array, " b"]
    turn: Int[Array, " b"]
    t: Int[Array, " b"]
    count: Int[Array, " b"]
    done: Bool[Array, " b"]


@pytree
class HopSkipJump:
    """The smallest L2 or Linf perturbation, from decisions alone; forward passes only.

    The search starts at `starts`, or else at the first image of noise that is adversarial: uniform in the box, as in
    the original, and in turns between two random levels of every channel. Noise is rarely classified as a given
    target: a targeted attack needs `starts`, such as images of the target classes, and reports failure where it finds
    no start.

    Attributes:
        starts: [B,H,W,C] adversarial images to start from; where one is not adversarial, noise is tried.
        gamma: factor on the precision of the bisection and the radius of the samples.
        kappa: confidence, the margin of logits that counts as success.
        norm: "l2" or "linf".
        steps: number of iterations T.
        evaluations: B_0; iteration t samples B_0 sqrt(t) points.
        max_evaluations: the most points that an iteration samples.
        tries: the most images of noise that are tried as a start.
    """

    name: ClassVar[str] = "hopskipjump"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"norm": ("l2", "linf")}
    arrays: ClassVar[tuple[str, ...]] = ("starts",)

    starts: Float[Array, "b h w c"] | None = None
    gamma: Real = 1.0
    kappa: Real = 0.0
    norm: Literal["l2", "linf"] = static(default="l2")
    steps: int = static(default=40)
    evaluations: int = static(default=100)
    max_evaluations: int = static(default=10_000)
    tries: int = static(default=100)

    @property
    def samples(self) -> tuple[int, ...]:
        """B_t of every iteration."""
        every = (int(self.evaluations * math.sqrt(t)) for t in range(1, self.steps + 1))
        return tuple(min(b, self.max_evaluations) for b in every)

    @property
    def iterations(self) -> int:
        """The most queries: of the input and the starts, and in every iteration of samples, jumps and bisections."""
        first = 2 + self.tries + _BISECTIONS
        return first + sum(self.samples) + self.steps * (_HALVINGS + _BISECTIONS)

    @canonical
    def init(self, model, images, labels, targets, keys, support=None) -> HopSkipJumpState:
        """The input is judged first. No query is made.

        Raises:
            ValueError: starts that do not have the shape of the images.
        """
        if self.starts is not None and jnp.shape(self.starts) != images.shape:
            raise ValueError(
                f"HopSkipJump.starts must have the images' shape {images.shape}, got {jnp.shape(self.starts)}"
            )
        size = images[0].size
        theta = per_example(self.gamma, images) * size ** (-1.5 if self.norm == "l2" else -2.0)
        far = images if self.starts is None else jnp.clip(self.starts, 0, 1)
        if support is not None:
            far = jnp.where(support, far, images)
        zeros, none = jnp.zeros(images.shape[0], jnp.int32), jnp.zeros_like(images)
        return HopSkipJumpState(
            examples=Examples(images, labels, targets, support),
            record=Record.start(images),
            best=per_example(jnp.inf, images),
            candidate=images,
            images=images,
            far=far,
            low=per_example(0.0, images),
            high=per_example(1.0, images),
            signed=none,
            plain=none,
            decisions=zeros,
            delta=per_example(_FIRST_DELTA, images),
            jump=per_example(0.0, images),
            theta=jnp.maximum(theta, 2.0**-_BISECTIONS),
            kappa=per_example(self.kappa, images),
            keys=jax.random.key_data(keys),
            doing=zeros + _JUDGE,
            turn=zeros,
            t=zeros,
            count=zeros,
            done=zeros.astype(bool),
        )

    @canonical
    def step(self, model, state: HopSkipJumpState) -> HopSkipJumpState:
        """One query of every example, what follows from it, and the point of the next one."""
        examples, active, x = state.examples, ~state.done, state.candidate
        logits = model(x)
        adversarial = objective.succeeded(logits, examples.labels, examples.targets, state.kappa)
        found = active & adversarial
        size = distance(x - examples.images, self.norm)
        better = found & (size < state.best)
        record = state.record.update(
            images=x, found=found, better=better, iteration=state.count, forward=active, backward=jnp.zeros_like(found)
        )
        moved = dataclasses.replace(
            state,
            record=record,
            best=jnp.where(better, size, state.best),
            turn=state.turn + 1,
            count=state.count + 1,
        )
        moved = self._learn(moved, adversarial)
        return select(active, dataclasses.replace(moved, candidate=self._next(moved)), state)

    def _learn(self, state: HopSkipJumpState, adversarial: Bool[Array, " b"]) -> HopSkipJumpState:
        """The state after the decision at the candidate, by what each example is doing."""
        judging, starting, bisecting, sampling, jumping = (state.doing == i for i in range(5))

        # The input is adversarial: nothing is nearer.
        state = dataclasses.replace(state, done=judging & adversarial)
        state = select(judging & ~adversarial, _begin(state, _START), state)

        # A start, or the end of a jump, is the far end of a bisection.
        arrived = (starting | jumping) & adversarial
        ends = dataclasses.replace(
            _begin(state, _BISECT),
            images=state.candidate,
            far=state.candidate,
            low=jnp.zeros_like(state.low),
            high=jnp.ones_like(state.high),
        )
        gone = starting & ~adversarial & (state.turn >= self.tries + (self.starts is not None))
        shorter = dataclasses.replace(
            state,
            jump=jnp.where(jumping, state.jump / 2, state.jump),
            done=state.done | gone,
        )
        state = select(arrived, ends, select((starting | jumping) & ~adversarial, shorter, state))

        middle = (state.low + state.high) / 2
        narrowed = dataclasses.replace(
            state,
            images=select(adversarial, state.candidate, state.images),
            low=jnp.where(adversarial, state.low, middle),
            high=jnp.where(adversarial, middle, state.high),
        )
        state = select(bisecting, narrowed, state)

        # On the boundary, or without an adversarial point to jump to, the next iteration begins.
        near = bisecting & (state.high - state.low <= state.theta)
        lost = jumping & ~adversarial & (state.turn >= _HALVINGS)
        state = select(near | lost, self._next_iteration(state, near), state)

        direction = (state.candidate - state.images) / along(state.delta, state.images)
        summed = dataclasses.replace(
            state,
            signed=state.signed + select(adversarial, direction, -direction),
            plain=state.plain + direction,
            decisions=state.decisions + jnp.where(adversarial, 1, -1),
        )
        state = select(sampling, summed, state)
        enough = jnp.asarray(self.samples, jnp.int32)[jnp.clip(state.t - 1, 0, self.steps - 1)]
        return select(sampling & (state.turn >= enough), self._begin_jump(state), state)

    def _next_iteration(self, state: HopSkipJumpState, near: Bool[Array, " b"]) -> HopSkipJumpState:
        """Samples around the point on the boundary, in a radius that fits the precision of the bisection."""
        size = distance(state.far - state.examples.images, self.norm)
        components = state.images[0].size
        factor = math.sqrt(components) if self.norm == "l2" else components
        delta = jnp.where(state.t == 0, _FIRST_DELTA, factor * state.theta * size)
        return dataclasses.replace(
            _begin(state, _SAMPLE),
            delta=jnp.where(near, delta, state.delta),
            signed=jnp.zeros_like(state.signed),
            plain=jnp.zeros_like(state.plain),
            decisions=jnp.zeros_like(state.decisions),
            t=state.t + 1,
            done=state.t >= self.steps,
        )

    def _begin_jump(self, state: HopSkipJumpState) -> HopSkipJumpState:
        """Equation (16): decisions less their mean, times directions. Where all agree, the mean has nothing to add."""
        mean = state.decisions / jnp.maximum(state.turn, 1)
        mixed = jnp.abs(state.decisions) < state.turn
        estimate = state.signed - along(jnp.where(mixed, mean, 0), state.plain) * state.plain
        size = distance(state.images - state.examples.images, self.norm)
        return dataclasses.replace(
            _begin(state, _JUMP),
            signed=steepest(estimate, self.norm),
            jump=size / jnp.sqrt(jnp.maximum(state.t, 1).astype(jnp.float32)),
        )

    def _next(self, state: HopSkipJumpState) -> Float[Array, "b h w c"]:
        """The point of the next query."""
        original, support = state.examples.images, state.examples.support
        needed = (state.doing == _START) | (state.doing == _SAMPLE)
        drawn = lax.cond(jnp.any(needed), self._draw, lambda state: jnp.zeros_like(original), state)

        if self.norm == "l2":
            part = along((state.low + state.high) / 2, original)
            between = _add(original, part * (state.far - original))
        else:
            reach = distance(state.far - original, "linf") * (state.low + state.high) / 2
            reach = along(jnp.maximum(reach, 0), original)
            between = original + jnp.clip(state.far - original, -reach, reach)
        # Noise is all alike to many networks. Every other try is noise between two levels of its own in each channel.
        noise = (drawn + 1) / 2
        one, other = noise[:, :1, :1], noise[:, -1:, -1:]
        tries = state.turn - (self.starts is not None)
        noise = select(tries % 2 == 0, noise, _add(one, (other - one) * noise))
        points = {
            _START: noise,
            _BISECT: jnp.clip(between, 0, 1),
            _SAMPLE: _add(state.images, along(state.delta, original) * self._directions(drawn, support)),
            _JUMP: _add(state.images, along(state.jump, original) * state.signed),
        }
        candidate = original
        for doing, point in points.items():
            candidate = select(state.doing == doing, point, candidate)
        if self.starts is not None:
            candidate = select((state.doing == _START) & (state.turn == 0), state.far, candidate)
        return candidate if support is None else jnp.where(support, candidate, original)

    def _draw(self, state: HopSkipJumpState) -> Float[Array, "b h w c"]:
        """Numbers uniform in (-1, 1), of every example's own query."""
        shape = state.images.shape[1:]

        def draw(data, count):
            key = jax.random.fold_in(wrapped(data), count)
            return shaped(jax.random.uniform, key, shape, jnp.float32, -1 + 2.0**-23)

        return jax.vmap(draw)(state.keys, state.count)

    def _directions(self, drawn: Float[Array, "b h w c"], support: Any) -> Float[Array, "b h w c"]:
        """Directions of Euclidean length 1: of normal components in L2, of uniform ones in Linf."""
        directions = lax.erf_inv(drawn) if self.norm == "l2" else drawn
        return steepest(directions if support is None else jnp.where(support, directions, 0), "l2")

    @canonical
    def result(self, state: HopSkipJumpState) -> AttackResult:
        """The nearest adversarial image of all queries."""
        return state.record.result(state.examples.images)


def _begin(state: HopSkipJumpState, doing: int) -> HopSkipJumpState:
    return dataclasses.replace(state, doing=jnp.full_like(state.doing, doing), turn=jnp.zeros_like(state.turn))


def _add(images: Array, change: Array) -> Array:
    """The sum in the box. The inner bounds keep product and sum apart, which else may be rounded once or twice."""
    return jnp.clip(images + jnp.clip(change, -1, 1), 0, 1)
