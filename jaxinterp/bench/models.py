"""Networks: forward pass and input gradient, as this library runs them and as they are written."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp.bench import formats
from jaxinterp.bench.attacks import by_image, gradient
from jaxinterp.bench.formats import computing_in, network_in
from jaxinterp.bench.measure import Account, Found, Task, as_written, measure, program
from jaxinterp.bench.setting import Setting
from jaxinterp.bench.sweep import Trial
from jaxinterp.canonical import canonical
from jaxinterp.network import Model


def _logits(model: Model, images: Any, labels: Any) -> jax.Array:
    return model(images)


_WRITTEN = {"forward": _logits, "gradient": by_image}
_PROGRAMS = {"forward": jax.jit(canonical(_logits)), "gradient": gradient}
_PLAIN = {what: jax.jit(function) for what, function in _WRITTEN.items()}


def bench(setting: Setting) -> Found:
    """Times a network.

    Args:
        setting: what is run.
    """
    images, labels = setting.images(), setting.labels
    tasks, results = [], {}
    for form in setting.forms:
        network, params = network_in(form, setting.network, setting.params)
        model = network.bind(params)
        for what, written in _WRITTEN.items():
            kinds = {"": _PROGRAMS[what]}
            if form == setting.forms[0] and jax.default_backend() == "cpu":  # elsewhere the two are one program
                kinds[", as written"] = _PLAIN[what]
            for kind, function in kinds.items():

                def run(function=function, model=model, form=form, key=(what + kind, form)):
                    with computing_in(form):
                        results[key] = function(model, images, labels)
                    return results[key]

                def account(function=function, written=written, model=model, form=form):
                    with computing_in(form):
                        spent, size = program(function, model, images, labels)
                        return Account(setting.batch, spent, as_written(written, model, images, labels), size)

                tasks.append(Task(f"{what}{kind} {form}", run, account, "images", form))
    found = Found(measure(tasks, rounds=setting.rounds, peak=setting.peak))
    first, *others = setting.forms
    for form in others:
        logits, reference = results["forward", form], results["forward", first]
        gradients = results["gradient", form], results["gradient", first]
        found.changes[form] = {
            "than": first,
            "same bits": all(bool(np.array_equal(a, b)) for a, b in ((logits, reference), gradients)),
            "logits, largest difference over largest": formats.difference(logits, reference),
            "predictions that agree": formats.agreement(jnp.argmax(logits, -1), jnp.argmax(reference, -1)),
            "gradient signs that agree": formats.sign_agreement(*gradients),
        }
    found.swept, found.trial = "gradient", functools.partial(_trial, setting)
    return found


def _trial(setting: Setting, batch: int) -> Trial:
    form = setting.forms[0]
    network, params = network_in(form, setting.network, setting.params)
    model, labels = network.bind(params), setting.labels_of(batch)
    _, *shape = setting.images(1).shape
    with computing_in(form):
        _, size = program(gradient, model, jax.ShapeDtypeStruct((batch, *shape), jnp.float32), labels)

    images = functools.cache(lambda: setting.images(batch))  # made when it is clear that they fit

    def run():
        with computing_in(form):
            return gradient(model, images(), labels)

    return Trial(size, run, batch)
