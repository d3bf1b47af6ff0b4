"""One step of denoising: what is still masked, the network's prediction, what of it is revealed."""

import jax
import jax.numpy as jnp

from dlm_jax.sampling import blocks
from dlm_jax.sampling.config import POLICIES
from dlm_jax.sampling.forward import empty_cache, predict
from dlm_jax.sampling.spec import (
    Network,
    SamplingInputs,
    SamplingSpec,
    State,
    block_ids,
    block_steps,
    pending_mask,
    planned_step,
    target,
)
from dlm_jax.sampling.tokens import draw_tokens


def start(network: Network, spec: SamplingSpec, tokens: jax.Array, fixed: jax.Array, lengths: jax.Array,
         keys: jax.Array) -> tuple[SamplingInputs, State]:
    """The canvas with every gap masked; arguments as in `loop.sample`."""
    if spec.blocks is not None:
        return blocks.start(network, spec, tokens, fixed, lengths, keys)
    positions = jnp.arange(tokens.shape[1])
    gaps = ~fixed & (positions > 0) & (positions < lengths[:, None])
    inputs = SamplingInputs(gaps, block_ids(gaps, spec.config.block_length), lengths, keys)
    return inputs, State(
        tokens=jnp.where(gaps, spec.mask_token_id, tokens), masked=gaps, confidence=jnp.zeros(gaps.shape),
        steps=jnp.zeros_like(lengths), block=jnp.int32(0), steps_in_block=jnp.int32(0),
        cache=empty_cache(network, spec, *tokens.shape))


def advance(network: Network, spec: SamplingSpec, inputs: SamplingInputs, state: State) -> State:
    """One forward pass of the batch and what it reveals."""
    config, policy = spec.config, POLICIES[spec.config.policy]
    size = None if spec.blocks is None else spec.blocks.size
    length = state.tokens.shape[1]
    plan_keys, step_keys = _fold(inputs.keys, 0), _fold(inputs.keys, 1)
    step_keys = jax.vmap(jax.random.fold_in)(step_keys, state.steps)

    here = inputs.gaps & (inputs.blocks == state.block.reshape(-1, 1))
    number, steps = here.sum(axis=1), block_steps(config, inputs.gaps, inputs.blocks, state.block)
    active = here & pending_mask(spec, inputs, state)
    working = active.any(axis=1)
    if config.remask:
        forget = here & ~state.masked & (working & (state.steps_in_block + 1 < jnp.minimum(steps, number)))[:, None]
        forget &= _uniform(_fold(step_keys, 0), length) < config.remask
        state = state._replace(tokens=jnp.where(forget, spec.mask_token_id, state.tokens), masked=state.masked | forget)
        active = here & pending_mask(spec, inputs, state)
    count = target(config, state.steps_in_block + 1, number, steps) - (here & ~state.masked).sum(axis=1)
    count = jnp.maximum(count, 1)

    # A block's work happens in a window that begins with it; past the row's end there is nothing.
    start, rows = jnp.maximum(jnp.argmax(here, axis=1), 1), jnp.arange(len(here))[:, None]
    if size is not None:
        start = state.block * size
    window = start[:, None] + jnp.arange(min(size or config.block_length or length, length))
    if size is None:
        (states, cache), frontier = predict(network, spec, inputs, state, start, window.shape[1]), None
    else:
        states, cache, frontier = blocks.predict(network, spec, inputs, state)

    def draw_at(positions: jax.Array) -> tuple[jax.Array, ...]:
        """Tokens, log-probabilities and scores [batch, length] where `positions` says so."""
        chosen = jnp.take_along_axis(positions, jnp.minimum(window, length - 1), axis=1) & (window < length)
        drawn = draw_tokens(network, spec, states, chosen, window, inputs, state, _fold(step_keys, 1))
        return tuple(jnp.zeros(here.shape, x.dtype).at[rows, window].set(x, mode="drop") for x in drawn)

    if policy.independent:
        step = jnp.where(active, planned_step(config, _uniform(plan_keys, length), steps[:, None]), steps[:, None])
        # Each row jumps to the next of its steps that reveals something: the others would change nothing.
        reveal = active & (step == step.min(axis=1, keepdims=True))
        tokens, confidence, _ = draw_at(reveal)
    elif policy.score is None:
        reveal = _highest(_uniform(_fold(step_keys, 2), length), active, count)
        tokens, confidence, _ = draw_at(reveal)
    else:
        tokens, confidence, score = draw_at(active)
        reveal = _highest(score, active, count)
        if config.reveal_threshold is not None:
            reveal |= active & (confidence >= jnp.log(config.reveal_threshold))

    state = State(
        tokens=jnp.where(reveal, tokens, state.tokens), masked=state.masked & ~reveal,
        confidence=jnp.where(reveal, confidence, state.confidence), steps=state.steps + working,
        block=state.block, steps_in_block=state.steps_in_block + 1, cache=cache, frontier=frontier)
    block = jnp.where(pending_mask(spec, inputs, state), inputs.blocks, length).min(axis=None if size is None else 1)
    if size is not None:
        state = state._replace(frontier=frontier._replace(pending=block != state.block))
    return state._replace(block=block, steps_in_block=jnp.where(block == state.block, state.steps_in_block, 0))


def _highest(score: jax.Array, active: jax.Array, count: jax.Array) -> jax.Array:
    """The `count` [batch] highest of the `active` scores [batch, length], bool; of equals the leftmost."""
    order = jnp.lexsort((-score, ~active), axis=1)  # the active first, the best of them first
    return active & (jnp.argsort(order, axis=1) < count[:, None])


def _fold(keys: jax.Array, site: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, site)


def _uniform(keys: jax.Array, length: int) -> jax.Array:
    """Uniform in [0, 1), [batch, length], a function of the row's key and the position: padding changes nothing."""
    by_position = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys, jnp.arange(length))
    return jax.vmap(jax.vmap(jax.random.uniform))(by_position)
