"""A model in files of another program: a Hugging Face directory or a GGUF file, opened by the same four names.

Nothing is read before it is used.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dlm_jax.checkpoints.gguf_file import is_gguf
from dlm_jax.checkpoints.hf_config import read_config
from dlm_jax.checkpoints.hf_tensors import read_tensors
from dlm_jax.checkpoints.tokenizer import load_tokenizer
from dlm_jax.storage import read_metadata

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Tensor(Protocol):
    """A tensor on disk, which `np.asarray` reads."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __array__(self) -> np.ndarray: ...

    def __len__(self) -> int: ...


class StoredModel(Protocol):
    """What is read of a model; each part raises CheckpointError where it is missing, damaged or not supported."""

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json, or the same of what says it otherwise."""

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """Its tokenizer; None without one."""

    @property
    def recipe(self) -> dict[str, Any] | None:
        """The settings of the run that trained it, by dotted keys; None where unknown."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Returns its tensors by their HF names or what `hf_names.canonical` knows instead."""


class HFDirectory:
    """A checkpoint of transformers, or an export of this library."""

    def __init__(self, directory: Path):
        self._directory = directory

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        return read_config(self._directory)

    @functools.cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        return load_tokenizer(self._directory)

    @functools.cached_property
    def recipe(self) -> dict[str, Any] | None:
        return read_metadata(self._directory).get("recipe")

    def tensors(self) -> dict[str, np.ndarray]:
        return read_tensors(self._directory)


def open_stored(path: Path) -> StoredModel:
    """Returns the model in a directory or a GGUF file.

    Raises:
      CheckpointError: the file is damaged.
    """
    if is_gguf(path):
        from dlm_jax.checkpoints.gguf import GGUFModel

        return GGUFModel(path)
    return HFDirectory(path)
