"""What a benchmark runs on: a network, its weights, images, and how thoroughly it is measured."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp import models
from jaxinterp.bench import device, formats
from jaxinterp.bench.device import Peak
from jaxinterp.network import Network, Params, identity
from jaxinterp.weights import checkpoint, load, seeded

WEIGHTS = ("auto", "converted", "seeded")


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """A network with images that it classifies as `labels`, and how it is measured.

    Attributes:
        network: the network.
        params: its parameters, in float32.
        weights: where they come from: "converted", or "seeded" (made by rule; times do not depend on them, what
            attacks achieve does).
        batch: images in a batch.
        rounds: how often everything is timed.
        forms: see `jaxinterp.bench.formats`; results are compared with those of the first.
        seed: of attacks' randomness.
    """

    network: Network
    params: Params
    weights: str
    batch: int
    rounds: int
    forms: tuple[str, ...]
    seed: int = 0

    def images(self, count: int | None = None) -> jax.Array:
        """Images by rule [count,H,W,C]; the batch by default. The first ones are the same for any count."""
        channels = models.ARCHITECTURES[self.network.name].channels
        count = self.batch if count is None else count
        some = seeded.images(min(count, _KINDS), self.network.image_size, channels)
        return jnp.asarray(np.concatenate([some] * -(-count // len(some)))[:count])

    @functools.cached_property
    def labels(self) -> jax.Array:
        """[B] what the network sees in the batch."""
        return jnp.argmax(
            jax.jit(lambda params, x: self.network.apply(params, x, identity))(self.params, self.images()), -1
        )

    def labels_of(self, count: int) -> jax.Array:
        """[count] classes for images that are only timed."""
        return jnp.resize(self.labels, (count,))

    def peak(self, form: str) -> Peak:
        """Of the default device in a format, measured once where it is not published."""
        return _peak(form)

    def key(self) -> jax.Array:
        """The random key of attacks."""
        return jax.random.key(self.seed)

    def record(self) -> dict[str, Any]:
        """For a record: the setting, the devices and their limits."""
        first = jax.devices()[0]
        return {
            "network": self.network.name,
            "weights": self.weights,
            "size": self.network.image_size,
            "batch": self.batch,
            "rounds": self.rounds,
            "formats": list(self.forms),
            "matmul_precision": {form: formats.PRECISIONS[form] for form in self.forms},
            "seed": self.seed,
            "device": first.device_kind,
            "devices": jax.local_device_count(),
            "peaks": {form: dataclasses.asdict(self.peak(form)) for form in self.forms},
        }


_KINDS = 512  # different images: more would only take time to make

_peak = functools.cache(device.peak)


def prepare(
    model: str, *, weights: str, size: int | None, batch: int, rounds: int, forms: tuple[str, ...], seed: int
) -> Setting:
    """Looks at the arguments, loads or makes the weights.

    Args:
        model: name of a network.
        weights: "converted", "seeded", or "auto": converted ones where there are any.
        size: side of the images in pixels; None is the network's own.
        batch: images in a batch.
        rounds: how often everything is timed.
        forms: formats.
        seed: of attacks' randomness.

    Raises:
        ValueError: an unknown network or format, a number below 1, no converted weights, a size that the network
            cannot take.
    """
    for name, value in (("--batch", batch), ("--rounds", rounds), ("--size", 1 if size is None else size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be from 0 to {2**32 - 1}, got {seed}")
    formats.check(forms)
    network = models.network(model)
    found = weights
    if weights == "auto":
        there = (checkpoint.default_root() / model / "manifest.json").is_file()
        found = "converted" if there else "seeded"
    if found == "converted":
        network, params = load(model)
    else:
        params = jax.tree.map(jnp.asarray, seeded.params(models.shapes(model)))
    if size is not None:
        network = dataclasses.replace(network, image_size=size)
    side, channels = network.image_size, models.ARCHITECTURES[model].channels
    shape = jax.ShapeDtypeStruct((batch, side, side, channels), jnp.float32)
    try:
        jax.eval_shape(lambda params, x: network.apply(params, x, identity), params, shape)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{model} cannot take images of {side} x {side} pixels: {error}") from error
    return Setting(network, params, found, batch, rounds, tuple(forms), seed)
