"""Samples any number of rows, of any lengths, in batches of one size."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from dlm_jax.parallel import num_batch_shards, shard_batch, to_host, use_mesh
from dlm_jax.sampling.sampler import Sample, sample, stream
from dlm_jax.sampling.spec import Network, SamplingSpec, find_gaps
from dlm_jax.sampling.text import GAP, bucket, pad_rows
from dlm_jax.sampling.trace import Snapshot


@dataclasses.dataclass
class SamplingStats:
    """Counts what `sample_rows` did; give one object to several calls to add them up.

    Attributes:
      texts: rows.
      tokens: sampled tokens, up to each text's end.
      passes: forward passes that the rows needed; several rows share a pass of their batch.
      accepted: how many of the passes accepted the first draft, the second, and so on; empty without a drafter.
      seconds: time of sampling, compilation included.
    """

    texts: int = 0
    tokens: int = 0
    passes: int = 0
    accepted: tuple[int, ...] = ()
    seconds: float = 0.0

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / max(self.passes, 1)

    @property
    def acceptance(self) -> list[float]:
        """The share of passes that accepted each draft, all those before it included."""
        return [number / max(self.passes, 1) for number in self.accepted]

    def add(self, result: Sample, number: int, seconds: float) -> None:
        """Adds the first `number` rows of a batch."""
        self.texts, self.seconds = self.texts + number, self.seconds + seconds
        self.tokens += int(to_host(result.num_sampled)[:number].sum())
        self.passes += int(to_host(result.steps)[:number].sum())
        if result.accepted is not None:
            accepted = to_host(result.accepted)[:number].sum(axis=0).tolist()
            self.accepted = tuple(map(sum, zip(self.accepted or [0] * len(accepted), accepted, strict=True)))

    def summary(self) -> dict[str, float | list[float]]:
        """Returns counts and shares, for a table or a JSON file."""
        drafts = {"acceptance_by_position": self.acceptance} if self.accepted else {}
        return {"texts": self.texts, "tokens": self.tokens, "forward_passes": self.passes,
                "tokens_per_pass": self.tokens_per_pass, "seconds": self.seconds, **drafts}

    def __str__(self) -> str:
        line = (f"{self.tokens:,} tokens in {self.seconds:.1f} s, {self.passes:,} forward passes, "
                f"{self.tokens_per_pass:.2f} tokens per pass")
        return line if not self.accepted else f"{line}; drafts accepted by position " + ", ".join(
            f"{100 * share:.0f}%" for share in self.acceptance)


def sample_rows(model: Network, rows: Sequence[Sequence[int]], keys: jax.Array, spec: SamplingSpec, *, batch_size: int,
                mesh: Mesh | None = None, on_step: Callable[[Snapshot], None] | None = None, coarse: bool = False,
                progress: bool = False, stats: SamplingStats | None = None) -> list[np.ndarray]:
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
      stats: counts what is done.

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
    shards = num_batch_shards(mesh)
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
        began = time.perf_counter()
        with use_mesh(mesh):
            if on_step is None:
                result = sample(model, *arrays, spec)
            else:
                result = _sample_with_callback(model, arrays, spec, chosen, on_step)
        for i, row in zip(chosen, to_host(result.tokens), strict=True):
            filled[i] = row[: len(rows[i])]
        if stats is not None:
            stats.add(result, len(np.unique(chosen)), time.perf_counter() - began)
    return filled


@jax.jit
def _key_data(keys: jax.Array, rows: np.ndarray) -> jax.Array:
    return jax.random.key_data(keys[rows])


def _sample_with_callback(model: Network, arrays: list[jax.Array], spec: SamplingSpec, rows: np.ndarray,
                          on_step: Callable[[Snapshot], None]) -> Sample:
    """Returns what `sample` does; `on_step` sees every step."""
    number = len(np.unique(rows))  # without repeated rows
    for step, state in enumerate(stream(model, *arrays, spec)):
        tokens, masked, confidence = (np.asarray(x)[:number] for x in (state.tokens, state.masked, state.confidence))
        on_step(Snapshot(step, rows[:number], np.asarray(arrays[2])[:number], tokens, masked, confidence))
    return Sample.of(state, find_gaps(*arrays[1:3]))
