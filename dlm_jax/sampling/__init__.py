"""From noise to text: a sampler is a reveal policy times a token choice."""

from dlm_jax.sampling.canvas import GAP, Canvas, bucket, make_canvas
from dlm_jax.sampling.config import SamplerConfig
from dlm_jax.sampling.loop import sample
from dlm_jax.sampling.policies import POLICIES

__all__ = ["GAP", "POLICIES", "Canvas", "SamplerConfig", "bucket", "make_canvas", "sample"]
