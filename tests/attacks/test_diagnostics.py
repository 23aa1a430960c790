"""Each warning on a model that deserves it, and none on one that does not."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp import attacks
from jaxinterp.attacks import (
    IFGSM,
    PGD,
    CWLinf,
    HopSkipJump,
    KeyPixels,
    SmoothBIM,
    Square,
    compare_access,
    compare_transfer,
    diagnose,
    run,
)

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
    "softmax of 8 bits": (lambda x: jax.nn.softmax(0.1 * linear(x)).astype(jnp.bfloat16), {"probabilities"}),
    "logits of 8 bits": (lambda x: linear(x).astype(jnp.bfloat16), set()),
    "noise of NumPy": (noisy_when_traced, {"random"}),
    "noise of a callback": (noisy_when_run, {"random"}),
    "a class ruled out": (lambda x: linear(x).at[:, 0].set(-jnp.inf), set()),
    "noise, and a class ruled out": (lambda x: noisy_when_traced(x).at[:, 0].set(-jnp.inf), {"random"}),
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


def rows(linf, backward=0, l2=0.0):
    """Rows of successes at these distances, and of failures where one is None."""
    more = {"backward": backward, "l2": l2}
    return [
        {"id": str(i), "success": d is not None, "linf": 0.0 if d is None else d, **more} for i, d in enumerate(linf)
    ]


FAILED = [None] * 6
PGD_ROWS = rows([0.1, None, None, None, None, None], 10)


def test_blind_attacks_that_find_more_in_the_same_ball_are_reported():
    ball = {"pgd": PGD(eps=0.1), "square": Square(eps=0.1)}
    blind = rows([0.1, 0.1, 0.05, None, None, 0.10001])
    [finding] = compare_access({"pgd": PGD_ROWS, "square": blind}, ball)
    assert finding.name == "transfer"
    assert "square" in finding.message
    assert "3 of 6" in finding.message
    # A failure in a smaller ball, or in another norm's, is none.
    assert not compare_access({"pgd": PGD_ROWS, "square": blind}, {**ball, "pgd": PGD(eps=0.049)})
    far = [{**row, "l2": 17.0} for row in blind]
    assert not compare_access({"pgd": PGD_ROWS, "square": far}, {**ball, "pgd": PGD(eps=3.0, norm="l2")})
    assert len(compare_access({"pgd": PGD_ROWS, "square": far}, {**ball, "pgd": PGD(eps=17.0, norm="l2")})) == 1
    # What one of several attacks with gradients finds in the ball is not held against gradients.
    more = {**ball, "cw-linf": CWLinf()}
    for distance, reported in ((0.1, 0), (0.3, 1)):
        nearest = rows([None, *[distance] * 5], 5)
        found = compare_access({"pgd": PGD_ROWS, "cw-linf": nearest, "square": rows([None, *[0.1] * 5])}, more)
        assert len(found) == reported
    assert not compare_access({"pgd": rows(FAILED, 9), "square": PGD_ROWS[:0]}, ball)
    assert not compare_access({"square": blind}, ball)


@pytest.mark.parametrize(
    ("seeing", "found", "blind", "reported"),
    [
        (CWLinf(), FAILED, [0.5] * 6, True),
        (CWLinf(), [0.1] * 6, [0.06] * 6, False),
        (CWLinf(), [0.1] * 6, [0.04] * 6, True),
        (CWLinf(), [0.1] * 6, [0.04, *FAILED[1:]], False),  # a single one
        (PGD(eps=0.1), [0.1] * 6, [0.001] * 6, False),  # nobody asked for the nearest
        (IFGSM(eps=0.1), FAILED, [0.1] * 6, True),
        (IFGSM(eps=0.1, kappa=1.0), FAILED, [0.1] * 6, False),  # of a blind attack without confidence
        (KeyPixels(eps=0.1, norm="linf"), FAILED, [0.1] * 6, False),  # on a few pixels
        (SmoothBIM(eps=0.1), FAILED, [0.1] * 6, False),  # smooth
    ],
)
def test_a_failure_counts_where_the_success_could_have_been_found(seeing, found, blind, reported):
    chosen = {"seeing": seeing, "hopskipjump": HopSkipJump(norm="linf")}
    assert bool(compare_access({"seeing": rows(found, 7), "hopskipjump": rows(blind)}, chosen)) == reported


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


def test_images_of_another_model_must_reach_the_confidence_that_was_asked_for():
    sure = run(IFGSM(eps=0.5, steps=5, kappa=1e3), linear, IMAGES, LABELS, key=jax.random.key(0))
    other = run(IFGSM(eps=0.5, steps=5), linear, IMAGES, LABELS, key=jax.random.key(0))
    assert not np.asarray(sure.success).any()
    assert np.asarray(other.success).all()
    assert not compare_transfer(linear, LABELS, sure, other.images, kappa=1e3)
    assert compare_transfer(linear, LABELS, sure, other.images)


def test_nothing_to_look_at():
    with pytest.raises(ValueError, match=r"^images: expected at least one image"):
        diagnose(linear, IMAGES[:0], LABELS[:0], key=jax.random.key(0))
