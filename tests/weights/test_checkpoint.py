"""Checkpoints: round trip, manifest, damage of every kind, interrupted writing, conversion of a published file."""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinterp import models, weights
from jaxinterp.weights import catalogue, checkpoint, recipes

SOURCE = {"file": "net.pth", "sha256": "0" * 64, "license": "MIT"}


@pytest.fixture
def params(rng) -> dict[str, np.ndarray]:
    return {
        "conv.weight": rng.normal(size=(3, 3, 4, 8)).astype(np.float32),
        "bn.bias": np.array([0.0, -0.0, 1e-40, np.float32(np.pi)], np.float32),
        "fc.weight": rng.normal(size=(5, 2)).astype(np.float32),
    }


@pytest.fixture
def folder(tmp_path, params) -> Path:
    """A sound checkpoint of the network "net"."""
    checkpoint.save(params, tmp_path / "ckpts" / "net", name="net", classes=2, source=SOURCE)
    return tmp_path / "ckpts" / "net"


def shapes(params):
    return {key: jax.ShapeDtypeStruct(value.shape, np.float32) for key, value in params.items()}


def assert_holds(folder, params):
    loaded = checkpoint.load(folder, shapes(params), name="net")
    assert set(loaded) == set(params)
    for key, value in loaded.items():
        assert isinstance(value, jax.Array)
        assert np.asarray(value).tobytes() == params[key].tobytes()


def refusal(folder, params) -> str:
    """What loading says; empty where it gives `params` to the last bit. Anything else fails."""
    try:
        assert_holds(folder, params)
    except ValueError as error:
        return str(error)
    return ""


def test_round_trip(folder, params):
    """To the last bit, negative zeros and subnormal numbers included."""
    assert_holds(folder, params)
    assert [path.name for path in folder.parent.iterdir()] == ["net"]


def test_manifest(folder, params):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == checkpoint.read_manifest(folder, name="net")
    assert manifest["network"] == "net"
    assert manifest["source"] == SOURCE
    assert manifest["classes"] == 2
    assert manifest["versions"]["jax"] == importlib.metadata.version("jax")
    assert manifest["tensors"] == {
        key: {"shape": [*value.shape], "dtype": "float32", "sha256": hashlib.sha256(value.tobytes()).hexdigest()}
        for key, value in params.items()
    }


def test_replacing(folder, params):
    newer = {key: value + 1 for key, value in params.items()}
    checkpoint.save(newer, folder, name="net", classes=2, source=SOURCE)
    assert_holds(folder, newer)
    assert [path.name for path in folder.parent.iterdir()] == ["net"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tensorstore's abandoned reads
def test_every_flipped_byte_is_noticed(folder, params):
    """One byte of the largest file of the checkpoint, at many places: refused, or no parameter changed by a bit."""
    largest = max((p for p in (folder / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    sound, messages = largest.read_bytes(), []
    for place in np.linspace(0, len(sound) - 1, 12).astype(int):
        damaged = bytearray(sound)
        damaged[place] ^= 0x10
        largest.write_bytes(damaged)
        if message := refusal(folder, params):
            messages.append(message)
    assert len(messages) >= 6
    assert all("run: jaxinterp convert net --force" in message for message in messages)
    largest.write_bytes(sound)
    assert_holds(folder, params)


def test_a_changed_tensor_is_named(folder, params):
    """Data that is readable, but not what the manifest says."""
    other = folder.parent / "other"
    changed = {**params, "fc.weight": np.nextafter(params["fc.weight"], np.float32(9))}
    checkpoint.save(changed, other, name="net", classes=2, source=SOURCE)
    shutil.rmtree(folder / "params")
    shutil.move(other / "params", folder / "params")
    with pytest.raises(ValueError, match=r"damaged: tensor fc\.weight does not match its sha256"):
        checkpoint.load(folder, shapes(params), name="net")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_any_deleted_file_is_noticed_or_not_needed(folder, params):
    files = [path for path in folder.rglob("*") if path.is_file()]
    refused = set()
    for path in files:
        sound = path.read_bytes()
        path.unlink()
        if message := refusal(folder, params):
            assert "run: jaxinterp convert net" in message
            refused.add(path.name)
        path.write_bytes(sound)
    assert {"manifest.json", "manifest.ocdbt"} <= refused
    shutil.rmtree(folder / "params")
    with pytest.raises(ValueError, match=r"cannot be read .* run: jaxinterp convert net --force"):
        checkpoint.load(folder, shapes(params), name="net")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"format": 1, "network": "net"}'])
def test_broken_manifest(folder, params, content):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json is missing or damaged .* run: jaxinterp convert net"):
        checkpoint.load(folder, shapes(params), name="net")


def test_truncated_manifest(folder, params):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="missing or damaged"):
        checkpoint.load(folder, shapes(params), name="net")


@pytest.mark.parametrize(("key", "value"), [("format", 99), ("network", "other"), ("tensors", [])])
def test_manifest_of_something_else(folder, params, key, value):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, key: value}))
    with pytest.raises(ValueError, match=rf"expected {checkpoint.FORMAT} for 'net'; run: jaxinterp convert net"):
        checkpoint.load(folder, shapes(params), name="net")


