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
from dlm_jax.diffusion import Batch, ObjectiveConfig, TeacherObjective, noise_batch
from dlm_jax.errors import CheckpointError, ConfigError
from dlm_jax.models import LoRAConfig, ModelConfig, Transformer, split_trainable
from dlm_jax.parallel import MeshConfig, make_global_batch, make_mesh
from dlm_jax.training import diffusion_loss
from dlm_jax.training.config import LoRASettings, ModelSource
from dlm_jax.training.diffusion_loss import DiffusionLoss
from dlm_jax.training.loop import train
from dlm_jax.training.metrics import read_records
from dlm_jax.training.optimizer import OptimizerConfig, make_optimizer
from dlm_jax.training.state import Frozen, create_state, parent_params
from dlm_jax.training.step import make_train_step

MODEL = ModelConfig("llama", vocab_size=24, hidden_size=16, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=4,
                    mlp_size=32, max_length=16)
ROWS, LENGTH, MASK = 16, 16, 23
BLOCKS = ObjectiveConfig(name="block_diffusion", block_size=4)
AUTOREGRESSIVE = ObjectiveConfig(name="autoregressive")
KL = TeacherObjective(distribution_weight=1.0)
EVERYTHING = dataclasses.replace(
    BLOCKS, clean_weight=0.3, confidence_weight=0.2, complementary=True,
    teacher=TeacherObjective(distribution_weight=0.5, divergence="tv", hidden_weight=2.0, hidden_layers=(1,)))


def batch_of(step=0, mesh=None):
    def read(rows):
        tokens = np.random.default_rng(step).integers(0, 23, (ROWS, LENGTH)).astype(np.int32)
        noisable = np.broadcast_to(np.arange(LENGTH) > 0, (ROWS, LENGTH))
        return Batch(tokens[rows], noisable[rows], (np.arange(ROWS, dtype=np.uint32) + ROWS * step)[rows])

    return make_global_batch(read, ROWS, mesh or one_device())


@functools.cache
def one_device():
    return make_mesh(devices=jax.devices()[:1])


def transformer(lora=None, seed=0):
    return Transformer(MODEL, rngs=nnx.Rngs(seed), lora=lora)


def losses(objective, model, frozen=None):
    """The sums and the gradients of a model's trained parameters."""
    graphdef, params, base = split_trainable(model)
    loss = DiffusionLoss(graphdef, one_device(), objective, 0, MASK)
    frozen = Frozen(base) if frozen is None else frozen

    @jax.jit
    def run(params, frozen, batch):
        def total(params):
            sums = loss(params, frozen, batch, jnp.int32(3), ROWS)
            return sums.loss, sums

        return jax.grad(total, has_aux=True)(params)

    with jax.set_mesh(one_device()):
        grads, sums = run(params, frozen, batch_of())
    return sums, grads


