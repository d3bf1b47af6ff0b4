"""Left-to-right decoding with cached keys and values: what the parents do, and the baseline of every comparison."""

import jax
import jax.numpy as jnp

from dlm_jax.attention import AttentionMask
from dlm_jax.models import Cache
from dlm_jax.sampling.spec import Network, SamplingInputs, SamplingSpec, State, pending_mask
from dlm_jax.sampling.tokens import draw_tokens


def start(network: Network, spec: SamplingSpec, tokens: jax.Array, fixed: jax.Array, lengths: jax.Array,
          keys: jax.Array) -> tuple[SamplingInputs, State]:
    """The prompts, of any lengths, with their keys and values; arguments as in `loop.sample`."""
    positions = jnp.arange(tokens.shape[1])
    gaps = ~fixed & (positions > 0) & (positions < lengths[:, None])
    tokens = jnp.where(gaps, 0, tokens)
    prompts = tokens[:, : spec.prompt_width]
    positions = jnp.broadcast_to(positions[: spec.prompt_width], prompts.shape)
    # What is written past a prompt's end is seen by no query before it has been written anew.
    _, cache = network.cached_hidden(prompts, AttentionMask.causal(), positions,
                                     Cache.empty(network.config, *tokens.shape, network.compute.dtype))
    zero = jnp.int32(0)
    return SamplingInputs(gaps, jnp.zeros(gaps.shape, jnp.int32), lengths, keys), State(
        tokens, masked=gaps, confidence=jnp.zeros(gaps.shape), steps=jnp.zeros_like(lengths), block=zero, steps_in_block=zero,
        cache=cache)


def advance(network: Network, spec: SamplingSpec, inputs: SamplingInputs, state: State) -> State:
    """The next token of every row that is not done."""
    working = pending_mask(spec, inputs, state).any(axis=1)
    at = jnp.argmax(state.masked, axis=1)[:, None]  # [batch, 1], the first position without a token
    last = jnp.maximum(at - 1, 0)
    hidden, cache = network.cached_hidden(jnp.take_along_axis(state.tokens, last, axis=1), AttentionMask.causal(), last,
                                          state.cache)
    token, confidence, _ = draw_tokens(network, spec, hidden, working[:, None], at, inputs, state, inputs.keys)
    reveal = working[:, None] & (jnp.arange(state.tokens.shape[1]) == at)
    return state._replace(
        tokens=jnp.where(reveal, token, state.tokens), masked=state.masked & ~reveal,
        confidence=jnp.where(reveal, confidence, state.confidence), steps=state.steps + working, steps_in_block=state.steps_in_block + 1,
        cache=cache)
