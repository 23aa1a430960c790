import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.attacks import PGD, SPSA, HopSkipJump, Square, run
from jaxinterp.attacks.driver import example_keys
from jaxinterp.draws import reproducible, shaped, wrapped

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


def test_keys_of_threefry_stay_as_they_are():
    key = jax.random.key(7)
    for same in (key, jax.random.PRNGKey(7)):
        np.testing.assert_array_equal(jax.random.key_data(reproducible(same)), jax.random.key_data(key))


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_keys_of_other_implementations_seed_one_that_does_not_depend_on_the_batch(implementation):
    """Under vmap theirs draws other numbers for an example with another one beside it."""
    first, second = (jax.random.key(seed, impl=implementation) for seed in (1, 2))
    data = [jax.random.key_data(reproducible(key)) for key in (first, second)]
    assert data[0].shape == (2,)
    assert (data[0] != data[1]).any()
    images = jnp.arange(12, dtype=jnp.float32).reshape(3, 2, 2, 1)

    def drawn(images):
        return jax.vmap(lambda key: jax.random.uniform(key, (5,)))(example_keys(first, images))

    np.testing.assert_array_equal(drawn(images)[1:2], drawn(images[1:2]))


@pytest.mark.parametrize("default", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("attack", [PGD(steps=2, restarts=2), Square(steps=3), SPSA(steps=2), HopSkipJump(steps=2)])
def test_attacks_take_keys_of_any_implementation(attack, default):
    """Those that draw in every step store what is left of the keys, and find it again whatever the default is."""
    images, labels = jnp.full((2, 3, 3, 1), 0.51), np.zeros(2, np.int32)

    def model(x):
        logit = jnp.mean(x, axis=(1, 2, 3)) - 0.5
        return jnp.stack([logit, -logit], axis=1)

    with jax.default_prng_impl(default):
        results = [run(attack, model, images, labels, key=key) for key in (jax.random.key(1), jax.random.PRNGKey(1))]
        ours = run(attack, model, images, labels, key=reproducible(jax.random.key(1)))
    assert ours.success.all()
    for result in results:
        np.testing.assert_array_equal(result.images, ours.images)


def test_what_is_stored_of_a_key_is_found_again():
    keys = jax.random.split(jax.random.key(3), 4)
    np.testing.assert_array_equal(jax.random.key_data(wrapped(jax.random.key_data(keys))), jax.random.key_data(keys))
