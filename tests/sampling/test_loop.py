import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from dlm_jax.models import ModelConfig, Transformer
from dlm_jax.sampling import POLICIES, SamplerConfig, Task, sample
from dlm_jax.sampling.loop import _sample
from tests.sampling.toys import Joint, Toy, confidence_law, random_law

ROWS = 20_000


def keys_of(count, seed=0):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))


def run(network, tokens, fixed, lengths=None, *, keys=None, mask=None, shift=True, **config):
    tokens = np.asarray(tokens)
    lengths = np.full(len(tokens), tokens.shape[1]) if lengths is None else lengths
    keys = keys_of(len(tokens)) if keys is None else keys
    return np.asarray(sample(network, tokens, fixed, lengths, keys, Task(SamplerConfig(**config), mask, shift)).tokens)


def assert_follows(law, samples):
    """Chi-square of the drawn rows against the enumerated law, outcomes of few expected counts taken together."""
    drawn = {}
    for row in map(tuple, samples.tolist()):
        drawn[row] = drawn.get(row, 0) + 1
    assert all(law[row] > 0 for row in drawn)
    expected = np.array([p * len(samples) for p in law.values()])
    observed = np.array([drawn.get(row, 0) for row in law])
    rare = expected < 10
    expected, observed = (np.append(x[~rare], x[rare].sum()) for x in (expected, observed))
    keep = expected > 0
    assert stats.chisquare(observed[keep], expected[keep], sum_check=False).pvalue > 1e-4


@pytest.mark.parametrize(("config", "law", "shift"), [
    ({"policy": "random", "num_steps": 2}, lambda j: random_law(j, 2), True),
    ({"policy": "random", "num_steps": 3, "temperature": 0.7, "top_p": 0.8},
     lambda j: random_law(j, 3, temperature=0.7, top_p=0.8), True),
    ({"policy": "random", "num_steps": 1000}, lambda j: j.law(), False),
    ({"policy": "confidence", "num_steps": 2}, lambda j: confidence_law(j, [1, 2]), False),
    ({"policy": "confidence", "num_steps": 64, "top_k": 2}, lambda j: confidence_law(j, [1, 1, 1], top_k=2), True),
], ids=["random-2", "random-3-truncated", "random-one-at-a-time", "confidence-2", "confidence-truncated"])
def test_samples_follow_the_enumerated_law(config, law, shift):
    joint = Joint(vocab=3, length=3, seed=1)
    fixed = np.tile([True, False, False, False], (ROWS, 1))
    out = run(Toy(joint.logits, shift), np.zeros((ROWS, 4), int), fixed, mask=joint.mask, shift=shift, **config)
    assert_follows(law(joint), out[:, 1:])


def masked_count(tokens):
    """Predicts at each position how many masks the row still holds, so that the output tells when it was revealed."""
    count = (tokens == 30).sum(axis=1)
    return jnp.broadcast_to(10 * jax.nn.one_hot(count, 31)[:, None], (*tokens.shape, 31))


@pytest.mark.parametrize(("num_steps", "counts"), [(1, [20]), (3, [6, 7, 7]), (8, [2, 3] * 4), (99, [1] * 20)])
def test_the_confidence_policy_reveals_as_many_as_scheduled(num_steps, counts):
    tokens, fixed = np.zeros((2, 24), int), np.ones((2, 24), bool)
    fixed[0, 2:22] = False
    fixed[1, 5:9] = False
    out = run(Toy(masked_count), tokens, fixed, mask=30, policy="confidence", num_steps=num_steps, temperature=0.0)
    assert [int((out[0] == left).sum()) for left in 20 - np.cumsum([0, *counts[:-1]])] == counts
    assert np.bincount(out[1, 5:9]).max() <= -(-4 // num_steps)  # a row with fewer gaps has its own schedule


def test_the_random_policy_reveals_in_the_release_s_proportions():
    rows, num_steps = 400, 5
    fixed = np.tile(np.arange(24) < 4, (rows, 1))
    out = run(Toy(masked_count), np.zeros((rows, 24), int), fixed, mask=30, policy="random", num_steps=num_steps,
              temperature=0.0)
    first = np.array([(row == 20).sum() for row in out[:, 4:]])  # revealed in the step that has 20 masks before it
    expected = stats.binom(20, 1 / num_steps).pmf(np.arange(1, 11)) / (1 - (1 - 1 / num_steps) ** 20)
    # A step that reveals nothing leaves no trace, hence the law given at least one.
    assert stats.chisquare(np.bincount(first, minlength=12)[1:11], expected * rows, sum_check=False).pvalue > 1e-4
    assert max(len(set(row)) for row in out[:, 4:].tolist()) <= num_steps


@pytest.fixture(scope="module")
def tiny():
    config = ModelConfig("llama", vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
                         mlp_size=48, max_length=128, initializer_range=0.3)
    return Transformer(config, rngs=nnx.Rngs(0))


def problem(seed=0, batch=4, length=40):
    rng = np.random.default_rng(seed)
    tokens, fixed = rng.integers(0, 60, (batch, length)), rng.random((batch, length)) < 0.4
    return tokens, fixed, np.array([40, 17, 29, 2])[:batch]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_row_does_not_depend_on_batch_or_padding(tiny, policy):
    tokens, fixed, lengths = problem()
    config = {"mask": 60, "policy": policy, "num_steps": 6, "temperature": 0.8, "top_p": 0.9}
    together = run(tiny, tokens, fixed, lengths, **config)
    for row in np.flatnonzero(lengths <= 32):
        one, length = slice(row, row + 1), lengths[row]
        alone = run(tiny, tokens[one, :32], fixed[one, :32], lengths[one], keys=keys_of(4)[one], **config)
        np.testing.assert_array_equal(alone[0, :length], together[row, :length])


@pytest.mark.parametrize(("policy", "temperature"), [("random", 1.0), ("confidence", 0.0)])
def test_fixed_tokens_and_padding_stay_and_the_mask_is_never_written(tiny, policy, temperature):
    tokens, fixed, lengths = problem()
    tokens[0, 3], fixed[0, 3] = 60, True  # the mask's id as a given token is a token
    out = run(tiny, tokens, fixed, lengths, mask=60, policy=policy, num_steps=5, temperature=temperature)
    kept = fixed | (np.arange(40) >= lengths[:, None]) | (np.arange(40) == 0)
    np.testing.assert_array_equal(out[kept], tokens[kept])
    assert not (out[~kept] == 60).any()


def test_other_keys_give_other_rows_and_the_same_key_the_same(tiny):
    tokens, fixed, lengths = problem(batch=1)
    out = [run(tiny, tokens, fixed, lengths, keys=keys_of(1, seed), mask=60) for seed in (0, 0, 1)]
    assert (out[0] == out[1]).all()
    assert (out[0] != out[2]).any()


@pytest.mark.parametrize("policy", POLICIES)
def test_logits_never_exist_for_the_whole_canvas(tiny, policy):
    graphdef, params = nnx.split(tiny)
    config = SamplerConfig(policy, num_steps=16)
    program = _sample.lower(graphdef, params, jnp.zeros((2, 128), int), jnp.zeros((2, 128), bool),
                            jnp.full(2, 128), keys_of(2), 60, True, config).as_text()
    assert "tensor<2x16x61xf32>" in program or "tensor<2x8x61xf32>" in program
    assert "x128x61xf32" not in program
