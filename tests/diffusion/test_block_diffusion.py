"""Block diffusion against what it must equal: the AR loss, full diffusion, and each block computed by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlm_jax.attention import AttentionMask
from dlm_jax.diffusion import (
    BlockSpec,
    HeadPlan,
    block_times,
    clean_batch,
    complementary_mask,
    concat_noisy_and_clean,
    corrupt,
    cross_entropy,
    loss_sums,
)
from dlm_jax.models import ModelConfig, Transformer
from dlm_jax.random import example_keys

ROWS, LENGTH, MASK = 3, 12, 28
SIZES = dict(vocab_size=29, hidden_size=32, num_layers=2, num_heads=4, head_dim=8, mlp_size=48, max_length=LENGTH)
CONFIGS = {
    "gpt2": ModelConfig("gpt2", **SIZES, num_kv_heads=4, norm="layer", positions="learned", gated_mlp=False,
                        tie_embeddings=True, qkv_bias=True),
    "llama": ModelConfig("llama", **SIZES, num_kv_heads=2),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, MASK, (ROWS, LENGTH)), jnp.int32)
NOISABLE = jnp.broadcast_to(jnp.arange(LENGTH) > 0, TOKENS.shape).at[1, :5].set(False)  # a prompt in the second
TIMES = jnp.array([0.3, 0.9, 0.6])


@functools.cache
def model_of(name):
    return jax.jit(lambda: Transformer(CONFIGS[name], rngs=nnx.Rngs(0)))()


logits_of = jax.jit(Transformer.__call__)


def noisy(times=TIMES):
    keys = example_keys(0, jnp.arange(ROWS))
    return jax.jit(corrupt, static_argnames="mask_token_id")(TOKENS, NOISABLE, times, keys, mask_token_id=MASK)


def copies(block_size, views=None, clean="causal", **options):
    views = views or [noisy()]
    mask = BlockSpec(block_size, clean).training_mask(LENGTH, len(views))
    return concat_noisy_and_clean(views, block_size, **options), mask


def loss_and_gradients(name, batch, mask, **options):
    graphdef, params = nnx.split(model_of(name))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params):
        model = nnx.merge(graphdef, params)
        positions = jnp.arange(batch.tokens.shape[1]) % LENGTH
        param = model.head_kernel
        sums = loss_sums(model.hidden(batch.tokens, mask, positions=positions), param[...],
                         HeadPlan(param.axes.index("vocab")), batch, **options)
        return sums.loss, sums

    (loss, sums), gradients = run(params)
    return loss, gradients, sums.num_noisable


def assert_same(one, other):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), one, other)


@pytest.mark.parametrize("name, clean, num_views", [("gpt2", "causal", 1), ("llama", "block_bidirectional", 2)])
def test_blocks_of_one_token_have_the_ar_loss(name, clean, num_views):
    """Whatever the noise: every token is predicted from the clean copy."""
    expected = loss_and_gradients(name, clean_batch(TOKENS, NOISABLE), AttentionMask.causal())
    views = [noisy(), complementary_mask(noisy(), MASK, (1 / (1 - TIMES))[:, None])][:num_views]
    assert_same(loss_and_gradients(name, *copies(1, views, clean)), expected)


@pytest.mark.parametrize("name, clean, shift", [("gpt2", "block_bidirectional", True), ("llama", "causal", False)])
def test_one_block_is_full_diffusion(name, clean, shift):
    expected = loss_and_gradients(name, noisy(), AttentionMask.bidirectional(), shift=shift)
    assert_same(loss_and_gradients(name, *copies(LENGTH, clean=clean, shift=shift), shift=shift), expected)


@pytest.mark.parametrize("clean", ["causal", "block_bidirectional"])
@pytest.mark.parametrize("shift", [True, False])
def test_each_block_is_predicted_given_earlier_clean_blocks(shift, clean):
    """Against a forward pass per block, with an explicit mask and all logits."""
    size, model, view = 5, model_of("llama"), noisy(block_times(TIMES, 5, LENGTH, low=0.0, high=1.0))
    expected = 0.0
    for start in range(0, LENGTH, size):
        stop = min(start + size, LENGTH)
        tokens = jnp.concatenate([TOKENS[:, :start], view.tokens[:, start:stop]], axis=1)
        q, k = np.indices((stop, stop))
        before = k <= q if clean == "causal" else k // size <= q // size
        logits = logits_of(model, tokens, AttentionMask.matrix(before | (q >= start)))
        for n in range(max(start, 1), stop):
            nll = cross_entropy(logits[:, n - shift], TOKENS[:, n])
            from_clean = shift and n == start
            weights = NOISABLE[:, n] if from_clean else view.loss_mask[:, n] * view.weights[:, n]
            expected += float(jnp.sum(weights * nll))
    loss, _, num_noisable = loss_and_gradients("llama", *copies(size, [view], clean, shift=shift), shift=shift)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert num_noisable == NOISABLE.sum()
