"""The rules that no attack may break, each a test on every attack of the registry.

An example's result depends on nothing but the example; failure returns the original; images stay in box, ball and
support; constants added to the logits, zero gradients and NaN do no harm; and a run can be cut into pieces. On CPU
"the same" means to the last bit. To put another attack under these rules, add instances to `CASES`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from jaxinterp import Network, ensemble, typesetting
from jaxinterp.attacks import (
    APGD,
    APGDT,
    ATTACKS,
    CW,
    CWL0,
    DDN,
    EAD,
    FAB,
    FGSM,
    FMN,
    IFGSM,
    MIFGSM,
    PGD,
    SPSA,
    Attack,
    AttackResult,
    AutoAttack,
    Chain,
    CWLinf,
    DeepFool,
    DiverseInputs,
    HopSkipJump,
    KeyPixels,
    Nesterov,
    ScaleInvariant,
    SmoothBIM,
    SmoothCW,
    Smoothed,
    SmoothPGD,
    Square,
    StrAttack,
    TranslationInvariant,
    TransparentText,
    VarianceTuning,
    Watermark,
    advance,
    finish,
    finished,
    objective,
    run,
    start,
)
from jaxinterp.attacks.driver import by_example, coerce, example_keys

# To embed: seven of the images' size.
PICTURES = jnp.asarray(np.random.default_rng(2).uniform(size=(7, 16, 16, 3)), jnp.float32)
CASES: dict[str, Any] = {
    "ifgsm": IFGSM(eps=0.03, steps=5),
    "pgd-linf": PGD(eps=0.03, steps=5),
    "pgd-l2": PGD(eps=0.5, norm="l2", steps=5),
    "cw": CW(lr=0.05, initial_const=0.3, search_steps=3, steps=15, window=5, tolerance=0.01, polish=True),
    "fgsm": FGSM(eps=0.03),
    "pgd-l1": PGD(eps=6.0, norm="l1", sparsity=0.05, steps=4, restarts=2),
    "apgd-linf": APGD(eps=0.03, steps=6, restarts=2),
    "apgd-l2": APGD(eps=0.5, norm="l2", loss="dlr", steps=6),
    "apgd-l1": APGD(eps=6.0, norm="l1", steps=6),
    "apgdt": APGDT(eps=0.03, classes=2, steps=4),
    "mifgsm": MIFGSM(eps=0.03, steps=4),
    "mifgsm-chain": MIFGSM(
        eps=0.03,
        transforms=(
            VarianceTuning(samples=1),
            Nesterov(),
            TranslationInvariant(sigma=0.5, reach=2),
            ScaleInvariant(copies=2),
            DiverseInputs(),
        ),
        steps=3,
    ),
    "spsa": SPSA(eps=0.06, lr=0.03, samples=16, chunk=8, steps=4),
    "ddn": DDN(initial_radius=0.5, gamma=0.1, steps=10),
    "fmn-l0": FMN(norm="l0", gamma=0.3, steps=15),
    "fmn-l1": FMN(norm="l1", steps=10),
    "fmn-l2": FMN(norm="l2", steps=10),
    "fmn-linf": FMN(norm="linf", steps=10),
    "deepfool-l2": DeepFool(norm="l2", steps=10),
    "deepfool-linf": DeepFool(norm="linf", steps=10),
    "fab-l2": FAB(norm="l2", restarts=2, steps=4),
    "fab-t": FAB(norm="l2", classes=3, steps=4),
    "fab-linf": FAB(norm="linf", candidates=3, steps=5),
    "fab-l1": FAB(norm="l1", candidates=3, steps=8),
    "square-linf": Square(eps=0.1, steps=40),
    "square-l2": Square(eps=2.0, norm="l2", steps=40),
    "square-l1": Square(eps=40.0, norm="l1", steps=40),
    "chain": Chain(
        (PGD(norm="l2", steps=2), CW(lr=0.05, initial_const=1.0, search_steps=1, steps=15)), eps=0.3, norm="l2"
    ),
    "autoattack": AutoAttack(eps=0.02, steps=2, classes=2, queries=20),
    "hopskipjump-l2": HopSkipJump(steps=2, evaluations=10, tries=20),
    "hopskipjump-linf": HopSkipJump(norm="linf", steps=2, evaluations=10, tries=20),
    "ead": EAD(beta=0.01, lr=0.02, initial_const=1.0, search_steps=3, steps=15, window=5, tolerance=0.01, polish=True),
    "strattack": StrAttack(
        eps=0.2,
        tau=0.05,
        gamma=0.05,
        rho=1.0,
        alpha=1.0,
        group=3,
        stride=2,
        search_steps=2,
        steps=12,
        refit_search_steps=2,
        refit_steps=10,
    ),
    "spgd": SmoothPGD(eps=0.5, steps=5, cg_steps=20),
    "sbim": SmoothBIM(eps=0.05, steps=5, cg_steps=20),
    "scw": SmoothCW(lr=0.05, initial_const=1.0, search_steps=3, steps=15, cg_steps=20),
    "smoothed": Smoothed(IFGSM(eps=0.06, steps=3), alpha=0.5, lam=10.0, tries=4, cg_steps=20),
    "key-pixels": KeyPixels(eps=0.6, rho=0.05, most=0.5, steps=5, rounds=3, prunes=6, lengths=4),
    "key-pixels-linf": KeyPixels(eps=0.1, rho=0.1, most=0.8, norm="linf", steps=5, rounds=3, prunes=4, lengths=3),
    "cw-linf": CWLinf(lr=0.05, initial_const=1.0, decrease=0.7, search_steps=4, steps=12),
    "cw-l0": CWL0(lr=0.02, initial_const=0.3, search_steps=8, steps=12),
    # Hues of this opacity cannot make a dark row brighter than 0.2, where the network that fails on dark ones is well.
    "transparent-text": typesetting.written(
        TransparentText(opacity=0.29, text="go|no", colour="hues", queries=500, population=20), 16, 16
    ),
    "transparent-text-faintest": typesetting.written(
        TransparentText(opacity=0.3, faintest=0.02, text="go|no", colour="hues", queries=500, population=20), 16, 16
    ),
    "watermark-haar": Watermark(watermarks=PICTURES, folders=(3, 4), failures=3, strength=3.0, candidates=2),
    "watermark-dct": Watermark(transform="dct", signs="random", jpeg=False, failures=1, rounds=4, strength=3.0),
}
# A leaf that makes the attack stronger or weaker, with values for a sweep.
SWEEPS = {
    "ifgsm": "eps",
    "pgd-linf": "eps",
    "pgd-l2": "eps",
    "cw": "initial_const",
    "fgsm": "eps",
    "pgd-l1": "eps",
    "apgd-linf": "eps",
    "apgd-l2": "eps",
    "apgd-l1": "eps",
    "apgdt": "eps",
    "mifgsm": "eps",
    "mifgsm-chain": "eps",
    "spsa": "eps",
    "ddn": "initial_radius",
    "square-linf": "eps",
    "square-l2": "eps",
    "square-l1": "eps",
    "chain": "eps",
    "autoattack": "eps",
    "ead": "initial_const",
    "strattack": "initial_const",
    "spgd": "eps",
    "sbim": "eps",
    "scw": "initial_const",
    "smoothed": "lam",
    "key-pixels": "eps",
    "key-pixels-linf": "eps",
    "cw-linf": "initial_const",
    "cw-l0": "initial_const",
    "transparent-text": "opacity",
    "transparent-text-faintest": "opacity",
    "watermark-haar": "strength",
    "watermark-dct": "strength",
}
SWEEPS |= {case: "gamma" for case in CASES if case.startswith("hopskipjump")}
SWEEPS |= {case: "step_size" for case in CASES if case.startswith("fmn")}
SWEEPS |= {case: "overshoot" for case in CASES if case.startswith("deepfool")}
SWEEPS |= {case: "alpha_max" for case in CASES if case.startswith("fab")}
# Attacks that know the logits only, and those that show the network other images than perturbed ones.
BLACK_BOX = {"spsa", "square-linf", "square-l2", "square-l1", "hopskipjump-l2", "hopskipjump-linf", "transparent-text"}
BLACK_BOX |= {"transparent-text-faintest", "watermark-haar", "watermark-dct"}
TRANSFORMING = {"mifgsm-chain"}
# Attacks that one of the networks withstands with a margin.
WEAK = {case for case in CASES if case.startswith(("transparent-text", "watermark", "chain"))}
# Attacks that look for the smallest perturbation.
MINIMAL = {case for case, attack in CASES.items() if hasattr(attack, "initial_const")}
BOUNDARY = {case for case in CASES if case.startswith(("ddn", "fmn", "deepfool", "fab", "hopskipjump"))}
MINIMAL |= BOUNDARY
# Settings with which many pixels move, those at 0 and 1 too: by default eight times the radius. In the variable of C&W,
# they are some seven units away from the interior; fewer pixels change in every further problem of the L0 attack.
LARGER: dict[str, dict[str, Any]] = {
    "cw": {"lr": 1.0, "initial_const": 10.0},
    "ead": {"initial_const": 10.0},
    "cw-linf": {"lr": 1.0},
    "scw": {"initial_const": 10.0, "kappa": 1.0},
    "smoothed": {"base": IFGSM(eps=0.4, steps=3)},
    "cw-l0": {"lr": 1.0, "search_steps": 1},
    **{case: {"kappa": 1.5} for case in BOUNDARY},
    "ddn": {"kappa": 1.5, "initial_radius": 2.0},
    "fmn-l0": {"kappa": 1.0, "step_size": 10.0},
    "spsa": {"eps": 0.5, "lr": 0.3},
    # From noise, which decides for no class as clearly.
    "hopskipjump-l2": {"kappa": 0.1},
    "hopskipjump-linf": {"kappa": 0.1},
    "transparent-text": {"opacity": 1.0},
    "transparent-text-faintest": {"opacity": 1.0},
    # All watermarks that are embedded so strongly are one pattern, which not every image yields to.
    "watermark-haar": {"strength": 20.0, "signs": "random"},
    "watermark-dct": {"strength": 20.0},
}
# Steps after which no attack has ended.
FEW = {
    case: 1 if case in ("deepfool-l2", "deepfool-linf", "fgsm", "chain", "autoattack", "mifgsm-chain") else 4
    for case in CASES
}
BATCH, SIDE, CLASSES = 8, 16, 5
KEY = jax.random.key(3)


# Models: a linear one, a stock Flax NNX module, a bound Network of lax operations


def some_images() -> jax.Array:
    """Images with interior and saturated pixels."""
    pixels = np.random.default_rng(1).uniform(-0.2, 1.2, (BATCH, SIDE, SIDE, 3))
    return jnp.asarray(np.clip(pixels, 0, 1), jnp.float32)


def _linear(weights, bias, fails_below, x):
    logits = (x.reshape(x.shape[0], -1) - 0.5) @ weights + bias
    dark = jnp.mean(x[:, 0], axis=(1, 2)) < fails_below
    return jnp.where(dark[:, None], jnp.nan, logits)


def linear_model(*, scale: float = 1.0, bias: Any = 0.0, fails_below: float = -1.0):
    """A linear model, NaN for images that are darker than `fails_below` in their first row.

    All of these share one compiled program.
    """
    weights = scale * jax.random.normal(jax.random.key(0), (SIDE * SIDE * 3, CLASSES)) * 0.05
    bias = jnp.broadcast_to(jnp.asarray(bias, jnp.float32), (CLASSES,))
    return Partial(_linear, weights, bias, jnp.float32(fails_below))


class Stock(nnx.Module):
    """Stride, batch norm, depthwise convolution, max-pool, dense."""

    def __init__(self, rngs):
        self.first = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.second = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.dense = nnx.Linear(8 * 16, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x - 0.5)))
        x = nnx.max_pool(nnx.relu(self.second(x)), (2, 2), (2, 2))
        return 10 * self.dense(x.reshape(x.shape[0], -1))


def bound_network():
    def apply(params, x, tap):
        conv = functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = tap("one", jax.nn.gelu(conv((x - 0.5) / 0.25, params["one"], (2, 2), "SAME")))
        x = tap("two", jax.nn.gelu(conv(x, params["two"], (1, 1), ((1, 1), (1, 1)))))
        return jnp.mean(x, axis=(1, 2)) @ params["fc"] + params["bias"]

    shapes = {"one": (5, 5, 3, 6), "two": (3, 3, 6, 7), "fc": (7, CLASSES)}
    params = {
        name: jax.random.normal(jax.random.key(i), shape) * (3 if name == "fc" else 0.15)
        for i, (name, shape) in enumerate(shapes.items())
    }
    network = Network(name="small", apply=apply, nodes=("one", "two"), image_size=SIDE, classes=CLASSES)
    # Centred, so that several classes are within reach of a small perturbation.
    logits = network.bind({**params, "bias": jnp.zeros(CLASSES)})(some_images())
    return network.bind({**params, "bias": -jnp.mean(logits, axis=0)})


def two_networks():
    """An ensemble of linear networks of two input sizes."""

    def member(size, seed):
        weights = jax.random.normal(jax.random.key(seed), (size * size * 3, CLASSES)) * 0.8 / size
        network = Network(f"of {size}", lambda params, x: (x.reshape(len(x), -1) - 0.5) @ params, (), size, CLASSES)
        return network, weights

    network, params = ensemble.of([member(SIDE, 0), member(12, 1)])
    return network.bind(params)


class Problem(NamedTuple):
    model: Any
    images: jax.Array
    labels: jax.Array
    targets: jax.Array | None

    def take(self, rows) -> "Problem":
        rows = np.asarray(rows)
        targets = None if self.targets is None else self.targets[rows]
        return self._replace(images=self.images[rows], labels=self.labels[rows], targets=targets)


PROBLEMS = ("linear", "stock", "network-targeted", "ensemble-targeted")
SMALL = ("linear", "network-targeted")  # where other programs must be compiled


@functools.cache
def problem(name: str) -> Problem:
    """Images labelled with what the model says; targets of all other classes."""
    kind, _, targeted = name.partition("-")
    made = {"linear": linear_model, "stock": lambda: Stock(nnx.Rngs(0)), "network": bound_network}
    model = {**made, "ensemble": two_networks}[kind]()
    images = some_images()
    labels = jnp.argmax(model(images), axis=-1)
    targets = (labels + 1 + jnp.arange(BATCH) % (CLASSES - 1)) % CLASSES
    return Problem(model, images, labels, targets if targeted else None)


def attack_on(case: str | Attack, p: Problem, **kwargs) -> AttackResult:
    attack = CASES[case] if isinstance(case, str) else case
    return run(attack, p.model, p.images, p.labels, p.targets, **{"key": KEY, "compact": compact(attack), **kwargs})


def compact(attack: Attack) -> bool:
    """Further programs, for smaller batches of what is unfinished: of HopSkipJump for one of the two norms."""
    return not (isinstance(attack, HopSkipJump) and attack.norm == "l2")


@functools.cache
def solved(case: str, name: str) -> AttackResult:
    return attack_on(case, problem(name))


def assert_same(actual, expected):
    """Pytrees of equal structure, equal to the last bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, leaf), other in pairs:
        a, b = np.asarray(leaf), np.asarray(other)
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(a, b, err_msg=str(path))
        assert a.tobytes() == b.tobytes(), path


