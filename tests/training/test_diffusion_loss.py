"""The objective as a product of noise, clean copy and teacher: its equalities, on every mesh, and resumed."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlm_jax import AttentionMask
from dlm_jax.checkpoints import load_pretrained, save_pretrained
from dlm_jax.diffusion import ObjectiveConfig, TeacherObjective, noise_batch
from dlm_jax.errors import CheckpointError, ConfigError
from dlm_jax.models import LoRAConfig, ModelConfig, Transformer, split_trainable
from dlm_jax.parallel import MeshConfig, make_mesh
from dlm_jax.training import diffusion_loss
from dlm_jax.training.config import CheckpointConfig, LogConfig, LoRASettings, ModelSource, ValidationConfig
from dlm_jax.training.diffusion_loss import DiffusionLoss
from dlm_jax.training.loop import train
from dlm_jax.training.metrics import read_records
from dlm_jax.training.state import Frozen
from tests.training.steps import LENGTH, MASK, ROWS, assert_same_curve, batch_of, one_device, split_alone, take_steps

MODEL = ModelConfig("llama", vocab_size=24, hidden_size=16, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=4,
                    mlp_size=32, max_length=16)
BLOCKS = ObjectiveConfig(name="block_diffusion", block_size=4)
AUTOREGRESSIVE = ObjectiveConfig(name="autoregressive")
KL = TeacherObjective(distribution_weight=1.0)
EVERYTHING = dataclasses.replace(
    BLOCKS, clean_weight=0.3, confidence_weight=0.2, complementary=True,
    teacher=TeacherObjective(distribution_weight=0.5, divergence="tv", hidden_weight=2.0, hidden_layers=(1,)))


@functools.cache
def transformer(lora=None, seed=0):
    return jax.jit(lambda: Transformer(MODEL, rngs=nnx.Rngs(seed), lora=lora))()


def sums_of(objective, model, parent=None):
    """The sums of a model, beside the parent of a teacher."""
    graphdef, params, base = split_trainable(model)
    loss = DiffusionLoss(graphdef, one_device(), objective, 0, MASK)
    frozen = Frozen(base) if parent is None else Frozen(base, nnx.state(parent))
    with jax.set_mesh(one_device()):
        return jax.jit(loss, static_argnums=4)(params, frozen, batch_of(), jnp.int32(3), ROWS)


@functools.cache
def losses(objective):
    """The sums and the gradients of a new model."""
    graphdef, params = nnx.split(transformer())
    loss = DiffusionLoss(graphdef, one_device(), objective, 0, MASK)

    def total(params):
        sums = loss(params, Frozen(), batch_of(), jnp.int32(3), ROWS)
        return sums.loss, sums

    with jax.set_mesh(one_device()):
        grads, sums = jax.jit(jax.grad(total, has_aux=True))(params)
    return sums, grads


def assert_same(found, expected, rtol=1e-4, atol=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("objective", [BLOCKS, dataclasses.replace(BLOCKS, shift=False), ObjectiveConfig(),
                                       dataclasses.replace(BLOCKS, complementary=True)])
def test_clean_copy_alone_is_autoregression(objective):
    only_clean = dataclasses.replace(objective, noised_weight=0.0, clean_weight=1.0)
    (sums, grads), (expected, reference) = losses(only_clean), losses(AUTOREGRESSIVE)
    np.testing.assert_allclose(sums.loss, expected.loss, rtol=1e-5)
    np.testing.assert_allclose(sums.clean_nll, expected.nll, rtol=1e-5)
    assert sums.num_clean == expected.num_scored == ROWS * (LENGTH - 1)
    assert_same(grads, reference)


@pytest.mark.parametrize("objective", [BLOCKS, ObjectiveConfig()])
def test_clean_weight_adds_to_the_bound(objective):
    sums, grads = losses(dataclasses.replace(objective, clean_weight=0.3))
    (bound, of_bound), (clean, of_clean) = losses(objective), losses(AUTOREGRESSIVE)
    np.testing.assert_allclose(sums.weighted_nll, bound.weighted_nll, rtol=1e-5)
    np.testing.assert_allclose(sums.loss, bound.loss + 0.3 * clean.loss, rtol=1e-5)
    assert_same(grads, jax.tree.map(lambda a, b: a + 0.3 * b, of_bound, of_clean))


def test_one_token_per_block_is_autoregression_with_both_weights():
    one = dataclasses.replace(BLOCKS, block_size=1, clean_weight=0.5)
    (sums, grads), (expected, reference) = losses(one), losses(AUTOREGRESSIVE)
    np.testing.assert_allclose(sums.loss, 1.5 * expected.loss, rtol=1e-5)
    assert_same(grads, jax.tree.map(lambda x: 1.5 * x, reference))


@pytest.mark.parametrize("objective", [BLOCKS, ObjectiveConfig(), dataclasses.replace(BLOCKS, shift=False),
                                       AUTOREGRESSIVE, dataclasses.replace(BLOCKS, noise="random_tokens"),
                                       dataclasses.replace(BLOCKS, clean_attention="block_bidirectional")])
def test_teacher_is_the_parent_on_clean_text(objective):
    """The divergence is that of the two models' full logits where a token is noised."""
    model, parent, batch = transformer(), transformer(seed=1), batch_of()
    teacher = dataclasses.replace(KL, hidden_weight=1.0)
    sums = sums_of(dataclasses.replace(objective, teacher=teacher), model, parent)
    noisy, mask = noise_batch(objective, batch, jnp.int32(3), seed=0, batch_size=ROWS, mask_token_id=MASK,
                              vocab_size=24)

    p, features = jax.device_get(log_probs_and_features(model, noisy.tokens, mask, noisy.positions))
    q, parent_features = jax.device_get(log_probs_and_features(parent, batch.tokens, AttentionMask.causal(), None))
    divergence = distance = 0.0
    taught = noisy.loss_mask if noisy.noised is None else noisy.loss_mask[:, : noisy.noised[1]]
    for row, place in zip(*np.nonzero(taught), strict=True):
        student, teacher = place - objective.shift, place % LENGTH - 1
        divergence += np.sum(np.exp(q[row, teacher]) * (q[row, teacher] - p[row, student]))
        a, b = (x.reshape(*x.shape[:2], 2, 16)[row, n] for x, n in ((features, student), (parent_features, teacher)))
        distance += np.mean(1 - np.sum(a * b, axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))
    np.testing.assert_allclose((sums.divergence, sums.distance), (divergence, distance), rtol=1e-4)
    assert divergence > 0.1


