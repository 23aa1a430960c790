"""Operations, bytes and collectives of compiled programs, against what is known of them by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jaxinterp import attacks, models, parallel
from jaxinterp.bench import cost
from jaxinterp.bench.cost import Communication, Cost, collectives, library_calls
from jaxinterp.bench.device import Peak
from jaxinterp.weights import seeded


def test_a_matrix_product_costs_two_n_cubed():
    n = 96
    program = jax.jit(lambda a, b: a @ b).lower(*[jnp.ones((n, n))] * 2).compile()
    found = cost.cost(program)
    assert found == Cost(2 * n**3, 3 * n * n * 4)
    assert (cost.program_bytes(program) or 0) >= 3 * n * n * 4
    assert found is not None
    assert found.times(2.5) == Cost(5 * n**3, 7.5 * n * n * 4)


def test_a_loop_counts_as_one_iteration():
    def looped(steps):
        def run(x, w):
            return lax.fori_loop(0, steps, lambda _, x: x @ w, x)

        found = cost.cost(jax.jit(run).lower(*[jnp.ones((64, 64))] * 2).compile())
        return None if found is None else found.flops

    assert looped(7) == pytest.approx(2 * 64**3, rel=1e-3)
    assert looped(7) == looped(70)


def test_a_backend_that_tells_nothing():
    class Silent:
        def cost_analysis(self):
            raise NotImplementedError

        def memory_analysis(self):
            return None

    assert cost.cost(Silent()) is None
    assert cost.program_bytes(Silent()) is None


def test_positions_on_the_roofline():
    peak = Peak(flops=100.0, bandwidth=10.0, source="published")
    assert peak.ridge == 10
    memory = cost.position(Cost(flops=20, bytes=10), 1.0, peak)
    assert (memory.bound, memory.intensity, memory.share_of_peak, memory.share_of_roof) == ("memory", 2, 0.2, 1.0)
    compute = cost.position(Cost(flops=200, bytes=10), 4.0, peak)
    assert (compute.bound, compute.flops_per_second, compute.share_of_roof) == ("compute", 50, 0.5)
    both = cost.position(Cost(flops=200, bytes=10), 4.0, peak, devices=2)
    assert both.share_of_peak == 0.25
    unknown = cost.position(Cost(flops=50, bytes=0), 1.0, peak)
    assert math.isnan(unknown.intensity)
    assert unknown.share_of_roof == unknown.share_of_peak == 0.5


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])


def counted(function, mesh, replicated=False):
    spec = PartitionSpec() if replicated else PartitionSpec("data")
    mapped = jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=spec, check_vma=False)
    return collectives(jax.jit(mapped).lower(jnp.ones((8, 4))).compile().as_text() or "")


def test_collectives_outside_and_inside_of_loops(mesh):
    def none(x):
        return lax.fori_loop(0, 3, lambda _, x: x * 1.5, x)

    def after(x):
        return lax.psum(none(x), "data")

    def inside(x):
        return lax.fori_loop(0, 3, lambda _, x: x + lax.psum(x, "data"), x)

    def in_a_branch_inside(x):
        def body(i, x):
            return lax.cond(i < 2, lambda x: x + lax.psum(x, "data"), lambda x: x, x)

        return lax.all_gather(lax.fori_loop(0, 3, body, x), "data").sum(0)

    assert counted(none, mesh) == Communication(0, 0)
    assert counted(after, mesh, replicated=True) == Communication(1, 0)
    assert counted(inside, mesh) == Communication(1, 1)
    found = counted(in_a_branch_inside, mesh, replicated=True)
    assert found.in_loops == 1
    assert found.total == 2


def test_asynchronous_collectives_count_once():
    text = """HloModule m
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %start = (f32[4]{0}, f32[4]{0}) all-gather-start(%x), dimensions={0}
  %done = f32[4]{0} all-gather-done(%start)
}
%condition (p: (s32[], f32[4])) -> pred[] {
  ROOT %c = pred[] constant(true)
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%condition, body=%body
  ROOT %r = f32[4]{0} all-reduce(%y), to_apply=%add
}
"""
    assert collectives(text) == Communication(total=2, in_loops=1)
    with pytest.raises(ValueError, match="not the text of an HLO module"):
        collectives("nothing")


def test_attacks_exchange_nothing_in_their_loops(mesh):
    model = models.network("small_cnn").bind(jax.tree.map(jnp.asarray, seeded.params(models.shapes("small_cnn"))))
    images = parallel.shard(seeded.images(4, 8), mesh)
    labels = parallel.shard(np.zeros(4, np.int32), mesh)
    attack = attacks.IFGSM(steps=2)
    state = attacks.start(attack, model, images, labels, key=jax.random.key(0))
    program = attacks.lowered(attack, model, state).compile()
    text = program.as_text() or ""
    assert " while(" in text
    assert collectives(text) == Communication(0, 0)
    from_shapes = attacks.lowered(attack, model, jax.eval_shape(lambda x: x, jax.device_get(state))).compile()
    one_device, share = cost.cost(from_shapes), cost.cost(program)
    assert one_device is not None
    assert share is not None
    assert 0.4 * one_device.flops < share.flops < one_device.flops  # small shares are padded


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "padding", "dilation", "groups"),
    [(9, 3, 1, 1, 1, 1), (14, 7, 2, 3, 1, 1), (8, 3, 2, 0, 1, 1), (10, 3, 1, 2, 2, 1), (6, 3, 1, 1, 1, 4)],
)
def test_calls_of_cudnn_cost_what_the_convolution_costs(side, kernel, stride, padding, dilation, groups):
    """Forward and backward, by the compiler's account of the same convolution where it is no library's."""
    images, weights = jnp.zeros((2, side, side + 1, 4)), jnp.zeros((kernel, kernel, 4 // groups, 8))

    def run(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), [(padding, padding)] * 2, rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
        )  # fmt: skip

    expected = (jax.jit(run).lower(images, weights).cost_analysis() or {})["flops"]
    maps = run(images, weights)
    shapes = {
        "x": images.shape, "w": (8, kernel, kernel, 4 // groups), "y": maps.shape,
    }  # fmt: skip
    typed = {name: f"f32[{','.join(map(str, shape))}]{{3,2,1,0}}" for name, shape in shapes.items()}
    more = "" if dilation == 1 else f" rhs_dilate={dilation}x{dilation}"
    window = f"size={kernel}x{kernel} stride={stride}x{stride} pad={padding}_{padding}x{padding}_{padding}{more}"
    for target, result, operands in (
        ("Forward", "y", "xw"),
        ("BiasActivationForward", "y", "xw"),
        ("BackwardInput", "x", "yw"),
        ("BackwardFilter", "w", "xy"),
    ):
        text = "\n".join(
            [
                "ENTRY %main (x: f32[1]) -> f32[1] {",
                *(f"  %{name} = {typed[name]} parameter({i})" for i, name in enumerate(operands)),
                f"  %conv.1 = ({typed[result]}, u8[4096]{{0}}) custom-call(%{operands[0]}, %{operands[1]}), "
                f"window={{{window}}}, dim_labels=b01f_o01i->b01f, feature_group_count={groups}, "
                f'custom_call_target="__cudnn$conv{target}", backend_config={{}}',
                "}",
            ]
        )
        found = library_calls(text)
        assert found.flops == expected, target
        assert found.bytes == 4 * sum(math.prod(shapes[name]) for name in "xwy")


def test_calls_of_cublas():
    text = """
  %a.1 = bf16[5,300,20]{2,1,0} parameter(0)
  %b = bf16[5,300,70]{2,1,0} parameter(1)
  ROOT %gemm = (bf16[5,20,70]{2,1,0}, s8[33554432]{0}) custom-call(%a.1, bf16[5,300,70]{2,1,0} %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"]}}}
  %other = f32[9]{0} custom-call(%b), custom_call_target="something"
"""  # noqa: E501
    found = library_calls(text)
    assert found.flops == 2 * 5 * 20 * 70 * 300
    assert found.bytes == 2 * (5 * 300 * 20 + 5 * 300 * 70 + 5 * 20 * 70)
    assert library_calls("no program at all").flops == 0
