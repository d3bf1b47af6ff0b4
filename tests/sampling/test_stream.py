"""Step by step: the same tokens as at once, and what every step did follows from the model itself."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention import AttentionMask
from dlm_jax.sampling import SamplerConfig, SamplingSpec, stream
from tests.sampling.tools import EOS, MASK, SETTINGS, is_gap, keys_of, problem, run, tiny

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # mostly compiles


@jit
def logits_of(model, tokens, attention):
    return model(tokens, attention)


def watch(kind, settings):
    """The states of `stream` as numpy arrays."""
    tokens, fixed, lengths = problem(settings["policy"])
    settings = dict(settings)
    ends = (settings.pop("eos"),) if "eos" in settings else ()
    spec = SamplingSpec(eos_token_ids=ends, stop_at_eos=settings.pop("stop", False), mask_token_id=MASK, shift=True,
                config=SamplerConfig(**settings))
    states = stream(tiny(kind), tokens, fixed, lengths, keys_of(4), spec)
    return [jax.tree.map(np.asarray, state._replace(cache=None)) for state in states]


def predicted(kind, state, gaps, lengths, policy="confidence", cfg_scale=0.0, repetition_penalty=1.0, eos=None,
              eos_penalty=0.0, **_):
    """Log-probabilities [batch, length, vocab] that a step goes by, aligned with the positions they are of."""
    attention = (AttentionMask.causal() if policy == "autoregressive" else
                 AttentionMask.bidirectional().with_lengths(jnp.asarray(lengths, jnp.int32)))
    logits = np.array(logits_of(tiny(kind), state.tokens, attention))
    if cfg_scale:
        hidden = np.where(gaps | (np.arange(40) == 0), state.tokens, MASK)
        blind = np.array(logits_of(tiny(kind), hidden, attention))
        logits = blind + (1 + cfg_scale) * (logits - blind)
    for row in range(len(logits)):
        seen = np.unique(state.tokens[row][~state.masked[row] & (np.arange(40) < lengths[row])])
        column = logits[row][:, seen]
        logits[row][:, seen] = np.where(column > 0, column / repetition_penalty, column * repetition_penalty)
    if eos is not None:
        logits[:, :, eos] -= eos_penalty
    logits[:, :, MASK] = -np.inf
    return np.roll(jax.nn.log_softmax(logits), 1, axis=1)


@pytest.mark.parametrize(("kind", "settings"), [pytest.param(*rest, id=name) for name, *rest in SETTINGS])
def test_step_by_step_and_at_once_are_the_same(kind, settings):
    tokens, fixed, lengths = problem(settings["policy"])
    gaps, states = is_gap(fixed, lengths), watch(kind, settings)
    np.testing.assert_array_equal(states[0].masked, gaps)
    for before, after in itertools.pairwise(states):
        if "remask" not in settings:
            assert (after.masked <= before.masked).all()
            kept = ~before.masked
            np.testing.assert_array_equal(after.tokens[kept], before.tokens[kept])
            np.testing.assert_array_equal(after.confidence[kept], before.confidence[kept])
        assert (after.masked != before.masked).any()
        np.testing.assert_array_equal(after.tokens[~gaps], tokens[~gaps])
        if settings["policy"] != "autoregressive":
            left = EOS if after is states[-1] else MASK  # in the end what is left stands behind an end of text
            assert (after.tokens[after.masked] == left).all()
        assert (after.tokens[gaps & ~after.masked] != MASK).all()
        if "remask" in settings or "cache" in settings:
            continue
        log_p = predicted(kind, before, gaps, lengths, **settings)
        for row, position in np.argwhere(before.masked & ~after.masked):
            found = after.confidence[row, position]
            assert abs(found - log_p[row, position, after.tokens[row, position]]) < 1e-3

    out = run(tiny(kind), tokens, fixed, lengths, **settings)
    last = states[-1]
    np.testing.assert_array_equal(last.tokens, out.tokens)
    np.testing.assert_array_equal(last.confidence, out.confidence)
    np.testing.assert_array_equal(last.steps, out.steps)
    assert settings.get("stop") or not last.masked.any()


def test_remasking_masks_some_again_and_keeps_to_the_counts():
    kind, settings = next(rest for name, *rest in SETTINGS if "remask" in rest[1])
    settings = {**settings, "num_steps": 7, "block_length": None}
    states = watch(kind, settings)
    gaps = states[0].masked.sum(axis=1)
    for steps_in_block, state in enumerate(states):
        steps = np.clip(gaps, 1, 7)
        np.testing.assert_array_equal(state.masked.sum(axis=1), gaps - np.minimum(steps_in_block, steps) * gaps // steps)
    again = [(after.masked & ~before.masked).any() for before, after in itertools.pairwise(states)]
    assert any(again) and not again[-1]
    changed = [(~after.masked & ~before.masked & (after.tokens != before.tokens)).any()
               for before, after in itertools.pairwise(states)]
    assert any(changed)  # masked, and filled with another token within the step
