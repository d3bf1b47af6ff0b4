"""Where arrays live: the device mesh, and one table from logical axes to mesh axes."""

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

__all__ = ["ATTENTION_PARTITION", "AXES", "RULES", "MeshConfig", "array_sharding", "num_batch_shards",
           "describe_mesh", "is_param", "initialize_distributed", "make_mesh", "mesh_sizes", "param_shardings", "make_global_batch",
           "partition_spec", "shard_batch", "state_shardings", "preemption_requested", "to_host", "broadcast_from_process_zero"]
