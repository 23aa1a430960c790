"""Bad input to `run` is refused by name, with what was given, before the model runs or anything is compiled."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer

from jaxinterp import attacks
from jaxinterp.attacks import CW, FGSM, IFGSM, PGD, driver, run
from jaxinterp.attacks.driver import RANGES, coerce

BATCH, CLASSES = 3, 4
IMAGES = np.random.default_rng(0).uniform(size=(BATCH, 5, 6, 2)).astype(np.float32)
LABELS = np.array([0, 3, 1])
TARGETS = np.array([1, 2, 0])


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    """Shapes may be traced; asking for a program fails the test."""

    def refuse(*args):
        raise AssertionError("compiled before the input was checked")

    for name in ("_start", "_advance", "_finish", "_example_keys"):
        monkeypatch.setattr(driver, name, refuse)


def model(images):
    assert isinstance(images, Tracer), "the model ran on values"
    return images.reshape(images.shape[0], -1)[:, :CLASSES]


def attempt(attack=None, model=model, images=IMAGES, labels=LABELS, targets=TARGETS, key=None, **kwargs):
    attack, key = IFGSM() if attack is None else attack, jax.random.key(0) if key is None else key
    return run(attack, model, images, labels, targets, key=key, **kwargs)


def changed(value):
    images = IMAGES.copy()
    images[1, 2, 3, 1] = value
    return images


def with_field(attack, name, value):
    """An attack built past the types that the tests check in constructors."""
    attack = dataclasses.replace(attack)
    object.__setattr__(attack, name, value)
    return attack


BAD = {
    "images of rank 3": ({"images": IMAGES[0]}, ValueError, r"images must be \[B,H,W,C\], got shape \(5, 6, 2\)"),
    "8-bit images": ({"images": np.zeros((BATCH, 5, 6, 2), np.uint8)}, TypeError, "images must be floats.*uint8.*255"),
    "images with NaN": ({"images": changed(np.nan)}, ValueError, r"images must be finite and in \[0, 1\]"),
    "images with inf": ({"images": changed(np.inf)}, ValueError, r"images must be finite and in \[0, 1\].*inf"),
    "images above 1": ({"images": changed(1.01)}, ValueError, r"images must be .*in \[0, 1\].*1\.01"),
    "images below 0": ({"images": changed(-0.01)}, ValueError, r"images must be .*in \[0, 1\].*-0\.01"),
    "images of text": ({"images": np.array("cat")}, TypeError, "images must be an array"),
    "labels as floats": ({"labels": LABELS.astype(np.float32)}, TypeError, "labels must be integers, got float32"),
    "labels too large": ({"labels": np.array([0, 4, 1])}, ValueError, "labels must be classes from 0 to 3.* 1 has 4"),
    "labels negative": ({"labels": np.array([-1, 3, 1])}, ValueError, "labels must be classes from 0 to 3.* 0 has -1"),
    "too few labels": ({"labels": LABELS[:2]}, ValueError, r"labels must have shape \[3\].*\(2,\)"),
    "one-hot labels": ({"labels": np.eye(3, 4, dtype=int)}, ValueError, r"labels must have shape \[3\].*\(3, 4\)"),
    "targets as floats": ({"targets": TARGETS / 1.0}, TypeError, "targets must be integers, got float"),
    "targets too large": ({"targets": np.array([1, 2, 9])}, ValueError, "targets must be classes.* 2 has 9"),
    "one target for all": ({"targets": np.array(1)}, ValueError, r"targets must have shape \[3\]"),
    "target is label": ({"targets": np.array([1, 3, 0])}, ValueError, "targets must differ from labels.* 1 .* 3"),
    "support of another size": (
        {"support": np.ones((BATCH, 5, 5, 1), bool)},
        ValueError,
        r"support must broadcast to the images' shape \(3, 5, 6, 2\), got \(3, 5, 5, 1\)",
    ),
    "support in between": ({"support": np.full(IMAGES.shape, 0.5)}, ValueError, "support must be boolean, or 0 and 1"),
    "support with NaN": ({"support": np.full(IMAGES.shape, np.nan)}, ValueError, "support must be boolean"),
    "eps negative": ({"attack": IFGSM(eps=-0.1)}, ValueError, r"IFGSM.eps must be finite and not negative, got -0\.1"),
    "eps NaN": ({"attack": PGD(eps=float("nan"))}, ValueError, "PGD.eps must be finite.* nan"),
    "one eps infinite": ({"attack": PGD(eps=jnp.array([0, np.inf, 1]))}, ValueError, "PGD.eps must be finite.*inf"),
    "too few eps": (
        {"attack": PGD(eps=jnp.full(2, 0.1))},
        ValueError,
        r"PGD.eps must be one number, or one for each of 3 examples, got shape \(2,\)",
    ),
    "step size negative": ({"attack": IFGSM(step_size=-1.0)}, ValueError, "IFGSM.step_size must be"),
    "kappa negative": ({"attack": CW(kappa=-1.0)}, ValueError, "CW.kappa must be"),
    "const NaN": ({"attack": CW(initial_const=float("nan"))}, ValueError, "CW.initial_const must be"),
    "no steps": ({"attack": IFGSM(steps=0)}, ValueError, "IFGSM.steps must be at least 1, got 0"),
    "no search steps": ({"attack": CW(search_steps=0)}, ValueError, "CW.search_steps must be at least 1, got 0"),
    "steps as a bool": (
        {"attack": with_field(IFGSM(), "steps", True)},
        TypeError,
        "IFGSM.steps must be a whole number",
    ),
    "too many steps": ({"attack": IFGSM(steps=2**40)}, ValueError, r"IFGSM.steps must be at least 1 and below 2\*\*31"),
    "no eps": ({"attack": with_field(PGD(), "eps", None)}, TypeError, "PGD.eps must be a number, or one for every"),
    "eps of text": ({"attack": with_field(PGD(), "eps", [0.1, "b", 0.2])}, TypeError, "PGD.eps must be a number"),
    "a class of attack": ({"attack": PGD}, TypeError, r"attack must be an instance, such as PGD\(\)"),
    "label of 64 bits": ({"labels": np.array([0, 2**32, 1])}, ValueError, "labels must be classes.* 1 has 4294967296"),
    "too few ids": ({"ids": [1, 2]}, ValueError, r"ids must have shape \[3\]"),
    "ids of text": ({"ids": ["a", "b", "c"]}, TypeError, "ids must be integers"),
    "negative ids on a device": ({"ids": jnp.array([0, 1, -1])}, ValueError, "ids must be from 0 to"),
    "several keys": ({"key": jax.random.split(jax.random.key(0))}, TypeError, r"key must be a single key.*\(2,\)"),
    "an array for a key": ({"key": jnp.zeros(2)}, TypeError, r"key must be a single key.*float32"),
    "ids of 64 bits": ({"ids": [0, 1, 2**40]}, ValueError, "ids must be from 0 to"),
    "unknown norm": (
        {"attack": with_field(PGD(), "norm", "l7")},
        ValueError,
        "norm must be one of linf, l2, l1, got 'l7'",
    ),
    "no norm": ({"attack": with_field(PGD(), "norm", None)}, ValueError, "norm must be one of linf, l2, l1, got None"),
    "several norms": ({"attack": with_field(PGD(), "norm", ("l2",))}, ValueError, "norm must be one of linf, l2, l1"),
    "a word as a number": ({"attack": with_field(CW(), "loss", 1)}, ValueError, "CW.loss must be one of margin, ce"),
    "a flag of text": (
        {"attack": with_field(PGD(), "random_start", "no")},
        TypeError,
        "PGD.random_start must be True or False, got 'no'",
    ),
    "eps beyond floats": ({"attack": with_field(PGD(), "eps", 10**400)}, TypeError, "PGD.eps must be a number"),
    "no images": ({"images": IMAGES[:0], "labels": LABELS[:0]}, ValueError, "images: expected at least one image"),
    "whole logits": (
        {"model": lambda x: model(x).astype(jnp.int32)},
        TypeError,
        "model must return floats, got int32",
    ),
    "one logit": ({"model": lambda x: x[:, 0, 0, 0]}, ValueError, r"model must map .* to logits \[3,K\], got \(3,\)"),
    "one class": ({"model": lambda x: x[:, 0, 0, :1]}, ValueError, r"model must have at least two classes.*\(3, 1\)"),
    "one row of logits": ({"model": lambda x: x[:1, 0, 0]}, ValueError, r"model must map .*\[3,K\], got \(1, 2\)"),
    "logits in a tuple": (
        {"model": lambda x: (model(x), x)},
        ValueError,
        r"model must map .* to logits \[3,K\], got tuple",
    ),
    "no model": ({"model": "resnet"}, TypeError, "model"),
    "no attack": ({"attack": "cw"}, TypeError, "attack"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=f"(?s){message}"):
        attempt(**arguments)


OUTSIDE = {"positive": (0.0,), "below 1": (1.0,), "from 0 to 1": (1.01,), "from 1 to 100": (0.5, 101.0)}
PARTS = [*attacks.ATTACKS.values(), *attacks.TRANSFORMS.values()]


@pytest.mark.parametrize("part", [part for part in PARTS if hasattr(part, "ranges")])
def test_numbers_outside_their_range_are_refused(part):
    assert OUTSIDE.keys() == RANGES.keys()
    for name, within in part.ranges.items():
        for value in OUTSIDE[within]:
            for given in (value, jnp.full(BATCH, value)):
                attack = part(**{name: given})
                attack = attacks.MIFGSM(transforms=(attack,)) if part in attacks.TRANSFORMS.values() else attack
                with pytest.raises(ValueError, match=rf"^{part.__name__}\.{name} must be {within}, got \[?{value:g}"):
                    coerce(attack)


def test_a_range_that_the_documentation_states_is_checked():
    """And the documentation states what is checked."""
    stated = {}
    for part in PARTS:
        described = (part.__doc__ or "").partition("Attributes:")[2]
        for name, meaning in re.findall(r"^        (\w+): (.*(?:\n {12}.*)*)", described, re.MULTILINE):
            for within in RANGES:
                if re.search(rf"\b{within}\b", meaning):
                    stated[part.__name__, name] = within
    assert stated == {(part.__name__, n): w for part in PARTS for n, w in getattr(part, "ranges", {}).items()}


def test_the_guard_sees_a_compilation():
    with pytest.raises(AssertionError, match="compiled before"):
        attempt()


@pytest.mark.parametrize("value", [0.5, -0.25, 1.5, np.inf, np.nan])
def test_devices_find_the_extremes_that_the_host_finds(value):
    images = jnp.asarray(changed(value))
    there = [float(x) for x in driver._extremes(images)]
    np.testing.assert_equal(there, [float(np.min(images)), float(np.max(images))])
    np.testing.assert_equal(driver._range(images), tuple(there))


def test_numbers_of_the_host_stay_there():
    """An array of a device for each of them would be a launch for each, in every call."""
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(coerce(PGD(eps=0.1))))
    [eps, *_] = jax.tree.leaves(coerce(PGD(eps=jnp.array([0.1, 0.2], jnp.float16))))
    assert isinstance(eps, jax.Array)
    assert eps.dtype == jnp.float32


def past_the_checks_of_tests(attack, **fields):
    """The attack with values that its annotations do not allow, which are not checked outside tests."""
    for name, value in fields.items():
        object.__setattr__(attack, name, value)
    return attack


@pytest.mark.parametrize(
    ("attack", "kind", "message"),
    [
        (
            past_the_checks_of_tests(attacks.Chain((FGSM(),)), stages=[FGSM(), PGD()]),
            TypeError,
            "Chain.stages must be a tuple of its parts, got a list",
        ),
        (
            attacks.Chain((past_the_checks_of_tests(PGD(), eps=[0.1, 0.2]),)),
            ValueError,
            "Chain.stages[0].eps must be one number, or one for each of 3 examples, got shape (2,)",
        ),
        (
            past_the_checks_of_tests(PGD(), eps=jnp.full((BATCH, 1, 1, 1), 0.1)),
            ValueError,
            "PGD.eps must be one number, or one for each of 3 examples, got shape (3, 1, 1, 1)",
        ),
    ],
)
def test_parts_of_an_attack_are_checked_as_it_is(attack, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        attempt(attack)


def test_parts_of_an_attack_are_instances():
    with pytest.raises(TypeError, match=r"^Chain.stages must hold instances, such as IFGSM\(\), got the class"):
        driver._checked(attacks.Chain((PGD(), IFGSM)))


def test_a_number_of_steps_is_no_text():
    with pytest.raises(TypeError, match=r"^PGD.steps must be a whole number, got '10'"):
        driver._checked(past_the_checks_of_tests(PGD(), steps="10"))
