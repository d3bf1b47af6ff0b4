"""A model of ours as a candidate."""

import functools
from typing import TYPE_CHECKING

import numpy as np
from jax.sharding import Mesh

from dlm_jax.checkpoints import Pretrained
from dlm_jax.diffusion import DiffusionSpec
from dlm_jax.errors import ConfigError
from dlm_jax.evaluation.eval_model import EvalModel, Pair
from dlm_jax.evaluation.generation import make_greedy, make_write
from dlm_jax.evaluation.scoring import (
    Draw,
    DrawRule,
    autoregressive_score,
    bound_draw,
    diffusion_score,
    make_guess,
    release_draw,
    sample_time_masks,
)
from dlm_jax.sampling import SamplerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ESTIMATORS = {"mask_count": bound_draw, "time": sample_time_masks}


def make_eval_model(pretrained: Pretrained, name: str, *, autoregressive: bool = False, release: bool = False,
                   num_samples: int = 16, seed: int = 0, mc_estimator: str = "mask_count",
                   sampler: SamplerConfig | None = None, batch_size: int = 16, mesh: Mesh | None = None) -> EvalModel:
    """A model as a diffusion model, or as an autoregressive one: scored exactly, writing the likeliest tokens.

    Args:
      release: score by the released rule, with `num_samples` its T, and with no BOS but the tokenizer's own.
      mc_estimator: of the bound, "mask_count" of masked tokens or "time"; see `scoring.bound_draw` and
        `scoring.sample_time_masks`.
      num_samples: forward passes for each option of a diffusion model; fewer where they would repeat themselves.
      sampler: how texts are written, but for temperature and steps, which the tasks know; None: the surest tokens
        first, or from left to right.

    Raises:
      ConfigError: there is no tokenizer, no mask token for a diffusion model, no BOS or EOS to begin with, or an
        autoregressive model was trained without the shift.
    """
    source, tokenizer, config = pretrained.source, pretrained.tokenizer, pretrained.model.config
    if tokenizer is None:
        raise ConfigError(f"{source} has no tokenizer; put its tokenizer files beside the weights")
    if num_samples < 1:
        raise ConfigError(f"num_samples must be at least 1, got {num_samples}")
    if autoregressive and not pretrained.shift:
        raise ConfigError(f"{source} was trained without the shift, so its outputs do not predict the next token; "
                          "evaluate it as a diffusion model")
    if not autoregressive and pretrained.mask_token_id is None:
        raise ConfigError(f"{source} records no mask token, which a diffusion model needs; name one with --mask_token, "
                          "or evaluate it with --objective=autoregressive")
    if release and pretrained.blocks is not None:
        raise ConfigError(f"{source} writes in blocks, and the released scripts are for models that see whole rows; "
                          "choose the protocol default")
    bos_token_id = next((token for token in (pretrained.bos_token_id, pretrained.eos_token_id)
                         if token is not None and token < config.vocab_size), None)
    if bos_token_id is None:
        raise ConfigError(f"{source} has no BOS or EOS token to begin a text with; set bos_token in its "
                          "tokenizer_config.json")
    scored_from = None if release else bos_token_id  # the release has what its tokenizer puts there
    if autoregressive:
        score = autoregressive_score(pretrained.model, bos_token_id=scored_from, batch_size=batch_size, mesh=mesh)
    else:
        rule = released_rule(num_samples, seed) if release else bound_rule(num_samples, seed, mc_estimator)
        score = diffusion_score(pretrained.model, rule, diffusion=pretrained.diffusion, bos_token_id=scored_from,
                                batch_size=batch_size, mesh=mesh)
    special = functools.partial(_encode, tokenizer, True)
    write = make_write(pretrained.model, tokenizer,
                       sampler or SamplerConfig("autoregressive" if autoregressive else "confidence"),
                       diffusion=pretrained.diffusion, bos_token_id=bos_token_id,
                       eos_token_id=pretrained.eos_token_id, seed=seed, batch_size=batch_size, mesh=mesh,
                       keep_bos=not release or special("a")[0] == bos_token_id)
    greedy = make_greedy(pretrained.model, autoregressive=autoregressive, diffusion=pretrained.diffusion,
                         bos_token_id=scored_from, batch_size=batch_size, mesh=mesh)
    guess = None  # a block diffusion model does not attend to later blocks
    if autoregressive or pretrained.blocks is None:
        guess = make_guess(pretrained.model, diffusion=DiffusionSpec(None) if autoregressive else pretrained.diffusion,
                           bos_token_id=scored_from, batch_size=batch_size, mesh=mesh)
    return EvalModel(name, functools.partial(_encode, tokenizer, False), score, write, config.max_length,
                     autoregressive, 0.9 if pretrained.hf_config.get("model_type") == "llama" else 0.95,
                     special, greedy, guess)


def bound_rule(num_samples: int, seed: int, mc_estimator: str = "mask_count") -> DrawRule:
    """The bound's masks: the options of an item meet the same noise."""
    draw = ESTIMATORS[mc_estimator]
    return lambda pair: draw(len(pair.continuation), num_samples, seed, pair.item)


def released_rule(num_samples: int, seed: int) -> DrawRule:
    """The release's masks, drawn afresh for every option."""

    def draw(pair: Pair) -> Draw:
        rng = np.random.default_rng([seed, pair.item, pair.option])
        return release_draw(rng.random((num_samples, len(pair.continuation))))

    return draw


def _encode(tokenizer: "PreTrainedTokenizerBase", special: bool, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
