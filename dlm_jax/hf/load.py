"""Import: a Hugging Face checkpoint becomes a Transformer, its tensors streamed straight into their shardings."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from dlm_jax.errors import ConfigError
from dlm_jax.hf import keys
from dlm_jax.hf.config import config_from_hf, read_config, recorded_mask_token_id, recorded_shift
from dlm_jax.hf.hub import locate
from dlm_jax.hf.stream import check_tensors, stream_parameters
from dlm_jax.hf.tensors import read_tensors
from dlm_jax.hf.tokenizer import choose_mask_token, load_tokenizer
from dlm_jax.models import Compute, ModelConfig, Transformer, abstract_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The released DiffuGPT-S and -M by the size of their vocabulary, should their tokenizer not be at hand to say.
_RELEASE_MASK_IDS = {50257: 10541, 50258: 50257}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model with what is needed to use it and to hand it back.

    Attributes:
      mask_token_id: None for an AR model that has not been given one.
      shift: whether logits at position n predict token n + 1.
      hf_config: the config.json it came from.
      source: the directory, workdir or hub id it came from.
      recipe: the settings of the run that made it, for the model card of an export; None where unknown.
    """

    model: Transformer
    tokenizer: "PreTrainedTokenizerBase | None"
    mask_token_id: int | None
    shift: bool
    hf_config: dict[str, Any]
    source: str
    recipe: dict[str, Any] | None = None

    @property
    def bos_token_id(self) -> int | None:
        """The token that generation starts from."""
        return self._special("bos_token_id")

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a document."""
        return self._special("eos_token_id")

    @property
    def pad_token_id(self) -> int | None:
        """The padding token; the end of a document where there is none."""
        pad = self._special("pad_token_id")
        return self.eos_token_id if pad is None else pad

    def _special(self, name: str) -> int | None:
        value = getattr(self.tokenizer, name, None)
        value = self.hf_config.get(name) if value is None else value
        return value[0] if isinstance(value, list) else value  # LLaMA 3 lists several ends


def load_pretrained(path_or_hub_id: str | Path, *, mask_token: str | int | None = None, compute: Compute = Compute(),
                    param_dtype: str = "float32", shardings: Callable[[ModelConfig], Any] | None = None,
                    init: str = "pretrained", seed: int = 0) -> Pretrained:
    """Loads a model and its tokenizer from a directory or the Hugging Face hub.

    Args:
      mask_token: the id or text of an existing token, or a new token, for which embedding and head get a row
        that is the mean of the others; None takes what the checkpoint records.
      param_dtype: type of the parameters, "float32" or "bfloat16", whatever the checkpoint's.
      shardings: gives, for the architecture found, a pytree of shardings like the parameters; None puts all
        of them on the first device.
      init: "pretrained", or "random" to take only architecture and tokenizer, with weights from `seed`.

    Raises:
      CheckpointError: the checkpoint is missing, damaged or unsupported, or does not hold what it should.
    """
    if init not in ("pretrained", "random"):
        raise ConfigError(f"init {init!r} is unknown; choose pretrained or random")
    directory = locate(path_or_hub_id, weights=init == "pretrained")
    hf_config = read_config(directory)
    config = config_from_hf(hf_config)
    tokenizer = load_tokenizer(directory)
    recorded = recorded_mask_token_id(hf_config)
    if init == "pretrained":
        stored = read_tensors(directory)
        tensors = {name: stored[found] for name, found in keys.canonical(stored, config.family).items()}
        config = _settle_embeddings(config, tensors)
        if any(name.startswith("denoise_model.") for name in stored):
            config, recorded = _settle_release(config, tensors, recorded, tokenizer)
        check_tensors(tensors, config, directory)

    mask_token_id, is_new = choose_mask_token(mask_token, recorded, config.vocab_size, tokenizer)
    if is_new:
        config = dataclasses.replace(config, vocab_size=max(config.vocab_size, mask_token_id + 1))
    graphdef, shapes = nnx.split(abstract_model(config, compute, param_dtype))
    count = len(jax.tree.leaves(shapes))
    places = jax.tree.leaves(shardings(config)) if shardings else [SingleDeviceSharding(jax.local_devices()[0])] * count
    if init == "pretrained":
        params = stream_parameters(tensors, config, shapes, places, mask_token_id if is_new else None)
    else:
        initialise = jax.jit(_initialise, static_argnums=(1, 2, 3), out_shardings=places)
        params = jax.tree.unflatten(jax.tree.structure(shapes), initialise(seed, config, compute, param_dtype))
    return Pretrained(nnx.merge(graphdef, params), tokenizer, mask_token_id, recorded_shift(hf_config), hf_config,
                      str(path_or_hub_id))


def _initialise(seed: jax.Array, config: ModelConfig, compute: Compute, param_dtype: str) -> list[jax.Array]:
    rngs, dtype = nnx.Rngs(jax.random.key(seed)), jnp.dtype(param_dtype)
    return jax.tree.leaves(nnx.state(Transformer(config, compute=compute, rngs=rngs, param_dtype=dtype)))


def _settle_embeddings(config: ModelConfig, tensors: dict[str, np.ndarray]) -> ModelConfig:
    """Decides whether the head is tied to the embedding, and leaves in `tensors` what is then needed.

    A tied checkpoint may store either tensor, or both; if it stores two that differ, it is not tied.
    """
    embedding, head = keys.embedding_name(config.family), keys.HEAD
    if not config.tie_embeddings or head not in tensors:
        return config
    if embedding not in tensors:
        tensors[embedding] = tensors[head]
    if not _equal(tensors[embedding], tensors[head]):
        return dataclasses.replace(config, tie_embeddings=False)
    del tensors[head]
    return config


def _settle_release(config: ModelConfig, tensors: dict[str, np.ndarray], recorded: int | None,
                    tokenizer: "PreTrainedTokenizerBase | None") -> tuple[ModelConfig, int | None]:
    """The DiffuGPT release resizes its vocabulary without saying so in config.json: the embedding knows."""
    embedding = tensors.get(keys.embedding_name(config.family))
    if embedding is not None:
        config = dataclasses.replace(config, vocab_size=len(embedding))
    if recorded is None and getattr(tokenizer, "mask_token_id", None) is None:
        recorded = _RELEASE_MASK_IDS.get(config.vocab_size)
    return config, recorded


def _equal(a: np.ndarray, b: np.ndarray, rows: int = 1024) -> bool:
    return a is b or (a.shape == b.shape and all(
        np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, len(a), rows)))
