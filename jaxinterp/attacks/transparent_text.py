"""Transparent text: an overlay of low opacity under which a classifier loses the object (arXiv 2105.09685).

    x' = x + a m(theta) (colour - x),   theta = phrase, size, angle, place, single or on a grid, colour

a is the opacity, m the coverage by letters. The paper asks no query. Here theta is searched for within a budget of
them, from logits alone: half of the overlays are drawn at random, half are the best one so far with one thing changed.
Overlays come in populations, each proposed from what the ones before have shown, and a population is evaluated as one
batch. What is counted are the queries of the same search done one by one: those up to the first success.

a is given. Where a lowest one is given, too, it is searched for as well: after a success the queries that are left go
to fainter overlays, half of them random as before, half the faintest one so far with its opacity lowered and, every
other time, with one thing changed. The faintest success is returned, for which all queries are paid.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxinterp.attacks import lettering, objective
from jaxinterp.attacks.attack import AttackResult, Examples, Real, Record, per_example, select
from jaxinterp.canonical import canonical
from jaxinterp.draws import wrapped
from jaxinterp.pytree import pytree, static

_REACH = 8  # a place changes by up to a part of the image
_DRAWS = 8  # numbers that a proposal takes


@pytree
class Overlay:
    """Which text stands where, for every example.

    Attributes:
        entry: position in the bank.
        tiled: on a grid instead of once.
        offset: row and column of its upper left corner.
        colour: position in the palette.
    """

    entry: Int[Array, "*b"]
    tiled: Bool[Array, "*b"]
    offset: Int[Array, "*b 2"]
    colour: Int[Array, "*b"]


@pytree
class TransparentTextState:
    """What the search of every example has found.

    Attributes:
        examples: the problem.
        record: the adversarial image, and what it has cost.
        best: the overlay that is changed: of the lowest loss, after a success the faintest that succeeded.
        loss: the margin of logits that it leaves.
        opacity: what the next overlays may have at most: that of the faintest success, or the attack's.
        faintest: what they may have at least.
        kappa: confidence.
        keys: data of the examples' keys.
        count: queries made.
        done: examples that no further step changes.
    """

    examples: Examples
    record: Record
    best: Overlay
    loss: Float[Array, " b"]
    opacity: Float[Array, " b"]
    faintest: Float[Array, " b"]
    kappa: Float[Array, " b"]
    keys: UInt[Array, "b n"]
    count: Int[Array, " b"]
    done: Bool[Array, " b"]


@pytree
class TransparentText:
    """A text of low opacity, once or on a grid, found by random search; forward passes only.

    An example ends at its first success, or with its queries where `faintest` is given. The input itself is judged
    first, which costs one query.

    `jaxinterp.typesetting.written` gives it what it places; `text`, `smallest`, `largest`, `sizes` and `angles` say
    what that is.

    Attributes:
        bank: every text in every size and at every angle, for the images' size.
        opacity: of the letters, from 0 to 1; one number, or one for every example.
        faintest: the lowest opacity, from 0 to 1, that a success is followed by a search for, one number or one for
            every example (above `opacity` it means that); None ends the search at the first success.
        kappa: confidence, the margin of logits that counts as success.
        text: what may be written, phrases separated by |.
        layout: "single", "grid", or "any" of them.
        colour: "black", "white", "grey" (one of these two), "hues" (red, green, blue, cyan, magenta or yellow), or
            "any" of them; images of one channel have black and white.
        smallest: the smallest font size, in pixels; None means a third of the largest.
        largest: the largest font size, in pixels; None means a quarter of the image's height, or less where a phrase
            would not fit.
        sizes: number of font sizes from the smallest to the largest.
        angles: number of angles from -45 to 45 degrees; 1 means level.
        queries: number of overlays that are tried, at most.
        population: number of overlays that are proposed and evaluated at once.
    """

    name: ClassVar[str] = "transparent-text"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "layout": ("any", "single", "grid"),
        "colour": ("any", "grey", "hues", "black", "white"),
    }
    ranges: ClassVar[dict[str, str]] = {"opacity": "from 0 to 1", "faintest": "from 0 to 1"}
    shared: ClassVar[tuple[str, ...]] = ("bank",)

    bank: lettering.Bank | None = None
    opacity: Real = 0.2
    faintest: Real | None = None
    kappa: Real = 0.0
    text: str = static(default="sample|copyright|confidential")
    layout: Literal["any", "single", "grid"] = static(default="any")
    colour: Literal["any", "grey", "hues", "black", "white"] = static(default="any")
    smallest: int | None = static(default=None)
    largest: int | None = static(default=None)
    sizes: int = static(default=4)
    angles: int = static(default=5)
    queries: int = static(default=100)
    population: int = static(default=8)

    @property
    def iterations(self) -> int:
        """The input and all overlays, a population in each step."""
        return -(-(self.queries + 1) // self.population)

    def palette(self, channels: int) -> Float[np.ndarray, "n c"]:
        """The colours of the letters: corners of the colour cube.

        Raises:
            ValueError: hues for images that do not have three channels.
        """
        corners = np.array(list(itertools.product((0.0, 1.0), repeat=channels)), np.float32)
        grey = corners.min(1) == corners.max(1)
        if channels != 3:
            if self.colour == "hues":
                raise ValueError(f"TransparentText.colour 'hues' needs images of 3 channels, got {channels}")
            corners, grey = corners[grey], grey[grey]
        kept = {
            "any": np.ones_like(grey),
            "grey": grey,
            "hues": ~grey,
            "black": corners.max(1) == 0,
            "white": corners.min(1) == 1,
        }
        return corners[kept[self.colour]]

    @canonical
    def init(self, model, images, labels, targets, keys, support=None) -> TransparentTextState:
        """No overlay yet, and no query.

        Raises:
            ValueError: no texts, or texts for images of another size; as `palette`.
        """
        batch = images.shape[0]
        self._texts(images.shape[1:])
        self.palette(images.shape[3])
        zeros = jnp.zeros(batch, jnp.int32)
        opacity = per_example(self.opacity, images)
        faintest = opacity if self.faintest is None else jnp.minimum(per_example(self.faintest, images), opacity)
        return TransparentTextState(
            examples=Examples(images, labels, targets, support),
            record=Record.start(images),
            best=Overlay(zeros, zeros.astype(bool), jnp.zeros((batch, 2), jnp.int32), zeros),
            loss=per_example(jnp.inf, images),
            opacity=opacity,
            faintest=faintest,
            kappa=per_example(self.kappa, images),
            keys=jax.random.key_data(keys),
            count=zeros,
            done=zeros.astype(bool),
        )

    @canonical
    def step(self, model, state: TransparentTextState) -> TransparentTextState:
        """One population of queries, of which the first is the input itself."""
        examples, active = state.examples, ~state.done
        numbers = state.count[:, None] + jnp.arange(self.population, dtype=jnp.int32)  # [B,P], from 0: the input
        overlays, opacity = self._proposed(state, numbers)
        images = self._overlaid(examples, overlays, jnp.where(numbers > 0, opacity, 0))
        logits = model(images.reshape(-1, *images.shape[2:]))
        logits = logits.reshape(*numbers.shape, logits.shape[-1])

        def judged(logits):
            loss = objective.margin(logits, examples.labels, examples.targets)
            return loss, objective.succeeded(logits, examples.labels, examples.targets, state.kappa)

        loss, success = jax.vmap(judged, in_axes=1, out_axes=1)(logits)
        asked = active[:, None] & (numbers <= self.queries)
        success = success & asked
        found, first = jnp.any(success, axis=1), jnp.argmax(success, axis=1).astype(jnp.int32)
        unchanged = success[:, 0] & (numbers[:, 0] == 0)
        if self.faintest is None:
            ended, taken = found, first
        else:  # the input as it is needs no overlay; of others the faintest
            ended = unchanged
            taken = jnp.where(unchanged, 0, jnp.argmin(jnp.where(success, opacity, jnp.inf), axis=1).astype(jnp.int32))
        better = found & (unchanged | ~state.record.success | (_at(opacity, taken) < state.opacity))
        paid = jnp.where(ended, first + 1, jnp.sum(asked, axis=1, dtype=jnp.int32))
        record = state.record.update(
            images=_at(images, taken),
            found=found,
            better=better,
            iteration=state.count + first,
            forward=paid,
            backward=jnp.zeros_like(found),
        )
        loss = jnp.where(asked & (numbers > 0) & ~jnp.isnan(loss), loss, jnp.inf)
        lowest = jnp.where(better, taken, jnp.argmin(loss, axis=1))
        kept = better | (~record.success & (_at(loss, lowest) < state.loss))
        return dataclasses.replace(
            state,
            record=record,
            best=select(kept, jax.tree.map(lambda part: _at(part, lowest), overlays), state.best),
            loss=jnp.where(kept, _at(loss, lowest), state.loss),
            opacity=jnp.where(better & ~unchanged, _at(opacity, taken), state.opacity),
            count=state.count + paid,
            done=state.done | ended | (state.count + paid > self.queries),
        )

    @canonical
    def result(self, state: TransparentTextState) -> AttackResult:
        """The first overlay that succeeded, or the faintest that did."""
        return state.record.result(state.examples.images)

    def drawn(
        self, images: Float[Array, "b h w c"], keys: Array, count: int, support: Bool[Array, "b h w c"] | None = None
    ) -> Float[Array, "b n h w c"]:
        """Images under the first `count` overlays that a search without feedback would try: the paper's, query-free.

        Args:
            images: in [0, 1].
            keys: [B] one key for every example, as `jaxinterp.attacks.driver.example_keys` gives them.
            count: number of overlays n of each.
            support: where the images may change.

        Raises:
            ValueError: as `init`.
        """
        numbers = jnp.broadcast_to(1 + jnp.arange(count, dtype=jnp.int32), (images.shape[0], count))
        overlays = self._random(_uniform(keys, numbers), images.shape[1:])
        labels = jnp.zeros(images.shape[0], jnp.int32)
        opacity = jnp.broadcast_to(per_example(self.opacity, images)[:, None], numbers.shape)
        return self._overlaid(Examples(images, labels, None, support), overlays, opacity)

    def _proposed(self, state: TransparentTextState, numbers: Int[Array, "b p"]) -> tuple[Overlay, Float[Array, "b p"]]:
        """Random overlays, and the best one so far with its place, its text, or its colour and layout changed.

        After a success their opacities are below its own, mostly by little, and every other one of the best overlays
        is changed in nothing else.
        """
        shape = state.examples.images.shape[1:]
        u = _uniform(wrapped(state.keys), numbers)
        fresh = self._random(u, shape)
        best = jax.tree.map(lambda part: part[:, None], state.best)
        found = state.record.success[:, None]
        change = jnp.where(found, 2 * u[..., 5] - 1, u[..., 5])  # below 0: none
        moves, writes = (change >= 0) & (change < 1 / 3), (change >= 1 / 3) & (change < 2 / 3)
        paints = change >= 2 / 3
        reach = jnp.asarray([max(1, side // _REACH) for side in shape[:2]], jnp.int32)
        step = jnp.floor(u[..., 2:4] * (2 * reach + 1)).astype(jnp.int32) - reach
        entry = jnp.where(writes, fresh.entry, best.entry)
        tiled = jnp.where(paints, fresh.tiled, best.tiled)
        span = self._span(entry, tiled, shape)
        offset = jnp.where(moves[..., None], best.offset + step, best.offset)
        offset = jnp.where(tiled[..., None], offset % span, jnp.clip(offset, 0, span - 1))
        changed = Overlay(entry, tiled, offset, jnp.where(paints, fresh.colour, best.colour))
        keeps = (u[..., 6] < 0.5) & jnp.isfinite(state.loss)[:, None]
        highest = state.opacity[:, None]
        fainter = highest - (highest - state.faintest[:, None]) * u[..., 7] ** 2
        return _select(keeps, changed, fresh), jnp.where(found, fainter, highest)

    def _random(self, u: Float[Array, "*b n"], shape: tuple[int, ...]) -> Overlay:
        """An overlay from numbers uniform in [0, 1)."""
        bank, palette = self._texts(shape), self.palette(shape[2])
        entry = _whole(u[..., 0], len(bank))
        tiled = jnp.full_like(entry, self.layout == "grid", bool) if self.layout != "any" else u[..., 1] < 0.5
        offset = _whole(u[..., 2:4], self._span(entry, tiled, shape))
        return Overlay(entry, tiled, offset, _whole(u[..., 4], len(palette)))

    def _span(self, entry: Int[Array, "*b"], tiled: Bool[Array, "*b"], shape: tuple[int, ...]) -> Int[Array, "*b 2"]:
        """How many rows and columns the upper left corner of the text may have."""
        bank = self._texts(shape)
        single = jnp.asarray(shape[:2], jnp.int32) - bank.ink + 1
        return jnp.where(tiled[..., None], bank.period[entry], single[entry])

    def _overlaid(
        self, examples: Examples, overlays: Overlay, opacity: Float[Array, "b p"]
    ) -> Float[Array, "b p h w c"]:
        """The images under the overlays, on the support."""
        original, size = examples.images, examples.images.shape[1:3]
        bank = self._texts(original.shape[1:])
        palette = jnp.asarray(self.palette(original.shape[3]))
        whole = jnp.asarray(size, jnp.int32)

        def mask(entry, tiled, offset):
            return lettering.place(bank.tiles[entry], jnp.where(tiled, bank.period[entry], whole), offset)

        masks = jax.vmap(jax.vmap(mask))(overlays.entry, overlays.tiled, overlays.offset)
        every = jnp.broadcast_to(original[:, None], (*masks.shape, original.shape[3]))
        blended = lettering.blend(every, masks, opacity, palette[overlays.colour])
        return blended if examples.support is None else jnp.where(examples.support[:, None], blended, every)

    def _texts(self, shape: tuple[int, ...]) -> lettering.Bank:
        """The bank. Raises ValueError where there is none, or one for images of another shape [H,W,C]."""
        if self.bank is None:
            raise ValueError(
                "TransparentText.bank must hold the texts, got none; jaxinterp.typesetting.written(attack, height, "
                "width) gives them"
            )
        if self.bank.tiles.shape[1:] != tuple(shape[:2]):
            raise ValueError(
                f"TransparentText.bank must be for images of {shape[0]} x {shape[1]} pixels, got texts for "
                f"{self.bank.tiles.shape[1]} x {self.bank.tiles.shape[2]}"
            )
        return self.bank


def _uniform(keys: Array, numbers: Int[Array, "b p"]) -> Float[Array, "b p n"]:
    """Numbers uniform in [0, 1) for each of an example's numbered queries."""

    def draw(key, number):
        return jax.random.uniform(jax.random.fold_in(key, number), (_DRAWS,), jnp.float32)

    return jax.vmap(lambda key, each: jax.vmap(lambda number: draw(key, number))(each))(keys, numbers)


def _whole(u: Float[Array, "*b"], count: int | Int[Array, "*b"]) -> Int[Array, "*b"]:
    """A whole number from 0 to count - 1."""
    return jnp.minimum(jnp.floor(u * count).astype(jnp.int32), count - 1)


def _at(values: Array, chosen: Int[Array, " b"]) -> Array:
    """values[i, chosen[i]] for every example i."""
    index = chosen.reshape(-1, *[1] * (values.ndim - 1))
    return jnp.take_along_axis(values, index, axis=1)[:, 0]


def _select(condition: Bool[Array, "b p"], new: Overlay, old: Overlay) -> Overlay:
    """The overlay `new` where the condition holds, else `old`."""

    def choose(a, b):
        return jnp.where(condition.reshape(*condition.shape, *[1] * (b.ndim - 2)), a, b)

    return jax.tree.map(choose, new, old)
