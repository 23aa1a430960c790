"""What an attack's loop costs beyond its steps: attack time against steps x one jitted step, on CPU.

    python experiments/bench_loop.py --out results/bench.jsonl

The reference is what a user writes by hand: jax.jit of the value and input gradient of the same loss and the signed
update, called from Python `steps` times, without this library's rewriting of convolutions. The attack is
`attacks.run(IFGSM(steps=...))` from checking its input to its result. It also judges its last iterate, one forward pass
that the reference lacks; ratios are given with and without that pass added to the reference. "by hand in a loop" puts
the reference step into lax.fori_loop: what the rewriting saves a user from. Networks: EfficientNet-Lite0 of this
library, a Flax NNX network made of Flax's own layers, and a network in NCHW made of lax operations.

Expected time: 6 minutes on two cores. Expected result: attack / (steps x step + forward) at most 1.05 for all three;
by hand in a loop several times slower.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax import lax

import jaxinterp
from jaxinterp import attacks
from jaxinterp.attacks import objective
from jaxinterp.bench.records import append, cores
from jaxinterp.bench.timing import interleaved, middle, ratios, shown, verdict
from jaxinterp.network import Network, as_model

TARGET = 1.05
EPS = 8 / 255


class StockCNN(nnx.Module):
    """Convolutions, batch norm and a linear layer as Flax has them."""

    def __init__(self, widths: tuple[int, ...], classes: int, *, rngs: nnx.Rngs):
        pairs = list(zip((3, *widths), widths, strict=False))
        self.convs = nnx.List([nnx.Conv(i, o, (3, 3), strides=(1 if i == 3 else 2), rngs=rngs) for i, o in pairs])
        self.norms = nnx.List([nnx.BatchNorm(o, use_running_average=True, rngs=rngs) for _, o in pairs])
        self.linear = nnx.Linear(widths[-1], classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images - 0.5
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.relu(norm(conv(x)))
        return self.linear(x.mean((1, 2)))


def nchw_network(widths: tuple[int, ...], classes: int) -> Any:
    """A bound network whose convolutions are in NCHW, OIHW."""
    rng = np.random.default_rng(0)
    kernels = [
        jnp.asarray(rng.normal(0, (2 / 9 / i) ** 0.5, (o, i, 3, 3)), jnp.float32)
        for i, o in zip((3, *widths), widths, strict=False)
    ]
    linear = jnp.asarray(rng.normal(0, 0.1, (widths[-1], classes)), jnp.float32)

    def apply(params, images):
        x = jnp.moveaxis(images, -1, 1) - 0.5
        for index, kernel in enumerate(params[:-1]):
            stride = (1, 1) if index == 0 else (2, 2)
            x = jax.nn.relu(
                lax.conv_general_dilated(x, kernel, stride, "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
            )
        return x.mean((2, 3)) @ params[-1]

    return Network(name="nchw", apply=apply, classes=classes).bind([*kernels, linear])


def cases() -> dict[str, Callable[[], tuple[Any, tuple[int, ...]]]]:
    """Name -> a function that makes the model and tells the shape of its images."""

    def lite():
        network, params = jaxinterp.load("efficientnet_lite0")
        return network.bind(params), (8, network.image_size, network.image_size, 3)

    widths = (32, 64, 128, 128)
    return {
        "lite0": lite,
        "nnx": lambda: (StockCNN(widths, 100, rngs=nnx.Rngs(0)), (16, 96, 96, 3)),
        "nchw": lambda: (nchw_network(widths, 100), (16, 96, 96, 3)),
    }


def by_hand(model: Any, images: jax.Array, original: jax.Array, labels: jax.Array, size: float) -> Any:
    """One untargeted signed step in the Linf ball and the box, and the loss at `images`."""

    def loss(x):
        return objective.likelihood(model(x), labels, None).sum()

    value, gradient = jax.value_and_grad(loss)(images)
    delta = jnp.clip(images - size * jnp.sign(gradient) - original, -EPS, EPS)
    return jnp.clip(original + delta, 0.0, 1.0), value


def measure(make: Callable[[], tuple[Any, tuple[int, ...]]], steps: int, rounds: int) -> dict[str, Any]:
    """Times of one case, printed and returned."""
    model, shape = make()
    model = as_model(model)
    images = jnp.asarray(np.random.default_rng(1).random(shape, dtype=np.float32))
    labels = jnp.argmax(model(images), axis=-1)
    size, attack, key = 2.5 * EPS / steps, attacks.IFGSM(eps=EPS, steps=steps), jax.random.key(0)

    step = jax.jit(by_hand)
    forward = jax.jit(lambda model, x: model(x))

    @functools.partial(jax.jit, static_argnums=4)
    def in_loop(model, x, labels, size, steps):
        return lax.fori_loop(0, steps, lambda _, now: by_hand(model, now, x, labels, size)[0], x)

    def python_loop():
        x = images
        for _ in range(steps):
            x, _ = step(model, x, images, labels, size)
        return x.block_until_ready()

    state = attacks.start(attack, model, images, labels, key=key)
    programs = {
        "attack": lambda: jax.block_until_ready(attacks.run(attack, model, images, labels, key=key)).images,
        "attack, its loop alone": lambda: jax.block_until_ready(attacks.advance(attack, model, state)).images,
        "steps x step": python_loop,
        "forward": lambda: forward(model, images).block_until_ready(),
    }
    # Far slower on most networks: two steps, and few rounds.
    slow = {"by hand in a loop": lambda: in_loop(model, images, labels, size, 2).block_until_ready()}
    compiling = {
        "attack": _seconds(programs["attack"]),  # with its first run, which is taken off below
        "step": _seconds(lambda: step.lower(model, images, images, labels, size).compile()),
        "forward": _seconds(lambda: forward.lower(model, images).compile()),
        "by hand in a loop": _seconds(lambda: in_loop.lower(model, images, labels, size, 2).compile()),
    }
    for run in programs.values():
        run()

    times = interleaved(programs, rounds)
    times["by hand in a loop"] = [t * steps / 2 for t in interleaved(slow, min(rounds, 3))["by hand in a loop"]]
    longer = [a + b for a, b in zip(times["steps x step"], times["forward"], strict=True)]
    compared = {
        "attack / (steps x step)": ratios(times["attack"], times["steps x step"]),
        "attack / (steps x step + forward)": ratios(times["attack"], longer),
        "its loop alone / (steps x step + forward)": ratios(times["attack, its loop alone"], longer),
    }
    usual = middle(times["steps x step"])["median"]
    compared["by hand in a loop / (steps x step)"] = [t / usual for t in times["by hand in a loop"]]
    compiling["attack"] -= middle(times["attack"])["median"]
    equal = float(jnp.mean(attacks.advance(attack, model, state).images == python_loop()))
    return {"shape": shape, "times": times, "ratios": compared, "compile": compiling, "equal": equal}


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(
    case: tuple[str, ...] = ("lite0", "nnx", "nchw"), steps: int = 10, rounds: int = 9, out: Path | None = None
) -> None:
    """Times attacks against their steps.

    Args:
        case: Networks: lite0, nnx, nchw.
        steps: Steps of the attack.
        rounds: How often everything is timed.
        out: File to which one JSON line is appended.
    """
    known = cases()
    figures: dict[str, Any] = {"backend": jax.default_backend(), "steps": steps, "rounds": rounds, "results": {}}
    for name in case:
        if name not in known:
            raise SystemExit(f"unknown case {name!r}; known: {', '.join(known)}")
        found = measure(known[name], steps, rounds)
        shape = " x ".join(map(str, found["shape"]))
        print(f"{name}, images {shape}, {steps} steps, {cores()} cores, {rounds} rounds; median (quartiles)")
        for what, values in found["times"].items():
            print(f"  {what:44}{shown(values, 1e3):>30} ms")
        for what, values in found["ratios"].items():
            target = verdict(middle(values)["median"], TARGET) if what.startswith("attack") else ""
            print(f"  {what:44}{shown(values, digits=3):>30}    {target}")
        print("  compile, s: " + ", ".join(f"{what} {value:.1f}" for what, value in found["compile"].items()))
        print(f"  components of the last iterate equal to the reference's: {found['equal']:.2%}", flush=True)
        figures["results"][name] = {
            "shape": found["shape"],
            "seconds": {what: middle(values) for what, values in found["times"].items()},
            "ratios": {what: middle(values) for what, values in found["ratios"].items()},
            "compile": found["compile"],
            "equal": found["equal"],
        }
    append(out, "loop", figures)


if __name__ == "__main__":
    tyro.cli(main)
