"""Scores of gap lengths against a direct computation, and a language in which exactly one length fits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention import AttentionMask
from dlm_jax.diffusion import DiffusionSpec
from dlm_jax.errors import ConfigError, DataError
from dlm_jax.sampling import GAP, pad_rows
from dlm_jax.sampling.gap_length import Gap, continuation_scores, infer_gap_lengths
from tests.sampling.enumerated import LogitsModel
from tests.sampling.tiny_models import MASK, run_sampler, tiny

BOS, CYCLE = 3, DiffusionSpec(4)


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def log_probabilities(model, tokens, lengths):
    return jax.nn.log_softmax(model(tokens, AttentionMask.bidirectional().with_lengths(lengths)))


def test_scores_follow_chain_rule():
    model, before, after = tiny("llama"), [1, 17, 5], [30, GAP, 8, 41, 2]
    gap = Gap(before, after, range(1, 3))
    found, = continuation_scores(model, [gap], diffusion=DiffusionSpec(MASK))
    rows = pad_rows([[*before, *[GAP] * length, *after] for length in gap.lengths], 128)
    filled = run_sampler(model, rows.tokens, rows.fixed, rows.lengths, policy="confidence", temperature=0.0).tokens
    total, scored = np.zeros(2), 3 + np.array(gap.lengths)[:, None] + [0, 2, 3, 4]  # the given tokens of `after`
    for n, positions in enumerate(scored.T):
        seen = filled.copy()  # a copy: JAX may not yet have read the previous one
        np.put_along_axis(seen, scored[:, n:], MASK, axis=1)
        log_p = log_probabilities(model, jnp.array(seen), rows.lengths)
        total += log_p[np.arange(2), positions - 1, filled[np.arange(2), positions]]
    np.testing.assert_allclose(found, total, rtol=1e-5)


@functools.cache
def cycle_model():
    """Returns a model of the language 0, 1, 2, 0, 1, 2, ..., which depends on the nearest given token on the left."""

    def logits(tokens):
        positions = jnp.arange(tokens.shape[1])
        known = jnp.where(tokens < 3, positions, -1)
        left = jax.lax.cummax(jnp.pad(known, ((0, 0), (1, 0)), constant_values=-1)[:, :-1], axis=1)
        value = jnp.take_along_axis(tokens, jnp.maximum(left, 0), axis=1)
        expected = (value + positions - left) % 3
        # The nearer, the more certain.
        return 5 * jax.nn.one_hot(expected, 5) / (1 + 0.05 * (positions - left))[..., None]

    model = LogitsModel(logits, vocab=5)
    object.__setattr__(model.config, "max_length", 32)
    return model


def encode(segments):
    """Encodes as `sampling.text.encode`, with a token per character."""
    row, where = [BOS], []
    for place, segment in enumerate(segments):
        length = (segment[-1] if isinstance(segment, range) else segment) if place % 2 else len(segment)
        if place % 2:
            where.append(range(len(row), len(row) + length))
        row += [GAP] * length if place % 2 else ["abc".index(letter) for letter in segment]
    return row, where


def test_fitting_length_is_found():
    texts = [["abcab", range(2, 5), "abcabc"], ["abca", range(2, 5), "abca"], ["a", range(3, 6), "cab", 1, "b"],
             ["abc", range(4, 7), "cabc", range(1, 4), "abca"], ["abc", 2, "c"]]
    inferred = infer_gap_lengths(cycle_model(), texts, encode, diffusion=CYCLE)
    assert [text[1] for text in inferred] == [4, 2, 4, 5, 2]
    assert inferred[3][3] == 3 and inferred[2][3] == 1
    assert texts[0][1] == range(2, 5)  # the argument is unchanged
    assert infer_gap_lengths(cycle_model(), texts, encode, diffusion=CYCLE, batch_size=3) == inferred


def test_middle_without_text_after_gap():
    texts = [["ab", range(2, 7), ""], ["ab", range(2, 6), "", range(1, 2), ""]]
    inferred = infer_gap_lengths(cycle_model(), texts, encode, diffusion=CYCLE, batch_size=3)
    assert inferred == [["ab", 4, ""], ["ab", 3, "", 1, ""]]


def test_refused():
    with pytest.raises(DataError, match="text 1 .*46.*32"):
        infer_gap_lengths(cycle_model(), [["a", 3, "b"], ["abcab", range(2, 41), ""]], encode, diffusion=CYCLE)
    with pytest.raises(ConfigError, match="batch_size"):
        continuation_scores(cycle_model(), [Gap([BOS], [1], range(1, 3))], diffusion=CYCLE, batch_size=0)
