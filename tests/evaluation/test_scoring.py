"""Masks, scores and reconstruction against their definitions and the enumerated bound."""

import itertools

import numpy as np
import pytest
from scipy.special import beta

from dlm_jax.attention import AttentionMask
from dlm_jax.diffusion import DiffusionSpec
from dlm_jax.errors import DataError
from dlm_jax.evaluation.causal_scoring import causal_accuracy
from dlm_jax.evaluation.eval_model import Pair
from dlm_jax.evaluation.scoring import (
    RECONSTRUCTION_RATIOS,
    bound_masks,
    diffusion_score,
    make_masked_accuracy,
    reconstruct,
    reconstruction_mask,
    reference_masks,
    time_masks,
)
from dlm_jax.parallel import MeshConfig, make_mesh
from tests.evaluation.full_logits import log_probabilities
from tests.sampling.tiny_models import MASK, tiny


def values_of(length, seed=0):
    """Returns arbitrary values of the 2**length sets of masked tokens, by the set's bits."""
    return np.random.default_rng(seed).gamma(2.0, size=2**length) * [bin(code).count("1") for code in range(2**length)]


def score(sample, values):
    return float(np.mean([half.weights @ values[half.masked @ (1 << np.arange(half.masked.shape[1]))]
                          for half in sample]))


def enumerated(values, length):
    """The integral over t of 1/t times the expectation over masks of rate t: Beta functions."""
    sizes = np.array([bin(code).count("1") for code in range(2**length)])
    return sum(beta(size, length - size + 1) * value for size, value in zip(sizes, values, strict=True) if size)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_bound_masks_of_few_tokens_are_exact(length):
    values = values_of(length)
    assert score(bound_masks(length, 16, 0, 0), values) == pytest.approx(enumerated(values, length))


@pytest.mark.parametrize(("length", "num_samples"), [(5, 1), (7, 16), (4, 8)])
def test_bound_masks_are_unbiased(length, num_samples):
    values = values_of(length)
    found = [score(bound_masks(length, num_samples, 1, item), values) for item in range(4000)]
    assert abs(np.mean(found) - enumerated(values, length)) < 4 * np.std(found) / len(found) ** 0.5


@pytest.mark.parametrize(("length", "num_samples"), [(1, 4), (5, 3)])
def test_time_masks_are_unbiased(length, num_samples):
    values = values_of(length)
    found = [score(time_masks(length, num_samples, 1, item), values) for item in range(6000)]
    assert abs(np.mean(found) - enumerated(values, length)) < 4 * np.std(found) / len(found) ** 0.5
    others = time_masks(length + 3, num_samples, 1, 7)
    assert all(any((row == longer[:length]).all() for longer in other.masked) for half, other in zip(time_masks(
        length, num_samples, 1, 7), others, strict=True) for row in half.masked)  # common random numbers


@pytest.mark.parametrize(("length", "num_samples"), [(20, 8), (25, 16), (40, 16), (127, 32)])
def test_bound_masks_weigh_tokens_equally(length, num_samples):
    for item in range(20):
        halves = bound_masks(length, num_samples, 0, item)
        assert len(halves) == 2
        counted = np.mean([half.weights @ half.masked for half in halves], axis=0)
        assert counted.mean() == pytest.approx(1)
        # A token that is masked alone counts length / num_samples at once; no other is far from 1.
        assert np.sort(np.abs(counted - 1))[:-2].max() < 0.5 and counted.std() < 0.4
        for half in halves:
            assert half.masked.any(axis=1).all()
            assert len(np.unique(half.masked, axis=0)) == len(half.masked) <= num_samples / 2


def test_halves_are_unbiased_by_themselves():
    values = values_of(7)
    found = np.array([[score([half], values) for half in bound_masks(7, 16, 1, item)] for item in range(4000)])
    assert (abs(found.mean(axis=0) - enumerated(values, 7)) < 4 * found.std(axis=0) / len(found) ** 0.5).all()
    error, estimate = found.mean(axis=1).std(), np.sqrt(np.mean((found[:, 0] - found[:, 1]) ** 2)) / 2
    assert error < estimate < 4 * error  # each half misses more than both together


def test_bound_masks_depend_on_seed_and_item():
    first, again = bound_masks(20, 8, 3, 5), bound_masks(20, 8, 3, 5)
    np.testing.assert_array_equal(first[0].masked, again[0].masked)
    others = bound_masks(20, 8, 4, 5), bound_masks(20, 8, 3, 6)
    assert all(other[0].masked.shape != first[0].masked.shape or (other[0].masked != first[0].masked).any()
               for other in others)


