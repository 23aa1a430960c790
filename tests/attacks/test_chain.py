"""Chain against the same attacks run by hand one after the other, with other keys and on what is left."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxinterp import attacks
from jaxinterp.attacks import (
    APGD,
    APGDT,
    CW,
    FAB,
    FGSM,
    IFGSM,
    MIFGSM,
    PGD,
    SPSA,
    Chain,
    CWLinf,
    Smoothed,
    Square,
    StrAttack,
    driver,
    finish,
    start,
)
from jaxinterp.attacks.driver import by_example, coerce, example_keys

SHAPE = (6, 5, 3)
KEY = jax.random.key(0)
# In one program: what is unfinished in smaller batches is up to test_compaction.py.
run = functools.partial(attacks.run, compact=False)
advance = functools.partial(attacks.advance, compact=False)
BATCH = 6
WEAK = 0.005  # a radius at which PGD breaks some of the images


def affine(p, x):
    return x.reshape(x.shape[0], -1) @ p[0] + p[1]


def problem():
    """A linear model, images whose margins differ, and their labels."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(np.prod(SHAPE), 3)).astype(np.float32)
    images = rng.uniform(0.35, 0.65, size=(BATCH, *SHAPE)).astype(np.float32)
    bias = (-images.reshape(BATCH, -1).mean(0) @ weights).astype(np.float32)
    model = Partial(affine, (jnp.asarray(weights), jnp.asarray(bias)))
    logits = np.asarray(model(jnp.asarray(images)))
    return model, jnp.asarray(images), jnp.asarray(logits.argmax(1))


@jax.jit
def begun(attack, model, images, labels, targets, keys, support):
    return attack.init(model, images, labels, targets, keys, support)


def alone(attack, stage, model=None, labels=None, targets=None, support=None):
    """The result of an attack with the keys of the given stage, on the problem or on another model."""
    usual, images, usual_labels = problem()
    model, labels = (usual, usual_labels) if model is None else (model, labels)
    attack = by_example(coerce(attack), BATCH)
    keys = jax.vmap(lambda k: jax.random.fold_in(k, stage))(example_keys(KEY, images))
    return finish(attack, advance(attack, model, begun(attack, model, images, labels, targets, keys, support)))


def pick(condition, *results):
    """Rows of the first result where the condition holds, of the second elsewhere."""
    return jax.tree.map(lambda a, b: np.where(np.reshape(condition, (-1, *[1] * (a.ndim - 1))), a, b), *results)


def test_stages_take_what_is_left_and_passes_add_up():
    weak, strong = PGD(eps=WEAK, steps=3), PGD(eps=0.2, steps=4)
    never = Square(eps=0.0, steps=5)
    model, images, labels = problem()
    result = run(Chain((never, weak, strong, never)), model, images, labels, key=KEY)
    zero, one, two = alone(never, 0), alone(weak, 1), alone(strong, 2)
    assert 0 < np.sum(one.success) < BATCH
    assert np.all(two.success)
    expected = pick(one.success, one, two)
    for field in ("images", "success", "l0", "l1", "l2", "linf"):
        np.testing.assert_array_equal(getattr(result, field), getattr(expected, field))
    np.testing.assert_array_equal(zero.forward, 6)
    later = np.where(one.success, 0, np.asarray(two.forward))
    np.testing.assert_array_equal(result.forward, 6 + np.asarray(one.forward) + later)
    np.testing.assert_array_equal(result.backward, 3 + np.where(one.success, 0, 4))
    before = np.where(one.success, 6, 6 + 4)
    np.testing.assert_array_equal(result.iterations, before + np.asarray(expected.iterations))


def test_a_minimum_norm_stage_counts_within_the_radius_only():
    cw = CW(lr=0.02, initial_const=0.1, search_steps=3, steps=40)
    model, images, labels = problem()
    nearest = run(cw, model, images, labels, key=KEY)
    assert np.all(nearest.success)
    eps = float(np.sort(nearest.l2)[2:4].mean())
    result = run(Chain((cw,), eps=eps, norm="l2"), model, images, labels, key=KEY)
    np.testing.assert_array_equal(result.success, np.asarray(nearest.l2) <= eps)
    failed = ~np.asarray(result.success)
    assert failed.sum() == 3
    np.testing.assert_array_equal(np.asarray(result.images)[failed], np.asarray(images)[failed])
    assert (np.asarray(result.l2) <= eps).all()
    # Any success within the radius will do: no time is spent on a nearer one.
    np.testing.assert_array_equal(np.asarray(result.forward)[failed], np.asarray(nearest.forward)[failed])
    found = np.asarray(result.iterations)[~failed]
    np.testing.assert_array_equal(np.asarray(result.forward)[~failed], found + 1)
    # Without a radius, the nearest success is asked for.
    whole = run(Chain((cw,)), model, images, labels, key=KEY)
    for field in ("images", "success", "l2", "forward", "backward", "iterations"):
        np.testing.assert_array_equal(getattr(whole, field), getattr(nearest, field))


