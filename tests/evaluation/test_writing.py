"""Writing at requests: as the sampler would for each alone, in its place, and within the model's length."""

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dlm_jax.diffusion import DiffusionSpec
from dlm_jax.errors import ConfigError
from dlm_jax.evaluation.eval_model import GenerationRequest
from dlm_jax.evaluation.generation import make_generate
from dlm_jax.random import example_keys
from dlm_jax.sampling import SamplerConfig
from tests.sampling.tiny_models import EOS, MASK, run_sampler, tiny

BOS = 58


@pytest.fixture(scope="module")
def tokenizer():
    """A letter is a token; most of the 61 are those of Greek and Russian."""
    letters = {chr(945 + n): n for n in range(58)} | {"<b>": BOS, "<e>": EOS, "<m>": MASK}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<m>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<b>", eos_token="<e>")


def text_of(tokens):
    return "".join(chr(945 + token) for token in tokens)


def writer(tokenizer, kind="gpt2", policy="confidence", **settings):
    return make_generate(tiny(kind), tokenizer, SamplerConfig(policy=policy), diffusion=DiffusionSpec(MASK),
                         bos_token_id=BOS, eos_token_id=EOS, seed=3, **settings)


def test_each_blank_is_written_as_if_alone(tokenizer):
    requests = [GenerationRequest(text_of([1, 2]), "", range(4, 5), 0),
                GenerationRequest(text_of([5]), text_of([7, 8]), range(3, 4), 1),
                GenerationRequest(text_of(range(20)), "", range(4, 5), 2),
                GenerationRequest(text_of([5]), text_of([9]), range(2, 5), 3)]
    settings = {"temperature": 0.7, "num_steps": 3}
    together = writer(tokenizer, batch_size=3)(requests, **settings)
    assert together == [writer(tokenizer, batch_size=1)([request], **settings)[0] for request in requests]
    assert len(together[1]) == 3 and 2 <= len(together[3]) <= 4
    row = np.array([[BOS, 5, 0, 0, 0, 7, 8]])
    fixed = np.array([[1, 1, 0, 0, 0, 1, 1]], bool)
    keys = example_keys(3, jnp.array([1], jnp.uint32))
    expected = run_sampler(tiny("gpt2"), row, fixed, keys=keys, eos=EOS, policy="confidence", **settings).tokens[0, 2:5]
    assert together[1] == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("policy", ["confidence", "autoregressive"])
def test_samples_have_random_numbers_of_their_own(tokenizer, policy):
    before = text_of([1, 2])
    requests = [GenerationRequest(before, "", range(6, 7), item, sample) for item in range(2) for sample in range(3)]
    settings = {"temperature": 1.0, "num_steps": None}
    texts = writer(tokenizer, policy=policy, batch_size=4)(requests, **settings)
    assert len(set(texts)) == 6
    assert texts == [writer(tokenizer, policy=policy, batch_size=1)([request], **settings)[0] for request in requests]
    alone = [GenerationRequest(before, "", range(6, 7), item) for item in range(2)]
    assert writer(tokenizer, policy=policy)(alone, **settings) == texts[::3]  # the first is what it was alone


def test_samples_of_a_gap_share_its_length(tokenizer, monkeypatch):
    asked = []

    def settle(model, texts, *arguments, **settings):
        asked.extend(texts)
        return [[text[0], 3, text[2]] for text in texts]

    monkeypatch.setattr("dlm_jax.evaluation.generation.infer_gap_lengths", settle)
    requests = [GenerationRequest(text_of([5]), text_of([9]), range(2, 5), item, sample)
                for item in range(2) for sample in range(3)]
    texts = writer(tokenizer)(requests, temperature=1.0, num_steps=None)
    assert asked == [[requests[0].before, range(2, 5), requests[0].after]] * 2  # an item's once
    assert max(map(len, texts)) == 3 and len(set(texts)) > 2  # an end of text has no letter


def test_texts_around_a_gap_that_are_too_long_are_cut_at_their_far_ends(tokenizer):
    tokens = list(np.random.default_rng(1).integers(0, 58, 60))
    generate = writer(tokenizer)  # the model takes 40
    settings = {"temperature": 0.0, "num_steps": None}
    both, = generate([GenerationRequest(text_of(tokens[:30]), text_of(tokens[30:]), range(9, 10))],
                     **settings)  # 30 remain
    assert [both] == generate([GenerationRequest(text_of(tokens[15:30]), text_of(tokens[30:45]), range(9, 10))],
                              **settings)
    short, = generate([GenerationRequest(text_of(tokens[:5]), text_of(tokens[5:]), range(9, 10))], **settings)
    assert [short] == generate([GenerationRequest(text_of(tokens[:5]), text_of(tokens[5:30]), range(9, 10))],
                               **settings)
    long, = generate([GenerationRequest(text_of(tokens[:55]), text_of(tokens[55:]), range(9, 10))], **settings)
    assert [long] == generate([GenerationRequest(text_of(tokens[30:55]), text_of(tokens[55:]), range(9, 10))],
                              **settings)
    # Where the length is open, there is room for the longest.
    some, = generate([GenerationRequest(text_of(tokens[:30]), text_of(tokens[30:]), range(8, 10))], **settings)
    assert [some] == generate([GenerationRequest(text_of(tokens[15:30]), text_of(tokens[30:45]), range(8, 10))],
                              **settings)
    with pytest.raises(ConfigError, match="40"):
        generate([GenerationRequest(text_of(tokens[:9]), text_of(tokens[:9]), range(40, 41))], **settings)


def test_without_bos_the_prompts_first_token_is_context(tokenizer):
    request = GenerationRequest(text_of([5, 6]), "", range(3, 4), 0)
    found, = writer(tokenizer, keep_bos=False)([request], temperature=0.0, num_steps=None)
    expected = run_sampler(tiny("gpt2"), [[5, 6, 0, 0, 0]], np.array([[1, 1, 0, 0, 0]], bool), eos=EOS, stop=True,
                   policy="confidence", temperature=0.0).tokens[0, 2:].tolist()
    expected = expected[: expected.index(EOS)] if EOS in expected else expected
    assert found == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_prompt_that_is_too_long_loses_its_beginning(tokenizer):
    tokens = list(np.random.default_rng(0).integers(0, 58, 60))
    generate = writer(tokenizer, policy="autoregressive")  # the model takes 40
    settings = {"temperature": 0.0, "num_steps": 7}  # of steps it takes no notice
    whole, = generate([GenerationRequest(text_of(tokens), "", range(10, 11))], **settings)
    assert whole == generate([GenerationRequest(text_of(tokens[-29:]), "", range(10, 11))], **settings)[0]
    with pytest.raises(ConfigError, match="40"):
        generate([GenerationRequest(text_of(tokens), "", range(40, 41))], **settings)
