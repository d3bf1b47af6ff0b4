"""The forward process: tokens are replaced by the mask token, and the batch records which.

Block diffusion (BD3-LM, arXiv 2503.09573) predicts the masked tokens of a block given all earlier blocks clean. Under
the shift the state at n - 1 predicts token n. For the first token of a block that state belongs to an earlier block,
so it is read from the clean copy; where clean attention is causal, this prediction is the AR parent's own. It does
not depend on the noise of its block, so its weight is replaced by the weight's expectation, 1, and it is always
scored. Blocks of one token then have the AR loss, and one block as long as the text has the loss of full diffusion.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from dlm_jax.diffusion.schedule import NoiseSchedule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens with what each step needs to know about them.

    Attributes:
      tokens: int32 [batch, length].
      noisable_mask: bool [batch, length]; True where a token may be noised and scored. Position 0 is never True.
      example_index: uint32 [batch], `step * batch_size + row` over the global batch; all noise derives from it.
      segment_ids: int32 [batch, length] or None; tokens attend only within their segment.
      positions: int32 [batch, length] or None for 0, 1, 2, ...; they restart with each segment.
    """

    tokens: jax.Array
    noisable_mask: jax.Array
    example_index: jax.Array
    segment_ids: jax.Array | None = None
    positions: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoisyBatch:
    """A noised batch with all that the loss needs, so that nothing is inferred from a token's value.

    Attributes:
      tokens: int32 [batch, length], the network's input.
      targets: int32 [batch, length], the clean tokens.
      loss_mask: bool [batch, length], the positions whose cross-entropy counts.
      noisable_mask: bool [batch, length], the positions that could have been noised; their number normalizes the bound.
      weights: float32 [batch, length], weight of each position's cross-entropy in the bound.
      clean_mask: bool [batch, length], the positions of a clean copy, whose AR loss may count; None without one.
      positions: int32 [batch or 1, length], each token's position in its text; None: counted from 0.
      noised: first and last + 1 of the positions of noised copies, where there is a clean one too; else None.
    """

    tokens: jax.Array
    targets: jax.Array
    loss_mask: jax.Array
    noisable_mask: jax.Array
    weights: jax.Array
    clean_mask: jax.Array | None = None
    positions: jax.Array | None = None
    noised: tuple[int, int] | None = dataclasses.field(default=None, metadata={"static": True})


def corrupt(tokens: jax.Array, noisable_mask: jax.Array, times: jax.Array, keys: jax.Array, *, mask_token_id: int,
            schedule: NoiseSchedule = NoiseSchedule()) -> NoisyBatch:
    """Masks each noisable token independently with the schedule's probability at its row's time.

    Args:
      tokens: int32 [batch, length].
      noisable_mask: bool [batch, length]; position 0 should be False, as context is never noised.
      times: float32 [batch] or [batch, length], in (0, 1].
      keys: random keys [batch], one per example.

    Returns:
      A batch with the bound's weight at each time (arXiv 2410.17891, eq. 4 for the linear schedule).
    """
    length = tokens.shape[1]
    noise = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys)
    times = times[:, None] if times.ndim == 1 else times
    masked = noisable_mask & (noise < schedule.mask_probability(times))
    return _replaced(tokens, noisable_mask, masked, mask_token_id, schedule.weight(times))


