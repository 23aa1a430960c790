"""Taps against a network written out by hand, what they cost once compiled, and any callable as a model."""

import functools
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

from jaxinterp import models, network
from jaxinterp.network import Network
from jaxinterp.weights import seeded

# A network by hand: two feature maps, of which the second one is global.


def apply(params, images, tap):
    x = tap("early", jnp.tanh(images @ params["mix"]))
    x = tap("late", x.mean((1, 2)) ** 2)
    return x @ params["out"]


def by_hand(params, images):
    """The same network in numpy: (logits, early, late)."""
    early = np.tanh(np.asarray(images, np.float64) @ np.asarray(params["mix"], np.float64))
    late = early.mean((1, 2)) ** 2
    return late @ np.asarray(params["out"], np.float64), early, late


def by_hand_in_jax(params, images):
    return apply(params, images, network.identity)


@pytest.fixture
def small(rng):
    params = {
        "mix": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
        "out": jnp.asarray(rng.normal(size=(4, 5)), jnp.float32),
    }
    images = jnp.asarray(rng.random((2, 6, 6, 3)), jnp.float32)
    return Network(name="small", apply=apply, nodes=("early", "late"), image_size=6, classes=5), params, images


@functools.cache
def lite():
    """EfficientNet-Lite0 with parameters by rule, and two small images."""
    net = models.network("efficientnet_lite0", 10)
    params = jax.tree.map(jnp.asarray, seeded.params(models.shapes("efficientnet_lite0", 10)))
    return net, params, jax.random.uniform(jax.random.key(1), (2, 64, 64, 3))


def close(actual, expected, rtol=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def test_capture(small):
    net, params, images = small
    logits, early, late = by_hand(params, images)
    given, seen = jax.jit(lambda p, x: network.capture(net, p, x, ["late", "early"]))(params, images)
    close(given, logits)
    assert list(network.capture(net, params, images, ["late", "early"])[1]) == ["late", "early"]
    close(seen["early"], early)
    close(seen["late"], late)
    close(jax.jit(lambda p, x: network.features(net, p, x, "early"))(params, images), early)


def test_replace(small):
    net, params, images = small
    run = jax.jit(lambda p, x, values: net.apply(p, x, network.replace({"late": values})))
    late = np.arange(8.0).reshape(2, 4)
    expected = late @ np.asarray(params["out"])
    close(run(params, images, late), expected)
    close(run(params, images, late[:1]), expected[[0, 0]])  # one value for every example
    assert run(params, images, np.arange(8).reshape(2, 4)).dtype == jnp.float32
    close(jax.jit(lambda p, x, m: network.head(net, p, "late", m, x))(params, images, jnp.asarray(late)), expected)


def test_mask(small):
    net, params, images = small
    units, place = np.array([1.0, 0.0, 1.0, 0.5]), np.zeros((6, 6, 1))
    place[2:4] = 1
    early = by_hand(params, images)[1] * units * place
    expected = early.mean((1, 2)) ** 2 @ np.asarray(params["out"])
    tap = network.compose(network.mask({"early": units}), network.mask({"early": place}))
    close(jax.jit(lambda p, x: net.apply(p, x, tap))(params, images), expected)
    whole = jax.jit(lambda p, x: net.apply(p, x, network.mask({"late": np.array([True, False, True, True])})))
    close(whole(params, images), by_hand(params, images)[2] * [1, 0, 1, 1] @ np.asarray(params["out"]))


def test_perturb(small, rng):
    net, params, images = small
    delta = rng.normal(size=(2, 4))
    run = jax.jit(lambda p, x, d: net.apply(p, x, network.perturb({"late": d})))
    close(run(params, images, delta), (by_hand(params, images)[2] + delta) @ np.asarray(params["out"]))


def test_compose_goes_from_left_to_right(small):
    net, params, images = small
    double, add = network.mask({"late": 2.0}), network.perturb({"late": 1.0})
    late, out = by_hand(params, images)[2], np.asarray(params["out"])
    for taps, expected in (((double, add), 2 * late + 1), ((add, double), 2 * (late + 1)), ((), late)):
        run = jax.jit(lambda p, x, taps=taps: net.apply(p, x, network.compose(*taps)))
        close(run(params, images), expected @ out)
    logits, seen = network.capture(net, params, images, ["late"], tap=network.compose(double, add))
    close(seen["late"], 2 * late + 1)  # what the tap made of it
    close(logits, (2 * late + 1) @ out)


def test_gradient_of_a_perturbation(small, rng):
    """Against central differences in every direction of the delta."""
    net, params, images = small
    with jax.enable_x64(True):
        params, images = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (params, images))
        f = jax.jit(lambda d: jnp.sin(net.apply(params, images, network.perturb({"early": d}))).sum())
        delta = jnp.asarray(rng.normal(size=(6, 6, 4)))
        gradient, h = jax.grad(f)(delta), 1e-5
        for place in np.ndindex(2, 6, 4):
            step = jnp.zeros_like(delta).at[place].set(h)
            assert (f(delta + step) - f(delta - step)) / (2 * h) == pytest.approx(float(gradient[place]), rel=1e-6)


