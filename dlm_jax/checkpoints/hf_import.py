"""Parameters from a checkpoint's tensors: checked first, then read, converted and placed one at a time."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from tqdm import tqdm

from dlm_jax.checkpoints import hf_names
from dlm_jax.checkpoints.hf_config import (
    blocks_of,
    config_from_hf,
    read_config,
    recorded_blocks,
    recorded_mask_token_id,
    recorded_shift,
)
from dlm_jax.checkpoints.hf_tensors import read_tensors
from dlm_jax.checkpoints.hub import find_base, locate
from dlm_jax.checkpoints.peft import Adapter, is_adapter, merge_adapter, read_adapter
from dlm_jax.checkpoints.pretrained import Pretrained
from dlm_jax.checkpoints.tokenizer import choose_mask_token, load_tokenizer
from dlm_jax.diffusion.spec import DiffusionSpec
from dlm_jax.errors import CheckpointError, ConfigError
from dlm_jax.models import (
    Compute,
    LoRAConfig,
    ModelConfig,
    Transformer,
    abstract_model,
    add_dora_magnitudes,
    add_lora,
    base_shapes,
    fingerprint,
    freeze_base,
    init_lora_factors,
)
from dlm_jax.storage import read_metadata

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Bounds = tuple[tuple[int, int], ...]  # start and stop along each axis


def check_tensors(tensors: Mapping[str, np.ndarray], config: ModelConfig, directory: Path) -> None:
    """Refuses tensors that are missing, unknown, misshaped or not floating point.

    Raises:
      CheckpointError: names them.
    """
    expected = {name: hf_names.hf_shape(key, shape)
                for path, leaf in nnx.to_flat_state(nnx.state(abstract_model(config)))
                for key in [hf_names.KEYS[config.family][".".join(path)]]
                for name, shape in hf_names.layer_tensors(key, leaf.shape)}
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
        key = hf_names.KEYS[config.family][".".join(path)]
        stored = _Stored(tensors, key, leaf, new_row)
        yield path, leaf.replace(jax.make_array_from_callback(leaf.shape, place, stored.read))


class _Stored:
    """One parameter, still on disk: a view for each layer, or a single one."""

    def __init__(self, tensors: Mapping[str, np.ndarray], key: hf_names.Key, leaf: nnx.Param, new_row: int | None):
        self.shape, self.dtype = leaf.shape, leaf.dtype
        self.views = [hf_names.from_hf(tensors[name], key, shape) for name, shape in hf_names.layer_tensors(key, leaf.shape)]
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


# ---- Import: a Hugging Face checkpoint becomes a Transformer, its tensors streamed straight into their shardings.


# The released DiffuGPT-S and -M by the size of their vocabulary, should their tokenizer not be at hand to say.
_RELEASE_MASK_IDS = {50257: 10541, 50258: 50257}


LoraFactory = Callable[[ModelConfig, bool], LoRAConfig | None]


def load_pretrained(path_or_hub_id: str | Path, *, mask_token: str | int | None = None, compute: Compute = Compute(),
                    param_dtype: str = "float32", shardings: Callable[[ModelConfig], Any] | None = None,
                    init: str = "pretrained", seed: int = 0, lora: LoraFactory | None = None, base: str | None = None,
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
        tensors = {name: stored[found] for name, found in hf_names.canonical(stored, config.family).items()}
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
        params, merged_adapters = freeze_base(read, beside)
    else:
        initialise = jax.jit(_initialise, static_argnums=(1, 2, 3), out_shardings=places)
        params = jax.tree.unflatten(jax.tree.structure(shapes), initialise(seed, config, compute, param_dtype))
        merged_adapters = ()
    factors = nnx.State({}) if beside is None else init_lora_factors(config, beside, seed, param_dtype, whole(places[0]))
    diffusion = DiffusionSpec(mask_token_id, recorded_shift(hf_config), recorded_blocks(hf_config))
    return Pretrained(add_dora_magnitudes(nnx.merge(graphdef, params, factors)), tokenizer, diffusion, hf_config,
                      str(path_or_hub_id), read_metadata(directory).get("recipe"), merged_adapters=merged_adapters)


def whole(place: Sharding) -> Sharding:
    """A copy on every device of a parameter's mesh, or its device."""
    return NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else place


def _load_adapted(adapter: Adapter, mask_token: str | int | None, base: str | None,
                  open_base: Callable[..., Pretrained], settings: dict[str, Any], lora: LoraFactory | None,
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
    diffusion = dataclasses.replace(
        loaded.diffusion, shift=adapter.notes.get("shift", loaded.shift),
        blocks=blocks_of(adapter.notes) if "block_size" in adapter.notes else loaded.blocks)
    model = dataclasses.replace(model, tokenizer=tokenizer, diffusion=diffusion,
                                recipe=adapter.notes.get("recipe", loaded.recipe))
    if lora is None:
        return model
    has_row = any(name.endswith("embed_tokens.weight") or name.endswith("wte.weight") for name in adapter.tensors)
    beside = lora(model.model.config, any(new_rows) and not has_row)
    if beside is None:
        return model
    merged_adapters = loaded.merged_adapters or (fingerprint(nnx.state(loaded.model)),)
    place = whole(model.model.embed.embedding[...].sharding)
    return dataclasses.replace(model, merged_adapters=(*merged_adapters, adapter.digest()),
                               model=add_lora(model.model, beside, seed, dtype, place))


def _initialise(seed: jax.Array, config: ModelConfig, compute: Compute, param_dtype: str) -> list[jax.Array]:
    rngs, dtype = nnx.Rngs(jax.random.key(seed)), jnp.dtype(param_dtype)
    return jax.tree.leaves(nnx.state(Transformer(config, compute=compute, rngs=rngs, param_dtype=dtype)))


def _settle_embeddings(config: ModelConfig, tensors: dict[str, np.ndarray]) -> ModelConfig:
    """Decides whether the head is tied to the embedding, and leaves in `tensors` what is then needed.

    A tied checkpoint may store either tensor, or both; if it stores two that differ, it is not tied.
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


def _settle_release(config: ModelConfig, tensors: dict[str, np.ndarray], recorded: int | None,
                    tokenizer: "PreTrainedTokenizerBase | None") -> tuple[ModelConfig, int | None]:
    """The DiffuGPT release resizes its vocabulary without saying so in config.json: the embedding knows."""
    embedding = tensors.get(hf_names.embedding_name(config.family))
    if embedding is not None:
        config = dataclasses.replace(config, vocab_size=len(embedding))
    if recorded is None and getattr(tokenizer, "mask_token_id", None) is None:
        recorded = _RELEASE_MASK_IDS.get(config.vocab_size)
    return config, recorded


def _equal(a: np.ndarray, b: np.ndarray, rows: int = 1024) -> bool:
    return a is b or (a.shape == b.shape and all(
        np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, len(a), rows)))
