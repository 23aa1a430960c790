"""From one device to all of them: the same batch spread ever thinner (strong), the same share for each (weak).

Attacks loop on every device over its own examples, so that the loops' program exchanges nothing: the number of
collective operations in it is counted, and those inside loops by themselves.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from jaxinterp import attacks, parallel
from jaxinterp.attacks.attack import Attack, AttackResult
from jaxinterp.bench.attacks import choose, costs_of_step, iterations, steps_taken
from jaxinterp.bench.cost import collectives, cost, program_bytes
from jaxinterp.bench.formats import computing_in, network_in
from jaxinterp.bench.measure import Account, Found, Task, measure
from jaxinterp.bench.setting import Setting


def numbers(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    powers = [2**i for i in range(most.bit_length()) if 2**i < most]
    return [*powers, most]


def check(most: int | None) -> int:
    """The largest number of devices. Arguments and errors are those of `bench`."""
    there = jax.local_device_count()
    if most is not None and not 1 <= most <= there:
        raise ValueError(f"--devices: there are {there}, got {most}")
    return there if most is None else most


def bench(setting: Setting, specs: tuple[str, ...] = (), most: int | None = None) -> Found:
    """Times one attack on 1 to all local devices.

    Args:
        setting: what is run; the strong table's batch is `setting.batch`, rounded up to a multiple of the devices,
            and the weak table gives every device its share of that.
        specs: attacks as text; the first counts, by default the first of `jaxinterp.bench.attacks.DEFAULT`.
        most: how many devices at most; None means all.

    Raises:
        ValueError: more devices than there are, an unknown attack.
    """
    devices, most = jax.local_devices(), check(most)
    name, attack = next(iter(choose(specs).items()))
    unit = math.lcm(*numbers(most))  # so that every number of devices divides the same batch
    whole = -(-setting.batch // unit) * unit
    tasks: list[Task] = []
    notes: list[str] = []
    if whole != setting.batch:
        notes.append(f"the batch is {whole}, a multiple of {', '.join(map(str, numbers(most)))} devices")
    for number in numbers(most):
        mesh = None
        if number > 1:
            mesh = jax.make_mesh((number,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:number])
        for kind, batch in (("strong", whole), ("weak", whole // most * number)):
            tasks.append(_task(setting, attack, kind, number, batch, mesh))
    found = Found(measure(tasks, rounds=setting.rounds, peak=setting.peak), notes=notes)
    for row in found.rows:
        alone = next(r for r in found.rows if r["kind"] == row["kind"] and r["devices"] == 1)
        row["speedup"] = row["per_second"] / alone["per_second"]
        row["efficiency"] = row["speedup"] / row["devices"]
    found.more["attack"] = name
    return found


def _task(setting: Setting, attack: Attack, kind: str, number: int, batch: int, mesh: Mesh | None) -> Task:
    form = setting.forms[0]
    network, params = network_in(form, setting.network, setting.params)
    model = network.bind(parallel.replicate(params, mesh))
    images, labels = parallel.shard((setting.images(batch), setting.labels_of(batch)), mesh)
    latest: dict[str, AttackResult] = {}

    def run() -> Any:
        with computing_in(form):
            latest["result"] = attacks.run(attack, model, images, labels, key=setting.key())
        return latest["result"]

    more: dict[str, Any] = {"kind": kind, "batch": batch}

    def account() -> Account:
        steps = steps_taken(latest["result"])
        with computing_in(form):
            state = attacks.start(attack, model, images, labels, key=setting.key())
            compiled = attacks.lowered(attack, model, state).compile()
            alone = network.bind(params)
            rows = setting.images(batch // number), setting.labels_of(batch // number)
            share, _ = costs_of_step(alone, *rows, latest["result"])
        talk = collectives(compiled.as_text() or "")
        more.update({"collectives": talk.total, "collectives in loops": talk.in_loops})
        spent = cost(compiled)  # of one device's share
        runs = number * iterations(steps / batch, spent, share)
        return Account(steps, None if spent is None else spent.times(runs), None, program_bytes(compiled))

    return Task(f"{kind}, {number} x {batch // number}", run, account, "image steps", form, number, more=more)


def lines(found: Found) -> list[str]:
    """The table as text."""
    head = f"{'':8}{'devices':>8}{'batch':>8}{'ms':>10}{'a second':>12}{'speed-up':>10}{'efficiency':>12}"
    text = [f"{head}{'collectives':>13}{'in loops':>10}"]
    for row in sorted(found.rows, key=lambda row: (row["kind"], row["devices"])):
        text.append(
            f"{row['kind']:8}{row['devices']:8}{row['batch']:8}{row['seconds']['median'] * 1e3:10.1f}"
            f"{row['per_second']:12.4g}{row['speedup']:10.2f}{row['efficiency']:12.0%}"
            f"{row['collectives']:13}{row['collectives in loops']:10}"
        )
    return text
