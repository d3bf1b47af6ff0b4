"""Generation, greedy checks and free texts against the sampler and plain computations."""


import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dlm_jax import AttentionMask
from dlm_jax.diffusion import DiffusionSpec
from dlm_jax.errors import ConfigError, DataError
from dlm_jax.evaluation.causal_scoring import autoregressive_score, score_and_is_greedy
from dlm_jax.evaluation.eval_model import GenerationRequest, Pair
from dlm_jax.evaluation.generation import make_generate, make_is_greedy
from dlm_jax.random import example_keys
from dlm_jax.sampling import SamplerConfig
from dlm_jax.sampling.batching import SamplingStats
from tests.evaluation.full_logits import log_probabilities
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


def test_generation_is_independent_of_other_requests(tokenizer):
    requests = [GenerationRequest(text_of([1, 2]), "", range(4, 5), 0),
                GenerationRequest(text_of([5]), text_of([7, 8]), range(3, 4), 1),
                GenerationRequest(text_of(range(20)), "", range(4, 5), 2),
                GenerationRequest(text_of([5]), text_of([9]), range(2, 5), 3)]
    settings = {"temperature": 0.7, "num_steps": 3}
    generate = writer(tokenizer, batch_size=2)
    together = generate(requests, **settings)
    assert together == [generate([request], **settings)[0] for request in requests]
    assert len(together[1]) == 3 and 2 <= len(together[3]) <= 4
    row = np.array([[BOS, 5, 0, 0, 0, 7, 8]])
    fixed = np.array([[1, 1, 0, 0, 0, 1, 1]], bool)
    keys = example_keys(3, jnp.array([1], jnp.uint32))
    expected = run_sampler(tiny("gpt2"), row, fixed, keys=keys, eos=EOS, policy="confidence", **settings).tokens[0, 2:5]
    assert together[1] == tokenizer.decode(expected, skip_special_tokens=True)


def test_number_of_steps_is_the_samplers_unless_given(tokenizer):
    stats = SamplingStats()
    generate = make_generate(tiny("gpt2"), tokenizer, SamplerConfig(num_steps=3), diffusion=DiffusionSpec(MASK),
                             bos_token_id=BOS, eos_token_id=None, stats=stats)
    request = [GenerationRequest(text_of([1, 2]), "", range(6, 7))]
    passes = [0]
    for num_steps in (None, 2):
        generate(request, temperature=0.0, num_steps=num_steps)
        passes.append(stats.passes)
    assert np.diff(passes).tolist() == [3, 2]


@pytest.mark.parametrize("policy", ["confidence", "autoregressive"])
def test_samples_have_their_own_random_numbers(tokenizer, policy):
    before = text_of([1, 2])
    requests = [GenerationRequest(before, "", range(6, 7), item, sample) for item in range(2) for sample in range(3)]
    settings = {"temperature": 1.0, "num_steps": 3}
    generate = writer(tokenizer, policy=policy, batch_size=2)
    texts = generate(requests, **settings)
    assert len(set(texts)) == 6
    # Of other batch sizes one policy is enough: rows are batched before a policy is chosen.
    other = writer(tokenizer, policy=policy, batch_size=1 if policy == "autoregressive" else 2)
    assert texts == [other([request], **settings)[0] for request in requests]
    alone = [GenerationRequest(before, "", range(6, 7), item) for item in range(2)]
    assert generate(alone, **settings) == texts[::3]  # sample 0 is the only sample


def test_samples_share_the_gap_length(tokenizer, monkeypatch):
    asked = []

    def infer(model, texts, *arguments, **settings):
        asked.extend(texts)
        return [[text[0], 3, text[2]] for text in texts]

    monkeypatch.setattr("dlm_jax.evaluation.generation.infer_gap_lengths", infer)
    requests = [GenerationRequest(text_of([5]), text_of([9]), range(2, 5), item, sample)
                for item in range(2) for sample in range(3)]
    texts = writer(tokenizer, batch_size=2)(requests, temperature=1.0, num_steps=3)
    assert asked == [[requests[0].before, range(2, 5), requests[0].after]] * 2  # once per item
    assert max(map(len, texts)) == 3 and len(set(texts)) > 2  # an end of text has no letter


