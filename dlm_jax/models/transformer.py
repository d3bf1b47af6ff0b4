"""The decoder: embedding, scanned blocks, final norm, head. It knows nothing of diffusion."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dlm_jax.attention import AttentionMask
from dlm_jax.errors import ConfigError
from dlm_jax.matmul import DEFAULT, matmul
from dlm_jax.models.config import Compute, ModelConfig
from dlm_jax.models.layers import Block, Cache, Initializer, LayerCache, Norm, frequencies, rotation
from dlm_jax.models.lora import LoRAConfig
from dlm_jax.random import counter_hash, dropout

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "full": None,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["layer input"], offload_src="device",
        offload_dst="pinned_host"),
}


class Embedding(nnx.Module):
    """A table of vectors."""

    def __init__(self, size: int, axis: str | None, config: ModelConfig, init: Initializer, *, trained: bool = False):
        self.embedding = init.normal((size, config.hidden_size), (axis, "embed"), trained=trained)

    def __call__(self, index: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return jnp.take(self.embedding[...], index, axis=0).astype(dtype)


class Head(nnx.Module):
    """The output projection of a model without tied embeddings."""

    def __init__(self, config: ModelConfig, init: Initializer):
        trained = init.lora is not None and init.lora.head
        self.kernel = init.normal((config.hidden_size, config.vocab_size), ("embed", "vocab"), trained=trained)


class Transformer(nnx.Module):
    """A language model whose logits at position n predict token n + 1, under any attention mask.

    Args:
      config: the architecture.
      compute: dtypes, rematerialization and attention backend.
      rngs: source of the initial weights.
      param_dtype: dtype of the parameters.
      lora: adds LoRA to a frozen base; None: every parameter is trained.

    Raises:
      ConfigError: `lora` does not fit the architecture.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, compute: Compute = Compute(),
                 param_dtype: jnp.dtype = jnp.float32, lora: LoRAConfig | None = None):
        if lora is not None:
            check_lora(lora, config)
        init = Initializer(config, compute, rngs, param_dtype, lora)
        self.config, self.compute, self.lora = config, compute, lora
        self.embed = Embedding(config.vocab_size, "vocab", config, init, trained=lora is not None and lora.embedding)
        self.positions = Embedding(config.max_length, None, config, init) if config.positions == "learned" else None
        self.blocks = Block(config, compute, init)
        self.final_norm = Norm(config, (config.hidden_size,), init)
        self.head = None if config.tie_embeddings else Head(config, init)

    def hidden(self, tokens: jax.Array, attention: AttentionMask, *, positions: jax.Array | None = None,
               dropout_seeds: jax.Array | None = None) -> jax.Array:
        """Returns the input of the head: int `tokens` [batch, length] to [batch, length, embed] in the compute dtype.

        Args:
          attention: the mask, to which the model's sliding window, if any, is added.
          positions: int [length] or [batch, length], within the model's length; None counts from 0.
          dropout_seeds: uint32 [batch], one per example; None turns dropout off.

        Raises:
          ConfigError: the sequence is longer than the learned positions.
        """
        return self._run(tokens, attention, positions, dropout_seeds, None)[0]

    def cached_hidden(self, tokens: jax.Array, attention: AttentionMask, positions: jax.Array, cache: Cache,
                      slots: jax.Array | None = None) -> tuple[jax.Array, Cache]:
        """Returns `hidden` of some positions that attend to the cache: int `tokens` [batch, Q] to [batch, Q, embed].

        Args:
          attention: a mask on positions of the full row; it must forbid positions that have not been written.
          positions: int [batch, Q], each token's position in its row; past the cache's end: not written.
          cache: the keys and values so far; those of `tokens` are written before attention.
          slots: int [batch, Q], where in the cache, and for the mask, each token is; None: at its position.
        """
        return self._run(tokens, attention, positions, None, cache, slots)

    def _run(self, tokens: jax.Array, attention: AttentionMask, positions: jax.Array | None,
             dropout_seeds: jax.Array | None, cache: Cache | None,
             slots: jax.Array | None = None) -> tuple[jax.Array, Cache | None]:
        config, dtype = self.config, jnp.dtype(self.compute.dtype)
        if self.positions is not None and positions is None and tokens.shape[1] > config.max_length:
            raise ConfigError(f"the sequence has {tokens.shape[1]} tokens, but the model has {config.max_length} "
                              "learned positions; use shorter rows")
        if positions is None:
            positions = jnp.arange(tokens.shape[1])
        attention = attention.with_window(config.sliding_window)
        x = self.embed(tokens, dtype)
        if self.positions is not None:
            # Positions past a cache's end are padding; a sequence that is too long was refused above.
            x += self.positions(jnp.minimum(positions, config.max_length - 1), dtype)
            cos_sin = None
        else:
            cos_sin = rotation(positions, frequencies(config.head_dim, config.rope_theta, config.rope_scaling))
        x = dropout(x, config.embed_dropout, dropout_seeds)

        graphdef, stacked = nnx.split(self.blocks)
        if self.compute.matmul != DEFAULT:  # else the backward pass would store each layer's converted kernels
            stacked = nnx.map_state(
                lambda path, param: param.replace(param[...].astype(dtype))
                if path[-1] == "kernel" and jnp.issubdtype(param.dtype, jnp.floating) else param, stacked)

        def layer(carry: tuple[jax.Array, Cache | None],
                  layer_input: tuple[jax.Array, nnx.State]) -> tuple[tuple[jax.Array, Cache | None], None]:
            (x, cache), (index, params) = carry, layer_input
            x = checkpoint_name(x, "layer input")
            layer_cache = None if cache is None else LayerCache(cache, index, positions if slots is None else slots)
            seeds = (None,) * 4 if dropout_seeds is None else tuple(
                counter_hash(dropout_seeds, index, site) for site in range(4))
            return nnx.merge(graphdef, params)(x, attention, cos_sin, seeds, layer_cache), None

        if self.compute.remat != "none":
            layer = jax.checkpoint(layer, policy=_REMAT_POLICIES[self.compute.remat], prevent_cse=False)
        (x, cache), _ = jax.lax.scan(layer, (x, cache), (jnp.arange(config.num_layers), stacked))
        return self.final_norm(x), cache

    @property
    def head_kernel(self) -> nnx.Param:
        """The parameter that `unembed` uses: [vocab, embed] if tied to the embedding, else [embed, vocab]."""
        return self.embed.embedding if self.head is None else self.head.kernel

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 logits [..., vocab] of hidden states [..., embed]."""
        kernel = self.head_kernel[...].astype(hidden.dtype)
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits = matmul(rows, kernel, self.compute.matmul, transpose_b=self.head is None)
        return logits.reshape(*hidden.shape[:-1], logits.shape[-1])

    def __call__(self, tokens: jax.Array, attention: AttentionMask, *, positions: jax.Array | None = None) -> jax.Array:
        """Returns float32 logits [batch, length, vocab] without dropout; arguments as in `hidden`."""
        return self.unembed(self.hidden(tokens, attention, positions=positions))


def check_lora(lora: LoRAConfig, config: ModelConfig) -> None:
    """Raises ConfigError if LoRA names parameters that the architecture does not have."""
    if "gate" in lora.targets and not config.gated_mlp:
        raise ConfigError(f"lora.targets has gate, but {config.family} has no gated MLP; remove it")
    if lora.head and config.tie_embeddings:
        raise ConfigError("lora.head cannot be trained alone: this model's head is tied to its embedding; set "
                          "lora.embedding instead, which trains both")


def abstract_model(config: ModelConfig, compute: Compute = Compute(), param_dtype: str = "float32",
                   lora: LoRAConfig | None = None) -> Transformer:
    """Returns the model with shapes in place of arrays, without allocating any."""
    return nnx.merge(*_abstract(config, compute, param_dtype, lora), copy=True)


@functools.lru_cache(maxsize=64)  # opening a checkpoint asks several times for one model
def _abstract(config: ModelConfig, compute: Compute, param_dtype: str,
              lora: LoRAConfig | None) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, compute=compute, rngs=nnx.Rngs(0),
                                                        param_dtype=jnp.dtype(param_dtype), lora=lora)))
