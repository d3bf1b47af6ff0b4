"""Options with which XLA compiles quickly and optimizes little."""

import jax


def quick(level: int = 0) -> dict[str, int | bool]:
    """For `jax.jit(compiler_options=...)`; JAX 0.12 no longer has one of them."""
    emitters = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 12) else {}
    return {"xla_backend_optimization_level": level, "xla_cpu_parallel_codegen_split_count": 1} | emitters
