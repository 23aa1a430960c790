"""Gradient transformations that make attacks transfer to other networks, chained as in optax.

A transformation answers a query for a gradient by asking the next one in the chain, once or several times, at other
images or behind a transformation of the input; the last one is the network. The gradient is always with respect to
the image at which it is asked for, so that the order matters only to what is drawn at random: behind a
transformation that asks several times, each time is drawn anew.

Papers write chains in all orders; theirs is `vmi + ni + ti + si + di`, the first of which asks all others.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxinterp.attacks import objective
from jaxinterp.attacks.attack import Real, along, per_example
from jaxinterp.draws import shaped
from jaxinterp.network import Model
from jaxinterp.pytree import pytree, static

_EXACT = lax.Precision.HIGHEST  # accelerators round the factors of matrix products unless they are told not to

Memory = dict[str, Array]  # by name of the transformation, with the example as first axis


@dataclasses.dataclass(frozen=True)
class Query:
    """Where the gradient is asked for.

    Attributes:
        images: [B,H,W,C].
        through: what happens to the images before the network sees them; its derivative is part of the gradient.
        keys: one for every example.
        eps: [B], radius of the attack's ball in Linf.
        ahead: [B,H,W,C], the step that the momentum alone would make.
    """

    images: Array
    through: Callable[[Array], Array]
    keys: Array
    eps: Array
    ahead: Array

    def then(self, function: Callable[[Array], Array]) -> Query:
        """With `function` behind what happens to the images already."""
        return dataclasses.replace(self, through=lambda images: function(self.through(images)))

    def numbered(self, number: int | Array) -> Query:
        """With other keys."""
        return dataclasses.replace(self, keys=jax.vmap(lambda key: jax.random.fold_in(key, number))(self.keys))


# Logits [B,K] of the first images that were asked about, the gradient [B,H,W,C], and the memory.
Answer = tuple[Array, Array, Memory]
Ask = Callable[[Query, Memory], Answer]


@runtime_checkable
class Transform(Protocol):
    """A frozen dataclass registered as a pytree; real parameters are leaves, those that give counts are static.

    Attributes:
        name: how command lines call it; also the key of its part of the memory.
        elsewhere: whether the network sees other images than those asked about, also the first time.
    """

    name: ClassVar[str]
    elsewhere: ClassVar[bool]

    @property
    def gradients(self) -> int:
        """How many gradients one call asks of the next in the chain."""
        ...

    def init(self, images: Float[Array, "b h w c"]) -> Memory:
        """What it remembers at the start, under its name; empty where it remembers nothing."""
        ...

    def update(self, ask: Ask, query: Query, memory: Memory) -> Answer:
        """The transformed gradient, from what `ask` answers."""
        ...


def check(transforms: Sequence[Transform]) -> None:
    """Whether a chain makes sense.

    Raises:
        ValueError: a transformation stands in it twice, or one that remembers is behind one that asks several times.
    """
    names = [each.name for each in transforms]
    if len(set(names)) != len(names):
        raise ValueError(f"transforms must differ, got {'+'.join(names)}")
    for i, each in enumerate(transforms):
        if isinstance(each, VarianceTuning) and gradients(transforms[:i]) > 1:
            raise ValueError(f"{each.name} must come before what asks for several gradients, got {'+'.join(names)}")


def gradients(transforms: Sequence[Transform]) -> int:
    """How many gradients of the network one gradient of the chain costs."""
    return math.prod(each.gradients for each in transforms)


def elsewhere(transforms: Sequence[Transform]) -> bool:
    """Whether the logits that a chain answers belong to other images than those asked about."""
    return any(each.elsewhere for each in transforms)


def init(transforms: Sequence[Transform], images: Float[Array, "b h w c"]) -> Memory:
    """The memory of a chain at its start."""
    return {name: value for each in transforms for name, value in each.init(images).items()}


def update(
    transforms: Sequence[Transform],
    model: Model,
    loss: Callable[[Array], Float[Array, " b"]],
    query: Query,
    memory: Memory,
) -> Answer:
    """Logits, gradient and memory as the chain answers them; the first of `transforms` is asked first."""

    def network(query, memory):
        logits, _, gradient = objective.value_and_gradient(lambda x: model(query.through(x)), query.images, loss)
        return logits, gradient, memory

    ask: Ask = network
    for each in reversed(transforms):
        ask = functools.partial(each.update, ask)
    return ask(query, memory)


class _Forgetful:
    def init(self, images: Float[Array, "b h w c"]) -> Memory:
        """Nothing to remember."""
        return {}


@pytree
class Nesterov(_Forgetful):
    """The gradient where the momentum alone would lead (NI, Lin et al. 2020, arXiv 1908.06281, section 3.2)."""

    name: ClassVar[str] = "ni"
    elsewhere: ClassVar[bool] = True
    gradients: ClassVar[int] = 1

    def update(self, ask: Ask, query: Query, memory: Memory) -> Answer:
        """The gradient at x + a mu g."""
        return ask(dataclasses.replace(query, images=query.images + query.ahead), memory)


@pytree
class ScaleInvariant(_Forgetful):
    """The mean gradient over copies of the image at falling brightness (SI, the same paper, section 3.3).

    Attributes:
        copies: number m of copies x / 2^i, i = 0 ... m-1.
    """

    name: ClassVar[str] = "si"
    elsewhere: ClassVar[bool] = False

    copies: int = static(default=5)

    @property
    def gradients(self) -> int:
        """One for each copy."""
        return self.copies

    def update(self, ask: Ask, query: Query, memory: Memory) -> Answer:
        """1/m sum_i grad L(x / 2^i)."""

        def scaled(i):
            return query.numbered(i).then(lambda x: x * jnp.ldexp(jnp.float32(1), -i))

        logits, first, others, memory = _several(ask, scaled, self.copies, memory)
        return logits, (first + others) / self.copies, memory


@pytree
class DiverseInputs(_Forgetful):
    """The gradient behind a random change of size and place (DI, Xie et al. 2019, arXiv 1803.06978, section 3.3).

    The image is shrunk by nearest neighbours and put at a random place on black. The authors enlarge 299 to up to 330
    pixels; here the size that the network sees stays, in the same proportion.

    Attributes:
        probability: how often the input is changed at all, from 0 to 1.
        smallest: the smallest side, as a part of the image's, from 0 to 1.
    """

    name: ClassVar[str] = "di"
    ranges: ClassVar[dict[str, str]] = {"probability": "from 0 to 1", "smallest": "from 0 to 1"}
    elsewhere: ClassVar[bool] = True
    gradients: ClassVar[int] = 1

    probability: Real = 0.5
    smallest: Real = 0.9

    def update(self, ask: Ask, query: Query, memory: Memory) -> Answer:
        """The gradient of L(T(x)), by the chain rule through T."""
        _, height, width, _ = query.images.shape
        drawn = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0), (4,), jnp.float32))(query.keys)
        changed = drawn[:, 0] < per_example(self.probability, query.images)
        smallest = per_example(self.smallest, query.images)
        rows, columns = (
            _shrunk(size, jnp.where(changed, smallest, 1), drawn[:, 1], place)
            for size, place in ((height, drawn[:, 2]), (width, drawn[:, 3]))
        )

        def moved(x):
            return jnp.einsum("bih,bhwc,bjw->bijc", rows, x, columns, precision=_EXACT)

        return ask(query.numbered(1).then(moved), memory)


@pytree
class TranslationInvariant(_Forgetful):
    """The gradient smoothed by a Gaussian, in place of a mean over shifted images (TI, arXiv 1904.02884, section 3.3).

    Of Dong et al. (2019), whose kernel of 15 x 15 pixels with standard deviation 7/3 is the default.

    Attributes:
        sigma: standard deviation in pixels.
        reach: the kernel has 2 reach + 1 pixels a side.
    """

    name: ClassVar[str] = "ti"
    elsewhere: ClassVar[bool] = False
    gradients: ClassVar[int] = 1

    sigma: Real = 7 / 3
    reach: int = static(default=7)

    def update(self, ask: Ask, query: Query, memory: Memory) -> Answer:
        """W * grad L(x), with zeros beyond the border."""
        logits, gradient, memory = ask(query, memory)
        _, height, width, _ = gradient.shape
        sigma = per_example(self.sigma, gradient)
        rows, columns = _gaussian(height, sigma, self.reach), _gaussian(width, sigma, self.reach)
        return logits, jnp.einsum("bih,bhwc,bjw->bijc", rows, gradient, columns, precision=_EXACT), memory


@pytree
class VarianceTuning:
    """The gradient corrected by how it varied around the last iterate (VMI, Wang and He 2021, arXiv 2103.15571).

    In a chain it stands before those that ask for several gradients.

    Attributes:
        beta: half the side of the neighbourhood, in units of eps.
        samples: number N of neighbours.
    """

    name: ClassVar[str] = "vmi"
    elsewhere: ClassVar[bool] = False

    beta: Real = 1.5
    samples: int = static(default=20)

    @property
    def gradients(self) -> int:
        """One at the iterate and one at each neighbour."""
        return 1 + self.samples

    def init(self, images: Float[Array, "b h w c"]) -> Memory:
        """No variance."""
        return {self.name: jnp.zeros_like(images)}

    def update(self, ask: Ask, query: Query, memory: Memory) -> Answer:
        """Answers grad L(x) + v; then v = 1/N sum_i grad L(x + r_i) - grad L(x), r_i uniform in the neighbourhood."""
        radius = along(per_example(self.beta, query.images) * query.eps, query.images)
        shape = query.images.shape[1:]

        def neighbour(i):
            asked = query.numbered(i)
            keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(asked.keys)
            r = jax.vmap(lambda key: shaped(jax.random.uniform, key, shape, jnp.float32, -1.0))(keys)
            images = query.images + jnp.where(i == 0, 0, radius * r)
            return dataclasses.replace(asked.numbered(1), images=images)

        logits, gradient, others, after = _several(ask, neighbour, 1 + self.samples, memory)
        variance = others / self.samples - gradient
        return logits, gradient + memory[self.name], {**after, self.name: variance}


TRANSFORMS: Mapping[str, type] = {
    each.name: each for each in (Nesterov, ScaleInvariant, DiverseInputs, TranslationInvariant, VarianceTuning)
}


def _several(ask: Ask, query: Callable[[Array], Query], count: int, memory: Memory):
    """Answers to query(0) ... query(count - 1): the first one's logits and gradient, the sum of the other gradients."""

    def body(i, carry):
        logits, first, others, memory = carry
        new_logits, gradient, memory = ask(query(i), memory)
        return (
            jnp.where(i == 0, new_logits, logits),
            jnp.where(i == 0, gradient, first),
            others + jnp.where(i == 0, 0, gradient),
            memory,
        )

    shapes = jax.eval_shape(lambda: ask(query(jnp.int32(0)), memory))
    logits, gradient = (jnp.zeros(each.shape, each.dtype) for each in shapes[:2])
    return lax.fori_loop(0, count, body, (logits, gradient, gradient, memory))