# The same on a real network


def test_every_node_of_efficientnet_lite():
    """The head of any node's own feature map is the whole network; each node is passed once, in order."""
    net, params, images = lite()
    names = []

    def listing(name, x):
        names.append(name)
        return x

    logits, maps = jax.jit(lambda p, x: network.capture(net, p, x, net.nodes, tap=listing))(params, images)
    assert tuple(names) == net.nodes
    assert set(maps) == set(net.nodes)
    assert {name: maps[name].shape[1:3] for name in ("_conv_stem", "_blocks.15", "_conv_head")} == {
        "_conv_stem": (32, 32),
        "_blocks.15": (2, 2),
        "_conv_head": (2, 2),
    }
    assert float(jnp.abs(logits[0] - logits[1]).max()) > 1e-4
    for node in ("_blocks.12", "_conv_head"):
        rest = jax.jit(lambda p, m, x, node=node: network.head(net, p, node, m, x))
        close(rest(params, maps[node], jnp.zeros_like(images)), logits, 1e-4)
        close(rest(params, maps[node][::-1], images), logits[::-1], 1e-4)
    last = np.asarray(maps["_conv_head"], np.float64).mean((1, 2))  # ends in a mean and one linear layer
    close(logits, last @ np.asarray(params["_fc.weight"]) + np.asarray(params["_fc.bias"]), 1e-4)


def flops(f, *args) -> float:
    analysis = jax.jit(f).lower(*args).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def test_unused_parts_are_compiled_away():
    net, params, images = lite()
    maps = jax.eval_shape(lambda p, x: network.features(net, p, x, "_conv_head"), params, images)
    whole = flops(net.bind(params), images)
    stem = flops(lambda p, x: network.features(net, p, x, "_conv_stem"), params, images)
    middle = flops(lambda p, x: network.capture(net, p, x, ["_blocks.2"])[1], params, images)
    last = flops(lambda p, m, x: network.head(net, p, "_conv_head", m, x), params, maps, images)
    channels, classes = 1280, 10
    assert 2 * 2 * 32 * 32 * 27 * 32 <= stem < 0.15 * whole
    assert stem < middle < 0.6 * whole
    assert 2 * 2 * channels * classes <= last < 0.02 * whole


# The record


def test_unknown_nodes_name_the_closest(small):
    net, params, images = small
    for use in (
        lambda: network.capture(net, params, images, ["early", "lat"]),
        lambda: network.features(net, params, images, "lat"),
        lambda: network.head(net, params, "lat", jnp.zeros((2, 4)), images),
        lambda: net.check_node("lat"),
    ):
        with pytest.raises(ValueError, match=r"small has no node 'lat'; did you mean 'late'\?"):
            use()
    with pytest.raises(ValueError, match="known: early, late"):
        net.check_node("zzzzzz")
    with pytest.raises(ValueError, match=r"_blocks\.1"):
        lite()[0].check_node("blocks.1")


def test_suggest():
    assert network.suggest("x", []) == "; it has none"
    assert network.suggest("b1", ["a1", "b2", "zz"]).startswith("; did you mean 'b2'")
    assert network.suggest("????", [f"n{i}" for i in range(30)]).endswith("n23, ... (30 in all)")


def test_validation():
    with pytest.raises(ValueError, match="not unique"):
        Network(name="n", apply=apply, nodes=("a", "a"))
    with pytest.raises(ValueError, match=r"cam_node: n has no node 'c'"):
        Network(name="n", apply=apply, nodes=("a", "b"), cam_node="c")
    with pytest.raises(TypeError, match="takes no tap"):
        Network(name="n", apply=lambda params, images: images, nodes=("a",))
    with pytest.raises((TypeError, ValueError)):
        Network(name="n", apply=3)  # type: ignore[arg-type]


def test_a_node_that_is_never_passed(small):
    _, params, images = small
    net = Network(name="n", apply=apply, nodes=("early", "ghost"))
    with pytest.raises(ValueError, match="never passed the node 'ghost'"):
        network.capture(net, params, images, ["ghost"])


def test_function_without_tap(small):
    _, params, images = small
    net = Network(name="plain", apply=lambda params, images: images.sum((1, 2)) @ params["mix"], classes=4)
    expected = np.asarray(images).sum((1, 2)) @ np.asarray(params["mix"])
    close(net.bind(params)(images), expected)
    close(net.apply(params, images, network.identity), expected)
    logits, seen = network.capture(net, params, images, [])
    close(logits, expected)
    assert seen == {}
    with pytest.raises(ValueError, match="it has none"):
        net.check_node("x")


def test_tap_with_a_default_or_among_variable_arguments(small):
    _, params, images = small
    for function in (lambda p, x, tap=network.identity: apply(p, x, tap), lambda *args: apply(*args)):
        net = Network(name="n", apply=function, nodes=("early", "late"))
        close(network.features(net, params, images, "late"), by_hand(params, images)[2])


