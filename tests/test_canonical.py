"""`canonical`: the same values, convolutions in one layout, and results that do not depend on the batch.

Bits are compared on the CPU backend, the only one on which `canonical` does anything.
"""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxinterp import canonical as rewriting
from jaxinterp.canonical import canonical, jitted
from jaxinterp.canonical import rounded as kept

NHWC = ("NHWC", "HWIO", "NHWC")

quick = settings(max_examples=15, deadline=None, derandomize=True)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def assert_close(actual, expected, rtol):
    """Same tree, shapes and types; floats within `rtol` of the largest, everything else equal."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(jax.random.key_data(a), jax.random.key_data(b))
        elif jnp.issubdtype(a.dtype, jnp.floating) and a.size:
            assert a.weak_type == b.weak_type
            largest = np.abs(np.where(np.isfinite(b), b, 0)).max()
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * largest)
        else:
            np.testing.assert_array_equal(a, b)


# The same values

LAYOUTS = [
    ("NCHW", "OIHW", "NCHW"),
    ("NHWC", "HWIO", "NHWC"),
    ("NHWC", "OHWI", "NCHW"),
    ("HWNC", "IHWO", "CHWN"),
    ("NCW", "OIW", "NCW"),
    ("NWC", "WIO", "NWC"),
    ("NCDHW", "OIDHW", "NCDHW"),
    ("NDHWC", "DHWIO", "NDHWC"),
]
SIDES = {3: 64, 4: 14, 5: 7}  # large enough for the rows that need no padding


@quick
@given(
    layout=st.sampled_from(LAYOUTS),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    kernel=st.integers(1, 3),
    padding=st.sampled_from(["SAME", "VALID"]),
    gradient=st.booleans(),
    channels=st.sampled_from([2, 6, 36]),
)
def test_convolutions(layout, stride, dilation, groups, kernel, padding, gradient, channels):
    rank = len(layout[0])
    sizes = {"N": 4, "C": channels, "I": channels // groups, "O": 34}
    x = normal(0, *(sizes.get(axis, SIDES[rank]) for axis in layout[0]))
    k = normal(1, *(sizes.get(axis, kernel) for axis in layout[1]))

    def convolution(x, k):
        return lax.conv_general_dilated(
            x,
            k,
            (stride,) * (rank - 2),
            padding,
            rhs_dilation=(dilation,) * (rank - 2),
            dimension_numbers=layout,
            feature_group_count=groups,
        )

    f = convolution
    if gradient:  # with stride 2 this is a convolution of a dilated input
        cotangent = normal(2, *jax.eval_shape(convolution, x, k).shape)
        f = lambda x, k: jax.vjp(convolution, x, k)[1](cotangent)[0]  # noqa: E731
    actual, expected = jax.jit(canonical(f))(x, k), jax.jit(f)(x, k)
    assert_close(actual, expected, 1e-5)


@settings(quick, max_examples=6)
@given(
    shape=st.tuples(*[st.integers(1, 21)] * 3),
    axes=st.sampled_from([(0,), (1,), (2,), (0, 2), (0, 1, 2)]),
    reduction=st.sampled_from([jnp.sum, jnp.max, jnp.min, jnp.var, jax.nn.logsumexp]),
)
def test_reductions(shape, axes, reduction):
    x = jnp.exp(normal(0, *shape))  # positive, so that a sum does not cancel
    f = lambda x: reduction(x, axis=axes)  # noqa: E731
    program, found = str(jax.make_jaxpr(canonical(f))(x)), jax.jit(canonical(f))(x)
    assert "reduce_sum" not in program
    assert program.count("bitcast_convert_type") == 4 * program.count("reduce_m")  # exact; nothing is taken into them
    if reduction in (jnp.max, jnp.min):
        np.testing.assert_array_equal(found, f(x))
    assert_close(found, f(x), 2e-6)


@quick
@given(
    window=st.tuples(*[st.integers(1, 4)] * 2),
    strides=st.tuples(*[st.integers(1, 3)] * 2),
    dilation=st.tuples(*[st.integers(1, 2)] * 2),
    padding=st.sampled_from(["SAME", "VALID", [(0, 0), (2, 1), (0, 3), (0, 0)]]),
    combine=st.sampled_from([(0.0, lax.add), (-jnp.inf, lax.max), (jnp.inf, lax.min)]),
    gradient=st.booleans(),
)
def test_windows(window, strides, dilation, padding, combine, gradient):
    x, (start, operation) = normal(0, 3, 11, 9, 2), combine
    if operation is not lax.add:
        dilation = (1, 1)  # else its gradient is not known

    def f(x):
        sizes, steps, distances = ((1, *each, 1) for each in (window, strides, dilation))
        return lax.reduce_window(x, start, operation, sizes, steps, padding, window_dilation=distances)

    if gradient and operation is not lax.min:
        inner = f
        f = jax.grad(lambda x: jnp.sum(jnp.sin(inner(x))))
    assert_close(jax.jit(canonical(f))(x), f(x), 2e-6)


@settings(quick, max_examples=10)
@given(
    first=st.booleans(),
    second=st.booleans(),
    sizes=st.tuples(*[st.integers(1, 9)] * 6),
)
def test_products_of_any_dimension_numbers(first, second, sizes):
    """dot_general over two contracted and two batch axes, with the free axes before or after the contracted ones."""
    b1, b2, k1, k2, m, n = sizes
    lhs_shape, lhs_contract = ((b1, k1, k2, m, b2), (1, 2)) if first else ((b1, m, k1, k2, b2), (2, 3))
    rhs_shape, rhs_contract = ((b2, k2, k1, n, b1), (2, 1)) if second else ((b2, n, k2, k1, b1), (3, 2))
    lhs, rhs = normal(0, *lhs_shape), normal(1, *rhs_shape)
    f = lambda a, b: lax.dot_general(a, b, ((lhs_contract, rhs_contract), ((0, 4), (4, 0))))  # noqa: E731
    expected = np.einsum(
        f"{'xijmy' if first else 'xmijy'},{'yjinx' if second else 'ynjix'}->xymn",
        np.asarray(lhs, np.float64),
        np.asarray(rhs, np.float64),
    )
    actual = jax.jit(canonical(f))(lhs, rhs)
    assert actual.shape == expected.shape == (b1, b2, m, n)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@jax.custom_jvp
def softplus(x):
    return jnp.logaddexp(x, 0.0)


softplus.defjvp(lambda primals, tangents: (softplus(*primals), tangents[0] * 7.0))


@jax.custom_vjp
def rounded(x):
    return jnp.round(x)


rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g * 3.0,))

W = normal(3, 5, 5)


def straight(x):
    return jnp.tanh(x @ W).sum(-1)


def solved(b):
    def halved(p):
        return 2 * p + 0.1 * p[:, ::-1]

    def jacobi(_, b):
        return lax.fori_loop(0, 20, lambda _, p: (b - 0.1 * p[:, ::-1]) / 2, b)

    return lax.custom_linear_solve(halved, b, jacobi, symmetric=True) @ W


FUNCTIONS = {
    "jit": lambda x: jax.jit(straight)(x),
    "remat": lambda x: jax.grad(lambda x: jax.checkpoint(straight)(x).sum())(x),
    "remat with a policy": lambda x: jax.grad(
        lambda x: jax.checkpoint(straight, policy=jax.checkpoint_policies.dots_saveable)(x).sum()
    )(x),
    "custom_jvp": lambda x: (softplus(x @ W), jax.grad(lambda x: softplus(x @ W).sum())(x)),
    "custom_vjp": lambda x: (rounded(x @ W), jax.grad(lambda x: rounded(x @ W).sum())(x)),
    "scan": lambda x: lax.scan(lambda c, row: (jnp.tanh(c @ W) + row, c.sum()), x[0], x),
    "gradient of scan": jax.grad(lambda x: lax.scan(lambda c, row: (jnp.tanh(c @ W) + row, c), x[0], x)[1].sum()),
    "while": lambda x: lax.while_loop(
        lambda c: (c[1] < 4) & (c[0].sum() < 1e6), lambda c: (c[0] @ W, c[1] + 1), (x, 0)
    ),
    "fori": lambda x: lax.fori_loop(0, 3, lambda i, c: jnp.sin(c @ W) + i, x),
    "cond": lambda x: lax.cond(x.sum() > 0, lambda x: x @ W, lambda x: x - 1.0, x),
    "switch": lambda x: lax.switch(2, [lambda x: x, lambda x: -x, lambda x: x @ W @ W], x),
    "map": lambda x: lax.map(straight, x),
    "vmap": lambda x: jax.vmap(straight)(x),
    "pytree": lambda x: {"a": [x @ W, (x.sum(), None)], "b": ()},
    "unused and passed through": lambda x: (x, x, 3.0, jnp.ones(2)),
    "complex numbers": lambda x: jnp.abs(jnp.fft.fft(x) * (2 + 1j) + x * 3),
    "argmax and sort": lambda x: (jnp.argmax(x, -1), jnp.sort(x, 0), jnp.cumsum(x, 1), x.prod(1)),
    "linear solve": lambda x: jax.value_and_grad(lambda b: solved(b).sum())(x),
    "platform_dependent": lambda x: lax.platform_dependent(x, cpu=lambda x: x @ W, default=lambda x: x * jnp.nan),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_kind_of_program(name):
    f, x = FUNCTIONS[name], normal(4, 6, 5)
    expected = jax.tree.map(jnp.asarray, f(x))
    assert_close(jax.tree.map(jnp.asarray, canonical(f)(x)), expected, 2e-6)
    assert_close(jax.tree.map(jnp.asarray, jax.jit(canonical(f))(x)), expected, 2e-6)


def test_products_inside_remat_are_rewritten():
    jaxpr = str(jax.make_jaxpr(canonical(jax.checkpoint(straight)))(normal(4, 6, 5)))
    assert re.search(r":f32\[64,64\] = dot_general", jaxpr)
    assert "prevent_cse" in jaxpr, "it still is a checkpoint"


@pytest.mark.parametrize(
    "x",
    [
        np.arange(12, dtype=np.int32).reshape(3, 4),
        np.arange(12, dtype=np.uint8).reshape(3, 4),
        np.arange(12).reshape(3, 4) % 3 == 0,
        np.zeros((0, 4), np.float32),
        np.zeros((3, 0), np.float32),
        np.arange(12).reshape(3, 4).astype(jnp.bfloat16),
        np.full((3, 4), np.nan, np.float32),
        np.array([[np.inf, -np.inf, 1.0, 2.0]], np.float32),
    ],
    ids=["int", "uint8", "bool", "no examples", "no features", "bfloat16", "nan", "inf"],
)
def test_types_and_empty_arrays(x):
    def f(x):
        high = x.max(1) if x.shape[1] else x.sum(1)
        return x.sum(0), x.sum(), high, x.any(), jnp.dot(x, x.T)

    assert_close(canonical(f)(x), jax.tree.map(jnp.asarray, f(jnp.asarray(x))), 1e-6)


@pytest.mark.parametrize("dtype", ["bool", "int8", "int32", "bfloat16", "complex64"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions_of_other_types(dtype, rank):
    x = jnp.asarray(np.arange(2 * 4**rank * 3).reshape(2, *(4,) * rank, 3) % 3).astype(dtype)
    k = jnp.asarray(np.arange(2**rank * 3 * 5).reshape(*(2,) * rank, 3, 5) % 2).astype(dtype)
    axes = "DHW"[-rank:]

    def convolution(x):
        return lax.conv_general_dilated(
            x, k, (1,) * rank, "SAME", dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C")
        )

    assert_close(canonical(convolution)(x), convolution(x), 1e-5)


def test_empty_batch_of_a_network():
    model = nchw()
    assert canonical(model)(jnp.zeros((0, 12, 12, 3))).shape == (0, 10)
    assert jax.grad(lambda x: canonical(model)(x).sum())(jnp.zeros((0, 12, 12, 3))).shape == (0, 12, 12, 3)


def test_keys_and_leaves_that_are_no_arrays():
    def f(options, key, x, scale):
        assert isinstance(options["activation"], str)
        x = {"tanh": jnp.tanh, "sin": jnp.sin}[options["activation"]](x @ W)
        return x * scale + jax.random.normal(key, x.shape), jax.random.split(key)

    args = ({"activation": "sin", "nothing": None}, jax.random.key(7), normal(4, 6, 5), 2.0)
    assert_close(canonical(f)(*args), f(*args), 2e-6)


def test_effects_of_constants_and_references():
    """What has no result, and what is closed over but no array."""
    seen, kept_there = [], jax.new_ref(jnp.ones((3, 4)))

    def function(x):
        jax.debug.callback(seen.append, 2 * jnp.arange(3))
        kept_there[...] = kept_there[...] + 1
        return x * kept_there[...]

    result = jax.jit(canonical(function))(jnp.ones((3, 4)))
    jax.effects_barrier()
    np.testing.assert_array_equal(result, np.full((3, 4), 2.0))
    np.testing.assert_array_equal(seen[0], [0, 2, 4])


def test_weak_types_out_of_loops():
    def function(x):
        return lax.scan(lambda carry, _: (carry * 1.5, carry * 2.5), x, None, length=3)

    actual, expected = (jax.eval_shape(f, 1.0) for f in (canonical(function), function))
    assert jax.tree.map(lambda a: (a.dtype, a.weak_type), actual) == jax.tree.map(
        lambda a: (a.dtype, a.weak_type), expected
    )


def test_transformations_of_the_rewritten_function():
    x = normal(4, 6, 5)
    model = lambda x: jnp.tanh(x @ W).sum(-1)  # noqa: E731
    total = lambda x: model(x).sum()  # noqa: E731
    new = canonical(total)
    assert_close(jax.grad(new)(x), jax.grad(total)(x), 2e-6)
    assert_close(jax.jvp(new, (x,), (x,)), jax.jvp(total, (x,), (x,)), 2e-6)
    assert_close(jax.vmap(canonical(model))(x[None]), model(x)[None], 2e-6)
    assert_close(jax.vmap(jax.grad(new))(x), jax.grad(total)(x), 2e-6)
    assert_close(jax.hessian(new)(x[0]), jax.hessian(total)(x[0]), 1e-5)
    assert_close(jax.jit(canonical(canonical(total)))(x), total(x), 2e-6)
    assert canonical(straight).__name__ == "straight"


# The compiler


def test_own_programs_are_compiled_with_the_convolutions_of_eigen():
    x, k = normal(0, 4, 12, 12, 8), normal(1, 3, 3, 8, 32)

    def convolution(x):
        return lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    text = jitted(convolution).lower(x).compile().as_text() or ""
    assert re.search(r"= f32\S* convolution\(", text)
    assert "ynn" not in text
    assert_close(jitted(convolution)(x), convolution(x), 1e-5)


def test_own_programs_under_the_transformations_of_others():
    """JAX takes options of the compiler at the outermost jit only."""
    x = normal(4, 6, 5)
    own = jitted(lambda x, scale=1.0: jnp.tanh(x @ W).sum(-1) * scale)
    for call in (
        lambda f: f(x, scale=2.0),
        lambda f: jax.jit(lambda x: f(x) + 1)(x),
        lambda f: jax.jit(lambda: f(x) + 1)(),
        lambda f: jax.vmap(f)(x[None]),
        lambda f: jax.grad(lambda x: f(x).sum())(x),
        lambda f: jax.jit(jax.grad(lambda scale: f(x, scale).sum()))(3.0),
        lambda f: lax.map(lambda row: f(row[None])[0], x),
    ):
        assert_close(call(own), call(straight_scaled), 2e-6)
    assert jitted(lambda x, steps: x * steps, static_argnums=1)(x, 2).shape == x.shape
    with pytest.raises(ValueError, match="of the function itself"):
        jitted(lambda x: raises(ValueError("of the function itself")))(x)


def straight_scaled(x, scale=1.0):
    return straight(x) * scale


def raises(error):
    raise error


def test_a_compiler_is_asked_for_what_it_knows_only(monkeypatch):
    module = sys.modules["jaxinterp.canonical"]
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(module, "_OPTIONS", {"xla_no_such_option": "1"})
    assert module._compiler_options.__wrapped__() == {}
    monkeypatch.setattr(module, "_OPTIONS", {"xla_cpu_enable_fast_math": "False"})
    assert module._compiler_options.__wrapped__() == module._OPTIONS
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    assert module._compiler_options.__wrapped__() == {}, "somebody has decided"


# The layout inside loops


def nchw(width: int = 8):
    """A network by hand, in PyTorch's layout."""
    k1, k2, w = normal(0, width, 3, 3, 3) / 5, normal(1, 2 * width, width, 3, 3) / 8, normal(2, 2 * width, 10)

    def model(x):
        def conv(x, k, stride):
            return lax.conv_general_dilated(
                x, k, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NCHW", "OIHW", "NCHW")
            )

        x = jax.nn.relu(conv(x.transpose(0, 3, 1, 2), k1, 1))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        x = jax.nn.silu(conv(x, k2, 2))
        x = (x - x.mean((2, 3), keepdims=True)) * lax.rsqrt(x.var((2, 3), keepdims=True) + 1e-5)
        return x.mean((2, 3)) @ w

    return model


