"""Training: images a second of a step, in forward passes, and its memory; standard, adversarial and consistent."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxinterp.bench import forward
from jaxinterp.bench.formats import computing_in, network_in
from jaxinterp.bench.measure import Account, Found, Task, measure, program
from jaxinterp.bench.setting import Setting
from jaxinterp.training.consistent import consistent, standard
from jaxinterp.training.loop import begin, metrics_of, step_of


def bench(setting: Setting) -> Found:
    """Times steps of Adam on one batch, batch norm frozen.

    Raises:
        ValueError: a network without feature maps.
    """
    images, labels = setting.images(), jnp.asarray(setting.labels, jnp.int32)
    batch = (images, labels, jnp.arange(setting.batch, dtype=jnp.uint32), jnp.ones(setting.batch, jnp.float32))
    optimizer, key = optax.adam(1e-5), setting.key()
    tasks = []
    for form in setting.forms:
        network, params = network_in(form, setting.network, setting.params)
        tasks.append(forward.task(network.bind(params), images, form))
        losses = {
            "standard": standard(network),
            "adversarial": consistent(network, beta=0.0, eps=(0.0, 8 / 255)),
            "consistent": consistent(network, beta=1e-4, eps=(0.0, 8 / 255)),
        }
        for name, loss in losses.items():
            step = step_of(loss, optimizer)
            fresh = jax.tree.map(lambda x: jnp.array(x, copy=True), params)  # a step takes its state's memory
            state: dict[str, Any] = {"now": begin(fresh, optimizer, metrics_of(loss, params, batch, key))}

            def run(step=step, state=state, form=form):
                with computing_in(form):
                    state["now"] = step(state["now"], batch, key)
                return state["now"][3]

            def account(step=step, state=state, form=form):
                with computing_in(form):
                    spent, size = program(step, state["now"], batch, key)
                return Account(setting.batch, spent, None, size)

            tasks.append(Task(f"{name} {form}", run, account, "images", form, over=(f"forward {form}", 1.0)))
    return Found(measure(tasks, rounds=setting.rounds, peak=setting.peak))
