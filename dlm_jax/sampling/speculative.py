"""Speculative decoding: a drafter guesses the next tokens, and the model checks all of them in one forward pass.

The text is the one that autoregressive decoding gives for the same seed, whatever the drafter. The model samples a
token at every drafted position, with that position's own random numbers, and keeps the tokens up to the first that
differs from its draft: each of them was sampled given the right tokens before it. A draft is therefore accepted with
its probability under the model (Leviathan et al., arXiv 2211.17192, for a drafter that is certain of its drafts).
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from dlm_jax.attention import AttentionMask
from dlm_jax.config_fields import check_at_least
from dlm_jax.sampling.spec import SamplingInputs, SamplingState, pending_mask
from dlm_jax.sampling.steppers import AutoregressiveStepper, reveal
from dlm_jax.sampling.tokens import sample_tokens

NO_DRAFT = -1


class Drafter(Protocol):
    """Guesses tokens; hashable, as a part of `SamplingSpec`."""

    num_drafts: int

    def draft(self, tokens: jax.Array, at: jax.Array) -> jax.Array:
        """Returns guesses int32 [batch, num_drafts] for the positions from `at` [batch] on, or `NO_DRAFT`.

        Args:
          tokens: int32 [batch, length], known before `at`.
        """


@dataclasses.dataclass(frozen=True)
class NgramDrafter:
    """Looks the last tokens up in the text so far, and guesses that what followed them there follows again.

    It needs no training, so it is what any other drafter must beat. It finds much in code, tables and answers that
    quote their question. Known as prompt lookup decoding.

    Attributes:
      num_drafts: tokens to guess at a time.
      longest: the most last tokens to look up. The place where most of them match counts; of several, the last.
      shortest: the fewest tokens that must match.
    """

    num_drafts: int = 8
    longest: int = 4
    shortest: int = 2

    def __post_init__(self) -> None:
        check_at_least(self.num_drafts, 1, "num_drafts")
        check_at_least(self.shortest, 1, "shortest")
        check_at_least(self.longest, self.shortest, "longest")

    def draft(self, tokens: jax.Array, at: jax.Array) -> jax.Array:
        length, at = tokens.shape[1], at[:, None]
        ends = jnp.arange(length)  # where an earlier occurrence of the last tokens may end

        def match(carry: tuple[jax.Array, jax.Array], back: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            run, number = carry
            last = jnp.take_along_axis(tokens, jnp.maximum(at - 1 - back, 0), axis=1)
            run &= (jnp.roll(tokens, back, axis=1) == last) & (ends >= back)
            return (run, number + run), None

        before = ends < at - 1
        (_, number), _ = jax.lax.scan(match, (before, jnp.zeros(tokens.shape, jnp.int32)), jnp.arange(self.longest))
        best = jnp.argmax(jnp.where(number >= self.shortest, number * length + ends, -1), axis=1)[:, None]
        found = jnp.take_along_axis(number, best, axis=1) >= self.shortest
        guessed = best + 1 + jnp.arange(self.num_drafts)
        guesses = jnp.take_along_axis(tokens, jnp.minimum(guessed, length - 1), axis=1)
        return jnp.where(found & (guessed < at), guesses, NO_DRAFT)


@dataclasses.dataclass(frozen=True)
class SpeculativeStepper(AutoregressiveStepper):
    """Decodes from left to right, in each step as many tokens as the drafter guessed right, and one more."""

    def advance(self, inputs: SamplingInputs, state: SamplingState) -> SamplingState:
        spec, length = self.spec, state.tokens.shape[1]
        unfinished = pending_mask(spec, inputs, state).any(axis=1)
        at = jnp.argmax(state.masked, axis=1)
        drafts = jnp.where(unfinished[:, None], spec.drafter.draft(state.tokens, at), NO_DRAFT)

        def verify(width: int, state: SamplingState) -> SamplingState:
            """Runs the model on the last token and `width` - 1 drafts, and reveals what it samples there."""
            window = at[:, None] + jnp.arange(width)
            last = jnp.take_along_axis(state.tokens, jnp.maximum(at - 1, 0)[:, None], axis=1)
            guesses = drafts[:, : width - 1]
            given = jnp.concatenate([last, jnp.maximum(guesses, 0)], axis=1)
            hidden, cache = self.network.cached_hidden(given, AttentionMask.causal(), window - 1, state.cache)
            # A position is wanted if all drafts before it exist: after a missing one nothing can be kept.
            exist = jnp.cumprod(jnp.pad(guesses != NO_DRAFT, ((0, 0), (1, 0)), constant_values=True), axis=1) > 0
            wanted = exist & unfinished[:, None] & (window < inputs.lengths[:, None])
            tokens, confidence, _ = sample_tokens(self.network, spec, hidden, wanted, window, inputs, state,
                                                  inputs.keys, guesses)
            right = jnp.cumprod(jnp.pad(tokens[:, :-1] == guesses, ((0, 0), (1, 0)), constant_values=True), axis=1)
            kept = wanted & (right > 0)
            if spec.stop_at_eos:  # the text ends at its first end of text, whatever was drafted after it
                ends = jnp.isin(tokens, jnp.array(spec.eos_token_ids))
                kept &= jnp.cumsum(ends, axis=1) - ends == 0
            rows, places = jnp.arange(len(at))[:, None], jnp.where(kept, window, length)
            revealed, chosen, confident = (
                jnp.zeros(state.tokens.shape, x.dtype).at[rows, places].set(x, mode="drop")
                for x in (kept, tokens, confidence))
            return reveal(state, revealed, chosen, confident, unfinished)._replace(cache=cache)

        widths = [1, spec.drafter.num_drafts + 1]
        return jax.lax.switch((drafts[:, 0] != NO_DRAFT).any().astype(jnp.int32),
                              [lambda state, width=width: verify(width, state) for width in widths], state)