def test_long_texts_around_a_gap_are_cut_at_their_far_ends(tokenizer):
    tokens = np.random.default_rng(1).integers(0, 58, 60)
    generate = writer(tokenizer, batch_size=2)  # the model takes 40 tokens; a gap of 9 leaves 30

    def pair(cut, shortened, lengths=range(9, 10)):
        requests = [GenerationRequest(text_of(tokens[slice(*before)]), text_of(tokens[slice(*after)]), lengths)
                    for before, after in (cut, shortened)]
        return generate(requests, temperature=0.0, num_steps=3)

    for cut, shortened in ((((0, 30), (30, 60)), ((15, 30), (30, 45))), (((0, 5), (5, 60)), ((0, 5), (5, 30))),
                           (((0, 55), (55, 60)), ((30, 55), (55, 60)))):
        first, second = pair(cut, shortened)
        assert first == second
    first, second = pair(((0, 30), (30, 60)), ((15, 30), (30, 45)), range(8, 10))  # room for the longest
    assert first == second
    with pytest.raises(ConfigError, match="40"):
        pair(((0, 9), (0, 9)), ((0, 9), (0, 9)), range(40, 41))


def test_without_bos(tokenizer):
    request = GenerationRequest(text_of([5, 6]), "", range(3, 4), 0)
    found, = writer(tokenizer, keep_bos=False)([request], temperature=0.0, num_steps=None)
    expected = run_sampler(tiny("gpt2"), [[5, 6, 0, 0, 0]], np.array([[1, 1, 0, 0, 0]], bool), eos=EOS, stop=True,
                   policy="confidence", temperature=0.0).tokens[0, 2:].tolist()
    expected = expected[: expected.index(EOS)] if EOS in expected else expected
    assert found == tokenizer.decode(expected, skip_special_tokens=True)


def test_long_prompt_is_cut_from_the_left(tokenizer):
    tokens = list(np.random.default_rng(0).integers(0, 58, 60))
    generate = writer(tokenizer, policy="autoregressive")  # the model takes 40
    settings = {"temperature": 0.0, "num_steps": 7}  # an autoregressive model ignores the steps
    text, = generate([GenerationRequest(text_of(tokens), "", range(10, 11))], **settings)
    assert text == generate([GenerationRequest(text_of(tokens[-29:]), "", range(10, 11))], **settings)[0]
    with pytest.raises(ConfigError, match="40"):
        generate([GenerationRequest(text_of(tokens), "", range(40, 41))], **settings)


CONTEXTS = ["The little girl was", "", "Tom"]
LENGTHS = [1, 2, 4]


def generate_left_to_right(lm, context, length):
    row = list(context)
    for _ in range(length):
        row.append(int(log_probabilities(lm.model, [row], AttentionMask.causal())[0, -1].argmax()))
    return row[len(context):]


def generate_by_confidence(lm, context, length):
    row = np.array([*context, *[lm.mask_token_id] * length])
    masked = np.arange(len(row)) >= len(context)
    while masked.any():
        logits = log_probabilities(lm.model, [row], AttentionMask.bidirectional())[0, :-1]  # of positions 1, 2, ...
        logits[:, lm.mask_token_id] = -np.inf
        share = np.exp(logits - logits.max(axis=1, keepdims=True))
        best = np.where(masked[1:], (share / share.sum(axis=1, keepdims=True)).max(axis=1), -1).argmax() + 1
        row[best], masked[best] = logits[best - 1].argmax(), False
    return row[len(context):].tolist()


@pytest.mark.parametrize("autoregressive", [True, False])
def test_is_greedy(lm, autoregressive):
    generate, bos = generate_left_to_right if autoregressive else generate_by_confidence, lm.pretrained.bos_token_id
    pairs, expected = [], []
    for context, length in zip(CONTEXTS, LENGTHS, strict=True):
        tokens = lm.tokenizer.encode(context)
        greedy = generate(lm, [bos, *tokens], length)
        for place in (None, 0, length - 1):
            changed = [token + (n == place) for n, token in enumerate(greedy)]
            pairs.append(Pair(tuple(tokens), tuple(changed)))
            expected.append(place is None)
    if autoregressive:
        both = score_and_is_greedy(lm.model, bos_token_id=bos, batch_size=5)

        def is_greedy(pairs):
            scores, found = both(pairs)
            np.testing.assert_allclose(scores, autoregressive_score(lm.model, bos_token_id=bos)(pairs), rtol=1e-5)
            return found.tolist()
    else:
        is_greedy = make_is_greedy(lm.model, diffusion=lm.diffusion, bos_token_id=bos, batch_size=5)
    assert is_greedy(pairs) == expected and is_greedy(pairs[::-1]) == expected[::-1] and is_greedy([]) == []


def test_is_greedy_refuses_long_pairs(lm):
    greedy = make_is_greedy(lm.model, diffusion=lm.diffusion)
    with pytest.raises(DataError, match="text 0"):
        greedy([Pair((), (5,))])
    with pytest.raises(DataError, match="0"):
        greedy([Pair((1,) * lm.config.max_length, (5,))])
