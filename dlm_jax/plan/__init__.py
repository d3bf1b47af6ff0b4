"""Planning without the machine: does a recipe fit on a TPU slice or some GPUs, what does it send, how long it takes."""

from dlm_jax.plan.advice import LargestBatch, Trial, advise, largest_batch
from dlm_jax.plan.base import Base, describe_base
from dlm_jax.plan.measure import Plan, make_plan
from dlm_jax.plan.program import check_plan
from dlm_jax.plan.targets import Target, gpu_target, tpu_target
from dlm_jax.plan.topology import Topology, read_topology

__all__ = ["Base", "LargestBatch", "Plan", "Target", "Topology", "Trial", "advise", "check_plan", "describe_base",
           "gpu_target", "largest_batch", "make_plan", "read_topology", "tpu_target"]
