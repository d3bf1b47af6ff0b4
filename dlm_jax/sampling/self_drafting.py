"""Speculative decoding by a model that drafts for itself, in the same pass that checks what it drafted before.

After each token that may turn out to be the last, there is a block of masks, or of random tokens if the model learned
from those, which sees the text up to that token. Of the block that follows the token that is kept, the next drafts are
made: the most likely tokens, or with a `DraftHead`, which sees the token before each, samples. The text is that of the
model's clean attention, from left to right; with LoRA at noised positions alone it is the text of the base (Apple,
arXiv 2507.11851).

A pass reads (drafts + 1) x (1 + masks of a block) tokens. A model whose masks see no later one needs only as many as
there are drafts; one that learned from full blocks gets full blocks.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dlm_jax.attention import AttentionMask
from dlm_jax.diffusion import DiffusionSpec
from dlm_jax.errors import ConfigError
from dlm_jax.models import LMHead, ModelConfig
from dlm_jax.random import fold_keys, position_keys
from dlm_jax.sampling.config import SamplerConfig
from dlm_jax.sampling.spec import NO_DRAFT, Drafts, SamplingInputs, SamplingState
from dlm_jax.sampling.speculative import NextDraft, SpeculativeStepper, last_token_and, next_position
from dlm_jax.sampling.tokens import process_logits

_NOISE_KEYS = 8  # noise has other random numbers than drafts and tokens


@dataclasses.dataclass(frozen=True)
class SelfDraftingStepper(SpeculativeStepper):
    """Speculative decoding by a model with blocks that guesses for itself, in the pass that checks its last guesses.

    Attributes:
      lm_head: what makes the drafts' logits; with `draft_vocab_size` of the first tokens alone.
    """

    lm_head: LMHead

    @property
    def num_drafts(self) -> int:
        return self.spec.config.num_drafts or self.spec.diffusion.blocks.size - 1

    @property
    def _group_size(self) -> int:
        """The masks after each token that may turn out to be the last."""
        blocks = self.spec.diffusion.blocks
        return self.num_drafts if blocks.noised_attention == "causal" else blocks.size

    def start(self, tokens: jax.Array, inputs: SamplingInputs) -> SamplingState:
        state = super().start(tokens, inputs)
        groups = (self.num_drafts + 1) * self._group_size
        room = ((0, 0), (0, 0), (0, groups), (0, 0), (0, 0))  # [layers, batch, length, kv_heads, head_dim]
        cache = jax.tree.map(lambda x: jnp.pad(x, room), state.cache)
        drafts = jnp.full((len(tokens), self.num_drafts), NO_DRAFT)
        is_sampled = self.network.draft_head is not None and inputs.settings.temperature is not None
        probs = jnp.zeros((*drafts.shape, self.lm_head.vocab_size)) if is_sampled else None
        return state._replace(cache=cache, drafts=Drafts(drafts, probs))

    def advance(self, inputs: SamplingInputs, state: SamplingState) -> SamplingState:
        blocks, (batch, length) = self.spec.diffusion.blocks, state.tokens.shape
        number, size = self.num_drafts + 1, self._group_size
        at = next_position(state)
        given, window = last_token_and(state.drafts, state)
        places = (window[:, :, None] + jnp.arange(size)).reshape(batch, -1)
        noise = self._noise(places, inputs.keys)
        slots = jnp.where(window <= length, window - 1, length + number * size)  # past the row's end: not cached
        scratch = jnp.broadcast_to(length + jnp.arange(number * size), noise.shape)
        hidden, cache = self.network.cached_hidden(
            jnp.concatenate([given, noise], axis=1),
            AttentionMask.drafts(length, size, at, causal=blocks.noised_attention == "causal"),
            jnp.concatenate([window - 1, places], axis=1), state.cache, jnp.concatenate([slots, scratch], axis=1),
            noised=(number, number * (1 + size)))
        checked, guessing = hidden[:, :number], hidden[:, number:].reshape(batch, number, size, -1)
        state, kept = self.verify(checked, state.drafts, inputs, state)
        kept = jnp.maximum(kept, 1)
        block = jnp.take_along_axis(guessing, kept[:, None, None, None] - 1, axis=1)[:, 0, : self.num_drafts]
        return state._replace(cache=cache, drafts=self._draft(block, at + kept, inputs, state))

    def _noise(self, places: jax.Array, keys: jax.Array) -> jax.Array:
        """Returns what stands at unknown tokens, int32 [batch, n]; random tokens are a function of key and place."""
        if self.spec.diffusion.blocks.noise == "mask":
            return jnp.full(places.shape, self.spec.diffusion.mask_token_id)

        def token(key: jax.Array) -> jax.Array:
            return jax.random.randint(key, (), 0, self.network.config.vocab_size, jnp.int32)

        return jax.vmap(jax.vmap(token))(position_keys(fold_keys(keys, _NOISE_KEYS), places))

    @jax.named_scope("draft")
    def _draft(self, block: jax.Array, at: jax.Array, inputs: SamplingInputs, state: SamplingState) -> Drafts:
        """Returns drafts for the positions from `at` [batch] on, of masks' states [batch, num_drafts, embed]."""
        network, spec = self.network, self.spec
        if network.draft_head is None:
            logits = process_logits(self.lm_head(block), spec, inputs.settings, None)
            return Drafts(jnp.argmax(logits, axis=-1).astype(jnp.int32), None)

        def next_draft(previous: jax.Array, carry: None, hidden: jax.Array) -> NextDraft:
            return NextDraft(self.lm_head(network.correct_drafts(hidden, previous)), carry)

        return self.draft_in_turn(next_draft, jnp.swapaxes(block, 0, 1), None, at, inputs, state)


def check_drafts_itself(config: SamplerConfig, diffusion: DiffusionSpec, model: ModelConfig) -> None:
    """Raises ConfigError for a model that cannot guess as it was trained."""
    blocks = diffusion.blocks
    if blocks is None or blocks.size == 1 or blocks.clean_attention != "causal" or diffusion.mask_token_id is None:
        raise ConfigError("drafter=self needs a model that was trained with blocks of two or more tokens and causal "
                          "clean attention, which this one was not; choose drafter=ngram")
    if model.sliding_window is not None:
        raise ConfigError("drafter=self does not know sliding windows, which this model has; choose drafter=ngram")
    if config.num_drafts is not None and config.num_drafts >= blocks.size:
        raise ConfigError(f"num_drafts is at most {blocks.size - 1} with drafter=self, the rest of a block of "
                          f"{blocks.size} tokens, got {config.num_drafts}")
