"""Class activation maps: images a second for every method, in forward passes, and what formats change in maps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp import cam
from jaxinterp.bench import formats, forward
from jaxinterp.bench.attacks import peer_form
from jaxinterp.bench.formats import computing_in, network_in
from jaxinterp.bench.measure import Account, Found, Task, measure, program
from jaxinterp.bench.setting import Setting
from jaxinterp.bench.sweep import Trial

QUICK = tuple(method for method in cam.METHODS if method not in ("scorecam", "ablationcam"))
"""Methods that do not take a pass for every unit."""


def bench(
    setting: Setting,
    methods: tuple[str, ...] = (),
    *,
    peers: Mapping[str, Callable[[], Any]] | None = None,
) -> Found:
    """Times maps of the network's own predictions.

    Args:
        setting: what is run.
        methods: some of `jaxinterp.cam.METHODS`; none means `QUICK`, without "cam" where the network has none.
        peers: Grad-CAM of other libraries, by name, on the same images and weights; compared with ours.

    Raises:
        ValueError: an unknown method, or one that the network does not have.
    """
    methods = methods or tuple(m for m in QUICK if m != "cam" or setting.network.cam_node is not None)
    if peers and "gradcam" not in methods:
        methods = (*methods, "gradcam")
    for method in methods:
        cam.check_method(setting.network, method)
    images, labels = setting.images(), setting.labels
    tasks, results = [], {}
    for form in setting.forms:
        network, params = network_in(form, setting.network, setting.params)
        model = network.bind(params)
        tasks.append(forward.task(model, images, form))
        for method in methods:

            def run(network=network, params=params, form=form, method=method):
                with computing_in(form):
                    results[method, form] = cam.maps(network, params, images, labels, method)
                return results[method, form]

            def account(network=network, params=params, form=form, method=method):
                def whole(params, images, labels):
                    return cam.maps(network, params, images, labels, method)

                with computing_in(form):
                    spent, size = program(jax.jit(whole), params, images, labels)
                return Account(setting.batch, spent, None, size)

            tasks.append(Task(f"{method} {form}", run, account, "images", form, over=(f"forward {form}", 1.0)))
    if peers:
        form = peer_form(setting)
        ours = f"gradcam {form}"
        if form not in setting.forms:

            def as_peers():
                with computing_in(form):
                    return cam.maps(setting.network, setting.params, images, labels, "gradcam")

            tasks.append(Task(ours, as_peers, lambda: Account(setting.batch), "images", form))
        for name, peer in peers.items():
            tasks.append(Task(name, peer, lambda: Account(setting.batch), "images", form, over=(ours, 1.0)))
    found = Found(measure(tasks, rounds=setting.rounds, peak=setting.peak))
    first, *others = setting.forms
    for form in others:
        found.changes[form] = {"than": first}
        for method in methods:
            here, there = (np.asarray(results[method, f].astype(jnp.float32)) for f in (form, first))
            flat = here.reshape(len(here), -1), there.reshape(len(there), -1)
            found.changes[form][method] = {
                "largest difference over largest": formats.difference(here, there),
                "highest positions that agree": formats.agreement(flat[0].argmax(1), flat[1].argmax(1)),
            }
    found.swept, found.trial = methods[0], functools.partial(_trial, setting, methods[0])
    return found


def _trial(setting: Setting, method: str, batch: int) -> Trial:
    form = setting.forms[0]
    network, params = network_in(form, setting.network, setting.params)
    labels = setting.labels_of(batch)
    _, *shape = setting.images(1).shape

    def whole(params, images, labels):
        return cam.maps(network, params, images, labels, method)

    with computing_in(form):
        _, size = program(jax.jit(whole), params, jax.ShapeDtypeStruct((batch, *shape), jnp.float32), labels)

    images = functools.cache(lambda: setting.images(batch))  # made when it is clear that they fit

    def run():
        with computing_in(form):
            return whole(params, images(), labels)

    return Trial(size, run, batch)
