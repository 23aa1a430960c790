"""Attacks: image steps a second, against the bare gradients that they are made of, and what formats change.

An image step is a backward pass that an example paid for, or a forward pass of an attack without gradients. The
operations of a step are those of the program in which the attack loops, of which each iteration may hold several.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp import attacks
from jaxinterp.attacks import objective
from jaxinterp.attacks.attack import Attack, AttackResult
from jaxinterp.attacks.driver import coerce
from jaxinterp.attacks.spec import from_spec
from jaxinterp.bench import formats, forward
from jaxinterp.bench.cost import Cost, cost, program_bytes
from jaxinterp.bench.formats import computing_in, network_in
from jaxinterp.bench.measure import Account, Found, Task, as_written, measure, program
from jaxinterp.bench.setting import Setting
from jaxinterp.bench.sweep import Trial
from jaxinterp.canonical import canonical
from jaxinterp.network import Model

DEFAULT = ("pgd:steps=10", "mifgsm:steps=10", "cw:search_steps=1,steps=20")


def choose(specs: Sequence[str]) -> dict[str, Attack]:
    """Attacks by their text; see `jaxinterp.attacks.spec`. Raises ValueError as that does, and for one given twice."""
    chosen: dict[str, Attack] = {}
    for spec in specs or DEFAULT:
        if spec in chosen:
            raise ValueError(f"attack {spec} is given twice")
        chosen[spec] = from_spec(spec, attacks.ATTACKS)
        coerce(chosen[spec])
    return chosen


def by_image(model: Model, images: Any, labels: Any) -> jax.Array:
    """The gradient of the cross-entropy [B,H,W,C] with respect to the images."""
    return jax.grad(lambda x: objective.likelihood(model(x), labels, None).sum())(images)


gradient = jax.jit(canonical(by_image))


def bench(
    setting: Setting,
    specs: Sequence[str] = (),
    *,
    peers: Callable[..., Mapping[str, Callable[[], Any]]] | None = None,
) -> Found:
    """Times attacks.

    Args:
        setting: what they run on.
        specs: attacks as text; none means `DEFAULT`. The first is swept over batch sizes.
        peers: returns PGD of other libraries, by name, on the setting's images and weights or on as many images as it
            is given; each is compared with our PGD, and a sweep is of that.

    Raises:
        ValueError: an unknown attack or parameter.
    """
    chosen, images, labels = choose(specs), setting.images(), setting.labels
    tasks: list[Task] = []
    results: dict[tuple[str, str], AttackResult] = {}
    gradients: dict[str, Any] = {}
    for form in setting.forms:
        network, params = network_in(form, setting.network, setting.params)
        model = network.bind(params)

        def one_gradient(model=model, form=form):
            with computing_in(form):
                gradients[form] = gradient(model, images, labels)
            return gradients[form]

        def its_account(model=model, form=form):
            with computing_in(form):
                spent, size = program(gradient, model, images, labels)
                return Account(setting.batch, spent, as_written(by_image, model, images, labels), size)

        tasks.append(Task(f"gradient {form}", one_gradient, its_account, "image steps", form))
        for name, attack in chosen.items():

            def attacked(attack=attack, name=name, model=model, form=form):
                with computing_in(form):
                    results[name, form] = attacks.run(attack, model, images, labels, key=setting.key())
                return results[name, form]

            account = functools.partial(_account, setting, attack, model, form, lambda n=name, f=form: results[n, f])
            tasks.append(Task(f"{name} {form}", attacked, account, "image steps", form))
    theirs = {} if peers is None else peers()
    if theirs:
        ours, same, form = f"ours, {PEER}", from_spec(PEER, attacks.ATTACKS), peer_form(setting)
        bound = setting.network.bind(setting.params)

        def as_peers():
            with computing_in(form):
                return attacks.run(same, bound, images, labels, key=setting.key())

        counted = functools.partial(Account, setting.batch * PEER_STEPS)
        tasks.append(Task(ours, as_peers, counted, "image steps", form))
        tasks += [Task(name, run, counted, "image steps", form, over=(ours, 1.0)) for name, run in theirs.items()]
    found = Found(measure(tasks, rounds=setting.rounds, peak=setting.peak))
    for row in found.rows:
        form, (name, _, _) = row["format"], row["name"].rpartition(" ")
        if (name, form) in results:
            bare = next(r for r in found.rows if r["name"] == f"gradient {form}")
            row["over gradients"] = row["seconds"]["median"] / bare["seconds"]["median"] * setting.batch / row["work"]
            row["success"] = float(np.mean(results[name, form].success))
    found.changes = _changes(setting, chosen, results, gradients)
    first = next(iter(chosen))
    found.swept, swept, form, beside = first, chosen[first], setting.forms[0], None
    if theirs:
        found.swept, swept, form, beside = PEER, from_spec(PEER, attacks.ATTACKS), peer_form(setting), peers
    found.form, found.trial = form, functools.partial(_trial, setting, swept, form, beside)
    return found


PEER_STEPS = 10
PEER = f"pgd:eps=8/255,step_size=2/255,steps={PEER_STEPS}"
"""Our side of the comparison with peers, whose settings `jaxinterp.bench.peers` gives them, too."""


def peer_form(setting: Setting) -> str:
    """The format in which peers and our side of the comparison compute: float32, or TF32 where the first is lower."""
    return "float32" if setting.forms[0] == "float32" else "tf32"


def steps_taken(result: AttackResult) -> int:
    """Image steps of a batch: backward passes, or forward passes where an example had none."""
    return int(np.sum(np.where(np.asarray(result.backward) > 0, result.backward, result.forward)))


def iterations(steps: float | int, spent: Cost | None, step: Cost | None) -> float:
    """How often a program of steps is run for so many, which holds several where it costs as much as several.

    Args:
        steps: steps taken, in batches.
        spent: what the program costs.
        step: what the program of one step of a batch costs, a gradient or a forward pass, see `costs_of_step`.
    """
    if spent is None or step is None or not step.flops:
        return float(steps)
    return steps / max(1, round(spent.flops / step.flops))


def costs_of_step(model: Model, images: Any, labels: Any, result: AttackResult) -> tuple[Cost | None, Cost | None]:
    """What a step of an attack costs, a gradient or a forward pass: its program, and as it is written."""
    if np.any(result.backward):
        return program(gradient, model, images, labels)[0], as_written(by_image, model, images, labels)
    return program(forward.jitted, model, images)[0], as_written(forward.logits, model, images)


def _account(setting: Setting, attack: Attack, model: Model, form: str, result: Callable[[], AttackResult]) -> Account:
    images, labels = setting.images(), setting.labels
    steps = steps_taken(result())
    with computing_in(form):
        compiled = _loop(attack, model, images, labels, setting.key()).compile()
        step, bare = costs_of_step(model, images, labels, result())
    spent, runs = cost(compiled), steps / setting.batch
    return Account(
        steps,
        None if spent is None else spent.times(iterations(runs, spent, step)),
        None if bare is None else bare.times(runs),
        program_bytes(compiled),
    )


def _loop(attack: Attack, model: Model, images: Any, labels: Any, key: jax.Array) -> jax.stages.Lowered:
    """The program of an attack's steps for images, or for their shapes."""

    def begin(model, images, labels):
        return attacks.start(attack, model, images, labels, key=key)

    return attacks.lowered(attack, model, jax.eval_shape(begin, model, images, labels))


