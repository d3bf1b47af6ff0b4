"""What a sampling run is given and carries, and the step schedule: which step reveals how many tokens."""

import dataclasses
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.diffusion import BlockSpec, DiffusionSpec
from dlm_jax.models import Cache, DraftedModel, Transformer
from dlm_jax.sampling.config import SamplerConfig

Network = Transformer | DraftedModel  # what is sampled: a model, or one with a trained drafter
NO_DRAFT = -1  # where a drafter guesses nothing
_LAST_TIME = 1e-3  # at which the step schedule "dream" ends


@dataclasses.dataclass(frozen=True)
class SamplingSpec:
    """What is known when a sampling program is compiled.

    Attributes:
      config: the policy and the token choice.
      diffusion: mask token, shift and blocks of the model. The mask token is never sampled.
      eos_token_ids: tokens that end a text: EOS, or in a chat also the end of a turn. No id is repeated.
      stop_at_eos: whether positions after a sampled end of text stay unfilled.
      prompt_width: room for the longest prompt of the batch, for autoregressive decoding and models with blocks;
        `sample` and `stream` fill it in.
    """

    config: SamplerConfig
    diffusion: DiffusionSpec
    eos_token_ids: tuple[int, ...] = ()
    stop_at_eos: bool = False
    prompt_width: int = 0

    @property
    def blocks(self) -> BlockSpec | None:
        """The blocks that are denoised one after another; None for entire rows and for autoregressive decoding."""
        return None if self.config.policy == "autoregressive" else self.diffusion.blocks


class RowSettings(NamedTuple):
    """The numbers of `SamplerConfig`, arrays [batch]; None for what the program does not compute.

    Rows of a batch may differ in them, and other numbers need no other program.
    """

    num_steps: jax.Array | None = None  # int32; None: at most one step per token
    threshold: jax.Array | None = None
    remask: jax.Array | None = None
    temperature: jax.Array | None = None  # None: 0 for all rows
    top_p: jax.Array | None = None
    top_k: jax.Array | None = None  # int32
    repetition_penalty: jax.Array | None = None
    eos_penalty: jax.Array | None = None
    cfg_scale: jax.Array | None = None

    @classmethod
    def of(cls, config: SamplerConfig, batch: int) -> Self:
        """Returns the numbers of `config` for each row, NumPy arrays; None for those that change nothing."""
        def per_row(number: float | None, neutral: float | None, dtype: type = np.float32) -> np.ndarray | None:
            return None if number is None or number == neutral else np.full(batch, number, dtype)

        return cls(
            num_steps=per_row(config.steps, None, np.int32), threshold=per_row(config.reveal_threshold, None),
            remask=per_row(config.remask, 0), temperature=per_row(config.temperature, 0),
            top_p=per_row(config.top_p, 1), top_k=per_row(config.top_k, None, np.int32),
            repetition_penalty=per_row(config.repetition_penalty, 1), eos_penalty=per_row(config.eos_penalty, 0),
            cfg_scale=per_row(config.cfg_scale, 0))


