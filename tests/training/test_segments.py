"""Documents packed with segment ids train as if each had a row of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlm_jax.attention import AttentionMask
from dlm_jax.data.loader import Loader
from dlm_jax.data.rows import Rows
from dlm_jax.diffusion import ObjectiveConfig, loss_sums, noise_batch, token_nll
from dlm_jax.models import ModelConfig, Transformer
from dlm_jax.training.diffusion_loss import lm_head
from tests.training.steps import one_device

GPT2 = ModelConfig("gpt2", vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8,
                   mlp_size=64, max_length=24, norm="layer", positions="learned", gated_mlp=False,
                   activation="gelu_tanh", qkv_bias=True, out_bias=True, mlp_bias=True, tie_embeddings=True)
LLAMA = ModelConfig("llama", vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
                    mlp_size=48, max_length=24)
MASK, FIRST, SECOND = 60, 10, 10  # one length: one program


def loaded(tokens: np.ndarray, starts: tuple[int, ...] = ()):
    is_start = np.isin(np.arange(tokens.shape[1]), (0, *starts)) & np.ones(tokens.shape, bool)
    return jax.tree.map(jnp.asarray, Loader([Rows(tokens, is_start)], len(tokens), shuffle=False).batch(0))


def tokens_of(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 60, (4, FIRST + SECOND))


@functools.cache
def model_of(config):
    return Transformer(config, rngs=nnx.Rngs(0))


@functools.partial(jax.jit, static_argnames="objective")
def sums_of(model, objective, batch):
    """The sums of the loss, the cross-entropy of every token [batch, length], and the noisy batch."""
    noisy, mask = noise_batch(objective, batch, jnp.int32(3), seed=0, batch_size=4, mask_token_id=MASK)
    hidden = model.hidden(noisy.tokens, mask, positions=batch.positions)
    sums = loss_sums(hidden, *lm_head(model, one_device()), noisy)
    return sums, token_nll(hidden, model.unembed, noisy.targets), noisy


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_autoregressive_loss_of_packed_documents(config):
    model, tokens = model_of(config), tokens_of()
    objective = ObjectiveConfig(name="autoregressive")
    packed = sums_of(model, objective, loaded(tokens, (FIRST,)))[0]
    apart = [sums_of(model, objective, loaded(document))[0] for document in (tokens[:, :FIRST], tokens[:, FIRST:])]
    np.testing.assert_allclose(packed.nll, apart[0].nll + apart[1].nll, rtol=1e-5)
    assert packed.num_scored == apart[0].num_scored + apart[1].num_scored == 4 * (FIRST + SECOND - 2)


@pytest.mark.parametrize("config, anneal_steps", [(GPT2, 0), (LLAMA, 8)], ids=["gpt2", "llama, annealed"])
def test_documents_do_not_see_each_other(config, anneal_steps):
    model, objective = model_of(config), ObjectiveConfig(anneal_steps=anneal_steps)
    tokens, other = tokens_of(), tokens_of(1)
    for changed, kept in ((slice(0, FIRST), slice(FIRST + 1, None)), (slice(FIRST, None), slice(1, FIRST))):
        mixed = tokens.copy()
        mixed[:, changed] = other[:, changed]
        first, second = (jax.device_get(sums_of(model, objective, loaded(each, (FIRST,)))) for each in (tokens, mixed))
        np.testing.assert_array_equal(first[1][:, kept], second[1][:, kept])
        assert not np.array_equal(first[1], second[1])
        assert not first[2].loss_mask[:, [0, FIRST]].any()  # the first token of each is its context


def test_bound_of_packed_documents():
    model, tokens = model_of(GPT2), tokens_of()
    _, nll, noisy = sums_of(model, ObjectiveConfig(), loaded(tokens, (FIRST,)))

    @jax.jit
    def alone(model, seen, targets):
        return token_nll(model.hidden(seen, AttentionMask.bidirectional()), model.unembed, targets)

    expected = alone(model, noisy.tokens[:, FIRST:], jnp.asarray(tokens[:, FIRST:]))
    np.testing.assert_allclose(nll[:, FIRST + 1:], expected[:, 1:], rtol=2e-5)
