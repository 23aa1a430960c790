"""Exact thresholds against NumPy's quantiles in 64 bits, for features at hand, in batches and on several devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import NamedSharding, PartitionSpec

from jaxinterp import dissect
from jaxinterp.dissect import quantiles

QUANTILES = (0.005, 1 - 994 / 999, 0.5, 0.1, 1 / 159, 0.25, 0.999, 1e-9, 1 - 1e-9, 0.0371)
IMAGES, HEIGHT, WIDTH = 8, 5, 4
POSITIONS = IMAGES * HEIGHT * WIDTH


def columns():
    """A unit of each kind [positions,U]: what an activation can look like."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=POSITIONS)
    smallest = np.float64(np.finfo(np.float32).smallest_subnormal)
    kinds = {
        "normal": normal,
        "rectified": np.maximum(normal - 1, 0),
        "negative": -np.exp(normal),
        "ties": rng.integers(-2, 3, POSITIONS).astype(float),
        "dead": np.zeros(POSITIONS),
        "zeros of both signs": np.where(normal > 0, 0.0, -0.0),
        "subnormal": smallest * rng.integers(-50, 50, POSITIONS),
        "of all sizes": np.sign(normal) * 10.0 ** rng.uniform(-45, 38, POSITIONS),
        "neighbours": 1 + 2.0**-23 * rng.integers(0, 300, POSITIONS),  # of one upper half, and of two
        "around an upper half": np.float64(1.0078125) + 2.0**-23 * rng.integers(-3, 3, POSITIONS),
        "one high": np.eye(1, POSITIONS)[0] * 7,
    }
    return kinds, np.stack(list(kinds.values()), axis=1).astype(np.float32)


KINDS, VALUES = columns()
FEATURES = VALUES.reshape(IMAGES, HEIGHT, WIDTH, -1)


def bits(x):
    return np.asarray(x).view(np.uint32)


@pytest.mark.parametrize("method", quantiles.METHODS)
@pytest.mark.parametrize("quantile", QUANTILES)
def test_values_are_numpys(quantile, method):
    expected = np.quantile(VALUES.astype(np.float64), 1 - quantile, axis=0, method=method).astype(np.float32)
    found = dissect.thresholds(jnp.asarray(FEATURES), quantile, method=method)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected, err_msg=str(list(KINDS)))


def test_the_share_that_exceeds_the_threshold():
    """With n positions, at most the share `quantile` lies above; of the higher value, never more."""
    rng = np.random.default_rng(1)
    features = rng.permutation(2000).reshape(10, 10, 20, 1).astype(np.float32)
    for quantile in (0.005, 0.1, 0.5):
        for method in quantiles.METHODS:
            above = (features > np.asarray(dissect.thresholds(jnp.asarray(features), quantile, method=method))).sum()
            assert above == 2000 * quantile - (method == "higher")
    ten = np.arange(10, dtype=np.float32).reshape(1, 5, 2, 1)
    assert dissect.thresholds(ten, 0.25).tolist() == [6.75]
    assert dissect.thresholds(ten, 0.25, method="higher").tolist() == [7]
    assert dissect.thresholds(ten[:, :1], 0.5).tolist() == [0.5]
    assert dissect.QUANTILE == 0.005
    np.testing.assert_array_equal(dissect.thresholds(features), [np.float32(1989.005)])


values = st.floats(width=32, allow_nan=False)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    arrays(np.float32, (4, 3, 1, 2), elements=values | st.sampled_from([0.0, -0.0, 1.0, np.inf, -np.inf])),
    st.floats(0.001, 0.999),
    st.sampled_from(quantiles.METHODS),
)
def test_any_values(features, quantile, method):
    found = np.asarray(dissect.thresholds(features, quantile, method=method))
    np.testing.assert_array_equal(
        bits(dissect.thresholds([features[:2], features[2:]], quantile, method=method)), bits(found)
    )
    columns = np.sort(features.reshape(-1, 2).astype(np.float64), axis=0)
    place = 11 * (1 - quantile)
    lower, upper = columns[int(np.floor(place))], columns[int(np.ceil(place))]
    assert ((found >= lower) & (found <= upper)).all()
    assume(method == "higher" or np.isfinite(columns).all())
    expected = np.quantile(columns, 1 - quantile, axis=0, method=method)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_infinities():
    """An infinite value is a threshold like any other; between it and a finite one lies nothing but itself."""
    one = np.array([[-np.inf, -np.inf, 2.0, 5.0, np.inf]] * 1, np.float32).reshape(1, 5, 1, 1)
    at = {1.0 - place / 4: place for place in (0.5, 1, 1.5, 2, 2.5, 3, 3.5)}
    expected = {0.5: -np.inf, 1: -np.inf, 1.5: -np.inf, 2: 2, 2.5: 3.5, 3: 5, 3.5: np.inf}
    for quantile, place in at.items():
        assert dissect.thresholds(one, quantile).tolist() == [expected[place]]
    higher = {0.5: -np.inf, 1: -np.inf, 1.5: 2, 2: 2, 2.5: 5, 3: 5, 3.5: np.inf}
    for quantile, place in at.items():
        assert dissect.thresholds(one, quantile, method="higher").tolist() == [higher[place]]


