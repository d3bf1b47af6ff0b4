"""Held-out examples answered by sampling, the same ones each time: what a loss means in answers."""

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dlm_jax.data.rows import RowSource
from dlm_jax.errors import ConfigError
from dlm_jax.evaluation.answers import answer, judge, questions_of, text_of
from dlm_jax.hf import Pretrained
from dlm_jax.parallel import batch_parts
from dlm_jax.sampling import SamplerConfig, Task
from dlm_jax.training.config import TrainConfig


class Answers:
    """The first held-out examples, and how they are answered: the likeliest tokens, those that the model is surest of
    first, or from left to right under the autoregressive objective.

    Raises:
      ConfigError: nothing is held out.
    """

    def __init__(self, base: Pretrained, rows: RowSource | None, mesh: Mesh, config: TrainConfig):
        if rows is None:
            raise ConfigError("validation.answers needs held-out examples; name some in data.validation, or raise "
                              "data.validation_fraction")
        self._base, self._mesh, self._config = base, mesh, config
        settings = config.validation
        self._questions = questions_of(rows[np.arange(min(settings.answers, len(rows)))], base.eos_token_id)
        self._references = [text_of(base.tokenizer, question.answer, base.eos_token_id)
                            for question in self._questions]
        sampler = (SamplerConfig(policy="autoregressive", temperature=0.0)
                   if config.objective.name == "autoregressive"
                   else SamplerConfig(policy="confidence", temperature=0.0, num_steps=settings.answer_steps))
        self._task = Task(sampler, base.mask_token_id, base.shift, base.eos_token_id, stop_at_eos=True)

    def __call__(self, params: nnx.State) -> tuple[dict[str, float], str]:
        """The share of the answers that are right, and in what ways, and the first answer."""
        model = nnx.merge(nnx.graphdef(self._base.model), params)
        size = -(-min(len(self._questions), 32) // batch_parts(self._mesh)) * batch_parts(self._mesh)
        texts = answer(model, self._questions, self._config.data.length, self._task, self._base.tokenizer,
                       batch_size=size, mesh=self._mesh)
        values = judge(texts, self._references, numbers=self._config.data.examples.format.startswith("gsm8k"))
        means = {name: float(np.mean([value[name] for value in values])) for name in values[0]}
        return means, texts[0]
