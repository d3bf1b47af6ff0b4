"""Reads adapters in PEFT's format, and merges them into their bases; `peft_export` writes them.

A setting that changes the result and is not implemented here is refused by name. PEFT stores factors as [rank, inputs]
and [outputs, rank] whatever the layout of the kernel, so `fan_in_fan_out` has no effect.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from dlm_jax.checkpoints import hf_names
from dlm_jax.checkpoints.hf_tensors import read_tensors
from dlm_jax.checkpoints.settings import check_implemented, require
from dlm_jax.errors import CheckpointError
from dlm_jax.models import Transformer, abstract_model, kernel_norms, merge_kernel
from dlm_jax.parallel import to_host
from dlm_jax.storage import read_json, read_metadata

CONFIG, TENSORS = "adapter_config.json", "adapter_model"
PREFIX, MAGNITUDE = "base_model.model.", "magnitude_vector"
_EMBEDDING_SIDES = ("embedding_A", "embedding_B")

# Features of PEFT beyond LoRA itself, with the values that have no effect. Initializations that change the base (PiSSA
# and similar) are among them: their adapters belong to another base than the one that is named.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "lora_bias": (False,), "use_qalora": (False,), "use_bdlora": (None, False),
    "layer_replication": (None,), "trainable_token_indices": (None,), "target_parameters": (None, []),
    "alora_invocation_tokens": (None,), "arrow_config": (None,), "kasa_config": (None,), "monteclora_config": (None,),
    "velora_config": (None,), "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}  # fmt: skip

_MERGE = "; merge the adapter with PEFT, and load the merged model"


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """The contents of an adapter's directory.

    Attributes:
      config: its adapter_config.json.
      tensors: by stored name, without the prefix that all share.
      metadata: what an export of this library records beside them of the mask token, shift and blocks; else empty.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    metadata: dict[str, Any]

    @property
    def base(self) -> str:
        """The source of the base, as the adapter names it."""
        return self.config.get("base_model_name_or_path") or ""

    @property
    def sides(self) -> tuple[str, ...]:
        """The suffixes of each module's tensors, after `lora_`."""
        return ("A", "B", MAGNITUDE) if self.config.get("use_dora") else ("A", "B")

    @property
    def has_embedding(self) -> bool:
        """Whether the adapter holds a full embedding."""
        return any(name.endswith(("embed_tokens.weight", "wte.weight")) for name in self.tensors)

    def digest(self) -> str:
        """Returns a hash of the settings and of the bytes of all tensors."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self.tensors):
            digest.update(name.encode() + np.ascontiguousarray(self.tensors[name]).view(np.uint8).data)
        return digest.hexdigest()[:16]

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """Returns the rank of a module's factors, and the scale of their product."""
        rank = _match_pattern(self.config.get("rank_pattern"), module, self.config.get("r", 8))
        alpha = _match_pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", 8))
        return rank, alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def targets(self, module: str) -> bool:
        """Returns whether a module must have factors; False for regular expressions, which may use other names."""
        included, excluded = self.config.get("target_modules"), self.config.get("exclude_modules") or []
        layers = self.config.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers
        layer = re.search(r"\.(\d+)\.", module)
        if layers and (layer is None or int(layer[1]) not in layers):
            return False
        if isinstance(included, str) or isinstance(excluded, str):
            return included == "all-linear" and not excluded and not layers and layer is not None
        matches = lambda names: any(f".{module}".endswith(f".{name}") for name in names)  # noqa: E731
        return matches(included or []) and not matches(excluded)


class _WrongBase(Exception):
    """The adapter does not fit the base, for the reason given."""


class _Factors(NamedTuple):
    """The tensors of a module by side, the rank of its factors, and the scale of their product."""

    module: str
    tensors: dict[str, np.ndarray]
    rank: int
    scale: float

    def read(self, sides: tuple[str, ...], *shapes: tuple[int, ...]) -> list[np.ndarray]:
        """Returns the tensors of these sides, float32; `shapes` are what they must have, in the same order."""
        for side, expected in zip(sides, shapes, strict=False):
            if side not in self.tensors:
                raise _WrongBase(f"{self.module} has no lora_{side}")
            if (shape := self.tensors[side].shape) != expected:
                raise _WrongBase(f"{self.module}.lora_{side} has the shape {list(shape)}, where its rank {self.rank} "
                                 f"and this base need {list(expected)}")
        return [self.tensors[side].astype(np.float32) for side in sides]


def is_peft_adapter(directory: Path) -> bool:
    """Returns whether the directory holds an adapter, perhaps beside its base or the base's config.json."""
    return (directory / CONFIG).is_file()


