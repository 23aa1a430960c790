"""Each warning on a model that deserves it, and none on one that does not."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp import attacks
from jaxinterp.attacks import IFGSM, compare_access, compare_transfer, diagnose, run

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(4 * 4 * 3, 5)).astype(np.float32)
IMAGES = RNG.uniform(0.1, 0.9, size=(8, 4, 4, 3)).astype(np.float32)


def linear(x):
    return x.reshape(x.shape[0], -1) @ WEIGHTS


LABELS = np.argmax(IMAGES.reshape(8, -1) @ WEIGHTS, axis=1)


def noisy_when_traced(x):
    return linear(x) + RNG.normal(size=5).astype(np.float32)


def noisy_when_run(x):
    noise = jax.pure_callback(lambda: RNG.normal(size=5).astype(np.float32), jax.ShapeDtypeStruct((5,), np.float32))
    return linear(x) + jax.lax.stop_gradient(noise)


MODELS = {
    "logits": (linear, set()),
    "log-softmax": (lambda x: jax.nn.log_softmax(linear(x)), set()),
    "softmax": (lambda x: jax.nn.softmax(0.1 * linear(x)), {"probabilities"}),
    "noise of NumPy": (noisy_when_traced, {"random"}),
    "noise of a callback": (noisy_when_run, {"random"}),
    "rounded input": (lambda x: linear(jnp.round(x * 255) / 255), {"zero-gradients"}),
    "gradient not finite": (lambda x: linear(x) + 0 * jnp.sqrt(0 * x.sum(axis=(1, 2, 3))[:, None]), {"zero-gradients"}),
    "saturated": (lambda x: jnp.tanh(1e6 * linear(x)), {"zero-gradients"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_findings(name):
    model, expected = MODELS[name]
    found = diagnose(model, IMAGES, LABELS, key=jax.random.key(0))
    assert {finding.name for finding in found} == expected


def test_every_finding_has_its_section_in_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "diagnostics.md").read_text()
    sections = set(re.findall(r"^## (\S+)$", page, re.MULTILINE))
    assert sections == {"probabilities", "random", "zero-gradients", "transfer"}
    [finding] = diagnose(MODELS["softmax"][0], IMAGES, LABELS, key=jax.random.key(0))
    assert finding.section == "docs/diagnostics.md#probabilities"
    assert finding.section in str(finding)
    for name in re.findall(r"`(square|spsa|hopskipjump|apgd)", page):
        assert name in attacks.ATTACKS


def rows(success, backward):
    return [{"id": str(i), "success": bool(s), "backward": backward} for i, s in enumerate(success)]


def test_blind_attacks_that_find_more_are_reported():
    white, blind = rows([1, 0, 0, 0, 0, 0], 10), rows([1, 1, 1, 0, 0, 1], 0)
    [finding] = compare_access({"pgd": white, "square": blind})
    assert finding.name == "transfer"
    assert "square" in finding.message
    assert "3 of 6" in finding.message
    # What one of several attacks with gradients breaks is not held against gradients.
    assert not compare_access({"pgd": white, "apgd": rows([0, 1, 1, 0, 0, 1], 5), "square": blind})
    assert not compare_access({"pgd": blind, "square": white[:0]})
    assert not compare_access({"square": blind})


def test_images_of_another_model_that_do_better_are_reported():
    result = run(IFGSM(eps=0.5, steps=5), linear, IMAGES, LABELS, key=jax.random.key(0))
    assert np.asarray(result.success).all()
    flat = lambda x: linear(jnp.round(x))  # noqa: E731
    labels = np.argmax(flat(IMAGES), axis=1)
    weak = run(IFGSM(eps=0.01, steps=2), flat, IMAGES, labels, key=jax.random.key(0))
    assert np.sum(weak.success) < np.sum(np.argmax(flat(result.images), axis=1) != labels)
    [finding] = compare_transfer(flat, labels, weak, result.images)
    assert finding.name == "transfer"
    assert not compare_transfer(linear, LABELS, result, result.images)