@pytest.mark.parametrize("tensor", [3, {}, {"shape": 5, "sha256": ""}, {"shape": [5, 2], "sha256": None}])
def test_manifest_with_a_broken_entry(folder, params, tensor):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tensors"]["fc.weight"] = tensor
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="jaxinterp convert net"):
        checkpoint.load(folder, shapes(params), name="net")


def test_checkpoint_of_another_network(folder, params):
    with pytest.raises(ValueError, match=f"for 'net', expected {checkpoint.FORMAT} for 'other'"):
        checkpoint.load(folder, shapes(params), name="other")
    for changed, named in (
        ({**params, "new.bias": np.zeros(2, np.float32)}, "new.bias"),
        ({key: value for key, value in params.items() if key != "bn.bias"}, "bn.bias"),
        ({**params, "fc.weight": params["fc.weight"].T}, "fc.weight"),
    ):
        with pytest.raises(ValueError, match=f"does not fit net: {named}; run"):
            checkpoint.load(folder, shapes(changed), name="net")


def test_missing_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint of efficientnet_lite0 in .*run: jaxinterp convert effic"):
        weights.load("efficientnet_lite0", root=tmp_path)
    with pytest.raises(ValueError, match="did you mean 'efficientnet_lite0'"):
        weights.load("efficientnet_lit0", root=tmp_path)


def test_a_killed_conversion_is_named(folder, params):
    """After SIGKILL between writing and renaming there is no checkpoint; the message names what was left behind."""
    shutil.rmtree(folder)
    killed = """
import os, signal, sys, numpy, pathlib
from jaxinterp.weights import checkpoint
os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
os.chmod = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save({"a": numpy.zeros(3, numpy.float32)}, pathlib.Path(sys.argv[1]), name="net", classes=2, source={})
"""
    found = subprocess.run([sys.executable, "-c", killed, str(folder)], capture_output=True, timeout=300)
    assert found.returncode == -9, found.stderr.decode()[-2000:]
    [left] = folder.parent.iterdir()
    with pytest.raises(ValueError, match=f"a conversion was interrupted and left {left.name}, to be deleted; run: "):
        checkpoint.load(folder, shapes(params), name="net")
    checkpoint.save(params, folder, name="net", classes=2, source=SOURCE)
    assert_holds(folder, params)


def test_without_a_placement_parameters_are_free(folder, params):
    """What is computed from them and from other arrays has one program, not one for each place it may come from."""
    loaded = checkpoint.load(folder, shapes(params), name="net")
    assert not any(value.committed for value in loaded.values())
    assert_holds(folder, params)


def test_any_placement(folder, params):
    """Sharded or replicated over eight devices: the same bits, verified all the same."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread, copied = (jax.sharding.NamedSharding(mesh, jax.P(*axes)) for axes in ((None, None, None, "data"), ()))
    expected = shapes(params)
    for placement in (copied, lambda name, shape: spread if name == "conv.weight" else copied):
        loaded = checkpoint.load(folder, expected, name="net", placement=placement)
        for key, value in loaded.items():
            assert value.sharding == (placement(key, value.shape) if callable(placement) else placement)
            assert np.asarray(value).tobytes() == params[key].tobytes()
        edit_digest(folder, "conv.weight", lambda digest: digest[::-1])
        with pytest.raises(ValueError, match=r"damaged: tensor conv\.weight does not match"):
            checkpoint.load(folder, expected, name="net", placement=placement)
        edit_digest(folder, "conv.weight", lambda digest: digest[::-1])


def edit_digest(folder, name, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tensors"][name]["sha256"] = change(manifest["tensors"][name]["sha256"])
    path.write_text(json.dumps(manifest))


def test_damage_is_noticed_by_every_process(folder, params):
    """Two processes of two devices: parameters that no process holds as a whole are verified, too."""
    program = """
import sys, json, pathlib, jax, numpy as np
folder, port, index = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
from jaxinterp.weights import checkpoint
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
spread, copied = (jax.sharding.NamedSharding(mesh, jax.P(*axes)) for axes in ((None, None, None, "data"), ()))
tensors = json.loads((folder / "manifest.json").read_text())["tensors"]
expected = {key: jax.ShapeDtypeStruct(tuple(t["shape"]), np.float32) for key, t in tensors.items()}
for name in ("sound", "net"):
    for placement in (copied, lambda key, shape: spread if len(shape) == 4 else copied):
        try:
            found = checkpoint.load(folder.parent / name, expected, name="net", placement=placement)
            whole = [found[key].is_fully_addressable for key in found]
            print("found: loaded", any(whole))
        except ValueError as error:
            print("found:", error)
