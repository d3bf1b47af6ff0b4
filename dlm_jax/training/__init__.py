"""From a base model and a corpus to a trained model.

`setup` opens a run, `loop` takes its steps (`step` on a `state`, `optimizer`), which minimize `diffusion_loss` or what
is in `draft_loss`. `hooks` do everything else (validation, samples, checkpoints, a profile), `metrics` measures and
reports, and `flops` counts what a step computes.
"""

from dlm_jax.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, {
    "config": ("TrainConfig",),
    "loop": ("train",),
    "flops": ("count_params",),
    "metrics": ("read_records",),
})
