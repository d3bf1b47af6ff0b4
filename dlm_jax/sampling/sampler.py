"""The sampling loop: fills the gaps of a batch, as one compiled program (`sample`) or one step at a time (`stream`)."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dlm_jax.errors import ConfigError
from dlm_jax.matmul import jit_model
from dlm_jax.models import DraftedModel
from dlm_jax.sampling.config import BUILT_IN_DRAFTERS
from dlm_jax.sampling.drafted import DraftedStepper, check_drafter
from dlm_jax.sampling.self_drafting import SelfDraftingStepper, check_drafts_itself
from dlm_jax.sampling.spec import (
    Network,
    RowSettings,
    SamplingInputs,
    SamplingSpec,
    SamplingState,
    find_gaps,
    pending_mask,
)
from dlm_jax.sampling.speculative import SpeculativeStepper, check_draft_vocab
from dlm_jax.sampling.steppers import AutoregressiveStepper, BlockStepper, DenoisingStepper, Stepper
from dlm_jax.sampling.text import bucket


class Sample(NamedTuple):
    """A sampled batch.

    Attributes:
      tokens: int32 [batch, length], every gap filled; with `stop_at_eos`, positions after the end of text hold the
        first of `eos_token_ids`.
      confidence: float32 [batch, length], the log-probability of each token when it was sampled, 0 where given.
      steps: int32 [batch], the forward passes that each row needed.
      num_sampled: int32 [batch], the tokens that each row needed: its gaps up to the end of text.
      accepted: int32 [batch, num_drafts], how many of the passes accepted the first draft, the second, and so on; None
        without a drafter.
    """

    tokens: jax.Array
    confidence: jax.Array
    steps: jax.Array
    num_sampled: jax.Array
    accepted: jax.Array | None = None

    @classmethod
    def of(cls, state: SamplingState, gaps: jax.Array) -> Self:
        """Returns the sample of a final state."""
        return cls(state.tokens, state.confidence, state.steps, (gaps & ~state.masked).sum(axis=1), state.accepted)


def sample(model: Network, tokens: jax.Array, fixed: jax.Array, lengths: jax.Array, keys: jax.Array,
           spec: SamplingSpec) -> Sample:
    """Fills the gaps of a batch.

    A row's result depends on its own tokens and key, never on other rows, padding or the batch size.

    Args:
      tokens: int32 [batch, length]; values in gaps are ignored.
      fixed: bool [batch, length], True where the token is given. Position 0 is context and always given.
      lengths: int32 [batch]; later positions are padding, never seen and never filled.
      keys: random keys [batch].

    Raises:
      ConfigError: the policy cannot fill these gaps: one token per step in too few steps; no mask token; or, for
        autoregressive decoding and models with blocks, text after a gap or a model without the shift.
    """
    return _sample(*_arguments(model, tokens, fixed, lengths, keys, spec))


def stream(model: Network, tokens: jax.Array, fixed: jax.Array, lengths: jax.Array, keys: jax.Array,
           spec: SamplingSpec) -> Iterator[SamplingState]:
    """Does what `sample` does, one compiled step at a time: yields the state before the first step and after each."""
    graphdef, params, *arrays, spec = _arguments(model, tokens, fixed, lengths, keys, spec)
    inputs, state, more = _start(graphdef, params, *arrays, spec)
    yield state
    while more:
        state, more = _step(graphdef, params, inputs, state, spec)
        yield state if more else state._replace(tokens=_final_tokens(spec, state))


def make_stepper(network: Network, spec: SamplingSpec) -> Stepper:
    """Returns the stepper for the policy and the model."""
    if spec.config.policy == "autoregressive":
        if isinstance(network, DraftedModel):
            return DraftedStepper.of(network, spec)
        if spec.config.drafter == "self":
            return SelfDraftingStepper(network, spec, network.lm_head.first(spec.config.draft_vocab_size))
        return (SpeculativeStepper if spec.config.drafter == "ngram" else AutoregressiveStepper)(network, spec)
    return (DenoisingStepper if spec.blocks is None else BlockStepper)(network, spec)


def resolve_spec(network: Network, spec: SamplingSpec, fixed: jax.Array, lengths: jax.Array) -> SamplingSpec:
    """Checks that the policy can fill the gaps; returns the spec of the program, with the prompt's width.

    Raises:
      ConfigError: as in `sample`.
    """
    config, diffusion = spec.config, spec.diffusion
    gaps, prompt, inside = (int(number) for number in _measure(fixed, lengths))
    if config.policy == "first_hitting" and config.num_steps is not None and gaps > config.num_steps:
        raise ConfigError(f"first_hitting reveals one token per step, which is too slow for {gaps} tokens in "
                          f"{config.num_steps} steps; remove num_steps, or choose random_exact")
    if config.policy == "autoregressive":
        if not diffusion.shift:
            raise ConfigError("autoregressive decoding needs outputs that predict the next token, and this model was "
                              "trained without the shift; choose another policy")
        if inside:
            raise ConfigError("autoregressive decoding cannot fill a gap with text after it; choose another policy")
        if isinstance(network, DraftedModel):
            check_drafter(config, network)
        elif config.drafter == "self":
            check_drafts_itself(config, diffusion, network.config)
        elif config.drafter not in BUILT_IN_DRAFTERS:
            raise ConfigError(f"drafter must be {', '.join(BUILT_IN_DRAFTERS)}, or the model a DraftedModel, got "
                              f"{config.drafter!r}")
        check_draft_vocab(spec, network.config.vocab_size)
    elif diffusion.mask_token_id is None:
        raise ConfigError(f"the policy {config.policy} needs a mask token; name one, or choose autoregressive")
    elif diffusion.blocks is None:
        return dataclasses.replace(spec, config=config.structure)
    else:
        if diffusion.blocks.noise != "mask":
            raise ConfigError(f"this model was trained on blocks of random tokens, which the policy {config.policy} "
                              "cannot fill; choose autoregressive with drafter=self")
        for name, unset in (("block_length", None), ("cache", "none"), ("cfg_scale", 0.0)):
            if getattr(config, name) != unset:
                raise ConfigError(f"this model has blocks and an exact cache of its own; remove {name}")
        if inside:
            raise ConfigError("a model with blocks does not see text after a gap; continue a text with it, or fill "
                              "gaps with a model trained on entire rows")
    return dataclasses.replace(spec, config=config.structure, prompt_width=bucket(prompt, fixed.shape[1], coarse=True))


@jax.jit
def _measure(fixed: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the most gaps per row, the most given tokens, and whether a row has a given token after a gap."""
    gaps = find_gaps(fixed, lengths)
    given = lengths - gaps.sum(axis=1)
    return gaps.sum(axis=1).max(), given.max(), (gaps & (jnp.arange(fixed.shape[1]) < given[:, None])).any()


