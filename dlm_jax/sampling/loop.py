"""The sampling loop: from a canvas with gaps to tokens, one compiled program."""

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from dlm_jax.attention import AttentionMask
from dlm_jax.sampling.choice import choose
from dlm_jax.sampling.config import SamplerConfig
from dlm_jax.sampling.policies import POLICIES, Planned, quota


class Network(Protocol):
    """What the sampler needs of a model, which is also a Flax NNX module."""

    def hidden(self, tokens: jax.Array, attention: AttentionMask) -> jax.Array: ...

    def unembed(self, hidden: jax.Array) -> jax.Array: ...


class State(NamedTuple):
    """The loop's carry: the step count, the canvas int32 [batch, length], and where it is still masked."""

    step: jax.Array
    tokens: jax.Array
    masked: jax.Array


def sample(model: Network, tokens: jax.Array, fixed: jax.Array, lengths: jax.Array, keys: jax.Array, *,
           mask_token_id: int, shift: bool, config: SamplerConfig) -> jax.Array:
    """Fills the gaps of a batch.

    A row's result depends on its own tokens and key, never on the other rows, the padding or the batch size.

    Args:
      tokens: int32 [batch, length]; what stands in a gap is ignored.
      fixed: bool [batch, length], True where the token is given. Position 0 is context and always kept.
      lengths: int32 [batch]; positions from there on are padding, never seen and never filled.
      keys: random keys [batch], one a row.
      mask_token_id: the mask's id, which is never drawn as a token.
      shift: whether the network's output at position n - 1 predicts position n.

    Returns:
      int32 [batch, length], every gap filled.
    """
    graphdef, params = nnx.split(model)
    return _sample(graphdef, params, jnp.asarray(tokens, jnp.int32), jnp.asarray(fixed, bool),
                   jnp.asarray(lengths, jnp.int32), keys, mask_token_id, shift, config)


@functools.partial(jax.jit, static_argnames=("graphdef", "mask_token_id", "shift", "config"))
def _sample(graphdef: Any, params: nnx.State, tokens: jax.Array, fixed: jax.Array, lengths: jax.Array,
            keys: jax.Array, mask_token_id: int, shift: bool, config: SamplerConfig) -> jax.Array:
    network, policy = nnx.merge(graphdef, params), POLICIES[config.policy]
    positions = jnp.arange(tokens.shape[1])
    attention = AttentionMask.bidirectional().with_lengths(lengths)
    gaps = ~fixed & (positions > 0) & (positions < lengths[:, None])
    plan_keys, token_keys = (jax.vmap(jax.random.fold_in, (0, None))(keys, stream) for stream in (0, 1))
    draw = functools.partial(_draw, network, keys=token_keys, mask_token_id=mask_token_id, shift=shift, config=config)

    if isinstance(policy, Planned):
        plan = jax.vmap(policy.plan, (0, 0, None))(plan_keys, gaps, config.num_steps)

        def advance(state: State) -> State:
            # Each row jumps to the next step of its plan that reveals something: the others would change nothing.
            step = jnp.where(state.masked, plan, config.num_steps).min(axis=1)
            reveal = state.masked & (plan == step[:, None])
            drawn, _ = draw(network.hidden(state.tokens, attention), reveal, step)
            return State(state.step + 1, jnp.where(reveal, drawn, state.tokens), state.masked & ~reveal)
    else:
        total = gaps.sum(axis=1)

        def advance(state: State) -> State:
            step = jnp.full_like(total, state.step)
            drawn, score = draw(network.hidden(state.tokens, attention), state.masked, step)
            order = jnp.lexsort((-score, ~state.masked), axis=1)  # the masked first, the best of them first
            rank = jnp.argsort(order, axis=1)
            reveal = state.masked & (rank < quota(step, total, config.num_steps)[:, None])
            return State(state.step + 1, jnp.where(reveal, drawn, state.tokens), state.masked & ~reveal)

    start = State(jnp.int32(0), jnp.where(gaps, mask_token_id, tokens), gaps)

    def unfinished(state: State) -> jax.Array:
        return state.masked.any() & (state.step < config.num_steps)

    return jax.lax.while_loop(unfinished, advance, start).tokens


def _draw(network: Network, hidden: jax.Array, wanted: jax.Array, step: jax.Array, *, keys: jax.Array,
          mask_token_id: int, shift: bool, config: SamplerConfig) -> tuple[jax.Array, jax.Array]:
    """Draws a token where `wanted`, running the head only there, a slice of each row at a time.

    Args:
      hidden: [batch, length, embed].
      wanted: bool [batch, length].
      step: int32 [batch]; with the row's key and the position it determines the randomness.

    Returns:
      Tokens int32 and the policy's scores float32 [batch, length], meaningful where `wanted`.
    """
    policy = POLICIES[config.policy]
    batch, length = wanted.shape
    parts = max(8, config.num_steps) if isinstance(policy, Planned) else 8
    width = min(length, -(-length // parts // 8) * 8)
    rows = jnp.arange(batch)[:, None]
    order = jnp.argsort(~wanted, axis=1, stable=True)  # wanted positions first
    step_keys = jax.vmap(jax.random.fold_in)(keys, step)

    def fill(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        start, tokens, scores = carry
        at = jax.lax.dynamic_slice_in_dim(order, start, width, axis=1)  # [batch, width]
        read = jnp.maximum(at - 1, 0) if shift else at  # the one place where sampling undoes the shift
        logits = network.unembed(jnp.take_along_axis(hidden, read[:, :, None], axis=1))
        logits = logits.at[:, :, mask_token_id].set(-jnp.inf)
        position_keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(step_keys, at)
        token = jax.vmap(jax.vmap(lambda x, key: choose(x, key, config)))(logits, position_keys)
        score = jnp.zeros(at.shape) if isinstance(policy, Planned) else policy.score(logits, token)
        return start + width, tokens.at[rows, at].set(token), scores.at[rows, at].set(score)

    number = wanted.sum(axis=1).max()
    empty = (jnp.int32(0), jnp.zeros(wanted.shape, jnp.int32), jnp.zeros(wanted.shape))
    _, tokens, scores = jax.lax.while_loop(lambda carry: carry[0] < number, fill, empty)
    return tokens, scores
