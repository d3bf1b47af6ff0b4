"""The loss on held-out rows: the same rows, under the same noise, each time."""

import dataclasses
import functools
import operator

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dlm_jax.data.loader import Loader
from dlm_jax.data.rows import RowSource
from dlm_jax.diffusion import Batch, ObjectiveConfig
from dlm_jax.parallel import make_global_batch
from dlm_jax.training.step import make_eval_step, metrics_from_sums


class Validation:
    """Held-out batches on the devices, and the program that scores them.

    Args:
      num_rows: at most how many rows are used.
      num_samples: noise levels per row; the autoregressive loss has no noise and takes one.
      batch_size: rows of one forward pass.
    """

    def __init__(self, graphdef: nnx.GraphDef, rows: RowSource, mesh: Mesh, *, num_rows: int, num_samples: int,
                 batch_size: int, objective: ObjectiveConfig, seed: int, mask_token_id: int | None):
        self.num_rows = min(num_rows, len(rows))
        self.num_samples = 1 if objective.name == "autoregressive" else num_samples
        self._eval_step = make_eval_step(graphdef, mesh, objective=objective, seed=seed, num_rows=self.num_rows,
                                         num_samples=self.num_samples, mask_token_id=mask_token_id)
        loader = Loader([rows], batch_size, shuffle=False)
        self._batches = [make_global_batch(lambda part, k=k: self._read(loader, k, part), batch_size, mesh)
                         for k in range(-(-self.num_rows // batch_size))]

    def _read(self, loader: Loader, index: int, part: slice) -> Batch:
        """A part of a batch, in which rows past the last one wanted are not scored."""
        batch = loader.batch(index, part)
        wanted = np.asarray(batch.example_index) < self.num_rows
        return dataclasses.replace(batch, noisable_mask=batch.noisable_mask & wanted[:, None])

    def __call__(self, params: nnx.State) -> dict[str, float]:
        """The bound in nats per token with its companions, under bidirectional attention; see `metrics_from_sums`."""
        sums = functools.reduce(operator.add, (self._eval_step(params, batch, np.int32(draw))
                                               for batch in self._batches for draw in range(self.num_samples)))
        return {name: float(value) for name, value in jax.device_get(metrics_from_sums(sums)).items()}
