"""Functions of images on a mesh with explicit axes return what they do without one, on that mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxinterp import attacks, attribution, cam, effect, localize
from jaxinterp.attacks import smoothing
from jaxinterp.network import Network
from jaxinterp.sharding import on_host, with_automatic_axes

BATCH, SIDE, CLASSES = 4, 8, 5


def apply(params, x, tap=lambda name, x: x):
    x = jax.lax.conv_general_dilated(x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return tap("maps", nnx.relu(x)).mean((1, 2)) @ params["weight"]


NETWORK = Network(name="narrow", apply=apply, nodes=("maps",), image_size=SIDE, classes=CLASSES)


@pytest.fixture
def problem(rng):
    """Parameters, images, adversarial images, labels and targets."""
    images, noise = rng.uniform(size=(2, BATCH, SIDE, SIDE, 3)).astype(np.float32)
    params = {
        "kernel": rng.normal(size=(3, 3, 3, 8)).astype(np.float32),
        "weight": rng.normal(size=(8, CLASSES)).astype(np.float32),
    }
    labels = np.asarray(apply(params, images)).argmax(-1)
    return params, images, np.clip(images + 0.1 * (noise - 0.5), 0, 1), labels, (labels + 1) % CLASSES


def scores(params, x, adversarial, y, t):
    return localize.interpretability_score(adversarial - x, jnp.abs(adversarial - x).sum(-1))


FUNCTIONS = {
    "attack": lambda p, x, a, y, t: attacks.run(attacks.FGSM(), NETWORK.bind(p), x, y, t, key=jax.random.key(0)).images,
    "effect": lambda p, x, a, y, t: effect.pse(NETWORK.bind(p), x, a, y, t, cells=4).suppression,
    "gradients": lambda p, x, a, y, t: attribution.input_x_gradient(NETWORK.bind(p), x, y),
    "activation maps": lambda p, x, a, y, t: cam.maps(NETWORK, p, x, y, method="gradcam", node="maps"),
    "saliency": lambda p, x, a, y, t: localize.adversarial_saliency(NETWORK.bind(p), x, y, t),
    "score": scores,
    "smoothing": lambda p, x, a, y, t: smoothing.smooth(a - x, x),
}


@pytest.mark.parametrize("spec", [("data",), (None, "data")], ids=["examples", "rows"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_meshes_with_explicit_axes(problem, name, spec):
    """Their types are not for models that know nothing of meshes, nor is an axis of the images for everything."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    params, images, adversarial, labels, targets = problem
    spread = [jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))) for x in (images, adversarial)]
    found = FUNCTIONS[name](params, *spread, labels, targets)
    assert found.sharding.mesh == mesh
    expected = FUNCTIONS[name](params, jnp.asarray(images), jnp.asarray(adversarial), labels, targets)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_axes_are_automatic_within():
    seen = []
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, PartitionSpec("data")))

    @with_automatic_axes
    def doubled(x, *, factor):
        """Twice."""
        seen.extend([x.sharding.mesh.axis_types, jax.sharding.get_mesh().axis_types])
        return {"values": factor * x, "name": "doubled"}

    with jax.set_mesh(mesh):
        found = doubled(x, factor=2)
        assert jax.sharding.get_mesh() == mesh
    assert seen == [(AxisType.Auto,)] * 2
    assert found["values"].sharding == x.sharding
    assert found["name"] == "doubled"
    assert doubled.__doc__ == "Twice."
    np.testing.assert_array_equal(on_host(found["values"]), 2 * np.arange(8.0))
