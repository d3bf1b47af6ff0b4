"""Parameters from a checkpoint's tensors: checked first, then read, converted and placed one at a time."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from tqdm import tqdm

from dlm_jax.errors import CheckpointError
from dlm_jax.hf import keys
from dlm_jax.models import ModelConfig, abstract_model

Bounds = tuple[tuple[int, int], ...]  # start and stop along each axis


def check_tensors(tensors: Mapping[str, np.ndarray], config: ModelConfig, directory: Path) -> None:
    """Refuses tensors that are missing, unknown, misshaped or not floating point.

    Raises:
      CheckpointError: names them.
    """
    expected = {name: keys.hf_shape(key, shape)
                for path, leaf in nnx.to_flat_state(nnx.state(abstract_model(config)))
                for key in [keys.KEYS[config.family][".".join(path)]]
                for name, shape in keys.slices(key, leaf.shape)}
    common = expected.keys() & tensors.keys()
    problems = {
        "lacks": expected.keys() - tensors.keys(),
        "has unknown tensors": tensors.keys() - expected.keys(),
        "has other shapes": {f"{name} {tensors[name].shape} instead of {expected[name]}" for name in common
                             if tensors[name].shape != expected[name]},
        "has types other than floating point": {f"{name} {tensors[name].dtype}" for name in common
                                                if not jnp.issubdtype(tensors[name].dtype, jnp.floating)},
    }
    said = [f"{problem}: {_some(names)}" for problem, names in problems.items() if names]
    if said:
        raise CheckpointError(f"{directory} does not hold the {config.family} model that its config.json describes; "
                              f"it {'; it '.join(said)}")


def stream_parameters(tensors: Mapping[str, np.ndarray], config: ModelConfig, shapes: nnx.State,
                      places: list[Sharding], new_row: int | None) -> Iterator[tuple[tuple, nnx.Param]]:
    """The parameters as sharded arrays with their paths, in the types of `shapes`; at most one is in flight at a time.

    Args:
      tensors: the checkpoint's, by HF name, which `check_tensors` has passed.
      places: a sharding for each parameter.
      new_row: index of a token that the checkpoint does not have; its row becomes the mean of all rows.
    """
    flat = nnx.to_flat_state(shapes)
    progress = tqdm(zip(flat, places, strict=True), "importing", len(flat), leave=False, disable=None, delay=3)
    for (path, leaf), place in progress:
        key = keys.KEYS[config.family][".".join(path)]
        stored = _Stored(tensors, key, leaf, new_row)
        yield path, leaf.replace(jax.make_array_from_callback(leaf.shape, place, stored.read))


class _Stored:
    """One parameter, still on disk: a view for each layer, or a single one."""

    def __init__(self, tensors: Mapping[str, np.ndarray], key: keys.Key, leaf: nnx.Param, new_row: int | None):
        self.shape, self.dtype = leaf.shape, leaf.dtype
        self.views = [keys.from_hf(tensors[name], key, shape) for name, shape in keys.slices(key, leaf.shape)]
        self.stacked = leaf.axes[0] == "layers"
        self.grows = new_row is not None and "vocab" in leaf.axes
        if self.grows:
            self.new_row, self.vocab_axis = new_row, leaf.axes.index("vocab")
            self.mean = self.views[0].mean(axis=self.vocab_axis, dtype=np.float64)
        self.parts: dict[Bounds, np.ndarray] = {}

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The part of the parameter at `index`; devices that hold the same part share one reading of it."""
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True))
        if bounds not in self.parts:
            self.parts[bounds] = part = aligned_empty([stop - start for start, stop in bounds], self.dtype)
            window = tuple(slice(*pair) for pair in bounds)
            if self.stacked:
                for target, view in zip(part, self.views[window[0]], strict=True):
                    _copy(target, view[window[1:]])
            elif self.grows:
                self._read_grown(part, window)
            else:
                _copy(part, self.views[0][window])
        return self.parts[bounds]

    def _read_grown(self, part: np.ndarray, window: tuple[slice, ...]) -> None:
        known = np.moveaxis(self.views[0][window], self.vocab_axis, 0)  # numpy cuts a slice at the last row
        rows = np.moveaxis(part, self.vocab_axis, 0)
        _copy(rows[: len(known)], known)
        first = window[self.vocab_axis].start
        if first <= self.new_row < first + len(rows):
            rows[self.new_row - first] = self.mean[window[1 - self.vocab_axis]]


def aligned_empty(shape: Sequence[int], dtype: np.typing.DTypeLike, alignment: int = 64) -> np.ndarray:
    """An array at an address that XLA on CPU adopts as it is, so that placing it there makes no second copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    return buffer[start : start + size].view(dtype).reshape(shape)


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copies and converts; a transposed source in strips, which is several times faster than in one go."""
    strip = target.shape[-1] if source.strides[-1] == source.itemsize else 16
    for i in range(0, target.shape[-1], strip):
        target[..., i : i + strip] = source[..., i : i + strip]


def _some(names: set[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + rest