def test_a_stage_is_begun_and_paid_for_when_it_is_reached():
    """The first pass of C&W in Linf, which judges the input, is made when the stage before has failed."""
    model, images, labels = problem()
    chain = Chain((PGD(steps=3), CWLinf(search_steps=1, steps=5)), eps=0.0, norm="linf")
    state = start(chain, model, images, labels, key=KEY)
    forward = [np.asarray(finish(chain, state).forward)]
    for _ in range(5):
        state = advance(chain, model, state, 1)
        forward.append(np.asarray(finish(chain, state).forward))
    np.testing.assert_array_equal(np.transpose(forward)[0], [0, 1, 2, 3, 4, 6])
    assert (np.array(forward) == np.array(forward)[:, :1]).all()


def test_an_example_in_a_later_stage_waits_and_stays_as_it_is():
    model, images, labels = problem()
    chain = Chain((PGD(eps=0.0, steps=3), Square(eps=0.001, steps=20)))
    first = start(chain, model, images, labels, key=KEY)
    ahead = advance(chain, model, first, 9)
    mixed = jax.tree.map(lambda a, b: jnp.concatenate([a[:3], b[3:]]), first, ahead)
    for steps in range(1, 5):
        later = advance(chain, model, mixed, steps)
        np.testing.assert_array_equal(later.stage, [int(steps > 3)] * 3 + [1] * 3)
        for old, new in zip(jax.tree.leaves(mixed), jax.tree.leaves(later), strict=True):
            np.testing.assert_array_equal(old[3:], new[3:])