def _arguments(model: Network, tokens: jax.Array, fixed: jax.Array, lengths: jax.Array, keys: jax.Array,
               spec: SamplingSpec) -> tuple[Any, ...]:
    """Returns the arguments of `_sample`, checked. NumPy arrays are copied: the caller may change them later."""
    def convert(x: jax.Array, dtype: type) -> jax.Array:
        return x.astype(dtype) if isinstance(x, jax.Array) else np.array(x, dtype)

    return (*nnx.split(model), convert(tokens, np.int32), convert(fixed, bool), convert(lengths, np.int32), keys,
            RowSettings.of(spec.config, len(tokens)), resolve_spec(model, spec, fixed, lengths))


def _final_tokens(spec: SamplingSpec, state: SamplingState) -> jax.Array:
    """Returns the tokens with EOS where a position is still masked, which is after the end of the text."""
    return jnp.where(state.masked, spec.eos_token_ids[0], state.tokens) if spec.stop_at_eos else state.tokens


def fill(stepper: Stepper, tokens: jax.Array, fixed: jax.Array, lengths: jax.Array, keys: jax.Array,
         settings: RowSettings) -> Sample:
    """Takes steps until nothing is pending."""
    spec = stepper.spec
    inputs, state = _begin(stepper, tokens, fixed, lengths, keys, settings)
    state = jax.lax.while_loop(lambda state: pending_mask(spec, inputs, state).any(),
                               functools.partial(stepper.advance, inputs), state)
    return Sample.of(state._replace(tokens=_final_tokens(spec, state)), inputs.gaps)


def _begin(stepper: Stepper, tokens: jax.Array, fixed: jax.Array, lengths: jax.Array, keys: jax.Array,
           settings: RowSettings) -> tuple[SamplingInputs, SamplingState]:
    inputs = SamplingInputs.of(stepper.spec, fixed, lengths, keys, settings)
    state = stepper.start(tokens, inputs)
    return inputs, stepper.prefill(inputs, state, jnp.int32(0), stepper.spec.prompt_width)


@functools.partial(jit_model, static_argnames=("graphdef", "spec"))
def _sample(graphdef: Any, params: nnx.State, tokens: jax.Array, fixed: jax.Array, lengths: jax.Array,
            keys: jax.Array, settings: RowSettings, spec: SamplingSpec) -> Sample:
    return fill(make_stepper(nnx.merge(graphdef, params), spec), tokens, fixed, lengths, keys, settings)


# Unused parameters are kept so that the state is on their devices, as it is after a step: `_step` compiles once.
@functools.partial(jit_model, static_argnames=("graphdef", "spec"), keep_unused=True)
def _start(graphdef: Any, params: nnx.State, tokens: jax.Array, fixed: jax.Array, lengths: jax.Array, keys: jax.Array,
           settings: RowSettings, spec: SamplingSpec) -> tuple[SamplingInputs, SamplingState, jax.Array]:
    inputs, state = _begin(make_stepper(nnx.merge(graphdef, params), spec), tokens, fixed, lengths, keys, settings)
    return inputs, state, pending_mask(spec, inputs, state).any()


@functools.partial(jit_model, static_argnames=("graphdef", "spec"))
def _step(graphdef: Any, params: nnx.State, inputs: SamplingInputs, state: SamplingState,
          spec: SamplingSpec) -> tuple[SamplingState, jax.Array]:
    state = make_stepper(nnx.merge(graphdef, params), spec).advance(inputs, state)
    return state, pending_mask(spec, inputs, state).any()
