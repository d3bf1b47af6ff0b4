"""What a sampling run is told and what it carries from step to step."""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from dlm_jax.attention import AttentionMask, Blocks
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
class Task:
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
    blocks: Blocks | None = None


class Request(NamedTuple):
    """What stays as it is while a batch is sampled: arrays [batch, length], but `lengths` and `keys` [batch]."""

    gaps: jax.Array  # bool, True where a token is to be found
    blocks: jax.Array  # int32, the block that each gap belongs to
    lengths: jax.Array  # int32; positions from there on are padding
    keys: jax.Array  # random keys


class Frontier(NamedTuple):
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
    age: jax.Array  # int32, steps since that block began
    cache: Cache | None
    frontier: Frontier | None = None  # of a model of blocks, whose rows have each a `block` and `age` [batch]


def wanted(task: Task, request: Request, state: State) -> jax.Array:
    """Where a token is still to be found, bool [batch, length]: masked, and not behind a drawn end of text."""
    if not task.stop_at_eos:
        return state.masked
    ends = request.gaps & ~state.masked & jnp.isin(state.tokens, jnp.array(task.eos_token_ids))
    return state.masked & (jnp.cumsum(ends, axis=1) == 0)