def test_on_one_device_stages_are_programs_of_their_own_as_they_are_reached(monkeypatch):
    model, images, labels = problem()
    chain = Chain((PGD(eps=WEAK, steps=3), PGD(eps=0.2, steps=70), Square(eps=0.2, steps=80)))
    asked, original = [], driver._advance

    def recorded(mesh, donated=False, stage=None):
        asked.append(stage)
        return original(mesh, donated, stage)

    monkeypatch.setattr(driver, "_advance", recorded)
    whole = run(chain, model, images, labels, key=KEY)
    assert asked == [None]
    asked.clear()
    state = attacks.advance(chain, model, start(chain, model, images, labels, key=KEY))
    assert set(asked) == {0, 1}, "the second breaks all that the first has left"
    asked.clear()
    assert attacks.advance(chain, model, state) is state
    assert not asked, "no program for what has ended"
    pieces = start(chain, model, images, labels, key=KEY)
    for steps in (2, 5, 200):
        pieces = attacks.advance(chain, model, pieces, steps)
    for end in (state, pieces):
        for a, b in zip(jax.tree.leaves(finish(chain, end)), jax.tree.leaves(whole), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def wavy(p, x):
    return affine(p, jnp.sin(x))


def wavy_problem():
    """The same with a model that is not linear."""
    model, images, _ = problem()
    model = Partial(wavy, *model.args)
    return model, images, jnp.argmax(model(images), axis=-1)


@pytest.mark.parametrize(
    ("kind", "radii"),
    [("any class", (0.002, 0.13, 0.1)), ("a target", (0.006, 0.3, 0.14)), ("a support", (0.0025, 0.13, 0.11))],
)
def test_neighbours_that_ask_for_one_gradient_give_what_they_give_alone(kind, radii):
    model, images, labels = wavy_problem()
    targets = (labels + 1) % 3 if kind == "a target" else None
    support = np.arange(images[0].size).reshape(SHAPE) % 3 > 0 if kind == "a support" else None
    given = {"targets": targets, "support": None if support is None else np.broadcast_to(support, images.shape)}
    stages = (
        Square(eps=0.0, steps=1),
        APGD(eps=radii[0], steps=5),
        APGD(eps=radii[1], norm="l1", steps=20),
        APGDT(eps=radii[2], step_size=radii[2] / 4, steps=8, classes=2, norm="l2", random_start=False),
        FAB(steps=3, classes=2),
    )
    ends = [alone(attack, i, model, labels, **given) for i, attack in enumerate(stages)]
    result = run(Chain(stages), model, images, labels, key=KEY, **given)
    left, passes, expected = np.ones(BATCH, bool), {"forward": 0, "backward": 0}, ends[0]
    for i, end in enumerate(ends):
        assert np.any(left & np.asarray(end.success)) == (i > 0), "every stage breaks something but the first"
        expected = pick(left, end, expected)
        passes = {name: total + left * np.asarray(getattr(end, name)) for name, total in passes.items()}
        left = left & ~np.asarray(end.success)
    for field in ("images", "success", "l0", "l1", "l2", "linf"):
        np.testing.assert_array_equal(getattr(result, field), getattr(expected, field))
    for field, total in passes.items():
        np.testing.assert_array_equal(getattr(result, field), total)


def test_neighbours_that_ask_for_one_gradient_share_the_network():
    """Its passes stand in their program once."""
    model, images, labels = wavy_problem()
    stages = (APGD(steps=3), APGDT(steps=2, norm="l2"), FAB(steps=3, classes=2))

    def passes(*stages):
        text = driver.lowered(Chain(stages), model, start(Chain(stages), model, images, labels, key=KEY)).as_text()
        return text.count("stablehlo.sine"), text.count("stablehlo.cosine")

    assert passes(*stages) == passes(stages[0]) == (1, 1)
    assert passes(*stages, Square(steps=2)) == (2, 1)  # which sees logits only
    # Several gradients in a step, or others between them, and it is not shared.
    parts = Chain((*stages, Square(), stages[0], FAB(), stages[1], PGD(), PGD()))
    state = start(parts, model, images, labels, key=KEY)
    found = [int(parts.stage(dataclasses.replace(state, stage=state.stage + i))) for i in range(9)]
    assert found == [0, 0, 0, 1, 2, 3, 4, 5, 6]


def test_confidence_and_radius_are_those_of_the_chain():
    model, images, labels = problem()
    stages = (PGD(eps=9.0, kappa=5.0, steps=3), Square(eps=9.0, steps=20))
    result = run(Chain(stages, eps=0.02, kappa=0.1), model, images, labels, key=KEY)
    same = run(Chain((PGD(steps=3), Square(steps=20)), eps=0.02, kappa=0.1), model, images, labels, key=KEY)
    assert np.any(result.success)
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_chain_can_be_a_stage():
    model, images, labels = problem()
    flat = Chain((PGD(eps=0.0, steps=2), PGD(eps=0.5, norm="l2", steps=3, random_start=False)))
    nested = Chain((flat,))
    one, two = (run(chain, model, images, labels, key=KEY) for chain in (flat, nested))
    assert np.any(one.success)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "later", [Chain((PGD(eps=0.1, steps=2), PGD(eps=0.2, steps=4))), Smoothed(PGD(eps=0.2, steps=3))]
)
def test_an_attack_that_holds_others_waits_as_a_whole(later):
    """What the first stage breaks stays as it is, whatever the network sees in a state that was never begun: zeros."""
    model, images, labels = problem()
    chain = Chain((FGSM(eps=WEAK), later))
    first = run(FGSM(eps=WEAK), model, images, labels, key=KEY)
    assert 0 < np.sum(first.success) < BATCH
    together = run(chain, model, images, labels, key=KEY)
    np.testing.assert_array_equal(together.images[first.success], first.images[first.success])
    np.testing.assert_array_equal(together.forward[first.success], first.forward[first.success])
    for i in range(BATCH):
        alone = run(chain, model, images[i : i + 1], labels[i : i + 1], key=KEY)
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_array_equal(a[0], b[i])


def test_bad_chains_are_refused():
    model, images, labels = problem()
    for stage in (FGSM(), IFGSM(), MIFGSM(), SPSA(), StrAttack()):
        with pytest.raises(ValueError, match=r"stages\[0\] must have the chain's norm 'l2'.*'linf'"):
            run(Chain((stage,), eps=0.2, norm="l2"), model, images, labels, key=KEY)
    with pytest.raises(ValueError, match="at least one attack"):
        run(Chain(()), model, images, labels, key=KEY)
    with pytest.raises(ValueError, match=r"stages\[1\] must have the chain's norm 'linf'.*'l2'"):
        run(Chain((PGD(), PGD(norm="l2")), eps=0.1), model, images, labels, key=KEY)
    with pytest.raises(ValueError, match=r"PGD\.steps must be at least 1"):
        run(Chain((PGD(steps=0),)), model, images, labels, key=KEY)
