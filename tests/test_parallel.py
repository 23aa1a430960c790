"""Parameters spread by a table: who holds what, the same results to rounding, and what is refused."""

import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxinterp import attacks, models, parallel
from jaxinterp.weights import checkpoint, seeded

TABLE = [(r"^conv.*\.weight$", P(None, None, None, "model")), (r"^fc\.weight$", P("model", None))]


@pytest.fixture(scope="module")
def params() -> dict[str, np.ndarray]:
    return seeded.params(models.shapes("small_cnn"))


def test_an_attack_on_parameters_that_are_spread(params):
    mesh = parallel.model_mesh()
    assert mesh.shape == {"model": 8}
    placed = parallel.place(params, mesh, TABLE)
    for name, whole in params.items():
        parts = 8 if name.endswith("weight") else 1
        assert {shard.data.size * parts for shard in placed[name].addressable_shards} == {whole.size}, name
        np.testing.assert_array_equal(placed[name], whole)
    network = models.network("small_cnn")
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(3, 32, 32, 3)), jnp.float32)
    params = jax.tree.map(jnp.asarray, params)
    labels = np.argmax(network.bind(params)(images), axis=1)
    attack, key = attacks.IFGSM(steps=3, eps=0.1), jax.random.key(0)
    expected = attacks.run(attack, network.bind(params), images, labels, key=key)
    found = attacks.run(attack, network.bind(placed), parallel.replicate(images, mesh), labels, key=key)
    np.testing.assert_array_equal(found.success, expected.success)
    assert np.mean(np.abs(np.asarray(found.images) - np.asarray(expected.images)) > 1e-5) < 0.01


def test_a_checkpoint_is_loaded_in_parts(params, tmp_path):
    source = {"file": "seeded", "sha256": "0", "known": False}
    checkpoint.save(params, tmp_path / "small_cnn", name="small_cnn", classes=10, source=source)
    where = parallel.placement(parallel.model_mesh(), TABLE)
    loaded = checkpoint.load(tmp_path / "small_cnn", models.shapes("small_cnn"), name="small_cnn", placement=where)
    for name, leaf in loaded.items():
        assert leaf.sharding.is_equivalent_to(where(name, leaf.shape), leaf.ndim)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (("127.0.0.1", 2, 1), ValueError, "--coordinator-address: expected HOST:PORT, got '127.0.0.1'"),
        (("host:port", 2, 1), ValueError, "--coordinator-address: expected HOST:PORT, got 'host:port'"),
        (("host:1", 2, 2), ValueError, "--process-id must be from 0 to 1, got 2"),
        (("host:1", 0, 0), ValueError, "--num-processes must be at least 1, got 0"),
        (("no.such.host.invalid:1234", 2, 1), OSError, "nobody answered at no.such.host.invalid:1234 within 1 s"),
    ],
)
def test_processes_that_cannot_start(given, error, message):
    with pytest.raises(error, match=message):
        parallel.initialize(*given, start_timeout=1)


def test_a_port_that_is_taken():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        with pytest.raises(OSError, match=r"cannot be used .*; choose another"):
            parallel.initialize(f"127.0.0.1:{other.getsockname()[1]}", 2, 0)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([("(", P())], "'\\(' is no regular expression"),
        ([("fc", P("data"))], "'fc' names the axis 'data'; the mesh has \\('model',\\)"),
        ([("fc.bias", P(None, "model"))], "fc.bias has the shape \\[10\\], fewer axes than"),
        ([("fc.bias", P("model"))], "fc.bias of shape \\[10\\] cannot be spread by .*: 10 into 8 parts"),
        ([("head", P("model"))], "'head' fits no parameter; there are conv1"),
    ],
)
def test_bad_tables(params, table, message):
    with pytest.raises(ValueError, match=message):
        parallel.place(params, parallel.model_mesh(), table)
