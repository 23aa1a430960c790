"""Ensembles: the mean of losses is exact, sizes are reconciled, every attack and the command line take them."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxinterp import Network, attacks, cli, ensemble, models, weights
from jaxinterp.attacks.objective import log_odds
from jaxinterp.network import capture
from jaxinterp.weights import checkpoint, seeded

WEIGHTS = (0.5, 0.3, 0.2)


def pooled(params, images, tap):
    """Means of a grid of four cells, then a linear layer."""
    batch, height, width, channels = images.shape
    cells = images.reshape(batch, 2, height // 2, 2, width // 2, channels).mean((2, 4))
    return tap("cells", cells).reshape(batch, -1) @ params


def member(name: str, size: int, seed: int, classes: int | tuple[str, ...] = 4):
    count = classes if isinstance(classes, int) else len(classes)
    params = 4 * jax.random.normal(jax.random.key(seed), (12, count))
    return Network(name, pooled, ("cells",), size, classes), params


def cross_entropy(logits, c):
    return -jax.nn.log_softmax(logits)[:, c]


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_mean_of_losses_is_the_mean_of_cross_entropies_with_its_gradient(scale, rng):
    given = [jnp.asarray(scale * rng.normal(size=(5, 4)), jnp.float32) for _ in WEIGHTS]
    net, _ = ensemble.of([member(f"m{i}", 8, i) for i in range(3)], weights=[5, 3, 2], combine="losses")
    assert isinstance(net.apply, ensemble.Members)
    fixed = dataclasses.replace(net.apply, networks=tuple(Network(f"m{i}", lambda p, x: p) for i in range(3)))

    def of(logits, c):
        whole = fixed({f"m{i}": z for i, z in enumerate(logits)}, jnp.zeros((5, 224, 224, 3)), lambda name, x: x)
        assert whole.shape == (5, 5)
        return cross_entropy(whole, c)

    fixed = dataclasses.replace(fixed, size=224)
    for c in range(4):
        expected = sum(w * cross_entropy(z, c) for w, z in zip(WEIGHTS, given, strict=True))
        np.testing.assert_allclose(of(given, c), expected, rtol=3e-6, atol=3e-7)
        gradient = jax.grad(lambda logits, c=c: of(logits, c).sum())(given)
        for w, z, g in zip(WEIGHTS, given, gradient, strict=True):
            np.testing.assert_allclose(g, w * (jax.nn.softmax(z) - jnp.eye(4)[c]), atol=3e-6)


def test_members_that_are_sure_and_agree_still_have_precise_odds():
    """What attacks descend on is log((1 - p) / p), p near one."""
    sure = [np.array([[20.0, 0, 1, -3, 2]]), np.array([[17.0, 1, 1, -3, 2]])]
    rest = [-np.log1p(np.exp(z[0, 1:] - z[0, 0]).sum()) for z in sure]  # log p of the first class
    mean = (rest[0] + rest[1]) / 2
    exact = np.log(-np.expm1(mean)) - mean
    logits = ensemble._of_losses([jax.nn.log_softmax(jnp.asarray(z, jnp.float32)) for z in sure], (0.5, 0.5))
    np.testing.assert_allclose(log_odds(logits, jnp.array([0])), [exact], rtol=1e-6)


def test_classes_that_a_member_rules_out():
    one, other = jnp.array([[0.0, -jnp.inf, 1.0]]), jnp.array([[1.0, 2.0, 0.0]])
    found = ensemble._of_losses([jax.nn.log_softmax(one), jax.nn.log_softmax(other)], (0.5, 0.5))
    assert found[0, 1] == -jnp.inf
    np.testing.assert_allclose(jnp.exp(found).sum(), 1, rtol=1e-6)


def test_the_mean_of_logits_and_of_log_probabilities_are_the_same_to_an_attack(rng):
    members = [member("a", 8, 0), member("b", 8, 1)]
    net, params = ensemble.of(members, weights=[1, 3])
    images = jnp.asarray(rng.random((3, 8, 8, 3)), jnp.float32)
    mean = net.bind(params)(images)
    logits = [n.bind(p)(images) for n, p in members]
    np.testing.assert_allclose(mean, 0.25 * logits[0] + 0.75 * logits[1], rtol=1e-6)
    disagreement = -jax.nn.logsumexp(
        sum(w * jax.nn.log_softmax(z) for w, z in zip((0.25, 0.75), logits, strict=True)), -1
    )
    assert jnp.all(disagreement > 0)
    for c in range(4):
        losses = sum(w * cross_entropy(z, c) for w, z in zip((0.25, 0.75), logits, strict=True))
        np.testing.assert_allclose(cross_entropy(mean, c), losses - disagreement, rtol=1e-5, atol=1e-6)


def test_members_see_pictures_of_their_size(rng):
    members = [member("a", 8, 0), member("b", 12, 1)]
    net, params = ensemble.of(members)
    assert net.image_size == 12
    assert net.nodes == ("a/cells", "b/cells")
    images = jnp.asarray(rng.random((2, 12, 12, 3)), jnp.float32)
    _, maps = capture(net, params, images, net.nodes)
    small = jax.image.resize(images, (2, 8, 8, 3), "bilinear")
    np.testing.assert_array_equal(maps["a/cells"], capture(*members[0], small, ["cells"])[1]["cells"])
    np.testing.assert_array_equal(maps["b/cells"], capture(*members[1], images, ["cells"])[1]["cells"])
    np.testing.assert_allclose(ensemble.resized(jnp.full((1, 12, 12, 3), 0.3), 8), 0.3, rtol=1e-6)
    # The gradient of a linear function is the function itself: <resized(x), y> = <x, its transpose y>.
    y = jnp.asarray(rng.normal(size=(2, 8, 8, 3)), jnp.float32)
    _, pull = jax.vjp(lambda x: ensemble.resized(x, 8), images)
    np.testing.assert_allclose(jnp.vdot(small, y), jnp.vdot(images, pull(y)[0]), rtol=1e-4)


def test_names_that_occur_twice_and_the_class_of_none():
    net, params = ensemble.of([member("a", 8, 0), member("a", 8, 1, ("w", "x", "y", "z"))], combine="losses")
    assert list(params) == ["a#0", "a#1"]
    assert net.classes == ("w", "x", "y", "z")
    assert [net.class_name(i) for i in (3, 4)] == ["z", "none"]


@pytest.mark.parametrize("combine", [pytest.param("logits", marks=pytest.mark.exhaustive), "losses"])
def test_attacks_run_on_it_and_an_example_depends_on_itself_alone(combine, rng):
    net, params = ensemble.of([member("a", 8, 0), member("b", 12, 1)], combine=combine)
    images = jnp.asarray(rng.random((4, 12, 12, 3)), jnp.float32)
    model = net.bind(params)
    labels = jnp.argmax(model(images)[:, :4], -1)
    targets = (labels + 1) % 4
    attack = attacks.PGD(eps=0.5, steps=8)
    whole = attacks.run(attack, model, images, labels, targets, key=jax.random.key(0))
    assert whole.success.any()
    assert jnp.array_equal(jnp.argmax(model(whole.images), -1) == targets, whole.success)
    alone = attacks.run(attack, model, images[2:3], labels[2:3], targets[2:3], key=jax.random.key(0))
    np.testing.assert_array_equal(alone.images[0], whole.images[2])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"members": []}, ValueError, "members is empty"),
        (
            {"members": [member("a", 8, 0), "b"]},
            TypeError,
            r"members\[1\] must be a network with its parameters, got str",
        ),
        ({"members": [member("a", 8, 0), member("b", 8, 1, 5)]}, ValueError, "a has 4 and b 5"),
        (
            {"members": [member("a", 8, 0, ("x", "y")), member("b", 8, 1, ("x", "z"))]},
            ValueError,
            "class 1 is 'y' in a and 'z' in b",
        ),
        ({"weights": [1.0]}, ValueError, "weights must be one for each of 2 members, got 1"),
        ({"weights": [1.0, 0.0]}, ValueError, "weights must be positive"),
        ({"combine": "votes"}, ValueError, "combine must be one of logits, losses, got 'votes'"),
        ({"image_size": 0}, ValueError, "image_size must be at least 1, got 0"),
    ],
)
def test_bad_input(change, error, message):
    given = {"members": [member("a", 8, 0), member("b", 8, 1)], **change}
    of = inspect.unwrap(ensemble.of)  # the type checker would refuse some members, those that it happens to look at
    with pytest.raises(error, match=message):
        of(given.pop("members"), **given)


def test_names_of_ensembles():
    assert weights.ensemble_of("a+2*b:combine=losses,image_size=64") == (
        ["a", "b"],
        [1.0, 2.0],
        {"combine": "losses", "image_size": 64},
    )
    for name, message in (("a+x*b", "expected a number before"), ("a+b:size=3", "unknown option 'size'")):
        with pytest.raises(ValueError, match=message):
            weights.ensemble_of(name)


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXINTERP_CKPTS", str(tmp_path))
    shapes = models.shapes("small_cnn")
    params = seeded.params(shapes)
    checkpoint.save(params, tmp_path / "small_cnn", name="small_cnn", classes=10, source={"sha256": "0"})
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(seeded.images(2, 32)):
        Image.fromarray((image * 255).astype(np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    given = ["attack", str(tmp_path / "pictures"), "--labels", "predicted", "--attack", "fgsm:eps=0.5", "--no-images"]
    assert cli.main([*given, "--model", "small_cnn+2*small_cnn", "--out", str(tmp_path / "out")]) == 0
    alone, both = weights.load("small_cnn"), weights.load("small_cnn+2*small_cnn")
    images = jnp.asarray(seeded.images(2, 32))
    np.testing.assert_allclose(both[0].bind(both[1])(images), alone[0].bind(alone[1])(images), atol=1e-6)
    assert cli.main([*given, "--model", "small_cnn+nothing", "--out", str(tmp_path / "other")]) == 2
    assert "unknown model 'nothing'" in capsys.readouterr().err
