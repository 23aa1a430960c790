"""The strict map: layouts, rules, the table, and what makes it fail."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxinterp.weights.names import class_axis, classes_of, from_jax_shape, map_tensors, plan, to_jax_layout

EXPECTED = {
    "conv.weight": (3, 3, 2, 4),
    "depth.weight": (3, 3, 1, 4),
    "bn.running_mean": (4,),
    "fc.weight": (4, 5),
    "fc.bias": (5,),
}
EXPECTED = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in EXPECTED.items()}
RNG = np.random.default_rng(0)


def state_dict(**changes) -> dict[str, np.ndarray]:
    shapes = {name: from_jax_shape(spec.shape) for name, spec in EXPECTED.items()}
    tensors = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in tensors.items() if value is not None}


def test_layouts():
    tensors = state_dict()
    params = map_tensors(tensors, EXPECTED, source="x")
    assert list(params) == list(EXPECTED)
    for h, w, i, o in np.ndindex(3, 3, 2, 4):
        assert params["conv.weight"][h, w, i, o] == tensors["conv.weight"][o, i, h, w]
    assert params["depth.weight"][2, 1, 0, 3] == tensors["depth.weight"][3, 0, 2, 1]
    assert params["fc.weight"][3, 1] == tensors["fc.weight"][1, 3]
    for name, param in params.items():
        assert (param.dtype, param.shape) == (np.float32, EXPECTED[name].shape)
        assert param.flags.c_contiguous
        assert from_jax_shape(param.shape) == tensors[name].shape
    keras = {name: np.asarray(param) for name, param in params.items()}
    for name, param in map_tensors(keras, EXPECTED, source="x", layout="keras").items():
        np.testing.assert_array_equal(param, params[name])
    np.testing.assert_array_equal(to_jax_layout(tensors["fc.bias"]), tensors["fc.bias"])


def test_data_parallel_and_counters():
    tensors = state_dict()
    wrapped = {f"module.{name}": value for name, value in tensors.items()}
    wrapped["module.bn.num_batches_tracked"] = np.array(5)
    expected, found = (map_tensors(each, EXPECTED, source="x") for each in (tensors, wrapped))
    for name in EXPECTED:
        np.testing.assert_array_equal(found[name], expected[name])
    rows = plan(wrapped, EXPECTED)
    assert {row.note for row in rows if row.name} == {"prefix module. removed"}
    assert rows[-1].source == "module.bn.num_batches_tracked"
    assert rows[-1].name is None
    assert rows[-1].note == "dropped: not used in evaluation"
    assert not any(row.problem for row in rows)
    # DataParallel around DistributedDataParallel, say.
    twice = {f"module.{name}": value for name, value in wrapped.items()}
    np.testing.assert_array_equal(map_tensors(twice, EXPECTED, source="x")["fc.bias"], expected["fc.bias"])
    assert {row.note for row in plan(twice, EXPECTED) if row.name} == {"prefix module.module. removed"}
    assert classes_of(twice, "fc.bias", 0, source="x") == 5
    # A prefix on some names only is no DataParallel, and a network may have a part that is called so.
    with pytest.raises(ValueError, match=r"missing: fc\.bias; unexpected: module\.fc\.bias"):
        map_tensors(state_dict(fc__bias=None, module__fc__bias=np.zeros(5)), EXPECTED, source="x")
    own = {"module.w": jax.ShapeDtypeStruct((2,), jnp.float32)}
    assert list(map_tensors({"module.w": np.ones(2)}, own, source="x")) == ["module.w"]


@pytest.mark.parametrize(
    ("network", "names"),
    [
        ("inception_v3", ["AuxLogits.fc.weight", "AuxLogits.conv0.bn.bias"]),
        ("googlenet", ["aux1.fc1.weight", "aux2.conv.conv.weight"]),
    ],
)
def test_auxiliary_heads(network, names):
    tensors = state_dict() | dict.fromkeys(names, np.zeros(3))
    assert list(map_tensors(tensors, EXPECTED, source="x", network=network)) == list(EXPECTED)
    dropped = [row.source for row in plan(tensors, EXPECTED, network=network) if row.note == "dropped: auxiliary head"]
    assert dropped == names
    for other in ("", "resnet18", "googlenet" if network == "inception_v3" else "inception_v3"):
        with pytest.raises(ValueError, match=f"unexpected: {names[0]}, {names[1]}"):
            map_tensors(tensors, EXPECTED, source="x", network=other)


def test_other_precisions():
    half, brain, double = np.array([1, -2, 0.5, 65504, 0], np.float16), np.arange(4), np.ones((4, 1, 3, 3))
    tensors = state_dict(
        fc__bias=half,
        bn__running_mean=brain.astype(ml_dtypes.bfloat16),
        depth__weight=double,
        conv__weight=np.ones((4, 2, 3, 3), int),
    )
    params = map_tensors(tensors, EXPECTED, source="x")
    assert {param.dtype for param in params.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(params["fc.bias"], half.astype(np.float32))
    np.testing.assert_array_equal(params["bn.running_mean"], brain)
    notes = {row.name: row.note for row in plan(tensors, EXPECTED)}
    assert notes == {
        "conv.weight": "int64 -> float32",
        "depth.weight": "float64 -> float32",
        "bn.running_mean": "bfloat16 -> float32",
        "fc.weight": "",
        "fc.bias": "float16 -> float32",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc__bias": None, "fc__weight": None}, r"^x does not fit the network: missing: fc\.weight, fc\.bias$"),
        ({"extra": np.zeros(1)}, "unexpected: extra$"),
        ({"fc__bias": np.zeros(6)}, r"misshapen: fc\.bias \(6,\) instead of \(5,\)$"),
        ({"conv__weight": np.zeros((4, 2, 3))}, r"conv\.weight \(4, 2, 3\) instead of \(4, 2, 3, 3\)$"),
        ({"fc__bias": np.array([1, np.nan, 0, 0, 0])}, r"unusable: fc\.bias with values that are not finite$"),
        ({"fc__bias": np.full(5, 1e300)}, r"unusable: fc\.bias with values that are not finite$"),
        ({"fc__bias": np.ones(5, complex)}, r"unusable: fc\.bias of type complex128$"),
        ({"fc__bias": np.ones(5, bool)}, r"unusable: fc\.bias of type bool$"),
        ({"fc__bias": np.array(["a"] * 5)}, r"unusable: fc\.bias of type str"),
        ({f"a{i}": np.zeros(1) for i in range(20)}, r"unexpected: a0, .*, a11, \.\.\. \(20 in all\)$"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        map_tensors(state_dict(**changes), EXPECTED, source="x")


def test_the_table_says_everything():
    tensors = state_dict(fc__bias=np.zeros(6), extra=np.zeros((2, 1)), bn__running_mean=None)
    rows = {row.name or row.source: row for row in plan(tensors, EXPECTED)}
    assert rows["conv.weight"] == ("conv.weight", (4, 2, 3, 3), "float32", "conv.weight", (3, 3, 2, 4), "", "")
    assert rows["bn.running_mean"] == (None, None, None, "bn.running_mean", (4,), "", "missing")
    assert rows["fc.bias"] == ("fc.bias", (6,), "float64", "fc.bias", (5,), "", "misshapen")
    assert rows["extra"] == ("extra", (2, 1), "float64", None, None, "", "unexpected")


def test_two_names_for_one_parameter():
    tensors = state_dict() | {"FC.BIAS": np.zeros(5)}
    with pytest.raises(ValueError, match=r"given twice: FC\.BIAS"):
        map_tensors(tensors, EXPECTED, source="x", rename=str.lower)


def test_number_of_classes():
    more = {
        **EXPECTED,
        **{n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in {"fc.weight": (4, 6), "fc.bias": (6,)}.items()},
    }
    assert class_axis(EXPECTED, more) == ("fc.bias", 0)
    without = {name: spec for name, spec in EXPECTED.items() if name != "fc.bias"}
    assert class_axis(without, more) == ("fc.weight", 1)
    with pytest.raises(ValueError, match="no parameter depends"):
        class_axis(EXPECTED, EXPECTED)
    tensors = state_dict(fc__weight=np.zeros((7, 4)), fc__bias=np.zeros(7))
    for each in (tensors, {f"module.{name}": value for name, value in tensors.items()}):
        assert classes_of(each, "fc.bias", 0, source="x") == 7
        assert classes_of(each, "fc.weight", 1, source="x") == 7
    assert (
        classes_of({"FC.weight": np.zeros((4, 9))}, "fc.weight", 1, source="x", layout="keras", rename=str.lower) == 9
    )
    for bad in ({}, {"fc.bias": np.array(3)}, {"fc.bias": np.zeros(0)}):
        with pytest.raises(ValueError, match=r"x does not fit the network: .*fc\.bias"):
            classes_of(bad, "fc.bias", 0, source="x")
