"""Reconstruction: the masks, a scripted model, and a network against a plain computation."""

import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention import AttentionMask
from dlm_jax.diffusion import DiffusionSpec
from dlm_jax.evaluation.eval_model import Pair
from dlm_jax.evaluation.scoring import RECONSTRUCTION_RATIOS, make_masked_accuracy, reconstruct, reconstruction_mask
from tests.sampling.tiny_models import MASK, tiny

BOS = 3


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
    found = make_masked_accuracy(model, diffusion=diffusion, bos_token_id=BOS, batch_size=4)
    mask = AttentionMask.causal() if causal else AttentionMask.bidirectional()
    some = False
    for _turn in range(2):
        shares = found(pairs, asked)
        for number, (pair, masked) in enumerate(zip(pairs, asked, strict=True)):
            row = np.array([BOS, *pair.context, *pair.continuation])
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