def ascent(rewrite):
    step = rewrite(jax.grad(lambda x: nchw()(x)[:, 0].sum()))

    def loop(x):
        return lax.while_loop(lambda c: c[1] < 3, lambda c: (c[0] + 0.01 * step(c[0]), c[1] + 1), (x, 0))[0]

    return jax.jit(loop)


def test_layout_of_convolutions_in_a_compiled_loop():
    x = normal(5, 4, 16, 16, 3)
    labels = {}
    for name, rewrite in (("canonical", canonical), ("plain", lambda f: f)):
        text = ascent(rewrite).lower(x).compile().as_text() or ""
        labels[name] = re.findall(r" convolution\(.*dim_labels=(\S+?)(?:,|$)", text, re.MULTILINE)
        assert len(labels[name]) >= 3, "two convolutions forward, two backward"
    assert set(labels["canonical"]) == {"b01f_01io->b01f"}
    assert not set(labels["plain"]) <= {"b01f_01io->b01f"}
    assert_close(ascent(canonical)(x), ascent(lambda f: f)(x), 1e-5)


def test_weights_are_known_to_the_compiler():
    """It brings them into the order of the gradient when it compiles, not in every run."""
    kernel, matrix = np.asarray(normal(1, 3, 3, 16, 48)), np.asarray(normal(2, 48, 80))

    def loss(x, kernel, matrix):
        x = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.sum(jnp.tanh(jax.jit(lambda x: nnx.relu(x).mean((1, 2)) @ matrix)(x)))

    def moved(function, *args):
        text = jax.jit(canonical(function)).lower(*args).compile().as_text() or ""
        return [size for size in re.findall(r"= f32\[([\d,]+)\]\S* (?:transpose|reverse|copy)\(", text) if "48" in size]

    x = normal(0, 4, 16, 16, 16)
    assert not moved(jax.grad(lambda x: loss(x, kernel, matrix)), x)
    assert moved(jax.grad(loss), x, kernel, matrix), "those that are arguments it cannot"


