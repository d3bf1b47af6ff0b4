"""Makes an `EvalModel` of a pretrained model: its scores, its generation and its special tokens."""

import functools
from typing import TYPE_CHECKING

import numpy as np
from jax.sharding import Mesh

from dlm_jax.checkpoints import Pretrained
from dlm_jax.data.tokenization import is_rendered, tokenize_prompt
from dlm_jax.errors import ConfigError
from dlm_jax.evaluation.causal_scoring import autoregressive_score, causal_accuracy, score_and_is_greedy
from dlm_jax.evaluation.eval_model import EvalModel, Pair
from dlm_jax.evaluation.generation import make_generate, make_is_greedy
from dlm_jax.evaluation.likelihood import check_has_bound
from dlm_jax.evaluation.scoring import (
    MaskRule,
    MaskSample,
    bound_masks,
    diffusion_score,
    make_masked_accuracy,
    reference_masks,
    time_masks,
)
from dlm_jax.sampling import SamplerConfig
from dlm_jax.sampling.batching import SamplingStats
from dlm_jax.sampling.spec import Network

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MC_ESTIMATORS = {"mask_count": bound_masks, "time": time_masks}


def make_eval_model(pretrained: Pretrained, name: str, *, autoregressive: bool = False, reference: bool = False,
                    num_samples: int = 16, seed: int = 0, mc_estimator: str = "mask_count",
                    sampler: SamplerConfig | None = None, network: Network | None = None, batch_size: int = 16,
                    mesh: Mesh | None = None) -> EvalModel:
    """Returns a pretrained model as an `EvalModel`, either as a diffusion or as an autoregressive model.

    An autoregressive model has exact scores and generates from left to right.

    Args:
      reference: score as the reference implementation does (`reference_masks`, with `num_samples` as its T), with no
        BOS but the tokenizer's own.
      mc_estimator: "mask_count" (`scoring.bound_masks`) or "time" (`scoring.time_masks`).
      num_samples: forward passes per option of a diffusion model; fewer where masks repeat.
      sampler: how texts are generated. The tasks set its temperature and number of steps. None: by confidence, or from
        left to right.
      network: the model joined with the drafter that the sampler names; None: no drafter of its own parameters.

    Raises:
      ConfigError: the checkpoint has no tokenizer, no BOS or EOS token for position 0, or, for a diffusion model, no
        mask token; or an autoregressive model was trained without the shift.
    """
    source, tokenizer, config = pretrained.source, pretrained.tokenizer, pretrained.model.config
    if tokenizer is None:
        raise ConfigError(f"{source} has no tokenizer; put its tokenizer files beside the weights")
    if num_samples < 1:
        raise ConfigError(f"num_samples must be at least 1, got {num_samples}")
    if autoregressive and not pretrained.diffusion.shift:
        raise ConfigError(f"{source} was trained without the shift, so its outputs do not predict the next token; "
                          "evaluate it as a diffusion model")
    if not autoregressive and pretrained.diffusion.mask_token_id is None:
        raise ConfigError(f"{source} records no mask token, which a diffusion model needs; name one with --mask_token, "
                          "or evaluate it with --objective=autoregressive")
    if not autoregressive:
        check_has_bound(pretrained.diffusion)
    if reference and pretrained.diffusion.blocks is not None:
        raise ConfigError(f"{source} generates in blocks, which the reference implementation does not support; choose "
                          "the protocol default")
    diffusion, bos_token_id = pretrained.diffusion, pretrained.start_token_id
    rows = {"batch_size": batch_size, "mesh": mesh}
    scored = {"bos_token_id": None if reference else bos_token_id, **rows}  # the reference's tokenizer adds its own
    is_greedy = both = None
    if autoregressive:
        score, both = autoregressive_score(pretrained.model, **scored), score_and_is_greedy(pretrained.model, **scored)
    else:
        is_greedy = make_is_greedy(pretrained.model, diffusion=diffusion, **scored)
        rule = reference_rule(num_samples, seed) if reference else bound_rule(num_samples, seed, mc_estimator)
        score = diffusion_score(pretrained.model, rule, diffusion=diffusion, **scored)
    encode = functools.partial(_encode, tokenizer, None if reference else bos_token_id)
    encode_special = functools.partial(_encode_special, tokenizer)
    stats = SamplingStats()
    generate = make_generate(network or pretrained.model, tokenizer,
                             sampler or SamplerConfig("autoregressive" if autoregressive else "confidence"),
                             diffusion=diffusion, bos_token_id=bos_token_id, eos_token_id=pretrained.eos_token_id,
                             seed=seed, stats=stats,
                             keep_bos=not reference or encode_special("a")[0] == bos_token_id, **rows)
    masked_accuracy = None  # a block diffusion model does not attend to later blocks
    if autoregressive:
        masked_accuracy = causal_accuracy(pretrained.model, **scored)
    elif diffusion.blocks is None:
        masked_accuracy = make_masked_accuracy(pretrained.model, diffusion=diffusion, **scored)
    return EvalModel(name, encode, score, generate, config.max_length, autoregressive,
                     0.9 if pretrained.hf_config.get("model_type") == "llama" else 0.95, encode_special, is_greedy,
                     both, masked_accuracy, stats)


def bound_rule(num_samples: int, seed: int, mc_estimator: str = "mask_count") -> MaskRule:
    """Returns the rule of the bound, under which all options of an item get the same noise."""
    masks = MC_ESTIMATORS[mc_estimator]
    return lambda pair: masks(len(pair.continuation), num_samples, seed, pair.item)


def reference_rule(num_samples: int, seed: int) -> MaskRule:
    """Returns the reference implementation's rule, under which each option gets noise of its own."""

    def masks(pair: Pair) -> list[MaskSample]:
        rng = np.random.default_rng([seed, pair.item, pair.option])
        return reference_masks(rng.random((num_samples, len(pair.continuation))))

    return masks


def _encode(tokenizer: "PreTrainedTokenizerBase", start: int | None, text: str) -> list[int]:
    """Returns the tokens of a text, without the one that precedes every context if a chat template has written it."""
    tokens = tokenize_prompt(tokenizer, text)
    return tokens[1:] if start in tokens[:1] and is_rendered(tokenizer, text) else tokens


def _encode_special(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Returns the tokens of a text with those that the tokenizer puts around it."""
    return tokenizer(text, verbose=False)["input_ids"]
