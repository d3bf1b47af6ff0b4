"""Reconstruction: how many of a text's tokens a model finds again when a given share of them is masked at once.

One forward pass, the likeliest token at each place. A diffusion model sees the tokens that are left on both sides; an
autoregressive model is asked for the same tokens and sees everything before each of them, masked or not.
"""

from collections.abc import Sequence

import numpy as np

from dlm_jax.evaluation.eval_model import MaskedPrediction, Pair

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
