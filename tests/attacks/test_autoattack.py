"""AutoAttack on a linear model whose nearest adversarial points are known, and the attacks it is made of."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxinterp.attacks import AutoAttack, run

SHAPE = (6, 5, 3)
KEY = jax.random.key(0)


def affine(p, x):
    return x.reshape(x.shape[0], -1) @ p[0] + p[1]


def linear(classes: int):
    """A linear model, six images inside the box, their labels, and the weights."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(np.prod(SHAPE), classes)).astype(np.float32)
    images = rng.uniform(0.35, 0.65, size=(6, *SHAPE)).astype(np.float32)
    bias = (-images.reshape(6, -1).mean(0) @ weights).astype(np.float32)
    model = Partial(affine, (jnp.asarray(weights), jnp.asarray(bias)))
    labels = np.asarray(model(jnp.asarray(images))).argmax(1)
    return model, images, labels, weights


def nearest(model, images, labels, weights, norm):
    """Distance of the nearest point where another class overtakes the label (in L1 where the box is not in the way)."""
    logits = np.asarray(model(jnp.asarray(images)), np.float64)
    dual = {"linf": 1, "l2": 2, "l1": np.inf}[norm]
    return np.array(
        [
            min((z[y] - z[j]) / np.linalg.norm(weights[:, y] - weights[:, j], dual) for j in range(len(z)) if j != y)
            for z, y in zip(logits, labels, strict=True)
        ]
    )


@pytest.mark.parametrize("norm", ["linf", *(pytest.param(more, marks=pytest.mark.exhaustive) for more in ("l2", "l1"))])
def test_succeeds_just_outside_the_optimum_and_not_inside(norm):
    model, images, labels, weights = linear(3)
    best = nearest(model, images, labels, weights, norm)
    assert norm != "l1" or best.max() < 0.35  # one component can do it inside the box
    outside = np.arange(6) % 2 == 1
    eps = np.where(outside, 1.25, 0.8) * best
    attack = AutoAttack(eps=jnp.asarray(eps, jnp.float32), norm=norm, steps=10, queries=20, restarts=1)
    result = run(attack, model, images, labels, key=KEY, compact=False)
    np.testing.assert_array_equal(result.success, outside)
    assert (np.asarray(getattr(result, norm)) <= 1.0001 * eps).all()
    np.testing.assert_array_equal(np.asarray(result.images)[~outside], images[~outside])
    # A robust image has paid for all four: APGD judges after every step, APGD-T has two rivals here, and looks at
    # the input before, and so does Square. What was found early has paid for what was made.
    forward = np.asarray(result.forward)
    fab = np.asarray(result.forward)[~outside] - 11 - (1 + 2 * 11) - 21
    assert (fab > 10).all()
    assert (forward[outside] < 11 + 1 + 2 * 11).all()


def test_the_standard_version_is_that_of_the_paper():
    standard: dict[Literal["linf", "l2", "l1"], tuple[int, int]] = {"linf": (1, 9), "l2": (1, 9), "l1": (5, 5)}
    for norm, (restarts, classes) in standard.items():
        attack = AutoAttack(eps=0.3, kappa=1.0, norm=norm)
        chain = attack.chain
        ce, targeted, fab, square = chain.stages
        assert [type(stage).__name__ for stage in chain.stages] == ["APGD", "APGDT", "FAB", "Square"]
        assert (chain.eps, chain.kappa) == (0.3, 1.0)
        assert {chain.norm, *(stage.norm for stage in chain.stages)} == {norm}
        assert (ce.loss, ce.steps, ce.restarts) == ("ce", 100, restarts)
        assert (targeted.steps, targeted.classes, targeted.restarts) == (100, classes, 1)
        assert (fab.steps, fab.classes, fab.restarts) == (100, 9, 1)
        assert (square.steps, square.horizon, square.p) == (5000, 10_000, 0.8)
        assert attack.iterations == sum(stage.iterations for stage in chain.stages)
