"""Masks, scores and reconstruction against their definitions and the enumerated bound."""

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
from dlm_jax.evaluation.scoring import (
    RECONSTRUCTION_RATIOS,
    autoregressive_score,
    bound_masks,
    diffusion_score,
    make_masked_accuracy,
    mask_all,
    reconstruct,
    reconstruction_mask,
    reference_masks,
    time_masks,
)
from tests.sampling.tiny_models import MASK, tiny


def values_of(length, seed=0):
    """What a pass that masks a set finds, any function of the set: [2**length] by the set's bits."""
    return np.random.default_rng(seed).gamma(2.0, size=2**length) * [bin(code).count("1") for code in range(2**length)]


def score(draw, values):
    return float(draw.weights @ values[draw.masked @ (1 << np.arange(draw.masked.shape[1]))])


def enumerated(values, length):
    """The integral over t of 1/t times the expectation over masks of rate t: Beta functions."""
    sizes = np.array([bin(code).count("1") for code in range(2**length)])
    return sum(beta(size, length - size + 1) * value for size, value in zip(sizes, values, strict=True) if size)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_few_tokens_give_the_bound_exactly(length):
    values = values_of(length)
    assert score(bound_masks(length, 16, 0, 0), values) == pytest.approx(enumerated(values, length))


@pytest.mark.parametrize(("length", "num_samples"), [(5, 1), (5, 3), (7, 16), (4, 8)])
def test_more_tokens_give_it_without_bias(length, num_samples):
    values = values_of(length)
    found = [score(bound_masks(length, num_samples, 1, item), values) for item in range(4000)]
    assert abs(np.mean(found) - enumerated(values, length)) < 4 * np.std(found) / len(found) ** 0.5


@pytest.mark.parametrize(("length", "num_samples"), [(1, 4), (5, 3), (7, 16)])
def test_times_give_it_without_bias(length, num_samples):
    values = values_of(length)
    found = [score(time_masks(length, num_samples, 1, item), values) for item in range(6000)]
    assert abs(np.mean(found) - enumerated(values, length)) < 4 * np.std(found) / len(found) ** 0.5
    other = time_masks(length + 3, num_samples, 1, 7).masked
    assert all(any((row == longer[:length]).all() for longer in other) for row in time_masks(
        length, num_samples, 1, 7).masked)  # common random numbers


@pytest.mark.parametrize(("length", "num_samples"), [(20, 8), (25, 16), (40, 16), (127, 32)])
def test_tokens_count_about_equally(length, num_samples):
    for item in range(20):
        draw = bound_masks(length, num_samples, 0, item)
        counted = draw.weights @ draw.masked
        assert counted.mean() == pytest.approx(1)
        # A token that is masked alone counts length / num_samples at once; no other is far from 1.
        assert np.sort(np.abs(counted - 1))[:-2].max() < 0.5 and counted.std() < 0.4
        assert draw.masked.any(axis=1).all()
        assert len(np.unique(draw.masked, axis=0)) == len(draw.masked) <= num_samples


def test_masks_depend_on_seed_item_and_length_alone():
    first, again = bound_masks(20, 8, 3, 5), bound_masks(20, 8, 3, 5)
    np.testing.assert_array_equal(first.masked, again.masked)
    others = bound_masks(20, 8, 4, 5), bound_masks(20, 8, 3, 6)
    assert all(other.masked.shape != first.masked.shape or (other.masked != first.masked).any() for other in others)


def test_the_released_rule_step_by_step():
    uniform = np.random.default_rng(0).random((32, 3))
    total = 0.0
    values = values_of(3)
    for t, row in zip(range(32, 0, -1), uniform, strict=True):
        masked = [position for position in range(3) if row[position] < t / 32]
        if masked:  # a step that masks nothing counts as 0
            total += values[sum(1 << position for position in masked)] / len(masked)
    assert score(reference_masks(uniform), values) == pytest.approx(total / 32)
    assert len(reference_masks(uniform).masked) < 32


