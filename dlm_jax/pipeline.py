"""DiffusionLM: a model, its tokenizer and its mask token, and what a user does with them."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from dlm_jax.attention import AttentionMask
from dlm_jax.checkpoints import Pretrained, load_pretrained, save_pretrained
from dlm_jax.data.prompts import Prompt, PromptFormat, prompt_format_from_run
from dlm_jax.errors import ConfigError, DataError
from dlm_jax.evaluation import BoundEstimate, bound
from dlm_jax.models import Compute, ModelConfig, Transformer, abstract_model
from dlm_jax.parallel import ATTENTION_PARTITION, MeshConfig, make_mesh, param_shardings
from dlm_jax.random import example_keys
from dlm_jax.sampling import GAP, SamplerConfig, SamplingSpec, Snapshot, pad_rows, sample_rows, sampler_config
from dlm_jax.sampling.gap_length import infer_gap_lengths
from dlm_jax.sampling.text import Segment, before_end, decode, encode, split_gaps


@dataclasses.dataclass(frozen=True)
class DiffusionLM:
    """A diffusion language model ready for use; build one with `from_pretrained`.

    Every method's result depends on the seed and on an example's place in the list given, never on the batch size.
    """

    pretrained: Pretrained
    mesh: Mesh | None = None

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | os.PathLike, mask_token: str | int | None = None,
                        dtype: str = "float32", mesh: MeshConfig | None = None, merge: bool = True,
                        base: str | None = None) -> Self:
        """Loads a Hugging Face directory or hub id, a checkpoint in DiffuGPT's layout, a training workdir,
        `workdir@step`, or an adapter in PEFT's format with its base.

        Args:
          mask_token: an id, or a token, which is added to the vocabulary if new; None: the recorded one. A model without
            a mask token can give logits and be saved, not sampled.
          dtype: "float32" or "bfloat16", of parameters and activations.
          mesh: splits parameters and texts over all devices, e.g. `MeshConfig(fsdp=-1)`; None uses the first device.
          merge: False keeps a run's LoRA beside its base, with parameters in the dtypes of the run; it computes the
            same, and can be saved as an adapter.
          base: of an adapter, in place of the one that it names.
        """
        devices = None if mesh is None else make_mesh(mesh)
        compute = Compute(dtype=dtype, partition=None if mesh is None else ATTENTION_PARTITION)
        shardings = None if devices is None else lambda config: param_shardings(
            abstract_model(config, compute, dtype), devices)
        return cls(load_pretrained(path_or_hub_id, mask_token=mask_token, base=base, merge=merge, compute=compute,
                                   param_dtype=dtype, shardings=shardings), devices)

    @property
    def model(self) -> Transformer:
        return self.pretrained.model

    @property
    def config(self) -> ModelConfig:
        return self.pretrained.model.config

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self.pretrained.tokenizer is None:
            raise ConfigError(f"{self.pretrained.source} has no tokenizer; put its tokenizer files beside the weights")
        return self.pretrained.tokenizer

    @property
    def mask_token_id(self) -> int:
        if self.pretrained.mask_token_id is None:
            raise ConfigError(f"{self.pretrained.source} records no mask token; name one with mask_token=")
        return self.pretrained.mask_token_id

    def logits(self, tokens: np.ndarray, attention: AttentionMask | None = None) -> jax.Array:
        """Float32 logits [batch, length, vocab] of int `tokens` [batch, length]; position n predicts n + 1.

        `attention` is bidirectional by default.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise DataError(f"tokens must be integers [batch, length], got {tokens.dtype} {list(tokens.shape)}")
        if tokens.shape[1] > self.config.max_length:
            raise DataError(f"{tokens.shape[1]} tokens a row, and the model takes at most {self.config.max_length}")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
            raise DataError(f"token ids must lie in 0 .. {self.config.vocab_size - 1}, the model's vocabulary, "
                            f"got {tokens.min()} .. {tokens.max()}")
        with self._in_use():
            # A copy: JAX may read what it is handed after this returns, when the caller may have changed it.
            return _logits(*nnx.split(self.model), np.array(tokens, np.int32),
                           AttentionMask.bidirectional() if attention is None else attention)

    def generate(self, prompts: str | Sequence[str] = "", max_new_tokens: int = 128, num_steps: int | None = None,
                 policy: str = "confidence", temperature: float = 1.0, top_p: float | None = None, seed: int = 0,
                 batch_size: int = 16, example_index: Sequence[int] | None = None,
                 on_step: Callable[[Snapshot], None] | None = None, **settings) -> list[str]:
        """Continues each prompt, "" for none: the prompt as it was, and the text that follows, up to an EOS token.

        Args:
          max_new_tokens: how many tokens follow each prompt.
          num_steps, policy, temperature, top_p, settings: see `sampling.SamplerConfig`. The policy "autoregressive"
            writes from left to right, as the model's parent does, and needs no mask token.
          example_index: which random numbers each prompt gets, 0, 1, 2, ... by default.
          on_step: called before the first step of each batch and after every step; the texts are the same with it.
        """
        _check_some(max_new_tokens)
        config = sampler_config(num_steps=num_steps, policy=policy, temperature=temperature, top_p=top_p, **settings)
        segments = [[prompt, max_new_tokens] for prompt in _texts(prompts, "prompts")]
        return self._fill(segments, config, seed, batch_size, example_index, on_step, stop_at_eos=True)

    def infill(self, texts: str | Sequence[str], gap_length: int = 16, num_steps: int | None = None,
               policy: str = "confidence", temperature: float = 1.0, top_p: float | None = None, seed: int = 0,
               batch_size: int = 16, example_index: Sequence[int] | None = None,
               on_step: Callable[[Snapshot], None] | None = None, **settings) -> list[str]:
        """Fills the gaps of each text: `<mask:12>` is one of 12 tokens, `<mask>` one of `gap_length`.

        `<mask:2-8>` is one of 2 to 8 tokens, as many as what stands behind it suggests: see `evaluation.gap_length`.
        What stands around gaps comes back character for character. Other arguments as in `generate`.
        """
        config = sampler_config(num_steps=num_steps, policy=policy, temperature=temperature, top_p=top_p, **settings)
        segments = [split_gaps(text, gap_length) for text in _texts(texts, "texts")]
        if any(isinstance(segment, range) for text in segments for segment in text):
            encode_text = functools.partial(encode, self.tokenizer, bos_token_id=self._bos_token_id)
            with self._in_use():
                segments = infer_gap_lengths(self.model, segments, encode_text, mask_token_id=self.mask_token_id,
                                        shift=self.pretrained.shift, batch_size=batch_size)
        return self._fill(segments, config, seed, batch_size, example_index, on_step, stop_at_eos=False)

    def respond(self, questions: str | Sequence[Prompt], max_new_tokens: int = 128, num_steps: int | None = None,
                policy: str = "confidence", temperature: float = 1.0, top_p: float | None = None, seed: int = 0,
                batch_size: int = 16, example_index: Sequence[int] | None = None,
                on_step: Callable[[Snapshot], None] | None = None, prompt_format: PromptFormat | None = None,
                **settings) -> list[str]:
        """Answers each question as a fine-tuned model learnt to: the response alone, up to the end of it.

        Args:
          questions: a text, a conversation (a list of messages {role, content}), or a list of either.
          max_new_tokens: the most tokens of a response.
          prompt_format: how a question is written; by default `prompt_format()`. Other arguments as in `generate`.
        """
        _check_some(max_new_tokens)
        config = sampler_config(num_steps=num_steps, policy=policy, temperature=temperature, top_p=top_p, **settings)
        prompt_format = self.prompt_format() if prompt_format is None else prompt_format
        alone = not isinstance(questions, str) and questions and isinstance(questions[0], dict)
        prompts = [prompt_format.encode_prompt(question)
                   for question in ([questions] if alone else _texts(questions, "questions"))]
        # Conversations grow from call to call: coarse lengths, so that not every turn needs a program of its own.
        filled = self._sample([prompt + [GAP] * max_new_tokens for prompt in prompts], config, seed, batch_size,
                              example_index, on_step, prompt_format.end_token_ids, stop_at_eos=True, coarse=True)
        ends = prompt_format.end_token_ids
        return [prompt_format.decode_response(before_end(row[len(prompt) : len(prompt) + max_new_tokens], ends))
                for prompt, row in zip(prompts, filled, strict=True)]

    def prompt_format(self, **settings) -> PromptFormat:
        """How the examples were written that the model learnt from; `settings` as in `data.recorded`."""
        return prompt_format_from_run(self.tokenizer, self.pretrained.recipe or {}, self.config.max_length, **settings)

    def score(self, texts: str | Sequence[str], num_samples: int = 128, seed: int = 0,
              batch_size: int = 16) -> list[BoundEstimate]:
        """An upper bound on each text's negative log-likelihood: nats, nats per token and its standard error."""
        mask_token_id, bos_token_id = self.mask_token_id, self._bos_token_id
        rows = [encode(self.tokenizer, [text], bos_token_id)[0] for text in _texts(texts, "texts")]
        for number, row in enumerate(rows):
            if len(row) == 1:
                raise DataError(f"text {number} is empty, so there is nothing to score")
        padded = pad_rows(rows, self.config.max_length)
        padding = np.arange(padded.tokens.shape[1]) >= padded.lengths[:, None]
        with self._in_use():
            estimate = bound(self.model, padded.tokens, ~padding, mask_token_id=mask_token_id,
                             shift=self.pretrained.shift, num_samples=num_samples, seed=seed, batch_size=batch_size,
                             segment_ids=padding, blocks=self.pretrained.blocks)
        return list(estimate.rows)

    def save_pretrained(self, directory: str | os.PathLike, layout: str = "hf") -> None:
        """Writes weights, config and tokenizer for `transformers` ("hf") or the DiffuGPT release ("diffugpt"), or of a
        model loaded with `merge=False` the adapter ("peft")."""
        save_pretrained(directory, self.pretrained, layout=layout)

    @property
    def _bos_token_id(self) -> int:
        """What position 0 holds: BOS, or for a tokenizer without one its end-of-text token."""
        for token_id in (self.pretrained.bos_token_id, self.pretrained.eos_token_id):
            if token_id is not None and token_id < self.config.vocab_size:
                return token_id
        raise ConfigError(f"{self.pretrained.source} has no BOS or EOS token to begin a text with; set bos_token "
                          "in its tokenizer_config.json")

    def _fill(self, segments: Sequence[Sequence[Segment]], config: SamplerConfig, seed: int, batch_size: int,
              example_index: Sequence[int] | None, on_step: Callable[[Snapshot], None] | None, *,
              stop_at_eos: bool) -> list[str]:
        """Fills the gaps of texts."""
        eos_token_id = self.pretrained.eos_token_id
        ends = () if eos_token_id is None else (eos_token_id,)
        rows, gaps = zip(*(encode(self.tokenizer, segment, self._bos_token_id) for segment in segments), strict=True)
        filled = self._sample(rows, config, seed, batch_size, example_index, on_step, ends, stop_at_eos)
        return [decode(self.tokenizer, *parts, ends if stop_at_eos else ())
                for parts in zip(segments, gaps, filled, strict=True)]

    def _sample(self, rows: Sequence[Sequence[int]], config: SamplerConfig, seed: int, batch_size: int,
                example_index: Sequence[int] | None, on_step: Callable[[Snapshot], None] | None,
                eos_token_ids: tuple[int, ...], stop_at_eos: bool, coarse: bool = False) -> list[np.ndarray]:
        """Fills the gaps of rows of tokens, see `sampling.sample_rows`."""
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        index = np.arange(len(rows)) if example_index is None else np.asarray(example_index)
        if len(index) != len(rows):
            raise ConfigError(f"example_index has {len(index)} entries for {len(rows)} texts")
        mask_token_id = self.pretrained.mask_token_id if config.policy == "autoregressive" else self.mask_token_id
        spec = SamplingSpec(config, mask_token_id, self.pretrained.shift, eos_token_ids, stop_at_eos and bool(eos_token_ids),
                    blocks=self.pretrained.blocks)
        return sample_rows(self.model, rows, example_keys(seed, jnp.asarray(index, jnp.uint32)), spec,
                           batch_size=min(batch_size, len(rows)), mesh=self.mesh, on_step=on_step, coarse=coarse,
                           progress=on_step is None)

    def _in_use(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


def _check_some(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}")


def _texts(texts: str | Sequence[str], name: str) -> list[str]:
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise DataError(f'{name} is an empty list; give at least one text ("" to begin from nothing)')
    return texts


@functools.partial(jax.jit, static_argnames="graphdef")
def _logits(graphdef: nnx.GraphDef, params: nnx.State, tokens: jax.Array, attention: AttentionMask) -> jax.Array:
    return nnx.merge(graphdef, params)(tokens, attention)
