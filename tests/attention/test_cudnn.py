"""cuDNN's arguments run through JAX's plain implementation here, and through cuDNN where there is a GPU."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlm_jax.attention import AttentionMask, attend, cudnn, xla_attention
from dlm_jax.attention.cudnn import cudnn_attention, cudnn_block_attention, mask_arguments, query_chunks
from dlm_jax.errors import ConfigError
from dlm_jax.models import Compute, ModelConfig, Transformer
from dlm_jax.parallel import ATTENTION_PARTITION, MeshConfig, make_mesh
from tests.attention.parity import (
    BLOCK_MASKS,
    MESHES,
    ON_GPU,
    TEXT,
    TEXT_SEGMENTS,
    assert_close,
    inputs,
    lowered_cudnn_calls,
    mesh_id,
    on_mesh,
    value_and_gradients,
)

LENGTH = 32
EXAMPLES = jnp.array([7, 8, 9, 4_000_000_000], jnp.uint32)
LENGTHS = jnp.array([LENGTH, 30, 25, 1])
SEGMENTS = jnp.repeat(jnp.array([[0, 1, 2]] * 4), jnp.array([7, 12, 13]), axis=1)
CAUSAL, BIDIRECTIONAL, ANNEALED = (
    AttentionMask.causal(), AttentionMask.bidirectional(), AttentionMask.annealed(0.4, 5, EXAMPLES))
MASKS = {
    "causal": CAUSAL,
    "causal, window": CAUSAL.with_window(5),
    "causal, lengths": CAUSAL.with_lengths(LENGTHS),
    "causal, window, lengths": CAUSAL.with_window(5).with_lengths(LENGTHS),
    "causal, segments": CAUSAL.with_segments(SEGMENTS),
    "bidirectional": BIDIRECTIONAL,
    "bidirectional, window": BIDIRECTIONAL.with_window(5),
    "bidirectional, lengths": BIDIRECTIONAL.with_lengths(LENGTHS),
    "bidirectional, segments": BIDIRECTIONAL.with_segments(SEGMENTS),
    "annealed": ANNEALED,
    "annealed, shared": AttentionMask.annealed(0.4, 5),
    "annealed, everything": ANNEALED.with_segments(SEGMENTS).with_window(9).with_lengths(LENGTHS),
    "block causal": AttentionMask.block_causal(6),
    "matrix": AttentionMask.matrix(np.tri(LENGTH, k=3)),
}
KNOWN = {"causal", "causal, window", "causal, lengths", "bidirectional", "bidirectional, lengths"}
ON_CUDNN = pytest.param("cudnn", jnp.bfloat16, marks=pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU"))


@pytest.fixture
def short_chunks(monkeypatch):
    """Makes chunks of at least two tokens, and at most a third of the text."""
    monkeypatch.setattr(cudnn, "_MAX_CHUNKS", 3)
    monkeypatch.setattr(cudnn, "_MIN_CHUNK", 2)


def assert_parity(attention, tensors, mask, implementation):
    """Compares with the reference in float32."""
    exact = tuple(x.astype(jnp.float32) for x in tensors)
    expected = jax.jit(functools.partial(value_and_gradients, xla_attention))(exact, mask)
    attention = functools.partial(attention, implementation=implementation)
    found = jax.jit(functools.partial(value_and_gradients, attention))(tensors, mask)
    assert_close(found, expected, 3e-6 if tensors[0].dtype == jnp.float32 else 0.02)


@pytest.mark.parametrize("implementation, dtype", [("xla", jnp.float32), ("xla", jnp.bfloat16), ON_CUDNN])
@pytest.mark.parametrize("length, kv_heads", [(LENGTH, 1), (LENGTH - 1, 2)])
@pytest.mark.parametrize("name", MASKS)
def test_matches_xla(name, length, kv_heads, implementation, dtype):
    assert_parity(cudnn_attention, inputs(4, length, 4, kv_heads, 16, dtype), MASKS[name], implementation)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("implementation, dtype", [("xla", jnp.float32), ON_CUDNN])
@pytest.mark.parametrize("mask", BLOCK_MASKS.values(), ids=BLOCK_MASKS.keys())
def test_chunks_match_the_full_square(mask, implementation, dtype):
    tensors = inputs(2, mask.spec.text_length * (mask.spec.views + 1), dtype=dtype)
    assert_parity(cudnn_block_attention, tensors, mask, implementation)


@pytest.mark.skipif(ON_GPU or not os.path.exists("/dev/nvidiactl"), reason="needs an NVIDIA GPU")
def test_matches_xla_on_the_gpu():
    """Tests run on the CPU even where there is a GPU, so this starts a process."""
    subprocess.run([sys.executable, "-m", "pytest", __file__, "-k", "cudnn-bfloat16"], check=True,
                   env=os.environ | {"JAX_PLATFORMS": ""})


@pytest.mark.parametrize("name", MASKS)
def test_square_only_for_masks_that_cudnn_does_not_know(name):
    arguments = mask_arguments(MASKS[name], 4, LENGTH, LENGTH)
    assert (arguments.mask is None) == (name in KNOWN)
    if arguments.mask is not None:
        per_example = MASKS[name].example_index is not None or "segments" in name or "lengths" in name
        assert arguments.mask.shape == (4 if per_example else 1, 1, LENGTH, LENGTH)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("mesh", MESHES, ids=mesh_id)
@pytest.mark.parametrize("name", ["causal", "causal, window", "bidirectional, lengths", "annealed, shared",
                                  "annealed, everything", "block diffusion"])
def test_mesh_matches_one_device(mesh, name):
    attention, mask, length = cudnn_attention, MASKS.get(name), LENGTH
    if name == "block diffusion":
        attention, length = cudnn_block_attention, 2 * TEXT
        mask = AttentionMask.block_diffusion(3, TEXT).with_segments(np.tile(TEXT_SEGMENTS, (2, 1)))
    tensors = inputs(4, length)
    expected = jax.jit(functools.partial(value_and_gradients, xla_attention))(tensors, mask)
    attention = functools.partial(attention, partition=ATTENTION_PARTITION, implementation="xla")
    assert_close(on_mesh(mesh, attention, tensors, mask), expected, 3e-6)


@pytest.mark.parametrize("text, size, views", [(2048, 32, 1), (2048, 4, 2), (4096, 100, 1), (512, 4, 1), (64, 4, 1)])
@pytest.mark.parametrize("bidirectional_clean", [False, True])
def test_chunks_cover_the_copies_and_save_work(text, size, views, bidirectional_clean):
    chunks = list(query_chunks(AttentionMask.block_diffusion(size, text, views,
                                                             bidirectional_clean=bidirectional_clean)))
    copies, positions = views + bidirectional_clean, np.arange((views + 1) * text)
    np.testing.assert_array_equal(np.concatenate([positions[queries] for queries, _ in chunks]),
                                  positions[: copies * text])
    area = sum(len(positions[queries]) * sum(len(positions[r]) for r in keys) for queries, keys in chunks)
    assert all((queries.start % text) % size == 0 for queries, _ in chunks)
    assert area / (copies * text**2) < (0.7 if text >= 2048 else 0.9 if text >= 512 else 2)


@pytest.mark.usefixtures("pretend_cudnn")
@pytest.mark.parametrize("length", [LENGTH, LENGTH - 1])
@pytest.mark.parametrize("name", MASKS)
def test_lowers_for_cuda_without_a_gradient_of_the_mask(name, length):
    forward = "fmhaSoftmax" if name in KNOWN else "fmhaScaleBiasSoftmax"
    attention = functools.partial(attend, backend="cudnn")
    calls = lowered_cudnn_calls(functools.partial(value_and_gradients, attention),
                                inputs(4, length, head_dim=16, dtype=jnp.bfloat16), MASKS[name])
    assert calls == [(forward, 2), (f"{forward}Backward", 3)]  # the output and its logsumexp; dq, dk, dv


@pytest.mark.usefixtures("pretend_cudnn")
def test_block_diffusion_lowers_for_cuda_in_chunks():
    mask = AttentionMask.block_diffusion(4, 512)
    calls = lowered_cudnn_calls(functools.partial(value_and_gradients, functools.partial(attend, backend="cudnn")),
                                inputs(2, 1024, dtype=jnp.bfloat16), mask)
    names = [name for name, _ in calls]
    for name, count in (("fmhaScaleBiasSoftmax", 4), ("fmhaSoftmax", 1)):  # four chunks, and the clean copy
        assert names.count(name) == names.count(f"{name}Backward") == count
    assert len(names) == 10


@pytest.mark.usefixtures("pretend_cudnn")
@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_on_a_mesh_share_one_square(remat):
    layers = 3
    config = ModelConfig("llama", vocab_size=64, hidden_size=64, num_layers=layers, num_heads=4, num_kv_heads=2,
                         head_dim=16, mlp_size=48, max_length=LENGTH)
    model = Transformer(config, rngs=nnx.Rngs(0), compute=Compute("bfloat16", remat, "cudnn", ATTENTION_PARTITION))
    graphdef, params = nnx.split(model)

    def gradient(params, tokens, mask):
        return jax.grad(lambda params: jnp.sum(nnx.merge(graphdef, params).hidden(tokens, mask).astype(float)))(params)

    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2, context=2))):
        args = params, jnp.zeros((4, LENGTH), jnp.int32), ANNEALED
        names = [name for name, _ in lowered_cudnn_calls(gradient, *args)]
        program = str(jax.make_jaxpr(gradient)(*args))
    assert names.count("fmhaScaleBiasSoftmaxBackward") == 1
    assert names.count("fmhaScaleBiasSoftmax") == (2 if remat == "full" else 1)
    assert f"16,{LENGTH}]" in program  # a device's shard of the square
    assert not re.search(rf"\[{layers},[\d,]*,(16|{LENGTH}),{LENGTH}\]", program)


@pytest.mark.usefixtures("pretend_cudnn")
def test_dropout_is_refused_only_where_something_is_dropped():
    tensors, seeds = inputs(4, LENGTH, dtype=jnp.bfloat16)[:3], EXAMPLES
    with pytest.raises(ConfigError, match="model.dropout=0"):
        attend(*tensors, CAUSAL, backend="cudnn", dropout_rate=0.1, dropout_seeds=seeds)
    for quiet in ({"dropout_rate": 0.1}, {"dropout_rate": 0.0, "dropout_seeds": seeds}):
        assert lowered_cudnn_calls(functools.partial(attend, mask=CAUSAL, backend="cudnn", **quiet), *tensors)
