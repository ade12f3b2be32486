"""The reader of compiled programs finds every collective, once, with its size, its group and its loops."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from benchmarks.hlo import bytes_of, collectives, cycles
from tests.compile_options import AS_FOR_USERS

pytestmark = pytest.mark.usefixtures("full_compiles")

P = PartitionSpec


def compiled(function, axes, *args):
    """Return the text of a function that says itself what to send, on four devices that split the rows."""
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    rows = P(tuple(axes))
    spread = jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    return jax.jit(spread).lower(*args).compile(AS_FOR_USERS).as_text()


def test_every_kind_is_found_with_the_size_of_its_larger_side():
    def all_kinds(x):  # [4, 8] float32 on each device, 128 bytes
        x = jnp.sin(jax.lax.all_gather(x, "x", axis=0, tiled=True))  # to [16, 8]
        x = jnp.sin(jax.lax.psum_scatter(x, "x", scatter_dimension=0, tiled=True))  # from [16, 8]
        x = jnp.sin(jax.lax.psum(x, "x"))
        x = jnp.sin(jax.lax.all_to_all(x, "x", 0, 0, tiled=True))
        return jax.lax.ppermute(x, "x", [(0, 1), (1, 2), (2, 3), (3, 0)])

    found = collectives(compiled(all_kinds, {"x": 4}, jnp.ones((16, 8))))
    assert {one.kind: one.bytes for one in found} == {
        "all-gather": 512, "reduce-scatter": 512, "all-reduce": 128, "all-to-all": 128, "collective-permute": 128,
    }  # fmt: skip
    assert len(found) == 5 and all(one.participants == 4 and one.loops == () for one in found)
    assert all("shard_map" in one.op_name for one in found)


def test_the_group_is_that_of_the_axes_and_not_of_the_machine():
    function = lambda x: jnp.sin(jax.lax.psum(x, "x")) + jax.lax.psum(x * 2, ("x", "y"))
    text = compiled(function, {"x": 2, "y": 2}, jnp.ones((4, 8)))
    assert sorted(one.participants for one in collectives(text)) == [2, 4]


def test_loops_are_told_from_outside_in_with_their_trip_counts():
    def nested(x):
        def inner(y, _):
            return jnp.sin(jax.lax.psum(y, "x")), None

        def outer(y, _):
            return jax.lax.scan(inner, jnp.cos(jax.lax.psum(y * 2, "x")), None, length=7)[0], None

        return jax.lax.psum(jax.lax.scan(outer, x, None, length=5)[0] * 3, "x")

    found = collectives(compiled(nested, {"x": 4}, jnp.ones((4, 8))))
    assert sorted(tuple(loop.trips for loop in one.loops) for one in found) == [(), (5,), (5, 7)]
    assert all("while" in loop.op_name for one in found for loop in one.loops)


def test_a_loop_of_unknown_length_and_a_branch_are_said_to_be_so():
    def until(x):
        halved = lambda y: jnp.sin(jax.lax.psum(y, "x")) / 2
        y = jax.lax.while_loop(lambda y: y.sum() > 1, halved, x)
        return jax.lax.cond(y.sum() > 0, lambda y: jax.lax.psum(y * 2, "x"), lambda y: y, y)

    found = collectives(compiled(until, {"x": 4}, jnp.ones((4, 8))))
    in_loop, in_branch = sorted(found, key=lambda one: one.conditional)
    assert [loop.trips for loop in in_loop.loops] == [None] and not in_loop.conditional
    assert in_branch.loops == () and in_branch.conditional


def test_what_moves_nothing_is_no_collective():
    text = compiled(lambda x: jax.lax.psum(x, "y"), {"x": 4, "y": 1}, jnp.ones((4, 8)))
    assert collectives(text) == []


# Forms of the TPU's compiler that the CPU's does not write.
TPU = """HloModule jit_loss, is_scheduled=true, num_partitions=16

%all-reduce-scatter.1 (input: f32[512,512]) -> f32[128,512] {
  %input = f32[512,512]{1,0:T(8,128)S(1)} parameter(0)
  %all-reduce.5 = f32[512,512]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %dynamic-slice.2 = f32[128,512]{1,0:T(8,128)S(1)} dynamic-slice(%all-reduce.5), dynamic_slice_sizes={128,512}
}

%async_computation (p: bf16[8,16]) -> bf16[32,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  ROOT %all-gather.7 = bf16[32,16]{1,0} all-gather(%p), replica_groups=mesh['a'=2,'b'=4,'c'=2], device_ids=([4,4]T(1,0)) {'a','b'}
}

