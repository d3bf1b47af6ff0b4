"""From hidden states to candidate tokens, the head running only where one is asked for."""

import functools

import jax
import jax.numpy as jnp

from dlm_jax.sampling.choice import choose
from dlm_jax.sampling.config import SamplerConfig
from dlm_jax.sampling.policies import POLICIES, probability
from dlm_jax.sampling.task import Network, Request, State, Task

_ROWS = 32  # rows of the head's product below which a processor waits for the kernel alone


def draw(network: Network, task: Task, states: jax.Array, active: jax.Array, positions: jax.Array, request: Request,
         state: State, keys: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws a token where `active`, a slice of each row at a time.

    Args:
      states: [batch, width, embed] as `forward.predict` gives them, twice the batch under guidance.
      active: bool [batch, width].
      positions: int32 [batch, width], where in its row each stands; with the row's key it determines the randomness.
      request, state: the rows as they are, for the repetition penalty.
      keys: random keys [batch].

    Returns:
      Tokens int32, their log-probabilities and the policy's scores float32 [batch, width], meaningful where `active`.
    """
    score = POLICIES[task.config.policy].score
    batch, width = active.shape
    size = slice_size(task.config, batch, width)
    rows = jnp.arange(batch)[:, None]
    order = jnp.argsort(~active, axis=1, stable=True)  # active ones first
    order = jnp.pad(order, ((0, 0), (0, -width % size)), constant_values=width)
    repeated = None
    if task.config.repetition_penalty != 1:
        vocab = network.config.vocab_size
        padding = jnp.arange(state.tokens.shape[1]) >= request.lengths[:, None]
        seen = jnp.where(state.masked | padding, vocab, state.tokens)
        repeated = jnp.zeros((batch, vocab), bool).at[rows, seen].set(True, mode="drop")

    def fill(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        start, tokens, confidence, scores = carry
        at = jax.lax.dynamic_slice_in_dim(order, start, size, axis=1)
        read = jnp.minimum(at, width - 1)
        both = jnp.tile(read, (len(states) // batch, 1))
        logits = network.unembed(jnp.take_along_axis(states, both[:, :, None], axis=1))
        logits = adjust(logits, task, repeated)
        position_keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(
            keys, jnp.take_along_axis(positions, read, axis=1))
        token = jax.vmap(jax.vmap(functools.partial(choose, config=task.config)))(logits, position_keys)
        sure = probability(logits, token)
        fresh = token, sure, sure if score in (None, probability) else score(logits, token)
        old = tokens, confidence, scores
        return start + size, *(x.at[rows, at].set(y, mode="drop") for x, y in zip(old, fresh, strict=True))

    nothing = jnp.zeros(active.shape)
    number = active.sum(axis=1).max()
    out = jax.lax.while_loop(lambda carry: carry[0] < number, fill,
                             (jnp.int32(0), nothing.astype(jnp.int32), nothing, nothing))
    return out[1:]


def slice_size(config: SamplerConfig, batch: int, width: int) -> int:
    """How many positions of each row the head takes at a time: about as many as a step reveals, or an eighth."""
    if POLICIES[config.policy].score is None:
        expected = width / (config.steps or width)
        size = expected + expected**0.5  # one slice is enough most of the time
    else:
        size = width / 8
    size = max(size, _ROWS / batch, 1)
    return min(width, -(-int(size) // 8) * 8)


def adjust(logits: jax.Array, task: Task, repeated: jax.Array | None) -> jax.Array:
    """What tokens are drawn from and judged by: guidance, penalties, and never the mask itself.

    Args:
      logits: float32 [batch, n, vocab], twice the batch under guidance.
      repeated: bool [batch, vocab], which tokens a row already holds; None where it does not matter.
    """
    config = task.config
    if config.guidance:
        seeing, blind = jnp.split(logits, 2)
        logits = blind + (1 + config.guidance) * (seeing - blind)
    if repeated is not None:
        penalty = config.repetition_penalty
        logits = jnp.where(repeated[:, None], jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if task.eos_token_ids and config.eos_penalty:
        logits = logits.at[:, :, jnp.array(task.eos_token_ids)].add(-config.eos_penalty)
    return logits if task.mask_token_id is None else logits.at[:, :, task.mask_token_id].set(-jnp.inf)
