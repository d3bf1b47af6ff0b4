"""Planning without the machine: whether a recipe fits on TPU slices or GPUs, what it sends, how long it takes."""

from dlm_jax.plan.compile import Base, CompileError, Memory, check_plan, describe_base
from dlm_jax.plan.report import Plan, Trial, make_plan, suggest
from dlm_jax.plan.topology import Target, Topology, gpu_target, read_topology, tpu_target

__all__ = ["Base", "CompileError", "Memory", "Plan", "Target", "Topology", "Trial", "check_plan", "describe_base",
           "gpu_target", "make_plan", "read_topology", "suggest", "tpu_target"]
