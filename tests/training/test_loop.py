"""The training loop: means over examples, any devices, resume to the last bit, what is not trained, errors."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh

from jaxinterp.data import Arrays, DamagedImage, Example
from jaxinterp.runs import Run
from jaxinterp.training.loop import Outcome, fit

IMAGES = np.random.default_rng(0).random((11, 2, 2, 1), np.float32)
SOURCE = Arrays(IMAGES, np.arange(11) % 3)
START = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}


def devices(count: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:count]), ("data",), axis_types=(AxisType.Auto,))


def loss(params, images, labels, keys):
    noise = jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys)
    logits = (images.reshape(len(images), -1) + 0.1 * noise) @ params["w"] + params["b"]
    correct = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
    return Outcome(optax.softmax_cross_entropy_with_integer_labels(logits, labels), {"accuracy": correct})


def train(out: Path, **more):
    given = {"optimizer": optax.adam(0.1), "epochs": 3, "batch_size": 4, "key": jax.random.key(1), "mesh": devices(1)}
    return fit(loss, START, SOURCE, run=Run(out, {}), quiet=True, **{**given, **more})


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_step_lowers_the_mean_over_the_examples_alone(tmp_path):
    """Plain descent on a linear loss, in closed form: 11 examples in batches of 4, the last of which has 3."""

    def linear(params, images, labels, keys):
        return Outcome(images.reshape(len(images), -1) @ params["w"], {"label": labels.astype(jnp.float32)})

    start = {"w": jnp.ones(4)}
    found = fit(
        linear, start, SOURCE, optimizer=optax.sgd(1.0), epochs=1, batch_size=11, key=jax.random.key(0),
        run=Run(tmp_path / "a", {}), mesh=devices(1), quiet=True,
    )  # fmt: skip
    np.testing.assert_allclose(found.params["w"], 1 - IMAGES.reshape(11, 4).mean(0), rtol=1e-6)
    [measured] = found.history
    assert measured["label"] == pytest.approx(np.mean(SOURCE.labels))
    assert measured["loss"] == pytest.approx(IMAGES.reshape(11, 4).sum(1).mean(), rel=1e-6)
    found = fit(
        linear, start, SOURCE, optimizer=optax.sgd(1e-9), epochs=2, batch_size=4, key=jax.random.key(0),
        run=Run(tmp_path / "b", {}), mesh=devices(1), quiet=True,
    )  # fmt: skip
    assert [h["label"] for h in found.history] == pytest.approx([np.mean(SOURCE.labels)] * 2)


def test_devices_change_rounding_only(tmp_path):
    one, four = (train(tmp_path / str(n), mesh=devices(n)) for n in (1, 4))
    for name in START:
        np.testing.assert_allclose(one.params[name], four.params[name], atol=2e-6)
    assert float(jnp.abs(one.params["w"]).max()) > 0.1
    assert [h["accuracy"] for h in one.history] == [h["accuracy"] for h in four.history]


def test_a_stopped_training_ends_with_the_same_bits(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", evaluate=lambda params: {"held-out norm": float(jnp.sum(params["w"] ** 2))})
    write, calls = Run.write_state, []

    def stopping(run, name, state):
        write(run, name, state)
        calls.append(int(state["done"]))
        if len(calls) == 5:  # in the middle of the second epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "write_state", stopping)
    evaluate = lambda params: {"held-out norm": float(jnp.sum(params["w"] ** 2))}  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", store_every=0, evaluate=evaluate)
    assert calls == [1, 2, 3, 4, 5]
    found = train(tmp_path / "parts", store_every=0, evaluate=evaluate)
    assert calls[5:] == [6, 7, 8, 9]
    assert same(whole.params, found.params)
    assert whole.history == found.history
    for name in ("training.csv", "training.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    lines = (tmp_path / "whole" / "training.csv").read_text().splitlines()
    assert lines[0].split(",")[0] == "epoch"
    assert len(lines) == 4
    again = train(tmp_path / "parts", evaluate=evaluate)
    assert same(again.params, whole.params)
    assert len(calls) == 9  # nothing was left to do
    with pytest.raises(ValueError, match=r"belongs to \[11, 4, 3\] examples.*expected \[11, 4, 5\]"):
        train(tmp_path / "parts", epochs=5)


def test_running_statistics_are_measured_not_trained(tmp_path):
    def normed(params, images, labels, keys):
        x = images.mean((1, 2, 3)) - params["norm.running_mean"]
        new = params["norm.running_mean"] + 0.1 * (images.mean() - params["norm.running_mean"])
        return Outcome((x * params["w"]) ** 2, {}, {"norm.running_mean": new})

    given = {"optimizer": optax.sgd(0.1), "epochs": 1, "batch_size": 11, "key": jax.random.key(0), "mesh": devices(1)}
    start = {"w": jnp.float32(1), "norm.running_mean": jnp.float32(0)}
    found = fit(normed, start, SOURCE, run=Run(tmp_path, {}), quiet=True, **given)
    means = IMAGES.mean((1, 2, 3))
    assert float(found.params["norm.running_mean"]) == pytest.approx(0.1 * IMAGES.mean(), rel=1e-5)
    assert float(found.params["w"]) == pytest.approx(1 - 0.1 * np.mean(2 * means**2), rel=1e-5)

    def wrong(params, images, labels, keys):
        return Outcome(images.mean((1, 2, 3)) * params["w"], {}, {"w": params["w"]})

    with pytest.raises(TypeError, match="statistics must be parameters that are not trained, got 'w'"):
        fit(wrong, start, SOURCE, run=Run(tmp_path / "wrong", {}), quiet=True, **given)


class Damaged:
    """Three images, of which the second cannot be read."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index == 1:
            raise DamagedImage("b", "damaged")
        return Example(np.full((2, 2, 1), index, np.float32) / 2, index, str(index))


