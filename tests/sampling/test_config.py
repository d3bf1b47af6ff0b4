import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.errors import ConfigError
from dlm_jax.sampling import POLICIES, SamplerConfig, resolve_settings
from dlm_jax.sampling.config import log_prob, margin, negative_entropy

NAN, INF = float("nan"), float("inf")
SCORES = (log_prob, margin, negative_entropy)


@pytest.mark.parametrize(("settings", "key"), [
    (dict(policy="best"), "policy.*random, .*confidence"),
    (dict(step_schedule="square"), "step_schedule.*linear, cosine"),
    (dict(cache="triple"), "cache.*none, prefix, dual"),
    (dict(num_steps=0), "num_steps"),
    (dict(block_length=-3), "block_length"),
    (dict(top_k=0), "top_k"),
    (dict(block_length=8, cache="dual", cache_refresh_interval=0), "cache_refresh_interval"),
    *[(dict(temperature=value), "temperature") for value in (-0.1, NAN, INF)],
    *[(dict(top_p=value), "top_p") for value in (0.0, 1.5)],
    *[(dict(policy="threshold", threshold=value), "threshold") for value in (0.0, 1.1)],
    *[(dict(remask=value), "remask") for value in (1.0, -0.1)],
    *[(dict(repetition_penalty=value), "repetition_penalty") for value in (0.0, NAN)],
    *[(dict(eos_penalty=value), "eos_penalty") for value in (-1.0, NAN)],
    *[(dict(cfg_scale=value), "cfg_scale") for value in (-0.5, INF)],
    (dict(policy="confidence", threshold=0.9), "threshold.*confidence"),
    (dict(policy="random", remask=0.1), "remask.*random_exact"),
    (dict(policy="first_hitting", step_schedule="cosine"), "step_schedule.*first_hitting.*num_steps"),
    (dict(step_schedule="dream", remask=0.1), "remask"),
    (dict(step_schedule="dream", cache="dual", block_length=4), "cache"),
    (dict(policy="threshold", step_schedule="cosine"), "step_schedule.*threshold.*num_steps"),
    (dict(cache="prefix"), "cache.*block_length"),
    (dict(block_length=8, cache_refresh_interval=2), "cache_refresh_interval.*cache"),
    (dict(policy="confidence", drafter="ngram"), "drafter.*confidence"),
    *[(dict(policy="autoregressive", **drafting), "draft") for drafting in (
        dict(num_drafts=3), dict(drafter="ngram", num_drafts=0), dict(drafter=" "), dict(draft_threshold=0.5),
        dict(drafter="ngram", draft_threshold=0.5), dict(drafter="ngram", draft_vocab_size=8),
        dict(draft_vocab_size=8), dict(drafter="given", draft_threshold=1.5))],
    *[(dict(policy="autoregressive") | {name: value}, name)
      for name, value in dict(num_steps=8, step_schedule="cosine", block_length=4, threshold=0.5, remask=0.1,
                              cfg_scale=1.0, cache="dual", cache_refresh_interval=2).items()],
], ids=lambda value: ",".join(map(str, value)) if isinstance(value, dict) else "")
def test_refused_settings(settings, key):
    with pytest.raises(ConfigError, match=key) as error:
        SamplerConfig(**settings)
    assert "\n" not in str(error.value)


def test_unknown_setting_is_named():
    with pytest.raises(ConfigError, match="top_q.*num_steps"):
        resolve_settings({"policy": "random", "top_q": 0.9}, {})
    assert resolve_settings({"top_p": 0.9}, {}) == SamplerConfig(top_p=0.9)


def test_defaults_and_limits():
    steps = {policy: SamplerConfig(policy).steps for policy in POLICIES}
    assert {policy for policy, number in steps.items() if number is None} == {
        "first_hitting", "threshold", "autoregressive"}
    assert set(steps.values()) == {None, 64}
    assert SamplerConfig("threshold", num_steps=5).steps == SamplerConfig("random", num_steps=5).steps == 5
    assert SamplerConfig("threshold").reveal_threshold == 0.9
    assert SamplerConfig("threshold", threshold=0.4).reveal_threshold == 0.4
    assert SamplerConfig("confidence").reveal_threshold is None
    SamplerConfig("random_exact", 10_000, "cosine", 32, None, 0.99, 0.0, 1.0, 1, 5.0, INF, 10.0, "dual", 1)
    SamplerConfig("threshold", 3, "cosine", threshold=1.0)
    SamplerConfig("autoregressive", temperature=0.7, top_p=0.9, top_k=40, repetition_penalty=1.1, eos_penalty=INF)


def test_scores_match_their_definitions():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(9, 0.5), (4, 5))
    token = rng.integers(0, 9, (4, 5))
    logits = jnp.asarray(np.log(p) + 3, jnp.float32)
    expected = np.log(np.take_along_axis(p, token[..., None], -1)[..., 0])
    np.testing.assert_allclose(log_prob(logits, token), expected, rtol=1e-4, atol=1e-5)
    largest = np.sort(p)
    np.testing.assert_allclose(margin(logits, token), largest[..., -1] - largest[..., -2], atol=1e-6)
    np.testing.assert_allclose(negative_entropy(logits, token), (p * np.log(p)).sum(-1), atol=1e-5)


def test_scores_ignore_excluded_tokens():
    logits, token = jnp.array([[0.0, 1.0, -jnp.inf]]), jnp.array([1])
    p = np.array(jax.nn.softmax(jnp.array([0.0, 1.0])))
    for score, expected in zip(SCORES, (np.log(p[1]), p[1] - p[0], (p * np.log(p)).sum()), strict=True):
        np.testing.assert_allclose(score(logits, token), [expected], rtol=1e-6)
    logits, token = jnp.full((1, 5), -jnp.inf).at[0, 2].set(4.0), jnp.array([2])
    assert [float(score(logits, token)[0]) for score in SCORES] == [0.0, 1.0, 0.0]
