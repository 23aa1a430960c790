"""Formats: what is computed in which, and how far results agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp import cam, models, precision
from jaxinterp.bench import formats
from jaxinterp.network import capture
from jaxinterp.weights import seeded


@pytest.fixture(scope="module")
def small():
    return models.network("small_cnn"), jax.tree.map(jnp.asarray, seeded.params(models.shapes("small_cnn")))


def test_bfloat16_is_inside_and_float32_outside(small):
    network, params = formats.network_in("bf16", *small)
    images = jnp.asarray(seeded.images(2, 8))
    logits, maps = capture(network, params, images, ("conv1", "conv3"))
    assert logits.dtype == jnp.float32
    assert {x.dtype for x in maps.values()} == {jnp.dtype(jnp.bfloat16)}
    whole = small[0].bind(small[1])(images)
    assert 0 < formats.difference(logits, whole) < 0.02
    gradient = jax.grad(lambda x: network.bind(params)(x)[:, 0].sum())(images)
    assert gradient.dtype == jnp.float32
    again, _ = formats.network_in("bf16", *small)
    assert again == network  # so that programs are shared
    assert hash(again) == hash(network)


def test_the_others_leave_the_network_and_set_the_precision(small):
    for form, name in (("float32", "highest"), ("tf32", "high")):
        assert formats.network_in(form, *small) == small
        with formats.computing_in(form):
            assert precision.current() == name
            traced = jax.make_jaxpr(lambda a: a @ a)(jnp.ones((2, 2)))
        assert f"Precision.{name.upper()}" in str(traced)


def test_maps_of_a_network_in_bfloat16(small):
    """There is no singular value decomposition in bfloat16."""
    images = jnp.asarray(seeded.images(2, 8))
    network, params = formats.network_in("bf16", *small)
    found, expected = (cam.maps(n, p, images, np.array([1, 2]), "eigencam") for n, p in ((network, params), small))
    assert formats.difference(found, expected) < 0.05


def test_agreement_by_hand():
    reference = np.array([1.0, -2.0, 0.0, 4.0])
    assert formats.sign_agreement(np.array([3.0, 2.0, 5.0, 1e-9]), reference) == pytest.approx(2 / 3)
    assert formats.sign_agreement(np.zeros(4), np.zeros(4)) == 1
    assert formats.difference(np.array([1.0, -2.0, 0.0, 3.0]), reference) == 0.25
    assert formats.agreement([True, False, True, True], [True, True, True, False]) == 0.5


@pytest.mark.parametrize(
    ("forms", "message"),
    [(("float16",), "unknown format 'float16'; did you mean"), ((), "got none"), (("bf16", "bf16"), "each once")],
)
def test_bad_formats(forms, message):
    with pytest.raises(ValueError, match=message):
        formats.check(forms)