def _trial(setting: Setting, attack: Attack, form: str, peers: Callable[..., Any] | None, batch: int) -> Trial:
    network, params = network_in(form, setting.network, setting.params)
    model, labels = network.bind(params), setting.labels_of(batch)
    _, *shape = setting.images(1).shape
    with computing_in(form):
        lowered = _loop(attack, model, jax.ShapeDtypeStruct((batch, *shape), jnp.float32), labels, setting.key())
        size = program_bytes(lowered.compile())

    images = functools.cache(lambda: setting.images(batch))  # made when it is clear that they fit

    last: list[AttackResult] = []

    def run():
        with computing_in(form):
            last[:] = [attacks.run(attack, model, images(), labels, key=setting.key())]
        return last[0]

    others = dict if peers is None else functools.partial(peers, batch)
    return Trial(size, run, lambda: steps_taken(last[0]), others)


def _changes(
    setting: Setting,
    chosen: Mapping[str, Attack],
    results: Mapping[tuple[str, str], AttackResult],
    gradients: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """What every format but the first changes, and whether it changes anything at all."""
    first, *others = setting.forms
    model, found = setting.network.bind(setting.params), {}
    for form in others:
        found[form] = {
            "than": first,
            "same bits": bool(np.array_equal(np.asarray(gradients[form]), np.asarray(gradients[first]))),
            "gradient signs that agree": formats.sign_agreement(gradients[form], gradients[first]),
        }
        for name in chosen:
            here, there = results[name, form], results[name, first]
            with computing_in("float32"):
                fooled = jnp.argmax(model(here.images), -1) != setting.labels
            found[form][name] = {
                "success": float(np.mean(here.success)),
                f"success in {first}": float(np.mean(there.success)),
                "success flags that agree": formats.agreement(here.success, there.success),
                "success judged in float32": float(np.mean(fooled & here.success)),
            }
    return found
