"""Trained drafters: the target's own text from drafters of every kind, whatever they guess."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlm_jax.attention import AttentionMask
from dlm_jax.checkpoints.drafter import DrafterSettings, resolve_drafter
from dlm_jax.errors import ConfigError
from dlm_jax.models import DraftedModel, Drafter
from tests.sampling.enumerated import sample_short_texts
from tests.sampling.tiny_models import make_batch, run_sampler, tiny

DFLASH = dict(block_size=4, sample_from_anchor=False)
KINDS = {
    "dflash": DFLASH,
    "dspark": dict(block_size=3, sample_from_anchor=True, markov_rank=4, confidence_head=True),
    "gated": dict(block_size=3, sample_from_anchor=True, markov_rank=4, markov_head="gated"),
    "rnn": dict(block_size=3, sample_from_anchor=True, markov_rank=4, markov_head="rnn"),
    "dflash2": DFLASH | dict(conv_kernel_size=2, selector_rank=4, selector_top_k=4, conv_group_size=8),
}
VOCAB = 5  # the last is the mask


@functools.cache
def drafted(kind, target_kind="llama", vocab_size=VOCAB):
    """Returns a random target with the first of many random drafters that guesses right now and then."""
    target = tiny(target_kind, num_layers=4, vocab_size=vocab_size)
    settings = DrafterSettings(num_layers=1, target_layer_ids=(1, 2), **KINDS[kind])
    config = resolve_drafter(settings, target.config, mask_token_id=vocab_size - 1)
    drafter, noise = jax.jit(lambda: Drafter(config, rngs=nnx.Rngs(1)))(), np.random.default_rng(0)
    model, first = DraftedModel(target, drafter), nnx.state(drafter)
    for _ in range(100):
        nnx.update(drafter, jax.tree.map(lambda x: x + jnp.asarray(0.3 * noise.normal(size=x.shape), x.dtype), first))
        if run(model, mask=vocab_size - 1, temperature=0.0).accepted.sum() > 8:
            return model
    raise AssertionError("no drafter guesses right")


def run(model, temperature=0.0, mask=VOCAB - 1, **settings):
    """Samples four rows of several lengths from left to right."""
    tokens, fixed, lengths = make_batch("autoregressive")
    return run_sampler(model, tokens % mask, fixed, lengths, policy="autoregressive", mask=mask,
                       temperature=temperature, **settings)


@pytest.mark.parametrize(("kind", "target"), [
    *((kind, "llama") for kind in KINDS), ("dspark", "two types and experts")])
def test_greedy_text_is_the_targets(kind, target):
    model, settings = drafted(kind, target), dict(repetition_penalty=1.3, eos=1, stop=True)
    plain, found = run(model.target, **settings), run(model, **settings)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    np.testing.assert_allclose(found.confidence, plain.confidence, atol=2e-4)
    # A pass gives the accepted drafts and one token more, unless the text ends with a draft.
    assert set(found.steps + found.accepted.sum(axis=1) - found.num_sampled) <= {0, 1}


def test_certain_drafts_leave_sampled_text_as_it_is():
    model, settings = drafted("dflash", "window"), dict(temperature=0.7, top_p=0.9, repetition_penalty=1.2)
    plain, found = run(model.target, **settings), run(model, **settings)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    assert found.accepted.sum() > 3


@jax.jit
def _block(model, tokens, anchors):
    """Returns the target's logits [batch, length, vocab], and the drafter's states [batch, slots, embed], uncached."""
    mask, drafter = AttentionMask.causal(), model.drafter
    hidden, features = model.target.hidden_and_features(tokens, mask, drafter.config.target_layer_ids)
    embeddings = model.block_embeddings(jnp.take_along_axis(tokens, anchors, axis=1))
    states = drafter.hidden(drafter.fuse(features), embeddings, anchors)
    return model.target.unembed(hidden), states[:, drafter.config.first_slot :]


@jax.jit
def _next_guess(model, state, previous, markov_state):
    logits = model.target.unembed(state)
    if model.drafter.markov is not None:
        bias, markov_state = model.drafter.markov_bias(previous, state, markov_state)
        logits = logits + bias
    logits = logits.at[:, VOCAB - 1].set(-jnp.inf)
    if model.drafter.selector is not None:
        top, candidates = jax.lax.top_k(logits, model.drafter.config.selector_top_k)
        scores = model.drafter.select(previous, state, candidates, top)
        return jnp.take_along_axis(candidates, scores.argmax(axis=-1)[:, None], axis=1)[:, 0], markov_state
    return logits.argmax(axis=-1), markov_state


@pytest.mark.parametrize("kind", ["dflash", "rnn", "dflash2"])
def test_cached_drafts_are_those_of_the_training_forward(kind):
    """As many passes as an uncached simulation needs, in rows of several lengths."""
    model, accepted = drafted(kind), 0
    found = run(model)
    for row, length, first, steps in zip(found.tokens, (40, 17, 29, 3), (4, 11, 1, 2), found.steps, strict=True):
        at, passes = first, 0
        while at < length:
            _, states = _block(model, jnp.asarray(row)[None], jnp.array([[at - 1]]))
            previous, markov_state, right = jnp.array([row[at - 1]]), model.drafter.markov_state((1,)), 0
            for slot in range(model.drafter.config.num_drafts):
                previous, markov_state = _next_guess(model, states[:, slot], previous, markov_state)
                if at + right >= length or int(previous[0]) != row[at + right]:
                    break
                right += 1
            accepted += right
            at, passes = at + right + 1, passes + 1
        assert steps == passes
    assert accepted > 3


@pytest.mark.parametrize(("kind", "settings"), [
    ("dflash", dict(temperature=0.8)), ("dspark", dict(temperature=0.7, top_p=0.8)), ("rnn", dict(top_k=3)),
    ("dflash2", dict(temperature=1.5)),
    ("dspark", dict(drafter="given", draft_vocab_size=3)), ("dflash2", dict(drafter="given", draft_vocab_size=3))],
    ids=str)
def test_law_of_short_texts_is_the_targets(kind, settings, optimized_program):
    """In a batch whose rows accept different numbers."""
    model = drafted(kind, vocab_size=6)
    found = sample_short_texts(model, model.target, **settings)
    assert len(set(found.steps.tolist())) > 1
    assert found.accepted.sum() > 0.1 * len(found.steps)


def test_threshold_checks_fewer_drafts():
    model, number = drafted("dspark"), []
    plain = run(model)
    for threshold in (0.5, 1.0):
        found = run(model, drafter="given", draft_threshold=threshold)
        np.testing.assert_array_equal(found.tokens, plain.tokens)
        number.append(int(found.accepted.sum()))
    assert plain.accepted.sum() > number[0] > number[1] == 0


@pytest.mark.parametrize("kind", ["dflash", "dspark"])
def test_drafts_of_the_first_tokens_alone(kind):
    model = drafted(kind)
    for settings in (dict(repetition_penalty=1.3), dict()):
        found = run(model, drafter="given", draft_vocab_size=2, **settings)
        np.testing.assert_array_equal(found.tokens, run(model, **settings).tokens)
    assert found.accepted.sum() > 0
    others = run(model, drafter="given", draft_vocab_size=VOCAB)
    np.testing.assert_array_equal(others.accepted, run(model).accepted)


def test_fewer_drafts():
    model = drafted("dflash")
    full, one = run(model), run(model, drafter="given", num_drafts=1)
    np.testing.assert_array_equal(one.tokens, full.tokens)
    assert one.accepted.shape == (4, 1) and full.steps.sum() < one.steps.sum() < one.num_sampled.sum()


@pytest.mark.parametrize(("kind", "settings"), [("dflash", dict(num_drafts=4)), ("dflash", dict(draft_threshold=0.5)),
                                                ("dspark", dict(num_drafts=4)),
                                                ("dspark", dict(draft_vocab_size=VOCAB + 1)),
                                                ("dflash", dict(draft_vocab_size=2, eos=(0, 1)))])
def test_settings_that_the_drafter_cannot_follow(kind, settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        run(drafted(kind), drafter="given", **settings)


def test_a_named_drafter_must_be_given():
    with pytest.raises(ConfigError, match="drafter"):
        run(drafted("dflash").target, drafter="somewhere")
