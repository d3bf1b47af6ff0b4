"""The sampling loop: from a canvas with gaps to tokens, one compiled program."""

import dataclasses
import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dlm_jax.errors import ConfigError
from dlm_jax.sampling import autoregressive, blocks, denoise
from dlm_jax.sampling.spec import Network, SamplingInputs, SamplingSpec, State, pending_mask
from dlm_jax.sampling.text import bucket


class Sample(NamedTuple):
    """What sampling gives.

    Attributes:
      tokens: int32 [batch, length], every gap filled; behind a drawn end of text with the first of those tokens.
      confidence: float32 [batch, length], the log-probability of each token when it was drawn, 0 where given.
      steps: int32 [batch], the forward passes that each row had use of.
    """

    tokens: jax.Array
    confidence: jax.Array
    steps: jax.Array


def sample(model: Network, tokens: jax.Array, fixed: jax.Array, lengths: jax.Array, keys: jax.Array,
           spec: SamplingSpec) -> Sample:
    """Fills the gaps of a batch.

    A row's result depends on its own tokens and key, never on the other rows, the padding or the batch size.

    Args:
      tokens: int32 [batch, length]; what stands in a gap is ignored.
      fixed: bool [batch, length], True where the token is given. Position 0 is context and always kept.
      lengths: int32 [batch]; positions from there on are padding, never seen and never filled.
      keys: random keys [batch], one a row.

    Raises:
      ConfigError: the policy cannot fill these gaps: one token a step in too few steps, or, from left to right, a
        text behind a gap or a model without the shift.
    """
    spec = _checked(spec, fixed, lengths)
    return _sample(*nnx.split(model), *_arrays(tokens, fixed, lengths), keys, spec)


def stream(model: Network, tokens: jax.Array, fixed: jax.Array, lengths: jax.Array, keys: jax.Array,
           spec: SamplingSpec) -> Iterator[State]:
    """As `sample`, one compiled step at a time: yields the state before the first step and after each."""
    spec = _checked(spec, fixed, lengths)
    graphdef, params = nnx.split(model)
    inputs, state, more = _begin(graphdef, params, *_arrays(tokens, fixed, lengths), keys, spec)
    yield state
    while more:
        state, more = _step(graphdef, params, inputs, state, spec)
        yield state if more else state._replace(tokens=_result(spec, state))


def _checked(spec: SamplingSpec, fixed: jax.Array, lengths: jax.Array) -> SamplingSpec:
    """The task, when it is known that its policy can do what is asked, and how wide the prompts are."""
    config = spec.config
    gaps, prompt, inside = (int(number) for number in _extent(fixed, lengths))
    if config.policy == "first_hitting" and config.num_steps is not None and gaps > config.num_steps:
        raise ConfigError(f"first_hitting reveals one token a step, and {gaps} are to be found in "
                          f"{config.num_steps} steps; leave num_steps out, or choose random_exact")
    if config.policy != "autoregressive" and spec.mask_token_id is None:
        raise ConfigError(f"the policy {config.policy} needs a mask token; name one, or choose autoregressive")
    if config.policy != "autoregressive" and spec.blocks is None:
        return spec
    if spec.blocks is not None:
        blocks.check(config)
    if config.policy == "autoregressive" and not spec.shift:
        raise ConfigError("autoregressive decoding needs outputs that predict the next token, and this model was "
                          "trained without the shift, to predict the token itself; choose another policy")
    if inside and spec.blocks is not None:
        raise ConfigError("this model writes one block after another and does not see what stands behind a gap; "
                          "continue a text with it, or fill gaps with a model trained on whole rows")
    if inside:
        raise ConfigError("autoregressive decoding continues a text and fills no gap that has text behind it; choose "
                          "another policy")
    return dataclasses.replace(spec, prompt_width=bucket(prompt, fixed.shape[1], coarse=True))


@jax.jit
def _extent(fixed: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The most gaps a row has, the most given tokens, and whether any row has a gap before a given token."""
    positions = jnp.arange(fixed.shape[1])
    gaps = ~fixed & (positions > 0) & (positions < lengths[:, None])
    given = lengths - gaps.sum(axis=1)
    return gaps.sum(axis=1).max(), given.max(), (gaps & (positions < given[:, None])).any()


def _arrays(tokens: jax.Array, fixed: jax.Array, lengths: jax.Array) -> tuple[jax.Array, ...]:
    """In the types that are compiled for; of NumPy arrays copies, as JAX may read what it is handed after a function
    returns, when the caller may have changed it."""
    def own(x: jax.Array, dtype: type) -> jax.Array:
        return x.astype(dtype) if isinstance(x, jax.Array) else np.array(x, dtype)

    return own(tokens, np.int32), own(fixed, bool), own(lengths, np.int32)


@functools.partial(jax.jit, static_argnames=("graphdef", "spec"))
def _sample(graphdef: Any, params: nnx.State, tokens: jax.Array, fixed: jax.Array, lengths: jax.Array,
            keys: jax.Array, spec: SamplingSpec) -> Sample:
    network, stepper = nnx.merge(graphdef, params), _stepper(spec)
    inputs, state = stepper.start(network, spec, tokens, fixed, lengths, keys)
    state = jax.lax.while_loop(lambda state: pending_mask(spec, inputs, state).any(),
                               functools.partial(stepper.advance, network, spec, inputs), state)
    return Sample(_result(spec, state), state.confidence, state.steps)


def _result(spec: SamplingSpec, state: State) -> jax.Array:
    """The tokens at the end: whatever is masked still stands behind an end of text."""
    return jnp.where(state.masked, spec.eos_token_ids[0], state.tokens) if spec.stop_at_eos else state.tokens


# Unused parameters are kept so that the state lies where they do, as it does after a step, which then compiles once.
@functools.partial(jax.jit, static_argnames=("graphdef", "spec"), keep_unused=True)
def _begin(graphdef: Any, params: nnx.State, tokens: jax.Array, fixed: jax.Array, lengths: jax.Array, keys: jax.Array,
           spec: SamplingSpec) -> tuple[SamplingInputs, State, jax.Array]:
    inputs, state = _stepper(spec).start(nnx.merge(graphdef, params), spec, tokens, fixed, lengths, keys)
    return inputs, state, pending_mask(spec, inputs, state).any()


@functools.partial(jax.jit, static_argnames=("graphdef", "spec"))
def _step(graphdef: Any, params: nnx.State, inputs: SamplingInputs, state: State, spec: SamplingSpec) -> tuple[State, jax.Array]:
    state = _stepper(spec).advance(nnx.merge(graphdef, params), spec, inputs, state)
    return state, pending_mask(spec, inputs, state).any()


def _stepper(spec: SamplingSpec) -> ModuleType:
    return autoregressive if spec.config.policy == "autoregressive" else denoise
