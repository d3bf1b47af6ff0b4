"""The training step: the same on every mesh, exact offload, skipped steps, normalization; and the eval step."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlm_jax.diffusion import Batch, LossSums, ObjectiveConfig
from dlm_jax.models import Compute, ExpertsConfig, ModelConfig, Transformer, abstract_model
from dlm_jax.parallel import ATTENTION_PARTITION, MeshConfig, make_mesh, param_shardings
from dlm_jax.training import diffusion_loss
from dlm_jax.training.state import create_state
from dlm_jax.training.step import make_eval_step, micro_batches
from tests.training.steps import (
    LENGTH,
    MASK,
    ROWS,
    assert_same_curve,
    batch_of,
    compiled_step,
    one_device,
    split_alone,
    take_steps,
)

MODEL = ModelConfig("gpt2", vocab_size=24, hidden_size=16, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=4,
                    mlp_size=32, max_length=16, norm="layer", positions="learned", gated_mlp=False, tie_embeddings=True,
                    qkv_bias=True, residual_dropout=0.1, embed_dropout=0.1, attention_dropout=0.1)
ANNEALED = ObjectiveConfig(anneal_steps=4)


@functools.cache
def split_model(model=MODEL, compute=Compute()):
    _, *params = split_alone(Transformer(model, rngs=nnx.Rngs(0)))
    return nnx.graphdef(abstract_model(model, compute)), *params


def train(mesh, steps=6, noisable_mask=True, compute=Compute(), objective=ANNEALED, model=MODEL, **settings):
    """Metrics of each step, and the last state."""
    return take_steps(split_model(model, compute), mesh, steps, objective,
                      functools.partial(batch_of, noisable_mask=noisable_mask), **{"weight_decay": 0.1} | settings)


@pytest.fixture(scope="module")
def reference():
    return train(one_device())


@pytest.mark.parametrize("mesh, accumulate", [
    (MeshConfig(fsdp=8), 1), (MeshConfig(fsdp=1, tensor=8), 1), (MeshConfig(data=2, fsdp=2, tensor=2), 2),
    (MeshConfig(fsdp=2, tensor=2, context=2), 4), (MeshConfig(dcn_data=2, fsdp=1, context=4), 1)])
def test_loss_curve_is_the_same_on_every_mesh(reference, mesh, accumulate, capfd):
    mesh = make_mesh(mesh)
    metrics, state = train(mesh, accumulate_steps=accumulate)
    assert_same_curve(metrics, reference[0])
    assert "rematerialization" not in capfd.readouterr().err  # XLA's warning that it gathers an array in full
    assert_placed(state, mesh)


def assert_placed(state, mesh):
    placed = jax.tree.leaves(param_shardings(state.params, mesh))
    for tree in (state.params, state.opt_state[1].mu):  # nothing moves between shardings
        for leaf, sharding in zip(jax.tree.leaves(tree), placed, strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=1, expert=8), MeshConfig(fsdp=1, tensor=2, context=2, expert=2),
                                  MeshConfig(fsdp=8)])
def test_experts_on_every_mesh(mesh):
    mesh = make_mesh(mesh)
    found, state = train(mesh, steps=3, model=EXPERTS, compute=Compute(partition=ATTENTION_PARTITION))
    assert_same_curve(found, experts_on_one_device())
    assert_placed(state, mesh)


EXPERTS = dataclasses.replace(MODEL, positions="rope", gated_mlp=True, experts=ExpertsConfig(8, 2, False, 0.1))


@functools.cache
def experts_on_one_device():
    return train(one_device(), steps=3, model=EXPERTS)[0]


def test_layers_of_two_types_on_a_mesh():
    model = dataclasses.replace(MODEL, positions="rope", sliding_window=3, full_attention_layers=(1,),
                                sliding_rope_theta=50.0, attention_softcap=1.0, logit_softcap=2.0)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, context=2))
    (expected, _), (found, state) = (train(mesh, steps=3, model=model) for mesh in (one_device(), mesh))
    assert_same_curve(found, expected, names=("loss", "grad_norm"))
    assert_placed(state, mesh)


@pytest.mark.parametrize("remat", ["none", "offload"])
def test_optimizer_offload_is_exact(reference, remat):
    metrics, state = train(make_mesh(MeshConfig(fsdp=4, data=2)), 3, compute=Compute(remat=remat), offload=True)
    assert_same_curve(metrics, reference[0], names=["loss"])
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state)} == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.params)} == {"device"}


def test_nonfinite_steps_are_skipped(monkeypatch):
    """Poisoned at step 2: its weights, and so loss and gradient; at step 4: the gradient of a loss that is fine."""
    original, mesh = diffusion_loss.noise_batch, one_device()

    def poisoned(objective, batch, step, **rest):
        noisy, mask = original(objective, batch, step, **rest)
        factor = jnp.select([step == 2, step == 4], [jnp.nan, 1e30], 1.0)
        return dataclasses.replace(noisy, weights=factor * noisy.weights), mask

    monkeypatch.setattr(diffusion_loss, "noise_batch", poisoned)
    graphdef, params, _ = split_model()
    settings = (("on_nonfinite", "skip"), ("ema_decay", 0.5), ("weight_decay", 0.1))
    _, rule, step = compiled_step(graphdef, mesh, ObjectiveConfig(), settings)
    state, metrics = create_state(jax.tree.map(jnp.asarray, params), rule, True, mesh), []
    states = [jax.device_get(state)]
    for i in range(6):
        state, last = step(state, batch_of(i, mesh))
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(last))
    assert [bool(np.isfinite(m["loss"])) for m in metrics] == [True, True, False, True, True, True]
    assert [bool(np.isfinite(m["grad_norm"])) for m in metrics] == [True, True, False, True, False, True]
    assert [int(state.step) for state in states] == list(range(7))
    for before, after in itertools.pairwise(states):
        kept = [np.array_equal(a, b) for name in ("params", "opt_state", "ema") for a, b in zip(
            *(jax.tree.leaves(getattr(state, name)) for state in (before, after)), strict=True)]
        assert all(kept) if int(before.step) in (2, 4) else not any(kept)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[-1]))


def test_batch_without_noisable_tokens(reference):
    metrics, state = train(one_device(), steps=2, noisable_mask=False)
    assert all(m["loss"] == 0 and m["grad_norm"] == 0 and m["masked_tokens"] == 0 for m in metrics)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params)))


def test_bfloat16_compute_and_moving_average(reference):
    metrics, state = train(one_device(), 1, compute=Compute(dtype="bfloat16", remat="full"), ema_decay=0.75)
    np.testing.assert_allclose(metrics[0]["loss"], reference[0][0]["loss"], rtol=0.02)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves((state.params, state.opt_state, state.ema))}
    assert dtypes == {"float32", "int32"}
    trees = jax.device_get((split_model()[1], state.params, state.ema))
    for old, new, average in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(average, 0.75 * old + 0.25 * new, rtol=1e-5, atol=1e-7)


def test_loss_normalization_and_weight(reference):
    """With `masked_tokens` and uniform weights the loss is the mean over masked tokens; the bound stays the bound."""
    objective = ObjectiveConfig(anneal_steps=4, loss_normalization="masked_tokens", weight="uniform")
    (found,), _ = train(one_device(), 1, objective=objective)
    expected = reference[0][0]
    assert expected["loss"] == expected["bound"] != expected["masked_nll"]
    np.testing.assert_allclose(found["loss"], expected["masked_nll"], rtol=1e-6)
    np.testing.assert_allclose(found["bound"], expected["bound"], rtol=1e-6)
    sums = dataclasses.replace(LossSums.zero(), num_scored=jnp.float32(2), num_noisable=jnp.float32(3))
    assert (sums.normalizer("all_tokens"), sums.normalizer("masked_tokens")) == (3, 2)


def test_per_example_normalization(reference):
    """The loss is the mean over rows of each row's own bound, whatever the micro-batches."""
    noisable_mask = np.arange(LENGTH) < np.arange(2, ROWS + 2)[:, None]  # answers of 1, 2, 3, ... tokens
    noisable_mask[-1] = False  # one without an answer does not count
    rows = [noisable_mask & (np.arange(ROWS) == row)[:, None] for row in range(ROWS - 1)]
    expected = np.mean([train(one_device(), 1, noisable_mask=row)[0][0]["bound"] for row in rows])
    (found,), _ = train(one_device(), 1, noisable_mask=noisable_mask, accumulate_steps=2,
                        objective=ObjectiveConfig(anneal_steps=4, loss_normalization="per_example"))
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    assert abs(found["bound"] / expected - 1) > 0.01