def test_what_cannot_be_read_has_no_weight(tmp_path):
    def mean(params, images, labels, keys):
        return Outcome(images.mean((1, 2, 3)) + 0 * params["w"])

    found = fit(
        mean, {"w": jnp.float32(0)}, Damaged(), optimizer=optax.sgd(0.1), epochs=2, batch_size=3,
        key=jax.random.key(0), run=Run(tmp_path, {}), mesh=devices(1), quiet=True,
    )  # fmt: skip
    assert found.damaged == (("b", "damaged"),)
    assert [h["loss"] for h in found.history] == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"batch_size": 3, "mesh": None}, ValueError, "batch_size must be a multiple of the 8 devices, got 3"),
        ({"loss": lambda *_: 1.0}, TypeError, "loss must return an Outcome, got float"),
        ({"loss": lambda p, x, y, k: Outcome(jnp.sum(x))}, TypeError, r"losses must have the shape \(4,\), got \(\)"),
        ({"source": Arrays(IMAGES)}, ValueError, "every example needs a label, but 0 has none"),
        ({"source": Arrays(IMAGES[:0])}, ValueError, "source has no examples"),
        (
            {"loss": lambda p, x, y, k: Outcome(x.mean((1, 2, 3)) * jnp.nan * p["b"][0])},
            ValueError,
            "the loss of epoch 0 is nan",
        ),
    ],
)
def test_bad_input(tmp_path, change, error, message):
    given = {"loss": loss, "source": SOURCE, "epochs": 1, "batch_size": 4, "mesh": devices(1), **change}
    with pytest.raises(error, match=message):
        fit(
            given.pop("loss"), START, given.pop("source"), optimizer=optax.sgd(0.1), key=jax.random.key(0),
            run=Run(tmp_path, {}), quiet=True, **given,
        )  # fmt: skip


PROGRAM = """
    import os, signal, sys
    import jax
    from jaxinterp.runs import Run
    sys.path.insert(0, sys.argv[1])
    import test_loop
    from pathlib import Path
    write = Run.write_state
    def killing(run, name, state):
        write(run, name, state)
        if int(state["done"]) == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
    Run.write_state = killing
    test_loop.train(Path(sys.argv[2]), store_every=0)
"""


@pytest.mark.exhaustive
def test_a_killed_training_ends_with_the_same_bits(tmp_path):
    def ran(where, kill):
        words = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(Path(__file__).parent), str(where), str(kill)]
        return subprocess.run(words, env={**os.environ, "JAX_PLATFORMS": "cpu"}, timeout=300).returncode

    assert ran(tmp_path / "killed", 5) == -signal.SIGKILL
    assert ran(tmp_path / "killed", 0) == 0
    assert ran(tmp_path / "whole", 0) == 0
    for name in ("training.csv", "parts/training.state.npz"):
        found = [(tmp_path / which / name).read_bytes() for which in ("killed", "whole")]
        if name.endswith("npz"):
            a, b = (np.load(tmp_path / which / name) for which in ("killed", "whole"))
            assert all(np.array_equal(a[key], b[key]) for key in b.files)
        else:
            assert found[0] == found[1]
