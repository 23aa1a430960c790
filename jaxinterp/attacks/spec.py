"""Attacks as text, for command lines and configs: `NAME` or `NAME:parameter=value,parameter=value`.

A parameter made of parts takes their names, joined by `+`, each with parameters of its own in brackets where they
differ from the defaults: `mifgsm:steps=20,transforms=ni+vmi(samples=5,beta=1)`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from jaxinterp.attacks.attack import Attack
from jaxinterp.network import suggest


def from_spec(text: str, known: Mapping[str, type], presets: Mapping[str, Mapping[str, Any]] | None = None) -> Attack:
    """The attack that `text` names, such as `cw:steps=100,kappa=5` or `ifgsm:eps=4/255`.

    An attack whose fields hold parts lists the parts of each by name in a class variable `parts`.

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
    return _build(known[name], rest, f"attack {name}", name, dict((presets or {}).get(name, {})))


def _build(kind: type, text: str, whole: str, name: str, values: dict[str, Any]) -> Any:
    """An attack or a part of one, from `values` and what `text` says."""
    fields = {field.name: field for field in _named(kind)}
    parts, given = getattr(kind, "parts", {}), set()
    for item in _split(text, ","):
        parameter, equals, value = (part.strip() for part in item.partition("="))
        if parameter in getattr(kind, "arrays", ()):
            raise ValueError(f"parameter {parameter!r} of {whole} holds images, which text cannot give")
        if parameter not in fields:
            raise ValueError(f"unknown parameter {parameter!r} of {whole}{suggest(parameter, fields)}")
        if not equals:
            raise ValueError(f"parameter {parameter!r} of {whole} needs a value, as in {parameter}=VALUE")
        if parameter in given:
            raise ValueError(f"parameter {parameter!r} of {whole} is given twice")
        given.add(parameter)
        if parameter in parts:
            values[parameter] = tuple(
                _part(part, parts[parameter], f"{name}:{parameter}")
                for part in _split(value, "+")
                if value.lower() != "none"
            )
        else:
            words = parameter in getattr(kind, "choices", {})
            values[parameter] = _value(value.lower() if words else value, fields[parameter], f"{name}:{parameter}")
    return kind(**values)


def _part(text: str, known: Mapping[str, type], whole: str) -> Any:
    match = re.fullmatch(r"([^()]*)(?:\((.*)\))?", text)
    name, inside = (match[1].strip().lower(), match[2] or "") if match else (text, "")
    if name not in known:
        raise ValueError(f"unknown part {name!r} of {whole}{suggest(name, known)}")
    return _build(known[name], inside, name, f"{whole}={name}", {})


def _split(text: str, separator: str) -> list[str]:
    """What stands between separators, except those in brackets, which may be nested."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == separator and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def parameters(attack: Attack) -> dict[str, Any]:
    """Every hyper-parameter of an attack: all fields but arrays that examples share, or images of each."""
    return {field.name: getattr(attack, field.name) for field in _named(attack)}


def _named(attack: Any) -> list[dataclasses.Field]:
    """The fields that text can hold."""
    without = (*getattr(attack, "shared", ()), *getattr(attack, "arrays", ()))
    return [field for field in dataclasses.fields(attack) if field.name not in without]


def record(attack: Attack) -> dict[str, Any]:
    """The attack's name and every hyper-parameter, as JSON holds them, for a config; parts by their names."""
    return {"attack": attack.name, **{name: _plain(value) for name, value in parameters(attack).items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    if not dataclasses.is_dataclass(value):
        return value
    fields = {field.name: _plain(getattr(value, field.name)) for field in _named(value)}
    return {"name": value.name, **fields}  # type: ignore[attr-defined]  # parts have names


def _value(text: str, field: dataclasses.Field, name: str) -> Any:
    default = field.default
    whole = isinstance(default, int) or bool(field.metadata.get("static"))  # words and flags apart
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if isinstance(default, str):
            return text
        if default is None and text.lower() == "none":
            return None
        if isinstance(default, tuple):
            return tuple(int(part) for part in _split(text, "+"))
        if whole:
            return int(text)
        numerator, _, denominator = text.partition("/")
        return float(numerator) / float(denominator or 1)
    except (ValueError, KeyError, ZeroDivisionError):
        kind = "true or false" if isinstance(default, bool) else "a whole number" if whole else "a number"
        kind = "whole numbers joined by +" if isinstance(default, tuple) else kind
        kind += " or none" if default is None else ""
        raise ValueError(f"{name} must be {kind}, got {text!r}") from None


def describe(attack: Attack) -> str:
    """All hyper-parameters in a line, such as `eps=0.0314, steps=20`; those that are None are chosen by others."""
    return ", ".join(f"{name}={_shown(v)}" for name, v in parameters(attack).items() if v not in (None, ()))


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(_shown, value))
    if not dataclasses.is_dataclass(value):
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    fields = {field.name: getattr(value, field.name) for field in _named(value)}
    inside = ", ".join(f"{name}={_shown(v)}" for name, v in fields.items())
    return f"{value.name}({inside})" if inside else value.name  # type: ignore[attr-defined]  # parts have names


def explain(known: Mapping[str, type]) -> Iterator[str]:
    """Every attack with what it does and its parameters, as lines of text, from the docstrings."""
    for name, attack in known.items():
        what, meanings = _described(attack)
        yield f"{name}"
        for paragraph in what.split("\n\n"):
            yield from _wrapped(paragraph, 4)
        for field in _named(attack):
            yield from _wrapped(_explained(attack, field, meanings), 6, hanging=4)
            parts = getattr(attack, "parts", {}).get(field.name, {})
            if parts is known:
                yield from _wrapped("One of the attacks in this list, as in cw(steps=200).", 10)
            elif parts:
                yield from _wrapped("Joined by +, each with parameters in brackets where it needs others:", 10)
                yield from _parts(parts)
        yield ""


def _parts(known: Mapping[str, type]) -> Iterator[str]:
    """The parts that a parameter is made of, and their parameters."""
    for name, part in known.items():
        what, meanings = _described(part)
        yield from _wrapped(f"{name}: {' '.join(what.split())}", 10, hanging=4)
        for field in _named(part):
            yield from _wrapped(_explained(part, field, meanings), 14, hanging=4)


def _described(kind: type) -> tuple[str, dict[str, str]]:
    """What it does, and what its parameters mean, from the docstring."""
    what, _, described = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:")
    return what.strip(), _meanings(described)


def _explained(kind: type, field: dataclasses.Field, meanings: Mapping[str, str]) -> str:
    """NAME=DEFAULT (words): meaning."""
    default, choices = field.default, getattr(kind, "choices", {})
    shown = "none" if default in (None, ()) else getattr(default, "name", None) or _shown(default)
    words = f" ({', '.join(choices[field.name])})" if field.name in choices else ""
    return f"{field.name}={shown}{words}: {meanings.get(field.name, '')}"


def _wrapped(text: str, indent: int, hanging: int = 0) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()), 100, initial_indent=" " * indent, subsequent_indent=" " * (indent + hanging)
    )


def _meanings(described: str) -> dict[str, str]:
    """Parameter to meaning, from the Attributes section of a docstring."""
    found: dict[str, str] = {}
    last = None
    section, _, _ = described.partition("\nRaises:")
    for line in filter(str.strip, inspect.cleandoc(section).splitlines()):
        name, colon, meaning = line.partition(":")
        if colon and not line.startswith(" ") and name.isidentifier():
            last = name
            found[last] = meaning.strip()
        elif last is not None:
            found[last] += " " + line.strip()
    return found
