"""Any number of rows: in batches of any size, step by step, and on a mesh, the same tokens."""

import jax
import numpy as np
import pytest
from flax import nnx

from dlm_jax.errors import DataError
from dlm_jax.models import Compute, abstract_model
from dlm_jax.parallel import ATTENTION_PARTITION, MeshConfig, array_sharding, make_mesh, param_shardings
from dlm_jax.sampling import GAP, sample, sample_rows
from tests.sampling.tiny_models import EOS, MASK, make_batch, make_keys, make_spec, tiny


def shard_model(model, mesh):
    graphdef, params = nnx.split(model)
    return nnx.merge(graphdef, jax.device_put(params, param_shardings(params, mesh)))


def test_rows_do_not_depend_on_batch_size_callback_or_mesh():
    model, spec, keys = tiny("llama", vocab_size=64), make_spec(policy="confidence", num_steps=4), make_keys(5)
    # All of one width, since compilation takes most of the time.
    rows = [[1, 5, *[GAP] * gaps, 7][:length] for gaps, length in ((3, 9), (26, 30), (6, 9), (2, 3), (23, 30))]
    expected = sample_rows(model, rows, keys, spec, batch_size=8)
    for row, tokens in zip(rows, expected, strict=True):
        assert len(tokens) == len(row) and MASK not in tokens
        assert all(token == given for token, given in zip(tokens, row, strict=True) if given != GAP)
    seen, mesh = [], make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    split = shard_model(model, mesh)
    for found in (sample_rows(model, rows, keys, spec, batch_size=2),
                  sample_rows(split, rows, keys, spec, batch_size=3, mesh=mesh, on_step=seen.append)):
        for tokens, reference in zip(found, expected, strict=True):
            np.testing.assert_array_equal(tokens, reference)
    assert sorted(row for snapshot in seen if snapshot.step == 0 for row in snapshot.rows) == [0, 1, 2, 3, 4]
    last = {row: snapshot for snapshot in seen for row in snapshot.rows}
    assert not any(snapshot.masked.any() for snapshot in last.values())
    assert sample_rows(model, [], keys[:0], spec, batch_size=2) == []
    with pytest.raises(DataError, match="text 1"):
        sample_rows(model, [[1, GAP], [GAP, 1]], keys[:2], spec, batch_size=2)


@pytest.mark.parametrize(("settings", "mesh"), [
    (dict(policy="threshold", threshold=0.3, block_length=12, cache="prefix", cfg_scale=0.5, repetition_penalty=1.2,
          remask=0.2), MeshConfig(data=2, tensor=2, context=2)),
    (dict(policy="autoregressive", temperature=0.8), MeshConfig(data=2, fsdp=2, tensor=2)),
], ids=["prefix cache, guidance", "autoregressive"])
def test_mesh_samples_what_one_device_samples(settings, mesh, capfd):
    spec = make_spec(eos=EOS, stop=True, **settings)
    model, arrays = tiny("llama", vocab_size=64), make_batch(spec.config.policy)
    expected = sample(model, *arrays, make_keys(4), spec)
    mesh = make_mesh(mesh)
    axes = ("batch", "length"), ("batch", "length"), ("batch",), ("batch",)
    placed = [jax.device_put(array, array_sharding(mesh, *names))
              for array, names in zip((*arrays, make_keys(4)), axes, strict=True)]
    found = sample(shard_model(model, mesh), *placed, spec)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-4)
    np.testing.assert_array_equal(found.steps, expected.steps)
    assert "rematerialization" not in capfd.readouterr().err  # XLA's warning when it moves an entire array


def test_host_arrays_with_a_mesh_set():
    """As training samples a text: a few rows, not placed, while the mesh is set."""
    spec = make_spec(policy="confidence", num_steps=6)
    model, arrays, keys = tiny("llama", vocab_size=64), [array[:3] for array in make_batch()], make_keys(3)
    expected = sample(model, *arrays, keys, spec)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        graphdef = nnx.graphdef(abstract_model(model.config, Compute(partition=ATTENTION_PARTITION)))
        split = shard_model(nnx.merge(graphdef, nnx.state(model)), mesh)
        found = sample(split, *arrays, keys, spec)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