def test_reference_masks_step_by_step():
    uniform = np.random.default_rng(0).random((32, 3))
    total = 0.0
    values = values_of(3)
    for t, row in zip(range(32, 0, -1), uniform, strict=True):
        masked = [position for position in range(3) if row[position] < t / 32]
        if masked:  # a step that masks nothing counts as 0
            total += values[sum(1 << position for position in masked)] / len(masked)
    assert score(reference_masks(uniform), values) == pytest.approx(total / 32)
    assert len(reference_masks(uniform)[0].masked) < 32


def test_bound_masks_are_uniform_subsets():
    count = dict.fromkeys(itertools.combinations(range(5), 2), 0)
    for item in range(3000):
        for half in bound_masks(5, 10, 0, item):
            for row in half.masked[half.masked.sum(axis=1) == 2]:
                count[tuple(np.flatnonzero(row))] += 1
    observed = np.array(list(count.values()))
    assert observed.min() > 0.85 * observed.mean() and observed.max() < 1.15 * observed.mean()


BOS = 7


def pairs_of(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [Pair(tuple(rng.integers(0, 61, context)), tuple(rng.integers(0, 61, length)), item)
            for item, (context, length) in enumerate(shapes)]


def masked_nll(model, pair, masked, shift=True):
    """Returns the cross-entropy of each pass summed over its masked tokens, [passes], from full logits."""
    row = np.array([BOS, *pair.context, *pair.continuation])
    where = np.pad(masked, ((0, 0), (len(row) - masked.shape[1], 0)))
    logp = log_probabilities(model, np.where(where, MASK, row), AttentionMask.bidirectional())
    nll = -np.stack([logp[:, n - shift, row[n]] for n in range(len(row))], axis=1)
    return np.where(where, nll, 0).sum(axis=1)


@pytest.mark.parametrize("shift", [True, False])
def test_score_of_few_tokens_is_the_enumerated_bound(shift):
    model, (pair,) = tiny("llama"), pairs_of((4, 4))
    masks = np.array([mask for mask in itertools.product([False, True], repeat=4) if any(mask)])
    sizes = masks.sum(axis=1)
    expected = (beta(sizes, 4 - sizes + 1) * masked_nll(model, pair, masks, shift)).sum()
    score = diffusion_score(model, lambda pair: bound_masks(4, 15, 0, pair.item), diffusion=DiffusionSpec(MASK, shift),
                            bos_token_id=BOS)
    np.testing.assert_allclose(score([pair]), [[expected, expected]], rtol=1e-5)


def test_score_is_unbiased():
    model, (pair,) = tiny("llama"), pairs_of((3, 5))
    masks = np.array([mask for mask in itertools.product([False, True], repeat=5) if any(mask)])
    sizes = masks.sum(axis=1)
    expected = (beta(sizes, 5 - sizes + 1) * masked_nll(model, pair, masks)).sum()
    score = diffusion_score(model, lambda pair: bound_masks(5, 4, 0, pair.item), diffusion=DiffusionSpec(MASK),
                            bos_token_id=BOS, batch_size=256)
    found = score([pair._replace(item=item) for item in range(600)]).mean(axis=1)
    assert abs(found.mean() - expected) < 4 * found.std() / len(found) ** 0.5


def test_score_depends_on_its_own_pair():
    model, pairs = tiny("gpt2"), pairs_of((5, 9), (25, 6), (1, 1), (12, 20), (0, 3))
    scores = [diffusion_score(model, lambda pair: bound_masks(len(pair.continuation), 6, 0, pair.item),
                              diffusion=DiffusionSpec(MASK), bos_token_id=BOS, batch_size=size) for size in (3, 16)]
    found = [score(pairs) for score in scores]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    np.testing.assert_allclose(scores[1](pairs[::-1])[::-1], found[0], rtol=1e-5)


def test_equal_options_score_equally():
    model, (pair,) = tiny("llama"), pairs_of((6, 12))
    score = diffusion_score(model, lambda pair: bound_masks(12, 5, 0, pair.item), diffusion=DiffusionSpec(MASK),
                            bos_token_id=BOS)
    first, second = score([pair, pair._replace(option=1)])
    np.testing.assert_allclose(first, second, rtol=1e-6)


def test_reference_score_with_given_noise():
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


def test_score_on_eight_devices():
    model, pairs = tiny("llama"), pairs_of((5, 9), (3, 6), (1, 11))
    settings = {"diffusion": DiffusionSpec(MASK), "bos_token_id": BOS, "batch_size": 12}
    alone, spread = (diffusion_score(model, lambda pair: bound_masks(len(pair.continuation), 6, 0, pair.item),
                                     mesh=mesh, **settings)(pairs) for mesh in (None, make_mesh(MeshConfig())))
    np.testing.assert_allclose(spread, alone, rtol=1e-5)


def test_bad_pairs():
    score = diffusion_score(tiny("gpt2"), lambda pair: bound_masks(len(pair.continuation), 4, 0, 0),
                            diffusion=DiffusionSpec(MASK))
    with pytest.raises(DataError, match="item 0, option 0"):
        score(pairs_of((0, 3)))
    with pytest.raises(DataError, match="item 0, option 0"):
        score(pairs_of((3, 0)))
    with pytest.raises(DataError, match="43 .* 40"):
        score(pairs_of((3, 40)))


def test_reconstruction_mask():
    for length in (1, 7, 40):
        for ratio in RECONSTRUCTION_RATIOS:
            masked = reconstruction_mask(length, ratio, 0, 5)
            assert masked.sum() == max(round(ratio * length), 1)
            np.testing.assert_array_equal(masked, reconstruction_mask(length, ratio, 0, 5))
    for other in (reconstruction_mask(40, 0.5, 0, 6), reconstruction_mask(40, 0.5, 1, 5)):
        assert (reconstruction_mask(40, 0.5, 0, 5) != other).any()
    counts = sum(reconstruction_mask(10, 0.3, 0, item) for item in range(2000)) / 2000
    np.testing.assert_allclose(counts, 0.3, atol=0.05)  # 5 standard errors


def test_reconstruct_by_hand():
    def masked_accuracy(pairs, asked):
        """Finds even tokens."""
        return [np.mean([token % 2 == 0 for token in np.array(pair.continuation)[masked]])
                for pair, masked in zip(pairs, asked, strict=True)]

    even, both = reconstruct(masked_accuracy, [Pair((), (2, 4, 6), 0), Pair((), tuple(range(10)), 1)])
    assert set(even.values()) == {1.0} and list(even) == ["10% masked", "30% masked", "50% masked", "70% masked",
                                                         "90% masked"]
    assert both["90% masked"] in (pytest.approx(4 / 9), pytest.approx(5 / 9)) and both["10% masked"] in (0.0, 1.0)


@pytest.mark.parametrize("causal, shift", [(False, True), (False, False), (True, True)])
def test_masked_accuracy_against_full_logits(causal, shift):
    model = tiny("llama")
    rng = np.random.default_rng(0)
    pairs = [Pair((7,) * (n % 3), tuple(map(int, rng.integers(0, 60, 5 + 3 * n))), n) for n in range(6)]
    masks = [reconstruction_mask(len(pair.continuation), 0.5, 0, pair.item) for pair in pairs]
    settings = {"bos_token_id": BOS, "batch_size": 4}
    accuracy = causal_accuracy(model, **settings) if causal else make_masked_accuracy(
        model, diffusion=DiffusionSpec(MASK, shift), **settings)
    attention = AttentionMask.causal() if causal else AttentionMask.bidirectional()
    for _ in range(2):  # in the second, every other masked token is the most likely one
        rows = [np.array([BOS, *pair.context, *pair.continuation]) for pair in pairs]
        places = [np.flatnonzero(masked) + len(row) - len(masked) for row, masked in zip(rows, masks, strict=True)]
        visible = [row.copy() for row in rows]
        for row, masked in zip(visible, places, strict=True):
            row[masked] = row[masked] if causal else MASK
        best = [logp[masked - shift].argmax(axis=-1) for logp, masked in
                zip(log_probabilities(model, visible, attention), places, strict=True)]
        expected = [(tokens == row[masked]).mean() for tokens, row, masked in zip(best, rows, places, strict=True)]
        np.testing.assert_allclose(accuracy(pairs, masks), expected)
        for number, (pair, row, masked) in enumerate(zip(pairs, rows, places, strict=True)):
            row[masked[::2]] = best[number][::2]
            pairs[number] = pair._replace(continuation=tuple(row[len(row) - len(pair.continuation):].tolist()))
    assert sum(expected) > 0
