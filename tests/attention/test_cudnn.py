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
    CAUSAL,
    LENGTH,
    MASKS,
    MESH_EXAMPLES,
    MESH_LENGTH,
    MESH_MASKS,
    MESHES,
    ON_GPU,
    TEXT,
    TEXT_SEGMENTS,
    assert_close,
    inputs,
    lowered_cudnn_calls,
    mesh_id,
    on_mesh,
    reference,
    run,
    value_and_gradients,
)

KNOWN = {"causal", "causal, window", "causal, lengths", "bidirectional", "bidirectional, lengths"}
SQUARE = {"causal, segments", "annealed, shared", "annealed, narrowed"}  # some of the others
NEEDS_GPU = pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")


@pytest.fixture
def short_chunks(monkeypatch):
    """Makes chunks of at least two tokens, and at most a third of the text."""
    monkeypatch.setattr(cudnn, "_MAX_CHUNKS", 3)
    monkeypatch.setattr(cudnn, "_MIN_CHUNK", 2)


def assert_parity(attention, tensors, mask, implementation, expected):
    attention = functools.partial(attention, implementation=implementation)
    found = run(attention, tensors, mask)
    assert_close(found, expected, 3e-6 if tensors[0].dtype == jnp.float32 else 0.02)


@pytest.mark.parametrize("name, length, kv_heads, implementation, dtype", [
    *((name, LENGTH, 2, "xla", "float32") for name in sorted(KNOWN | SQUARE)),
    *((name, LENGTH - 1, 1, "xla", "bfloat16") for name in ("causal, window", "bidirectional, lengths", "annealed")),
    *(pytest.param(name, length, kv_heads, "cudnn", "bfloat16", marks=NEEDS_GPU)
      for name in MASKS for length, kv_heads in ((LENGTH, 2), (LENGTH - 1, 1)))])
def test_matches_xla(name, length, kv_heads, implementation, dtype):
    tensors, expected = inputs(2, length, kv_heads=kv_heads, dtype=dtype), reference(name, length, kv_heads, dtype)
    assert_parity(cudnn_attention, tensors, MASKS[name], implementation, expected)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("implementation, dtype", [
    ("xla", "float32"), pytest.param("cudnn", "bfloat16", marks=NEEDS_GPU)])
@pytest.mark.parametrize("mask", BLOCK_MASKS.values(), ids=BLOCK_MASKS.keys())
def test_chunks_match_the_full_square(mask, implementation, dtype):
    tensors = inputs(2, mask.spec.text_length * (mask.spec.views + 1), dtype=dtype)
    expected = run(xla_attention, tuple(x.astype(jnp.float32) for x in tensors), mask)
    assert_parity(cudnn_block_attention, tensors, mask, implementation, expected)


@pytest.mark.skipif(ON_GPU or not os.path.exists("/dev/nvidiactl"), reason="needs an NVIDIA GPU")
def test_matches_xla_on_the_gpu():
    """Tests run on the CPU even where there is a GPU, so this starts a process."""
    subprocess.run([sys.executable, "-m", "pytest", __file__, "-k", "cudnn-bfloat16"], check=True,
                   env=os.environ | {"JAX_PLATFORMS": ""})


@pytest.mark.parametrize("name", MASKS)
def test_square_only_for_masks_that_cudnn_does_not_know(name):
    mask, positions = MASKS[name], jnp.arange(LENGTH)
    arguments = mask_arguments(mask, 2, LENGTH, LENGTH)
    assert (arguments.mask is None) == (name in KNOWN)
    if arguments.mask is not None:
        np.testing.assert_array_equal(arguments.mask[:, 0], mask.allowed(positions, positions))
        per_example = mask.example_index is not None or mask.spec.segments or mask.spec.lengths
        assert len(arguments.mask) == (2 if per_example else 1)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("mesh, name", [
    *((MESHES[0], name) for name in ("causal, window", "bidirectional, lengths", "annealed, narrowed", "blocks")),
    *((MESHES[1], name) for name in ("causal", "annealed, shared", "annealed, narrowed", "blocks"))], ids=mesh_id)
def test_mesh_matches_one_device(mesh, name):
    attention, mask, length = cudnn_attention, MESH_MASKS.get(name), MESH_LENGTH
    if name == "blocks":
        attention, length = cudnn_block_attention, 2 * TEXT
        mask = AttentionMask.block_diffusion(3, TEXT).with_segments(np.tile(TEXT_SEGMENTS, (2, 1)))
    tensors = inputs(4, length)
    attention = functools.partial(attention, partition=ATTENTION_PARTITION, implementation="xla")
    assert_close(on_mesh(mesh, attention, tensors, mask), run(xla_attention, tensors, mask), 3e-6)


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
@pytest.mark.parametrize("name, length", [
    *((name, LENGTH) for name in sorted(KNOWN | SQUARE)), ("causal", LENGTH - 1), ("bidirectional", LENGTH - 1)])
def test_lowers_for_cuda_without_a_gradient_of_the_mask(name, length):
    forward = "fmhaSoftmax" if name in KNOWN else "fmhaScaleBiasSoftmax"
    attention = functools.partial(attend, backend="cudnn")
    calls = lowered_cudnn_calls(functools.partial(value_and_gradients, attention),
                                inputs(2, length, dtype=jnp.bfloat16), MASKS[name])
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
                         head_dim=16, mlp_size=48, max_length=MESH_LENGTH)
    model = Transformer(config, rngs=nnx.Rngs(0), compute=Compute("bfloat16", remat, "cudnn", ATTENTION_PARTITION))
    graphdef, params = nnx.split(model)

    def gradient(params, tokens, mask):
        return jax.grad(lambda params: jnp.sum(nnx.merge(graphdef, params).hidden(tokens, mask).astype(float)))(params)

    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2, context=2))):
        args = params, jnp.zeros((4, MESH_LENGTH), jnp.int32), AttentionMask.annealed(0.4, 5, MESH_EXAMPLES)
        names = [name for name, _ in lowered_cudnn_calls(gradient, *args)]
        program = str(jax.make_jaxpr(gradient)(*args))
    assert names.count("fmhaScaleBiasSoftmaxBackward") == 1
    assert names.count("fmhaScaleBiasSoftmax") == (2 if remat == "full" else 1)
    assert f"16,{MESH_LENGTH}]" in program  # a device's shard of the square
    assert not re.search(rf"\[{layers},[\d,]*,(16|{MESH_LENGTH}),{MESH_LENGTH}\]", program)


@pytest.mark.usefixtures("pretend_cudnn")
def test_dropout_is_refused_only_where_something_is_dropped():
    tensors, seeds = inputs(2, LENGTH, dtype=jnp.bfloat16)[:3], jnp.zeros(2, jnp.uint32)
    with pytest.raises(ConfigError, match="model.dropout=0"):
        attend(*tensors, CAUSAL, backend="cudnn", dropout_rate=0.1, dropout_seeds=seeds)
    for quiet in ({"dropout_rate": 0.1}, {"dropout_rate": 0.0, "dropout_seeds": seeds}):
        assert lowered_cudnn_calls(functools.partial(attend, mask=CAUSAL, backend="cudnn", **quiet), *tensors)
