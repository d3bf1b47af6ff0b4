"""Drafters: small models that guess a block of tokens in one pass, from the hidden states of another model, the target.

A drafter reads the outputs of some layers of the target, its features, for the text so far, and the embeddings of a
block: the last token, the anchor, and masks. Its layers attend from the block to the fused features of the text before
the anchor, and to the block. Embedding and head are the target's. So are its guesses: the target verifies them
(`sampling.speculative`). The kinds are DFlash (arXiv 2602.06036); DSpark (arXiv 2607.05147), with a Markov head and
confidences; and DFlash2, with convolutions over the block and a selector of candidates.

    target's features ── fuse ──▶ fused ──┬── hidden: many blocks per row, for training
    embeddings of blocks ─────────────────┴── extend_cache, cached_hidden: one block per row, for decoding
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from dlm_jax.attention import AttentionMask, anchored_attention
from dlm_jax.config_fields import check_at_least, check_choices
from dlm_jax.errors import ConfigError
from dlm_jax.models.config import Compute, ModelConfig
from dlm_jax.models.drafter_heads import (
    BlockConvolution,
    CandidateSelector,
    MarkovHead,
    Projection,
    convolve,
    score_candidates,
)
from dlm_jax.models.layer_types import LayerTypes, MaskChoice, Rotation, attend_under
from dlm_jax.models.layers import (
    MLP,
    Attention,
    Cache,
    Initializer,
    LMHead,
    Norm,
    rematerialize,
    rotary,
    split_layers,
)
from dlm_jax.models.transformer import Transformer

KeysAndValues = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
    """The architecture of a drafter.

    Attributes:
      layers: of the drafter's own layers. Width and vocabulary are the target's; `sliding_window` holds for
        `sliding_layers` alone.
      target_layer_ids: the target's layers, from 0 on, whose outputs are the features.
      block_size: slots of a block, the anchor's included.
      mask_token_id: what the block has after the anchor.
      sample_from_anchor: slot j guesses the token after it, so that every slot guesses (DSpark); else the token at its
        own position, and the anchor's slot guesses nothing (DFlash, DFlash2).
      causal: within a block, the slots of full layers see no later ones.
      sliding_layers: layers that see only the window of the text.
      sliding_causal: the same as `causal` for sliding layers.
      markov_rank: rank of the Markov head's logits; 0: it has none.
      confidence_with_markov: confidences also see the Markov head's row of the token before.
      selector_rank: rank of the selector's scores; 0: it has none.
      selector_top_k: candidates per slot.
      conv_kernel_size: slots that a convolution sees; 0: there are none.
      conv_group_size: channels that share what the input adds to the weights.
    """

    layers: ModelConfig
    target_layer_ids: tuple[int, ...]
    block_size: int
    mask_token_id: int
    sample_from_anchor: bool
    causal: bool = False
    sliding_layers: tuple[int, ...] = ()
    sliding_causal: bool = True
    markov_rank: int = 0
    markov_head: Literal["vanilla", "gated", "rnn"] = "vanilla"
    confidence_head: bool = False
    confidence_with_markov: bool = True
    selector_rank: int = 0
    selector_top_k: int = 16
    conv_kernel_size: int = 0
    conv_group_size: int = 16

    def __post_init__(self) -> None:
        check_choices(self, "drafter")
        check_at_least(self.num_drafts, 1, "drafter.num_drafts")
        layers, ids = self.layers, self.target_layer_ids
        if not ids or list(ids) != sorted(set(ids)) or ids[0] < 0:
            raise ConfigError(f"drafter.target_layer_ids must be layers of the target in increasing order, got {ids}")
        if layers.positions != "rope":
            raise ConfigError("drafter.layers must have rotary positions, as blocks begin anywhere in the text")
        if layers.post_norms or layers.attention_softcap is not None or layers.experts is not None:
            raise ConfigError("drafter.layers have no norms after attention and MLP, soft caps or experts, which the "
                              "target's layers have; set drafter.init to random")
        if not 0 <= self.mask_token_id < layers.vocab_size:
            raise ConfigError(f"drafter.mask_token_id {self.mask_token_id} is outside the target's vocabulary of "
                              f"{layers.vocab_size} tokens")
        if self.sliding_layers and layers.sliding_window is None:
            raise ConfigError("drafter.sliding_layers needs drafter.layers.sliding_window, which is not set")
        if any(not 0 <= layer < layers.num_layers for layer in self.sliding_layers):
            raise ConfigError(f"drafter.sliding_layers {self.sliding_layers} names a layer that the drafter, which has "
                              f"{layers.num_layers}, does not have")
        if self.conv_kernel_size and layers.hidden_size % self.conv_group_size:
            raise ConfigError(f"drafter.conv_group_size {self.conv_group_size} does not divide the width "
                              f"{layers.hidden_size}")

    @property
    def num_drafts(self) -> int:
        """Tokens that a full block guesses."""
        return self.block_size if self.sample_from_anchor else self.block_size - 1

    @property
    def first_slot(self) -> int:
        """The first slot that guesses a token, which is the one after the anchor."""
        return 0 if self.sample_from_anchor else 1


def spread_layer_ids(num_layers: int, count: int) -> tuple[int, ...]:
    """Returns `count` layers of a target of `num_layers`, evenly from its second to its third last, as DFlash has them.

    Raises:
      ConfigError: the target has too few layers for that.
    """
    if count == 1:
        return (num_layers // 2,)
    ids = tuple(round(1 + i * (num_layers - 4) / (count - 1)) for i in range(count))
    if count < 1 or len(set(ids)) != count or ids[0] > ids[-1]:
        raise ConfigError(f"a target of {num_layers} layers has no {count} layers to take features from; take fewer")
    return ids


class DrafterBlock(nnx.Module):
    """A layer of a drafter; holds the stacked parameters of all layers, under the names of `layers.Block`."""

    def __init__(self, config: DrafterConfig, compute: Compute, init: Initializer):
        layers = config.layers
        shape = (layers.num_layers, layers.hidden_size)
        self.attention_norm = Norm(layers, shape, init)
        self.attention = Attention(layers, compute, init)
        self.mlp_norm = Norm(layers, shape, init)
        self.mlp = MLP(layers, compute, init)
        has_conv = config.conv_kernel_size > 0
        self.attention_conv = BlockConvolution(config, init) if has_conv else None
        self.mlp_conv = BlockConvolution(config, init) if has_conv else None

    def __call__(self, x: jax.Array, mask: AttentionMask | MaskChoice, cos_sin: Rotation, text: KeysAndValues,
                 block_size: int) -> jax.Array:
        """Runs a layer.

        Args:
          x: [batch, blocks * block_size, embed].
          mask: of the kind `AttentionMask.anchored`.
          text: of the text, [batch, length, kv_heads, head_dim].
        """
        def attend(y: jax.Array) -> jax.Array:
            queries, block = self.attention.queries(y, cos_sin), self.attention.keys_and_values(y, cos_sin)
            return self.attention.out(attend_under(mask, lambda mask: anchored_attention(
                queries, text, block, mask, matmul_kind=self.attention.compute.matmul)))

        x = x + _convolved(attend, self.attention_norm(x), self.attention_conv, block_size)
        return x + _convolved(self.mlp, self.mlp_norm(x), self.mlp_conv, block_size)


def _convolved(branch: Callable[[jax.Array], jax.Array], x: jax.Array, conv: BlockConvolution | None,
               block_size: int) -> jax.Array:
    """Returns the output of a layer's branch, with its convolutions before and after it, if any."""
    if conv is None:
        return branch(x)
    before, after = conv.kernels(x)
    return convolve(branch(convolve(x, before, block_size)), after, block_size)


