"""AdvEWM: the transforms by hand, the search against a loop over files, one picture after the other."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial
from PIL import Image

from jaxinterp.attacks import Chain, Watermark, advance, embedding, finish, finished, run, start
from jaxinterp.attacks.driver import example_keys
from jaxinterp.attacks.embedding import SIGNS, STRENGTHS
from jaxinterp.attacks.spec import from_spec

SIDE, BATCH, CLASSES = 16, 8, 5
KEY = jax.random.key(4)
haar, inverse_haar = jax.jit(embedding.haar), jax.jit(embedding.inverse_haar)
embed, change = (jax.jit(each, static_argnames="transform") for each in (embedding.embed, embedding.change))


# The transforms


def test_haar_by_hand_and_back(rng):
    block = jnp.float32([[1, 2], [3, 4]])[..., None]
    np.testing.assert_array_equal(haar(block)[0, 0, 0], [5, -2, -1, 0])
    images = jnp.asarray(rng.uniform(size=(2, 6, 10, 3)), jnp.float32)
    bands = haar(images)
    np.testing.assert_allclose(inverse_haar(bands), images, atol=1e-6)
    np.testing.assert_allclose(jnp.sum(bands**2), jnp.sum(images**2), rtol=1e-6)  # it is orthonormal


def test_haar_embedding_has_the_published_signs_in_all_four_bands(rng):
    host, mark = (jnp.asarray(rng.uniform(size=(6, 8, 3)), jnp.float32) for _ in range(2))
    added = haar(embed(host, mark)) - haar(host)
    low = np.asarray(mark).reshape(3, 2, 4, 2, 3).sum((1, 3)) / 2
    for channel, (q, signs) in enumerate(zip((0.02, 0.04, 0.01), ("+---", "-+++", "+---"), strict=True)):
        for band, sign in enumerate(signs):
            expected = q * low[..., channel] * (1 if sign == "+" else -1)
            np.testing.assert_allclose(added[..., channel, band], expected, atol=2e-6)
    # In pixels: of R and B the upper left one of four gets darker, the others brighter by as much; of G the reverse.
    white = embed(jnp.zeros((2, 2, 3)), jnp.ones((2, 2, 3)))
    np.testing.assert_allclose(white[..., 0], [[-0.04, 0.04], [0.04, 0.04]], atol=1e-7)
    np.testing.assert_allclose(white[..., 1], [[0.08, -0.08], [-0.08, -0.08]], atol=1e-7)
    np.testing.assert_allclose(white[..., 2], [[-0.02, 0.02], [0.02, 0.02]], atol=1e-7)


def test_dct_embedding_is_linear_in_pixels(rng):
    host, mark = (jnp.asarray(rng.uniform(size=(7, 9, 3)), jnp.float32) for _ in range(2))
    expected = host + np.array([0.010, 0.020, 0.005], np.float32) * mark
    np.testing.assert_allclose(embed(host, mark, transform="dct"), expected, atol=2e-6)


@pytest.mark.parametrize("transform", STRENGTHS)
def test_what_is_added_does_not_depend_on_the_host_and_has_a_gradient(transform, rng):
    host, mark, weights = (jnp.asarray(rng.uniform(size=(2, 6, 8, 3)), jnp.float32) for _ in range(3))
    q = jnp.float32([0.3, 0.1, 0.2])

    def weighted(mark, q):
        images = embedding.embed(host, mark, q, transform)
        return jnp.sum(weights * images), images

    added = np.asarray(change(mark, q, transform=transform))
    (by_mark, by_strength), images = jax.jit(jax.grad(weighted, (0, 1), has_aux=True))(mark, q)
    np.testing.assert_allclose(images, host + added, atol=2e-6)
    # What is added is linear in the watermark, and in the strengths.
    for gradient, argument in ((by_mark, mark), (by_strength, q)):
        np.testing.assert_allclose(np.sum(gradient * argument), np.sum(weights * added), rtol=1e-4)


def test_signs_of_bands_and_pixels_are_the_same_pattern():
    bands = jnp.broadcast_to(SIGNS, (1, 1, 3, 4))  # of a watermark with LL = 1
    half = jnp.full((2, 2, 3), 0.5)  # has LL = 1
    np.testing.assert_array_equal(inverse_haar(bands), change(half, jnp.ones(3)))


# The search


def linear():
    """A linear model with small margins, images of flat blocks, of which a JPEG keeps most, and their labels."""
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(SIDE * SIDE * 3, CLASSES)) * 0.15, jnp.float32)
    images = jnp.asarray(rng.integers(60, 196, (BATCH, 4, 4, 3)).repeat(4, 1).repeat(4, 2) / 255, jnp.float32)
    bias = -(images.reshape(BATCH, -1) @ weights).mean(0)
    model = Partial(lambda p, x: x.reshape(len(x), -1) @ p[0] + p[1], (weights, bias))
    return model, images, jnp.argmax(model(images), axis=1)


def marks(number: int = 7, seed: int = 1):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=(number, SIDE, SIDE, 3)), jnp.float32)


def file_of(image):
    """What Pillow reads from the file that it has written."""
    buffer = io.BytesIO()
    Image.fromarray(np.floor(np.clip(image * 255, 0, 255) + 0.5).astype(np.uint8)).save(buffer, "JPEG", quality=75)
    return np.asarray(Image.open(buffer), np.float32) / 255


def sequential(model, images, labels, pictures, order, rounds, added):
    """The search as a loop: (image or None, queries) of every example."""
    found = []
    for image, label, row in zip(np.asarray(images), np.asarray(labels), np.asarray(order), strict=True):
        asked = 0

        def differs(candidate, label=label):
            nonlocal asked
            asked += 1
            return int(jnp.argmax(model(candidate[None])[0])) != label

        result = image if differs(image) else None
        for picture in pictures[row]:
            if result is not None:
                break
            moved = image
            for _ in range(rounds):
                moved = file_of(moved + added(picture))
                if differs(moved):
                    result = moved
                    break
        found.append((result, asked))
    return found


@pytest.mark.parametrize(("transform", "rounds", "strength"), [("haar", 2, 0.5), ("dct", 3, 4.0)])
def test_queries_and_images_are_those_of_a_loop_over_files(transform, rounds, strength):
    model, images, labels = linear()
    labels = labels.at[5].set((labels[5] + 1) % CLASSES)  # not classified so to begin with
    pictures, attack = marks(), Watermark(
        watermarks=marks(), transform=transform, rounds=rounds, strength=strength, folders=(4, 3), failures=3
    )  # fmt: skip
    order = jax.jit(Watermark.order)(attack, example_keys(KEY, images))
    assert order.shape == (BATCH, 6)

    def added(picture):
        return np.float32(strength) * np.asarray(change(picture, transform=transform))

    expected = sequential(model, images, labels, pictures, order, rounds, added)
    queries = [asked for _, asked in expected]
    succeeded = [image is not None for image, _ in expected]
    assert 1 < sum(succeeded) < BATCH
    assert len(set(queries)) > 3
    results = [
        run(dataclasses.replace(attack, candidates=n), model, images, labels, key=KEY) for n in (1, 4)
    ]  # fmt: skip
    for result in results:
        np.testing.assert_array_equal(result.success, succeeded)
        np.testing.assert_array_equal(result.forward, queries)
        np.testing.assert_array_equal(result.iterations, np.where(succeeded, np.array(queries) - 1, -1))
        np.testing.assert_array_equal(result.backward, 0)
        for found, original, (image, _) in zip(result.images, images, expected, strict=True):
            np.testing.assert_array_equal(found, original if image is None else image)


def test_orders_are_folder_by_folder_and_each_example_has_its_own():
    attack = Watermark(watermarks=marks(9), folders=(2, 4, 3), failures=3)
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(60))
    ordered = jax.jit(Watermark.order)
    orders = np.asarray(ordered(attack, keys))
    assert orders.shape == (60, 2 + 3 + 3)
    of = np.repeat(range(3), (2, 4, 3))
    for row in orders:
        assert len(set(row)) == len(row)
        folders = of[row]
        assert len(set(np.flatnonzero(np.diff(folders)))) == 2  # each comes once
        assert [int(np.sum(folders == f)) for f in range(3)] == [2, 3, 3]
    assert {tuple(dict.fromkeys(of[row])) for row in orders} == {
        (0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0),
    }  # fmt: skip
    assert {int(i) for i in orders.ravel()} == set(range(9))
    plain = ordered(dataclasses.replace(attack, shuffle=False), keys)
    np.testing.assert_array_equal(plain, [[0, 1, 2, 3, 4, 6, 7, 8]] * 60)


def embedded(attack, images):
    """The first candidate of every example, before anybody is asked about another one."""
    model = Partial(lambda x: jnp.stack([jnp.ones(len(x)), jnp.zeros(len(x))], 1))
    state = start(attack, model, images, jnp.zeros(len(images), jnp.int32), key=KEY)
    return np.asarray(advance(attack, model, state, 1).images[:, 0])


def test_random_signs_keep_the_size_of_every_change():
    images = jnp.full((4, SIDE, SIDE, 3), 0.5) + jnp.arange(4)[:, None, None, None] / 255
    attack = Watermark(watermarks=marks(), strength=3.0, jpeg=False)
    published, random = (embedded(dataclasses.replace(attack, signs=s), images) for s in ("published", "random"))
    sizes = [np.round(255 * np.abs(each - np.asarray(images))) for each in (published, random)]
    assert np.abs(sizes[0] - sizes[1]).max() <= 1  # 0.5 is between two levels
    assert sizes[0].max() > 20
    signs = np.sign(random - np.asarray(images))[..., 0]
    assert 0.4 < np.mean(signs > 0) < 0.6
    assert (signs[0] != signs[1]).mean() > 0.3
    assert len(np.unique(np.sign(published - np.asarray(images))[:, ::2, ::2, 0])) == 1


def test_noise_is_new_for_every_example_and_has_the_released_variance():
    images = jnp.zeros((3, 32, 32, 3)) + jnp.arange(3)[:, None, None, None] * 1e-4
    attack = Watermark(transform="dct", strength=50.0, jpeg=False)  # Q = (0.5, 1, 0.25)
    pictures = embedded(attack, images)[..., 1]
    assert np.abs(pictures.mean((1, 2)) - 0.5).max() < 0.02
    assert np.abs(pictures.var((1, 2)) - 0.02).max() < 0.003
    assert np.abs(np.corrcoef(pictures.reshape(3, -1)) - np.eye(3)).max() < 0.15
    assert attack.tries == 100
    assert attack.iterations == 1000


def test_watermarks_belong_to_no_example_on_any_devices():
    """As many as there are examples: neither spread, nor gathered when finished examples leave."""
    model, images, labels = linear()
    attack = Watermark(watermarks=marks(BATCH), strength=0.5, rounds=9, shuffle=False, jpeg=False)
    assert attack.iterations >= 64  # so that examples do leave
    expected = run(attack, model, images, labels, key=KEY, compact=False)
    assert 0 < np.sum(expected.success) < BATCH
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    spread = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    one = start(attack, model, images, labels, key=KEY)
    while not finished(one):
        one = advance(attack, model, one, 30)
    chained = run(Chain((attack,)), model, images, labels, key=KEY, compact=False)
    for result in (run(attack, model, spread, labels, key=KEY, compact=False), finish(attack, one), chained):
        for field in ("images", "success", "forward"):
            np.testing.assert_array_equal(getattr(result, field), getattr(expected, field))


# What is refused


@pytest.mark.parametrize(
    ("attack", "shape", "message"),
    [
        (Watermark(), (1, 15, 16, 3), "needs sides that two divides, got 15 x 16 pixels"),
        (Watermark(transform="dct"), (1, 8, 8, 1), r"images must be RGB \[B,H,W,3\] for a watermark"),
        (Watermark(watermarks=marks()), (1, 12, 12, 3), r"images' size \(12, 12, 3\), got shape \(7, 16, 16, 3\)"),
        (Watermark(watermarks=marks(), folders=(3, 3)), (1, 16, 16, 3), r"add up to the 7 watermarks, got \(3, 3\)"),
        (Watermark(watermarks=marks(), folders=(7, 0)), (1, 16, 16, 3), r"at least one picture, got \(7, 0\)"),
        (Watermark(watermarks=marks(0)), (1, 16, 16, 3), "at least one picture, got none"),
        (Watermark(rounds=0), (1, 16, 16, 3), "Watermark.rounds must be at least 1"),
    ],
)
def test_bad_problems_are_named(attack, shape, message):
    model = Partial(lambda x: jnp.stack([x.sum((1, 2, 3)), -x.sum((1, 2, 3))], 1))
    with pytest.raises(ValueError, match=message):
        run(attack, model, jnp.zeros(shape), jnp.zeros(1, jnp.int32), key=KEY)


def test_folders_as_text():
    attack = from_spec("watermark:transform=dct,folders=3+4,failures=2", {"watermark": Watermark})
    assert attack == Watermark(transform="dct", folders=(3, 4), failures=2)
    assert isinstance(attack, Watermark)
    assert attack.tries == 4
    with pytest.raises(ValueError, match=r"watermark:folders must be whole numbers joined by \+, got 'a'"):
        from_spec("watermark:folders=a", {"watermark": Watermark})
    with pytest.raises(ValueError, match="sides that two divides, got 5 x 6 pixels"):
        embed(jnp.zeros((5, 6, 3)), jnp.zeros((5, 6, 3)))
    with pytest.raises(ValueError, match=r"embedded in RGB images .*, got shape \(4, 6, 1\)"):
        embed(jnp.zeros((4, 6, 1)), jnp.zeros((4, 6, 1)))
    with pytest.raises(ValueError, match=r"images' size \(4, 6, 3\), got \(4, 4, 3\)"):
        embed(jnp.zeros((4, 6, 3)), jnp.zeros((4, 4, 3)), transform="dct")


def test_watermarks_of_eight_bits_are_refused(rng):
    images = rng.random((1, 8, 8, 3), np.float32)
    attack = Watermark()
    object.__setattr__(attack, "watermarks", rng.integers(0, 256, (2, 8, 8, 3), np.uint8))  # past the tests' checks
    with pytest.raises(TypeError, match=r"must be of floats in .* got uint8; divide pixels of 8 bits by 255"):
        run(attack, lambda x: x.mean((1, 2))[:, :2], images, np.zeros(1, np.int32), key=jax.random.key(0))
