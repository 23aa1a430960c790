"""What is done to weights before a loop: the same values, and nothing of it left inside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.tree_util import Partial

from jaxinterp.attacks import DDN, IFGSM, driver, start
from jaxinterp.canonical import canonical
from jaxinterp.hoisting import ahead

RNG = np.random.default_rng(0)
WEIGHTS = {
    "kernel": jnp.asarray(RNG.normal(size=(3, 3, 4, 5)), jnp.float32),
    "other": (jnp.asarray(RNG.normal(size=(5, 7)), jnp.float32),),
}
X = jnp.asarray(RNG.normal(size=(2, 6, 6, 4)), jnp.float32)


def model(weights, x):
    y = lax.conv_general_dilated(x, weights["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.tanh(y).sum((1, 2)) @ weights["other"][0]


def step(weights, state):
    """A gradient inside two branches, beside something that is not done."""
    count, x = state
    logits, pull_back = jax.vjp(lambda x: model(weights, x), x)

    def moved(x):
        far = lambda: pull_back(jnp.cos(logits))[0]  # noqa: E731  # a branch
        return x - 0.1 * lax.cond(jnp.sum(x) < 1e6, far, lambda: lax.rev(x, (1,)))

    return count + 1, lax.cond(count < 3, moved, lambda x: x + 1, x)


def names(jaxpr):
    """The primitives of a jaxpr and of those inside it, with the shapes of what they take."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, eqn.invars[0].aval.shape if eqn.invars else ()
        for param in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "jaxpr")):
            if hasattr(param, "jaxpr"):
                yield from names(param.jaxpr)


def turns(function, *args):
    return [shape for name, shape in names(jax.make_jaxpr(function)(*args).jaxpr) if name in ("rev", "transpose")]


def test_kernels_are_turned_before_and_nowhere_else():
    state = (jnp.int32(0), X)
    assert (3, 3, 4, 5) in turns(step, WEIGHTS, state)
    prepared = ahead(step, WEIGHTS, state)
    assert turns(prepared, state) == [X.shape], "what is not made of the weights alone stays where it is"
    for _ in range(5):
        expected, state = step(WEIGHTS, state), prepared(state)
        for a, b in zip(expected, state, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_a_loop_gives_the_same_bits():
    def loop(weights, x, prepare):
        body = canonical(step)
        now = prepare(body, weights, (jnp.int32(0), x))
        return lax.while_loop(lambda s: s[0] < 5, now, (jnp.int32(0), x))[1]

    def plain(body, weights, _):
        return lambda state: body(weights, state)

    found, expected = (jax.jit(loop, static_argnums=2)(WEIGHTS, X, prepare) for prepare in (ahead, plain))
    np.testing.assert_array_equal(found, expected)
    assert not np.allclose(found, X)


def test_every_branch_has_its_own():
    a, b = (jnp.asarray(RNG.normal(size=(3, 3)), jnp.float32) for _ in range(2))

    def chosen(weights, x):
        first, second = weights
        return lax.switch(
            x[0, 0].astype(jnp.int32), [lambda x: first.T @ x, lambda x: second[::-1] @ first.T @ x, lambda x: x + 1], x
        )

    prepared = ahead(chosen, (a, b), jnp.zeros((3, 3)))
    assert turns(prepared, jnp.zeros((3, 3))) == []
    for choice in range(3):
        x = jnp.asarray(RNG.normal(size=(3, 3)), jnp.float32).at[0, 0].set(choice)
        np.testing.assert_allclose(prepared(x), chosen((a, b), x), rtol=1e-6, atol=1e-6)


def test_loops_inside_turn_them_before_too():
    """Of what is the same in all their steps; what they carry may be turned in each."""

    def looped(weights, state):
        def inside(i, carry):
            _, pull_back = jax.vjp(lambda x: model(weights, x), carry[1])
            return lax.rev(carry[0], (0,)), carry[1] - 0.1 * pull_back(jnp.ones((2, 7)) * i)[0]

        first = weights["other"][0]
        carried, moved = lax.fori_loop(0, 3, inside, (first, state[1]))
        return state[0] + jnp.sum(carried[0]).astype(jnp.int32), moved

    state = (jnp.int32(0), X)
    prepared = ahead(looped, WEIGHTS, state)
    assert (3, 3, 4, 5) in turns(looped, WEIGHTS, state)
    assert turns(prepared, state) == [(5, 7)]
    for a, b in zip(looped(WEIGHTS, state), prepared(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_what_a_step_reports_is_reported_once_each_in_order():
    seen = []

    def reporting(weights, x):
        jax.debug.callback(lambda v: seen.append(float(v)), x[0], ordered=True)
        y = lax.cond(x[0] < 9, lambda: (weights.T @ x.reshape(1, 2).T).ravel() + x, lambda: x)
        jax.debug.callback(lambda v: seen.append(-float(v)), y[0], ordered=True)
        return y

    weights, x = jnp.eye(2), jnp.array([1.0, 2.0])
    prepared = ahead(reporting, weights, x)
    jax.block_until_ready(prepared(prepared(x)))
    jax.effects_barrier()
    assert seen == [1, -2, 2, -4]


def test_functions_without_weights_or_branches():
    np.testing.assert_array_equal(ahead(lambda w, x: x + 1, (), X)(X), X + 1)
    np.testing.assert_array_equal(ahead(lambda w, x: w.T + x, jnp.eye(3), jnp.ones(3))(jnp.zeros(3)), jnp.eye(3))
    # Results that are turned weights, and nothing else.
    np.testing.assert_array_equal(ahead(lambda w, x: w[::-1], jnp.arange(4.0), X)(X), jnp.arange(4.0)[::-1])


@pytest.mark.parametrize("attack", [IFGSM(steps=3), DDN(steps=3)])
def test_attacks_turn_no_kernel_in_their_steps(attack):
    images = jnp.asarray(RNG.uniform(size=(2, 6, 6, 4)), jnp.float32)
    net, labels = Partial(model, WEIGHTS), np.zeros(2, int)
    state = start(attack, net, images, labels, key=jax.random.key(0))
    text = driver.lowered(attack, net, state).as_text()
    before, _, loop = text.partition("stablehlo.while")
    assert "stablehlo.reverse" in before
    assert "stablehlo.reverse" not in loop
