"""What is compiled: one program for like batches, and none that holds the logits of a whole canvas."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlm_jax.sampling import POLICIES, SamplerConfig, SamplingSpec, loop, pad_rows
from dlm_jax.sampling.text import GAP
from tests.sampling.tools import MASK, SETTINGS, keys_of, run, tiny


@pytest.mark.parametrize("name", ["random in blocks", "threshold, prefix cache", "autoregressive, end of text"])
def test_another_prompt_of_the_same_bucket_and_another_seed_compile_nothing(name):
    kind, settings = next(rest for known, *rest in SETTINGS if known == name)
    compiled = []
    for seed, prompts in enumerate(([3, 17], [9, 1], [18, 11])):
        padded = pad_rows([[1] * prompt + [GAP] * 14 for prompt in prompts], 128)
        out = run(tiny(kind), padded.tokens, padded.fixed, padded.lengths, keys=keys_of(2, seed), **settings)
        assert not (out.tokens[~padded.fixed] == MASK).any()
        compiled.append(loop._sample._cache_size())
    assert len(set(compiled)) == 1


@pytest.mark.parametrize("config", [
    *[SamplerConfig(policy, num_steps=16 if POLICIES[policy].needs_num_steps else None) for policy in POLICIES],
    SamplerConfig("confidence", block_length=32, cache="dual"),
    SamplerConfig("random", num_steps=16, block_length=32, cfg_scale=1.0, repetition_penalty=1.2, cache="prefix"),
], ids=lambda config: f"{config.policy} {config.block_length or ''}")
def test_logits_never_exist_for_the_whole_canvas(config):
    batch, length, vocab = 4, 128, 61
    lengths = jnp.full(batch, length)
    spec = SamplingSpec(config, MASK, True, prompt_width=32)
    program = loop._sample.lower(*nnx.split(tiny("llama")), jnp.zeros((batch, length), int),
                                 jnp.zeros((batch, length), bool), lengths, keys_of(batch), spec).as_text()
    rows = [np.prod([int(size) for size in shape[:-1].split("x")])
            for shape in re.findall(rf"tensor<((?:\d+x)+){vocab}xf32>", program)]
    assert rows and max(rows) <= batch * length / 4


def test_the_head_runs_once_for_all_that_a_step_reveals_by_chance():
    """Told by the program's own count of operations: with the steps, the head's work falls as the share of a step."""
    def head_rows(num_steps):
        config = SamplerConfig("random_exact", num_steps=num_steps)
        program = loop._sample.lower(*nnx.split(tiny("llama")), jnp.zeros((1, 128), int), jnp.zeros((1, 128), bool),
                                     jnp.full(1, 128), keys_of(1), SamplingSpec(config, MASK, True)).as_text()
        return max(int(rows) for rows in re.findall(r"tensor<1x(\d+)x61xf32>", program))

    assert head_rows(4) >= 32
    assert head_rows(64) <= head_rows(4) <= 64


def test_inputs_of_any_integer_type_share_a_program():
    tokens, fixed = np.ones((2, 32), np.int64), np.arange(32) < np.array([[4], [9]])
    before = None
    for kind in (np.int64, np.int32, np.uint16):
        run(tiny("llama"), tokens.astype(kind), fixed, np.array([20, 32], kind), policy="confidence", num_steps=2)
        assert before in (None, loop._sample._cache_size())
        before = loop._sample._cache_size()
