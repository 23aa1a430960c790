"""Attacks as text, for command lines and configs: `NAME` or `NAME:parameter=value,parameter=value`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxinterp.attacks.attack import Attack
from jaxinterp.network import suggest


def from_spec(text: str, known: Mapping[str, type], presets: Mapping[str, Mapping[str, Any]] | None = None) -> Attack:
    """The attack that `text` names, such as `cw:steps=100,kappa=5` or `ifgsm:eps=4/255`.

    Args:
        text: name of the attack, and parameters that differ from its defaults; numbers may be fractions.
        known: attacks by name.
        presets: parameters by name of attack that replace the defaults.

    Raises:
        ValueError: an unknown attack or parameter (with the closest names), or a value that does not fit.
    """
    name, _, rest = text.strip().partition(":")
    name = name.strip().lower()
    if name not in known:
        raise ValueError(f"unknown attack {name!r}{suggest(name, known)}")
    fields = {field.name: field for field in dataclasses.fields(known[name])}
    values = dict((presets or {}).get(name, {}))
    for item in filter(None, (part.strip() for part in rest.split(","))):
        parameter, equals, value = (part.strip() for part in item.partition("="))
        if not equals or parameter not in fields:
            raise ValueError(f"unknown parameter {parameter!r} of attack {name}{suggest(parameter, fields)}")
        values[parameter] = _value(value, fields[parameter], f"{name}:{parameter}")
    return known[name](**values)


def parameters(attack: Attack) -> dict[str, Any]:
    """Every hyper-parameter of an attack, for a config."""
    return {field.name: getattr(attack, field.name) for field in dataclasses.fields(attack)}  # type: ignore[arg-type]  # every attack is one


def _value(text: str, field: dataclasses.Field, name: str) -> Any:
    default = field.default
    whole = isinstance(default, int) or bool(field.metadata.get("static"))  # words and flags apart
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if isinstance(default, str):
            return text.lower()
        if default is None and text.lower() == "none":
            return None
        if whole:
            return int(text)
        numerator, _, denominator = text.partition("/")
        return float(numerator) / float(denominator or 1)
    except (ValueError, KeyError, ZeroDivisionError):
        kind = "true or false" if isinstance(default, bool) else "a whole number" if whole else "a number"
        kind += " or none" if default is None else ""
        raise ValueError(f"{name} must be {kind}, got {text!r}") from None


def describe(attack: Attack) -> str:
    """All hyper-parameters in a line, such as `eps=0.0314, steps=20`; those that are None are chosen by others."""

    def shown(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name}={shown(v)}" for name, v in parameters(attack).items() if v is not None)
