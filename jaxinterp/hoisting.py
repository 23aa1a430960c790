"""What the steps of a loop do to the weights, done once before it.

In the gradient of a convolution the kernel stands the other way round. XLA moves what does not change out of a loop,
but neither what only brings numbers into another order nor anything inside a branch, so that it would turn all kernels
in every step: for a ResNet-18 that is a tenth of the time of two cores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.extend.core as jex

X = TypeVar("X")

_TURNS = ("transpose", "rev")
_ARRANGES = (*_TURNS, "reshape", "squeeze", "slice", "pad")


def ahead(function: Callable[[Any, X], X], weights: Any, x: X) -> Callable[[X], X]:
    """`function(weights, x)` as a function of x, for arguments like `x`; what it turns of the weights is turned now.

    On other backends than the CPU the function is left as it is.

    Args:
        function: (weights, x) -> pytree.
        weights: a pytree of arrays.
        x: a pytree of arrays.
    """
    if jax.default_backend() != "cpu":
        return lambda x: function(weights, x)
    fixed, treedef = jax.tree.flatten(weights)
    leaves, form = jax.tree.flatten(x)

    def flat(*args):
        return function(treedef.unflatten(args[: len(fixed)]), form.unflatten(args[len(fixed) :]))

    closed, shape = jax.make_jaxpr(flat, return_shape=True)(*fixed, *leaves)
    closed = _lifted(closed, range(len(fixed)))
    turned = _turned(closed.jaxpr, closed.jaxpr.invars[: len(fixed)])
    known = dict(zip(turned, _values(closed, [*fixed, *leaves], turned), strict=True))
    structure = jax.tree.structure(shape)

    def remaining(x):
        return structure.unflatten(_values(closed, [*fixed, *jax.tree.leaves(x)], closed.jaxpr.outvars, known))

    return remaining


def _lifted(closed: jex.ClosedJaxpr, fixed: Sequence[int]) -> jex.ClosedJaxpr:
    """The same function, with the arguments at `fixed` turned before the branches and loops that turn them."""
    jaxpr = closed.jaxpr
    arranged = {jaxpr.invars[i] for i in fixed}
    for eqn in jaxpr.eqns:
        if _only_arranges(eqn, arranged):
            arranged.update(eqn.outvars)
    # Most branches of an attack never see the weights: they are not traced again.
    places = {i: _places(eqn, arranged) for i, eqn in enumerate(jaxpr.eqns) if eqn.primitive.name in _INSIDE}
    if not any(places.values()):
        return closed

    def function(*args):
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args), strict=True))
        for i, eqn in enumerate(jaxpr.eqns):
            inputs = [_read(atom, values) for atom in eqn.invars]
            inside = places.get(i)
            outputs = _INSIDE[eqn.primitive.name](eqn, inputs, inside) if inside else _bound(eqn, inputs)
            values.update(zip(eqn.outvars, outputs, strict=True))
        return [_read(atom, values) for atom in jaxpr.outvars]

    return jax.make_jaxpr(function)(*_specs(closed.in_avals))


def _choice(eqn: Any, inputs: Sequence[Any], fixed: Sequence[int]) -> Sequence[Any]:
    """A choice between functions, with the inputs at `fixed` turned before it."""
    index, *args = inputs
    fixed = [i - 1 for i in fixed if i > 0]
    branches = [_lifted(branch, fixed) for branch in eqn.params["branches"]]
    turned = [_turned(branch.jaxpr, [branch.jaxpr.invars[i] for i in fixed]) for branch in branches]
    values = list(args)
    for branch, variables in zip(branches, turned, strict=True):
        values += _values(branch, args, variables)
    specs = _specs([*branches[0].in_avals, *(var.aval for variables in turned for var in variables)])

    def part(branch, variables, first):
        def function(*args):
            known = dict(zip(variables, args[first : first + len(variables)], strict=True))
            return _values(branch, args[: len(branch.in_avals)], branch.jaxpr.outvars, known)

        return jax.make_jaxpr(function)(*specs)

    parts, first = [], len(args)
    for branch, variables in zip(branches, turned, strict=True):
        parts.append(part(branch, variables, first))
        first += len(variables)
    return eqn.primitive.bind(index, *values, **{**eqn.params, "branches": tuple(parts)})


def _scan(eqn: Any, inputs: Sequence[Any], fixed: Sequence[int]) -> Sequence[Any]:
    """A loop of known length, with those of the inputs at `fixed` turned before it that all its steps share."""
    same = eqn.params["num_consts"]
    fixed = [i for i in fixed if i < same]
    body = _lifted(eqn.params["jaxpr"], fixed)
    turned = _turned(body.jaxpr, [body.jaxpr.invars[i] for i in fixed])
    behind = same + len(turned)

    def function(*args):
        known = dict(zip(turned, args[same:behind], strict=True))
        return _values(body, [*args[:same], *args[behind:]], body.jaxpr.outvars, known)

    params, avals = dict(eqn.params), body.in_avals
    specs = _specs([*avals[:same], *(var.aval for var in turned), *avals[same:]])
    params |= {"jaxpr": jax.make_jaxpr(function)(*specs), "num_consts": behind}
    if linear := params.get("linear"):  # of some versions of JAX
        params["linear"] = (*linear[:same], *[False] * len(turned), *linear[same:])
    return eqn.primitive.bind(*inputs[:same], *_values(body, inputs, turned), *inputs[same:], **params)


_INSIDE = {"cond": _choice, "scan": _scan}


def _turned(jaxpr: jex.Jaxpr, fixed: Sequence[Any]) -> list[Any]:
    """The variables that are `fixed` ones in another order, and that other equations take."""
    arranged, turned = set(fixed), set()
    taken = {atom for atom in jaxpr.outvars if isinstance(atom, jex.Var)}
    for eqn in jaxpr.eqns:
        inputs = {atom for atom in eqn.invars if isinstance(atom, jex.Var)}
        if not _only_arranges(eqn, arranged):
            taken |= inputs
            continue
        arranged.update(eqn.outvars)
        if eqn.primitive.name in _TURNS or not inputs.isdisjoint(turned):
            turned.update(eqn.outvars)
    return [var for eqn in jaxpr.eqns for var in eqn.outvars if var in turned and var in taken]


def _only_arranges(eqn: Any, arranged: set[Any]) -> bool:
    inputs = [atom for atom in eqn.invars if isinstance(atom, jex.Var)]
    return eqn.primitive.name in _ARRANGES and bool(inputs) and arranged.issuperset(inputs)


def _values(
    closed: jex.ClosedJaxpr, args: Sequence[Any], wanted: Sequence[Any], known: Mapping[Any, Any] | None = None
) -> list[Any]:
    """The values of some variables, by what is needed for them alone.

    Where others are known, as in a function that goes on from there, what else it does (its effects) is done, too.
    """
    jaxpr, values = closed.jaxpr, dict(known or {})
    values.update(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args), strict=True))
    steps, missing = [], {atom for atom in wanted if isinstance(atom, jex.Var)}.difference(values)
    for eqn in reversed(jaxpr.eqns):
        if (known is not None and eqn.effects) or not missing.isdisjoint(eqn.outvars):
            steps.append(eqn)
            missing.update(atom for atom in eqn.invars if isinstance(atom, jex.Var) and atom not in values)
    for eqn in reversed(steps):
        values.update(zip(eqn.outvars, _bound(eqn, [_read(atom, values) for atom in eqn.invars]), strict=True))
    return [_read(atom, values) for atom in wanted]


def _bound(eqn: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    return outputs if eqn.primitive.multiple_results else [outputs]


def _read(atom: Any, values: Mapping[Any, Any]) -> Any:
    return atom.val if isinstance(atom, jex.Literal) else values[atom]


def _places(eqn: Any, variables: set[Any]) -> list[int]:
    """Where among its inputs those variables are."""
    return [i for i, atom in enumerate(eqn.invars) if isinstance(atom, jex.Var) and atom in variables]


def _specs(avals: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in avals]
