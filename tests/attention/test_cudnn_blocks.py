"""The copies of a text in pieces: what the whole square gives, and how much less of it is computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dlm_jax.attention import AttentionMask, attend, cudnn
from dlm_jax.attention.cudnn import cudnn_block_attention, pieces
from dlm_jax.parallel import ATTENTION_PARTITION, MeshConfig, make_mesh
from tests.attention.test_dense_blocks import SEGMENTS, TEXT, mask_of
from tests.attention.tools import ON_GPU, assert_close, jit, lowered_calls, value_and_gradients


@pytest.fixture
def short_pieces(monkeypatch):
    """Of at least two tokens, a third of the text at most."""
    monkeypatch.setattr(cudnn, "_PIECES", 3)
    monkeypatch.setattr(cudnn, "_SHORTEST", 2)


def inputs(mask, batch=2, dtype=jnp.float32):
    rng, length = np.random.default_rng(0), mask.text_length * (mask.views + 1)
    return tuple(jnp.asarray(rng.normal(size=(batch, length, heads, 8)), dtype) for heads in (4, 2, 2, 4))


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("implementation, dtype, tolerance", [
    ("xla", jnp.float32, 2e-6),
    pytest.param("cudnn", jnp.bfloat16, 0.02, marks=pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")),
])
@pytest.mark.parametrize("size, views, segments, window, bidirectional_clean", [
    (1, 1, False, None, False), (3, 1, False, None, True), (5, 2, True, None, False), (4, 1, True, 3, True),
    (TEXT, 1, False, None, False), (64, 2, False, 6, False)])
def test_matches_the_whole_square(size, views, segments, window, bidirectional_clean, implementation, dtype, tolerance):
    mask = mask_of(size, views, segments, window, bidirectional_clean)
    tensors = inputs(mask, dtype=dtype)
    exact = tuple(x.astype(jnp.float32) for x in tensors)
    square = functools.partial(attend, backend="xla")
    expected = jit(functools.partial(value_and_gradients, square))(exact, mask)
    attention = functools.partial(cudnn_block_attention, implementation=implementation)
    found = jax.jit(functools.partial(value_and_gradients, attention))(tensors, mask)
    assert_close(found, expected, tolerance)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=2, tensor=2, context=2)],
                         ids=lambda mesh: "x".join(map(str, mesh.sizes())))
def test_a_mesh_computes_what_one_device_does(mesh):
    mask = AttentionMask.block_diffusion(3, TEXT).with_segments(np.tile(SEGMENTS, (2, 1)))
    tensors = inputs(mask, batch=4)
    expected = jit(functools.partial(value_and_gradients, functools.partial(attend, backend="xla")))(tensors, mask)
    mesh = make_mesh(mesh)
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "context", "tensor"))
    attention = functools.partial(cudnn_block_attention, partition=ATTENTION_PARTITION, implementation="xla")
    with jax.set_mesh(mesh):
        found = jit(functools.partial(value_and_gradients, attention))(
            tuple(jax.device_put(tensor, split) for tensor in tensors), mask)
    assert_close(found, expected, 2e-6)


@pytest.mark.parametrize("text, size, views", [(2048, 32, 1), (2048, 4, 2), (4096, 100, 1), (512, 4, 1), (64, 4, 1)])
@pytest.mark.parametrize("bidirectional_clean", [False, True])
def test_pieces_fill_the_copies_and_compute_little(text, size, views, bidirectional_clean):
    found = list(pieces(AttentionMask.block_diffusion(size, text, views, bidirectional_clean=bidirectional_clean)))
    copies, at = views + bidirectional_clean, np.arange((views + 1) * text)
    np.testing.assert_array_equal(np.concatenate([at[own] for own, _ in found]), at[: copies * text])
    area = sum(len(at[own]) * sum(len(at[part]) for part in keys) for own, keys in found)
    assert all((own.start % text) % size == 0 for own, _ in found)
    assert area / (copies * text**2) < (0.7 if text >= 2048 else 0.9 if text >= 512 else 2)


@pytest.mark.usefixtures("pretend_cudnn")
def test_lowers_for_cuda_without_the_whole_square():
    mask = AttentionMask.block_diffusion(4, 512)
    calls = lowered_calls(functools.partial(value_and_gradients, functools.partial(attend, backend="cudnn")),
                          inputs(mask, dtype=jnp.bfloat16), mask)
    names = [name for name, _ in calls]
    for name, number in (("fmhaScaleBiasSoftmax", 4), ("fmhaSoftmax", 1)):  # four pieces, and the clean copy
        assert names.count(name) == names.count(f"{name}Backward") == number
    assert len(names) == 10
