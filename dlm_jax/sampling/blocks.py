"""One block of tokens after another, by a model that block diffusion has taught; what is written is remembered exactly.

Text that is written sees nothing of what follows its block, so its keys and values never change and are kept. A step
computes the tokens of the block alone, which see themselves and all that is kept. When a block is full, its keys and
values as clean text are computed together with the first step of the next. Rows do not wait for each other: each is in
a block of its own.
"""

import jax
import jax.numpy as jnp

from dlm_jax.errors import ConfigError
from dlm_jax.models import Cache
from dlm_jax.sampling.config import SamplerConfig
from dlm_jax.sampling.spec import DecodeFrontier, Network, SamplingInputs, SamplingSpec, State, pending_mask


def check(config: SamplerConfig) -> None:
    """Raises ConfigError where settings are for models that see the whole row."""
    for name, nothing in (("block_length", None), ("cache", "none"), ("cfg_scale", 0.0)):
        if getattr(config, name) != nothing:
            raise ConfigError(f"this model writes in blocks of its own and keeps what it has written; leave {name} out")


def start(network: Network, spec: SamplingSpec, tokens: jax.Array, fixed: jax.Array, lengths: jax.Array,
          keys: jax.Array) -> tuple[SamplingInputs, State]:
    """The prompts, of any lengths, with their keys and values; arguments as in `loop.sample`."""
    positions = jnp.arange(tokens.shape[1])
    gaps = ~fixed & (positions > 0) & (positions < lengths[:, None])
    inputs = SamplingInputs(gaps, jnp.broadcast_to(positions // spec.blocks.size, gaps.shape), lengths, keys)
    zero = jnp.zeros_like(lengths)
    state = State(jnp.where(gaps, spec.mask_token_id, tokens), masked=gaps, confidence=jnp.zeros(gaps.shape),
                  steps=zero, block=zero, steps_in_block=zero, cache=None)
    block = jnp.where(pending_mask(spec, inputs, state), inputs.blocks, len(positions)).min(axis=1)
    prompts = state.tokens[:, : spec.prompt_width]
    # What is written past the blocks that are full is seen by no query before it has been written anew.
    hidden, cache = network.cached_hidden(
        prompts, spec.blocks.prefill_mask().with_lengths(lengths),
        jnp.broadcast_to(positions[: spec.prompt_width], prompts.shape),
        Cache.empty(network.config, *tokens.shape, network.compute.dtype))
    last = jnp.clip(block * spec.blocks.size - 1, 0, spec.prompt_width - 1)
    opening = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return inputs, state._replace(block=block, cache=cache, frontier=DecodeFrontier(opening, jnp.zeros(len(gaps), bool)))


def predict(network: Network, spec: SamplingSpec, inputs: SamplingInputs, state: State) -> tuple[jax.Array, Cache, DecodeFrontier]:
    """The hidden states [batch, block_size, embed] that predict the tokens of each row's block, and what is kept."""
    size, length = spec.blocks.size, state.tokens.shape[1]
    begin = state.block * size
    attention = spec.blocks.decode_mask(begin).with_lengths(inputs.lengths)

    def run(first: int, cache: Cache) -> tuple[jax.Array, Cache]:
        """The states from `first` positions after each block's beginning to its end."""
        at = begin[:, None] + jnp.arange(first, size)
        tokens = jnp.take_along_axis(state.tokens, jnp.clip(at, 0, length - 1), axis=1)
        return network.cached_hidden(tokens, attention, jnp.where(at < 0, length, at), cache)  # there: not written

    def with_block_before(cache: Cache) -> tuple[jax.Array, jax.Array, Cache]:
        hidden, cache = run(-size, cache)
        opening = jnp.where(state.frontier.pending[:, None], hidden[:, size - 1], state.frontier.opening)
        return hidden[:, size:], opening, cache

    def alone(cache: Cache) -> tuple[jax.Array, jax.Array, Cache]:
        hidden, cache = run(0, cache)
        return hidden, state.frontier.opening, cache

    hidden, opening, cache = jax.lax.cond(state.frontier.pending.any(), with_block_before, alone, state.cache)
    if spec.shift:
        hidden = jnp.concatenate([opening[:, None], hidden[:, :-1]], axis=1)
    return hidden, cache, state.frontier._replace(opening=opening)
