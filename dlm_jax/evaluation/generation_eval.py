"""Held-out examples answered by sampling during training, the same ones each time."""

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dlm_jax.checkpoints import Pretrained
from dlm_jax.data.config import DataConfig
from dlm_jax.data.prompts import PromptFormat
from dlm_jax.data.rows import RowSource
from dlm_jax.errors import ConfigError
from dlm_jax.evaluation.answers import answer, judge, questions_of
from dlm_jax.parallel import num_batch_shards
from dlm_jax.sampling import SamplerConfig

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
        texts = answer(model, self._questions, self._format, self._sampler, mask_token_id=self._base.mask_token_id,
                       shift=self._base.shift, blocks=self._base.blocks, mesh=self._mesh,
                       batch_size=max(min(len(self._questions), _BATCH), num_batch_shards(self._mesh)))
        values = judge(texts, self._questions, self._format)
        means = {name: float(np.mean([value[name] for value in values])) for name in values[0]}
        shares = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        return {**means, "text": texts[0]}, f"answers  {shares}  first: {' '.join(texts[0].split())}"
