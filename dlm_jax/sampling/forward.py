"""The network in the loop: the states that a block's tokens are read from, computed or partly remembered."""

import jax
import jax.numpy as jnp

from dlm_jax.attention import AttentionMask
from dlm_jax.models import Cache
from dlm_jax.sampling.spec import Network, SamplingInputs, SamplingSpec, State

_PREFIX_WIDTHS = 4  # programs of different width for what follows the prefix


def empty_cache(network: Network, spec: SamplingSpec, batch: int, length: int) -> Cache | None:
    """Room for the keys and values that the task's cache keeps; None where it keeps none."""
    if spec.config.cache == "none":
        return None
    rows = 2 * batch if spec.config.cfg_scale else batch
    return Cache.empty(network.config, rows, length, network.compute.dtype)


def predict(network: Network, spec: SamplingSpec, inputs: SamplingInputs, state: State, start: jax.Array,
            width: int) -> tuple[jax.Array, Cache | None]:
    """The hidden states that predict positions `start` .. `start + width`, and the cache after it.

    The one place where sampling undoes the shift. Positions past the row's end give states that mean nothing.

    Args:
      start: int32 [batch], at least 1.

    Returns:
      [batch, width, embed]. Under guidance the batch is twice as large: with the given tokens, then without them.
    """
    tokens, lengths = state.tokens, inputs.lengths
    if spec.config.cfg_scale:
        given = ~inputs.gaps & (jnp.arange(tokens.shape[1]) > 0)
        tokens = jnp.concatenate([tokens, jnp.where(given, spec.mask_token_id, tokens)])
        lengths, start = jnp.tile(lengths, 2), jnp.tile(start, 2)
    attention = AttentionMask.bidirectional().with_lengths(lengths)
    length = tokens.shape[1]
    first = start - spec.shift  # the state here predicts position `start`

    def whole(cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        if cache is None:
            hidden = network.hidden(tokens, attention)
        else:
            every = jnp.broadcast_to(jnp.arange(length), tokens.shape)
            hidden, cache = network.cached_hidden(tokens, attention, every, cache)
        at = jnp.minimum(first[:, None] + jnp.arange(width), length - 1)
        return jnp.take_along_axis(hidden, at[:, :, None], axis=1), cache

    def part(size: int, cache: Cache) -> tuple[jax.Array, Cache]:
        at = first[:, None] + jnp.arange(size)
        some = jnp.take_along_axis(tokens, jnp.minimum(at, length - 1), axis=1)
        hidden, cache = network.cached_hidden(some, attention, at, cache)
        return hidden[:, :width], cache

    if spec.config.cache == "none":
        return whole(None)
    narrowest = min(width + spec.shift, length)
    if spec.config.cache == "dual":
        rest = lambda cache: part(narrowest, cache)  # noqa: E731
    else:
        widths = sorted({max(-(-length * i // _PREFIX_WIDTHS), narrowest) for i in range(1, _PREFIX_WIDTHS + 1)})
        needed = jnp.searchsorted(jnp.array(widths), (lengths - first).max())
        branches = [lambda cache, size=size: part(size, cache) for size in widths]
        rest = lambda cache: jax.lax.switch(needed, branches, cache)  # noqa: E731
    every = spec.config.cache_refresh_interval
    due = state.steps_in_block == 0 if every is None else state.steps_in_block % every == 0
    return jax.lax.cond(due, whole, rest, state.cache)