# Results that do not depend on the batch


class MLP(nnx.Module):
    def __init__(self, inputs, hidden, classes):
        rngs = nnx.Rngs(0)
        self.first, self.last = nnx.Linear(inputs, hidden, rngs=rngs), nnx.Linear(hidden, classes, rngs=rngs)

    def __call__(self, x):
        return nnx.log_softmax(self.last(nnx.gelu(self.first(x.reshape(x.shape[0], -1)))))


class CNN(nnx.Module):
    def __init__(self, width, classes):
        rngs = nnx.Rngs(0)
        self.conv1 = nnx.Conv(3, width, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(width, use_running_average=True, rngs=rngs)
        self.conv2 = nnx.Conv(width, 2 * width, (3, 3), strides=2, rngs=rngs)
        self.norm2 = nnx.LayerNorm(2 * width, rngs=rngs)
        self.last = nnx.Linear(2 * width, classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.norm1(self.conv1(x))), (2, 2), (2, 2))
        x = nnx.avg_pool(nnx.tanh(self.norm2(self.conv2(x))), (2, 2), (1, 1))
        return nnx.softmax(self.last(x.mean((1, 2))))


class Attention(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Linear(36, 24, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(3, 24, decode=False, rngs=rngs)
        self.last = nnx.Linear(24, 10, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x.reshape(x.shape[0], 12, -1))
        return self.last((x + self.attention(x)).mean(1))


@pytest.mark.parametrize(
    ("size", "channels", "filters", "kernel", "stride"),
    [
        (8, 16, 3, 3, 1),
        (28, 16, 16, 3, 1),
        (13, 32, 16, 1, 1),
        (4, 96, 16, 3, 1),
        (7, 64, 8, 1, 2),
        (9, 3, 12, 5, 2),
        (11, 3, 24, 3, 1),
        (7, 100, 17, 1, 1),
        (1, 30, 40, 1, 1),
        (2, 48, 64, 3, 1),
        (2, 64, 40, 5, 2),
        (1, 64, 64, 3, 1),
    ],
)
def test_convolutions_of_few_channels_do_not_depend_on_the_batch(size, channels, filters, kernel, stride):
    """The libraries behind them compute incomplete tiles of output rows in another order."""
    k, x = normal(0, kernel, kernel, channels, filters), normal(1, 11, size, size, channels)
    convolution = functools.partial(
        lax.conv_general_dilated,
        window_strides=(stride, stride),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    forward = jax.jit(canonical(lambda x: convolution(x, k)))
    out = np.asarray(forward(x))
    gradient = jax.jit(canonical(lambda g: jax.linear_transpose(lambda x: convolution(x, k), x[: len(g)])(g)[0]))
    back = np.asarray(gradient(out))
    for examples in (1, 2, 5, 7):
        np.testing.assert_array_equal(forward(x[-examples:]), out[-examples:], err_msg=f"{examples} examples")
        np.testing.assert_array_equal(gradient(out[:examples]), back[:examples], err_msg=f"{examples} examples")


@pytest.mark.parametrize(
    ("sides", "channels", "filters", "kernel", "stride", "padding"),
    [
        ((12, 12), 48, 32, 3, 1, "FULL"),
        ((8, 8), 128, 16, 3, 1, "FULL"),
        ((13, 13), 96, 100, 7, 3, "VALID"),
        ((10, 16), 40, 64, 3, 1, "VALID"),
        ((2, 9), 64, 48, 3, 1, "SAME"),
        ((33,), 256, 96, 2, 1, "SAME"),
        ((36,), 96, 3, 7, 1, "FULL"),
        ((6, 6, 6), 64, 40, 3, 2, "FULL"),
    ],
)
def test_convolutions_do_not_depend_on_the_batch_with_many_threads(sides, channels, filters, kernel, stride, padding):
    """Eigen divides sums among its threads, of which there are as many as devices, where examples are few."""
    assert len(jax.devices()) >= 8
    rank = len(sides)
    k, x = normal(0, *(kernel,) * rank, channels, filters), normal(1, 5, *sides, channels)
    axes = "DHW"[-rank:]
    convolution = functools.partial(
        lax.conv_general_dilated,
        window_strides=(stride,) * rank,
        padding=[(kernel - 1, kernel - 1)] * rank if padding == "FULL" else padding,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
    )
    forward = jax.jit(canonical(lambda x: convolution(x, k)))
    out = np.asarray(forward(x))
    assert_close(forward(x), convolution(x, k), 1e-5)
    gradient = jax.jit(canonical(lambda g: jax.linear_transpose(lambda x: convolution(x, k), x[: len(g)])(g)[0]))
    back = np.asarray(gradient(out))
    for examples in (1, 2, 3):
        np.testing.assert_array_equal(forward(x[-examples:]), out[-examples:], err_msg=f"{examples} examples")
        np.testing.assert_array_equal(gradient(out[:examples]), back[:examples], err_msg=f"{examples} examples")


def convolved(x, k, stride, dilation, padding):
    return lax.conv_general_dilated(x, k, stride, padding, rhs_dilation=dilation, dimension_numbers=NHWC)


@pytest.fixture
def wide(monkeypatch):
    """Puts the examples of every convolution side by side for which that is possible."""
    monkeypatch.setattr(rewriting, "_WORTH_THREADS", 0)
    monkeypatch.setattr(rewriting, "_threads", lambda: 1 << 20)


def batches(function, *args):
    """The examples in each of the convolutions of a function, in its canonical form."""
    jaxpr = jax.make_jaxpr(canonical(function))(*args)
    return [eqn.invars[0].aval.shape[0] for eqn in jaxpr.eqns if eqn.primitive.name == "conv_general_dilated"]


@pytest.mark.parametrize(
    ("sides", "channels", "filters", "kernel", "stride", "dilation", "padding"),
    [
        ((10, 10), 24, 32, (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1))),
        ((12, 12), 32, 40, (3, 3), (1, 1), (1, 1), ((0, 0), (0, 0))),
        ((13, 14), 20, 64, (3, 3), (2, 2), (1, 1), ((0, 1), (0, 1))),
        ((23, 24), 3, 64, (7, 7), (2, 2), (1, 1), ((3, 3), (3, 3))),
        ((9, 11), 16, 32, (3, 3), (1, 1), (2, 2), ((2, 2), (2, 2))),
        ((1, 17), 32, 48, (1, 5), (1, 3), (1, 1), ((0, 0), (2, 2))),
        ((8, 7), 16, 32, (2, 4), (1, 1), (1, 1), ((1, 0), (3, 0))),
        ((40, 2), 64, 32, (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1))),
        ((16, 12), 16, 32, (4, 4), (4, 4), (1, 1), ((0, 0), (0, 0))),
    ],
)
def test_convolutions_with_examples_side_by_side_have_the_same_bits(
    request, sides, channels, filters, kernel, stride, dilation, padding
):
    k, x = normal(0, *kernel, channels, filters), normal(1, 6, *sides, channels)

    convolution = functools.partial(convolved, k=k, stride=stride, dilation=dilation, padding=padding)

    apart = np.asarray(jax.jit(canonical(convolution))(x))
    assert 1 not in batches(convolution, x)
    request.getfixturevalue("wide")
    beside = jax.jit(canonical(lambda x: convolution(x)))
    assert batches(convolution, x) == [1]
    np.testing.assert_array_equal(beside(x), apart)
    for examples in (1, 2, 5):
        np.testing.assert_array_equal(beside(x[-examples:]), apart[-examples:], err_msg=f"{examples} examples")
    # What is in one image stays there.
    for bad in (np.nan, np.inf):
        found = np.asarray(beside(x.at[2].set(bad)))
        np.testing.assert_array_equal(np.delete(found, 2, axis=0), np.delete(apart, 2, axis=0))
        assert not np.isfinite(found[2]).any()


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(
    ("sides", "channels", "filters", "kernel", "stride", "dilation", "padding"),
    [
        ((2, 1), 48, 8, (2, 2), (2, 1), (1, 2), ((1, 0), (2, 0))),
        ((5, 1), 64, 8, (2, 3), (1, 1), (1, 1), ((1, 0), (2, 0))),
        ((2, 6), 3, 16, (2, 3), (2, 3), (1, 1), ((1, 1), (0, 0))),
        ((3, 6), 128, 5, (3, 2), (1, 2), (1, 2), ((1, 0), (1, 2))),
    ],
)
def test_examples_lie_side_by_side_only_where_that_changes_no_bit(
    sides, channels, filters, kernel, stride, dilation, padding
):
    """Few rows are summed in another order."""
    k, x = normal(0, *kernel, channels, filters), normal(1, 3, *sides, channels)

    convolution = functools.partial(convolved, k=k, stride=stride, dilation=dilation, padding=padding)

    assert 1 not in batches(convolution, x)
    found = jax.jit(canonical(convolution))(x)
    assert_close(found, convolution(x), 1e-5)
    for examples in (1, 2):
        np.testing.assert_array_equal(jax.jit(canonical(convolution))(x[:examples]), found[:examples])


def test_where_examples_lie_side_by_side(monkeypatch):
    """For convolutions that are large enough and would not have all threads otherwise."""

    def found(batch, side, channels, filters, threads):
        monkeypatch.setattr(rewriting, "_threads", lambda: threads)
        x, k = jnp.zeros((batch, side, side, channels)), jnp.zeros((3, 3, channels, filters))
        return batches(lambda x, k: lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=NHWC), x, k)

    assert found(16, 32, 64, 64, threads=2) == [1]
    assert found(16, 32, 64, 64, threads=1) == [16]
    assert found(1, 128, 64, 64, threads=2) == [1]
    assert found(16, 6, 64, 64, threads=2) == [16], "too small"
    assert found(16, 16, 128, 128, threads=2) == [16], "the channels are enough for two"
    assert found(16, 16, 128, 128, threads=16) == [1]


