import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlm_jax.attention import AttentionMask
from dlm_jax.diffusion import BlockSpec
from dlm_jax.errors import ConfigError
from dlm_jax.models import LoRAConfig, split_lora
from tests.sampling.enumerated import sample_short_texts
from tests.sampling.tiny_models import EOS, MASK, make_batch, random_model, run_sampler, tiny

GATED = LoRAConfig(rank=4, alpha=8.0, where="noised", draft_head=True, frozen_dtype="float32")


def gated(base, lora=GATED):
    """Returns a model that drafts with random LoRA at noised positions, beside a base."""
    if not base.config.gated_mlp:
        lora = dataclasses.replace(lora, targets=("q", "k", "v", "out", "up", "down"))
    graphdef, params, factors = split_lora(random_model(base.config, lora=lora))
    del params
    return nnx.merge(graphdef, nnx.state(base), factors)


@pytest.mark.parametrize(("kind", "choice"), [("gpt2", dict(temperature=0.0)), ("llama", dict(
    top_k=12, eos=EOS, stop=True, repetition_penalty=1.4))], ids=str)
def test_text_does_not_depend_on_own_guesses(kind, choice):
    network, (tokens, fixed, lengths) = tiny(kind), make_batch("autoregressive")
    settings = dict(policy="autoregressive", blocks=BlockSpec(4), **choice)
    plain = run_sampler(network, tokens, fixed, lengths, **settings)
    found = run_sampler(network, tokens, fixed, lengths, drafter="self", **settings)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    assert (found.steps <= plain.steps).all()


def test_drafts_from_random_tokens():
    """The text is the same, the drafts are others, and no other policy fills such blocks."""
    network, (tokens, fixed, lengths) = tiny("llama"), make_batch("autoregressive")
    settings = dict(policy="autoregressive", temperature=0.0)
    plain = run_sampler(network, tokens, fixed, lengths, blocks=BlockSpec(4), **settings)
    masked, noised = (run_sampler(network, tokens, fixed, lengths, drafter="self", blocks=BlockSpec(4, noise=noise),
                                  **settings) for noise in ("mask", "random_tokens"))
    np.testing.assert_array_equal(noised.tokens, plain.tokens)
    assert (noised.steps <= plain.steps).all() and (noised.accepted != masked.accepted).any()
    again = run_sampler(network, tokens, fixed, lengths, drafter="self", blocks=BlockSpec(4, noise="random_tokens"),
                        **settings)
    np.testing.assert_array_equal(again.accepted, noised.accepted)
    with pytest.raises(ConfigError, match="random tokens"):
        run_sampler(network, tokens, fixed, lengths, policy="threshold", blocks=BlockSpec(4, noise="random_tokens"))


def guess(network, prefix, size):
    """Returns the most likely tokens of a block of masks after the token that follows `prefix`, without a cache."""
    tokens, start = np.full((1, 40), MASK), len(prefix)
    tokens[0, :start] = prefix
    queries, keys = np.arange(40)[:, None], np.arange(40)
    allowed = np.where(queries < start, keys <= queries, keys < start + size)
    logits = np.array(_logits(network, jnp.asarray(tokens), jnp.asarray(allowed)))[0, start : start + size - 1]
    logits[:, MASK] = -np.inf
    return logits.argmax(axis=-1).tolist()


@jax.jit
def _logits(network, tokens, allowed):
    return network(tokens, AttentionMask.matrix(allowed))


def test_own_guesses_are_those_of_block_diffusion():
    """As many passes as an uncached simulation needs, which guesses after each prefix that turns out to be kept."""
    network, size = tiny("llama", vocab_size=61, num_layers=1), 3
    tokens, fixed, lengths = make_batch("autoregressive")
    settings = dict(policy="autoregressive", temperature=0.0, blocks=BlockSpec(size))
    found = run_sampler(network, tokens, fixed, lengths, drafter="self", **settings)
    check_passes(found, lengths, lambda row, start: guess(network, row[:start], size))


def check_passes(found, lengths, guess_after):
    """Checks the passes of a greedy sample against a simulation in which `guess_after(row, start)` drafts."""
    for row, length, first, steps, accepted in zip(found.tokens, lengths, (4, 11, 1, 2), found.steps, found.accepted,
                                                   strict=True):
        at, guesses, expected, total = first, [], 0, 0
        while at < length:
            right = 0
            while right < len(guesses) and at + right < length and guesses[right] == row[at + right]:
                right += 1
            at, expected, total = at + right + 1, expected + 1, total + right
            if at < length:
                guesses = guess_after(row, at - 1)
        assert steps == expected and accepted.sum() == total
    assert found.accepted.sum() > 0