def read_peft_adapter(directory: Path) -> PeftAdapter:
    """Reads an adapter, whose tensors stay on disk until they are used.

    Raises:
      CheckpointError: it is damaged, or not LoRA as implemented here.
    """
    config = read_json(directory / CONFIG)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{directory / CONFIG} has peft_type {config.get('peft_type')!r}; supported is LORA")
    check_implemented(config, _NEUTRAL, directory / CONFIG, _MERGE)
    for name in ("r", "lora_alpha"):
        require(config.get(name, 8), name, "a number", directory / CONFIG)
    for name in ("use_rslora", "use_dora", "ensure_weight_tying"):
        require(config.get(name) or False, name, "true or false", directory / CONFIG)
    stored = read_tensors(directory, (f"{TENSORS}.safetensors", f"{TENSORS}.bin"))
    tensors = {re.sub(r"\.(modules_to_save|default|base_layer)(?=\.)", "", name.removeprefix(PREFIX)): tensor
               for name, tensor in stored.items()}
    return PeftAdapter(directory, config, tensors, read_metadata(directory))


def merge_peft_adapter(adapter: PeftAdapter, model: Transformer, source: str, param_dtype: str) -> Transformer:
    """Returns a base with an adapter's products added to its kernels and tables, in float32, and full tables replaced.

    Args:
      source: of the base, for messages.

    Raises:
      CheckpointError: the adapter is for another base, or holds something that cannot be merged.
    """
    family = model.config.family
    factors: dict[str, _Factors] = {}
    tables: dict[str, np.ndarray] = {}
    for name, stored in hf_names.canonical(adapter.tensors, family).items():
        if not np.isfinite(adapter.tensors[stored]).all():
            raise CheckpointError(f"{stored} of the adapter {adapter.directory} has numbers that are not finite (NaN "
                                  "or infinity); use an earlier checkpoint of it")
        module, found, side = name.partition(".lora_")
        side = side.removesuffix(".weight")
        if found and side in (*adapter.sides, *_EMBEDDING_SIDES):
            rank_and_scale = adapter.rank_and_scale(stored.partition(".lora_")[0])
            factors.setdefault(module, _Factors(module, {}, *rank_and_scale)).tensors[side] = adapter.tensors[stored]
        elif name in (hf_names.embedding_name(family), hf_names.HEAD):
            tables[name] = adapter.tensors[stored]
        else:
            raise CheckpointError(f"the adapter {adapter.directory} holds {stored}, which cannot be merged; supported "
                                  "are LoRA's factors beside projections, the embedding and the head, and a full "
                                  "embedding or head")
    try:
        expected = (model.config.vocab_size, model.config.hidden_size)
        for name, table in tables.items():
            if table.shape != expected:
                raise _WrongBase(f"its {name} has the shape {list(table.shape)}, where this base needs "
                                 f"{list(expected)}")
        tables |= _adapted_tables(adapter, model, factors, tables)
        if missing := [name for name in map(str, adapter.config.get("modules_to_save") or ())
                       for table in (hf_names.embedding_name(family), hf_names.HEAD)
                       if f".{table}".endswith(f".{name}.weight") and table not in tables]:
            raise _WrongBase(f"it lacks {missing[0]}, which modules_to_save names")
        model = _replace_tables(adapter, model, tables, param_dtype)
        return _add_products(adapter, model, factors, param_dtype)
    except _WrongBase as error:
        raise CheckpointError(f"the adapter {adapter.directory} is damaged, or for another base than {source}: "
                              f"{error}") from error


def _find_factors(adapter: PeftAdapter, factors: Mapping[str, _Factors], module: str) -> _Factors | None:
    if module not in factors and adapter.targets(module):
        raise _WrongBase(f"it targets {module} and has no factors for it")
    return factors.get(module)


