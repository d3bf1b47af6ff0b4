"""Bounds and exact likelihoods against enumeration over all masks, and against full logits."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from scipy.special import beta

from dlm_jax.attention import AttentionMask
from dlm_jax.diffusion import Batch, BlockSpec, DiffusionSpec
from dlm_jax.errors import ConfigError, DataError
from dlm_jax.evaluation import autoregressive_nll, bound
from dlm_jax.evaluation.eval_model import Pair
from dlm_jax.evaluation.likelihood import bound_values, token_log_probs
from dlm_jax.evaluation.scoring import bound_masks, diffusion_score
from dlm_jax.models import ModelConfig
from tests.evaluation.full_logits import log_probabilities
from tests.sampling.tiny_models import random_model

MASK = 12


@pytest.fixture(scope="module")
def model():
    return random_model(ModelConfig("llama", vocab_size=13, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1,
                                    head_dim=8, mlp_size=32, max_length=64), scale=0.5)


def rows_of(count, length=5, seed=0):
    tokens = np.random.default_rng(seed).integers(0, 13, (count, length))  # some are the mask's id, as given tokens
    return tokens, np.ones((count, length), bool)


def enumerated_bound(model, row, shift):
    """The integral over t of 1/t times the expected cross-entropy of the masked, mask by mask: Beta functions."""
    n = len(row) - 1
    masks = np.array([mask for mask in itertools.product([False, True], repeat=n) if any(mask)])
    noised = np.where(np.pad(masks, ((0, 0), (1, 0))), MASK, row)
    logp = log_probabilities(model, noised, AttentionMask.bidirectional())
    total = 0.0
    for mask, logp_row in zip(masks, logp, strict=True):
        k = mask.sum()
        weight = beta(k, n - k + 1)  # the integral of t**(k-1) (1-t)**(n-k)
        total -= weight * sum(logp_row[position - shift, row[position]] for position in np.flatnonzero(mask) + 1)
    return total


@pytest.mark.parametrize("shift", [True, False])
def test_bound_and_its_standard_error_are_unbiased(model, shift):
    (row,), _ = rows_of(1)
    copies = 2000
    estimate = bound(model, np.tile(row, (copies, 1)), np.ones((copies, 5), bool), diffusion=DiffusionSpec(MASK, shift),
                     num_samples=3, batch_size=1000)
    expected = enumerated_bound(model, row, shift)
    spread = np.std([r.nats for r in estimate.rows]) / copies**0.5
    assert abs(estimate.nats / copies - expected) < 4 * spread
    assert estimate.nats_per_token == pytest.approx(estimate.nats / (4 * copies))
    assert 0.9 < 4 * estimate.standard_error / spread < 1.6  # overstated, and a little only


def enumerated_block_bound(model, row, blocks, shift):
    """`enumerated_bound` of each block given the clean text before it. Under the shift a block's first token is
    predicted from clean text, whatever is masked."""
    size, total = blocks.size, 0.0
    q, k = np.indices((len(row), len(row)))
    clean = k // size <= q // size if blocks.clean_attention == "block_bidirectional" else k <= q
    of_clean = log_probabilities(model, [row], blocks.prefill_mask())[0]
    for start in range(0, len(row), size):
        end = min(start + size, len(row))
        inside = np.arange(max(start, 1), end)
        masks = np.array([mask for mask in itertools.product([False, True], repeat=len(inside)) if any(mask)], bool)
        if not len(masks):  # position 0 alone
            continue
        noised = np.tile(row, (len(masks), 1))
        noised[:, inside] = np.where(masks, MASK, row[inside])
        logp = log_probabilities(model, noised, np.where(q < end, (clean | (q >= start)) & (k < end), k == q))
        for mask, logp_row in zip(masks, logp, strict=True):
            masked = mask.sum()
            weight = beta(masked, len(inside) - masked + 1)
            total -= weight * sum(logp_row[at - shift, row[at]] for at in inside[mask] if not (shift and at == start))
        if shift and start:
            total -= of_clean[start - 1, row[start]]
    return total


@pytest.mark.parametrize("blocks, shift", [
    (BlockSpec(3), True), (BlockSpec(3), False), (BlockSpec(1), True), (BlockSpec(3, "block_bidirectional"), True)])
def test_block_bound_is_unbiased(model, blocks, shift):
    (row,), _ = rows_of(1, length=7)
    copies = 1000
    estimate = bound(model, np.tile(row, (copies, 1)), np.ones((copies, 7), bool),
                     diffusion=DiffusionSpec(MASK, shift, blocks), num_samples=3, batch_size=1000)
    expected = enumerated_block_bound(model, row, blocks, shift)
    spread = np.std([r.nats for r in estimate.rows]) / copies**0.5
    assert abs(estimate.nats / copies - expected) < 4 * spread + 1e-4
    if blocks.size == 1:
        exact = autoregressive_nll(model, row[None], np.ones((1, 7), bool))
        assert estimate.nats / copies == pytest.approx(exact.nats, rel=1e-5) and spread < 1e-5


@pytest.mark.parametrize("blocks, shift", [
    (BlockSpec(3), True), (BlockSpec(3), False), (BlockSpec(1), True), (BlockSpec(3, "block_bidirectional"), False)])
def test_block_score_is_the_enumerated_bound(model, blocks, shift):
    """Exact, as every mask of a short block is tried: from position 0, and after a context of full blocks."""
    (row,), _ = rows_of(1, length=9)
    score = diffusion_score(model, lambda pair: bound_masks(len(pair.continuation), 7, 0, pair.item),
                            diffusion=DiffusionSpec(MASK, shift, blocks), bos_token_id=int(row[0]), batch_size=4)
    full, rest = score([Pair((), tuple(row[1:])), Pair(tuple(row[1:6]), tuple(row[6:]))])
    expected = enumerated_block_bound(model, row, blocks, shift)
    np.testing.assert_allclose(full, expected, rtol=1e-5)
    np.testing.assert_allclose(rest, expected - enumerated_block_bound(model, row[:6], blocks, shift), rtol=1e-5)


def test_bound_depends_on_the_seed_alone(model):
    tokens, noisable_mask = rows_of(7, length=9)
    first, again, batched, other = (
        bound(model, tokens, noisable_mask, diffusion=DiffusionSpec(MASK), num_samples=4, seed=seed, batch_size=size)
        for seed, size in ((0, 5), (0, 5), (0, 3), (1, 5)))
    assert first == again
    assert first.num_tokens == 56
    assert len(first.rows) == 7
    assert first.nats == pytest.approx(batched.nats, rel=1e-5)
    assert first.nats != other.nats
    assert abs(first.nats - other.nats) < 6 * 56 * (first.standard_error + other.standard_error)


def test_padding_with_its_own_segment(model):
    tokens, noisable_mask = rows_of(3, length=9)
    wide = np.pad(tokens, ((0, 0), (0, 7)), constant_values=3)
    padding = np.tile(np.arange(16) >= 9, (3, 1))
    options = {"diffusion": DiffusionSpec(MASK), "num_samples": 4}
    plain = bound(model, tokens, noisable_mask, **options)
    padded = bound(model, wide, ~padding, segment_ids=padding, **options)
    np.testing.assert_allclose([r.nats for r in padded.rows], [r.nats for r in plain.rows], rtol=1e-5)
    plain, padded = autoregressive_nll(model, tokens, noisable_mask), autoregressive_nll(model, wide, ~padding)
    np.testing.assert_allclose([r.nats for r in padded.rows], [r.nats for r in plain.rows], rtol=1e-5)


@pytest.mark.parametrize("lengths", [[1, 64, 33], [7]])
def test_token_log_probs(model, lengths):
    """Of rows of different lengths, up to the model's limit; the most likely token has exactly the value of the top."""
    rows = [np.random.default_rng(length).integers(0, 13, length).tolist() for length in lengths]
    for row, found in zip(rows, token_log_probs(model, rows, 3), strict=True):
        logp = log_probabilities(model, np.array([row]), AttentionMask.causal())[0]
        assert [len(values) for values in found] == [len(row)] * 3
        np.testing.assert_allclose(found.log_probs[1:], logp[np.arange(len(row) - 1), row[1:]], atol=1e-4)
        np.testing.assert_allclose(found.top_log_probs[1:], -np.sort(-logp[:-1], axis=1)[:, :3], atol=1e-4)
        is_top = found.top_tokens[:, 0] == row
        np.testing.assert_array_equal(is_top[1:], (found.log_probs == found.top_log_probs[:, 0])[1:])
        exact = -autoregressive_nll(model, np.array([row]), np.ones((1, len(row)), bool)).nats if len(row) > 1 else 0
        assert found.log_probs.sum() == pytest.approx(exact, abs=1e-3)


