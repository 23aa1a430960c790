"""The promotion-suppression effect against closed forms of linear models and a slow loop over cells in NumPy."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from jaxinterp import effect
from jaxinterp.effect import Kind

BATCH, HEIGHT, WIDTH, CLASSES = 8, 10, 13, 4
LABELS = np.array([0, 1, 2, 3, 0, 1, 2, 3])
TARGETS = np.array([1, 2, 3, 0, 3, 3, 0, 1])
FIELDS = ("suppression", "promotion", "ratio", "kind", "norm", "label_change", "target_change", "forward", "backward")


def pairs():
    """Clean and adversarial images; a third of the pixels and a few whole regions are not perturbed."""
    rng = np.random.default_rng(0)
    clean = rng.uniform(0.2, 0.8, (BATCH, HEIGHT, WIDTH, 3)).astype(np.float32)
    delta = rng.normal(size=clean.shape) * 0.1 * (rng.uniform(size=(BATCH, HEIGHT, WIDTH, 1)) < 0.7)
    delta[1, :5] = 0
    delta[2] = 0
    delta[3, :, :] = 0
    delta[3, 4, 7, 1] = 0.2
    return clean, np.clip(clean + delta, 0, 1).astype(np.float32)


@functools.cache
def linear():
    weights = np.random.default_rng(1).normal(size=(HEIGHT * WIDTH * 3, CLASSES)).astype(np.float32)
    return Partial(lambda w, x: x.reshape(x.shape[0], -1) @ w + 1.0, jnp.asarray(weights)), weights


@functools.cache
def small_net():
    keys = jax.random.split(jax.random.key(0), 3)
    params = [
        jax.random.normal(keys[0], (3, 3, 3, 6)) * 0.3,
        jax.random.normal(keys[1], (3, 3, 6, 9)) * 0.3,
        jax.random.normal(keys[2], (9, CLASSES)),
    ]

    def apply(params, x):
        conv = functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(conv(x - 0.5, params[0], (2, 2), "SAME"))
        x = jax.nn.relu(conv(x, params[1], (1, 1), "SAME"))
        return 10 * jnp.mean(x, axis=(1, 2)) @ params[2]

    return Partial(apply, params)


def cells_of(cell, height=HEIGHT, width=WIDTH):
    """The rows and columns of every cell, row by row, by hand."""
    ch, cw = (cell, cell) if isinstance(cell, int) else cell
    return [
        [(slice(r, min(r + ch, height)), slice(c, min(c + cw, width))) for c in range(0, width, cw)]
        for r in range(0, height, ch)
    ]


def brute_force(model, clean, adversarial, cell):
    """Signed effects (Z without a cell minus Z(x')) of labels and (Z(x') minus Z without) of targets, and norms."""
    model = jax.jit(model)
    grid = cells_of(cell)
    shape = (BATCH, len(grid), len(grid[0]))
    drop, rise, norm = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    rows = np.arange(BATCH)
    whole = np.asarray(model(jnp.asarray(adversarial)), np.float64)
    for i, line in enumerate(grid):
        for j, (r, c) in enumerate(line):
            without = adversarial.copy()
            without[:, r, c] = clean[:, r, c]
            z = np.asarray(model(jnp.asarray(without)), np.float64)
            drop[:, i, j] = (z - whole)[rows, LABELS]
            rise[:, i, j] = (whole - z)[rows, TARGETS]
            norm[:, i, j] = np.sqrt(((adversarial - clean)[:, r, c].astype(np.float64) ** 2).sum(axis=(1, 2, 3)))
    return drop, rise, norm


def assert_same(a, b):
    for name in FIELDS:
        x, y = np.asarray(getattr(a, name)), np.asarray(getattr(b, name))
        np.testing.assert_array_equal(x, y, err_msg=name)
        assert x.dtype == y.dtype


def by_numpy(e):
    """With arrays of NumPy, whose slices are not compiled."""
    return jax.tree.map(np.asarray, e)


def take(e, rows):
    return jax.tree.map(lambda x: x[np.asarray(rows)], by_numpy(e))


@functools.cache
def solved(cell=4):
    return effect.pse(small_net(), *pairs(), LABELS, TARGETS, cell)


# Values


@pytest.mark.parametrize("cell", [1, 4, 5, (3, 6), (10, 13), (10, 1)], ids=str)
def test_linear_model_in_closed_form(cell):
    """Leaving cell G out of a linear model changes logit c by -sum_G w_c d, whatever the other cells do."""
    (model, weights), (clean, adversarial) = linear(), pairs()
    e = by_numpy(effect.pse(model, clean, adversarial, LABELS, TARGETS, cell))
    by_pixel = (adversarial.astype(np.float64) - clean)[..., None] * weights.reshape(1, HEIGHT, WIDTH, 3, CLASSES)
    rows = np.arange(BATCH)
    grid = cells_of(cell)
    for i, line in enumerate(grid):
        for j, (r, c) in enumerate(line):
            change = by_pixel[:, r, c].sum(axis=(1, 2, 3))
            np.testing.assert_allclose(e.suppression[:, i, j], np.maximum(-change[rows, LABELS], 0), atol=3e-5)
            np.testing.assert_allclose(e.promotion[:, i, j], np.maximum(change[rows, TARGETS], 0), atol=3e-5)
            squares = ((adversarial - clean)[:, r, c] ** 2).sum(axis=(1, 2, 3))
            np.testing.assert_allclose(e.norm[:, i, j], np.sqrt(squares), rtol=1e-5)
    assert e.kind.shape == (BATCH, len(grid), len(grid[0]))
    # The cells tile the image once.
    total = ((adversarial - clean) ** 2).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(np.square(e.norm).sum(axis=(1, 2)), total, rtol=1e-5)


@pytest.mark.parametrize("method", effect.METHODS)
def test_signed_effects_of_a_linear_model_sum_to_the_change_of_the_logit(method):
    """By every method: for a linear model they agree."""
    (model, _), (clean, adversarial) = linear(), pairs()
    e = effect.pse(model, clean, adversarial, LABELS, TARGETS, 4, method=method)
    change = np.asarray(model(jnp.asarray(adversarial)) - model(jnp.asarray(clean)), np.float64)
    rows = np.arange(BATCH)
    np.testing.assert_allclose(np.asarray(e.label_change).sum(axis=(1, 2)), change[rows, LABELS], atol=3e-4)
    np.testing.assert_allclose(np.asarray(e.target_change).sum(axis=(1, 2)), change[rows, TARGETS], atol=3e-4)
    assert np.abs(change).max() > 1
    np.testing.assert_array_equal(e.suppression, np.maximum(-e.label_change, 0))
    np.testing.assert_array_equal(e.promotion, np.maximum(e.target_change, 0))
    first = effect.pse(model, clean, adversarial, LABELS, TARGETS, 4)
    for name in ("label_change", "target_change"):
        np.testing.assert_allclose(getattr(e, name), getattr(first, name), atol=5e-5)
    np.testing.assert_array_equal(e.norm, first.norm)


def test_swapping_classes_and_the_sign_of_logits_swaps_suppression_and_promotion():
    model, (clean, adversarial) = small_net(), pairs()
    negative = Partial(lambda m, x: -m(x), model)
    e, n = solved(), effect.pse(negative, clean, adversarial, TARGETS, LABELS, 4)
    np.testing.assert_array_equal(n.suppression, e.promotion)
    np.testing.assert_array_equal(n.promotion, e.suppression)
    swap = {Kind.SUPPRESSION: Kind.PROMOTION, Kind.PROMOTION: Kind.SUPPRESSION}
    np.testing.assert_array_equal(n.kind, np.vectorize(lambda k: swap.get(k, k))(np.asarray(e.kind)))
    np.testing.assert_allclose(n.ratio, -np.asarray(e.ratio), atol=1e-5)


@pytest.mark.parametrize("cell", [4, (3, 6)], ids=str)
def test_a_convolutional_net_against_a_slow_loop(cell):
    model, (clean, adversarial) = small_net(), pairs()
    drop, rise, norm = brute_force(model, clean, adversarial, cell)
    e = effect.pse(model, clean, adversarial, LABELS, TARGETS, cell)
    s, p = np.maximum(drop, 0), np.maximum(rise, 0)
    np.testing.assert_allclose(e.suppression, s, atol=1e-5)
    np.testing.assert_allclose(e.promotion, p, atol=1e-5)
    np.testing.assert_allclose(e.norm, norm, rtol=1e-5)
    clear = (norm > 0) & (np.maximum(s, p) > 1e-3) & (np.minimum(s, p) > 1e-3)
    ratio = np.log2(p[clear] / s[clear])
    np.testing.assert_allclose(np.asarray(e.ratio)[clear], ratio, atol=0.02)
    off = np.abs(np.abs(ratio) - 1) > 0.05
    expected = np.select([ratio < -1, ratio > 1], [Kind.SUPPRESSION, Kind.PROMOTION], Kind.BALANCED)
    np.testing.assert_array_equal(np.asarray(e.kind)[clear][off], expected[off])
    assert set(np.asarray(e.kind)[clear]) == {Kind.SUPPRESSION, Kind.BALANCED, Kind.PROMOTION}
    only_one = (np.maximum(s, p) > 1e-3) & (np.minimum(drop, rise) < -1e-3)
    assert only_one.any()
    np.testing.assert_array_equal(np.asarray(e.ratio)[only_one], np.where(s > p, -np.inf, np.inf)[only_one])


SCORES = {"logit": lambda z: z, "log_softmax": jax.nn.log_softmax, "softmax": jax.nn.softmax}


@pytest.mark.parametrize(
    ("method", "scale"),
    [
        *(("leave_one_out", "softmax"), ("add_one_in", "log_softmax"), ("leave_one_out", "logit")),
        *(
            pytest.param(*more, marks=pytest.mark.exhaustive)
            for more in (("leave_one_out", "log_softmax"), ("add_one_in", "softmax"), ("add_one_in", "logit"))
        ),
    ],
)
def test_methods_and_scales_against_a_slow_loop(method, scale):
    (clean, adversarial), net = pairs(), small_net()
    e = by_numpy(effect.pse(net, clean, adversarial, LABELS, TARGETS, 5, method=method, scale=scale))
    compiled = jax.jit(lambda images: SCORES[scale](net(images)))

    def score(images):
        return np.asarray(compiled(images), np.float64)

    rows = np.arange(BATCH)
    base, rest, sign = (adversarial, clean, -1) if method == "leave_one_out" else (clean, adversarial, 1)
    for i, line in enumerate(cells_of(5)):
        for j, (r, c) in enumerate(line):
            changed = base.copy()
            changed[:, r, c] = rest[:, r, c]
            change = sign * (score(changed) - score(base))
            np.testing.assert_allclose(e.label_change[:, i, j], change[rows, LABELS], atol=1e-5)
            np.testing.assert_allclose(e.target_change[:, i, j], change[rows, TARGETS], atol=1e-5)
    assert np.abs(np.asarray(e.target_change)).max() > (0.01 if scale == "softmax" else 0.1)


@pytest.mark.parametrize(
    "scale", ["softmax", *(pytest.param(more, marks=pytest.mark.exhaustive) for more in ("logit", "log_softmax"))]
)
def test_first_order_is_the_derivative_along_the_cell(scale):
    """Against forward mode, along the perturbation of one cell at a time."""
    (clean, adversarial), net = pairs(), small_net()
    e = by_numpy(effect.pse(net, clean, adversarial, LABELS, TARGETS, 5, method="first-order", scale=scale))
    slopes = jax.jit(lambda part: jax.jvp(lambda x: SCORES[scale](net(x)), (adversarial,), (part,))[1])
    delta, rows = adversarial - clean, np.arange(BATCH)
    for i, line in enumerate(cells_of(5)):
        for j, (r, c) in enumerate(line):
            part = np.zeros_like(delta)
            part[:, r, c] = delta[:, r, c]
            slope = np.asarray(slopes(part))
            np.testing.assert_allclose(e.label_change[:, i, j], slope[rows, LABELS], atol=1e-5)
            np.testing.assert_allclose(e.target_change[:, i, j], slope[rows, TARGETS], atol=1e-5)
    assert np.abs(np.asarray(e.label_change)).max() > 0.01
    perturbed = (delta != 0).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(e.forward, perturbed)
    np.testing.assert_array_equal(e.backward, 2 * perturbed)


# Kinds


def test_kinds_and_ratios_by_hand():
    inf, nan = np.inf, np.nan
    rows = [  # s, p, ratio, kind
        (1.0, 1.0, 0.0, Kind.BALANCED),
        (0.3, 0.6, 1.0, Kind.BALANCED),
        (0.6, 0.3, -1.0, Kind.BALANCED),
        (0.1, 0.2, 1.0, Kind.BALANCED),
        (1.0, 2.001, np.log2(2.001), Kind.PROMOTION),
        (2.001, 1.0, -np.log2(2.001), Kind.SUPPRESSION),
        (0.0, 1.0, inf, Kind.PROMOTION),
        (1.0, 0.0, -inf, Kind.SUPPRESSION),
        (0.0, 0.0, nan, Kind.NONE),
        (1e-4, 1e-4, nan, Kind.NONE),
        (0.0, 1e-4, nan, Kind.NONE),
        (1e-4, 1.0, np.log2(1e4), Kind.PROMOTION),
        (nan, 1.0, nan, Kind.NONE),
        (1.0, nan, nan, Kind.NONE),
        (inf, 1.0, -inf, Kind.SUPPRESSION),
    ]
    s, p, expected, kinds = (np.array(column) for column in zip(*rows, strict=True))
    ratio, kind = effect.classify(jnp.asarray(s, jnp.float32), jnp.asarray(p, jnp.float32), 1e-4)
    np.testing.assert_allclose(ratio, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(kind, kinds)


@settings(max_examples=25, deadline=None)
@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_twice_the_suppression_is_balanced_to_the_last_bit(s):
    s = jnp.float32(s)
    above = jnp.nextafter(2 * s, jnp.float32(jnp.inf))
    for first, second, kind in (
        (s, 2 * s, Kind.BALANCED),
        (2 * s, s, Kind.BALANCED),
        (s, above, Kind.PROMOTION),
        (above, s, Kind.SUPPRESSION),
    ):
        assert int(effect.classify(first, second, 0.0)[1]) == kind


def test_p_of_twice_s_in_a_network_is_balanced():
    """One pixel that raises the target by exactly twice what it takes from the label."""

    def model(x):
        return jnp.stack([4 - x[:, 1, 1, 0], 2 * x[:, 1, 1, 0], x[:, 0, 0, 0]], axis=1)

    clean = np.zeros((1, 2, 2, 1), np.float32)
    adversarial = clean.copy()
    adversarial[0, 1, 1] = 0.5
    adversarial[0, 0, 0] = 0.75  # touches neither class
    e = effect.pse(model, clean, adversarial, np.array([0]), np.array([1]), 1)
    np.testing.assert_array_equal(e.suppression[0], [[0, 0], [0, 0.5]])
    np.testing.assert_array_equal(e.promotion[0], [[0, 0], [0, 1.0]])
    np.testing.assert_array_equal(e.ratio[0], [[np.nan, np.nan], [np.nan, 1.0]])
    np.testing.assert_array_equal(e.kind[0], [[Kind.NONE, Kind.NONE], [Kind.NONE, Kind.BALANCED]])
    np.testing.assert_array_equal(e.norm[0], [[0.75, 0], [0, 0.5]])
    np.testing.assert_array_equal(e.forward, [3])
    # A tolerance above the effects, relative to the range of logits (3.5 to 0.75).
    none = effect.pse(model, clean, adversarial, np.array([0]), np.array([1]), 1, tolerance=0.4)
    np.testing.assert_array_equal(none.kind, 0)
    assert np.isnan(none.ratio).all()


def test_shares_leave_out_cells_without_effect():
    kind = jnp.array([[[0, 1, 1, 2], [3, 0, 1, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]]], jnp.int32)
    np.testing.assert_allclose(effect.shares(kind), [[0.6, 0.2, 0.2], [np.nan] * 3], rtol=1e-6)
    assert effect.shares(kind[:0]).shape == (0, 3)  # where no attack succeeded


def test_kinds_have_names():
    assert [kind.label for kind in Kind] == ["none", "suppression-dominated", "balanced", "promotion-dominated"]


# Cells


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_cells_tile_the_image_once(height, width, data):
    cell = data.draw(st.tuples(st.integers(1, height), st.integers(1, width)))
    expected = np.full((height, width), -1)
    lines = cells_of(cell, height, width)
    for index, (r, c) in enumerate(piece for line in lines for piece in line):
        assert (expected[r, c] == -1).all()
        expected[r, c] = index
    np.testing.assert_array_equal(effect.cell_map(height, width, cell), expected)
    assert effect.grid(height, width, cell) == (len(lines), len(lines[0]))


def test_cells_are_whole_numbers_of_any_type():
    for cell in (np.int64(4), (np.int32(4), np.uint8(4))):
        assert_same(effect.pse(small_net(), *pairs(), LABELS, TARGETS, cell), solved())


def stripes(batch=None):
    """A partition that is no grid: diagonal stripes, another one for each image if asked."""
    rows, columns = np.indices((HEIGHT, WIDTH))
    one = (rows + columns) // 3
    return one if batch is None else np.stack([(one + i) % (4 + i) for i in range(batch)])


@pytest.mark.parametrize("batch", [None, BATCH])
@pytest.mark.parametrize("method", effect.METHODS)
def test_any_partition(batch, method):
    (clean, adversarial), (model, weights) = pairs(), linear()
    cells = stripes(batch)
    e = by_numpy(effect.pse(model, clean, adversarial, LABELS, TARGETS, cells, method=method))
    count = cells.max() + 1
    assert e.kind.shape == (BATCH, count)
    by_pixel = (adversarial.astype(np.float64) - clean)[..., None] * weights.reshape(1, HEIGHT, WIDTH, 3, CLASSES)
    by_pixel = by_pixel.sum(axis=3)
    for i in range(BATCH):
        mine = cells if batch is None else cells[i]
        for cell in range(count):
            change = by_pixel[i][mine == cell].sum(axis=0)
            np.testing.assert_allclose(e.label_change[i, cell], change[LABELS[i]], atol=3e-5)
            np.testing.assert_allclose(e.target_change[i, cell], change[TARGETS[i]], atol=3e-5)
            squares = np.square(adversarial - clean)[i][mine == cell].sum()
            np.testing.assert_allclose(e.norm[i, cell], np.sqrt(squares), rtol=1e-5)
            if cell > mine.max():  # only other images have it
                assert e.kind[i, cell] == Kind.NONE


def test_a_grid_given_as_a_partition_is_the_grid():
    e = effect.pse(small_net(), *pairs(), LABELS, TARGETS, effect.cell_map(HEIGHT, WIDTH, 4))
    for name in FIELDS:
        np.testing.assert_array_equal(
            np.asarray(getattr(solved(), name)).reshape(getattr(e, name).shape), getattr(e, name)
        )


# Cost


def test_a_cell_without_perturbation_costs_nothing():
    (clean, adversarial), rows = pairs(), []
    net = small_net()

    def counted(m, x):
        jax.debug.callback(lambda n: rows.append(int(n)), x.shape[0])
        return m(x)

    e = effect.pse(Partial(counted, net), clean, adversarial, LABELS, TARGETS, 4, chunk=4)
    jax.block_until_ready(e)
    jax.effects_barrier()
    _, _, norm = brute_force(net, clean, adversarial, 4)
    perturbed = (norm > 0).sum(axis=(1, 2))
    np.testing.assert_array_equal(e.forward, np.where(perturbed > 0, perturbed + 1, 0))
    assert perturbed[2] == 0
    assert perturbed[3] == 1
    assert sum(rows) == -(-int(e.forward.sum()) // 4) * 4
    assert sum(rows) < BATCH * norm[0].size
    assert_same(e, solved())


def test_no_perturbation_has_no_effect_and_costs_nothing():
    (clean, _), rows = pairs(), []

    def counted(x):
        jax.debug.callback(lambda: rows.append(1))
        return x[:, 0, 0:4, 0]

    e = effect.pse(counted, clean, clean, LABELS, TARGETS, 4)
    jax.effects_barrier()
    assert not rows
    for name in ("suppression", "promotion", "norm", "kind", "forward"):
        assert not np.asarray(getattr(e, name)).any()
    assert np.isnan(e.ratio).all()
    np.testing.assert_array_equal(solved().kind[2], Kind.NONE)


def test_one_program_for_any_number_of_perturbed_cells():
    net, (clean, adversarial) = small_net(), pairs()
    traced = []

    def model(x):
        traced.append(1)
        return net(x)

    def count(images):
        before = len(traced)
        jax.block_until_ready(effect.pse(model, clean, images, LABELS, TARGETS, 4))
        return len(traced) - before

    first, again = count(adversarial), count(adversarial)
    assert first > again  # shapes are traced anew, programs are not
    one_pixel = clean.copy()
    one_pixel[4, 0, 0] = 0
    for images in (clean, one_pixel, 1 - clean):
        assert count(images) <= again


def test_one_program_for_cells_of_any_size_and_shape():
    net, images, traced = small_net(), pairs(), []

    def model(x):
        traced.append(1)
        return net(x)

    def count(cells):
        before = len(traced)
        jax.block_until_ready(effect.pse(model, *images, LABELS, TARGETS, cells))
        return len(traced) - before

    first, again = count(4), count(4)
    assert first > again
    for cells in (1, 5, (3, 6), (10, 13), stripes()):
        assert count(cells) <= again


# An image's result is its own


@pytest.mark.parametrize("chunk", [3, 1000, *(pytest.param(more, marks=pytest.mark.exhaustive) for more in (1, 16))])
def test_the_chunk_changes_no_bit(chunk):
    assert_same(effect.pse(small_net(), *pairs(), LABELS, TARGETS, 4, chunk=chunk), solved())


def test_a_batch_is_runs_of_one():
    clean, adversarial = pairs()
    for i in range(BATCH):
        alone = effect.pse(
            small_net(), clean[i : i + 1], adversarial[i : i + 1], LABELS[i : i + 1], TARGETS[i : i + 1], 4
        )
        assert_same(alone, take(solved(), [i]))
    order = np.array([3, 1, 0, 7, 2, 6, 5, 4])
    moved = effect.pse(small_net(), clean[order], adversarial[order], LABELS[order], TARGETS[order], 4)
    assert_same(moved, take(solved(), order))


def test_eight_devices_give_what_one_gives():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    clean, adversarial = (jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))) for x in pairs())
    e = effect.pse(small_net(), clean, adversarial, LABELS, TARGETS, 4)
    assert len(e.kind.sharding.device_set) == 8
    assert_same(e, solved())
    estimate, alone = (
        effect.pse(small_net(), *x, LABELS, TARGETS, 4, method="first_order") for x in ((clean, adversarial), pairs())
    )
    assert_same(estimate, alone)


def test_eight_devices_share_the_cells_of_one_image():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    passes = []

    def counted(m, x):
        jax.debug.callback(lambda: passes.append(1))
        return m(x)

    clean, adversarial = (x[:1] for x in pairs())
    places = NamedSharding(mesh, PartitionSpec())
    everywhere = jax.device_put(clean, places), jax.device_put(adversarial, places)
    model = Partial(counted, small_net())
    e = effect.pse(model, *everywhere, LABELS[:1], TARGETS[:1], 1, chunk=4)
    jax.block_until_ready(e)
    jax.effects_barrier()
    assert len(passes) == -(-int(e.forward[0]) // 4)  # each done once, by one of the devices
    assert_same(e, effect.pse(small_net(), clean, adversarial, LABELS[:1], TARGETS[:1], 1))


def test_under_jit():
    clean, adversarial = pairs()
    run = jax.jit(effect.pse, static_argnames="cells")
    assert_same(run(small_net(), clean, adversarial, jnp.asarray(LABELS), jnp.asarray(TARGETS), cells=4), solved())


# Errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cells": 0}, ValueError, r"cells must be from 1 pixel .* 10 x 13 pixels, got 0 x 0"),
        ({"cells": 11}, ValueError, r"cells must be .* 10 x 13 pixels, got 11 x 11"),
        ({"cells": (2, 14)}, ValueError, r"cells must be .*got 2 x 14"),
        ({"targets": LABELS}, ValueError, "targets must differ from labels"),
        ({"targets": TARGETS + 3}, ValueError, "targets must be classes from 0 to 3"),
        ({"targets": None}, ValueError, "targets are needed"),
        ({"labels": LABELS / 2}, TypeError, "labels must be integers"),
        ({"adversarial": pairs()[1] + 1}, ValueError, r"adversarial.*in \[0, 1\]"),
        ({"clean": pairs()[0] - 1}, ValueError, r"clean.*in \[0, 1\]"),
        ({"adversarial": pairs()[1][:, :9]}, ValueError, r"adversarial.*\(8, 9, 13, 3\).*\(8, 10, 13, 3\)"),
        ({"tolerance": -1e-6}, ValueError, "tolerance must be finite and not negative, got -1e-06"),
        ({"tolerance": float("nan")}, ValueError, "tolerance must be finite"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
        ({"cells": np.zeros((10, 13))}, TypeError, r"partition into cells must be integers.*float64"),
        ({"cells": np.zeros((13, 10), int)}, ValueError, r"must have shape \[10,13\] or \[8,10,13\], got \(13, 10\)"),
        ({"cells": np.zeros((7, 10, 13), int)}, ValueError, r"must have shape .*got \(7, 10, 13\)"),
        ({"cells": stripes() - 1}, ValueError, "leaves 6 pixels out.*row 0, column 0 has -1"),
        ({"cells": stripes(8) - 1}, ValueError, "leaves .* pixels out.*row 0, column 0 of example 0 has -1"),
        ({"cells": stripes() + 130}, ValueError, "at most as many cells as pixels, 130, got number 137"),
        ({"method": "leave_one_in"}, ValueError, "unknown method 'leave_one_in'; did you mean 'leave_one_out'"),
        ({"scale": "logits"}, ValueError, "unknown scale 'logits'; did you mean 'logit'"),
        ({"model": lambda x: x[:, 0, 0, 0]}, ValueError, "model must map"),
        ({"adversarial": pairs()[1][:2]}, ValueError, r"adversarial images \(2, .* and clean images"),
        ({"chunk": 2.5}, TypeError, "chunk must be a whole number, got 2.5"),
        ({"tolerance": None}, TypeError, "tolerance must be one number, got None"),
        ({"cells": True}, TypeError, "cells must be a whole number of pixels"),
        ({"windows": "yes"}, TypeError, "windows must be True, False or None"),
        ({"windows": True, "method": "first_order"}, ValueError, "an estimate of first order has none"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, message):
    def model(x):
        assert isinstance(x, Tracer), "the model ran on values"
        return x[:, 0, 0:4, 0]

    clean, adversarial = pairs()
    arguments = {"model": model, "clean": clean, "adversarial": adversarial, "labels": LABELS, "targets": TARGETS}
    with pytest.raises(error, match=f"(?s){message}"):
        inspect.unwrap(effect.pse)(**{**arguments, "cells": 4, **change})
