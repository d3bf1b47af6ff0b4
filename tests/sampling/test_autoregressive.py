"""From left to right: the chain rule, enumerated on a network that is run on every prefix."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention import AttentionMask
from dlm_jax.errors import ConfigError
from dlm_jax.models import ModelConfig
from tests.sampling.tools import problem, random_model, run, tiny
from tests.sampling.toys import assert_follows, truncated

OPTIMIZATION_LEVEL = 1  # large batches
ROWS, VOCAB, NEW = 10_000, 4, 3
PROMPTS = [[1], [3, 0, 0, 1]]


def network(kind):
    details = dict(norm="layer", positions="learned", gated_mlp=False) if kind == "gpt2" else {}
    return random_model(ModelConfig(kind, vocab_size=VOCAB, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=2,
                                    head_dim=4, mlp_size=16, max_length=8, **details), scale=0.5)


def chain_law(model, prompt, mask=None, repetition_penalty=1.0, eos=None, stop=False, **choice):
    """The probability of every continuation by NEW tokens; with `stop`, of what it is up to its first end of text."""
    prefixes = [[*prompt, *new] for size in range(NEW) for new in itertools.product(range(VOCAB), repeat=size)]
    padded = np.array([prefix + [0] * (8 - len(prefix)) for prefix in prefixes])
    everything = jax.jit(lambda model, tokens: model(tokens, AttentionMask.causal()))(model, jnp.asarray(padded))
    step = {}
    for prefix, rows in zip(prefixes, np.asarray(everything, np.float64), strict=True):
        logits = rows[len(prefix) - 1]
        for token in set(prefix):
            logits[token] *= repetition_penalty if logits[token] < 0 else 1 / repetition_penalty
        if mask is not None:
            logits[mask] = -np.inf
        step[tuple(prefix)] = truncated(np.exp(logits), **choice)
    law = {}
    for new in itertools.product(range(VOCAB), repeat=NEW):
        p = np.prod([step[(*prompt, *new[:n])][token] for n, token in enumerate(new)])
        end = new.index(eos) + 1 if stop and eos in new else NEW
        short = new[:end] + (eos,) * (NEW - end)
        law[short] = law.get(short, 0.0) + p
    return law


@pytest.mark.parametrize(("kind", "settings"), [
    ("llama", dict(mask=None)),
    ("gpt2", dict(mask=3, repetition_penalty=1.6, temperature=1.3, top_p=0.9)),
    ("llama", dict(mask=2, eos=1, stop=True, top_k=2)),
], ids=["without a mask token", "choice", "end of text"])
def test_continuations_of_prompts_of_any_length_follow_the_chain_rule(kind, settings):
    model, tokens = network(kind), np.zeros((ROWS * 2, 8), int)
    lengths = np.array([len(PROMPTS[row % 2]) for row in range(2 * ROWS)])
    for start, prompt in enumerate(PROMPTS):
        tokens[start::2, : len(prompt)] = prompt
    out = run(model, tokens, np.arange(8) < lengths[:, None], lengths + NEW, policy="autoregressive", **settings)
    for start, prompt in enumerate(PROMPTS):
        new = out.tokens[start::2, len(prompt) : len(prompt) + NEW]
        assert_follows(chain_law(model, prompt, **settings), new)
        steps = out.steps[start::2]
        ended = new == (settings["eos"] if settings.get("stop") else -1)
        np.testing.assert_array_equal(steps, np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, NEW))


def test_the_likeliest_tokens_are_those_of_decoding_without_a_cache():
    model = tiny("window")
    tokens, fixed, lengths = problem("autoregressive")
    out = run(model, tokens, fixed, lengths, policy="autoregressive", temperature=0.0)
    run_whole = jax.jit(lambda model, tokens: model(tokens, AttentionMask.causal()))
    logits = np.array(run_whole(model, out.tokens))
    logits[:, :, 60] = -np.inf  # the mask
    gaps = ~fixed & (np.arange(40) < lengths[:, None])
    np.testing.assert_array_equal(out.tokens[gaps], np.roll(logits.argmax(-1), 1, axis=1)[gaps])


def test_a_model_without_the_shift_is_refused():
    with pytest.raises(ConfigError, match="autoregressive decoding needs outputs that predict the next token"):
        run(tiny("llama"), *problem("autoregressive"), policy="autoregressive", shift=False)
