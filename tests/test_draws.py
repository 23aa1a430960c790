import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.attacks.driver import example_keys
from jaxinterp.draws import shaped

SHAPES = [(), (1,), (5, 7, 3), (16, 16, 3), (2, 3, 4, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("draw", "more"),
    [
        (jax.random.uniform, (jnp.float32, -1.0, 2.0)),
        (jax.random.normal, (jnp.float32,)),
        (jax.random.laplace, (jnp.float32,)),
        (jax.random.rademacher, (jnp.float32,)),
        (jax.random.bits, ()),
    ],
)
def test_is_what_jax_draws(draw, more, shape):
    keys = jax.random.split(jax.random.key(5), 3)
    drawn = jax.jit(jax.vmap(lambda key: shaped(draw, key, shape, *more)))(keys)
    assert drawn.shape == (3, *shape)
    for key, one in zip(keys, drawn, strict=True):
        np.testing.assert_array_equal(one, draw(key, shape, *more))


def test_components_are_numbered_along_one_axis():
    """JAX numbers those of three axes by three indices, which is what takes long to compile."""

    def numbered(draw):
        program = jax.jit(jax.vmap(draw)).lower(jax.random.split(jax.random.key(0), 2)).as_text()
        return program.count("stablehlo.iota")

    assert numbered(lambda key: jax.random.uniform(key, (8, 8, 3))) == 3
    assert numbered(lambda key: shaped(jax.random.uniform, key, (8, 8, 3))) == 1


def test_ids_are_numbers_wherever_they_are():
    images, key = jnp.zeros((3, 2, 2, 1)), jax.random.key(0)
    expected = jax.random.key_data(example_keys(key, images, [4, 5, 6]))
    for ids in (jnp.array([4, 5, 6]), jnp.array([4, 5, 6], jnp.uint8), np.array([4, 5, 6])):
        np.testing.assert_array_equal(jax.random.key_data(example_keys(key, images, ids)), expected)
        traced = jax.jit(lambda ids: jax.random.key_data(example_keys(key, images, ids)))(ids)
        np.testing.assert_array_equal(traced, expected)
