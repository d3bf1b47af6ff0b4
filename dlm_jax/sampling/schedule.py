"""How many tokens each step reveals, and which steps a block of the row gets."""

import jax
import jax.numpy as jnp

from dlm_jax.sampling.config import SamplerConfig


def block_ids(gaps: jax.Array, block_length: int | None) -> jax.Array:
    """Which block each gap belongs to, int32 [batch, length], from left to right; other positions mean nothing.

    A block begins at the first gap that is left and spans `block_length` positions, given ones included.
    """
    if block_length is None:
        return jnp.zeros(gaps.shape, jnp.int32)

    def visit(carry: tuple[jax.Array, jax.Array], here: tuple[jax.Array, jax.Array]):
        block, end = carry
        position, gap = here
        opens = gap & (position >= end)
        block, end = jnp.where(opens, block + 1, block), jnp.where(opens, position + block_length, end)
        return (block, end), block

    nothing = jnp.full(gaps.shape[0], -1, jnp.int32)
    _, blocks = jax.lax.scan(visit, (nothing, jnp.zeros_like(nothing)), (jnp.arange(gaps.shape[1]), gaps.T))
    return blocks.T


def block_steps(config: SamplerConfig, gaps: jax.Array, blocks: jax.Array, block: jax.Array) -> jax.Array:
    """The steps that each row gives to its `block`; int32 [batch].

    Every block has one, and the rest is shared out by the gaps that the blocks have beyond their first. So all blocks
    together take just the number asked for, or one each where that is less than there are blocks.

    Args:
      gaps, blocks: [batch, length], as in `block_ids`.
    """
    number, before = (gaps & (blocks == block)).sum(axis=1), (gaps & (blocks < block)).sum(axis=1)
    if config.steps is None:
        return jnp.maximum(number, 1)
    amount = jnp.max(blocks, axis=1, initial=-1, where=gaps) + 1
    spare, further = jnp.maximum(config.steps - amount, 0), jnp.maximum(gaps.sum(axis=1) - amount, 1)
    before = before - block  # beyond the first of each
    return 1 + jnp.maximum((before + number - 1) * spare // further - before * spare // further, 0)


def target(config: SamplerConfig, step: jax.Array, number: jax.Array, steps: jax.Array) -> jax.Array:
    """How many of `number` gaps are to be filled when `step` of `steps` have been taken: at least one a step.

    Blocks of fewer gaps than steps fill one a step and are done early, as no forward pass need reveal nothing.
    """
    steps = jnp.clip(steps, 1, jnp.maximum(number, 1))
    step = jnp.minimum(step, steps)
    if config.grid == "linear":
        return step * number // steps
    left = jnp.floor(number * jnp.cos(jnp.pi / 2 * step / steps) + 1e-4).astype(jnp.int32)
    # At least one a step, and one left for each step that follows.
    return jnp.where(step == steps, number, jnp.clip(number - left, step, number - (steps - step)))


def planned_step(config: SamplerConfig, uniform: jax.Array, steps: jax.Array) -> jax.Array:
    """The step at which a position that drew `uniform` in [0, 1) is revealed, in [0, steps), int32.

    On the linear grid it is the release's loop, drawn at once: revealing each masked token with probability 1/(t+1)
    for t = steps-1, ..., 1 and the rest at the end gives a token each step with probability 1/steps.
    """
    passed = uniform if config.grid == "linear" else jnp.arccos(1 - uniform) * (2 / jnp.pi)
    return jnp.minimum((passed * steps).astype(jnp.int32), steps - 1)