"""
    shutil.copytree(folder, folder.parent / "sound")
    edit_digest(folder, "conv.weight", lambda digest: digest[::-1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS_OF_ONE_DEVICE"]}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(folder), port, str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for out, err in outputs:
        lines = [line for line in out.splitlines() if line.startswith("found:")]  # gloo prints, too
        assert lines[:2] == ["found: loaded False"] * 2, err[-2000:]
        assert len(lines) == 4
        assert all("damaged: tensor conv.weight does not match its sha256" in line for line in lines[2:])


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_save(folder, params, monkeypatch, error, when):
    """An exception while or after Orbax writes leaves nothing behind, and the older checkpoint as it was."""
    from orbax.checkpoint import v1 as ocp

    save = ocp.save

    def interrupted(path, *args, **kwargs):
        if when == "after":
            save(path, *args, **kwargs)
        else:
            Path(str(path) + ".orbax-checkpoint-tmp").mkdir()
        raise error

    monkeypatch.setattr(ocp, "save", interrupted)
    for target in (folder, folder.parent / "fresh"):
        with pytest.raises(type(error)):
            checkpoint.save({"a": np.zeros(3, np.float32)}, target, name="net", classes=2, source=SOURCE)
    assert [path.name for path in folder.parent.iterdir()] == ["net"]
    assert_holds(folder, params)


def test_failed_exchange(folder, params, monkeypatch):
    """The older checkpoint comes back if the new one cannot take its place."""
    rename = checkpoint.os.rename

    def failing(source, target):
        if Path(target) == folder and Path(source).name.startswith(".net.") and (Path(source) / "params").exists():
            raise OSError("refused")
        rename(source, target)

    monkeypatch.setattr(checkpoint.os, "rename", failing)
    with pytest.raises(OSError, match="refused"):
        checkpoint.save({"a": np.zeros(3, np.float32)}, folder, name="net", classes=2, source=SOURCE)
    monkeypatch.undo()
    assert_holds(folder, params)
    assert [path.name for path in folder.parent.iterdir()] == ["net"]


def test_default_root(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXINTERP_CKPTS", str(tmp_path))
    assert checkpoint.default_root() == tmp_path
    monkeypatch.delenv("JAXINTERP_CKPTS")
    assert checkpoint.default_root().name == "ckpts"


# A published file


def test_convert(tmp_path):
    """Converts, does nothing a second time, writes anew when forced or damaged."""
    name = "efficientnet_lite0"
    recipe = recipes.recipe(name)
    if importlib.util.find_spec(recipe.package) is None:
        pytest.skip(f"{recipe.package} is not installed")
    folder = weights.convert(name, root=tmp_path)
    assert folder == tmp_path / name

    manifest = checkpoint.read_manifest(folder, name=name)
    assert manifest["source"]["sha256"] == hashlib.sha256(recipe.find().read_bytes()).hexdigest()
    assert manifest["source"]["license"] == "Apache-2.0"
    assert manifest["source"]["known"] is True  # by the committed record, wherever checkpoints are kept
    (tmp_path / "known.json").write_text(json.dumps({"small_cnn": {"sha256": "0" * 64, "source": "mine"}}))
    table = {row[0]: row[5:] for row in catalogue.rows(tmp_path)}
    assert table[name] == ("yes", "known", "Apache-2.0")
    assert table["efficientnet_lite1"] == ("no", "on record", "Apache-2.0")
    assert table["small_cnn"] == ("no", "on record", "-")
    assert table["resnet18"] == ("no", "-", "-")
    assert {key: tuple(t["shape"]) for key, t in manifest["tensors"].items()} == {
        key: s.shape for key, s in models.shapes(name).items()
    }

    def times():
        return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}

    first = times()
    assert weights.convert(name, root=tmp_path) == folder
    assert times() == first
    weights.convert(name, root=tmp_path, force=True)
    forced = times()
    assert forced[folder / "manifest.json"] > first[folder / "manifest.json"]
    (folder / "manifest.json").write_text("{")
    weights.convert(name, root=tmp_path)
    network, params = weights.load(name, root=tmp_path)
    assert network == models.network(name)
    assert set(params) == set(models.shapes(name))


def test_convert_refuses(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        weights.convert("efficientnet_lite0", file=tmp_path / "none.pth", root=tmp_path)
    with pytest.raises(ValueError, match="did you mean 'efficientnet_lite1'"):
        weights.convert("efficientnet_lte1", root=tmp_path)
    (tmp_path / "bad.pth").write_bytes(b"not a state dict")
    with pytest.raises(ValueError):
        weights.convert("efficientnet_lite0", file=tmp_path / "bad.pth", root=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pth"]