%chain_start (p.3: bf16[2,4]) -> (bf16[2,4], bf16[32,4], u32[]) {
  %p.3 = bf16[2,4]{1,0} parameter(0)
  %all-gather.50 = bf16[32,4]{1,0} all-gather(%p.3), replica_groups=[1,16]<=[16], frontend_attributes={chain_id="0"}
  ROOT %start.1 = (bf16[2,4]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.50), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.8 (p.4: bf16[2,4], p.5: bf16[32,4]) -> bf16[32,4] {
  %p.4 = bf16[2,4]{1,0} parameter(0)
  ROOT %all-gather.51 = bf16[32,4]{1,0} all-gather(%p.4), replica_groups=[1,16]<=[16], frontend_attributes={chain_id="0"}
}

%chain_done (p.6: bf16[2,4]) -> bf16[32,4] {
  %p.6 = bf16[2,4]{1,0} parameter(0)
  %all-gather.52 = bf16[32,4]{1,0} all-gather(%p.6), replica_groups=[1,16]<=[16], frontend_attributes={chain_id="0"}
  ROOT %custom-call.2 = bf16[32,4]{1,0} custom-call(%all-gather.52), custom_call_target="AsyncCollectiveDone"
}

%body (arg: (s32[], f32[512,512])) -> (s32[], f32[512,512]) {
  %arg = (s32[]{:T(128)}, f32[512,512]{1,0:T(8,128)}, /*index=2*/s32[]) parameter(0)
  %x = f32[512,512]{1,0:T(8,128)S(1)} get-tuple-element(%arg), index=1
  %fusion.39 = f32[128,512]{1,0} fusion(%x), calls=%all-reduce-scatter.1, backend_config={"estimated_cycles":"1000"}
  %step = bf16[32,4]{1,0} fusion(%x, %x), kind=kCustom, calls=%async_collective_fusion.8
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[512,512]{1,0:T(8,128)}) tuple(%arg, %x)
}

%condition (arg: (s32[], f32[512,512])) -> pred[] {
  %limit = s32[]{:T(128)} constant(9)
  %arg.2 = (s32[]{:T(128)}, f32[512,512]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg.2), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (w: bf16[8,16]) -> f32[512,512] {
  %two = s32[]{:T(128)} constant(2)
  %i.0 = s32[]{:T(128)S(6)} copy(%two)
  %w = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = f32[512,512]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %gather-start = ((bf16[8,16]), bf16[32,16], u32[]) async-start(%w), calls=%async_computation
  %gather-done = bf16[32,16]{1,0} async-done(%gather-start), calls=%async_computation
  %chain-start = (bf16[2,4]{1,0}, bf16[32,4]{1,0}, u32[]) fusion(%w), kind=kCustom, calls=%chain_start
  %chain-done = bf16[32,4]{1,0} fusion(%w), kind=kCustom, calls=%chain_done
  %permute-start = (bf16[8,16], bf16[8,16], u32[]{:S(2)}) collective-permute-start(%w), source_target_pairs={{0,1},{1,0}}
  %permute-done = bf16[8,16]{1,0:T(8,128)(2,1)} collective-permute-done(%permute-start)
  %start = (s32[]{:T(128)}, f32[512,512]{1,0:T(8,128)}) tuple(%i.0, %zero), backend_config={"estimated_cycles":"30"}
  %while = (s32[]{:T(128)}, f32[512,512]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body
  ROOT %end = f32[512,512]{1,0:T(8,128)} get-tuple-element(%while), index=1
}
"""


def test_the_forms_of_a_tpu_program_are_read():
    chain, gather, permute, scatter = sorted(collectives(TPU), key=lambda one: (one.kind, one.bytes))
    assert (chain.kind, chain.name, chain.bytes, chain.loops) == ("all-gather", "all-gather.50", 256, ())
    assert (gather.kind, gather.bytes, gather.participants, gather.loops) == ("all-gather", 1024, 8, ())
    assert (permute.kind, permute.bytes, permute.participants) == ("collective-permute", 256, 2)
    assert (scatter.kind, scatter.bytes, scatter.participants) == ("reduce-scatter", 512 * 512 * 4, 4)
    assert scatter.shapes == ("f32[512,512]",) and [loop.trips for loop in scatter.loops] == [7]


def test_the_cycle_estimates_keep_their_loops():
    assert [(count, [loop.trips for loop in loops]) for count, loops in cycles(TPU)] == [(30, []), (1000, [7])]


@pytest.mark.parametrize(
    ("type_", "size"),
    [
        ("f32[2,3]{1,0}", 24),
        ("bf16[]", 2),
        ("pred[5]", 5),
        ("s8[4]", 4),
        ("f8e4m3fn[4]", 4),
        ("token[]", 0),
        ("u4[8]", 4),
    ],
)
def test_bytes_of_a_type(type_, size):
    assert bytes_of(type_) == size
