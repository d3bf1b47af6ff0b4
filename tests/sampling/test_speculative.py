import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax import DiffusionLM
from dlm_jax.sampling import GAP, pad_rows
from dlm_jax.sampling.sampler import fill, resolve_spec
from dlm_jax.sampling.spec import NO_DRAFT, Drafts, RowSettings
from dlm_jax.sampling.speculative import SpeculativeStepper, look_up, next_position
from tests.sampling.tiny_models import EOS, make_batch, make_keys, make_spec, run_sampler, tiny


@dataclasses.dataclass(frozen=True)
class ScriptedStepper(SpeculativeStepper):
    """Guesses tokens from `guesses` [batch, length], so that a test decides which drafts are right."""

    guesses: jax.Array
    num_drafts = 5

    def guess(self, inputs, state):
        places = next_position(state)[:, None] + jnp.arange(self.num_drafts)
        return Drafts(jnp.take_along_axis(self.guesses, places, axis=1, mode="fill", fill_value=NO_DRAFT), None)


@functools.partial(jax.jit, static_argnames="spec")
def fill_scripted(network, spec, guesses, *arrays):
    return fill(ScriptedStepper(network, spec, guesses), *arrays)


def run_scripted(network, tokens, fixed, lengths, right, wrong=(), missing=(), **settings):
    """Samples with drafts that are `right` [batch, length], but wrong or missing at some positions."""
    guesses = np.array(right)
    guesses[:, list(wrong)] = (guesses[:, list(wrong)] + 1) % 50
    guesses[:, list(missing)] = NO_DRAFT
    spec = make_spec(policy="autoregressive", **settings)
    return jax.tree.map(np.asarray, fill_scripted(
        network, resolve_spec(network, spec, fixed, lengths), guesses, jnp.asarray(tokens, jnp.int32), fixed,
        jnp.asarray(lengths, jnp.int32), make_keys(len(tokens)), RowSettings.of(spec.config, len(tokens))))


CHOICES = {"greedy": ("gpt2", dict(temperature=0.0)), "top-p": ("window", dict(temperature=0.8, top_p=0.9)),
           "repetition": ("llama", dict(top_k=12, repetition_penalty=1.4)),
           "end of text": ("llama", dict(eos=EOS, stop=True, repetition_penalty=1.2))}


@pytest.mark.parametrize(("kind", "choice"), CHOICES.values(), ids=CHOICES)
def test_text_does_not_depend_on_drafter(kind, choice):
    """Rows of several lengths, with drafts of any quality: token by token what decoding without a drafter gives."""
    network, batch = tiny(kind), make_batch("autoregressive")
    plain = run_sampler(network, *batch, policy="autoregressive", **choice)
    found = run_scripted(network, *batch, plain.tokens, wrong=range(0, 40, 3), missing=range(0, 40, 7), **choice)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    np.testing.assert_allclose(found.confidence, plain.confidence, atol=2e-4)
    assert (found.steps <= plain.steps).all()


def test_right_drafts_save_passes():
    network, (tokens, fixed, lengths) = tiny("llama"), make_batch("autoregressive")
    plain = run_sampler(network, tokens, fixed, lengths, policy="autoregressive")
    gaps = lengths - fixed.sum(axis=1, where=np.arange(40) < lengths[:, None])
    np.testing.assert_array_equal(plain.steps, gaps)
    right, wrong = (run_scripted(network, tokens, fixed, lengths, plain.tokens, wrong=places)
                    for places in ((), range(40)))
    np.testing.assert_array_equal(right.steps, -(-gaps // 6))  # five drafts and one more token
    np.testing.assert_array_equal(wrong.steps, gaps)


def reference_look_up(row, at, num_drafts):
    """Searches for the longest match first, from the right."""
    for size in (4, 3, 2):
        for end in range(at - 2, size - 2, -1):
            if at >= size and row[end - size + 1 : end + 1] == row[at - size : at]:
                return row[end + 1 : min(end + 1 + num_drafts, at)]
    return []


def test_look_up_finds_longest_and_last_match():
    rng = np.random.default_rng(0)
    rows, ends = rng.integers(0, 3, (200, 20)), rng.integers(1, 20, 200)
    unknown = np.arange(20) >= ends[:, None]
    drafts = look_up(jnp.where(unknown, 7, rows), jnp.asarray(ends), 4)
    expected = [reference_look_up(row, at, 4) for row, at in zip(rows.tolist(), ends.tolist(), strict=True)]
    assert [[token for token in draft if token != NO_DRAFT] for draft in drafts.tolist()] == expected
    assert 50 < sum(map(bool, expected)) < 200


def test_look_up_in_text_that_repeats_itself():
    network, tokens = tiny("llama"), np.tile([5, 6, 7, 8], (2, 10))
    fixed, settings = np.arange(40) < np.array([[12], [17]]), dict(policy="autoregressive", temperature=0.0)
    plain = run_sampler(network, tokens, fixed, **settings)
    found = run_sampler(network, tokens, fixed, **settings, drafter="ngram", num_drafts=3)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    assert found.accepted.shape == (2, 3) and found.steps.sum() < plain.steps.sum()


def test_trained_model_needs_fewer_passes():
    lm = DiffusionLM.from_pretrained("stories")
    prompt = lm.tokenizer("Once upon a time, there was a little", add_special_tokens=False)["input_ids"]
    batch = pad_rows([[0, *prompt, *[GAP] * 80]] * 2, 128)
    settings = dict(policy="autoregressive", temperature=0.0, mask=lm.mask_token_id, blocks=lm.diffusion.blocks)
    arrays = batch.tokens, batch.fixed, batch.lengths
    plain = run_sampler(lm.model, *arrays, **settings)
    found = run_sampler(lm.model, *arrays, **settings, drafter="self")
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    assert found.steps.sum() < 0.9 * plain.steps.sum()
