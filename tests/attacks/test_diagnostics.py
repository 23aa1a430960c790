"""Each warning on a model that deserves it, and none on one that does not."""

import dataclasses
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


FIRST = np.arange(len(IMAGES))[:, None] == 0


def names(model, images=IMAGES):
    labels = np.argmax(linear(images)[:, 1:], axis=1) + 1  # class 0 may be masked
    return {finding.name for finding in diagnose(model, images, labels, key=jax.random.key(0))}


def disturbed(model, by):
    """The logits of a model, changed by `by(logits)` times other normal numbers in every call."""

    def noise(logits):
        return (by(logits) * RNG.normal(size=logits.shape)).astype(np.float32)

    def call(x):
        logits = model(x)
        added = jax.pure_callback(noise, jax.ShapeDtypeStruct(logits.shape, np.float32), jax.lax.stop_gradient(logits))
        return logits + jax.lax.stop_gradient(added)

    return call


@pytest.mark.parametrize("images", [IMAGES, IMAGES[:1]], ids=["batch", "one image"])
@pytest.mark.parametrize("masked", [[0], [0, 2, 4]], ids=str)
@pytest.mark.parametrize("mask", [-1e3, -1e4, -1e9, -3e38])
def test_a_masked_class_does_not_hide_noise(mask, masked, images):
    noisy = disturbed(linear, lambda logits: 1.0)
    remaining = np.setdiff1d(np.arange(5), masked)
    labels = remaining[np.argmax(linear(images)[:, remaining], axis=1)]
    for model, expected in ((noisy, {"random"}), (linear, set())):
        found = diagnose(lambda x: model(x).at[:, masked].set(mask), images, labels, key=jax.random.key(0))  # noqa: B023
        assert {finding.name for finding in found} == expected


@pytest.mark.parametrize("factor", [1e-3, 1e-2, 1e2, 1e4])
@pytest.mark.parametrize("which", [FIRST, ~FIRST], ids=["one image", "all but one"])
def test_images_with_larger_logits_do_not_hide_noise_in_others(which, factor):
    scaled = lambda x: linear(x) * jnp.where(which, factor, 1.0)  # noqa: E731
    small = np.array(which if factor < 1 else ~which)
    noisy = disturbed(scaled, lambda logits: np.where(small, 0.1 * np.abs(logits), 0.0))
    assert "random" in names(noisy)
    assert "random" not in names(scaled)


DETERMINISTIC = {
    "logits": linear,
    "one image of larger logits": lambda x: linear(x) * jnp.where(FIRST[: len(x)], 1e4, 1.0),
    "large logits of small differences": lambda x: 1e4 + linear(x),
    "classes that tie": lambda x: linear(x)[:, jnp.array([0, 1, 1, 2, 2])],
    "two first classes near 0 in one image": lambda x: jnp.where(
        FIRST[: len(x)], jnp.array([0.0, -1e-5, -3.0, -8.0, -9.0]), linear(x)
    ),
    "constant": lambda x: 0 * linear(x) + jnp.arange(5.0),
    "the same in all classes": lambda x: 0 * linear(x) + 3.0,
    "zero": lambda x: 0 * linear(x),
    "log-softmax": lambda x: jax.nn.log_softmax(linear(x)),
    "softmax": lambda x: jax.nn.softmax(linear(x)),
    "a class masked by addition": lambda x: linear(x) + jnp.array([-1e9, 0.0, 0.0, 0.0, 0.0]),
}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_rounding_is_not_randomness(name):
    def rounding(logits):
        sizes = np.abs(logits)
        return 1e-5 * np.maximum(sizes, np.max(sizes, axis=1, keepdims=True, where=sizes < 1e8, initial=0))

    assert "random" not in names(disturbed(DETERMINISTIC[name], rounding))


def test_rounding_where_logits_cancel_is_not_randomness():
    cancelling = lambda x: jnp.where(FIRST, 0.0, linear(x))  # noqa: E731
    assert "random" not in names(disturbed(cancelling, lambda logits: 1e-7))


def test_randomness_tells_how_many_decisions_change():
    fixed = disturbed(linear, lambda logits: np.where(FIRST, 0.1, 0.0) * np.ones(5))
    wide = lambda x: fixed(x).at[:, 1].add(30.0)  # noqa: E731
    [finding] = diagnose(wide, IMAGES, np.ones(8, int), key=jax.random.key(0))
    assert "1 of 8, and different classes for 0" in finding.message
    calls = iter(range(9))
    moving = lambda x: linear(x) + 100 * jax.nn.one_hot(next(calls) % 5, 5)  # noqa: E731
    [finding] = diagnose(moving, IMAGES, LABELS, key=jax.random.key(0))
    assert "8 of 8, and different classes for 8" in finding.message


def test_probabilities_are_seen_in_the_rows_that_are_finite():
    def naive(x):
        z = jnp.exp(jnp.where(FIRST, 100.0, 0.1) * jnp.abs(linear(x)))
        return z / z.sum(axis=1, keepdims=True)

    assert np.isnan(naive(IMAGES)).any(axis=1).tolist() == [True] + [False] * 7
    assert "probabilities" in names(naive)
    assert "probabilities" not in names(lambda x: jnp.where(FIRST, jnp.nan, linear(x)))
    assert "probabilities" not in names(lambda x: linear(x) + jnp.nan)


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


@pytest.mark.parametrize(
    ("white", "transferred", "missed"),
    [
        ([0, 1, 2, 3], [4, 5, 6, 7], 4),
        ([0, 1, 2, 3, 4], [5, 6], 2),  # although the attack on the model breaks more
        ([0, 1, 2, 3], [0, 1, 2, 3], 0),
        ([0, 1, 2, 3], [0, 1, 2, 3, 4], 0),  # a single one
        ([], [4, 5], 2),
    ],
)
def test_images_of_another_model_are_compared_one_by_one(white, transferred, missed):
    result = run(IFGSM(eps=0.5, steps=5), linear, IMAGES, LABELS, key=jax.random.key(0))
    images = np.where(np.isin(np.arange(8), transferred)[:, None, None, None], result.images, IMAGES)
    result = dataclasses.replace(result, success=jnp.isin(jnp.arange(8), jnp.array(white, int)))
    found = compare_transfer(linear, LABELS, result, images)
    assert len(found) == (missed > 0)
    for finding in found:
        assert finding.name == "transfer"
        assert f"{missed} of 8" in finding.message


def test_chance_may_break_one_image_of_twenty_on_another_model():
    images, labels = np.tile(IMAGES, (5, 1, 1, 1)), np.tile(LABELS, 5)
    result = run(IFGSM(eps=0.5, steps=5), linear, images, labels, key=jax.random.key(0))
    for missed, reported in ((2, False), (3, True)):
        own = dataclasses.replace(result, success=jnp.arange(40) >= missed)
        assert bool(compare_transfer(linear, labels, own, result.images)) == reported


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
