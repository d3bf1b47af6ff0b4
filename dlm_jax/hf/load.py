"""Import: a Hugging Face checkpoint becomes a Transformer, its tensors streamed straight into their shardings."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from dlm_jax.attention import Blocks
from dlm_jax.errors import CheckpointError, ConfigError
from dlm_jax.hf import keys
from dlm_jax.hf.adapter import Adapter, is_adapter, merge_adapter, read_adapter
from dlm_jax.hf.config import (
    blocks_of,
    config_from_hf,
    read_config,
    recorded_blocks,
    recorded_mask_token_id,
    recorded_shift,
)
from dlm_jax.hf.folder import read_notes
from dlm_jax.hf.hub import find_base, locate
from dlm_jax.hf.stream import check_tensors, stream_parameters
from dlm_jax.hf.tensors import read_tensors
from dlm_jax.hf.tokenizer import choose_mask_token, load_tokenizer
from dlm_jax.models import (
    Compute,
    LoraConfig,
    ModelConfig,
    Transformer,
    add_lora,
    base_shapes,
    fingerprint,
    freeze,
    new_factors,
    with_magnitudes,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The released DiffuGPT-S and -M by the size of their vocabulary, should their tokenizer not be at hand to say.
_RELEASE_MASK_IDS = {50257: 10541, 50258: 50257}


LoraOf = Callable[[ModelConfig, bool], LoraConfig | None]


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model with what is needed to use it and to hand it back.

    Attributes:
      mask_token_id: None for an AR model that has not been given one.
      shift: whether logits at position n predict token n + 1.
      hf_config: the config.json it came from.
      source: the directory, workdir or hub id it came from.
      recipe: the settings of the run that made it, by dotted keys; None where unknown.
      base: where the base is of a model with LoRA beside it; None for a model as it is.
      merged: fingerprints of a base and of the adapters that were merged into it, in order, for who puts LoRA beside
        them, or of a base before it was quantised; none for a model that was read as it is.
      blocks: of a model that writes one block of tokens after another; None: it sees whole rows.
    """

    model: Transformer
    tokenizer: "PreTrainedTokenizerBase | None"
    mask_token_id: int | None
    shift: bool
    hf_config: dict[str, Any]
    source: str
    recipe: dict[str, Any] | None = None
    base: str | None = None
    merged: tuple[str, ...] = ()
    blocks: Blocks | None = None

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

    @property
    def learnt_left_to_right(self) -> bool:
        """Whether the run that made it, where it is on record, was autoregressive."""
        return (self.recipe or {}).get("objective.name") == "autoregressive"

    def _special(self, name: str) -> int | None:
        value = getattr(self.tokenizer, name, None)
        value = self.hf_config.get(name) if value is None else value
        return value[0] if isinstance(value, list) else value  # LLaMA 3 lists several ends


