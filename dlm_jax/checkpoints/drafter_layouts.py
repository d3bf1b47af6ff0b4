"""Reads and writes drafters as directories that inference engines load: config.json, safetensors, a model card.

The layouts are in `drafter_config`. Embedding and head are the target's; where a file has copies of them, they must be
equal to the target's.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Sharding

from dlm_jax.checkpoints import hf_names
from dlm_jax.checkpoints.card import drafter_card
from dlm_jax.checkpoints.drafter_config import drafter_to_hf, layout_of, read_drafter_config
from dlm_jax.checkpoints.hf_import import check_tensors, stream_parameters
from dlm_jax.checkpoints.hf_names import Key
from dlm_jax.checkpoints.hf_tensors import LazyTensor, fetch, read_tensors, write_tensors
from dlm_jax.checkpoints.source import locate
from dlm_jax.errors import CheckpointError, ConfigError
from dlm_jax.models import Compute, DraftedModel, Drafter, Transformer, abstract_drafter
from dlm_jax.parallel import to_host
from dlm_jax.storage import atomic_directory, write_json

if TYPE_CHECKING:
    from dlm_jax.checkpoints.pretrained import Pretrained

# The names and layouts of a drafter's tensors; those of its layers are a model's, without "model.".
_KEYS = {
    "fc.kernel": Key("fc.weight", "io->oi"),
    "hidden_norm.scale": Key("hidden_norm.weight"),
    "blocks.attention_conv.base": Key("layers.{i}.attention_conv.base_kernel"),
    "blocks.attention_conv.dynamic.kernel": Key("layers.{i}.attention_conv.kernel_projection.weight", "dstg->(stg)d"),
    "blocks.mlp_conv.base": Key("layers.{i}.mlp_conv.base_kernel"),
    "blocks.mlp_conv.dynamic.kernel": Key("layers.{i}.mlp_conv.kernel_projection.weight", "dstg->(stg)d"),
    "markov.previous": Key("markov_head.markov_w1.weight"),
    "markov.next": Key("markov_head.markov_w2.weight"),
    "markov.gate.kernel": Key("markov_head.gate_proj.weight", "io->oi"),
    "markov.gate.bias": Key("markov_head.gate_proj.bias"),
    "markov.joint.kernel": Key("markov_head.joint_proj.weight", "io->oi"),
    "markov.joint.bias": Key("markov_head.joint_proj.bias"),
    "confidence_head.kernel": Key("confidence_head.proj.weight", "io->oi"),
    "confidence_head.bias": Key("confidence_head.proj.bias"),
    "selector.predecessors": Key("candidate_selector.predecessor_codebook"),
    "selector.successors": Key("candidate_selector.successor_codebook"),
    "selector.projection.kernel": Key("candidate_selector.hidden_projection.weight", "io->oi"),
} | {path: key._replace(name=key.name.removeprefix("model.")) for path, key in hf_names.KEYS["qwen3"].items()
     if path.startswith(("blocks.", "final_norm."))}  # fmt: skip

_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"
_COPIES = (_EMBEDDING, _HEAD)


def read_drafter(source: str, target: Transformer | None, compute: Compute, param_dtype: str,
                 sharding: Sharding) -> Drafter:
    """Reads a drafter in the layout dflash, dspark or dflash2, or one of speculators; see `drafter.open_drafter`."""
    directory = locate(source)
    layout, config, settings = read_drafter_config(directory)
    tensors = {_published_name(name): tensor for name, tensor in read_tensors(directory).items()}
    drafter = abstract_drafter(config, compute, param_dtype)
    graphdef, shapes = nnx.split(drafter)
    expected = hf_names.stored_shapes(_KEYS, shapes)
    needs_copies = layout == "dspark" and not settings.keys() & {"speculators", "projector_type"}  # DeepSpec's own
    table = (config.layers.vocab_size, config.layers.hidden_size)
    expected |= {name: table for name in _COPIES if needs_copies or name in tensors}
    check_tensors(tensors, expected, directory, "drafter")
    if target is not None:
        check_target(drafter, target, source, settings.get("num_target_layers"))
        _check_copies({name: tensors[name] for name in _COPIES if name in tensors}, target, directory)
    shardings = [sharding] * len(jax.tree.leaves(shapes))
    return nnx.merge(graphdef, nnx.from_flat_state(list(stream_parameters(tensors, _KEYS, shapes, shardings))))


def check_target(drafter: Drafter, target: Transformer, source: epath.PathLike, num_layers: int | None = None) -> None:
    """Raises CheckpointError unless a drafter, perhaps with shapes in place of arrays, fits a target.

    Args:
      source: of the drafter, for the message.
      num_layers: of the target that the drafter was trained for; None where unknown.
    """
    try:
        DraftedModel(target, drafter)
    except ConfigError as error:
        raise CheckpointError(f"{source} is another model's drafter: {error}") from error
    if num_layers not in (None, target.config.num_layers):
        raise CheckpointError(f"{source} is the drafter of a model of {num_layers} layers, and the target has "
                              f"{target.config.num_layers}; use the target that it was trained for")


def save_drafter(directory: epath.PathLike, drafter: Drafter, target: "Pretrained", layout: str | None = None, *,
                 dtype: str = "float32", max_shard_bytes: float = 5e9) -> None:
    """Writes a drafter as engines load it, with a model card.

    The directory appears complete or not at all, and replaces an earlier export. With several processes all call this,
    and the first writes.

    Args:
      target: the model that it guesses for, whose embedding and head go with it in the layout dspark.
      layout: "dflash", "dspark" or "dflash2"; None: the one that can express the drafter.
      dtype: of the stored weights, "float32" or "bfloat16".
      max_shard_bytes: larger weights are split into several files with an index.

    Raises:
      CheckpointError: the drafter does not fit the layout or the target, or the directory holds something else.
    """
    fits = layout_of(drafter.config)
    if layout not in (None, fits):
        raise CheckpointError(f"the layout {layout} cannot express this drafter; choose {fits}")
    check_target(drafter, target.model, "this")
    special = {name: getattr(target, name) for name in ("bos_token_id", "eos_token_id")}
    hf_config = drafter_to_hf(drafter.config, target.model.config, special, dtype)
    tensors = named_tensors(drafter)
    if fits == "dspark":
        tensors |= _copies(target.model)
    if jax.process_index() > 0:  # gathering a tensor takes every process
        for name, tensor in tensors.items():
            fetch(name, tensor, jnp.dtype(dtype))
        return
    with atomic_directory(directory) as folder:
        write_tensors(folder, tensors, jnp.dtype(dtype), max_shard_bytes)
        write_json(folder / "config.json", hf_config)
        size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(drafter)))
        (folder / "README.md").write_text(drafter_card(drafter.config, fits, target.source, size, dtype))


def named_tensors(drafter: Drafter) -> dict[str, LazyTensor]:
    """Returns every tensor of a drafter by its published name."""
    return hf_names.named_tensors(_KEYS, nnx.state(drafter))


def _copies(target: Transformer) -> dict[str, LazyTensor]:
    """Returns the target's embedding and head, [vocab, embed] each, by their names in a drafter's files."""
    tied, kernel, table = target.head is None, target.head_kernel[...], target.embed.embedding
    return {_EMBEDDING: LazyTensor(table.shape, lambda: to_host(table[...])),
            _HEAD: LazyTensor(table.shape, lambda: to_host(kernel) if tied else to_host(kernel).T)}


def _check_copies(stored: dict[str, np.ndarray], target: Transformer, directory: Path) -> None:
    """Refuses copies of embedding and head that differ from the target's, as far as both types tell."""
    for name, tensor in stored.items():
        table = _copies(target)[name].values()
        dtype = min(tensor.dtype, table.dtype, key=lambda dtype: dtype.itemsize)
        rows = 1024  # at a time: they are read from disk
        if not all(np.array_equal(tensor[i : i + rows].astype(dtype), table[i : i + rows].astype(dtype))
                   for i in range(0, len(tensor), rows)):
            raise CheckpointError(f"{directory} is another model's drafter, or its embedding and head were trained: "
                                  f"its {name} is not the target's; use the target that it was trained for")


def _published_name(name: str) -> str:
    """Returns the name of a tensor without the suffix that transformers gives to the selector's tables."""
    return name.removesuffix(".weight") if name.endswith("_codebook.weight") else name
