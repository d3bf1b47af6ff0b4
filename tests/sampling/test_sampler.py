"""The loop: what each step reveals, when a row is done, what a row depends on, and what is compiled."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlm_jax.attention import AttentionMask
from dlm_jax.checkpoints.hf_import import aligned_empty
from dlm_jax.diffusion import BlockSpec, DiffusionSpec
from dlm_jax.errors import ConfigError
from dlm_jax.sampling import GAP, POLICIES, SamplerConfig, SamplingSpec, pad_rows, sample, sampler, stream
from dlm_jax.sampling.spec import RowSettings
from tests.sampling.enumerated import LogitsModel
from tests.sampling.tiny_models import EOS, MASK, SETTINGS, is_gap, make_batch, make_keys, make_spec, run_sampler, tiny

VOCAB, LENGTH = 31, 24  # of the LogitsModels here, whose mask token is the last of the vocabulary

every_setting = pytest.mark.parametrize(("kind", "settings"), [pytest.param(*rest, id=name)
                                                               for name, *rest in SETTINGS])


def settings_of(name):
    return next((kind, settings) for known, kind, settings in SETTINGS if known == name)


def count_masks(tokens):
    """Logits that predict the number of masks left in the row, so that a token shows when it was revealed."""
    count = (tokens == VOCAB - 1).sum(axis=1)
    return jnp.broadcast_to(10 * jax.nn.one_hot(count, VOCAB)[:, None], (*tokens.shape, VOCAB))


def predict_end(tokens):
    """Logits certain of EOS (token 0) at the position that the row's first token names, less so of 5 elsewhere."""
    here = jnp.arange(tokens.shape[1]) == tokens[:, :1]
    return jnp.where(here[..., None], 12 * jax.nn.one_hot(0, VOCAB), 8 * jax.nn.one_hot(5, VOCAB))


def revealed_per_step(number=20, **config):
    """Returns how many tokens of a row of `number` gaps each step revealed, and the sample; row 1 has 4 gaps."""
    tokens, fixed = np.zeros((2, LENGTH), int), np.ones((2, LENGTH), bool)
    fixed[0, 2 : 2 + number] = False
    fixed[1, 5:9] = False
    out = run_sampler(LogitsModel(count_masks), tokens, fixed, mask=VOCAB - 1, temperature=0.0, **config)
    left = np.sort(np.unique(out.tokens[0, 2 : 2 + number]))[::-1]
    counts = [int((out.tokens[0] == masks).sum()) for masks in left]
    np.testing.assert_array_equal(left, number - np.cumsum([0, *counts[:-1]]))
    assert out.steps[0] == len(counts)
    assert out.steps[1] == len(np.unique(out.tokens[1, 5:9]))
    return counts, out


@pytest.mark.parametrize(("config", "counts"), [
    (dict(policy="margin", num_steps=3), [7, 7, 6]),
    (dict(policy="random_exact", num_steps=8), [3] * 4 + [2] * 4),
    (dict(policy="entropy", num_steps=99), [1] * 20),
    (dict(policy="threshold", threshold=0.99999), [1] * 20),  # above the model's probabilities
    (dict(policy="threshold", threshold=0.9), [20]),
    (dict(policy="confidence", num_steps=4, step_schedule="cosine"), [2, 4, 7, 7]),
    (dict(policy="threshold", block_length=8), [8, 8, 4]),
], ids=str)
def test_each_step_reveals_as_scheduled(config, counts):
    found, out = revealed_per_step(**config)
    assert found == counts
    if "num_steps" in config and "block_length" not in config:  # a row with fewer gaps has its own schedule
        assert out.steps[1] == min(4, config["num_steps"])


def test_random_skips_steps_that_reveal_nothing():
    counts, out = revealed_per_step(policy="random", num_steps=10_000)
    assert sum(counts) == 20 and len(counts) >= 19  # two of 20 in one of 10,000 steps: a probability of 1 in 50
    assert out.steps[1] <= 4