@jax.jit
def log_probs_and_features(model, tokens, mask, positions):
    hidden, features = model.hidden_and_features(tokens, mask, (0, 1), positions=positions)
    return jax.nn.log_softmax(model.unembed(hidden)), features


def trained(objective, lora):
    """A model before and after training beside a teacher."""
    model = transformer(lora)
    graphdef, params, base = split_trainable(model)
    metrics, state = take_steps((graphdef, params, base), one_device(), 4, objective)
    return model, nnx.merge(graphdef, state.params, state.frozen.base), metrics[-1]


def test_lora_at_noised_positions_leaves_the_parent_as_it_is():
    objective = dataclasses.replace(BLOCKS, noise="random_tokens", noised_weight=0.0,
                                    teacher=TeacherObjective(distribution_weight=1.0, divergence="tv"))
    before, after, metrics = trained(objective, LoRAConfig(4, 8.0, where="noised", frozen_dtype="float32"))
    tokens = batch_of().tokens
    logits = [jax.jit(lambda model: model(tokens, AttentionMask.causal()))(model) for model in (before, after)]
    np.testing.assert_array_equal(*logits)
    assert all((x[...] != 0).any() for path, x in nnx.to_flat_state(nnx.state(after)) if path[-1] == "b")
    assert 0 < metrics["tv"] < 1


def test_clean_copy_of_gated_lora_teaches_as_the_parent_itself(monkeypatch):
    lora = LoRAConfig(4, 8.0, where="noised", frozen_dtype="float32")
    objective = dataclasses.replace(BLOCKS, teacher=dataclasses.replace(KL, hidden_weight=1.0))
    _, model, _ = trained(objective, lora)
    sums = sums_of(objective, model)
    assert sums.divergence > 0 and sums.distance > 0
    monkeypatch.setattr(diffusion_loss, "has_parent_pass", lambda *_: True)
    assert_same(sums_of(objective, model), sums)


@functools.cache
def curve(mesh, accumulate=1):
    return take_steps(split_alone(transformer()), mesh, 4, EVERYTHING, accumulate_steps=accumulate)[0]


@pytest.mark.parametrize("mesh, accumulate", [
    (MeshConfig(data=2, fsdp=2, tensor=2), 2), (MeshConfig(fsdp=2, tensor=2, context=2), 4),
    (MeshConfig(dcn_data=2, fsdp=1, context=4), 1)])
def test_same_curve_on_every_mesh(mesh, accumulate):
    expected = curve(one_device())
    assert expected[-1]["tv"] > 1e-3 and expected[-1]["hidden_distance"] > 1e-3 and expected[-1]["clean_nll"] > 1
    assert_same_curve(curve(make_mesh(mesh), accumulate), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("objective, key", [
    (dataclasses.replace(BLOCKS, teacher=TeacherObjective(hidden_weight=1.0, hidden_layers=(2,))), "hidden_layers"),
    (dataclasses.replace(BLOCKS, noise="random_tokens", teacher=KL), "model.init")])
def test_runs_that_cannot_be_taught_are_refused(config, pretrained, objective, key, tmp_path):
    source = ModelSource(source=str(pretrained), mask_token="<mask>", init="random" if "init" in key else "pretrained")
    with pytest.raises(ConfigError, match=key):
        train(dataclasses.replace(config, objective=objective, model=source), tmp_path)


@pytest.mark.parametrize("lora", [0, 2])
def test_resumes_bit_for_bit_beside_the_same_weights_only(config, pretrained, lora, tmp_path):
    """A run that resumes beside other weights than it started from would have another teacher."""
    shutil.copytree(pretrained, tmp_path / "base")
    config = dataclasses.replace(
        config, num_steps=4, objective=EVERYTHING, lora=LoRASettings(rank=lora),
        model=ModelSource(source=str(tmp_path / "base"), mask_token="<mask>"), log=LogConfig(every=2),
        checkpoint=CheckpointConfig(every=2, keep_best=False), validation=ValidationConfig(every=0))
    train(config, tmp_path / "full")
    train(dataclasses.replace(config, num_steps=2), tmp_path / "half")
    train(config, tmp_path / "half")
    full, half = (read_records(tmp_path / name, "train")[-1] for name in ("full", "half"))
    assert full["step"] == half["step"] == 4
    assert all(full[name] == half[name] for name in ("loss", "tv", "hidden_distance", "clean_nll"))

    save_pretrained(tmp_path / "other", load_pretrained(pretrained, init="random", seed=9))
    shutil.rmtree(tmp_path / "base")
    shutil.copytree(tmp_path / "other", tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"adapter\.json" if lora else r"parent\.json"):
        train(dataclasses.replace(config, num_steps=5), tmp_path / "half")
