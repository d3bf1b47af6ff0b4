"""Eight devices: parameters and rows split, and the texts those of one device."""

import jax
import numpy as np
import pytest
from flax import nnx

from dlm_jax.models import Compute, abstract_model
from dlm_jax.parallel import ATTENTION_PARTITION, MeshConfig, array_sharding, make_mesh, param_shardings
from dlm_jax.sampling import SamplerConfig, SamplingSpec, sample, stream
from tests.sampling.tools import EOS, MASK, keys_of, problem, tiny

CASES = {
    "random": dict(policy="random", num_steps=8, top_p=0.9),
    "confidence, dual cache": dict(policy="confidence", num_steps=16, block_length=8, cache="dual", remask=0.2),
    "threshold, prefix cache, guidance": dict(policy="threshold", threshold=0.3, block_length=12, cache="prefix",
                                              cfg_scale=0.5, repetition_penalty=1.2),
    "autoregressive": dict(policy="autoregressive", temperature=0.8),
}


def spread(model, mesh):
    graphdef, params = nnx.split(model)
    return nnx.merge(graphdef, jax.device_put(params, param_shardings(params, mesh)))


@pytest.mark.parametrize(("name", "mesh"), [
    *[(name, MeshConfig(data=2, fsdp=2, tensor=2)) for name in CASES],
    ("confidence, dual cache", MeshConfig(data=2, tensor=2, context=2)),
], ids=str)
def test_a_mesh_samples_what_one_device_does(name, mesh, capfd):
    config = SamplerConfig(**CASES[name])
    spec = SamplingSpec(config, MASK, True, (EOS,), stop_at_eos=True)
    model, arrays = tiny("llama", vocab_size=64), problem(config.policy)
    expected = sample(model, *arrays, keys_of(4), spec)

    mesh = make_mesh(mesh)
    split = spread(model, mesh)
    axes = ("batch", "length"), ("batch", "length"), ("batch",), ("batch",)
    placed = [jax.device_put(array, array_sharding(mesh, *names))
              for array, names in zip((*arrays, keys_of(4)), axes, strict=True)]
    found = sample(split, *placed, spec)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-4)
    np.testing.assert_array_equal(found.steps, expected.steps)
    assert "rematerialization" not in capfd.readouterr().err  # XLA's word for moving an array whole


def test_host_arrays_of_any_number_of_rows_on_a_mesh_in_use():
    """As training samples a text: a row or three, not placed, while the mesh is set."""
    spec = SamplingSpec(SamplerConfig("confidence", num_steps=6), MASK, True)
    model, arrays, keys = tiny("llama", vocab_size=64), [array[:3] for array in problem()], keys_of(3)
    expected = sample(model, *arrays, keys, spec)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        graphdef = nnx.graphdef(abstract_model(model.config, Compute(partition=ATTENTION_PARTITION)))
        split = spread(nnx.merge(graphdef, nnx.state(model)), mesh)
        np.testing.assert_array_equal(sample(split, *arrays, keys, spec).tokens, expected.tokens)
        *_, last = stream(split, *arrays, keys, spec)
    np.testing.assert_array_equal(last.tokens, expected.tokens)
