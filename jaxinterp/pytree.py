"""Frozen dataclasses that are pytrees."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


def static(**kwargs: Any) -> Any:
    """A field that is part of a pytree's structure: it selects the compiled program instead of being an input."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static))
def pytree(cls: type[T]) -> type[T]:
    """Makes a class a frozen dataclass and a pytree, whose fields are leaves unless they are `static`.

    Unlike `jax.tree_util.register_dataclass`, rebuilding one does not call its constructor: transformations put
    things other than arrays into the fields (specs, axes, placeholders), which the declared types do not describe.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # it is a dataclass now
    data = [f.name for f in fields if not f.metadata.get("static")]
    meta = [f.name for f in fields if f.metadata.get("static")]

    def with_keys(node):
        children = [(jax.tree_util.GetAttrKey(name), getattr(node, name)) for name in data]
        return children, tuple(getattr(node, name) for name in meta)

    def flatten(node):
        return [getattr(node, name) for name in data], tuple(getattr(node, name) for name in meta)

    def unflatten(aux, children):
        node = object.__new__(cls)
        for names, values in ((data, children), (meta, aux)):
            for name, value in zip(names, values, strict=True):
                object.__setattr__(node, name, value)
        return node

    jax.tree_util.register_pytree_with_keys(cls, with_keys, unflatten, flatten)
    return cls
