import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.diffusion.corruption import Batch
from dlm_jax.diffusion.objective import ObjectiveConfig, check_mask_token, loss_weights, prepare, ratio_of, time_range
from dlm_jax.errors import ConfigError

POSITIONS = jnp.arange(8)


def batch(rows=16, first=0):
    noisable_mask = jnp.broadcast_to(jnp.arange(8) > 0, (rows, 8))
    return Batch(jnp.full((rows, 8), 5), noisable_mask, jnp.arange(first, first + rows, dtype=jnp.uint32))


def prepared(config, step=0, rows=batch()):
    return prepare(config, rows, jnp.int32(step), seed=0, batch_size=16, mask_token_id=9)


def test_diffusion_masks_what_it_scores_and_never_position_0():
    noised, mask = prepared(ObjectiveConfig())
    np.testing.assert_array_equal(noised.tokens == 9, noised.loss_mask)
    assert not noised.loss_mask[:, 0].any() and 0.3 < noised.loss_mask[:, 1:].mean() < 0.7
    assert mask.allowed(POSITIONS, POSITIONS).all()
    times = 1 / np.asarray(noised.weights[:, 0])  # the weights 1/t are those of pairs that balance, spread evenly
    np.testing.assert_allclose(times[::2] + times[1::2], 1 + 1e-3, rtol=1e-5)
    np.testing.assert_allclose(np.diff(np.sort(times[::2])), 1 / 8, rtol=0.01)


def test_the_loss_weighs_by_the_bound_or_evenly():
    noised, _ = prepared(ObjectiveConfig())
    np.testing.assert_array_equal(loss_weights(ObjectiveConfig(), noised), noised.weights)
    np.testing.assert_array_equal(loss_weights(ObjectiveConfig(weight="uniform"), noised), np.ones((16, 8)))


def test_any_part_of_a_batch_is_noised_as_in_the_whole():
    whole, mask = prepared(ObjectiveConfig(anneal_steps=4))
    part, part_mask = prepared(ObjectiveConfig(anneal_steps=4), rows=batch(4, first=4))
    np.testing.assert_array_equal(part.tokens, whole.tokens[4:8])
    np.testing.assert_array_equal(part.weights, whole.weights[4:8])
    np.testing.assert_array_equal(part_mask.allowed(POSITIONS, POSITIONS), mask.allowed(POSITIONS, POSITIONS)[4:8])


def test_annealing_opens_attention_step_by_step():
    config = ObjectiveConfig(anneal_steps=4)
    later = ~np.tril(np.ones((8, 8), bool))
    shares = [prepared(config, step)[1].allowed(POSITIONS, POSITIONS)[:, later].mean() for step in range(5)]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.75, 1, 1], atol=0.06)
    np.testing.assert_allclose([ratio_of(config, step) for step in range(5)], [0.25, 0.5, 0.75, 1, 1])
    patterns = prepared(config, 1)[1].allowed(POSITIONS, POSITIONS)
    assert len(np.unique(patterns, axis=0)) == 16
    shared = prepared(ObjectiveConfig(anneal_steps=4, share_annealed_mask=True), 1)[1].allowed(POSITIONS, POSITIONS)
    assert shared.shape[0] == 1


def test_autoregressive_is_causal_and_scores_everything_clean():
    noised, mask = prepared(ObjectiveConfig(name="autoregressive"))
    assert (noised.tokens == 5).all() and (noised.weights == 1).all()
    np.testing.assert_array_equal(noised.loss_mask, batch().noisable_mask)
    np.testing.assert_array_equal(mask.allowed(POSITIONS, POSITIONS)[0], np.tril(np.ones((8, 8), bool)))
    assert ratio_of(ObjectiveConfig(name="autoregressive"), 0) == 0


def test_segments_are_kept_apart():
    rows = dataclasses.replace(batch(), segment_ids=jnp.broadcast_to(jnp.arange(8) // 4, (16, 8)))
    allowed = prepared(ObjectiveConfig(), rows=rows)[1].allowed(POSITIONS, POSITIONS)
    assert allowed[0, 0, 3] and not allowed[0, 0, 4]
    both = jnp.arange(16)  # a noised copy and a clean one: each block of 3 sees what is its own document's
    allowed = prepared(ObjectiveConfig(name="block_diffusion", block_size=3), rows=rows)[1].allowed(both, both)[0]
    assert [list(np.flatnonzero(row)) for row in np.asarray(allowed)[[3, 4, 6, 8 + 3, 8 + 4]]] == [
        [3, 8, 9, 10], [4, 5], [6, 7, 8 + 4, 8 + 5], [8, 9, 10, 11], [8 + 4]]


def test_stages_narrow_the_times():
    config = ObjectiveConfig(time_curriculum=((0, 0.0, 0.5), (10, 0.25, 1.0)))
    assert [tuple(map(float, time_range(config, jnp.int32(step)))) for step in (0, 9, 10)] == [
        (np.float32(1e-3), 0.5), (np.float32(1e-3), 0.5), (0.25, 1.0)]
    times = 1 / prepared(config, 10)[0].weights[:, 0]
    assert times.min() >= 0.25 and 0.9 < times.max() <= 1


@pytest.mark.parametrize("mask_token_id, message", [(None, "no mask token"), (10, "outside the vocabulary of 10")])
def test_diffusion_needs_a_mask_token_of_the_vocabulary(mask_token_id, message):
    with pytest.raises(ConfigError, match=message):
        check_mask_token(ObjectiveConfig(), mask_token_id, 10)
    check_mask_token(ObjectiveConfig(name="autoregressive"), mask_token_id, 10)


@pytest.mark.parametrize("settings", [
    {"min_time": 0.0}, {"anneal_steps": -1}, {"name": "autoregressive", "shift": False},
    {"stages": ((5, 0.0, 1.0),)}, {"stages": ((0, 0.5, 0.5),)}, {"stages": ((0, 0.0, 1.0), (0, 0.0, 0.5))}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match="objective"):
        ObjectiveConfig(**settings)
