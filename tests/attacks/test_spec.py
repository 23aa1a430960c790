"""Attacks as text: defaults, presets, fractions, and errors that name what was meant."""

import pytest

from jaxinterp.attacks import ATTACKS, CW, IFGSM, PGD, StrAttack
from jaxinterp.attacks.spec import describe, from_spec, parameters


def test_values_and_defaults():
    assert from_spec("ifgsm", ATTACKS) == IFGSM()
    assert from_spec(" IFGSM : eps=4/255 , steps=7 ", ATTACKS) == IFGSM(eps=4 / 255, steps=7)
    assert from_spec("pgd:norm=L2,eps=2,random_start=no,step_size=none", ATTACKS) == PGD(
        norm="l2", eps=2.0, random_start=False
    )
    assert from_spec("pgd:step_size=0.5", ATTACKS) == PGD(step_size=0.5)
    chosen = from_spec("strattack:group=4,stride=none", ATTACKS)
    assert chosen == StrAttack(group=4)
    assert type(chosen.group) is int


def test_presets_stand_behind_what_is_given():
    presets = {"cw": {"steps": 50, "initial_const": 1.0}}
    assert from_spec("cw:steps=9", ATTACKS, presets) == CW(steps=9, initial_const=1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cww", r"unknown attack 'cww'; did you mean 'cw'"),
        ("deepfool", "unknown attack 'deepfool'; known: ifgsm, pgd, cw"),
        ("cw:stepz=3", "unknown parameter 'stepz' of attack cw; did you mean 'steps'"),
        ("cw:steps", "unknown parameter 'steps'"),
        ("cw:steps=many", "cw:steps must be a whole number, got 'many'"),
        ("cw:steps=1.5", "whole number"),
        ("strattack:group=1.5", "strattack:group must be a whole number or none, got '1.5'"),
        ("pgd:step_size=small", "pgd:step_size must be a number or none, got 'small'"),
        ("ifgsm:eps=1/0", "ifgsm:eps must be a number"),
        ("ifgsm:stop_on_success=maybe", "true or false"),
    ],
)
def test_errors(text, message):
    with pytest.raises(ValueError, match=message):
        from_spec(text, ATTACKS)


def test_parameters_rebuild_the_attack_and_describe_it():
    for attack in (IFGSM(steps=3), PGD(norm="l2"), CW(kappa=2.0)):
        assert type(attack)(**parameters(attack)) == attack
    assert describe(IFGSM()) == "eps=0.03137, kappa=0, steps=20, stop_on_success=False"
