"""Block diffusion against what it must equal: the AR loss, full diffusion, and each block computed by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlm_jax.attention import AttentionMask
from dlm_jax.diffusion import (
    HeadPlan,
    block_times,
    clean_batch,
    complementary_mask,
    concat_noisy_and_clean,
    corrupt,
    cross_entropy,
    example_keys,
    loss_sums,
)
from dlm_jax.diffusion.spec import BlockSpec
from dlm_jax.models import ModelConfig, Transformer

ROWS, LENGTH, MASK = 3, 12, 28
SIZES = dict(vocab_size=29, hidden_size=32, num_layers=2, num_heads=4, head_dim=8, mlp_size=48, max_length=LENGTH)
CONFIGS = {
    "gpt2": ModelConfig("gpt2", **SIZES, num_kv_heads=4, norm="layer", positions="learned", gated_mlp=False,
                        tie_embeddings=True, qkv_bias=True),
    "llama": ModelConfig("llama", **SIZES, num_kv_heads=2),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, MASK, (ROWS, LENGTH)), jnp.int32)
MASKABLE = jnp.broadcast_to(jnp.arange(LENGTH) > 0, TOKENS.shape).at[1, :5].set(False)  # a prompt in the second
TIMES = jnp.array([0.3, 0.9, 0.6])
INDEX = jnp.arange(LENGTH)


@functools.cache
def model_of(name):
    return Transformer(CONFIGS[name], rngs=nnx.Rngs(0))


def noised(times=TIMES):
    return corrupt(TOKENS, MASKABLE, times, example_keys(0, jnp.arange(ROWS)), mask_token_id=MASK)


def copies(block_size, views=(), clean="causal", **options):
    views = views or [noised()]
    views = [jax.tree.map(lambda x: x, view) for view in views]
    return concat_noisy_and_clean(list(views), block_size, **options), BlockSpec(block_size, clean).training_mask(LENGTH, len(views))


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


@pytest.mark.parametrize("name, clean", [("gpt2", "causal"), ("llama", "block_bidirectional")])
def test_blocks_of_one_token_are_the_parents_loss(name, clean):
    """Whatever the noise: every token is read from the clean copy."""
    expected = loss_and_gradients(name, clean_batch(TOKENS, MASKABLE), AttentionMask.causal())
    assert_same(loss_and_gradients(name, *copies(1, clean=clean)), expected)
    pair = [noised(), complementary_mask(noised(), MASK, (1 / (1 - TIMES))[:, None])]
    assert_same(loss_and_gradients(name, *copies(1, pair)), expected)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("name, clean", [("gpt2", "block_bidirectional"), ("llama", "causal")])
def test_one_block_is_full_diffusion(name, clean, shift):
    expected = loss_and_gradients(name, noised(), AttentionMask.bidirectional(), shift=shift)
    assert_same(loss_and_gradients(name, *copies(LENGTH, clean=clean, shift=shift), shift=shift), expected)


@pytest.mark.parametrize("clean", ["causal", "block_bidirectional"])
@pytest.mark.parametrize("shift", [True, False])
def test_each_block_is_predicted_given_the_clean_ones_before_it(shift, clean):
    """Against a forward pass for every block by itself, with an explicit mask and logits in full."""
    size, model, view = 5, model_of("llama"), noised(block_times(TIMES, 5, LENGTH, low=0.0, high=1.0))
    expected = 0.0
    for start in range(0, LENGTH, size):
        stop = min(start + size, LENGTH)
        tokens = jnp.concatenate([TOKENS[:, :start], view.tokens[:, start:stop]], axis=1)
        q, k = np.indices((stop, stop))
        before = k <= q if clean == "causal" else k // size <= q // size
        logits = model(tokens, AttentionMask.matrix(before | (q >= start)))
        for at in range(max(start, 1), stop):
            opens = shift and at == start
            nll = cross_entropy(logits[:, at - shift], TOKENS[:, at])
            counts = jnp.where(opens, MASKABLE[:, at], view.loss_mask[:, at] * view.weights[:, at])
            expected += float(jnp.sum(counts * nll))
    found, _, noisable_mask = loss_and_gradients("llama", *copies(size, [view], clean, shift=shift), shift=shift)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert noisable_mask == MASKABLE.sum()


def test_complementary_views_mask_each_token_once():
    first = noised()
    batch, _ = copies(4, [first, complementary_mask(first, MASK, (1 / (1 - TIMES))[:, None])])
    one, two, clean = jnp.split(batch.loss_mask, 3, axis=1)
    opens = INDEX % 4 == 0
    np.testing.assert_array_equal(one ^ two, MASKABLE & ~opens)
    np.testing.assert_array_equal(clean, MASKABLE & opens)
    np.testing.assert_array_equal(jnp.split(batch.tokens, 3, axis=1)[1] == MASK, MASKABLE & ~first.loss_mask)
    weights = jnp.split(batch.weights, 3, axis=1)
    np.testing.assert_allclose(1 / weights[0] + 1 / weights[1], 2.0, rtol=1e-5)


def test_times_of_blocks_cover_the_range_and_are_uniform_each():
    low, high, size, length = 0.1, 0.9, 4, 64
    rows = low + (high - low) * (jnp.arange(4096) + 0.5) / 4096
    times = np.asarray(block_times(rows, size, length, low=low, high=high)).reshape(4096, 16, size)
    assert (times == times[:, :, :1]).all() and (times >= low).all() and (times <= high).all()
    np.testing.assert_array_equal(times[:, 0, 0], rows)
    for block in range(16):
        np.testing.assert_allclose(np.sort(times[:, block, 0]), rows, atol=2e-4)  # 1 / 4096 apart
    gaps = np.diff(np.sort(times[:, :, 0], axis=1), axis=1)
    assert gaps.max() < 2.7 * (high - low) / 16  # of random ones the largest is about four


def test_the_expectation_of_the_loss_is_the_bound_of_the_blocks():
    """Given constants in place of the network, each token counts 1 on average, wherever it stands in its block."""
    def weights(seed):
        times = jax.random.uniform(jax.random.key(seed), (ROWS,), minval=1e-3)
        times = block_times(times, 4, LENGTH, low=1e-3, high=1.0)
        view = corrupt(TOKENS, MASKABLE, times, example_keys(seed, jnp.arange(ROWS)), mask_token_id=MASK)
        batch = concat_noisy_and_clean([view], 4)
        return jnp.where(batch.loss_mask, batch.weights, 0).reshape(ROWS, 2, LENGTH).sum(axis=1)

    found = jax.jit(jax.vmap(weights))(jnp.arange(20_000))
    error = found.std(axis=0) / np.sqrt(len(found))
    assert (jnp.abs(found.mean(axis=0) - MASKABLE) < 5 * error + 2e-3).all()
