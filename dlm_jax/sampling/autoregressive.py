"""Left-to-right decoding with cached keys and values: what the parents do, and the baseline of every comparison."""

import jax
import jax.numpy as jnp

from dlm_jax.attention import AttentionMask
from dlm_jax.models import Cache
from dlm_jax.sampling.draw import draw
from dlm_jax.sampling.task import Network, Request, State, Task, wanted


def start(network: Network, task: Task, tokens: jax.Array, fixed: jax.Array, lengths: jax.Array,
          keys: jax.Array) -> tuple[Request, State]:
    """The prompts, of any lengths, with their keys and values; arguments as in `loop.sample`."""
    positions = jnp.arange(tokens.shape[1])
    gaps = ~fixed & (positions > 0) & (positions < lengths[:, None])
    tokens = jnp.where(gaps, 0, tokens)
    prompts = tokens[:, : task.prompt_width]
    positions = jnp.broadcast_to(positions[: task.prompt_width], prompts.shape)
    # What is written past a prompt's end is seen by no query before it has been written anew.
    _, cache = network.cached_hidden(prompts, AttentionMask.causal(), positions,
                                     Cache.empty(network.config, *tokens.shape, network.compute.dtype))
    zero = jnp.int32(0)
    return Request(gaps, jnp.zeros(gaps.shape, jnp.int32), lengths, keys), State(
        tokens, masked=gaps, confidence=jnp.zeros(gaps.shape), steps=jnp.zeros_like(lengths), block=zero, age=zero,
        cache=cache)


def advance(network: Network, task: Task, request: Request, state: State) -> State:
    """The next token of every row that is not done."""
    working = wanted(task, request, state).any(axis=1)
    at = jnp.argmax(state.masked, axis=1)[:, None]  # [batch, 1], the first position without a token
    last = jnp.maximum(at - 1, 0)
    hidden, cache = network.cached_hidden(jnp.take_along_axis(state.tokens, last, axis=1), AttentionMask.causal(), last,
                                          state.cache)
    token, confidence, _ = draw(network, task, hidden, working[:, None], at, request, state, request.keys)
    reveal = working[:, None] & (jnp.arange(state.tokens.shape[1]) == at)
    return state._replace(
        tokens=jnp.where(reveal, token, state.tokens), masked=state.masked & ~reveal,
        confidence=jnp.where(reveal, confidence, state.confidence), steps=state.steps + working, age=state.age + 1,
        cache=cache)
