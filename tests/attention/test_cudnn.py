"""cuDNN's arguments run through JAX's plain implementation here, and through cuDNN where there is a GPU."""

import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dlm_jax.attention import AttentionMask, attend
from dlm_jax.attention.cudnn import cudnn_arguments, cudnn_attention
from dlm_jax.attention.xla import xla_attention
from dlm_jax.errors import ConfigError
from dlm_jax.models import Compute, ModelConfig, Transformer
from dlm_jax.parallel import ATTENTION_PARTITION, MeshConfig, make_mesh
from tests.attention.tools import ON_GPU, assert_close, jit, lowered_calls, value_and_gradients

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


def inputs(dtype=jnp.float32, length=LENGTH, kv_heads=2):
    """Query, key, value, and weights of the output for a loss."""
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(4, length, heads, 16)), dtype) for heads in (4, kv_heads, kv_heads, 4))


@pytest.mark.parametrize("implementation, dtype", [
    ("xla", jnp.float32),
    ("xla", jnp.bfloat16),
    pytest.param("cudnn", jnp.bfloat16, marks=pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")),
])
@pytest.mark.parametrize("length, kv_heads", [(LENGTH, 1), (LENGTH - 1, 2)])
@pytest.mark.parametrize("name", MASKS)
def test_matches_dense(name, length, kv_heads, implementation, dtype):
    tensors, mask = inputs(dtype, length, kv_heads), MASKS[name]
    exact = tuple(x.astype(jnp.float32) for x in tensors)
    expected = value_and_gradients(xla_attention, exact, mask)
    attention = functools.partial(cudnn_attention, implementation=implementation)
    run = jax.jit if implementation == "cudnn" else lambda function: function
    found = run(functools.partial(value_and_gradients, attention))(tensors, mask)
    assert_close(found, expected, 2e-6 if dtype == jnp.float32 else 0.02)


@pytest.mark.skipif(ON_GPU or not os.path.exists("/dev/nvidiactl"), reason="needs an NVIDIA GPU")
def test_matches_dense_on_the_gpu():
    """The tests run on the CPU, also where there is a GPU: a process of its own."""
    files = pathlib.Path(__file__).parent.glob("test_cudnn*.py")
    subprocess.run([sys.executable, "-m", "pytest", *files, "-k", "cudnn-bfloat16"], check=True,
                   env=os.environ | {"JAX_PLATFORMS": ""})


@pytest.mark.parametrize("name", MASKS)
def test_a_square_is_made_only_where_cudnn_does_not_know_the_mask(name):
    arguments = cudnn_arguments(MASKS[name], 4, LENGTH, LENGTH)
    assert (arguments.mask is None) == (name in KNOWN)
    if arguments.mask is not None:
        per_example = MASKS[name].example_index is not None or "segments" in name or "lengths" in name
        assert arguments.mask.shape == (4 if per_example else 1, 1, LENGTH, LENGTH)


@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=2, tensor=2, context=2)],
                         ids=lambda mesh: "x".join(map(str, mesh.sizes())))
@pytest.mark.parametrize("name", ["causal", "causal, window", "bidirectional, lengths", "annealed, shared",
                                  "annealed, everything"])
def test_a_mesh_computes_what_one_device_does(mesh, name):
    tensors, mask = inputs(), MASKS[name]
    expected = jit(functools.partial(value_and_gradients, xla_attention))(tensors, mask)
    mesh = make_mesh(mesh)
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "context", "tensor"))
    attention = functools.partial(cudnn_attention, partition=ATTENTION_PARTITION, implementation="xla")
    with jax.set_mesh(mesh):
        found = jit(functools.partial(value_and_gradients, attention))(
            tuple(jax.device_put(tensor, split) for tensor in tensors), mask)
    assert_close(found, expected, 2e-6)


@pytest.mark.usefixtures("pretend_cudnn")
@pytest.mark.parametrize("length", [LENGTH, LENGTH - 1])
@pytest.mark.parametrize("name", MASKS)
def test_lowers_for_cuda_without_a_gradient_of_the_mask(name, length):
    forward = "fmhaSoftmax" if name in KNOWN else "fmhaScaleBiasSoftmax"
    attention = functools.partial(attend, backend="cudnn")
    calls = lowered_calls(functools.partial(value_and_gradients, attention), inputs(jnp.bfloat16, length), MASKS[name])
    assert calls == [(forward, 2), (f"{forward}Backward", 3)]  # the output and its logsumexp; dq, dk, dv


@pytest.mark.usefixtures("pretend_cudnn")
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_network_on_a_mesh_keeps_one_square_for_all_layers(remat):
    layers = 3
    config = ModelConfig("llama", vocab_size=64, hidden_size=64, num_layers=layers, num_heads=4, num_kv_heads=2,
                         head_dim=16, mlp_size=48, max_length=LENGTH)
    model = Transformer(config, rngs=nnx.Rngs(0), compute=Compute("bfloat16", remat, "cudnn", ATTENTION_PARTITION))
    graphdef, params = nnx.split(model)

    def gradient(params, tokens, mask):
        return jax.grad(lambda params: jnp.sum(nnx.merge(graphdef, params).hidden(tokens, mask).astype(float)))(params)

    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2, context=2))):
        args = params, jnp.zeros((4, LENGTH), jnp.int32), ANNEALED
        calls = lowered_calls(gradient, *args)
        program = str(jax.make_jaxpr(gradient)(*args))
    assert [name for name, _ in calls].count("fmhaScaleBiasSoftmaxBackward") == 1
    assert [name for name, _ in calls].count("fmhaScaleBiasSoftmax") == (2 if remat == "full" else 1)
    assert f"16,{LENGTH}]" in program  # a device's part of the square
    assert not re.search(rf"\[{layers},[\d,]*,(16|{LENGTH}),{LENGTH}\]", program)


def test_what_cannot_run_is_refused():
    with pytest.raises(ConfigError, match="cudnn needs cuDNN, which JAX does not find; set model.attention=xla"):
        attend(*inputs(jnp.bfloat16)[:3], CAUSAL, backend="cudnn")


@pytest.mark.usefixtures("pretend_cudnn")
def test_dropout_is_refused_only_where_something_is_dropped():
    tensors, seeds = inputs(jnp.bfloat16)[:3], EXAMPLES
    with pytest.raises(ConfigError, match="has no attention dropout .* set model.attention=xla, or model.dropout=0"):
        attend(*tensors, CAUSAL, backend="cudnn", dropout_rate=0.1, dropout_seeds=seeds)
    for quiet in ({"dropout_rate": 0.1}, {"dropout_rate": 0.0, "dropout_seeds": seeds}):
        assert lowered_calls(functools.partial(attend, mask=CAUSAL, backend="cudnn", **quiet), *tensors)
