"""Sensitivity of units: measures of a pair, sums over pairs, and what the sensitive units are."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from scipy.stats import hypergeom, spearmanr

from jaxinterp.dissect import dissection
from jaxinterp.dissect import sensitivity as s

from . import narrow


def some_pairs(rng, pairs=6, units=5, side=4):
    natural = np.maximum(rng.standard_normal((pairs, side, side + 1, units)), 0).astype(np.float32)
    adversarial = np.maximum(natural + 0.5 * rng.standard_normal(natural.shape), 0).astype(np.float32)
    natural[..., 3] = 0  # silent for natural images
    natural[..., 4] = adversarial[..., 4] = 0  # dead
    return natural, adversarial, np.full(units, 0.7, np.float32)


def test_measures_of_a_pair(rng):
    natural, adversarial, limits = some_pairs(rng)
    found = s.change(jnp.asarray(natural), jnp.asarray(adversarial), jnp.asarray(limits))
    for i, (a, b) in enumerate(zip(natural.astype(np.float64), adversarial.astype(np.float64), strict=True)):
        for u in range(natural.shape[-1]):
            f, g = a[..., u], b[..., u]
            plain, norm = np.linalg.norm(f - g), np.linalg.norm(f)
            np.testing.assert_allclose(found.plain[i, u], plain, rtol=1e-6)
            np.testing.assert_allclose(found.norm[i, u], norm, rtol=1e-6)
            np.testing.assert_allclose(found.squared[i, u], ((f - g) ** 2).mean(), rtol=1e-6)
            places = [np.array(np.unravel_index(x.argmax(), x.shape)) for x in (f, g)]
            np.testing.assert_allclose(found.shift[i, u], math.dist(*places), rtol=1e-6)
            masks = [x > limits[u] for x in (f, g)]
            either = (masks[0] | masks[1]).sum()
            expected = 1 - (masks[0] & masks[1]).sum() / either if either else np.nan
            np.testing.assert_allclose(found.mask[i, u], expected, rtol=1e-6)
            relative = plain / norm if norm else (0.0 if plain == 0 else np.nan)
            np.testing.assert_allclose(found.relative[i, u], relative, rtol=1e-6)
    assert np.isnan(np.asarray(found.relative)[:, 3]).all()
    assert (np.asarray(found.relative)[:, 4] == 0).all()


def test_a_pair_gives_the_same_bits_in_any_batch(rng):
    natural, adversarial, limits = map(jnp.asarray, some_pairs(rng, pairs=7, units=19, side=13))
    whole = s.change(natural, adversarial, limits)
    for rows in ([3], [6, 0], [5, 1, 2, 4, 3]):
        part = s.change(natural[np.array(rows)], adversarial[np.array(rows)], limits)
        for a, b in zip(jax.tree.leaves(part), jax.tree.leaves(whole), strict=True):
            np.testing.assert_array_equal(a, np.asarray(b)[rows])


def test_means_over_pairs_in_any_batches(rng):
    natural, adversarial, limits = map(jnp.asarray, some_pairs(rng, pairs=9))
    changes = s.change(natural, adversarial, limits)
    found = s.result(s.update(s.init(5), changes))
    for name in (*s.MEASURES, "norm"):
        values = np.asarray(getattr(changes, name), np.float64)
        np.testing.assert_allclose(found[name], s.mean_over_pairs(values), rtol=1e-12)
    assert np.isnan(found["relative"][3])

    parts = []
    for rows in ([8, 2, 5], [0], [1, 7, 3, 4, 6]):
        padded = np.array(rows + [0] * (6 - len(rows)))
        some = jax.tree.map(lambda x, rows=padded: x[rows], changes)
        parts.append(s.update(s.init(5), some, jnp.arange(6) < len(rows)))
    merged = s.result(s.merge(parts[2], s.merge(parts[0], parts[1])))
    for name, values in found.items():
        np.testing.assert_array_equal(merged[name], values)


def test_shapes_that_do_not_fit():
    x = jnp.zeros((2, 3, 3, 4))
    with pytest.raises(ValueError, match=r"natural, adversarial, thresholds.*\[2, 3, 3, 4\] and \[5\]"):
        s.change(x, x, jnp.zeros(5))


def test_ranking_puts_undefined_units_last_and_keeps_the_order_of_equal_ones():
    np.testing.assert_array_equal(s.ranking([1.0, np.nan, 3.0, 1.0, -2.0]), [2, 0, 3, 4, 1])


def test_enrichment_against_every_possible_draw():
    values, detects = np.array([5.0, 4, 3, 2, 1, 0]), np.array([1, 0, 1, 1, 0, 0], bool)
    found = s.enrichment(values, detects, 3)
    import itertools

    draws = [detects[list(chosen)].sum() for chosen in itertools.combinations(range(6), 3)]
    assert (found.found, found.detectors, found.expected) == (2, 3, 1.5)
    assert found.more == pytest.approx(np.mean([d >= 2 for d in draws]))
    assert found.fewer == pytest.approx(np.mean([d <= 2 for d in draws]))
    assert found.interval == tuple(int(hypergeom(6, 3, 3).ppf(p)) for p in (0.025, 0.975))
    for number in (0, 7):
        with pytest.raises(ValueError, match="number: expected 1 to 6 units"):
            s.enrichment(values, detects, number)


def test_correlation_is_spearmans_with_an_interval_over_pairs(rng):
    scores = rng.random(40)
    values = np.exp(scores + 0.2 * rng.standard_normal((12, 40)))
    values[3, 5] = np.nan
    found, low, high = s.correlation(values, scores, seed=0, draws=200)
    assert found == pytest.approx(spearmanr(s.mean_over_pairs(values), scores).statistic)  # type: ignore[attr-defined]  # not in its stubs
    assert low < high <= 1
    resampled = [
        spearmanr(s.mean_over_pairs(values[rows]), scores).statistic  # type: ignore[attr-defined]
        for rows in s.resamples(12, 200, 0)
    ]
    ends = np.quantile(resampled, [0.975, 0.025])
    np.testing.assert_allclose([low, high], np.clip(2 * found - ends, -1, 1), atol=1e-12)
    assert high - low < 0.3
    assert s.correlation(values, scores, seed=0, draws=200) == (found, low, high)
    assert np.isnan(s.correlation(values[:1], scores, seed=0)[1:]).all()
    assert np.isnan(s.correlation(values, np.ones(40), seed=0)).all()
    with pytest.raises(ValueError, match=r"values, scores: expected \[N,U\] and \[U\], got \[12, 40\] and \[39\]"):
        s.correlation(values, scores[1:], seed=0)


def test_a_networks_measures_are_the_same_on_any_devices_and_in_any_batches(rng):
    """Sixteen pairs, of which two do not count, on 1, 2, 4 and 8 devices."""
    network, params = narrow.network()
    natural = rng.uniform(size=(16, 16, 16, 3)).astype(np.float32)
    adversarial = np.clip(natural + 0.1 * rng.standard_normal(natural.shape), 0, 1).astype(np.float32)
    valid = np.arange(16) % 9 != 8
    limits = [np.full(5, 0.3, np.float32), np.full(7, 0.2, np.float32)]

    def measured(count, batch):
        mesh = Mesh(np.array(jax.devices()[:count]), ("data",)) if count else None
        rows = [slice(i, i + batch) for i in range(0, 16, batch)]
        pairs = ((natural[r], adversarial[r], valid[r]) for r in rows)
        return s.measure(network, params, ("a", "b"), pairs, limits, mesh=mesh)

    one = measured(0, 16)
    for count, batch in ((0, 4), (1, 16), (2, 8), (4, 4), (8, 8), (8, 16)):
        for node, found in measured(count, batch).items():
            for name, values in found.items():
                np.testing.assert_array_equal(values, one[node][name], err_msg=f"{count}, {batch}, {node}, {name}")
    run = dissection.extractor(network, ("a", "b"))
    maps = zip(run(params, jnp.asarray(natural)), run(params, jnp.asarray(adversarial)), limits, strict=True)
    for node, (before, after, limit) in zip(("a", "b"), maps, strict=True):
        changes = s.change(before, after, jnp.asarray(limit))
        expected = s.mean_over_pairs(np.asarray(changes.plain, np.float64)[valid])
        np.testing.assert_allclose(one[node]["plain"], expected, rtol=1e-12)
    assert one["b"]["plain"][1:].min() > 0
    with pytest.raises(ValueError, match="pairs: expected at least one batch"):
        s.measure(network, params, ("a",), (), limits[:1])
    with pytest.raises(ValueError, match="thresholds: expected those of 1 layers, got 2"):
        s.measure(network, params, ("a",), (), limits)