def _adapted_tables(adapter: PeftAdapter, model: Transformer, factors: dict[str, _Factors],
                    stored_tables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the embedding and head that have LoRA, with its product, float32 [vocab, embed] on the host.

    Their factors are removed from `factors`. As in PEFT, LoRA beside one of two tied tables leaves the other unchanged.
    """
    config, flat, tables = model.config, dict(nnx.to_flat_state(nnx.state(model))), {}
    for name in (embedding := hf_names.embedding_name(config.family), hf_names.HEAD):
        module = name.removesuffix(".weight")
        if (found := _find_factors(adapter, factors, module)) is None:
            continue
        del factors[module]
        if adapter.config.get("ensure_weight_tying") or (name == embedding and MAGNITUDE in adapter.sides):
            setting = "ensure_weight_tying" if adapter.config.get("ensure_weight_tying") else "use_dora"
            raise CheckpointError(f"{adapter.directory / CONFIG} sets {setting} with LoRA beside {module}, which this "
                                  f"library does not implement{_MERGE}")
        own = name == embedding or config.tie_embeddings
        table = host_float32(flat["embed", "embedding"][...] if own else flat["head", "kernel"][...].T)
        if name in stored_tables:  # PEFT may store a copy of the table that the factors are beside
            table = stored_tables[name].astype(np.float32)
        (size, width), rank = table.shape, found.rank
        if name == embedding:
            a, b = found.read(_EMBEDDING_SIDES, (rank, size), (width, rank))
            tables[name] = table + found.scale * (b @ a).T
            continue
        a, b, *magnitude = found.read(adapter.sides, (rank, width), (size, rank), (size,))
        table += found.scale * (b @ a)
        for norms in magnitude:
            table *= (norms / np.linalg.norm(table, axis=1))[:, None]
        tables[name] = table
    return tables


def _add_products(adapter: PeftAdapter, model: Transformer, factors: Mapping[str, _Factors],
                  param_dtype: str) -> Transformer:
    """Returns the model with the products of factors added to its projections."""
    graphdef, state = nnx.split(model)
    flat, unused = dict(nnx.to_flat_state(state)), set(factors)
    for linear, key in hf_names.projections(model.config).items():
        path, num_inputs = (*linear, "kernel"), functools.reduce(getattr, linear, model).num_inputs
        shape = flat[path].shape
        inputs, outputs = shape[1 : 1 + num_inputs], shape[1 + num_inputs :]
        modules = [key.name.format(i=layer).removesuffix(".weight") for layer in range(model.config.num_layers)]
        unused.difference_update(modules)
        layers = {layer: _projection(adapter, found, key, math.prod(inputs), math.prod(outputs))
                  for layer, module in enumerate(modules)
                  if (found := _find_factors(adapter, factors, module)) is not None}
        if not layers:
            continue
        rank = max(found[0].shape[1] for found in layers.values())  # smaller ranks are padded with zeros
        a = np.zeros((len(modules), math.prod(inputs), rank), np.float32)
        b = np.zeros((len(modules), rank, math.prod(outputs)), np.float32)
        kernel, magnitude = flat[path][...], None
        if MAGNITUDE in adapter.sides:  # layers without magnitudes keep their norms
            magnitude = kernel_norms(kernel, 1 + len(outputs))
        for layer, found in layers.items():
            a[layer, :, : found[0].shape[1]], b[layer, : found[1].shape[0]] = found[:2]
            if magnitude is not None:
                magnitude = magnitude.at[layer].set(found[2].reshape(outputs))
        flat[path] = flat[path].replace(merge_kernel(
            kernel, a.reshape(*shape[: 1 + num_inputs], rank), b.reshape(shape[0], rank, *outputs), 1.0, param_dtype,
            magnitude))
    if unused:
        raise _WrongBase(f"it has factors for {min(unused)}, which this base does not have")
    return nnx.merge(graphdef, nnx.from_flat_state(list(flat.items())))


def _projection(adapter: PeftAdapter, found: _Factors, key: hf_names.Key, inputs: int,
                outputs: int) -> tuple[np.ndarray, ...]:
    """Returns one projection's float32 [inputs, rank], scaled [rank, outputs] and, for DoRA, magnitudes [outputs]; its
    third of a fused module."""
    stored_outputs, rank = outputs * (1 if key.third is None else 3), found.rank
    a, b, *magnitude = found.read(adapter.sides, (rank, inputs), (stored_outputs, rank), (stored_outputs,))
    third = slice(None) if key.third is None else slice(key.third * outputs, (key.third + 1) * outputs)
    return a.T, found.scale * b[third].T, *(values[third] for values in magnitude)


def _replace_tables(adapter: PeftAdapter, model: Transformer, tables: dict[str, np.ndarray],
                    param_dtype: str) -> Transformer:
    """Returns the model with an adapter's full tables.

    As in PEFT, an embedding without its tied head leaves the head unchanged and so unties the two, unless the adapter
    says that they stay tied.
    """
    config = model.config
    embedding, head = (tables.get(name) for name in (hf_names.embedding_name(config.family), hf_names.HEAD))
    if embedding is None and head is None:
        return model
    flat = {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}
    table = flat["embed", "embedding"]
    tied = config.tie_embeddings and (bool(adapter.config.get("ensure_weight_tying")) or (
        embedding is not None and head is not None and np.array_equal(embedding, head)))
    if tied and embedding is None:
        embedding = head
    if not tied:
        old = table.T if config.tie_embeddings else flat["head", "kernel"]
        flat["head", "kernel"] = old if head is None else _place_like(head.T, old, param_dtype)
    if embedding is not None:
        flat["embed", "embedding"] = _place_like(embedding, table, param_dtype)
    config = dataclasses.replace(config, tie_embeddings=tied)
    graphdef, shapes = nnx.split(abstract_model(config, model.compute, param_dtype))
    return nnx.merge(graphdef, nnx.from_flat_state(
        [(path, shape.replace(flat[path])) for path, shape in nnx.to_flat_state(shapes)]))


def _place_like(value: np.ndarray, like: jax.Array, dtype: str) -> jax.Array:
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: value[index].astype(dtype))


def _match_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Returns the value of the first key, a regular expression, that matches the end of a module's name."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)


def host_float32(array: jax.Array) -> np.ndarray:
    """Copies an array to the host, in which every process takes part."""
    return to_host(array).astype(np.float32)
