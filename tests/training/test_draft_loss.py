"""The loss of a drafter: the same on every mesh, in bfloat16, and what it learns; the target stays as it is."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlm_jax.attention import AttentionMask
from dlm_jax.checkpoints.drafter import DrafterSettings, resolve_drafter
from dlm_jax.diffusion import Batch, DraftObjective, ObjectiveConfig, drafts
from dlm_jax.matmul import compiler_options, has_bfloat16_units
from dlm_jax.models import Compute, DraftedModel, Drafter, ModelConfig, Transformer, split_trainable
from dlm_jax.parallel import MeshConfig, make_mesh
from dlm_jax.training.draft_loss import DrafterLoss
from dlm_jax.training.drafter_setup import copy_layers
from dlm_jax.training.state import Frozen, state_layout
from dlm_jax.training.step import make_eval_step
from tests.training.steps import (
    LENGTH,
    MASK,
    ROWS,
    assert_same_curve,
    batch_of,
    compiled_step,
    one_device,
    take_steps,
)

TARGET = ModelConfig("llama", vocab_size=24, hidden_size=16, num_layers=5, num_heads=8, num_kv_heads=8, head_dim=4,
                     mlp_size=32, max_length=32, tie_embeddings=True, initializer_range=0.3)
DSPARK = DrafterSettings(num_layers=2, num_target_layers=2, block_size=3, sample_from_anchor=True, markov_rank=8,
                         markov_head="rnn", confidence_head=True)
DFLASH2 = DrafterSettings(num_layers=2, num_target_layers=2, block_size=4, conv_kernel_size=2, conv_group_size=8,
                          selector_rank=8, selector_top_k=4)
SETTINGS = {"dspark": DSPARK, "dflash2": DFLASH2}
OBJECTIVES = {kind: ObjectiveConfig("drafter", drafts=drafts) for kind, drafts in {
    "dspark": DraftObjective(num_anchors=6, cross_entropy=0.1, l1=0.9, confidence=1.0),
    "dflash2": DraftObjective(num_anchors=6, decay=7.0, selector=1.0)}.items()}
two_documents = functools.partial(batch_of, start=7)


@functools.cache
def split_model(kind):
    """The graph, and the trained and frozen parameters on the host."""
    @jax.jit
    def make():
        config = resolve_drafter(SETTINGS[kind], TARGET, MASK)
        return DraftedModel(Transformer(TARGET, rngs=nnx.Rngs(0)), Drafter(config, rngs=nnx.Rngs(1)))

    graphdef, params, frozen = split_trainable(make())
    return graphdef, jax.device_get(params), jax.device_get(frozen)


def run(mesh, kind, **settings):
    """Metrics of each step, and the last state on the host."""
    metrics, state = take_steps(split_model(kind), mesh, 3, OBJECTIVES[kind], two_documents, **settings)
    return metrics, jax.device_get(state)


reference = functools.cache(lambda kind: run(one_device(), kind))


@pytest.mark.parametrize("kind", ["dspark", "dflash2"])
def test_the_drafter_alone_is_trained(kind):
    metrics, state = reference(kind)
    _, params, frozen = split_model(kind)
    for (path, before), (_, after) in zip(nnx.to_flat_state(params), nnx.to_flat_state(state.params), strict=True):
        assert path[0] == "drafter" and not np.array_equal(before[...], after[...]), path
    for before, after in zip(jax.tree.leaves(frozen), jax.tree.leaves(state.frozen.base), strict=True):
        np.testing.assert_array_equal(before, after)
    assert ("tokens_per_pass" in metrics[0]) == (kind == "dspark")


@pytest.mark.parametrize("kind, mesh, accumulate", [
    ("dspark", MeshConfig(data=2, fsdp=2, tensor=2), 4), ("dspark", MeshConfig(fsdp=2, tensor=2, context=2), 1),
    ("dflash2", MeshConfig(fsdp=4, tensor=2), 2)])
def test_loss_curve_is_the_same_on_every_mesh(kind, mesh, accumulate, capfd, monkeypatch):
    monkeypatch.setattr(drafts, "CHUNK_GUESSES", 6)  # several chunks, where the reference has one
    metrics, _ = run(make_mesh(mesh), kind, accumulate_steps=accumulate)
    assert_same_curve(metrics, reference(kind)[0], rtol=2e-5)
    assert "rematerialization" not in capfd.readouterr().err


@functools.cache
def gradients(kind, compute):
    """Of each part of the drafter together, with the options under which such a step is compiled."""
    config = resolve_drafter(SETTINGS[kind], TARGET, MASK)
    graphdef, _, _ = split_trainable(jax.eval_shape(lambda: DraftedModel(
        Transformer(TARGET, rngs=nnx.Rngs(0), compute=compute), Drafter(config, rngs=nnx.Rngs(1), compute=compute))))
    loss, frozen = DrafterLoss(graphdef, one_device(), OBJECTIVES[kind], 0), Frozen(split_model(kind)[2])

    def value(params, batch):
        return loss(params, frozen, batch, jnp.int32(0), ROWS).loss

    grads = jax.jit(jax.grad(value), compiler_options=compiler_options(compute.matmul))(
        reference(kind)[1].params, two_documents())["drafter"]  # none is 0 as in a new selector
    return {name: np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(part)])
            for name, part in grads.items()}


@pytest.mark.parametrize("kind", ["dspark", "dflash2"])
@pytest.mark.parametrize("products", ["default", pytest.param("cpu_bfloat16", marks=pytest.mark.skipif(
    not has_bfloat16_units(), reason="XLA uses bfloat16 products only where the processor has them"))])
def test_bfloat16_gradients(kind, products):
    """Relative to the largest of each part."""
    exact, rounded = gradients(kind, Compute()), gradients(kind, Compute(dtype="bfloat16", matmul=products))
    for part, gradient in rounded.items():
        cosine = gradient @ exact[part] / np.linalg.norm(gradient) / np.linalg.norm(exact[part])
        assert cosine > 0.99, (part, cosine)


def test_each_device_computes_its_own_rows():
    """Without a loss that needs the target's states, too: no array has the MLP's activations of all rows."""
    mesh, (graphdef, params, frozen) = make_mesh(MeshConfig(fsdp=8)), split_model("dflash2")
    _, rule, step = compiled_step(graphdef, mesh, OBJECTIVES["dflash2"], ())
    layout = state_layout(params, rule, False, mesh, frozen=Frozen(frozen))
    program = step.lower(layout, two_documents(0, mesh)).compile().as_text()
    found = {tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", program)}
    assert (ROWS // 8, LENGTH, TARGET.mlp_size) in found or (ROWS // 8 * LENGTH, TARGET.mlp_size) in found
    assert (ROWS, LENGTH, TARGET.mlp_size) not in found and (ROWS * LENGTH, TARGET.mlp_size) not in found


def test_validation_measures_what_the_target_accepts():
    """By the rule of `speculative sampling`, slot by slot: the smaller of both probabilities, summed over tokens."""
    graphdef, params, frozen = split_model("dflash2")
    step = make_eval_step(graphdef, one_device(), objective=OBJECTIVES["dflash2"], seed=0, num_rows=ROWS,
                          num_samples=1, mask_token_id=MASK)
    metrics = step(nnx.merge_state(params, frozen), two_documents(), jnp.int32(0)).metrics()
    assert 1 <= metrics["tokens_per_pass"] <= 4 and 0 < metrics["acceptance_1"] < 1 and "acceptance_4" not in metrics


@pytest.mark.parametrize("kind", ["dspark with copied layers", "dflash2"])
def test_one_overfitted_sample_accepts_full_blocks(kind):
    """Learned from a text that the target wrote greedily; then every block, drafted in the cached way, is that text."""
    graphdef, params, frozen = split_model(kind.partition(" ")[0])
    length, causal = 20, AttentionMask.causal()
    model = nnx.merge(graphdef, *jax.tree.map(jnp.array, (params, frozen)))
    if "copied" in kind:
        copy_layers(model.target, model.drafter)
        np.testing.assert_array_equal(model.drafter.blocks.mlp.up.kernel[1], model.target.blocks.mlp.up.kernel[4])
        _, params, _ = split_trainable(model)
    write = jax.jit(lambda target, tokens: jnp.argmax(target(tokens, causal), axis=-1))
    tokens = jnp.zeros((1, length), jnp.int32).at[0, 0].set(5)
    for i in range(length - 1):
        tokens = tokens.at[0, i + 1].set(write(model.target, tokens)[0, i])
    objective = DraftObjective(num_anchors=length, confidence=float("dspark" in kind),
                               selector=float(kind == "dflash2"))
    metrics, state = take_steps(
        (graphdef, params, frozen), one_device(), 150, ObjectiveConfig("drafter", drafts=objective),
        lambda step, _: Batch(tokens, jnp.arange(length)[None] > 0, jnp.full((1,), step, jnp.uint32)))
    assert metrics[-1]["accuracy"] == 1

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
