"""Block diffusion: noised copies of a text and a clean one, and from which copy each token is predicted.

A block's tokens are masked and predicted given all earlier blocks clean (BD3-LM, arXiv 2503.09573). Under the shift the
state at n - 1 predicts token n, and for the first token of a block that state lies in an earlier block: it is read from
the clean copy, and where that is causal this prediction is the AR parent's own. It does not depend on the noise of its
block, so the expectation of its weight, 1, takes the weight's place, and it is always scored. Blocks of one token
are then the AR loss, and one block as long as the text is the loss of full diffusion.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dlm_jax.diffusion.corruption import CorruptedBatch


def opens_block(length: int, block_size: int) -> jax.Array:
    """Where a block begins, bool [length]."""
    return jnp.arange(length) % block_size == 0


def beside_clean(views: list[CorruptedBatch], block_size: int, *, shift: bool = True) -> CorruptedBatch:
    """Noised views of one text [batch, length] and the text itself: [batch, (views + 1) x length].

    Every position keeps its loss in the copy from whose state it is predicted. Several views count as their mean. All
    copies stand at the positions of the text.
    """
    first, number = views[0], len(views)
    at = jnp.arange(first.tokens.shape[1]) if first.positions is None else first.positions
    at = jnp.broadcast_to(at, first.tokens.shape)
    begins = opens_block(first.tokens.shape[1], block_size) & shift
    none = jnp.zeros_like(first.maskable)
    clean = dataclasses.replace(first, tokens=first.targets, scored=first.maskable & begins, maskable=none,
                                weights=jnp.ones_like(first.weights), positions=at)
    copies = [dataclasses.replace(view, scored=view.scored & ~begins, weights=view.weights / number, positions=at,
                                  maskable=none if index else view.maskable) for index, view in enumerate(views)]
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *copies, clean)


def complement(view: CorruptedBatch, mask_token_id: int, weights: jax.Array) -> CorruptedBatch:
    """The view in which just the other maskable tokens are masked, with weights [batch or 1, length] of its own."""
    masked = view.maskable & ~view.scored
    return dataclasses.replace(view, tokens=jnp.where(masked, mask_token_id, view.targets), scored=masked,
                               weights=jnp.broadcast_to(weights, view.weights.shape))
