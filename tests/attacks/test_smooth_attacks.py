"""Smooth attacks: without smoothing they are the attacks they come from; with it, flat areas stay quiet."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxinterp import attacks
from jaxinterp.attacks import ATTACKS, CW, FGSM, IFGSM, PGD, SmoothBIM, SmoothCW, Smoothed, SmoothPGD
from jaxinterp.attacks.spec import from_spec, record

SHAPE, BATCH, CLASSES = (12, 10, 3), 5, 3
KEY = jax.random.key(0)
run = functools.partial(attacks.run, compact=False)


def affine(p, x):
    return x.reshape(x.shape[0], -1) @ p[0] + p[1]


def problem():
    """A linear model whose weights are noise, images that are flat on the left and noise on the right, their labels."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(np.prod(SHAPE), CLASSES)).astype(np.float32)
    images = np.full((BATCH, *SHAPE), 0.5, np.float32)
    images += rng.uniform(-0.02, 0.02, images.shape).astype(np.float32)
    images[:, :, 5:] = rng.uniform(0.2, 0.8, images[:, :, 5:].shape)
    bias = (-images.reshape(BATCH, -1).mean(0) @ weights).astype(np.float32)
    model = Partial(affine, (jnp.asarray(weights), jnp.asarray(bias)))
    return model, jnp.asarray(images), jnp.argmax(model(images), axis=-1), weights


def nearest(model, images, labels, weights) -> np.ndarray:
    """Closed-form L2 distance [B] to the nearest boundary of a linear model."""
    z = np.asarray(model(images), np.float64)
    rows = np.arange(BATCH)[:, None]
    others = np.array([[j for j in range(CLASSES) if j != y] for y in np.asarray(labels)])
    gap = z[rows, np.asarray(labels)[:, None]] - z[rows, others]
    across = np.linalg.norm(weights[:, np.asarray(labels)][:, :, None] - weights[:, others], axis=0)
    return (gap / across).min(1)


def roughness(result, images, columns) -> np.ndarray:
    """Total variation of the perturbation [B] within some columns, relative to its size there."""
    delta = np.asarray(result.images - images)[:, :, columns]
    change = np.abs(np.diff(delta, axis=1)).sum((1, 2, 3)) + np.abs(np.diff(delta, axis=2)).sum((1, 2, 3))
    return change / np.abs(delta).sum((1, 2, 3))


@pytest.mark.parametrize(
    ("smooth", "rough"),
    [
        (SmoothPGD(eps=0.5, alpha=0.0, steps=7), PGD(eps=0.5, norm="l2", random_start=False, steps=7)),
        (SmoothBIM(eps=0.03, alpha=0.0, steps=7), IFGSM(eps=0.03, steps=7)),
    ],
    ids=["spgd", "sbim"],
)
def test_without_smoothing_they_are_the_attacks_they_come_from(smooth, rough):
    model, images, labels, _ = problem()
    found, expected = (run(attack, model, images, labels, key=KEY) for attack in (smooth, rough))
    assert np.asarray(expected.success).any()
    for field in ("success", "iterations", "forward", "backward"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))
    np.testing.assert_allclose(found.images, expected.images, atol=1e-6)


def test_scw_comes_near_the_nearest_point_without_smoothing_and_not_below_it_with():
    model, images, labels, weights = problem()
    best = nearest(model, images, labels, weights)
    attack = SmoothCW(alpha=jnp.zeros(BATCH), initial_const=0.1, steps=200)
    for alpha, least, most in ((0.0, 0.999, 1.03), (0.9, 0.999, 2.0)):
        result = run(dataclasses.replace(attack, alpha=jnp.full(BATCH, alpha)), model, images, labels, key=KEY)
        assert np.asarray(result.success).all()
        ratio = np.asarray(result.l2) / best
        assert least < ratio.min()
        assert ratio.max() < most


@pytest.mark.parametrize(
    ("smooth", "rough"),
    [
        (SmoothPGD(eps=1.5, steps=10), PGD(eps=1.5, norm="l2", steps=10)),
        (SmoothBIM(eps=0.1, steps=10), IFGSM(eps=0.1, steps=10)),
        (SmoothCW(search_steps=4), CW(initial_const=0.1, search_steps=4, steps=100)),
        (Smoothed(FGSM(eps=0.1)), FGSM(eps=0.1)),
    ],
    ids=["spgd", "sbim", "scw", "smoothed"],
)
def test_perturbations_are_smooth_where_the_image_is_flat(smooth, rough):
    model, images, labels, _ = problem()
    found, other = (run(attack, model, images, labels, key=KEY) for attack in (smooth, rough))
    both = np.asarray(found.success & other.success)
    assert both.sum() >= 3
    flat, noisy = slice(0, 5), slice(5, None)
    quieter = roughness(found, images, flat) / roughness(other, images, flat)
    assert quieter[both].max() < 0.6
    in_texture = roughness(found, images, noisy) / roughness(other, images, noisy)
    assert (quieter < in_texture)[both].all()