@pytest.mark.parametrize(("kind", "settings"), [
    ("llama", dict(blocks=None)), ("llama", dict(blocks=BlockSpec(1))), ("window", dict(blocks=BlockSpec(4))),
    ("llama", dict(blocks=BlockSpec(4, "block_bidirectional"))), ("llama", dict(blocks=BlockSpec(4), num_drafts=4)),
    ("llama", dict(blocks=BlockSpec(4), draft_vocab_size=10**6))])
def test_own_guesses_need_causal_blocks(kind, settings):
    tokens, fixed, lengths = make_batch("autoregressive")
    with pytest.raises(ConfigError, match="drafter=self|draft_vocab_size"):
        run_sampler(tiny(kind), tokens, fixed, lengths, policy="autoregressive", drafter="self", **settings)


@pytest.mark.parametrize(("kind", "choice"), [
    ("gpt2", dict()), ("llama", dict(repetition_penalty=1.3, eos=EOS, stop=True))], ids=str)
def test_gated_model_writes_its_bases_text(kind, choice):
    base, (tokens, fixed, lengths) = tiny(kind), make_batch("autoregressive")
    settings = dict(policy="autoregressive", temperature=0.0, **choice)
    plain = run_sampler(base, tokens, fixed, lengths, **settings)
    for lora in (GATED, dataclasses.replace(GATED, draft_head=False)):
        found = run_sampler(gated(base, lora), tokens, fixed, lengths, drafter="self", blocks=BlockSpec(4), **settings)
        np.testing.assert_array_equal(found.tokens, plain.tokens)


def test_gated_model_without_drafts_is_its_base():
    base, (tokens, fixed, lengths) = tiny("llama"), make_batch("autoregressive")
    found = [run_sampler(model, tokens, fixed, lengths, policy="autoregressive") for model in (base, gated(base))]
    np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
    np.testing.assert_array_equal(found[0].confidence, found[1].confidence)  # bit for bit


@pytest.mark.parametrize("draft_vocab_size", [None, 4])
def test_law_of_short_texts_is_the_bases(draft_vocab_size, optimized_program):
    """Sampled drafts, of a head that sees the token before each, in rows that accept different numbers."""
    base = tiny("llama", vocab_size=6)
    found = sample_short_texts(gated(base), base, drafter="self", blocks=BlockSpec(4), temperature=0.7, top_p=0.8,
                               draft_vocab_size=draft_vocab_size)
    assert len(set(found.steps.tolist())) > 1
    assert found.accepted.sum() > 0.05 * len(found.steps)


def guess_in_turn(network, row, start, blocks, number):
    """Returns the drafts after the token at `start`, each given the one before, of a full block, without a cache."""
    size = blocks.size
    tokens, places = np.append(row, np.full(size, MASK))[None], np.append(np.arange(40), start + np.arange(size))[None]
    queries, keys = np.arange(40 + size)[:, None], np.arange(40 + size)
    own = (keys >= 40) & ((keys <= queries) | (blocks.noised_attention == "bidirectional"))
    allowed = np.where(queries < 40, keys <= queries, (keys < start) | own)
    states = np.array(_states(network, tokens, places, allowed))[:, 40:]
    found, last = [], row[start]
    for slot in range(min(number, 39 - start)):
        logits = np.array(_corrected(network, states[:, slot], jnp.array([last])))[0]
        logits[MASK] = -np.inf
        last = int(logits.argmax())
        found.append(last)
    return found


@jax.jit
def _states(network, tokens, places, allowed):
    return network.hidden(tokens, AttentionMask.matrix(allowed), positions=places, noised=(40, tokens.shape[1]))


@jax.jit
def _corrected(network, state, last):
    return network.unembed(network.correct_drafts(state, last))


@pytest.mark.parametrize("num_drafts", [3, 2])
@pytest.mark.parametrize("noised_attention", ["bidirectional", "causal"])
def test_gated_drafts_are_those_of_training(noised_attention, num_drafts):
    """Masks that see no later one need no full block: the drafts are those of full ones nevertheless."""
    network, blocks = gated(tiny("llama", vocab_size=61, num_layers=1)), BlockSpec(4, noised_attention=noised_attention)
    tokens, fixed, lengths = make_batch("autoregressive")
    found = run_sampler(network, tokens, fixed, lengths, policy="autoregressive", temperature=0.0,
                        blocks=blocks, drafter="self", num_drafts=num_drafts)
    check_passes(found, lengths, lambda row, start: guess_in_turn(network, row, start, blocks, num_drafts))
