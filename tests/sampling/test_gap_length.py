"""The length of a gap: the scores against a plain computation, and a language in which one length alone fits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention import AttentionMask
from dlm_jax.errors import ConfigError, DataError
from dlm_jax.sampling import GAP
from dlm_jax.sampling.gap_length import Gap, continuation_scores, infer_gap_lengths
from tests.sampling.tools import MASK, run, tiny
from tests.sampling.toys import Toy

BOS, CYCLE_MASK = 3, 4


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def log_probabilities(model, tokens):
    return jax.nn.log_softmax(model(tokens, AttentionMask.bidirectional()))


def test_a_length_is_scored_by_the_chain_rule_behind_the_filled_gap():
    model, before, after = tiny("llama"), [1, 17, 5], [30, GAP, 8, 41, 2]
    gap = Gap(before, after, range(1, 4))
    found, = continuation_scores(model, [gap], mask_token_id=MASK, num_scored=3)
    for length, score in zip(gap.lengths, found, strict=True):
        row = np.array([[*before, *[GAP] * length, *after]])
        filled = run(model, row, row != GAP, policy="confidence", temperature=0.0).tokens
        scored = 3 + length + np.array([0, 2, 3])  # the given ones of `after`, in their order
        total = 0.0
        for n, position in enumerate(scored):
            seen = filled.copy()  # a fresh one each time: JAX may not yet have read the one before
            seen[0, scored[n:]] = MASK
            total += log_probabilities(model, jnp.array(seen))[0, position - 1, filled[0, position]]
        np.testing.assert_allclose(score, total, rtol=1e-5)


def cycle(max_length=32):
    """A network of the language 0, 1, 2, 0, 1, 2, ...: it goes by the nearest token on the left that it sees."""

    def logits(tokens):
        positions = jnp.arange(tokens.shape[1])
        known = jnp.where(tokens < 3, positions, -1)
        left = jax.lax.cummax(jnp.pad(known, ((0, 0), (1, 0)), constant_values=-1)[:, :-1], axis=1)
        value = jnp.take_along_axis(tokens, jnp.maximum(left, 0), axis=1)
        wanted = (value + positions - left) % 3
        # The nearer, the surer: otherwise all gaps are equally sure.
        return 5 * jax.nn.one_hot(wanted, 5) / (1 + 0.05 * (positions - left))[..., None]

    model = Toy(logits, vocab=5)
    object.__setattr__(model.config, "max_length", max_length)
    return model


def encode(pieces):
    """As `sampling.text.encode` does it, every character a token."""
    row, where = [BOS], []
    for place, piece in enumerate(pieces):
        length = (piece[-1] if isinstance(piece, range) else piece) if place % 2 else len(piece)
        if place % 2:
            where.append(range(len(row), len(row) + length))
        row += [GAP] * length if place % 2 else ["abc".index(letter) for letter in piece]
    return row, where


def test_the_length_found_is_the_one_that_the_text_goes_on_after():
    texts = [["abcab", range(2, 5), "abcabc"], ["abca", range(2, 5), "abca"], ["a", range(3, 6), "cab", 1, "b"],
             ["abc", range(4, 7), "cabc", range(1, 4), "abca"], ["abc", 2, "c"]]
    settled = infer_gap_lengths(cycle(), texts, encode, mask_token_id=CYCLE_MASK)
    assert [text[1] for text in settled] == [4, 2, 4, 5, 2]
    assert settled[3][3] == 3 and settled[2][3] == 1
    assert texts[0][1] == range(2, 5)  # what was given is as it was
    for batch_size in (1, 3):
        assert infer_gap_lengths(cycle(), texts, encode, mask_token_id=CYCLE_MASK, batch_size=batch_size) == settled


def test_without_text_behind_the_gap_the_middle_is_taken():
    texts = [["ab", range(2, 7), ""], ["ab", range(2, 6), "", range(1, 2), ""]]
    settled = infer_gap_lengths(cycle(), texts, encode, mask_token_id=CYCLE_MASK)
    assert settled == [["ab", 4, ""], ["ab", 3, "", 1, ""]]


def test_what_cannot_be_settled_is_refused():
    with pytest.raises(DataError, match="text 1 has 46 tokens with its gaps at their longest, .* at most 32"):
        infer_gap_lengths(cycle(), [["a", 3, "b"], ["abcab", range(2, 41), ""]], encode, mask_token_id=CYCLE_MASK)
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        continuation_scores(cycle(), [Gap([BOS], [1], range(1, 3))], mask_token_id=CYCLE_MASK, batch_size=0)
