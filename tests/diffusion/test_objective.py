"""Noise, attention and weights by objective, and which settings are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.diffusion import Batch, DraftObjective, TeacherObjective
from dlm_jax.diffusion.config import ObjectiveConfig, OpenObjective
from dlm_jax.diffusion.objective import annealing, check_mask_token, loss_weights, noise_batch, time_range
from dlm_jax.errors import ConfigError

POSITIONS = jnp.arange(8)


def batch(rows=16, first=0):
    noisable_mask = jnp.broadcast_to(jnp.arange(8) > 0, (rows, 8))
    return Batch(jnp.full((rows, 8), 5), noisable_mask, jnp.arange(first, first + rows, dtype=jnp.uint32))


run = jax.jit(noise_batch, static_argnames=("config", "seed", "batch_size", "mask_token_id"))


def noisy_of(config, step=0, rows=batch()):
    return run(config, rows, jnp.int32(step), seed=0, batch_size=16, mask_token_id=9)


def test_diffusion():
    noisy, mask = noisy_of(ObjectiveConfig())
    np.testing.assert_array_equal(noisy.tokens == 9, noisy.loss_mask)
    assert not noisy.loss_mask[:, 0].any() and 0.3 < noisy.loss_mask[:, 1:].mean() < 0.7
    assert mask.allowed(POSITIONS, POSITIONS).all()
    np.testing.assert_array_equal(loss_weights(ObjectiveConfig(), noisy).noised, noisy.weights)
    np.testing.assert_array_equal(loss_weights(ObjectiveConfig(weight="uniform"), noisy).noised, np.ones((16, 8)))
    times = 1 / np.asarray(noisy.weights[:, 0])  # the weights 1/t are those of pairs that balance, spread evenly
    np.testing.assert_allclose(times[::2] + times[1::2], 1 + 1e-3, rtol=1e-5)
    np.testing.assert_allclose(np.diff(np.sort(times[::2])), 1 / 8, rtol=0.01)


def test_a_slice_is_noised_as_in_the_full_batch():
    full, mask = noisy_of(ObjectiveConfig(anneal_steps=4))
    rows, rows_mask = noisy_of(ObjectiveConfig(anneal_steps=4), rows=batch(4, first=4))
    np.testing.assert_array_equal(rows.tokens, full.tokens[4:8])
    np.testing.assert_array_equal(rows.weights, full.weights[4:8])
    np.testing.assert_array_equal(rows_mask.allowed(POSITIONS, POSITIONS), mask.allowed(POSITIONS, POSITIONS)[4:8])


def test_annealing():
    config = ObjectiveConfig(anneal_steps=4)
    later = ~np.tril(np.ones((8, 8), bool))
    shares = [noisy_of(config, step)[1].allowed(POSITIONS, POSITIONS)[:, later].mean() for step in range(5)]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.75, 1, 1], atol=0.06)
    np.testing.assert_allclose([annealing(config, step) for step in range(5)], [0.25, 0.5, 0.75, 1, 1])
    patterns = noisy_of(config, 1)[1].allowed(POSITIONS, POSITIONS)
    assert len(np.unique(patterns, axis=0)) == 16
    shared = noisy_of(ObjectiveConfig(anneal_steps=4, share_annealed_mask=True), 1)[1].allowed(POSITIONS, POSITIONS)
    assert shared.shape[0] == 1


def test_autoregressive():
    noisy, mask = noisy_of(ObjectiveConfig(name="autoregressive"))
    assert (noisy.tokens == 5).all() and (noisy.weights == 1).all()
    np.testing.assert_array_equal(noisy.loss_mask, batch().noisable_mask)
    np.testing.assert_array_equal(mask.allowed(POSITIONS, POSITIONS)[0], np.tril(np.ones((8, 8), bool)))
    assert annealing(ObjectiveConfig(name="autoregressive"), 0) == 0


def test_segments():
    rows = dataclasses.replace(batch(), segment_ids=jnp.broadcast_to(jnp.arange(8) // 4, (16, 8)))
    allowed = noisy_of(ObjectiveConfig(), rows=rows)[1].allowed(POSITIONS, POSITIONS)
    assert allowed[0, 0, 3] and not allowed[0, 0, 4]
    both = jnp.arange(16)  # a noisy copy and a clean one; blocks of 3 tokens
    allowed = noisy_of(ObjectiveConfig(name="block_diffusion", block_size=3), rows=rows)[1].allowed(both, both)[0]
    assert [list(np.flatnonzero(row)) for row in np.asarray(allowed)[[3, 4, 6, 8 + 3, 8 + 4]]] == [
        [3, 8, 9, 10], [4, 5], [6, 7, 8 + 4, 8 + 5], [8, 9, 10, 11], [8 + 4]]


def test_time_curriculum():
    config = ObjectiveConfig(time_curriculum=((0, 0.0, 0.5), (10, 0.25, 1.0)))
    assert [tuple(map(float, time_range(config, jnp.int32(step)))) for step in (0, 9, 10)] == [
        (np.float32(1e-3), 0.5), (np.float32(1e-3), 0.5), (0.25, 1.0)]
    times = 1 / noisy_of(config, 10)[0].weights[:, 0]
    assert times.min() >= 0.25 and 0.9 < times.max() <= 1


@pytest.mark.parametrize("mask_token_id, message", [(None, "model.mask_token"), (10, "vocabulary")])
def test_mask_token_is_checked(mask_token_id, message):
    with pytest.raises(ConfigError, match=message):
        check_mask_token(ObjectiveConfig(), mask_token_id, 10)
    check_mask_token(ObjectiveConfig(name="autoregressive"), mask_token_id, 10)


def test_block_size_schedule_and_canonical_names():
    objective = ObjectiveConfig(name="block_diffusion", block_size=4, block_size_schedule=((0, 1), (4, 2), (8, 4)))
    assert [objective.at_step(step).block_size for step in (0, 3, 4, 7, 8, 100)] == [1, 1, 2, 2, 4, 4]
    assert objective.at_step(0).canonicalize(16).name == "autoregressive"
    assert objective.at_step(4).canonicalize(16) == objective.at_step(4)
    assert objective.at_step(8).canonicalize(4) == ObjectiveConfig(block_size=1)
    assert [objective.at_step(step).forward_multiplier(16) for step in (0, 4)] == [1, 2]
    assert dataclasses.replace(objective, complementary=True).forward_multiplier(4) == 3


@pytest.mark.parametrize("size, plain", [(1, "autoregressive"), (8, "diffusion")])
def test_blocks_of_one_token_and_one_block(size, plain):
    rows = dataclasses.replace(batch(), segment_ids=jnp.broadcast_to(jnp.arange(8) // 4, (16, 8)))
    found, expected = (noisy_of(config, rows=rows) for config in (
        ObjectiveConfig(name="block_diffusion", block_size=size), ObjectiveConfig(name=plain)))
    np.testing.assert_array_equal(found[1].allowed(POSITIONS, POSITIONS), expected[1].allowed(POSITIONS, POSITIONS))
    for field in ("tokens", "loss_mask", "weights"):
        np.testing.assert_array_equal(getattr(found[0], field), getattr(expected[0], field))


def test_validation_resets_only_what_shapes_training():
    trained = ObjectiveConfig(
        name="block_diffusion", shift=False, min_time=0.1, loss_normalization="masked_tokens", weight="uniform",
        time_curriculum=((0, 0.0, 0.5),), block_size=4, block_size_schedule=((0, 2), (5, 4)),
        clean_attention="block_bidirectional", complementary=True)
    validated = trained.for_validation()
    changed = {field.name for field in dataclasses.fields(trained)
               if getattr(trained, field.name) != getattr(validated, field.name)}
    assert changed == {"time_curriculum", "block_size_schedule", "complementary", "weight"}
    for trained in (ObjectiveConfig(anneal_steps=9, share_annealed_mask=True, confidence_weight=0.1, noise="position"),
                    ObjectiveConfig(noised_weight=0.0, teacher=TeacherObjective(distribution_weight=1.0))):
        assert trained.for_validation() == ObjectiveConfig()
    with_clean = ObjectiveConfig(noise="all_masked", clean_weight=0.2)
    assert with_clean.for_validation() == with_clean


@pytest.mark.parametrize("settings, key", [
    ({"name": "masked"}, "name"), ({"min_time": 0.0}, "min_time"), ({"anneal_steps": -1}, "anneal_steps"),
    ({"name": "autoregressive", "shift": False}, "shift"),
    ({"time_curriculum": ((5, 0.0, 1.0),)}, "time_curriculum"),
    ({"time_curriculum": ((0, 0.5, 0.5),)}, "time_curriculum"),
    ({"time_curriculum": ((0, 0.0, 1.0), (0, 0.0, 0.5))}, "time_curriculum"),
    ({"name": "block_diffusion", "block_size": 0}, "block_size"),
    ({"name": "block_diffusion", "anneal_steps": 5}, "anneal_steps"),
    ({"name": "block_diffusion", "block_size_schedule": ((1, 1), (4, 32))}, "block_size_schedule"),
    ({"name": "block_diffusion", "block_size_schedule": ((0, 1), (4, 8))}, "block_size_schedule"),
    ({"name": "block_diffusion", "complementary": True, "schedule": "cosine"}, "complementary"),
    ({"complementary": True}, "complementary"), ({"clean_attention": "block_bidirectional"}, "clean_attention"),
    ({"block_size_schedule": ((0, 32),)}, "block_size_schedule"),
    ({"clean_weight": -1.0}, "clean_weight"), ({"confidence_weight": float("nan")}, "confidence_weight"),
    ({"half_life": 0.0}, "half_life"), ({"noise": "gaussian"}, "noise"), ({"noised_weight": 0.0}, "noised_weight"),
    ({"name": "block_diffusion", "clean_weight": 0.3, "clean_attention": "block_bidirectional"}, "clean_weight"),
    ({"noise": "random_tokens"}, "noise"), ({"name": "autoregressive", "clean_weight": 0.3}, "clean_weight"),
    ({"name": "drafter", "teacher": TeacherObjective(hidden_weight=1.0)}, "teacher"),
    ({"clean_weight": 0.3, "loss_normalization": "masked_tokens"}, "loss_normalization"),
    ({"name": "drafter", "drafts": DraftObjective(cross_entropy=0.0)}, "drafts.cross_entropy"),
    ({"name": "self_drafting", "drafts": DraftObjective(cross_entropy=0.0)}, "drafts.cross_entropy"),
    ({"name": "self_drafting", "drafts": DraftObjective(confidence=1.0)}, "drafts.confidence"),
    ({"name": "self_drafting", "block_size": 1}, "block_size"),
    ({"name": "self_drafting", "loss_normalization": "per_example"}, "loss_normalization"),
    ({"name": "drafter", "schedule": "cosine"}, "schedule"), ({"name": "drafter", "weight": "uniform"}, "weight"),
    ({"name": "self_drafting", "time_curriculum": ((0, 0.0, 0.5),)}, "time_curriculum"),
    ({"half_life": 0.5}, "half_life"), ({"schedule": "cosine", "power": 3.0}, "power"),
    ({"name": "block_diffusion", "noise": "all_masked", "complementary": True}, "noise"),
    ({"noise": "all_masked", "time_curriculum": ((0, 0.0, 0.5),)}, "noise")])
def test_invalid_settings_are_refused(settings, key):
    with pytest.raises(ConfigError, match=f"objective.{key}"):
        ObjectiveConfig(**settings)


def test_noise_by_position_is_scored_as_noise_by_rate():
    config = ObjectiveConfig(name="block_diffusion", block_size=1, noise="position", half_life=0.5)
    assert config.for_validation().noise == config.canonicalize(8).noise == "rate"


def test_a_drafters_blocks_are_its_own():
    with pytest.raises(ConfigError, match=r"drafter\.block_size"):
        OpenObjective(name="drafter", block_size=4)


@pytest.mark.parametrize("settings, key", [
    ({"distribution_weight": -1.0}, "distribution_weight"), ({"divergence": "js"}, "divergence"),
    ({"hidden_layers": (1,)}, "hidden_layers")])
def test_invalid_teachers_are_refused(settings, key):
    with pytest.raises(ConfigError, match=key):
        TeacherObjective(**settings)


@pytest.mark.parametrize("name", ["diffusion", "block_diffusion"])
def test_kinds_of_noise(name):
    config = ObjectiveConfig(name=name, block_size=4)
    late, masked = (noisy_of(dataclasses.replace(config, noise=noise))[0] for noise in ("position", "all_masked"))
    noised = late.loss_mask[:, :8]
    assert noised[:, 4:].sum() > noised[:, :4].sum() > 0
    assert (masked.tokens[:, 1:8] == 9).all() and masked.weights.max() == 1
    assert masked.loss_mask.sum() == 16 * 7


def test_random_tokens():
    config = ObjectiveConfig(name="block_diffusion", block_size=4, noise="random_tokens")
    noisy = noise_batch(config, batch(), jnp.int32(0), seed=0, batch_size=16, mask_token_id=9, vocab_size=7)[0]
    noise = np.asarray(noisy.tokens[:, 1:8])
    assert set(np.unique(noise)) == set(range(7)) and (noisy.targets == 5).all()
    part = noise_batch(config, batch(4, first=4), jnp.int32(0), seed=0, batch_size=16, mask_token_id=9, vocab_size=7)[0]
    np.testing.assert_array_equal(part.tokens, noisy.tokens[4:8])