class SamplingInputs(NamedTuple):
    """What does not change while a batch is sampled."""

    gaps: jax.Array  # bool [batch, length], True where a token is to be sampled
    block_ids: jax.Array  # int32 [batch, length], the block of each gap: see `block_ids`; or of the model's blocks
    lengths: jax.Array  # int32 [batch]; later positions are padding
    keys: jax.Array  # random keys [batch]
    settings: RowSettings

    @classmethod
    def of(cls, spec: SamplingSpec, fixed: jax.Array, lengths: jax.Array, keys: jax.Array,
           settings: RowSettings) -> Self:
        """Returns the inputs of a batch; arguments are as in `sampler.sample`."""
        gaps = find_gaps(fixed, lengths)
        if spec.blocks is None:
            ids = block_ids(gaps, spec.config.block_length)
        else:
            ids = jnp.broadcast_to(jnp.arange(gaps.shape[1]) // spec.blocks.size, gaps.shape)
        return cls(gaps, ids, lengths, keys, settings)


class DecodeFrontier(NamedTuple):
    """How far the clean text of each row reaches, for models with blocks."""

    hidden: jax.Array  # [batch, embed], the state of the last clean token, which predicts the first of the block
    pending: jax.Array  # bool [batch], whether the previous block is full and its keys and values are not yet cached


class Drafts(NamedTuple):
    """Guesses of the next tokens of each row, from its first position without a token on."""

    tokens: jax.Array  # int32 [batch, num_drafts], or `NO_DRAFT`
    # float32 [batch, num_drafts, vocab or draft_vocab_size], what they are samples of; None: they are certain
    probs: jax.Array | None

    def first(self, number: int) -> Self:
        return Drafts(self.tokens[:, :number], None if self.probs is None else self.probs[:, :number])


class SamplingState(NamedTuple):
    """The loop's carry."""

    tokens: jax.Array  # int32 [batch, length], the mask token where masked
    masked: jax.Array  # bool [batch, length]
    confidence: jax.Array  # float32 [batch, length], log-probability of a token when sampled; 0 where given
    steps: jax.Array  # int32 [batch], forward passes that each row needed
    block: jax.Array  # int32 [batch], each row's current block; scalar, of all rows, with a cache that grows stale
    steps_in_block: jax.Array  # int32, steps since that block started; shape as `block`
    cache: Cache | None
    frontier: DecodeFrontier | None = None  # for models with blocks
    drafts: Drafts | None = None  # what the model itself guesses
    drafter_cache: Cache | None = None  # the drafter's keys and values of the text before the last token
    accepted: jax.Array | None = None  # int32 [batch, num_drafts], passes that accepted each draft of a window


def find_gaps(fixed: jax.Array, lengths: jax.Array) -> jax.Array:
    """Returns where a token is to be sampled, bool [batch, length]: not given, not padding, not position 0."""
    positions = jnp.arange(fixed.shape[1])
    return ~fixed & (positions > 0) & (positions < lengths[:, None])


def pending_mask(spec: SamplingSpec, inputs: SamplingInputs, state: SamplingState) -> jax.Array:
    """Returns where a token is still needed, bool [batch, length]: masked, and not after a sampled end of text."""
    if not spec.stop_at_eos:
        return state.masked
    ends = inputs.gaps & ~state.masked & jnp.isin(state.tokens, jnp.array(spec.eos_token_ids))
    return state.masked & (jnp.cumsum(ends, axis=1) == 0)


def block_ids(gaps: jax.Array, block_length: int | None) -> jax.Array:
    """Returns the block of each gap, int32 [batch, length], numbered from left to right; undefined elsewhere.

    A block starts at the first gap that no earlier block has and spans `block_length` positions, given ones included.
    """
    if block_length is None:
        return jnp.zeros(gaps.shape, jnp.int32)

    def visit(carry: tuple[jax.Array, jax.Array], here: tuple[jax.Array, jax.Array]):
        block, end = carry
        position, gap = here
        starts = gap & (position >= end)
        block, end = jnp.where(starts, block + 1, block), jnp.where(starts, position + block_length, end)
        return (block, end), block

    none = jnp.full(gaps.shape[0], -1, jnp.int32)
    _, ids = jax.lax.scan(visit, (none, jnp.zeros_like(none)), (jnp.arange(gaps.shape[1]), gaps.T))
    return ids.T


def block_steps(num_steps: jax.Array | None, gaps: jax.Array, block_ids: jax.Array, block: jax.Array) -> jax.Array:
    """Returns the number of steps that each row spends on its `block`, int32 [batch].

    A block gets steps in proportion to its gaps, at least one. All blocks together get exactly the number asked for,
    or one each where there are more blocks than that.

    Args:
      num_steps: int32, for all rows or [batch]; None: one step for each gap.
      gaps, block_ids: [batch, length], as in `block_ids`.
      block: int32, for all rows or [batch].
    """
    block = jnp.broadcast_to(block, gaps.shape[:1])
    if num_steps is None:
        return jnp.maximum((gaps & (block_ids == block[:, None])).sum(axis=1), 1)
    num_steps = jnp.broadcast_to(num_steps, block.shape)
    gap_blocks = jnp.where(gaps, block_ids, -1)
    num_blocks = gap_blocks.max(axis=1) + 1
    earlier = jnp.pad(jax.lax.cummax(gap_blocks, axis=1), ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    starts = gap_blocks > earlier
    rank, total = jnp.cumsum(gaps, axis=1) - gaps, jnp.maximum(gaps.sum(axis=1, keepdims=True), 1)
    # Steps before the block that starts here: its share, capped so that each later block can have one.
    share = jnp.minimum(rank * num_steps[:, None] // total, (num_steps - num_blocks)[:, None] + block_ids)

    def steps_before(block: jax.Array) -> jax.Array:
        """Steps of all earlier blocks: the largest share of a block so far, plus one for each block since."""
        taken = jnp.max(share + block[:, None] - block_ids, axis=1, initial=0,
                        where=starts & (block_ids <= block[:, None]))
        return jnp.where(block < num_blocks, jnp.maximum(taken, block), jnp.maximum(num_steps, num_blocks))

    return jnp.maximum(steps_before(block + 1) - steps_before(block), 1)


def num_revealed(config: SamplerConfig, step: jax.Array, number: jax.Array, steps: jax.Array) -> jax.Array:
    """Returns how many of `number` gaps are filled after `step` of `steps` steps: at least one more per step.

    Blocks with fewer gaps than steps fill one per step and finish early, so that no forward pass reveals nothing. Where
    `linear` does not divide, the first steps reveal one more, as in the samplers of LLaDA and SDAR.
    """
    steps = jnp.clip(steps, 1, jnp.maximum(number, 1))
    step = jnp.minimum(step, steps)
    if config.step_schedule == "linear":
        return step * (number // steps) + jnp.minimum(step, number % steps)
    masked = jnp.floor(number * jnp.cos(jnp.pi / 2 * step / steps) + 1e-4).astype(jnp.int32)
    # At least one per step so far, and at least one for each step that follows.
    return jnp.where(step == steps, number, jnp.clip(number - masked, step, number - (steps - step)))


def next_reveal(config: SamplerConfig, step: jax.Array, number: jax.Array, filled: jax.Array,
                steps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the step, at least `step`, that next fills something, and how many gaps are filled after it.

    All but `dream` fill at every step. There, step i of n is from time t to s, where times fall evenly from 1 to 0.001;
    it fills floor(m (1 - s / t)) of the m gaps that are left, and the last step all of them (Dream's `_sample`). While
    that is 0 the network would see the same, so those steps are omitted. Float32 as in Dream's own code.

    Args:
      step, filled, steps: int32 [batch], of which each row has taken, filled and asked for so many.
    """
    if config.step_schedule != "dream":
        return step, num_revealed(config, step + 1, number, steps)
    left = number - filled
    width = (_LAST_TIME - 1) / steps.astype(jnp.float32)  # of a step, negative

    def time(step: jax.Array) -> jax.Array:  # torch.linspace counts from both ends
        return jnp.where(step < (steps + 1) // 2, 1 + width * step, _LAST_TIME - width * (steps - step))

    def count(step: jax.Array) -> jax.Array:
        some = jnp.floor(left * (1 - time(step + 1) / time(step))).astype(jnp.int32)
        return jnp.where(step < steps - 1, some, left)

    # The first step with left * width >= time; rounding may move it by one.
    first = jnp.clip(jnp.floor(-1 / width - left).astype(jnp.int32) - 1, step, steps - 1)
    for _ in range(3):
        first += (count(first) < 1) & (first < steps - 1)
    return first, filled + count(first)


def planned_step(config: SamplerConfig, uniform: jax.Array, steps: jax.Array) -> jax.Array:
    """Returns the step that reveals a position with the random number `uniform` in [0, 1): int32 in [0, steps).

    With the linear schedule it has the law of the DiffuLLaMA reference implementation, which reveals each masked
    token with probability 1/(t+1) for t = steps-1, ..., 1 and the rest at the end: 1/steps for each step. With `dream`
    it has that of Dream's rule `origin`, in which the last step gets 0.001 more.
    """
    elapsed = {"linear": uniform, "dream": uniform / (1 - _LAST_TIME)}.get(config.step_schedule)
    if elapsed is None:
        elapsed = jnp.arccos(1 - uniform) * (2 / jnp.pi)
    return jnp.minimum((elapsed * steps).astype(jnp.int32), steps - 1)
