"""StrAttack: every update of ADMM in closed form, its groups, and what it finds on linear models."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from jaxinterp import attacks
from jaxinterp.attacks import CW, StrAttack, finish, start
from jaxinterp.attacks.strattack import Admm, Grids, bounds, consensus, largest, shrink, shrink_groups

KEY = jax.random.key(0)
# In one program: what is unfinished in smaller batches is up to test_compaction.py.
run = functools.partial(attacks.run, compact=False)
advance = functools.partial(attacks.advance, compact=False)
SHAPE = (2, 7, 8, 3)


def as_float32(x):
    return jnp.asarray(x, jnp.float32)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# The groups


@pytest.mark.parametrize(("group", "stride"), [(2, 2), (3, 3), (13, 13), (3, 2), (4, 2), (2, 1), (5, 3)])
def test_block_soft_threshold_group_by_group(group, stride):
    """Against a loop over the groups, which start at every multiple of the stride and are cut off at the border."""
    grids = Grids(group, stride)
    height, width = SHAPE[1:3]
    copies = normal(2, len(grids.offsets), *SHAPE[1:])
    threshold = np.array([0.5, 1.0], np.float32) * np.float32(np.sqrt(3) * group)  # near the norm of a group
    found = np.asarray(shrink_groups(jnp.asarray(copies), jnp.asarray(threshold), grids))
    covered, starts = np.zeros(copies.shape[1:4], int), set()
    expected, emptied = np.zeros_like(copies), []
    for i, (row, column) in enumerate(grids.offsets):
        rows, columns = (range(o - grids.period, n, grids.period) for o, n in ((row, height), (column, width)))
        for top, left in itertools.product(rows, columns):
            inside = np.s_[max(top, 0) : max(top + group, 0), max(left, 0) : max(left + group, 0)]
            if not covered[i][inside].size:
                continue
            covered[i][inside] += 1
            starts.add((top, left))
            for example in range(2):
                block = copies[example, i][inside].astype(np.float64)
                factor = max(1 - threshold[example] / np.linalg.norm(block), 0)
                expected[example, i][inside] = factor * block
                emptied.append(factor == 0)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert any(emptied)
    assert not all(emptied)
    # The grids hold every group once, groups of a grid do not overlap, and together they cover the image.
    assert all(top % stride == 0 and left % stride == 0 for top, left in starts)
    reach = [len([t for t in range(-group + 1, n) if t % stride == 0 and t + group > 0]) for n in (height, width)]
    assert len(starts) == reach[0] * reach[1]
    assert covered.max() == 1
    np.testing.assert_array_equal(grids.covered(height, width)[..., 0], covered)
    assert covered.sum(0).min() >= 1
    if group == stride:
        np.testing.assert_array_equal(covered, 1)


def test_copies_are_averaged_where_they_exist():
    grids = Grids(5, 3)  # a period of 6: in a grid every sixth row and column is in no group
    copies = jnp.asarray(normal(2, 4, *SHAPE[1:]))
    covered = np.broadcast_to(grids.covered(*SHAPE[1:3]), (4, *SHAPE[1:]))
    expected = np.ma.masked_array(copies, np.broadcast_to(~covered, copies.shape)).mean(axis=1)
    np.testing.assert_allclose(grids.mean(copies), expected, atol=1e-6)
    assert (covered.sum(0) < 4).any()


def test_a_stride_beyond_the_group_is_refused():
    images = np.full((1, 6, 6, 1), 0.5, np.float32)
    model = lambda x: x.reshape(1, -1)[:, :3]  # noqa: E731
    with pytest.raises(ValueError, match=r"StrAttack.stride must be at most the side of a group, 2, got 3"):
        run(StrAttack(stride=3), model, images, np.zeros(1, int), key=KEY)


def test_groups_are_of_two_pixels_in_small_images_and_of_thirteen_in_large_ones():
    assert StrAttack()._grids(jnp.zeros((1, 32, 32, 3))) == Grids(2, 2)
    assert StrAttack()._grids(jnp.zeros((1, 33, 33, 3))) == Grids(13, 13)
    assert StrAttack(stride=7)._grids(jnp.zeros((1, 224, 224, 3))) == Grids(13, 7)


# The other updates


def test_the_d_step_minimises_its_term():
    x, gamma, rho = normal(*SHAPE), np.array([0.5, 2.0], np.float32), np.array([3.0, 15.0], np.float32)
    d = np.asarray(shrink(jnp.asarray(x), jnp.asarray(gamma), jnp.asarray(rho)))
    wide = np.s_[:, None, None, None]
    # The gradient of gamma ||d||^2 + rho / 2 ||d - x||^2.
    np.testing.assert_allclose(2 * gamma[wide] * d + rho[wide] * (d - x), 0, atol=1e-5)


def test_the_w_step_projects_onto_the_box_the_ball_and_the_support():
    original = np.array([0.1, 0.1, 0.9, 0.0, 0.5], np.float32).reshape(1, 5, 1, 1)
    kept = np.array([1, 1, 1, 1, 0], bool).reshape(1, 5, 1, 1)
    low, high = bounds(jnp.asarray(original), jnp.array([0.3]), jnp.asarray(kept))
    np.testing.assert_allclose(np.ravel(low), [-0.1, -0.1, -0.3, 0, 0], atol=1e-7)
    np.testing.assert_allclose(np.ravel(high), [0.3, 0.3, 0.1, 0.3, 0], atol=1e-7)


@pytest.mark.parametrize(("group", "stride"), [(2, 2), (5, 3)])
def test_the_z_step_is_stationary_and_the_duals_gather_what_disagrees(group, stride):
    grids = Grids(group, stride)
    n = len(grids.offsets)
    covered = np.broadcast_to(grids.covered(*SHAPE[1:3]), (n, *SHAPE[1:]))
    z, u, s, d, w, gradient = (normal(*SHAPE, seed=i).astype(np.float64) for i in range(6))
    v, y = (np.where(covered, normal(2, n, *SHAPE[1:], seed=i), 0).astype(np.float64) for i in (7, 8))
    before = Admm(*map(as_float32, (z, u, s, v)))
    arrays = as_float32(d), as_float32(w), as_float32(y), as_float32(gradient)
    after = consensus(before, *arrays, jnp.array([5.0, 10.0]), jnp.array([3.0, 15.0]), grids)
    new = np.asarray(after.z, np.float64)
    eta, rho = (np.reshape(x, (2, 1, 1, 1)) for x in ([5.0, 10.0], [3.0, 15.0]))
    # z minimises <g, z> + eta / 2 ||z - z_k||^2 + rho / 2 (||d + u - z||^2 + ||w + s - z||^2 + sum ||y + v - z||^2).
    pull = (d + u - new) + (w + s - new) + np.where(covered, y + v - new[:, None], 0).sum(1)
    np.testing.assert_allclose(gradient + eta * (new - z) - rho * pull, 0, atol=1e-4)
    np.testing.assert_allclose(after.u, u + d - new, atol=1e-5)
    np.testing.assert_allclose(after.s, s + w - new, atol=1e-5)
    np.testing.assert_allclose(after.v, np.where(covered, v + y - new[:, None], 0), atol=1e-5)


@pytest.mark.parametrize("used", [0, 1, 2, 50, 168])
def test_the_refit_keeps_what_exceeds_the_third_percentile_of_each_example(used):
    delta = np.zeros((2, 168), np.float32)
    delta[0, :used] = normal(used)
    delta[1] = 100 * normal(168, seed=1)  # the neighbour has a percentile of its own
    delta = delta[:, np.random.default_rng(2).permutation(168)].reshape(SHAPE)
    kept = np.asarray(largest(jnp.asarray(delta), 3))
    for d, k in zip(delta, kept, strict=True):
        nonzero = np.abs(d[d != 0])
        limit = np.percentile(nonzero, 3) if nonzero.size else 0
        np.testing.assert_array_equal(k, np.abs(d) > limit)


# The attack


def slow_strattack(x0, y, weights, bias, *, const, tau, gamma, rho, alpha, eps, group, steps):
    """One search step for one image and a linear model in float64: best L2 norm of a success, and the last z."""
    x0, shape = x0.astype(np.float64), x0.shape
    low, high = np.maximum(-x0, -eps), np.minimum(1 - x0, eps)
    z = u = s = v = np.zeros(shape)
    best = np.inf
    for k in range(steps):
        d = rho / (rho + 2 * gamma) * (z - u)
        w = np.clip(z - s, low, high)
        b = z - v
        sparse = np.zeros(shape)
        for i, j in itertools.product(range(0, shape[0], group), range(0, shape[1], group)):
            block = b[i : i + group, j : j + group]
            size = np.linalg.norm(block)
            sparse[i : i + group, j : j + group] = max(1 - tau / (rho * size), 0) * block if size else 0
        logits = (x0 + z).ravel() @ weights + bias
        rival = max((j for j in range(len(bias)) if j != y), key=lambda j: logits[j])
        slope = weights[:, y] - weights[:, rival] if logits[y] > logits[rival] else np.zeros(z.size)
        eta = alpha * np.sqrt(k + 1)
        total = d + u + w + s + sparse + v
        z = (eta * z + rho * total - const * slope.reshape(shape)) / (eta + 3 * rho)
        u, s, v = u + d - z, s + w - z, v + sparse - z
        image = x0 + np.clip(sparse, low, high)
        logits = image.ravel() @ weights + bias
        if np.delete(logits, y).max() - logits[y] > 1e-5 * np.ptp(logits):
            best = min(best, np.linalg.norm(image - x0))
    return best, z


def affine(p, x):
    return x.reshape(x.shape[0], -1) @ p[0] + p[1]


def grouped_model(seed: int = 0):
    """Two classes told apart by three groups of 2x2 pixels, and a little by all others; images of gap 1 and more."""
    rng = np.random.default_rng(seed)
    weights = 0.02 * rng.normal(size=(6, 8, 3, 2))
    important = np.zeros((6, 8, 3), bool)
    for weight, i, j in ((0.6, 0, 2), (0.45, 2, 6), (0.3, 4, 0)):
        important[i : i + 2, j : j + 2] = True
        weights[i : i + 2, j : j + 2] += weight * np.sign(rng.normal(size=(2, 2, 3, 1))) * [1, -1]
    weights = weights.reshape(-1, 2).astype(np.float32)
    images = rng.uniform(0.3, 0.7, size=(4, 6, 8, 3)).astype(np.float32)
    scores = images.reshape(4, -1) @ (weights[:, 0] - weights[:, 1])
    bias = np.array([rng.uniform(1, 2) - scores.min(), 0], np.float32)  # all images are of class 0
    model = Partial(affine, (jnp.asarray(weights), jnp.asarray(bias)))
    gap = scores + bias[0] - bias[1]
    return model, images, np.zeros(4, int), weights, bias, gap, important


ADMM: dict[str, Any] = {"tau": 1.5, "gamma": 0.5, "rho": 15.0, "alpha": 5.0, "eps": 0.5, "group": 2}


def test_iterates_are_those_of_a_slow_program():
    model, images, labels, weights, bias, _, _ = grouped_model()
    attack = StrAttack(initial_const=2.0, search_steps=1, steps=60, refit=False, **ADMM)
    first = start(attack, model, images, labels, key=KEY)
    before = advance(attack, model, first, 59)
    result = finish(attack, advance(attack, model, before))
    assert np.asarray(result.success).all()
    for i, image in enumerate(images):
        args = (image, 0, weights.astype(np.float64), bias.astype(np.float64))
        _, z = slow_strattack(*args, const=2.0, steps=59, **ADMM)
        np.testing.assert_allclose(before.admm.z[i], z, atol=1e-4)
        best, _ = slow_strattack(*args, const=2.0, steps=60, **ADMM)
        np.testing.assert_allclose(result.l2[i], best, rtol=1e-3)
    np.testing.assert_array_equal(result.forward, 2 * 60)
    np.testing.assert_array_equal(result.backward, 60)


def groups_used(images, original):
    used = (np.asarray(images) != original).any(axis=3).reshape(len(original), 3, 2, 4, 2)
    return used.any(axis=(2, 4)).sum(axis=(1, 2))


@pytest.mark.parametrize("stride", [2, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_only_the_groups_that_matter_change_and_the_refit_brings_them_near_the_optimum(stride):
    model, images, labels, weights, _, gap, important = grouped_model()
    common: dict[str, Any] = {**ADMM, "initial_const": 1.0, "search_steps": 6, "steps": 80, "stride": stride}
    whole = run(StrAttack(refit_search_steps=6, refit_steps=80, **common), model, images, labels, key=KEY)
    sparse = run(StrAttack(refit=False, **common), model, images, labels, key=KEY)
    cw = run(CW(initial_const=0.1, search_steps=6, steps=100), model, images, labels, key=KEY)
    for result in (whole, sparse, cw):
        assert np.asarray(result.success).all()
    assert (groups_used(cw.images, images) == 12).all()
    outside = ~np.broadcast_to(important, images.shape)
    if stride == 2:
        assert (groups_used(whole.images, images) <= 3).all()
        np.testing.assert_array_equal(np.asarray(whole.images)[outside], images[outside])
    assert (np.asarray(whole.l0) < 0.7 * np.asarray(cw.l0)).all()
    # The refit changes a part of what the search has found and is nearer; as near as the weights outside allow.
    assert (np.asarray(whole.l0) <= np.asarray(sparse.l0)).all()
    assert (np.asarray(whole.l2) < np.asarray(sparse.l2)).all()
    best = gap / np.linalg.norm(weights[:, 0] - weights[:, 1])
    ratio = np.asarray(whole.l2) / best
    assert ratio.min() > 0.999
    assert ratio.max() < 1.25


def test_examples_without_success_skip_the_refit():
    model, images, labels, *_ = grouped_model()
    attack = StrAttack(
        initial_const=0.5, kappa=jnp.array([0.0, 1e4, 0.0, 1e4]), search_steps=2, steps=30, refit_steps=10, **ADMM
    )
    result = run(attack, model, images, labels, key=KEY)
    np.testing.assert_array_equal(result.success, [True, False, True, False])
    np.testing.assert_array_equal(result.forward, np.where(result.success, 2 * 60 + 8 * 10, 2 * 60))
    np.testing.assert_array_equal(result.backward, np.where(result.success, 60 + 8 * 10, 60))


def test_constants_grow_by_five_until_a_success_and_the_refit_starts_at_five_times_the_first():
    model, images, labels, *_ = grouped_model()
    kappa = jnp.array([1e4, 1e4, 0.0, 0.0])
    attack = StrAttack(initial_const=2.0, kappa=kappa, search_steps=3, steps=40, refit_steps=10, **ADMM)
    state, consts = start(attack, model, images, labels, key=KEY), []
    for _ in range(4):
        consts.append(np.asarray(state.bracket.const))
        state = advance(attack, model, state, 40)
    np.testing.assert_allclose(np.array(consts)[:3, 0], [2, 10, 50])
    np.testing.assert_allclose(np.array(consts)[:, 2], [2, 1, 0.5, 10])
    np.testing.assert_array_equal(state.done, [True, True, False, False])


@pytest.mark.parametrize("shape", [(9, 5, 1), (8, 8, 3)])
def test_two_devices_give_what_one_gives_in_any_shape(shape):
    """Masks of groups, which programs for several devices do not see through, must not decide how products round."""
    rng = np.random.default_rng(0)
    weights = jnp.asarray(0.3 * rng.normal(size=(math.prod(shape), 5)).astype(np.float32))
    model = Partial(lambda weights, x: x.reshape(x.shape[0], -1) @ weights, weights)
    images = rng.random((4, *shape), np.float32)
    labels = np.asarray(model(images)).argmax(1)
    attack = StrAttack(steps=12, search_steps=2, refit_steps=6, refit_search_steps=2)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put((images, labels), NamedSharding(mesh, PartitionSpec("data")))
    one, two = (run(attack, model, *arrays, key=jax.random.key(0)) for arrays in ((images, labels), spread))
    assert np.asarray(one.success).any()
    np.testing.assert_array_equal(one.images, two.images)