@pytest.mark.parametrize("num_shards, expected", [
    (1, [[0, 1, 2, 3], [4, 5, 6, 7]]), (2, [[0, 1, 4, 5], [2, 3, 6, 7]]), (4, [[0, 2, 4, 6], [1, 3, 5, 7]])])
def test_micro_batches(num_shards, expected):
    batch = Batch(jnp.arange(8)[:, None], jnp.ones((8, 1), bool), jnp.arange(8, dtype=jnp.uint32))
    found = micro_batches(batch, 2, num_shards)
    np.testing.assert_array_equal(found.example_index, expected)
    np.testing.assert_array_equal(found.tokens[..., 0], expected)


def test_eval_step():
    """It changes with the parameters only: not with annealing, dropout or the time curriculum."""
    mesh, (graphdef, params, _) = one_device(), split_model()
    shaped = ObjectiveConfig(anneal_steps=100, time_curriculum=((0, 0.0, 0.5),), weight="uniform")
    plain, other = (make_eval_step(graphdef, mesh, objective=objective, seed=0, num_rows=ROWS, num_samples=8,
                                   mask_token_id=MASK) for objective in (ObjectiveConfig(), shaped))
    rows = batch_of(0, mesh)
    found, expected = (jax.device_get(step(params, rows, np.int32(3))) for step in (plain, other))
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
    row = batch_of(0, mesh, noisable_mask=np.arange(ROWS)[:, None] == 3)
    sums = jax.device_get([plain(params, row, np.int32(sample)) for sample in range(8)])
    shares = np.sort([one.num_scored for one in sums]) / (LENGTH - 1)
    assert shares[1] < 0.4 < 0.6 < shares[-2] and abs(shares.mean() - 0.5) < 0.15  # each row has all times
