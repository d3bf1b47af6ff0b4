"""Collectives of compiled programs with known numbers and sizes, and the notations of TPU programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dlm_jax.plan.collectives import Collective, by_kind, collectives
from dlm_jax.plan.topology import read_topology, tpu_devices
from tests.plan.conftest import needs_libtpu

MiB = 1 << 20


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def found_in(mesh: Mesh, function, *shapes: tuple[int, ...]) -> list[Collective]:
    """Compiles a function of float32 arrays that are sharded along their first axis over `b`."""
    spec = PartitionSpec("b")
    split = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(), check_vma=False)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape in shapes]
    return collectives(jax.jit(split).lower(*arguments).compile().as_text(), mesh.size)


@pytest.mark.parametrize(("kind", "function", "size", "sent"), [
    ("all-reduce", lambda x: lax.psum(x, "b"), MiB, 1.5 * MiB),
    ("all-reduce", lambda x: lax.psum(x, ("a", "b")), MiB, 1.75 * MiB),
    ("all-gather", lambda x: lax.all_gather(x, "b"), 4 * MiB, 3 * MiB),
    ("reduce-scatter", lambda x: lax.psum_scatter(x, "b", tiled=True), MiB, 0.75 * MiB),
    ("all-to-all", lambda x: lax.all_to_all(x.reshape(4, -1), "b", 0, 0), MiB, 0.75 * MiB),
    ("collective-permute", lambda x: lax.ppermute(x, "b", [(i, (i + 1) % 4) for i in range(4)]), MiB, MiB),
])
def test_bytes_sent(mesh, kind, function, size, sent):
    one, = found_in(mesh, function, (MiB,))  # a quarter of 4 MiB each
    assert (one.kind, one.size, one.count, one.sent) == (kind, size, 1, sent)
    assert kind == "collective-permute" or one.group_size == (8 if sent == 1.75 * MiB else 4)


def sums_in_loops(x: jax.Array, trips: jax.Array | int) -> jax.Array:
    """Sums over devices in 5 x 3 trips, then in `trips`."""

    def inner(carry, _):
        return lax.psum(jnp.sin(carry), "b"), None

    def outer(carry, _):
        return lax.scan(inner, carry, length=3)[0] * 2, None

    x = lax.scan(outer, x, length=5)[0]
    return lax.fori_loop(0, trips, lambda i, y: lax.psum(jnp.cos(y), "a"), x)


def test_trip_counts(mesh):
    inner, last = sorted(found_in(mesh, lambda x: sums_in_loops(x, 7), (4096,)), key=lambda c: -c.count)
    assert (inner.count, inner.group_size, last.count, last.group_size) == (15, 4, 7, 2)
    assert inner.is_bounded and last.is_bounded

    inner, last = sorted(found_in(mesh, lambda x: sums_in_loops(x, x[0].astype(int)), (4096,)), key=lambda c: -c.count)
    assert (inner.count, last.count, last.is_bounded) == (15, 1, False)
    assert sorted(by_kind([inner, last])) == ["all-reduce", last.label]


def test_collectives_that_xla_inserts(mesh):
    split = NamedSharding(mesh, PartitionSpec(("a", "b")))
    weight, rows = (jax.ShapeDtypeStruct((size, 512), jnp.float32, sharding=split) for size in (512, 1024))

    def loss(weight: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.sum(jnp.tanh(rows @ lax.with_sharding_constraint(weight, NamedSharding(mesh, PartitionSpec()))))

    program = jax.jit(jax.value_and_grad(loss), out_shardings=(None, weight.sharding)).lower(weight, rows).compile()
    kinds = by_kind(collectives(program.as_text(), mesh.size))
    assert kinds["all-gather"] == {"count": 1, "bytes": 0.875 * MiB}
    sums = {kind: kinds[kind]["bytes"] for kind in ("all-reduce", "reduce-scatter") if kind in kinds}
    assert max(sums.values()) >= 0.875 * MiB  # the gradient, and a little for the loss


@needs_libtpu
def test_compiled_tpu_program():
    mesh = Mesh(np.array(tpu_devices(read_topology("v5e:2x4"))).reshape(2, 4), ("a", "b"),
                axis_types=(AxisType.Auto,) * 2)
    inner, last = sorted(found_in(mesh, lambda x: sums_in_loops(x, 7), (4096,)), key=lambda c: -c.count)
    assert (inner.count, inner.group_size, last.count, last.group_size) == (15, 4, 7, 2)

    mesh = Mesh(np.array(tpu_devices(read_topology("v5e:2x2"))).reshape(1, 4), ("a", "b"),
                axis_types=(AxisType.Auto,) * 2)
    scatter = functools.partial(lax.psum_scatter, axis_name="b", scatter_dimension=1, tiled=True)
    scattered, = found_in(mesh, lambda x: scatter(jnp.sin(x)), (16384, 4096))
    assert (scattered.kind, scattered.group_size, scattered.sent) == ("reduce-scatter", 4, 48 * MiB)


# As libtpu prints programs: an all-gather in two fusions that share its channel, one of them in an unrelated loop; an
# all-reduce of which each device keeps a slice; an all-reduce between slices; a replica group named by a mesh axis.
TPU_PROGRAM = """\
HloModule jit_f, is_scheduled=true