def test_remasking_keeps_the_schedule():
    kind, settings = settings_of("random_exact, remasking")
    states = stream_states(kind, {**settings, "num_steps": 7, "block_length": None})
    gaps = states[0].masked.sum(axis=1)
    steps = np.clip(gaps, 1, 7)
    for step, state in enumerate(states):
        taken = np.minimum(step, steps)
        filled = taken * (gaps // steps) + np.minimum(taken, gaps % steps)
        np.testing.assert_array_equal(state.masked.sum(axis=1), gaps - filled)
    again = [(after.masked & ~before.masked).any() for before, after in itertools.pairwise(states)]
    assert any(again) and not again[-1]


@pytest.mark.parametrize("config", [
    dict(policy="confidence"), dict(policy="random", num_steps=9),
    dict(policy="random_exact", remask=0.2, block_length=8), dict(policy="threshold", threshold=0.999999)],
    ids=lambda config: config["policy"])
def test_row_is_done_when_all_before_eos_is_filled(config):
    ends = np.array([5, 20, 1, 25, 12])  # the fourth row has none
    tokens = np.repeat(ends[:, None], LENGTH, axis=1)
    fixed = np.tile(np.arange(LENGTH) < 1, (len(ends), 1))
    fixed[4, 15] = True
    settings = dict(mask=VOCAB - 1, eos=0, temperature=0.0, **config)
    out = run_sampler(LogitsModel(predict_end), tokens, fixed, stop=True, **settings)
    for row, end in enumerate(ends):
        assert (out.tokens[row, 1:end] == np.where(fixed[row, 1:end], ends[row], 5)).all()
        assert (out.tokens[row, end:] == 0).sum() >= 1 or end >= LENGTH
        sampled = out.confidence[row] < 0
        assert sampled[1 : min(end + 1, LENGTH)].sum() == (~fixed[row, 1 : end + 1]).sum()
        np.testing.assert_array_equal(out.tokens[row, end + 1 :][~(sampled | fixed[row])[end + 1 :]], 0)
        assert fixed[row, 15] == (out.tokens[row, 15] == 12)
    full = run_sampler(LogitsModel(predict_end), tokens, fixed, **settings)
    assert (out.steps <= full.steps).all()
    assert out.steps[3] == full.steps[3]
    if config["policy"] == "confidence":  # EOS comes first, and then only what precedes it
        np.testing.assert_array_equal(out.steps, [5, 20, 1, 23, 12])


def test_several_eos_tokens_and_infinite_eos_penalty():
    tokens = np.repeat(np.array([5, 20])[:, None], LENGTH, axis=1)
    settings = dict(mask=VOCAB - 1, policy="confidence", temperature=0.0)
    fixed = np.tile(np.arange(LENGTH) < 1, (2, 1))
    one, several = (run_sampler(LogitsModel(predict_end), tokens, fixed, eos=eos, stop=True, **settings)
                    for eos in (0, (7, 0)))
    np.testing.assert_array_equal(several.steps, one.steps)
    np.testing.assert_array_equal(several.tokens == 7, one.confidence + fixed == 0)  # after the end
    out = run_sampler(LogitsModel(predict_end), tokens, fixed, eos=(0, 5), eos_penalty=np.inf, **settings)
    assert not np.isin(out.tokens[:, 1:], (0, 5)).any()


def test_given_eos_ends_nothing():
    tokens, fixed = np.full((1, LENGTH), 40), np.arange(LENGTH)[None] < 3
    tokens[0, 2] = 0
    out = run_sampler(LogitsModel(predict_end), tokens, fixed, mask=VOCAB - 1, eos=0, stop=True, policy="confidence",
                      temperature=0.0)
    assert (out.tokens[0, 3:] == 5).all()


@pytest.mark.parametrize(("config", "diffusion", "match"), [
    (dict(policy="first_hitting", num_steps=19), DiffusionSpec(MASK), "20 .*19 .*num_steps"),
    (dict(policy="autoregressive"), DiffusionSpec(MASK), "gap"),
    (dict(policy="autoregressive"), DiffusionSpec(MASK, shift=False), "shift"),
    (dict(policy="confidence"), DiffusionSpec(None), "confidence.*mask token"),
    (dict(policy="confidence"), DiffusionSpec(MASK, True, BlockSpec(4)), "blocks.*gap"),
    *[(settings, DiffusionSpec(MASK, True, BlockSpec(4)), key) for settings, key in (
        (dict(block_length=8), "block_length"), (dict(cfg_scale=1.0), "cfg_scale"),
        (dict(block_length=8, cache="dual"), "block_length"))],
], ids=lambda value: value if isinstance(value, str) else "")
def test_refused_before_the_first_step(config, diffusion, match):
    tokens, fixed = np.zeros((2, 30), int), np.zeros((2, 30), bool)  # position 0 is never a gap
    fixed[:, 9:18] = True
    fixed[0] = True
    spec = SamplingSpec(SamplerConfig(**config), diffusion)
    for start in (sample, lambda *arguments: next(stream(*arguments))):
        with pytest.raises(ConfigError, match=match) as error:
            start(tiny("llama"), tokens, fixed, np.array([30, 30]), make_keys(2), spec)
        assert "\n" not in str(error.value)


@every_setting
def test_row_is_independent_of_other_rows_padding_and_values_in_gaps(kind, settings):
    """Also: given tokens and padding stay, the mask token is never sampled, and steps are at most the gaps."""
    tokens, fixed, lengths = make_batch(settings["policy"])
    tokens[0, 3], fixed[0, 3] = MASK, True  # as a given token, the mask token is a token
    together, gaps = run_sampler(tiny(kind), tokens, fixed, lengths, **settings), is_gap(fixed, lengths)
    np.testing.assert_array_equal(together.tokens[~gaps], tokens[~gaps])
    assert not (together.tokens[gaps] == MASK).any()
    assert (together.confidence[~gaps] == 0).all()
    after_end = np.cumsum(gaps & (together.tokens == EOS), axis=1) > 1  # not sampled
    assert (together.confidence[gaps & ~after_end if settings.get("stop") else gaps] < 0).all()
    assert after_end.any() or "stop" not in settings
    if "remask" not in settings:
        assert (together.steps <= gaps.sum(axis=1)).all()
    if "num_steps" in settings and "block_length" not in settings:
        assert (together.steps <= settings["num_steps"]).all()

    rng, outside = np.random.default_rng(5), np.arange(40) >= lengths[:, None]
    changed = np.where(gaps | outside, rng.integers(0, 61, tokens.shape), tokens)
    given = np.where(outside, rng.random(fixed.shape) < 0.5, fixed)
    changed[3], given[3], lengths[3] = changed[1], given[1], lengths[1]  # another row in the batch
    found = run_sampler(tiny(kind), changed, given, lengths, **settings)
    for array, expected in zip(jax.tree.leaves(found), jax.tree.leaves(together), strict=True):
        keep = ~outside[:3] if array.ndim == 2 else slice(None)
        np.testing.assert_array_equal(array[:3][keep], expected[:3][keep])


@pytest.mark.parametrize("name", ["random in blocks", "confidence, dual cache", "entropy, prefix cache",
                                  "autoregressive, end of text"])
def test_row_is_independent_of_batch_size_and_width(name):
    kind, settings = settings_of(name)
    tokens, fixed, lengths = make_batch(settings["policy"])
    together = run_sampler(tiny(kind), tokens, fixed, lengths, **settings)
    for row in (1, 2):
        one, length = slice(row, row + 1), lengths[row]
        alone = run_sampler(tiny(kind), tokens[one, :32], fixed[one, :32], lengths[one], keys=make_keys(4)[one],
                            **settings)
        np.testing.assert_array_equal(alone.tokens[0, :length], together.tokens[row, :length])
        np.testing.assert_allclose(alone.confidence[0, :length], together.confidence[row, :length], atol=1e-4)
        assert alone.steps[0] == together.steps[row]


def test_settings_cover_every_policy():
    assert {settings["policy"] for _, _, settings in SETTINGS} == set(POLICIES)


@pytest.mark.parametrize("name", ["first_hitting", "autoregressive, end of text"])
def test_position_0_is_context_and_rows_without_gaps_come_back(name):
    kind, settings = settings_of(name)
    tokens, fixed, lengths = make_batch(settings["policy"])
    out = [run_sampler(tiny(kind), tokens, given, lengths, **settings).tokens
           for given in (fixed | (np.arange(40) == 0), fixed & (np.arange(40) > 0))]
    np.testing.assert_array_equal(out[0][:, 0], tokens[:, 0])
    np.testing.assert_array_equal(*out)
    out = run_sampler(tiny(kind), tokens, np.ones_like(fixed), lengths, **settings)
    np.testing.assert_array_equal(out.tokens, tokens)
    assert (out.steps == 0).all()


def test_keys_determine_rows():
    kind, settings = settings_of("first_hitting")
    out = [run_sampler(tiny(kind), *make_batch(), keys=make_keys(4, seed), **settings).tokens for seed in (0, 0, 1)]
    assert (out[0] == out[1]).all()
    assert (out[0] != out[2]).any(axis=1)[:3].all()


def test_arrays_may_change_after_the_call():
    """JAX may use an aligned array without a copy, and computes asynchronously."""
    def start():
        tokens, fixed = aligned_empty((4, 64), np.int32), aligned_empty((4, 64), np.bool_)
        tokens[:], fixed[:] = 7, np.arange(64) < 20
        spec = make_spec(policy="confidence", num_steps=2, temperature=0.0)
        return tokens, fixed, sample(tiny("llama"), tokens, fixed, np.full(4, 64), make_keys(4), spec)

    expected = np.asarray(start()[-1].tokens)
    for _ in range(20):
        tokens, fixed, found = start()
        tokens[:], fixed[:] = 8, False
        np.testing.assert_array_equal(found.tokens, expected)


# Step by step.

@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def compute_logits(model, tokens, attention):
    return model(tokens, attention)


def stream_states(kind, settings):
    """Returns the states of `stream` as NumPy arrays."""
    states = stream(tiny(kind), *make_batch(settings["policy"]), make_keys(4), make_spec(**settings))
    return [jax.tree.map(np.asarray, state._replace(cache=None)) for state in states]


def expected_log_probs(kind, state, gaps, lengths, policy="confidence", cfg_scale=0.0, repetition_penalty=1.0,
                       eos=None, eos_penalty=0.0, **_):
    """Returns log-probabilities [batch, length, vocab] of a step, each for its own position."""
    attention = (AttentionMask.causal() if policy == "autoregressive" else
                 AttentionMask.bidirectional().with_lengths(jnp.asarray(lengths, jnp.int32)))
    logits = np.array(compute_logits(tiny(kind), state.tokens, attention))
    if cfg_scale:
        unconditional = np.where(gaps | (np.arange(40) == 0), state.tokens, MASK)
        unconditional = np.array(compute_logits(tiny(kind), unconditional, attention))
        logits = unconditional + (1 + cfg_scale) * (logits - unconditional)
    for row in range(len(logits)):
        seen = np.unique(state.tokens[row][~state.masked[row] & (np.arange(40) < lengths[row])])
        column = logits[row][:, seen]
        logits[row][:, seen] = np.where(column > 0, column / repetition_penalty, column * repetition_penalty)
    if eos is not None:
        logits[:, :, eos] -= eos_penalty
    logits[:, :, MASK] = -np.inf
    return np.roll(jax.nn.log_softmax(logits), 1, axis=1)


@every_setting
def test_stream_equals_sample_and_every_step_follows_the_model(kind, settings):
    tokens, fixed, lengths = make_batch(settings["policy"])
    gaps, states = is_gap(fixed, lengths), stream_states(kind, settings)
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
            left = EOS if after is states[-1] else MASK  # at the end, what is still masked is after EOS
            assert (after.tokens[after.masked] == left).all()
        assert (after.tokens[gaps & ~after.masked] != MASK).all()
        if "remask" in settings or "cache" in settings:
            continue
        log_p = expected_log_probs(kind, before, gaps, lengths, **settings)
        for row, position in np.argwhere(before.masked & ~after.masked):
            expected = log_p[row, position, after.tokens[row, position]]
            assert abs(after.confidence[row, position] - expected) < 1e-3

    out = run_sampler(tiny(kind), tokens, fixed, lengths, **settings)
    for name in ("tokens", "confidence", "steps"):
        np.testing.assert_array_equal(getattr(states[-1], name), getattr(out, name))
    np.testing.assert_array_equal(out.num_sampled, (gaps & ~states[-1].masked).sum(axis=1))
    assert settings.get("stop") or not states[-1].masked.any()


# Programs.

@pytest.mark.parametrize("name", ["random in blocks", "confidence, dual cache", "autoregressive, end of text"])
def test_similar_prompts_other_numbers_and_integer_types_share_a_program(name):
    kind, settings = settings_of(name)
    compiled = set()
    for seed, (prompts, dtype) in enumerate((([3, 17], np.int64), ([9, 1], np.int32), ([18, 11], np.uint16))):
        batch = pad_rows([[1] * prompt + [GAP] * 14 for prompt in prompts], 128)
        run_sampler(tiny(kind), batch.tokens.astype(dtype), batch.fixed, batch.lengths.astype(dtype),
                    keys=make_keys(2, seed), **settings, temperature=0.5 + seed / 4)
        compiled.add(sampler._sample.program("default")._cache_size())
    assert len(compiled) == 1


def logits_rows(config, batch):
    """Returns the rows of each array of logits in the compiled program, for gaps in `batch` rows of 128."""
    vocab, length = 61, 128
    spec = SamplingSpec(config, DiffusionSpec(MASK), prompt_width=32)
    program = sampler._sample.program("default").lower(*nnx.split(tiny("llama")), jnp.zeros((batch, length), int),
                                    jnp.zeros((batch, length), bool), jnp.full(batch, length), make_keys(batch),
                                    RowSettings.of(config, batch),
                                    dataclasses.replace(spec, config=config.structure)).as_text()
    return [np.prod([int(size) for size in shape[:-1].split("x")])
            for shape in re.findall(rf"tensor<((?:\d+x)+){vocab}xf32>", program)]


@pytest.mark.parametrize("config", [
    *[SamplerConfig(policy, num_steps=16 if POLICIES[policy].needs_num_steps else None) for policy in POLICIES],
    SamplerConfig("confidence", block_length=32, cache="dual"),
    SamplerConfig("random", num_steps=16, block_length=32, cfg_scale=1.0, repetition_penalty=1.2, cache="prefix"),
], ids=lambda config: f"{config.policy} {config.block_length or ''}")
def test_logits_never_exist_for_entire_batch(config):
    rows = logits_rows(config, batch=4)
    assert rows and max(rows) <= 4 * 128 / 4


def test_head_runs_once_per_step_for_random_policies():
    few, many = (max(logits_rows(SamplerConfig("random_exact", num_steps=steps), batch=1)) for steps in (4, 64))
    assert many <= few <= 64 and few >= 32
