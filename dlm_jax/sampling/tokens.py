"""Token choice: one token from a position's logits, without a sort and without a random number for each token."""

import functools

import jax
import jax.numpy as jnp

from dlm_jax.sampling.config import POLICIES, SamplerConfig, probability
from dlm_jax.sampling.spec import Network, SamplingInputs, SamplingSpec, State

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


# ---- From hidden states to candidate tokens, the head running only where one is asked for.


_ROWS = 32  # rows of the head's product below which a processor waits for the kernel alone


def draw_tokens(network: Network, spec: SamplingSpec, states: jax.Array, active: jax.Array, positions: jax.Array, inputs: SamplingInputs,
         state: State, keys: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws a token where `active`, a slice of each row at a time.

    Args:
      states: [batch, width, embed] as `forward.predict` gives them, twice the batch under guidance.
      active: bool [batch, width].
      positions: int32 [batch, width], where in its row each stands; with the row's key it determines the randomness.
      request, state: the rows as they are, for the repetition penalty.
      keys: random keys [batch].

    Returns:
      Tokens int32, their log-probabilities and the policy's scores float32 [batch, width], meaningful where `active`.
    """
    score = POLICIES[spec.config.policy].score
    batch, width = active.shape
    size = slice_size(spec.config, batch, width)
    rows = jnp.arange(batch)[:, None]
    order = jnp.argsort(~active, axis=1, stable=True)  # active ones first
    order = jnp.pad(order, ((0, 0), (0, -width % size)), constant_values=width)
    repeated = None
    if spec.config.repetition_penalty != 1:
        vocab = network.config.vocab_size
        padding = jnp.arange(state.tokens.shape[1]) >= inputs.lengths[:, None]
        seen = jnp.where(state.masked | padding, vocab, state.tokens)
        repeated = jnp.zeros((batch, vocab), bool).at[rows, seen].set(True, mode="drop")

    def fill(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        start, tokens, confidence, scores = carry
        at = jax.lax.dynamic_slice_in_dim(order, start, size, axis=1)
        read = jnp.minimum(at, width - 1)
        both = jnp.tile(read, (len(states) // batch, 1))
        logits = network.unembed(jnp.take_along_axis(states, both[:, :, None], axis=1))
        logits = adjust(logits, spec, repeated)
        position_keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(
            keys, jnp.take_along_axis(positions, read, axis=1))
        token = jax.vmap(jax.vmap(functools.partial(choose, config=spec.config)))(logits, position_keys)
        sure = probability(logits, token)
        fresh = token, sure, sure if score in (None, probability) else score(logits, token)
        old = tokens, confidence, scores
        return start + size, *(x.at[rows, at].set(y, mode="drop") for x, y in zip(old, fresh, strict=True))

    nothing = jnp.zeros(active.shape)
    number = active.sum(axis=1).max()
    out = jax.lax.while_loop(lambda carry: carry[0] < number, fill,
                             (jnp.int32(0), nothing.astype(jnp.int32), nothing, nothing))
    return out[1:]


def slice_size(config: SamplerConfig, batch: int, width: int) -> int:
    """How many positions of each row the head takes at a time: about as many as a step reveals, or an eighth."""
    if POLICIES[config.policy].score is None:
        expected = width / (config.steps or width)
        size = expected + expected**0.5  # one slice is enough most of the time
    else:
        size = width / 8
    size = max(size, _ROWS / batch, 1)
    return min(width, -(-int(size) // 8) * 8)


def adjust(logits: jax.Array, spec: SamplingSpec, repeated: jax.Array | None) -> jax.Array:
    """What tokens are drawn from and judged by: guidance, penalties, and never the mask itself.

    Args:
      logits: float32 [batch, n, vocab], twice the batch under guidance.
      repeated: bool [batch, vocab], which tokens a row already holds; None where it does not matter.
    """
    config = spec.config
    if config.cfg_scale:
        seeing, blind = jnp.split(logits, 2)
        logits = blind + (1 + config.cfg_scale) * (seeing - blind)
    if repeated is not None:
        penalty = config.repetition_penalty
        logits = jnp.where(repeated[:, None], jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if spec.eos_token_ids and config.eos_penalty:
        logits = logits.at[:, :, jnp.array(spec.eos_token_ids)].add(-config.eos_penalty)
    return logits if spec.mask_token_id is None else logits.at[:, :, spec.mask_token_id].set(-jnp.inf)