def test_parts_of_a_product():
    """As measured by how many of two cores are busy (jaxlib 0.10.2)."""
    alone = [(32, 64, 576), (16, 64, 576), (32, 128, 576), (32, 64, 1152), (26, 32, 288)]
    assert [rewriting._parts(*sizes) for sizes in alone] == [1] * 5
    several = [(16, 128, 1152), (32, 256, 576), (512, 64, 576), (128, 64, 576)]
    assert all(rewriting._parts(*sizes) > 1 for sizes in several)


def column_vectors(x):
    """`weight @ x` of one example, mapped over the batch: the examples are the columns of the product."""
    first, last = normal(0, 20, 12 * 12 * 3) / 20, normal(1, 10, 20)
    return jax.vmap(lambda x: last @ jnp.tanh(first @ x.ravel()))(x)


MODELS = {
    "mlp": lambda: MLP(12 * 12 * 3, 57, 10),
    "mlp of 100 classes": lambda: MLP(12 * 12 * 3, 128, 100),
    "column vectors": lambda: column_vectors,
    "nnx cnn": lambda: CNN(8, 10),
    "nnx cnn, wide": lambda: CNN(33, 3),
    "nchw": nchw,
    "nchw, wide": lambda: nchw(33),
    "attention": Attention,
}


@pytest.mark.parametrize(
    ("name", "loop"),
    [
        ("mlp", False),
        ("column vectors", False),
        ("nnx cnn", True),
        *(
            pytest.param(*more, marks=pytest.mark.exhaustive)
            for more in (
                *(("mlp of 100 classes", True), ("nnx cnn, wide", False), ("nchw", False)),
                *(("nchw, wide", True), ("attention", True)),
            )
        ),
    ],
)
def test_an_example_does_not_depend_on_its_batch(name, loop):
    """Losses, logits and input gradients to the last bit, for several batch sizes and any position."""
    model = MODELS[name]()

    def loss(x, y):
        logits = model(x)
        losses = jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, y[:, None], 1)[:, 0]
        return losses.sum(), (losses, logits)

    def step(x, y):
        gradient, (losses, logits) = jax.grad(loss, has_aux=True)(x, y)
        return losses, logits, gradient

    run = canonical(step)
    if loop:

        def run(x, y):
            start = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(step, x, y))
            return lax.fori_loop(0, 2, lambda _, c: canonical(step)(x + c[2], y), start)

    generator = np.random.default_rng(1)
    images, labels = generator.random((13, 12, 12, 3), np.float32), generator.integers(0, 3, 13)
    run = jax.jit(run)
    together = jax.tree.map(np.asarray, run(images, labels))
    assert np.abs(together[2]).max() > 0
    for size in (1, 3, 8, 13):
        chosen = generator.permutation(13)[:size]
        part = run(images[chosen], labels[chosen])
        for what, a, b in zip(("loss", "logits", "gradient"), part, together, strict=True):
            np.testing.assert_array_equal(a, b[chosen], err_msg=f"{what} at batch size {size}")


