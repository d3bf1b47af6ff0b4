"""Evaluation on fine-tuning examples: a model answers prompts in their training format, and answers are compared."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dlm_jax.checkpoints import Pretrained
from dlm_jax.data.config import DataConfig
from dlm_jax.data.prompts import PromptFormat
from dlm_jax.data.rows import Rows, RowSource
from dlm_jax.data.tokenization import start_token
from dlm_jax.diffusion import DiffusionSpec
from dlm_jax.errors import ConfigError, DataError
from dlm_jax.evaluation.metrics import rouge_l, strict_match
from dlm_jax.models import Transformer
from dlm_jax.parallel import num_batch_shards
from dlm_jax.random import example_keys
from dlm_jax.sampling import GAP, SamplerConfig, SamplingSpec, sample_rows
from dlm_jax.sampling.text import before_end

_BATCH_SIZE = 32
_NUMBER_AT_END = re.compile(r"#### \$?-?[\d,]*\.?\d+$")


class Question(NamedTuple):
    """An example.

    Attributes:
      prompt: token ids, as in training.
      answer: the expected text.
    """

    prompt: tuple[int, ...]
    answer: str


def questions_of(rows: Rows, prompt_format: PromptFormat) -> list[Question]:
    """Returns the examples in `rows`, one per row: the noisable tokens are the answer with its end and padding.

    Raises:
      DataError: the rows are plain text.
    """
    if rows.noisable_mask is None:
        raise DataError("rows of plain text have no questions to answer; name a format in data.examples")
    found = []
    for tokens, noisable_mask in zip(rows.tokens.tolist(), rows.noisable_mask, strict=True):
        start = int(np.argmax(noisable_mask))
        answer = tokens[start : start + int(noisable_mask.sum())]
        text = prompt_format.decode_response(before_end(answer, prompt_format.end_token_ids))
        found.append(Question(tuple(tokens[:start]), text))
    return found


def answer(model: Transformer, questions: Sequence[Question], prompt_format: PromptFormat, config: SamplerConfig, *,
           diffusion: DiffusionSpec, seed: int = 0, batch_size: int = 16, mesh: Mesh | None = None,
           progress: bool = False) -> list[str]:
    """Returns the generated answer to each prompt, in rows of the prompt format's length.

    An answer depends on the seed and the question's index, never on the batch size.

    Raises:
      ConfigError: the sampler's settings do not fit; see `sampling.sample_rows`.
    """
    spec = SamplingSpec(config, diffusion, prompt_format.end_token_ids, stop_at_eos=True)
    rows = [[*question.prompt, *[GAP] * (prompt_format.length - len(question.prompt))] for question in questions]
    keys = example_keys(seed, jnp.arange(len(rows), dtype=jnp.uint32))
    filled = sample_rows(model, rows, keys, spec, batch_size=batch_size, mesh=mesh, progress=progress)
    return [prompt_format.decode_response(before_end(row[len(question.prompt) :], prompt_format.end_token_ids))
            for row, question in zip(filled, questions, strict=True)]


def judge(texts: Sequence[str], questions: Sequence[Question], prompt_format: PromptFormat) -> list[dict[str, float]]:
    """Returns metrics of each text against the answer to its question, between 0 and 1.

    All formats have `exact_match`, the same text. GSM8K's have `strict_match`, the same number after `####`, and
    `well_formed`, whether the text ends with such a number. The others have `rougeL`.
    """
    metrics_of = _number_metrics if prompt_format.config.format.startswith("gsm8k") else _word_metrics
    return [{"exact_match": float(text == question.answer), **metrics_of(text, question.answer)}
            for text, question in zip(texts, questions, strict=True)]


class GenerationEval:
    """Generates greedy answers to the first held-out examples with the parameters of a run, the same ones each time.

    Args:
      base: the model of the run; only its structure is used.
      held_out: the held-out rows.
      data: how examples become rows.
      num_examples: number of examples, at most.
      sampler: how answers are generated.

    Raises:
      ConfigError: nothing is held out.
    """

    def __init__(self, base: Pretrained, held_out: RowSource | None, mesh: Mesh, data: DataConfig, *,
                 num_examples: int, sampler: SamplerConfig):
        if held_out is None:
            raise ConfigError("validation.num_generations needs held-out examples; name some in data.validation, or "
                              "raise data.validation_fraction")
        self._base, self._mesh, self._sampler = base, mesh, sampler
        self._format = PromptFormat(base.tokenizer, data.examples, data.length,
                                    start_token(base.tokenizer, data.add_bos, data.packing))
        self._questions = questions_of(held_out[np.arange(min(num_examples, len(held_out)))], self._format)

    def __call__(self, params: nnx.State) -> tuple[dict[str, float | str], str]:
        """Returns the mean of each metric with the first answer as `text`, and the same as a line of text."""
        model = nnx.merge(nnx.graphdef(self._base.model), params)
        batch_size = max(min(len(self._questions), _BATCH_SIZE), num_batch_shards(self._mesh))
        texts = answer(model, self._questions, self._format, self._sampler, diffusion=self._base.diffusion,
                       mesh=self._mesh, batch_size=batch_size)
        values = judge(texts, self._questions, self._format)
        means = {name: float(np.mean([value[name] for value in values])) for name in values[0]}
        shares = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        return {**means, "text": texts[0]}, f"answers  {shares}  first: {' '.join(texts[0].split())}"


def _number_metrics(text: str, answer: str) -> dict[str, float]:
    return {"strict_match": strict_match(text, answer.rpartition("####")[2].strip()),
            "well_formed": float(_NUMBER_AT_END.search(text) is not None)}


def _word_metrics(text: str, answer: str) -> dict[str, float]:
    return {"rougeL": rouge_l(text, answer)}
