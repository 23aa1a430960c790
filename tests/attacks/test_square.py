"""Square against a slow program for one image, against what is known by hand, and on models that it must beat."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxinterp.attacks import Square, advance, finish, run, start
from jaxinterp.attacks.square import _grid, _move_norm, _pattern

SHAPE = (10, 8, 3)
KEY = jax.random.key(0)


def affine(p, x):
    return x.reshape(x.shape[0], -1) @ p[0] + p[1]


def linear(classes: int, seed: int = 0):
    """A linear model, six images inside the box, and their labels."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(np.prod(SHAPE), classes)).astype(np.float32)
    images = rng.uniform(0.4, 0.6, size=(6, *SHAPE)).astype(np.float32)
    bias = (-images.reshape(6, -1).mean(0) @ weights).astype(np.float32)
    model = Partial(affine, (jnp.asarray(weights), jnp.asarray(bias)))
    labels = np.asarray(model(jnp.asarray(images))).argmax(1)
    return model, images, labels, weights


def bumps(height, width):
    """eta^(h1,h2) as released: nested boxes that grow by one pixel to every side, the k-th one adding 1/k^2."""
    values = np.zeros((height, width))
    row, column = height // 2, width // 2
    for k in range(max(height, width) // 2 + 1):
        rows = slice(max(row - k, 0), min(row + k + 1, height))
        columns = slice(max(column - k, 0), min(column + k + 1, width))
        values[rows, columns] += 1 / (k + 1) ** 2
    return values


@pytest.mark.parametrize("side", range(1, 10))
@pytest.mark.parametrize("turned", [False, True])
def test_pattern_is_two_bumps_of_opposite_sign(side, turned):
    expected = np.concatenate([bumps(side // 2, side), -bumps(side - side // 2, side)])
    rows, columns = jnp.indices((9, 9))
    actual = np.asarray(_pattern(rows, columns, side, turned))[:side, :side]
    np.testing.assert_allclose(actual, expected.T if turned else expected, rtol=1e-5)


def test_grid_tiles_the_image_with_patterns_of_unit_signs():
    grid = np.asarray(_grid(jax.random.uniform(KEY, (5 * 5 * 4,)), (17, 16, 3)))
    # 5 x 5 tiles of side 3, one pixel above and below, and one to the left
    assert not grid[0].any()
    assert not grid[16].any()
    assert not grid[:, 15].any()
    expected = np.concatenate([bumps(1, 3), -bumps(2, 3)])
    kinds = set()
    for i in range(5):
        for j in range(5):
            tile = grid[1 + 3 * i : 4 + 3 * i, 3 * j : 3 * j + 3]
            turned = np.allclose(np.abs(tile[..., 0]), np.abs(expected.T))
            pattern = expected.T if turned else expected
            for c in range(3):
                sign = np.sign(tile[0, 0, c])
                np.testing.assert_allclose(tile[..., c], sign * pattern, rtol=1e-5)
                kinds.add((turned, sign))
    assert len(kinds) == 4


@pytest.mark.parametrize("steps", [100, 10_000, 2500])
def test_schedule_halves_p_where_the_released_program_does(steps):
    def released(i):
        i = int(i / steps * 10_000)
        return sum(i > bound for bound in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))

    iterations = np.unique(np.linspace(0, steps - 1, 500).astype(np.int32))
    actual = Square(steps=steps)._halvings(jnp.asarray(iterations))
    np.testing.assert_array_equal(actual, [released(i) for i in iterations])
    np.testing.assert_array_equal(Square(steps=7, horizon=steps)._halvings(jnp.asarray(iterations)), actual)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_search_descends_the_margin_from_its_start_in_ball_and_box(norm):
    """Every iterate is the best point so far, its loss is its margin, and its size is eps where the box allows it."""
    model, images, labels, _ = linear(3)
    eps = {"linf": 0.05, "l2": 0.3, "l1": 2.0}[norm]
    attack = Square(eps=eps, norm=norm, steps=60, kappa=1e6)
    state = advance(attack, model, start(attack, model, images, labels, key=KEY), 2)
    losses = [np.asarray(state.loss)]
    sizes = set()
    for _ in range(20):
        before = np.asarray(state.images)
        state = advance(attack, model, state, 3)
        losses.append(np.asarray(state.loss))
        logits = np.array(model(state.images))
        own = logits[np.arange(6), labels].copy()
        logits[np.arange(6), labels] = -np.inf
        np.testing.assert_allclose(losses[-1], own - logits.max(1), atol=1e-4)
        sizes.update(np.abs(np.asarray(state.images) - before).sum(axis=(1, 2, 3)).round(5).tolist())
        delta = np.asarray(state.images) - images
        if norm == "linf":
            np.testing.assert_allclose(np.abs(delta), eps, atol=1e-6)
        else:
            order = 2 if norm == "l2" else 1
            np.testing.assert_allclose(np.linalg.norm(delta.reshape(6, -1), order, axis=1), eps, rtol=1e-4)
    assert (np.diff(losses, axis=0) <= 0).all()
    assert (losses[-1] < losses[0] - 0.5).all()
    assert len(sizes) > 10


@pytest.mark.parametrize("order", [2, 1])
def test_proposals_move_norm_between_windows_and_change_nothing_else(order):
    rng = np.random.default_rng(0)
    delta = rng.normal(size=SHAPE).astype(np.float32)

    def norm(x):
        return np.linalg.norm(x.ravel(), order)

    size = norm(delta)
    move = jax.jit(functools.partial(_move_norm, side=3, support=None, which=f"l{order}"))
    places = set()
    for numbers in jax.random.uniform(KEY, (8, 8)):
        for eps in (size, 1.5 * size):
            moved = np.asarray(move(numbers, delta=delta, eps=jnp.float32(eps)))
            np.testing.assert_allclose(norm(moved), eps, rtol=1e-5)
        changed = (moved != delta).all(-1)
        zeroed = (moved == 0).all(-1)
        first = changed & ~zeroed
        rows, columns = np.flatnonzero(first.any(1)), np.flatnonzero(first.any(0))
        assert len(rows) == len(columns) == 3
        assert first.sum() == 9
        assert (moved[~changed] == delta[~changed]).all()
        assert zeroed.sum() <= 9
        places.add((rows[0], columns[0]))
        # Every channel: the old window and a pattern, both of unit norm, scaled to what is available to the channel.
        window = np.s_[rows[0] : rows[0] + 3, columns[0] : columns[0] + 3]
        pattern = np.concatenate([bumps(1, 3), -bumps(2, 3)])
        pattern /= norm(pattern)
        for c in range(3):
            old = delta[window][..., c] / norm(delta[window][..., c])
            free = norm(delta[changed][:, c]) ** order + (eps**order - size**order) / 3
            options = [old + sign * p for sign in (1, -1) for p in (pattern, pattern.T)]
            options = [o / norm(o) * free ** (1 / order) for o in options]
            assert min(np.abs(o - moved[window][..., c]).max() for o in options) < 1e-4
    assert len(places) > 4


@pytest.mark.parametrize(
    ("norm", "targeted"),
    [
        ("linf", True),
        *(pytest.param(*more, marks=pytest.mark.exhaustive) for more in (("linf", False), ("l2", False), ("l2", True))),
    ],
)
def test_slopes_made_of_its_own_shapes_are_found_just_outside_the_optimum_and_never_inside(norm, targeted):
    """A black box comes near the optimum where squares (Linf) or one pattern (L2) can build the gradient."""
    rng = np.random.default_rng(3)
    slope = np.zeros(SHAPE)
    if norm == "linf":
        slope[:] = rng.choice([-1.0, 1.0], size=(1, SHAPE[1], 3))
    else:
        slope[4:7, 2:5] = np.concatenate([bumps(1, 3), -bumps(2, 3)]).T[..., None] * [1, -1, 1]
    slope = slope.ravel()
    weights = jnp.asarray(np.stack([slope, -slope], 1) / 20, jnp.float32)
    images = rng.uniform(0.4, 0.6, size=(6, *SHAPE)).astype(np.float32)
    model = Partial(lambda w, x: (x.reshape(x.shape[0], -1) - 0.5) @ w, weights)
    logits = np.asarray(model(jnp.asarray(images)))
    labels = logits.argmax(1)
    dual = np.abs(slope).sum() if norm == "linf" else np.linalg.norm(slope)
    best = np.abs(logits[:, 0] - logits[:, 1]) / (dual / 10)
    targets = 1 - labels if targeted else None
    for factor, succeeds in ((0.8, False), (1.25, True)):
        attack = Square(eps=jnp.asarray(factor * best), norm=norm, steps=2000, p=0.3)
        result = run(attack, model, images, labels, targets, key=KEY)
        np.testing.assert_array_equal(result.success, succeeds)
        size = result.linf if norm == "linf" else result.l2
        assert (np.asarray(size) <= 1.0001 * factor * best).all()
        np.testing.assert_array_equal(result.backward, 0)
        np.testing.assert_array_equal(result.forward, np.asarray(result.iterations) + 1 if succeeds else 2001)


def test_an_adversarial_input_costs_one_pass_and_is_returned():
    model, images, labels, _ = linear(3)
    result = run(Square(steps=50), model, images, (labels + 1) % 3, key=KEY)
    assert np.asarray(result.success).all()
    np.testing.assert_array_equal(result.images, images)
    np.testing.assert_array_equal(result.forward, 1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_squares_reach_every_pixel_of_images_that_are_not_square(norm):
    model, images, labels, _ = linear(3)
    attack = Square(eps=0.1, norm=norm, p=0.05, steps=400, kappa=1e6)
    first = advance(attack, model, start(attack, model, images, labels, key=KEY), 2)
    last = advance(attack, model, first)
    moved = np.abs(np.asarray(last.images) - np.asarray(first.images)).max(axis=(0, 3))
    assert (moved > 0).all()
    assert not np.asarray(finish(attack, last).success).any()


def test_other_keys_draw_other_squares_and_the_same_key_the_same():
    model, images, labels, _ = linear(3)
    images[1], labels[1] = images[0], labels[0]

    def iterates(key, ids):
        attack = Square(steps=20, kappa=1e6)
        return np.asarray(advance(attack, model, start(attack, model, images, labels, key=key, ids=ids)).images)

    ids = np.array([1, 1, 2, 3, 4, 5])
    one = iterates(KEY, ids)
    np.testing.assert_array_equal(one, iterates(KEY, ids))
    np.testing.assert_array_equal(one[0], one[1])
    other = iterates(KEY, np.array([1, 7, 2, 3, 4, 5]))
    np.testing.assert_array_equal(np.delete(one, 1, 0), np.delete(other, 1, 0))
    assert (one[1] != other[1]).mean() > 0.1
    assert (one != iterates(jax.random.key(1), ids)).mean() > 0.1
