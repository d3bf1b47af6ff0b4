"""A drafter as a user asks for it, and the opener of every kind of drafter.

The checkpoints of a run that trains one hold the drafter alone; its target is on record: see `workdir.DrafterRecord`.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dlm_jax.checkpoints.source import DRAFTER_FILE, find_base, is_workdir, locate, split_step
from dlm_jax.config_fields import check_at_least, check_choices, field
from dlm_jax.errors import CheckpointError, ConfigError
from dlm_jax.storage import read_json

if TYPE_CHECKING:
    import jax
    from etils import epath

    from dlm_jax.checkpoints.workdir import DrafterRecord
    from dlm_jax.models import Compute, Drafter, DrafterConfig, ModelConfig, Transformer


@dataclasses.dataclass(frozen=True)
class DrafterSettings:
    """The config group `drafter`."""

    num_layers: int = field(5, "layers of the drafter, of the width of the base and as many heads")
    init: Literal["random", "target"] = field(
        "random", "new layers as in Qwen3, with norms of queries and keys; or copies of the base's last ones")
    num_target_layers: int = field(5, "layers of the base whose outputs the drafter reads, evenly spread")
    target_layer_ids: tuple[int, ...] = field((), "which layers, from 0 on; empty: num_target_layers of them")
    target_dtype: Literal["float32", "bfloat16"] = field("float32", "type of the base's stored parameters")
    block_size: int = field(16, "slots of a block, the anchor's included")
    sample_from_anchor: bool = field(False, "every slot guesses the token after it (DSpark); else the token at its own "
                                            "position, and the anchor's slot none (DFlash)")
    causal: bool = field(False, "a slot sees no later slots of its block")
    sliding_window: int | None = field(None, "tokens of the text that sliding_layers see")
    sliding_layers: tuple[int, ...] = field((), "layers of the drafter, from 0 on, that see sliding_window tokens")
    sliding_causal: bool = field(True, "the same as causal, for sliding_layers")
    markov_rank: int = field(0, "rank of a head that adds logits by the token before (DSpark); 0: none")
    markov_head: Literal["vanilla", "gated", "rnn"] = field("vanilla", "what else these logits depend on: nothing; the "
                                                            "hidden state; it and the earlier tokens of the block")
    confidence_head: bool = field(False, "also learn how likely each guess is accepted (DSpark)")
    conv_kernel_size: int = field(0, "slots of the block that convolutions see (DFlash2); 0: none")
    conv_group_size: int = field(16, "channels that share the part of a convolution that depends on its input")
    selector_rank: int = field(0, "rank of the scores of a choice among candidates (DFlash2); 0: none")
    selector_top_k: int = field(16, "candidates for each token")

    def __post_init__(self) -> None:
        check_choices(self, "drafter")
        check_at_least(self.num_layers, 1, "drafter.num_layers")
        check_at_least(self.num_target_layers, 1, "drafter.num_target_layers")


def resolve_drafter(settings: DrafterSettings, target: "ModelConfig", mask_token_id: int) -> "DrafterConfig":
    """Returns the architecture of a new drafter for a target.

    Raises:
      ConfigError: the settings do not go together, or do not fit the target.
    """
    from dlm_jax.models import DrafterConfig, spread_layer_ids  # here, as a recipe is checked before JAX is imported

    layers = dataclasses.replace(
        target, num_layers=settings.num_layers, sliding_window=settings.sliding_window, full_attention_layers=(),
        sliding_rope_theta=None, scale_embeddings=False, logit_softcap=None, embed_dropout=0.0, attention_dropout=0.0,
        residual_dropout=0.0)
    if settings.init == "random":
        if target.experts is not None:
            layers = dataclasses.replace(layers, mlp_size=target.mlp_size * target.experts.num_experts_per_tok)
        layers = dataclasses.replace(
            layers, family="qwen3", norm="rms", activation="silu", gated_mlp=True, positions="rope", qkv_bias=False,
            out_bias=False, mlp_bias=False, qk_norm=True, post_norms=False, query_pre_attn_scalar=None,
            attention_softcap=None, experts=None)
    elif settings.num_layers > target.num_layers:
        raise ConfigError(f"drafter.num_layers {settings.num_layers} is more than the {target.num_layers} layers of "
                          "the base, whose last ones it copies; set drafter.init to random")
    ids = settings.target_layer_ids or spread_layer_ids(target.num_layers, settings.num_target_layers)
    names = {item.name for item in dataclasses.fields(DrafterConfig)} & {
        item.name for item in dataclasses.fields(DrafterSettings)} - {"target_layer_ids"}
    return DrafterConfig(layers, target_layer_ids=ids, mask_token_id=mask_token_id,
                         **{name: getattr(settings, name) for name in sorted(names)})


class StoredDrafter(NamedTuple):
    """A drafter, and the source of the target that it was trained for, None where its files do not say."""

    drafter: "Drafter"
    target: str | None


def open_drafter(source: "epath.PathLike", *, target: "Transformer | None" = None, compute: "Compute | None" = None,
                 param_dtype: str | None = None, sharding: "jax.sharding.Sharding | None" = None) -> StoredDrafter:
    """Loads a drafter of any kind; `DraftedModel(target, drafter)` joins it to its target.

    Args:
      source: the workdir of a run, its `@step` or `@best`; a directory or a hub id in the layout dflash, dspark or
        dflash2, or one of speculators.
      target: the model that it guesses for; None: whether it fits a target is not checked.
      compute: how it is computed; None: in float32.
      param_dtype: "float32" or "bfloat16"; None: the run's, else float32.
      sharding: of every parameter; None: on the first device.

    Raises:
      CheckpointError: there is no drafter, it is damaged or not supported, or it is another model's.
    """
    import jax

    from dlm_jax.checkpoints.drafter_layouts import check_target, read_drafter
    from dlm_jax.models import Compute

    compute, sharding = compute or Compute(), sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if not is_workdir(source):
        return StoredDrafter(read_drafter(str(source), target, compute, param_dtype or "float32", sharding), None)
    stored = _open_run(source, compute, param_dtype, sharding)
    if target is not None:
        check_target(stored.drafter, target, source)
    return stored


def recorded_target(source: "epath.PathLike") -> str | None:
    """Returns the source of the target that a drafter was trained for; None where its files do not say.

    Raises:
      CheckpointError: there is no drafter.
    """
    if not is_workdir(source):
        locate(str(source), weights=False)
        return None
    return find_base(_read_record(source).source, split_step(source)[0])


def _read_record(source: "epath.PathLike") -> "DrafterRecord":
    from dlm_jax.checkpoints.workdir import DrafterRecord

    record = DrafterRecord.read(split_step(source)[0])
    if record is None:
        raise CheckpointError(f"{source} is not the workdir of a run that trains a drafter; it has no {DRAFTER_FILE}")
    return record


def _open_run(source: "epath.PathLike", compute: "Compute", param_dtype: str | None,
              sharding: "jax.sharding.Sharding") -> StoredDrafter:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from dlm_jax.checkpoints.orbax import resolve_step, restore_params
    from dlm_jax.models import abstract_drafter

    record, (workdir, step) = _read_record(source), split_step(source)
    stored_dtype = read_json(workdir / "config.json")["model.param_dtype"]
    graphdef, shapes = nnx.split(abstract_drafter(record.config, compute, stored_dtype))
    layout = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)
    params: Any = restore_params(workdir, resolve_step(workdir, step), nnx.State({"drafter": layout}))["drafter"]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(param_dtype or stored_dtype)), params)
    return StoredDrafter(nnx.merge(graphdef, params), find_base(record.source, workdir))