def load_pretrained(path_or_hub_id: str | Path, *, mask_token: str | int | None = None, compute: Compute = Compute(),
                    param_dtype: str = "float32", shardings: Callable[[ModelConfig], Any] | None = None,
                    init: str = "pretrained", seed: int = 0, lora: LoraOf | None = None, base: str | None = None,
                    open_base: Callable[..., Pretrained] | None = None) -> Pretrained:
    """Loads a model and its tokenizer from a directory or the Hugging Face hub.

    An adapter in PEFT's format is loaded as the model that it makes of its base.

    Args:
      mask_token: the id or text of an existing token, or a new token, for which embedding and head get a row
        that is the mean of the others; None takes what the checkpoint records.
      param_dtype: type of the parameters, "float32" or "bfloat16", whatever the checkpoint's.
      shardings: gives, for the architecture found, a pytree of shardings like the parameters; None puts all
        of them on the first device.
      init: "pretrained", or "random" to take only architecture and tokenizer, with weights from `seed`.
      lora: gives, for the architecture found and whether the mask token is new to it, the LoRA to put beside the
        model, with new factors from `seed`; its weights are then stored as that says.
      base: of an adapter, in place of the one that it names.
      open_base: loads the base of an adapter, called as this function; None: this function.

    Raises:
      CheckpointError: the checkpoint is missing, damaged or unsupported, or does not hold what it should.
    """
    if init not in ("pretrained", "random"):
        raise ConfigError(f"init {init!r} is unknown; choose pretrained or random")
    directory = locate(path_or_hub_id, weights=init == "pretrained")
    if is_adapter(directory):
        if init == "random":
            raise ConfigError(f"{path_or_hub_id} is an adapter, which has no shape of its own; name its base instead")
        settings = {"compute": compute, "param_dtype": param_dtype, "shardings": shardings}
        loaded = _load_adapted(read_adapter(directory), mask_token, base, open_base or load_pretrained, settings, lora,
                               seed)
        return dataclasses.replace(loaded, source=str(path_or_hub_id))
    if base is not None:
        raise ConfigError(f"{path_or_hub_id} is no adapter, so it has no base; leave the base out")
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
    beside = None if lora is None else lora(config, is_new)
    if beside is not None and init == "random":
        raise ConfigError("LoRA stands beside pretrained weights, and model.init is random; set lora.rank to 0, or "
                          "model.init to pretrained")
    graphdef, shapes = base_shapes(config, compute, param_dtype, beside)
    count = len(jax.tree.leaves(shapes))
    places = jax.tree.leaves(shardings(config)) if shardings else [SingleDeviceSharding(jax.local_devices()[0])] * count
    if init == "pretrained":
        read = stream_parameters(tensors, config, shapes, places, mask_token_id if is_new else None)
        params, merged = freeze(read, beside)
    else:
        initialise = jax.jit(_initialise, static_argnums=(1, 2, 3), out_shardings=places)
        params = jax.tree.unflatten(jax.tree.structure(shapes), initialise(seed, config, compute, param_dtype))
        merged = ()
    factors = nnx.State({}) if beside is None else new_factors(config, beside, seed, param_dtype, whole(places[0]))
    return Pretrained(with_magnitudes(nnx.merge(graphdef, params, factors)), tokenizer, mask_token_id,
                      recorded_shift(hf_config), hf_config, str(path_or_hub_id), read_notes(directory).get("recipe"),
                      merged=merged, blocks=recorded_blocks(hf_config))


def whole(place: Sharding) -> Sharding:
    """A copy on every device of a parameter's mesh, or its device."""
    return NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else place


def _load_adapted(adapter: Adapter, mask_token: str | int | None, base: str | None,
                  open_base: Callable[..., Pretrained], settings: dict[str, Any], lora: LoraOf | None,
                  seed: int) -> Pretrained:
    """The model that an adapter makes of its base."""
    named = base or adapter.base
    new_rows: list[bool] = []
    if mask_token is None:  # by name if it is not one of the base's tokens, whose vocabulary grows by it
        mask_token = adapter.notes.get("mask_token") or adapter.notes.get("mask_token_id")
    try:
        loaded = open_base(find_base(named, adapter.directory), mask_token=mask_token, **settings,
                           lora=lambda _, is_new: new_rows.append(is_new))
    except CheckpointError as error:
        raise CheckpointError(f"the base {named!r} of the adapter {adapter.directory} cannot be loaded: {error}; put "
                              "it there or beside the adapter, or say where it is (--base, or base=)") from error
    dtype = settings["param_dtype"]
    model = merge_adapter(adapter, loaded, dtype)
    tokenizer = load_tokenizer(adapter.directory) or loaded.tokenizer
    model = dataclasses.replace(model, tokenizer=tokenizer, shift=adapter.notes.get("shift", loaded.shift),
                                blocks=blocks_of(adapter.notes) if "block_size" in adapter.notes else loaded.blocks,
                                recipe=adapter.notes.get("recipe", loaded.recipe))
    if lora is None:
        return model
    has_row = any(name.endswith("embed_tokens.weight") or name.endswith("wte.weight") for name in adapter.tensors)
    beside = lora(model.model.config, any(new_rows) and not has_row)
    if beside is None:
        return model
    merged = loaded.merged or (fingerprint(nnx.state(loaded.model)),)
    place = whole(model.model.embed.embedding[...].sharding)
    return dataclasses.replace(model, merged=(*merged, adapter.digest()),
                               model=add_lora(model.model, beside, seed, dtype, place))


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
