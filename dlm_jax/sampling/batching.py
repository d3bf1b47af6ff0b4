"""Samples any number of rows, of any lengths, in batches of one size."""

import contextlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from dlm_jax.parallel import num_batch_shards, shard_batch, to_host
from dlm_jax.sampling.sampler import sample, stream
from dlm_jax.sampling.spec import Network, SamplingSpec
from dlm_jax.sampling.text import GAP, bucket, pad_rows
from dlm_jax.sampling.trace import Snapshot


def sample_rows(model: Network, rows: Sequence[Sequence[int]], keys: jax.Array, spec: SamplingSpec, *, batch_size: int,
                mesh: Mesh | None = None, on_step: Callable[[Snapshot], None] | None = None, coarse: bool = False,
                progress: bool = False) -> list[np.ndarray]:
    """Fills the gaps of rows of token ids and `GAP`s, similar rows together.

    A row's tokens depend on its own ids and key, never on other rows or the batch size. With several processes all
    call this, and all get every row.

    Args:
      keys: random keys [rows].
      batch_size: rows per batch; with a mesh it is rounded up to what the mesh can split. The last batch repeats rows
        to have the shape of the others, so that it needs no program of its own.
      mesh: the devices that hold the model.
      on_step: called before the first step of each batch and after every step; it does not change the rows.
      coarse: as in `text.bucket`.
      progress: whether to show a bar when there are several batches.

    Returns:
      The tokens of each row, int32 [its length].

    Raises:
      DataError: a row is too long for the model, or starts with a gap.
      ConfigError: the policy cannot fill these gaps, see `sampler.sample`.
    """
    if not rows:
        return []
    padded = pad_rows(rows, model.config.max_length, coarse)
    # Rows of a batch have the same width, which is the program's shape, and similar numbers of gaps, hence of steps.
    order = sorted(range(len(rows)), key=lambda i: (bucket(len(rows[i]), model.config.max_length, coarse=coarse),
                                                    sum(token == GAP for token in rows[i])))
    shards = 1 if mesh is None else num_batch_shards(mesh)
    size = -(-batch_size // shards) * shards
    filled: list[np.ndarray] = [np.zeros(0, np.int32)] * len(rows)
    disable = None if progress and len(rows) > size else True  # None: shown on a terminal only
    for start in tqdm(range(0, len(rows), size), desc="sampling", leave=False, disable=disable):
        chosen = np.resize(order[start : start + size], size)
        batch = padded.take(chosen)
        arrays = [batch.tokens, batch.fixed, batch.lengths, _key_data(keys, chosen)]
        if mesh is not None:
            arrays = [shard_batch(np.asarray(x), mesh) for x in arrays]
        arrays[-1] = jax.random.wrap_key_data(arrays[-1])
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            if on_step is None:
                tokens = sample(model, *arrays, spec).tokens
            else:
                tokens = _sample_with_callback(model, arrays, spec, chosen, on_step)
        for i, row in zip(chosen, to_host(tokens), strict=True):
            filled[i] = row[: len(rows[i])]
    return filled


@jax.jit
def _key_data(keys: jax.Array, rows: np.ndarray) -> jax.Array:
    return jax.random.key_data(keys[rows])


def _sample_with_callback(model: Network, arrays: list[jax.Array], spec: SamplingSpec, rows: np.ndarray,
                          on_step: Callable[[Snapshot], None]) -> jax.Array:
    """Returns the same tokens as `sample`; `on_step` sees every step."""
    number = len(np.unique(rows))  # without repeated rows
    for step, state in enumerate(stream(model, *arrays, spec)):
        tokens, masked, confidence = (np.asarray(x)[:number] for x in (state.tokens, state.masked, state.confidence))
        on_step(Snapshot(step, rows[:number], np.asarray(arrays[2])[:number], tokens, masked, confidence))
    return state.tokens
