"""One step of denoising: what is still masked, the network's prediction, what of it is revealed."""

import jax
import jax.numpy as jnp

from dlm_jax.sampling import blocks
from dlm_jax.sampling.draw import draw
from dlm_jax.sampling.forward import empty_cache, predict
from dlm_jax.sampling.policies import POLICIES
from dlm_jax.sampling.schedule import block_ids, block_steps, planned_step, target
from dlm_jax.sampling.task import Network, Request, State, Task, wanted


def start(network: Network, task: Task, tokens: jax.Array, fixed: jax.Array, lengths: jax.Array,
         keys: jax.Array) -> tuple[Request, State]:
    """The canvas with every gap masked; arguments as in `loop.sample`."""
    if task.blocks is not None:
        return blocks.start(network, task, tokens, fixed, lengths, keys)
    positions = jnp.arange(tokens.shape[1])
    gaps = ~fixed & (positions > 0) & (positions < lengths[:, None])
    request = Request(gaps, block_ids(gaps, task.config.block_length), lengths, keys)
    return request, State(
        tokens=jnp.where(gaps, task.mask_token_id, tokens), masked=gaps, confidence=jnp.zeros(gaps.shape),
        steps=jnp.zeros_like(lengths), block=jnp.int32(0), age=jnp.int32(0),
        cache=empty_cache(network, task, *tokens.shape))


def advance(network: Network, task: Task, request: Request, state: State) -> State:
    """One forward pass of the batch and what it reveals."""
    config, policy = task.config, POLICIES[task.config.policy]
    size = None if task.blocks is None else task.blocks.size
    length = state.tokens.shape[1]
    plan_keys, step_keys = _fold(request.keys, 0), _fold(request.keys, 1)
    step_keys = jax.vmap(jax.random.fold_in)(step_keys, state.steps)

    here = request.gaps & (request.blocks == state.block.reshape(-1, 1))
    number, steps = here.sum(axis=1), block_steps(config, request.gaps, request.blocks, state.block)
    active = here & wanted(task, request, state)
    working = active.any(axis=1)
    if config.remask:
        forget = here & ~state.masked & (working & (state.age + 1 < jnp.minimum(steps, number)))[:, None]
        forget &= _uniform(_fold(step_keys, 0), length) < config.remask
        state = state._replace(tokens=jnp.where(forget, task.mask_token_id, state.tokens), masked=state.masked | forget)
        active = here & wanted(task, request, state)
    count = target(config, state.age + 1, number, steps) - (here & ~state.masked).sum(axis=1)
    count = jnp.maximum(count, 1)

    # A block's work happens in a window that begins with it; past the row's end there is nothing.
    start, rows = jnp.maximum(jnp.argmax(here, axis=1), 1), jnp.arange(len(here))[:, None]
    if size is not None:
        start = state.block * size
    window = start[:, None] + jnp.arange(min(size or config.block_length or length, length))
    if size is None:
        (states, cache), frontier = predict(network, task, request, state, start, window.shape[1]), None
    else:
        states, cache, frontier = blocks.predict(network, task, request, state)

    def draw_at(positions: jax.Array) -> tuple[jax.Array, ...]:
        """Tokens, log-probabilities and scores [batch, length] where `positions` says so."""
        chosen = jnp.take_along_axis(positions, jnp.minimum(window, length - 1), axis=1) & (window < length)
        drawn = draw(network, task, states, chosen, window, request, state, _fold(step_keys, 1))
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
        if config.certain is not None:
            reveal |= active & (confidence >= jnp.log(config.certain))

    state = State(
        tokens=jnp.where(reveal, tokens, state.tokens), masked=state.masked & ~reveal,
        confidence=jnp.where(reveal, confidence, state.confidence), steps=state.steps + working,
        block=state.block, age=state.age + 1, cache=cache, frontier=frontier)
    block = jnp.where(wanted(task, request, state), request.blocks, length).min(axis=None if size is None else 1)
    if size is not None:
        state = state._replace(frontier=frontier._replace(pending=block != state.block))
    return state._replace(block=block, age=jnp.where(block == state.block, state.age, 0))


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
