"""One step of sampling: by denoising entire rows, by denoising one block after another, or autoregressively.

A step is one forward pass and the tokens that it reveals. This is the one place where sampling undoes the shift.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from dlm_jax.attention import AttentionMask
from dlm_jax.models import Cache, Transformer
from dlm_jax.random import fold_keys, position_keys
from dlm_jax.sampling.config import POLICIES
from dlm_jax.sampling.spec import (
    DecodeFrontier,
    SamplingInputs,
    SamplingSpec,
    SamplingState,
    block_steps,
    next_reveal,
    pending_mask,
    planned_step,
)
from dlm_jax.sampling.tokens import sample_tokens

_PREFIX_WIDTHS = 4  # compiled widths of what follows a cached prefix


@dataclasses.dataclass(frozen=True)
class Stepper:
    """How a kind of model or policy fills gaps: each kind has its own `advance`."""

    network: Transformer
    spec: SamplingSpec

    def start(self, tokens: jax.Array, inputs: SamplingInputs) -> SamplingState:
        """Returns the state with every gap of `tokens` [batch, length] masked, for `prefill`."""
        # Causal attention never sees a masked token.
        mask_token_id = 0 if self.spec.config.policy == "autoregressive" else self.spec.diffusion.mask_token_id
        zeros = jnp.zeros_like(inputs.lengths)
        return SamplingState(
            jnp.where(inputs.gaps, mask_token_id, tokens), masked=inputs.gaps, confidence=jnp.zeros(tokens.shape),
            steps=zeros, block=zeros, steps_in_block=zeros, cache=None)

    def prefill(self, inputs: SamplingInputs, state: SamplingState, first: jax.Array, width: int) -> SamplingState:
        """Returns the state after the given tokens from `first` to `first` + `width` are in the cache.

        It is called for all given tokens before the first gap, from left to right, and may see tokens after them.
        """
        return state

    def advance(self, inputs: SamplingInputs, state: SamplingState) -> SamplingState:
        """Returns the state after one forward pass of the batch."""
        raise NotImplementedError

    def empty_cache(self, tokens: jax.Array, copies: int = 1) -> Cache:
        """Returns room for the keys and values of `tokens` [batch, length], several times over with `copies`."""
        batch, length = tokens.shape
        return Cache.empty(self.network.config, copies * batch, length, self.network.compute.dtype)


class DenoisingStepper(Stepper):
    """Denoises entire rows, each in a block of its own.

    With a cache that grows stale all rows are in the same block, since they refresh it together. Without one, every
    step computes the entire row, so that there is nothing to prefill.
    """

    def start(self, tokens: jax.Array, inputs: SamplingInputs) -> SamplingState:
        state = super().start(tokens, inputs)
        if self.spec.config.cache == "none":
            return state
        cache = self.empty_cache(tokens, copies=1 if inputs.settings.cfg_scale is None else 2)
        return state._replace(cache=cache, block=jnp.int32(0), steps_in_block=jnp.int32(0))

    def advance(self, inputs: SamplingInputs, state: SamplingState) -> SamplingState:
        spec, config, policy = self.spec, self.spec.config, POLICIES[self.spec.config.policy]
        settings, length = inputs.settings, state.tokens.shape[1]
        plan_keys, step_keys = fold_keys(inputs.keys, 0), fold_keys(inputs.keys, 1)
        step_keys = jax.vmap(jax.random.fold_in)(step_keys, state.steps)

        here = inputs.gaps & (inputs.block_ids == state.block.reshape(-1, 1))
        number, steps = here.sum(axis=1), block_steps(settings.num_steps, inputs.gaps, inputs.block_ids, state.block)
        active = here & pending_mask(spec, inputs, state)
        unfinished = active.any(axis=1)
        if settings.remask is not None:
            may_remask = unfinished & (state.steps_in_block + 1 < jnp.minimum(steps, number))
            remask = here & ~state.masked & may_remask[:, None]
            positions = jnp.broadcast_to(jnp.arange(length), here.shape)
            remask &= _uniform(fold_keys(step_keys, 0), positions) < settings.remask[:, None]
            state = state._replace(tokens=jnp.where(remask, spec.diffusion.mask_token_id, state.tokens),
                                   masked=state.masked | remask)
            active = here & pending_mask(spec, inputs, state)
        filled = (here & ~state.masked).sum(axis=1)
        step, total = next_reveal(config, state.steps_in_block, number, filled, steps)
        state, count = state._replace(steps_in_block=step), jnp.maximum(total - filled, 1)

        window, hidden, state = self._predict(inputs, state, here)
        rows = jnp.arange(len(here))[:, None]
        active = jnp.take_along_axis(active, jnp.minimum(window, length - 1), axis=1) & (window < length)
        # From here on everything is [batch, width], of the window.

        def sample_at(positions: jax.Array) -> tuple[jax.Array, ...]:
            """Returns tokens, log-probabilities and scores, defined where `positions` is True."""
            return sample_tokens(self.network, spec, hidden, positions, window, inputs, state, fold_keys(step_keys, 1))

        if policy.independent:
            step = planned_step(config, _uniform(plan_keys, window), steps[:, None])
            step = jnp.where(active, step, steps[:, None])
            # Each row jumps to the next of its steps that reveals something: the others would change nothing.
            chosen = active & (step == step.min(axis=1, keepdims=True))
            tokens, confidence, _ = sample_at(chosen)
        elif policy.score is None:
            chosen = _highest(_uniform(fold_keys(step_keys, 2), window), active, count)
            tokens, confidence, _ = sample_at(chosen)
        else:
            tokens, confidence, score = sample_at(active)
            chosen = _highest(score, active, count)
            if settings.threshold is not None:
                chosen |= active & (confidence >= jnp.log(settings.threshold)[:, None])

        in_row = (jnp.zeros(here.shape, x.dtype).at[rows, window].set(x, mode="drop")
                  for x in (chosen, tokens, confidence))
        state = reveal(state, *in_row, unfinished)
        return self._move_on(state, self._current_block(inputs, state))

    def _move_on(self, state: SamplingState, block: jax.Array) -> SamplingState:
        """Returns the state in `block`, which is the present one while that has gaps."""
        return state._replace(block=block, steps_in_block=jnp.where(block == state.block, state.steps_in_block, 0))

    def _current_block(self, inputs: SamplingInputs, state: SamplingState) -> jax.Array:
        """Returns each row's first block that is not full, int32 [batch]; with a stale cache the first of any row."""
        pending = pending_mask(self.spec, inputs, state)
        first = jnp.where(pending, inputs.block_ids, pending.shape[1]).min(axis=1)
        return first if self.spec.config.cache == "none" else first.min()

    def _predict(self, inputs: SamplingInputs, state: SamplingState,
                 here: jax.Array) -> tuple[jax.Array, jax.Array, SamplingState]:
        """Runs the network on the block, and on all that is not cached or not fresh.

        Args:
          here: bool [batch, length], the gaps of the block.

        Returns:
          The positions of the block int [batch, width], where positions past the row's end have no meaning; the hidden
          states that predict them [batch, width, embed], with guidance twice the batch: with the given tokens, then
          without; and the state with the new cache.
        """
        spec, config, shift = self.spec, self.spec.config, self.spec.diffusion.shift
        tokens, lengths = state.tokens, inputs.lengths
        length = tokens.shape[1]
        start, width = jnp.maximum(jnp.argmax(here, axis=1), 1), min(config.block_length or length, length)
        window = start[:, None] + jnp.arange(width)
        first = start - shift  # the state here predicts position `start`
        if inputs.settings.cfg_scale is not None:
            given = ~inputs.gaps & (jnp.arange(length) > 0)
            tokens = jnp.concatenate([tokens, jnp.where(given, spec.diffusion.mask_token_id, tokens)])
            lengths, first = jnp.tile(lengths, 2), jnp.tile(first, 2)
        attention = AttentionMask.bidirectional().with_lengths(lengths)

        def run_row(cache: Cache | None) -> tuple[jax.Array, Cache | None]:
            if cache is None:
                hidden = self.network.hidden(tokens, attention)
            else:
                positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
                hidden, cache = self.network.cached_hidden(tokens, attention, positions, cache)
            at = jnp.minimum(first[:, None] + jnp.arange(width), length - 1)
            return jnp.take_along_axis(hidden, at[:, :, None], axis=1), cache

        def run_window(cache: Cache, size: int) -> tuple[jax.Array, Cache]:
            at = first[:, None] + jnp.arange(size)
            some = jnp.take_along_axis(tokens, jnp.minimum(at, length - 1), axis=1)
            hidden, cache = self.network.cached_hidden(some, attention, at, cache)
            return hidden[:, :width], cache

        if config.cache == "none":
            return window, run_row(None)[0], state
        narrowest = min(width + shift, length)
        widths = [narrowest]
        if config.cache == "prefix":
            widths = sorted({max(-(-length * i // _PREFIX_WIDTHS), narrowest) for i in range(1, _PREFIX_WIDTHS + 1)})
        index = jnp.searchsorted(jnp.array(widths), (lengths - first).max()) if len(widths) > 1 else 0
        branches = [lambda cache, size=size: run_window(cache, size) for size in widths]
        interval = config.cache_refresh_interval
        refresh = state.steps_in_block == 0 if interval is None else state.steps_in_block % interval == 0
        hidden, cache = jax.lax.cond(refresh, run_row, lambda cache: jax.lax.switch(index, branches, cache),
                                     state.cache)
        return window, hidden, state._replace(cache=cache)


class BlockStepper(DenoisingStepper):
    """Denoises one block after another, with a model trained by block diffusion and an exact cache.

    Clean text sees nothing after its block, so its keys and values never change and are cached. A step computes the
    tokens of the current block alone, which see each other and the cache. When a block is full, its clean keys and
    values are computed together with the first step of the next. Each row is in a block of its own.
    """

    def start(self, tokens: jax.Array, inputs: SamplingInputs) -> SamplingState:
        state, cache = super().start(tokens, inputs), self.empty_cache(tokens)
        hidden = jnp.zeros((len(tokens), self.network.config.hidden_size), self.network.compute.dtype)
        return state._replace(block=self._current_block(inputs, state), cache=cache,
                              frontier=DecodeFrontier(hidden, jnp.zeros(len(tokens), bool)))

    def prefill(self, inputs: SamplingInputs, state: SamplingState, first: jax.Array, width: int) -> SamplingState:
        blocks = self.spec.diffusion.blocks
        given, positions = window_tokens(state.tokens, first, width)
        hidden, cache = self.network.cached_hidden(given, blocks.prefill_mask().with_lengths(inputs.lengths),
                                                   positions, state.cache)
        last = jnp.maximum(state.block * blocks.size - 1, 0) - first  # of the clean text
        found = jnp.take_along_axis(hidden, jnp.clip(last, 0, width - 1)[:, None, None], axis=1)[:, 0]
        is_here = (last >= 0) & (last < width)
        frontier = state.frontier._replace(hidden=jnp.where(is_here[:, None], found, state.frontier.hidden))
        return state._replace(cache=cache, frontier=frontier)

    def _move_on(self, state: SamplingState, block: jax.Array) -> SamplingState:
        frontier = state.frontier._replace(pending=block != state.block)
        return super()._move_on(state, block)._replace(frontier=frontier)

    def _predict(self, inputs: SamplingInputs, state: SamplingState,
                 here: jax.Array) -> tuple[jax.Array, jax.Array, SamplingState]:
        """Returns the positions of each row's block, the states that predict them, and the state with the new cache."""
        diffusion, frontier, (batch, length) = self.spec.diffusion, state.frontier, state.tokens.shape
        size = diffusion.blocks.size
        start = state.block * size

        def run(first: jax.Array, width: int, cache: Cache, rows: jax.Array | None = None) -> tuple[jax.Array, Cache]:
            """Returns the states of `width` positions from `first`, int [n], in rows int [n]; None: in each row."""
            at, mine = first[:, None] + jnp.arange(width), jnp.arange(batch) if rows is None else rows
            attention = diffusion.blocks.decode_mask(start[mine]).with_lengths(inputs.lengths[mine])
            tokens = state.tokens[mine[:, None], jnp.clip(at, 0, length - 1)]
            return self.network.cached_hidden(tokens, attention, jnp.where(at < 0, length, at), cache,  # not cached
                                              noised=(width - size, width), rows=rows)

        def without(cache: Cache) -> tuple[jax.Array, jax.Array, Cache]:
            hidden, cache = run(start, size, cache)
            return hidden, frontier.hidden, cache

        def with_previous_of(count: int, cache: Cache) -> tuple[jax.Array, jax.Array, Cache]:
            """Computes the previous block as well, in so many rows: in those that need it first."""
            rows = jnp.argsort(~frontier.pending, stable=True)[:count]
            hidden, cache = run(jnp.concatenate([start, start[rows] - size]), size, cache,
                                jnp.concatenate([jnp.arange(batch), rows]))
            last = jnp.where(frontier.pending[rows, None], hidden[batch:, -1], frontier.hidden[rows])
            return hidden[:batch], frontier.hidden.at[rows].set(last), cache

        def with_previous(cache: Cache) -> tuple[jax.Array, jax.Array, Cache]:
            hidden, cache = run(start - size, 2 * size, cache)
            last = jnp.where(frontier.pending[:, None], hidden[:, size - 1], frontier.hidden)
            return hidden[:, size:], last, cache

        counts = self._counts(batch)
        branches = [without, *(functools.partial(with_previous_of, count) for count in counts), with_previous]
        hidden, last, cache = jax.lax.switch(jnp.searchsorted(jnp.array([0, *counts]), frontier.pending.sum()),
                                             branches, state.cache)
        if diffusion.shift:
            hidden = jnp.concatenate([last[:, None], hidden[:, :-1]], axis=1)
        width = min(size, length)
        state = state._replace(cache=cache, frontier=frontier._replace(hidden=last))
        return start[:, None] + jnp.arange(width), hidden[:, :width], state

    def _counts(self, batch: int) -> list[int]:
        """Returns the numbers of rows, other than none and all, whose previous block a step can compute.

        Rows reach the ends of their blocks at different steps, so that of many rows some do at most steps.
        """
        lora, is_spread = self.network.lora, not jax.sharding.get_abstract_mesh().empty
        if is_spread or (lora is not None and lora.where == "noised"):  # whose positions are the same in all rows
            return []
        return [count for count in (batch // 4, batch // 2) if count > 0]


class AutoregressiveStepper(Stepper):
    """Decodes from left to right with cached keys and values, as AR parents do: the baseline of every comparison."""

    def start(self, tokens: jax.Array, inputs: SamplingInputs) -> SamplingState:
        return super().start(tokens, inputs)._replace(cache=self.empty_cache(tokens))

    def prefill(self, inputs: SamplingInputs, state: SamplingState, first: jax.Array, width: int) -> SamplingState:
        given, positions = window_tokens(state.tokens, first, width)
        return state._replace(cache=self.network.cached_hidden(given, AttentionMask.causal(), positions,
                                                               state.cache)[1])

    def advance(self, inputs: SamplingInputs, state: SamplingState) -> SamplingState:
        unfinished = pending_mask(self.spec, inputs, state).any(axis=1)
        at = jnp.argmax(state.masked, axis=1)[:, None]  # [batch, 1], the first position without a token
        last = jnp.maximum(at - 1, 0)
        hidden, cache = self.network.cached_hidden(jnp.take_along_axis(state.tokens, last, axis=1),
                                                   AttentionMask.causal(), last, state.cache)
        tokens, confidence, _ = sample_tokens(self.network, self.spec, hidden, unfinished[:, None], at, inputs, state,
                                              inputs.keys)
        here = unfinished[:, None] & (jnp.arange(state.tokens.shape[1]) == at)
        return reveal(state, here, tokens, confidence, unfinished)._replace(cache=cache)


def window_tokens(tokens: jax.Array, first: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """Returns the tokens of a window of all rows, and their positions, both int32 [batch, width].

    Keys and values past a prompt's end are overwritten before any query sees them, and those past the row's end are not
    stored.
    """
    positions = jnp.broadcast_to(first + jnp.arange(width), (len(tokens), width))
    return jnp.take_along_axis(tokens, jnp.minimum(positions, tokens.shape[1] - 1), axis=1), positions


def reveal(state: SamplingState, where: jax.Array, tokens: jax.Array, confidence: jax.Array,
           unfinished: jax.Array) -> SamplingState:
    """Returns the state after a step that reveals `tokens` [batch, length] in the places `where`."""
    return state._replace(
        tokens=jnp.where(where, tokens, state.tokens), masked=state.masked & ~where,
        confidence=jnp.where(where, confidence, state.confidence), steps=state.steps + unfinished,
        steps_in_block=state.steps_in_block + 1)


def _highest(score: jax.Array, active: jax.Array, count: jax.Array) -> jax.Array:
    """Returns the `count` [batch] highest of the `active` scores [batch, length], bool; of equals the leftmost."""
    order = jnp.lexsort((-score, ~active), axis=1)  # active ones first, the best of them first
    return active & (jnp.argsort(order, axis=1) < count[:, None])


def _uniform(keys: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns uniform [0, 1) numbers [batch, n], a function of the row's key and the position int [batch, n] alone."""
    return jax.vmap(jax.vmap(jax.random.uniform))(position_keys(keys, positions))