def test_the_higher_value_is_exact_where_the_lower_one_is_far_below():
    far = np.array([-1e30, 1e-3, 5.0], np.float32).reshape(1, 1, 3, 1)
    assert dissect.thresholds(far, 0.75, method="higher").tolist() == [np.float32(1e-3)]


def test_one_position_and_few():
    for count in (1, 2, 3):
        features = np.arange(count, dtype=np.float32).reshape(count, 1, 1, 1) + 5
        for quantile in (1e-12, 0.005, 0.5, 1 - 1e-12):
            expected = np.float32(np.quantile(features.astype(np.float64), 1 - quantile))
            assert dissect.thresholds(features, quantile).tolist() == [expected]
            assert dissect.thresholds([features], quantile).tolist() == [expected]


@pytest.mark.parametrize("quantile", [0.005, 0.5, 1 - 1e-9])
def test_batches_give_the_same_bits(quantile):
    expected = bits(dissect.thresholds(jnp.asarray(FEATURES), quantile))
    for cuts in ([1, 2, 4], [4], [1, 2, 3, 4, 5, 6, 7]):
        batches = np.split(FEATURES, cuts)
        np.testing.assert_array_equal(bits(dissect.thresholds(batches, quantile)), expected)
        once = (batch for batch in batches)
        np.testing.assert_array_equal(bits(dissect.thresholds(once, quantile)), expected)


def test_batches_are_walked_through_twice_and_not_held():
    class Walks:
        begun = 0

        def __iter__(self):
            self.begun += 1
            yield from np.split(FEATURES, [4])

    walks = Walks()
    np.testing.assert_array_equal(bits(dissect.thresholds(walks)), bits(dissect.thresholds(FEATURES)))
    assert walks.begun == 2


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_devices_give_the_same_bits(meshes, devices):
    spread = jax.device_put(FEATURES, NamedSharding(meshes[devices], PartitionSpec("data")))
    for quantile in (0.005, 0.5):
        for method in quantiles.METHODS:
            found = dissect.thresholds(spread, quantile, method=method)
            np.testing.assert_array_equal(bits(found), bits(dissect.thresholds(FEATURES, quantile, method=method)))


def test_half_precision_and_images_that_do_not_count():
    half = FEATURES[:, :, :, :2].astype(jnp.bfloat16)
    np.testing.assert_array_equal(dissect.thresholds(jnp.asarray(half)), dissect.thresholds(half.astype(np.float32)))
    valid = np.array([True, False, True, True, False, True, True, False])
    expected = bits(dissect.thresholds(FEATURES[valid], 0.1))
    filled = np.where(valid[:, None, None, None], FEATURES, np.float32(np.nan))
    found = quantiles.of_kept(jnp.asarray(filled), jnp.asarray(valid), 5, 0.1, mesh=None)
    np.testing.assert_array_equal(bits(found), expected)
    batches = [(filled[:4], valid[:4]), (filled[4:], valid[4:])]
    np.testing.assert_array_equal(bits(quantiles.streamed(lambda: batches, 0.1)), expected)


@pytest.mark.parametrize("block", [None, 1, 7 * 64, 1 << 20])
def test_blocks_change_no_bit(block):
    """One block of everything is what accelerators have."""
    valid = jnp.asarray([True, False, True, True, False, True, True, False])
    select = jax.jit(functools.partial(quantiles._selected, block=block))
    for rank in (0, 17, 5 * FEATURES.shape[1] * FEATURES.shape[2] - 1):
        lower, upper, nan = select(jnp.asarray(FEATURES), valid, np.int32(rank))
        ordered = np.sort(FEATURES[np.asarray(valid)].reshape(-1, FEATURES.shape[-1]), axis=0)
        ordered += 0.0  # -0 counts as 0
        np.testing.assert_array_equal(bits(lower), bits(ordered[rank]))
        np.testing.assert_array_equal(bits(upper), bits(ordered[min(rank + 1, len(ordered) - 1)]))
        assert not nan.any()


def test_keys_have_the_order_of_floats_and_lead_back():
    smallest = np.finfo(np.float32).smallest_subnormal
    order = [-np.inf, -3e38, -1.0, -1e-38, -smallest, 0.0, smallest, 1e-38, 1.0, 3e38, np.inf, np.nan]
    x = np.array(order, np.float32)
    keys = np.asarray(jax.jit(quantiles.ordered)(x))
    assert (np.diff(keys.astype(np.int64)) > 0).all()
    np.testing.assert_array_equal(bits(quantiles.value(jnp.asarray(keys))), bits(x))
    assert quantiles.ordered(jnp.float32(-0.0)) == quantiles.ordered(jnp.float32(0.0))


