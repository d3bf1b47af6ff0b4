import pytest

from dlm_jax.errors import ConfigError
from dlm_jax.sampling import POLICIES, SamplerConfig, sampler_config

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("settings", "words"), [
    (dict(policy="best"), "unknown reveal policy 'best'; choose one of random, .*confidence"),
    (dict(step_schedule="square"), "unknown step schedule 'square'; choose one of linear, cosine"),
    (dict(cache="triple"), "unknown cache 'triple'; choose one of none, prefix, dual"),
    (dict(num_steps=0), "num_steps must be at least 1, got 0"),
    (dict(block_length=-3), "block_length must be at least 1, got -3"),
    (dict(top_k=0), "top_k must be at least 1"),
    (dict(block_length=8, cache="dual", cache_refresh_interval=0), "cache_refresh_interval must be at least 1"),
    (dict(temperature=-0.1), "temperature must be 0 .* or positive, got -0.1"),
    (dict(temperature=NAN), "temperature"),
    (dict(temperature=INF), "temperature"),
    (dict(top_p=0.0), r"top_p must lie in \(0, 1\], got 0.0"),
    (dict(top_p=1.5), r"top_p must lie in \(0, 1\]"),
    (dict(policy="threshold", threshold=0.0), r"threshold must lie in \(0, 1\]"),
    (dict(policy="threshold", threshold=1.1), r"threshold must lie in \(0, 1\]"),
    (dict(remask=1.0), r"remask must lie in \[0, 1\)"),
    (dict(remask=-0.1), "remask"),
    (dict(repetition_penalty=0.0), "repetition_penalty must be positive"),
    (dict(repetition_penalty=NAN), "repetition_penalty must be positive"),
    (dict(eos_penalty=-1.0), "eos_penalty must be 0 or positive"),
    (dict(eos_penalty=NAN), "eos_penalty must be 0 or positive"),
    (dict(cfg_scale=-0.5), "cfg_scale must be 0 or positive"),
    (dict(cfg_scale=INF), "cfg_scale must be 0 or positive"),
    (dict(policy="confidence", threshold=0.9), "threshold belongs to the policy threshold, .* is confidence"),
    (dict(policy="random", remask=0.1), "remask needs a policy that keeps to counts, such as random_exact"),
    (dict(policy="first_hitting", step_schedule="cosine"), "the cosine step_schedule needs num_steps, and first_hitting"),
    (dict(policy="threshold", step_schedule="cosine"), "the cosine step_schedule needs num_steps, and threshold"),
    (dict(cache="prefix"), "the prefix cache keeps what lies outside a block; set block_length"),
    (dict(block_length=8, cache_refresh_interval=2), "cache_refresh_interval belongs to a cache; set cache to prefix or dual"),
    *[(dict(policy="autoregressive") | {name: value}, f"autoregressive decoding has no {name}; leave it out")
      for name, value in dict(num_steps=8, step_schedule="cosine", block_length=4, threshold=0.5, remask=0.1, cfg_scale=1.0,
                              cache="dual", cache_refresh_interval=2).items()],
], ids=lambda value: ",".join(map(str, value)) if isinstance(value, dict) else "")
def test_impossible_settings_are_refused_in_one_sentence(settings, words):
    with pytest.raises(ConfigError, match=words) as refusal:
        SamplerConfig(**settings)
    assert "\n" not in str(refusal.value)


def test_an_unknown_setting_is_named_with_those_there_are():
    with pytest.raises(ConfigError, match="there is no sampling setting 'top_q'; the settings are policy, num_steps,"):
        sampler_config(policy="random", top_q=0.9)
    assert sampler_config(top_p=0.9) == SamplerConfig(top_p=0.9)


def test_settings_in_force():
    steps = {policy: SamplerConfig(policy).steps for policy in POLICIES}
    assert {policy for policy, number in steps.items() if number is None} == {"first_hitting", "threshold",
                                                                               "autoregressive"}
    assert set(steps.values()) == {None, 64}
    assert SamplerConfig("threshold", num_steps=5).steps == SamplerConfig("random", num_steps=5).steps == 5
    assert SamplerConfig("threshold").reveal_threshold == 0.9
    assert SamplerConfig("threshold", threshold=0.4).reveal_threshold == 0.4
    assert SamplerConfig("confidence").reveal_threshold is None


def test_the_widest_settings_are_accepted():
    SamplerConfig("random_exact", 10_000, "cosine", 32, None, 0.99, 0.0, 1.0, 1, 5.0, INF, 10.0, "dual", 1)
    SamplerConfig("threshold", 3, "cosine", threshold=1.0)
    SamplerConfig("autoregressive", temperature=0.7, top_p=0.9, top_k=40, repetition_penalty=1.1, eos_penalty=INF)
