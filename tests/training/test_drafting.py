"""Training a drafter: the same on every mesh, exact resumption, a target that stays as it is, and what is refused."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlm_jax import DiffusionLM
from dlm_jax.attention import AttentionMask
from dlm_jax.checkpoints import Pretrained, load_pretrained, open_drafter, save_pretrained
from dlm_jax.checkpoints.drafter import DrafterSettings, resolve_drafter
from dlm_jax.checkpoints.workdir import DrafterRecord
from dlm_jax.cli.config import build_config, load_recipe
from dlm_jax.cli.main import main
from dlm_jax.diffusion import Batch, DiffusionSpec, DraftObjective, ObjectiveConfig, drafts
from dlm_jax.errors import CheckpointError, ConfigError
from dlm_jax.matmul import compiler_options, has_bfloat16_units
from dlm_jax.models import (
    Compute,
    DraftedModel,
    Drafter,
    ModelConfig,
    Transformer,
    abstract_drafter,
    split_trainable,
)
from dlm_jax.parallel import MeshConfig, make_global_batch, make_mesh
from dlm_jax.sampling import SamplingStats
from dlm_jax.training import train
from dlm_jax.training.config import TrainConfig
from dlm_jax.training.drafting import DraftLoss, add_drafter, check_losses, copy_layers
from dlm_jax.training.optimizer import OptimizerConfig, make_optimizer
from dlm_jax.training.state import Frozen, create_state, state_layout
from dlm_jax.training.step import make_eval_step, make_train_step
from tests.training.conftest import changed, checkpoint_arrays
from tests.training.test_step import one_device

TARGET = ModelConfig("llama", vocab_size=24, hidden_size=16, num_layers=5, num_heads=8, num_kv_heads=8, head_dim=4,
                     mlp_size=32, max_length=32, tie_embeddings=True, initializer_range=0.3)
DSPARK = DrafterSettings(num_layers=2, num_target_layers=2, block_size=3, sample_from_anchor=True, markov_rank=8,
                         markov_head="rnn", confidence_head=True)
DFLASH2 = DrafterSettings(num_layers=2, num_target_layers=2, block_size=4, conv_kernel_size=2, conv_group_size=8,
                          selector_rank=8, selector_top_k=4)
OBJECTIVES = {"dspark": DraftObjective(num_anchors=6, cross_entropy=0.1, l1=0.9, confidence=1.0),
              "dflash2": DraftObjective(num_anchors=6, decay=7.0, selector=1.0)}
ROWS, LENGTH, MASK = 16, 16, 23


@functools.cache
def split_model(settings):
    """The graph, and the trained and frozen parameters on the host."""
    @jax.jit
    def make():
        config = resolve_drafter(settings, TARGET, MASK)
        return DraftedModel(Transformer(TARGET, rngs=nnx.Rngs(0)), Drafter(config, rngs=nnx.Rngs(1)))

    graphdef, params, frozen = split_trainable(make())
    return graphdef, jax.device_get(params), jax.device_get(frozen)


def batch_of(step, mesh):
    """Random tokens in two documents per row; position 0 is context."""
    def read(rows):
        tokens = np.random.default_rng(step).integers(0, 23, (ROWS, LENGTH)).astype(np.int32)
        noisable = np.broadcast_to(np.arange(LENGTH) > 0, tokens.shape)
        second = np.broadcast_to(np.arange(LENGTH) >= 7, tokens.shape).astype(np.int32)
        positions = np.where(second, np.arange(LENGTH) - 7, np.arange(LENGTH)).astype(np.int32)
        return Batch(*(x[rows] for x in (tokens, noisable, np.arange(ROWS, dtype=np.uint32) + ROWS * step, second,
                                         positions)))

    return make_global_batch(read, ROWS, mesh)


def run(mesh, steps, kind, **settings):
    """Metrics of each step, and the last state on the host."""
    config = OptimizerConfig(**{"learning_rate": 1e-2, "schedule": "constant"} | settings)
    rule = make_optimizer(config, 10)
    graphdef, params, frozen = split_model({"dspark": DSPARK, "dflash2": DFLASH2}[kind])
    state = create_state(jax.tree.map(jnp.asarray, params), rule, False, mesh, False,
                         Frozen(jax.tree.map(jnp.asarray, frozen)))
    step = make_train_step(graphdef, rule, mesh, objective=ObjectiveConfig("drafter", drafts=OBJECTIVES[kind]),
                           config=config, num_steps=10, seed=1, mask_token_id=MASK)
    metrics = []
    for i in range(steps):
        state, last = step(state, batch_of(i, mesh))
        metrics.append(jax.device_get(last))
    return metrics, jax.device_get(state)


reference = functools.cache(lambda kind: run(one_device(), 3, kind))


@pytest.mark.parametrize("kind", ["dspark", "dflash2"])
def test_the_drafter_alone_is_trained(kind):
    metrics, state = reference(kind)
    _, params, frozen = split_model({"dspark": DSPARK, "dflash2": DFLASH2}[kind])
    for (path, before), (_, after) in zip(nnx.to_flat_state(params), nnx.to_flat_state(state.params), strict=True):
        assert path[0] == "drafter" and not np.array_equal(before[...], after[...]), path
    for before, after in zip(jax.tree.leaves(frozen), jax.tree.leaves(state.frozen.base), strict=True):
        np.testing.assert_array_equal(before, after)
    assert ("tokens_per_pass" in metrics[0]) == (kind == "dspark")


@pytest.mark.parametrize("kind", ["dspark", "dflash2"])
def test_the_target_has_no_gradient(kind):
    """If it were trained too: through features, embeddings, head and distributions."""
    settings = {"dspark": DSPARK, "dflash2": DFLASH2}[kind]
    (graphdef, _, frozen), params = split_model(settings), reference(kind)[1].params  # none is 0 as in a new selector
    loss = DraftLoss(graphdef, one_device(), OBJECTIVES[kind], 0)

    def value(frozen, params):
        return loss(params, Frozen(frozen), batch_of(0, one_device()), jnp.int32(0), ROWS).loss

    by_frozen, by_params = jax.jit(jax.grad(value, argnums=(0, 1)))(frozen, params)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(by_params))
    assert not any(leaf.any() for leaf in jax.tree.leaves(by_frozen))


@pytest.mark.parametrize("kind, mesh, accumulate", [
    ("dspark", MeshConfig(fsdp=8), 2), ("dspark", MeshConfig(data=2, fsdp=2, tensor=2), 4),
    ("dspark", MeshConfig(fsdp=2, tensor=2, context=2), 1), ("dflash2", MeshConfig(data=2, fsdp=2, tensor=2), 2)])
def test_loss_curve_is_the_same_on_every_mesh(kind, mesh, accumulate, capfd, monkeypatch):
    monkeypatch.setattr(drafts, "CHUNK_GUESSES", 6)  # several chunks, where the reference has one
    metrics, _ = run(make_mesh(mesh), 3, kind, accumulate_steps=accumulate)
    for found, expected in zip(metrics, reference(kind)[0], strict=True):
        assert found.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, err_msg=name)
    assert "rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["dspark", "dflash2"])
@pytest.mark.parametrize("products", ["default", pytest.param("cpu_bfloat16", marks=pytest.mark.skipif(
    not has_bfloat16_units(), reason="XLA uses bfloat16 products only where the processor has them"))])
def test_bfloat16_gradients(kind, products):
    """Of each part together, relative to its largest, with the options under which such a step is compiled."""
    def gradients(compute):
        settings = {"dspark": DSPARK, "dflash2": DFLASH2}[kind]
        config = resolve_drafter(settings, TARGET, MASK)
        _, _, frozen = split_model(settings)
        graphdef, _, _ = split_trainable(jax.eval_shape(lambda: DraftedModel(
            Transformer(TARGET, rngs=nnx.Rngs(0), compute=compute),
            Drafter(config, rngs=nnx.Rngs(1), compute=compute))))
        loss = DraftLoss(graphdef, one_device(), OBJECTIVES[kind], 0)

        def value(params, batch):
            return loss(params, Frozen(frozen), batch, jnp.int32(0), ROWS).loss

        grads = jax.jit(jax.grad(value), compiler_options=compiler_options(compute.matmul))(
            reference(kind)[1].params, batch_of(0, one_device()))["drafter"]
        return {name: np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(part)])
                for name, part in grads.items()}

    exact, rounded = gradients(Compute()), gradients(Compute(dtype="bfloat16", matmul=products))
    for part, gradient in rounded.items():
        cosine = gradient @ exact[part] / np.linalg.norm(gradient) / np.linalg.norm(exact[part])
        assert cosine > 0.99, (part, cosine)


def test_a_drafter_begins_with_copies_of_the_last_layers():
    target = Transformer(TARGET, rngs=nnx.Rngs(0))
    base = Pretrained(target, None, DiffusionSpec(MASK), {}, "here")
    config = TrainConfig(objective=ObjectiveConfig("drafter", drafts=OBJECTIVES["dspark"]),
                         drafter=dataclasses.replace(DSPARK, init="target"))
    drafter = add_drafter(base, config, one_device(), None).model.drafter
    for found, expected in zip(jax.tree.leaves(nnx.state(drafter.blocks)), jax.tree.leaves(nnx.state(target.blocks)),
                               strict=True):
        np.testing.assert_array_equal(found, expected[-2:])
    # What it fuses is what the first of them would have read after the last tapped layer.
    features = jax.random.normal(jax.random.key(0), (1, 3, 2 * 16))
    np.testing.assert_allclose(drafter.fuse(features)[0], jax.vmap(lambda x: x * jax.lax.rsqrt(
        jnp.mean(x * x) + TARGET.norm_eps))(features[0, :, 16:]), rtol=1e-5)


def test_each_device_computes_its_own_rows():
    """Without a loss that needs the target's states, too: no array has the MLP's activations of all rows."""
    mesh, graphdef, params, frozen = make_mesh(MeshConfig(fsdp=8)), *split_model(DFLASH2)
    rule = make_optimizer(config := OptimizerConfig(), 10**6)
    layout = state_layout(params, rule, False, mesh, frozen=Frozen(frozen))
    step = make_train_step(graphdef, rule, mesh, objective=ObjectiveConfig("drafter", drafts=OBJECTIVES["dflash2"]),
                           config=config, num_steps=10**6, seed=0, mask_token_id=MASK)
    program = step.lower(layout, batch_of(0, mesh)).compile().as_text()
    found = {tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", program)}
    assert (ROWS // 8, LENGTH, TARGET.mlp_size) in found or (ROWS // 8 * LENGTH, TARGET.mlp_size) in found
    assert (ROWS, LENGTH, TARGET.mlp_size) not in found and (ROWS * LENGTH, TARGET.mlp_size) not in found


def test_validation_measures_what_the_target_accepts():
    """By the rule of `speculative sampling`, slot by slot: the smaller of both probabilities, summed over tokens."""
    graphdef, params, frozen = split_model(DFLASH2)
    step = make_eval_step(graphdef, one_device(), objective=ObjectiveConfig("drafter", drafts=OBJECTIVES["dflash2"]),
                          seed=0, num_rows=ROWS, num_samples=1, mask_token_id=MASK)
    metrics = step(nnx.merge_state(params, frozen), batch_of(0, one_device()), jnp.int32(0)).metrics()
    assert 1 <= metrics["tokens_per_pass"] <= 4 and 0 < metrics["acceptance_1"] < 1 and "acceptance_4" not in metrics


@pytest.mark.parametrize("settings", [DSPARK, DFLASH2, dataclasses.replace(DSPARK, init="target")],
                         ids=["dspark", "dflash2", "copied layers"])
def test_one_overfitted_sample_accepts_full_blocks(settings):
    """Learned from a text that the target wrote greedily; then every block, drafted in the cached way, is that text."""
    graphdef, params, frozen = split_model(settings)
    length, causal = 20, AttentionMask.causal()
    model = nnx.merge(graphdef, params, frozen)
    if settings.init == "target":
        copy_layers(model.target, model.drafter)
        np.testing.assert_array_equal(model.drafter.blocks.mlp.up.kernel[1], model.target.blocks.mlp.up.kernel[4])
        _, params, _ = split_trainable(model)
    write = jax.jit(lambda target, tokens: jnp.argmax(target(tokens, causal), axis=-1))
    tokens = jnp.zeros((1, length), jnp.int32).at[0, 0].set(5)
    for i in range(length - 1):
        tokens = tokens.at[0, i + 1].set(write(model.target, tokens)[0, i])
    objective = DraftObjective(num_anchors=length, confidence=float(settings.confidence_head),
                               selector=float(settings.selector_rank > 0))
    rule = make_optimizer(config := OptimizerConfig(learning_rate=1e-2, schedule="constant"), 10**6)
    state = create_state(jax.tree.map(jnp.asarray, params), rule, False, one_device(),
                         frozen=Frozen(jax.tree.map(jnp.asarray, frozen)))
    step = make_train_step(graphdef, rule, one_device(), objective=ObjectiveConfig("drafter", drafts=objective),
                           config=config, num_steps=10**6, seed=0, mask_token_id=MASK)
    for i in range(150):
        batch = Batch(tokens, jnp.arange(length)[None] > 0, jnp.full((1,), i, jnp.uint32))
        state, metrics = step(state, batch)
    assert metrics["accuracy"] == 1

    drafter = nnx.merge(graphdef, state.params, state.frozen.base).drafter
    config, target = drafter.config, model.target

    @jax.jit
    def draft(model, drafter, anchor):
        _, features = target.hidden_and_features(tokens, causal, config.target_layer_ids)
        places = jnp.where(jnp.arange(length) < anchor, jnp.arange(length), length)[None]
        cache = drafter.extend_cache(drafter.fuse(features), places, drafter.empty_cache(1, length))
        positions = anchor + jnp.arange(config.block_size)[None]
        states = drafter.cached_hidden(model.block_embeddings(tokens[:, anchor][:, None]), positions, cache)
        previous, state, guesses = tokens[:, anchor], drafter.markov_state((1,)), []
        for slot in range(config.first_slot, config.block_size):
            logits = target.unembed(states[:, slot])
            if config.markov_rank:
                bias, state = drafter.markov_bias(previous, states[:, slot], state)
                logits += bias
            if config.selector_rank:
                top, candidates = jax.lax.top_k(logits, config.selector_top_k)
                best = jnp.argmax(drafter.select(previous, states[:, slot], candidates, top), axis=-1)
                previous = candidates[jnp.arange(1), best]
            else:
                previous = jnp.argmax(logits, axis=-1)
            guesses.append(previous)
        return jnp.concatenate(guesses)

    for anchor in range(1, length - config.num_drafts):
        np.testing.assert_array_equal(draft(model, drafter, jnp.int32(anchor)),
                                      tokens[0, anchor + 1 : anchor + 1 + config.num_drafts])


@pytest.fixture(scope="module")
def target(base, tmp_path_factory):
    """A GPT-2 with weights, and a free row for the mask token."""
    shape, directory = tmp_path_factory.mktemp("shape"), tmp_path_factory.mktemp("target") / "model"
    for file in base.iterdir():
        (shape / file.name).write_bytes(file.read_bytes())
    settings = json.loads((base / "config.json").read_text()) | {"n_layer": 5, "initializer_range": 0.2}
    (shape / "config.json").write_text(json.dumps(settings))
    save_pretrained(directory, load_pretrained(shape, init="random", seed=5))
    return directory


@pytest.fixture(scope="module")
def draft_config(config, target):
    for key, value in {"model.source": str(target), "model.init": "pretrained", "model.mask_token": 11,
                       "objective": ObjectiveConfig("drafter", drafts=OBJECTIVES["dspark"]), "drafter": DSPARK,
                       "num_steps": 10, "validation.every": 5}.items():
        config = changed(config, key, value)
    return config


@pytest.fixture(scope="module")
def drafter_run(draft_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "drafter"
    return workdir, train(draft_config, workdir)


def test_a_run_of_a_drafter(drafter_run, draft_config, target, tmp_path):
    workdir, summary = drafter_run
    assert summary["train"]["loss"] > 0 and 1 <= summary["validation"]["tokens_per_pass"] <= 4
    assert summary["best_step"] in (5, 10)
    names = {name.split("/")[1].split(".")[0] for name in checkpoint_arrays(workdir, 10) if name.startswith("params")}
    assert names == {"drafter"}

    stored = open_drafter(workdir)
    assert stored.target == str(target) and stored.drafter.config == DrafterRecord.read(workdir).config
    average = checkpoint_arrays(workdir, 10)["ema/drafter.fc.kernel"]
    np.testing.assert_array_equal(stored.drafter.fc.kernel[...], average)
    DraftedModel(load_pretrained(stored.target).model, stored.drafter)
    at = open_drafter(f"{workdir}@5", param_dtype="bfloat16").drafter
    assert at.fc.kernel.dtype == jnp.bfloat16 and not np.array_equal(at.fc.kernel[...], average)
    with pytest.raises(CheckpointError, match=r"drafter\.json"):
        open_drafter(tmp_path)
    with pytest.raises(CheckpointError, match="target"):
        load_pretrained(workdir)


def test_sampling_with_a_run(drafter_run, target, tmp_path, capsys):
    """By its name, from Python and from the command line: the target's own text, and what it took."""
    workdir, _ = drafter_run
    lm, stats = DiffusionLM.from_pretrained(target), SamplingStats()
    settings = dict(max_new_tokens=10, policy="autoregressive", temperature=0.0)
    expected = lm.generate(["ab", "cab"], **settings)
    assert lm.generate(["ab", "cab"], drafter=str(workdir), stats=stats, **settings) == expected
    assert stats.texts == 2 and len(stats.acceptance) == DSPARK.block_size
    assert main(["sample", f"--model={target}", f"--drafter={workdir}", "--prompt=ab", "--max_new_tokens=10",
                 "--temperature=0", f"--json={tmp_path / 'result.json'}"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["samples"][0]["text"] == expected[0] and len(result["acceptance_by_position"]) == DSPARK.block_size
    assert main(["sample", f"--model={target}", f"--drafter={tmp_path / 'nowhere'}", "--prompt=ab"]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_export_of_a_run(drafter_run, target, tmp_path, capsys):
    workdir, _ = drafter_run
    assert main(["export", f"--drafter={workdir}@5", f"--output={tmp_path / 'out'}"]) == 0
    assert "layout" in capsys.readouterr().out
    stored = open_drafter(f"{workdir}@5", target=load_pretrained(target).model).drafter
    exported = open_drafter(tmp_path / "out", target=load_pretrained(target).model).drafter
    jax.tree.map(np.testing.assert_array_equal, nnx.state(exported), nnx.state(stored))
    tokens, fused = jnp.full((1, 3, exported.config.layers.hidden_size), 0.1), jnp.ones((1, 9, 16))
    for a, b in zip(*(jax.tree.leaves(jax.jit(lambda d: d.hidden(fused, tokens, jnp.array([[4]])))(d))
                      for d in (stored, exported)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_resuming_is_exact(drafter_run, draft_config, tmp_path):
    train(dataclasses.replace(draft_config, num_steps=5, optimizer=draft_config.optimizer), tmp_path)
    train(draft_config, tmp_path)
    full, resumed = (checkpoint_arrays(workdir, 10) for workdir in (drafter_run[0], tmp_path))
    assert full.keys() == resumed.keys()
    for name in full:
        np.testing.assert_array_equal(full[name], resumed[name], err_msg=name)


def test_a_changed_target_is_refused(draft_config, target, tmp_path):
    moved = tmp_path / "target"
    moved.mkdir()
    for file in target.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    config = changed(changed(draft_config, "model.source", str(moved)), "num_steps", 5)
    train(config, tmp_path / "run")
    save_pretrained(tmp_path / "other", load_pretrained(target, init="random", seed=6))
    (moved / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="weights"):
        train(changed(config, "num_steps", 10), tmp_path / "run")


@pytest.mark.parametrize("key, value, named", [
    ("model.mask_token", "<new>", "mask_token"), ("drafter.confidence_head", False, "confidence_head"),
    ("drafter.num_target_layers", 4, "layers"), ("drafter.init", "target", "rotary")])
def test_what_does_not_fit_is_refused(draft_config, tmp_path, key, value, named):
    with pytest.raises(ConfigError, match=named):
        train(changed(draft_config, key, value), tmp_path)


@pytest.mark.parametrize("key, value", [("lora.rank", 4), ("model.init", "random")])
def test_what_would_change_the_target_is_refused(draft_config, key, value):
    with pytest.raises(ConfigError, match=key):
        changed(draft_config, key, value)


@pytest.mark.parametrize("name, drafts, sizes", [
    ("dflash_qwen3_8b", 15, {"fc": 5 * 4096 * 4096}),
    ("dspark_qwen3_8b", 7, {"markov": 2 * 151_936 * 256, "confidence_head": 4096 + 256 + 1}),
    ("dflash2_qwen3_8b", 15, {"selector": 2 * 151_936 * 256 + 4096 * 256})])
def test_recipes_with_published_settings(name, drafts, sizes):
    """The sizes of the tensors of the released drafters for Qwen3-8B."""
    config = build_config(TrainConfig, load_recipe(name))
    qwen3 = ModelConfig("qwen3", vocab_size=151_936, hidden_size=4096, num_layers=36, num_heads=32, num_kv_heads=8,
                        head_dim=128, mlp_size=12_288, max_length=40_960, rope_theta=1e6, qk_norm=True)
    drafter_config = resolve_drafter(config.drafter, qwen3, config.model.mask_token)
    check_losses(config.objective.drafts, drafter_config)
    assert drafter_config.target_layer_ids == (1, 9, 17, 25, 33) and drafter_config.num_drafts == drafts
    drafter = abstract_drafter(drafter_config, Compute(), "float32")
    count = lambda module: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module)))  # noqa: E731
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12_288 + 2 * 4096 + 2 * 128
    convolutions = 2 * (4 * 4096 + 4096 * 4 * 4096 // 16) if drafter_config.conv_kernel_size else 0
    assert count(drafter.blocks) == 5 * (layer + convolutions)
    for part, size in sizes.items():
        assert count(getattr(drafter, part)) == size
