"""Speculative decoding: a drafter guesses the next tokens, and the model checks all of them in one forward pass.

The text follows the model's own distribution, whatever the drafter. The model chooses a token at every drafted
position, and keeps the tokens up to the first that differs from its draft: each of them was chosen given the right
tokens before it. There are two kinds of drafts.

Certain ones, which are looked up or the most likely tokens: the model samples with each position's own random numbers,
so that the text is the one that autoregressive decoding gives for the same seed, as far as passes of different widths
round alike. A draft is accepted with its probability under the model.

Sampled ones, from a distribution q that the drafter gives: the model accepts them or samples again, so that a draft is
accepted with probability sum min(p, q) (Leviathan et al., arXiv 2211.17192). The text is another sample of the same
distribution.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from dlm_jax.attention import AttentionMask
from dlm_jax.config_fields import check_at_least
from dlm_jax.sampling.spec import (
    NO_DRAFT,
    Network,
    RowSettings,
    SamplingInputs,
    SamplingSpec,
    SamplingState,
    pending_mask,
)
from dlm_jax.sampling.steppers import AutoregressiveStepper, reveal
from dlm_jax.sampling.tokens import categorical, process_logits, sample_tokens, seen_tokens, token_probs

_DRAFT_KEYS = 7  # the drafts' random numbers are not those of the tokens


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

    @property
    def num_drafts(self) -> int:
        return self.spec.drafter.num_drafts

    def start(self, tokens: jax.Array, fixed: jax.Array, lengths: jax.Array,
              keys: jax.Array, settings: RowSettings) -> tuple[SamplingInputs, SamplingState]:
        inputs, state = super().start(tokens, fixed, lengths, keys, settings)
        return inputs, state._replace(accepted=jnp.zeros((len(tokens), self.num_drafts), jnp.int32))

    @property
    def widths(self) -> tuple[int, ...]:
        """The numbers of drafts that a compiled pass can check; without any, a pass over the last token is enough."""
        return 0, self.num_drafts

    def advance(self, inputs: SamplingInputs, state: SamplingState) -> SamplingState:
        unfinished = pending_mask(self.spec, inputs, state).any(axis=1)
        at = jnp.argmax(state.masked, axis=1)
        drafts, probs = self.guess(inputs, state, at)
        drafts = jnp.where(unfinished[:, None], drafts, NO_DRAFT)
        branches = [functools.partial(self.check, drafts[:, :width], None if probs is None else probs[:, :width], at,
                                      unfinished, inputs) for width in self.widths]
        number = _all_before(drafts != NO_DRAFT)[:, 1:].sum(axis=1).max()
        return jax.lax.switch(jnp.searchsorted(jnp.array(self.widths), number), branches, state)

    def guess(self, inputs: SamplingInputs, state: SamplingState,
              at: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Returns drafts int32 [batch, num_drafts] for the positions from `at` [batch] on, or `NO_DRAFT`.

        The second result is the distributions that they are samples of, [batch, num_drafts, vocab], or None where they
        are certain.
        """
        return self.spec.drafter.draft(state.tokens, at), None

    def check(self, drafts: jax.Array, probs: jax.Array | None, at: jax.Array, unfinished: jax.Array,
              inputs: SamplingInputs, state: SamplingState) -> SamplingState:
        """Runs the model over the last token and the drafts, and reveals what it accepts and one more."""
        given, window = last_token_and(drafts, at, state.tokens)
        hidden, cache = self.network.cached_hidden(given, AttentionMask.causal(), window - 1, state.cache)
        return self.verify(hidden, drafts, at, unfinished, inputs, state, probs)[0]._replace(cache=cache)

    def verify(self, hidden: jax.Array, guesses: jax.Array, at: jax.Array, unfinished: jax.Array,
               inputs: SamplingInputs, state: SamplingState,
               probs: jax.Array | None = None) -> tuple[SamplingState, jax.Array]:
        """Samples at each guess and after the last, and reveals what follows from the tokens before it.

        Args:
          hidden: [batch, guesses + 1, embed], the states of the last token and of the guesses.
          guesses: int32 [batch, guesses], for the positions from `at` [batch] on.
          probs: float32 [batch, guesses, vocab], the distributions that guesses are samples of; None: they are certain.

        Returns:
          The state with the revealed tokens, and how many they are, int32 [batch].
        """
        spec, length = self.spec, state.tokens.shape[1]
        window = at[:, None] + jnp.arange(guesses.shape[1] + 1)
        # A position is wanted if all guesses before it exist: after a missing one nothing can be kept.
        wanted = _all_before(guesses != NO_DRAFT) & unfinished[:, None] & (window < inputs.lengths[:, None])
        tokens, confidence, _ = sample_tokens(self.network, spec, hidden, wanted, window, inputs, state, inputs.keys,
                                              guesses, probs)
        kept = wanted & _all_before(tokens[:, :-1] == guesses)
        if spec.stop_at_eos:  # the text ends at its first end of text, whatever was guessed after it
            ends = jnp.isin(tokens, jnp.array(spec.eos_token_ids))
            kept &= jnp.cumsum(ends, axis=1) - ends == 0
        rows, places = jnp.arange(len(at))[:, None], jnp.where(kept, window, length)
        revealed = (jnp.zeros(state.tokens.shape, x.dtype).at[rows, places].set(x, mode="drop")
                    for x in (kept, tokens, confidence))
        right = kept[:, :-1] & (tokens[:, :-1] == guesses)
        accepted = state.accepted.at[:, : guesses.shape[1]].add(right)
        return reveal(state, *revealed, unfinished)._replace(accepted=accepted), kept.sum(axis=1)