NORMALISED = {
    "one number for each": lambda x: 1.4142135 * jnp.tanh(x) / jnp.sqrt(jnp.sum(x**2, axis=(1, 2), keepdims=True)),
    "two numbers for each": lambda x: x / jnp.max(x, axis=(1, 2), keepdims=True) * jnp.sum(x, (1, 2), keepdims=True),
    "quotient and sum": lambda x: 0.1 + x / jnp.sum(x, axis=(1, 2), keepdims=True),
    "softmax": jax.nn.softmax,
    "largest exponential": lambda x: jnp.max(jnp.exp(x), axis=-1),
    "log of the sum": lambda x: jax.nn.logsumexp(x, axis=(1, 2)),
}


def test_averages_in_windows_do_not_depend_on_the_batch():
    """From 4,096 numbers on they went to another library, with the tanh around them."""
    x = normal(0, 9, 16, 16, 32)
    run = jax.jit(canonical(jax.grad(lambda x: jnp.sum(jnp.tanh(4 * nnx.avg_pool(x, (2, 2), (2, 2)))))))
    for size in (1, 2, 5):
        np.testing.assert_array_equal(run(x[:size]), run(x)[:size], err_msg=f"{size} examples")


@pytest.mark.parametrize("name", NORMALISED)
def test_what_is_divided_by_a_number_of_the_example_does_not_depend_on_the_batch(rng, name):
    """The compiler multiplies by reciprocals, in another order where there is one example."""
    x = rng.normal(size=(40, 24, 12)).astype(np.float32)
    run = jax.jit(canonical(NORMALISED[name]))
    together = np.asarray(run(x))
    for size in (1, 2, 3, 5, 8, 13, 24):
        np.testing.assert_array_equal(run(x[:size]), together[:size], err_msg=f"{size} examples")


