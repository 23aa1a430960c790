"""Attacks one after the other as one attack: what the first does not break, the next one tries.

The usual way to measure robustness at a budget: cheap attacks come first, and an image that one of them breaks costs
the others nothing (Croce and Hein 2020, arXiv 2003.01690, section 5).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, UInt

from jaxinterp.attacks import objective
from jaxinterp.attacks.attack import AttackResult, Examples, OneGradient, Real, Record, ended, per_example, select
from jaxinterp.attacks.constraint import NORMS, Norm
from jaxinterp.canonical import canonical
from jaxinterp.draws import wrapped
from jaxinterp.pytree import pytree, static


@pytree
class ChainState:
    """The states of all stages, and the stage that every example is in.

    In the state of a stage an example is done before it begins the stage and again when it has left it, so that steps
    of the stage pass it by.
    """

    examples: Examples
    stages: tuple[Any, ...]
    keys: UInt[Array, "b n"]
    stage: Int[Array, " b"]
    iterations: Int[Array, " b"]  # the step in which the example first succeeded, or -1
    count: Int[Array, " b"]  # steps that it has taken, in all stages
    done: Bool[Array, " b"]


@pytree
class Chain:
    """Attacks in stages: an example enters the next stage when a stage ends without success.

    A step is a step of the earliest stage that any unfinished example is in; examples in later stages wait for it
    and stay as they are. An example begins a stage, and pays for its first passes, only when it gets there. Each stage
    draws from a key of its own.

    Without `eps` every stage runs to its own end. With it the chain asks for any success within the budget: an example
    is done at the first one.

    Attributes:
        stages: the attacks, in their order.
        eps: radius of the ball, in place of that of every stage that has one, and the largest distance at which a
            success of a minimum-norm attack counts; None leaves all as they are.
        kappa: confidence, the margin of logits that counts as success, in place of that of every stage.
        norm: the norm of `eps`: "linf", "l2", "l1" or "l0".
    """

    name: ClassVar[str] = "chain"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"norm": NORMS}

    stages: tuple[Any, ...]
    eps: Real | None = None
    kappa: Real = 0.0
    norm: Norm = static(default="linf")

    @property
    def iterations(self) -> int:
        """Those of all stages."""
        return sum(attack.iterations for attack in self.stages)

    def init(self, model, images, labels, targets, keys, support=None) -> ChainState:
        """Nobody has begun the first stage; no pass is made.

        Raises:
            ValueError: no stages, or one whose norm is not that of `eps`.
        """
        self._check()
        problem = images, labels, targets, keys, support
        zeros = jnp.zeros(images.shape[0], jnp.int32)
        return ChainState(
            examples=Examples(images, labels, targets, support),
            stages=tuple(_waiting(self._attack(i), model, problem) for i in range(len(self.stages))),
            keys=jax.random.key_data(keys),
            stage=zeros,
            iterations=zeros - 1,
            count=zeros,
            done=zeros.astype(bool),
        )

    def step(self, model, state: ChainState) -> ChainState:
        """One step of the earliest stage that has unfinished examples."""
        steps = [functools.partial(self.step_of, i, model) for i in range(len(self._parts))]
        return lax.switch(self.stage(state), steps, state)

    def stage(self, state: ChainState) -> Int[Array, ""]:
        """The part that this stage is in: neighbours that ask for one gradient at a time are one to the driver."""
        parts = [i for i, part in enumerate(self._parts) for _ in part]
        return jnp.asarray(parts, jnp.int32)[self._earliest(state)]

    def step_of(self, stage: int, model, state: ChainState) -> ChainState:
        """One step of the earliest stage of that part, for the examples that are in it."""
        part = self._parts[stage]
        if len(part) == 1:
            return self._step(part[0], model, state)
        several = canonical(lambda chain, model, state: chain._step_of_several(part, model, state))
        return several(self, model, state)

    @property
    def _parts(self) -> tuple[tuple[int, ...], ...]:
        """The stages, with those together that can share the passes of a network."""
        shares = [isinstance(attack, OneGradient) and attack.one_gradient for attack in self.stages]
        starts = [i for i, share in enumerate(shares) if not (i and share and shares[i - 1])]
        return tuple(tuple(range(*ends)) for ends in itertools.pairwise([*starts, len(self.stages)]))

    def _earliest(self, state: ChainState) -> Int[Array, ""]:
        """The earliest stage that has unfinished examples; without any, the last one."""
        return jnp.min(jnp.where(state.done, len(self.stages) - 1, state.stage))

    def _step(self, stage: int, model, state: ChainState) -> ChainState:
        """One step of a stage."""
        attack, inner = self._attack(stage), self._begun(stage, model, state)
        inner = lax.cond(jnp.all(inner.done), lambda inner: inner, lambda inner: attack.step(model, inner), inner)
        return self._after(stage, state, inner)

    def _step_of_several(self, part: tuple[int, ...], model, state: ChainState) -> ChainState:
        """One step of the earliest of several stages, whose programs have the passes of the network in common."""
        now = jnp.clip(self._earliest(state), part[0], part[-1]) - part[0]

        def of_it(function, *args):
            """`function(stage, attack, inner, *args)` of that stage, where `inner` is its state."""

            def of(stage):
                return lambda stages, *args: function(stage, self._attack(stage), stages[stage], *args)

            return lax.switch(now, list(map(of, part)), state.stages, *args)

        state = of_it(lambda stage, attack, inner: _put(state, stage, self._begun(stage, model, state)))
        points = of_it(lambda stage, attack, inner: attack.points(inner))
        logits, pull_back = objective.linearised(model, points, state.examples.support)
        covectors, needed = of_it(lambda stage, attack, inner, logits: attack.covectors(inner, logits), logits)
        gradient = objective.pulled_back(pull_back, covectors, points, jnp.any(needed))

        def update(stage, attack, inner, logits, gradient):
            return self._after(stage, state, attack.update(inner, logits, lambda _: gradient))

        return of_it(update, logits, gradient)

    def _begun(self, stage: int, model, state: ChainState) -> Any:
        """The state of a stage, begun by the examples that have reached it."""
        attack, examples = self._attack(stage), state.examples
        here = _here(stage, state)

        def begin(inner):
            # Nobody pays for a stage, or keeps its states up to date, before the stage is reached.
            keys = jax.vmap(lambda k: jax.random.fold_in(k, stage))(wrapped(state.keys))
            new = attack.init(model, examples.images, examples.labels, examples.targets, keys, examples.support)
            return select(here & inner.done, new, inner)

        inner = state.stages[stage]
        return lax.cond(jnp.any(here & inner.done), begin, lambda inner: inner, inner)

    def _after(self, stage: int, state: ChainState, inner: Any) -> ChainState:
        """The state with that of a stage after its step, and the examples that it ends for in the next one."""
        here = _here(stage, state)
        found = here & self._succeeded(stage, self._attack(stage).result(inner))
        if self.eps is not None:
            inner = dataclasses.replace(inner, done=inner.done | found)
        left, last = here & inner.done, stage + 1 == len(self.stages)
        return dataclasses.replace(
            _put(state, stage, inner),
            stage=state.stage + (left & ~found & (not last)),
            iterations=jnp.where(found & (state.iterations < 0), state.count, state.iterations),
            count=state.count + here,
            done=state.done | (left & (found | last)),
        )

    @canonical
    def result(self, state: ChainState) -> AttackResult:
        """What the stage found that succeeded, and the passes of all stages."""
        record = Record.start(state.examples.images)
        for i, inner in enumerate(state.stages):
            result = self._attack(i).result(inner)
            found = self._succeeded(i, result)
            record = record.update(
                images=result.images,
                found=found,
                better=found,
                iteration=state.iterations,
                forward=result.forward,
                backward=result.backward,
            )
        return record.result(state.examples.images)

    def _attack(self, i: int) -> Any:
        """The attack of stage i, at the chain's confidence and radius."""
        attack = self.stages[i]
        radius = {} if self.eps is None or not hasattr(attack, "eps") else {"eps": self.eps}
        return dataclasses.replace(attack, kappa=self.kappa, **radius)

    def _succeeded(self, i: int, result: AttackResult) -> Bool[Array, " b"]:
        """Success within eps. Attacks that have a radius keep to it themselves."""
        if self.eps is None or hasattr(self.stages[i], "eps"):
            return result.success
        distance = getattr(result, self.norm)
        return result.success & (distance <= per_example(self.eps, distance))

    def _check(self) -> None:
        if not self.stages:
            raise ValueError("Chain.stages must hold at least one attack, got none")
        for i, attack in enumerate(self.stages):
            if self.eps is not None and getattr(attack, "norm", self.norm) != self.norm:
                raise ValueError(
                    f"Chain.stages[{i}] must have the chain's norm {self.norm!r}, as eps is given, got {attack.norm!r}"
                )


def _here(stage: int, state: ChainState) -> Bool[Array, " b"]:
    """The examples that are in a stage."""
    return ~state.done & (state.stage == stage)


def _put(state: ChainState, stage: int, inner: Any) -> ChainState:
    """The state with another one of a stage."""
    return dataclasses.replace(state, stages=(*state.stages[:stage], inner, *state.stages[stage + 1 :]))


def _waiting(attack: Any, model: Any, problem: tuple[Any, ...]) -> Any:
    """The state of a stage that no example has begun: nothing found, nothing paid, done."""
    shapes = jax.eval_shape(lambda *problem: attack.init(model, *problem), *problem)
    return ended(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))
