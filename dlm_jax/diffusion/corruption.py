"""What a training step receives."""

import dataclasses

import jax
import jax.numpy as jnp

from dlm_jax.diffusion.schedule import NoiseSchedule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens with what each step needs to know about them.

    Attributes:
      tokens: int32 [batch, length].
      maskable: bool [batch, length]; True where a token may be noised and scored. Position 0 is never True.
      example_index: uint32 [batch], `step * batch_size + row` over the global batch; all noise derives from it.
      segment_ids: int32 [batch, length] or None; tokens attend only within their segment.
      positions: int32 [batch, length] or None for 0, 1, 2, ...; they restart with each segment.
    """

    tokens: jax.Array
    noisable_mask: jax.Array
    example_index: jax.Array
    segment_ids: jax.Array | None = None
    positions: jax.Array | None = None


# ---- The forward process: tokens are replaced by the mask token, and the batch remembers which.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoisyBatch:
    """A noised batch with all that the loss needs, so that nothing is inferred from a token's value.

    Attributes:
      tokens: int32 [batch, length], what the network reads.
      targets: int32 [batch, length], the clean tokens.
      scored: bool [batch, length], the positions whose cross-entropy counts.
      maskable: bool [batch, length], the positions that could have been noised; their number normalises the bound.
      weights: float32 [batch, length], weight of each position's cross-entropy.
      positions: int32 [batch or 1, length], where in its text each token stands; None: counted from 0.
    """

    tokens: jax.Array
    targets: jax.Array
    loss_mask: jax.Array
    noisable_mask: jax.Array
    weights: jax.Array
    positions: jax.Array | None = None


def corrupt(tokens: jax.Array, noisable_mask: jax.Array, times: jax.Array, keys: jax.Array, *, mask_token_id: int,
            schedule: NoiseSchedule = NoiseSchedule()) -> NoisyBatch:
    """Masks each maskable token independently with the schedule's probability at its row's time.

    Args:
      tokens: int32 [batch, length].
      maskable: bool [batch, length]; position 0 should be False, as context is never noised.
      times: float32 [batch] or [batch, length], in (0, 1].
      keys: random keys [batch], one per example.

    Returns:
      A batch weighted by the bound's weight at each time (arXiv 2410.17891, eq. 4 for the linear schedule).
    """
    length = tokens.shape[1]
    noise = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys)
    times = times[:, None] if times.ndim == 1 else times
    masked = noisable_mask & (noise < schedule.mask_probability(times))
    weights = jnp.broadcast_to(schedule.weight(times), tokens.shape).astype(jnp.float32)
    return NoisyBatch(tokens=jnp.where(masked, mask_token_id, tokens), targets=tokens, loss_mask=masked,
                          noisable_mask=noisable_mask, weights=weights)


def clean_batch(tokens: jax.Array, noisable_mask: jax.Array) -> NoisyBatch:
    """The autoregressive case of the same batch: nothing noised, every maskable token scored with weight 1."""
    return NoisyBatch(tokens=tokens, targets=tokens, loss_mask=noisable_mask, noisable_mask=noisable_mask,
                          weights=jnp.ones(tokens.shape, jnp.float32))


# ---- Block diffusion: noised copies of a text and a clean one, and from which copy each token is predicted.
#
# A block's tokens are masked and predicted given all earlier blocks clean (BD3-LM, arXiv 2503.09573). Under the shift the
# state at n - 1 predicts token n, and for the first token of a block that state lies in an earlier block: it is read from
# the clean copy, and where that is causal this prediction is the AR parent's own. It does not depend on the noise of its
# block, so the expectation of its weight, 1, takes the weight's place, and it is always scored. Blocks of one token
# are then the AR loss, and one block as long as the text is the loss of full diffusion.


def opens_block(length: int, block_size: int) -> jax.Array:
    """Where a block begins, bool [length]."""
    return jnp.arange(length) % block_size == 0


def concat_noisy_and_clean(views: list[NoisyBatch], block_size: int, *, shift: bool = True) -> NoisyBatch:
    """Noised views of one text [batch, length] and the text itself: [batch, (views + 1) x length].

    Every position keeps its loss in the copy from whose state it is predicted. Several views count as their mean. All
    copies stand at the positions of the text.
    """
    first, number = views[0], len(views)
    at = jnp.arange(first.tokens.shape[1]) if first.positions is None else first.positions
    at = jnp.broadcast_to(at, first.tokens.shape)
    begins = opens_block(first.tokens.shape[1], block_size) & shift
    none = jnp.zeros_like(first.noisable_mask)
    clean = dataclasses.replace(first, tokens=first.targets, loss_mask=first.noisable_mask & begins, noisable_mask=none,
                                weights=jnp.ones_like(first.weights), positions=at)
    copies = [dataclasses.replace(view, loss_mask=view.loss_mask & ~begins, weights=view.weights / number, positions=at,
                                  noisable_mask=none if index else view.noisable_mask) for index, view in enumerate(views)]
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *copies, clean)


def complementary_mask(view: NoisyBatch, mask_token_id: int, weights: jax.Array) -> NoisyBatch:
    """The view in which just the other maskable tokens are masked, with weights [batch or 1, length] of its own."""
    masked = view.noisable_mask & ~view.loss_mask
    return dataclasses.replace(view, tokens=jnp.where(masked, mask_token_id, view.targets), loss_mask=masked,
                               weights=jnp.broadcast_to(weights, view.weights.shape))
