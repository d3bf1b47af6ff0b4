"""Models of blocks: what is remembered is exact, rows do not wait for each other, every policy works in a block."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.diffusion import BlockSpec
from dlm_jax.errors import ConfigError
from dlm_jax.sampling import SamplerConfig, SamplingSpec, loop
from tests.sampling.tools import EOS, MASK, keys_of, tiny

SIZE, WIDTH = 4, 24
TOKENS = np.random.default_rng(3).integers(0, EOS, (4, WIDTH))
GIVEN, LENGTHS = np.array([1, 4, 7, 12]), np.array([24, 18, 23, 13])
FIXED = np.arange(WIDTH) < GIVEN[:, None]


def task_of(shift=True, eos=(), blocks=BlockSpec(SIZE), **settings):
    settings = {"policy": "confidence", "temperature": 0.8} | settings
    return SamplingSpec(SamplerConfig(**settings), MASK, shift, eos, bool(eos), blocks=blocks)


def states_of(spec, kind="llama", rows=slice(None)):
    arrays = TOKENS[rows], FIXED[rows], LENGTHS[rows], keys_of(4)[rows]
    return list(loop.stream(tiny(kind), *arrays, spec))


@functools.partial(jax.jit, static_argnames=("kind", "shift", "blocks"))
def uncached(tokens, kind, shift, blocks):
    """Log-probabilities [batch, length, vocab] for every position, from one pass over noised copies and clean ones."""
    padding = jnp.arange(WIDTH) >= LENGTHS[:, None]
    mask = blocks.training_mask(WIDTH).with_segments(padding)
    hidden = tiny(kind).hidden(jnp.tile(tokens, 2), mask, positions=jnp.arange(2 * WIDTH) % WIDTH)
    noised, clean = jnp.split(hidden, 2, axis=1)
    if shift:
        opens = (jnp.arange(WIDTH) % SIZE == 0)[:, None]
        noised = jnp.where(opens, jnp.roll(clean, 1, axis=1), jnp.roll(noised, 1, axis=1))
    return jax.nn.log_softmax(tiny(kind).unembed(noised).at[:, :, MASK].set(-jnp.inf))


@pytest.mark.parametrize("kind, shift, clean", [
    ("llama", True, "causal"), ("gpt2", True, "causal"), ("window", True, "causal"), ("llama", False, "causal"),
    ("llama", True, "block_bidirectional"), ("gpt2", False, "block_bidirectional"), ("window", True, "block_bidirectional")])
def test_what_is_remembered_is_what_would_be_computed(kind, shift, clean):
    """At every step of every row, what is revealed and how likely it is are those of the whole row computed anew."""
    blocks = BlockSpec(SIZE, clean)
    for before, after in itertools.pairwise(states_of(task_of(shift, blocks=blocks, temperature=0.0, num_steps=20),
                                                      kind)):
        expected, revealed = uncached(before.tokens, kind, shift, blocks), np.asarray(before.masked & ~after.masked)
        np.testing.assert_array_equal(after.tokens[revealed], expected.argmax(axis=-1)[revealed])
        np.testing.assert_allclose(after.confidence[revealed], expected.max(axis=-1)[revealed], atol=2e-4)
        assert revealed.any()


def test_rows_do_not_wait_for_each_other_nor_know_of_each_other():
    spec = task_of(num_steps=12)
    together = states_of(spec)[-1]
    blocks = np.array([state.block for state in states_of(spec)])
    assert (np.ptp(blocks[:3], axis=1) > 0).all()
    for row in range(4):
        alone = states_of(spec, rows=slice(row, row + 1))[-1]
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
        assert together.steps[row] == alone.steps[0]


@pytest.mark.parametrize("policy", ["random", "random_exact", "first_hitting", "margin", "entropy", "threshold"])
def test_every_policy_fills_block_after_block(policy):
    settings = {} if policy in ("first_hitting", "threshold") else {"num_steps": 9}
    states = states_of(task_of(policy=policy, **settings))
    gaps = np.asarray(states[0].masked)
    for before, after in itertools.pairwise(states):
        revealed = np.asarray(before.masked & ~after.masked)
        for row in range(4):
            blocks = np.flatnonzero(revealed[row]) // SIZE
            assert (blocks == np.asarray(before.block)[row]).all()
    assert not states[-1].masked.any() and (np.asarray(states[-1].tokens) != MASK)[gaps].all()
    np.testing.assert_array_equal(np.where(gaps, 0, states[-1].tokens), np.where(gaps, 0, TOKENS))
    if "num_steps" in settings:
        assert (np.asarray(states[-1].steps) <= 9).all() and states[-1].steps[0] == 9


def test_a_threshold_of_nothing_takes_one_step_a_block():
    last = states_of(task_of(policy="threshold", threshold=1e-9))[-1]
    expected = [-(-length // SIZE) - given // SIZE for length, given in zip(LENGTHS, GIVEN, strict=True)]
    np.testing.assert_array_equal(last.steps, expected)


def test_blocks_of_one_token_are_the_parents_decoding():
    ours = states_of(task_of(blocks=BlockSpec(1), temperature=0.0))[-1]
    parents = states_of(task_of(blocks=None, policy="autoregressive", temperature=0.0))[-1]
    np.testing.assert_array_equal(ours.tokens, parents.tokens)
    np.testing.assert_allclose(ours.confidence, parents.confidence, atol=2e-4)


def test_a_row_ends_with_its_text():
    """Whatever is revealed first is declared to be the end: nothing behind it is looked for."""
    plain = states_of(task_of(num_steps=20))[-1]
    first = int(np.asarray(plain.tokens)[0, 5])
    states = states_of(task_of(num_steps=20, eos=(first,)))
    tokens, steps = np.asarray(states[-1].tokens), np.asarray(states[-1].steps)
    end = int(np.argmax((tokens[0] == first) & ~FIXED[0]))
    assert (tokens[0, end:] == first).all() and steps[0] < np.asarray(plain.steps)[0]


@pytest.mark.parametrize("settings, message", [
    ({"block_length": 8}, "leave block_length out"), ({"cfg_scale": 1.0}, "leave cfg_scale out"),
    ({"block_length": 8, "cache": "dual"}, "leave block_length out")])
def test_settings_of_other_models_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        states_of(task_of(**settings))


def test_a_gap_with_text_behind_it_is_refused():
    fixed = np.arange(WIDTH) != 5
    with pytest.raises(ConfigError, match="does not see what stands behind a gap"):
        loop.sample(tiny("llama"), TOKENS, np.broadcast_to(fixed, TOKENS.shape), LENGTHS, keys_of(4), task_of())
