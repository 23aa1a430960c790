"""The consistent loss: its formula, what is differentiated, batch norm in training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxinterp import Network
from jaxinterp.models.layers import BatchNorm, Linear
from jaxinterp.models.registry import Module
from jaxinterp.network import identity
from jaxinterp.training.consistent import consistent, fast_gradient, standard


class Normed(nnx.Module):
    """Batch norm of the pixels, a feature map, a linear layer."""

    def __init__(self, *, rngs):
        self.bn = BatchNorm(3, rngs=rngs)
        self.fc = Linear(3, 4, rngs=rngs)

    def __call__(self, images, tap):
        x = tap("map", jnp.tanh(self.bn(images)))
        return self.fc(x.mean((1, 2)))


def normed():
    module = Normed(rngs=nnx.Rngs(0))
    state = nnx.to_flat_state(nnx.state(module))
    params = {".".join(map(str, path)): leaf[...] for path, leaf in state}
    params["bn.running_mean"] = jnp.array([0.2, 0.5, 0.1])
    return Network("normed", Module(nnx.graphdef(module)), ("map",), 5, 4, "map"), params


def problem(rng):
    images = jnp.asarray(rng.random((6, 5, 5, 3)), jnp.float32)
    return images, jnp.asarray(rng.integers(0, 4, 6), jnp.int32), jax.random.split(jax.random.key(3), 6)


def test_the_loss_is_its_formula(rng):
    network, params = normed()
    images, labels, keys = problem(rng)
    found = jax.jit(consistent(network, beta=0.7, eps=(0.1, 0.4)))(params, images, labels, keys)
    eps = jnp.stack([jax.random.uniform(key, minval=0.1, maxval=0.4) for key in keys])
    model = network.bind(params)

    def ce(x):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), labels)

    gradient = jax.grad(lambda x: ce(x).sum())(images)
    attacked = jnp.clip(images + eps[:, None, None, None] * jnp.sign(gradient), 0, 1)
    np.testing.assert_allclose(fast_gradient(network, params, images, labels, eps), attacked, atol=1e-6)
    phi = [jnp.tanh((x - params["bn.running_mean"]) / jnp.sqrt(1 + 1e-5)) for x in (images, attacked)]
    distance = jnp.sum((phi[0] - phi[1]) ** 2, (1, 2, 3))
    np.testing.assert_allclose(found.metrics["distance"], distance, rtol=1e-4)
    np.testing.assert_allclose(found.losses, ce(images) + ce(attacked) + 0.7 * distance, rtol=1e-4)
    assert dict(found.statistics) == {}
    plain = consistent(network, beta=0.0, eps=(0.1, 0.4))(params, images, labels, keys)
    np.testing.assert_allclose(plain.losses, ce(images) + ce(attacked), rtol=1e-5)


def test_the_adversarial_image_is_not_differentiated(rng):
    network, params = normed()
    images, labels, keys = problem(rng)
    loss = consistent(network, beta=0.7, eps=(0.2, 0.2))
    attacked = fast_gradient(network, params, images, labels, 0.2)

    def by_hand(params):
        model = network.bind(params)
        losses = [optax.softmax_cross_entropy_with_integer_labels(model(x), labels) for x in (images, attacked)]
        phi = [
            jnp.tanh((x - params["bn.running_mean"]) * params["bn.weight"] / jnp.sqrt(1 + 1e-5))
            for x in (images, attacked)
        ]
        return jnp.mean(losses[0] + losses[1] + 0.7 * jnp.sum((phi[0] - phi[1]) ** 2, (1, 2, 3)))

    found = jax.grad(lambda p: jnp.mean(loss(p, images, labels, keys).losses))(params)
    expected = jax.grad(by_hand)(params)
    for name in ("fc.weight", "fc.bias", "bn.weight"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_batch_norm_as_in_training(rng):
    network, params = normed()
    images, labels, keys = problem(rng)
    found = jax.jit(standard(network, batch_norm="batch"))(params, images, labels, keys)
    x = np.asarray(images, np.float64)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    maps = np.tanh((x - mean) / np.sqrt(var + 1e-5)).mean((1, 2))
    logits = maps @ np.asarray(params["fc.weight"]) + np.asarray(params["fc.bias"])
    expected = np.log(np.exp(logits).sum(-1)) - logits[np.arange(6), labels]
    np.testing.assert_allclose(found.losses, expected, rtol=1e-4)
    np.testing.assert_allclose(
        found.statistics["bn.running_mean"], 0.9 * np.array([0.2, 0.5, 0.1]) + 0.1 * mean, rtol=1e-5
    )
    np.testing.assert_allclose(found.statistics["bn.running_var"], 0.9 + 0.1 * var * 150 / 149, rtol=1e-5)
    frozen = standard(network)(params, images, labels, keys)
    assert not np.allclose(frozen.losses, expected, rtol=1e-3)
    # What is given stays as it is, and `apply` is frozen afterwards, too.
    again = network.apply(params, images, identity)
    np.testing.assert_array_equal(again, network.bind(params)(images))


def test_clean_and_adversarial_images_are_one_batch(rng):
    network, params = normed()
    images, labels, keys = problem(rng)
    found = consistent(network, beta=0.0, eps=(0.3, 0.3), batch_norm="batch")(params, images, labels, keys)
    both = np.concatenate([images, fast_gradient(network, params, images, labels, 0.3)])
    np.testing.assert_allclose(
        found.statistics["bn.running_mean"], 0.9 * np.array([0.2, 0.5, 0.1]) + 0.1 * both.mean((0, 1, 2)), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"beta": -1.0}, ValueError, "beta must not be negative, got -1.0"),
        ({"eps": (0.3, 0.2)}, ValueError, "eps must be two bounds"),
        ({"node": "maps"}, ValueError, "no node 'maps'; did you mean 'map'"),
        ({"batch_norm": "none"}, ValueError, "batch_norm must be one of frozen, batch, got 'none'"),
        ({"network": Network("own", lambda p, x: x)}, ValueError, "own has no nodes"),
        (
            {"network": Network("own", lambda p, x, tap: tap("a", x), ("a",)), "batch_norm": "batch"},
            TypeError,
            "takes a network of jaxinterp.models, got own",
        ),
    ],
)
def test_bad_input(change, error, message):
    given = {"network": normed()[0], "beta": 0.1, "eps": (0.0, 0.1), **change}
    with pytest.raises(error, match=message):
        consistent(given.pop("network"), **given)
