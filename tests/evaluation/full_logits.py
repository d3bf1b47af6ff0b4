"""Log-probabilities from full logits, for comparison with scores that are computed in parts."""

import functools

import jax
import numpy as np
from flax import nnx

from dlm_jax.attention import AttentionMask


def log_probabilities(model, rows, attention):
    """Returns float64 [rows, length, vocab] for rows of token ids.

    Numbers of rows and lengths are padded, so that few programs are compiled.

    Args:
      rows: may differ in length; the result has the longest.
      attention: a mask, or bool [length, length].
    """
    longest = max(map(len, rows))
    length = min(-(-longest // 16) * 16, model.config.max_length)
    tokens = np.zeros((max(8, 1 << len(rows).bit_length()), length), np.int32)
    lengths = np.ones(len(tokens), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)], lengths[number] = row, len(row)
    if isinstance(attention, AttentionMask):
        attention = attention.with_lengths(lengths)
    else:
        allowed = np.eye(length, dtype=bool)
        allowed[:longest, :longest] = attention
        attention = AttentionMask.matrix(allowed)
    return np.asarray(_log_softmax(*nnx.split(model), tokens, attention), np.float64)[: len(rows), :longest]


@functools.partial(jax.jit, static_argnums=0)
def _log_softmax(graphdef, params, tokens, attention):
    return jax.nn.log_softmax(nnx.merge(graphdef, params)(tokens, attention))
