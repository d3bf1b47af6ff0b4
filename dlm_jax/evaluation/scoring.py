"""Which tokens of a continuation are masked in each forward pass, and how much each pass counts.

Every rule gives a `Draw`, and a score is linear in what the passes find:

    score = sum over passes s of weight[s] * (cross-entropy summed over the tokens masked in pass s)

The context is never masked. Masks are a function of (seed, item) and of the continuation's length alone, drawn on the
host; so the options of an item meet the same noise (common random numbers), and another framework can use the same.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dlm_jax.attention import AttentionMask
from dlm_jax.diffusion import DiffusionSpec, NoisyBatch, concat_noisy_and_clean, cross_entropy, token_nll, top1_correct
from dlm_jax.diffusion.loss import Measure
from dlm_jax.errors import ConfigError, DataError
from dlm_jax.evaluation.eval_model import MaskedPrediction, Pair, Score
from dlm_jax.models import Transformer
from dlm_jax.parallel import array_sharding, num_batch_shards
from dlm_jax.sampling import bucket


class Draw(NamedTuple):
    """`masked` bool [passes, length], no row empty; `weights` float64 [passes].

    Of a model that writes in blocks, `weights` are [passes, length]: see `in_blocks`.
    """

    masked: np.ndarray
    weights: np.ndarray


def bound_draw(length: int, num_samples: int, seed: int, item: int) -> Draw:
    """Masks whose score is an unbiased estimate of the bound on -log p(continuation | context), in nats.

    The bound is the expectation, over a number l of masked tokens uniform on 1 .. length and over which they are, of
    (length / l) times their cross-entropy (LLaDA, arXiv 2502.09992, eq. 6). Where the 2**length - 1 masks are no more
    than `num_samples`, each is taken once with its own probability and the bound is exact.

    Else the numbers are a systematic sample of 1 .. length with one random offset. A token counts with the sum of the
    weights length / l of the passes in which it is masked, over `num_samples`, which is 1 on average; tokens differ
    far more in their cross-entropy than one token does under different masks, so that this sum has to be nearly 1 for
    each: from the fewest masked tokens to the most, each pass takes those that count least so far. As the tokens stand
    in random order, every mask by itself is a uniformly random subset of its size.
    """
    if 2**length - 1 <= num_samples:
        codes = np.arange(1, 2**length)[:, None]
        masked = (codes >> np.arange(length) & 1).astype(bool)
        return Draw(masked, np.array([1 / (row.sum() * math.comb(length, row.sum())) for row in masked]))
    rng = np.random.default_rng([seed, item])
    offset = rng.random()
    # One number a token, in the tokens' order: options of other lengths begin with the same.
    order = np.argsort(rng.random(length), kind="stable")
    number = 1 + np.floor((np.arange(num_samples) + offset) / num_samples * length).astype(int)
    number = np.minimum(number, length)  # rounding
    weights = length / number / num_samples
    masked, counted = np.zeros((num_samples, length), bool), np.zeros(length)
    for row, size, weight in zip(masked, number, weights, strict=True):
        least = np.argsort(counted, kind="stable")[:size]
        counted[least] += weight
        row[order[least]] = True
    return _merged(masked, weights)


def sample_time_masks(length: int, num_samples: int, seed: int, item: int) -> Draw:
    """The same bound by times instead of numbers: pass s masks each token with probability t, and counts 1 / t.

    The times are stratified, one from each of `num_samples` equal parts of (0, 1). It is what training minimises
    (arXiv 2410.17891, eq. 4), and dearer for the same error than `bound_draw`; passes that mask nothing are left out.
    """
    rng = np.random.default_rng([seed, item])
    times = (np.arange(num_samples) + 1 - rng.random(num_samples)) / num_samples
    masked = times[:, None] > rng.random((length, num_samples)).T  # an option's tokens meet what another's first do
    some = masked.any(axis=1)
    return _merged(masked[some], 1 / (num_samples * times[some]))


def release_draw(uniform: np.ndarray) -> Draw:
    """The rule of the released evaluation: `uniform` [T, length] in [0, 1), row t masks those below (T - t) / T.

    A pass counts as the unweighted mean cross-entropy of its masked tokens, and the score is the mean over passes; one
    that masks nothing counts as 0, which favours short options.
    """
    num_passes = len(uniform)
    masked = uniform < ((num_passes - np.arange(num_passes)) / num_passes)[:, None]
    masked = masked[masked.any(axis=1)]
    return _merged(masked, 1 / (num_passes * masked.sum(axis=1)))


def mask_all(length: int) -> Draw:
    """Every token scored once in one pass: what a causal model needs."""
    return Draw(np.ones((1, length), bool), np.ones(1))


def in_blocks(draw: Callable[[int, int], Draw], begin: int, length: int, block_size: int, *, shift: bool) -> Draw:
    """Masks for the bound of blocks that are written one after another, each given the clean text before it.

    A pass masks in every block at once, so that a block's tokens count by its own draw: the weights are [passes,
    length]. Under the shift a block's first token is predicted from clean text whatever is masked, and counts once, in
    the first pass (see `diffusion.blocks`).

    Args:
      draw: gives the masks in a block, from its number and how many of its tokens are to be scored.
      begin: where in its row the continuation begins, at least 1; blocks are counted from the row's beginning.
    """
    ends = [*range(begin - begin % block_size + block_size, begin + length, block_size), begin + length]
    found = [draw((end - 1) // block_size, end - start) for start, end in zip([begin, *ends], ends, strict=False)]
    passes = max(len(part.weights) for part in found)
    row_masks = [part.masked for part in found], [part.weights[:, None] * part.masked for part in found]
    masked, weights = (np.concatenate([np.pad(x, ((0, passes - len(x)), (0, 0))) for x in plane], axis=1)
                       for plane in row_masks)
    if shift:
        opens = (begin + np.arange(length)) % block_size == 0
        weights[:, opens] = np.arange(passes)[:, None] == 0
    scores = weights.any(axis=1)
    return Draw(masked[scores], weights[scores])


def _merged(masked: np.ndarray, weights: np.ndarray) -> Draw:
    """Equal masks become one, with their weights added: the same score for fewer passes."""
    unique, which = np.unique(masked, axis=0, return_inverse=True)
    return Draw(unique, np.bincount(which.ravel(), weights, len(unique)))


# ---- Scores of continuations by a model of ours: all passes of all pairs in full batches of one compiled function.


DrawRule = Callable[[Pair], Draw]
_HEAD_CHUNK = 8  # masked tokens of a row whose logits exist at one time
_BLOCK_ITEMS = 1 << 24  # items' numbers of the draws of one block and of the next lie so far apart
_WIDTHS = 16  # a row is padded to a multiple of it: more programs than a canvas has, for many more passes of each


class _Pass(NamedTuple):
    """One forward pass: which pair, where of its continuation masks lie, and what each token counts, [length]."""

    pair: int
    masked: np.ndarray
    weights: np.ndarray


def diffusion_score(model: Transformer, draw: DrawRule, *, diffusion: DiffusionSpec,
                    bos_token_id: int | None = None, batch_size: int = 16, mesh: Mesh | None = None) -> Score:
    """A `Score` by masking: the sum of `draw(pair)`'s passes, bidirectional attention, the context never masked.

    A pair's score does not depend on the other pairs or the batch size.

    Args:
      draw: returns the masks of a pair: `bound_draw` for the bound, `release_draw` for the reference's score.
      diffusion: mask token, shift and blocks of the model. Without a mask token nothing is masked, and attention is
        causal. With blocks the bound is that of the blocks, each with masks of its own.
      bos_token_id: precedes every context; None: position 0 is the context's own first token.
      mesh: splits a batch over devices.
    """
    blocks = diffusion.blocks

    def draw_of(pair: Pair) -> Draw:
        if blocks is None:
            return draw(pair)
        begin = (bos_token_id is not None) + len(pair.context)
        return in_blocks(lambda block, length: draw(pair._replace(
            continuation=pair.continuation[:length], item=pair.item + _BLOCK_ITEMS * block)), begin,
            len(pair.continuation), blocks.size, shift=diffusion.shift)

    def score(pairs: Sequence[Pair]) -> np.ndarray:
        return _score(model, pairs, list(map(draw_of, pairs)), diffusion=diffusion, bos_token_id=bos_token_id,
                      batch_size=batch_size, mesh=mesh)

    return score


def autoregressive_score(model: Transformer, *, bos_token_id: int | None = None, batch_size: int = 16,
                         mesh: Mesh | None = None) -> Score:
    """A `Score` that is exact: one pass under causal attention; arguments as in `diffusion_score`."""
    return diffusion_score(model, lambda pair: mask_all(len(pair.continuation)), diffusion=DiffusionSpec(None),
                           bos_token_id=bos_token_id, batch_size=batch_size, mesh=mesh)


def make_guess(model: Transformer, *, diffusion: DiffusionSpec, bos_token_id: int | None = None, batch_size: int = 16,
               mesh: Mesh | None = None) -> MaskedPrediction:
    """Returns a `MaskedPrediction` with one forward pass per text, in which all tokens asked for are masked.

    An autoregressive model (no mask token) predicts each from the tokens before it, and nothing is masked.
    """
    diffusion = dataclasses.replace(diffusion, blocks=None)

    def guess(pairs: Sequence[Pair], asked: Sequence[np.ndarray]) -> np.ndarray:
        draws = [Draw(masked[None], np.array([1 / masked.sum()])) for masked in asked]
        return _score(model, pairs, draws, diffusion=diffusion, bos_token_id=bos_token_id,
                      batch_size=batch_size, mesh=mesh, measure=top1_correct)

    return guess


def _score(model: Transformer, pairs: Sequence[Pair], draws: Sequence[Draw], *, diffusion: DiffusionSpec,
           bos_token_id: int | None, batch_size: int, mesh: Mesh | None,
           measure: Measure = cross_entropy) -> np.ndarray:
    """float64 [pairs], each the weighted sum over its passes of `measure` at the masked; no mask token: causal."""
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    head = () if bos_token_id is None else (bos_token_id,)
    rows = [np.array([*head, *pair.context, *pair.continuation], np.int32) for pair in pairs]
    for row, pair in zip(rows, pairs, strict=True):
        _check(row, pair, model.config.max_length)
    width = [bucket(len(row), model.config.max_length, _WIDTHS) for row in rows]
    passes = [_Pass(number, masked, np.where(masked, weights, 0) if np.ndim(weights) == 0 else weights)
              for number, draw in enumerate(draws) for masked, weights in zip(*draw, strict=True)]
    # Batch mates are alike in their width, one compiled shape, and in how many tokens the head works on.
    passes.sort(key=lambda one: (width[one.pair], one.masked.sum()), reverse=True)
    graphdef, params = nnx.split(model)
    parts = 1 if mesh is None else num_batch_shards(mesh)
    batch_size = -(-batch_size // parts) * parts
    scores = np.zeros(len(pairs))
    waiting: list[tuple[list[_Pass], jax.Array]] = []
    for batch in _batches(passes, width, batch_size):
        arrays = _arrays([(rows[one.pair], one) for one in batch], width[batch[0].pair], batch_size,
                         diffusion.mask_token_id)
        arrays = jax.tree.map(jnp.asarray, arrays) if mesh is None else jax.device_put(
            arrays, array_sharding(mesh, "batch"))
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            nll = _nll(graphdef, params, *arrays, diffusion=diffusion, measure=measure)
        waiting.append((batch, nll))  # the next batch is made while this one runs
        if len(waiting) > 1:
            _add(scores, *waiting.pop(0))
    for batch, nll in waiting:
        _add(scores, batch, nll)
    return scores


def _check(row: np.ndarray, pair: Pair, max_length: int) -> None:
    where = f"item {pair.item}, option {pair.option}"
    if not pair.continuation:
        raise DataError(f"{where}: the continuation has no token to score")
    if len(row) == len(pair.continuation):
        raise DataError(f"{where}: nothing stands before the continuation, whose first token nothing predicts; give "
                        "the model a BOS token or the item a context")
    if len(row) > max_length:
        raise DataError(f"{where}: {len(row)} tokens, and the model takes at most {max_length}; shorten the context")


def _batches(passes: Sequence[_Pass], width: Sequence[int], batch_size: int) -> list[list[_Pass]]:
    """Neighbours of one width, `batch_size` at most."""
    batches: list[list[_Pass]] = []
    for one in passes:
        if not batches or len(batches[-1]) == batch_size or width[batches[-1][0].pair] != width[one.pair]:
            batches.append([])
        batches[-1].append(one)
    return batches


def _arrays(rows: Sequence[tuple[np.ndarray, _Pass]], width: int, batch_size: int,
            mask_token_id: int | None) -> tuple[np.ndarray, ...]:
    """Noised tokens, clean tokens, weights [batch, width]; lengths [batch]. Rows left over score nothing."""
    targets = np.zeros((batch_size, width), np.int32)
    masked = np.zeros((batch_size, width), bool)
    weights = np.zeros((batch_size, width), np.float32)
    lengths = np.ones(batch_size, np.int32)
    for number, (row, one) in enumerate(rows):
        here = slice(len(row) - len(one.masked), len(row))
        targets[number, : len(row)], lengths[number] = row, len(row)
        masked[number, here], weights[number, here] = one.masked, one.weights
    tokens = targets if mask_token_id is None else np.where(masked, mask_token_id, targets).astype(np.int32)
    return tokens, targets, weights, lengths


@functools.partial(jax.jit, static_argnames=("graphdef", "diffusion", "measure"))
def _nll(graphdef: Any, params: nnx.State, tokens: jax.Array, targets: jax.Array, weights: jax.Array,
         lengths: jax.Array, *, diffusion: DiffusionSpec, measure: Measure) -> jax.Array:
    """Returns each row's weighted sum of the cross-entropy, or of another measure, float32 [batch]."""
    model, scored, shift, blocks = nnx.merge(graphdef, params), weights > 0, diffusion.shift, diffusion.blocks
    nll_of = functools.partial(token_nll, unembed=model.unembed, shift=shift, chunk_size=_HEAD_CHUNK, measure=measure)
    if blocks is None:
        attention = AttentionMask.causal() if diffusion.mask_token_id is None else AttentionMask.bidirectional()
        hidden = model.hidden(tokens, attention.with_lengths(lengths))
        return jnp.sum(weights * nll_of(hidden, targets=targets, mask=scored), axis=1)
    both = concat_noisy_and_clean([NoisyBatch(tokens, targets, scored, scored, weights)], blocks.size, shift=shift)
    padding = jnp.arange(tokens.shape[1]) >= lengths[:, None]
    attention = blocks.training_mask(tokens.shape[1]).with_segments(padding)
    hidden = model.hidden(both.tokens, attention, positions=both.positions)
    # A block's first token, from the clean copy, has the weight 1 there that it has in the pass that scores it.
    return jnp.sum(both.weights * nll_of(hidden, targets=both.targets, mask=both.loss_mask), axis=1)


