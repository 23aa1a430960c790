"""Key pixels: an attack on the few pixels that a network depends on.

The idea is that of arXiv 2106.01615: find the pixels that a detector of generated images depends on, and change those
alone. The procedure is ours:

1. the key pixels are the share rho of all pixels with the largest gradient, weighted by a map where one is given;
2. steps of steepest descent change them, and them alone;
3. without success after K steps, rho grows: the pixels so far stay, and those are added which are the largest at the
   image that has been reached;
4. at the first success, pixels are sorted by what their change takes from the loss, -<g, d> by the gradient there,
   and the fewest of the first ones are kept that still succeed, by bisection of their number;
5. the change that is left is shortened, by bisection of its length.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.attacks import constraint, descent, objective
from jaxinterp.attacks.attack import AttackResult, Examples, Real, along, per_example, select
from jaxinterp.canonical import canonical
from jaxinterp.pytree import pytree, static

_ATTACK, _PRUNE, _SHORTEN, _ENDED = range(4)


@pytree
class Search:
    """Where every example is in its search.

    Attributes:
        weights: what gradients are multiplied with to rank pixels.
        key: the key pixels.
        base: the adversarial image that is pruned, or shortened.
        worth: what the change of each pixel takes from the loss.
        low: the number of pixels, or the length, that is too little.
        high: the one that is enough.
        phase: attack, prune, shorten, ended.
        tried: images evaluated in the phase.
        rho: the first share of key pixels.
        growth: by what it grows.
        most: its largest value.
    """

    weights: Float[Array, "b h w 1"]
    key: Bool[Array, "b h w 1"]
    base: Float[Array, "b h w c"]
    worth: Float[Array, "b h w 1"]
    low: Float[Array, " b"]
    high: Float[Array, " b"]
    phase: Int[Array, " b"]
    tried: Int[Array, " b"]
    rho: Float[Array, " b"]
    growth: Float[Array, " b"]
    most: Float[Array, " b"]


@pytree
class KeyPixels:
    """A change of the few pixels that the network depends on: found by gradients, attacked, pruned and shortened.

    Attributes:
        eps: radius of the ball, in pixel units of [0, 1]; one number, or one for every example.
        step_size: length of a step in the ball's norm; None means 2.5 eps / steps.
        kappa: confidence, the margin of logits that counts as success.
        rho: the first share of pixels that are attacked, from 0 to 1.
        growth: by what the share grows after a round without success.
        most: the largest share, from 0 to 1.
        weights: [B,H,W,1], not negative: a map that gradients are multiplied with to rank pixels, such as a class
            activation map of the images' size; None means gradients alone.
        norm: of ball and steps, "l2" or "linf".
        steps: steps K of a round.
        rounds: how many shares are tried.
        prunes: images that are tried to find the fewest pixels.
        lengths: images that are tried to find the shortest change.

    Raises:
        ValueError: weights that do not have the images' shape.
    """

    name: ClassVar[str] = "key-pixels"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"norm": ("l2", "linf")}
    ranges: ClassVar[dict[str, str]] = {"rho": "from 0 to 1", "most": "from 0 to 1"}
    arrays: ClassVar[tuple[str, ...]] = ("weights",)

    eps: Real = 1.0
    step_size: Real | None = None
    kappa: Real = 0.0
    rho: Real = 0.01
    growth: Real = 2.0
    most: Real = 0.1
    weights: Float[Array, "b h w c"] | None = None
    norm: Literal["l2", "linf"] = static(default="l2")
    steps: int = static(default=20)
    rounds: int = static(default=4)
    prunes: int = static(default=12)
    lengths: int = static(default=6)

    @property
    def iterations(self) -> int:
        """K steps a round, one that judges the last of them, and the images that are tried after a success."""
        return self.rounds * self.steps + 1 + self.prunes + self.lengths

    @canonical
    def init(self, model, images, labels, targets, keys, support=None) -> descent.DescentState:
        """Starts at the original, without key pixels."""
        shape = (*images.shape[:3], 1)
        if self.weights is not None and jnp.shape(self.weights) != shape:
            raise ValueError(f"KeyPixels.weights must have shape {shape}, one for each pixel, got {self.weights.shape}")
        zeros = jnp.zeros(images.shape[0], jnp.int32)
        search = Search(
            weights=jnp.ones(shape, jnp.float32) if self.weights is None else jnp.asarray(self.weights, jnp.float32),
            key=jnp.zeros(shape, bool),
            base=images,
            worth=jnp.zeros(shape, jnp.float32),
            low=per_example(0.0, images),
            high=per_example(0.0, images),
            phase=zeros + _ATTACK,
            tried=zeros,
            rho=per_example(self.rho, images),
            growth=per_example(self.growth, images),
            most=per_example(self.most, images),
        )
        return descent.start(
            Examples(images, labels, targets, support),
            images,
            eps=self.eps,
            step_size=descent.default_step_size(self.eps, self.steps) if self.step_size is None else self.step_size,
            kappa=self.kappa,
            memory=search,
        )

    @canonical
    def step(self, model, state: descent.DescentState) -> descent.DescentState:
        """Judges an image, and goes on: a step of the attack, fewer pixels, or a shorter change."""
        examples, search, active = state.examples, state.memory, ~state.done
        attacked = active & (search.phase == _ATTACK)
        logits, ascent = lax.cond(
            jnp.any(attacked),
            lambda: descent.gradient(model, state),
            lambda: (model(state.images), jnp.zeros_like(state.images)),
        )
        found = active & objective.succeeded(logits, examples.labels, examples.targets, state.kappa)
        record = state.record.update(
            images=state.images,
            found=found,
            better=found,  # after the first one, each has fewer pixels or is shorter
            iteration=state.count,
            forward=active,
            backward=attacked,
        )
        moved, stepped = self._moved(state, ascent)
        pruned = _narrowed(search, found, self.prunes)
        shortened = dataclasses.replace(
            _narrowed(search, found, self.lengths, whole=False),
            phase=jnp.where(search.tried + 1 >= self.lengths, _ENDED, _SHORTEN),
        )
        begun = self._pruning(state, ascent)
        after = select(search.phase == _SHORTEN, shortened, select(search.phase == _PRUNE, pruned, stepped))
        after = select(attacked & found, begun, after)
        # What is shortened is the best so far.
        begins = active & (after.phase == _SHORTEN) & (search.phase != _SHORTEN)
        after = select(begins, _shortening(after, record.best), after)
        images = select(after.phase == _ATTACK, moved, _candidate(after, examples.images))
        images, after = select(active, (images, after), (state.images, search))
        return dataclasses.replace(
            state,
            record=record,
            images=images,
            memory=after,
            count=state.count + active,
            done=state.done | (after.phase == _ENDED),
        )

    @canonical
    def result(self, state: descent.DescentState) -> AttackResult:
        """The success of the fewest pixels, as short as was found."""
        return descent.result(state)

    def _moved(self, state: descent.DescentState, ascent: Float[Array, "b h w c"]):
        """The images after a step on the key pixels, and the search; in the first step of a round there are more."""
        search, x = state.memory, state.images
        # The box is in the way of components at 0 and 1.
        ascent = constraint.movable(ascent, x)
        turn, place = search.tried // self.steps, search.tried % self.steps
        share = jnp.minimum(search.rho * search.growth**turn, search.most)
        wanted = jnp.ceil(share * x.shape[1] * x.shape[2])
        importance = jnp.where(search.key, 0, _by_pixel(ascent, self.norm) * search.weights)
        more = constraint.largest(importance, wanted - _count(search.key))
        key = search.key | (more & along(place == 0, more))
        direction = constraint.steepest(jnp.where(key, ascent, 0), self.norm)
        ended = search.tried >= self.rounds * self.steps
        after = dataclasses.replace(
            search, key=key, tried=search.tried + 1, phase=jnp.where(ended, _ENDED, search.phase)
        )
        return descent.towards(state, direction, self.norm), after

    def _pruning(self, state: descent.DescentState, ascent: Float[Array, "b h w c"]) -> Search:
        """Before the first image with fewer pixels; an image that is adversarial without a change ends the search."""
        delta = state.images - state.examples.images
        changed = _count(jnp.any(delta != 0, axis=-1, keepdims=True))
        return dataclasses.replace(
            state.memory,
            base=state.images,
            worth=-jnp.sum(ascent * delta, axis=-1, keepdims=True),
            low=jnp.zeros_like(changed),
            high=changed,
            phase=jnp.where(changed == 0, _ENDED, jnp.where(changed == 1, _SHORTEN, _PRUNE)),
            tried=jnp.zeros_like(state.memory.tried),
        )


def _by_pixel(ascent: Float[Array, "b h w c"], norm: str) -> Float[Array, "b h w 1"]:
    """What a step of unit length gains on each pixel: the slope in the dual norm, squared in L2."""
    ascent = constraint.normalised(ascent, "linf")  # so that no square vanishes
    return jnp.sum(jnp.square(ascent) if norm == "l2" else jnp.abs(ascent), axis=-1, keepdims=True)


def _count(pixels: Bool[Array, "b h w 1"]) -> Float[Array, " b"]:
    return jnp.sum(pixels, axis=(1, 2, 3), dtype=jnp.int32).astype(jnp.float32)


def _middle(search: Search) -> Float[Array, " b"]:
    """Pixels, or the length, of the image that is evaluated."""
    middle = (search.low + search.high) / 2
    return jnp.where(search.phase == _PRUNE, jnp.floor(middle), middle)


def _narrowed(search: Search, found: Bool[Array, " b"], tries: int, *, whole: bool = True) -> Search:
    """The search after one more image was judged; of whole numbers, it ends where none is left in between."""
    middle, tried = _middle(search), search.tried + 1
    low, high = jnp.where(found, search.low, middle), jnp.where(found, middle, search.high)
    ended = (tried >= tries) | ((high - low <= 1) & whole)
    phase = jnp.where(ended, _SHORTEN, search.phase)
    return dataclasses.replace(search, low=low, high=high, tried=tried, phase=phase)


def _shortening(search: Search, best: Float[Array, "b h w c"]) -> Search:
    """Before the first shorter change."""
    zeros = jnp.zeros_like(search.low)
    return dataclasses.replace(search, base=best, low=zeros, high=zeros + 1, tried=jnp.zeros_like(search.tried))


def _candidate(search: Search, original: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """The image to be judged next: with the most worthy pixels alone, or with a shorter change."""
    middle = _middle(search)
    kept = jnp.where(constraint.largest(search.worth, middle), search.base, original)
    shorter = jnp.clip(original + along(middle, original) * (search.base - original), 0, 1)
    return select(search.phase == _PRUNE, kept, shorter)
