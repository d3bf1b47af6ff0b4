import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax import DiffusionLM
from dlm_jax.errors import ConfigError
from dlm_jax.sampling import GAP, SamplerConfig, pad_rows
from dlm_jax.sampling.speculative import NO_DRAFT, NgramDrafter
from tests.sampling.tiny_models import EOS, make_batch, run_sampler, tiny


@dataclasses.dataclass(frozen=True)
class Scripted:
    """Guesses tokens from a list of rows, so that a test decides which drafts are right."""

    rows: tuple[tuple[int, ...], ...]
    num_drafts: int = 5

    def draft(self, tokens, at):
        rows = jnp.pad(jnp.array(self.rows), ((0, 0), (0, self.num_drafts)), constant_values=NO_DRAFT)
        return jnp.take_along_axis(rows, at[:, None] + jnp.arange(self.num_drafts), axis=1)


def scripted(tokens, wrong=(), missing=()):
    """Returns a drafter that guesses `tokens` [batch, length], but wrong or no tokens at some positions."""
    rows = np.array(tokens)
    rows[:, list(wrong)] = (rows[:, list(wrong)] + 1) % 50
    rows[:, list(missing)] = NO_DRAFT
    return Scripted(tuple(map(tuple, rows.tolist())))


CHOICES = {"greedy": ("gpt2", dict(temperature=0.0)), "top-p": ("window", dict(temperature=0.8, top_p=0.9)),
           "repetition": ("llama", dict(top_k=12, repetition_penalty=1.4)),
           "end of text": ("llama", dict(eos=EOS, stop=True, repetition_penalty=1.2))}
DRAFTERS = {
    "some wrong, some missing": lambda tokens: scripted(tokens, wrong=range(0, 40, 3), missing=range(0, 40, 7)),
    "look-up": lambda tokens: NgramDrafter(4, longest=2, shortest=1),
}


@pytest.mark.parametrize(("kind", "choice"), CHOICES.values(), ids=CHOICES)
def test_text_does_not_depend_on_drafter(kind, choice):
    """Rows of several lengths, with drafts of any quality: token by token what decoding without a drafter gives."""
    network, (tokens, fixed, lengths) = tiny(kind), make_batch("autoregressive")
    plain = run_sampler(network, tokens, fixed, lengths, policy="autoregressive", **choice)
    for name, make in DRAFTERS.items():
        found = run_sampler(network, tokens, fixed, lengths, policy="autoregressive", drafter_object=make(plain.tokens),
                            **choice)
        np.testing.assert_array_equal(found.tokens, plain.tokens, err_msg=name)
        np.testing.assert_allclose(found.confidence, plain.confidence, atol=2e-4, err_msg=name)
        assert (found.steps <= plain.steps).all()


def test_right_drafts_save_passes():
    network, (tokens, fixed, lengths) = tiny("llama"), make_batch("autoregressive")
    plain = run_sampler(network, tokens, fixed, lengths, policy="autoregressive")
    gaps = lengths - fixed.sum(axis=1, where=np.arange(40) < lengths[:, None])
    np.testing.assert_array_equal(plain.steps, gaps)
    right = run_sampler(network, tokens, fixed, lengths, policy="autoregressive", drafter_object=scripted(plain.tokens))
    np.testing.assert_array_equal(right.steps, -(-gaps // 6))  # five drafts and one more token
    wrong = run_sampler(network, tokens, fixed, lengths, policy="autoregressive",
                        drafter_object=scripted(plain.tokens, wrong=range(40)))
    np.testing.assert_array_equal(wrong.steps, gaps)


def reference_look_up(row, at, num_drafts, longest, shortest):
    """Searches for the longest match first, from the right."""
    for size in range(longest, shortest - 1, -1):
        for end in range(at - 2, size - 2, -1):
            if at >= size and row[end - size + 1 : end + 1] == row[at - size : at]:
                return row[end + 1 : min(end + 1 + num_drafts, at)]
    return []


def test_look_up_finds_longest_and_last_match():
    rng = np.random.default_rng(0)
    settings = dict(num_drafts=4, longest=3, shortest=2)
    rows, ends = rng.integers(0, 3, (200, 20)), rng.integers(1, 20, 200)
    unknown = np.arange(20) >= ends[:, None]
    drafts = NgramDrafter(**settings).draft(jnp.where(unknown, 7, rows), jnp.asarray(ends))
    expected = [reference_look_up(row, at, **settings) for row, at in zip(rows.tolist(), ends.tolist(), strict=True)]
    assert [[token for token in draft if token != NO_DRAFT] for draft in drafts.tolist()] == expected
    assert 50 < sum(map(bool, expected)) < 200


@pytest.mark.parametrize("settings", [dict(num_drafts=0), dict(shortest=0), dict(longest=1, shortest=2)])
def test_look_up_refuses_impossible_sizes(settings):
    with pytest.raises(ConfigError):
        NgramDrafter(**settings)


@pytest.mark.parametrize("settings", [dict(policy="confidence", drafter="ngram"), dict(policy="autoregressive",
                                      num_drafts=3), dict(policy="autoregressive", drafter=" ")])
def test_config_refuses(settings):
    with pytest.raises(ConfigError, match="draft"):
        SamplerConfig(**settings)


def test_config_names_drafter():
    network, tokens = tiny("llama"), np.tile([5, 6, 7, 8], (2, 10))  # text that repeats itself
    fixed, settings = np.arange(40) < np.array([[12], [17]]), dict(policy="autoregressive", temperature=0.0)
    plain = run_sampler(network, tokens, fixed, **settings)
    by_name = run_sampler(network, tokens, fixed, **settings, drafter="ngram", num_drafts=3)
    by_object = run_sampler(network, tokens, fixed, **settings, drafter_object=NgramDrafter(3))
    for found in (by_name, by_object):
        np.testing.assert_array_equal(found.tokens, plain.tokens)
    np.testing.assert_array_equal(by_name.steps, by_object.steps)


def test_trained_model_needs_fewer_passes():
    lm = DiffusionLM.from_pretrained("stories")
    prompt = lm.tokenizer("Once upon a time, there was a little", add_special_tokens=False)["input_ids"]
    batch = pad_rows([[0, *prompt, *[GAP] * 80]] * 2, 128)
    settings = dict(policy="autoregressive", temperature=0.0, mask=lm.mask_token_id, blocks=lm.diffusion.blocks)
    plain = run_sampler(lm.model, *batch_of(batch), **settings)
    for drafter in ("self", "ngram"):
        found = run_sampler(lm.model, *batch_of(batch), **settings, drafter=drafter)
        np.testing.assert_array_equal(found.tokens, plain.tokens)
        assert found.steps.sum() < 0.9 * plain.steps.sum()


def batch_of(batch):
    return batch.tokens, batch.fixed, batch.lengths
