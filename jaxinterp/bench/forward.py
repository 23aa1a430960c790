"""The forward pass as a task of its own, in which the time of others is expressed."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float

from jaxinterp.bench.formats import computing_in
from jaxinterp.bench.measure import Account, Task, as_written, program
from jaxinterp.canonical import canonical
from jaxinterp.network import Model


def logits(model: Model, images: Any) -> Float[Array, "b k"]:
    """The forward pass as it is written."""
    return model(images)


jitted = jax.jit(canonical(logits))


def task(model: Model, images: Float[Array, "b h w c"], form: str) -> Task:
    """A forward pass of the batch, named "forward FORM"."""

    def run():
        with computing_in(form):
            return jitted(model, images)

    def account():
        with computing_in(form):
            spent, size = program(jitted, model, images)
            return Account(len(images), spent, as_written(logits, model, images), size)

    return Task(f"forward {form}", run, account, "images", form)
