"""A text sampled into the log, to see what a loss means."""

import jax
import jax.numpy as jnp
from flax import nnx

from dlm_jax.checkpoints import Pretrained
from dlm_jax.errors import ConfigError
from dlm_jax.random import example_keys
from dlm_jax.sampling import SamplerConfig, SamplingSpec, sample


def sample_text(base: Pretrained, params: nnx.State, *, length: int, num_steps: int, seed: int) -> str:
    """An unconditional text of `length` tokens from the parameters as they stand; the same noise each time."""
    first = base.eos_token_id if base.bos_token_id is None else base.bos_token_id
    if first is None:
        raise ConfigError("log.sample_every needs a tokenizer with a BOS or EOS token to begin a text with")
    model = nnx.merge(nnx.graphdef(base.model), params)
    tokens = jnp.full((1, length), first, jnp.int32)
    fixed = jnp.arange(length)[None] == 0
    spec = SamplingSpec(SamplerConfig(num_steps=num_steps, top_p=0.9), base.mask_token_id, base.shift,
                blocks=base.blocks)
    keys = example_keys(seed, jnp.zeros((1,), jnp.uint32))
    tokens = sample(model, tokens, fixed, jnp.full((1,), length), keys, spec).tokens
    return base.tokenizer.decode(jax.device_get(tokens)[0], skip_special_tokens=True)
