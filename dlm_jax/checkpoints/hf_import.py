"""Streams the tensors of a Hugging Face checkpoint into sharded parameters.

All tensors are checked first; then one parameter at a time is read, converted and placed.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from tqdm import tqdm

from dlm_jax.checkpoints import hf_names
from dlm_jax.errors import CheckpointError
from dlm_jax.models import ModelConfig, abstract_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dlm_jax.checkpoints.stored import Tensor

# Mask tokens of DiffuGPT-S and -M by vocabulary size, for a checkpoint without its tokenizer.
_DIFFUGPT_MASK_IDS = {50257: 10541, 50258: 50257}

# The exponent's bits by type: all of them are set in NaN and infinity. NumPy's own test of bfloat16 is slow.
_EXPONENTS = {"float32": (np.uint32, 0x7F80_0000), "bfloat16": (np.uint16, 0x7F80)}

Bounds = tuple[tuple[int, int], ...]  # start and stop along each axis


def open_tensors(stored: Mapping[str, "Tensor"], config: ModelConfig, mask_token_id: int | None,
                 tokenizer: "PreTrainedTokenizerBase | None", path: Path
                 ) -> tuple[dict[str, "Tensor"], ModelConfig, int | None]:
    """Checks a checkpoint's tensors.

    Args:
      stored: the tensors by the names that they have there.
      config, mask_token_id: as config.json records them.
      path: of the checkpoint, for messages.

    Returns:
      The tensors by HF name, on disk until they are used, and `config` and `mask_token_id` as the tensors show them:
      whether the head is tied, and for the DiffuGPT layout the vocabulary size and mask token.

    Raises:
      CheckpointError: tensors are missing, damaged, unknown, or not what `config` describes.
    """
    tensors = {name: stored[found] for name, found in hf_names.canonical(stored, config.family).items()}
    config = _untie_different(config, tensors)
    if any(name.startswith("denoise_model.") for name in stored):  # DiffuGPT resizes its vocabulary, unrecorded
        embedding = tensors.get(hf_names.embedding_name(config.family))
        if embedding is not None:
            config = dataclasses.replace(config, vocab_size=len(embedding))
        if mask_token_id is None and getattr(tokenizer, "mask_token_id", None) is None:
            mask_token_id = _DIFFUGPT_MASK_IDS.get(config.vocab_size)
    expected = hf_names.stored_shapes(hf_names.KEYS[config.family], nnx.state(abstract_model(config)))
    check_tensors(tensors, expected, path, f"{config.family} model")
    return tensors, config, mask_token_id


def check_tensors(tensors: Mapping[str, "Tensor"], expected: Mapping[str, tuple[int, ...]], path: Path,
                  what: str) -> None:
    """Raises CheckpointError that names tensors that are missing, unknown, misshaped or not floating point.

    Args:
      expected: shapes by name.
      path, what: the checkpoint and what it should hold, for messages.
    """
    common = expected.keys() & tensors.keys()
    problems = {
        "lacks": expected.keys() - tensors.keys(),
        "has unknown tensors": tensors.keys() - expected.keys(),
        "has other shapes": {f"{name} {tensors[name].shape} instead of {expected[name]}" for name in common
                             if tensors[name].shape != expected[name]},
        "has types other than floating point": {f"{name} {tensors[name].dtype}" for name in common
                                                if not jnp.issubdtype(tensors[name].dtype, jnp.floating)},
    }
    found = [f"{problem}: {_first_names(names)}" for problem, names in problems.items() if names]
    if found:
        described_by = "config.json" if path.is_dir() else "metadata"
        raise CheckpointError(f"{path} does not hold the {what} that its {described_by} describes; "
                              f"it {'; it '.join(found)}")


def stream_parameters(tensors: Mapping[str, "Tensor"], keys: Mapping[str, hf_names.Key], shapes: nnx.State,
                      shardings: list[Sharding], new_row: int | None = None) -> Iterator[tuple[tuple, nnx.Param]]:
    """Yields the parameters' paths and sharded arrays, in the dtypes of `shapes`, one parameter in memory at a time.

    Args:
      tensors: by HF name, as `open_tensors` returns them.
      keys: of all parameters, as `hf_names.KEYS[family]`.
      shardings: one per parameter.
      new_row: index of a token that the checkpoint does not have; its row becomes the mean of all others.
    """
    flat = nnx.to_flat_state(shapes)
    progress = tqdm(zip(flat, shardings, strict=True), "importing", len(flat), leave=False, disable=None, delay=3)
    for (path, leaf), sharding in progress:
        shards = _read_shards(tensors, hf_names.key_of(keys, path), leaf, new_row, sharding)
        yield path, leaf.replace(jax.make_array_from_callback(
            leaf.shape, sharding, lambda index, leaf=leaf, shards=shards: shards[_bounds(index, leaf.shape)]))


def _read_shards(tensors: Mapping[str, "Tensor"], key: hf_names.Key, leaf: nnx.Param, new_row: int | None,
                 sharding: Sharding) -> dict[Bounds, np.ndarray]:
    """Returns the shards of one parameter that this process needs; devices with the same shard share one copy.

    Each stored tensor is read once, and only one is in memory beside the shards.
    """
    indices = sharding.addressable_devices_indices_map(leaf.shape).values()
    shards = {bounds: aligned_empty([stop - start for start, stop in bounds], leaf.dtype)
              for bounds in {_bounds(index, leaf.shape) for index in indices}}
    windows = [(tuple(slice(*pair) for pair in bounds), shard) for bounds, shard in shards.items()]
    for name, shape, index in hf_names.layer_tensors(key, leaf.shape):
        view = hf_names.from_hf(np.asarray(tensors[name]), key, shape)
        mean = None
        if new_row is not None and "vocab" in leaf.axes:
            vocab_axis = leaf.axes.index("vocab")
            mean = view.mean(axis=vocab_axis, dtype=np.float64)
        for window, shard in windows:
            if mean is not None:
                _copy_grown(shard, view, window, mean, new_row, vocab_axis, name)
            elif all(axis.start <= i < axis.stop for axis, i in zip(window, index, strict=False)):
                at = tuple(i - axis.start for axis, i in zip(window, index, strict=False))
                _copy(shard[at], view[window[len(index) :]], name)
    return shards


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))


def _copy_grown(shard: np.ndarray, view: np.ndarray, window: tuple[slice, ...], mean: np.ndarray, new_row: int,
                vocab_axis: int, name: str) -> None:
    """Copies a table to which the row `new_row` is added, the mean of all others."""
    known = np.moveaxis(view[window], vocab_axis, 0)  # without the new row: numpy clips slices
    rows = np.moveaxis(shard, vocab_axis, 0)
    _copy(rows[: len(known)], known, name)
    first = window[vocab_axis].start
    if first <= new_row < first + len(rows):
        rows[new_row - first] = mean[window[1 - vocab_axis]]


def aligned_empty(shape: Sequence[int], dtype: np.typing.DTypeLike) -> np.ndarray:
    """Allocates an aligned array, which XLA on CPU adopts without a copy."""
    alignment = 64
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    return buffer[start : start + size].view(dtype).reshape(shape)


def _copy(target: np.ndarray, source: np.ndarray, name: str) -> None:
    """Copies and converts; a transposed source in strips, which is several times faster.

    Raises:
      CheckpointError: the copy, a part of the tensor `name`, has a number that is not finite.
    """
    strip = target.shape[-1] if source.strides[-1] == source.itemsize else 16
    for i in range(0, target.shape[-1], strip):
        target[..., i : i + strip] = source[..., i : i + strip]
    if not all(_is_finite(target[i : i + 64]) for i in range(0, len(target), 64)):
        raise CheckpointError(f"the tensor {name} has numbers that are not finite (NaN or infinity); use another copy "
                              "of the checkpoint, or an earlier one")


def _is_finite(values: np.ndarray) -> bool:
    bits, exponent = _EXPONENTS[values.dtype.name]
    return not ((values.view(bits) & bits(exponent)) == exponent).any()


def _untie_different(config: ModelConfig, tensors: dict[str, "Tensor"]) -> ModelConfig:
    """Returns `config` with the head untied if its tensor differs from the embedding; removes a tied head's tensor.

    A tied checkpoint may store either tensor, or both.
    """
    embedding, head = hf_names.embedding_name(config.family), hf_names.HEAD
    if not config.tie_embeddings or head not in tensors:
        return config
    if embedding not in tensors:
        tensors[embedding] = tensors[head]
    if not _equal(tensors[embedding], tensors[head]):
        return dataclasses.replace(config, tie_embeddings=False)
    del tensors[head]
    return config


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    rows = 1024  # at a time: they are read from disk
    return a is b or (a.shape == b.shape and all(
        np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, len(a), rows)))


def _first_names(names: set[str]) -> str:
    most = 5
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + rest
