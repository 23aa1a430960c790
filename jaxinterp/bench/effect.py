"""Effects of cells: forward passes a second, with whole passes and with windows, and what formats change in kinds."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp import effect
from jaxinterp.bench import formats, forward
from jaxinterp.bench.formats import computing_in, network_in
from jaxinterp.bench.measure import Account, Found, Task, as_written, measure, program
from jaxinterp.bench.setting import Setting
from jaxinterp.bench.sweep import Trial

_KINDS = [kind.label for kind in list(effect.Kind)[1:]]


def grid(setting: Setting, cell: effect.Cell | None) -> tuple[effect.Cell, int]:
    """The size of a cell, and how many cells an image has. Arguments and errors are those of `bench`."""
    side = setting.network.image_size
    cell = -(-side // 14) if cell is None else cell
    return cell, math.prod(effect.grid(side, side, cell))


def bench(setting: Setting, cell: effect.Cell | None = None) -> Found:
    """Times the effects of all cells of a batch.

    The perturbation is noise, and every cell has some.

    Args:
        setting: what is run.
        cell: side of a cell in pixels, or its height and width; None: a fourteenth of the image's, rounded up.

    Raises:
        ValueError: a cell beyond the image.
    """
    cell, cells = grid(setting, cell)
    clean, labels = setting.images(), setting.labels
    adversarial, targets = _perturbed(setting, clean), _others(setting, labels)
    passes = setting.batch * (cells + 1)
    tasks, results = [], {}
    for form in setting.forms:
        network, params = network_in(form, setting.network, setting.params)
        model = network.bind(params)
        tasks.append(forward.task(model, clean, form))
        for way, windows in (("whole passes", False), ("windows", True)):

            def run(model=model, form=form, way=way, windows=windows):
                with computing_in(form):
                    results[way, form] = effect.pse(
                        model, clean, adversarial, labels, targets, cell, windows=windows, method="leave_one_out"
                    )
                return results[way, form]

            def account(model=model, form=form):
                with computing_in(form):
                    bare = as_written(forward.logits, model, clean)
                return Account(passes, None, None if bare is None else bare.times(passes / setting.batch))

            over = (f"forward {form}", passes / setting.batch)
            tasks.append(Task(f"effects, {way} {form}", run, account, "passes", form, over=over))
    found = Found(measure(tasks, rounds=setting.rounds, peak=setting.peak))
    found.more = {"cell": cell, "cells": cells}
    first = setting.forms[0]
    reference = results["whole passes", first]
    agreed = formats.agreement(results["windows", first].kind, reference.kind)
    found.notes.append(f"windows and whole passes give {agreed:.2%} of the cells the same kind")
    for form in setting.forms[1:]:
        here = results["whole passes", form]
        found.changes[form] = {
            "than": first,
            "same bits": bool(np.array_equal(here.label_change, reference.label_change)),
            "kinds of cells that agree": formats.agreement(here.kind, reference.kind),
            "shares of kinds": _shares(here),
            f"shares of kinds in {first}": _shares(reference),
        }
    found.swept, found.trial = f"effects of {cells} cells", functools.partial(_trial, setting, cell)
    return found


def _perturbed(setting: Setting, clean: jax.Array) -> jax.Array:
    noise = 0.05 * np.random.default_rng(setting.seed).normal(size=clean.shape)
    return jnp.clip(clean + noise.astype(np.float32), 0, 1)


def _others(setting: Setting, labels: jax.Array) -> jax.Array:
    return (labels + 1) % setting.network.num_classes


def _trial(setting: Setting, cell: effect.Cell, batch: int) -> Trial:
    form = setting.forms[0]
    network, params = network_in(form, setting.network, setting.params)
    model, labels = network.bind(params), setting.labels_of(batch)
    targets = _others(setting, labels)
    _, *shape = setting.images(1).shape
    pictures = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)

    def whole(model, clean, adversarial, labels, targets):
        return effect.pse(model, clean, adversarial, labels, targets, cell)

    with computing_in(form):
        _, size = program(jax.jit(whole), model, pictures, pictures, labels, targets)

    @functools.cache  # made when it is clear that they fit
    def pair():
        clean = setting.images(batch)
        return clean, _perturbed(setting, clean)

    def run():
        with computing_in(form):
            return whole(model, *pair(), labels, targets)

    return Trial(size, run, batch)


def _shares(found: effect.Effect) -> dict[str, float]:
    """Of the cells of all images that have an effect."""
    counts = [int(np.sum(np.asarray(found.kind) == kind)) for kind in list(effect.Kind)[1:]]
    return {kind: count / max(1, sum(counts)) for kind, count in zip(_KINDS, counts, strict=True)}
