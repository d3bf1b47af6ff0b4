"""From noise to text: a sampler is a reveal policy times a token choice."""

from dlm_jax.sampling.canvas import GAP, Canvas, bucket, make_canvas
from dlm_jax.sampling.config import SamplerConfig, sampler_config
from dlm_jax.sampling.loop import Sample, sample, stream
from dlm_jax.sampling.policies import POLICIES
from dlm_jax.sampling.rows import sample_rows
from dlm_jax.sampling.task import Task
from dlm_jax.sampling.trace import Snapshot, Trace

__all__ = ["GAP", "POLICIES", "Canvas", "Sample", "SamplerConfig", "Snapshot", "Task", "Trace", "bucket", "make_canvas",
           "sample", "sample_rows", "sampler_config", "stream"]
