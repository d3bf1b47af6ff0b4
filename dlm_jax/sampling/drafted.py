"""Speculative decoding with a trained drafter: a small model that reads the hidden states of the model it guesses for.

A step is a pass of the drafter over one block, and a pass of the model, the target, over the guessed tokens. A drafter
whose guesses depend on the token before each (by a Markov head, or a selector) samples them one after another, and the
target accepts them or samples again. Any other drafter guesses the most likely token of each position: sampled without
knowing each other, guesses would contradict each other. `sampling.speculative` says why the text follows the target's
distribution either way.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from dlm_jax.attention import AttentionMask
from dlm_jax.errors import ConfigError
from dlm_jax.models import DraftedModel, LMHead
from dlm_jax.sampling.config import SamplerConfig
from dlm_jax.sampling.spec import Drafts, SamplingInputs, SamplingSpec, SamplingState
from dlm_jax.sampling.speculative import NextDraft, SpeculativeStepper, last_token_and, next_position, token_before
from dlm_jax.sampling.steppers import window_tokens
from dlm_jax.sampling.tokens import process_logits, seen_tokens


@dataclasses.dataclass(frozen=True)
class DraftedStepper(SpeculativeStepper):
    """Speculative decoding of a target, `network`, with the drafter of `model`, which has both.

    Attributes:
      lm_head, markov_head: what makes the drafter's logits; with `draft_vocab_size` of the first tokens alone.
    """

    model: DraftedModel
    lm_head: LMHead
    markov_head: LMHead | None

    @classmethod
    def of(cls, model: DraftedModel, spec: SamplingSpec) -> Self:
        """Returns the stepper for a model. Called outside the loop, it copies parts of the heads once."""
        size, markov = spec.config.draft_vocab_size, model.drafter.markov
        return cls(model.target, spec, model, model.target.lm_head.first(size),
                   None if markov is None else markov.lm_head.first(size))

    @property
    def num_drafts(self) -> int:
        return self.spec.config.num_drafts or self.model.drafter.config.num_drafts

    @property
    def widths(self) -> tuple[int, ...]:
        number = self.num_drafts
        return (number,) if self.spec.config.draft_threshold is None else (0, -(-number // 2), number)

    def start(self, tokens: jax.Array, inputs: SamplingInputs) -> SamplingState:
        return super().start(tokens, inputs)._replace(drafter_cache=self.model.drafter.empty_cache(*tokens.shape))

    def prefill(self, inputs: SamplingInputs, state: SamplingState, first: jax.Array, width: int) -> SamplingState:
        given, positions = window_tokens(state.tokens, first, width)
        _, cache, features = self.network.cached_hidden_and_features(given, AttentionMask.causal(), positions,
                                                                     state.cache, self._taps)
        anchor = next_position(state)[:, None] - 1
        return self._read_features(features, positions, positions < anchor, state._replace(cache=cache))

    def guess(self, inputs: SamplingInputs, state: SamplingState) -> Drafts:
        spec, drafter, at = self.spec, self.model.drafter, next_position(state)
        slots = self.num_drafts + drafter.config.first_slot  # fewer than a full block, if fewer drafts are wanted
        block = self.model.block_embeddings(token_before(state.tokens, at)[:, None], slots)
        hidden = drafter.cached_hidden(block, jnp.maximum(at - 1, 0)[:, None] + jnp.arange(slots),
                                       state.drafter_cache)[:, drafter.config.first_slot :]
        logits = self.lm_head(hidden)
        if drafter.markov is None and drafter.selector is None:
            seen = seen_tokens(self.network.config.vocab_size, inputs, state)
            logits = process_logits(logits, spec, inputs.settings, seen)
            return Drafts(jnp.argmax(logits, axis=-1).astype(jnp.int32), None)
        rows = jnp.arange(len(at))[:, None]

        def next_draft(previous: jax.Array, markov_state: jax.Array, slot: tuple[jax.Array, jax.Array]) -> NextDraft:
            hidden, logits = slot
            goes_on = None
            if drafter.markov is not None:
                bias, markov_state = drafter.markov_bias(previous, hidden, markov_state, self.markov_head)
                logits = logits + bias
            if drafter.selector is not None:
                top, candidates = jax.lax.top_k(process_logits(logits[:, None], spec, inputs.settings, None)[:, 0],
                                                min(drafter.config.selector_top_k, logits.shape[-1]))
                scores = drafter.select(previous, hidden, candidates, top)
                logits = jnp.full_like(logits, -jnp.inf).at[rows, candidates].set(scores)
            if spec.config.draft_threshold is not None:
                goes_on = jax.nn.sigmoid(drafter.confidence(previous, hidden)) >= spec.config.draft_threshold
            return NextDraft(logits, markov_state, goes_on)

        slots = jnp.swapaxes(hidden, 0, 1), jnp.swapaxes(logits, 0, 1)
        return self.draft_in_turn(next_draft, slots, drafter.markov_state((len(at),)), at, inputs, state)

    def check(self, drafts: Drafts, inputs: SamplingInputs, state: SamplingState) -> SamplingState:
        given, window = last_token_and(drafts, state)
        hidden, cache, features = self.network.cached_hidden_and_features(
            given, AttentionMask.causal(), window - 1, state.cache, self._taps)
        state, kept = self.verify(hidden, drafts, inputs, state)
        # The tokens read by this pass that stay: the last one, and the accepted drafts.
        stay = jnp.arange(given.shape[1]) < kept[:, None]
        return self._read_features(features, window - 1, stay, state._replace(cache=cache))

    @property
    def _taps(self) -> tuple[int, ...]:
        return self.model.drafter.config.target_layer_ids

    @jax.named_scope("draft")
    def _read_features(self, features: jax.Array, positions: jax.Array, stay: jax.Array,
                       state: SamplingState) -> SamplingState:
        """Returns the state in which the drafter has read the features of the positions that `stay`."""
        drafter = self.model.drafter
        positions = jnp.where(stay, positions, state.tokens.shape[1])  # past the end: not written
        return state._replace(drafter_cache=drafter.extend_cache(drafter.fuse(features), positions,
                                                                 state.drafter_cache))


def check_drafter(config: SamplerConfig, model: DraftedModel) -> None:
    """Raises ConfigError where settings of the drafter do not fit it."""
    drafter = model.drafter.config
    if config.num_drafts is not None and config.num_drafts > drafter.num_drafts:
        raise ConfigError(f"this drafter guesses at most {drafter.num_drafts} tokens, got num_drafts "
                          f"{config.num_drafts}")
    if config.draft_threshold is not None and not drafter.confidence_head:
        raise ConfigError("draft_threshold needs a drafter with a confidence head, which this one lacks; remove it")
