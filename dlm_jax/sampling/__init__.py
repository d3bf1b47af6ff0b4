"""From noise to text: a sampler is a reveal policy times a token choice."""

from dlm_jax.sampling.batching import sample_rows
from dlm_jax.sampling.config import POLICIES, SamplerConfig, sampler_config
from dlm_jax.sampling.loop import Sample, sample, stream
from dlm_jax.sampling.spec import SamplingSpec
from dlm_jax.sampling.text import GAP, PaddedBatch, bucket, pad_rows
from dlm_jax.sampling.trace import Snapshot, Trace

__all__ = ["GAP", "POLICIES", "PaddedBatch", "Sample", "SamplerConfig", "Snapshot", "SamplingSpec", "Trace", "bucket", "pad_rows",
           "sample", "sample_rows", "sampler_config", "stream"]
