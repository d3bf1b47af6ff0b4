"""Planning without the machine: whether a recipe fits on TPU slices or GPUs, what it sends, how long it takes."""

from dlm_jax.plan.compile import Base, CompileError, check_plan, describe_base
from dlm_jax.plan.report import LargestBatch, Plan, Trial, largest_batch, make_plan, suggest
from dlm_jax.plan.topology import Target, Topology, gpu_target, read_topology, tpu_target

__all__ = ["Base", "CompileError", "LargestBatch", "Plan", "Target", "Topology", "Trial", "check_plan", "describe_base",
           "gpu_target", "largest_batch", "make_plan", "read_topology", "suggest", "tpu_target"]