class NextDraft(NamedTuple):
    """What a drafter gives for one place of a row, given the token before it."""

    logits: jax.Array  # float32 [batch, vocab]
    carry: Any  # for the next place
    goes_on: jax.Array | None = None  # bool [batch], whether this draft is worth checking; None: it is


def choose_drafts(next_draft: Callable[[jax.Array, Any, Any], NextDraft], slots: Any, carry: Any, last: jax.Array,
                  at: jax.Array, network: Network, spec: SamplingSpec, inputs: SamplingInputs,
                  state: SamplingState) -> tuple[jax.Array, jax.Array | None]:
    """Chooses drafts one after another, each given the one before it: samples, or at temperature 0 the most likely.

    Args:
      next_draft: called with the token before, int32 [batch], the carry, and one place's part of `slots`.
      slots: a pytree of arrays [num_drafts, ...].
      last: int32 [batch], the token before the first draft.
      at: int32 [batch], the position of the first draft.

    Returns:
      Tokens int32 [batch, num_drafts], and the distributions that they are samples of, or None, as `guess` does.
    """
    settings, rows = inputs.settings, jnp.arange(len(at))
    keys = jax.vmap(jax.random.fold_in, (0, None))(inputs.keys, _DRAFT_KEYS)
    seen = None
    if settings.repetition_penalty is not None:
        seen = seen_tokens(network.config.vocab_size, inputs, state, None)

    def choose(before: tuple[Any, ...], here: tuple[jax.Array, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        (previous, carry, seen, worthwhile), (number, slot) = before, here
        logits, carry, goes_on = next_draft(previous, carry, slot)
        logits = process_logits(logits[:, None], spec, settings, seen)
        probs, token = None, jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
        if settings.temperature is not None:
            probs = token_probs(logits, settings)[:, 0]
            token = jax.vmap(categorical)(probs, jax.vmap(jax.random.fold_in)(keys, at + number))
        if goes_on is not None:
            worthwhile &= goes_on
        if seen is not None:
            seen = seen.at[rows, 0, token].set(True)
        return (token, carry, seen, worthwhile), (jnp.where(worthwhile, token, NO_DRAFT), probs)

    number = jnp.arange(len(jax.tree.leaves(slots)[0]))
    start = last, carry, seen, jnp.ones(len(at), bool)
    _, (drafts, probs) = jax.lax.scan(choose, start, (number, slots))
    return drafts.T, None if probs is None else jnp.swapaxes(probs, 0, 1)


def last_token_and(guesses: jax.Array, at: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns what a pass reads, the last token and the guesses, and the positions after each of them.

    Args:
      guesses: int32 [batch, guesses], for the positions from `at` [batch] on.
      tokens: int32 [batch, length].
    """
    last = jnp.take_along_axis(tokens, jnp.maximum(at - 1, 0)[:, None], axis=1)
    window = at[:, None] + jnp.arange(guesses.shape[1] + 1)
    return jnp.concatenate([last, jnp.maximum(guesses, 0)], axis=1), window


def _all_before(right: jax.Array) -> jax.Array:
    """Returns whether all before a position are True, for each and one after the last: [batch, n] to [batch, n + 1]."""
    return jnp.cumprod(jnp.pad(right, ((0, 0), (1, 0)), constant_values=True), axis=1) > 0
