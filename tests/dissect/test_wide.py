"""Counters beyond 32 bits against Python's integers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinterp.dissect import wide

LARGEST = 2**31 - 65536
quick = settings(max_examples=40, deadline=None, derandomize=True)
add, merge = jax.jit(wide.add), jax.jit(wide.merge)


def counted(*counts):
    """One counter after additions."""
    return functools.reduce(add, (jnp.array([count], jnp.int32) for count in counts), wide.zeros(1))


@quick
@given(st.lists(st.one_of(st.integers(0, LARGEST), st.sampled_from([LARGEST, 65535, 65536, 0])), max_size=12))
def test_additions_are_those_of_integers(counts):
    counter = counted(*counts)
    assert wide.total(counter).tolist() == [sum(counts)]
    assert 0 <= int(counter.low[0]) < 65536, "the carry has moved"


@quick
@given(*[st.lists(st.integers(0, LARGEST), min_size=1, max_size=4) for _ in range(3)])
def test_merging_is_associative_and_commutative_in_every_bit(a, b, c):
    x, y, z = counted(*a), counted(*b), counted(*c)
    assert wide.total(merge(x, y)).tolist() == [sum(a) + sum(b)]
    one, other, turned = merge(merge(x, y), z), merge(x, merge(y, z)), merge(z, merge(y, x))
    for got in (other, turned):
        np.testing.assert_array_equal(got.low, one.low)
        np.testing.assert_array_equal(got.high, one.high)
    assert wide.total(one).tolist() == [sum(a) + sum(b) + sum(c)]
    assert 0 <= int(one.low[0]) < 65536, "the carry has moved"


def test_the_largest_number():
    """2^47 - 1 = (2^31 - 1) 65536 + 65535 is counted, one by one at its end."""
    counter = wide.Wide(jnp.array([65534], jnp.int32), jnp.array([2**31 - 1], jnp.int32))
    assert wide.total(add(counter, jnp.array([1], jnp.int32))).tolist() == [2**47 - 1]


def test_halves_summed_over_many_devices_keep_their_carries():
    """Sums of 32,768 low halves, each as large as it gets, fit; `normalised` moves the carry."""
    shares = 32768
    summed = wide.Wide(jnp.array([65535 * shares], jnp.int32), jnp.array([3 * shares], jnp.int32))
    whole = wide.normalised(summed)
    assert wide.total(whole).tolist() == [shares * (3 * 65536 + 65535)]
    assert int(whole.low[0]) < 65536


def test_a_sum_over_devices_is_the_sum(meshes):
    numbers = np.array([2**31 - 1, 2**40 + 65535, 7, 65535, 2**43 - 1, 0, 1, 2**32 - 1])
    counter = wide.Wide(jnp.asarray(numbers & 65535, jnp.int32), jnp.asarray(numbers >> 16, jnp.int32))
    summed = jax.shard_map(
        lambda share: wide.normalised(jax.lax.psum(share, "data")),
        mesh=meshes[8],
        in_specs=jax.P("data"),
        out_specs=jax.P(),
    )(counter)
    assert wide.total(summed).tolist() == [numbers.sum()]


def test_every_shape():
    counter = wide.add(wide.zeros(2, 3), jnp.arange(6, dtype=jnp.int32).reshape(2, 3) * 65535)
    np.testing.assert_array_equal(wide.total(counter), np.arange(6).reshape(2, 3) * 65535)
    assert wide.total(counter).dtype == np.int64
    assert wide.total(wide.add(wide.zeros(), jnp.int32(70000))) == 70000