OF_POSITIONS = {
    "quotient": lambda x, c, d: x / d,
    "standardized": lambda x, c, d: (x - c) / jnp.sqrt(d + 1e-3) * c + d,
    "quotient of a quotient": lambda x, c, d: x / c / d,
    "quotients of each other": lambda x, c, d: (x / c) / (x / d),
    "by a root of what is repeated": lambda x, c, d: x / jnp.sqrt(jnp.broadcast_to(c, x.shape)),
    "of a number": lambda x, c, d: 3.0 / jnp.broadcast_to(c, x.shape) * x,
    "product of two": lambda x, c, d: x * c * d,
    "product of products": lambda x, c, d: (x * c) * (x * d),
    "square": lambda x, c, d: jnp.square(x * c),
    "power": lambda x, c, d: (x * c) ** 3,
    "powers": lambda x, c, d: jnp.exp(x * c) * jnp.exp(d),
    "sum of two": lambda x, c, d: (x + c) + d,
    "counted positions": lambda x, c, d: x * jnp.linspace(0.3, 0.9, 20) * jnp.arange(1.0, 21.0),
    "in a loop": lambda x, c, d: lax.fori_loop(0, 3, lambda i, y: y * c * d + x / c, x),
    "in a function of its own": lambda x, c, d: jax.jit(lambda x: x * c)(x) * d,
}


def averaged(x):
    return nnx.avg_pool(x.reshape(-1, 4, 5, 1), (3, 3), (1, 1))


FRACTIONS = np.random.default_rng(3).uniform(0.3, 2, 20).astype(np.float32)
COUNTS = np.random.default_rng(2).integers(1, 200, 20).astype(np.uint8)
OF_POSITIONS |= {
    "quotient of a sigmoid": lambda x, c, d: nnx.sigmoid(c) / (x + d),
    "sum of a stack": lambda x, c, d: jnp.sum(jnp.stack(jnp.broadcast_arrays(2.84 * c * x, d)), axis=0),
    "power that is a square": lambda x, c, d: jnp.stack([x, jnp.broadcast_to(c ** jnp.float32(2), x.shape)]).sum(0),
    "larger of two products": lambda x, c, d: x + jnp.maximum(x[:, 3:4] * d, x * d),
    "third of a stack": lambda x, c, d: jnp.stack([x * c, x]).sum(0) / 3,
    "levels of 8 bits": lambda x, c, d: x * (jnp.asarray(COUNTS) / 255) / (x * (jnp.asarray(COUNTS) / 255) + c) ** 2,
    "powers of levels": lambda x, c, d: jnp.square(x * jnp.asarray(COUNTS).astype(jnp.float32)),
    "averages": lambda x, c, d: averaged(x) * averaged(jnp.broadcast_to(c, x.shape)),
    "halves": lambda x, c, d: (0.5 * x) * (0.3 * jnp.broadcast_to(c, x.shape)),
    "moved": lambda x, c, d: x * jnp.roll(jnp.asarray(FRACTIONS), 3) * jnp.flip(FRACTIONS)[None] * c,
    "moved and divided by": lambda x, c, d: x * jnp.roll(FRACTIONS, 1) / jnp.roll(FRACTIONS, 3) / d,
    "between others": lambda x, c, d: x * jnp.where(x > 1, FRACTIONS, c) * jnp.where(x > 1, 0.3, jnp.flip(FRACTIONS)),
    "in a branch": lambda x, c, d: lax.cond(jnp.bool_(True), lambda y: y * FRACTIONS + c, lambda y: y, x * c * d),
    "chosen by a mask": lambda x, c, d: x * jnp.where(COUNTS > 99, 0.3, 0.7) * jnp.where(COUNTS > 50, 1.1, d),
}


def gradient_of(function):
    return lambda x, *others: jax.grad(lambda x: jnp.sum(jnp.tanh(function(x, *others))))(x)


def assert_every_batch_alike(function, x, *others):
    """With the other arrays as arguments, and as constants."""
    given, closed = jax.jit(canonical(function)), jax.jit(canonical(lambda x: function(x, *others)))
    for run in (lambda x: given(x, *others), closed):
        together = np.asarray(run(x))
        for rows in (slice(2), *(slice(i, i + 1) for i in range(len(x)))):
            np.testing.assert_array_equal(run(x[rows]), together[rows], err_msg=f"{rows}")


@pytest.mark.parametrize("name", OF_POSITIONS)
def test_numbers_of_every_position_do_not_depend_on_the_batch(rng, name):
    """In a batch of one they have the shape of the batch, and the compiler simplifies what it does not elsewhere."""
    x, c, d = map(jnp.asarray, rng.uniform(0.3, 2, (3, 5, 20)).astype(np.float32))
    for function in (OF_POSITIONS[name], gradient_of(OF_POSITIONS[name])):
        assert_every_batch_alike(function, x, c[0], d[0])
        assert_every_batch_alike(function, x, c[:1], d[:1])


ONE_NUMBER = np.array([0.37], np.float32)


def fraction():
    whole = jnp.float32(0.37) * 191.0
    return whole - jnp.floor(whole)


@jax.jit
def scaled_product(x, y, a, b):
    return (x * a) * (y * b)


