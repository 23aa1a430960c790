"""Scores in closed form with their nulls, the identities of the four maps, kinds on maps, refined attacks."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinterp import Network, attacks, cam, effect, localize
from jaxinterp.effect import Kind

SIDE = 10
PERCENTILES = (30.0, 50.0, 70.0, 90.0)


def ramp(batch=1):
    """Maps at the size of the image whose values are 0 ... 99 in another order for each example."""
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(SIDE * SIDE).reshape(SIDE, SIDE) for _ in range(batch)]).astype(np.float32)


def noise(batch=4, seed=1):
    return np.random.default_rng(seed).normal(size=(batch, SIDE, SIDE, 3)).astype(np.float32) * 0.01


def score(delta, maps, percentile=70.0):
    return np.asarray(localize.interpretability_score(jnp.asarray(delta), jnp.asarray(maps), percentile))


# Closed forms


def test_salient_pixels_are_those_from_the_percentile_on():
    """The 70th percentile of 0 ... 99 is 69.3: thirty pixels, 70 ... 99."""
    maps = ramp(3)
    np.testing.assert_array_equal(localize.salient(jnp.asarray(maps), (SIDE, SIDE)), maps >= 70)
    np.testing.assert_array_equal(localize.salient(jnp.asarray(maps), (SIDE, SIDE), 95.0), maps >= 95)
    # Reaching the percentile is enough: of a map without values everything is salient.
    assert np.asarray(localize.salient(jnp.zeros((1, 3, 3)), (SIDE, SIDE))).all()
    # Resized first: a map of two columns has its upper 30 % in the last three columns of ten.
    mask = np.asarray(localize.salient(jnp.array([[[0.0, 1.0]]]), (4, 10), 70.0))[0]
    np.testing.assert_array_equal(mask, np.tile(np.arange(10) >= 7, (4, 1)))


def test_scores_in_closed_form():
    maps = np.repeat(ramp(), 5, axis=0)
    mask = maps[0] >= 70
    delta = np.zeros((5, SIDE, SIDE, 3), np.float32)
    delta[0, mask] = [0.1, -0.2, 0.3]  # all on the salient part
    delta[1, ~mask] = [0.1, -0.2, 0.3]  # none on it
    delta[2] = 0.01  # uniform: the root of the salient share
    r, c = np.argwhere(mask)[0], np.argwhere(~mask)[0]
    delta[3, r[0], r[1]] = [0.0, 0.3, 0.0]
    delta[3, c[0], c[1]] = [0.0, 0.0, 0.4]  # 3-4-5
    np.testing.assert_allclose(score(delta, maps)[:4], [1, 0, np.sqrt(0.3), 0.6], rtol=1e-6)
    assert np.isnan(score(delta, maps)[4])  # no perturbation, no score


def test_score_is_the_ratio_of_norms():
    delta, maps = noise(), ramp(4)
    for percentile in PERCENTILES:
        mask = maps >= np.percentile(maps, percentile)
        inside = np.sqrt((delta.astype(np.float64) ** 2 * mask[..., None]).sum(axis=(1, 2, 3)))
        expected = inside / np.sqrt((delta.astype(np.float64) ** 2).sum(axis=(1, 2, 3)))
        np.testing.assert_allclose(score(delta, maps, percentile), expected, rtol=1e-5)


def test_null_is_the_root_of_the_salient_share():
    maps, delta = ramp(4), noise()
    for percentile, share in ((30.0, 0.7), (70.0, 0.3), (90.0, 0.1)):
        null = localize.null_score(jnp.asarray(delta), jnp.asarray(maps), percentile)
        np.testing.assert_allclose(null, np.sqrt(share), rtol=1e-6)
        uniform = score(np.full_like(delta, 0.02), maps, percentile)
        np.testing.assert_allclose(uniform, null, rtol=1e-6)
    # With ties at the percentile the share is larger than nominal, and the null says so.
    ties = np.zeros((1, SIDE, SIDE), np.float32)
    ties[0, :5] = 1
    np.testing.assert_allclose(
        localize.null_score(jnp.asarray(delta[:1]), jnp.asarray(ties), 70.0), np.sqrt(0.5), rtol=1e-6
    )


# The shuffled control


def keys(n=4, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def shuffled(delta, maps, keys, **kwargs):
    return np.asarray(localize.shuffled_score(jnp.asarray(delta), jnp.asarray(maps), keys, **kwargs))


def test_shuffled_scores_lie_around_the_null():
    """The mean of squared scores is the salient share exactly; its spread follows from sampling without replacement."""
    delta, maps = noise(), ramp(4)
    delta[0] *= 1 + 5 * (maps[0] >= 70)[..., None]  # strongly localised before shuffling
    assert score(delta, maps)[0] > 0.9
    repeats = 200
    control = shuffled(delta, maps, keys(), repeats=repeats)
    assert control.shape == (4, repeats)
    energy = (delta.astype(np.float64) ** 2).sum(axis=-1).reshape(4, -1)
    n, k = SIDE * SIDE, 30
    variance = k * (n - k) / (n * (n - 1)) * (energy**2).sum(1) - k * (n - k) / (n**2 * (n - 1)) * energy.sum(1) ** 2
    spread = np.sqrt(variance) / energy.sum(1)
    squares = np.square(control)
    assert (np.abs(squares.mean(1) - 0.3) < 5 * spread / np.sqrt(repeats)).all()
    np.testing.assert_allclose(squares.std(1), spread, rtol=0.25)


def test_keys_of_hardware_shuffle_an_example_as_it_is_shuffled_alone():
    delta, maps = noise(), ramp(4)
    of_hardware = jax.random.split(jax.random.key(0, impl="rbg"), 4)
    together = shuffled(delta, maps, of_hardware)
    alone = np.concatenate([shuffled(delta[i : i + 1], maps[i : i + 1], of_hardware[i : i + 1]) for i in range(4)])
    np.testing.assert_array_equal(together, alone)


def test_shuffling_a_uniform_perturbation_changes_nothing():
    control = shuffled(np.full((4, SIDE, SIDE, 3), 0.02, np.float32), ramp(4), keys(), repeats=4)
    np.testing.assert_allclose(control, np.sqrt(0.3), rtol=1e-6)
    assert (control == control[:, :1]).all()


def test_shuffling_keeps_the_channels_of_a_pixel_together():
    """One perturbed pixel is either on the salient part or not; its channels never part."""
    delta = np.zeros((1, SIDE, SIDE, 3), np.float32)
    delta[0, 3, 3] = [0.1, 0.2, 0.2]
    control = shuffled(delta, ramp(), keys(1), repeats=300)
    assert set(np.round(control.ravel(), 6)) == {0.0, 1.0}
    assert abs(control.mean() - 0.3) < 4 * np.sqrt(0.21 / 300)


def test_shuffles_are_decided_by_each_examples_key():
    delta, maps = noise(), ramp(4)
    control = shuffled(delta, maps, keys(), repeats=3)
    np.testing.assert_array_equal(shuffled(delta, maps, keys(), repeats=3), control)
    assert (shuffled(delta, maps, keys(seed=1), repeats=3) != control).all()
    for i in range(4):
        alone = shuffled(delta[i : i + 1], maps[i : i + 1], keys()[i : i + 1], repeats=3)
        np.testing.assert_array_equal(alone[0], control[i])
    # More repeats go on where fewer stopped.
    np.testing.assert_array_equal(shuffled(delta, maps, keys(), repeats=5)[:, :3], control)


# Invariances


@settings(max_examples=15, deadline=None)
@given(st.integers(-12, 12), st.integers(-6, 6), st.sampled_from([-64.0, -1.0, 0.0, 1.0, 64.0]))
def test_scale_of_perturbation_and_of_map_do_not_matter(power, map_power, offset):
    """Powers of two and whole numbers, so that the arithmetic is exact."""
    delta, maps = noise(), ramp(4)
    np.testing.assert_array_equal(score(delta * np.float32(2.0**power), maps), score(delta, maps))
    moved = (maps * np.float32(2.0**map_power) + np.float32(offset)).astype(np.float32)
    np.testing.assert_array_equal(score(delta, moved), score(delta, maps))


def test_the_sign_of_the_map_matters():
    delta, maps = noise(), ramp(4)
    delta *= 1 + 5 * (maps >= 70)[..., None]
    assert (score(delta, maps) > score(delta, -maps) + 0.3).all()


def test_a_higher_percentile_scores_lower():
    delta = noise()
    maps = np.random.default_rng(3).normal(size=(4, 4, 3)).astype(np.float32)  # resized to the image
    curve = np.stack([score(delta, maps, p) for p in np.linspace(0, 100, 11)])
    assert (np.diff(curve, axis=0) <= 0).all()
    np.testing.assert_allclose(curve[0], 1, rtol=1e-6)
    assert (curve[5] > curve[9]).all()


def test_percentiles_share_one_program():
    delta, maps = jnp.asarray(noise()), jnp.asarray(ramp(4))
    sweep = jax.jit(jax.vmap(lambda p: localize.interpretability_score(delta, maps, p)))
    together = sweep(jnp.asarray(PERCENTILES))
    for percentile, scores in zip(PERCENTILES, together, strict=True):
        np.testing.assert_allclose(scores, score(delta, maps, percentile), rtol=1e-6)


@pytest.mark.parametrize("size", [(SIDE, SIDE), (4, 3)], ids=str)
def test_a_batch_is_scores_of_one(size):
    delta = noise(5)
    maps = np.random.default_rng(2).normal(size=(5, *size)).astype(np.float32)
    whole = score(delta, maps)
    order = np.array([4, 2, 0, 1, 3])
    np.testing.assert_array_equal(score(delta[order], maps[order]), whole[order])
    null = np.asarray(localize.null_score(jnp.asarray(delta), jnp.asarray(maps)))
    for i in range(5):
        np.testing.assert_array_equal(score(delta[i : i + 1], maps[i : i + 1])[0], whole[i])
        alone = localize.null_score(jnp.asarray(delta[i : i + 1]), jnp.asarray(maps[i : i + 1]))
        np.testing.assert_array_equal(alone[0], null[i])


# The four maps

CLASSES = 4
LABELS, TARGETS = np.array([0, 1, 2, 3]), np.array([2, 3, 0, 0])


def small():
    """A network of one convolution, the mean over positions and a linear layer."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "kernel": jax.random.normal(keys[0], (3, 3, 3, 8)) * 0.4,
        "head": jax.random.normal(keys[1], (8, CLASSES)) * 4,
        "bias": jax.random.normal(keys[2], (CLASSES,)),
    }

    def apply(params, images, tap):
        maps = jax.lax.conv_general_dilated(
            images - 0.5, params["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean(tap("conv", jax.nn.relu(maps)), axis=(1, 2)) @ params["head"] + params["bias"]

    return Network(
        name="small", apply=apply, nodes=("conv",), image_size=SIDE, classes=CLASSES, cam_node="conv"
    ), params


def images():
    clean = np.random.default_rng(7).uniform(0.2, 0.8, (4, SIDE, SIDE, 3)).astype(np.float32)
    return clean, np.clip(clean + 10 * noise(), 0, 1)


def test_suppression_and_promotion_maps_sum_to_the_changes_of_the_logits():
    (network, params), (clean, adversarial) = small(), images()
    four = localize.four_maps(network, params, clean, adversarial, LABELS, TARGETS)
    model, rows = network.bind(params), np.arange(4)
    before, after = (np.asarray(model(jnp.asarray(x))) for x in (clean, adversarial))
    np.testing.assert_allclose(four.suppression.sum((1, 2)), (before - after)[rows, LABELS], atol=1e-4)
    np.testing.assert_allclose(four.promotion.sum((1, 2)), (after - before)[rows, TARGETS], atol=1e-4)
    assert np.abs(before - after).max() > 0.1
    each = zip(
        (four.label_clean, four.label_adversarial, four.target_clean, four.target_adversarial),
        ((clean, LABELS), (adversarial, LABELS), (clean, TARGETS), (adversarial, TARGETS)),
        strict=True,
    )
    for i, (mine, (pictures, classes)) in enumerate(each):
        np.testing.assert_allclose(mine, cam.maps(network, params, pictures, classes), atol=1e-6)
        np.testing.assert_array_equal(four.stacked()[:, i], mine)
    other = localize.four_maps(network, params, clean, adversarial, LABELS, TARGETS, "layercam", "conv")
    np.testing.assert_allclose(other.target_clean, cam.maps(network, params, clean, TARGETS, "layercam"), atol=1e-6)


def test_one_scale_for_the_four_maps_of_an_image():
    values = np.random.default_rng(0).normal(size=(4, 3, 2, 5)).astype(np.float32)
    scaled = np.asarray(localize.FourMaps(*jnp.asarray(values)).one_scale())
    stacked = values.swapaxes(0, 1)
    low, high = stacked.min(axis=(1, 2, 3), keepdims=True), stacked.max(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(scaled, (stacked - low) / (high - low), atol=1e-6)


# Curves, and the saliency map in place of a class activation map


def test_curves_are_scores_at_every_percentile():
    delta, maps = jnp.asarray(noise()), jnp.asarray(ramp(4))
    scores, nulls = localize.score_curve(delta, maps, (30, 50, 90))
    assert scores.shape == nulls.shape == (4, 3)
    for column, percentile in enumerate((30.0, 50.0, 90.0)):
        np.testing.assert_allclose(scores[:, column], score(delta, maps, percentile), rtol=1e-6)
        np.testing.assert_allclose(nulls[:, column], np.sqrt(1 - percentile / 100), rtol=1e-6)
    assert localize.score_curve(delta, maps)[0].shape == (4, 7)


def test_saliency_by_hand():
    """Of a linear model the gradients are its weights."""
    weights = np.random.default_rng(3).normal(size=(SIDE, SIDE, 3, CLASSES)).astype(np.float32)

    def model(x):
        return jnp.einsum("bhwc,hwck->bk", x, weights)

    found = localize.adversarial_saliency(model, images()[0], LABELS, TARGETS)
    for i in range(4):
        up, down = weights[..., TARGETS[i]], weights[..., LABELS[i]]
        expected = np.where((up < 0) | (down > 0), 0, up * np.abs(down)).sum(axis=-1)
        np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-6)


# Kinds on maps


@pytest.mark.parametrize("cells", [3, (2, 5), "rings"], ids=str)
def test_mean_of_a_map_by_kind(cells):
    if cells == "rings":
        rows, columns = np.indices((SIDE, SIDE))
        cells = np.maximum(np.abs(rows - 4), np.abs(columns - 4))
    where = np.asarray(effect.partition(cells, 2, SIDE, SIDE)[0])[0]
    shape = effect.partition(cells, 2, SIDE, SIDE)[1]
    rng = np.random.default_rng(4)
    kind = rng.integers(0, 4, (2, *shape)).astype(np.int32)
    kind[1][kind[1] == Kind.BALANCED] = Kind.NONE
    maps = rng.normal(size=(2, 4, 3)).astype(np.float32)
    large = np.asarray(cam.resize(jnp.asarray(maps), SIDE))
    found = localize.mean_by_kind(jnp.asarray(maps), jnp.asarray(kind), cells, (SIDE, SIDE))
    for i in range(2):
        by_pixel = kind[i].ravel()[where]
        for column, k in enumerate((Kind.SUPPRESSION, Kind.BALANCED, Kind.PROMOTION)):
            inside = large[i][by_pixel == k]
            expected = inside.mean() if inside.size else np.nan
            np.testing.assert_allclose(found[i, column], expected, rtol=1e-4, atol=1e-5)
    assert np.isnan(found[1, 1])
    alone = localize.mean_by_kind(jnp.asarray(maps[1:]), jnp.asarray(kind[1:]), cells, (SIDE, SIDE))
    np.testing.assert_array_equal(alone, found[1:])  # to the last bit


# Refinement


def test_top_cells_by_hand():
    overall = np.array([[[5, 1, 3], [2, 2, 4]], [[0, 0, 0], [0, 0, 0]]], np.float32)
    mask = np.asarray(localize.top_cells(jnp.asarray(overall), (2, 2), (4, 5), 0.5))
    expected = np.zeros((4, 5), bool)
    expected[:2, :2] = expected[:2, 4:] = expected[2:, 4:] = True  # 5, 3 and 4
    np.testing.assert_array_equal(mask[0], expected)
    first = np.zeros((4, 5), bool)
    first[:2] = True  # of equal cells the first ones
    np.testing.assert_array_equal(mask[1], first)
    assert np.asarray(localize.top_cells(jnp.asarray(overall), (2, 2), (4, 5), 1.0)).all()
    assert np.asarray(localize.top_cells(jnp.asarray(overall), (2, 2), (4, 5), 0.01)).sum() == 4 + 4
    with pytest.raises(ValueError, match="fraction must be above 0 and at most 1, got 0"):
        localize.top_cells(jnp.asarray(overall), (2, 2), (4, 5), 0)


REFINED = {
    "ifgsm": attacks.IFGSM(eps=0.3, steps=5),
    "pgd": attacks.PGD(norm="l2", eps=3.0, steps=5),
    "mifgsm": attacks.MIFGSM(eps=0.3, steps=5),
    "cw": attacks.CW(lr=0.03, steps=20, search_steps=3, initial_const=1.0),
    "ead": attacks.EAD(steps=60, search_steps=3, initial_const=1.0),
    "strattack": attacks.StrAttack(steps=60, search_steps=3, refit_search_steps=1, refit_steps=20, eps=1.0, tau=0.1),
    "deepfool": attacks.DeepFool(),
}


def some_of(names, always):
    """With --exhaustive all of them."""
    return [pytest.param(name, marks=() if name in always else pytest.mark.exhaustive) for name in names]


@pytest.mark.parametrize("name", some_of(REFINED, ("ifgsm",)))
def test_a_refined_attack_stays_on_its_support_and_succeeds_there(name):
    """On the half of the image that matters most; the perturbation found before is where it begins."""
    (network, params), (clean, _) = small(), images()
    model, attack = network.bind(params), REFINED[name]
    labels = np.asarray(jnp.argmax(model(jnp.asarray(clean)), axis=-1))
    targets = (labels + 1) % CLASSES
    key = jax.random.key(0)
    whole = attacks.run(attack, model, clean, labels, targets, key=key)
    assert np.asarray(whole.success).all()
    cells = effect.pse(model, clean, whole.images, labels, targets, 2)
    support = localize.top_cells(cells.suppression + cells.promotion, 2, (SIDE, SIDE), 0.6)
    refined = localize.refine(attack, model, clean, whole.images, labels, targets, support, key=key)
    changed = np.asarray(refined.images) != clean
    assert not changed[~np.asarray(support)].any()
    assert np.asarray(refined.success).sum() >= 3
    assert (np.asarray(refined.l0) <= 3 * np.asarray(support).sum(axis=(1, 2))).all()
    # The same for an image on its own.
    alone = localize.refine(
        attack, model, clean[2:3], whole.images[2:3], labels[2:3], targets[2:3], support[2:3], key=key
    )
    np.testing.assert_array_equal(alone.images[0], refined.images[2])


@pytest.mark.parametrize("name", some_of((name for name in REFINED if name != "deepfool"), ("pgd",)))
def test_a_warm_start_is_where_the_attack_begins(name):
    """From a success far away an attack without time to search still knows it, or a point between."""
    (network, params), (clean, _) = small(), images()
    model = network.bind(params)
    labels = np.asarray(jnp.argmax(model(jnp.asarray(clean)), axis=-1))
    targets = (labels + 1) % CLASSES
    far = attacks.run(attacks.IFGSM(eps=0.3, steps=20), model, clean, labels, targets, key=jax.random.key(0))
    assert np.asarray(far.success).all()
    few = {"steps": 1} if name in ("ifgsm", "pgd", "mifgsm") else {"steps": 2, "search_steps": 2}
    short = {"eps": 6.0 if name == "pgd" else 0.3, "step_size": 1e-3} if "search_steps" not in few else {}
    if name == "ead":
        short = {"lr": 1e-4}
    if name == "strattack":
        short = {"refit": False, "tau": 1e-3, "gamma": 1e-3, "eps": 1.0}
    attack = dataclasses.replace(REFINED[name], **few, **short)
    cold = attacks.run(attack, model, clean, labels, targets, key=jax.random.key(0))
    warm = attacks.run(attack, model, clean, labels, targets, key=jax.random.key(0), initial=far.images)
    assert not np.asarray(cold.success).all()
    np.testing.assert_array_equal(warm.iterations, 0)  # a success from the first iterate on
    stay = attacks.run(attack, model, clean, labels, targets, key=jax.random.key(0), initial=clean)
    if name != "pgd":  # whose own start is random
        np.testing.assert_array_equal(stay.images, cold.images)


ITERATES = {
    "cw": lambda state: state.variable.images(),
    "ead": lambda state: state.x,
    "strattack": lambda state: state.examples.images + state.admm.z,
}


@pytest.mark.parametrize("name", ITERATES)
def test_every_problem_of_a_search_begins_at_the_warm_start(name):
    (network, params), (clean, initial) = small(), images()
    model = network.bind(params)
    labels = np.asarray(jnp.argmax(model(jnp.asarray(clean)), axis=-1))
    attack = dataclasses.replace(REFINED[name], steps=3, search_steps=2)
    key, targets = jax.random.key(0), (labels + 1) % CLASSES
    state = attacks.start(attack, model, clean, labels, targets, key=key, initial=initial)
    np.testing.assert_allclose(ITERATES[name](state), initial, atol=2e-6)
    state = attacks.advance(attack, model, state, 1)
    assert np.abs(np.asarray(ITERATES[name](state)) - initial).max() > 1e-4
    state = attacks.advance(attack, model, state, 2)
    np.testing.assert_allclose(ITERATES[name](state), initial, atol=2e-6)


@pytest.mark.parametrize("name", ITERATES)
def test_an_original_that_is_adversarial_is_found_before_the_warm_start(name):
    (network, params), (clean, initial) = small(), images()
    model = network.bind(params)
    labels = np.array(jnp.argmax(model(jnp.asarray(clean)), axis=-1))
    labels[1:3] = (labels[1:3] + 1) % CLASSES
    attack = dataclasses.replace(REFINED[name], steps=3, search_steps=2)
    result = attacks.run(attack, model, clean, labels, key=jax.random.key(0), initial=initial)
    np.testing.assert_array_equal(result.images[1:3], clean[1:3])
    np.testing.assert_array_equal(result.success[1:3], True)
    np.testing.assert_array_equal(result.iterations[1:3], 0)
    np.testing.assert_array_equal(result.forward[1:3], 1)
    np.testing.assert_array_equal(result.backward[1:3], 0)
    assert (np.asarray(result.forward)[[0, 3]] > 3).all()


def test_a_warm_start_must_be_an_image_and_the_attack_must_have_one():
    (network, params), (clean, _) = small(), images()
    arguments = (network.bind(params), clean, LABELS, TARGETS)
    with pytest.raises(TypeError, match="DeepFool cannot begin at given images"):
        attacks.run(attacks.DeepFool(), *arguments, key=jax.random.key(0), initial=clean)
    with pytest.raises(ValueError, match=r"initial must have the images' shape \(4, 10, 10, 3\), got \(4, 9, 10, 3\)"):
        attacks.run(attacks.CW(), *arguments, key=jax.random.key(0), initial=clean[:, :9])
    with pytest.raises(ValueError, match=r"initial must be finite and in \[0, 1\]"):
        attacks.run(attacks.CW(), *arguments, key=jax.random.key(0), initial=clean + 1)


# Bad input


def test_of_a_partition_with_gaps_the_cells_that_are_there_count():
    """Numbered from 5, with one number left out; and another number of cells in each image."""
    part = np.where(np.arange(SIDE)[:, None] < 5, 5, 9) * np.ones((SIDE, SIDE), int)
    overall = jnp.zeros((1, 10)).at[0, 9].set(1.0)
    np.testing.assert_array_equal(localize.top_cells(overall, part, (SIDE, SIDE), 0.5)[0], part == 9)
    quarters = (np.arange(SIDE)[:, None] // 5) * 2 + np.arange(SIDE) // 5
    both = np.stack([part, quarters])
    kept = localize.top_cells(jnp.zeros((2, 10)), both, (SIDE, SIDE), 0.5)
    np.testing.assert_array_equal(kept, np.stack([part == 5, quarters < 2]))


def test_a_map_that_is_not_finite_has_no_score():
    maps = ramp(2)
    maps[1, 3, 3] = np.nan
    for scores in (score(noise(2), maps), localize.null_score(jnp.asarray(noise(2)), jnp.asarray(maps))):
        np.testing.assert_array_equal(np.isnan(scores), [False, True])
    keys = jax.random.split(jax.random.key(0), 2)
    shuffled = localize.shuffled_score(jnp.asarray(noise(2)), jnp.asarray(maps), keys)
    np.testing.assert_array_equal(np.isnan(shuffled), [[False] * 8, [True] * 8])


@pytest.mark.parametrize("percentile", [-1.0, 100.5, float("nan")])
def test_percentiles_lie_between_0_and_100(percentile):
    with pytest.raises(ValueError, match="percentile must be from 0 to 100"):
        score(noise(1), ramp(), percentile)
    with pytest.raises(ValueError, match="percentile must be from 0 to 100"):
        localize.score_curve(jnp.asarray(noise(1)), jnp.asarray(ramp()), [50, percentile])


def test_maps_effects_and_images_must_belong_together():
    """Called without the shape checks of these tests, as users do."""
    bare = inspect.unwrap
    delta, maps = jnp.asarray(noise(3)), jnp.asarray(ramp(2))
    for function in (localize.interpretability_score, localize.null_score):
        with pytest.raises(ValueError, match=r"expected perturbations \[B,H,W,C\] and a map"):
            bare(function)(delta, maps)
    effects = jnp.zeros((3, 2, 2))
    with pytest.raises(ValueError, match=r"overall must have the shape \(3, 5, 5\) with these cells, got \(3, 2, 2\)"):
        bare(localize.top_cells)(effects, 2, (SIDE, SIDE), 0.5)
    with pytest.raises(ValueError, match=r"kind must have the shape \(3, 2, 2\) with these cells, got \(1, 2, 2\)"):
        bare(localize.mean_by_kind)(jnp.zeros((3, 4, 4)), effects[:1].astype(int), 5, (SIDE, SIDE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adversarial": np.zeros((2, 6, 6, 3))}, r"adversarial images \(2, 6, 6, 3\) and clean images \(3, 6, 6, 3\)"),
        ({"adversarial": np.zeros((3, 5, 6, 3))}, "must have the same shape"),
        ({"targets": [1, 2]}, r"targets must have shape \[3\]"),
        ({"labels": 0}, r"labels must have shape \[3\]"),
        ({"targets": [0, 1, 1]}, "targets must differ from labels, but example 0 has both 0"),
    ],
)
def test_four_maps_name_what_does_not_fit(change, message):
    pictures = np.full((3, 6, 6, 3), 0.5, np.float32)
    given = {"clean": pictures, "adversarial": pictures, "labels": [0, 0, 0], "targets": [1, 1, 1]} | change
    network, params = small()
    with pytest.raises(ValueError, match=message):
        localize.four_maps(network, params, *given.values())
