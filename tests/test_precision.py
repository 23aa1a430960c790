"""The switch of precision: what it sets, what is restored, and what states it."""

import json

import jax
import jax.numpy as jnp
import pytest

from jaxinterp import cli, precision

NAME = "jax_default_matmul_precision"


def traced() -> str:
    return str(jax.make_jaxpr(lambda a: a @ a)(jnp.ones((2, 2))))


@pytest.mark.parametrize(("name", "found"), [("default", "None"), ("high", "HIGH"), ("highest", "HIGHEST")])
def test_using_and_restoring(name, found):
    before = jax.config.values[NAME]
    with precision.using(name):
        assert precision.current() == name
        text = traced()
        assert (f"Precision.{found}" in text) == (found != "None")
    assert jax.config.values[NAME] == before
    with precision.using("highest"), pytest.raises(ZeroDivisionError), precision.using("high"):
        raise ZeroDivisionError
    assert jax.config.values[NAME] == before


def test_none_changes_nothing():
    with precision.using("high"), precision.using(None):
        assert precision.current() == "high"


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("float32", "highest"),
        ("tensorfloat32", "high"),
        ("bfloat16", "default"),
        ("BF16_BF16_F32_X3", "BF16_BF16_F32_X3"),
    ],
)
def test_words_of_jax(word, name):
    with jax.default_matmul_precision(word):
        assert precision.current() == name


def test_every_command_takes_it(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("jaxinterp.weights.catalogue.table", lambda: seen.append(precision.current()) or [])
    for given in (["--precision", "highest", "models"], ["models", "--precision=high"], ["models"]):
        assert cli.main(given) == 0
    assert seen == ["highest", "high", precision.current()]
    assert cli.main(["--precision", "hihgest", "models"]) == 2
    assert "--precision must be one of default, high, highest, got 'hihgest'; did you mean" in capsys.readouterr().err
    assert cli.main(["models", "--precision"]) == 2
    assert "--precision: expected a value" in capsys.readouterr().err
    assert len(seen) == 3


def test_validation_is_at_the_highest_whatever_the_switch_says(monkeypatch, tmp_path, capsys):
    from jaxinterp.weights import validation

    seen = []
    apply = validation.capture

    def spied(*args):
        seen.append(precision.current())
        return apply(*args)

    monkeypatch.setattr(validation, "capture", spied)
    out = tmp_path / "v.json"
    assert cli.main(["--precision", "default", "validate", "carlini_mnist", "--out", str(out)]) == 0
    assert seen == ["highest"]
    assert json.loads(out.read_text())["matmul_precision"] == "highest"
    assert "PASS" in capsys.readouterr().out
