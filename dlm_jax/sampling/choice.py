"""Token choice: one token from a position's logits, without a sort and without a random number for each token."""

import jax
import jax.numpy as jnp

from dlm_jax.sampling.config import SamplerConfig

_BLOCK = 256  # tokens in the second level of a categorical draw


def choose(logits: jax.Array, key: jax.Array, config: SamplerConfig) -> jax.Array:
    """Draws a token, int32 scalar, from float32 `logits` [vocab]; tokens at -inf are never drawn.

    Temperature comes first, then top-k, then top-p of what top-k kept, as in HF's `generate`.
    """
    if config.temperature == 0:
        return jnp.argmax(logits).astype(jnp.int32)
    weights = jax.nn.softmax((logits - logits.max()) / config.temperature)  # the difference: no overflow near 0
    if config.top_k is not None and config.top_k < logits.shape[0]:
        weights = keep_largest(weights, jnp.ones_like(weights), config.top_k)
    if config.top_p is not None and config.top_p < 1:
        weights = keep_largest(weights, weights, config.top_p * weights.sum())
    return categorical(weights, key)


def keep_largest(weights: jax.Array, measure: jax.Array, target: jax.Array | float) -> jax.Array:
    """Keeps the fewest largest `weights` [vocab] whose `measure` sums to at least `target`; the rest become 0.

    The one that crosses the target is kept, and so are its equals. The cut is found by bisection over the bits
    of a float32, which for non-negative numbers are ordered as the numbers are.
    """

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # a cut at `low` keeps enough, one at `high` too little
        middle = low + (high - low) // 2
        cut = jax.lax.bitcast_convert_type(middle, jnp.float32)
        enough = jnp.where(weights >= cut, measure, 0).sum() >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    infinity = jax.lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.int32(0), infinity))
    return jnp.where(weights >= jax.lax.bitcast_convert_type(low, jnp.float32), weights, 0)


def categorical(weights: jax.Array, key: jax.Array) -> jax.Array:
    """Draws index i with probability weights[i] / sum: inverts the cumulative sum, first over blocks, then inside one.

    Exact to the 23 bits of each uniform number, tails included. (Gumbel noise made from float32 uniforms never
    exceeds 16, which starves rare tokens and so acts as a lower temperature: arXiv 2409.02908.)
    """
    blocks = jnp.pad(weights, (0, -weights.shape[0] % _BLOCK)).reshape(-1, _BLOCK)
    outer, inner = jax.random.uniform(key, (2,))
    block = invert(blocks.sum(axis=1), outer)
    return block * _BLOCK + invert(blocks[block], inner)


def invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The first index whose cumulative weight exceeds `uniform` in [0, 1) times the total; never one of weight 0."""
    edges = jnp.where(weights > 0, jnp.cumsum(weights), 0)  # a zero weight owns no interval, however sums round
    return jnp.argmax(edges > uniform * edges.max()).astype(jnp.int32)
