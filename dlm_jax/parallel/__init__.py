"""Devices and processes: the mesh, and one table from logical axes to mesh axes."""

from dlm_jax.parallel.distributed import broadcast_from_process_zero, initialize_distributed, preemption_requested
from dlm_jax.parallel.mesh import AXES, MeshConfig, describe_mesh, make_mesh, mesh_sizes
from dlm_jax.parallel.sharding import (
    ATTENTION_PARTITION,
    RULES,
    array_sharding,
    is_param,
    make_global_batch,
    num_batch_shards,
    param_shardings,
    partition_spec,
    shard_batch,
    state_shardings,
    to_host,
)

__all__ = ["ATTENTION_PARTITION", "AXES", "RULES", "MeshConfig", "array_sharding", "broadcast_from_process_zero",
           "describe_mesh", "initialize_distributed", "is_param", "make_global_batch", "make_mesh", "mesh_sizes",
           "num_batch_shards", "param_shardings", "partition_spec", "preemption_requested", "shard_batch",
           "state_shardings", "to_host"]
