"""Smooth attacks: without smoothing they are the attacks they come from; with it, flat areas stay quiet."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxinterp import attacks
from jaxinterp.attacks import ATTACKS, CW, IFGSM, PGD, SmoothBIM, SmoothCW, Smoothed, SmoothPGD
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


# Pairs of a smooth attack and the one it comes from; alpha is given, so that its values share a program.
PAIRS = {
    "spgd": (SmoothPGD(alpha=0.95, lam=10.0, steps=7), PGD(norm="l2", random_start=False, steps=7)),
    "sbim": (SmoothBIM(alpha=0.95, lam=10.0, steps=7), IFGSM(steps=7)),
    "scw": (
        SmoothCW(alpha=0.95, lam=10.0, initial_const=0.1, search_steps=6, steps=100, cg_steps=20),
        CW(initial_const=0.1, search_steps=6, steps=100),
    ),
}


def pairs(*names):
    further = ("sbim",)
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=pytest.mark.exhaustive if n in further else ()) for n in names]
    )


@pairs("spgd", "sbim")
def test_without_smoothing_they_are_the_attacks_they_come_from(name):
    model, images, labels, _ = problem()
    smooth, rough = PAIRS[name]
    eps = {"spgd": 0.5, "sbim": 0.03}[name]
    found = run(dataclasses.replace(smooth, eps=eps, alpha=0.0), model, images, labels, key=KEY)
    expected = run(dataclasses.replace(rough, eps=eps), model, images, labels, key=KEY)
    assert np.asarray(expected.success).any()
    for field in ("success", "iterations", "forward", "backward"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))
    np.testing.assert_allclose(found.images, expected.images, atol=1e-6)


@pytest.mark.parametrize(("alpha", "most"), [(0.0, 1.05), (0.95, 2.0)])
def test_scw_comes_near_the_nearest_point_and_not_below_it(alpha, most):
    model, images, labels, weights = problem()
    result = run(dataclasses.replace(PAIRS["scw"][0], alpha=alpha, lr=0.002), model, images, labels, key=KEY)
    assert np.asarray(result.success).all()
    best = nearest(model, images, labels, weights)
    within = best > 0.02  # half of what a single step of Adam moves
    assert within.sum() >= 3
    ratio = (np.asarray(result.l2) / best)[within]
    assert ratio.min() > 0.999
    assert ratio.max() < most


@pairs("spgd", "sbim", "scw")
def test_perturbations_are_smooth_where_the_image_is_flat(name):
    model, images, labels, _ = problem()
    eps = {"spgd": {"eps": 1.5}, "sbim": {"eps": 0.1}, "scw": {}}[name]
    smooth, rough = (dataclasses.replace(attack, **eps) for attack in PAIRS[name])
    found = run(dataclasses.replace(smooth, alpha=0.99, lam=300.0), model, images, labels, key=KEY)
    other = run(rough, model, images, labels, key=KEY)
    both = np.asarray(found.success & other.success)
    assert both.sum() >= 3
    flat, noisy = (
        np.mean((roughness(found, images, part) / roughness(other, images, part))[both])
        for part in (slice(0, 5), slice(5, None))
    )
    assert flat < 0.7
    assert flat < 0.8 * noisy


def test_smoothing_afterwards_finds_how_long_the_smoothed_perturbation_must_be():
    """Along a direction the margin of a linear model is linear, so the length at which it vanishes is known."""
    model, images, labels, weights = problem()
    base = PGD(eps=50.0, step_size=0.15, norm="l2", random_start=False, steps=7)
    found = run(base, model, images, labels, key=KEY)
    assert np.asarray(found.success).all()
    r = np.asarray(attacks.smooth(found.images - images, images), np.float64).reshape(BATCH, -1)
    r *= np.asarray(found.l2)[:, None] / np.linalg.norm(r, axis=1, keepdims=True)
    z, rows, own = np.asarray(model(images), np.float64), np.arange(BATCH), np.asarray(labels)
    gap, slope = z[rows, own][:, None] - z, r @ weights
    with np.errstate(divide="ignore", invalid="ignore"):
        lengths = gap / (slope - slope[rows, own][:, None])
    threshold = np.where(lengths > 0, lengths, np.inf).min(1)

    tries = 8
    result = run(Smoothed(base, tries=tries), model, images, labels, key=KEY)
    near = threshold < 4  # beyond, the box is in the way
    assert near.sum() >= 3
    assert np.asarray(result.success)[near].all()
    doubled = np.ceil(np.log2(np.maximum(threshold, 1)))  # times until a success; then the interval is halved
    width = 2 ** np.maximum(doubled - 1, 0) / 2 ** (tries - 1 - doubled)
    length = np.asarray(result.l2) / np.asarray(found.l2)
    assert (length >= 0.999 * threshold)[near].all()
    assert (length <= 1.001 * threshold + width)[near].all()


@pytest.mark.parametrize(
    "base",
    [
        PGD(eps=0.5, step_size=0.15, norm="l2", random_start=False, steps=7),
        pytest.param(IFGSM(eps=0.05, step_size=0.02, steps=7), marks=pytest.mark.exhaustive),
    ],
    ids=["l2", "linf"],
)
def test_smoothing_afterwards_stays_in_the_ball_and_pays_for_its_tries(base):
    model, images, labels, _ = problem()
    first = run(base, model, images, labels, key=KEY)
    result = run(Smoothed(base), model, images, labels, key=KEY)
    success = np.asarray(first.success)
    assert success.any()
    assert not np.asarray(result.success & ~first.success).any()
    assert (np.asarray(getattr(result, getattr(base, "norm", "linf"))) <= base.eps * 1.0001).all()
    np.testing.assert_array_equal(result.forward, np.asarray(first.forward) + 8 * success)
    np.testing.assert_array_equal(result.backward, first.backward)
    won = np.asarray(result.success)
    assert (np.asarray(result.iterations)[won] >= base.iterations).all()


def test_smoothing_afterwards_stays_in_the_box_and_on_the_support():
    model, images, _, _ = problem()
    images = jnp.where(jnp.arange(images.shape[2])[:, None] % 3 == 0, images, jnp.round(images))
    labels, support = jnp.argmax(model(images), axis=1), np.arange(images.shape[1])[:, None, None] > 2
    result = run(Smoothed(CW(steps=60, search_steps=4)), model, images, labels, key=KEY, support=support)
    found, kept = np.asarray(result.images), np.broadcast_to(support, images.shape)
    assert np.asarray(result.success).any()
    assert found.min() >= 0
    assert found.max() <= 1
    np.testing.assert_array_equal(found[~kept], np.asarray(images)[~kept])
    assert (found == 0)[kept].any()
    assert (found != images)[kept].any()


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
    nested: Any = from_spec("smoothed:base=mifgsm(transforms=ni+vmi(samples=5),steps=3)", ATTACKS)
    assert nested.base.steps == 3
    assert [each.name for each in nested.base.transforms] == ["ni", "vmi"]
    written = record(attack)
    assert written["attack"] == "smoothed"
    assert written["base"]["name"] == "cw"
    assert written["base"]["steps"] == 50
    with pytest.raises(ValueError, match="unknown part 'cww' of smoothed:base; did you mean 'cw'"):
        from_spec("smoothed:base=cww", ATTACKS)
