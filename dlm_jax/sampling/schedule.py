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

    A block has its share of the steps by its gaps, at least one. All blocks together take just the number asked for,
    or one each where that is less than there are blocks.

    Args:
      gaps, blocks: [batch, length], as in `block_ids`.
      block: int32, for all rows or [batch].
    """
    block = jnp.broadcast_to(block, gaps.shape[:1])
    if config.steps is None:
        return jnp.maximum((gaps & (blocks == block[:, None])).sum(axis=1), 1)
    gap_blocks = jnp.where(gaps, blocks, -1)
    amount = gap_blocks.max(axis=1) + 1
    earlier = jnp.pad(jax.lax.cummax(gap_blocks, axis=1), ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    opens = gap_blocks > earlier
    rank, total = jnp.cumsum(gaps, axis=1) - gaps, jnp.maximum(gaps.sum(axis=1, keepdims=True), 1)
    # Steps before the block that opens here: its share, unless too few would be left for the blocks from here on.
    share = jnp.minimum(rank * config.steps // total, config.steps - amount[:, None] + blocks)

    def before(block: jax.Array) -> jax.Array:
        """Steps before a block: at least one for each block since any that comes earlier."""
        taken = jnp.max(share + block[:, None] - blocks, axis=1, initial=0, where=opens & (blocks <= block[:, None]))
        return jnp.where(block < amount, jnp.maximum(taken, block), jnp.maximum(config.steps, amount))

    return jnp.maximum(before(block + 1) - before(block), 1)


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
