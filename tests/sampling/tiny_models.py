"""Tiny transformers with random weights, batches for them, a tokenizer, and settings that cover the sampler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dlm_jax.diffusion import DiffusionSpec
from dlm_jax.models import ExpertsConfig, ModelConfig, abstract_model
from dlm_jax.sampling import SamplerConfig, SamplingSpec, sample

MASK, EOS = 60, 59
_SIZES = dict(vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, head_dim=8, mlp_size=48)
_KINDS = {
    "llama": dict(num_kv_heads=2, max_length=128),
    "window": dict(num_kv_heads=2, max_length=128, sliding_window=6),
    "two types and experts": dict(num_kv_heads=2, max_length=128, sliding_window=6, full_attention_layers=(1,),
                                  sliding_rope_theta=100.0, norm="zero_centered_rms", post_norms=True,
                                  scale_embeddings=True, attention_softcap=4.0, logit_softcap=9.0,
                                  query_pre_attn_scalar=5.0, experts=ExpertsConfig(4, 2)),
    "gpt2": dict(num_kv_heads=4, max_length=40, norm="layer", positions="learned", gated_mlp=False,
                 activation="gelu_tanh", qkv_bias=True, out_bias=True, mlp_bias=True, tie_embeddings=True),
}


@functools.cache
def tiny(kind, **changes):
    """Returns a random network of one of four kinds, which differ in positions, heads, windows, norms and MLPs."""
    return random_model(ModelConfig(kind, **_SIZES | _KINDS[kind] | changes))


def random_model(config, scale=0.3, lora=None):
    """Returns a model with random parameters, biases too, whose zeros would hide mistakes; by NumPy: no compilation."""
    rng = np.random.default_rng(0)
    graphdef, shapes = nnx.split(abstract_model(config, lora=lora))

    def fill(path, leaf):
        center, spread = (1, 0.1) if "scale" in jax.tree_util.keystr(path) else (0, scale)
        return jnp.asarray(rng.normal(center, spread, leaf.shape), jnp.float32)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, shapes))


def byte_tokenizer(words=()):
    """Returns a tokenizer with a token per byte, some words, and an EOS token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(words))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>")


def make_keys(count, seed=0):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))


def make_spec(*, mask=MASK, shift=True, eos=None, stop=False, blocks=None, **config):
    """Returns a `SamplingSpec`; `eos` is a token that ends a text, or several."""
    ends = () if eos is None else tuple(np.atleast_1d(eos).tolist())
    return SamplingSpec(SamplerConfig(**config), DiffusionSpec(mask, shift, blocks), ends, stop)


def run_sampler(network, tokens, fixed, lengths=None, *, keys=None, **settings):
    """Returns a `Sample` of NumPy arrays; `settings` are of `make_spec`."""
    tokens = np.asarray(tokens)
    lengths = np.full(len(tokens), tokens.shape[1]) if lengths is None else lengths
    keys = make_keys(len(tokens)) if keys is None else keys
    return jax.tree.map(np.asarray, sample(network, tokens, fixed, lengths, keys, make_spec(**settings)))


def make_batch(policy="confidence", seed=0):
    """Returns tokens, where they are given, and lengths of four rows: scattered gaps, or prompts."""
    rng = np.random.default_rng(seed)
    tokens, lengths = rng.integers(0, 60, (4, 40)), np.array([40, 17, 29, 3])
    fixed = rng.random(tokens.shape) < 0.3
    if policy == "autoregressive":
        fixed = np.arange(40) < np.array([4, 11, 1, 2])[:, None]
    return tokens, fixed, lengths


def is_gap(fixed, lengths):
    positions = np.arange(fixed.shape[1])
    return ~fixed & (positions > 0) & (positions < lengths[:, None])


# Every policy, and every setting with at least one of them: name, kind of network, settings.
SETTINGS = [
    ("random in blocks", "llama", dict(policy="random", num_steps=12, block_length=10, step_schedule="cosine",
                                       top_p=0.9)),
    ("random_exact, remasking", "llama", dict(policy="random_exact", num_steps=7, remask=0.3, block_length=16)),
    ("first_hitting", "gpt2", dict(policy="first_hitting", temperature=0.8)),
    ("confidence, dual cache", "gpt2", dict(policy="confidence", num_steps=18, block_length=8, cache="dual")),
    ("margin, guidance", "llama", dict(policy="margin", num_steps=5, cfg_scale=0.7, top_k=20,
                                       repetition_penalty=1.2)),
    ("entropy, prefix cache", "window", dict(policy="entropy", num_steps=20, block_length=8, cache="prefix",
                                             cache_refresh_interval=2, cfg_scale=0.5, repetition_penalty=1.3)),
    ("threshold, end of text", "gpt2", dict(policy="threshold", threshold=0.2, num_steps=9, step_schedule="cosine",
                                            eos=EOS, stop=True, temperature=0.7)),
    ("autoregressive, end of text", "llama", dict(policy="autoregressive", eos=EOS, stop=True, eos_penalty=0.5,
                                                  repetition_penalty=1.2, top_k=30)),
]
