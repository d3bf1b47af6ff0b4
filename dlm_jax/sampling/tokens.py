"""Token choice: from hidden states to logits, and from a position's logits to one token, without a sort.

The LM head runs only at positions that need a token, a slice of each row at a time.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.models import Transformer
from dlm_jax.random import position_keys
from dlm_jax.sampling.config import POLICIES, SamplerConfig, log_prob
from dlm_jax.sampling.spec import NO_DRAFT, Drafts, RowSettings, SamplingInputs, SamplingSpec, SamplingState

_HEAD_ROWS = 8  # with fewer rows the head's product takes as long as reading its kernel
_CDF_BLOCK = 256  # tokens per block of the two-level inversion


def sample_tokens(network: Transformer, spec: SamplingSpec, hidden: jax.Array, active: jax.Array, positions: jax.Array,
                  inputs: SamplingInputs, state: SamplingState, keys: jax.Array,
                  drafts: Drafts | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Samples a token at each `active` position.

    Args:
      hidden: [batch, width, embed], the states that predict the positions; twice the batch with guidance.
      active: bool [batch, width].
      positions: int32 [batch, width], places in the row; with the row's key they determine the random numbers.
      inputs, state: the rows, for the repetition penalty.
      keys: random keys [batch].
      drafts: guesses at all of the positions but the last, which later ones count as tokens that the row has, for the
        repetition penalty. Where the drafts are samples, the token is the draft wherever that leaves its distribution
        as it is, see `accept_or_resample`; it does not depend on certain ones. None: there are none.

    Returns:
      Tokens int32, their log-probabilities and the policy's scores float32, all [batch, width], defined where `active`.
    """
    score = POLICIES[spec.config.policy].score
    batch, width = active.shape
    size = slice_size(spec.config, batch, width, state.tokens.shape[1])
    rows = jnp.arange(batch)[:, None]
    order = jnp.argsort(~active, axis=1, stable=True)  # active ones first
    order = jnp.pad(order, ((0, 0), (0, -width % size)), constant_values=width)
    seen = seen_tokens(network.config.vocab_size, inputs, state, None if drafts is None else drafts.tokens)

    def fill_slice(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        start, *filled = carry
        at = jax.lax.dynamic_slice_in_dim(order, start, size, axis=1)
        read = jnp.minimum(at, width - 1)
        index = jnp.tile(read, (len(hidden) // batch, 1))
        logits = network.unembed(jnp.take_along_axis(hidden, index[:, :, None], axis=1))
        seen_here = seen if drafts is None or seen is None else jnp.take_along_axis(seen, read[:, :, None], axis=1)
        logits = process_logits(logits, spec, inputs.settings, seen_here)
        token_keys = position_keys(keys, jnp.take_along_axis(positions, read, axis=1))
        if drafts is None or drafts.probs is None:
            token = sample_token(logits, token_keys, inputs.settings)
        else:
            at_draft = jnp.minimum(read, width - 2)
            draft = jnp.where(read < width - 1, jnp.take_along_axis(drafts.tokens, at_draft, axis=1), NO_DRAFT)
            probs = jnp.take_along_axis(drafts.probs, at_draft[:, :, None], axis=1)
            token = accept_or_resample(logits, draft, probs, token_keys, inputs.settings)
        confidence = log_prob(logits, token)
        scores = confidence if score in (None, log_prob) else score(logits, token)
        return start + size, *(x.at[rows, at].set(y, mode="drop")
                               for x, y in zip(filled, (token, confidence, scores), strict=True))

    zeros = jnp.zeros(active.shape)
    number = active.sum(axis=1).max()
    _, *filled = jax.lax.while_loop(lambda carry: carry[0] < number, fill_slice,
                                    (jnp.int32(0), zeros.astype(jnp.int32), zeros, zeros))
    return tuple(filled)


def slice_size(config: SamplerConfig, batch: int, width: int, length: int) -> int:
    """Returns how many positions per row the head computes at a time.

    Where a policy chooses positions first, it is about as many as a step reveals of a row of `length`, so that one
    slice is enough most of the time. Else all masked positions need a token: it is an eighth of the `width` positions.
    """
    if POLICIES[config.policy].score is None:
        expected = length / (config.steps or length)
        size = max(expected + expected**0.5, _HEAD_ROWS / batch)
    else:
        size = max(width / 8, 4 * _HEAD_ROWS / batch)
    return min(width, -(-int(max(size, 1)) // 8) * 8)


def process_logits(logits: jax.Array, spec: SamplingSpec, settings: RowSettings, seen: jax.Array | None) -> jax.Array:
    """Applies guidance and penalties, and excludes the mask token and ids that no token has.

    Tokens are sampled and scored by the result.

    Args:
      logits: float32 [batch, n, vocab]; twice the batch with guidance; or of the first tokens of the vocabulary.
      seen: bool [batch, n or 1, vocab], tokens that the row already has; None without repetition penalty.
    """
    diffusion = spec.diffusion
    if settings.cfg_scale is not None:
        conditional, unconditional = jnp.split(logits, 2)
        logits = unconditional + (1 + _per_row(settings.cfg_scale)) * (conditional - unconditional)
    if seen is not None:
        penalty, seen = _per_row(settings.repetition_penalty), seen[:, :, : logits.shape[-1]]
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if spec.eos_token_ids and settings.eos_penalty is not None:
        logits = logits.at[:, :, jnp.array(spec.eos_token_ids)].add(-_per_row(settings.eos_penalty))
    excluded = np.zeros(logits.shape[-1], bool)
    for ids in diffusion.missing_ids:
        excluded[ids.start : ids.stop] = True
    if diffusion.mask_token_id is not None:
        excluded[diffusion.mask_token_id :][:1] = True
    return jnp.where(excluded, -jnp.inf, logits) if excluded.any() else logits


def sample_token(logits: jax.Array, keys: jax.Array, settings: RowSettings) -> jax.Array:
    """Samples a token at each position, int32 [batch, n], from float32 `logits` [batch, n, vocab]; never one at -inf.

    Temperature comes first, then top-k, then top-p of what top-k kept, as in HF's `generate`.

    Args:
      keys: random keys [batch, n].
    """
    def most_likely() -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    if settings.temperature is None:
        return most_likely()

    def sampled() -> jax.Array:
        return jax.vmap(jax.vmap(categorical))(token_weights(logits, settings), keys)

    is_sampled, none = settings.temperature > 0, functools.partial(jnp.zeros, logits.shape[:2], jnp.int32)
    return jnp.where(is_sampled[:, None], jax.lax.cond(is_sampled.any(), sampled, none),
                     jax.lax.cond(is_sampled.all(), none, most_likely))


def token_weights(logits: jax.Array, settings: RowSettings) -> jax.Array:
    """Returns what tokens are sampled in proportion to, float32 [batch, n, vocab], for temperatures above 0."""
    temperature = _per_row(jnp.where(settings.temperature > 0, settings.temperature, 1))
    weights = jnp.exp((logits - logits.max(axis=-1, keepdims=True)) / temperature)  # the largest is 1
    keep = jax.vmap(jax.vmap(keep_largest), in_axes=(0, 0, 0))
    if settings.top_k is not None:
        targets = jnp.broadcast_to(settings.top_k[:, None], weights.shape[:2]).astype(jnp.float32)
        weights = jax.lax.cond((settings.top_k < weights.shape[-1]).any(),
                               lambda: keep(weights, jnp.ones_like(weights), targets), lambda: weights)
    if settings.top_p is not None:
        top_p, before = settings.top_p, weights
        weights = jax.lax.cond((top_p < 1).any(), lambda: jnp.where(
            _per_row(top_p) < 1, keep(before, before, top_p[:, None] * before.sum(axis=-1)), before), lambda: before)
    return weights


def token_probs(logits: jax.Array, settings: RowSettings) -> jax.Array:
    """Returns what `sample_token` samples from, float32 [batch, n, vocab]; at temperature 0 all on one token."""
    def one_hot() -> jax.Array:
        return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])

    if settings.temperature is None:
        return one_hot()
    weights = token_weights(logits, settings)
    probs, is_sampled = weights / weights.sum(axis=-1, keepdims=True), settings.temperature > 0
    return jax.lax.cond(is_sampled.all(), lambda: probs, lambda: jnp.where(_per_row(is_sampled), probs, one_hot()))


def accept_or_resample(logits: jax.Array, drafts: jax.Array, draft_probs: jax.Array, keys: jax.Array,
                       settings: RowSettings) -> jax.Array:
    """Returns samples of `sample_token`'s distribution p that equal the drafts as often as possible, int32 [batch, n].

    A draft, a sample of the distribution q, is taken with probability min(1, p / q), and otherwise a sample of
    max(p - q, 0) (speculative sampling, arXiv 2211.17192). They are equal with probability sum min(p, q).

    Args:
      logits: float32 [batch, n, vocab], of p.
      drafts: int32 [batch, n]; `NO_DRAFT`: there is none, and the result is a sample of p.
      draft_probs: float32 [batch, n, vocab], q; or of the first tokens of the vocabulary, if no other is drafted.
      keys: random keys [batch, n].
    """
    draft_probs = jnp.pad(draft_probs, ((0, 0), (0, 0), (0, logits.shape[-1] - draft_probs.shape[-1])))
    return jax.vmap(jax.vmap(_accept_or_resample))(token_probs(logits, settings), drafts, draft_probs, keys)


def _accept_or_resample(probs: jax.Array, draft: jax.Array, draft_probs: jax.Array, key: jax.Array) -> jax.Array:
    """Does what `accept_or_resample` does at one position."""
    found = draft != NO_DRAFT
    ratio = probs[draft] / jnp.maximum(draft_probs[draft], jnp.finfo(jnp.float32).tiny)
    accepted = found & (jax.random.uniform(jax.random.fold_in(key, 1)) < ratio)
    rest = jnp.where(found, jnp.maximum(probs - draft_probs, 0), probs)
    rest = jnp.where(rest.sum() > 0, rest, probs)  # p and q are equal but for rounding
    return jnp.where(accepted, draft, categorical(rest, key))


def keep_largest(weights: jax.Array, measure: jax.Array, target: jax.Array | float) -> jax.Array:
    """Keeps the fewest largest `weights` [vocab] whose `measure` sums to at least `target`; the rest become 0.

    The weight that crosses the target is kept, and so are its equals. The cut-off is found by bisection over the bits
    of a float32, which for non-negative numbers have the order of the numbers.
    """

    def bisect(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # a cut-off at `low` keeps enough, one at `high` too little
        middle = low + (high - low) // 2
        enough = jnp.where(weights >= _float(middle), measure, 0).sum() >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    infinity = jax.lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, bisect, (jnp.int32(0), infinity))
    return jnp.where(weights >= _float(low), weights, 0)


def categorical(weights: jax.Array, key: jax.Array) -> jax.Array:
    """Samples index i with probability weights[i] / sum: inverts the cumulative sum over blocks, then inside one.

    It is exact to the 23 bits of each uniform number, tails included, and needs two random numbers per token.
    `jax.random.categorical` needs one or two for each entry of the vocabulary: in its default mode Gumbel noise of
    float32 uniforms never exceeds 16, so that rare tokens are too rare (arXiv 2409.02908); with mode="high" the tails
    are right, and it took 15 times as long on a CPU (32 rows of 50,257 logits, JAX 0.10.2).
    """
    blocks = jnp.pad(weights, (0, -weights.shape[0] % _CDF_BLOCK)).reshape(-1, _CDF_BLOCK)
    outer, inner = jax.random.uniform(key, (2,))
    block = invert_cdf(blocks.sum(axis=1), outer)
    return block * _CDF_BLOCK + invert_cdf(blocks[block], inner)


def invert_cdf(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Returns the first index whose cumulative weight exceeds `uniform` in [0, 1) times the sum; never one of 0."""
    edges = jnp.where(weights > 0, jnp.cumsum(weights), 0)  # a zero weight has no interval, however sums round
    return jnp.argmax(edges > uniform * edges.max()).astype(jnp.int32)


def seen_tokens(vocab: int, inputs: SamplingInputs, state: SamplingState,
                drafts: jax.Array | None = None) -> jax.Array | None:
    """Returns which tokens each row has, bool [batch, 1, vocab]; with drafts before it, [batch, width, vocab].

    It is None without a repetition penalty, which alone needs it.
    """
    if inputs.settings.repetition_penalty is None:
        return None
    batch, length = state.tokens.shape
    padding = jnp.arange(length) >= inputs.lengths[:, None]
    tokens = jnp.where(state.masked | padding, vocab, state.tokens)
    seen = jnp.zeros((batch, vocab), bool).at[jnp.arange(batch)[:, None], tokens].set(True, mode="drop")[:, None]
    if drafts is None:
        return seen
    drafted = jnp.cumsum(jax.nn.one_hot(drafts, vocab, dtype=jnp.int32), axis=1) > 0
    return seen | jnp.pad(drafted, ((0, 0), (1, 0), (0, 0)))


def _per_row(x: jax.Array) -> jax.Array:
    """Returns numbers [batch] in a shape that broadcasts to [batch, n, vocab]."""
    return x[:, None, None]


def _float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
