"""Any number of rows, of any lengths, in batches of one size."""

import contextlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from dlm_jax.parallel import num_batch_shards, shard_batch, to_host
from dlm_jax.sampling.loop import sample, stream
from dlm_jax.sampling.spec import Network, SamplingSpec
from dlm_jax.sampling.text import GAP, bucket, pad_rows
from dlm_jax.sampling.trace import Snapshot


def sample_rows(model: Network, rows: Sequence[Sequence[int]], keys: jax.Array, spec: SamplingSpec, *, batch_size: int,
                mesh: Mesh | None = None, on_step: Callable[[Snapshot], None] | None = None, coarse: bool = False,
                progress: bool = False) -> list[np.ndarray]:
    """Fills the gaps of rows of token ids and `GAP`s, those alike together.

    A row's tokens depend on its own ids and key, never on the other rows or the batch size. With several processes all
    call this, and all get every row.

    Args:
      keys: random keys [rows].
      batch_size: rows at a time; over a mesh it is rounded up to what the mesh can split. The last batch repeats rows,
        to have the shape of the others and no program of its own.
      mesh: the devices that the model lies on.
      on_step: called before the first step of each batch and after every step; the rows are the same with it.
      coarse: as in `padded.bucket`.
      progress: whether a bar shows how far more than one batch has come.

    Returns:
      The tokens of each row, int32 [its length].

    Raises:
      DataError: a row is too long for the model, or begins with a gap.
      ConfigError: the policy cannot fill these gaps, see `loop.sample`.
    """
    if not rows:
        return []
    padded = pad_rows(rows, model.config.max_length, coarse)
    # Batch mates are alike in width, which is a program's shape, and in gaps, which is how many steps they take.
    order = sorted(range(len(rows)), key=lambda i: (bucket(len(rows[i]), model.config.max_length, coarse=coarse),
                                                    sum(token == GAP for token in rows[i])))
    parts = 1 if mesh is None else num_batch_shards(mesh)
    size = -(-batch_size // parts) * parts
    filled: list[np.ndarray] = [np.zeros(0, np.int32)] * len(rows)
    quiet = None if progress and len(rows) > size else True  # None: where there is a terminal
    for start in tqdm(range(0, len(rows), size), desc="sampling", leave=False, disable=quiet):
        chosen = np.resize(order[start : start + size], size)
        part = padded.take(chosen)
        arrays = part.tokens, part.fixed, part.lengths, keys[chosen]
        if mesh is not None:
            *arrays, numbers = (shard_batch(np.asarray(x), mesh) for x in (*arrays[:3], jax.random.key_data(arrays[3])))
            arrays = *arrays, jax.random.wrap_key_data(numbers)
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            tokens = (sample(model, *arrays, spec).tokens if on_step is None else
                      _watched(model, arrays, spec, chosen, on_step))
        for i, row in zip(chosen, to_host(tokens), strict=True):
            filled[i] = row[: len(rows[i])]
    return filled


def _watched(model: Network, arrays: tuple[jax.Array, ...], spec: SamplingSpec, rows: np.ndarray,
             on_step: Callable[[Snapshot], None]) -> jax.Array:
    """The tokens that `sample` would give, every step shown."""
    number = len(np.unique(rows))  # without repetitions
    for step, state in enumerate(stream(model, *arrays, spec)):
        tokens, masked, confidence = (np.asarray(x)[:number] for x in (state.tokens, state.masked, state.confidence))
        on_step(Snapshot(step, rows[:number], np.asarray(arrays[2])[:number], tokens, masked, confidence))
    return state.tokens
