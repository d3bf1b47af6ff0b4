"""Drafters read from published layouts, against what the publishers' own code computed (`make_drafter_goldens`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention import AttentionMask
from dlm_jax.checkpoints import load_pretrained, open_drafter
from dlm_jax.models import DraftedModel
from tests.checkpoints import drafter_files
from tests.checkpoints.make_drafter_goldens import ANCHORS, GOLDENS
from tests.sampling.tiny_models import run_sampler


@pytest.fixture(scope="module", params=drafter_files.CASES)
def case(request, tmp_path_factory):
    """Returns a model with its drafter, and the goldens."""
    name, folder = request.param, tmp_path_factory.mktemp("drafter")
    drafter_files.write_target(drafter_files.CASES[name][0], folder / "target")
    drafter_files.write_drafter(name, folder / "drafter", folder / "target", shards=3 if name == "dspark" else 1)
    target = load_pretrained(folder / "target").model
    model = DraftedModel(target, open_drafter(folder / "drafter", target=target).drafter)
    goldens = np.load(GOLDENS)
    return model, {key.partition("/")[2]: goldens[key] for key in goldens if key.startswith(f"{name}/")}


@jax.jit
def guess(model, tokens, anchors):
    """Returns logits [anchors, drafts, vocab], greedy drafts, and the confidences, by the training forward."""
    drafter, at = model.drafter, jnp.array(anchors)[None]
    features = model.target.hidden_and_features(tokens, AttentionMask.causal(), drafter.config.target_layer_ids)[1]
    embeddings = model.block_embeddings(jnp.take_along_axis(tokens, at, axis=1))
    hidden = drafter.hidden(drafter.fuse(features), embeddings, at)
    hidden = hidden.reshape(len(anchors), -1, hidden.shape[-1])[:, drafter.config.first_slot :]
    logits, previous = model.target.unembed(hidden), tokens[0, at[0]]
    results, state = [], drafter.markov_state((len(anchors),))
    for slot in range(drafter.config.num_drafts):
        found = logits[:, slot]
        if drafter.markov is not None:
            bias, state = drafter.markov_bias(previous, hidden[:, slot], state)
            found = found + bias
        token, confidence = found.argmax(-1), None
        if drafter.selector is not None:
            top, candidates = jax.lax.top_k(found, drafter.config.selector_top_k)
            best = drafter.select(previous, hidden[:, slot], candidates, top).argmax(-1)
            token = jnp.take_along_axis(candidates, best[:, None], axis=1)[:, 0]
        if drafter.confidence_head is not None:
            confidence = drafter.confidence(previous, hidden[:, slot])
        results.append((found, token, confidence))
        previous = token
    return jax.tree.map(lambda *slots: jnp.stack(slots, axis=1), *results)


def test_logits_and_drafts_are_those_of_the_publishers_code(case):
    model, golden = case
    logits, drafts, confidence = guess(model, drafter_files.prompt()[None], ANCHORS)
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)
    np.testing.assert_array_equal(drafts, golden["drafts"])
    if confidence is not None:
        np.testing.assert_allclose(confidence, golden["confidence"], atol=1e-4)


def test_text_and_accepted_drafts_are_those_of_the_publishers_code(case):
    model, golden = case
    # Their first token comes from the pass over the prompt; here it is part of the prompt. The last are not compared:
    # the codes differ in whether they count drafts past the end.
    given, written = len(drafter_files.prompt()) + 1, 30
    tokens = np.concatenate([drafter_files.prompt(), golden["text"]])[None, : given + written]
    fixed = np.arange(given + written)[None] < given
    found = run_sampler(model, np.where(fixed, tokens, 0), fixed, policy="autoregressive", temperature=0.0, mask=None)
    np.testing.assert_array_equal(found.tokens, tokens)
    at, passes, accepted = 0, 0, np.zeros(model.drafter.config.num_drafts, int)
    while at < written:
        number = golden["accepted"][passes]
        accepted[: min(number, written - at)] += 1
        at, passes = at + number + 1, passes + 1
    assert found.steps.tolist() == [passes]
    np.testing.assert_array_equal(found.accepted[0], accepted)
    assert accepted.sum() > 5
