"""DiffusionLM, the public face: a model with its tokenizer, to generate, infill, answer, score and save."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dlm_jax.attention import AttentionMask
from dlm_jax.checkpoints import Pretrained, load_pretrained, open_drafter, save_pretrained
from dlm_jax.config_fields import check_at_least
from dlm_jax.data.prompts import Prompt, PromptFormat, prompt_format_from_run
from dlm_jax.diffusion import DiffusionSpec
from dlm_jax.errors import ConfigError, DataError
from dlm_jax.evaluation import BoundEstimate, bound
from dlm_jax.matmul import choose_matmul, jit_model, resolve_dtype
from dlm_jax.models import Compute, DraftedModel, ModelConfig, Transformer, abstract_model
from dlm_jax.parallel import ATTENTION_PARTITION, MeshConfig, make_mesh, param_shardings, use_mesh
from dlm_jax.random import example_keys
from dlm_jax.sampling import (
    BUILT_IN_DRAFTERS,
    GAP,
    SamplerConfig,
    SamplingSpec,
    SamplingStats,
    Snapshot,
    pad_rows,
    resolve_settings,
    sample_rows,
)
from dlm_jax.sampling.gap_length import infer_gap_lengths
from dlm_jax.sampling.text import Segment, before_end, decode, encode, split_gaps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class DiffusionLM:
    """A diffusion language model ready for use; build one with `from_pretrained`.

    Results depend on the seed and on a text's place in the list, never on the batch size.
    """

    pretrained: Pretrained
    mesh: Mesh | None = None
    _drafters: dict[str, DraftedModel] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | os.PathLike, mask_token: str | int | None = None,
                        dtype: str = "float32", mesh: MeshConfig | None = None, merge: bool = True,
                        base: str | None = None) -> Self:
        """Loads a Hugging Face directory or hub id, a checkpoint in DiffuGPT's layout, a training workdir,
        `workdir@step`, or an adapter in PEFT's format with its base.

        Args:
          mask_token: an id, or a token, which is added to the vocabulary if new; None: the recorded one. Without a mask
            token the model computes logits and can be saved, but samples only autoregressively.
          dtype: "float32" or "bfloat16", of parameters and activations; "auto": bfloat16 where these devices are
            faster in it.
          mesh: splits parameters and texts over all devices, e.g. `MeshConfig(fsdp=-1)`; None: the first device.
          merge: False keeps the LoRA parameters of a workdir beside its base, in the dtypes of the run; the model
            computes the same, and can be saved as an adapter.
          base: the base of an adapter, instead of the one that it names.
        """
        device_mesh = None if mesh is None else make_mesh(mesh)
        platform, num_devices = jax.devices()[0].platform, 1 if device_mesh is None else device_mesh.size
        dtype = resolve_dtype(dtype, platform, num_devices)
        compute = Compute(dtype=dtype, partition=None if mesh is None else ATTENTION_PARTITION,
                          matmul=choose_matmul(dtype, platform, num_devices))
        shardings = None if device_mesh is None else lambda config: param_shardings(
            abstract_model(config, compute, dtype), device_mesh)
        return cls(load_pretrained(path_or_hub_id, mask_token=mask_token, base=base, merge=merge, compute=compute,
                                   param_dtype=dtype, shardings=shardings), device_mesh)

    @property
    def model(self) -> Transformer:
        return self.pretrained.model

    @property
    def config(self) -> ModelConfig:
        return self.pretrained.model.config

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        if self.pretrained.tokenizer is None:
            raise ConfigError(f"{self.pretrained.source} has no tokenizer; put its tokenizer files beside the weights")
        return self.pretrained.tokenizer

    @property
    def diffusion(self) -> DiffusionSpec:
        """The mask token, shift and blocks of the model.

        Raises:
          ConfigError: the model has no mask token.
        """
        if self.pretrained.diffusion.mask_token_id is None:
            raise ConfigError(f"{self.pretrained.source} records no mask token; name one with mask_token=")
        return self.pretrained.diffusion

    @property
    def mask_token_id(self) -> int:
        return self.diffusion.mask_token_id

    def model_with_drafter(self, name: str) -> Transformer | DraftedModel:
        """Returns the model, joined with a drafter unless `name` is one that needs no parameters of its own.

        Args:
          name: as in `sampling.SamplerConfig`. A drafter is loaded once.
        """
        if name in BUILT_IN_DRAFTERS:
            return self.model
        if name not in self._drafters:
            compute = self.model.compute
            stored = open_drafter(name, target=self.model, compute=compute, param_dtype=compute.dtype)
            self._drafters[name] = DraftedModel(self.model, stored.drafter)
        return self._drafters[name]

    @property
    def default_policy(self) -> str:
        """The policy where none is named, see `default_sampling`."""
        return self.default_sampling["policy"]

    @property
    def default_sampling(self) -> dict[str, Any]:
        """The settings of `sampling.SamplerConfig` where they are not named.

        They are those that the checkpoint records, as LLaDA's and Dream's do; else a policy alone: "autoregressive" for
        a model trained so, or to draft for its base, "threshold" for one with blocks, and "confidence".
        """
        if self.pretrained.is_autoregressive or self.pretrained.drafts_for_itself:
            return {"policy": "autoregressive"}
        default = "confidence" if self.pretrained.diffusion.blocks is None else "threshold"
        return {"policy": default, **self.pretrained.sampling}

    def logits(self, tokens: np.ndarray, attention: AttentionMask | None = None) -> jax.Array:
        """Returns float32 logits [batch, length, vocab] of int `tokens` [batch, length]; position n predicts n + 1.

        Args:
          attention: None: bidirectional.

        Raises:
          DataError: the shape, the length or a token id does not fit the model.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise DataError(f"tokens must be integers [batch, length], got {tokens.dtype} {list(tokens.shape)}")
        if tokens.shape[1] > self.config.max_length:
            raise DataError(f"{tokens.shape[1]} tokens per row, and the model takes at most {self.config.max_length}")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
            raise DataError(f"token ids must be in 0 .. {self.config.vocab_size - 1}, the model's vocabulary, "
                            f"got {tokens.min()} .. {tokens.max()}")
        with use_mesh(self.mesh):
            # A copy: JAX may read the array after the caller has changed it.
            return _logits(*nnx.split(self.model), np.array(tokens, np.int32),
                           AttentionMask.bidirectional() if attention is None else attention)

    def generate(self, prompts: str | Sequence[str] = "", max_new_tokens: int = 128, num_steps: int | None = None,
                 policy: str | None = None, temperature: float | None = None, top_p: float | None = None,
                 seed: int = 0, **options: Any) -> list[str]:
        """Continues each prompt, "" for none: returns the prompt as it was and the text after it, up to an EOS token.

        Settings of `sampling.SamplerConfig` that are None, or not named, are those of `default_sampling`, or else those
        that are the default there.

        Args:
          max_new_tokens: the most tokens after each prompt.
          num_steps: denoising steps, as in `sampling.SamplerConfig`.
          policy: which positions a step reveals, as there. "autoregressive" decodes from left to right, as the model's
            parent does, and needs no mask token.
          temperature: divides the logits, 1 by default; 0 takes the most likely token.
          top_p: sample from the fewest most likely tokens that reach this probability; by default from all.
          seed: with `example_index` it determines the random numbers.
          options: the other fields of `sampling.SamplerConfig`, and
            batch_size: rows at a time, 16 by default; it does not change the texts.
            example_index: which random numbers each prompt gets, 0, 1, 2, ... by default.
            on_step: called with a `sampling.Snapshot` before the first step of each batch and after every step.
            stats: a `sampling.SamplingStats`, which counts tokens, forward passes and accepted drafts.
        """
        check_at_least(max_new_tokens, 1, "max_new_tokens")
        settings = _Settings.make(self.default_sampling, num_steps=num_steps, policy=policy, temperature=temperature,
                                  top_p=top_p, seed=seed, **options)
        segments = [[prompt, max_new_tokens] for prompt in _as_list(prompts, "prompts")]
        return self._fill(segments, settings, stop_at_eos=True)

    def infill(self, texts: str | Sequence[str], gap_length: int = 16, **options: Any) -> list[str]:
        """Fills the gaps of each text: `<mask:12>` is a gap of 12 tokens, `<mask>` one of `gap_length`.

        `<mask:2-8>` is a gap of 2 to 8 tokens, as many as suit the text after it: see `sampling.gap_length`.
        The text around gaps comes back character for character.

        Args:
          options: the keywords of `generate`, from `num_steps` on.
        """
        settings = _Settings.make(self.default_sampling, **options)
        segments = [split_gaps(text, gap_length) for text in _as_list(texts, "texts")]
        if any(isinstance(segment, range) for text in segments for segment in text):
            encode_text = functools.partial(encode, self.tokenizer, start=self.pretrained.start_token_id)
            segments = infer_gap_lengths(self.model, segments, encode_text, diffusion=self.diffusion,
                                         batch_size=settings.batch_size, mesh=self.mesh)
        return self._fill(segments, settings, stop_at_eos=False)

    def respond(self, questions: str | Sequence[Prompt], max_new_tokens: int = 128, *,
                prompt_format: PromptFormat | None = None, **options: Any) -> list[str]:
        """Answers each question in the format that the model was fine-tuned on: returns the response alone.

        Args:
          questions: a text, a conversation (a list of messages {role, content}), or a list of either.
          max_new_tokens: the most tokens of a response.
          prompt_format: how a question is formatted; by default `prompt_format()`.
          options: the keywords of `generate`, from `num_steps` on.
        """
        check_at_least(max_new_tokens, 1, "max_new_tokens")
        settings = _Settings.make(self.default_sampling, **options)
        prompt_format = self.prompt_format() if prompt_format is None else prompt_format
        is_conversation = not isinstance(questions, str) and questions and isinstance(questions[0], dict)
        questions = [questions] if is_conversation else _as_list(questions, "questions")
        prompts, ends = [prompt_format.encode_prompt(question) for question in questions], prompt_format.end_token_ids
        # Conversations grow from call to call: coarse lengths, so that not every turn needs a program of its own.
        filled = self._sample([prompt + [GAP] * max_new_tokens for prompt in prompts], settings, ends, stop_at_eos=True,
                              coarse=True)
        return [prompt_format.decode_response(before_end(row[len(prompt) : len(prompt) + max_new_tokens], ends))
                for prompt, row in zip(prompts, filled, strict=True)]

    def prompt_format(self, **settings) -> PromptFormat:
        """Returns the format of the examples that the model was fine-tuned on; see `data.prompt_format_from_run`."""
        return prompt_format_from_run(self.tokenizer, self.pretrained.recipe or {}, self.config.max_length, **settings)

    def score(self, texts: str | Sequence[str], num_samples: int = 128, seed: int = 0,
              batch_size: int = 16) -> list[BoundEstimate]:
        """Returns an upper bound on each text's negative log-likelihood: nats, nats per token, standard error."""
        diffusion, tokenizer, start_token_id = self.diffusion, self.tokenizer, self.pretrained.start_token_id
        rows = [encode(tokenizer, [text], start_token_id)[0] for text in _as_list(texts, "texts")]
        for number, row in enumerate(rows):
            if len(row) == 1:
                raise DataError(f"text {number} is empty, so there is nothing to score")
        padded = pad_rows(rows, self.config.max_length)
        padding = np.arange(padded.tokens.shape[1]) >= padded.lengths[:, None]
        with use_mesh(self.mesh):
            estimate = bound(self.model, padded.tokens, ~padding, diffusion=diffusion, num_samples=num_samples,
                             seed=seed, batch_size=batch_size, segment_ids=padding)
        return list(estimate.rows)

    def save_pretrained(self, directory: str | os.PathLike, layout: str = "hf") -> None:
        """Writes weights, config and tokenizer for `transformers` ("hf"), for SGLang, LMDeploy and JetEngine ("sdar"),
        for llama.cpp ("dream") or in DiffuGPT's layout ("diffugpt"), or the adapter of a model loaded with
        `merge=False` ("peft")."""
        save_pretrained(directory, self.pretrained, layout=layout)

    def _fill(self, segments: Sequence[Sequence[Segment]], settings: "_Settings", *, stop_at_eos: bool) -> list[str]:
        """Returns texts with their gaps filled."""
        tokenizer, start, end = self.tokenizer, self.pretrained.start_token_id, self.pretrained.eos_token_id
        ends = () if end is None else (end,)
        rows, gaps = zip(*(encode(tokenizer, text, start) for text in segments), strict=True)
        filled = self._sample(rows, settings, ends, stop_at_eos=stop_at_eos)
        return [decode(tokenizer, text, gap, row, ends if stop_at_eos else ())
                for text, gap, row in zip(segments, gaps, filled, strict=True)]

    def _sample(self, rows: Sequence[Sequence[int]], settings: "_Settings", eos_token_ids: tuple[int, ...], *,
                stop_at_eos: bool, coarse: bool = False) -> list[np.ndarray]:
        """Returns rows of tokens with their gaps filled, see `sampling.sample_rows`."""
        index = np.arange(len(rows)) if settings.example_index is None else np.asarray(settings.example_index)
        if len(index) != len(rows):
            raise ConfigError(f"example_index has {len(index)} entries for {len(rows)} texts")
        diffusion = self.pretrained.diffusion if settings.config.policy == "autoregressive" else self.diffusion
        model = self.model_with_drafter(settings.config.drafter)
        return sample_rows(model, rows, _example_keys(np.uint32(settings.seed), index.astype(np.uint32)),
                           SamplingSpec(settings.config, diffusion, eos_token_ids, stop_at_eos and bool(eos_token_ids)),
                           batch_size=min(settings.batch_size, len(rows)), mesh=self.mesh, on_step=settings.on_step,
                           coarse=coarse, progress=settings.on_step is None, stats=settings.stats)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The settings that `generate`, `infill` and `respond` share."""

    config: SamplerConfig
    seed: int
    batch_size: int
    example_index: Sequence[int] | None
    on_step: Callable[[Snapshot], None] | None
    stats: SamplingStats | None

    @classmethod
    def make(cls, defaults: Mapping[str, Any], *, seed: int = 0, batch_size: int = 16,
             example_index: Sequence[int] | None = None, on_step: Callable[[Snapshot], None] | None = None,
             stats: SamplingStats | None = None, **sampler: Any) -> Self:
        check_at_least(batch_size, 1, "batch_size")
        return cls(resolve_settings(sampler, defaults), seed, batch_size, example_index, on_step, stats)


def _as_list(texts: str | Sequence[str], name: str) -> list[str]:
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise DataError(f'{name} is an empty list; give at least one text ("" for an empty prompt)')
    return texts


_example_keys = jax.jit(example_keys)  # one small program instead of ten


@functools.partial(jit_model, static_argnames="graphdef")
def _logits(graphdef: nnx.GraphDef, params: nnx.State, tokens: jax.Array, attention: AttentionMask) -> jax.Array:
    return nnx.merge(graphdef, params)(tokens, attention)
