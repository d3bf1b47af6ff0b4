"""Fine-tuning examples answered: a model writes behind prompts as it met them in training, and is judged."""

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
from dlm_jax.diffusion import DiffusionSpec
from dlm_jax.errors import ConfigError, DataError
from dlm_jax.evaluation.metrics import METRICS
from dlm_jax.models import Transformer
from dlm_jax.parallel import num_batch_shards
from dlm_jax.random import example_keys
from dlm_jax.sampling import GAP, SamplerConfig, SamplingSpec, sample_rows
from dlm_jax.sampling.text import before_end

_FORM = re.compile(r"#### \$?-?[\d,]*\.?\d+$")


class Question(NamedTuple):
    """An example.

    Attributes:
      prompt: token ids, as training has them.
      answer: the text to be found.
    """

    prompt: tuple[int, ...]
    answer: str


def questions_of(rows: Rows, prompt_format: PromptFormat) -> list[Question]:
    """The examples that fill `rows`, one each: what may be masked is the answer, with its end and perhaps padding.

    Raises:
      DataError: the rows are running text.
    """
    if rows.noisable_mask is None:
        raise DataError("rows of running text hold no questions to answer; name a format in data.examples")
    found = []
    for tokens, noisable_mask in zip(rows.tokens.tolist(), rows.noisable_mask, strict=True):
        begin = int(np.argmax(noisable_mask))
        answer = tokens[begin : begin + int(noisable_mask.sum())]
        text = prompt_format.decode_response(before_end(answer, prompt_format.end_token_ids))
        found.append(Question(tuple(tokens[:begin]), text))
    return found


def answer(model: Transformer, questions: Sequence[Question], prompt_format: PromptFormat, config: SamplerConfig, *,
           diffusion: DiffusionSpec, seed: int = 0,
           batch_size: int = 16, mesh: Mesh | None = None, progress: bool = False) -> list[str]:
    """What the model writes behind each prompt, in rows as long as the prompt format's.

    An answer depends on the seed and its question's place in the list, never on the batch size.

    Raises:
      ConfigError: the sampler cannot do it; see `sampling.sample`.
    """
    spec = SamplingSpec(config, diffusion, prompt_format.end_token_ids, stop_at_eos=True)
    rows = [[*question.prompt, *[GAP] * (prompt_format.length - len(question.prompt))] for question in questions]
    keys = example_keys(seed, jnp.arange(len(rows), dtype=jnp.uint32))
    filled = sample_rows(model, rows, keys, spec, batch_size=batch_size, mesh=mesh, progress=progress)
    return [prompt_format.decode_response(before_end(row[len(question.prompt) :], prompt_format.end_token_ids))
            for row, question in zip(filled, questions, strict=True)]


def judge(texts: Sequence[str], questions: Sequence[Question], prompt_format: PromptFormat) -> list[dict[str, float]]:
    """Each text against the answer to its question, values between 0 and 1.

    `exact_match` is the same text. For GSM8K's formats `marked_number` is the same number after `####`, and `in_form`
    whether there is a number after `####` at the end; for others `rougeL` says how near the text comes.
    """
    about = _about_numbers if prompt_format.config.format.startswith("gsm8k") else _about_words
    return [{"exact_match": float(text == question.answer), **about(text, question.answer)}
            for text, question in zip(texts, questions, strict=True)]


def _about_numbers(text: str, answer: str) -> dict[str, float]:
    return {"marked_number": METRICS["marked_number"](text, [answer.rpartition("####")[2].strip()]),
            "in_form": float(_FORM.search(text) is not None)}


def _about_words(text: str, answer: str) -> dict[str, float]:
    return {"rougeL": METRICS["rougeL"](text, [answer])}


# ---- Held-out examples answered by sampling during training, the same ones each time.


_BATCH = 32  # examples at a time


class GenerationEval:
    """The first held-out examples, answered greedily by the parameters of a run.

    Args:
      base: the model of the run; only its shapes are used.
      held_out: the held-out rows.
      data: how examples become rows.
      num_examples: number of examples, at most.
      sampler: how they are answered.

    Raises:
      ConfigError: nothing is held out.
    """

    def __init__(self, base: Pretrained, held_out: RowSource | None, mesh: Mesh, data: DataConfig, *,
                 num_examples: int, sampler: SamplerConfig):
        if held_out is None:
            raise ConfigError("validation.num_generations needs held-out examples; name some in data.validation, or "
                              "raise data.validation_fraction")
        self._base, self._mesh, self._sampler = base, mesh, sampler
        self._format = PromptFormat(base.tokenizer, data.examples, data.length)
        self._questions = questions_of(held_out[np.arange(min(num_examples, len(held_out)))], self._format)

    def __call__(self, params: nnx.State) -> tuple[dict[str, float | str], str]:
        """Returns the mean of each judgment with the first answer as `text`, and the same as a line for people."""
        model = nnx.merge(nnx.graphdef(self._base.model), params)
        texts = answer(model, self._questions, self._format, self._sampler, diffusion=self._base.diffusion,
                       mesh=self._mesh, batch_size=max(min(len(self._questions), _BATCH), num_batch_shards(self._mesh)))
        values = judge(texts, self._questions, self._format)
        means = {name: float(np.mean([value[name] for value in values])) for name in values[0]}
        shares = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        return {**means, "text": texts[0]}, f"answers  {shares}  first: {' '.join(texts[0].split())}"
