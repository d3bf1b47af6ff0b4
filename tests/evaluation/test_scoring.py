"""Scores of continuations against the definition, the enumerated bound and the reference rule."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import beta

from dlm_jax.attention import AttentionMask
from dlm_jax.diffusion import DiffusionSpec
from dlm_jax.errors import DataError
from dlm_jax.evaluation.eval_model import Pair
from dlm_jax.evaluation.scoring import autoregressive_score, bound_masks, diffusion_score, reference_masks
from tests.sampling.tiny_models import MASK, tiny

BOS = 7


def pairs_of(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [Pair(tuple(rng.integers(0, 61, context)), tuple(rng.integers(0, 61, length)), item)
            for item, (context, length) in enumerate(shapes)]


def log_probabilities(model, rows, attention):
    return np.asarray(jax.nn.log_softmax(model(jnp.asarray(rows), attention)), np.float64)


def masked_nll(model, pair, masked, shift=True):
    """Of every pass the cross-entropy summed over its masked tokens, [passes], by full logits."""
    row = np.array([BOS, *pair.context, *pair.continuation])
    where = np.pad(masked, ((0, 0), (len(row) - masked.shape[1], 0)))
    logp = log_probabilities(model, np.where(where, MASK, row), AttentionMask.bidirectional())
    nll = -np.stack([logp[:, n - shift, row[n]] for n in range(len(row))], axis=1)
    return np.where(where, nll, 0).sum(axis=1)


@pytest.mark.parametrize("shift", [True, False])
def test_a_short_continuation_has_its_enumerated_bound(shift):
    model, (pair,) = tiny("llama"), pairs_of((4, 4))
    masks = np.array([mask for mask in itertools.product([False, True], repeat=4) if any(mask)])
    sizes = masks.sum(axis=1)
    expected = (beta(sizes, 4 - sizes + 1) * masked_nll(model, pair, masks, shift)).sum()
    score = diffusion_score(model, lambda pair: bound_masks(4, 15, 0, pair.item), diffusion=DiffusionSpec(MASK, shift),
                            bos_token_id=BOS)
    np.testing.assert_allclose(score([pair]), expected, rtol=1e-5)


def test_the_estimate_of_a_longer_one_is_unbiased():
    model, (pair,) = tiny("llama"), pairs_of((3, 5))
    masks = np.array([mask for mask in itertools.product([False, True], repeat=5) if any(mask)])
    sizes = masks.sum(axis=1)
    expected = (beta(sizes, 5 - sizes + 1) * masked_nll(model, pair, masks)).sum()
    score = diffusion_score(model, lambda pair: bound_masks(5, 4, 0, pair.item), diffusion=DiffusionSpec(MASK),
                            bos_token_id=BOS,
                            batch_size=256)
    found = score([pair._replace(item=item) for item in range(600)])
    assert abs(found.mean() - expected) < 4 * found.std() / len(found) ** 0.5


def test_a_score_depends_on_its_own_pair_alone():
    model, pairs = tiny("gpt2"), pairs_of((5, 9), (25, 6), (1, 1), (12, 20), (0, 3))
    scores = [diffusion_score(model, lambda pair: bound_masks(len(pair.continuation), 6, 0, pair.item),
                              diffusion=DiffusionSpec(MASK), bos_token_id=BOS, batch_size=size) for size in (1, 4, 64)]
    found = [score(pairs) for score in scores]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-5)
    np.testing.assert_allclose(scores[1](pairs[::-1])[::-1], found[0], rtol=1e-5)


def test_options_that_are_equal_score_equally():
    model, (pair,) = tiny("llama"), pairs_of((6, 12))
    score = diffusion_score(model, lambda pair: bound_masks(12, 5, 0, pair.item), diffusion=DiffusionSpec(MASK),
                            bos_token_id=BOS)
    first, second = score([pair, pair._replace(option=1)])
    assert first == pytest.approx(second, rel=1e-6)


def test_the_released_score_with_given_noise():
    model, pairs = tiny("gpt2"), pairs_of((6, 5), (6, 2))
    noise = [np.random.default_rng(n).random((32, len(pair.continuation))) for n, pair in enumerate(pairs)]
    score = diffusion_score(model, lambda pair: reference_masks(noise[pair.item]), diffusion=DiffusionSpec(MASK))
    for pair, uniform, found in zip(pairs, noise, score(pairs), strict=True):
        row = np.array([*pair.context, *pair.continuation])  # no BOS
        masked = np.array([[False] * len(pair.context) + list(uniforms < t / 32)
                           for t, uniforms in zip(range(32, 0, -1), uniform, strict=True)])
        logp = log_probabilities(model, np.where(masked, MASK, row), AttentionMask.bidirectional())
        total = 0.0
        for step in range(32):
            if masked[step].any():
                total -= np.mean([logp[step, n - 1, row[n]] for n in np.flatnonzero(masked[step])])
        np.testing.assert_allclose(found, total / 32, rtol=1e-4)


def test_an_autoregressive_score_is_the_chain_rule():
    model, pairs = tiny("llama"), pairs_of((5, 4), (2, 7), (0, 3))
    for pair, found in zip(pairs, autoregressive_score(model, bos_token_id=BOS, batch_size=2)(pairs), strict=True):
        row = [BOS, *pair.context, *pair.continuation]
        logp = log_probabilities(model, [row], AttentionMask.causal())[0]
        first = len(row) - len(pair.continuation)
        np.testing.assert_allclose(found, -sum(logp[n - 1, row[n]] for n in range(first, len(row))), rtol=1e-5)


def test_devices_of_a_mesh_agree_with_one():
    from dlm_jax.parallel import MeshConfig, make_mesh

    model, pairs = tiny("llama"), pairs_of((5, 9), (3, 6), (1, 11))
    settings = {"diffusion": DiffusionSpec(MASK), "bos_token_id": BOS, "batch_size": 12}
    alone, spread = (diffusion_score(model, lambda pair: bound_masks(len(pair.continuation), 6, 0, pair.item),
                                     mesh=mesh, **settings)(pairs) for mesh in (None, make_mesh(MeshConfig())))
    np.testing.assert_allclose(spread, alone, rtol=1e-5)


def test_pairs_that_cannot_be_scored_are_refused():
    score = autoregressive_score(tiny("gpt2"))
    with pytest.raises(DataError, match="item 0, option 0"):
        score(pairs_of((0, 3)))
    with pytest.raises(DataError, match="item 0, option 0"):
        score(pairs_of((3, 0)))
    with pytest.raises(DataError, match="43 .* 40"):
        score(pairs_of((3, 40)))