def test_a_causal_model_needs_one_pass():
    assert mask_all(3).masked.tolist() == [[True] * 3] and mask_all(3).weights.tolist() == [1]


def test_every_mask_is_a_uniform_subset():
    count = dict.fromkeys(itertools.combinations(range(5), 2), 0)
    for item in range(3000):
        draw = bound_masks(5, 10, 0, item)
        for row in draw.masked[draw.masked.sum(axis=1) == 2]:
            count[tuple(np.flatnonzero(row))] += 1
    observed = np.array(list(count.values()))
    assert observed.min() > 0.85 * observed.mean() and observed.max() < 1.15 * observed.mean()


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


TEXT_BOS = 3


def test_as_many_are_masked_as_the_ratio_says_whatever_the_model():
    for length in (1, 7, 40):
        for ratio in RECONSTRUCTION_RATIOS:
            masked = reconstruction_mask(length, ratio, 0, 5)
            assert masked.sum() == max(round(ratio * length), 1)
            np.testing.assert_array_equal(masked, reconstruction_mask(length, ratio, 0, 5))
    for other in (reconstruction_mask(40, 0.5, 0, 6), reconstruction_mask(40, 0.5, 1, 5)):
        assert (reconstruction_mask(40, 0.5, 0, 5) != other).any()
    counts = sum(reconstruction_mask(10, 0.3, 0, item) for item in range(2000)) / 2000
    np.testing.assert_allclose(counts, 0.3, atol=0.05)  # 5 standard errors


def test_shares_by_hand():
    def masked_accuracy(pairs, asked):
        """Finds even tokens."""
        return [np.mean([token % 2 == 0 for token in np.array(pair.continuation)[masked]])
                for pair, masked in zip(pairs, asked, strict=True)]

    even, both = reconstruct(masked_accuracy, [Pair((), (2, 4, 6), 0), Pair((), tuple(range(10)), 1)])
    assert set(even.values()) == {1.0} and list(even) == ["10% masked", "30% masked", "50% masked", "70% masked",
                                                         "90% masked"]
    assert both["90% masked"] in (pytest.approx(4 / 9), pytest.approx(5 / 9)) and both["10% masked"] in (0.0, 1.0)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("causal", [False, True])
def test_a_network_is_asked_for_its_likeliest_tokens(causal, shift):
    if causal and not shift:
        pytest.skip("no autoregressive model is without the shift")
    model = tiny("llama")
    rng = np.random.default_rng(0)
    pairs = [Pair((7,) * (n % 3), tuple(map(int, rng.integers(0, 60, 5 + 3 * n))), n) for n in range(6)]
    asked = [reconstruction_mask(len(pair.continuation), 0.5, 0, pair.item) for pair in pairs]
    # The network's own most likely tokens stand at some places, so that some are found.
    diffusion = DiffusionSpec(None if causal else MASK, shift)
    found = make_masked_accuracy(model, diffusion=diffusion, bos_token_id=TEXT_BOS, batch_size=4)
    mask = AttentionMask.causal() if causal else AttentionMask.bidirectional()
    some = False
    for _turn in range(2):
        shares = found(pairs, asked)
        for number, (pair, masked) in enumerate(zip(pairs, asked, strict=True)):
            row = np.array([TEXT_BOS, *pair.context, *pair.continuation])
            where = np.flatnonzero(masked) + len(row) - len(masked)
            seen = row.copy()
            if not causal:
                seen[where] = MASK
            best = np.asarray(model(jnp.array(seen)[None], mask))[0].argmax(axis=-1)[where - shift]
            assert shares[number] == pytest.approx((best == row[where]).mean())
            some |= shares[number] > 0
            tokens = row.copy()
            tokens[where[::2]] = best[::2]
            pairs[number] = pair._replace(continuation=tuple(map(int, tokens[len(row) - len(masked):])))
    assert some