%start (p: bf16[64,8]) -> bf16[256,8] {
  %p = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[256,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}
  ROOT %custom-call.1 = bf16[256,8]{1,0} custom-call(%all-gather.1), custom_call_target="Start"
}

%async_collective_fusion.2 (p.2: bf16[64,8]) -> bf16[256,8] {
  %p.2 = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[256,8]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=1, replica_groups={{0,1,2,3}}
}

%all-reduce-scatter (input: f32[256,16]) -> f32[64,16] {
  %input = f32[256,16]{1,0:T(8,128)S(1)} parameter(0)
  %all-reduce.3 = f32[256,16]{1,0:T(8,128)} all-reduce(%input), channel_id=3, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %dynamic-slice.5 = f32[64,16]{1,0:T(8,128)S(1)} dynamic-slice(%all-reduce.3, %m, %c), dynamic_slice_sizes={64,16}
}

%body (carried: (s32[], f32[256,16])) -> (s32[], f32[256,16]) {
  %carried = (s32[]{:T(128)}, /*index=1*/f32[256,16]{1,0:T(8,128)}) parameter(0)
  %step = bf16[256,8]{1,0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.2
  %mine = f32[64,16]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter, backend_config={"a":[{"b":"0"}]}
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[256,16]{1,0:T(8,128)}) tuple(%i, %y)
}

%condition (carried.2: (s32[], f32[256,16])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(12)
  %carried.2 = (s32[]{:T(128)}, f32[256,16]{1,0:T(8,128)}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%carried.2), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter, %constant.9), direction=LT, metadata={op_name="jit(f)/while/cond/lt"}
}

ENTRY %main (a: bf16[64,8], b: f32[256,16]) -> f32[1024,8] {
  %a = bf16[64,8]{1,0} parameter(0)
  %begun = bf16[256,8]{1,0} fusion(%a), kind=kCustom, calls=%start
  %first = s32[]{:T(128)} constant(2)
  %copied = s32[]{:T(128)} copy(%first)
  %carried.3 = (s32[]{:T(128)}, f32[256,16]{1,0:T(8,128)}) tuple(%copied, %b)
  %while.1 = (s32[]{:T(128)}, f32[256,16]{1,0:T(8,128)}) while(%carried.3), condition=%condition, body=%body
  %sums = (f32[8]{0}, /*index=1*/bf16[4]{0}) all-reduce(%p, %q), replica_groups=mesh['x'=2,'y'=4] {'y':(2)2}
  %send = (f32[4096,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%grads, %after-all), channel_id=1, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %permute = (bf16[8,64]{1,0}, bf16[8,64]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=5
  %permuted = bf16[8,64]{1,0} collective-permute-done(%permute)
  ROOT %r = f32[1024,8]{1,0} fusion(%while.1), kind=kLoop, calls=%nowhere
}
"""


def test_notations_of_tpu_programs():
    found = {(c.kind, c.between_slices): c for c in collectives(TPU_PROGRAM, 8, 2)}
    assert found["all-gather", False] == Collective("all-gather", 4, 256 * 8 * 2, 1)
    assert found["reduce-scatter", False] == Collective("reduce-scatter", 4, 256 * 16 * 4, 10)
    assert found["all-reduce", False] == Collective("all-reduce", 2, 8 * 4 + 4 * 2, 1)
    assert found["all-reduce", True] == Collective("all-reduce", 2, 16 * MiB, 1, between_slices=True)
    assert found["collective-permute", False].sent == 8 * 64 * 2
    assert len(found) == 5 and "all-reduce between slices" in by_kind(list(found.values()))