def test_smoothing_afterwards_finds_how_long_the_smoothed_perturbation_must_be():
    """Along a direction the margin of a linear model is linear, so the length at which it vanishes is known."""
    model, images, labels, weights = problem()
    base = PGD(eps=50.0, step_size=0.15, norm="l2", random_start=False, steps=5)
    found = run(base, model, images, labels, key=KEY)
    assert np.asarray(found.success).all()
    r = np.asarray(attacks.smooth(found.images - images, images), np.float64).reshape(BATCH, -1)
    r *= np.asarray(found.l2)[:, None] / np.linalg.norm(r, axis=1, keepdims=True)
    z, rows, own = np.asarray(model(images), np.float64), np.arange(BATCH), np.asarray(labels)
    gap, slope = z[rows, own][:, None] - z, r @ weights
    with np.errstate(divide="ignore", invalid="ignore"):
        lengths = gap / (slope - slope[rows, own][:, None])
    threshold = np.where(lengths > 0, lengths, np.inf).min(1)

    tries = 10
    result = run(Smoothed(base, tries=tries), model, images, labels, key=KEY)
    near = threshold < 4  # beyond, the box is in the way
    assert near.sum() >= 3
    assert np.asarray(result.success)[near].all()
    doubled = np.ceil(np.log2(np.maximum(threshold, 1)))  # times until a success; then the interval is halved
    width = 2 ** np.maximum(doubled - 1, 0) / 2 ** (tries - 1 - doubled)
    length = np.asarray(result.l2) / np.asarray(found.l2)
    assert (length >= 0.999 * threshold)[near].all()
    assert (length <= 1.001 * threshold + width)[near].all()


@pytest.mark.parametrize("base", [PGD(eps=0.5, norm="l2", steps=3), IFGSM(eps=0.05, steps=3)], ids=["l2", "linf"])
def test_smoothing_afterwards_stays_in_the_ball_and_pays_for_its_tries(base):
    model, images, labels, _ = problem()
    first = run(base, model, images, labels, key=KEY)
    result = run(Smoothed(base, tries=4), model, images, labels, key=KEY)
    success = np.asarray(first.success)
    assert success.any()
    assert not np.asarray(result.success & ~first.success).any()
    assert (np.asarray(getattr(result, getattr(base, "norm", "linf"))) <= base.eps * 1.0001).all()
    np.testing.assert_array_equal(result.forward, np.asarray(first.forward) + 4 * success)
    np.testing.assert_array_equal(result.backward, first.backward)
    won = np.asarray(result.success)
    assert (np.asarray(result.iterations)[won] >= base.iterations).all()


def test_smoothing_afterwards_without_smoothing_is_the_attack():
    model, images, labels, _ = problem()
    base = IFGSM(eps=0.05, steps=3)
    first = run(base, model, images, labels, key=KEY)
    result = run(Smoothed(base, alpha=0.0, tries=1), model, images, labels, key=KEY)
    np.testing.assert_array_equal(result.success, first.success)
    np.testing.assert_allclose(result.images, first.images, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SmoothCW(alpha=1.0), ValueError, r"SmoothCW.alpha must be in \[0, 1\), got 1.0"),
        (lambda: SmoothPGD(alpha=-0.5), ValueError, r"SmoothPGD.alpha must be in \[0, 1\)"),
        (lambda: SmoothBIM(lam=-1.0), ValueError, "SmoothBIM.lam must be at least 0, finite, got -1.0"),
        (lambda: Smoothed(CW(), alpha=2.0), ValueError, r"Smoothed.alpha must be in \[0, 1\)"),
        (lambda: Smoothed(CW), TypeError, "Smoothed.base must be an attack, such as CW()"),
        (lambda: Smoothed("cw"), TypeError, "Smoothed.base must be an attack"),
        (lambda: Smoothed((CW(), PGD())), ValueError, "Smoothed.base must be one attack, got 2"),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_an_attack_smoothed_afterwards_as_text():
    attack = from_spec("smoothed:base=cw(steps=50,kappa=1),alpha=0.9,tries=3", ATTACKS)
    assert attack == Smoothed(CW(steps=50, kappa=1.0), alpha=0.9, tries=3)
    nested = from_spec("smoothed:base=mifgsm(transforms=ni+vmi(samples=5),steps=3)", ATTACKS)
    assert nested.base.steps == 3
    assert [each.name for each in nested.base.transforms] == ["ni", "vmi"]
    written = record(attack)
    assert written["attack"] == "smoothed"
    assert written["base"]["name"] == "cw"
    assert written["base"]["steps"] == 50
    with pytest.raises(ValueError, match="unknown part 'cww' of smoothed:base; did you mean 'cw'"):
        from_spec("smoothed:base=cww", ATTACKS)