def _add(scores: np.ndarray, batch: Sequence[_Pass], nll: jax.Array) -> None:
    np.add.at(scores, [one.pair for one in batch], np.asarray(nll, np.float64)[: len(batch)])


# ---- Reconstruction: how many of a text's tokens a model finds again when a given share of them is masked at once.
#
# One forward pass, the likeliest token at each place. A diffusion model sees the tokens that are left on both sides; an
# autoregressive model is asked for the same tokens and sees everything before each of them, masked or not.


RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)


def reconstructed(guess: MaskedPrediction, texts: Sequence[Pair], seed: int = 0) -> list[dict[str, float]]:
    """For each text, by ratio, the share of its masked tokens that are found: {"10% masked": 0.8, ...}.

    As many tokens as the ratio says, at least one, are drawn anew for each text and ratio from (seed, item): the same
    for every model with the same tokens.
    """
    asked = [chosen(len(pair.continuation), ratio, seed, pair.item) for pair in texts for ratio in RATIOS]
    found = np.array(guess([pair for pair in texts for _ in RATIOS], asked)).reshape(len(texts), len(RATIOS))
    return [{metric(ratio): float(share) for ratio, share in zip(RATIOS, row, strict=True)} for row in found]


def chosen(length: int, ratio: float, seed: int, item: int) -> np.ndarray:
    """Which tokens are masked, bool [length]."""
    rng = np.random.default_rng([seed, item, round(1000 * ratio)])
    masked = np.zeros(length, bool)
    masked[rng.choice(length, max(round(ratio * length), 1), replace=False)] = True
    return masked


def metric(ratio: float) -> str:
    return f"{ratio:.0%} masked"
