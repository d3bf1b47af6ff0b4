"""Rows of any number and lengths, sampled in batches of one shape."""

import contextlib
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from dlm_jax.parallel import array_sharding, batch_parts, to_host
from dlm_jax.sampling.canvas import GAP, bucket, make_canvas
from dlm_jax.sampling.loop import sample
from dlm_jax.sampling.task import Network, Task


def fill_rows(model: Network, rows: Sequence[Sequence[int]], keys: jax.Array, task: Task, *, batch_size: int = 16,
              mesh: Mesh | None = None) -> list[np.ndarray]:
    """Each row of token ids with its `GAP`s filled, int32 [length of the row].

    A row's tokens depend on its own ids and key, never on the other rows or the batch size. With several processes all
    call this, and all get every row.

    Args:
      keys: random keys [rows].
      batch_size: rows at a time.
      mesh: splits a batch over devices.

    Raises:
      DataError: a row does not fit the model, or begins with a gap.
      ConfigError: the policy cannot fill these gaps; see `sample`.
    """
    if not rows:
        return []
    canvas = make_canvas(rows, model.config.max_length)
    parts = 1 if mesh is None else batch_parts(mesh)
    size = -(-batch_size // parts) * parts
    # Batch mates are alike in width, which is a program's shape, and in gaps, which is how many steps they take.
    order = sorted(range(len(rows)), key=lambda i: (bucket(len(rows[i]), model.config.max_length),
                                                    sum(token == GAP for token in rows[i])))
    filled: list[np.ndarray] = [np.zeros(0, np.int32)] * len(rows)
    for start in range(0, len(rows), size):
        chosen = np.resize(order[start : start + size], size)  # the last batch repeats rows, to have the same shape
        part = canvas.take(chosen)
        arrays = part.tokens, part.fixed, part.lengths, keys[chosen]
        if mesh is not None:
            arrays = jax.device_put(arrays, array_sharding(mesh, "batch"))
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            tokens = to_host(sample(model, *arrays, task).tokens)
        for i, row in zip(chosen, tokens, strict=True):
            filled[i] = row[: len(rows[i])]
    return filled
