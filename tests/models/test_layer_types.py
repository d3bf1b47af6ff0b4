"""Layers with and without a sliding window in one scan: caches, backends, rematerialization."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from dlm_jax.attention import AttentionMask
from dlm_jax.errors import ConfigError
from dlm_jax.models import Compute, ModelConfig
from dlm_jax.models.layers import Cache
from tests.attention.conftest import pretend_cudnn  # noqa: F401
from tests.attention.parity import lowered_cudnn_calls
from tests.models.test_transformer import CAUSAL, TOKENS, build, hidden, logits

GEMMA = ModelConfig("gemma3_text", vocab_size=61, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2,
                    head_dim=16, mlp_size=48, max_length=24, norm="zero_centered_rms", post_norms=True, qk_norm=True,
                    activation="gelu_tanh", tie_embeddings=True, scale_embeddings=True, sliding_window=4,
                    full_attention_layers=(1,), sliding_rope_theta=100.0, query_pre_attn_scalar=9.0,
                    attention_softcap=2.0, logit_softcap=3.0)
BIDIRECTIONAL = AttentionMask.bidirectional()


def reach(config, mask, at=10):
    """Returns the positions whose logits a token changes."""
    model = build(config)
    moved = logits(model, TOKENS, mask) - logits(model, TOKENS.at[:, at].add(1), mask)
    return np.flatnonzero(jnp.abs(moved).max(axis=(0, 2)) > 1e-6)


@pytest.mark.parametrize(("full", "expected"), [((), range(7, 14)), ((0,), range(20))])
def test_window_is_symmetric_and_in_its_layers_alone(full, expected):
    config = dataclasses.replace(GEMMA, num_layers=1, full_attention_layers=full)
    np.testing.assert_array_equal(reach(config, BIDIRECTIONAL), expected)


def test_windows_add_up_over_layers():
    assert reach(dataclasses.replace(GEMMA, num_layers=2, full_attention_layers=()), CAUSAL).max() == 16
    assert reach(dataclasses.replace(GEMMA, num_layers=2, full_attention_layers=(1,)), CAUSAL).max() == 19


def test_types_that_do_not_differ():
    one_type = dataclasses.replace(GEMMA, sliding_window=None, full_attention_layers=(), rope_theta=100.0)
    wide = dataclasses.replace(GEMMA, sliding_window=99, rope_theta=100.0)
    np.testing.assert_allclose(logits(build(wide), TOKENS, CAUSAL), logits(build(one_type), TOKENS, CAUSAL), atol=1e-5)


def test_exceptions_to_no_window_are_refused():
    with pytest.raises(ConfigError, match="full_attention_layers.*sliding_window"):
        dataclasses.replace(GEMMA, sliding_window=None)


def check_cached_rows(config):
    """Rows that are read in two halves have the states of entire rows."""
    model, cache = build(config), Cache.empty(config, 3, 20, "float32")
    run = jax.jit(type(model).cached_hidden)
    expected = hidden(model, TOKENS, CAUSAL)
    for half in (slice(0, 10), slice(10, 20)):
        positions = jnp.broadcast_to(jnp.arange(20)[half], (3, 10))
        found, cache = run(model, TOKENS[:, half], CAUSAL, positions, cache)
        np.testing.assert_allclose(found, expected[:, half], atol=5e-5)


def test_cached_rows_are_exact():
    check_cached_rows(GEMMA)


def test_remat_changes_nothing():
    loss = lambda m: jnp.mean(jax.nn.logsumexp(m(TOKENS, BIDIRECTIONAL), axis=-1))  # noqa: E731
    expected, *others = (jax.tree.leaves(jax.jit(jax.grad(loss))(build(GEMMA, compute=Compute(remat=remat))))
                         for remat in ("none", "dots", "full"))
    for found in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def gradients(config, attention):
    compute = Compute("bfloat16", attention=attention)
    return lambda: jax.grad(lambda m: jnp.mean(m(TOKENS, BIDIRECTIONAL)))(build(config, compute=compute))


@pytest.mark.usefixtures("pretend_cudnn")
def test_lowers_for_tpu_and_gpu():
    """Both kinds of layers by the platform's kernel; cuDNN has no soft cap."""
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)):
        text = jax.jit(gradients(GEMMA, "tpu")).trace().lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 6
    calls = lowered_cudnn_calls(gradients(dataclasses.replace(GEMMA, attention_softcap=None), "cudnn"))
    assert len(calls) >= 4 and all("fmha" in name for name, _ in calls)
