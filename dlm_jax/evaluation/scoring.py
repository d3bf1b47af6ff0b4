"""Scores of continuations: which tokens each forward pass masks, and all passes of all pairs in full batches.

A mask rule returns for each pair one `MaskSample`, or two that are estimates by themselves, whose mean is the score and
whose difference shows its error. An estimate is linear in the cross-entropies of its passes:

    score = sum over passes s of weight[s] * (cross-entropy summed over the tokens masked in pass s)

The context is never masked. Masks are computed on the host, from (seed, item) and the continuation's length alone. So
all options of an item get the same noise (common random numbers), and another framework can reproduce it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dlm_jax.attention import AttentionMask
from dlm_jax.config_fields import check_at_least
from dlm_jax.diffusion import DiffusionSpec, NoisyBatch, concat_noisy_and_clean, cross_entropy, token_nll, top1_correct
from dlm_jax.diffusion.loss import Measure
from dlm_jax.errors import DataError
from dlm_jax.evaluation.eval_model import MaskedAccuracy, Pair, Score
from dlm_jax.matmul import jit_model
from dlm_jax.models import Transformer
from dlm_jax.parallel import array_sharding, num_batch_shards
from dlm_jax.sampling import bucket

T = TypeVar("T")


class MaskSample(NamedTuple):
    """The masks of one continuation's passes.

    Attributes:
      masked: bool [passes, length], at least one True per row.
      weights: float64 [passes]; for block diffusion [passes, length], see `block_masks`.
    """

    masked: np.ndarray
    weights: np.ndarray


MaskRule = Callable[[Pair], Sequence[MaskSample]]
RECONSTRUCTION_RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)
_HEAD_CHUNK = 8  # masked tokens per row whose logits exist at one time
_BLOCK_ITEMS = 1 << 24  # distance between the item numbers that seed the masks of successive blocks
_WIDTH_MULTIPLE = 16  # row lengths are padded to a multiple of it


def bound_masks(length: int, num_samples: int, seed: int, item: int) -> list[MaskSample]:
    """Returns masks whose score is an unbiased estimate of the bound on -log p(continuation | context), in nats.

    The bound is the expectation of (length / l) times the cross-entropy of l masked tokens, for l uniform on
    1 .. length and a uniformly random subset of that size (LLaDA, arXiv 2502.09992, eq. 6). If there are at most
    `num_samples` masks, 2**length - 1, each is taken once with its probability, and the bound is exact.

    Otherwise the sizes are a systematic sample of 1 .. length with one random offset. A token counts with the sum of
    the weights length / l of the passes that mask it, over `num_samples`, which is 1 on average. Cross-entropy varies
    far more between tokens than between the masks of one token, so this sum should be near 1 for every token: from the
    smallest mask to the largest, each pass masks the tokens that count least so far. Tokens are in random order, so
    that each mask by itself is a uniformly random subset of its size.

    Each half is a systematic sample of its own. The offsets are half a step apart, so that both together are one too,
    and one half goes on with the counts of the other.
    """
    if 2**length - 1 <= num_samples:
        codes = np.arange(1, 2**length)[:, None]
        masked = (codes >> np.arange(length) & 1).astype(bool)
        return [MaskSample(masked, np.array([1 / (row.sum() * math.comb(length, row.sum())) for row in masked]))]
    rng = np.random.default_rng([seed, item])
    fractions = _halves(num_samples, rng.random())
    # One random number per token, in order of position: options of different lengths share their first ones.
    order = np.argsort(rng.random(length), kind="stable")
    halves, counted = {}, np.zeros(length)
    for number in sorted(range(len(fractions)), key=lambda number: fractions[number][0]):  # the smallest mask first
        half = np.minimum(1 + np.floor(fractions[number] * length).astype(int), length)  # rounding
        weights, masked = length / half / len(half), np.zeros((len(half), length), bool)
        for row, size, weight in zip(masked, half, weights, strict=True):
            least = np.argsort(counted, kind="stable")[:size]
            counted[least] += weight
            row[order[least]] = True
        halves[number] = _merged(masked, weights)
    return [halves[number] for number in range(len(fractions))]


def time_masks(length: int, num_samples: int, seed: int, item: int) -> list[MaskSample]:
    """Returns masks for the same bound by times: pass s masks each token with probability t and has the weight 1 / t.

    The times are stratified, one from each of `num_samples` equal intervals of (0, 1). This is the quantity that
    training minimizes (arXiv 2410.17891, eq. 4), with a larger error than `bound_masks` for the same number of passes.
    Passes that mask nothing are skipped. In each half the times are stratified, and in both together.
    """
    rng = np.random.default_rng([seed, item])
    fractions = _halves(num_samples, rng.random((num_samples + 1) // 2))
    halves = []
    for times, uniform in zip((1 - fraction for fraction in fractions), _split(rng.random((length, num_samples)).T),
                              strict=False):
        masked = times[:, None] > uniform  # options of different lengths share their first columns
        some = masked.any(axis=1)
        halves.append(_merged(masked[some], 1 / (len(times) * times[some])))
    return halves


def reference_masks(uniform: np.ndarray) -> list[MaskSample]:
    """Returns the masks of the DiffuLLaMA reference implementation from noise.

    Row t of `uniform` [T, length], in [0, 1), masks the tokens below (T - t) / T. A pass counts with the unweighted
    mean cross-entropy of its masked tokens, and the score is the mean over passes. A pass that masks nothing counts
    as 0, which favors short options.
    """
    num_passes = len(uniform)
    masked = uniform < ((num_passes - np.arange(num_passes)) / num_passes)[:, None]
    masked = masked[masked.any(axis=1)]
    return [_merged(masked, 1 / (num_passes * masked.sum(axis=1)))]


def block_masks(masks: Callable[[int, int], Sequence[MaskSample]], start: int, length: int, block_size: int, *,
                shift: bool) -> list[MaskSample]:
    """Returns masks for the bound of block diffusion, where each block is conditioned on the clean text before it.

    A pass masks tokens in every block at once, and each block has weights of its own: [passes, length]. With the shift
    the first token of a block is predicted from clean text under every mask, so it counts once, in the first pass
    (see `diffusion.corruption`).

    Args:
      masks: returns the masks of a block from its number and the number of its tokens to score.
      start: position of the continuation in its row, at least 1; blocks are counted from position 0.
    """
    ends = [*range(start - start % block_size + block_size, start + length, block_size), start + length]
    found = [masks((end - 1) // block_size, end - first) for first, end in zip([start, *ends], ends, strict=False)]
    is_first = (start + np.arange(length)) % block_size == 0
    halves = []
    for half in range(max(map(len, found))):
        blocks = [samples[half % len(samples)] for samples in found]  # a short block is exact in both halves
        passes = max(len(block.weights) for block in blocks)
        planes = [block.masked for block in blocks], [block.weights[:, None] * block.masked for block in blocks]
        masked, weights = (np.concatenate([np.pad(x, ((0, passes - len(x)), (0, 0))) for x in plane], axis=1)
                           for plane in planes)
        if shift:
            weights[:, is_first] = np.arange(passes)[:, None] == 0
        scores = weights.any(axis=1)
        halves.append(MaskSample(masked[scores], weights[scores]))
    return halves


def diffusion_score(model: Transformer, rule: MaskRule, *, diffusion: DiffusionSpec,
                    bos_token_id: int | None = None, batch_size: int = 16, mesh: Mesh | None = None) -> Score:
    """Returns a `Score` [pairs, 2] of the passes of `rule(pair)`, under bidirectional attention, context never masked.

    A pair's score does not depend on the other pairs or the batch size.

    Args:
      rule: `bound_masks` for the bound, `reference_masks` for the reference implementation's score.
      diffusion: mask token, shift and blocks of the model. With blocks the score is the bound of block diffusion, and
        each block has masks of its own.
      bos_token_id: precedes the context of a pair with `add_bos`; None: position 0 holds its first token.
      mesh: splits a batch over devices.
    """
    blocks = diffusion.blocks

    def masks_of(pair: Pair) -> Sequence[MaskSample]:
        if blocks is None:
            return rule(pair)
        start = (pair.add_bos and bos_token_id is not None) + len(pair.context)
        return block_masks(lambda block, length: rule(pair._replace(
            continuation=pair.continuation[:length], item=pair.item + _BLOCK_ITEMS * block)), start,
            len(pair.continuation), blocks.size, shift=diffusion.shift)

    def score(pairs: Sequence[Pair]) -> np.ndarray:
        return _score(model, pairs, list(map(masks_of, pairs)), diffusion=diffusion, bos_token_id=bos_token_id,
                      batch_size=batch_size, mesh=mesh)

    return score


def make_masked_accuracy(model: Transformer, *, diffusion: DiffusionSpec, bos_token_id: int | None = None,
                         batch_size: int = 16, mesh: Mesh | None = None) -> MaskedAccuracy:
    """Returns a `MaskedAccuracy` with one forward pass per pair, in which all requested tokens are masked at once."""
    diffusion = dataclasses.replace(diffusion, blocks=None)

    def masked_accuracy(pairs: Sequence[Pair], masked: Sequence[np.ndarray]) -> np.ndarray:
        samples = [[MaskSample(mask[None], np.array([1 / mask.sum()]))] for mask in masked]
        return _score(model, pairs, samples, diffusion=diffusion, bos_token_id=bos_token_id, batch_size=batch_size,
                      mesh=mesh, measure=top1_correct)[:, 0]

    return masked_accuracy


def reconstruct(masked_accuracy: MaskedAccuracy, texts: Sequence[Pair], seed: int = 0) -> list[dict[str, float]]:
    """Returns for each text the share of masked tokens that are predicted right, by ratio: {"10% masked": 0.8, ...}.

    Each text is masked at every ratio of `RECONSTRUCTION_RATIOS`, with masks from (seed, item): the same for every
    model with the same tokens.
    """
    masked = [reconstruction_mask(len(pair.continuation), ratio, seed, pair.item)
              for pair in texts for ratio in RECONSTRUCTION_RATIOS]
    pairs = [pair for pair in texts for _ in RECONSTRUCTION_RATIOS]
    shares = np.array(masked_accuracy(pairs, masked)).reshape(len(texts), len(RECONSTRUCTION_RATIOS))
    return [{f"{ratio:.0%} masked": float(share) for ratio, share in zip(RECONSTRUCTION_RATIOS, row, strict=True)}
            for row in shares]


def reconstruction_mask(length: int, ratio: float, seed: int, item: int) -> np.ndarray:
    """Returns which tokens are masked, bool [length]: the given ratio of them, and at least one."""
    rng = np.random.default_rng([seed, item, round(1000 * ratio)])
    masked = np.zeros(length, bool)
    masked[rng.choice(length, max(round(ratio * length), 1), replace=False)] = True
    return masked


def _halves(count: int, offset: float | np.ndarray) -> list[np.ndarray]:
    """Returns fractions in [0, 1): a grid for each half, shifted by `offset` of a step, and half a step apart."""
    sizes = (count + 1) // 2, count // 2
    return [(np.arange(size) + (np.resize(offset, size) + half / 2) % 1) / size
            for half, size in enumerate(sizes) if size]


def _split(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows[: (len(rows) + 1) // 2], rows[(len(rows) + 1) // 2 :]


def _merged(masked: np.ndarray, weights: np.ndarray) -> MaskSample:
    """Merges equal masks and adds their weights: the same score with fewer passes."""
    unique, which = np.unique(masked, axis=0, return_inverse=True)
    return MaskSample(unique, np.bincount(which.ravel(), weights, len(unique)))


class _Pass(NamedTuple):
    """One forward pass: the number of its pair, its half (None: both), and the masked tokens and weights, [length]."""

    pair: int
    half: int | None
    masked: np.ndarray
    weights: np.ndarray


def _score(model: Transformer, pairs: Sequence[Pair], samples: Sequence[Sequence[MaskSample]], *,
           diffusion: DiffusionSpec, bos_token_id: int | None, batch_size: int, mesh: Mesh | None,
           measure: Measure = cross_entropy) -> np.ndarray:
    """Returns float64 [pairs, halves], weighted sums of a measure over the masked tokens of each half's passes."""
    check_at_least(batch_size, 1, "batch_size")
    max_length = model.config.max_length
    rows = token_rows(pairs, bos_token_id, longest=max_length, max_length=max_length)
    width = [pad_width(len(row), max_length) for row in rows]
    passes = [_Pass(number, half if len(halves) > 1 else None, masked,
                    np.where(masked, weights, 0) if np.ndim(weights) == 0 else weights)
              for number, halves in enumerate(samples) for half, sample in enumerate(halves)
              for masked, weights in zip(*sample, strict=True)]
    # Rows of a batch have similar lengths, and similar numbers of tokens for the head.
    passes.sort(key=lambda one: (width[one.pair], one.masked.sum()), reverse=True)
    graphdef, params = nnx.split(model)
    shards = num_batch_shards(mesh)
    batch_size = -(-batch_size // shards) * shards
    scores = np.zeros((len(pairs), 2))

    def sums_of(batch: Sequence[_Pass]) -> jax.Array:
        arrays = _arrays([(rows[one.pair], one) for one in batch], width[batch[0].pair],
                         round_batch(len(batch), batch_size, shards), diffusion.mask_token_id)
        return run_batch(functools.partial(_weighted_sums, graphdef, params, diffusion=diffusion, measure=measure),
                         arrays, mesh)

    batches = (passes[first : first + batch_size] for first in range(0, len(passes), batch_size))
    for batch, sums in one_ahead(sums_of, batches):
        for one, value in zip(batch, np.asarray(sums, np.float64)[: len(batch)], strict=True):
            scores[one.pair, slice(None) if one.half is None else one.half] += value
    return scores


def token_rows(pairs: Sequence[Pair], bos_token_id: int | None, *, longest: int, max_length: int) -> list[np.ndarray]:
    """Returns the tokens of each pair, int32 [length].

    Raises:
      DataError: a pair has no continuation, nothing before it, or more than `longest` tokens; the error names
        `max_length`.
    """
    head = () if bos_token_id is None else (bos_token_id,)
    rows = [np.array([*(head if pair.add_bos else ()), *pair.context, *pair.continuation], np.int32) for pair in pairs]
    for row, pair in zip(rows, pairs, strict=True):
        where = f"item {pair.item}, option {pair.option}"
        if not pair.continuation:
            raise DataError(f"{where}: the continuation has no token to score")
        if len(row) == len(pair.continuation):
            raise DataError(f"{where}: no token precedes the continuation, so nothing predicts its first token; "
                            "give the model a BOS token or the item a context")
        if len(row) > longest:
            raise DataError(f"{where}: {len(row)} tokens, and the model takes at most {max_length}; shorten the "
                            "context")
    return rows


def pad_width(length: int, max_length: int) -> int:
    """Returns a row's padded length, at most an eighth longer or 15 tokens: each is one compiled shape."""
    return bucket(length, max_length, max(_WIDTH_MULTIPLE, (1 << (length - 1).bit_length()) // 16))


def round_batch(rows: int, batch_size: int, shards: int) -> int:
    """Returns the rows of a batch in quarters of the largest: few shapes, little padding, a multiple of `shards`."""
    quarter = -(-batch_size // (4 * shards)) * shards
    return min(-(-rows // quarter) * quarter, batch_size)


def one_ahead(run: Callable[[T], Any], batches: Iterable[T]) -> Iterator[tuple[T, Any]]:
    """Yields each batch and what `run`, which does not wait, returns for it: the next is prepared while one runs."""
    running: list[tuple[T, Any]] = []
    for batch in batches:
        running.append((batch, run(batch)))
        if len(running) > 1:
            yield running.pop(0)
    yield from running


def run_batch(function: Callable[..., Any], arrays: Any, mesh: Mesh | None) -> Any:
    """Returns `function(arrays)`, with the rows of the arrays spread over a mesh."""
    if mesh is None:
        return function(jax.tree.map(jnp.asarray, arrays))
    with jax.set_mesh(mesh):
        return function(jax.device_put(arrays, array_sharding(mesh, "batch")))


class _Arrays(NamedTuple):
    """A batch of rows, each array [batch, width] but `lengths`, int32 [batch]; unused rows have weight 0."""

    tokens: np.ndarray  # noised
    targets: np.ndarray
    weights: np.ndarray
    lengths: np.ndarray


def _arrays(rows: Sequence[tuple[np.ndarray, _Pass]], width: int, batch_size: int, mask_token_id: int) -> _Arrays:
    targets = np.zeros((batch_size, width), np.int32)
    masked = np.zeros((batch_size, width), bool)
    weights = np.zeros((batch_size, width), np.float32)
    lengths = np.ones(batch_size, np.int32)
    for number, (row, one) in enumerate(rows):
        here = slice(len(row) - len(one.masked), len(row))
        targets[number, : len(row)], lengths[number] = row, len(row)
        masked[number, here], weights[number, here] = one.masked, one.weights
    return _Arrays(np.where(masked, mask_token_id, targets).astype(np.int32), targets, weights, lengths)


@functools.partial(jit_model, static_argnames=("graphdef", "diffusion", "measure"))
def _weighted_sums(graphdef: nnx.GraphDef, params: nnx.State, arrays: _Arrays, *, diffusion: DiffusionSpec,
                   measure: Measure) -> jax.Array:
    """Returns each row's weighted sum of a measure, float32 [batch]."""
    tokens, targets, weights, lengths = arrays
    model, scored, shift, blocks = nnx.merge(graphdef, params), weights > 0, diffusion.shift, diffusion.blocks

    def total(hidden: jax.Array, targets: jax.Array, mask: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.sum(weights * token_nll(hidden, model.unembed, targets, mask, shift=shift, chunk_size=_HEAD_CHUNK,
                                           measure=measure), axis=1)

    if blocks is None:
        hidden = model.hidden(tokens, AttentionMask.bidirectional().with_lengths(lengths))
        return total(hidden, targets, scored, weights)
    both = concat_noisy_and_clean([NoisyBatch(tokens, targets, scored, scored, weights)], blocks.size, shift=shift)
    padding = jnp.arange(tokens.shape[1]) >= lengths[:, None]
    attention = blocks.training_mask(tokens.shape[1]).with_segments(padding)
    hidden = model.hidden(both.tokens, attention, positions=both.positions, noised=both.noised)
    # The clean copy predicts a block's first token, with the weight that it has in the pass that scores it.
    return total(hidden, both.targets, both.loss_mask, both.weights)
