import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from dlm_jax.errors import ConfigError
from dlm_jax.models import ExpertsConfig, ModelConfig, abstract_model
from dlm_jax.parallel import (
    MeshConfig,
    array_sharding,
    make_global_batch,
    make_mesh,
    param_shardings,
    partition_spec,
    state_shardings,
)

STORED = ("fsdp", "context", "expert")  # shards of a batch, of its sequences and of experts also shard parameters


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def model(**changes):
    sizes = dict(family="llama", vocab_size=64, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4,
                 mlp_size=32, max_length=8, tie_embeddings=False)
    return abstract_model(ModelConfig(**sizes | changes))


def test_parameters(mesh):
    specs = jax.tree.map(lambda sharding: sharding.spec, param_shardings(model(), mesh))
    assert specs["blocks"]["attention"]["q"]["kernel"].get_value() == P(None, STORED, "tensor", None)
    assert specs["blocks"]["attention"]["out"]["kernel"].get_value() == P(None, "tensor", None, STORED)
    assert specs["blocks"]["mlp"]["down"]["kernel"].get_value() == P(None, "tensor", STORED)
    assert specs["embed"]["embedding"].get_value() == P("tensor", STORED)
    assert specs["head"]["kernel"].get_value() == P(STORED, "tensor")
    assert specs["final_norm"]["scale"].get_value() == P(None)


def test_experts():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, expert=2))
    specs = jax.tree.map(lambda sharding: sharding.spec, param_shardings(model(experts=ExpertsConfig(4, 2)), mesh))
    mlp = specs["blocks"]["mlp"]
    assert mlp["gate"]["kernel"].get_value() == P(None, "expert", ("fsdp", "context"), "tensor")
    assert mlp["down"]["kernel"].get_value() == P(None, "expert", "tensor", ("fsdp", "context"))
    assert mlp["router"]["weight"].get_value() == P(None, STORED, None)
    with pytest.raises(ConfigError, match="expert.*blocks.mlp.down.kernel"):
        param_shardings(model(experts=ExpertsConfig(3, 2)), mesh)


def test_vocabulary_that_does_not_divide_is_replicated(mesh):
    specs = param_shardings(model(vocab_size=65), mesh)
    assert specs["embed"]["embedding"].get_value().spec == P(None, STORED)


def test_axis_that_does_not_divide_is_refused():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    with pytest.raises(ConfigError, match="kv_heads.*blocks.attention.k.kernel.*tensor"):
        param_shardings(model(), mesh)


def test_unknown_axis_and_wrong_rank_are_refused(mesh):
    with pytest.raises(ConfigError, match="'channels'"):
        partition_spec(("channels",), (4,), mesh)
    with pytest.raises(ConfigError, match="embed"):
        partition_spec(("embed", "mlp"), (4,), mesh)


@pytest.mark.parametrize("optimizer", [optax.adam(1.0), optax.adafactor(1.0, min_dim_size_to_factor=4)])
def test_optimizer_state_follows_its_parameter(mesh, optimizer):
    params = nnx.state(model())
    opt_state = jax.eval_shape(optimizer.init, params)
    shardings = state_shardings(opt_state, mesh)
    # shard_shape raises unless every axis divides
    jax.tree.map(lambda leaf, sharding: sharding.shard_shape(leaf.shape), opt_state, shardings)
    if hasattr(opt_state[0], "mu"):
        assert shardings[0].mu["blocks"]["mlp"]["up"]["kernel"].get_value().spec == P(None, STORED, "tensor")
        assert shardings[0].count.spec == P()
    else:
        assert shardings[0].v_row["blocks"]["mlp"]["up"]["kernel"].get_value().spec == P()


def test_batch_is_split_over_data_and_fsdp(mesh):
    sharding = array_sharding(mesh, "batch", "length")
    placed = jax.device_put(jnp.zeros((8, 4)), sharding)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 4)}


@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(data=2, fsdp=2, context=2), MeshConfig(fsdp=1, tensor=8)])
def test_global_batch_reads_each_shard_once(config):
    rows, reads = np.arange(16 * 8).reshape(16, 8), []

    def read(rows_slice):
        reads.append((rows_slice.start, rows_slice.stop))
        return {"rows": rows[rows_slice], "index": np.arange(16)[rows_slice]}

    placed = make_global_batch(read, 16, make_mesh(config))
    np.testing.assert_array_equal(placed["rows"], rows)
    np.testing.assert_array_equal(placed["index"], np.arange(16))
    assert len(reads) == len(set(reads)) and sum(stop - start for start, stop in reads) == 16


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="12.*8"):
        make_global_batch(lambda rows: np.zeros((12, 2))[rows], 12, make_mesh())