class Drafter(nnx.Module):
    """The trained part of a drafter: it knows neither the target nor its embedding and head.

    Args:
      config: the architecture.
      compute: dtypes and rematerialization.
      rngs: source of the initial weights.
      param_dtype: dtype of the parameters.
    """

    def __init__(self, config: DrafterConfig, *, rngs: nnx.Rngs, compute: Compute = Compute(),
                 param_dtype: jnp.dtype = jnp.float32):
        init, embed = Initializer(config.layers, compute, rngs, param_dtype), config.layers.hidden_size
        self.config, self.compute = config, compute
        self.fc = Projection(len(config.target_layer_ids) * embed, embed, (None, "embed"), init)
        self.hidden_norm = Norm(config.layers, (embed,), init)
        self.blocks = DrafterBlock(config, compute, init)
        self.final_norm = Norm(config.layers, (embed,), init)
        self.markov = MarkovHead(config, init) if config.markov_rank else None
        row = config.markov_rank if config.confidence_with_markov else 0
        self.confidence_head = Projection(embed + row, 1, (None, None), init,
                                          bias=True) if config.confidence_head else None
        self.selector = CandidateSelector(config, init) if config.selector_rank else None

    def fuse(self, features: jax.Array) -> jax.Array:
        """Returns what all layers see of the text: features [batch, T, taps * embed] to [batch, T, embed]."""
        return self.hidden_norm(self.fc(features.astype(self.compute.dtype)))

    def hidden(self, fused: jax.Array, embeddings: jax.Array, anchors: jax.Array, *,
               positions: jax.Array | None = None, segment_ids: jax.Array | None = None) -> jax.Array:
        """Returns the input of the head for blocks that begin at several places of each text, as training needs it.

        Args:
          fused: [batch, T, embed], of the text; a block sees what is before its anchor.
          embeddings: [batch, A * B, embed], of the blocks: anchor, masks, anchor, masks, ...
          anchors: int [batch, A], indices in the text.
          positions: int [batch, T], of the text's tokens; None: from 0 on.
          segment_ids: int [batch, T]; a block sees its anchor's segment. None: one segment.

        Returns:
          [batch, A * B, embed], in the compute dtype.
        """
        length, size = fused.shape[1], embeddings.shape[1] // anchors.shape[1]
        positions = jnp.arange(length)[None] if positions is None else positions
        begins = jnp.take_along_axis(jnp.broadcast_to(positions, fused.shape[:2]), anchors, axis=1)
        block_positions = (begins[:, :, None] + jnp.arange(size)).reshape(len(begins), -1)
        cos_sin = rotary(self.config.layers, positions)

        def text(block: DrafterBlock, _: jax.Array) -> KeysAndValues:
            return block.attention.keys_and_values(fused, cos_sin)

        return self._run(embeddings, block_positions, anchors, size, length, text, segment_ids)

    def extend_cache(self, fused: jax.Array, positions: jax.Array, cache: Cache) -> Cache:
        """Returns the cache with the keys and values of more of the text, in all layers.

        Args:
          fused: [batch, n, embed].
          positions: int [batch, n]; past the cache's end: not written.
          cache: as `empty_cache` makes it.
        """
        graphdef, stacked = split_layers(self.blocks, self.compute)
        cos_sin = rotary(self.config.layers, positions)

        def layer(cache: Cache, layer_input: tuple[jax.Array, nnx.State]) -> tuple[Cache, None]:
            index, params = layer_input
            added = nnx.merge(graphdef, params).attention.keys_and_values(fused, cos_sin)
            return cache.write(index, positions, *added), None

        return jax.lax.scan(layer, cache, (jnp.arange(self.config.layers.num_layers), stacked))[0]

    def cached_hidden(self, embeddings: jax.Array, positions: jax.Array, cache: Cache) -> jax.Array:
        """Returns the input of the head for one block per row: [batch, slots, embed], in the compute dtype.

        Args:
          embeddings: [batch, slots, embed], of the anchor and masks; `block_size` slots, or fewer.
          positions: int [batch, slots], from the anchor's on. The cache must have every position before the anchor's.
          cache: it does not change.
        """
        def text(_: DrafterBlock, index: jax.Array) -> KeysAndValues:
            return cache.read(index, cache.key.shape[2])

        return self._run(embeddings, positions, positions[:, :1], embeddings.shape[1], cache.key.shape[2], text, None)

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Returns a cache for rows of `length`."""
        return Cache.empty(self.config.layers, batch, length, self.compute.dtype)

    def _run(self, x: jax.Array, positions: jax.Array, anchors: jax.Array, size: int, text_length: int,
             text: Callable[[DrafterBlock, jax.Array], KeysAndValues], segment_ids: jax.Array | None) -> jax.Array:
        """Runs the layers over blocks of `size` slots; `text` returns a layer's keys and values of the text."""
        config, cos_sin = self.config, rotary(self.config.layers, positions)

        def mask(window: int | None, causal: bool) -> AttentionMask:
            mask = AttentionMask.anchored(text_length, size, anchors, causal=causal).with_window(window)
            return mask if segment_ids is None else mask.with_segments(segment_ids)

        slides = [layer in config.sliding_layers for layer in range(config.layers.num_layers)]
        types = LayerTypes(
            None if all(slides) else (mask(None, config.causal), cos_sin),
            (mask(config.layers.sliding_window, config.sliding_causal), cos_sin) if any(slides) else None,
            jnp.array(slides))
        graphdef, stacked = split_layers(self.blocks, self.compute)

        def layer(x: jax.Array, layer_input: tuple[jax.Array, jax.Array, nnx.State]) -> tuple[jax.Array, None]:
            index, slides, params = layer_input
            block = nnx.merge(graphdef, params)
            return block(x, *types.of_layer(slides), text(block, index), size), None

        x, _ = jax.lax.scan(rematerialize(layer, self.compute.remat), x.astype(self.compute.dtype),
                            (jnp.arange(len(slides)), types.slides, stacked))
        return self.final_norm(x)

    def markov_state(self, batch: tuple[int, ...]) -> jax.Array:
        """Returns the Markov head's state before the first slot, [*batch, rank]."""
        return jnp.zeros((*batch, self.config.markov_rank), self.compute.dtype)

    def markov_bias(self, previous: jax.Array, hidden: jax.Array, state: jax.Array,
                    lm_head: LMHead | None = None) -> tuple[jax.Array, jax.Array]:
        """Returns what the Markov head adds to a slot's logits, float32 [batch, vocab], and its next state.

        Args:
          previous: int [batch], the token before the one that the slot guesses; for the first slot the anchor.
          hidden: [batch, embed], of the slot.
          state: [batch, rank], from `markov_state` or the slot before.
          lm_head: of the Markov head, if only the first tokens of the vocabulary are asked for.
        """
        mixed, state = self.markov.step(previous, hidden, state)
        return (lm_head or self.markov.lm_head)(mixed), state

    def confidence(self, previous: jax.Array, hidden: jax.Array) -> jax.Array:
        """Returns the log odds, float32 [...], that the target accepts a slot's guess, if it accepts those before it.

        Args:
          previous: int [...], the token before the one that the slot guesses.
          hidden: [..., embed], of the slot.
        """
        if self.markov is not None and self.config.confidence_with_markov:
            hidden = jnp.concatenate([hidden, self.markov.embed(previous, hidden.dtype)], axis=-1)
        return self.confidence_head(hidden)[..., 0].astype(jnp.float32)

    def select(self, previous: jax.Array, hidden: jax.Array, candidates: jax.Array, logits: jax.Array) -> jax.Array:
        """Returns the logits, float32 [..., k], of a choice among a slot's candidates, given the token before it.

        Args:
          previous: int [...].
          hidden: [..., embed].
          candidates: int [..., k], the `selector_top_k` tokens with the highest logits.
          logits: float32 [..., k], theirs.
        """
        query = self.selector.query(previous, hidden)
        return score_candidates(query, self.selector.successors[...], candidates, logits)


