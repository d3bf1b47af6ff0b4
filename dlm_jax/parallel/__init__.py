"""Devices and processes: the mesh, and one table from logical axes to mesh axes."""

from dlm_jax.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, {
    "distributed": ("broadcast_from_process_zero", "initialize_distributed", "preemption_requested"),
    "mesh": ("describe_mesh", "make_mesh"),
    "sharding": ("ATTENTION_PARTITION", "RULES", "all_gather_embeddings", "array_sharding", "is_param",
                 "make_global_batch", "num_batch_shards", "param_shardings", "partition_spec", "shard_batch",
                 "state_shardings", "to_host", "use_mesh"),
    "config": ("AXES", "MeshConfig", "mesh_sizes"),
})
