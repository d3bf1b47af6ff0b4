"""Fine-tuning examples answered: a model writes behind prompts as it met them in training, and is judged."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dlm_jax.data.rows import Rows
from dlm_jax.diffusion import example_keys
from dlm_jax.errors import DataError
from dlm_jax.evaluation.metrics import METRICS
from dlm_jax.models import Transformer
from dlm_jax.sampling import GAP, Task, fill_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORM = re.compile(r"#### \$?-?[\d,]*\.?\d+$")


class Question(NamedTuple):
    """Token ids of an example.

    Attributes:
      prompt: with BOS and separator, as training has it.
      answer: with what ends it, without padding.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def questions_of(rows: Rows, eos_token_id: int) -> list[Question]:
    """The examples that fill `rows`, one each: what may be masked is the answer, up to its EOS.

    Raises:
      DataError: the rows are running text.
    """
    if rows.maskable is None:
        raise DataError("rows of running text hold no questions to answer; name a format in data.examples")
    found = []
    for tokens, maskable in zip(rows.tokens.tolist(), rows.maskable, strict=True):
        begin = int(np.argmax(maskable))
        answer = tokens[begin : begin + int(maskable[begin:].sum())]
        end = answer.index(eos_token_id) + 1 if eos_token_id in answer else len(answer)
        found.append(Question(tuple(tokens[:begin]), tuple(answer[:end])))
    return found


def answer(model: Transformer, questions: Sequence[Question], length: int, task: Task,
           tokenizer: "PreTrainedTokenizerBase", *, seed: int = 0, batch_size: int = 16,
           mesh: Mesh | None = None) -> list[str]:
    """What the model writes behind each prompt in a row of `length` tokens, up to the task's end of text.

    An answer depends on the seed and its question's place in the list, never on the batch size.
    """
    rows = [[*question.prompt, *[GAP] * (length - len(question.prompt))] for question in questions]
    keys = example_keys(seed, jnp.arange(len(rows), dtype=jnp.uint32))
    filled = fill_rows(model, rows, keys, task, batch_size=batch_size, mesh=mesh)
    return [text_of(tokenizer, row[len(question.prompt) :].tolist(), task.eos_token_id)
            for row, question in zip(filled, questions, strict=True)]


def judge(texts: Sequence[str], references: Sequence[str], numbers: bool) -> list[dict[str, float]]:
    """Each text against its reference, values between 0 and 1.

    `exact_match` is the same text. Of GSM8K's answers, `numbers`, `marked_number` is the same number after `####`, and
    `in_form` whether there is a number after `####` at the end; of others `rougeL` says how near they come.
    """
    return [{"exact_match": float(text == reference), **(_about_numbers if numbers else _about_words)(text, reference)}
            for text, reference in zip(texts, references, strict=True)]


def text_of(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[int], eos_token_id: int | None) -> str:
    """The text of an answer's tokens, up to its EOS, without spaces around it."""
    tokens = list(tokens)
    end = tokens.index(eos_token_id) if eos_token_id in tokens else len(tokens)
    return tokenizer.decode(tokens[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def _about_numbers(text: str, reference: str) -> dict[str, float]:
    return {"marked_number": METRICS["marked_number"](text, [reference.rpartition("####")[2].strip()]),
            "in_form": float(_FORM.search(text) is not None)}


def _about_words(text: str, reference: str) -> dict[str, float]:
    return {"rougeL": METRICS["rougeL"](text, [reference])}
