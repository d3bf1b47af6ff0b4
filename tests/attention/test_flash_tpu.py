"""The kernels run in interpret mode; whether Mosaic takes them is asked of its lowering, and of libtpu where it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from dlm_jax.attention import AttentionMask, xla_attention
from dlm_jax.attention.mask import MaskSpec, Span
from dlm_jax.attention.tpu import tpu_attention
from dlm_jax.errors import ConfigError

LENGTH = 45  # three tiles of 16, the last one not full
SMALL = functools.partial(tpu_attention, block_q=16, block_k=16, interpret=True)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # mostly compiles
SEGMENTS = jnp.repeat(jnp.array([[0, 1, 2]] * 2), jnp.array([7, 18, 20]), axis=1)
EXAMPLES = jnp.array([7, 4_000_000_000], jnp.uint32)
SEEDS = jnp.array([3, 9], jnp.uint32)


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def inputs(length=LENGTH, heads=4, kv_heads=2, head_dim=8, dtype=np.float32):
    """Query, key, value, and weights of the output for a loss."""
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(2, length, h, head_dim)), dtype)
                 for h in (heads, kv_heads, kv_heads, heads))


@functools.partial(jit, static_argnums=0, static_argnames="dropout_rate")
def value_and_gradients(attention, tensors, mask, **options):
    def loss(query, key, value):
        out = attention(query, key, value, mask, **options)
        return jnp.sum(out.astype(jnp.float32) * tensors[3].astype(jnp.float32)), out
    gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(*tensors[:3])
    return out, *gradients


def assert_parity(tensors, mask, tolerance=1e-5, **options):
    flash = value_and_gradients(SMALL, tensors, mask, **options)
    dense = value_and_gradients(xla_attention, tensors, mask, **options)
    for name, x, y in zip(("out", "dq", "dk", "dv"), flash, dense, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x.astype(np.float32), y.astype(np.float32), atol=tolerance, rtol=tolerance,
                                   err_msg=name)


MASKS = [
    pytest.param(AttentionMask.causal(), id="causal"),
    pytest.param(AttentionMask.bidirectional(), id="bidirectional"),
    pytest.param(AttentionMask.annealed(0.3, 5), id="annealed alike"),
    pytest.param(AttentionMask.block_causal(6), id="block_causal"),
    pytest.param(AttentionMask.bidirectional().with_window(9), id="window"),
    pytest.param(AttentionMask.bidirectional().with_segments(SEGMENTS), id="segments"),
    pytest.param(AttentionMask.bidirectional().with_lengths(jnp.array([LENGTH, 19])), id="lengths"),
    pytest.param(AttentionMask.block_diffusion(6, 15, views=2), id="block_diffusion"),
    pytest.param(AttentionMask.block_diffusion(6, 21, bidirectional_clean=True), id="block_diffusion whole"),
    pytest.param(AttentionMask.block_diffusion(4, 23).with_window(9).with_segments(SEGMENTS[:, :23]),
                 id="block_diffusion narrowed"),
    pytest.param(AttentionMask.annealed(0.5, 5, EXAMPLES).with_segments(SEGMENTS).with_window(30).with_lengths(
        jnp.array([41, LENGTH])), id="everything"),
]


@pytest.mark.parametrize("mask", MASKS)
def test_matches_dense(mask):
    assert_parity(inputs(), mask)


def test_matches_dense_while_annealing():
    for ratio in (0.0, 0.4, 1.0):  # traced: one program
        assert_parity(inputs(), AttentionMask.annealed(ratio, 5, EXAMPLES))


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_matches_dense_with_grouped_queries_and_drops_the_same_probabilities(kv_heads):
    assert_parity(inputs(kv_heads=kv_heads), AttentionMask.causal(), dropout_rate=0.3, dropout_seeds=SEEDS)


def test_matches_dense_in_bfloat16():
    assert_parity(inputs(length=32, dtype=jnp.bfloat16), AttentionMask.annealed(0.3, 5), tolerance=0.05)


def test_shards_of_the_keys_merge_and_shards_of_the_queries_know_their_place():
    query, key, value, weights = inputs(length=48)
    mask = AttentionMask.annealed(0.3, 5, EXAMPLES).with_lengths(jnp.array([48, 31])).with_segments(
        jnp.pad(SEGMENTS, ((0, 0), (0, 3)), mode="edge"))
    options = dict(dropout_rate=0.2, dropout_seeds=SEEDS)
    first = 20

    def merged(query, key, value):
        def part(shard):
            offset, key, value = shard
            return SMALL(query[:, first:], key, value, mask, query_offset=first, key_offset=offset,
                         return_residuals=True, **options)
        halves = (x.reshape(2, 2, 24, *x.shape[2:]).swapaxes(0, 1) for x in (key, value))
        out, logsumexp = jax.lax.map(part, (jnp.array([0, 24]), *halves))
        return jnp.einsum("sbqhd,sbhq->bqhd", out, jax.nn.softmax(logsumexp, axis=0))

    def whole(query, key, value):
        return xla_attention(query, key, value, mask, **options)[:, first:]

    def values(attention):
        return jit(jax.value_and_grad(lambda *x: jnp.sum(attention(*x) * weights[:, first:]), (0, 1, 2)))(
            query, key, value)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), values(merged), values(whole))


def test_a_shard_of_the_heads_drops_the_same_probabilities():
    query, key, value, _ = inputs()
    run = jit(functools.partial(SMALL, mask=AttentionMask.causal(), dropout_rate=0.3, dropout_seeds=SEEDS))
    whole = run(query, key, value)
    shard = run(query[:, :, 2:], key[:, :, 1:], value[:, :, 1:], kv_head_offset=1)
    np.testing.assert_allclose(shard, whole[:, :, 2:], atol=1e-6)


def test_a_query_that_sees_nothing_gives_nothing():
    query, key, value, _ = inputs()
    mask = AttentionMask.causal().with_lengths(jnp.array([0, LENGTH]))

    def loss(*x):  # the first ten queries come before every key: their tile is visited for the others
        out, logsumexp = SMALL(*x, mask, key_offset=10, return_residuals=True)
        return jnp.sum(out**2), (out, logsumexp)
    gradients, (out, logsumexp) = jit(jax.grad(loss, (0, 1, 2), has_aux=True))(query, key, value)
    for x in (out, gradients[0]):
        assert not x[0].any() and not x[1, :10].any() and x[1, 11:].any(axis=(1, 2)).all()
    assert (logsumexp[0] == -1e30).all() and (logsumexp[1, :, :10] == -1e30).all() and (logsumexp[1, :, 10:] > -9).all()
    assert all(np.isfinite(x).all() and not x[0].any() for x in gradients)


@pytest.mark.parametrize("rule", [
    MaskSpec("causal"), MaskSpec("bidirectional", lengths=True), MaskSpec("annealed"), MaskSpec("block_causal", block_size=6),
    MaskSpec("causal", window=20), MaskSpec("bidirectional", segments=True),
    MaskSpec("block_diffusion", block_size=12, text_length=32, views=1), MaskSpec(
        "block_diffusion", block_size=9, window=28, text_length=28, views=1), MaskSpec(
        "block_diffusion", block_size=9, text_length=28, views=1, bidirectional_clean=True)], ids=str)
def test_the_extent_of_a_tile_bounds_what_it_allows(spec):
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(0, 5, 64))
    seen = set()
    for ratio in (0.0, 0.3, 1.0):
        params = AttentionMask.annealed(ratio, 1).params()._replace(length=jnp.array([40]))
        for q, k in rng.integers(0, 56, (40, 2)):
            queries, keys = np.arange(q, q + 8)[:, None], np.arange(k, k + 8)[None]
            allowed = np.asarray(spec.allowed(queries, keys, params, segments[queries], segments[keys]))
            some, every = spec.tile_coverage(*(Span(x.min(), x.max()) for x in (queries, keys)), params,
                                      *(Span(x.min(), x.max()) for x in (segments[queries], segments[keys])))
            assert some or not allowed.any()
            assert not every or allowed.all()
            seen.add((bool(some), bool(every)))
            if spec.kind != "annealed" or ratio == 0:
                if spec.kind == "block_diffusion" and (q // spec.text_length != (q + 7) // spec.text_length
                                                       or k // spec.text_length != (k + 7) // spec.text_length):
                    continue  # across copies a tile is taken to reach over whole texts
                assert some == allowed.any() and every == allowed.all()
    assert seen == {(False, False), (True, False), (True, True)}


def test_what_it_cannot_do_is_refused():
    tensors = inputs()[:3]
    with pytest.raises(ConfigError, match="use the xla backend for an explicit matrix"):
        SMALL(*tensors, AttentionMask.matrix(jnp.ones((LENGTH, LENGTH), bool)))
    with pytest.raises(ConfigError, match="multiples of 128, got block_q=16"):
        tpu_attention(*tensors, AttentionMask.causal(), block_q=16)


def tpu_gradients(head_dim: int, length: int):
    """A jitted gradient of everything the kernels can do, and what it takes."""
    def loss(query, key, value, ratio, segments, lengths):
        mask = AttentionMask.annealed(ratio, 5, EXAMPLES).with_segments(segments).with_lengths(lengths).with_window(900)
        out = tpu_attention(query, key, value, mask, dropout_rate=0.1, dropout_seeds=SEEDS)
        return jnp.sum(out.astype(jnp.float32))

    shapes = [((2, length, h, head_dim), jnp.bfloat16) for h in (4, 2, 2)]
    shapes += [((), jnp.float32), ((2, length), jnp.int32), ((2,), jnp.int32)]
    return jax.jit(jax.grad(loss, (0, 1, 2))), shapes


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_lowers_for_a_tpu(head_dim):
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    gradients, shapes = tpu_gradients(head_dim, length=1100)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)):
        lowered = gradients.trace(*(jax.ShapeDtypeStruct(*x) for x in shapes)).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") == 3


@pytest.fixture
def tpu_mesh(monkeypatch):
    """One chip to compile for. Pallas asks the mesh which TPU it lowers for."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    return jax.sharding.Mesh([device], ("x",), axis_types=(AxisType.Auto,))


def compiled_for(mesh, function, shapes):
    with jax.set_mesh(mesh):
        everywhere = NamedSharding(mesh, PartitionSpec())
        return function.lower(*(jax.ShapeDtypeStruct(*x, sharding=everywhere) for x in shapes)).compile()


def test_compiles_for_a_tpu_without_a_square(tpu_mesh):
    length = 8192
    compiled = compiled_for(tpu_mesh, *tpu_gradients(head_dim=64, length=length))
    assert compiled.memory_analysis().peak_memory_in_bytes < 4 * length**2  # the float32 square of one head


@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_compiles_for_a_tpu(tpu_mesh, mask):
    def loss(query, key, value):
        return jnp.sum(tpu_attention(query, key, value, mask).astype(jnp.float32))

    shapes = [((2, LENGTH, 2, 64), jnp.bfloat16)] * 3
    assert compiled_for(tpu_mesh, jax.jit(jax.grad(loss, (0, 1, 2))), shapes)
