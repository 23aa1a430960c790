"""From a file to parameters: number of classes, table, notes, and files of other networks."""

import hashlib
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp import models, weights
from jaxinterp.weights import checkpoint, conversion, files
from jaxinterp.weights.names import from_jax_shape


@pytest.fixture
def save(tmp_path):
    """Writes a PyTorch-like .npz of a network with random weights."""

    def save(name, classes, *, prefix="", dtype=np.float32, extra=None):
        rng = np.random.default_rng(0)
        tensors = {
            prefix + key: (rng.random(from_jax_shape(spec.shape)) + 0.5).astype(dtype)
            for key, spec in models.shapes(name, classes).items()
        }
        np.savez(tmp_path / "weights.npz", **tensors, **(extra or {}))
        return tmp_path / "weights.npz", tensors

    return save


@pytest.mark.parametrize(("name", "classes"), [("small_cnn", 7), ("cifar_resnet20", 3)])
def test_number_of_classes_comes_from_the_file(save, name, classes):
    path, tensors = save(name, classes, prefix="module.", dtype=np.float16)
    found = conversion.prepare(name, path)
    assert (found.classes, found.origin) == (classes, {})
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    params = found.params()
    assert {key: value.shape for key, value in params.items()} == {
        key: spec.shape for key, spec in models.shapes(name, classes).items()
    }
    network = models.network(name, classes)
    images = jnp.zeros((1, network.image_size, network.image_size, 3))
    logits = jax.jit(lambda model, images: model(images))(network.bind(params), images)
    assert logits.shape == (1, classes)
    count = len(tensors)
    assert found.notes() == [f"prefix module. removed ({count} tensors)", f"float16 -> float32 ({count} tensors)"]


def test_head():
    """The parameter that is found is the bias of the layer that gives the logits."""
    for name, head in {
        "resnet18": "fc.bias",
        "alexnet": "classifier.6.bias",
        "efficientnet_lite0": "_fc.bias",
        "squeezenet1_1": "classifier.1.bias",
    }.items():
        assert conversion.head_of(name) == (head, 0)
        own = models.network(name).num_classes
        assert models.shapes(name)[head].shape[0] == own
        assert models.shapes(name, own + 5)[head].shape[0] == own + 5


def test_table(save):
    path, _ = save("small_cnn", 4, extra={"strange": np.zeros((2, 3)), "conv1.num_batches_tracked": np.array(1)})
    lines = list(conversion.table(conversion.prepare("small_cnn", path)))
    assert lines[0].split() == ["tensor", "shape", "type", "parameter", "shape", "note"]
    assert len({line.index("float32") for line in lines if "float32" in line}) == 1
    [strange] = [line.split() for line in lines if line.startswith("strange")]
    assert strange == ["strange", "2x3", "float64", "-", "-", "UNEXPECTED"]
    [counter] = [line for line in lines if "num_batches_tracked" in line]
    assert counter.split()[1] == "scalar"
    assert counter.endswith("dropped: not used in evaluation")


def test_a_file_of_another_network(save):
    path, _ = save("small_cnn", 4)
    found = conversion.prepare("cifar_resnet20", path)
    assert {row.problem for row in found.rows} >= {"missing", "unexpected"}
    with pytest.raises(ValueError, match=r"weights\.npz does not fit the network: missing: .*unexpected: "):
        found.params()


def test_the_tensors_of_the_file_are_let_go_before_writing(save, tmp_path, monkeypatch):
    """Else a conversion holds the weights once more than it needs, beside the writer's copies."""
    path, _ = save("small_cnn", 4, dtype=np.float16)
    read, kept, alive = files.read, [], []

    def reading(path):
        tensors = read(path)
        kept.extend(map(weakref.ref, tensors.values()))
        return tensors

    monkeypatch.setattr(files, "read", reading)
    monkeypatch.setattr(checkpoint, "save", lambda *_, **__: alive.extend(ref() is not None for ref in kept))
    weights.convert("small_cnn", file=path, root=tmp_path / "ckpts")
    assert alive == [False] * len(models.shapes("small_cnn"))


def test_refuses(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        conversion.prepare("resnet18", tmp_path / "none.pth")
    with pytest.raises(ValueError, match="no package with weights of 'resnet18'"):
        conversion.prepare("resnet18")
    with pytest.raises(ValueError, match="unknown model 'resnet19'"):
        conversion.prepare("resnet19", tmp_path / "none.pth")