def assert_same(found, expected, rtol=1e-4, atol=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("objective", [BLOCKS, dataclasses.replace(BLOCKS, shift=False), ObjectiveConfig(),
                                       dataclasses.replace(BLOCKS, complementary=True)])
def test_clean_copy_alone_is_autoregression(objective):
    model = transformer()
    only_clean = dataclasses.replace(objective, noised_weight=0.0, clean_weight=1.0)
    (sums, grads), (expected, reference) = losses(only_clean, model), losses(AUTOREGRESSIVE, model)
    np.testing.assert_allclose(sums.loss, expected.loss, rtol=1e-5)
    np.testing.assert_allclose(sums.clean_nll, expected.nll, rtol=1e-5)
    assert sums.num_clean == expected.num_scored == ROWS * (LENGTH - 1)
    assert_same(grads, reference)


@pytest.mark.parametrize("objective", [BLOCKS, ObjectiveConfig()])
def test_clean_weight_adds_to_the_bound(objective):
    model = transformer()
    sums, grads = losses(dataclasses.replace(objective, clean_weight=0.3), model)
    (bound, of_bound), (clean, of_clean) = losses(objective, model), losses(AUTOREGRESSIVE, model)
    np.testing.assert_allclose(sums.weighted_nll, bound.weighted_nll, rtol=1e-5)
    np.testing.assert_allclose(sums.loss, bound.loss + 0.3 * clean.loss, rtol=1e-5)
    assert_same(grads, jax.tree.map(lambda a, b: a + 0.3 * b, of_bound, of_clean))


def test_one_token_per_block_is_autoregression_with_both_weights():
    model = transformer()
    one = dataclasses.replace(BLOCKS, block_size=1, clean_weight=0.5)
    (sums, grads), (expected, reference) = losses(one, model), losses(AUTOREGRESSIVE, model)
    np.testing.assert_allclose(sums.loss, 1.5 * expected.loss, rtol=1e-5)
    assert_same(grads, jax.tree.map(lambda x: 1.5 * x, reference))


@pytest.mark.parametrize("objective", [BLOCKS, ObjectiveConfig(), dataclasses.replace(BLOCKS, shift=False),
                                       AUTOREGRESSIVE, dataclasses.replace(BLOCKS, noise="random_tokens"),
                                       dataclasses.replace(BLOCKS, clean_attention="block_bidirectional")])
def test_teacher_is_the_parent_on_clean_text(objective):
    """The divergence is that of the two models' full logits where a token is noised."""
    model, parent = transformer(), transformer(seed=1)
    frozen = Frozen(nnx.State({}), nnx.state(parent))
    teacher = dataclasses.replace(KL, hidden_weight=1.0)
    sums, _ = losses(dataclasses.replace(objective, teacher=teacher), model, frozen)
    batch = batch_of()
    noisy, mask = noise_batch(objective, batch, jnp.int32(3), seed=0, batch_size=ROWS, mask_token_id=MASK,
                              vocab_size=24)

    @jax.jit
    def log_probs_and_features(model, tokens, mask, positions):
        hidden, features = model.hidden_and_features(tokens, mask, (0, 1), positions=positions)
        return jax.nn.log_softmax(model.unembed(hidden)), features

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


def trained(objective, lora, steps=4):
    """A model before and after training beside a teacher."""
    config = OptimizerConfig(learning_rate=1e-2, schedule="constant")
    model, rule, mesh = transformer(lora), make_optimizer(config, 10), one_device()
    graphdef, params, base = split_trainable(model)
    before = nnx.merge(graphdef, *jax.tree.map(jnp.copy, (params, base)))
    step = make_train_step(graphdef, rule, mesh, objective=objective, config=config, num_steps=10, seed=1,
                           mask_token_id=MASK)
    with jax.set_mesh(mesh):
        parent = parent_params(objective, params, "float32")
        state = create_state(params, rule, False, mesh, frozen=Frozen(base, parent))
        for number in range(steps):
            state, metrics = step(state, batch_of(number))
    return before, nnx.merge(graphdef, state.params, state.frozen.base), metrics


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
    sums, _ = losses(objective, model)
    assert sums.divergence > 0 and sums.distance > 0

    monkeypatch.setattr(diffusion_loss, "has_parent_pass", lambda *_: True)
    graphdef, params, base = split_trainable(model)
    loss = DiffusionLoss(graphdef, one_device(), objective, 0, MASK)
    with jax.set_mesh(one_device()):
        apart = jax.jit(lambda: loss(params, Frozen(base), batch_of(), jnp.int32(3), ROWS))()
    assert_same(apart, sums)


@functools.cache
def curve(mesh, accumulate=1, objective=EVERYTHING):
    config = OptimizerConfig(learning_rate=1e-2, schedule="constant", accumulate_steps=accumulate)
    mesh, rule = make_mesh(mesh) if isinstance(mesh, MeshConfig) else mesh, make_optimizer(config, 10)
    graphdef, params = nnx.split(transformer())
    step = make_train_step(graphdef, rule, mesh, objective=objective, config=config, num_steps=10, seed=1,
                           mask_token_id=MASK)
    metrics = []
    with jax.set_mesh(mesh):
        state = create_state(params, rule, False, mesh,
                             frozen=Frozen(nnx.State({}), parent_params(objective, params, "float32")))
        for number in range(4):
            state, last = step(state, batch_of(number, mesh))
            metrics.append(jax.device_get(last))
    return {name: [float(x[name]) for x in metrics] for name in metrics[0]}


@pytest.mark.parametrize("mesh, accumulate", [
    (MeshConfig(fsdp=8), 1), (MeshConfig(fsdp=1, tensor=8), 1), (MeshConfig(data=2, fsdp=2, tensor=2), 2),
    (MeshConfig(fsdp=2, tensor=2, context=2), 4), (MeshConfig(dcn_data=2, fsdp=1, context=4), 1)])
def test_same_curve_on_every_mesh(mesh, accumulate):
    found, expected = curve(mesh, accumulate), curve(one_device())
    assert expected["tv"][-1] > 1e-3 and expected["hidden_distance"][-1] > 1e-3 and expected["clean_nll"][-1] > 1
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("objective, key", [
    (dataclasses.replace(BLOCKS, teacher=TeacherObjective(hidden_weight=1.0, hidden_layers=(2,))), "hidden_layers"),
    (dataclasses.replace(BLOCKS, noise="random_tokens", teacher=KL), "model.init")])
def test_runs_that_cannot_be_taught_are_refused(config, pretrained, objective, key, tmp_path):
    source = ModelSource(source=str(pretrained), mask_token="<mask>", init="random" if "init" in key else "pretrained")
    with pytest.raises(ConfigError, match=key):
        train(dataclasses.replace(config, objective=objective, model=source), tmp_path)


def test_another_parent_is_refused(config, pretrained, tmp_path):
    """A run that resumes beside other weights than it started from would have another teacher."""
    shutil.copytree(pretrained, tmp_path / "base")
    config = dataclasses.replace(config, num_steps=5, objective=dataclasses.replace(BLOCKS, teacher=KL),
                                 model=ModelSource(source=str(tmp_path / "base"), mask_token="<mask>"))
    train(config, tmp_path / "run")
    save_pretrained(tmp_path / "other", load_pretrained(pretrained, init="random", seed=9))
    shutil.rmtree(tmp_path / "base")
    shutil.copytree(tmp_path / "other", tmp_path / "base")
    with pytest.raises(CheckpointError, match="parent"):
        train(dataclasses.replace(config, num_steps=6), tmp_path / "run")


@pytest.mark.parametrize("lora", [0, 2])
def test_resumes_bit_for_bit(config, pretrained, lora, tmp_path):
    config = dataclasses.replace(config, num_steps=10, objective=EVERYTHING, lora=LoRASettings(rank=lora),
                                 model=ModelSource(source=str(pretrained), mask_token="<mask>"))
    train(config, tmp_path / "full")
    train(dataclasses.replace(config, num_steps=5), tmp_path / "half")
    train(config, tmp_path / "half")
    records = [read_records(tmp_path / name, "train")[-1] for name in ("full", "half")]
    assert all(records[0][name] == records[1][name] for name in ("loss", "tv", "hidden_distance", "clean_nll"))
    assert (tmp_path / "half" / "parent.json").exists() == (lora == 0)