def rows_of(tree, rows):
    """Those examples of a result."""
    return jax.tree.map(lambda x: np.asarray(x)[np.array(rows)], tree)


@jax.jit
def alternating(a, b):
    """Every other example of `a`, and of `b` those between: keys, too, which NumPy does not know."""
    return jnp.where((np.arange(BATCH) % 2 == 0).reshape(-1, *[1] * (a.ndim - 1)), a, b)


def strong(case):
    """The attack with settings with which it succeeds everywhere."""
    return dataclasses.replace(CASES[case], **(LARGER.get(case) or {"eps": 8 * CASES[case].eps}))


def assert_obeys(case: Any, p: Problem, result: AttackResult, support=None, kappa: float = 0.0):
    """Rules 2 and 3 on the returned images, judged by NumPy and a forward pass of their own."""
    attack = CASES[case] if isinstance(case, str) else case
    images, original = np.asarray(result.images), np.asarray(p.images)
    success = np.asarray(result.success)
    assert np.isfinite(images).all()
    assert images.min() >= 0
    assert images.max() <= 1
    delta = images.astype(np.float64) - original
    flat = delta.reshape(len(delta), -1)
    np.testing.assert_array_equal(result.l0, (flat != 0).sum(1))
    np.testing.assert_allclose(result.l1, np.abs(flat).sum(1), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(result.l2, np.sqrt((flat**2).sum(1)), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(result.linf, np.abs(flat).max(1), rtol=1e-5, atol=1e-7)
    if hasattr(attack, "eps"):
        order = {"linf": np.inf, "l2": 2, "l1": 1}[getattr(attack, "norm", "linf")]
        size = np.linalg.norm(flat, ord=order, axis=1)
        assert (size <= 1.0001 * np.asarray(attack.eps)).all()
    if support is not None:
        assert not delta[~np.broadcast_to(support, delta.shape)].any()
    assert not delta[~success].any()
    assert ((np.asarray(result.iterations) >= 0) == success).all()

    logits = np.array(p.model(jnp.asarray(images)), np.float64)
    rows = np.arange(len(logits))
    chosen = np.asarray(p.labels if p.targets is None else p.targets)
    own = logits[rows, chosen].copy()
    predicted = logits.argmax(1)
    logits[rows, chosen] = -np.inf
    margin = logits.max(1) - own if p.targets is None else own - logits.max(1)
    assert ((predicted != chosen) if p.targets is None else (predicted == chosen))[success].all()
    assert (margin >= kappa)[success].all()


# Nearly all of the time goes into compiling, and every rule needs programs of its own for every attack; compiling them
# all takes an hour (make exhaustive). Whenever the tests run, the attacks of the paper and PGD are put to every rule,
# and of every other family one to those that need no more programs than a whole batch of the linear problem does.
PAPER = ("ifgsm", "pgd-linf", "cw", "ead", "strattack")
KINDS = (
    *PAPER,
    *("fgsm", "mifgsm", "apgd-linf", "spsa", "fmn-l2", "deepfool-l2", "fab-l2", "square-linf", "chain"),
    *("hopskipjump-l2", "cw-linf", "transparent-text-faintest", "spgd", "watermark-haar", "key-pixels"),
)
# Where an example is alone, and on many devices: one that draws in every step, too.
SPREAD = (*PAPER, "square-linf", "pgd-l2", "hopskipjump-l2")
# Stored between steps, which for HopSkipJump takes further programs.
CUT = tuple(case for case in KINDS if case != "hopskipjump-l2")
# A stock module is differentiated as the others are.
STOCK = ("ifgsm",)
# What the driver, not the attack, sees to: without a search and with one.
TWO = ("ifgsm", "cw")


def _case(case, *more, always):
    return pytest.param(case, *more, marks=() if always else (pytest.mark.exhaustive,))


def _attacks(chosen, cases=tuple(CASES)):
    return pytest.mark.parametrize("case", [_case(case, always=case in chosen) for case in cases])


def each_attack(test):
    return _attacks(KINDS)(test)


def spread_attacks(test):
    return _attacks(SPREAD)(test)


def some_attacks(test):
    return _attacks(PAPER)(test)


def two_attacks(test):
    return _attacks(TWO)(test)


def each_attack_over(problems, *, kinds=KINDS, targeted=PAPER):
    """On the linear problem those of `kinds`, on the others fewer; the rest with --exhaustive."""
    chosen = {"linear": kinds, "stock": STOCK, "network-targeted": targeted, "ensemble-targeted": ()}
    pairs = [_case(case, name, always=case in chosen[name]) for case in CASES for name in problems]
    return pytest.mark.parametrize(("case", "name"), pairs)


def test_every_attack_of_the_registry_is_tested():
    assert {type(attack) for attack in CASES.values()} == {*ATTACKS.values(), Chain}
    assert CASES.keys() == SWEEPS.keys()


@spread_attacks
def test_these_attacks_are_compiled_as_users_have_it(case):
    assert not jax.config.read("jax_disable_most_optimizations")


# Rule 1: an example's result is its own


@each_attack_over(PROBLEMS, kinds=SPREAD, targeted=())
def test_a_batch_is_runs_of_one(case, name):
    p, whole = problem(name), solved(case, name)
    for i in range(BATCH):
        assert_same(attack_on(case, p.take([i])), rows_of(whole, [i]))


@each_attack_over(PROBLEMS)
def test_neither_order_nor_neighbours_matter(case, name):
    p, whole = problem(name), solved(case, name)
    for rows in ([5, 2, 7, 0, 4, 1, 3, 6], [3, 3, 3, 6, 3, 3, 3, 3]):
        assert_same(attack_on(case, p.take(rows)), rows_of(whole, rows))


@two_attacks
def test_an_odd_batch_is_part_of_a_larger_one(case):
    rows = [6, 1, 4]
    part = attack_on(case, problem("network-targeted").take(rows))
    assert_same(part, rows_of(solved(case, "network-targeted"), rows))


@each_attack_over(SMALL, kinds=SPREAD, targeted=())
def test_eight_devices_give_what_one_gives(case, name):
    p = problem(name)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(p.images, NamedSharding(mesh, PartitionSpec("data")))
    result = attack_on(case, p._replace(images=spread))
    assert len(result.images.sharding.device_set) == 8
    assert_same(result, solved(case, name))


@_attacks(["pgd-linf"], ["pgd-linf", "cw", "fab-l2"])
@pytest.mark.parametrize(("shape", "spec"), [((8,), ("a",)), ((1,), ("a",)), ((2, 2), ("b",)), ((2, 2), (("a", "b"),))])
def test_a_mesh_may_have_explicit_axes(case, shape, spec):
    """As those of `jax.make_mesh` are by default, with which JAX asks every operation where its result is."""
    p, name = problem("linear"), "ab"[: len(shape)]
    mesh = jax.make_mesh(shape, tuple(name), axis_types=(AxisType.Explicit,) * len(shape))
    spread = p._replace(images=jax.device_put(p.images, NamedSharding(mesh, PartitionSpec(*spec))))
    result = attack_on(case, spread)
    assert_same(result, solved(case, "linear"))
    assert len(result.images.sharding.device_set) == mesh.size
    np.testing.assert_array_equal(result.images - spread.images, np.asarray(result.images) - np.asarray(p.images))
    with jax.set_mesh(mesh):
        assert_same(attack_on(case, p), solved(case, "linear"))
        assert jax.sharding.get_mesh() == mesh
    with pytest.raises(ValueError, match="the axes of a mesh must be automatic"):
        jax.jit(lambda images: attack_on(case, p._replace(images=images)).images)(spread.images)


def test_a_loss_on_adversarial_images_has_a_gradient_outside_of_jit():
    """The loss of adversarial training, whose parameters the attack on it sees as tracers."""
    p = problem("linear")

    def loss(model):
        adversarial = lax.stop_gradient(run(PGD(eps=0.1, steps=3), model, p.images, p.labels, key=KEY).images)
        return jnp.mean(objective.log_odds(model(adversarial), p.labels))

    eager, compiled = jax.tree.leaves(jax.grad(loss)(p.model)), jax.tree.leaves(jax.jit(jax.grad(loss))(p.model))
    assert any(np.any(leaf) for leaf in eager)
    for one, other in zip(eager, compiled, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@spread_attacks
def test_a_hyper_parameter_for_every_example_is_separate_runs_on_any_devices(case):
    p, field = problem("linear"), SWEEPS[case]
    values = np.linspace(0.2, 2, BATCH, dtype=np.float32) * getattr(CASES[case], field)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = p._replace(images=jax.device_put(p.images, NamedSharding(mesh, PartitionSpec("data"))))
    together = attack_on(dataclasses.replace(CASES[case], **{field: jnp.asarray(values)}), p)
    assert_same(attack_on(dataclasses.replace(CASES[case], **{field: jnp.asarray(values)}), spread), together)
    for i, value in enumerate(values):
        alone = attack_on(dataclasses.replace(CASES[case], **{field: float(value)}), p.take([i]))
        assert_same(alone, rows_of(together, [i]))


# Rules 2 and 3: what is returned


@each_attack_over(PROBLEMS)
def test_results_lie_in_box_and_ball_and_succeed_as_they_say(case, name):
    result = solved(case, name)
    assert np.asarray(result.success).any()
    assert_obeys(case, problem(name), result)


@each_attack_over(PROBLEMS)
def test_confidence_is_honoured(case, name):
    p = problem(name)
    attack = dataclasses.replace(strong(case) if case in WEAK else CASES[case], kappa=0.2)
    result = attack_on(attack, p)
    assert np.asarray(result.success).any()
    assert_obeys(attack, p, result, kappa=0.2)


@each_attack_over(PROBLEMS)
def test_failure_returns_the_original(case, name):
    result = attack_on(dataclasses.replace(CASES[case], kappa=1e6), problem(name))
    assert not np.asarray(result.success).any()
    np.testing.assert_array_equal(result.images, problem(name).images)
    np.testing.assert_array_equal(result.iterations, -1)


@_attacks((*PAPER, "cw-l0", "key-pixels"))
def test_nothing_changes_off_the_support(case):
    p = problem("network-targeted")
    support = np.zeros((BATCH, SIDE, SIDE, 3), bool)
    support[:, :, 3:] = True
    support[:, :4, 3:, 1] = False  # some channels of a pixel
    stronger = dataclasses.replace(CASES[case], **{SWEEPS[case]: 2 * getattr(CASES[case], SWEEPS[case])})
    result = attack_on(stronger, p, support=support)
    assert np.asarray(result.success).any()
    assert_obeys(stronger, p, result, support=support)
    # 0 and 1 in any shape that broadcasts mean the same.
    assert_same(attack_on(stronger, p, support=support[:1].astype(np.float32)), result)


@some_attacks
def test_no_support_at_all_returns_the_original(case):
    p = problem("network-targeted")
    result = attack_on(case, p, support=np.zeros((BATCH, SIDE, SIDE, 1), bool))
    assert not np.asarray(result.success).any()
    np.testing.assert_array_equal(result.images, p.images)


@_attacks(KINDS, [case for case, attack in CASES.items() if hasattr(attack, "eps")])
def test_radius_zero_returns_the_input(case):
    p = problem("linear")
    result = attack_on(dataclasses.replace(CASES[case], eps=0.0), p)
    np.testing.assert_array_equal(result.images, p.images)
    assert not np.asarray(result.success).any()


@each_attack
def test_pixels_at_zero_and_one_can_move(case):
    p = problem("linear")
    images = jnp.round(p.images)
    labels = jnp.argmax(p.model(images), axis=-1)
    p = p._replace(images=images, labels=labels)
    result = attack_on(strong(case), p)
    assert np.asarray(result.success).all()
    assert_obeys(strong(case), p, result)
    moved = np.abs(np.asarray(result.images) - images) > 1e-3
    for value in (0, 1):
        assert (moved & (np.asarray(images) == value)).any(axis=(1, 2, 3)).all()


@each_attack_over(PROBLEMS)
def test_an_adversarial_input_is_a_success(case, name):
    p = problem(name)
    predicted = p.labels
    p = p._replace(labels=(predicted + 1) % CLASSES, targets=None if p.targets is None else predicted)
    result = attack_on(case, p)
    assert np.asarray(result.success).all()
    assert_obeys(case, p, result)
    if case in MINIMAL:  # the nearest adversarial image is the input
        np.testing.assert_array_equal(result.images, p.images)
        # One look at it, or one step, which tests a point and takes a gradient.
        steps = {"cw": (1, 1), "scw": (1, 1), "ead": (2, 1), "strattack": (2, 1)}
        forward, backward = steps.get(CASES[case].name, (1, 0))
        np.testing.assert_array_equal(result.forward, forward)
        np.testing.assert_array_equal(result.backward, backward)
    if case == "ifgsm":
        np.testing.assert_array_equal(result.iterations, 0)


# Rule 4: logits that are shifted, constant, or not numbers


@each_attack
def test_a_constant_added_to_all_logits_changes_nothing(case):
    p, expected = problem("linear"), solved(case, "linear")
    for shift in (64.0, -200.0):  # with -200, all logits are negative
        shifted = linear_model(bias=shift)
        result = attack_on(case, p._replace(model=shifted))
        assert (np.asarray(shifted(result.images)) * np.sign(shift) > 0).all()
        np.testing.assert_array_equal(result.success, expected.success)
        # The others return any success in their ball, or draw what to try next: which one, rounding may decide.
        if case in MINIMAL - BLACK_BOX:
            for distance in ("l2", "linf"):
                np.testing.assert_allclose(getattr(result, distance), getattr(expected, distance), atol=1e-3)


@two_attacks
def test_a_gradient_that_is_not_a_number_at_one_pixel_spoils_only_that_pixel(case):
    p = problem("linear")

    def singular(model, x):  # finite, and infinity times zero in the derivative at the first pixel
        return model(x) + 0.0 * jnp.sqrt(0.0 * x[:, 0, 0, :1])

    result = attack_on(case, p._replace(model=Partial(singular, p.model)))
    assert np.asarray(result.success).any()
    assert_obeys(case, p, result)


@each_attack
def test_zero_gradients_leave_a_finite_result(case):
    p = problem("linear")
    constant = linear_model(scale=0.0, bias=jax.nn.one_hot(0, CLASSES))
    result = attack_on(case, p._replace(model=constant, labels=jnp.zeros(BATCH, jnp.int32)))
    assert not np.asarray(result.success).any()
    np.testing.assert_array_equal(result.images, p.images)


@each_attack
def test_logits_that_are_not_numbers_leave_a_finite_result(case):
    p, expected = problem("linear"), solved(case, "linear")
    sick = np.array([0, 1, 0, 1, 0, 0, 0, 1], bool)
    # The network fails on images that are dark on average in their first row.
    images = jnp.where(sick[:, None, None, None] & (np.arange(SIDE) == 0)[:, None, None], 0, p.images)
    kept = p.images.at[:, 0].set(jnp.where(sick[:, None, None], 0, p.images[:, 0]))
    np.testing.assert_array_equal(images, kept)

    result = attack_on(case, p._replace(model=linear_model(fails_below=0.2), images=images))
    assert_obeys(case, p._replace(model=linear_model(fails_below=0.2), images=images), result)
    if not case.startswith("hopskipjump"):  # which comes from noise, where the network is well
        assert not np.asarray(result.success)[sick].any()
        np.testing.assert_array_equal(np.asarray(result.images)[sick], np.asarray(images)[sick])
    if case in TRANSFORMING:  # to the others, too, it shows dark rows
        return
    # Its neighbours are attacked as if it were not there.
    np.testing.assert_array_equal(np.asarray(result.success)[~sick], np.asarray(expected.success)[~sick])
    np.testing.assert_allclose(np.asarray(result.l2)[~sick], np.asarray(expected.l2)[~sick], rtol=1e-5)


# Rule 5: a run can be cut into pieces


@each_attack_over(SMALL, kinds=TWO, targeted=())
def test_run_is_one_program_and_a_loop_of_steps(case, name):
    attack, p, expected = CASES[case], problem(name), solved(case, name)
    arguments = (p.model, p.images, p.labels, p.targets)
    assert_same(jax.jit(functools.partial(run, key=KEY))(attack, *arguments), expected)

    step, state = jax.jit(type(attack).step), start(attack, *arguments, key=KEY)
    for _ in range(attack.iterations):
        state = step(attack, p.model, state)
    assert finished(state)
    assert_same(finish(attack, state), expected)


@each_attack_over(SMALL, kinds=CUT)
def test_run_is_chunks_with_the_state_stored_in_between(case, name, tmp_path):
    attack, p, expected = CASES[case], problem(name), solved(case, name)
    first = start(attack, p.model, p.images, p.labels, p.targets, key=KEY)
    assert not finished(first)

    state = advance(attack, p.model, first, FEW[case])
    leaves, structure = jax.tree.flatten(state)
    assert not finished(state)
    np.savez(tmp_path / "state.npz", *map(np.asarray, leaves))
    with np.load(tmp_path / "state.npz") as stored:
        restored = jax.tree.unflatten(structure, [jnp.asarray(stored[f"arr_{i}"]) for i in range(len(leaves))])
    while not finished(restored):
        restored = advance(attack, p.model, restored, FEW[case])
    assert_same(finish(attack, restored), expected)
    np.testing.assert_array_equal(restored.examples.labels, p.labels)
    if p.targets is not None:
        np.testing.assert_array_equal(restored.examples.targets, p.targets)

    # Nothing that is finished changes.
    assert_same(finish(attack, advance(attack, p.model, restored, 2)), expected)


@_attacks(CUT)
def test_a_finished_example_stays_as_it_is_beside_one_that_goes_on(case):
    """States of different progress can be put into one batch, as an example's place in its search is its own."""
    attack, p, expected = CASES[case], problem("linear"), solved(case, "linear")
    first = start(attack, p.model, p.images, p.labels, key=KEY)
    ahead = advance(attack, p.model, first, attack.iterations - 1)
    mixed = jax.tree.map(alternating, first, ahead)
    assert_same(finish(attack, advance(attack, p.model, mixed)), expected)


@each_attack_over(SMALL)
def test_arguments_are_left_alone(case, name):
    p = problem(name)
    arrays = [np.array(x) for x in p[1:] if x is not None]
    given = [x.copy() for x in arrays]
    run(CASES[case], p.model, *arrays, key=KEY, compact=compact(CASES[case]))
    for before, after in zip(given, arrays, strict=True):
        np.testing.assert_array_equal(before, after)


# What it costs, and what is compiled


@some_attacks
def test_passes_are_counted_as_they_run(case):
    counts = {"forward": 0, "backward": 0}

    def counted(name, rows=1):
        counts[name] += rows

    @jax.custom_vjp
    def probe(x):
        jax.debug.callback(functools.partial(counted, "forward", x.shape[0]))
        return x

    def forward(x):
        return probe(x), None

    def backward(_, g):
        jax.debug.callback(functools.partial(counted, "backward"))
        return (g,)

    probe.defvjp(forward, backward)
    p, attack = problem("linear-targeted").take([2]), CASES[case]
    if hasattr(attack, "population"):  # what follows a success in a population is not counted
        attack = dataclasses.replace(attack, population=1)
    result = attack_on(attack, p._replace(model=Partial(lambda model, x: model(probe(x)), p.model)))
    jax.block_until_ready(result)
    jax.effects_barrier()
    assert counts == {"forward": int(result.forward[0]), "backward": int(result.backward[0])}
    assert (counts["backward"] > 0) == (case not in BLACK_BOX)


@_attacks((*PAPER, "mifgsm"), [case for case, attack in CASES.items() if hasattr(attack, "stop_on_success")])
def test_stopping_at_success_saves_passes(case):
    p = problem("linear")
    attack = dataclasses.replace(CASES[case], stop_on_success=True)
    result, whole = attack_on(attack, p), attack_on(dataclasses.replace(attack, stop_on_success=False), p)
    success = np.asarray(whole.success)
    np.testing.assert_array_equal(result.success, success)
    np.testing.assert_array_equal(result.iterations, whole.iterations)
    assert (np.asarray(result.forward) <= np.asarray(whole.forward)).all()
    assert (np.asarray(result.forward) < np.asarray(whole.forward)).any()
    if np.asarray(whole.forward).max() == attack.iterations:  # one pass an iteration
        np.testing.assert_array_equal(
            np.asarray(result.forward), np.where(success, np.asarray(whole.iterations) + 1, attack.iterations)
        )
    assert_obeys(attack, p, result)


class Traces:
    """A model that counts how often it is traced."""

    def __init__(self, model):
        self.model, self.count = model, 0

    def __call__(self, x):
        self.count += 1
        return self.model(x)

    def during(self, function, *args):
        before = self.count
        jax.block_until_ready(function(*args))
        return self.count - before


@two_attacks
def test_two_values_share_one_program(case):
    p, field = problem("linear"), SWEEPS[case]
    model = Traces(p.model)

    def with_value(value):
        attack_on(dataclasses.replace(CASES[case], **{field: value}), p._replace(model=model))

    value = getattr(CASES[case], field)
    first = model.during(with_value, value)
    again = model.during(with_value, value)
    assert first > again
    for other in (2 * value, jnp.float32(3 * value), jnp.full(BATCH, value), np.float64(value)):
        assert model.during(with_value, other) <= again


@two_attacks
def test_a_sweep_is_one_program_and_separate_runs(case):
    p, field = problem("network-targeted"), SWEEPS[case]
    model = Traces(p.model)

    def one(value):
        return attack_on(dataclasses.replace(CASES[case], **{field: value}), p._replace(model=model))

    sweep = jax.jit(jax.vmap(one))
    values = jnp.asarray([0.5, 1.0, 2.0]) * getattr(CASES[case], field)
    together = sweep(values)
    for i in range(3):
        alone = attack_on(dataclasses.replace(CASES[case], **{field: values[i]}), p)
        one_of = jax.tree.map(lambda x, i=i: np.asarray(x[i]), together)
        for exact in ("success", "iterations", "forward", "backward"):
            np.testing.assert_array_equal(getattr(one_of, exact), getattr(alone, exact))
        # Another shape is other machine code, which may round a product and a sum once or twice.
        for distance in ("l1", "l2", "linf"):
            np.testing.assert_allclose(getattr(one_of, distance), getattr(alone, distance), rtol=1e-3)
        assert (np.abs(one_of.images - np.asarray(alone.images)) < 1e-4).mean() > 0.999
    assert model.during(sweep, 1.5 * values) == 0


# Randomness


@_attacks((*PAPER, "spsa", "square-linf", "hopskipjump-l2"))
def test_keys_decide_random_starts_and_nothing_else(case):
    p = problem("linear")

    def state(key, **kwargs):
        return start(CASES[case], p.model, p.images, p.labels, key=jax.random.key(key), **kwargs)

    assert_same(state(0), state(0))
    if case == "apgdt":  # its rivals are ranked before it starts
        first, other = (advance(CASES[case], p.model, state(key), 1, compact=False).images for key in (0, 1))
        assert np.mean(np.asarray(first != other)) > 0.5
        return
    random = getattr(CASES[case], "random_start", False)
    if not random and (getattr(CASES[case], "restarts", 1) or 2) > 1:
        return  # keys are for later
    if not random and getattr(state(0), "keys", None) is not None:  # drawn from in every step
        attack = strong(case) if case in WEAK else case
        drawn = [attack_on(attack, p, key=jax.random.key(i)) for i in (0, 1)]
        assert (np.asarray(drawn[0].images) != drawn[1].images).any(axis=(1, 2, 3)).sum() > BATCH / 2
        return
    if not random:
        assert_same(state(0), state(1))
        return
    base, other = np.asarray(state(0).images), np.asarray(state(1).images)
    assert (base != other).mean() > 0.5
    offsets = base - np.asarray(p.images)
    assert (offsets[0] != offsets[1]).mean() > 0.5  # examples draw their own

    # Ids in place of pixels: the same id draws the same numbers, whatever the pixels.
    ids = np.array([7, 7, 1, 2, 3, 4, 5, 2**31 - 1])
    interior = p._replace(images=0.25 + 0.5 * p.images)
    drawn = np.asarray(
        start(CASES[case], p.model, interior.images, p.labels, key=KEY, ids=ids).images - interior.images
    )
    np.testing.assert_allclose(drawn[0], drawn[1], atol=1e-6)
    far = np.abs(drawn[:, None] - drawn[None]).max(axis=(2, 3, 4)) > 1e-3
    np.testing.assert_array_equal(far, ids[:, None] != ids[None])
    rows = np.array([3, 0, 7])
    some = interior.take(rows)
    part = start(CASES[case], p.model, some.images, some.labels, key=KEY, ids=ids[rows])
    np.testing.assert_array_equal(np.asarray(part.images - some.images), drawn[rows])


# 64 bits


@each_attack
def test_states_have_32_bits_whatever_the_default(case):
    """With jax_enable_x64, too, a step keeps the types of the state, which a loop needs; nothing is compiled."""
    p = problem("network-targeted" if case in ("apgdt", "autoattack") else "linear")

    def types(attack, model, problem):
        def begin(images, labels, keys):
            return attack.init(model, images, labels, None, keys)

        first = jax.eval_shape(begin, *problem)
        after = jax.eval_shape(attack.step, model, first)
        found = first, after, jax.eval_shape(attack.result, after)
        return [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in found]

    attack = jax.tree.map(jnp.asarray, by_example(coerce(CASES[case]), BATCH))  # as programs get it
    arguments = p.images, p.labels, example_keys(KEY, p.images)
    expected = types(attack, p.model, arguments)
    with jax.enable_x64(True):
        first, after, result = types(attack, p.model, arguments)
    assert first == after
    assert [first, after, result] == expected


# 16 and 64 bits


@pytest.mark.parametrize("convert", ["half", "double"])
@_attacks(("pgd-linf", "apgd-linf", "apgd-l1", "apgdt", "autoattack", "cw", "ead", "ddn", "spsa", "square-linf"))
def test_logits_may_have_16_or_64_bits(case, convert):
    """A run is traced whole, which stops where a loop or a branch changes types; nothing is compiled."""
    p = problem("network-targeted" if case in ("apgdt", "autoattack") else "linear")
    other = Partial({"half": _half, "double": _double}[convert], p.model)
    with jax.enable_x64(convert == "double"):
        found = jax.eval_shape(
            lambda images: run(CASES[case], other, images, p.labels, key=KEY, compact=False), p.images
        )
    assert [x.dtype for x in (found.images, found.success, found.l2)] == [jnp.float32, jnp.bool_, jnp.float32]


def _half(model, images):
    return model(images).astype(jnp.bfloat16)


def _double(model, images):
    return model(images).astype(jnp.float64)


@pytest.mark.parametrize("case", ["apgd-linf", "ddn"])
def test_16_bits_are_judged_as_they_are(case):
    p = problem("linear")
    half = p._replace(model=Partial(_half, p.model))
    labels = jnp.argmax(half.model(p.images), axis=-1)
    result = attack_on(case, half._replace(labels=labels))
    assert np.asarray(result.success).any()
    classes = jnp.argmax(half.model(result.images), axis=-1)
    np.testing.assert_array_equal(result.success, classes != labels)


@_attacks(["pgd-l2"], ["pgd-linf", "pgd-l2"])
def test_the_same_bits_with_64_bits(case):
    p = problem("linear")
    with jax.enable_x64(True):
        found = attack_on(case, p)
    assert_same(found, solved(case, "linear"))
