"""Scores of packed options against full logits of each text alone."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from dlm_jax.attention import AttentionMask
from dlm_jax.diffusion import cross_entropy
from dlm_jax.errors import DataError
from dlm_jax.evaluation.causal_scoring import (
    _grow_trees,
    _pack,
    autoregressive_score,
    score_and_is_greedy,
    token_values,
)
from dlm_jax.evaluation.eval_model import Pair
from dlm_jax.evaluation.scoring import token_rows
from dlm_jax.parallel import MeshConfig, make_mesh
from tests.evaluation.full_logits import log_probabilities
from tests.sampling.tiny_models import tiny

BOS = 7


def items(seed, *, count=12, options=4):
    """Returns items whose options share the context, begin alike, differ in the context, or are equal."""
    rng = np.random.default_rng(seed)

    def tokens(length):
        return tuple(map(int, rng.integers(0, 61, length)))

    pairs = []
    for item in range(count):
        context, end = tokens(rng.integers(1, 9)), tokens(rng.integers(1, 6))
        for option in range(options):
            match item % 4:
                case 0:
                    pairs.append(Pair(context, tokens(rng.integers(1, 9)), item, option))
                case 1:
                    pairs.append(Pair(context, end + tokens(rng.integers(1, 4)), item, option))
                case 2:  # the continuation is the same
                    pairs.append(Pair(context + tokens(rng.integers(1, 5)), end, item, option))
                case 3:
                    pairs.append(Pair(context, end, item, option))
    return pairs


def expected_values(model, pair):
    """Returns the cross-entropy of each token of a continuation, and whether all are the most likely ones."""
    row = [BOS, *pair.context, *pair.continuation]
    logp = log_probabilities(model, [row], AttentionMask.causal())[0]
    places = range(len(row) - len(pair.continuation), len(row))
    return [-logp[n - 1, row[n]] for n in places], all(logp[n - 1].argmax() == row[n] for n in places)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_values_are_those_of_each_text_alone(family, batch_size):
    model, pairs = tiny(family), items(0)
    for pair, found in zip(pairs, token_values(model, pairs, cross_entropy, bos_token_id=BOS, batch_size=batch_size),
                           strict=True):
        np.testing.assert_allclose(found, expected_values(model, pair)[0], rtol=2e-5, atol=1e-6)


def test_greedy_options_are_found():
    model, pairs = tiny("llama"), items(1)
    for number, pair in enumerate(pairs[::3]):  # a third of the options becomes what the model would write
        row = [BOS, *pair.context]
        for _ in pair.continuation:
            row.append(int(log_probabilities(model, [row], AttentionMask.causal())[0, -1].argmax()))
        pairs[3 * number] = pair._replace(continuation=tuple(row[-len(pair.continuation):]))
    scores, greedy = score_and_is_greedy(model, bos_token_id=BOS)(pairs)
    expected = [expected_values(model, pair) for pair in pairs]
    np.testing.assert_allclose(scores, [sum(values) for values, _ in expected], rtol=1e-5)
    np.testing.assert_array_equal(greedy, [found for _, found in expected])
    assert 0 < greedy.sum() < len(greedy)


def test_order_and_number_of_pairs_change_rounding_alone():
    model, pairs = tiny("llama"), items(2)
    score = autoregressive_score(model, bos_token_id=BOS, batch_size=3)
    found = score(pairs)
    np.testing.assert_allclose(score(pairs[::-1])[::-1], found, rtol=1e-5)
    np.testing.assert_allclose(np.concatenate([score(pairs[:5]), score(pairs[5:])]), found, rtol=1e-5)
    assert len(score([])) == 0


def test_no_option_leaves_a_sliding_window():
    model = tiny("llama")
    config = dataclasses.replace(model.config, sliding_window=6)
    narrow = type(model)(config, rngs=nnx.Rngs(0))
    pairs = items(3)
    for pair, found in zip(pairs, autoregressive_score(narrow, bos_token_id=BOS)(pairs), strict=True):
        np.testing.assert_allclose(found, sum(expected_values(narrow, pair)[0]), rtol=1e-5)


def test_options_share_their_start():
    config, pairs = tiny("llama").config, [Pair(tuple(range(10)), (20 + n, 21, 22), 0, n) for n in range(4)]
    rows = token_rows(pairs, BOS, longest=40, max_length=40)
    tree, = _grow_trees(rows, pairs, config)
    # BOS and nine tokens; the tenth predicts the first token of each option, and the last token is not seen.
    assert (len(tree.start), tree.size) == (10, 10 + 4 * 3)
    lone = [pair._replace(item=number) for number, pair in enumerate(pairs)]
    assert [one.size for one in _grow_trees(rows, lone, config)] == [13] * 4


def test_rows_are_full():
    config, rng = tiny("llama").config, np.random.default_rng(0)
    pairs = [Pair(tuple(rng.integers(0, 61, rng.integers(2, 12))), (1, 2), number) for number in range(400)]
    trees = _grow_trees(token_rows(pairs, BOS, longest=40, max_length=40), pairs, config)
    rows = _pack(trees, 40)
    assert sorted(id(tree) for row in rows for _, tree in row.trees) == sorted(map(id, trees))
    assert all(row.used <= row.width for row in rows)
    assert sum(row.used for row in rows) > 0.97 * sum(row.width for row in rows)


def test_texts_of_the_longest_length():
    model = tiny("gpt2")  # 40 positions: the last token is predicted, and needs none
    pair = Pair(tuple(range(30)), tuple(range(10)))
    found, = autoregressive_score(model, bos_token_id=BOS)([pair])
    row = [BOS, *pair.context, *pair.continuation]
    logp = log_probabilities(model, [row[:-1]], AttentionMask.causal())[0]
    np.testing.assert_allclose(found, -sum(logp[n - 1, row[n]] for n in range(31, 41)), rtol=1e-5)


def test_scores_on_eight_devices():
    model, pairs = tiny("llama"), items(4)
    alone, spread = (autoregressive_score(model, bos_token_id=BOS, batch_size=4, mesh=mesh)(pairs)
                     for mesh in (None, make_mesh(MeshConfig())))
    np.testing.assert_allclose(spread, alone, rtol=1e-5)


def test_bad_pairs():
    score = autoregressive_score(tiny("gpt2"))
    for pair, named in ((Pair((), (1, 2, 3), 4, 1), "item 4, option 1"), (Pair((1, 2), (), 4, 1), "item 4, option 1"),
                        (Pair((1, 2, 3), tuple(range(40))), "43 .* 40")):
        with pytest.raises(DataError, match=named):
            score([pair])
