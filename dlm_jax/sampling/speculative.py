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

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dlm_jax.attention import AttentionMask
from dlm_jax.errors import ConfigError
from dlm_jax.random import fold_keys
from dlm_jax.sampling.spec import NO_DRAFT, Drafts, SamplingInputs, SamplingSpec, SamplingState, pending_mask
from dlm_jax.sampling.steppers import AutoregressiveStepper, reveal
from dlm_jax.sampling.tokens import categorical, process_logits, sample_tokens, seen_tokens, token_probs

_DRAFT_KEYS = 7  # the drafts' random numbers are not those of the tokens
_LOOK_UP_DRAFTS = 8  # by default
_LONGEST, _SHORTEST = 4, 2  # how many of the last tokens are looked up


class NextDraft(NamedTuple):
    """What a drafter gives for one place of a row, given the token before it."""

    logits: jax.Array  # float32 [batch, vocab]
    carry: Any  # for the next place
    goes_on: jax.Array | None = None  # bool [batch], whether this draft is worth checking; None: it is


class SpeculativeStepper(AutoregressiveStepper):
    """Decodes from left to right, in each step as many tokens as the drafter guessed right, and one more.

    This one looks the drafts up in the text; subclasses have other drafters.
    """

    @property
    def num_drafts(self) -> int:
        return self.spec.config.num_drafts or _LOOK_UP_DRAFTS

    @property
    def widths(self) -> tuple[int, ...]:
        """The numbers of drafts that a compiled pass can check; without any, a pass over the last token is enough."""
        return 0, self.num_drafts

    def start(self, tokens: jax.Array, inputs: SamplingInputs) -> SamplingState:
        accepted = jnp.zeros((len(tokens), self.num_drafts), jnp.int32)
        return super().start(tokens, inputs)._replace(accepted=accepted)

    def advance(self, inputs: SamplingInputs, state: SamplingState) -> SamplingState:
        unfinished = pending_mask(self.spec, inputs, state).any(axis=1)
        with jax.named_scope("draft"):  # for profiles
            drafts = self.guess(inputs, state)
        drafts = drafts._replace(tokens=jnp.where(unfinished[:, None], drafts.tokens, NO_DRAFT))
        branches = [functools.partial(self.check, drafts.first(width), inputs) for width in self.widths]
        number = _all_before(drafts.tokens != NO_DRAFT)[:, 1:].sum(axis=1).max()
        return jax.lax.switch(jnp.searchsorted(jnp.array(self.widths), number), branches, state)

    def guess(self, inputs: SamplingInputs, state: SamplingState) -> Drafts:
        """Returns guesses of the next tokens."""
        return Drafts(look_up(state.tokens, next_position(state), self.num_drafts), None)

    def check(self, drafts: Drafts, inputs: SamplingInputs, state: SamplingState) -> SamplingState:
        """Runs the model over the last token and the drafts, and reveals what it accepts and one more."""
        given, window = last_token_and(drafts, state)
        hidden, cache = self.network.cached_hidden(given, AttentionMask.causal(), window - 1, state.cache)
        return self.verify(hidden, drafts, inputs, state)[0]._replace(cache=cache)

    @jax.named_scope("verify")
    def verify(self, hidden: jax.Array, drafts: Drafts, inputs: SamplingInputs,
               state: SamplingState) -> tuple[SamplingState, jax.Array]:
        """Samples at each draft and after the last, and reveals what follows from the tokens before it.

        Args:
          hidden: [batch, drafts + 1, embed], the states of the last token and of the drafts.

        Returns:
          The state with the revealed tokens, and how many they are, int32 [batch].
        """
        spec, guesses, (batch, length) = self.spec, drafts.tokens, state.tokens.shape
        unfinished = pending_mask(spec, inputs, state).any(axis=1)
        window = next_position(state)[:, None] + jnp.arange(guesses.shape[1] + 1)
        # A position is wanted if all guesses before it exist: after a missing one nothing can be kept.
        wanted = _all_before(guesses != NO_DRAFT) & unfinished[:, None] & (window < inputs.lengths[:, None])
        tokens, confidence, _ = sample_tokens(self.network, spec, hidden, wanted, window, inputs, state, inputs.keys,
                                              drafts)
        kept = wanted & _all_before(tokens[:, :-1] == guesses)
        if spec.stop_at_eos:  # the text ends at its first end of text, whatever was guessed after it
            ends = jnp.isin(tokens, jnp.array(spec.eos_token_ids))
            kept &= jnp.cumsum(ends, axis=1) - ends == 0
        rows, places = jnp.arange(batch)[:, None], jnp.where(kept, window, length)
        revealed = (jnp.zeros(state.tokens.shape, x.dtype).at[rows, places].set(x, mode="drop")
                    for x in (kept, tokens, confidence))
        right = kept[:, :-1] & (tokens[:, :-1] == guesses)
        accepted = state.accepted.at[:, : guesses.shape[1]].add(right)
        return reveal(state, *revealed, unfinished)._replace(accepted=accepted), kept.sum(axis=1)

    def draft_in_turn(self, next_draft: Callable[[jax.Array, Any, Any], NextDraft], slots: Any, carry: Any,
                      at: jax.Array, inputs: SamplingInputs, state: SamplingState) -> Drafts:
        """Chooses drafts one after another, each given the one before it: samples, or at temperature 0 the most likely.

        Args:
          next_draft: called with the token before, int32 [batch], the carry, and one place's part of `slots`.
          slots: a pytree of arrays [num_drafts, ...].
          at: int32 [batch], the position of the first draft.
        """
        settings, rows = inputs.settings, jnp.arange(len(at))
        keys = fold_keys(inputs.keys, _DRAFT_KEYS)

        def choose(before: tuple[Any, ...], here: tuple[jax.Array, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            (previous, carry, seen, worthwhile), (number, slot) = before, here
            logits, carry, goes_on = next_draft(previous, carry, slot)
            logits = process_logits(logits[:, None], self.spec, settings, seen)
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
        seen = seen_tokens(self.network.config.vocab_size, inputs, state)
        start = token_before(state.tokens, at), carry, seen, jnp.ones(len(at), bool)
        _, (drafts, probs) = jax.lax.scan(choose, start, (number, slots))
        return Drafts(drafts.T, None if probs is None else jnp.swapaxes(probs, 0, 1))


def look_up(tokens: jax.Array, at: jax.Array, num_drafts: int) -> jax.Array:
    """Looks the last 2 to 4 tokens up in the text so far, and guesses that what followed them there follows again.

    The place where most of them match counts; of several, the last.

    It needs no training, so it is what any other drafter must beat. It finds much in code, tables and answers that
    quote their question. Known as prompt lookup decoding.

    Args:
      tokens: int32 [batch, length], known before `at` [batch].

    Returns:
      Guesses int32 [batch, num_drafts] for the positions from `at` on, or `NO_DRAFT`.
    """
    length, at = tokens.shape[1], at[:, None]
    ends = jnp.arange(length)  # where an earlier occurrence of the last tokens may end

    def match(carry: tuple[jax.Array, jax.Array], back: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        run, number = carry
        last = jnp.take_along_axis(tokens, jnp.maximum(at - 1 - back, 0), axis=1)
        run &= (jnp.roll(tokens, back, axis=1) == last) & (ends >= back)
        return (run, number + run), None

    before = ends < at - 1
    (_, number), _ = jax.lax.scan(match, (before, jnp.zeros(tokens.shape, jnp.int32)), jnp.arange(_LONGEST))
    best = jnp.argmax(jnp.where(number >= _SHORTEST, number * length + ends, -1), axis=1)[:, None]
    found = jnp.take_along_axis(number, best, axis=1) >= _SHORTEST
    guessed = best + 1 + jnp.arange(num_drafts)
    guesses = jnp.take_along_axis(tokens, jnp.minimum(guessed, length - 1), axis=1)
    return jnp.where(found & (guessed < at), guesses, NO_DRAFT)


def next_position(state: SamplingState) -> jax.Array:
    """Returns each row's first position without a token, int32 [batch]; 0 where it has none."""
    return jnp.argmax(state.masked, axis=1)


def token_before(tokens: jax.Array, at: jax.Array) -> jax.Array:
    """Returns the token before each row's position `at` [batch], or the nearest to it: int32 [batch]."""
    return jnp.take_along_axis(tokens, jnp.clip(at - 1, 0, tokens.shape[1] - 1)[:, None], axis=1)[:, 0]


def last_token_and(drafts: Drafts, state: SamplingState) -> tuple[jax.Array, jax.Array]:
    """Returns what a pass reads, the last token and the drafts, and the positions after each of them."""
    at = next_position(state)
    given = jnp.concatenate([token_before(state.tokens, at)[:, None], jnp.maximum(drafts.tokens, 0)], axis=1)
    return given, at[:, None] + jnp.arange(given.shape[1])


def check_draft_vocab(spec: SamplingSpec, vocab_size: int) -> None:
    """Raises ConfigError where the drafts' part of the vocabulary is larger than all of it, or has no text."""
    size = spec.config.draft_vocab_size
    if size is None:
        return
    if size > vocab_size:
        raise ConfigError(f"draft_vocab_size {size} is more than the {vocab_size} tokens of the vocabulary; lower or "
                          "remove it")
    without_text = {spec.diffusion.mask_token_id, *spec.eos_token_ids, *itertools.chain(*spec.diffusion.missing_ids)}
    if without_text.issuperset(range(size)):
        raise ConfigError(f"draft_vocab_size {size} leaves no token to guess: the first of the vocabulary are the mask "
                          "token, ends of texts, or ids that no token has; raise it")


def _all_before(right: jax.Array) -> jax.Array:
    """Returns whether all before a position are True, for each and one after the last: [batch, n] to [batch, n + 1]."""
    return jnp.cumprod(jnp.pad(right, ((0, 0), (1, 0)), constant_values=True), axis=1) > 0
