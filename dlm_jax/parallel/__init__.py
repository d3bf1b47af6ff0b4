"""Where arrays live: the device mesh, and one table from logical axes to mesh axes."""

from dlm_jax.parallel.mesh import AXES, MeshConfig, describe_mesh, make_mesh, mesh_sizes
from dlm_jax.parallel.place import place_rows, split_rows, to_host
from dlm_jax.parallel.processes import join_processes, stop_wanted, told_by_first
from dlm_jax.parallel.rules import (
    ATTENTION_PARTITION,
    RULES,
    array_sharding,
    batch_parts,
    is_param,
    param_shardings,
    spec_of,
    state_shardings,
)

__all__ = ["ATTENTION_PARTITION", "AXES", "RULES", "MeshConfig", "array_sharding", "batch_parts",
           "describe_mesh", "is_param", "join_processes", "make_mesh", "mesh_sizes", "param_shardings", "place_rows",
           "spec_of", "split_rows", "state_shardings", "stop_wanted", "to_host", "told_by_first"]
