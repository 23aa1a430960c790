"""AdvEWM: watermarks that change a decision (Xiang et al. 2020, arXiv 2009.05107).

    x_0 = host,   x_r = JPEG(8 bits(x_{r-1} + E(w))),  r = 1..R    until the class of x_r is another one

w runs through pictures that lie in class folders, E(w) is what embedding it adds (see `embedding`). It sees decisions
only. The search is the released program's, with these differences. Its limit of failures in a folder counts an
eleventh picture, which is embedded and asked about but never taken; here it ends at the tenth. The class of the
watermark itself, of which nothing depends, is not asked for.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxinterp.attacks import embedding, objective
from jaxinterp.attacks.attack import AttackResult, Examples, Real, Record, along, per_example, select
from jaxinterp.attacks.embedding import Transform
from jaxinterp.attacks.search import judge_original
from jaxinterp.canonical import canonical
from jaxinterp.draws import shaped, wrapped
from jaxinterp.jpeg import recompress, to_levels, to_unit
from jaxinterp.pytree import pytree, static

_ROUNDS = {"haar": 2, "dct": 10}
_FOLDERS = 10  # of pictures of noise
_NOISE = 0.02**0.5  # its standard deviation: variance 0.02, as in the released program


@pytree
class WatermarkState:
    """Which candidates every example is trying.

    Attributes:
        examples: the problem.
        record: the adversarial image, of the earliest candidate that had success so far.
        images: the candidates being tried, after the rounds so far.
        order: the watermarks that the example tries, in their order.
        tried: how many candidates have failed before these.
        turn: rounds that these have had.
        place: which of these had success, the earliest one; their number where none had.
        strength: factor on the published strengths.
        quality: of the JPEG.
        kappa: confidence.
        keys: data of the examples' keys.
        done: examples that no further step changes.
    """

    examples: Examples
    record: Record
    images: Float[Array, "b n h w c"]
    order: Int[Array, "b t"]
    tried: Int[Array, " b"]
    turn: Int[Array, " b"]
    place: Int[Array, " b"]
    strength: Float[Array, " b"]
    quality: Float[Array, " b"]
    kappa: Float[Array, " b"]
    keys: UInt[Array, "b k"]
    done: Bool[Array, " b"]


@pytree
class Watermark:
    """Embeds one picture after the other until the decision is another one; forward passes only, and labels only.

    Folders come in random order, and so do the pictures of each. A picture is embedded up to `rounds` times, each time
    into what the last JPEG left. After `failures` pictures of a folder the next folder follows. The input itself is
    asked about first. Passes are the queries of this search, one after the other, and `iterations` is the number of
    the one that succeeded (0 is the input). Of `candidates` that are tried at once, those behind the first success are
    computed but not asked about: results do not depend on that number.

    Attributes:
        watermarks: [N,H,W,3] pictures of the images' size, in [0, 1], folder by folder. None means pictures of
            Gaussian noise, new ones for every example (the paper's baseline).
        strength: factor on the published strengths of the transform.
        quality: of the JPEG, from 1 to 100; the released program writes files of 75.
        kappa: confidence, the margin of logits that counts as success.
        transform: "haar" or "dct".
        signs: "published", or "random" for a control of equal norm: every component of what is added gets a random
            sign, drawn anew for every picture.
        jpeg: compress; without it there is only rounding to 8 bits.
        rounds: how often a picture is embedded, at most; None means 2 (Haar) or 10 (DCT).
        failures: pictures of a folder that are tried, at most.
        folders: how many of the pictures each folder has; () means that all are of one.
        candidates: pictures that are tried at once.
        shuffle: random orders; without it folders and pictures are taken as they come.
    """

    name: ClassVar[str] = "watermark"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"transform": ("haar", "dct"), "signs": ("published", "random")}
    ranges: ClassVar[dict[str, str]] = {"quality": "from 1 to 100"}
    shared: ClassVar[tuple[str, ...]] = ("watermarks",)

    watermarks: Float[Array, "n h w c"] | None = None
    strength: Real = 1.0
    quality: Real = 75.0
    kappa: Real = 0.0
    transform: Transform = static(default="haar")
    signs: Literal["published", "random"] = static(default="published")
    jpeg: bool = static(default=True)
    rounds: int | None = static(default=None)
    failures: int = static(default=10)
    folders: tuple[int, ...] = static(default=())
    candidates: int = static(default=1)
    shuffle: bool = static(default=True)

    @property
    def tries(self) -> int:
        """How many pictures are tried, at most."""
        return sum(min(size, self.failures) for size in self._sizes)

    @property
    def most_rounds(self) -> int:
        """How often each is embedded, at most."""
        return _ROUNDS[self.transform] if self.rounds is None else self.rounds

    @property
    def iterations(self) -> int:
        """In every step all candidates of the moment are embedded once."""
        return -(-self.tries // self.candidates) * self.most_rounds

    @property
    def _sizes(self) -> tuple[int, ...]:
        if self.folders:
            return self.folders
        return (self.failures,) * _FOLDERS if self.watermarks is None else (self.watermarks.shape[0],)

    def order(self, keys: Any) -> Int[Array, "b t"]:
        """The numbers of the watermarks that examples with these keys try, in their order."""
        return jax.vmap(self._order)(keys)

    @canonical
    def init(self, model, images, labels, targets, keys, support=None) -> WatermarkState:
        """The input is judged, which costs a forward pass.

        Raises:
            TypeError: watermarks that are not of floats.
            ValueError: images that are not RGB, or with a side that two does not divide (Haar); watermarks of another
                size; folders that do not add up to the watermarks, or one without pictures.
        """
        self._check(images)
        examples, batch = Examples(images, labels, targets, support), images.shape[0]
        kappa = per_example(self.kappa, images)
        record = judge_original(model, examples, kappa)
        zeros = jnp.zeros(batch, jnp.int32)
        return WatermarkState(
            examples=examples,
            record=record,
            images=jnp.repeat(images[:, None], self.candidates, axis=1),
            order=self.order(keys),
            tried=zeros,
            turn=zeros,
            place=zeros + self.candidates,
            strength=per_example(self.strength, images),
            quality=per_example(self.quality, images),
            kappa=kappa,
            keys=jax.random.key_data(keys),
            done=record.success,
        )

    @canonical
    def step(self, model, state: WatermarkState) -> WatermarkState:
        """All candidates of the moment, embedded once more and judged."""
        examples, active = state.examples, ~state.done
        places = jnp.arange(self.candidates, dtype=jnp.int32)
        numbers = state.tried[:, None] + places
        moved = self._embed(state, numbers)
        flat = moved.reshape(-1, *moved.shape[2:])
        labels, kappa = (jnp.repeat(x, self.candidates, axis=0) for x in (examples.labels, state.kappa))
        targets = None if examples.targets is None else jnp.repeat(examples.targets, self.candidates, axis=0)
        found = objective.succeeded(model(flat), labels, targets, kappa).reshape(numbers.shape)
        # Of the candidates at once, those behind one that had success would not have been tried.
        found = found & (places < state.place[:, None]) & (numbers < self.tries) & active[:, None]
        place = jnp.minimum(state.place, jnp.min(jnp.where(found, places, self.candidates), axis=1))
        turn, earlier = state.turn + 1, place < state.place
        ended = (turn >= self.most_rounds) | (place == 0)
        over = ended & (place == self.candidates)
        tried = state.tried + jnp.where(over, self.candidates, 0)

        # What the search, one query after the other, has asked when it comes to this success, or to this failure.
        rounds = self.most_rounds
        asked = jnp.where(
            earlier,
            1 + (state.tried + place) * rounds + turn,
            jnp.where(over, 1 + jnp.minimum(tried, self.tries) * rounds, state.record.forward),
        )
        best = jnp.take_along_axis(moved, jnp.minimum(place, self.candidates - 1)[:, None, None, None, None], axis=1)
        record = dataclasses.replace(
            state.record,
            best=select(earlier, best[:, 0], state.record.best),
            success=state.record.success | earlier,
            iterations=jnp.where(earlier, asked - 1, state.record.iterations),
            forward=asked,
        )
        moved_on = dataclasses.replace(
            state,
            record=record,
            images=select(over, jnp.broadcast_to(examples.images[:, None], moved.shape), moved),
            tried=tried,
            turn=jnp.where(over, 0, turn),
            place=place,
            done=(ended & (place < self.candidates)) | (over & (tried >= self.tries)),
        )
        return select(active, moved_on, state)

    @canonical
    def result(self, state: WatermarkState) -> AttackResult:
        """The first image of the search that succeeded."""
        return state.record.result(state.examples.images)

    def _embed(self, state: WatermarkState, numbers: Int[Array, "b n"]) -> Float[Array, "b n h w c"]:
        """The candidates with their watermarks once more, as the file of each is read."""
        numbers = jnp.minimum(numbers, self.tries - 1)
        shape, (height, width, channels) = numbers.shape, state.images.shape[2:]

        def draw(data, number, what):
            key = jax.random.fold_in(jax.random.fold_in(wrapped(data), what), number)
            return shaped(jax.random.uniform, key, (height, width, channels), jnp.float32, -1 + 2.0**-23)

        def drawn(what):
            return jax.vmap(jax.vmap(lambda data, number: draw(data, number, what), (None, 0)))(state.keys, numbers)

        if self.watermarks is None:
            pictures = jnp.clip(0.5 + jnp.clip(_NOISE * (2**0.5 * lax.erf_inv(drawn(0))), -1, 1), 0, 1)
        else:
            pictures = self.watermarks[jnp.take_along_axis(state.order, numbers, axis=1)]
        added = embedding.change(pictures, transform=self.transform)
        if self.signs == "random":
            added = jnp.where(drawn(1) < 0, -added, added)
        moved = state.images + along(state.strength, state.images) * added
        flat = moved.reshape(-1, height, width, channels)
        flat = recompress(flat, jnp.repeat(state.quality, shape[1])) if self.jpeg else to_unit(to_levels(flat))
        moved = flat.reshape(moved.shape)
        support = state.examples.support
        return moved if support is None else jnp.where(support[:, None], moved, state.examples.images[:, None])

    def _order(self, key: Any) -> Int[Array, " t"]:
        """Of one example. Folders and pictures get a random place; of each folder the first `failures` stay."""
        sizes = self._sizes
        starts = np.cumsum((0, *sizes[:-1]))
        folder = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        kept = np.concatenate([s + np.arange(min(n, self.failures)) for s, n in zip(starts, sizes, strict=True)])
        numbers = jnp.arange(len(folder), dtype=jnp.int32)
        if not self.shuffle:
            return numbers[kept]
        of_folders, of_pictures = (jax.random.fold_in(key, i) for i in range(2))
        places = jax.random.uniform(of_pictures, (len(folder),), jnp.float32)
        numbers = lax.sort((jnp.asarray(folder), places, numbers), num_keys=2)[2][kept]
        return lax.sort(
            (jax.random.uniform(of_folders, (len(sizes),), jnp.float32)[folder[kept]], numbers), num_keys=1
        )[1]

    def _check(self, images: Array) -> None:
        if images.shape[-1] != 3:
            raise ValueError(f"images must be RGB [B,H,W,3] for a watermark, got shape {images.shape}")
        sizes = self.folders
        if self.watermarks is not None:
            if self.watermarks.ndim != 4 or self.watermarks.shape[1:] != images.shape[1:]:
                raise ValueError(
                    f"Watermark.watermarks must be [N,H,W,C] of the images' size {images.shape[1:]}, got shape "
                    f"{self.watermarks.shape}; resize them first"
                )
            if not self.watermarks.shape[0]:
                raise ValueError("Watermark.watermarks must hold at least one picture, got none")
            if not jnp.issubdtype(self.watermarks.dtype, jnp.floating):
                raise TypeError(
                    f"Watermark.watermarks must be of floats in [0, 1], got {self.watermarks.dtype}; divide pixels of "
                    "8 bits by 255"
                )
            if sizes and sum(sizes) != self.watermarks.shape[0]:
                raise ValueError(
                    f"Watermark.folders must add up to the {self.watermarks.shape[0]} watermarks, got {sizes}"
                )
        if any(size < 1 for size in sizes):
            raise ValueError(f"Watermark.folders must each have at least one picture, got {sizes}")
        if self.transform == "haar":
            embedding.check_even(images.shape)
