"""Any attack, smoothed afterwards (Zhang et al. 2019, arXiv 1903.11862, the baseline of section 4).

    x' = P(x_0 + t r),   r = ||d|| s(d) / ||s(d)||

where d is what the attack found, s the operator of `jaxinterp.attacks.smoothing`, and P the projection onto the
attack's own ball, the box and the support. Smoothing takes away much of what the network reacts to, so at the length of
d (t = 1) the smoothed perturbation may fail; a search on t says how long it has to be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.attacks import objective, smoothing
from jaxinterp.attacks.attack import Attack, AttackResult, Examples, Real, Record, along, norm, per_example, select
from jaxinterp.attacks.constraint import project
from jaxinterp.attacks.cw import CW
from jaxinterp.attacks.search import Bracket
from jaxinterp.canonical import canonical
from jaxinterp.pytree import pytree, static

_GROWTH = 2.0  # of t, until a success


@pytree
class SmoothedState:
    """The attack's own state, and every example's search along its smoothed perturbation."""

    examples: Examples
    inner: Any
    record: Record
    best_l2: Float[Array, " b"]
    r: Float[Array, "b h w c"]
    bracket: Bracket  # of t
    tried: Int[Array, " b"]
    kappa: Float[Array, " b"]
    count: Int[Array, " b"]  # steps taken, the attack's and those of the search
    done: Bool[Array, " b"]


@pytree
class Smoothed:
    """An attack whose perturbation is smoothed once it has been found, and tried at several lengths.

    The first length is that of the attack's own perturbation; it is doubled until a success, then bisected. The
    shortest that succeeds is returned. Where the attack fails, so does this.

    Attributes:
        base: the attack.
        kappa: confidence, the margin of logits that counts as success, in place of the attack's.
        alpha: how far to smooth, in [0, 1); None means 0.95 for images of at most 64 pixels a side, else 0.997.
        lam: lambda, how much an edge of the image separates; None means 10 and 300, likewise.
        tries: number of lengths that are tried, a forward pass each.
        normalised: whether smoothing leaves constants as they are.
        cg_steps: iterations of conjugate gradients in a smoothing.

    Raises:
        ValueError: alpha or lam out of range, or several attacks.
        TypeError: `base` is no attack.
    """

    name: ClassVar[str] = "smoothed"
    # Attacks by name, for command lines; `jaxinterp.attacks` puts the registry here.
    parts: ClassVar[dict[str, Mapping[str, type]]] = {}

    base: Any = CW()
    kappa: Real = 0.0
    alpha: Real | None = None
    lam: Real | None = None
    tries: int = static(default=8)
    normalised: bool = static(default=True)
    cg_steps: int = static(default=50)

    def __post_init__(self) -> None:
        if isinstance(self.base, tuple):  # as command lines have it
            if len(self.base) != 1:
                raise ValueError(f"Smoothed.base must be one attack, got {len(self.base)}")
            object.__setattr__(self, "base", self.base[0])
        if isinstance(self.base, type) or not isinstance(self.base, Attack):
            raise TypeError(f"Smoothed.base must be an attack, such as CW(), got {self.base!r}")
        smoothing.check(self.alpha, self.lam, "Smoothed.")

    @property
    def iterations(self) -> int:
        """Those of the attack and of the search."""
        return self.base.iterations + self.tries

    def init(self, model, images, labels, targets, keys, support=None) -> SmoothedState:
        """Begins the attack."""
        inner = self._attack().init(model, images, labels, targets, keys, support)
        return self._begin(inner, Examples(images, labels, targets, support))

    @canonical
    def _begin(self, inner, examples: Examples) -> SmoothedState:
        images = examples.images
        zeros = jnp.zeros(images.shape[0], jnp.int32)
        return SmoothedState(
            examples=examples,
            inner=inner,
            record=Record.start(images),
            best_l2=per_example(jnp.inf, images),
            r=jnp.zeros_like(images),
            bracket=Bracket.start(1.0, images),
            tried=zeros,
            kappa=per_example(self.kappa, images),
            count=zeros,
            done=zeros.astype(bool),
        )

    def step(self, model, state: SmoothedState) -> SmoothedState:
        """One step of the attack, and one of the search for the examples that the attack has left."""
        attack, active = self._attack(), ~state.done
        ready = active & state.inner.done
        inner = lax.cond(
            jnp.all(state.inner.done), lambda inner: inner, lambda inner: attack.step(model, inner), state.inner
        )
        searched = lax.cond(jnp.any(ready), lambda state: self._search(model, state, ready), lambda state: state, state)
        return dataclasses.replace(searched, inner=inner, count=state.count + active)

    @canonical
    def _search(self, model, state: SmoothedState, ready: Bool[Array, " b"]) -> SmoothedState:
        """The next length, for the examples that are `ready`."""
        examples, attack = state.examples, self._attack()
        found = attack.result(state.inner)
        begins = ready & (state.tried == 0)

        def smoothed():
            z = found.images - examples.images
            r = smoothing.once(
                z, examples.images, self.alpha, self.lam, normalised=self.normalised, iterations=self.cg_steps
            )
            return select(begins, smoothing.lengthened(r, z, examples.support), state.r)

        r = lax.cond(jnp.any(begins), smoothed, lambda: state.r)
        tries = ready & found.success
        x = self._projected(examples.images + along(state.bracket.const, r) * r, examples)
        l2 = norm(x - examples.images)

        def judged():
            return tries & objective.succeeded(model(x), examples.labels, examples.targets, state.kappa)

        success = lax.cond(jnp.any(tries), judged, lambda: jnp.zeros_like(tries))
        better = success & (l2 < state.best_l2)
        record = state.record.update(
            images=x, found=success, better=better, iteration=state.count, forward=tries, backward=tries & False
        )
        tried = state.tried + tries
        ended = ready & (~found.success | (tried >= self.tries) | (l2 == 0))
        return dataclasses.replace(
            state,
            record=record,
            best_l2=jnp.where(better, l2, state.best_l2),
            r=r,
            bracket=select(tries, state.bracket.narrow(success, growth=_GROWTH), state.bracket),
            tried=tried,
            done=state.done | ended,
        )

    @canonical
    def result(self, state: SmoothedState) -> AttackResult:
        """The shortest success, and the passes of the attack and of the search."""
        found, result = self._attack().result(state.inner), state.record.result(state.examples.images)
        return dataclasses.replace(
            result, forward=result.forward + found.forward, backward=result.backward + found.backward
        )

    def _attack(self) -> Any:
        """The attack at the confidence that is asked for."""
        return dataclasses.replace(self.base, kappa=self.kappa)

    def _projected(self, images, examples: Examples):
        """Into the attack's ball, where it has one, and the box; they leave the support nowhere."""
        eps: Any = getattr(self.base, "eps", None)
        if eps is None:
            return jnp.clip(images, 0, 1)
        return project(images, examples.images, per_example(eps, images), getattr(self.base, "norm", "linf"))
