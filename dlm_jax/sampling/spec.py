"""What a sampling run is told and what it carries from step to step."""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from dlm_jax.attention import AttentionMask
from dlm_jax.diffusion import BlockSpec
from dlm_jax.models import Cache, ModelConfig
from dlm_jax.sampling.config import SamplerConfig


class Network(Protocol):
    """What the sampler needs of a model, which is also a Flax NNX module."""

    config: ModelConfig

    def hidden(self, tokens: jax.Array, attention: AttentionMask) -> jax.Array: ...

    def cached_hidden(self, tokens: jax.Array, attention: AttentionMask, positions: jax.Array,
                      cache: Cache) -> tuple[jax.Array, Cache]: ...

    def unembed(self, hidden: jax.Array) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class SamplingSpec:
    """What is known when a program is compiled.

    Attributes:
      mask_token_id: the mask's id, which is never drawn as a token; None only from left to right.
      shift: whether the network's output at position n - 1 predicts position n.
      eos_token_ids: tokens that end a text: EOS, or in a chat also the mark that ends a turn. Each is listed once.
      stop_at_eos: whether what follows a drawn end of text is of no interest.
      prompt_width: from left to right, and of a model of blocks: room for the longest prompt of the batch.
      blocks: of a model that has learnt to write one block of tokens after another; None: it sees the whole row.
    """

    config: SamplerConfig
    mask_token_id: int | None
    shift: bool
    eos_token_ids: tuple[int, ...] = ()
    stop_at_eos: bool = False
    prompt_width: int = 0
    blocks: BlockSpec | None = None


class SamplingInputs(NamedTuple):
    """What stays as it is while a batch is sampled: arrays [batch, length], but `lengths` and `keys` [batch]."""

    gaps: jax.Array  # bool, True where a token is to be found
    blocks: jax.Array  # int32, the block that each gap belongs to
    lengths: jax.Array  # int32; positions from there on are padding
    keys: jax.Array  # random keys


class DecodeFrontier(NamedTuple):
    """How far the clean text of each row has come, of a model of blocks."""

    opening: jax.Array  # [batch, embed], the state of the last clean token, which predicts the first of the block
    pending: jax.Array  # bool [batch], whether the block before is written and its keys and values are still to be kept


class State(NamedTuple):
    """The loop's carry."""

    tokens: jax.Array  # int32 [batch, length], the mask's id where masked
    masked: jax.Array  # bool [batch, length]
    confidence: jax.Array  # float32 [batch, length], log-probability of a token when it was drawn; 0 where given
    steps: jax.Array  # int32 [batch], forward passes that each row has had use of
    block: jax.Array  # int32, the block that all rows are in: one that is done with its own waits for the others
    steps_in_block: jax.Array  # int32, steps since that block began
    cache: Cache | None
    frontier: DecodeFrontier | None = None  # of a model of blocks, whose rows have each a `block` and `steps_in_block` [batch]


def pending_mask(spec: SamplingSpec, inputs: SamplingInputs, state: State) -> jax.Array:
    """Where a token is still to be found, bool [batch, length]: masked, and not behind a drawn end of text."""
    if not spec.stop_at_eos:
        return state.masked
    ends = inputs.gaps & ~state.masked & jnp.isin(state.tokens, jnp.array(spec.eos_token_ids))
    return state.masked & (jnp.cumsum(ends, axis=1) == 0)


# ---- How many tokens each step reveals, and which steps a block of the row gets.


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
    if config.step_schedule == "linear":
        return step * number // steps
    left = jnp.floor(number * jnp.cos(jnp.pi / 2 * step / steps) + 1e-4).astype(jnp.int32)
    # At least one a step, and one left for each step that follows.
    return jnp.where(step == steps, number, jnp.clip(number - left, step, number - (steps - step)))


def planned_step(config: SamplerConfig, uniform: jax.Array, steps: jax.Array) -> jax.Array:
    """The step at which a position that drew `uniform` in [0, 1) is revealed, in [0, steps), int32.

    On the linear grid it is the release's loop, drawn at once: revealing each masked token with probability 1/(t+1)
    for t = steps-1, ..., 1 and the rest at the end gives a token each step with probability 1/steps.
    """
    passed = uniform if config.step_schedule == "linear" else jnp.arccos(1 - uniform) * (2 / jnp.pi)
    return jnp.minimum((passed * steps).astype(jnp.int32), steps - 1)
