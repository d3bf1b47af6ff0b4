"""A model in files of another program: a Hugging Face directory or a GGUF file, opened by the same four names.

Nothing is read before it is used.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dlm_jax.checkpoints.gguf import GGUFModel
from dlm_jax.checkpoints.gguf_file import GGUFTensor, is_gguf
from dlm_jax.checkpoints.hf_config import read_config
from dlm_jax.checkpoints.hf_tensors import read_tensors
from dlm_jax.checkpoints.tokenizer import load_tokenizer
from dlm_jax.storage import read_metadata

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tensor = np.ndarray | GGUFTensor  # on disk; `np.asarray` reads it


class HFDirectory:
    """A checkpoint of transformers, or an export of this library.

    Each of its parts raises CheckpointError where it is missing, damaged or not supported.
    """

    def __init__(self, directory: Path):
        self._directory = directory

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Its config.json; for a GGUF file, the same of its metadata."""
        return read_config(self._directory)

    @functools.cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """Its tokenizer; None without one."""
        return load_tokenizer(self._directory)

    @functools.cached_property
    def recipe(self) -> dict[str, Any] | None:
        """The settings of the run that trained it, by dotted keys; None where unknown."""
        return read_metadata(self._directory).get("recipe")

    def tensors(self) -> dict[str, Tensor]:
        """Returns its tensors by their HF names or what `hf_names.canonical` knows instead."""
        return read_tensors(self._directory)


def open_stored(path: Path) -> HFDirectory | GGUFModel:
    """Returns the model in a directory or a GGUF file.

    Raises:
      CheckpointError: the file is damaged.
    """
    return GGUFModel(path) if is_gguf(path) else HFDirectory(path)