def abstract_drafter(config: DrafterConfig, compute: Compute, param_dtype: str) -> Drafter:
    """Returns a drafter with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Drafter(config, rngs=nnx.Rngs(0), compute=compute,
                                          param_dtype=jnp.dtype(param_dtype)))


class DraftedModel(nnx.Module):
    """A target and its drafter.

    Raises:
      ConfigError: they do not fit together.
    """

    def __init__(self, target: Transformer, drafter: Drafter):
        ours, theirs = drafter.config.layers, target.config
        for name in ("hidden_size", "vocab_size"):
            if getattr(ours, name) != getattr(theirs, name):
                raise ConfigError(f"the drafter has {name} {getattr(ours, name)}, and the target "
                                  f"{getattr(theirs, name)}; use the target that the drafter was trained for")
        if drafter.config.target_layer_ids[-1] > theirs.num_layers - 2:
            raise ConfigError(f"the drafter takes features from layer {drafter.config.target_layer_ids[-1]}, and the "
                              f"last that the target gives is {theirs.num_layers - 2}")
        self.target, self.drafter = target, drafter

    @property
    def config(self) -> ModelConfig:
        """The target's architecture."""
        return self.target.config

    @property
    def compute(self) -> Compute:
        """How the target is computed."""
        return self.target.compute

    @property
    def lora(self) -> None:
        """None: a model with a drafter has no LoRA."""
        return None

    def block_embeddings(self, anchor_tokens: jax.Array, slots: int | None = None) -> jax.Array:
        """Returns the target's embeddings of blocks: anchor tokens int [batch, A] to [batch, A * slots, embed].

        Args:
          slots: of a block; None: `block_size`.
        """
        config = self.drafter.config
        slots = config.block_size if slots is None else slots
        tokens = jnp.full((*anchor_tokens.shape, slots), config.mask_token_id).at[..., 0].set(anchor_tokens)
        return self.target.embed(tokens.reshape(len(tokens), -1), jnp.dtype(self.drafter.compute.dtype))
