"""Which tokens of a continuation are masked in each forward pass, and how much each pass counts.

Every rule gives a `Draw`, and a score is linear in what the passes find:

    score = sum over passes s of weight[s] * (cross-entropy summed over the tokens masked in pass s)

The context is never masked. Masks are a function of (seed, item) and of the continuation's length alone, drawn on the
host; so the options of an item meet the same noise (common random numbers), and another framework can use the same.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


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