OF_EXAMPLES = {
    "square": lambda x, y: jnp.square(0.3 * x),
    "square of a quotient": lambda x, y: jnp.square(x / 30),
    "power": lambda x, y: (0.3 * x) ** 3,
    "power of another type": lambda x, y: jnp.abs(0.3 * x) ** jnp.float32(2),
    "inverse power": lambda x, y: (0.3 * x) ** -2,
    "product": lambda x, y: (0.3 * x) * (0.7 * y),
    "product of quotients": lambda x, y: (x / 30) * (y / 30),
    "in a sum": lambda x, y: (0.3 * x) * (y / 7) + 1,
    "with a number of its own": lambda x, y: (0.3 * x) * fraction() + (x * fraction()) ** 2,
    "with numbers given to a function": lambda x, y: 0.3 * jax.jit(lambda x, y, a: x * a + y * (1 - a))(x, y, 0.37),
    "with constants of one": lambda x, y: x * ONE_NUMBER * jnp.tanh(ONE_NUMBER) * (y * ONE_NUMBER.reshape(())),
    "with one of several constants": lambda x, y: (x * FRACTIONS[3]) * (y * jax.jit(lambda c: c[4] / 1)(FRACTIONS)),
    "with two that a function is given": lambda x, y: scaled_product(
        x, y, jnp.asarray(FRACTIONS)[3], jnp.asarray(FRACTIONS)[4]
    ),
    "gradient with two that a function is given": lambda x, y: jax.grad(
        lambda x: jnp.sum(scaled_product(x, y, jnp.asarray(FRACTIONS)[3], jnp.asarray(FRACTIONS)[4]) ** 2)
    )(x),
    "gradient with two literals that a function is given": lambda x, y: jax.grad(
        lambda x: jnp.sum(scaled_product(x, y, 0.37, 0.71) ** 2)
    )(x),
    "with one of several levels": lambda x, y: jnp.square(x * (jnp.asarray(COUNTS)[3] / 255)) * y,
    "of means": lambda x, y: jnp.square(jnp.mean(jnp.stack([x, y, x * y]), axis=0)),
}


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", OF_EXAMPLES)
def test_one_number_for_each_example_does_not_depend_on_the_batch(rng, name, rank):
    x, y = map(jnp.asarray, rng.uniform(0.2, 1.8, (2, 64, *[1] * (rank - 1))).astype(np.float32))
    for function in (OF_EXAMPLES[name], gradient_of(OF_EXAMPLES[name])):
        run = jax.jit(canonical(function))
        together = np.asarray(run(x, y))
        alone = np.concatenate([run(x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
        np.testing.assert_array_equal(alone, together)


OF_SHORT = {
    "product": lambda x, kernel, matrix: (x * x / 0.3).reshape(len(x), -1) @ matrix,
    "product of another type": lambda x, kernel, matrix: (x * x / 0.3).reshape(len(x), -1) @ matrix.astype(jnp.float32),
    "convolution": lambda x, kernel, matrix: same(x * x / 0.3, kernel),
    "averaged": lambda x, kernel, matrix: same(x, kernel).mean((1, 2)),
    "single positions": lambda x, kernel, matrix: same(x / 0.3, kernel[:1, :1]),
}


def same(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("name", OF_SHORT)
def test_numbers_of_16_bits_do_not_depend_on_the_batch(rng, name):
    """The compiler keeps the digits of 32 on the way to the logits, unless examples are added or cut off there."""

    def logits(x):
        return 0.3 * OF_SHORT[name](x, kernel, matrix).astype(jnp.float32)

    sizes = (80, 4, 4, 16), (3, 3, 16, 32), (256, 64)
    x, kernel, matrix = (jnp.asarray(rng.uniform(0.3, 2, size), jnp.bfloat16) for size in sizes)
    for function in (logits, gradient_of(logits)):
        run = jax.jit(canonical(function))
        together = np.asarray(run(x), np.float32)
        for size in (1, 2, 64):
            np.testing.assert_array_equal(np.asarray(run(x[:size]), np.float32), together[:size], err_msg=str(size))


ONE = {
    "root": lambda a: jnp.sqrt(jnp.abs(a) + 0.1),
    "inverse root": lambda a: lax.rsqrt(jnp.abs(a) + 0.1),
    "exponential": lambda a: jnp.exp(jnp.minimum(a, 3)),
    "square": jnp.square,
    "inverse": lambda a: 1 / a,
    "third": lambda a: a / 3,
    "scaled": lambda a: 0.3 * a,
    "softmax": jax.nn.softmax,
    "silu": jax.nn.silu,
    "unit": lambda a: a / (jnp.linalg.norm(a, axis=-1, keepdims=True) + 0.1),
    "centred": lambda a: a - jnp.mean(a, axis=-1, keepdims=True),
}
TWO = {
    "plus": jnp.add,
    "minus": jnp.subtract,
    "times": jnp.multiply,
    "over": jnp.divide,
    "power": lambda a, b: (jnp.abs(a) + 0.1) ** jnp.clip(b, -2, 2),
}
TERMS = st.recursive(
    st.sampled_from(["x", "x", "c", "d", "counted"]),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(sorted(ONE)), inner), st.tuples(st.sampled_from(sorted(TWO)), inner, inner)
    ),
    max_leaves=7,
)


def value(term, arrays):
    if isinstance(term, str):
        return arrays[term]
    name, *inner = term
    return (ONE | TWO)[name](*(value(each, arrays) for each in inner))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(term=st.tuples(st.sampled_from(["times", "over", "plus"]), TERMS, TERMS), gradient=st.booleans())
def test_no_arithmetic_depends_on_the_batch(term, gradient):
    x, (c, d) = jnp.abs(normal(0, 5, 17)) + 0.3, jnp.abs(normal(1, 2, 17)) + 0.3

    def function(x, c, d):
        return x * value(term, {"x": x, "c": c, "d": d, "counted": jnp.linspace(0.3, 2, 17)})

    assert_every_batch_alike(gradient_of(function) if gradient else function, x, c, d)


@jax.custom_jvp
def swapped(a, b):
    return b, a


@jax.custom_vjp
def multiplied(a, b):
    return a * b


swapped.defjvp(lambda primals, tangents: (swapped(*primals), tangents[::-1]))
multiplied.defvjp(lambda a, b: (a * b, (a, b)), lambda ab, g: (g * ab[1], g * ab[0]))


@quick
@given(
    sides=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    taps=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    pads=st.tuples(*[st.integers(-1, 9)] * 4),
    rank=st.sampled_from([1, 2]),
)
def test_kernels_larger_than_their_input(sides, taps, stride, dilation, pads, rank):
    """Against sums of NumPy, with padding of any size."""
    sides, taps, padding = sides[:rank], taps[:rank], [pads[:2], pads[2:]][:rank]
    reach = [(t - 1) * dilation + 1 for t in taps]
    for i, (side, needed) in enumerate(zip(sides, reach, strict=True)):  # at least one position
        low, high = padding[i]
        padding[i] = (low, max(high, needed - side - low))
    x, k = normal(0, 3, *sides, 6), normal(1, *taps, 6, 5)
    letters = "HW"[:rank]
    names = (f"N{letters}C", f"{letters}IO", f"N{letters}C")

    def convolution(x):
        return lax.conv_general_dilated(
            x, k, (stride,) * rank, padding, rhs_dilation=(dilation,) * rank, dimension_numbers=names
        )

    around = [(max(low, 0), max(high, 0)) for low, high in padding]
    inside = tuple(slice(max(-low, 0), side - max(-high, 0)) for side, (low, high) in zip(sides, padding, strict=True))
    padded = np.pad(np.asarray(x, np.float64)[(slice(None), *inside)], [(0, 0), *around, (0, 0)])
    positions = [range(0, size - needed + 1, stride) for size, needed in zip(padded.shape[1:-1], reach, strict=True)]
    expected = np.zeros((3, *map(len, positions), 5))
    for at in np.ndindex(*map(len, positions)):
        first = [p[i] for p, i in zip(positions, at, strict=True)]
        seen = padded[(slice(None), *(slice(a, a + n, dilation) for a, n in zip(first, reach, strict=True)))]
        expected[(slice(None), *at)] = np.tensordot(
            seen, np.asarray(k, np.float64), (range(1, rank + 2), range(rank + 1))
        )
    program = jax.jit(canonical(convolution))
    np.testing.assert_allclose(program(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sides", [(2, 2), (1, 2), (2, 3), (1, 1)])
def test_the_compiler_exchanges_no_kernel_with_its_input(sides, dtype):
    x, k = normal(0, 16, *sides, 32).astype(dtype), normal(1, 3, 3, 32, 32).astype(dtype)

    def convolution(x):
        return lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def exchanged(function):
        text = jax.jit(function).lower(x).compile().as_text() or ""
        return [label for label in re.findall(r"dim_labels=(\w+->\w+)", text) if label.split("->")[0] != "b01f_01io"]

    for function in (convolution, lambda g: jax.linear_transpose(convolution, x)(g)[0]):
        assert not exchanged(canonical(function))
        assert exchanged(function) or sides == (1, 1), "else this would test nothing"


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_product_is_rounded_before_it_is_added(rng, size):
    """NumPy, whose operations are one by one, is equal to the last bit; a fused multiply-add is not."""
    a, b, c = rng.normal(size=(3, size)).astype(np.float32)
    cases = {
        "sum": (lambda np, a, b, c: a * b + c),
        "difference": (lambda np, a, b, c: c - np.square(a)),
        "two products": (lambda np, a, b, c: a * b + b * c),
        "through a call": (lambda np, a, b, c: np.where(a > 0, c, b) - (np.reshape(a * b, (1, -1)))[0]),
        "negative": (lambda np, a, b, c: -(a * b) + c),
        "exact": (lambda np, a, b, c: 2 * a + c),
        "into and out of a rule": (lambda np, a, b, c: (swapped(a * b, c) if np is jnp else (c, a * b))[1] + c),
        "within a rule": (lambda np, a, b, c: (multiplied(a, b) if np is jnp else a * b) + c),
    }
    for name, function in cases.items():
        result = jax.jit(canonical(functools.partial(function, jnp)))(a, b, c)
        np.testing.assert_array_equal(result, function(np, a, b, c), err_msg=name)
    if size == 10_000:
        fused = np.asarray(jax.jit(functools.partial(cases["sum"], jnp))(a, b, c))
        assert (fused != cases["sum"](np, a, b, c)).any()


MOVED = {
    "copied": lambda x: x.copy(),
    "stacked": lambda x: jnp.stack([x, x[::-1]], axis=1),
    "unstacked": lambda x: jnp.unstack(x.reshape(2, -1))[1],
    "split": lambda x: jnp.split(x, 2)[1],
    "tiled": lambda x: jnp.tile(x, 3),
    "repeated": lambda x: jnp.repeat(x, 3),
    "rolled": lambda x: jnp.roll(x, 3),
    "joined": lambda x: jnp.concatenate([x, x]),
    "padded": lambda x: jnp.pad(x, 2),
    "mirrored": lambda x: jnp.pad(x, 2, mode="reflect"),
    "sliced": lambda x: lax.dynamic_slice(x, (3,), (40,)),
    "written": lambda x: jnp.zeros(90, x.dtype).at[5 : 5 + len(x)].set(x),
    "taken": lambda x: x[np.arange(len(x)) // 2],
    "upper": lambda x: jnp.triu(x.reshape(8, 8)),
    "of another type": lambda x: x.astype(jnp.float32),
    "named": lambda x: checkpoint_name(x, "x"),
    "behind a barrier": lax.optimization_barrier,
    "in a checkpoint": jax.checkpoint(lambda x: x.reshape(8, 8)),
    "in a loop": lambda x: lax.fori_loop(0, 1, lambda i, x: x[::-1], x),
    "in a branch": lambda x: lax.cond(True, lambda x: x[::-1], lambda x: x, x),
    "mapped": lambda x: lax.map(lambda row: row[::-1], x[None]),
}


@pytest.mark.parametrize("name", MOVED)
def test_a_product_is_rounded_wherever_it_is_moved(rng, name):
    a, b, c = map(jnp.asarray, rng.normal(size=(3, 64)).astype(np.float32))
    move = MOVED[name]
    for function in (lambda a, b, c: move(a * b) + move(c), lambda a, b, c: multiplied_and(move, a, b) + move(c)):
        np.testing.assert_array_equal(jax.jit(canonical(function))(a, b, c), move(a * b) + move(c))


def multiplied_and(move, a, b):
    """The product within what moves it, where that is a function of its own."""
    return jax.checkpoint(lambda a, b: move(a * b))(a, b)


def test_a_product_is_rounded_before_it_is_scattered(rng):
    a, b, c = map(jnp.asarray, rng.normal(size=(3, 64)).astype(np.float32))
    places = jnp.arange(64)[::-1]

    def scattered(a, b, c):
        return c.at[places].add(a * b), c.at[places].subtract(a * b)

    assert_close(jax.jit(canonical(scattered))(a, b, c), (c + (a * b)[::-1], c - (a * b)[::-1]), rtol=0)


def test_rounding_keeps_infinities_and_nan():
    x = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, 0.0])
    np.testing.assert_array_equal(
        jax.jit(canonical(lambda x, y: x * y + 1))(x, jnp.ones(4)), np.asarray([np.inf, -np.inf, np.nan, 1])
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rounding_keeps_every_number_and_nan(rng, dtype):
    bits = f"uint{8 * jnp.dtype(dtype).itemsize}"
    largest = np.iinfo(bits).max
    samples = rng.integers(0, largest, 65_536, dtype=bits, endpoint=True)
    edges = np.asarray([0, 1, largest // 2, largest // 2 - 1, largest // 2 + 1, largest], bits)  # signed ends, too
    x = jnp.concatenate([edges, samples]).view(dtype)
    results, nan = jax.jit(kept)(x), np.asarray(jnp.isnan(x))
    assert nan[[2, 5]].all()
    np.testing.assert_array_equal(jnp.isnan(results), nan)
    np.testing.assert_array_equal(np.asarray(results)[~nan].view(bits), np.asarray(x)[~nan].view(bits))


def test_a_rounded_product_has_its_derivative():
    x = jnp.asarray([1.5, -2.0, 0.1])
    function = canonical(lambda x: x**3 + 1)
    np.testing.assert_allclose(jax.grad(lambda x: function(x).sum())(x), 3 * x**2, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(function, (x,), (x,))[1], 3 * x**3, rtol=1e-6)