def corrupt_late_tokens(tokens: jax.Array, noisable_mask: jax.Array, times: jax.Array, keys: jax.Array, *,
                        mask_token_id: int, block_size: int, half_life: float,
                        schedule: NoiseSchedule = NoiseSchedule()) -> NoisyBatch:
    """Masks as many tokens of each block as its time says, late ones rather than early ones (Efficient-DLM).

    A block at the mask probability m has exactly round(m x its noisable tokens) masks. They are chosen one after
    another without replacement, the token at place i of the block with the weight 2^((1 - m) i / (half_life x
    block_size)): late ones where few are masked, all alike where nearly all are. The weights of the loss are those of
    the bound, which this noise does not estimate.

    Args:
      times: float32 [batch, length], constant within each block of `block_size` positions.
    """
    batch, length = tokens.shape
    place = jnp.arange(length) % block_size
    masked_share = schedule.mask_probability(times)
    log_weights = math.log(2.0) / (half_life * block_size) * (1.0 - masked_share) * place
    # The largest values of log-weight + Gumbel noise are such a choice (Kool et al., arXiv 1903.06059).
    scores = log_weights + jax.vmap(lambda key: jax.random.gumbel(key, (length,)))(keys)

    def blocks(x: jax.Array, fill: float | bool) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, -length % block_size)), constant_values=fill)
        return x.reshape(batch, -1, block_size)

    noisable = blocks(noisable_mask, False)
    scores = jnp.where(noisable, blocks(scores, 0.0), -jnp.inf)
    counts = jnp.round(blocks(masked_share, 0.0)[..., 0] * noisable.sum(axis=-1))
    ranks = jnp.argsort(jnp.argsort(-scores, axis=-1), axis=-1)
    masked = (noisable & (ranks < counts[..., None])).reshape(batch, -1)[:, :length]
    return _replaced(tokens, noisable_mask, masked, mask_token_id, schedule.weight(times))


def replace_tokens(tokens: jax.Array, noisable_mask: jax.Array, noise: jax.Array | int) -> NoisyBatch:
    """Replaces every noisable token by `noise`, int32 that broadcasts to [batch, length]; each weighs 1.

    The cross-entropy is then the bound of a model that writes all tokens, or those of a block, in one step.
    """
    return _replaced(tokens, noisable_mask, noisable_mask, noise, jnp.float32(1.0))


def clean_batch(tokens: jax.Array, noisable_mask: jax.Array) -> NoisyBatch:
    """Returns the batch of the autoregressive objective: nothing noised, every noisable token scored with weight 1."""
    return _replaced(tokens, noisable_mask, noisable_mask, tokens, jnp.float32(1.0))


def _replaced(tokens: jax.Array, noisable_mask: jax.Array, where: jax.Array, noise: jax.Array | int,
              weights: jax.Array) -> NoisyBatch:
    """Returns a batch with `noise` in place of the tokens at `where`, which are scored; all broadcast to `tokens`."""
    return NoisyBatch(tokens=jnp.where(where, noise, tokens), targets=tokens, loss_mask=where,
                      noisable_mask=noisable_mask,
                      weights=jnp.broadcast_to(weights, tokens.shape).astype(jnp.float32))


def complementary_mask(view: NoisyBatch, mask_token_id: int, weights: jax.Array) -> NoisyBatch:
    """Returns the view that masks exactly the other noisable tokens, with its own weights [batch or 1, length]."""
    masked = view.noisable_mask & ~view.loss_mask
    return dataclasses.replace(view, tokens=jnp.where(masked, mask_token_id, view.targets), loss_mask=masked,
                               weights=jnp.broadcast_to(weights, view.weights.shape))


def concat_noisy_and_clean(views: list[NoisyBatch], block_size: int, *, shift: bool = True) -> NoisyBatch:
    """Concatenates noisy views of one text and its clean copy: [batch, length] to [batch, (views + 1) x length].

    Every position keeps its loss in the copy whose state predicts it. Several views count as their mean. All copies
    have the positions of the text. `clean_mask` has the noisable positions of the clean copy.
    """
    first = views[0]
    length = first.tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length) if first.positions is None else first.positions, first.tokens.shape)
    from_clean = (jnp.arange(length) % block_size == 0) & shift  # first tokens of blocks
    none = jnp.zeros_like(first.noisable_mask)
    copies = [dataclasses.replace(view, loss_mask=view.loss_mask & ~from_clean, weights=view.weights / len(views),
                                  noisable_mask=none if i else view.noisable_mask, clean_mask=none, positions=positions)
              for i, view in enumerate(views)]
    clean = NoisyBatch(tokens=first.targets, targets=first.targets, loss_mask=first.noisable_mask & from_clean,
                       noisable_mask=none, clean_mask=first.noisable_mask, weights=jnp.ones_like(first.weights),
                       positions=positions)
    both = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *copies, clean)
    return dataclasses.replace(both, noised=(0, len(views) * length))