def test_another_optional_argument_is_not_the_tap(small):
    _, params, images = small

    def function(params, images, train=False):
        logits = by_hand_in_jax(params, images)
        return jnp.zeros_like(logits) if train else logits

    plain = Network(name="plain", apply=function, image_size=6, classes=5)
    np.testing.assert_array_equal(plain.bind(params)(images), by_hand_in_jax(params, images))

    def tapped(params, images, hook=network.identity):
        return apply(params, images, hook)

    net = Network(name="tapped", apply=tapped, nodes=("early", "late"), image_size=6, classes=5)
    assert list(network.capture(net, params, images, ["late"])[1]) == ["late"]


def test_classes():
    counted = Network(name="n", apply=apply, classes=5)
    named = Network(name="n", apply=apply, classes=("cat", "dog"))
    assert (counted.num_classes, counted.class_name(3)) == (5, "class 3")
    assert (named.num_classes, named.class_name(1)) == (2, "dog")
    with pytest.raises(ValueError, match="at least one"):
        Network(name="n", apply=apply, classes=())


def test_numpy_counts_and_single_texts_where_types_are_not_checked():
    code = """
import numpy as np
from jaxinterp import Network
assert Network(name="n", apply=lambda p, x, tap: x, classes=np.int64(7)).num_classes == 7
for field in ("classes", "nodes"):
    try:
        Network(name="n", apply=lambda p, x, tap: x, **{field: "tench"})
    except TypeError as error:
        assert "tuples of names" in str(error)
    else:
        raise AssertionError(field)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bindings_of_one_network_share_a_program(small):
    net, params, images = small
    traces = []

    @jax.jit
    def run(model, images):
        traces.append(model)
        return model(images)

    first = run(net.bind(params), images)
    again = run(net.bind(jax.tree.map(lambda a: 2 * a, params)), images)
    equal = run(Network(name="small", apply=apply, nodes=("early", "late")).bind(params), images)
    assert len(traces) == 1
    close(again, by_hand(jax.tree.map(lambda a: 2 * a, params), images)[0])
    np.testing.assert_array_equal(first, equal)


def test_parameters_do_not_become_constants(small):
    net, params, images = small
    leaves = jax.tree.leaves(net.bind(params))
    assert {id(leaf) for leaf in leaves} == {id(value) for value in params.values()}
    assert not jax.make_jaxpr(lambda model, x: model(x))(net.bind(params), images).consts


# Any callable as a model


class Stock(nnx.Module):
    """A user's network of Flax's own layers."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.last = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


@jax.tree_util.register_pytree_node_class
class Callable:
    """A callable pytree with an array, a number and a string among its leaves."""

    def __init__(self, weight, scale, name):
        self.weight, self.scale, self.name = weight, scale, name

    def tree_flatten(self):
        return (self.weight, self.scale, self.name), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)

    def __call__(self, x):
        assert isinstance(self.name, str)
        return self.scale * (x.mean((1, 2)) @ self.weight)


MODELS = {
    "function": lambda p: lambda x: x.mean((1, 2)) @ p["mix"],
    "partial": lambda p: Partial(lambda p, x: x.mean((1, 2)) @ p["mix"], p),
    "functools.partial": lambda p: functools.partial(lambda p, x: x.mean((1, 2)) @ p["mix"], p),
    "pytree": lambda p: Callable(p["mix"], 3.0, "mine"),
    "numpy leaves": lambda p: Callable(np.asarray(p["mix"]), 3.0, "mine"),
    "nnx": lambda p: Stock(),
}
LEAVES = {"function": 0, "partial": 2, "functools.partial": 0, "pytree": 1, "numpy leaves": 1, "nnx": 8}


@pytest.mark.parametrize("kind", MODELS)
def test_as_model(small, kind):
    _, params, images = small
    callable_ = MODELS[kind](params)
    expected = callable_(images)
    model = network.as_model(callable_)
    assert isinstance(model, Partial)
    assert len(jax.tree.leaves(model)) == LEAVES[kind]
    close(model(images), expected)
    close(jax.jit(lambda model, x: model(x))(model, images), expected)
    gradient = jax.jit(jax.grad(lambda x, model: model(x)[:, 0].sum()))(images, model)
    close(gradient, jax.grad(lambda x: callable_(x)[:, 0].sum())(images))
    assert network.as_model(model) is model


def test_arrays_of_a_module_are_leaves():
    """Doubling the leaves of the model doubles the module's parameters: nothing was compiled in."""
    stock, images = Stock(), jnp.ones((1, 6, 6, 3))
    traces = []

    @jax.jit
    def run(model, x):
        traces.append(1)
        return model(x)

    doubled = Stock()
    doubled.last.kernel[...] = 2 * doubled.last.kernel[...]
    one, two = run(network.as_model(stock), images), run(network.as_model(doubled), images)
    close(two, 2 * np.asarray(one))  # the bias is zero
    assert len(traces) == 1


def test_no_model():
    with pytest.raises((TypeError, ValueError)):
        network.as_model(types.SimpleNamespace())  # type: ignore[arg-type]
