"""Attacks as text: defaults, presets, fractions, and errors that name what was meant."""

import dataclasses
import json
import re

import pytest

from jaxinterp.attacks import ATTACKS, CW, IFGSM, MIFGSM, PGD, DiverseInputs, Nesterov, StrAttack, VarianceTuning
from jaxinterp.attacks.spec import describe, explain, from_spec, parameters, record


def test_values_and_defaults():
    assert from_spec("ifgsm", ATTACKS) == IFGSM()
    assert from_spec(" IFGSM : eps=4/255 , steps=7 ", ATTACKS) == IFGSM(eps=4 / 255, steps=7)
    assert from_spec("pgd:norm=L2,eps=2,random_start=no,step_size=none", ATTACKS) == PGD(
        norm="l2", eps=2.0, random_start=False
    )
    assert from_spec("pgd:step_size=0.5", ATTACKS) == PGD(step_size=0.5)
    chosen = from_spec("strattack:group=4,stride=none", ATTACKS)
    assert isinstance(chosen, StrAttack)
    assert chosen == StrAttack(group=4)
    assert type(chosen.group) is int


def test_presets_stand_behind_what_is_given():
    presets = {"cw": {"steps": 50, "initial_const": 1.0}}
    assert from_spec("cw:steps=9", ATTACKS, presets) == CW(steps=9, initial_const=1.0)


def test_parts_by_name_with_parameters_in_brackets():
    assert from_spec("mifgsm:transforms=ni", ATTACKS) == MIFGSM(transforms=(Nesterov(),))
    text = "mifgsm:transforms= vmi(samples=5, beta=3/2) + NI+di(smallest=0.8) , steps=7"
    attack = MIFGSM(transforms=(VarianceTuning(samples=5), Nesterov(), DiverseInputs(smallest=0.8)), steps=7)
    assert from_spec(text, ATTACKS) == attack
    assert "transforms=vmi(beta=1.5, samples=5)+ni+di(probability=0.5, smallest=0.8), steps=7" in describe(attack)
    assert "transforms" not in describe(MIFGSM())
    assert from_spec("mifgsm:transforms=", ATTACKS) == MIFGSM()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cww", r"unknown attack 'cww'; did you mean 'cw'"),
        ("voodoo", "unknown attack 'voodoo'; known: fgsm, ifgsm, pgd"),
        ("cw:stepz=3", "unknown parameter 'stepz' of attack cw; did you mean 'steps'"),
        ("cw:steps", "parameter 'steps' of attack cw needs a value, as in steps=VALUE"),
        ("cw:kappa=1,steps=3,kappa=5", "parameter 'kappa' of attack cw is given twice"),
        ("cw:steps=many", "cw:steps must be a whole number, got 'many'"),
        ("cw:steps=1.5", "whole number"),
        ("strattack:group=1.5", "strattack:group must be a whole number or none, got '1.5'"),
        ("pgd:step_size=small", "pgd:step_size must be a number or none, got 'small'"),
        ("ifgsm:eps=1/0", "ifgsm:eps must be a number"),
        ("ifgsm:stop_on_success=maybe", "true or false"),
        ("mifgsm:transforms=ni+dii", "unknown part 'dii' of mifgsm:transforms; did you mean 'di'"),
        ("mifgsm:transforms=vmi(sample=5)", "unknown parameter 'sample' of vmi; did you mean 'samples'"),
        ("mifgsm:transforms=vmi(samples=x)", "mifgsm:transforms=vmi:samples must be a whole number, got 'x'"),
        ("watermark:watermarks=3", "unknown parameter 'watermarks' of attack watermark"),
        ("hopskipjump:starts=3", "parameter 'starts' of attack hopskipjump holds images, which text cannot give"),
        ("key-pixels:weights=1", "parameter 'weights' of attack key-pixels holds images"),
        ("mifgsm:transforms=si+vmi", "vmi must come before"),
    ],
)
def test_errors(text, message):
    with pytest.raises(ValueError, match=message):
        from_spec(text, ATTACKS)


def test_parameters_rebuild_the_attack_and_describe_it():
    for attack in (IFGSM(steps=3), PGD(norm="l2"), CW(kappa=2.0)):
        assert type(attack)(**parameters(attack)) == attack
    assert record(IFGSM(steps=3)) == {"attack": "ifgsm", **parameters(IFGSM(steps=3))}
    written = json.loads(json.dumps(record(MIFGSM(transforms=(VarianceTuning(samples=5), Nesterov())))))
    assert written["transforms"] == [{"name": "vmi", "beta": 1.5, "samples": 5}, {"name": "ni"}]
    assert describe(IFGSM()) == "eps=0.03137, kappa=0, steps=20, stop_on_success=False"


def test_the_list_explains_every_parameter_of_every_attack():
    sections = "\n".join(explain(ATTACKS)).strip().split("\n\n")
    assert [section.splitlines()[0] for section in sections] == list(ATTACKS)
    for section, attack in zip(sections, ATTACKS.values(), strict=True):
        assert len(section.splitlines()[1]) > 20
        for field in dataclasses.fields(attack):
            if field.name in (*getattr(attack, "shared", ()), *getattr(attack, "arrays", ())):
                assert f"{field.name}=" not in section
                continue
            [meaning] = re.findall(rf"^      {field.name}=[^:]+: (.+)$", section, re.MULTILINE) or [""]
            assert len(meaning) > 3, f"{attack.name}:{field.name} is not explained"


def test_the_list_explains_every_part_of_a_parameter():
    lists = dict(zip(ATTACKS, "\n".join(explain(ATTACKS)).strip().split("\n\n"), strict=True))
    section = lists["mifgsm"]
    _, _, listed = section.partition("  transforms=none: ")
    for name, part in MIFGSM.parts["transforms"].items():
        [meaning] = re.findall(rf"^          {name}: (.+)$", listed, re.MULTILINE)
        assert len(meaning) > 20
        _, _, after = listed.partition(f"          {name}: ")
        for field in dataclasses.fields(part):
            assert re.match(rf"[^:]+\n( {{14}}.+\n)*? {{14}}{field.name}=\S+: ...", after), f"{name}:{field.name}"
    assert listed.index("  ni: ") < listed.index("  steps=10: "), "below the parameter they belong to"
    assert "one of the attacks in this list" in lists["smoothed"].lower()
    assert "Joined by +" not in lists["smoothed"]
    assert "Joined by +" not in lists["pgd"]
