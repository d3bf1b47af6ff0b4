"""The decoder: embedding, scanned blocks, final norm, head. It knows nothing of diffusion."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dlm_jax.attention import AttentionMask
from dlm_jax.errors import ConfigError
from dlm_jax.models.config import Compute, ModelConfig
from dlm_jax.models.layer_types import LayerTypes, MaskChoice
from dlm_jax.models.layers import (
    MLP,
    Attention,
    Cache,
    Initializer,
    LayerCache,
    LMHead,
    Norm,
    rematerialize,
    rotary,
    split_layers,
)
from dlm_jax.models.lora import DraftHead, LoRAConfig, LoRAInputs
from dlm_jax.models.moe import MoE, RouterSums
from dlm_jax.random import counter_hash, dropout


class Embedding(nnx.Module):
    """A table of vectors, and the factor by which they are multiplied."""

    def __init__(self, size: int, axis: str | None, config: ModelConfig, init: Initializer, *, trained: bool = False,
                 scale: float = 1.0):
        self.embedding, self.scale = init.normal((size, config.hidden_size), (axis, "embed"), trained=trained), scale

    def __call__(self, index: jax.Array, dtype: jnp.dtype) -> jax.Array:
        vectors = jnp.take(self.embedding[...], index, axis=0).astype(dtype)
        return vectors if self.scale == 1 else vectors * self.scale


class Head(nnx.Module):
    """The output projection of a model without tied embeddings."""

    def __init__(self, config: ModelConfig, init: Initializer):
        trained = init.lora is not None and init.lora.head
        self.kernel = init.normal((config.hidden_size, config.vocab_size), ("embed", "vocab"), trained=trained)


class LayerVisitor(NamedTuple):
    """Gathers something of each layer's output, the residual stream after it, before any norm.

    Attributes:
      start: arrays, what is gathered before the first layer.
      visit: (what is gathered so far, output [batch, length, embed], number of the layer from 0 on, int32) -> the same
        arrays after this layer.
    """

    start: Any
    visit: Callable[[Any, jax.Array, jax.Array], Any]


class _Outputs(NamedTuple):
    """What all layers put out: the normed state, and what else was asked for."""

    hidden: jax.Array
    cache: Cache | None
    gathered: Any
    router: RouterSums | None


class Block(nnx.Module):
    """Pre-norm attention and MLP around a residual stream; holds the stacked parameters of all layers."""

    def __init__(self, config: ModelConfig, compute: Compute, init: Initializer):
        shape = (config.num_layers, config.hidden_size)
        self.dropout_rate = config.residual_dropout
        self.attention_norm = Norm(config, shape, init)
        self.attention = Attention(config, compute, init)
        self.attention_post_norm = Norm(config, shape, init) if config.post_norms else None
        self.mlp_norm = Norm(config, shape, init)
        self.mlp = MLP(config, compute, init) if config.experts is None else MoE(config, compute, init)
        self.mlp_post_norm = Norm(config, shape, init) if config.post_norms else None

    def __call__(self, x: jax.Array, mask: AttentionMask | MaskChoice, cos_sin: tuple[jax.Array, jax.Array] | None,
                 seeds: tuple[jax.Array | None, jax.Array | None, jax.Array | None], lora: LoRAInputs,
                 layer_cache: LayerCache | None) -> tuple[jax.Array, Cache | None, RouterSums | None]:
        """Runs a layer.

        Args:
          x: [batch, length, embed].
          seeds: uint32 [batch] for the dropout of probabilities, and of the two branches.

        Returns:
          [batch, length, embed]; the cache with this layer's keys and values, and what its router did, if it has them.
        """
        y, cache = self.attention(self.attention_norm(x), mask, cos_sin, seeds[0], lora, layer_cache)
        y = y if self.attention_post_norm is None else self.attention_post_norm(y)
        x = x + dropout(y, self.dropout_rate, seeds[1])
        z = self.mlp_norm(x)
        y, router = self.mlp(z) if isinstance(self.mlp, MoE) else (self.mlp(z, lora), None)
        y = y if self.mlp_post_norm is None else self.mlp_post_norm(y)
        return x + dropout(y, self.dropout_rate, seeds[2]), cache, router


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
        self.embed = Embedding(config.vocab_size, "vocab", config, init, trained=lora is not None and lora.embedding,
                               scale=config.hidden_size**0.5 if config.scale_embeddings else 1.0)
        self.positions = Embedding(config.max_length, None, config, init) if config.positions == "learned" else None
        self.blocks = Block(config, compute, init)
        self.final_norm = Norm(config, (config.hidden_size,), init)
        self.head = None if config.tie_embeddings else Head(config, init)
        self.draft_head = DraftHead(config, init) if lora is not None and lora.draft_head else None

    def hidden(self, tokens: jax.Array, attention: AttentionMask, *, positions: jax.Array | None = None,
               dropout_seeds: jax.Array | None = None, noised: tuple[int, int] | None = None) -> jax.Array:
        """Returns the input of the head: int `tokens` [batch, length] to [batch, length, embed] in the compute dtype.

        Args:
          attention: the mask, to which the model's sliding window, if any, is added.
          positions: int [length] or [batch, length], within the model's length; None counts from 0.
          dropout_seeds: uint32 [batch], one per example; None turns dropout off.
          noised: first and last + 1 of the positions of a noised copy, where LoRA may act alone; None: there is none.

        Raises:
          ConfigError: the sequence is longer than the learned positions.
        """
        return self._run(tokens, attention, positions, dropout_seeds=dropout_seeds, noised=noised).hidden

    def cached_hidden(self, tokens: jax.Array, attention: AttentionMask, positions: jax.Array, cache: Cache,
                      slots: jax.Array | None = None, noised: tuple[int, int] | None = None,
                      rows: jax.Array | None = None) -> tuple[jax.Array, Cache]:
        """Returns `hidden` of some positions that attend to the cache: int `tokens` [batch, Q] to [batch, Q, embed].

        Args:
          attention: a mask on positions of the full row; it must forbid positions that have not been written.
          positions: int [batch, Q], each token's position in its row; past the cache's end: not written.
          cache: the keys and values so far; those of `tokens` are written before attention.
          slots: int [batch, Q], where in the cache, and for the mask, each token is; None: at its position.
          noised: as in `hidden`.
          rows: int [batch], the row of the cache that each row of tokens belongs to, several of which may be the same;
            None: the cache has the same rows.
        """
        found = self._run(tokens, attention, positions, cache=cache, slots=slots, noised=noised, cache_rows=rows)
        return found.hidden, found.cache

    def hidden_and_features(self, tokens: jax.Array, attention: AttentionMask, target_layer_ids: tuple[int, ...], *,
                            positions: jax.Array | None = None, lora: bool = True) -> tuple[jax.Array, jax.Array]:
        """Returns `hidden` without dropout, and what some layers put out: [batch, length, taps * embed].

        Args:
          target_layer_ids: layers from 0 on. A layer's output is the residual stream after it, before any norm.
          lora: whether LoRA acts; else the model computes what its base does.
        """
        found = self._run(tokens, attention, positions, lora=lora, visitor=self._tap(target_layer_ids, tokens))
        return found.hidden, _features(found.gathered)

    def hidden_and_visited(self, tokens: jax.Array, attention: AttentionMask, visitor: LayerVisitor | None, *,
                           positions: jax.Array | None = None, dropout_seeds: jax.Array | None = None,
                           noised: tuple[int, int] | None = None) -> tuple[jax.Array, Any, RouterSums | None]:
        """Returns `hidden`, what a visitor of each layer's output has gathered, and what the routers did.

        The latter two are None without a visitor, and for a model without experts; of routers they are [layers,
        experts].
        """
        found = self._run(tokens, attention, positions, dropout_seeds=dropout_seeds, noised=noised, visitor=visitor)
        return found.hidden, found.gathered, found.router

    def cached_hidden_and_features(self, tokens: jax.Array, attention: AttentionMask, positions: jax.Array,
                                   cache: Cache,
                                   target_layer_ids: tuple[int, ...]) -> tuple[jax.Array, Cache, jax.Array]:
        """Returns `cached_hidden`, and the features of `hidden_and_features`, [batch, Q, taps * embed]."""
        found = self._run(tokens, attention, positions, cache=cache, visitor=self._tap(target_layer_ids, tokens))
        return found.hidden, found.cache, _features(found.gathered)

    def _tap(self, layers: tuple[int, ...], tokens: jax.Array) -> LayerVisitor:
        """Returns the visitor that gathers the outputs of layers, [batch, length, taps + 1, embed]."""
        # Where each layer's output goes: to its place among the taps, or to one more place that nobody reads.
        places = np.full(self.config.num_layers, len(layers))
        places[list(layers)] = np.arange(len(layers))
        start = jnp.zeros((*tokens.shape, len(layers) + 1, self.config.hidden_size), jnp.dtype(self.compute.dtype))
        return LayerVisitor(start, lambda tapped, x, layer: jax.lax.dynamic_update_index_in_dim(
            tapped, x, jnp.asarray(places)[layer], axis=-2))

    def _run(self, tokens: jax.Array, attention: AttentionMask, positions: jax.Array | None, *,
             dropout_seeds: jax.Array | None = None, cache: Cache | None = None, slots: jax.Array | None = None,
             noised: tuple[int, int] | None = None, lora: bool = True, visitor: LayerVisitor | None = None,
             cache_rows: jax.Array | None = None) -> _Outputs:
        config, dtype = self.config, jnp.dtype(self.compute.dtype)
        if self.positions is not None and positions is None and tokens.shape[1] > config.max_length:
            raise ConfigError(f"the sequence has {tokens.shape[1]} tokens, but the model has {config.max_length} "
                              "learned positions; use shorter rows")
        if positions is None:
            positions = jnp.arange(tokens.shape[1])
        x = self.embed(tokens, dtype)
        if self.positions is not None:
            # Positions past a cache's end are padding; a sequence that is too long was refused above.
            x += self.positions(jnp.minimum(positions, config.max_length - 1), dtype)
        types = LayerTypes.of(config, attention, functools.partial(self._rotation, positions))
        x = dropout(x, config.embed_dropout, dropout_seeds)

        slots, read_index = positions if slots is None else slots, None
        if cache is not None:
            read_index = jnp.searchsorted(np.array(cache.read_widths),
                                          attention.count_visible_keys(slots, cache.key.shape[2]))
        graphdef, stacked = split_layers(self.blocks, self.compute)
        Carry = tuple[jax.Array, Cache | None, Any]

        def layer(carry: Carry,
                  layer_input: tuple[jax.Array, jax.Array, nnx.State]) -> tuple[Carry, RouterSums | None]:
            (x, cache, gathered), (index, slides, params) = carry, layer_input
            x = checkpoint_name(x, "layer input")
            layer_cache = None if cache is None else LayerCache(
                cache, index, slots, read_index, cache_rows)
            seeds = (None,) * 4 if dropout_seeds is None else tuple(
                counter_hash(dropout_seeds, index, site) for site in range(4))
            x, cache, router = nnx.merge(graphdef, params)(x, *types.of_layer(slides), seeds[:3],
                                                           LoRAInputs(seeds[3], noised, lora), layer_cache)
            if visitor is not None:
                gathered = visitor.visit(gathered, x, index)
            return (x, cache, gathered), router

        layers, carry = (jnp.arange(config.num_layers), types.slides, stacked), (x, cache, visitor and visitor.start)
        (x, cache, gathered), router = jax.lax.scan(rematerialize(layer, self.compute.remat), carry, layers)
        return _Outputs(self.final_norm(x), cache, gathered, router)

    def _rotation(self, positions: jax.Array, slides: bool) -> tuple[jax.Array, jax.Array] | None:
        """Returns RoPE's rotation in layers with a sliding window of their own base, or in others."""
        config = self.config
        if config.positions != "rope":
            return None
        if slides and config.sliding_rope_theta is not None:
            config = dataclasses.replace(config, rope_theta=config.sliding_rope_theta, rope_scaling=None)
        return rotary(config, positions)

    def correct_drafts(self, hidden: jax.Array, tokens: jax.Array) -> jax.Array:
        """Returns noised states [..., embed], corrected by the tokens at their places, int [...], if a head does so."""
        if self.draft_head is None:
            return hidden
        return self.draft_head(hidden, self.embed(tokens, hidden.dtype))

    @property
    def head_kernel(self) -> nnx.Param:
        """The parameter that `unembed` uses: [vocab, embed] if tied to the embedding, else [embed, vocab]."""
        return self.embed.embedding if self.head is None else self.head.kernel

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 logits [..., vocab] of hidden states [..., embed]."""
        return self.lm_head(hidden)

    @property
    def lm_head(self) -> LMHead:
        """What `unembed` applies."""
        return LMHead(self.head_kernel[...], self.head is None, self.compute.matmul, self.config.logit_softcap)

    def __call__(self, tokens: jax.Array, attention: AttentionMask, *, positions: jax.Array | None = None) -> jax.Array:
        """Returns float32 logits [batch, length, vocab] without dropout; arguments as in `hidden`."""
        return self.unembed(self.hidden(tokens, attention, positions=positions))


def _features(tapped: jax.Array) -> jax.Array:
    """Returns what `Transformer._tap` has gathered as [batch, length, taps * embed]."""
    return tapped[..., :-1, :].reshape(*tapped.shape[:2], -1)


def check_lora(lora: LoRAConfig, config: ModelConfig) -> None:
    """Raises ConfigError if LoRA names parameters that the architecture does not have."""
    if "gate" in lora.targets and not config.gated_mlp:
        raise ConfigError(f"lora.targets has gate, but {config.family} has no gated MLP; remove it")
    if config.experts is not None and (found := [name for name in ("gate", "up", "down") if name in lora.targets]):
        raise ConfigError(f"lora.targets has {', '.join(found)}, and experts have no LoRA; choose of q, k, v and out")
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
