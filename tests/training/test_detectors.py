"""Training of detectors: the loss, a set that is easy, and a checkpoint that is verified."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp import load, models
from jaxinterp.runs import Run
from jaxinterp.training import detectors
from jaxinterp.training.generated import Generated, Squares
from jaxinterp.weights import seeded

NAME = "detector_residual"


def easy(count: int, seed: int) -> Squares:
    """Dark squares are real, bright ones generated."""
    rng = np.random.default_rng(seed)
    labels = np.tile(np.array([0, 1], np.int32), count // 2)
    images = rng.integers(0, 90, (count, 32, 32, 3), np.uint8) + (160 * labels[:, None, None, None]).astype(np.uint8)
    ids = tuple(f"p_{i:02d}_{'splice' if label else 'real'}" for i, label in enumerate(labels))
    return Squares(images, labels, ids)


def test_a_square_is_turned_and_mirrored_in_eight_ways():
    image = np.arange(32 * 32 * 3, dtype=np.float32).reshape(32, 32, 3)
    ways = {np.rot90(flipped, k).tobytes() for flipped in (image, image[::-1]) for k in range(4)}
    found = jax.vmap(lambda key: detectors.turned(jnp.asarray(image), key))(jax.random.split(jax.random.key(0), 100))
    assert {np.asarray(each).tobytes() for each in found} == ways


def test_the_loss_is_cross_entropy():
    params = jax.tree.map(jnp.asarray, seeded.params(models.shapes(NAME)))
    images = jnp.broadcast_to(jnp.array([0.2, 0.9])[:, None, None, None], (2, 32, 32, 3))  # alike when turned
    logits = np.asarray(models.network(NAME).bind(params)(images), np.float64)
    labels = np.array([1, 0])
    expected = np.log(np.exp(logits).sum(1)) - logits[[0, 1], labels]
    keys = jax.random.split(jax.random.key(0), 2)
    found = detectors.loss(NAME, params, images, jnp.asarray(labels), keys)
    np.testing.assert_allclose(found.losses, expected, rtol=1e-5)
    np.testing.assert_array_equal(found.metrics["accuracy"], logits.argmax(1) == labels)


def test_an_easy_set_is_learnt_and_the_checkpoint_is_verified(tmp_path):
    train, test = easy(64, 0), easy(32, 1)
    run = Run(tmp_path / "run", {})
    params = detectors.train(NAME, train, run=run, epochs=6, batch_size=32, quiet=True)
    found = detectors.accuracy(NAME, params, test)
    assert {group: estimate.count for group, estimate in found.items()} == {"all": 32, "real": 16, "splice": 16}
    assert found["all"].mean == 1
    trained, data = detectors.Trained(NAME, params, found), Generated(train, test, 0.0)
    folder = detectors.save(trained, data, root=tmp_path / "ckpts")
    network, loaded = load(NAME, root=tmp_path / "ckpts")
    assert network.classes == ("real", "generated")
    for name, value in loaded.items():
        np.testing.assert_array_equal(value, params[name])

    manifest = folder / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole.replace('"sha256": "', '"sha256": "0', 3))
    with pytest.raises(ValueError, match="does not match its sha256"):
        load(NAME, root=tmp_path / "ckpts")


def test_a_detector_of_another_training_is_not_taken(tmp_path, monkeypatch):
    name = detectors.NAMES[-1]  # whatever is missing before it is not trained in vain
    monkeypatch.setattr(detectors, "train", lambda *_, **__: pytest.fail("nothing should be trained"))
    data = Generated(easy(4, 0), easy(4, 1), 0.0)
    trained = detectors.Trained(name, seeded.params(models.shapes(name)), {})
    detectors.save(trained, data, root=tmp_path, settings={"epochs": 20, "seed": 0})
    for other, epochs, seed, message in (
        (Generated(easy(4, 2), data.test, 0.0), 20, 0, 'data: "'),
        (Generated(data.train, easy(4, 2), 0.0), 20, 0, 'data: "'),
        (data, 5, 0, "epochs: 20 there, 5 asked"),
        (data, 20, 1, "seed: 0 there, 1 asked"),
    ):
        with pytest.raises(ValueError, match=f"another training; remove it to train it anew. It differs in {message}"):
            detectors.ensure(other, tmp_path / "run", root=tmp_path, epochs=epochs, seed=seed)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "small_cnn"}, "name must be one of detector_meso"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        detectors.train(**{"name": NAME, "squares": easy(4, 0), "run": Run(tmp_path, {}), "quiet": True, **given})
