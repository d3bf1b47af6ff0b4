"""Held-out examples answered by sampling, the same ones each time: what a loss means in answers."""

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dlm_jax.checkpoints import Pretrained
from dlm_jax.data.prompts import PromptFormat
from dlm_jax.data.rows import RowSource
from dlm_jax.errors import ConfigError
from dlm_jax.evaluation.answers import answer, judge, questions_of
from dlm_jax.parallel import num_batch_shards
from dlm_jax.sampling import SamplerConfig
from dlm_jax.training.config import TrainConfig

_BATCH = 32  # questions at a time


class GenerationEval:
    """The first held-out examples, and how they are answered: with the likeliest tokens, those that the model is surest
    of first, or from left to right under the autoregressive objective.

    Raises:
      ConfigError: nothing is held out.
    """

    def __init__(self, base: Pretrained, rows: RowSource | None, mesh: Mesh, config: TrainConfig):
        if rows is None:
            raise ConfigError("validation.generation_eval needs held-out examples; name some in data.validation, or raise "
                              "data.validation_fraction")
        self._base, self._mesh = base, mesh
        self._prompt_format = PromptFormat(base.tokenizer, config.data.examples, config.data.length)
        count = min(config.validation.generation_eval, len(rows))
        self._questions = questions_of(rows[np.arange(count)], self._prompt_format)
        self._sampler = (SamplerConfig("autoregressive", temperature=0.0) if config.objective.name == "autoregressive"
                         else SamplerConfig("confidence", config.validation.generation_steps, temperature=0.0))

    def __call__(self, params: nnx.State) -> tuple[dict[str, float], str]:
        """What the answers are worth on average, by name, and the first of them."""
        model = nnx.merge(nnx.graphdef(self._base.model), params)
        texts = answer(model, self._questions, self._prompt_format, self._sampler, mask_token_id=self._base.mask_token_id,
                       shift=self._base.shift, blocks=self._base.blocks, mesh=self._mesh,
                       batch_size=max(min(len(self._questions), _BATCH), num_batch_shards(self._mesh)))
        values = judge(texts, self._questions, self._prompt_format)
        return {name: float(np.mean([value[name] for value in values])) for name in values[0]}, texts[0]