def _shrunk(size: int, smallest: Array, scale: Array, place: Array) -> Float[Array, "b i h"]:
    """One axis of an image, shrunk and moved: a row for every new pixel, with a one at the pixel it shows.

    `scale` and `place` are uniform in [0, 1): which of the sides from `smallest` to all of the axis, which offset.
    """
    low = jnp.ceil(smallest * size)
    side = jnp.clip(jnp.floor(low + scale * (size + 1 - low)), 1, size)[:, None]
    offset = jnp.floor(place[:, None] * (size - side + 1))
    position = jnp.arange(size) - offset
    shows = jnp.floor((position + 0.5) * size / side)
    inside = (position >= 0) & (position < side)
    return ((shows[:, :, None] == jnp.arange(size)) & inside[:, :, None]).astype(jnp.float32)


def _gaussian(size: int, sigma: Array, reach: int) -> Float[Array, "b i h"]:
    """Convolution of one axis with a Gaussian, as a matrix. Beyond the border are zeros."""

    def kernel(distance):
        return jnp.exp(-jnp.square(distance / jnp.maximum(along(sigma, distance), 1e-6)) / 2)

    apart = jnp.abs(jnp.arange(size)[:, None] - jnp.arange(size)).astype(jnp.float32)[None]
    total = jnp.sum(kernel(jnp.arange(-reach, reach + 1, dtype=jnp.float32)[None, :, None]), axis=(1, 2))
    return jnp.where(apart <= reach, kernel(apart), 0) / along(total, apart)