def test_context_is_neither_noised_nor_scored(model):
    tokens, noisable_mask = rows_of(2)
    noisable_mask[:, 1:4] = False
    estimate = bound(model, tokens, noisable_mask, diffusion=DiffusionSpec(MASK), num_samples=2)
    noised = tokens.copy()
    noised[:, 4] = MASK
    logp = log_probabilities(model, noised, AttentionMask.bidirectional())
    np.testing.assert_allclose([r.nats for r in estimate.rows], -logp[[0, 1], 3, tokens[:, 4]], rtol=1e-4)
    assert estimate.standard_error < 1e-6
    assert estimate.num_tokens == 2


def test_bound_on_eight_devices(model):
    tokens, noisable_mask = rows_of(8, length=9)
    batch = Batch(jnp.asarray(tokens), jnp.asarray(noisable_mask).at[:, 0].set(False), jnp.arange(8, dtype=jnp.uint32))
    graphdef, params = nnx.split(model)
    values_of = functools.partial(bound_values, graphdef, diffusion=DiffusionSpec(MASK), num_samples=4, seed=0)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    everywhere = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    for sample in range(4):
        np.testing.assert_allclose(values_of(everywhere, spread, sample), values_of(params, batch, sample), rtol=1e-5)


def test_autoregressive_nll_is_the_chain_rule(model):
    tokens, noisable_mask = rows_of(3, length=9)
    logp = log_probabilities(model, tokens, AttentionMask.causal())
    expected = [-sum(logp[i, n - 1, tokens[i, n]] for n in range(1, 9)) for i in range(3)]
    estimate = autoregressive_nll(model, tokens, noisable_mask, batch_size=2)
    np.testing.assert_allclose([r.nats for r in estimate.rows], expected, rtol=1e-5)
    assert estimate.nats_per_token == pytest.approx(sum(expected) / 24, rel=1e-5)
    assert estimate.standard_error == 0


def test_refusals(model):
    tokens, noisable_mask = rows_of(2)
    with pytest.raises(ConfigError, match="num_samples"):
        bound(model, tokens, noisable_mask, diffusion=DiffusionSpec(MASK), num_samples=1)
    with pytest.raises(DataError):
        bound(model, tokens, np.zeros((2, 5), bool), diffusion=DiffusionSpec(MASK))