@pytest.mark.parametrize("second", [False, True])
def test_histograms_merge_in_any_order(second):
    """In the second walk the smallest value beyond the known upper half is in the middle part; NaN are in all."""
    features = FEATURES[:6, :, :, :2].copy()
    features[:, 0, 0, 1] = np.nan
    features[2:4, 1, 1] = 0.504
    upper = quantiles.ordered(jnp.float32([0.5, 0.5])) >> 16 if second else None
    update = jax.jit(quantiles.update)

    def of(part):
        return update(quantiles.init(2), jnp.asarray(part), None, upper)

    whole, (a, b, c) = of(features), map(of, np.split(features, 3))
    for merged in (
        quantiles.merge(quantiles.merge(a, b), c),
        quantiles.merge(a, quantiles.merge(b, c)),
        quantiles.merge(c, quantiles.merge(b, a)),
    ):
        jax.tree.map(np.testing.assert_array_equal, merged, whole)
    assert whole.nan.tolist() == [0, 6]
    if second:
        assert quantiles.value(whole.beyond).tolist() == [np.float32(0.504)] * 2  # 0.50390625 begins the next half
        assert int(whole.counts.sum()) == ((features >= 0.5) & (features < 0.50390625)).sum()
    else:
        assert int(whole.counts.sum()) == 2 * 6 * HEIGHT * WIDTH


def test_thresholds_of_the_original_program(oracle):
    """Its sketch keeps the order statistic at 994/999 to 0.2 per cent."""
    with np.load(oracle / "netdissect" / "raw.npz") as raw:
        features, expected = raw["features"].transpose(0, 2, 3, 1), raw["threshold"]
    for method in quantiles.METHODS:
        found = dissect.thresholds(features, 1 - 994 / 999, method=method)
        np.testing.assert_allclose(found, expected, rtol=2e-3)
    assert (expected == 0).any()
    assert len(np.unique(expected)) > 12


# Errors

NAN = FEATURES.copy()
NAN[3, 2, 1, [1, 4]] = np.nan


def negative_nan():
    features = FEATURES.copy()
    features.view(np.uint32)[0, 0, 0, 10] = 0xFFFFFFFF
    return features


@pytest.mark.parametrize("form", [lambda x: x, lambda x: [x[:4], x[4:]], lambda x: (b for b in (x[:4], x[4:]))])
def test_nan_is_refused_and_units_are_named(form):
    with pytest.raises(ValueError, match=r"NaN among the activations of 2 units: 1, 4$"):
        dissect.thresholds(form(NAN))
    with pytest.raises(ValueError, match=r"NaN among the activations of 1 units: 10$"):
        dissect.thresholds(form(negative_nan()))
    every = np.full_like(FEATURES, np.nan)
    with pytest.raises(ValueError, match=r"of 11 units: 0, 1, 2, 3, 4, 5, 6, 7, \.\.\.$"):
        dissect.thresholds(form(every))


class Changing:
    """Batches that are others in the second walk."""

    def __init__(self, first, second):
        self.passes = [first, second]

    def __iter__(self):
        yield from self.passes.pop(0)


@pytest.mark.parametrize(
    ("features", "options", "error", "message"),
    [
        (FEATURES, {"quantile": 0.0}, ValueError, "quantile: expected a share between 0 and 1 .*got 0.0"),
        (FEATURES, {"quantile": 1.0}, ValueError, "quantile: expected a share between 0 and 1 .*got 1.0"),
        (FEATURES, {"quantile": -0.1}, ValueError, "quantile: "),
        (FEATURES, {"quantile": float("nan")}, ValueError, "quantile: "),
        ([FEATURES], {"quantile": 1.5}, ValueError, "quantile: "),
        (FEATURES[0], {}, ValueError, r"features: expected \[N,h,w,U\] .*got \[5, 4, 11\]"),
        (
            FEATURES[:0],
            {},
            ValueError,
            r"features: expected \[N,h,w,U\] with at least one of each, got \[0, 5, 4, 11\]",
        ),
        (FEATURES[..., :0], {}, ValueError, "features: expected .* at least one of each"),
        ([], {}, ValueError, "features: expected at least one image, got none"),
        (iter(()), {}, ValueError, "features: expected at least one image, got none"),
        (FEATURES.view(np.int32), {}, TypeError, "features"),
        ([np.ones((2, 3, 3, 2), np.int32)], {}, TypeError, "features"),
        ([FEATURES, FEATURES[:, :2]], {}, ValueError, r"expected batches of \[5, 4, 11\], got \[2, 4, 11\]"),
        (Changing([FEATURES], [FEATURES + 1]), {}, ValueError, "the second walk .* gave other values"),
        (Changing([FEATURES], [FEATURES, 0 * FEATURES - 1e9]), {}, ValueError, "the second walk .* gave other values"),
    ],
)
def test_bad_input_is_refused_by_name(features, options, error, message):
    with pytest.raises(error, match=message):
        dissect.thresholds(features, **options)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method: expected one of linear, higher, got 'lower'"):
        quantiles.check(0.5, "lower")


def test_more_positions_than_32_bits_count_are_refused():
    with pytest.raises(ValueError, match="expected at most 2147483647 positions, got 2147483648"):
        quantiles._checked(jax.ShapeDtypeStruct((1 << 17, 128, 128, 1), jnp.float32))
